"""Survivors' images alone, by byte ranges of the source's shards.

A sidecar says where in the uncompressed shard files of its source each image lies: shard, offset and length. So pools
need nothing of the source, and of its shards only the ranges that hold survivors are asked for. Streaming iterates the
sidecar, whose samples are the source's in the same shards and order: ids, order and resumption are the same.

Ranges that lie close to each other are one request. A fixed distance would fetch whole shards of small images, so it is
the bytes in between that are bounded: the narrowest gaps are bridged, as long as together they are at most MAX_WASTE of
the images' own bytes.

MDS has hashes of whole shards only, which say nothing of a range. So the sidecar has a checksum of each image (CRC-32,
10 microseconds for 20 kB), and what does not match it is asked for again. Sidecars of earlier versions have none: of
them wrong bytes of the right number go to the image decoder, which refuses most, and not all, of what is no image.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from streaming.base.util import bytes_to_int

from clipcov_stream.decode import MAX_PIXELS, UndecodableImage, raw_image
from clipcov_stream.mds_index import checked_index
from clipcov_stream.range_cache import RangeCache
from clipcov_stream.redact import redacted
from clipcov_stream.remote import FIRST_PAUSE, RangeReader, is_missing, is_remote, within
from clipcov_stream.sidecar import SPAN_COLUMN, Sidecar

CONNECTIONS = 16
ATTEMPTS = 6
"""With pauses of at most 8 s in all."""
MISSING_ATTEMPTS = 4
"""Of an object that the store says it does not have: a copy of it may be behind for a moment."""
MAX_GAP = 1 << 18
"""Bytes: about what a connection brings in the time that a request of its own would wait for its answer."""
MAX_WASTE = 0.25
MAX_REQUEST = 1 << 23
"""Bytes that ranges are joined up to, so that a long one does not keep the other connections idle."""


class Span(NamedTuple):
    """Where an image lies: the number of its shard in the source's index, and bytes in that shard's file.

    `crc` is their zlib.crc32; -1 is not known.
    """

    shard: int
    offset: int
    length: int
    crc: int = -1


@dataclass(frozen=True)
class Request:
    """One range of a shard, and the images in it."""

    shard: int
    begin: int
    end: int
    spans: tuple[Span, ...]


def coalesce(
    spans: Iterable[Span], max_gap: int = MAX_GAP, max_waste: float = MAX_WASTE, max_request: int = MAX_REQUEST
) -> list[Request]:
    """Requests that together hold every span once, in order of shard and offset.

    Of all ways to bridge gaps of at most `max_gap` bytes whose sum is at most `max_waste` of the spans' bytes, one that
    leaves the fewest requests: the narrowest gaps first. A request that then grows beyond `max_request` bytes is begun
    anew at a span. Empty spans take no request, and equal ones count once.
    """
    ordered = sorted({span for span in spans if span.length > 0})
    # A gap is known by the span after it.
    gaps: list[tuple[int, int]] = []
    own = end = 0
    for at, span in enumerate(ordered):
        is_first = at == 0 or ordered[at - 1].shard != span.shard
        end = 0 if is_first else end
        if not is_first and span.offset - end <= max_gap:
            gaps.append((max(0, span.offset - end), at))
        own += max(0, span.offset + span.length - max(end, span.offset))
        end = max(end, span.offset + span.length)
    bridged, budget = set(), max_waste * own
    for gap, at in sorted(gaps):
        budget -= gap
        if budget < 0:
            break
        bridged.add(at)
    joined: list[list[Span]] = []
    for at, span in enumerate(ordered):
        if at in bridged and max(end, span.offset + span.length) - joined[-1][0].offset <= max_request:
            joined[-1].append(span)
            end = max(end, span.offset + span.length)
        else:
            joined.append([span])
            end = span.offset + span.length
    return [Request(g[0].shard, g[0].offset, max(s.offset + s.length for s in g), tuple(g)) for g in joined]


def damaged(data: bytes, request: Request) -> bool:
    """Whether a request's bytes are not all that the checksums of its images promise."""
    at = ((span, span.offset - request.begin) for span in request.spans if span.crc >= 0)
    return any(zlib.crc32(memoryview(data)[begin : begin + span.length]) != span.crc for span, begin in at)


