"""Checkpoints as data: read without running any code of theirs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

BESIDE = (
    "datetime.timedelta",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.torch_version.TorchVersion",
)
"""What Composer keeps beside tensors and plain values: the generators' states, the version of torch and the clock.
NumPy 2 renamed its core."""
VALIDATION = "CHECKPOINT_VALIDATION_FUNCTION"
"""The variable by which Composer is told what to ask before it loads a checkpoint, which it does as any pickle."""


class Inert:
    """Stands for what is not needed to read weights; takes any arguments and keeps none."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_inert(path: str | Path, mmap: bool = False) -> Any:
    """The content of a checkpoint, with `Inert` in place of what Composer keeps beside its tensors.

    Args:
        mmap: leave tensors on the disk until they are read.

    Raises:
        Exception: torch's own, of a dozen types, for a file that is none or holds anything but data.
    """
    # NumPy's types trust what they are given, so they are not made.
    with torch.serialization.safe_globals([(Inert, name) for name in BESIDE]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def is_data(path: str | Path, specs: Any = None) -> bool:
    """Composer's question about a checkpoint: whether it may be loaded. Costs: no tensor is read.

    Composer 0.32 loads a checkpoint with `weights_only=False`, and asks this function before if the environment names
    it (`VALIDATION`). What passes holds tensors, plain values and the types of BESIDE, whose making runs no code.

    The pieces of a sharded checkpoint (FSDP), of which Composer asks with `specs`, and its .metadata are not judged:
    torch.distributed.checkpoint reads them, in a form of its own.

    Raises:
        ValueError: a file that holds anything else, or is no checkpoint.
    """
    if specs is not None or Path(path).name == ".metadata":
        return True
    try:
        load_inert(path, mmap=True)
    except FileNotFoundError:
        raise  # Composer has words of its own for it
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # in the midst of torch's advice to load it all the same
        raise ValueError(
            f"checkpoint {str(path)!r}, of load_path or autoresume, is refused: it is damaged, or holds more than "
            f"data, and to load it could run code of whoever wrote it ({named[1] if named else type(error).__name__})"
        ) from error
    return True


@contextmanager
def checked_loading() -> Iterator[None]:
    """Within the block Composer asks `is_data` before it loads a checkpoint, if the environment names nobody else."""
    ours = VALIDATION not in os.environ
    if ours:
        os.environ[VALIDATION] = f"{is_data.__module__}.{is_data.__name__}"
    try:
        yield
    finally:
        if ours:
            del os.environ[VALIDATION]
