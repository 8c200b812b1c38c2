"""What the guards of the data path cost: hashes of shards, and a look at every wait and every sample.

    python tools/bench_guards.py [--turns 6]

The quickstart's corpus, pools and model. Loaders with and without guards are iterated over one epoch in turn, each from
a data set of its own, so that every shard is hashed; what is compared is processor time, background threads included,
because on a busy machine the clock scatters by more than the guards take. Without guards means Streaming's own
functions in their place. A step of the same recipe in the Trainer is then timed, by the clock and by processor time;
the share is of the latter. The last line of stdout is JSON. Bounded by the processor.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import make_mds
from composer import Callback
from streaming import Stream, StreamingDataset

from clipcov_stream import stream
from clipcov_stream.checked import CheckedStream
from clipcov_stream.config import load_config
from clipcov_stream.guard import GuardedDataset
from clipcov_stream.train import build_trainer

RECIPE = Path(__file__).resolve().parent.parent / "yamls" / "quickstart.yaml"
POOLS = 10


@contextmanager
def unguarded() -> Iterator[None]:
    """Within the block, Streaming's own functions run in the guards' place."""
    own = {name: getattr(StreamingDataset, name) for name in ("get_item", "prepare_shard", "_each_sample_id")}
    own |= {name: getattr(StreamingDataset, name) for name in ("_ready_thread", "on_exception")}
    with (
        mock.patch.multiple(GuardedDataset, **own),
        mock.patch.object(CheckedStream, "prepare_shard", Stream.prepare_shard),
        mock.patch.object(stream, "complete", lambda pools, *_: pools),
        mock.patch.object(stream, "named", lambda pools, *_: pools),
    ):
        yield


class StepTimes(Callback):
    """Seconds of every step, by the clock and of the processor."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def batch_end(self, state: Any, logger: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def medians(self) -> tuple[float, float]:
        pairs = list(zip(self.marks[1:], self.marks[2:], strict=False))
        clock, processor = (statistics.median(after[at] - before[at] for before, after in pairs) for at in (0, 1))
        return clock, processor


def trainer_of(folder: Path) -> Any:
    given = {"stream.local": folder / "train", "stream.num_workers": 0, "progress_bar": "false"}
    given |= {"eval.shapes.local": folder / "eval", "eval_interval": "1ep", "selection.warmup": "0ba"}
    given |= {"metrics_file": "null", "max_duration": f"{POOLS - 1}ba"}
    return build_trainer(load_config(str(RECIPE), [f"{key}={value}" for key, value in given.items()]))


def epoch_seconds(folder: Path, guarded: bool) -> float:
    """Processor seconds per pool of one epoch of the loader."""
    with nullcontext() if guarded else unguarded():
        trainer = trainer_of(folder)
        loader = trainer.state.train_dataloader
        begun = time.process_time()
        num_pools = sum(1 for _ in loader)
        spent = time.process_time() - begun
        trainer.close()
    del trainer, loader
    gc.collect()
    return spent / num_pools


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6, help="epochs with and without guards")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_guards-") as scratch:
        folder = Path(scratch, "corpus")
        make_mds.main(["synthetic", str(folder), "--samples", str(POOLS * 640), "--eval-per-class", "1"])
        epoch_seconds(folder, True)  # what is imported and compiled at first
        turns: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(args.turns):
            for guarded in (True, False) if turn % 2 else (False, True):
                turns[guarded].append(1e3 * epoch_seconds(folder, guarded))
        trainer, times = trainer_of(folder), StepTimes()
        trainer.state.callbacks.append(times)
        trainer.fit()
        clock, processor = times.medians()
        trainer.close()
    medians = {guarded: statistics.median(values) for guarded, values in turns.items()}
    extra = medians[True] - medians[False]
    account = {
        "pool_ms_guarded": [round(value, 2) for value in turns[True]],
        "pool_ms_plain": [round(value, 2) for value in turns[False]],
        "extra_ms_per_pool": round(extra, 3),
        "step_ms_processor": round(1e3 * processor, 1),
        "step_ms_clock": round(1e3 * clock, 1),
        "share_of_step": round(extra / (1e3 * processor), 5),
    }
    print(
        f"a pool of 640 takes {medians[False]:.1f} ms of the processor, with guards {medians[True]:.1f}; a step "
        f"{1e3 * processor:.0f}: the guards are {account['share_of_step']:.2%} of it",
        file=sys.stderr,
    )
    print(json.dumps(account))


if __name__ == "__main__":
    main()
