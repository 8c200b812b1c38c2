"""What makes a run what it is, kept in its checkpoint so that two runs are never mixed in silence."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from clipcov_stream.objective import Settings

LATER: dict[str, Any] = {
    "unevenness": 0.0,
    "novelty": 0.0,
    "copies": 0.0,
    "recent": Settings.recent,
    "repeats": math.inf,
    "soft_start": 0.0,
    "embed_patch_dropout": None,
    "proxy_lr": None,
}
"""Arguments that checkpoints of before they existed lack, and what those runs did."""


PROXIES = " (numbers that stand for the model; a run's about file, beside its metrics, has its width or config)"


ELSEWHERE = {"global_pool_size": "stream.global_pool_size"}
"""Arguments that are keys of another section than `selection` in a recipe."""
ANEW = "load_weights_only=true (step, schedule and optimizer then start anew)"


class OtherRun(ValueError):
    """A checkpoint is not of this run. Some of it is known only when training begins."""


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OtherRun, naming every difference, unless a checkpoint's arguments are this run's."""
    saved = {**LATER, **saved}
    other = [
        f"{ELSEWHERE.get(name, f'selection.{name}')}={saved.get(name)!r}, not {now[name]!r}"
        f"{PROXIES * (name == 'proxy')}"
        for name in now
        if saved.get(name) != now[name]
    ]
    if other:
        raise OtherRun(
            f"the checkpoint's run began with {'; '.join(other)}. To go on, use its settings; to start anew, another "
            f"run_name or save_folder; to take its weights alone, both of these with load_path=... and {ANEW}"
        )


def check_same_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint's place in the stream is none in this one.

    Args:
        saved, now: `columns`, role -> name of those read; `order`, what the order of samples depends on; of the
            checkpoint also `sample_in_epoch`, where the order matters only if it is above 0. An older checkpoint has
            neither of the first two, and passes.
    """
    pairs = [("stream.columns.", "columns")] + [("stream: ", "order")] * bool(saved.get("sample_in_epoch"))
    other = [
        f"{prefix}{key}={saved[kind].get(key)!r}, not {value!r}"
        for prefix, kind in pairs
        if kind in saved
        for key, value in now[kind].items()
        if saved[kind].get(key) != value
    ]
    if other:
        raise ValueError(
            f"the checkpoint's run read {'; '.join(other)}. It stands at sample {saved.get('sample_in_epoch')} of an "
            "epoch: in another order samples would be lost and others trained twice, and from other columns its sketch "
            f"is none. To go on, use its settings; to take its weights alone, load_path=... and {ANEW}"
        )


def name_of(selector: Any) -> str:
    """A name that another process gives the same function; the keyword arguments of a partial belong to it."""
    if isinstance(selector, functools.partial):
        knobs = "".join(f", {key}={value!r}" for key, value in sorted(selector.keywords.items()))
        return f"{name_of(selector.func)}{knobs}"
    return getattr(selector, "__name__", type(selector).__qualname__)


def fingerprint(model: nn.Module, values: bool = True) -> int:
    """A number that tells frozen models apart: of the names, shapes and first values of their weights.

    Without `values`, models in training: their weights are in the checkpoint.
    """
    total = 0
    for name, value in model.state_dict().items():
        head = value.detach().flatten()[: 256 if values else 0].double().cpu().numpy().tobytes()
        total = zlib.crc32(head + f"{name}{tuple(value.shape)}".encode(), total)
    return total
