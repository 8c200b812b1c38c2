"""Webdataset tars -> an MDS split, in parallel processes.

Each tar becomes an MDS folder of its own, in whichever process is free; the shards are then put behind each other in
the order of the tars. So what is written does not depend on the number of processes, nor on which was faster. In one
process (`--workers 1`) tars share shards, so the borders of shards are others; samples, their order, uids and
rejections are the same.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datacomp import COLUMNS as EMBEDDING_COLUMNS
from datacomp import Metadata
from held_out import HELD, held_out, key_of
from mds_folder import Found, MdsSplit, Rejection, Row, mds_split, read_split, write_found
from tar_source import number_repeats, numbered, read_webdataset
from tqdm import tqdm

# Of this worker process: the samples that all workers together have written. `_begin` sets it.
_progress: Any = None


@dataclass(frozen=True)
class TarJob:
    """How to turn tars into samples: the keys of KEY.json to read, and the columns and options of the MDS writer.

    `metadata` is a folder that `Metadata.save` wrote; without, samples have no embeddings. `seed` is of the keys of
    pairs that are held out.
    """

    columns: Mapping[str, str]
    caption_key: str | None
    uid_key: str | None
    num_threads: int
    metadata: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


class Converted(NamedTuple):
    """What a tar became: its rows, the uids of those that are samples, and the keys of those that were written."""

    num_rows: int
    uids: list[str]
    keys: array


def pair(row: Row, data: bytes) -> dict[str, Any]:
    """The sample of a row."""
    sample = {"image": data, "caption": row.caption, "uid": row.uid}
    return sample if row.embeddings is None else {**sample, **dict(zip(EMBEDDING_COLUMNS, row.embeddings, strict=True))}


def convert(
    tars: Sequence[Path],
    split: MdsSplit,
    job: TarJob,
    workers: int,
    held: MdsSplit | None = None,
    num_held: int = 0,
) -> None:
    """Write the samples of `tars` to `split` with that many processes; a bar on stderr shows samples per second.

    A uid that an earlier tar has too gets its '#2' only once all tars are read: those tars are then converted again.
    Which pairs are held out is known only then too: of the tars that have some, the samples are then copied once more.

    Args: held, num_held: a second split, and how many of the pairs go there.
    Raises: ValueError when a process dies, or no pair is left for `split`.
    Costs: about 150 bytes of memory for each sample, for its uid; some seconds for each process to begin.
    """
    scratch = split.folder / "parts"
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
    progress, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(min(workers, len(tars)), context, _begin, (progress, stop)) as pool:
        try:
            parts = [scratch / f"{number:06d}" for number in range(len(tars))]
            futures = [pool.submit(convert_tar, job, *at) for at in zip(tars, parts, strict=True)]
            done = _results(futures, progress, "convert")
            repeats = _repeats([one.uids for one in done])
            for number in repeats:
                shutil.rmtree(parts[number])
            futures = [pool.submit(convert_tar, job, tars[n], parts[n], names) for n, names in repeats.items()]
            _results(futures, progress, "repeated uids")
            chosen = held_out([one.keys for one in done], num_held) if held is not None else [set()] * len(tars)
            some = [number for number, rows in enumerate(chosen) if rows]
            futures = [pool.submit(set_aside, job, parts[number], chosen[number]) for number in some]
            _results(futures, progress, "hold out")
        except BrokenProcessPool as error:
            raise ValueError("a process died, perhaps of too little memory; use fewer --workers") from error
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    if held is not None:
        for number in some:
            for sample in read_split(parts[number] / HELD):
                held.write(sample)
    first_row = 0
    for part, one in zip(parts, done, strict=True):
        split.adopt(part, first_row)
        first_row += one.num_rows
    numbers: Counter[str] = Counter()
    split.uids_repeated = sum(numbered(uid, numbers) != uid for one in done for uid in one.uids)
    shutil.rmtree(scratch)


def set_aside(job: TarJob, part: Path, rows: set[int]) -> None:
    """Move these samples of the MDS folder `part` to one inside of it, in a worker process."""
    whole = part.rename(part.with_name(f"{part.name}.whole"))
    with (
        mds_split(part, job.columns, allow_empty=True, **job.options) as split,
        mds_split(part / HELD, job.columns, **job.options) as held,
    ):
        for number, sample in enumerate(read_split(whole)):
            (held if number in rows else split).write(sample)
            with _progress.get_lock():
                _progress.value += 1
    if (log := whole / "rejected.jsonl").exists():
        log.rename(part / log.name)
    shutil.rmtree(whole)


def convert_tar(job: TarJob, tar: Path, part: Path, names: Sequence[str] | None = None) -> Converted:
    """Write one tar as the MDS folder `part`, in a worker process.

    Args: names: what those samples are called; without, as if there were no other tar.
    """
    num_rows, uids, keys = 0, [], array("Q")

    def noted(items: Iterator[Found | Rejection]) -> Iterator[Found | Rejection]:
        nonlocal num_rows
        for item in items:
            row = item.rows[0].number if isinstance(item, Found) else item.row
            num_rows = max(num_rows, row or 0)
            yield item

    def counted(items: Iterator[Found | Rejection]) -> Iterator[Found | Rejection]:
        for item in items:
            uids.extend(row.uid for row in (item.rows if isinstance(item, Found) else []))
            yield item

    def named(items: Iterator[Found | Rejection], names: Iterator[str]) -> Iterator[Found | Rejection]:
        for item in items:
            for row in item.rows if isinstance(item, Found) else []:
                row.uid = next(names)
            yield item

    def make_sample(row: Row, data: bytes) -> dict[str, Any]:
        with _progress.get_lock():
            _progress.value += 1
        keys.append(key_of(data, job.seed))
        return pair(row, data)

    items = noted(read_webdataset([tar], job.caption_key, job.uid_key))
    if job.metadata is not None:
        items = Metadata.load(job.metadata).attach(items)
    items = number_repeats(counted(items)) if names is None else named(items, iter(names))
    with mds_split(part, job.columns, allow_empty=True, **job.options) as split:
        write_found(items, split, make_sample, num_threads=job.num_threads, show=False)
    return Converted(num_rows, uids, keys)


def _repeats(uids: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """For each tar whose samples are called otherwise because of earlier ones: what they are called."""
    numbers: Counter[str] = Counter()
    found = {}
    for number, own in enumerate(uids):
        alone: Counter[str] = Counter()
        names = [numbered(uid, numbers) for uid in own]
        if names != [numbered(uid, alone) for uid in own]:
            found[number] = names
    return found


def _results(futures: Sequence[Future[Any]], progress: Any, what: str) -> list[Any]:
    """The results in order; raises the first failure at once."""
    progress.value = 0
    waiting = set(futures)
    with tqdm(desc=what, unit=" samples", file=sys.stderr, disable=not futures) as bar:
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            bar.update(progress.value - bar.n)
            bar.set_postfix(tars=f"{len(futures) - len(waiting)}/{len(futures)}")
    return [future.result() for future in futures]


def _begin(progress: Any, stop: Any) -> None:
    """Set up a worker process, which ends at once when told to `stop` or when its parent is gone."""
    global _progress
    _progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then says stop
    parent = multiprocessing.parent_process()

    def watch() -> None:
        while not stop.wait(0.5) and parent is not None and parent.is_alive():
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
