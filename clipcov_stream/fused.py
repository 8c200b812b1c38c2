"""Functions whose passes over memory become one on a GPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """`function`, compiled by torch.compile for tensors on a CUDA device and as it is for all others.

    A pool's rows are larger than a GPU's caches, so an operation on them takes as long as reading and writing them
    does; compiled, a chain of operations reads once and writes once. On a CPU blocks that stay in the cache do as much
    (`BLOCK` in sketch, `block_rows` in evidence), without a compiler. `function` takes tensors and numbers, positional,
    the first of them a tensor, and keeps nothing. Where it cannot be compiled it runs as it is, with one warning.
    """
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(first: Tensor, *rest: Any) -> Any:
        if not first.is_cuda:
            return function(first, *rest)
        if not compiled:
            compiled.append(torch.compile(function, fullgraph=True, dynamic=False))
        try:
            return compiled[0](first, *rest)
        except Exception as error:  # compilers fail in ways of their own
            if compiled[0] is function:
                raise
            warnings.warn(f"{function.__name__} runs uncompiled, and slower: {error}", stacklevel=2)
            compiled[0] = function
            return function(first, *rest)

    return cast(Function, call)
