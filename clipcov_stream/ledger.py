"""What a run trained on: every survivor's id, by step and rank, in one append-only file per rank.

    rank00000.ledger     magic | u32 length, u32 CRC-32 and the JSON of the header | one block per step
    a block              u64 step | u32 samples | u32 CRC-32 of the block without it | per sample, u64 id and f32 gain

All little-endian, 12 bytes per sample and 16 per step. Ids are `id` of `PairDataset`, a sample's number in the folder;
they stand in the order chosen, as far as this rank trained them. The gain is what a sample added to clipcov's objective
when it was picked (`selection.Selected`); it compares samples of one step, not of different ones. NaN where nothing was
gained: of survivors that are random, in a warm-up or a soft start, and of every other selector.

A step is written by one call once its optimizer step is done, so a process that is killed leaves whole steps and at
most one torn block at the end, which readers drop and count. A checkpoint is written after the blocks of its steps have
reached the disk; a resumed run drops the blocks of later steps, and its ledger is then that of a straight run. A run
that starts anew sets a ledger of its name aside, each file as NAME.1, NAME.2, ..., with a warning.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from clipcov_stream.records import moved_aside

Found = TypeVar("Found")

MAGIC = b"CLEDGER2"
BLOCK = struct.Struct("<QII")
SAMPLE = np.dtype([("id", "<u8"), ("gain", "<f4")])


class Ledger(Callback):
    """Records ids and gains of all samples that had a gradient, in `folder`; give it to the Trainer as a callback.

    Args:
        folder: local, shared by the ranks or not. Of one run alone.
        about: whatever else tells runs apart (seed, selector, ...), strings and numbers, for the header.

    Raises:
        ValueError: at the start of training, on every rank alike, a folder that holds another run's ledger, or a file
            of a rank that trained the last step before and ends before the step that training resumes from; and pools
            without `id`.
    """

    def __init__(self, folder: str, **about: str | float | None) -> None:
        if "://" in folder:
            raise ValueError(
                f"ledger={folder!r} is remote, where nothing can be appended to a file; give a local folder"
            )
        self.folder = Path(folder)
        self.about = about
        self._file: IO[bytes] | None = None
        self._samples: np.ndarray | None = None
        self._trained_by = 1
        """Ranks that trained the last step before training goes on; 1 where no checkpoint says it."""

    @property
    def path(self) -> Path:
        """This rank's file."""
        return path_of(self.folder, dist.get_global_rank())

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop what an earlier process recorded of the steps that are to come; set it aside if that is all of them."""
        self.close(state, logger)
        step, rank = int(state.timestamp.batch), dist.get_global_rank()
        found = agreed(lambda: self._checked({**header_of(state), **self.about}))
        header, has_had_steps = found[rank][0], any(has_steps for _, has_steps in found)
        if step > 0:
            self._check_ends(agreed(lambda: self._ends(step)), step)
            for path in self._files().values():
                rewind(path, step)
        elif has_had_steps:
            self._set_aside()
        if not self.path.exists():
            new = self.path.with_suffix(".new")  # a header is there in full or not at all
            new.write_bytes(encoded_header({**header, "rank": rank}))
            new.rename(self.path)
        self._file = self.path.open("ab", buffering=0)
        self._trained_by = dist.get_world_size()

    def _checked(self, header: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """The header, and whether this rank's files have steps; raises ValueError if its own is another run's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            check_header(self.path, header)
        return header, any(has_steps(path) for path in self._files().values())

    def _files(self) -> dict[int, Path]:
        """This rank's file, if there is one, by rank; with rank 0 also those of ranks that the run has no more, as far
        as they are on its disk: no rank of this run would look at them."""
        rank, num_ranks = dist.get_global_rank(), dist.get_world_size()
        others = {rank_of(path): path for path in files_of(self.folder) if rank == 0 and rank_of(path) >= num_ranks}
        return {rank: self.path, **others} if self.path.exists() else others

    def _ends(self, step: int) -> dict[int, int]:
        """The last step before `step` in each of this rank's files."""
        return {rank: end_before(path, step)[0] for rank, path in self._files().items()}

    def _check_ends(self, ends: list[dict[int, int]], step: int) -> None:
        """Of the ranks that trained the step before `step`: raise ValueError if a file ends earlier, and warn of those
        that have no step before it, as one on a new machine with a disk of its own has none.

        Args:
            ends: `_ends`, of every rank.
            step: that training goes on from.
        """
        last = {rank: end for found in ends for rank, end in found.items() if end >= 0 and rank < self._trained_by}
        short = {rank: end for rank, end in sorted(last.items()) if end + 1 < step}
        if short:
            of = {rank: f"of rank {rank} " if rank else "" for rank in short}
            where = " and ".join(f"{of[rank]}ends after step {end}" for rank, end in short.items())
            raise ValueError(
                f"ledger {str(self.folder)!r} {where}, but training goes on from step {step}: what was trained on "
                "between them is not in it; give another folder"
            )
        missing = [rank for rank in range(min(self._trained_by, dist.get_world_size())) if rank not in last]
        if missing and dist.get_global_rank() == 0:
            which = "" if missing == [0] else f" of ranks {missing}"
            warnings.warn(f"ledger {str(self.folder)!r}{which} begins at step {step}, not at 0", stacklevel=3)

    def _set_aside(self) -> None:
        """Rename the files of all ranks, each rank its own, since they may share no disk; all or none, lest the numbers
        at the ends of their names differ."""
        aside = [moved_aside(path) for path in self._files().values()]
        if dist.get_global_rank() == 0 and aside:
            warnings.warn(
                f"ledger={str(self.folder)!r} had steps, but the run starts anew; they are in {aside[0].name!r}, and "
                "other ranks' beside it",
                stacklevel=2,
            )

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Note what this step trains on: algorithms run before callbacks, so the survivors are chosen."""
        batch = state.batch if isinstance(state.batch, Mapping) else {}
        selecting = (each for each in state.algorithms if getattr(each, "survivor_ids", None) is not None)
        selection: Any = next(selecting, None)
        ids = batch.get("id") if selection is None else selection.survivor_ids
        if ids is None:
            raise ValueError(f"a ledger needs the samples' 'id' in the batch, a dict, which has {sorted(batch)}")
        # Here they are still on the CPU: nothing waits for a GPU.
        self._samples = samples_of(torch.as_tensor(ids), getattr(selection, "survivor_gains", None))

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._file is None or self._samples is None:
            raise RuntimeError("the ledger saw no batch: were its events skipped?")
        # The clock has moved on to the next step.
        append(self._file, int(state.timestamp.batch) - 1, self._samples)
        self._samples = None

    def state_dict(self) -> dict[str, Any]:
        """The number of ranks. Each is asked for it before a checkpoint is written, which may not outlast its steps."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"num_ranks": dist.get_world_size()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._trained_by = int(state.get("num_ranks", 1))

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None


