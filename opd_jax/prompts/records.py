"""Files of records (JSONL, JSON, CSV, parquet) as a list of objects, and fields by a dotted path."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opd_jax.errors import UserError

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


def read(path: str, key: str) -> list[dict[str, Any]]:
    """The records of a file, by the ending of its name.

    Args:
      path: the file; or several, in the order of their names, where its name has a *.
      key: the config key or flag that names the file, for messages.

    Raises:
      UserError: no such file, another ending, a line that is no object, or no record at all.
    """
    where = Path(path).expanduser()
    if "*" in where.name:
        found = sorted(where.parent.glob(where.name))
        if not found:
            raise UserError(f"{key}={path}: no file has such a name; check the folder and the pattern")
        return [record for file in found for record in read(str(file), key)]
    if not path or not where.is_file():
        raise UserError(f"{key}={path!r}: no such file; give one of {', '.join(ENDINGS)}")
    if where.suffix not in ENDINGS:
        raise UserError(f"{key}={path}: unknown kind of file; give one of {', '.join(ENDINGS)}")
    if where.suffix == ".parquet":
        records = _parquet(where, key)
    elif where.suffix == ".csv":
        with open(where, encoding="utf-8-sig", newline="") as file:
            records = list(csv.DictReader(file))
    elif where.suffix == ".json":
        records = _json(where, key)
    else:
        records = list(_lines(where, key))
    if not records:
        raise UserError(f"{key}={path}: the file holds no records")
    return records


def field(record: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none. A name with a dot in it wins."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def first_field(record: Mapping[str, Any], paths: Iterable[str]) -> Any:
    """The first value among several dotted paths that is there and not empty, or None."""
    values = (field(record, path) for path in paths)
    return next((value for value in values if value not in (None, "")), None)


def _lines(where: Path, key: str):
    with open(where, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _object(line, f"{key}={where}: line {number}")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}; mend it") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; write one object a line")
    return record


def _json(where: Path, key: str) -> list[dict[str, Any]]:
    try:
        records = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{key}={where} is not JSON: {error}; mend it") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{key}={where}: give a JSON list of objects, or a .jsonl file")
    return records


def _parquet(where: Path, key: str) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{key}={where}: the package pyarrow is missing; pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(where).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}={where}: not a readable parquet file ({reason})") from error
