"""A run that is told to end saves where it stands, so that a preempted machine costs no step.

SIGTERM is what Slurm, Kubernetes and a machine that shuts down send some seconds before they kill; SIGINT is Ctrl-C.
By itself Composer exits on both at once, and what was trained since the last checkpoint is lost.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from clipcov_stream.checkpoints import WholeCheckpoints, WholePieces

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SOON = 1.0
"""Seconds between Composer's looks at a store for what it has uploaded. By itself it waits 30, all that launchers grant
between SIGTERM and SIGKILL."""

QUIET = 30.0
"""Seconds for which a run that has saved minds no signal beside a second Ctrl-C, unless it is closed before. A launcher
sends its own within a few."""


class Told(SystemExit):
    """What ends a run that was told to, on all ranks after the same step."""


class SaveOnSignal(Callback):
    """On SIGTERM or Ctrl-C ends the step, has every CheckpointSaver save and exits with status 128 + signal (`Told`).

    For any Trainer: `callbacks=[SaveOnSignal()]`. Ranks agree after every step, so a signal to one of them ends all
    after the same. An evaluation that is due after that step is run, lest it be missing later, between two checkpoints
    of the step, of which the first is there should time run out; Composer's own savers write the first alone, and so it
    is with pieces. A second Ctrl-C ends at once, without saving; SIGTERM beside another signal changes nothing,
    whichever is seen first, because Composer's launcher sends one to ranks that Ctrl-C has told to end. Signals are
    caught while `fit` runs in the main thread, and in a run that has saved for QUIET seconds or until it is closed.

    Composer's uploads, of its savers and its loggers, are made by processes that a signal to the whole group ends. For
    checkpoints in a store there is `stored_checkpoints.StoredCheckpoints`.

    Costs: over ranks an all-reduce of one number a step.
    """

    def __init__(self) -> None:
        self.asked = 0
        """The signal that this rank got; 0 is none."""
        self._interrupted = False
        self._quiet_until = 0.0
        """By the clock, a while after a run was told to end and has saved; 0 before."""
        self._in_fit = False
        self._saved_at = -1
        """Step of a checkpoint that was saved before an evaluation."""
        self._before: dict[int, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        self.asked, self._interrupted, self._quiet_until, self._in_fit, self._saved_at = 0, False, 0.0, True, -1
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {each: signal.signal(each, self._ask) for each in SIGNALS}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        is_interrupt = number == signal.SIGINT
        # Not whether any signal was here before: a launcher's SIGTERM can overtake the Ctrl-C that it answers. The
        # kernel may give that to any thread, and one that has to wait for a core notes it late.
        again, self._interrupted = is_interrupt and self._interrupted, self._interrupted or is_interrupt
        if not again and time.monotonic() < self._quiet_until:
            return  # it is about to end
        if again or not is_within_fit(frame):
            # Somebody has no patience; or an exception has ended fit, and the Trainer is not closed yet.
            self._release()
            os.kill(os.getpid(), number)
            return
        first, self.asked = not self.asked, self.asked or number
        if first and dist.get_global_rank() == 0:
            again = "; again: at once, unsaved" if is_interrupt else ""
            # Not print: the signal may have come in the midst of one. And who reads it may be gone by the same signal.
            with suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: ends after this step{again}\n".encode())

    def eval_before_all(self, state: State, logger: Logger) -> None:
        if self._in_fit and asked_of_any(self.asked, state):
            self._save(state, logger)
            self._saved_at = int(state.timestamp.batch)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        timestamp, epoch = state.timestamp, state.dataloader_len
        is_last = state.max_duration is not None and timestamp >= state.max_duration
        # Of an epoch's last step epoch_checkpoint comes next: one who goes on from there finds no epoch without steps.
        if not is_last and (epoch is None or timestamp.batch_in_epoch < epoch):
            self._end_if_asked(state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if state.max_duration is None or state.timestamp < state.max_duration:
            self._end_if_asked(state, logger)

    def _end_if_asked(self, state: State, logger: Logger) -> None:
        """Save and exit, on all ranks, if any of them got a signal."""
        number = asked_of_any(self.asked, state)
        if not number:
            return
        saves = self._save(state, logger)
        self._quiet_until = time.monotonic() + QUIET
        dist.barrier()  # a rank that is gone has the launcher end the others, the one that writes among them
        if dist.get_global_rank() == 0:
            saved = "saved, to go on from with the same settings" if saves else "nothing is saved: no save_folder"
            name, step = signal.Signals(number).name, int(state.timestamp.batch)
            with suppress(OSError):
                print(f"{state.run_name}: {name}, ends after step {step:,}; {saved}", flush=True)
        raise Told(128 + number)

    def _save(self, state: State, logger: Logger) -> bool:
        """Have all savers save this step, unless they have, and wait until it is uploaded; whether there are any."""
        savers = [each for each in state.callbacks if isinstance(each, CheckpointSaver)]
        for saver in savers:
            saver._symlink_upload_wait_before_next_try_in_seconds = SOON
            # Composer's own write over what is there, remove what they kept once for each time it was written, and
            # upload nothing twice. Pieces are written over, too.
            in_files = isinstance(saver, WholeCheckpoints) and not isinstance(saver, WholePieces)
            again = self._saved_at == int(state.timestamp.batch) and in_files
            if saver.last_checkpoint_batch != state.timestamp.batch or again:
                saver._save_checkpoint(state, logger)
            saver.fit_end(state, logger)  # which waits
        return bool(savers)

    def fit_end(self, state: State, logger: Logger) -> None:
        # Under this one's care, lest a signal cuts the last upload short.
        for saver in state.callbacks:
            if isinstance(saver, WholeCheckpoints):
                saver.fit_end(state, logger)
        self._release()

    def close(self, state: State, logger: Logger) -> None:
        self._release()

    def _release(self) -> None:
        self._in_fit = False
        for number, handler in self._before.items():
            # None: not Python's. And somebody may have set another since.
            if handler is not None and signal.getsignal(number) == self._ask:
                signal.signal(number, handler)
        self._before = {}


def is_within_fit(frame: FrameType | None) -> bool:
    """Whether a frame is of a call that `Trainer.fit`, or what it consists of, has made."""
    while frame is not None:
        if frame.f_code in (Trainer.fit.__code__, Trainer._train_loop.__code__):
            return True
        frame = frame.f_back
    return False


def asked_of_any(number: int, state: State) -> int:
    """The largest of all ranks' numbers."""
    if dist.get_world_size() == 1:
        return number
    asked = state.device.tensor_to_device(torch.tensor([number]))
    dist.all_reduce(asked, reduce_operation="MAX")
    return int(asked)