def agreed(work: Callable[[], Found]) -> list[Found]:
    """What every rank's work finds, by rank; each must ask.

    Raises:
        ValueError: what one rank's work raised, a ValueError or an OSError, on every rank, so that none waits for it.
    """
    found: list[Found] = []
    wrong, error = "", None
    try:
        found.append(work())
    except (ValueError, OSError) as raised:
        wrong, error = str(raised) or type(raised).__name__, raised
    everywhere = dist.all_gather_object((found, wrong))
    if wrong := next((message for _, message in everywhere if message), ""):
        raise ValueError(wrong) from error
    return [result for own, _ in everywhere for result in own]


@dataclass(frozen=True)
class Record:
    """One rank's file, read.

    Args:
        header: version, run_name, folder (a hash of what `PairDataset` reads), num_samples in it, pool_size per rank,
            num_ranks, rank, and what `Ledger` was told about the run.
        step: (n,) int64, ascending.
        sample: (n,) int64 ids.
        gain: (n,) float32, NaN where there is none.
        torn_bytes: of a block at the end that was not written in full, and is left out.
    """

    header: dict[str, Any]
    step: np.ndarray
    sample: np.ndarray
    gain: np.ndarray
    torn_bytes: int

    @property
    def rank(self) -> int:
        return int(self.header["rank"])


