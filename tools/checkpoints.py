"""Models to evaluate: a run's newest checkpoint, a checkpoint, or any of open_clip's.

A checkpoint of this project says which recipe it is of, unless it is older than that; then a recipe has to be given.
Runs and checkpoints may be URLs of a store, of which a copy is fetched for as long as it is read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from clipcov_stream.build import tokenizer_of
from clipcov_stream.checkpoints import checkpoints_in, step_of
from clipcov_stream.config import ModelConfig, load_config, parse
from clipcov_stream.identity import fingerprint
from clipcov_stream.model import build_towers
from clipcov_stream.redact import redacted
from clipcov_stream.remote import is_remote
from clipcov_stream.stored_checkpoints import check_store, newest_in, opened
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


@contextmanager
def checkpoint_of(path: str) -> Iterator[tuple[Path, str]]:
    """A file to read a run's newest checkpoint or a checkpoint from, and where it is: a path or a URL.

    What lies in a store is fetched to TMPDIR and deleted again. So is that of a local folder without a checkpoint whose
    run kept its in a store, by the `save_folder` of its about file.

    Raises:
        ValueError: as `find_checkpoint`; a store that cannot be read, or has none.
    """
    url = path.rstrip("/") if is_remote(path) else None
    if url is None:
        folder = Path(path).expanduser()
        try:
            file = find_checkpoint(folder)
        except ValueError:
            url = save_folder_of(folder)
            if url is None:
                raise
        else:
            yield file, str(file)
            return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        url, file = fetched(url, Path(scratch))
        yield file, redacted(url)


def save_folder_of(folder: Path) -> str | None:
    """Where in a store the run of a folder kept its checkpoints; None if it did not, or is not known."""
    for about in sorted(folder.glob("*.about.json")) if folder.is_dir() else []:
        try:
            recipe = json.loads(about.read_text(encoding="utf-8"))["recipe"]
            url, name = recipe["save_folder"], recipe["run_name"]
        except (OSError, ValueError, LookupError, TypeError):  # half a file, or somebody else's
            continue
        if is_remote(url):
            return url.replace("{run_name}", name or "")
    return None


def fetched(url: str, scratch: Path) -> tuple[str, Path]:
    """The URL of a run's newest checkpoint, or of a checkpoint, and a copy of it in a folder.

    Raises:
        ValueError: a store that cannot be read, or has none.
    """
    check_store(url)
    if not url.endswith(".pt"):
        try:
            newest = newest_in(url, "")
        except OSError as error:
            raise ValueError(str(error).replace("save_folder=", "")) from error
        if newest is None:
            raise ValueError(f"{redacted(url)} has no checkpoint (ep*-ba*-rank0.pt)")
        url = f"{url}/{newest}"
    folder, _, name = url.rpartition("/")
    try:
        store, prefix = opened(folder, "")
        store.download_object(f"{prefix}/{name}", str(scratch / name))
    except Exception as error:  # each client has its own
        raise ValueError(f"{redacted(url)} cannot be read: {type(error).__name__}: {redacted(error)}") from error
    return url, scratch / name


def state_of(file: Path, where: str) -> dict[str, Any]:
    """What Composer keeps in a checkpoint, as data.

    Raises:
        ValueError: a file that cannot be read, or is none of a run's.
    """
    try:
        saved = load_inert(file)
    except Exception as error:  # torch.load raises a dozen types; all mean the same to the user
        raise ValueError(f"checkpoint {where!r} cannot be read: {error}") from error
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise ValueError(
            f"{where} is not a checkpoint of a run; for open_clip's give --name MODEL --pretrained {where}"
        )
    return state


def model_in(state: dict[str, Any], where: str, recipe: str | None = None) -> tuple[ModelConfig, str | None]:
    """The model that a checkpoint is of, by its recorded recipe or another, and the selector of the former.

    Raises:
        ValueError: a checkpoint that names no recipe where none is given.
    """
    config, selector = recorded_model(state)
    if recipe is not None:
        config = load_config(recipe).model
    if config is None:
        raise ValueError(f"{where} does not say which model it is of; give its recipe, --recipe YAML")
    return config, selector


def from_checkpoint(path: str, recipe: str | None = None) -> Candidate:
    """The model of a run or a checkpoint of this project's.

    Raises:
        ValueError: no checkpoint there, one that is not Composer's, or one that names no recipe where none is given.
    """
    with checkpoint_of(path) as (file, where):
        state = state_of(file, where)
        config, selector = model_in(state, where, recipe)
        config = replace(config, pretrained=str(file))
        towers = build_towers(config.name, config.config, config.pretrained, config.loss).eval().requires_grad_(False)
    ours = dict(state.get("algorithms", [])).get("ClipCov", {})
    is_checkpoint = path.endswith(".pt") if is_remote(path) else Path(path).expanduser().is_file()
    place = Path(where)
    return Candidate(
        label=f"{place.parent.name}/{place.stem}" if is_checkpoint else Path(path).name.removesuffix(".pt"),
        towers=towers,
        tokenizer=tokenizer_of(towers, config),
        source=where,
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
