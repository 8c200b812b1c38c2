"""On a GPU: functions whose passes over memory become one, and work beside other work."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")


def fused(function: Function) -> Function:
    """`function`, compiled by torch.compile for tensors on a CUDA device and as it is for all others.

    A pool's rows are larger than a GPU's caches, so an operation on them takes as long as reading and writing them
    does; compiled, a chain of operations reads once and writes once. On a CPU blocks that stay in the cache do as much
    (`BLOCK` in sketch, `block_rows` in evidence), without a compiler. `function` takes tensors and numbers, positional,
    the first of them a tensor, and keeps nothing. It is compiled once for each set of shapes, and not for shapes at
    large, so that a resumed run rounds as the straight one did, whatever shapes came first. Where it cannot be
    compiled, or after more shapes than torch allows (8), it runs as it is, with one warning.
    """
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(first: Tensor, *rest: Any) -> Any:
        if not first.is_cuda:
            return function(first, *rest)
        if not compiled:
            # Without the shape checks that tests wrap around it.
            compiled.append(torch.compile(inspect.unwrap(function), fullgraph=True, dynamic=False))
        try:
            return compiled[0](first, *rest)
        except Exception as error:  # compilers fail in ways of their own
            passing = isinstance(error, torch.OutOfMemoryError) or torch.cuda.is_current_stream_capturing()
            if compiled[0] is function or passing:
                raise
            reason = str(error).strip().split("\n", 1)[0]
            warnings.warn(f"{function.__name__} runs uncompiled, and slower: {reason}", stacklevel=2)
            compiled[0] = function
            return function(first, *rest)

    return cast(Function, call)


def aside(run: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Start `run` beside what follows, on a GPU; the function returned waits for it, without the host, and returns its
    result. Elsewhere `run` runs when it is waited for.

    What `run` reads must outlive the wait.
    """
    if device.type != "cuda":
        return run
    main, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = run()

    def wait() -> Result:
        main.wait_stream(side)
        return result

    return wait


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for what a GPU has yet to do: from the CPU the copy takes its turn there.

    Memory that is not pinned CUDA copies before it returns, and for that may wait after all; pinned memory must not be
    written to until the device has read it: nothing that is brought here is ever written to. The other way round
    nothing would say when the values have come, so that waits.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


@functools.cache
def side_stream(device: torch.device) -> Any:
    """One per device, always the same: memory that was allocated on it is used again on it, in order."""
    return torch.cuda.Stream(device)
