"""What a run records beside its checkpoints, read or set aside; needs nothing of the stack: a report is quick to start.

metrics_file         metrics, a line of JSON per step and per evaluation (`train.MetricsFile`)
NAME.about.json      beside it: what the run was (`about.About`)
gallery.jsonl        in the gallery's folder: what was kept and dropped (`gallery.Gallery`)
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

GALLERY_FILE = "gallery.jsonl"


def about_path(metrics_file: str | Path) -> Path:
    """Where a run's `about` file is."""
    return Path(metrics_file).with_suffix(".about.json")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """A run's metrics, one dict per step, in order; a later line of the same step adds to the earlier.

    A line at the end that was not written in full, because the run was killed, is left out.

    Raises:
        ValueError: no metrics, or a damaged file.
    """
    steps: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            steps.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ValueError(f"{path}, line {number}, is not a step's metrics: {error!r}") from error
    return [steps[step] for step in sorted(steps)]


def read_gallery(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A gallery's header and its records, in order; a line at the end that was not written in full is left out.

    Args:
        path: the file, or its folder.

    Raises:
        ValueError: no gallery, or one that is damaged elsewhere than at its end.
    """
    path = Path(path)
    path = path / GALLERY_FILE if path.is_dir() else path
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"{path}: no gallery there") from error
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not found or not isinstance(found[0], dict) or found[0].get("version") != 1:
        raise ValueError(f"{path} is not a gallery of this version")
    return found[0], found[1:]


def set_aside(path: Path, key: str) -> None:
    """Rename a file that a recipe's key names (`moved_aside`), with a warning."""
    aside = moved_aside(path)
    warnings.warn(f"{key}={str(path)!r} had lines, but the run starts anew; they are in {aside.name!r}", stacklevel=2)


def moved_aside(path: Path) -> Path:
    """Rename a file to the first of PATH.1, PATH.2, ... that is free; returns its new place."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(aside)