def read_ledger(*places: str | Path) -> list[Record]:
    """All ranks' records, by rank.

    Args:
        places: the run's ledger folder; of ranks that share no disk, all their folders, or their files; of a run that
            went on on another machine those of both. A rank's later file counts from where it begins.

    Raises:
        ValueError: no ledger, one that lacks a rank's file or has its beginning twice, ranks of different runs, or a
            damaged file.
    """
    paths = [path for place in map(Path, places) for path in (files_of(place) if place.is_dir() else [place])]
    names = ", ".join(map(str, places))
    if not paths or not all(path.is_file() for path in paths):
        raise ValueError(f"{names}: no ledger there (a folder with {path_of(Path(), 0)})")
    read = sorted(((read_file(path), path) for path in paths), key=lambda pair: pair[0].rank)
    parts: dict[int, list[Record]] = {}
    for record, _ in read:
        parts.setdefault(record.rank, []).append(record)
    records = [record for rank in sorted(parts) for record in joined(parts[rank])]
    ranks = [record.rank for record in records]
    wanted = list(range(max(len(records), *(record.header["num_ranks"] for record in records))))
    if ranks != wanted:
        raise ValueError(f"ledger {names} has files of ranks {ranks}; it must have one of each of {wanted}")
    for _, path in read:
        check_header(path, records[0].header)
    return records


def read_file(path: Path) -> Record:
    """One rank's file.

    Raises:
        ValueError: no ledger, one that is damaged elsewhere than in its last block, or whose steps do not ascend.
    """
    header, start = read_header(path)
    data = path.read_bytes()
    found = list(blocks(data, start))
    for (before, _, _), (number, _, at) in pairwise(found):
        if number <= before:
            raise ValueError(
                f"{path} is damaged: step {number}, which ends at byte {at}, follows step {before}, as if two runs had "
                "written it at once; what was trained on is not known from there on"
            )
    end = found[-1][2] if found else start
    largest = max((len(samples) for _, samples, _ in found), default=0)
    torn = len(data) - end
    check_torn(path, end, torn, largest or header.get("pool_size"))
    step = [np.full(len(samples), number, np.int64) for number, samples, _ in found]
    samples = np.concatenate([np.zeros(0, SAMPLE), *(samples for _, samples, _ in found)])
    steps = np.concatenate([np.zeros(0, np.int64), *step])
    return Record(header, steps, samples["id"].astype(np.int64), samples["gain"].astype(np.float32), torn)


def joined(parts: list[Record]) -> list[Record]:
    """One record of a rank's files on several machines; as they are where two of them begin at once."""
    begins = [int(part.step[0]) if len(part.step) else 0 for part in parts]
    if len(set(begins)) < len(parts) or len(parts) == 1:
        return parts
    parts = [parts[at] for at in np.argsort(begins)]
    # What a machine trained beyond the checkpoint that another went on from was undone.
    rows = [
        *(slice(int(np.searchsorted(before.step, after.step[0]))) for before, after in pairwise(parts)),
        slice(None),
    ]
    columns = {
        name: np.concatenate([getattr(part, name)[own] for part, own in zip(parts, rows, strict=True)])
        for name in ("step", "sample", "gain")
    }
    return [Record(parts[0].header, **columns, torn_bytes=sum(part.torn_bytes for part in parts))]


def samples_of(ids: Tensor, gains: Tensor | None) -> np.ndarray:
    """A step's samples as they are stored; no gains are NaN."""
    samples = np.empty(len(ids), SAMPLE)
    samples["id"], samples["gain"] = ids.cpu().numpy(), math.nan if gains is None else gains.cpu().numpy()
    return samples


def append(file: IO[bytes], step: int, samples: np.ndarray) -> None:
    """Write one step's block, by one call unless the system takes only part of it."""
    payload = np.asarray(samples, SAMPLE).tobytes()
    check = zlib.crc32(payload, zlib.crc32(struct.pack("<QI", step, len(samples))))
    data = memoryview(BLOCK.pack(step, len(samples), check) + payload)
    while data:
        data = data[file.write(data) :]


