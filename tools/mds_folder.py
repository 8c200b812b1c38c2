"""Write an MDS folder that is either complete or absent, and account for every row left out.

`MDSWriter` writes its shards straight into the target: a run that is killed half-way leaves a folder
that looks like a data set. So splits are written inside of a `staged_folder`.

    mds_split(folder, ...)    one MDS split in a fresh folder inside of a staged one
    mds_folder(out, ...)      a local or remote folder with one split, the usual case
    write_found(found, ...)   images with their rows -> samples, once every image was decoded in full
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image
from remote_folder import output_folder
from streaming import MDSWriter
from streaming.base.compression import get_compressions, is_compression
from streaming.base.format import reader_from_json
from streaming.base.hashing import get_hashes, is_hash
from streaming.base.util import bytes_to_int
from tqdm import tqdm

from clipcov_stream.checked import decompressed
from clipcov_stream.decode import MAX_PIXELS, ImageTooLarge, check_size, in_eight_bits, opened


class Rejection(NamedTuple):
    """Why one row of the source is not in the output; `reason` is what gets counted."""

    row: int | None
    image: str
    reason: str
    detail: str


@dataclass(slots=True)
class Row:
    """One usable row of the source: where it stands, what it says, the name of its image, and embeddings, if any."""

    number: int | None
    image: str
    caption: str
    uid: str
    label: str = ""
    embeddings: tuple[Any, Any] | None = None


class Found(NamedTuple):
    """The bytes of one image with the rows that name it."""

    image: str
    data: bytes
    rows: list[Row]


class MdsSplit:
    """The open writer of one MDS split: samples written, rows rejected, and their counts.

    Made by `mds_split` and `mds_folder`. `num_written`, `rejected` (reason -> rows), `unreferenced` (images
    that no row names), `not_downloaded` (rows that never came with the source; like the former they are
    counted but not listed), `uids_repeated` (rows whose uid got a number) and `num_held` (samples of another split)
    may be read at any time, also after the block has ended.
    """

    def __init__(self, folder: Path, writer: MDSWriter) -> None:
        self.folder = folder
        self.num_written = 0
        self.rejected: Counter[str] = Counter()
        self.unreferenced = 0
        self.not_downloaded = 0
        self.uids_repeated = 0
        self.num_held = 0
        self._first: dict[str, Rejection] = {}
        self._writer = writer
        self._log = None

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append one sample, a value for each column."""
        self._writer.write(dict(sample))
        self.num_written += 1

    def reject(self, rejection: Rejection) -> None:
        """Count a row that is left out and list it in rejected.jsonl, made at the first one."""
        if self._log is None:
            self._log = (self.folder / "rejected.jsonl").open("w", encoding="ascii")
        # ASCII escapes: a rejected name may hold bytes that no encoding can write back as text.
        self._log.write(json.dumps(rejection._asdict()) + "\n")
        self.rejected[rejection.reason] += 1
        self._first.setdefault(rejection.reason, rejection)

    def adopt(self, part: Path, first_row: int) -> None:
        """Append the shards and rejections of the split in the folder `part`; its rows follow `first_row` others."""
        shards = self._writer.shards
        for shard in json.loads((part / "index.json").read_text(encoding="utf-8"))["shards"]:
            for data in (shard["raw_data"], shard["zip_data"]):
                if data is not None:
                    own = data["basename"]
                    data["basename"] = f"shard.{len(shards):05d}.{own.split('.', 2)[2]}"
                    if (part / own).exists():  # of a compressed shard the raw file is gone
                        (part / own).rename(self.folder / data["basename"])
            shards.append(shard)
            self.num_written += shard["samples"]
        log = part / "rejected.jsonl"
        for line in log.read_text(encoding="ascii").splitlines() if log.exists() else []:
            rejection = Rejection(**json.loads(line))
            self.reject(rejection._replace(row=None if rejection.row is None else rejection.row + first_row))

    def counts(self) -> dict[str, Any]:
        """The account of the run, as it goes into source.json."""
        rejected = dict(sorted(self.rejected.items()))
        others = {"not_downloaded": self.not_downloaded, "uids_repeated": self.uids_repeated, "held": self.num_held}
        return {
            "written": self.num_written,
            "rejected": rejected,
            "image_unreferenced": self.unreferenced,
            **{name: count for name, count in others.items() if count},
        }

    def summary(self) -> str:
        """Samples written and rows rejected by reason with the first of each, one line each."""
        held = f"{self.num_held} held out, " if self.num_held else ""
        lines = [f"{self.num_written} samples written, {held}{self.rejected.total()} rows rejected"]
        for reason, count in self.rejected.most_common():
            first = self._first[reason]
            place = "" if first.row is None else f"row {first.row}, "
            lines.append(f"  {reason}: {count} (first: {place}{first.image!r}: {first.detail})")
        if self.unreferenced:
            lines.append(f"  image_unreferenced: {self.unreferenced} images that no row names")
        if self.not_downloaded:
            lines.append(
                f"  not_downloaded: {self.not_downloaded} rows (counted by img2dataset, listed in its .parquet)"
            )
        if self.uids_repeated:
            lines.append(f"  uids_repeated: {self.uids_repeated} rows have a uid of others; theirs got a number, '#2'")
        return "\n".join(lines)

    def close(self) -> None:
        """Close the log; what was written stays."""
        if self._log is not None:
            self._log.close()


