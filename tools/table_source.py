"""A table that says what images show: CSV, TSV or JSONL in UTF-8, each row naming one image.

The rows are held in memory (about 0.5 kB each). A row that cannot be used is rejected, never fatal: row_malformed,
image_missing (it names no image, or one outside of the source), caption_encoding, caption_empty, label_empty.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from mds_folder import Rejection, Row

# Column names taken without being told, best first, in any case.
KNOWN_NAMES = {
    "image": ("file", "image", "filename", "filepath", "path", "image_path"),
    "caption": ("caption", "text", "title", "alt_text"),
    "uid": ("uid",),
    "label": ("label", "class", "class_name", "category", "target"),
}
DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}


@dataclass
class Table:
    """The rows of a table, usable and not, the names of all images they speak of, and the columns read.

    `uids_repeated` counts the rows whose uid, of a column, another row before them has.
    """

    name: str
    columns: dict[str, str]
    rows: list[Row]
    rejected: list[Rejection]
    named: set[str]
    uids_repeated: int = 0

    def __str__(self) -> str:
        columns = ", ".join(f"{role} from {column!r}" for role, column in self.columns.items())
        return f"{self.name}: {len(self.rows) + len(self.rejected)} rows, {columns}"


def read_table(
    lines: Iterable[str],
    name: str,
    columns: Mapping[str, str | None],
    optional: Collection[str],
    locate: Callable[[str], str],
) -> Table:
    """The rows of a table, each checked on its own: a bad row costs that row alone.

    Args:
        lines: the text of the table, with surrogates for the bytes that are no UTF-8.
        name: of the table; its ending tells the kind.
        columns: for image, caption, uid, label: the column to read, or None to take a known name.
        optional: those of them that a table may lack, and a row may leave empty.
        locate: the image a row names -> its one true name; ValueError when that lies outside of the images.
    Returns: rows in order, uids made unique: rows of one uid (several captions of one image) get '#1', '#2'.
    Raises: ValueError when a column is not there; the text lists those that are.
    """
    records = _records(lines, name)
    head = list(islice(records, 100))  # a JSONL row may lack a key, so the first alone does not tell
    keys = dict.fromkeys(key for _, record in head if isinstance(record, dict) for key in record)
    picked = _pick_columns(name, list(keys), columns, optional) if keys else {}
    table = Table(name, picked, [], [], set())
    for number, record in chain(head, records):
        if isinstance(record, str) or not picked:
            detail = record if isinstance(record, str) else "the first 100 rows are malformed, so no column is known"
            table.rejected.append(Rejection(number, "", "row_malformed", detail))
            continue
        row = _read_row(number, record, picked, optional, locate, table.named)
        if isinstance(row, Row):
            table.rows.append(row)
        else:
            table.rejected.append(row)
    total, last = Counter(row.uid for row in table.rows), Counter()
    if "uid" in picked:  # else they are names of images, of which each may have several captions
        table.uids_repeated = total.total() - len(total)
    for row in table.rows:
        if total[uid := row.uid] > 1:
            last[uid] += 1
            while f"{uid}#{last[uid]}" in total:  # another row's own
                last[uid] += 1
            row.uid = f"{uid}#{last[uid]}"
    return table


def _pick_columns(
    name: str, available: list[str], columns: Mapping[str, str | None], optional: Collection[str]
) -> dict[str, str]:
    for role, chosen in columns.items():
        if chosen is not None and chosen not in available:
            raise ValueError(f"--{role}-column {chosen!r} is not a column of {name}; its columns are {available}")
    by_lower = {column.strip().lower(): column for column in available}
    picked = {}
    for role, chosen in columns.items():
        known = next((by_lower[known] for known in KNOWN_NAMES[role] if known in by_lower), None)
        if chosen or known:
            picked[role] = chosen or known
        elif role not in optional:
            raise ValueError(
                f"{name} has no column called {' or '.join(KNOWN_NAMES[role])}; its columns are {available} "
                f"(a table begins with a header in UTF-8); choose one with --{role}-column"
            )
    return picked


def _read_row(
    number: int,
    record: Mapping[str, Any],
    picked: Mapping[str, str],
    optional: Collection[str],
    locate: Callable[[str], str],
    named: set[str],
) -> Row | Rejection:
    texts: dict[str, str] = {}
    image = str(record.get(picked["image"]) or "")
    for role, column in picked.items():
        value = record.get(column, "" if role in optional else ...)
        value = "" if value is None else str(value) if isinstance(value, int) else value
        if not isinstance(value, str):
            detail = f"no {column!r}" if value is ... else f"{column!r} is a {type(value).__name__}, not text"
            return Rejection(number, image, "row_malformed", detail)
        texts[role] = value
    try:
        if not image.strip():
            raise ValueError("the row names no image")
        texts["image"] = locate(texts["image"])
    except ValueError as error:
        return Rejection(number, image, "image_missing", str(error))
    named.add(texts["image"])
    for role, text in texts.items():
        if not is_unicode(text):
            reason = "caption_encoding" if role == "caption" else "row_malformed"
            return Rejection(number, image, reason, f"{picked[role]!r} is not UTF-8: {text[:80]!r}")
        if role not in optional and not text.strip():
            return Rejection(number, image, f"{role}_empty", f"{picked[role]!r} is empty")
    uid = texts.get("uid") or texts["image"]
    return Row(number, texts["image"], texts.get("caption", ""), uid, texts.get("label", ""))


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: what stands for a byte that was no UTF-8
        return False
    return True


def _records(lines: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, record), or (line number, what is wrong with it), for each row of a table."""
    delimiter = DELIMITERS.get(Path(name).suffix.lower())
    if delimiter is None:
        raise ValueError(f"{name} is not a table; give a file that ends in {', '.join(DELIMITERS)}")
    if not delimiter:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, json_object(line)
        return
    header: list[str] = []
    for number, fields in _csv_rows(lines, delimiter):
        if not header and isinstance(fields, str):
            raise ValueError(f"{name} line {number}, the header: {fields}")
        if not header:
            header = list(fields)
            repeated = [column for column, count in Counter(header).items() if column and count > 1]
            if repeated:
                raise ValueError(f"{name} has several columns called {repeated}; rename all but one")
        elif isinstance(fields, str):
            yield number, fields
        elif len(fields) != len(header):
            yield number, f"{len(fields)} columns, the header has {len(header)}"
        else:
            yield number, dict(zip(header, fields, strict=True))


