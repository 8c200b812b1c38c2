"""Composer's clock: durations, warm-up, and what a block of a step costs."""

from __future__ import annotations

import math
import time

import torch
from composer.core import State, Time, Timestamp, TimeUnit

from clipcov_stream.arguments import no_less_than, whole_number


class Stopwatch:
    """Time of a block, on the device's own clock where it has one."""

    def __init__(self, state: State) -> None:
        self.cuda = state.device.name == "gpu"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []
        self.start = self.stop = 0.0

    def __enter__(self) -> Stopwatch:
        if self.cuda:
            self.events[0].record(torch.cuda.current_stream())
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop = time.perf_counter()
        if self.cuda:
            self.events[1].record(torch.cuda.current_stream())

    def milliseconds(self) -> float:
        """Waits for the device; call it where figures are read anyway."""
        if self.cuda:
            self.events[1].synchronize()
            return self.events[0].elapsed_time(self.events[1])
        return 1e3 * (self.stop - self.start)


def parse_warmup(warmup: str | int) -> Time:
    """Composer time from a string or a number of batches.

    Raises:
        ValueError: not a Composer time, a negative one, or one in tokens, seconds or samples.
    """
    if not isinstance(warmup, (str, Time)):
        warmup = whole_number("selection.warmup", warmup, "at least 0 batches, or a Composer time", no_less_than(0))
    try:
        time_ = Time.from_input(warmup, TimeUnit.BATCH)
    except (ValueError, TypeError) as error:
        raise ValueError(f"selection.warmup={warmup!r} is not a Composer time such as '100ba' or '0.1dur'") from error
    if not 0 <= time_.value < math.inf:
        raise ValueError(f"selection.warmup={warmup!r} must not be negative; 0 selects from the first step on")
    if time_.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.DURATION):
        raise ValueError(f"selection.warmup={warmup!r} must be in batches (ba), epochs (ep) or duration (dur)")
    return time_


def steps_later(timestamp: Timestamp, steps: int, samples: int) -> Timestamp:
    """What a clock that counts batches and samples will show some steps later in the same epoch."""
    return timestamp.copy(
        batch=int(timestamp.batch) + steps,
        batch_in_epoch=int(timestamp.batch_in_epoch) + steps,
        sample=int(timestamp.sample) + steps * samples,
        sample_in_epoch=int(timestamp.sample_in_epoch) + steps * samples,
    )


def in_warmup(warmup: Time, timestamp: Timestamp, max_duration: Time | None) -> bool:
    if warmup.unit == TimeUnit.DURATION:
        return max_duration is not None and (timestamp.get(max_duration.unit) / max_duration).value < warmup.value
    return timestamp.get(warmup.unit).value < warmup.value


def check_foreseen(warmup: Time, max_duration: Time | None, run_ahead: int) -> None:
    """Raise ValueError unless the step at which a warm-up ends is known before it comes."""
    foreseen = (TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.SAMPLE)
    if warmup.unit == TimeUnit.DURATION and max_duration is not None and max_duration.unit not in foreseen:
        raise ValueError(
            f"selection.warmup={warmup.to_timestring()} of max_duration={max_duration.to_timestring()} ends at a step "
            f"that selection.run_ahead={run_ahead} cannot foresee; give selection.warmup in batches (ba), or "
            "selection.run_ahead=0"
        )


def outlasts(warmup: Time, state: State) -> bool:
    """Whether a warm-up lasts as long as training, where the two can be compared."""
    end = state.max_duration
    if warmup.unit == TimeUnit.DURATION:
        return warmup.value >= 1
    if end is None or end.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH):
        return False
    if warmup.unit == end.unit:
        return warmup.value >= end.value
    if state.dataloader_len is None:
        return False
    batches = {TimeUnit.BATCH: 1, TimeUnit.EPOCH: int(state.dataloader_len)}
    return warmup.value * batches[warmup.unit] >= end.value * batches[end.unit]


def num_pools(state: State) -> int:
    """Pools of an epoch that training is certain to come to."""
    end, now = state.max_duration, state.timestamp
    if end is None or state.dataloader_len is None or end.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH):
        return 0
    left = end.value - int(now.get(end.unit))
    reached = int(state.dataloader_len) * left if end.unit == TimeUnit.EPOCH else int(now.batch_in_epoch) + left
    return min(int(state.dataloader_len), reached)


def check_duration(value: str, key: str) -> None:
    """Raise ValueError unless a duration is in batches or epochs: Composer's samples count candidates."""
    try:
        unit = Time.from_timestring(value).unit
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}={value!r} is not a Composer time such as '1000ba'") from error
    if unit not in (TimeUnit.BATCH, TimeUnit.EPOCH):
        raise ValueError(f"{key}={value!r} must be in batches (ba) or epochs of the stream (ep)")


def check_interval(value: str | int, key: str) -> None:
    """Raise ValueError for a number but 0, never, and 1, every epoch: Composer's numbers count epochs."""
    if isinstance(value, int) and value not in (0, 1):
        raise ValueError(
            f"{key}={value} would be in epochs and needs a unit: {value}ba for batches, 1ep for every epoch; 0 is never"
        )
