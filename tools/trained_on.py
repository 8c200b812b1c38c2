"""Which samples of an MDS folder a run trained on, from its ledger, or which select_offline picked.

ledger_of(places)     from `clipcov_stream.ledger`
subset_of(path)       from the subset.csv of tools/select_offline.py
remote_pairs(url)     the folder itself, if it lies in an object store
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.storage import CloudDownloader
from subset_folder import PairFolder

from clipcov_stream.ledger import Record, index_hash, read_ledger
from clipcov_stream.remote import read_remote


@dataclass(frozen=True)
class TrainedOn:
    """Distinct samples, by ascending id.

    Args:
        id: (n,) int64, a sample's number in the folder.
        times: (n,) how often it was trained on.
        first_step, last_step: (n,) steps of the first and the last time. A subset has no steps: places in the order of
            picks stand for them.
        first_gain: (n,) what each gained the first time, when it was picked; NaN if nothing.
        order: (n,) places of the samples in the order of their first time; within a step by rank, and within a rank in
            the order chosen.
        num_records: lines of the source, each a sample trained on once.
        torn_bytes: of steps that a killed run did not finish writing, left out.
        missing: steps, ascending, that a rank's ledger lacks: another machine has them.
        folder: `ledger.index_hash` of the folder; None where the source does not know it.
        uids: of the samples, where the source has them.
    """

    id: np.ndarray
    times: np.ndarray
    first_step: np.ndarray
    last_step: np.ndarray
    first_gain: np.ndarray
    order: np.ndarray
    num_records: int
    torn_bytes: int = 0
    missing: Sequence[int] = ()
    folder: str | None = None
    uids: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.id)

    def check(self, pairs: PairFolder) -> None:
        """Raise ValueError unless these are samples of `pairs`."""
        own = index_hash((pairs.path / "index.json").read_bytes())
        if self.folder not in (None, own):
            raise ValueError(
                f"FOLDER is not the one trained on: its index.json has the hash {own[:12]}, the ledger's folder had "
                f"{str(self.folder)[:12]}; ids mean nothing in another folder"
            )
        if len(self) and not (self.id[0] >= 0 and self.id[-1] < len(pairs)):
            raise ValueError(f"FOLDER has {len(pairs)} samples, but SOURCE has ids {self.id[0]} to {self.id[-1]}")


def trained_on(places: Sequence[str]) -> TrainedOn:
    """What SOURCE says: ledger folders or files, or one subset.csv or its folder.

    Raises: ValueError for what is neither, and for a source without samples.
    """
    first = Path(places[0]).expanduser()
    path = first / "subset.csv" if first.is_dir() else first
    if len(places) == 1 and path.suffix == ".csv" and path.is_file():
        found = subset_of(path)
    else:
        found = ledger_of(*(Path(place).expanduser() for place in places))
    if not len(found):
        raise ValueError(f"SOURCE={places[0]!r} has no samples: no step was finished")
    return found


def ledger_of(*places: Path) -> TrainedOn:
    """What a run trained on, over all ranks."""
    records = read_ledger(*places)
    step = np.concatenate([record.step for record in records])
    by_step = np.argsort(step, kind="stable")  # ranks are in order, and stay so within a step
    step = step[by_step]
    sample = np.concatenate([record.sample for record in records])[by_step]
    ids, first, times = np.unique(sample, return_index=True, return_counts=True)
    last = len(sample) - 1 - np.unique(sample[::-1], return_index=True)[1]
    torn = sum(record.torn_bytes for record in records)
    gain = np.concatenate([record.gain for record in records])[by_step]
    order, folder = np.argsort(first), records[0].header["folder"]
    figures = times, step[first], step[last], gain[first].astype(np.float64)
    return TrainedOn(ids, *figures, order, len(sample), torn, missing_steps(records), folder)


def missing_steps(records: Sequence[Record]) -> list[int]:
    """Steps that a rank has none of before its last. Ranks that came later begin later, so only those count that the
    run had when rank 0's file was begun."""
    missing: set[int] = set()
    for record in records[: records[0].header["num_ranks"]]:
        if len(record.step):
            missing.update(np.setdiff1d(np.arange(record.step[-1]), record.step).tolist())
    return sorted(missing)


def subset_of(path: Path) -> TrainedOn:
    """What tools/select_offline.py picked.

    Raises: ValueError for a file that is none of its.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        picked = np.array([(int(row["row"]), int(row["rank"])) for row in rows], np.int64).reshape(-1, 2)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no subset.csv of tools/select_offline.py: {error!r}") from error
    ids, at = np.unique(picked[:, 0], return_index=True)
    rank = picked[at, 1]
    uids = [rows[i]["uid"] for i in at] if rows and "uid" in rows[0] else None
    none = np.full(len(ids), np.nan)
    return TrainedOn(ids, np.ones_like(ids), rank, rank, none, np.argsort(rank), len(rows), uids=uids)


class RemotePairs(PairFolder):
    """A folder in an object store; each shard with a sample that is asked for is fetched, read and deleted.

    Args:
        url: of the folder.
        scratch: an empty local folder.
    """

    def __init__(self, url: str, scratch: str) -> None:
        self.url = url.rstrip("/")
        try:
            Path(scratch, "index.json").write_bytes(read_remote(f"{self.url}/index.json"))
        except OSError as error:
            raise ValueError(f"FOLDER={url!r} has no index.json that can be read: {error}") from error
        super().__init__(scratch)
        self.where = self.url

    def samples_of(
        self, number: int, rows: Sequence[int] | None = None, decode: Iterable[str] = ()
    ) -> Iterator[dict[str, Any]]:
        shard = self._shards[number]
        rows = range(len(shard)) if rows is None else rows
        if not len(rows):
            return
        name = (shard.zip_data or shard.raw_data).basename
        stored = self.path / name
        stored.parent.mkdir(parents=True, exist_ok=True)
        try:
            CloudDownloader.direct_download(f"{self.url}/{name}", str(stored))
        except Exception as error:  # every back end has kinds of its own
            raise ValueError(f"{self.url}/{name} cannot be read: {error!r}") from error
        self.sound.discard(number)  # these bytes are new
        yield from super().samples_of(number, rows, decode)
        stored.unlink()


@contextmanager
def remote_pairs(url: str) -> Iterator[PairFolder]:
    """The samples of a remote MDS folder. Costs: room for its largest shard where TMPDIR says."""
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        yield RemotePairs(url, scratch)
