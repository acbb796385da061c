"""Where prompts come from, as conversations: the demo, files, TFDS datasets, reasoning-gym's generators.

The columns of the data sets in `datasets.json` are known; a file that lacks one of them is refused.
"""

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from ml_collections import ConfigDict

from opd_jax.data.prompts import generated, records
from opd_jax.data.prompts.conversations import (
    PROMPT_COLUMNS,
    QUESTION_COLUMNS,
    Columns,
    Conversation,
    conversation,
    reference,
)
from opd_jax.errors import UserError, reason

DATASETS_FILE = Path(__file__).with_name("datasets.json")


class Part(NamedTuple):
    """One source of prompts.

    Attributes:
      kind: one of KINDS.
      path: its file, folder or task.
      columns: where prompts and answers are.
      weight: in a mixture.
    """

    kind: str
    path: str
    columns: Columns
    weight: float


@functools.cache
def datasets() -> dict[str, dict[str, str]]:
    """Data sets with known columns: name -> title, and the columns of prompt and answer."""
    return json.loads(DATASETS_FILE.read_text(encoding="utf-8"))


FILES = ("jsonl", "parquet")
KINDS = (*FILES, *datasets(), "tfds", "rg")


def parse_mixture(entries: Sequence[str]) -> list[Part]:
    """Parts of `data.mixture`: "WEIGHT KIND:PATH [prompt=COLUMN] [answer=COLUMN]".

    Raises:
      UserError: an entry has another form.
    """
    parts = []
    for entry in entries:
        try:
            weight, source, *columns = entry.split()
            kind, _, path = source.partition(":")
            named = {name: value for name, _, value in (column.partition("=") for column in columns)}
            part = Part(kind, path, Columns(**named), float(weight))
            usable = kind in KINDS and path and 0 < part.weight < float("inf")
        except (TypeError, ValueError):
            usable = False
        if not usable:
            raise UserError(
                f"data.mixture: {entry!r} is not 'WEIGHT KIND:PATH [prompt=COLUMN] [answer=COLUMN]' with a "
                f"weight above 0 and a kind of {', '.join(KINDS)}; write for example '2 jsonl:a.jsonl'"
            )
        parts.append(part)
    if not parts:
        raise UserError("data.mixture is empty: data.source=mixture needs entries such as '1 rg:chain_sum'")
    return parts


def read(part: Part, config: ConfigDict) -> list[Conversation]:
    """Reads the conversations of one source other than the demo; `config` is the data section."""
    if part.kind == "rg":
        where = f"data.source=rg:{part.path}"
        pairs = generated.generate(part.path, config.generated, config.generated_seed, where)
        return [Conversation([{"role": "user", "content": q}], answer or None) for q, answer in pairs]
    if part.kind == "tfds":
        return read_tfds(part.path, part.columns)
    if part.kind in datasets():
        return read_dataset(part.kind, part.path)
    return read_file(part.path, part.columns)


def read_demo(cache: str | None) -> tuple[list[Conversation], list[Conversation]]:
    """The built-in (train, heldout) conversations; builds them under `cache` unless they are there.

    With `cache` None the folder is `$XDG_CACHE_HOME/opd_jax`, or `~/.cache/opd_jax` without that variable.
    """
    from opd_jax.data.prompts import demo

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd_jax"
    folder = demo.prepare(Path(cache or base).expanduser())
    source = _builder(folder).as_data_source()
    train, heldout = (_from_columns(source[split]) for split in ("train", "heldout"))
    shared = {c.messages[0]["content"] for c in train} & {c.messages[0]["content"] for c in heldout}
    assert not shared, f"demo prompts both trained on and held out: {shared}"
    return train, heldout


def read_tfds(path: str, columns: Columns | None = None) -> list[Conversation]:
    """Reads the "train" split of a prepared folder, or of a dataset by its TFDS name."""
    import tensorflow_datasets as tfds

    if not path:
        raise UserError("data.path is empty: data.source=tfds needs a dataset name or a folder")
    try:
        if Path(path).expanduser().is_dir():
            source = _builder(Path(path).expanduser()).as_data_source("train")
        else:
            array_record = {"file_format": "array_record"}
            source = tfds.data_source(path, split="train", builder_kwargs=array_record)
    # TFDS passes on all errors of its readers: an unknown name, a missing split, a tfrecord file.
    except Exception as error:
        if path.startswith("huggingface:"):
            raise UserError(
                f"data.path={path}: TFDS cannot fetch it ({reason(error)}); it needs the package datasets and"
                " the network once; or download the file and use data.source=parquet or jsonl"
            ) from error
        raise UserError(
            f"data.path={path}: TFDS cannot read a 'train' split from it ({reason(error)}); name a TFDS"
            " dataset or folder in array_record or parquet files"
        ) from error
    # One split is one source; TFDS's type also allows a tree of several.
    return _from_columns(cast(Sequence[Mapping[str, Any]], source), path, columns)


