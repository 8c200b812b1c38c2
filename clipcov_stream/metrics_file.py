"""A run's metrics as JSON lines, the same whether the run was killed and resumed or not."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from clipcov_stream.records import set_aside
from clipcov_stream.redact import redacted
from clipcov_stream.remote import is_remote


class MetricsFile(LoggerDestination):
    """Appends every step's metrics to a JSON-lines file, on rank 0.

    Each line has `step`, the optimizer steps done, and the metrics logged since the last line. Every evaluation adds a
    line for its step, with `samples_streamed` and `samples_seen`. A checkpoint notes the file's length, and what no
    line has yet; a resumed run cuts the file there before its first line, so that in the end it has each line once, as
    a straight run's. A run that starts anew sets a file that is there aside, as NAME.1, NAME.2, ..., with a warning.

    Args:
        path: local.

    Raises:
        ValueError: a URL.
    """

    def __init__(self, path: str) -> None:
        if is_remote(path):
            raise ValueError(
                redacted(f"metrics_file={path!r} is remote, where nothing can be appended to a file; give a local path")
            )
        self.path = Path(path)
        self.pending: dict[str, Any] = {}
        self.evaluated: dict[str, float] = {}
        """The last evaluations' figures, by label and metric: `shapes/top1`."""
        self._begins: dict[str, int] | None = {"step": 0}
        """Where this process's lines begin; None once they have."""

    def after_load(self, state: State, logger: Logger) -> None:
        if self._begins is not None:
            self._begins["step"] = int(state.timestamp.batch)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        plain = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        self.pending.update(plain)
        figures = {key: value for key, value in plain.items() if key.startswith("metrics/")}
        self.evaluated.update({key.removeprefix("metrics/"): value for key, value in figures.items()})

    def batch_end(self, state: State, logger: Logger) -> None:
        self.flush(int(state.timestamp.batch))

    def eval_end(self, state: State, logger: Logger) -> None:
        self.pending["samples_streamed"] = int(state.timestamp.sample)
        for algorithm in state.algorithms:
            if (seen := getattr(algorithm, "samples_seen", None)) is not None:
                self.pending["samples_seen"] = seen
        # Before the next step's metrics join: evaluations come after batch_end, after epoch_end and on their own.
        self.flush(int(state.timestamp.batch))

    def fit_end(self, state: State, logger: Logger) -> None:
        self.flush(int(state.timestamp.batch))

    def flush(self, step: int) -> None:
        if self.pending and dist.get_global_rank() == 0:
            self._begin()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **self.pending}) + "\n")
        self.pending = {}

    def _begin(self) -> None:
        """Before the first line: leave of the file what a straight run would have written so far."""
        if self._begins is None:
            return
        begins, self._begins = self._begins, None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        if begins["step"] == 0:
            set_aside(self.path, "metrics_file")
        else:
            rewind(self.path, begins["step"], begins.get("bytes"))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run begins with. Called before a checkpoint is written, which may not outlast its lines."""
        num_bytes = 0 if self._begins is None else self._begins.get("bytes", 0)
        if self._begins is None and dist.get_global_rank() == 0:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
                num_bytes = os.fstat(file.fileno()).st_size
        return {"bytes": num_bytes, "pending": dict(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # An older checkpoint has nothing of this.
        self._begins = {"step": 0} | ({"bytes": state["bytes"]} if "bytes" in state else {})
        self.pending = dict(state.get("pending", {}))


def rewind(path: Path, step: int, num_bytes: int | None) -> None:
    """Cut off what was written after a checkpoint.

    Args:
        path: of JSON lines; the last may be torn.
        step: of the checkpoint.
        num_bytes: the file's length then. If None, or if the file is no longer the same, which a warning then says,
            lines of steps up to `step` stay.
    """
    data = path.read_bytes()
    if num_bytes and num_bytes <= len(data) and data[:num_bytes].endswith(b"\n"):
        os.truncate(path, num_bytes)
        return
    lines = data.splitlines(keepends=True)
    kept = b"".join(line for line in lines if (number := step_of(line)) is not None and number <= step)
    if num_bytes is not None:
        warnings.warn(
            f"metrics_file={str(path)!r} is not as it was when the checkpoint of step {step} was written ({len(data)} "
            f"bytes, then {num_bytes}); its lines up to that step are kept",
            stacklevel=2,
        )
    if kept != data:
        new = path.with_name(f"{path.name}.new")  # replaced in full or not at all
        new.write_bytes(kept)
        new.replace(path)


def step_of(line: bytes) -> int | None:
    """A line's step; None if it is torn or no line of ours."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
