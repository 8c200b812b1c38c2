"""Trainers of tiny recipes, in this process and over ranks, and what tests note of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import torch
from composer import Callback, Trainer
from composer.loggers import LoggerDestination
from corpora import TINY_MODEL, recipe, write_recipe
from forked import run_forked
from streaming import MDSWriter

from clipcov_stream import ClipCov
from clipcov_stream.config import load_config
from clipcov_stream.model import ClipModel, build_towers
from clipcov_stream.train import build_trainer


class Recorder(Callback):
    """The token ids that every step trains on, which name the survivors, and their pixels."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.images: list[torch.Tensor] = []
        self.gains: list[torch.Tensor] = []
        self.keys: set[str] = set()

    def before_train_batch(self, state: Any, logger: Any) -> None:
        self.batches.append(state.batch["text"].clone())
        self.images.append(state.batch["image"].clone())
        gains = [algorithm.survivor_gains for algorithm in state.algorithms if isinstance(algorithm, ClipCov)]
        self.gains += [each.clone().nan_to_num(nan=1e30) for each in gains if each is not None]
        self.keys |= set(state.batch)


class Interrupt(Callback):
    """Ends a run as an exception would, before step number `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_start(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) == self.step:
            raise InterruptedError


class MemoryLog(LoggerDestination):
    """Every value logged, by metric."""

    def __init__(self) -> None:
        self.data: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.data.setdefault(name, []).append(float(value))


def trainer_of(tmp_path: Path, tree: dict[str, Any]) -> tuple[Trainer, Recorder, MemoryLog]:
    tmp_path.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", tree))))
    recorder, memory = Recorder(), MemoryLog()
    trainer.state.callbacks.append(recorder)
    trainer.logger.destinations = (*trainer.logger.destinations, memory)
    return trainer, recorder, memory


def algorithm_of(trainer: Trainer) -> ClipCov:
    return next(a for a in trainer.state.algorithms if isinstance(a, ClipCov))


def values(memory: MemoryLog, name: str) -> list[float]:
    return memory.data[name]


def run(tmp_path: Path, tree: dict[str, Any]) -> tuple[Trainer, Recorder, MemoryLog]:
    trainer, recorder, memory = trainer_of(tmp_path, tree)
    trainer.fit()
    return trainer, recorder, memory


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


GLOBAL = """
import sys, torch
from composer import Callback
from composer.utils import dist
from clipcov_stream.algorithm import ClipCov
from clipcov_stream.config import load_config
from clipcov_stream.sharded import whole
from clipcov_stream.train import build_trainer, leave_group
class Record(Callback):
    batches = []
    def before_train_batch(self, state, logger):
        self.batches.append({"image": state.batch["image"].clone(), "text": state.batch["text"].clone()})
