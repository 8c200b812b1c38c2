"""Image-caption pairs -> an MDS folder with the columns image (bytes as found), caption and uid.

Two layouts are read. A table (CSV, TSV or JSONL in UTF-8) names images of a folder or of tars; or tars in
the webdataset layout, as img2dataset writes them, hold KEY.jpg beside KEY.txt or KEY.json. Tars are read
once from front to back, so samples come in tar order and memory holds one shard, whatever the size of
the tar; the rows of a table are held in memory (about 0.5 kB each).

A row that cannot be used is rejected, never fatal: image_missing, image_empty, image_too_large,
not_an_image, caption_empty, caption_missing, caption_encoding, label_empty, row_malformed, tar_damaged.
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import json
import lzma
import os
import posixpath
import random
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, Any

from mds_folder import Found, MdsSplit, Rejection, Row, mds_folder, write_found

COLUMNS = {"image": "bytes", "caption": "str", "uid": "str"}
# Column names taken without being told, best first, in any case.
KNOWN_NAMES = {
    "image": ("file", "image", "filename", "filepath", "path", "image_path"),
    "caption": ("caption", "text", "title", "alt_text"),
    "uid": ("uid",),
    "label": ("label", "class", "class_name", "category", "target"),
}
DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WEBDATASET_IMAGES = ("jpg", "jpeg", "png", "webp")


class DamagedTar(ValueError):
    """A tar that cannot be read to its end."""


@dataclass
class Table:
    """The rows of a table, usable and not, the names of all images they speak of, and the columns read."""

    name: str
    columns: dict[str, str]
    rows: list[Row]
    rejected: list[Rejection]
    named: set[str]

    def __str__(self) -> str:
        columns = ", ".join(f"{role} from {column!r}" for role, column in self.columns.items())
        return f"{self.name}: {len(self.rows) + len(self.rejected)} rows, {columns}"


@dataclass
class Source:
    """Where the samples come from: tars, or else a folder; and a table, unless the tars are webdataset.

    `table` is a path, or the name of a member of the first tar.
    """

    tars: list[Path]
    folder: Path
    table: Path | str | None

    def read_table(self, columns: Mapping[str, str | None], optional: Collection[str]) -> Table:
        """The rows of the table; `columns` and `optional` as for `read_table`."""
        assert self.table is not None
        if isinstance(self.table, str):
            inside, table = posixpath.dirname(self.table), self.table
            data = next(data for _, data in tar_members(self.tars[0], table.__eq__) if data is not None)
            file: IO[bytes] = io.BytesIO(data)
        else:
            inside, table = "", self.table.name
            file = self.table.open("rb")

        def locate(image: str) -> str:
            return _in_tar(image, inside) if self.tars else _in_folder(image, self.folder)

        # surrogateescape carries a byte that is no UTF-8 up to the row it belongs to.
        with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
            return read_table(text, table, columns, optional, locate)

    def find(self, table: Table, split: MdsSplit) -> Iterator[Found | Rejection]:
        """The rows' images: in the order of a tar, or of the table; images left over are counted in `split`."""
        yield from table.rejected
        if self.tars:
            yield from _find_in_tars(self.tars, table, split)
        else:
            yield from _find_in_folder(self.folder, table, split)


