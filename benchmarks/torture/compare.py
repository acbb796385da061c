"""Whether two folders hold the same results: checkpoints bit for bit, records line by line."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorflow_datasets as tfds

CHECKPOINTS = "checkpoints"
# A lock, what tells of machine, time and command, and pages that are drawn from the records.
IGNORED = {".lock", "versions.json", "report.html", "table.md", "tensorboard"}


def differences(whole: Path, other: Path) -> list[str]:
    """What is not the same in two folders of runs, exports or data; [] if nothing is.

    Times and speeds are left out, and what a kill may leave behind under a name that begins with a dot.
    """
    return [*_difference(whole, other)]


def leftovers(folder: Path) -> list[str]:
    """Unfinished files and folders in a folder, which no reader takes for a result."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name not in IGNORED)


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint's state by their names."""
    reader = ocp.PyTreeCheckpointHandler()
    state = checkpoint.absolute() / "state"
    like = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(state).tree)
    with ocp.Checkpointer(reader) as checkpointer:
        tree = checkpointer.restore(state, args=ocp.args.PyTreeRestore(restore_args=like))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def _difference(whole: Path, other: Path) -> Iterator[str]:
    wanted, found = _files(whole), _files(other)
    yield from (f"{name} is missing" for name in sorted(wanted - found))
    yield from (f"{name} is too much" for name in sorted(found - wanted))
    for name in sorted(wanted & found):
        if Path(name).parent.name == CHECKPOINTS:
            yield from (f"{name}: {text}" for text in _checkpoint(whole / name, other / name))
        else:
            yield from (f"{name}: {text}" for text in _file(whole / name, other / name))


def _files(folder: Path) -> set[str]:
    """Relative paths of all files; a checkpoint counts as one."""
    found = set()
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if any(part in IGNORED or part.startswith(".") for part in parts):
            continue
        if CHECKPOINTS in parts:
            depth = parts.index(CHECKPOINTS) + 2
            found |= {str(Path(*parts[:depth]))} if len(parts) >= depth else set()
        elif path.is_file():
            found.add(str(path.relative_to(folder)))
    return found


def _file(whole: Path, other: Path) -> Iterator[str]:
    if whole.suffix == ".jsonl":
        yield from _lines(whole.read_text(), other.read_text())
    elif ".array_record" in whole.name:  # a record is a protobuf map, whose fields have no fixed order
        if _records(whole) != _records(other):
            yield "has other records"
    elif whole.name == "table.csv":
        if _rows(whole) != _rows(other):
            yield "has other numbers"
    elif whole.suffix == ".json" and whole.name != "config.json":
        if _timeless(json.loads(whole.read_text())) != _timeless(json.loads(other.read_text())):
            yield "has other values"
    elif whole.read_bytes() != other.read_bytes():
        yield "has other bytes"


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a split of a TFDS data set, in order; the path is NAME-SPLIT.array_record-..."""
    split = path.name.partition(".")[0].rpartition("-")[2]
    source = tfds.builder_from_directory(path.parent).as_data_source(split)
    return [source[i] for i in range(len(source))]


def _lines(whole: str, other: str) -> Iterator[str]:
    if other and not other.endswith("\n"):
        yield "ends in a torn line"
    ours, theirs = whole.splitlines(), other.splitlines()
    if len(ours) != len(theirs):
        yield f"has {len(theirs)} lines, not {len(ours)}"
    for number, (a, b) in enumerate(zip(ours, theirs), start=1):
        try:
            same = _timeless(json.loads(a)) == _timeless(json.loads(b))
        except ValueError:
            yield f"line {number} is not JSON"
            return
        if not same:
            yield f"line {number} differs: {b[:120]}"
            return


def _timeless(value: Any) -> Any:
    """A record without times and speeds."""
    if not isinstance(value, dict):
        return value
    return {k: v for k, v in value.items() if not k.startswith(("seconds", "tokens_per_second"))}


def _rows(path: Path) -> list[dict[str, str]]:
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def _parts(folder: Path) -> list[Path]:
    """The files of a part of a checkpoint, but for Orbax's note of the path that it was written to."""
    return [path for path in folder.glob("[a-z]*") if path.is_file() and path.name != "commit_success.txt"]


def _checkpoint(whole: Path, other: Path) -> Iterator[str]:
    for part in ("prompts", "metrics"):
        ours, theirs = ({p.name: p.read_bytes() for p in _parts(folder / part)} for folder in (whole, other))
        if ours != theirs:
            yield f"other {part}"
    ours, theirs = arrays(whole), arrays(other)
    if ours.keys() != theirs.keys():
        yield "other arrays"
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape) or a.tobytes() != b.tobytes():
            yield f"{name} has other bits"
