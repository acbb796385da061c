"""The inputs that the fuzz campaign damages, and the public path by which each is read."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf as gguf_package
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from absl import flags

from opd_jax import data
from opd_jax.config import run
from opd_jax.errors import UserError
from opd_jax.models import tokenizers, transformer
from opd_jax.models.files import hf, source, weights
from opd_jax.run import prepare
from tests import tiny

# Kind of input -> the file that is damaged.
FILES = {
    "safetensors": "model/model.safetensors",
    "config.json": "model/config.json",
    "generation_config.json": "model/generation_config.json",
    "tokenizer.json": "model/tokenizer.json",
    "tokenizer_config.json": "model/tokenizer_config.json",
    "chat template": "model/chat_template.jinja",
    "index": "sharded/model.safetensors.index.json",
    "GGUF": "model.gguf",
    "JSONL": "prompts.jsonl",
    "JSON": "prompts.json",
    "CSV": "prompts.csv",
    "parquet": "prompts.parquet",
    "override": "override/words.txt",
}

RECIPE = """\
from pathlib import Path
from tests import tiny


def get_config():
    return tiny.config(Path(__file__).parent)
"""


def write(folder: Path) -> None:
    """Writes a sound file of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    hf.save(folder / "model", tiny.STUDENT, tiny.student_params(), tiny.tokenizer())
    whole, hf.SHARD_BYTES = hf.SHARD_BYTES, 20_000
    hf.save(folder / "sharded", tiny.STUDENT, tiny.student_params(), tiny.tokenizer())
    hf.SHARD_BYTES = whole
    _write_gguf(folder / "model.gguf")
    rows: list[dict[str, Any]] = [{"prompt": f"What is {n} + {n}?", "answer": f"{2 * n}"} for n in range(6)]
    chats = [{"messages": [{"role": "user", "content": "What?"}], "tools": []}, {"question": "Who?"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *chats]))
    (folder / "prompts.json").write_text(json.dumps([*rows, *chats], indent=1))
    lines = ["prompt,answer", *(f'"{row["prompt"]}",{row["answer"]}' for row in rows)]
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "prompts.parquet")
    (folder / "override").mkdir()
    tiny.save_pair(folder / "override")
    (folder / "override" / "words.txt").write_text("--config.train.steps=8")
    (folder / "override" / "recipe.py").write_text(RECIPE)


def _write_gguf(file: Path) -> None:
    """A GGUF file of the tiny student, with its tokenizer."""
    model, tokenizer = tiny.STUDENT, tiny.tokenizer()
    writer = gguf_package.GGUFWriter(file, model.family)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.max_positions)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    texts = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list([*texts, "ab", "cd"])
    writer.add_token_types([1] * 256 + [3] * 3 + [1] * 2)
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(tiny.END)
    writer.add_pad_token_id(tiny.PAD)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)
    params, axes = tiny.student_params(), transformer.logical_axes(model)
    for tensor in weights.tensors(model, "gguf"):
        value, names = params, axes
        for key in tensor.path:
            value, names = value[key], names[key]
        value = np.asarray(value[tensor.index])
        writer.add_tensor(tensor.name, weights.to_stored(tensor, value, names))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def place(kind: str, sound: Path, folder: Path, damaged: bytes) -> None:
    """Puts a damaged file among the sound ones that are read with it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = Path(FILES[kind])
    if len(file.parts) > 1:
        shutil.copytree(sound / file.parent, folder / file.parent)
    (folder / file).write_bytes(damaged)


def read(kind: str, folder: Path) -> None:
    """Reads the files in a folder as a command does.

    Raises:
      UserError: it cannot be used.
    """
    file = folder / FILES[kind]
    if kind in ("JSONL", "JSON", "CSV", "parquet"):
        config = tiny.config(folder, **{"data.path": str(file), "data.heldout": 2}).data
        config.source = "parquet" if kind == "parquet" else "jsonl"
        data.load(config, tiny.tokenizer())
    elif kind == "override":
        _command(
            [
                f"--config={file.with_name('recipe.py')}",
                *file.read_text(errors="surrogateescape").splitlines(),
            ]
        )
    elif kind == "GGUF":
        _use(file)
    else:
        _use(file.parent)


def _use(path: Path) -> None:
    """Loads a model and its tokenizer, and renders a prompt.

    Raises:
      AssertionError: a weight is not finite.
    """
    model, params = source.load(path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params)), "weights that are not finite"
    tokenizer = tokenizers.load(path)
    tokenizers.end_ids(tokenizer, model)
    tokenizers.token_bytes(tokenizer)
    tokenizers.render(tokenizer, [{"role": "user", "content": "What is 2?"}], "record 1")


def _command(words: list[str]) -> None:
    """Parses a command line and checks its config, in a process of its own.

    Raises:
      UserError: it ends in one line and status 2.
      AssertionError: it ends in anything else but status 0.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        pid = os.fork()
        if not pid:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.argv = ["train", *words]
            code = 1
            try:
                run(lambda argv: prepare(flags.FLAGS.config) and None)
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        text = said.read()
    if code == 0:
        return
    last = text.splitlines()[-1] if text.splitlines() else ""
    assert code == 2 and last.startswith("error: "), f"status {code}: {last[:200]}"
    assert len(last) <= 507 and "Traceback" not in text, f"{len(last)} characters: {last[:200]}"
    raise UserError(last)
