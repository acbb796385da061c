"""Reads files of records (JSONL, JSON, CSV, parquet) as lists of objects, and fields by dotted paths."""

import contextlib
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.errors import UserError, reason

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
csv.field_size_limit(1 << 27)  # the default, 128 KiB, is shorter than a long solution


def read(path: str, key: str, wanted: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Reads the records of a file; the ending of its name gives the format.

    Args:
      path: the file. A * in its name stands for several files, which are read in the order of their names.
      key: the config key or flag that names the file, for messages.
      wanted: dotted paths of the fields that the caller uses. Only these columns of a parquet file are read,
        or all if it has none of them.

    Raises:
      UserError: there is no such file, its ending is unknown, a line is not an object, the text is not UTF-8,
        or there is no record.
    """
    records = [record for file in _files(path, key) for record in _read(file, key, wanted)]
    if not records:
        raise UserError(f"{key}={path}: the file holds no records")
    return records


def names(path: str, key: str) -> list[str]:
    """The columns of a file: the fields of its first record, or all columns of a parquet file."""
    first = _files(path, key)[0]
    if first.suffix == ".parquet":
        with _reading_parquet(first, key) as parquet:
            return parquet.read_schema(first).names
    return list(_read(first, key, ())[0])


def _files(path: str, key: str) -> list[Path]:
    try:
        return _found(path, key)
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder without access, no such home
        raise UserError(f"{key}={path} cannot be opened ({reason(error)}); give another path") from error


def _found(path: str, key: str) -> list[Path]:
    where = Path(path).expanduser()
    if "*" in where.name:
        found = sorted(where.parent.glob(where.name))
        if not found:
            raise UserError(f"{key}={path}: no file has such a name; check the folder and the pattern")
        return [file for each in found for file in _files(str(each), key)]
    if not path or not where.is_file():
        raise UserError(f"{key}={path!r}: no such file; give one of {', '.join(ENDINGS)}")
    if where.suffix not in ENDINGS:
        raise UserError(f"{key}={path}: unknown kind of file; give one of {', '.join(ENDINGS)}")
    return [where]


def _read(where: Path, key: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    if where.suffix == ".parquet":
        return _parquet(where, key, wanted)
    try:
        if where.suffix == ".csv":
            return _csv(where, key)
        return _json(where, key) if where.suffix == ".json" else list(_lines(where, key))
    except OSError as error:
        raise UserError(f"{key}={where} cannot be read ({error.strerror}); restore access") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={where} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(
            f"{key}={where} is not a readable CSV file ({error}); fix it, or give JSONL"
        ) from error


def _csv(where: Path, key: str) -> list[dict[str, Any]]:
    with open(where, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{key}={where}: two columns are named {twice!r}; rename one")
        rows = []
        for row in reader:
            if not row:  # an empty line
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{key}={where}: line {reader.line_num} has {len(row)} fields and the header has"
                    f" {len(header)}; put a text with a comma or a line break in double quotes"
                )
            rows.append(dict(zip(header, row)))
        return rows


def field(record: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, None if there is none. A field whose name contains the dot comes first."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def first_field(record: Mapping[str, Any], paths: Iterable[str]) -> Any:
    """The first value at one of several dotted paths that exists and is not empty, or None."""
    values = (field(record, path) for path in paths)
    return next((value for value in values if value not in (None, "")), None)


def _lines(where: Path, key: str):
    with open(where, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _object(line, f"{key}={where}: line {number}")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}; fix it") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; write one object a line")
    return record


def _json(where: Path, key: str) -> list[dict[str, Any]]:
    text = where.read_text(encoding="utf-8-sig")
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}={where} is not JSON: {error}; fix it") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{key}={where}: give a JSON list of objects, or a .jsonl file")
    return records


def _parquet(where: Path, key: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    with _reading_parquet(where, key) as parquet:
        tops = {top for path in wanted for top in (path, path.split(".")[0])}
        columns = [name for name in parquet.read_schema(where).names if name in tops]
        return parquet.read_table(where, columns=columns or None).to_pylist()


@contextlib.contextmanager
def _reading_parquet(where: Path, key: str):
    """pyarrow's parquet module; its errors become UserErrors."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{key}={where}: the package pyarrow is missing; pip install pyarrow") from error
    try:
        yield pyarrow.parquet
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise UserError(f"{key}={where}: not a readable parquet file ({reason(error)})") from error
