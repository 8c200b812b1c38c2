"""What a run was: its recipe, versions and hardware, in a file beside its metrics.

runs/NAME/metrics.jsonl          metrics
runs/NAME/metrics.about.json     {"recipe": ..., "versions": ..., "num_ranks": ..., "started": ..., "ended": ...}
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from clipcov_stream.config import TrainConfig
from clipcov_stream.records import about_path
from clipcov_stream.redact import redacted

PACKAGES = ("clipcov-stream", "torch", "mosaicml", "mosaicml-streaming", "open_clip_torch", "numpy", "pillow")
SECRET = re.compile(r"pass|secret|tokens?$|keys?$|key_?id$|credential|auth(orization)?$|sas$|webhook", re.IGNORECASE)
"""Keys whose values, and all below them, are hidden; loggers and callbacks are given such things."""


class About(Callback):
    """Writes a run's `about` file on rank 0: at the start of training, and again, with `ended`, at its end.

    Args:
        metrics_file: the run's, beside which the file stands.
        config: the run's recipe.
    """

    def __init__(self, metrics_file: str, config: TrainConfig) -> None:
        self.path = about_path(metrics_file)
        self.config = config
        self._about: dict[str, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        self._about = {
            "recipe": plain(dataclasses.asdict(self.config)),
            "versions": {"python": platform.python_version(), **installed(PACKAGES)},
            "device": torch.cuda.get_device_name() if state.device.name == "gpu" else platform.machine(),
            "num_ranks": dist.get_world_size(),
            "num_parameters": sum(parameter.numel() for parameter in state.model.parameters()),
            "first_step": int(state.timestamp.batch),
            "started": now(),
            "ended": None,
        }
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._about["ended"] = now()
        self._write()

    def _write(self) -> None:
        if dist.get_global_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self._about, indent=1) + "\n", encoding="utf-8")
            new.replace(self.path)


def plain(value: Any, key: str = "") -> Any:
    """A recipe as JSON can hold it, without its secrets: all below keys that name one, and what `redacted` hides."""
    if SECRET.search(key) and value:
        return "***"
    if isinstance(value, Mapping):
        return {str(name): plain(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, key) for item in value]
    if isinstance(value, str):
        return redacted(value)
    return value if isinstance(value, (int, float, bool, type(None))) else repr(value)


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout that was never installed
    return found


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
