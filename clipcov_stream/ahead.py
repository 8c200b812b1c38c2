"""Work on the next items of a loader in a thread of its own, while the current one is in use.

What the work needs to know of its consumer is handed over with permission to begin: a ticket. The consumer issues one
per item, at most `depth` beyond the one it is about to use. So memory is bounded, an item's work depends on the
consumer as it was a fixed number of items earlier, whatever the threads' speeds, and when the consumer stops, every
rank's thread has tickets for the same items, none of which waits for another rank in vain.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
Note = TypeVar("Note")
Result = TypeVar("Result")

ENOUGH = 2
"""Steps ahead at which training no longer waits, unless the thread is slower than it."""

PATIENCE = 60.0
"""Seconds that a stopping thread gets for what it has begun. It is a daemon: the process does not wait for it."""


@dataclass(frozen=True)
class Failure:
    error: BaseException


class End:
    """There are no more items, or no more tickets."""


class Ahead(Generic[Item, Note, Result]):
    """The results of work on every item, in order; at most `depth` are begun before they are asked for.

    Args:
        items: read in the thread, and nowhere else.
        depth: how far work runs ahead, at least 1.
        ticket: number of items ahead of the one asked for -> what `work` is told of the consumer, who makes it in its
            own thread; None if that item will not be needed.
        work: of an item and its ticket, in the thread.
        all_have: whether every rank's thread has an item, where they work together: if one has none, all end.
        finishes: whether a thread that is stopped still works on all items it has tickets for, because other ranks'
            threads wait for it to.

    Raises, from `next`: what `items` or `work` raised.
    """

    def __init__(
        self,
        items: Iterator[Item],
        depth: int,
        ticket: Callable[[int], Note | None],
        work: Callable[[Item, Note], Result],
        finishes: bool = False,
        all_have: Callable[[bool], bool] | None = None,
    ) -> None:
        self.depth, self.ticket, self.finishes = depth, ticket, finishes
        self.tickets: SimpleQueue[Any] = SimpleQueue()
        self.results: SimpleQueue[Any] = SimpleQueue()
        self.stopping = threading.Event()
        self.num_issued = self.num_taken = 0
        # Not a method: a thread that holds its owner would keep it from being collected.
        self.thread = threading.Thread(
            target=run,
            args=(items, work, all_have, self.tickets, self.results, self.stopping, here()),
            name="ahead",
            daemon=True,
        )
        self.thread.start()
        stop_ = (self.thread, self.tickets, None if finishes else self.stopping)
        self.close = weakref.finalize(self, stop, *stop_)
        """Ends the thread; also called when this is collected, or at exit."""

    def __iter__(self) -> Ahead[Item, Note, Result]:
        return self

    def __next__(self) -> Result:
        if not self.close.alive:
            raise StopIteration
        while self.num_issued <= self.num_taken + self.depth:
            note = self.ticket(self.num_issued - self.num_taken)
            if note is None:
                break
            self.tickets.put(note)
            self.num_issued += 1
        if self.num_issued <= self.num_taken:
            raise RuntimeError(f"item {self.num_taken} is asked for, but has no ticket")
        result = self.results.get()
        if isinstance(result, (End, Failure)):
            self.close()
            raise StopIteration if isinstance(result, End) else result.error
        self.num_taken += 1
        return result


def here() -> tuple[int, int | None]:
    """What PyTorch keeps per thread: the number of its threads, on which rounding may depend, and the CUDA device."""
    return torch.get_num_threads(), torch.cuda.current_device() if torch.cuda.is_initialized() else None


def run(
    items: Iterator[Any],
    work: Callable[[Any, Any], Any],
    all_have: Callable[[bool], bool] | None,
    tickets: SimpleQueue[Any],
    results: SimpleQueue[Any],
    stopping: threading.Event,
    place: tuple[int, int | None],
) -> None:
    """The thread: an item per ticket, until either ends, or something is raised."""
    try:
        num_threads, cuda_device = place
        torch.set_num_threads(num_threads)
        if cuda_device is not None:
            torch.cuda.set_device(cuda_device)
        while not isinstance(note := tickets.get(), End) and not stopping.is_set():
            item = next(items, End)
            has = item is not End
            if not (has if all_have is None else all_have(has)) or stopping.is_set():
                break
            try:
                result = work(item, note)
            except StopIteration as error:  # in the consumer it would end the epoch
                raise RuntimeError(f"{getattr(work, '__name__', work)} raised StopIteration") from error
            results.put(result)
        results.put(End())
    except BaseException as error:  # it is raised in the consumer's thread
        results.put(Failure(error))


def stop(thread: threading.Thread, tickets: SimpleQueue[Any], stopping: threading.Event | None) -> None:
    """End a thread: after all that it has tickets for, or, with `stopping`, after what it does now."""
    if stopping is not None:
        stopping.set()
    tickets.put(End())
    if thread is not threading.current_thread():
        thread.join(PATIENCE)


def check_ahead(run_ahead: int, lag_delay: int, follows: str, uses_lag: bool) -> None:
    """Raise ValueError unless selection can run this far ahead of training.

    Args:
        run_ahead, lag_delay: as `ClipCov`'s.
        follows: the arguments, if any, that make selection follow the model in training.
        uses_lag: whether selection reads the lag.
    """
    if run_ahead and follows:
        raise ValueError(
            f"selection.run_ahead={run_ahead}: selection with {follows} follows the model in training, and cannot run "
            "ahead of it; set selection.run_ahead=0, or use embed='columns', 'proxy' or 'online' and a selector that "
            "does not ask the model"
        )
    if uses_lag and run_ahead > lag_delay:
        raise ValueError(
            f"selection.run_ahead={run_ahead} must be at most selection.lag_delay={lag_delay}: a step's selection "
            "reads the lag of lag_delay steps before. Raise selection.lag_delay (it changes survivors), or set "
            "selection.learnability=0, which reads no lag"
        )
