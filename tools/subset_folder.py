"""Reads the samples of an MDS folder as they are stored, and writes a chosen subset of them.

PairFolder        columns as values or as the bytes they are stored in; no pickled column is ever loaded
subset_folder     a folder that is either complete or absent
write_subset      subset.csv, and the samples themselves, byte for byte
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pairs import positive
from staged_folder import staged_folder
from streaming import MDSWriter
from streaming.base.format import reader_from_json
from torch import Tensor
from tqdm import tqdm

from clipcov_stream.checked import check_file, check_header, decompressed
from clipcov_stream.mds_index import PICKLED, checked_index, read_index
from clipcov_stream.reader import bounded
from clipcov_stream.remote import is_remote
from clipcov_stream.sidecar import EMBEDDER_FILE

if TYPE_CHECKING:
    from jaxtyping import Float

SUBSET_FILES = {"subset.csv", "source.json"}


class PairFolder:
    """The samples of a local MDS folder, in order; the folder is only read.

    Attributes:
        where: what errors call the folder.
        sound: numbers of the shards whose files were found to be what the index says; each is looked at once.

    Raises: ValueError for a folder without index.json, without samples, or whose shards differ in their columns.
    """

    def __init__(self, folder: str) -> None:
        if is_remote(folder):
            raise ValueError(f"FOLDER={folder!r} is a URL; give a local MDS folder, such as a copy of it")
        self.path = Path(folder).expanduser().resolve()
        index = self.path / "index.json"
        if not index.is_file():
            below = sorted(path.parent.name for path in self.path.glob("*/index.json"))
            hint = f"did you mean one of its splits, {below}?" if below else "give a local MDS folder"
            raise ValueError(f"FOLDER={folder!r} has no index.json (checked {index}); {hint}")
        try:
            shards = checked_index(read_index(index), repr(folder), allow_pickle=None)
            self._shards: list[Any] = [bounded(reader_from_json(str(self.path), None, shard)) for shard in shards]
            columns = [dict(zip(shard.column_names, shard.column_encodings, strict=True)) for shard in self._shards]
        except Exception as error:  # whatever another kind of index makes Streaming say
            raise ValueError(f"{index} is not the index of an MDS folder: {error!r}") from error
        if len(self) == 0 or any(other != columns[0] for other in columns):
            raise ValueError(f"FOLDER={folder!r} has no samples, or shards with other columns than the first")
        self.columns: dict[str, str] = columns[0]
        self.compression: str | None = self._shards[0].compression
        self.where, self.sound = str(self.path), set[int]()

    def __len__(self) -> int:
        return sum(len(shard) for shard in self._shards)

    @property
    def embedder(self) -> dict[str, Any] | None:
        """What made the embedding columns, by embedder.json; None where there is no such file.

        Raises: ValueError for a file that says something else.
        """
        path = self.path / EMBEDDER_FILE
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not 0 < float(record["logit_scale"]) < float("inf"):
                raise ValueError(f"logit_scale={record['logit_scale']} must be above 0")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not say what made the embeddings: {error!r}") from error
        return record

    def samples(self, rows: Sequence[int], decode: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
        """The samples of ascending `rows`: `decode` columns as values, all others as the bytes they are stored in.

        So a pickled column runs no code. A compressed shard is unpacked into a scratch folder while it is read.

        Raises: ValueError for a shard that is missing, broken, or not what the index says.
        """
        first = 0
        for number, shard in enumerate(self._shards):
            own = rows[bisect_left(rows, first) : bisect_left(rows, first + len(shard))]
            yield from self.samples_of(number, [row - first for row in own], decode)
            first += len(shard)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of every shard."""
        return [len(shard) for shard in self._shards]

    @property
    def compressed(self) -> dict[str, str]:
        """Compressed shards by name, and how they are."""
        return {shard.raw_data.basename: shard.compression for shard in self._shards if shard.compression is not None}

    def samples_of(
        self, number: int, rows: Sequence[int] | None = None, decode: Iterable[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """The same from one shard, `rows` counted from its first sample; all of them if not given."""
        shard, decode = self._shards[number], set(decode)
        if pickled := sorted(name for name in decode if self.columns[name] == PICKLED):
            raise ValueError(f"columns {pickled} of {self.path} are pickled; their bytes can be read, not their values")
        rows = range(len(shard)) if rows is None else rows
        if not len(rows):
            return
        with tempfile.TemporaryDirectory() as scratch:
            shard.dirname = str(self._sound_folder(number, Path(scratch)))
            try:
                shard.column_encodings = [e if name in decode else "bytes" for name, e in self.columns.items()]
                for row in rows:
                    yield shard[row]
            except Exception as error:  # whatever a broken file makes a decoder say
                raise ValueError(f"{shard.raw_data.basename} of {self.where} cannot be read: {error!r}") from error

    def _sound_folder(self, number: int, scratch: Path) -> Path:
        """Where a shard's uncompressed file lies: the folder itself, or `scratch`, into which it is then unpacked.

        What is copied from a damaged file would get hashes of its own, which fit. So the files that are read are
        compared with the index the first time.

        Raises: ValueError for files that are missing or not what the index says.
        """
        shard, is_new = self._shards[number], number not in self.sound
        raw, packed, folder = shard.raw_data, shard.zip_data, self.path
        try:
            if packed is not None and not (folder / raw.basename).is_file():
                if is_new:
                    check_file(folder / packed.basename, packed)
                data = decompressed(shard.compression, (folder / packed.basename).read_bytes(), raw.bytes)
                folder = scratch
                (folder / raw.basename).parent.mkdir(parents=True, exist_ok=True)
                (folder / raw.basename).write_bytes(data)
            if is_new:
                check_file(folder / raw.basename, raw)
                if not raw.hashes:
                    check_header(folder / raw.basename, len(shard))
        except Exception as error:  # of the disk, the decompressor, an unknown hash
            raise ValueError(
                f"shard {raw.basename} of {self.where} cannot be used: {type(error).__name__}: {error}; put a good "
                "copy in its place, or write the folder again (python tools/verify_mds.py "
                f"{self.where} says what else is bad)"
            ) from error
        self.sound.add(number)
        return folder

    def spans_of(self, number: int, column: str) -> np.ndarray | None:
        """(n, 3) int64 for the samples of a shard: the shard's number, and offset and length of a column's bytes in it.

        None for a compressed shard, in whose file the bytes do not lie as such.
        Raises: ValueError for a shard that is missing, broken, or not what the index says.
        """
        shard = self._shards[number]
        if shard.compression is not None:
            return None
        self._sound_folder(number, self.path)  # where it lies, as it is not compressed
        try:
            data = np.memmap(self.path / shard.raw_data.basename, np.uint8, mode="r")
            begins = np.frombuffer(data[4 : 4 * (len(shard) + 1)], np.uint32).astype(np.int64)
            # A sample is the sizes of its columns of variable size, then its columns in the order of the index.
            heads = begins[:, None] + np.arange(4 * shard.column_sizes.count(None))
            told = iter(np.ascontiguousarray(data[heads]).view(np.uint32).astype(np.int64).T)
            widths = {n: next(told) if s is None else s for n, s in zip(self.columns, shard.column_sizes, strict=True)}
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"{shard.raw_data.basename} of {self.where} cannot be read: {error!r}") from error
        offsets = begins + heads.shape[1] + sum(widths[name] for name in takewhile(column.__ne__, self.columns))
        return np.stack([np.full_like(begins, number), offsets, np.broadcast_to(widths[column], begins.shape)], axis=1)

    def embeddings(self, names: Mapping[str, str]) -> list[Float[Tensor, "n dim"]]:
        """The ndarray columns of these names, option -> column, in float32: 4 n dim bytes each.

        Raises: ValueError for a column that is missing or no ndarray, and for widths that differ.
        """
        arrays = sorted(name for name, encoding in self.columns.items() if encoding.startswith("ndarray"))
        for option, name in names.items():
            if name not in arrays:
                raise ValueError(f"{option} {name!r} is no ndarray column of {self.path}; those are {arrays}")
        tables: list[np.ndarray] = []
        samples = self.samples(range(len(self)), decode=names.values())
        for row, sample in enumerate(bar(samples, "read", "samples", total=len(self))):
            values = [np.ravel(sample[name]) for name in names.values()]
            tables = tables or [np.empty((len(self), len(values[0])), np.float32) for _ in values]
            width, widths = tables[0].shape[1], [len(value) for value in values]
            if width == 0 or any(other != width for other in widths):
                text = f"row {row} of {self.path} has embeddings of widths {widths}; all must have that of the first"
                raise ValueError(f"{text}, {width}, and above 0 ({', '.join(names)})")
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which is then counted
                for table, value in zip(tables, values, strict=True):
                    table[row] = value
        return [torch.from_numpy(table) for table in tables]


class VerbatimWriter(MDSWriter):
    """Writes samples whose values are encoded already."""

    def encode_sample(self, sample: dict[str, Any]) -> bytes:
        values = [sample[name] for name in self.column_names]
        variable = [len(value) for value, size in zip(values, self.column_sizes, strict=True) if size is None]
        return np.array(variable, np.uint32).tobytes() + b"".join(values)

    def flush_shard(self) -> None:
        if self.new_samples:  # a sample above the size limit would otherwise follow an empty shard
            super().flush_shard()


@contextmanager
def subset_folder(out: str, overwrite: bool) -> Iterator[Path]:
    """`staged_folder`, whose `overwrite` also replaces a subset without --mds, which has no index.json."""
    path = Path(out).expanduser().resolve()
    is_subset = path.is_dir() and {entry.name for entry in path.iterdir()} == SUBSET_FILES
    if not (overwrite and is_subset and not os.path.ismount(path)):
        with staged_folder(out, overwrite) as folder:
            yield folder
        return
    owner = f"{platform.node()}-{os.getpid()}"  # names by which staged_folder finds what a killed run leaves
    new, old = (path.with_name(f".{path.name}.{kind}-{owner}") for kind in ("partial", "replaced"))
    with staged_folder(new) as folder:
        yield folder
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_subset(
    folder: Path, pairs: PairFolder, rows: Sequence[int], classes: Sequence[int], scores: Sequence[float], mds: bool
) -> None:
    """Write folder/subset.csv in order of picks and, with `mds`, folder/train in order of rows."""
    uids: dict[int, str] = {}
    has_uid = pairs.columns.get("uid") == "str"
    if mds or has_uid:
        out, ascending = str(folder / "train"), sorted(rows)
        writer = VerbatimWriter(columns=pairs.columns, out=out, hashes=["sha1", "xxh64"]) if mds else None
        samples = bar(pairs.samples(ascending), "write", "samples", total=len(rows))
        for row, sample in zip(ascending, samples, strict=True):
            if has_uid:
                uids[row] = sample["uid"].decode("utf-8")
            if writer:
                writer.write(sample)
        if writer:
            writer.finish()
            if pairs.embedder is not None:  # of whose temperature training would know nothing
                (folder / "train" / EMBEDDER_FILE).write_bytes((pairs.path / EMBEDDER_FILE).read_bytes())
    with (folder / "subset.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["row", *(["uid"] if has_uid else []), "class", "rank", "score"])
        for rank, (row, label, score) in enumerate(zip(rows, classes, scores, strict=True)):
            table.writerow([row, *([uids[row]] if has_uid else []), label, rank, score])


def refuse_sidecar(embedder: Any, folder: str, what: str, instead: str) -> None:
    """Raise ValueError if `folder` is a sidecar by its embedder.json: a part of one would pass for the whole."""
    if isinstance(embedder, dict) and embedder.get("sidecar"):
        raise ValueError(
            f"FOLDER={folder!r} is a sidecar, which belongs to all samples of its source and has no images: {what} "
            f"would write a part of it; {instead} the folder that it was made from, whose rows are the same"
        )


def add_subset_options(parser: argparse.ArgumentParser) -> None:
    """What every tool that picks a subset of a folder takes: FOLDER, OUT, the size and how to write it."""
    parser.add_argument("folder", metavar="FOLDER", help="local MDS folder with embedding columns")
    parser.add_argument("out", metavar="OUT", help="folder to write: subset.csv, source.json, train/ with --mds")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--fraction", type=float, help="share of the usable samples to pick, rounded down, at least one")
    size.add_argument("--num", type=positive, metavar="N", help="number of samples to pick")
    parser.add_argument("--mds", action="store_true", help="write the chosen samples too, byte for byte, to OUT/train")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new folder is complete")


def open_pairs(args: argparse.Namespace) -> PairFolder:
    """FOLDER, once `add_subset_options`' arguments are found to make sense.

    Raises:
        ValueError: a fraction outside (0, 1], an OUT that is or holds FOLDER, or --mds of a sidecar.
    """
    if args.num is None and not 0 < args.fraction <= 1:
        raise ValueError(f"--fraction {args.fraction} must be above 0 and at most 1")
    pairs, out = PairFolder(args.folder), Path(args.out).expanduser().resolve()
    embedder = pairs.embedder  # one that cannot be read is an error before anything is written
    if args.mds:
        refuse_sidecar(embedder, args.folder, "--mds", "leave --mds out, and give OUT to tools/export.py mds with")
    if out == pairs.path or out in pairs.path.parents:
        raise ValueError(f"OUT={args.out!r} is or holds FOLDER={args.folder!r}; give a folder of its own")
    return pairs


def report(run: Callable[[argparse.Namespace], dict[str, Any]], args: argparse.Namespace) -> int:
    """Run, and print the figures as one JSON document, or the error; returns the exit code."""
    try:
        figures = run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{figures['selected']} of {figures['samples']} samples written to {args.out}")
    print(json.dumps(figures))
    return 0


def bar(steps: Iterable[Any], what: str, unit: str, show: bool = True, total: int | None = None) -> Iterable[Any]:
    """A progress bar on stderr."""
    return tqdm(steps, what, total, unit=f" {unit}", file=sys.stderr, disable=not show)
