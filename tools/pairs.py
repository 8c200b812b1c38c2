"""Image-caption pairs -> an MDS folder with the columns image (bytes as found), caption and uid.

Three layouts are read. A table (CSV, TSV or JSONL in UTF-8) names images of a folder or of tars. Tars in the webdataset
layout, as img2dataset writes them, hold KEY.jpg beside KEY.txt or KEY.json. DataComp's are such tars whose embeddings
lie in metadata of their own (`datacomp`); they become image_embedding and text_embedding. Tars are read once from front
to back, so samples come in tar order and memory holds one shard, whatever the size of the tar; the rows of a table are
held in memory (about 0.5 kB each).

A row that cannot be used is rejected, never fatal: image_missing, image_empty, image_too_large, not_an_image,
caption_empty, caption_missing, caption_encoding, label_empty, row_malformed, tar_damaged, and those of `datacomp`.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from datacomp import ARRAYS, Metadata, embedding_encodings, find_metadata, write_embedder
from held_out import HELD, held_out, key_of
from mds_folder import Found, MdsSplit, Rejection, Row, mds_folder, mds_split, write_found
from parallel import TarJob, convert, pair
from remote_folder import SCHEMES
from source import Source, find_source
from table_source import KNOWN_NAMES
from tar_source import count_not_downloaded, number_repeats, read_webdataset

from clipcov_stream.remote import is_remote

COLUMNS = {"image": "bytes", "caption": "str", "uid": "str"}


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
        with _open_held(args, columns, split, metadata) if args.hold_out else nullcontext() as held:
            if args.workers > 1:
                _convert(args, source.tars, split, columns, metadata, held)
            else:
                _write(args, *_find(args, source, split, metadata), split, held)
    print(split.summary(), f"written to {args.out}", sep="\n")
    if args.hold_out:
        print(f"held out in {args.out.rstrip('/')}/{HELD}: eval.NAME.local=..., 'eval.NAME.tasks=[retrieval]'")


@contextmanager
def _open_held(
    args: argparse.Namespace, columns: Mapping[str, str], split: MdsSplit, metadata: Metadata | None
) -> Iterator[MdsSplit]:
    source = {"tool": f"make_mds.py {args.command}", "arguments": {"hold_out": args.hold_out, "seed": _seed(args)}}
    with mds_split(split.folder / HELD, columns, source=source, allow_empty=True, **_writer_options(args)) as held:
        if metadata:
            write_embedder(held.folder, metadata.kind)
        yield held
        split.num_held = held.num_written


def _seed(args: argparse.Namespace) -> int:
    """Of the pairs held out."""
    return args.shuffle_seed or 0


def _write(
    args: argparse.Namespace,
    found: Iterator[Found | Rejection],
    total: int | None,
    split: MdsSplit,
    held: MdsSplit | None,
) -> None:
    keys = array("Q")
    out: set[int] = set()

    def keyed(row: Row, data: bytes) -> dict[str, Any]:
        if held is not None:
            keys.append(key_of(data, _seed(args)))
        return pair(row, data)

    def choose(labels: list[Any]) -> list[int]:
        if held is not None:
            out.update(*held_out([keys], args.hold_out))
        rest = [index for index in range(len(labels)) if index not in out]
        if args.shuffle_seed is not None:
            rest = random.Random(args.shuffle_seed).sample(rest, len(rest))
        return rest[: args.limit]

    if args.shuffle_seed is None and held is None:
        write_found(found, split, pair, total=total, limit=args.limit)
        return
    # Unshuffled, what is behind the limit is not read.
    limit = args.limit + args.hold_out if args.limit and args.shuffle_seed is None else None
    aside = None if held is None else (held, lambda: sorted(out))
    write_found(found, split, keyed, total=total, limit=limit, choose=choose, aside=aside)


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
        return number_repeats(metadata.attach(found) if metadata else found, split), None
    columns = {"image": args.image_column, "caption": args.caption_column, "uid": args.uid_column}
    table = source.read_table(columns, optional=("uid",))
    print(table)
    split.uids_repeated = table.uids_repeated
    return source.find(table, split), len(table.rows)


def _convert(
    args: argparse.Namespace,
    tars: Sequence[Path],
    split: MdsSplit,
    columns: Mapping[str, str],
    metadata: Metadata | None,
    held: MdsSplit | None,
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
            _seed(args),
        )
        convert(tars, split, job, args.workers, held, args.hold_out)


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
    # The number of workers changes nothing but where shards end, so it does not show there either.
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


def make_parent(parser: argparse.ArgumentParser, out: Path | None) -> None:
    """Make the folder that --out lies in, before the work whose result goes there."""
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {str(out)!r} cannot be written: {error}")


def command_of(tool: str, parser: argparse.ArgumentParser, args: argparse.Namespace, *without: str) -> str:
    """How to run `tool` again, for its results: every option that is not its default, but those named."""
    given = {name: value for name, value in vars(args).items() if name not in without}
    options = [(name, value) for name, value in given.items() if value != parser.get_default(name)]
    argv = [text for name, value in options for text in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["python", f"tools/{tool}", *argv])


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
        "--hashes", default="sha1,xxh64", help="checksums kept per shard, separated by commas (sha1,xxh64), or none"
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
    parser.add_argument(
        "--hold-out",
        type=positive,
        default=0,
        metavar="N",
        help="keep N pairs, drawn from all with the shuffle seed (or 0), out of OUT and write them to OUT/held, to "
        "evaluate retrieval on; of several captions of one image all, so perhaps a few more. In one process all "
        "samples then wait on OUT's disk first (0)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="write N samples: the first, or random if shuffled")
    add_output_options(parser)
    parser.set_defaults(run=run)