def find_source(
    given: Sequence[str], images: str | None = None, captions: str | None = None, layout: str = "auto"
) -> Source:
    """Tell what SOURCE is: which tars or folder hold the images, and which table names them.

    Args:
        given: one table, one folder, or tars; patterns with * are expanded.
        images: folder or tar with the images of a SOURCE that is a table; its own folder without.
        captions: the table of a SOURCE that holds images. Without, the only table inside of it (or the
            one called captions), else the only one beside it.
        layout: "table", "webdataset", or "auto": webdataset when a tar holds captions beside its images.
    Raises: ValueError when something is not there, or could be several things; the text lists them.
    """
    paths = _expand(given)
    if len(paths) == 1 and paths[0].suffix.lower() in DELIMITERS:
        if captions or layout == "webdataset":
            raise ValueError(f"SOURCE={given[0]!r} is a table; --captions and --format webdataset go with images")
        return Source(*_images_at(_expand([images]) if images else [paths[0].parent]), table=paths[0])
    if images:
        raise ValueError(f"--images {images!r} goes with a SOURCE that is a table; SOURCE={given[0]!r} is not")
    tars, folder = _images_at(paths)
    if captions:
        table = _expand([captions])[0]
        if table.suffix.lower() not in DELIMITERS or layout == "webdataset":
            raise ValueError(
                f"--captions {captions!r} must end in {', '.join(DELIMITERS)}, without --format webdataset"
            )
        return Source(tars, folder, table)
    if layout == "webdataset":
        if not tars:
            raise ValueError(f"--format webdataset reads tars; SOURCE={given[0]!r} holds none")
        return Source(tars, folder, None)
    if not tars:
        parent = folder.absolute().parent
        return Source(tars, folder, _only_table({folder.name: _tables_in(folder), parent.name: _tables_in(parent)}))
    inside, grouped = _look_inside(tars[0])
    beside = _tables_in(folder)
    if grouped and layout == "auto":
        if beside:
            raise ValueError(
                f"{tars[0].name} holds captions beside its images, and {beside[0].name} lies beside it; "
                "choose with --format webdataset or --format table"
            )
        return Source(tars, folder, None)
    return Source(tars, folder, _only_table({tars[0].name: inside, folder.absolute().name: beside}))


def _expand(given: Sequence[str]) -> list[Path]:
    paths = []
    for text in given:
        path = Path(text).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
        if "://" in text or not matches:
            raise ValueError(
                f"{text!r} does not exist here; give a local file or folder, or a pattern that matches some"
            )
        paths += matches
    return paths


def _images_at(paths: Sequence[Path]) -> tuple[list[Path], Path]:
    """(tars, folder they lie in), or ([], folder of loose images)."""
    if len(paths) == 1 and paths[0].is_dir():
        names = sorted(entry.name for entry in os.scandir(paths[0]))
        loose = any(name.lower().endswith(IMAGE_ENDINGS) for name in names)
        tars = [paths[0] / name for name in names if name.lower().endswith(TAR_ENDINGS) and name[0] != "."]
        return ([] if loose else tars), paths[0]
    for path in paths:
        if path.is_dir() or not path.name.lower().endswith(TAR_ENDINGS):
            raise ValueError(
                f"SOURCE={str(path)!r} must be one folder, one table ({', '.join(DELIMITERS)}) "
                f"or any number of tars ({', '.join(TAR_ENDINGS)})"
            )
    return list(paths), paths[0].parent


def _tables_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in DELIMITERS and path.name[0] != "." and path.is_file()
    )


def _look_inside(tar: Path) -> tuple[list[str], bool]:
    """(tables in the tar, whether it is in the webdataset layout); stops at the first proof of the latter."""
    tables, images, captions = [], set(), set()
    for name, _ in tar_members(tar, lambda name: False, mode="r:*"):  # not a stream: a plain tar skips the data
        key, ending = _split_key(name)
        if ending in WEBDATASET_IMAGES:
            images.add(key)
        elif ending in ("txt", "json"):
            captions.add(key)
        elif posixpath.splitext(name)[1].lower() in DELIMITERS:
            tables.append(name)
        if key in images and key in captions:
            return tables, True
    return tables, False


def _only_table(places: Mapping[str, Sequence[Path | str]]) -> Path | str:
    for place, tables in places.items():
        captions = [table for table in tables if Path(table).stem == "captions"]
        for some in (captions, tables):
            if len(some) == 1:
                return some[0]
        if tables:
            names = ", ".join(Path(table).name for table in tables)
            raise ValueError(f"{place!r} holds several tables: {names}; choose one with --captions")
    raise ValueError(
        f"no table ({', '.join(DELIMITERS)}) in {' or '.join(map(repr, places))} says what the images show; "
        "give one with --captions"
    )


