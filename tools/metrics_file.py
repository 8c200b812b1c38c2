"""Reading what `metrics_file` recorded; apart from the rest, because nothing else of the stack is needed for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
