"""Which step's lag a selection reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor

Lag = tuple[Tensor, Tensor]
"""A selection state's lag and its weight."""


class Lags:
    """The lags of the last steps. The selection of step t reads that of step t - 1 - `delay`.

    A fixed delay is what lets selection run ahead of training and choose the same survivors as if it did not: the lag
    that a selection reads must be there when it begins, whatever the speed of either.

    Args:
        delay: steps that a lag waits before a selection reads it.
    """

    def __init__(self, delay: int) -> None:
        self.delay = delay
        self.kept: deque[Lag] = deque(maxlen=delay + 1)

    @property
    def newest(self) -> Lag | None:
        return self.kept[-1] if self.kept else None

    def note(self, lag: Lag) -> None:
        """Keep the lag that a step leaves."""
        self.kept.append(lag)

    def read_by(self, ahead: int) -> Lag | None:
        """The lag that the step `ahead` steps after the next one reads; None, a lag of zeros, if it has none yet."""
        assert ahead <= self.delay, (ahead, self.delay)
        at = self.delay - ahead
        return self.kept[-1 - at] if at < len(self.kept) else None

    def waiting(self) -> list[list[Tensor]]:
        """All but the newest, oldest first, for a checkpoint."""
        return [[lag.clone(), weight.clone()] for lag, weight in list(self.kept)[:-1]]

    def load(self, waiting: Iterable[Any], newest: Lag | None) -> None:
        """Go on from what `waiting` returned and the newest lag, which the selection state holds."""
        self.kept.clear()
        self.kept.extend((lag, weight) for lag, weight in waiting)
        if newest is not None:
            self.kept.append(newest)
