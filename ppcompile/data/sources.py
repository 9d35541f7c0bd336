"""Where preference records come from: JSON files, tables, ``datasets`` folders and names, or a plain iterable."""

from __future__ import annotations

import gzip
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ppcompile.data.records import parse_json

__all__ = ["Located", "Source", "raw_records", "record_at", "refuse_mapping"]

Source = str | Path | Iterable[Mapping[str, Any]]
Located = tuple[str, Any]
"""Words that say where a raw record stands, and the record."""

TEXT_FILES = (".json", ".jsonl", ".ndjson")
TABLE_FILES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def raw_records(source: Source, split: str | None) -> Iterator[Located]:
    """Raw rows of ``source`` (see :func:`ppcompile.data.read_preferences`), each with the words that locate it.

    A row is a mapping of columns, or a line of JSON text that has yet to be parsed.

    Raises:
        TypeError: a mapping, such as all splits of a data set, or columns that are no table.
    """
    refuse_mapping(source)
    if not isinstance(source, (str, Path)):
        _refuse_split("an iterable of records", split)
        if _is_table(source):
            return _rows_of_table("row", source)
        return ((f"record {number}", raw) for number, raw in enumerate(source, start=1))
    path = Path(source)
    suffix = next((end for end in reversed(path.suffixes) if end != ".gz"), "")
    if path.is_file():
        _refuse_split(str(path), split)
        return _table_rows(path, suffix) if suffix in TABLE_FILES else _text_rows(path)
    if not path.exists() and (suffix in TEXT_FILES or suffix in TABLE_FILES or str(source).startswith((".", "/"))):
        raise FileNotFoundError(f"no preference data at {source} (looked in {Path.cwd()})")
    return _dataset_rows(str(source), split)


def refuse_mapping(source: Any) -> None:
    """Raise for what would be read as a list of its keys."""
    if isinstance(source, Mapping):
        keys = ", ".join(map(repr, list(source)[:6]))
        raise TypeError(
            f"records come as a list, a table or a stream, got a {type(source).__name__} with keys {keys}. Try: "
            "dataset['train'] for one split, datasets.Dataset.from_dict(...) for columns, [record] for one record"
        )


def record_at(source: Any, index: int) -> Located:
    """One raw row of a list or a table, located as :func:`raw_records` does."""
    if _is_table(source):
        return f"row {index + 1}", without_nulls(source[index])
    return f"record {index + 1}", source[index]


def _is_table(source: Any) -> bool:
    return type(source).__module__.startswith("datasets.")


def _refuse_split(what: str, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"split={split!r} is for folders and hub names; {what} has no splits")


def _text_rows(path: Path) -> Iterator[Located]:
    """Records of a JSON list, or of JSON lines: the first character tells, as ``.json`` is used for both."""
    opener: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        if first == "[":
            rows = parse_json(file.read(), str(path))
            yield from ((f"{path} record {number}", row) for number, row in enumerate(rows, start=1))
        else:
            yield from ((f"{path}:{number}", line) for number, line in enumerate(file, start=1) if line.strip())


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            "reading this source needs the `datasets` library: pip install 'ppcompile[data]' "
            "(.json and .jsonl files are read without it)"
        ) from error


def _table_rows(path: Path, suffix: str) -> Iterator[Located]:
    rows = _datasets().load_dataset(TABLE_FILES[suffix], data_files=str(path), split="train")
    return _rows_of_table(f"{path} row", rows)


def _rows_of_table(name: str, rows: Iterable[Any]) -> Iterator[Located]:
    return ((f"{name} {number}", without_nulls(raw)) for number, raw in enumerate(rows, start=1))


def without_nulls(value: Any) -> Any:
    """A row of a table without what is null, at any depth.

    A table has one type for a column, so that every message gets the keys of all messages, and every tool call the
    arguments of all tools.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and isinstance(next((v for v in value if v is not None), None), (Mapping, list)):
        return [without_nulls(item) for item in value]
    return value  # a list of plain values, such as token ids, too


def _dataset_rows(name: str, split: str | None) -> Iterator[Located]:
    library = _datasets()
    if (Path(name) / "state.json").is_file():  # one saved Dataset
        _refuse_split(name, split)
        return _rows_of_table(f"{name} row", library.load_from_disk(name))
    split = split or "train"
    if (Path(name) / "dataset_dict.json").is_file():  # a saved DatasetDict
        splits = library.load_from_disk(name)
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(map(repr, splits))}")
        rows = splits[split]
    else:
        rows = library.load_dataset(name, split=split)
    return _rows_of_table(f"{name}[{split}] row", rows)