def blocks(data: bytes, start: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """Step, samples and end of every whole block, up to the first that is torn."""
    while start + BLOCK.size <= len(data):
        step, count, check = BLOCK.unpack_from(data, start)
        begin, end = start + BLOCK.size, start + BLOCK.size + SAMPLE.itemsize * count
        payload = data[begin:end]
        if end > len(data) or zlib.crc32(payload, zlib.crc32(struct.pack("<QI", step, count))) != check:
            return
        yield step, np.frombuffer(payload, SAMPLE), end
        start = end


def rewind(path: Path, step: int) -> int:
    """Cut a file off after the last whole block before `step`; returns that block's step, or -1."""
    last, end = end_before(path, step)
    os.truncate(path, end)
    return last


def end_before(path: Path, step: int) -> tuple[int, int]:
    """Step of the last whole block before `step`, or -1, and where in the file it ends.

    Raises:
        ValueError: more bytes than one torn block has, where the next block would be.
    """
    header, end = read_header(path)
    data, last, largest = path.read_bytes(), -1, 0
    for number, samples, after in blocks(data, end):
        if number >= step:
            return last, end
        last, end, largest = number, after, max(largest, len(samples))
    if last + 1 < step:  # else all that matters is there; what a machine that lost power left of later steps is cut off
        check_torn(path, end, len(data) - end, largest or header.get("pool_size"))
    return last, end


def has_steps(path: Path) -> bool:
    """Whether a file is more than its header."""
    return path.stat().st_size > read_header(path)[1]


def check_torn(path: Path, end: int, torn: int, samples: int | None) -> None:
    """Raise ValueError if more bytes follow the last whole block than one of so many samples can leave torn."""
    if samples is not None and torn > 2 * (BLOCK.size + SAMPLE.itemsize * samples):
        raise ValueError(f"{path} is damaged at byte {end}: {torn} bytes follow, more than one step can leave torn")


def header_of(state: State) -> dict[str, Any]:
    """What a run's ledger says of it, from Composer's state."""
    dataset = getattr(state.dataloader, "dataset", None)
    return {
        "version": 2,
        "run_name": state.run_name,
        "folder": folder_hash(dataset),
        "num_samples": getattr(dataset, "num_samples", None),
        "pool_size": getattr(state.dataloader, "batch_size", None),
        "num_ranks": dist.get_world_size(),
    }


def folder_hash(dataset: Any) -> str | None:
    """SHA-256 over the index.json of every folder that a StreamingDataset's samples are of; None for other data sets.

    Read by ranges, they are the source's, not the sidecar's that it iterates.
    """
    if (source := getattr(dataset, "source", None)) is not None:
        return index_hash(source.index)
    streams = getattr(dataset, "streams", None)
    if not streams:
        return None
    return index_hash(*(Path(stream.local, stream.split or "", "index.json").read_bytes() for stream in streams))


def index_hash(*indices: bytes) -> str:
    """The same from the contents of the index files."""
    return hashlib.sha256(b"".join(hashlib.sha256(index).digest() for index in indices)).hexdigest()


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05}.ledger"


def rank_of(path: Path) -> int:
    """From the name of a rank's file."""
    return int(path.stem.removeprefix("rank"))


def files_of(folder: Path) -> list[Path]:
    """Files of the ranks, in order."""
    return sorted(folder.glob("rank[0-9][0-9][0-9][0-9][0-9].ledger"))


def encoded_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, and where its blocks begin.

    Raises:
        ValueError: not a ledger, or not of this version.
    """
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + 8)
        if len(start) < len(MAGIC) + 8 or not start.startswith(MAGIC):
            raise ValueError(
                f"{path} is not a ledger of this version: it begins with {start[: len(MAGIC)]!r}, not {MAGIC!r}; give "
                "another folder (ledger=...)"
            )
        length, check = struct.unpack_from("<II", start, len(MAGIC))
        text = file.read(length)
    if len(text) < length or zlib.crc32(text) != check:
        raise ValueError(f"{path} is damaged in its header; delete it if the run never trained a step")
    return json.loads(text), len(start) + length


def check_header(path: Path, now: dict[str, Any]) -> None:
    """Raise ValueError, naming every difference, unless a file belongs to the run whose header is `now`."""
    saved, _ = read_header(path)
    ours = ("rank", "num_ranks", "pool_size")  # a run may be resumed on another number of ranks
    other = [
        f"{key}={saved.get(key)!r}, not {now[key]!r}" for key in now if key not in ours and saved.get(key) != now[key]
    ]
    if other:
        raise ValueError(f"{path} is the ledger of a run with {'; '.join(other)}; give another folder")