@dataclass(frozen=True)
class Source:
    """The folder whose shards ranges are read of.

    Args:
        local: the folder, or where Streaming may have left some of a remote folder's shards.
        remote: its URL, if it has one.
        names: of the shards' files.
        sizes: of the same, in bytes.
        encoding: of the images, one of Streaming's.
        index: the index.json itself.
    """

    local: Path | None
    remote: str | None
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    encoding: str
    index: bytes

    @classmethod
    def of(
        cls,
        index: bytes,
        local: str | None,
        remote: str | None,
        split: str | None,
        image: str,
        allow_pickle: Collection[str] | None = (),
    ) -> Source:
        """From what a stream's section says. Of pickled columns nothing is ever loaded here.

        Raises:
            ValueError: no shards, compressed ones, or no column of that name.
        """
        where = remote or local
        shards = checked_index(index, where, allow_pickle)
        if not shards:
            raise ValueError(f"stream {where!r} is an MDS folder without samples")
        kinds = {shard["compression"] for shard in shards} - {None}
        if kinds:
            raise ValueError(
                f"stream.range_reads=true: the shards of {where!r} are compressed ({', '.join(sorted(kinds))}), so no "
                "range of them is an image; leave it out, or write the folder without compression"
            )
        columns = dict(zip(shards[0]["column_names"], shards[0]["column_encodings"], strict=True))
        if image not in columns:
            raise ValueError(
                f"stream {where!r} has no column {image!r} (stream.columns.image); it has {sorted(columns)}"
            )
        below = split or ""
        if remote is not None and not is_remote(remote):  # a folder of this machine, or one that it mounts
            local, remote = remote, None
        return cls(
            local=None if local is None else Path(local, below),
            remote=None if remote is None else f"{remote.rstrip('/')}/{below}".rstrip("/"),
            names=tuple(shard["raw_data"]["basename"] for shard in shards),
            sizes=tuple(shard["raw_data"]["bytes"] for shard in shards),
            encoding=columns[image],
            index=index,
        )

    def check_sidecar(self, sidecar: Sidecar, image: str) -> None:
        """Raise ValueError unless a sidecar says where this folder's images lie."""
        sidecar.check_source(self.index)
        embedded = sidecar.record.get("embedded", {}).get("image", image)
        if embedded != image:
            raise ValueError(
                f"stream.sidecar {sidecar.where!r} says where the column {embedded!r} lies, but "
                f"stream.columns.image is {image!r}"
            )
        if SPAN_COLUMN not in sidecar.columns:
            raise ValueError(
                f"stream.range_reads=true needs the column {SPAN_COLUMN!r} of stream.sidecar {sidecar.where!r}, which "
                f"has {sorted(sidecar.columns)}; tools/embed_mds.py --sidecar writes it of uncompressed shards"
            )

    def cache(self, limit: int | str | None) -> RangeCache | None:
        """What keeps up to `limit` bytes of images ("20gb") in `local`; None if that is None.

        Raises:
            ValueError: no number of bytes, nothing to fetch from, or nowhere to keep it.
        """
        if limit is None:
            return None
        try:
            num_bytes = bytes_to_int(limit)
        except ValueError as error:
            raise ValueError(f"stream.range_cache={limit!r} is not a number of bytes: {error}") from error
        if self.remote is None or self.local is None:
            raise ValueError(
                f"stream.range_cache={limit!r} keeps what is fetched from stream.remote ({self.remote!r}) in a file in "
                f"stream.local ({None if self.local is None else str(self.local)!r}); set both, or leave it out"
            )
        return RangeCache(self.local / f".ranges-{hashlib.sha1(self.index).hexdigest()[:16]}.sqlite", num_bytes)


def sidecar_of(source: Source, where: str | None, local: str | None, image: str) -> dict[str, Any]:
    """Where Streaming finds the sidecar, `where`, of a source: arguments of its own.

    A remote one is kept in `local`, or the folder for temporary files, under the name that `sidecar.Sidecar` gives it.

    Raises:
        ValueError: no sidecar, or not one that says where this source's column `image` lies.
    """
    if where is None:
        raise ValueError(
            "stream.range_reads=true needs stream.sidecar, which says where images lie; tools/embed_mds.py --sidecar "
            "writes one"
        )
    sidecar = Sidecar(where, local or tempfile.gettempdir())
    source.check_sidecar(sidecar, image)
    remote = sidecar.where if sidecar.is_remote else None
    return {"local": str(sidecar.folder), "remote": remote, "split": None, "index": sidecar.index}


