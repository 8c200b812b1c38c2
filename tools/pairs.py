"""Image-caption pairs -> an MDS folder with the columns image (bytes as found), caption and uid.

Three layouts are read. A table (CSV, TSV or JSONL in UTF-8) names images of a folder or of tars; or tars in
the webdataset layout, as img2dataset writes them, hold KEY.jpg beside KEY.txt or KEY.json; or DataComp's, such tars
with embeddings in metadata of their own (`datacomp`), which become image_embedding and text_embedding. Tars are read
once from front to back, so samples come in tar order and memory holds one shard, whatever the size of
the tar; the rows of a table are held in memory (about 0.5 kB each).

A row that cannot be used is rejected, never fatal: image_missing, image_empty, image_too_large,
not_an_image, caption_empty, caption_missing, caption_encoding, label_empty, row_malformed, tar_damaged, and those
of `datacomp`.
"""

from __future__ import annotations

import argparse
import glob
import io
import os
import posixpath
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from datacomp import ARRAYS, Metadata, embedding_encodings, find_metadata, write_embedder
from mds_folder import Found, MdsSplit, Rejection, mds_folder, write_found
from parallel import TarJob, convert, pair
from remote_folder import SCHEMES, is_remote
from table_source import DELIMITERS, KNOWN_NAMES, Table, read_table
from tar_source import (
    IMAGE_ENDINGS,
    TAR_ENDINGS,
    count_not_downloaded,
    find_in_tars,
    look_inside,
    name_in_tar,
    number_repeats,
    read_webdataset,
    tar_members,
)

COLUMNS = {"image": "bytes", "caption": "str", "uid": "str"}


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
            return name_in_tar(image, inside) if self.tars else _in_folder(image, self.folder)

        # surrogateescape carries a byte that is no UTF-8 up to the row it belongs to.
        with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
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
    inside, grouped = look_inside(tars[0])
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


def run(args: argparse.Namespace) -> None:
    """Do what `pairs` was asked to; the summary goes to stdout.

    Raises: ValueError for whatever the user can mend; no OUT is left behind.
    """
    source = find_source(args.source, args.images, args.captions, args.format)
    _check_options(args, source)
    metadata = None
    if args.embeddings:
        metadata = Metadata.read(find_metadata(args.metadata, source.tars), args.embeddings)
    columns = COLUMNS | (embedding_encodings(args.embeddings) if metadata else {})
    with open_output(args, columns, source) as split:
        if metadata:
            write_embedder(split.folder, metadata.kind)
            for rejection in metadata.rejected:
                split.reject(rejection)
        if source.table is None:
            split.not_downloaded = count_not_downloaded(source.tars)
        if args.workers > 1:
            _convert(args, source.tars, split, columns, metadata)
        else:
            found, total = _find(args, source, split, metadata)
            choose = None if args.shuffle_seed is None else _shuffle(args.shuffle_seed, args.limit)
            limit = args.limit if choose is None else None
            write_found(found, split, pair, total=total, limit=limit, choose=choose)
    print(split.summary(), f"written to {args.out}", sep="\n")


def _check_options(args: argparse.Namespace, source: Source) -> None:
    if args.metadata and not args.embeddings:
        raise ValueError(f"--metadata {args.metadata!r} goes with --embeddings {' or '.join(ARRAYS)}")
    if source.table is None and args.image_column:
        raise ValueError("--image-column goes with a table; webdataset tars have none")
    if source.table is not None and args.embeddings:
        raise ValueError(f"--embeddings {args.embeddings} goes with webdataset tars, as DataComp's; SOURCE has a table")
    if args.workers > 1 and source.table is not None:
        raise ValueError(f"--workers {args.workers} goes with webdataset tars; a table is read by one process")
    if args.workers > 1 and (args.limit or args.shuffle_seed is not None):
        raise ValueError(
            f"--workers {args.workers} writes whole tars in their order: leave out --limit, --shuffle-seed"
        )


def _find(
    args: argparse.Namespace, source: Source, split: MdsSplit, metadata: Metadata | None
) -> tuple[Iterator[Found | Rejection], int | None]:
    """(the source's images with their rows, how many rows there are if that is known)."""
    if source.table is None:
        found = read_webdataset(source.tars, args.caption_column, args.uid_column)
        return number_repeats(metadata.attach(found) if metadata else found, Counter()), None
    columns = {"image": args.image_column, "caption": args.caption_column, "uid": args.uid_column}
    table = source.read_table(columns, optional=("uid",))
    print(table)
    return source.find(table, split), len(table.rows)


def _convert(
    args: argparse.Namespace,
    tars: Sequence[Path],
    split: MdsSplit,
    columns: Mapping[str, str],
    metadata: Metadata | None,
) -> None:
    with tempfile.TemporaryDirectory(dir=split.folder) as shared:
        if metadata:
            metadata.save(Path(shared))
        job = TarJob(
            columns,
            args.caption_column,
            args.uid_column,
            max(1, (os.cpu_count() or 1) // args.workers),
            Path(shared) if metadata else None,
            _writer_options(args),
        )
        convert(tars, split, job, args.workers)


def _shuffle(seed: int, limit: int | None) -> Callable[[list[Any]], list[int]]:
    return lambda labels: random.Random(seed).sample(range(len(labels)), len(labels))[:limit]


def open_output(
    args: argparse.Namespace, columns: Mapping[str, str], source: Source
) -> AbstractContextManager[MdsSplit]:
    """`mds_folder` as the options of `add_source_options` and `add_output_options` want it.

    Raises: ValueError also when OUT is the source or holds it, since --overwrite would delete it.
    """
    out = None if is_remote(args.out) else Path(args.out).expanduser().resolve()
    for path in (*source.tars, source.folder, source.table):
        if isinstance(path, Path) and (path.resolve() == out or out in path.resolve().parents):
            raise ValueError(f"OUT={args.out!r} is or holds the source {path.name!r}; give a folder of its own")
    paths = {key: Path(value) for key in ("images", "captions", "metadata") if (value := getattr(args, key, None))}
    # The number of workers changes nothing in the output, so it does not show there either.
    arguments = {
        key: value for key, value in vars(args).items() if key not in ("out", "workers") and not callable(value)
    }
    arguments |= paths | {"source": [Path(text) for text in args.source]}
    return mds_folder(
        args.out,
        columns,
        overwrite=args.overwrite,
        source={"tool": f"make_mds.py {args.command}", "arguments": arguments},
        **_writer_options(args),
    )


def _writer_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "size_limit": args.size_limit,
        "compression": None if args.compression == "none" else args.compression,
        "hashes": [] if args.hashes == "none" else args.hashes.split(","),
    }


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def add_source_options(parser: argparse.ArgumentParser, roles: Sequence[str]) -> None:
    """SOURCE, OUT, and the options that say how to read a table; one --ROLE-column for each role."""
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="a table, a folder, or tars (patterns allowed)")
    parser.add_argument(
        "out",
        metavar="OUT",
        help=f"folder to write: local, new or empty, or a URL ({', '.join(SCHEMES)}) without index.json",
    )
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
    parser.add_argument("--embeddings", choices=tuple(ARRAYS), help="DataComp: write its embeddings of this model, too")
    parser.add_argument("--metadata", metavar="FOLDER", help="DataComp: with its .parquet and .npz (found if near)")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes that convert tars (1)")
    parser.add_argument("--shuffle-seed", type=int, help="write in a random order (default: as found)")
    parser.add_argument("--limit", type=positive, metavar="N", help="write N samples: the first, or random if shuffled")
    add_output_options(parser)
    parser.set_defaults(run=run)
