"""Where prompts come from: the built-in demo, JSONL files and TFDS datasets, as conversations."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opd_jax.errors import UserError

QUESTION_COLUMNS = ("prompt", "question", "problem")


class Conversation(NamedTuple):
    """Messages ({"role", "content"}), the last one wanting a reply, and the answer if known."""

    messages: list[dict[str, str]]
    answer: str | None


def read_demo(cache: str | None) -> tuple[list[Conversation], list[Conversation]]:
    """The built-in (train, heldout) conversations, built under `cache` where they are not there.

    `cache` None is `$XDG_CACHE_HOME/opd_jax`, or `~/.cache/opd_jax` without that variable.
    """
    import tensorflow_datasets as tfds  # half a second to three, so only where it is used

    from opd_jax.prompts import demo

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd_jax"
    folder = demo.prepare(Path(cache or base).expanduser())
    source = tfds.builder_from_directory(folder).as_data_source()
    train, heldout = (_from_columns(source[split]) for split in ("train", "heldout"))
    shared = {c.messages[0]["content"] for c in train} & {
        c.messages[0]["content"] for c in heldout
    }
    assert not shared, f"demo prompts both trained on and held out: {shared}"
    return train, heldout


def read_tfds(path: str) -> list[Conversation]:
    """Reads the "train" split of a prepared folder, or of a dataset by its TFDS name."""
    import tensorflow_datasets as tfds

    if not path:
        raise UserError("data.path is empty: data.source=tfds needs a dataset name or a folder")
    try:
        if Path(path).expanduser().is_dir():
            source = tfds.builder_from_directory(Path(path).expanduser()).as_data_source("train")
        else:
            array_record = {"file_format": "array_record"}
            source = tfds.data_source(path, split="train", builder_kwargs=array_record)
    # TFDS raises whatever its readers raise: an unknown name, a missing split, a tfrecord file.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"data.path={path}: TFDS cannot read a 'train' split from it ({reason}); name a TFDS"
            " dataset or folder in array_record or parquet files"
        ) from error
    return _from_columns(source, path)


def _from_columns(source: Sequence[Mapping[str, Any]], path: str = "") -> list[Conversation]:
    def text(value: Any) -> str:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)

    rows = [source[i] for i in range(len(source))]
    column = next((name for name in QUESTION_COLUMNS if rows and name in rows[0]), None)
    if column is None:
        raise UserError(
            f"data.path={path}: the dataset has none of the columns {', '.join(QUESTION_COLUMNS)};"
            f" it has {', '.join(sorted(rows[0])) if rows else 'no rows'}"
        )
    return [
        Conversation(
            [{"role": "user", "content": text(row[column])}],
            (text(row["answer"]) or None) if "answer" in row else None,
        )
        for row in rows
    ]


def read_jsonl(path: str) -> list[Conversation]:
    """Reads lines of {"prompt": str} or {"messages": [{"role", "content"}]}, "answer" optional."""
    if not path or not Path(path).expanduser().is_file():
        raise UserError(f"data.path={path!r}: no such file; data.source=jsonl needs a JSONL file")
    conversations = []
    with open(Path(path).expanduser(), encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    conversations.append(_conversation(json.loads(line)))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise UserError(
                        f"data.path={path}: line {number} is not an object with 'prompt' (a string)"
                        " or 'messages' (roles and contents, the last not the assistant's):"
                        f" {type(error).__name__}: {error}"
                    ) from error
    if not conversations:
        raise UserError(f"data.path={path}: the file holds no prompts")
    return conversations


def _conversation(record: Mapping[str, Any]) -> Conversation:
    if "messages" in record:
        messages = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
    else:
        messages = [{"role": "user", "content": record["prompt"]}]
    for value in (text for message in messages for text in message.values()):
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is not a string")
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("there is nothing to answer")
    answer = record.get("answer")
    return Conversation(messages, None if answer is None else str(answer))
