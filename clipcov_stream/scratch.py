"""Working memory that is kept between steps, on a CPU.

A table of a few hundred kilobytes may be freed to the system and asked for again at every step: each of its pages then
costs a fault and is filled with zeros, together more than all that is computed in it (tools/LOG.md, 2026-11-27).
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LARGEST = 1 << 18
"""Numbers in the largest table that is kept, 1 MiB; a larger one is fresh every time."""

kept = threading.local()
"""Tables by name, of this thread alone: run-ahead selects in one of its own."""


def scratch(name: str, *shape: int) -> Tensor:
    """An uninitialized float32 tensor on the CPU, whose memory the next call of the same name takes back.

    For what does not outlive the function that asks for it. Costs: 1 MiB per name and thread at most.
    """
    size = math.prod(shape)
    if size > LARGEST:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    if not hasattr(kept, name):
        with torch.inference_mode(False):  # or nobody could write to it outside
            setattr(kept, name, torch.empty(LARGEST, dtype=torch.float32, device="cpu"))
    return getattr(kept, name)[:size].view(shape)
