"""Large matrix products of float32 rows on a CPU, by oneDNN.

torch.mm is MKL's on x86, and oneDNN, which torch has for its layers, was more than twice as fast on an AMD CPU with
AVX-512, and level on an older one with AVX2 alone (tools/LOG.md, 2026-11-28). Same precision, other rounding; which of
them a product goes to depends on its shape alone, so equal inputs give equal results. torch.backends.mkldnn.enabled =
False leaves all to torch.mm. And, on any device, products that autocast does not round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Function = TypeVar("Function", bound=Callable[..., Any])

STEP = 64
"""oneDNN compiles a kernel for every shape it meets, and keeps the last thousand: rows go to it by multiples of this,
at most BLOCK at a time, as the gate opens another number at every step."""

BLOCK = 1024
LEAST = 1 << 20
"""Multiplications from which on a call of oneDNN, which takes ten times as long to begin, is over sooner."""


def found_linear() -> Any:
    """oneDNN's linear layer, in the form that torch.compile uses too; None where this torch has none that works so."""
    try:
        linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise")  # noqa: B009 - unknown to type checkers
        rows = torch.ones(2, 3, dtype=torch.float32, device="cpu")
        works = bool((linear(rows, rows, rows[:, 0], "none", [], "") == 4).all())
    except Exception:  # not built in, or of another signature
        return None
    return linear if works else None


LINEAR = found_linear()


def blocks(num: int) -> Iterator[slice]:
    """Slices of `num` rows: of BLOCK, then of the largest multiple of STEP, then the rest."""
    start = 0
    while start < num:
        size = min(num - start, BLOCK)
        stop = start + (size if size < STEP else size // STEP * STEP)
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
    itself but no view of it, or in memory of its own.

    Costs: 2 * n * m * k flops.
    """
    if not suits(left, right, bias):
        return by_torch(left, right, bias, positive, None if out is left else out)
    if len(left) % STEP == 0 and len(left) <= BLOCK:
        return by_onednn(left, right, bias, positive)
    if out is None:
        out = left.new_empty(len(left), len(right))
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


def suits(left: Tensor, right: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product of these is oneDNN's: float32 on a CPU, large, and nothing to differentiate."""
    if LINEAR is None or left.device.type != "cpu" or left.shape[0] < STEP or left.numel() * right.shape[0] < LEAST:
        return False
    given = (left, right) if bias is None else (left, right, bias)
    alike = all(part.dtype == torch.float32 for part in given) and torch.backends.mkldnn.enabled
    return alike and not (torch.is_grad_enabled() and any(part.requires_grad for part in given))


def by_torch(left: Tensor, right: Tensor, bias: Tensor | None, positive: bool, out: Tensor | None = None) -> Tensor:
    found = torch.mm(left, right.T, out=out) if bias is None else torch.addmm(bias, left, right.T, out=out)
    return found.clamp_min_(0.0) if positive else found


def by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None, positive: bool = False) -> Tensor:
    # Of what is neither a matrix nor a transposed one it has no fast form.
    left, right = (
        rows if rows.is_contiguous() or rows.T.is_contiguous() else rows.contiguous() for rows in (left, right)
    )
    found = LINEAR(left, right, bias, "none", [], "")
    return found.clamp_min_(0.0) if positive else found  # its own "relu" makes 0 of NaN


def in_full(function: Function) -> Function:
    """`function`, in which autocast is off and nothing is noted for gradients: its products are those of its numbers,
    whatever it is called inside of.

    Its first argument has a tensor `lag`, on the device that all others are on.
    """

    @functools.wraps(function)
    @torch.no_grad()
    def call(state: Any, *rest: Any, **named: Any) -> Any:
        kind = state.lag.device.type
        if not torch.is_autocast_enabled(kind):
            return function(state, *rest, **named)
        with torch.autocast(kind, enabled=False):
            return function(state, *rest, **named)

    return cast(Function, call)
