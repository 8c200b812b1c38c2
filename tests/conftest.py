"""Shape checks of the maths, under pytest only."""

import importlib
import importlib.util
import sys
import typing

import beartype  # noqa: F401  (imported here, lest its own TYPE_CHECKING blocks run below)
import jaxtyping
import torch

CHECKED = [f"clipcov_stream.{name}" for name in ("pool", "sketch", "objective", "rivals", "selection")]


def import_checked() -> None:
    """Import the maths with every jaxtyping annotation enforced.

    Annotations are imported under TYPE_CHECKING only, so it must be true while these modules load, and only then: the
    package's own __init__ would import Composer. Hence the package is entered first, and executed last.
    """
    spec = importlib.util.find_spec("clipcov_stream")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    typing.TYPE_CHECKING = True
    try:
        with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
            for name in CHECKED:
                importlib.import_module(name)
    finally:
        typing.TYPE_CHECKING = False
    spec.loader.exec_module(package)


assert "clipcov_stream" not in sys.modules, "the package was imported before its shape checks could be turned on"
import_checked()
torch.set_num_threads(1)
