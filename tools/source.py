"""What SOURCE is: a table with a folder or tars of images, webdataset tars, or a folder of images alone."""

from __future__ import annotations

import glob
import io
import os
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import IO

from mds_folder import Found, MdsSplit, Rejection
from table_source import DELIMITERS, Table, line_end, names_a_file, read_table
from tar_source import (
    IMAGE_ENDINGS,
    TAR_ENDINGS,
    DamagedTar,
    EmptyTar,
    find_in_tars,
    look_inside,
    name_in_tar,
    tar_members,
)


@dataclass
class Source:
    """Where the samples come from: tars, or else a folder; and a table, unless the tars are webdataset.

    `table` is a path, or the name of a member of a tar.
    """

    tars: list[Path]
    folder: Path
    table: Path | str | None

    def read_table(self, columns: Mapping[str, str | None], optional: Collection[str]) -> Table:
        """The rows of the table; `columns` and `optional` as for `read_table`."""
        assert self.table is not None
        if isinstance(self.table, str):
            inside, table = posixpath.dirname(self.table), self.table
            members = chain.from_iterable(tar_members(tar, table.__eq__) for tar in self.tars)
            data = next(data for _, data in members if data is not None)
            file: IO[bytes] = io.BytesIO(data)
        else:
            inside, table = "", self.table.name
            file = self.table.open("rb")

        def locate(image: str) -> str:
            return name_in_tar(image, inside) if self.tars else _in_folder(image, self.folder)

        # surrogateescape carries a byte that is no UTF-8 up to the row it belongs to.
        with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=line_end(file)) as text:
            return read_table(text, table, columns, optional, locate)

    def find(self, table: Table, split: MdsSplit) -> Iterator[Found | Rejection]:
        """The rows' images: in the order of a tar, or of the table; images left over are counted in `split`."""
        yield from table.rejected
        if self.tars:
            yield from find_in_tars(self.tars, table, split)
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
        return Source(*_images_at(_expand([images]) if images else [paths[0].parent], paths[0]), table=paths[0])
    if images:
        raise ValueError(f"--images {images!r} goes with a SOURCE that is a table; SOURCE={given[0]!r} is not")
    table = _expand([captions])[0] if captions else None
    tars, folder = _images_at(paths, table)
    if table is not None:
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
    told, inside, grouped = _look_into(tars)
    beside = _tables_in(folder)
    if grouped and layout == "auto":
        if beside:
            raise ValueError(
                f"{told.name} holds captions beside its images, and {beside[0].name} lies beside it; "
                "choose with --format webdataset or --format table"
            )
        return Source(tars, folder, None)
    return Source(tars, folder, _only_table({told.name: inside, folder.absolute().name: beside}))


def _expand(given: Sequence[str]) -> list[Path]:
    paths = []
    for text in given:
        if "://" in text:
            raise ValueError(f"{text!r} is remote, and sources are read from a local disk; {how_to_copy(text)}")
        path = Path(text).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
        if not matches:
            raise ValueError(
                f"{text!r} does not exist here; give a local file or folder, or a pattern that matches some"
            )
        paths += matches
    return paths


def how_to_copy(url: str) -> str:
    """What to do with a source in a store."""
    scheme, name = url.partition("://")[0], posixpath.basename(url)
    folder = posixpath.dirname(url) if "*" in name or "." in name else url
    commands = {"s3": f"aws s3 sync {folder} FOLDER", "gs": f"gcloud storage rsync -r {folder} FOLDER"}
    command = f": {commands[scheme]}" if scheme in commands else ""
    return f"copy it here first and give the copy{command}"


def _look_into(tars: Sequence[Path]) -> tuple[Path, list[str], bool]:
    """(tar, and what `look_inside` says of it) of the first that tells the layout, or else of an empty one.

    Raises: DamagedTar when none can be read; of the first.
    """
    empty, damage = None, None
    for tar in tars:
        try:
            tables, grouped = look_inside(tar)
        except EmptyTar:
            empty = empty or tar
        except DamagedTar as error:  # which costs its samples alone
            damage = damage or error
        else:
            return tar, tables, grouped
    if empty is None and damage is not None:
        raise damage
    return empty or tars[0], [], False


def _images_at(paths: Sequence[Path], table: Path | None) -> tuple[list[Path], Path]:
    """(tars, folder they lie in), or ([], folder of loose images).

    Of a folder with both, the tars, unless `table`, or without it one in or beside the folder, names a loose image.
    """
    if len(paths) == 1 and paths[0].is_dir():
        names = sorted(entry.name for entry in os.scandir(paths[0]))
        loose = any(name.lower().endswith(IMAGE_ENDINGS) for name in names)
        tars = _tars_in(paths[0])
        if loose and tars:
            tables = [table] if table else [*_tables_in(paths[0]), *_tables_in(paths[0].absolute().parent)]
            loose = any(names_a_file(some, paths[0], IMAGE_ENDINGS) for some in tables)
        if loose or tars or _tables_in(paths[0]):
            return ([] if loose else tars), paths[0]
        # DataComp's code writes its tars to POOL/shards, and in some versions to a folder below, named by scale.
        below = {path: found for name in names if (path := paths[0] / name).is_dir() and (found := _tars_in(path))}
        if len(below) > 1:
            raise ValueError(
                f"SOURCE={str(paths[0])!r} holds several folders of tars: {', '.join(path.name for path in below)}; "
                "give one of them"
            )
        return next(((found, path) for path, found in below.items()), ([], paths[0]))
    for path in paths:
        if path.is_dir() or not path.name.lower().endswith(TAR_ENDINGS):
            raise ValueError(
                f"SOURCE={str(path)!r} must be one folder, one table ({', '.join(DELIMITERS)}) "
                f"or any number of tars ({', '.join(TAR_ENDINGS)})"
            )
    return list(paths), paths[0].parent


def _tars_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.lower().endswith(TAR_ENDINGS) and path.name[0] != ".")


def _tables_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in DELIMITERS and path.name[0] != "." and path.is_file()
    )


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


def _in_folder(image: str, folder: Path) -> str:
    root = os.path.abspath(folder)
    name = os.path.relpath(os.path.join(root, image), root)
    if name.startswith("../"):
        raise ValueError(f"the path leaves the folder {folder.name!r}")
    return name


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