class _Member(tarfile.TarInfo):
    """A header that is not taken for the end of the tar when it is cut off or broken, as tarfile does."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark of the end
                raise
            raise tarfile.ReadError(f"a broken header, or no end mark: {error}") from error


def tar_members(path: Path, wanted: Callable[[str], bool], mode: str = "r|*") -> Iterator[tuple[str, bytes | None]]:
    """(name, bytes if wanted) of each file in a tar, in one pass from front to back.

    Raises: DamagedTar when the tar ends early or is none.
    """
    name = "its beginning"
    try:
        with tarfile.open(path, mode, tarinfo=_Member) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
            for member in tar:
                tar.members = []  # or it keeps all it has passed, 1 kB each
                if member.isreg() and not posixpath.basename(member.name).startswith("."):
                    name = posixpath.normpath(member.name).lstrip("/")
                    file = tar.extractfile(member) if wanted(name) else None
                    yield name, file.read() if file else None
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DamagedTar(f"{path.name} cannot be read beyond {name!r}: {error}") from error


def _in_tar(image: str, inside: str = "") -> str:
    name = posixpath.normpath(posixpath.join(inside, image))
    if name.startswith(("/", "../")):
        raise ValueError("the path leaves the tar")
    return name


def _in_folder(image: str, folder: Path) -> str:
    root = os.path.abspath(folder)
    name = os.path.relpath(os.path.join(root, image), root)
    if name.startswith("../"):
        raise ValueError(f"the path leaves the folder {folder.name!r}")
    return name


def _find_in_tars(tars: Sequence[Path], table: Table, split: MdsSplit) -> Iterator[Found | Rejection]:
    waiting: dict[str, list[Row]] = {}
    for row in table.rows:
        waiting.setdefault(row.image, []).append(row)
    first = None
    for tar in tars:
        for name, data in tar_members(tar, waiting.__contains__):
            first = first or name
            if data is not None:
                yield Found(name, data, waiting.pop(name))
                table.named.discard(name)  # a second member of this name is left over
            elif name.lower().endswith(IMAGE_ENDINGS) and name not in table.named:
                split.unreferenced += 1
    for name, rows in waiting.items():
        for row in rows:
            yield Rejection(row.number, name, "image_missing", f"not in the tar, which begins with {first!r}")


def _find_in_folder(folder: Path, table: Table, split: MdsSplit) -> Iterator[Found | Rejection]:
    for name, group in groupby(table.rows, key=lambda row: row.image):
        rows = list(group)
        try:
            if not (folder / name).is_file():
                raise FileNotFoundError("no such file")
            found = Found(name, (folder / name).read_bytes(), rows)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            problem = f"in the folder {folder.name!r}: {getattr(error, 'strerror', None) or error}"
            yield from (Rejection(row.number, name, "image_missing", problem) for row in rows)
        else:
            yield found
    for name in files_below(folder):
        split.unreferenced += name.lower().endswith(IMAGE_ENDINGS) and name not in table.named


def files_below(folder: Path) -> Iterator[str]:
    """Relative paths of all files in a folder and the folders below, sorted, hidden ones left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(files):
            if name[0] != ".":
                yield os.path.relpath(os.path.join(parent, name), folder)


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
    total, so_far = Counter(row.uid for row in table.rows), Counter()
    for row in table.rows:
        if total[row.uid] > 1:
            so_far[row.uid] += 1
            row.uid = f"{row.uid}#{so_far[row.uid]}"
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
        if not _is_unicode(text):
            reason = "caption_encoding" if role == "caption" else "row_malformed"
            return Rejection(number, image, reason, f"{picked[role]!r} is not UTF-8: {text[:80]!r}")
        if role not in optional and not text.strip():
            return Rejection(number, image, f"{role}_empty", f"{picked[role]!r} is empty")
    uid = texts.get("uid") or texts["image"]
    return Row(number, texts["image"], texts.get("caption", ""), uid, texts.get("label", ""))


def _is_unicode(text: str) -> bool:
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
                yield number, _json_object(line)
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


