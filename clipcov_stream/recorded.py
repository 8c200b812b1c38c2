"""The recipe in every checkpoint, so that a run resumed with another says what differs."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from composer.core import Callback
from composer.utils import dist

from clipcov_stream.config import TrainConfig
from clipcov_stream.sharded import unlike

SECTIONS = (
    *("model", "stream", "selection", "optimizer", "scheduler", "algorithms", "seed", "precision", "max_duration"),
    *("fsdp_config", "compile_config"),
)
"""What of a recipe decides what is trained. Loggers and callbacks stay out: they may hold credentials."""
REFUSED = re.compile(r"model\.(name|config|loss)\b.*|optimizer\.name")
"""Keys whose change goes wrong in silence: Composer loads what weights it finds, and leaves the others random."""
log = logging.getLogger(__name__)


class RecordedRecipe(Callback):
    """Keeps the recipe in checkpoints. On resume it logs every difference, as a warning of this module's logger.

    Raises:
        ValueError: on resume, a model or an optimizer of another kind, or a model that is sharded and was not, or the
            other way round. What of `selection` and `stream` must be as it was, `ClipCov` and `PairDataset` see to.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.recipe = recorded(config)

    def state_dict(self) -> dict[str, Any]:
        return {"recipe": dict(self.recipe)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state.get("recipe", {})
        if saved and is_sharded(saved) != is_sharded(self.recipe):
            raise ValueError(unlike(now=is_sharded(self.recipe)))
        changed = differences(saved, self.recipe)
        refused = [said for key, said in changed.items() if REFUSED.fullmatch(key)]
        if refused:
            raise ValueError(
                f"the checkpoint's run began with {'; '.join(refused)}: weights that it lacks would stay random. To go "
                "on, use its settings; to start anew, another run_name or save_folder"
            )
        if changed and dist.get_global_rank() == 0:
            log.warning("the run goes on with other settings than its checkpoint's: %s", "; ".join(changed.values()))


def recorded(config: TrainConfig) -> dict[str, str]:
    """Key -> value, in JSON, of every setting that decides what is trained; credentials within URLs left out."""
    return {
        key: re.sub(r"(://)[^/@\s\"]*@", r"\1", json.dumps(value, sort_keys=True))
        for name in SECTIONS
        for key, value in flat(name, getattr(config, name))
    }


def is_sharded(recipe: Mapping[str, str]) -> bool:
    """Whether a recorded recipe has an `fsdp_config`; one with keys is recorded key by key."""
    return recipe.get("fsdp_config", "null") != "null" or any(key.startswith("fsdp_config.") for key in recipe)


def flat(key: str, value: Any) -> list[tuple[str, Any]]:
    """Leaves of nested sections and mappings, by their full key."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping) and value:
        return [leaf for name, item in value.items() for leaf in flat(f"{key}.{name}", item)]
    return [(key, value)]


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """What to say of every key whose value differs; a checkpoint without a recipe differs in none."""
    if not saved:
        return {}
    keys = [*now, *(key for key in saved if key not in now)]
    return {
        key: f"{key}={now.get(key, 'left out')}, was {saved.get(key, 'left out')}"
        for key in keys
        if now.get(key) != saved.get(key)
    }