class Spool:
    """Samples parked on disk, to be written in an order that is known only after the last one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offsets: list[int] = []

    def add(self, sample: Mapping[str, Any]) -> None:
        """Park one sample; the first has index 0."""
        self._offsets.append(self._file.tell())
        pickle.dump(dict(sample), self._file)

    def read(self, order: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The samples of the given indices, in the given order; add none after this."""
        for index in order:
            self._file.seek(self._offsets[index])
            yield pickle.load(self._file)


@contextmanager
def open_spool(folder: Path) -> Iterator[Spool]:
    """A spool on the disk of `folder`, gone when the block ends.

    Costs: one more copy of the samples on that disk, and some 30 bytes of memory for each. The file has
    no name, so not even SIGKILL leaves it behind.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        yield Spool(file)


class _Writer(MDSWriter):
    def flush_shard(self) -> None:
        # A sample above the size limit gets a shard of its own; MDSWriter would put an empty shard
        # before it when it comes first.
        if self.new_samples:
            super().flush_shard()


@contextmanager
def mds_split(
    folder: Path,
    columns: Mapping[str, str],
    *,
    size_limit: int | str = "64mb",
    compression: str | None = None,
    hashes: Iterable[str] = ("sha1", "xxh64"),
    source: Mapping[str, Any] | None = None,
    allow_empty: bool = False,
) -> Iterator[MdsSplit]:
    """Open one MDS split in `folder`; its index.json and source.json are written when the block ends.

    Args:
        folder: absent or empty; inside of a `staged_folder`, or else a killed run leaves it half-written.
        columns: name -> MDS encoding.
        size_limit, compression, hashes: as for `streaming.MDSWriter`.
        source: what source.json says beside the counts: tool and arguments. Paths in it are cut down
            to their last part, so that the folder tells nothing about the machine it was made on.
        allow_empty: write an index without shards rather than raise when there is no sample.
    Raises: ValueError for an unknown size, compression or hash, and when no sample was written.
    """
    _check_options(size_limit, compression, hashes := sorted(set(hashes)))
    writer = _Writer(
        columns=dict(columns), out=str(folder), size_limit=size_limit, compression=compression, hashes=hashes
    )
    split = MdsSplit(folder, writer)
    try:
        yield split
        if split.num_written == 0 and not allow_empty:
            raise ValueError(f"no usable sample, so no output: {split.summary()}")
        writer.finish()
        if source is not None:
            write_source_json(folder, source, split.counts())
    except BaseException:
        writer.cancel_future_jobs()
        raise
    finally:
        split.close()


@contextmanager
def mds_folder(
    out: str | Path, columns: Mapping[str, str], *, overwrite: bool = False, **options: Any
) -> Iterator[MdsSplit]:
    """`mds_split` inside of an `output_folder`: OUT holds one complete split, or does not appear.

    Args: options: the keyword arguments of `mds_split`.
    """
    with output_folder(out, overwrite) as folder, mds_split(folder, columns, **options) as split:
        yield split


def read_split(folder: Path) -> Iterator[dict[str, Any]]:
    """The samples of a split that `mds_split` wrote, in order; compressed shards are unpacked one at a time."""
    for shard in json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]:
        raw, packed = folder / shard["raw_data"]["basename"], shard["zip_data"]
        if packed is not None:
            data = (folder / packed["basename"]).read_bytes()
            raw.write_bytes(decompressed(shard["compression"], data, shard["raw_data"]["bytes"]))
        reader = reader_from_json(str(folder), None, shard)
        yield from (reader[row] for row in range(len(reader)))
        if packed is not None:
            raw.unlink()


def write_found(
    found: Iterable[Found | Rejection],
    split: MdsSplit,
    make_sample: Callable[[Row, bytes], dict[str, Any]],
    *,
    total: int | None = None,
    limit: int | None = None,
    choose: Callable[[list[Any]], Iterable[int]] | None = None,
    aside: tuple[MdsSplit, Callable[[], Iterable[int]]] | None = None,
    num_threads: int | None = None,
    show: bool = True,
) -> None:
    """Write one sample for each row whose image decodes; list the other rows as rejected.

    Args:
        total: rows to expect, for the progress bar on stderr.
        limit: stop after this many samples; rows after them are neither read nor counted.
        choose: from the labels of all usable samples (None without), the indices to write, in order.
            Samples then wait on disk (`open_spool`) until the last one is known.
        aside: with `choose`, after it: another split, and the indices to write there.
        num_threads: that decode images; one per core, at most 8, without.
        show: whether to show the progress bar.
    """
    num_threads = num_threads or min(8, os.cpu_count() or 1)
    with warnings.catch_warnings(), closing(_samples(found, split, make_sample, num_threads)) as samples:
        # Decoder remarks (odd EXIF, palettes) are no reason to reject; a decompression bomb is.
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        progress = tqdm(
            islice(samples, limit), total=limit or total, unit=" samples", file=sys.stderr, disable=not show
        )
        if choose is None:
            for sample in progress:
                split.write(sample)
            return
        with open_spool(split.folder) as spool:
            labels = []
            for sample in progress:
                spool.add(sample)
                labels.append(sample.get("label"))
            for sample in spool.read(choose(labels)):
                split.write(sample)
            if aside is not None:
                other, chosen = aside
                for sample in spool.read(chosen()):
                    other.write(sample)


def check_image(data: bytes) -> tuple[str, str] | None:
    """None when every pixel decodes to RGB; otherwise the reason and the detail of the rejection.

    Decodes in full, because a truncated JPEG has a good header. Keeps nothing: the bytes are written
    as they came.
    """
    if not data:
        return "image_empty", "0 bytes"
    try:
        with opened(data, MAX_PIXELS) as image:
            check_size(*image.size, MAX_PIXELS)
            image.load()
            if image.mode != "RGB":
                in_eight_bits(image).convert("RGB")
    except (ImageTooLarge, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return "image_too_large", str(error)
    except Exception as error:
        # The message of the commonest one ends in the address of a buffer, which says nothing.
        return "not_an_image", f"{type(error).__name__}: {str(error).split(' <_io')[0]}"
    return None


def _samples(
    found: Iterable[Found | Rejection],
    split: MdsSplit,
    make_sample: Callable[[Row, bytes], dict[str, Any]],
    num_threads: int,
) -> Generator[dict[str, Any]]:
    for item, problem in _checked(found, num_threads):
        if isinstance(item, Rejection):
            split.reject(item)
        elif problem is not None:
            for row in item.rows:
                split.reject(Rejection(row.number, item.image, *problem))
        else:
            yield from (make_sample(row, item.data) for row in item.rows)


def _checked(
    found: Iterable[Found | Rejection],
    num_threads: int,
) -> Iterator[tuple[Found | Rejection, tuple[str, str] | None]]:
    """Each item with the verdict on its image, in order; threads decode a few images ahead."""
    waiting: deque[tuple[Found | Rejection, Future | None]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for item in found:
            waiting.append((item, pool.submit(check_image, item.data) if isinstance(item, Found) else None))
            if len(waiting) > 4 * num_threads:
                first, verdict = waiting.popleft()
                yield first, verdict.result() if verdict else None
        for first, verdict in waiting:
            yield first, verdict.result() if verdict else None


def write_source_json(folder: Path, source: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """Write folder/source.json: tool, arguments and counts, with paths cut down to their names."""
    write_json(folder / "source.json", {**_names_only(source), "counts": dict(counts)})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _names_only(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _names_only(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_names_only(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith(("/", "~/", "./", "../"))):
        return Path(value).expanduser().absolute().name
    return value


def _check_options(size_limit: int | str, compression: str | None, hashes: list[str]) -> None:
    try:
        num_bytes = bytes_to_int(size_limit)
    except ValueError:
        num_bytes = 0
    if not 0 < num_bytes < 2**32:
        raise ValueError(
            f"--size-limit {size_limit!r} is not a shard size; give bytes or a number with kb, mb or gb, "
            "above 0 and below 4gb, such as 64mb"
        )
    if compression is not None and not is_compression(compression):
        families = sorted({name.split(":")[0] for name in get_compressions()})
        raise ValueError(f"--compression {compression!r} is unknown; use one of {families}, or zstd:7 for a level")
    for name in hashes:
        if not is_hash(name):
            raise ValueError(f"--hashes {name!r} is unknown; use some of {sorted(get_hashes())}")
