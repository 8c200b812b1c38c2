"""Models to evaluate: a run's newest checkpoint, a checkpoint, or any of open_clip's.

A checkpoint of this project says which recipe it is of, unless it is older than that; then a recipe has to be given.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from clipcov_stream.build import tokenizer_of
from clipcov_stream.checkpoints import checkpoints_in, step_of
from clipcov_stream.config import ModelConfig, load_config, parse
from clipcov_stream.identity import fingerprint
from clipcov_stream.model import build_towers
from clipcov_stream.stream import Tokenizer
from clipcov_stream.weights import load_inert


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, and what is known of its training.

    Args:
        label: what tables call it.
        towers: in evaluation mode.
        tokenizer: its own.
        source: the file or tag that its weights are from.
        samples_seen, samples_streamed: of its training; None where nobody counted.
        selector: that chose what it saw.
    """

    label: str
    towers: nn.Module
    tokenizer: Tokenizer
    source: str
    samples_seen: int | None = None
    samples_streamed: int | None = None
    selector: str | None = None

    def record(self) -> dict[str, Any]:
        """What evaluation.json says of it."""
        names = ("label", "source", "samples_seen", "samples_streamed", "selector")
        return {**{name: getattr(self, name) for name in names}, "fingerprint": fingerprint(self.towers)}


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file: itself, or the newest in a run's folder.

    Raises:
        ValueError: no such file or folder, or a folder without a checkpoint.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} is neither a checkpoint nor a run's folder")
    # By name, and not by the link `latest`: a run that is killed as it saves leaves an old one, or none.
    found = [file for file in path.rglob("*-rank0.pt") if step_of(file) >= 0 and file.is_file()]
    found = found or [file for file in path.rglob("latest-rank0.pt") if file.is_file()]
    if not found and (pieces := [file.parent for file in path.rglob(".metadata")]):
        newest = max(pieces, key=lambda folder: folder.stat().st_mtime_ns)
        raise ValueError(
            f"{newest} is a checkpoint in pieces; `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{newest} FILE` makes one file of it, which is read"
        )
    if not found:
        raise ValueError(f"{path} has no checkpoint (*-rank0.pt); train with save_folder=...")
    if several := sorted({str(file.parent.relative_to(path)) for file in found})[1:]:
        raise ValueError(f"{path} has checkpoints in several folders, as {several[-1]!r}; give one of them")
    return next(iter(checkpoints_in(found[0].parent)), found[0])


def from_checkpoint(path: str, recipe: str | None = None) -> Candidate:
    """The model of a run or a checkpoint of this project's.

    Raises:
        ValueError: no checkpoint there, one that is not Composer's, or one that names no recipe where none is given.
    """
    file = find_checkpoint(Path(path).expanduser())
    try:
        saved = load_inert(file)
    except Exception as error:  # torch.load raises a dozen types; all mean the same to the user
        raise ValueError(f"checkpoint {str(file)!r} cannot be read: {error}") from error
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{file} is not a checkpoint of a run; for open_clip's give --name MODEL --pretrained {file}")
    config, selector = recorded_model(state)
    if recipe is not None:
        config = load_config(recipe).model
    if config is None:
        raise ValueError(f"{file} does not say which model it is of; give its recipe, --recipe YAML")
    ours = dict(state.get("algorithms", [])).get("ClipCov", {})
    config = replace(config, pretrained=str(file))
    towers = build_towers(config.name, config.config, config.pretrained, config.loss).eval().requires_grad_(False)
    return Candidate(
        label=Path(path).name.removesuffix(".pt") if Path(path).is_dir() else f"{file.parent.name}/{file.stem}",
        towers=towers,
        tokenizer=tokenizer_of(towers, config),
        source=str(file),
        samples_seen=ours.get("samples_seen"),
        samples_streamed=int(state["timestamp"]["Timestamp"]["sample"]),
        selector=selector,
    )


def recorded_model(state: dict[str, Any]) -> tuple[ModelConfig | None, str | None]:
    """The model section and the selector of the recipe in a checkpoint; None where there is none."""
    recipe = state.get("callbacks", {}).get("RecordedRecipe", {}).get("recipe")
    if recipe is None:
        return None, None
    tree = nested({key: json.loads(value) for key, value in recipe.items()})
    return parse(ModelConfig, tree["model"], "model"), tree["selection"]["selector"]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Sections from full keys, `a.b`: the inverse of `recorded.flat`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value
    return tree


def from_open_clip(name: str, pretrained: str) -> Candidate:
    """One of open_clip's models, by tag or from a file.

    Raises:
        ValueError: a model, tag or file that open_clip does not know or cannot load.
    """
    config = ModelConfig(name=name, pretrained=pretrained)
    towers = build_towers(name, None, pretrained).eval().requires_grad_(False)
    tag = Path(pretrained).stem if Path(pretrained).exists() else pretrained
    return Candidate(f"{name} {tag}", towers, tokenizer_of(towers, config), pretrained)
