"""Embeddings that lie in a folder of their own, aligned by sample with the folder that holds the images.

A sidecar is an MDS folder: shard by shard the samples of its source in their order, without the images. So it is
fetched as the stream gets there, not in one piece before the first step (at 2 kB a sample a billion samples are 2 TB),
it is checked by the hashes in its index, and whatever reads MDS reads it. One memory-mapped array would have to be
whole and local; here each shard is mapped, and a row takes some 10 microseconds. `tools/embed_mds.py --sidecar` writes
one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import struct
import time
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from streaming.base.format import reader_from_json
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader

from clipcov_stream.checked import check_file
from clipcov_stream.mds_index import checked_index
from clipcov_stream.redact import redacted
from clipcov_stream.remote import FIRST_PAUSE, is_remote, read_agreed, within

EMBEDDER_FILE = "embedder.json"
"""In a folder with embedding columns: what made them. `tools/embed_mds.py` writes it."""
SPAN_COLUMN = "image_span"
"""In a sidecar of uncompressed shards: where the sample's image lies, (4,) int64 shard number, offset, length and its
bytes' CRC-32; (3,), without the last, of earlier versions."""
DOWNLOAD_ATTEMPTS = 6
PATIENCE = 600.0
"""Seconds for one of them."""
MAX_MAPPED = 64  # shards at a time: each takes a file descriptor