def _builder(folder: Path) -> Any:
    """The TFDS builder of a prepared folder; Any, because its decorated methods hide their signatures."""
    import tensorflow_datasets as tfds  # takes up to three seconds

    return tfds.builder_from_directory(folder)


def _from_columns(
    source: Sequence[Mapping[str, Any]], path: str = "", columns: Columns | None = None
) -> list[Conversation]:
    def text(value: Any) -> str:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)

    columns = columns or Columns()
    rows = [source[i] for i in range(len(source))]
    wanted = (columns.prompt,) if columns.prompt else QUESTION_COLUMNS
    column = next((name for name in wanted if rows and records.field(rows[0], name) is not None), None)
    if column is None:
        raise UserError(
            f"data.path={path}: the dataset has none of the columns {', '.join(wanted)}; it has"
            f" {', '.join(sorted(rows[0])) if rows else 'no rows'}; set data.columns.prompt"
        )
    answers = [records.field(row, columns.answer or "answer") for row in rows]
    if columns.answer and all(answer is None for answer in answers):
        raise _absent(columns.answer, path, rows[0])
    return [
        Conversation(
            [{"role": "user", "content": text(records.field(row, column))}],
            reference(text(answer) if isinstance(answer, bytes) else answer),
        )
        for row, answer in zip(rows, answers, strict=True)
    ]


def _absent(column: str, path: str, names: Iterable[str]) -> UserError:
    return UserError(
        f"data.columns.answer={column}: no record of {path} has it; it has {', '.join(sorted(names))}; name"
        " one, or leave it empty"
    )


def read_file(path: str, columns: Columns | None = None, *, replies: bool = False) -> list[Conversation]:
    """Reads a file of records, each a conversation.

    Without a named column for the prompt, a record has "messages" ([{"role", "content"}]) or a string in
    "prompt", "question" or "problem"; "answer" and "tools" are optional. A named column holds a string or
    messages.

    Args:
      replies: whether each conversation ends with the assistant's reply, to be learnt.

    Raises:
      UserError: the file or a record has another form, or no record has the named answer.
    """
    columns = columns or Columns()
    prompts = (columns.prompt,) if columns.prompt else PROMPT_COLUMNS
    rows = records.read(path, "data.path", (*prompts, "tools", columns.answer or "answer"))
    if columns.answer and all(records.field(row, columns.answer) is None for row in rows):
        raise _absent(columns.answer, path, records.names(path, "data.path"))
    return _conversations(rows, path, columns, replies)


def read_dataset(name: str, path: str) -> list[Conversation]:
    """Reads a file of one of `datasets()`.

    Raises:
      UserError: there is no such file, or a record lacks one of the data set's columns.
    """
    known = datasets()[name]
    wanted = known["prompt"], known["answer"]
    rows = records.read(path, "data.path", wanted)
    for number, row in enumerate(rows, start=1):
        missing = [column for column in wanted if records.field(row, column) in (None, "")]
        if missing:
            there = ", ".join(records.names(path, "data.path") if number == 1 else row)
            raise UserError(
                f"data.source={name}: record {number} of data.path={path} lacks {' and '.join(missing)}; "
                f"{known['title']} has {' and '.join(wanted)}, and it has {there}; give that data set's "
                "file, or use data.source=jsonl with data.columns"
            )
    return _conversations(rows, path, Columns(*wanted))


def _conversations(
    rows: Sequence[Mapping[str, Any]], path: str, columns: Columns, replies: bool = False
) -> list[Conversation]:
    found = []
    for number, record in enumerate(rows, start=1):
        try:
            found.append(conversation(record, columns, replies=replies))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            wanted = (
                "'messages' that end in an assistant's reply"
                if replies
                else ("'prompt' (a string) or 'messages' (roles and contents, the last not the assistant's)")
            )
            raise UserError(
                f"data.path={path}: record {number} can't be used ({type(error).__name__}: {error}); give"
                f" {wanted}, or name the column in data.columns.prompt"
            ) from error
    return found


def read_turns(path: str) -> list[dict[str, str]]:
    """Reads `data.few_shot`: a user's and an assistant's turn for each {"prompt", "response"}.

    Raises:
      UserError: the file or a record has another form.
    """
    turns = []
    for number, record in enumerate(records.read(path, "data.few_shot"), start=1):
        pair = record.get("prompt"), record.get("response")
        if not all(isinstance(text, str) for text in pair):
            raise UserError(
                f"data.few_shot={path}: record {number} needs the strings 'prompt' and 'response'"
            )
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
    return turns