def _json_object(text: str | bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"bad JSON: {error}"
    return value if isinstance(value, dict) else f"bad JSON: a {type(value).__name__}, not an object"


def _csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """(line number, fields or what is wrong) for each row.

    A quote that is never closed would swallow all rows up to the next quote. So lines of a bad record are
    kept: the first is given up, and reading resumes at the second.
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
            yield record[0][0], f"bad quoting: {error}"
            continue
        if fields:  # a blank line is no row
            yield record[0][0], fields


def read_webdataset(
    tars: Sequence[Path], caption_key: str | None = None, uid_key: str | None = None
) -> Iterator[Found | Rejection]:
    """The samples of tars in the webdataset layout: neighbouring members KEY.jpg, KEY.txt and KEY.json.

    The caption is KEY.txt, else "caption" of KEY.json (always `caption_key` of it, when given). The uid is
    "uid" or "key" of KEY.json (`uid_key`), else KEY; from the second time on a uid gets '#2', '#3'. A
    damaged tar costs its rest, and the last sample before that, which may lack a part.
    """
    number, seen = 0, Counter()
    for tar in tars:
        try:
            for key, group in groupby(tar_members(tar, _is_sample_part), key=lambda member: _split_key(member[0])[0]):
                number += 1
                item = _read_sample(f"{tar.name}/{key}", number, dict(group), caption_key, uid_key)
                for row in item.rows if isinstance(item, Found) else []:
                    seen[row.uid] += 1
                    row.uid += f"#{seen[row.uid]}" * (seen[row.uid] > 1)
                yield item
        except DamagedTar as error:
            yield Rejection(None, tar.name, "tar_damaged", str(error))


def _split_key(name: str) -> tuple[str, str]:
    """'00/17.seg.png' -> ('00/17', 'seg.png'): the key ends at the first dot of the file's own name."""
    folder, base = posixpath.split(name)
    stem, _, ending = base.partition(".")
    return posixpath.join(folder, stem), ending.lower()


def _is_sample_part(name: str) -> bool:
    return _split_key(name)[1] in (*WEBDATASET_IMAGES, "txt", "json")


def _read_sample(
    place: str, number: int, members: dict[str, bytes | None], caption_key: str | None, uid_key: str | None
) -> Found | Rejection:
    parts = {_split_key(name)[1]: data for name, data in members.items() if data is not None}
    images = [ending for ending in WEBDATASET_IMAGES if ending in parts]

    def reject(reason: str, detail: str) -> Rejection:
        return Rejection(number, f"{place}.{images[0]}" if images else place, reason, detail)

    if len(images) != 1:
        reason = "row_malformed" if images else "image_missing"
        return reject(reason, f"a sample needs one of {', '.join(WEBDATASET_IMAGES)}; it has {sorted(parts)}")
    about = _json_object(parts.get("json") or b"{}")
    if isinstance(about, str):
        return reject("row_malformed", f"its .json: {about}")
    if caption_key is None and "txt" in parts:
        caption = parts["txt"].decode("utf-8", "surrogateescape")
    elif (caption_key or "caption") in about:
        caption = about[caption_key or "caption"] or ""
    else:
        return reject("caption_missing", f"no {caption_key or 'caption'!r} in its .json, and no .txt was read")
    if not isinstance(caption, str):
        return reject("row_malformed", f"its caption is a {type(caption).__name__}, not text")
    if not _is_unicode(caption):
        return reject("caption_encoding", f"its caption is not UTF-8: {caption[:80]!r}")
    if not caption.strip():
        return reject("caption_empty", "its caption is empty")
    key = posixpath.basename(place)
    uid = str(next((about[name] for name in (uid_key or "uid", "key") if about.get(name) is not None), key))
    if not _is_unicode(uid):
        return reject("row_malformed", f"its uid is not UTF-8: {uid!r}")
    image = f"{place}.{images[0]}"
    return Found(image, parts[images[0]], [Row(number, image, caption, uid)])


def run(args: argparse.Namespace) -> None:
    """Do what `pairs` was asked to; the summary goes to stdout.

    Raises: ValueError for whatever the user can mend; no OUT is left behind.
    """
    source = find_source(args.source, args.images, args.captions, args.format)
    with open_output(args, COLUMNS, source) as split:
        total = None
        if source.table is None:
            if args.image_column:
                raise ValueError("--image-column goes with a table; webdataset tars have none")
            found = read_webdataset(source.tars, args.caption_column, args.uid_column)
        else:
            columns = {"image": args.image_column, "caption": args.caption_column, "uid": args.uid_column}
            table = source.read_table(columns, optional=("uid",))
            print(table)
            found, total = source.find(table, split), len(table.rows)
        choose = None if args.shuffle_seed is None else _shuffle(args.shuffle_seed, args.limit)
        limit = args.limit if choose is None else None
        write_found(found, split, _pair, total=total, limit=limit, choose=choose)
    print(split.summary(), f"written to {args.out}", sep="\n")


def _pair(row: Row, data: bytes) -> dict[str, Any]:
    return {"image": data, "caption": row.caption, "uid": row.uid}


def _shuffle(seed: int, limit: int | None) -> Callable[[list[Any]], list[int]]:
    return lambda labels: random.Random(seed).sample(range(len(labels)), len(labels))[:limit]


def open_output(
    args: argparse.Namespace, columns: Mapping[str, str], source: Source
) -> AbstractContextManager[MdsSplit]:
    """`mds_folder` as the options of `add_source_options` and `add_output_options` want it.

    Raises: ValueError also when OUT is the source or holds it, since --overwrite would delete it.
    """
    out = Path(args.out).expanduser().resolve()
    for path in (*source.tars, source.folder, source.table):
        if isinstance(path, Path) and (path.resolve() == out or out in path.resolve().parents):
            raise ValueError(f"OUT={args.out!r} is or holds the source {path.name!r}; give a folder of its own")
    paths = {key: Path(value) for key in ("images", "captions") if (value := getattr(args, key))}
    arguments = {key: value for key, value in vars(args).items() if key != "out" and not callable(value)}
    arguments |= paths | {"source": [Path(text) for text in args.source]}
    return mds_folder(
        args.out,
        columns,
        overwrite=args.overwrite,
        size_limit=args.size_limit,
        compression=None if args.compression == "none" else args.compression,
        hashes=[] if args.hashes == "none" else args.hashes.split(","),
        source={"tool": f"make_mds.py {Path(__file__).stem}", "arguments": arguments},
    )


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def add_source_options(parser: argparse.ArgumentParser, roles: Sequence[str]) -> None:
    """SOURCE, OUT, and the options that say how to read a table; one --ROLE-column for each role."""
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="a table, a folder, or tars (patterns allowed)")
    parser.add_argument("out", metavar="OUT", help="the folder to write; must not exist, or be empty")
    parser.add_argument("--images", metavar="PATH", help="folder or tar with the images of a table (its own folder)")
    parser.add_argument("--captions", metavar="FILE", help="the table that describes the images (found if only one)")
    for role in roles:
        names = ", ".join(KNOWN_NAMES[role])
        parser.add_argument(f"--{role}-column", metavar="NAME", help=f"column with the {role} (first of: {names})")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options of the MDS writer, and --overwrite."""
    parser.add_argument("--size-limit", default="64mb", help="largest shard, such as 64mb (default)")
    parser.add_argument("--compression", default="none", help="compression of shards, such as zstd or zstd:7 (none)")
    parser.add_argument(
        "--hashes", default="sha1", help="checksums kept per shard, separated by commas (sha1), or none"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new folder is complete")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `pairs`; its `run` takes the parsed arguments."""
    parser = subparsers.add_parser(
        "pairs", help="image-caption pairs -> MDS", description=(__doc__ or "").split("\n")[0]
    )
    add_source_options(parser, ("image", "caption", "uid"))
    parser.add_argument("--format", choices=("auto", "table", "webdataset"), default="auto", help="layout (auto)")
    parser.add_argument("--shuffle-seed", type=int, help="write in a random order (default: as found)")
    parser.add_argument("--limit", type=positive, metavar="N", help="write N samples: the first, or random if shuffled")
    add_output_options(parser)
    parser.set_defaults(run=run)
