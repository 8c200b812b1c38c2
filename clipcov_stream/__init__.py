"""Online, cross-covariance-preserving data selection for CLIP pretraining."""

from typing import TYPE_CHECKING, Any

from clipcov_stream.lowrank import LowRankSketch
from clipcov_stream.objective import Settings
from clipcov_stream.pool import Pool
from clipcov_stream.selection import SELECTORS
from clipcov_stream.selector import Selector
from clipcov_stream.sketch import CrossCovSketch

if TYPE_CHECKING:
    from clipcov_stream.algorithm import ClipCov

__version__ = "0.1.0"
__all__ = ["SELECTORS", "ClipCov", "CrossCovSketch", "LowRankSketch", "Pool", "Selector", "Settings"]


def __getattr__(name: str) -> Any:
    # Composer takes seconds to import; a loop that only wants a Selector needs torch alone.
    if name == "ClipCov":
        from clipcov_stream.algorithm import ClipCov

        return ClipCov
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
