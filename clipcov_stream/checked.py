"""Shards that are sound or noted as bad: what Streaming fetches, and what lies in its cache, is looked at before use.

Streaming checks a hash only if it is told which, only after a download, and leaves the damaged file under its name, so
the next run takes it. Here a file has its name only once it is sound. What cannot be had is noted in a small file that
all processes of the machine see; nothing is raised, because this runs in Streaming's background threads, where an error
would end the epoch, or leave other processes waiting for ever. `guard.GuardedDataset` raises it where it is read.

A hash of 64 MiB takes 14 ms (xxh64) or 56 ms (sha1), without the interpreter's lock, ahead of its use.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cramjam
import numpy as np
from streaming import Stream
from streaming.base.hashing import get_hash

from clipcov_stream.redact import redacted
from clipcov_stream.remote import FIRST_PAUSE, within

log = logging.getLogger(__name__)

FASTEST = ("xxh3_64", "xxh64", "xxh128", "sha1", "md5")
"""Hashes in the order in which they are taken where an index has several."""
LONGEST_PAUSE = 8.0
"""Seconds between two attempts."""
OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
"""Errors that are no shard's: another attempt will not help, and to skip the shard would be wrong."""
DECOMPRESSORS: dict[str, Callable[[bytes, bytearray], int]] = {
    "br": cramjam.brotli.decompress_into,
    "bz2": cramjam.bzip2.decompress_into,
    "gz": cramjam.gzip.decompress_into,
    "snappy": cramjam.snappy.decompress_raw_into,
    "zstd": cramjam.zstd.decompress_into,
}
"""Streaming's algorithms, into a buffer that does not grow; number of bytes."""


class BadShard(RuntimeError):
    """A shard that cannot be had, or is not what its index says; the message names it and what may help."""


def check_file(path: Path, info: Any, hash_name: str | None = None) -> None:
    """Raise OSError unless a file has the size and the hash that the index promises.

    Args:
        path: of the file.
        info: Streaming's FileInfo: `bytes` and `hashes`.
        hash_name: which hash; None is the fastest that there is, if any.
    """
    size = path.stat().st_size
    if size != info.bytes:
        raise OSError(f"it has {size} bytes, the index says {info.bytes}")
    names = [name for name in FASTEST if name in info.hashes] or sorted(info.hashes)
    name = hash_name or (names[0] if names else None)
    if name is not None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = get_hash(name, data)  # pyright: ignore[reportArgumentType]
        if found != info.hashes[name]:
            raise OSError(f"its {name} is {found}, the index says {info.hashes[name]}")


def check_header(path: Path, num_samples: int) -> None:
    """Raise OSError unless an MDS file begins as one of so many samples: their number, and offsets that cover it.

    It finds what is no shard at all; for damage within samples a hash is needed.
    """
    with path.open("rb") as file:
        head = np.frombuffer(file.read(4 * (num_samples + 2)), np.uint32).astype(np.int64)
    size = path.stat().st_size
    if len(head) != num_samples + 2 or head[0] != num_samples:
        raise OSError(f"it says it has {head[0] if len(head) else 'no'} samples, the index says {num_samples}")
    if head[1] < head.nbytes // 2 or head[-1] != size or (np.diff(head[1:]) < 0).any():
        raise OSError("its table of offsets is damaged")


def decompressed(compression: str, data: bytes, num_bytes: int) -> memoryview:
    """What a shard's compressed form holds, as long as that is no more than the index promises.

    A few kilobytes may be the compressed form of terabytes. So it is written into a buffer of the promised size, and
    ended where that is full, whichever algorithm it is; memory is that buffer and at most the algorithm's window.

    Args:
        compression: one of Streaming's, with or without a level (`zstd:7`).
        data: the compressed form.
        num_bytes: the uncompressed file's, `raw_data.bytes` of the index.

    Returns: the bytes; fewer than `num_bytes` if there were fewer.

    Raises:
        OSError: it holds more, or is damaged.
    """
    found = bytearray(num_bytes)
    try:
        size = DECOMPRESSORS[compression.partition(":")[0]](data, found)
    except cramjam.DecompressionError as error:
        raise OSError(
            f"it cannot be decompressed ({compression}) to the {num_bytes} bytes that the index says: {error}"
        ) from error
    return memoryview(found)[:size]