class Ranges:
    """Images by their spans, fetched by threads.

    A shard that lies in the source's local folder as a whole is read there. All others are asked for by requests, each
    tried ATTEMPTS times: after an error of the store, and after an answer of another length or checksum. What the store
    says it does not have is asked for MISSING_ATTEMPTS times.

    Args:
        source: where the spans lie.
        connections: requests at a time.
        timeout: seconds to wait for an answer, where the back end has such a limit.
        cache: of what was fetched earlier, if any.
        max_pixels: of an image that is stored as raw pixels.
        patience: seconds for a request and all its attempts; 0 is for ever.

    Raises:
        ValueError: a URL whose ranges nothing here can read.

    Attributes:
        num_bytes: read so far, from the store or from disk, but for what the cache had.
    """

    def __init__(
        self,
        source: Source,
        connections: int = CONNECTIONS,
        timeout: float = 60,
        cache: RangeCache | None = None,
        max_pixels: int = MAX_PIXELS,
        patience: float = 0,
    ) -> None:
        self.max_pixels, self.patience = max_pixels, patience
        self.source, self.cache, self.connections = source, cache, connections
        self.reader = None if source.remote is None else RangeReader(source.remote, connections, timeout)
        self.num_bytes = 0
        self._counting = threading.Lock()
        self._pauses = random.Random()  # of its own: training's generators stay as they are
        self._closed: Future[str] = Future()
        self._threads: ThreadPoolExecutor | None = None

    def __call__(self, spans: Sequence[Span]) -> list[Future[Any]]:
        """The images, encoded as they are stored, once they are there; equal spans are fetched once.

        A future raises OSError, with shard, offset and URL, if its range cannot be had, and UndecodableImage if there
        is no image in it.
        """
        images: dict[Span, Future[Any]] = {span: Future() for span in spans}
        outside = {span for span in images if not self._is_inside(span)}
        for span in outside:
            images[span].set_exception(UndecodableImage(f"the sidecar says that an image lies at {tuple(span)}"))
        kept: dict[Span, bytes] = {}
        if self.cache is not None:
            by_place = self.cache.get([span[:3] for span in images if span not in outside])
            found = {span: by_place[span[:3]] for span in images if span[:3] in by_place}
            kept = {span: data for span, data in found.items() if span.crc < 0 or zlib.crc32(data) == span.crc}
        for span, image in images.items():
            if span not in outside and (span.length == 0 or span in kept):
                self._give(image, kept.get(span, b""))
        if self._threads is None:
            self._closed = Future()
            self._threads = ThreadPoolExecutor(self.connections, "ranges")
        for request in coalesce(span for span in images if span not in kept and span not in outside):
            self._threads.submit(self._fetch, request, images)
        return [images[span] for span in spans]

    def _fetch(self, request: Request, images: dict[Span, Future[Any]]) -> None:
        try:
            data = self._answer(request)
        except Exception as error:
            for span in request.spans:
                images[span].set_exception(error)
            return
        with self._counting:
            self.num_bytes += len(data)
        found = {}
        for span in request.spans:
            at = span.offset - request.begin
            found[span] = data[at : at + span.length]
            self._give(images[span], found[span])
        if self.cache is not None and not self._is_local(request.shard):
            self.cache.put({span[:3]: image for span, image in found.items()})

    def _give(self, image: Future[Any], data: bytes) -> None:
        try:
            # Streaming's `pil` is no file that Pillow could open.
            image.set_result(raw_image(data, self.max_pixels) if self.source.encoding == "pil" else data)
        except UndecodableImage as error:
            image.set_exception(error)

    def _answer(self, request: Request) -> bytes:
        """The bytes of a request.

        Raises:
            OSError: none of the attempts brought them.
        """
        length, attempt = request.end - request.begin, 0
        until = time.monotonic() + self.patience
        while True:
            attempt += 1
            try:
                if self._closed.done():
                    raise InterruptedError(self._closed.result())
                left = max(0.0, until - time.monotonic()) if self.patience else None
                arguments = request.shard, request.begin, length, attempt == 1
                data = within(left, self._read, *arguments, unless=self._closed)
                if len(data) == length and not damaged(data, request):
                    return data
                wrong = f"{length}" if len(data) != length else "those the sidecar has a checksum of"
                error = OSError(f"{len(data)} bytes came instead of {wrong}")
            except Exception as raised:  # every back end has kinds of its own
                error = raised
            is_last = attempt >= (MISSING_ATTEMPTS if is_missing(error) else ATTEMPTS) or self.reader is None
            is_last |= self.patience > 0 and time.monotonic() >= until
            # Spread out, lest all connections come back at once to a store that asked for less.
            pause = FIRST_PAUSE * 2 ** (attempt - 1) * self._pauses.uniform(0.5, 1)
            if is_last or wait([self._closed], pause).done:
                break
        name = self.source.names[request.shard]
        raise OSError(
            f"stream.range_reads: cannot read {length} bytes at offset {request.begin} of shard {request.shard}, "
            f"{self.source.remote or self.source.local}/{name}, after {attempt} attempts: "
            + redacted(f"{type(error).__name__}: {error}")
        ) from error

    def _read(self, shard: int, begin: int, length: int, trusts_local: bool) -> bytes:
        name = self.source.names[shard]
        if self.reader is not None and not (trusts_local and self._is_local(shard)):
            return self.reader.read(name, begin, length)
        assert self.source.local is not None
        with (self.source.local / name).open("rb") as file:
            file.seek(begin)
            return file.read(length)

    def _is_inside(self, span: Span) -> bool:
        """Whether a span lies in a shard that there is."""
        sizes = self.source.sizes
        is_shard = 0 <= span.shard < len(sizes) and span.offset >= 0 and span.length >= 0
        return is_shard and span.offset + span.length <= sizes[span.shard]

    def _is_local(self, shard: int) -> bool:
        """Whether the shard's file lies here with all its bytes."""
        local = self.source.local
        try:
            return local is not None and (local / self.source.names[shard]).stat().st_size == self.source.sizes[shard]
        except OSError:
            return False

    def close(self) -> None:
        """End the threads, which no longer wait for what they asked for; the next call starts new ones."""
        if self._threads is not None:
            self._closed.set_result("the loader was closed")
            self._threads.shutdown()
            self._threads = None
        if self.cache is not None:
            self.cache.close()
