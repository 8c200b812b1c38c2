"""Matrix products of float32 rows on a CPU, by the faster of torch's two libraries.

torch.mm is MKL's on x86, which leaves half of the vector width of other makers' CPUs unused; oneDNN, which torch has
for its layers, uses it all. Same precision, other rounding; which of them a product goes to depends on its shape alone,
so equal inputs give equal results. Measured in tools/LOG.md, 2026-11-28.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

STEP = 64
"""oneDNN compiles a kernel for every shape it meets and keeps the last thousand: rows go to it by multiples of this, at
most BLOCK at a time, so that a gate which opens another number at every step makes no new ones."""

BLOCK = 1024
LEAST = 1 << 20
"""Multiplications from which on a call of oneDNN, which takes ten times as long to begin, is over sooner."""

LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""oneDNN's linear layer with what follows it; the form that torch.compile uses too. None: this build has none."""


def blocks(num: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices of `num` rows: of `size`, then of the largest multiple of STEP, then the rest."""
    start = 0
    while start < num:
        left = num - start
        stop = start + (min(left, size) if left < STEP else min(left, size) // STEP * STEP)
        yield slice(start, stop)
        start = stop


def product(
    left: Float[Tensor, "n k"],
    right: Float[Tensor, "m k"],
    bias: Float[Tensor, " m"] | None = None,
    positive: bool = False,
    out: Float[Tensor, "n m"] | None = None,
) -> Float[Tensor, "n m"]:
    """left @ right.T + bias, what is below 0 as 0 if only what is `positive` counts; in `out`, which may be `left`
    itself, or in memory of its own.

    Costs: 2 * n * m * k flops.
    """
    if not suits(left, right):
        return by_torch(left, right, bias, positive, None if out is left else out)
    if len(left) % STEP == 0 and len(left) <= BLOCK:
        return by_onednn(left, right, bias, positive)
    if out is None:
        out = torch.empty(len(left), len(right))
    for part in blocks(len(left)):
        rows = left[part]
        if len(rows) % STEP:
            out[part] = by_torch(rows, right, bias, positive)
        else:
            out[part] = by_onednn(rows, right, bias, positive)
    return out


def add_across(total: Float[Tensor, "a b"], x: Float[Tensor, "n a"], y: Float[Tensor, "n b"]) -> None:
    """Add x^T y, in place. Costs: 2 * n * a * b flops."""
    for part in blocks(len(x)):
        rows, others = x[part], y[part]
        if suits(rows.T, others.T) and not len(rows) % STEP:
            total += by_onednn(rows.T, others.T)
        else:
            total.addmm_(rows.T, others)


def suits(left: Tensor, right: Tensor) -> bool:
    """Whether a product of these is oneDNN's: float32 on a CPU, large, and nothing to differentiate."""
    if not (LINEAR is not None and left.device.type == "cpu" and left.dtype == right.dtype == torch.float32):
        return False
    small = left.shape[0] < STEP or left.numel() * right.shape[0] < LEAST
    return not (small or (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)))


def by_torch(left: Tensor, right: Tensor, bias: Tensor | None, positive: bool, out: Tensor | None = None) -> Tensor:
    found = torch.mm(left, right.T, out=out) if bias is None else torch.addmm(bias, left, right.T, out=out)
    return found.clamp_min_(0.0) if positive else found


def by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None, positive: bool = False) -> Tensor:
    # Of what is neither a matrix nor a transposed one it has no fast form.
    left, right = (
        rows if rows.is_contiguous() or rows.T.is_contiguous() else rows.contiguous() for rows in (left, right)
    )
    return LINEAR(left, right, bias, "relu" if positive else "none", [], "")