class CheckedStream(Stream):
    """Streaming's Stream, whose shards are sound or noted as bad.

    Args:
        timeout: seconds after which a shard counts as stuck; 0 never.
        index: the index.json, where it is at hand; Streaming's leader would download another.
        options: Stream's.

    Attributes:
        notes: the folder of notes, set once Streaming has a name for it.
    """

    def __init__(self, *, timeout: float = 0, index: bytes | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.timeout, self.index = timeout, index
        self.notes: Path | None = None

    @property
    def where(self) -> str:
        return os.path.join(self.remote or self.local, self.split).rstrip("/")

    @property
    def can_fetch(self) -> bool:
        """Whether there is a copy elsewhere. What lies here is the user's own otherwise, and is never deleted."""
        return self.remote is not None and os.path.realpath(self.remote) != os.path.realpath(self.local)

    def apply_default(self, default: dict[str, Any]) -> None:
        super().apply_default(default)
        # Streaming compares strings: '/x/' is another place than '/x' to it, whose compressed shards it then drops.
        self.safe_keep_zip = self.keep_zip or not self.can_fetch

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        path = self.path("index.json")
        if self.index is not None and world.is_local_leader and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name("index.json.part")
            part.write_bytes(self.index)
            os.replace(part, path)
        shards: list[Any] = [*super().get_shards(world, allow_unsafe_types)]
        lacking = [s.raw_data.basename for s in shards if self.validate_hash not in (None, *s.raw_data.hashes)]
        if lacking:
            raise ValueError(
                f"stream.validate_hash={self.validate_hash!r}: {self.where} has no such hash of {lacking[0]}; it has "
                f"{sorted(shards[0].raw_data.hashes)}. Leave it out: the fastest that there is is checked by itself"
            )
        return shards

    def set_up_local(self, shards: list[Any], cache_usage_per_shard: Any) -> None:
        """Note what lies here; where there is no other copy Streaming would delete shards whose zip is gone."""
        if self.can_fetch:
            super().set_up_local(shards, cache_usage_per_shard)
        else:
            cache_usage_per_shard[:] = [self._num_bytes(shard) for shard in shards]

    def path(self, basename: str) -> Path:
        return Path(self.local, self.split, basename)

    def prepare_shard(self, shard: Any) -> int:
        """Make a shard's file sound, or note why it cannot be had. Never raises.

        Returns: change of the cache's bytes, as Streaming counts them.
        """
        name = shard.raw_data.basename
        if self.note_of(name) is not None:
            return 0
        before = self._num_bytes(shard)
        try:
            self._make_sound(shard)
        except Exception as error:  # of the store, the disk, the decompressor
            self.note(name, f"{type(error).__name__}: {error}", getattr(error, "errno", None) in OF_THIS_MACHINE)
            log.error("shard %s of %s cannot be used: %s", name, self.where, redacted(error))
        return self._num_bytes(shard) - before

    def _num_bytes(self, shard: Any) -> int:
        files = (info for pair in shard.file_pairs for info in pair if info is not None)
        return sum(info.bytes for info in files if self.path(info.basename).is_file())

    def _make_sound(self, shard: Any) -> None:
        """Check the shard's file, or get it: from the store, tried anew with pauses, or from its compressed form."""
        raw, packed = shard.raw_data, shard.zip_data
        path, zipped = self.path(raw.basename), None if packed is None else self.path(packed.basename)
        until = time.monotonic() + 0.9 * self.timeout if self.timeout else None
        attempts = max(1, self.download_retry + 1) if self.can_fetch else 1 + (zipped is not None)
        for attempt in range(attempts):
            try:
                if not path.is_file() or (attempt and zipped is not None and zipped.is_file()):
                    self._get(shard, until)
                else:
                    self._check(path, shard)
                if zipped is not None and not self.safe_keep_zip:
                    zipped.unlink(missing_ok=True)
                return
            except Exception as error:
                is_late = until is not None and time.monotonic() >= until
                of_this_machine = getattr(error, "errno", None) in OF_THIS_MACHINE
                # The only copy may be sound in spite of the error; what is unpacked anew takes its name once checked.
                if self.can_fetch and not of_this_machine:
                    path.unlink(missing_ok=True)
                    if zipped is not None:
                        zipped.unlink(missing_ok=True)
                if is_late or of_this_machine or attempt == attempts - 1:
                    raise
                self._downloader.clean_up()
                log.warning("shard %s of %s, attempt %d: %s", raw.basename, self.where, attempt + 1, redacted(error))
                if self.can_fetch:
                    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1))
                    time.sleep(pause if until is None else max(0.0, min(pause, until - time.monotonic())))

    def _check(self, path: Path, shard: Any) -> None:
        check_file(path, shard.raw_data, self.validate_hash)
        if not shard.raw_data.hashes:
            check_header(path, len(shard))

    def _get(self, shard: Any, until: float | None) -> None:
        """The shard's file under its name, checked."""
        raw, packed = shard.raw_data, shard.zip_data
        path = self.path(raw.basename)
        part = path.with_name(f"{path.name}.part")
        parts = [part]
        try:
            if packed is None:
                self._download(raw.basename, part, until)
            else:
                zipped = self.path(packed.basename)
                if not zipped.is_file():
                    zip_part = zipped.with_name(f"{zipped.name}.part")
                    parts.append(zip_part)
                    self._download(packed.basename, zip_part, until)
                    os.replace(zip_part, zipped)
                check_file(zipped, packed, self.validate_hash if self.validate_hash in packed.hashes else None)
                part.write_bytes(decompressed(shard.compression, zipped.read_bytes(), raw.bytes))
            self._check(part, shard)
            os.replace(part, path)
        finally:
            for left in parts:
                left.unlink(missing_ok=True)
                left.with_name(f"{left.name}.tmp").unlink(missing_ok=True)  # where `remote` is a path

    def _download(self, basename: str, part: Path, until: float | None) -> None:
        if not self.can_fetch:
            raise FileNotFoundError("the file is missing")
        assert self.remote is not None
        part.unlink(missing_ok=True)  # a killed run's; the downloader would take it for done
        remote = os.path.join(self.remote, self.split, basename)
        left = None if until is None else max(0.0, until - time.monotonic())
        try:
            # In a thread that nothing waits for at exit: a store may send a byte a second for ever.
            within(left, self._downloader.download, remote, str(part), self.download_timeout)
        except TimeoutError as error:
            raise TimeoutError(f"it did not come within stream.timeout={self.timeout:g} s") from error

    def note_of(self, basename: str) -> dict[str, Any] | None:
        """What was noted of a bad shard, if it is one."""
        if self.notes is None:
            return None
        try:
            return json.loads(Path(self.notes, quote(basename, "")).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def note(self, basename: str, error: str, is_fatal: bool = False) -> None:
        """Note a bad shard for all processes of this machine; `is_fatal` if it must not be skipped."""
        error = redacted(error)
        if self.notes is None:
            raise BadShard(f"shard {basename} of {self.where} cannot be used: {error}")
        self.notes.mkdir(parents=True, exist_ok=True)
        path = Path(self.notes, quote(basename, ""))
        # Two threads may note the same shard at once.
        part = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{path.name}")
        part.write_text(json.dumps({"shard": basename, "error": error, "is_fatal": is_fatal}), encoding="utf-8")
        os.replace(part, path)

    def noted(self) -> dict[str, dict[str, Any]]:
        """All notes, by shard."""
        if self.notes is None or not self.notes.is_dir():
            return {}
        found = (json.loads(path.read_text(encoding="utf-8")) for path in self.notes.glob("[!.]*"))
        return {note["shard"]: note for note in sorted(found, key=lambda note: note["shard"])}