class Sidecar:
    """The rows of a sidecar by the sample's index in the source folder.

    Args:
        where: a folder or a URL.
        cache: where the shards of a URL are kept, in a hidden folder named by their hashes. Nothing is evicted.

    Raises:
        ValueError: what cannot be read, or is not a sidecar.
    """

    def __init__(self, where: str, cache: str | Path) -> None:
        self.where = where.rstrip("/")
        self.is_remote = is_remote(where)
        try:
            self.index = index = self._small_file("index.json")
            self.record: dict[str, Any] = json.loads(self._small_file(EMBEDDER_FILE))
            name = f".sidecar-{hashlib.sha1(index).hexdigest()[:16]}"
            self.folder = Path(cache) / name if self.is_remote else Path(self.where)
            shards = checked_index(index, where, cache=self.folder if self.is_remote else None)
            if not shards:
                raise ValueError("it has no samples")
            if not self.record.get("sidecar"):
                raise ValueError(f"{EMBEDDER_FILE} does not say so; tools/embed_mds.py --sidecar writes one")
        except (OSError, ValueError, AttributeError, RecursionError) as error:  # whatever other JSON leads to
            raise ValueError(f"stream.sidecar {where!r} is not a sidecar: {error}") from error
        self.shards: list[Any] = [reader_from_json(str(self.folder), None, shard) for shard in shards]
        self.ends = list(accumulate(len(shard) for shard in self.shards))
        first = self.shards[0]
        self.columns: dict[str, str] = dict(zip(first.column_names, first.column_encodings, strict=True))
        self.mapped: dict[int, mmap.mmap] = {}
        self.sound: set[int] = set()
        """Shards that this process has looked at."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mapped": {}}  # another process maps its own

    def check_source(self, index: bytes) -> None:
        """Raise ValueError unless this is the sidecar of the whole folder whose index.json is given."""
        own, other = self.record.get("source_index_sha1"), hashlib.sha1(index).hexdigest()
        if own != other:
            raise ValueError(
                f"stream.sidecar {self.where!r} belongs to another folder than the stream: it was made from an "
                f"index.json of sha1 {own}, the stream's has {other}. Make one with tools/embed_mds.py --sidecar"
            )
        sizes, wanted = ([len(shard) for shard in self.shards], [s["samples"] for s in json.loads(index)["shards"]])
        # Of a shard without samples, as MDSWriter leaves one before a first sample that is too large, there is none.
        sizes, wanted = ([size for size in each if size] for each in (sizes, wanted))
        if sizes != wanted:  # a part of one, whose embedder.json is the whole one's
            at = next((at for at, pair in enumerate(zip(sizes, wanted, strict=False)) if pair[0] != pair[1]), None)
            differ = "" if at is None else f", and shard {at} has {sizes[at]:,} samples, the stream's {wanted[at]:,}"
            raise ValueError(
                f"stream.sidecar {self.where!r} is not the whole sidecar of the stream: it has {sum(sizes):,} samples "
                f"in {len(sizes)} shards, the stream {sum(wanted):,} in {len(wanted)}{differ}. A sidecar has all of a "
                "folder's samples in their order; make one with tools/embed_mds.py --sidecar"
            )

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        """A sample's values; arrays are read-only views of the shard.

        Raises:
            ValueError: a shard whose bytes are no such sample.
        """
        number = bisect_right(self.ends, sample_id)
        shard, data = self.shards[number], self._map(number)
        try:
            return self._row(shard, data, sample_id - self.ends[number] + len(shard))
        except Exception as error:  # whatever broken bytes make a decoder say
            name = shard.raw_data.basename
            raise ValueError(f"sample {sample_id} of stream.sidecar {self.where!r}, {name}: {error!r}") from error

    def _row(self, shard: Any, data: mmap.mmap, at: int) -> dict[str, Any]:
        (begin,) = struct.unpack_from("<I", data, 4 * (1 + at))
        # As MDS lays a sample out: the sizes of its columns of variable size, then all columns.
        num_sizes = shard.column_sizes.count(None)
        sizes = iter(struct.unpack_from(f"<{num_sizes}I", data, begin))
        begin += 4 * num_sizes
        row = {}
        for name, encoding, fixed in zip(shard.column_names, shard.column_encodings, shard.column_sizes, strict=True):
            size = next(sizes) if fixed is None else fixed
            row[name] = _decode(encoding, data, begin, size)
            begin += size
        return row

    def _map(self, number: int) -> mmap.mmap:
        if number not in self.mapped:
            path = self.folder / self.shards[number].raw_data.basename
            if number not in self.sound:
                self._make_sound(self.shards[number], path)
                self.sound.add(number)
            if len(self.mapped) >= MAX_MAPPED:
                self.mapped.pop(next(iter(self.mapped)))
            with path.open("rb") as file:
                self.mapped[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self.mapped[number]

    def _make_sound(self, shard: Any, path: Path) -> None:
        """Raise OSError unless a shard's file is what the index promises; a store's is fetched, again if need be."""
        if self.is_remote:
            with suppress(OSError):
                return check_file(path, shard.raw_data)
            self._fetch(shard, path)
        try:
            check_file(path, shard.raw_data)
        except OSError as error:
            raise OSError(
                f"shard {shard.raw_data.basename} of stream.sidecar {self.where!r} cannot be used: {error}; python "
                f"tools/verify_mds.py {self.where} says what else is bad"
            ) from error

    def _small_file(self, name: str) -> bytes:
        return read_agreed(f"{self.where}/{name}") if self.is_remote else Path(self.where, name).read_bytes()

    def _fetch(self, shard: Any, path: Path) -> None:
        """Download a shard once for all processes of this machine; under its name it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            # Looked at anew: another process may have fetched it since. A damaged one is replaced, never deleted.
            with suppress(OSError):
                return check_file(path, shard.raw_data)
            part = path.with_name(f"{path.name}.part")
            for attempt in range(DOWNLOAD_ATTEMPTS):
                try:
                    within(PATIENCE, self._download, shard, part)
                    break
                except Exception as error:  # every back end has kinds of its own
                    if attempt == DOWNLOAD_ATTEMPTS - 1:
                        text = f"{shard.raw_data.basename} of stream.sidecar {self.where!r} cannot be had"
                        raise OSError(redacted(f"{text} after {DOWNLOAD_ATTEMPTS} attempts: {error}")) from error
                    time.sleep(FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1))
            os.replace(part, path)

    def _download(self, shard: Any, part: Path) -> None:
        part.unlink(missing_ok=True)
        CloudDownloader.direct_download(f"{self.where}/{shard.raw_data.basename}", str(part))
        data = part.read_bytes()
        for name, expected in shard.raw_data.hashes.items():
            if get_hash(name, data) != expected:
                raise ValueError(
                    f"{shard.raw_data.basename} of stream.sidecar {self.where!r} fails its {name} checksum"
                )


def _decode(encoding: str, data: mmap.mmap, begin: int, size: int) -> Any:
    kind, _, form = encoding.partition(":")
    dtype, _, shape = form.partition(":")
    if kind == "ndarray" and shape.isdigit():  # what mds_decode takes ten times as long for
        return np.frombuffer(data, dtype, int(shape), begin)
    return mds_decode(encoding, data[begin : begin + size])
