"""Readers of GLUE-style TSV, CSV and JSON lines: columns of text, second text and label, with their places."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import InputError, wrong

#: Name of a format -> what a file of it ends with.
FORMATS = {"tsv": (".tsv",), "csv": (".csv",), "jsonl": (".jsonl", ".ndjson", ".json")}

#: Rows as (line number, values in the order of the columns asked for).
Rows = Iterator[tuple[int, list[Any]]]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; `pair` is None where there is one text a sample."""

    text: str
    label: str
    pair: str | None = None

    def names(self) -> list[str]:
        return [self.text, self.label] + ([self.pair] if self.pair is not None else [])


@dataclass(frozen=True)
class Table:
    """What a file says: all integer labels, or all strings, and the line of each sample."""

    path: Path
    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[str]
    lines: list[int]


@dataclass(frozen=True)
class _Source:
    """A file being read, and the configuration key that named it."""

    path: Path
    key: str
    text: str
    columns: Columns

    def error(self, line: int | None, why: str, fix: str) -> InputError:
        place = f"{self.path}:{line}" if line else str(self.path)
        return wrong(self.key, f"{place}: {why}", fix, value=str(self.path))

    def lacks(self, line: int, missing: list[str], there: Sequence[str]) -> InputError:
        """A column is missing: names those that are there and the key that chooses."""
        words = [name for name, column in vars(self.columns).items() if column in missing]
        alike = difflib.get_close_matches(missing[0], there)
        close = next((name for name in there if name in alike), "COLUMN")
        return self.error(
            line,
            f"no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, there)) or 'none'}",
            f"choose with {' '.join(f'data.{word}={close!r}' for word in words)}",
        )


def read(path: str | Path, key: str, columns: Columns, format: str | None = None, as_text: bool = False) -> Table:
    """The table in a file. `key` is the configuration key that names it; `as_text` leaves integer labels as strings."""
    source = _Source(Path(path).expanduser(), key, _decoded(Path(path).expanduser(), key), columns)
    table = _Gathered(source, _READERS[_format(source.path, format)](source))
    if not table.lines:
        raise source.error(None, "the file has no samples", "give a file with a header line and one sample a line")
    return table.finish(as_text)


def _format(path: Path, format: str | None) -> str:
    if format is not None:
        if format not in FORMATS:
            raise wrong("data.format", "unknown format", f"one of {', '.join(FORMATS)}", value=format)
        return format
    for name, endings in FORMATS.items():
        if path.suffix.lower() in endings:
            return name
    raise wrong(
        "data.format",
        f"the name of {path} does not say its format",
        f"set data.format to one of {', '.join(FORMATS)}, or end the name in one of "
        f"{', '.join(ending for endings in FORMATS.values() for ending in endings)}",
        value=None,
    )


def _decoded(path: Path, key: str) -> str:
    fix = f"give the path of a TSV, CSV or JSON-lines file: {key}=FILE (relative to {Path.cwd()})"
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise wrong(key, f"no such file: {path}", fix, value=str(path)) from None
    except OSError as error:
        raise wrong(key, f"{path} cannot be read: {error.strerror}", fix, value=str(path)) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise wrong(
            key, f"{path}:{line}: not UTF-8 ({error.reason})", "save the file as UTF-8", value=str(path)
        ) from None


def _lines(source: _Source) -> Iterator[tuple[int, str]]:
    """Lines that are not blank. Only line feeds part them: texts may hold what else Unicode calls a line end."""
    for number, line in enumerate(source.text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line


def _read_tsv(source: _Source) -> Rows:
    """Tab-separated without quoting, as GLUE's files are."""
    return _below_header(source, ((number, line.split("\t")) for number, line in _lines(source)))


def _read_csv(source: _Source) -> Rows:
    reader = csv.reader(io.StringIO(source.text, newline=""), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        while True:
            first = reader.line_num + 1  # a quoted text may go over several lines
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise source.error(
                    first, f"not CSV: {error}", "quote texts with commas or quotes, as CSV does"
                ) from None
            if row:
                yield first, row

    return _below_header(source, rows())


def _below_header(source: _Source, rows: Iterator[tuple[int, list[str]]]) -> Rows:
    try:
        first, header = next(rows)
    except StopIteration:
        return
    missing = [name for name in source.columns.names() if name not in header]
    if missing:
        raise source.lacks(first, missing, header)
    places = [header.index(name) for name in source.columns.names()]
    for number, row in rows:
        if len(row) != len(header):
            raise source.error(
                number,
                f"{len(row)} columns where the header has {len(header)}",
                "every line needs as many columns as the header; a text must not hold the separator unquoted",
            )
        yield number, [row[place] for place in places]


def _read_jsonl(source: _Source) -> Rows:
    names = source.columns.names()
    for number, line in _lines(source):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise source.error(number, f"not JSON: {error}", "write one JSON object a line") from None
        if not isinstance(record, dict):
            raise source.error(number, f"a JSON {type(record).__name__}, not an object", "write one JSON object a line")
        missing = [name for name in names if name not in record]
        if missing:
            raise source.lacks(number, missing, list(record))
        yield number, [record[name] for name in names]


_READERS: dict[str, Callable[[_Source], Rows]] = {"tsv": _read_tsv, "csv": _read_csv, "jsonl": _read_jsonl}


class _Gathered:
    """The columns as they are read."""

    def __init__(self, source: _Source, rows: Rows) -> None:
        self.source = source
        self.texts: list[str] = []
        self.pairs: list[str] = []
        self.labels: list[Any] = []
        self.lines: list[int] = []
        for number, (text, label, *pair) in rows:
            for value, into in zip((text, *pair), (self.texts, self.pairs), strict=False):
                if not isinstance(value, str):
                    raise source.error(number, f"the text is {value!r}, not a string", "texts are strings")
                into.append(value)
            self.labels.append(self._label(number, label))
            self.lines.append(number)

    def _label(self, number: int, label: Any) -> str | int:
        if isinstance(label, bool):
            return str(label).lower()
        if isinstance(label, int) or (isinstance(label, str) and label.strip()):
            return label if isinstance(label, int) else label.strip()
        raise self.source.error(
            number,
            f"the label in column {self.source.columns.label!r} is {label!r}",
            "labels are integers or words; choose their column with data.label=COLUMN",
        )

    def finish(self, as_text: bool) -> Table:
        labels = [str(label) for label in self.labels]
        if not as_text:
            whole = [_is_integer(label) for label in labels]
            if all(whole):
                return self._table([int(label) for label in labels])
            if any(whole):
                self._mixed(labels, whole)
        return self._table(labels)

    def _mixed(self, labels: list[str], whole: list[bool]) -> None:
        rare = sum(whole) * 2 < len(whole)
        at = whole.index(rare)
        kind, others = ("an integer", "words") if rare else ("a word", "integers")
        raise self.source.error(
            self.lines[at],
            f"the label {labels[at]!r} is {kind} where most are {others}",
            "mend it, or list all labels in order: data.labels=[…]",
        )

    def _table(self, labels: list[int] | list[str]) -> Table:
        pairs = self.pairs if self.source.columns.pair is not None else None
        return Table(self.source.path, self.texts, pairs, labels, self.lines)


def _is_integer(label: str) -> bool:
    digits = label.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 10