trainer = build_trainer(load_config(sys.argv[1], sys.argv[3:]))
trainer.state.callbacks.append(Record())
trainer.fit()
clipcov = next(a for a in trainer.state.algorithms if isinstance(a, ClipCov))
model = getattr(trainer.state.model, "module", trainer.state.model)
kept = {"algorithm": clipcov.state_dict(), "batches": Record.batches}
kept["figures"] = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
kept["model"] = {name: whole(value).clone() for name, value in model.state_dict().items()}
optimizer = trainer.state.optimizers[0]
kept["moments"] = [whole(of["exp_avg"]).clone() for of in optimizer.state.values() if "exp_avg" in of]
kept["units"] = [name for name, of in model.named_modules() if type(of).__name__.startswith("FSDP")]
# The optimizer's: after an evaluation a sharded model's own outermost ones are whole until the next backward pass.
held = [p for group in optimizer.param_groups for p in group["params"]]
kept["numbers"] = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in held)
torch.save(kept, f"{sys.argv[2]}/rank{dist.get_global_rank()}.pt")
trainer.close()
leave_group()
"""


def run_ranks(folder: Path, recipe_path: Path, num_ranks: int, *overrides: str) -> list[dict[str, Any]]:
    """What each rank trained on and ended with: batches, weights and moments in full, ClipCov's state, evaluation; and
    which modules are units of FSDP, and how many of the weights are its own."""
    folder.mkdir()
    script = folder / "ranks.py"
    script.write_text(GLOBAL, encoding="utf-8")
    launch(num_ranks, script, str(recipe_path), str(folder), *overrides)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def composer() -> list[str]:
    return [str(Path(sys.executable).with_name("composer"))]


def launch(num_ranks: int, script: Path, *arguments: str) -> str:
    """What ranks of a script write, which all must end well."""
    done = run_forked(script.parent, num_ranks, script, *arguments)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def write_columns(folder: Path, rows: int, spoil: int = 0, text_dim: int = 8, bad_images: int = 0) -> Path:
    """An MDS folder with embedding columns; the first rows are spoilt by NaN and inf, or hold no image."""
    rng = np.random.default_rng(0)
    corpus = synthetic_bytes(rows)
    columns = {"image": "bytes", "caption": "str", "image_embedding": "ndarray", "text_embedding": "ndarray"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for row in range(rows):
            image = rng.normal(size=8).astype(np.float16)
            text = rng.normal(size=text_dim).astype(np.float16)
            if row < spoil:
                (image if row % 2 else text)[0] = (np.nan, np.inf)[row // 2 % 2]
            data = b"no image" if row < bad_images else corpus[row]
            writer.write({"image": data, "caption": f"{row}", "image_embedding": image, "text_embedding": text})
    return folder


def synthetic_bytes(rows: int) -> list[bytes]:
    corpus = synthetic.Corpus(synthetic.draw_classes(4, 0), 1.0, 0.0, 0.0, 0.0, 4, 16, 0)
    return [corpus.sample(index)["image"] for index in range(rows)]


def columns_recipe(folder: Path, **selection: Any) -> dict[str, Any]:
    tree = recipe(folder, selection={"embed": "columns", "warmup": "0ba", **selection})
    tree["stream"] = {"local": str(folder), "global_pool_size": 32, "num_workers": 0, "shuffle": False}
    return {**tree, "max_duration": "2ba"}


def trained_rows(ranks: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Per step, what all ranks trained on, image and text, in an order of its own."""
    steps = []
    for batches in zip(*(rank["batches"] for rank in ranks), strict=True):
        assert len({len(batch["text"]) for batch in batches}) == 1  # an equal share each
        rows = torch.cat([torch.cat([b["text"].float(), b["image"].flatten(1)], 1) for b in batches])
        steps.append(torch.tensor(sorted(rows.tolist())))
    return steps


def assert_same_run(
    ours: tuple[Trainer, Recorder, Any], theirs: tuple[Trainer, Recorder, Any], skipped: int = 0
) -> None:
    """Bit for bit the same survivors, pixels, weights and selection; `skipped` steps of theirs came before ours."""
    for kind in ("batches", "images", "gains"):
        for step, (a, b) in enumerate(
            zip(getattr(ours[1], kind), getattr(theirs[1], kind)[skipped:], strict=True), skipped
        ):
            assert torch.equal(a, b), (kind, step)
    for (name, a), b in zip(
        ours[0].state.model.state_dict().items(), theirs[0].state.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert_same(algorithm_of(ours[0]).state_dict(), algorithm_of(theirs[0]).state_dict())


def proxy_section(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    torch.save(ClipModel(build_towers(config=TINY_MODEL)).towers.state_dict(), tmp_path / "proxy.pt")
    return {"embed": "proxy", "proxy": {"config": TINY_MODEL, "pretrained": str(tmp_path / "proxy.pt")}}


def online_section(image_size: int = 16) -> dict[str, Any]:
    config = {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "image_size": image_size}}
    return {"embed": "online", "proxy": {"config": config}, "proxy_lr": 1e-2}