def names_a_file(table: Path, folder: Path, endings: tuple[str, ...]) -> bool:
    """Whether any column of any row of a table names a file in a folder that ends so; stops at the first.

    Costs: looks for a file per row, if none is there.
    """
    with (
        table.open("rb") as file,
        io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=line_end(file)) as lines,
    ):
        try:
            for _, record in _records(lines, table.name):
                texts = [text for text in record.values() if isinstance(text, str)] if isinstance(record, dict) else []
                if any(text.lower().endswith(endings) and os.path.isfile(folder / text) for text in texts):
                    return True
        except ValueError:  # a header that is none, which is an error if the table is read
            pass
    return False


def line_end(file: IO[bytes]) -> str:
    """`newline` to read a table with: lines end with a line feed; with a carriage return where there is none.

    Both would cut a row in two at a carriage return in a caption.
    """
    begin = file.read(1 << 16)
    file.seek(0)
    return "\n" if b"\n" in begin else ""


def json_object(text: str | bytes) -> dict[str, Any] | str:
    """The JSON object in a text, or what is wrong with it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"bad JSON: {error}"
    return value if isinstance(value, dict) else f"bad JSON: a {type(value).__name__}, not an object"


def _csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """(line number, fields or what is wrong) for each row.

    A quote that is never closed would swallow all rows up to the next quote. So lines of a bad record are
    kept: the first is given up, and reading resumes at the second. In a TSV, whose captions have no tabs, a field
    over several lines with a tab in it is such a one.
    """
    fresh = enumerate(lines, 1)
    again: deque[tuple[int, str]] = deque()
    record: list[tuple[int, str]] = []

    class Feed:
        def __iter__(self) -> Feed:
            return self

        def __next__(self) -> str:
            record.append(again.popleft() if again else next(fresh))
            return record[-1][1]

    reader = csv.reader(Feed(), delimiter=delimiter, strict=True)
    while True:
        record.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            again.extendleft(reversed(record[1:]))
            is_return = len(record) == 1 and "\r" in record[0][1].rstrip("\r\n")
            yield record[0][0], f"bad quoting{' or a carriage return within a field' * is_return}: {error}"
            continue
        if delimiter == "\t" and len(record) > 1 and any("\t" in field and "\n" in field for field in fields):
            again.extendleft(reversed(record[1:]))
            yield record[0][0], "bad quoting: a field that goes on over the columns of the next line"
            continue
        if fields:  # a blank line is no row
            yield record[0][0], fields
