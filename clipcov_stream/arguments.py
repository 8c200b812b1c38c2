"""A user's numbers, as numbers of Python's own, or an error that names the argument."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def real_number(name: str, value: Any, must: str, holds: Callable[[float], bool]) -> float:
    """A number, NumPy's or Python's, as Python's; an int stays one.

    Args:
        name: of the argument.
        must: what it must be, as the end of an error.
        holds: whether a number is that.

    Raises:
        ValueError: no number, as bools, strings and tensors are none, or one that does not hold.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; it must be a number, {must}")
    number = operator.index(value) if isinstance(value, numbers.Integral) else float(value)
    if not holds(number):
        raise ValueError(f"{name}={value} must be {must}")
    return number


def whole_number(name: str, value: Any, must: str, holds: Callable[[int], bool]) -> int:
    """A whole number, of Python, of NumPy or in a tensor of one, as an int; arguments and errors as of `real_number`,
    and floats are none, even 16.0."""
    unlike = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        number = None if unlike else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; it must be a whole number, {must}")
    if not holds(number):
        raise ValueError(f"{name}={number} must be {must}")
    return number


def no_less_than(low: float) -> Callable[[float], bool]:
    return lambda value: value >= low
