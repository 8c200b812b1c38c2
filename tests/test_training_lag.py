"""The lag as ClipCov takes it from the training pass, beside the formula by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from composer import Callback, Trainer
from composer.models import ComposerModel
from corpora import write_recipe
from runs import (
    algorithm_of,
    columns_recipe,
    run,
    trainer_of,
    write_columns,
)
from streaming import StreamingDataset

from clipcov_stream import ClipCov
from clipcov_stream.config import load_config
from clipcov_stream.model import ClipModel
from clipcov_stream.objective import LAG_DECAY, SelectionState
from clipcov_stream.train import build_trainer


class OwnOutputs(ClipModel):
    """As a user's own model may be: its outputs have other names than open_clip's."""

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"own_{name}": value for name, value in super().forward(batch).items()}

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *args: Any) -> torch.Tensor:
        return super().loss({name.removeprefix("own_"): value for name, value in outputs.items()}, batch)


class Learnt(Callback):
    """What the model answers in each training pass, and the selection state that the step leaves."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, torch.Tensor]] = []
        self.states: list[SelectionState] = []

    def after_loss(self, state: Any, logger: Any) -> None:
        self.outputs.append({name.removeprefix("own_"): value.detach() for name, value in state.outputs.items()})

    def batch_end(self, state: Any, logger: Any) -> None:
        self.states.append(next(a for a in state.algorithms if isinstance(a, ClipCov)).selection)  # pyright: ignore


@pytest.mark.parametrize("model", [ClipModel, OwnOutputs])
def test_the_lag_is_that_of_the_training_pass(tmp_path: Path, model: type[ClipModel]) -> None:
    """Against the oracle, from the survivors' columns and what the model answered when it trained on them."""
    folder = write_columns(tmp_path / "mds", 64)
    trainer, recorder, _ = trainer_of(tmp_path, columns_recipe(folder))
    trainer.state.model.__class__ = model
    passes: list[bool] = []
    trainer.state.model.towers.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))  # pyright: ignore
    learnt = Learnt()
    trainer.state.callbacks.append(learnt)
    trainer.fit()

    dataset = trainer.state.dataloader.dataset  # pyright: ignore
    row_of = {tuple(dataset.tokenizer(str(row)).tolist()): row for row in range(64)}
    columns = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    lag, weight = np.zeros((8, 8)), 0.0
    for tokens, outputs, state in zip(recorder.batches, learnt.outputs, learnt.states, strict=True):
        survivors = [columns[row_of[tuple(row)]] for row in tokens.tolist()]
        image, text = (oracle.unit([row[f"{side}_embedding"] for row in survivors]) for side in ("image", "text"))
        seen = (outputs[f"{side}_features"].numpy() for side in ("image", "text"))
        scale = float(outputs["logit_scale"])
        means = (np.asarray(mean, np.float64) for mean in (state.stream.image_mean, state.stream.text_mean))
        centred = (rows - mean for rows, mean in zip((image, text), means, strict=True))
        lag = LAG_DECAY * lag + oracle.lag_sum(*centred, *seen, scale)
        weight = LAG_DECAY * weight + 8
        np.testing.assert_allclose(state.lag, lag, rtol=1e-3, atol=1e-4)
        assert float(state.lag_weight) == pytest.approx(weight)
    assert len(learnt.states) == 2
    # Whose outputs are open_clip's is asked for nothing more; another's towers run once more, one after the other.
    assert passes == [True, True] if model is ClipModel else [True, False, False] * 2


def test_a_model_without_towers_learns_from_its_outputs(tmp_path: Path) -> None:
    class Plain(ComposerModel):
        """Two linear maps; neither encode_image nor logit_scale."""

        def __init__(self, names: tuple[str, str]) -> None:
            super().__init__()
            self.names = names
            self.image, self.text = torch.nn.Linear(3, 4), torch.nn.Embedding(50000, 4)

        def forward(self, batch: Any) -> dict[str, torch.Tensor]:
            rows = self.image(batch["image"].mean((2, 3))), self.text(batch["text"]).mean(1)
            return {**dict(zip(self.names, rows, strict=True)), "logit_scale": torch.tensor([20.0])}

        def loss(self, outputs: Any, batch: Any, *args: Any) -> torch.Tensor:
            image, text = (outputs[name] for name in self.names)
            return torch.nn.functional.cross_entropy(20 * image @ text.T, torch.arange(len(image)))

    def fit(names: tuple[str, str], **knobs: Any) -> ClipCov:
        folder = tmp_path / "mds"
        if not folder.exists():
            write_columns(folder, 64)
        loader = build_trainer(
            load_config(str(write_recipe(tmp_path / "recipe.yaml", columns_recipe(folder))))
        ).state.dataloader
        clipcov = ClipCov(0.75, embed="columns", warmup="0ba", **knobs)
        model = Plain(names)
        trainer = Trainer(
            model=model,
            train_dataloader=loader,
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            max_duration="2ba",
            algorithms=[clipcov],
            device="cpu",
            progress_bar=False,
        )
        trainer.fit()
        return clipcov

    learned = fit(("image_features", "text_features")).selection
    assert learned is not None and float(learned.lag_weight) == pytest.approx(8 * (1 + LAG_DECAY))
    with pytest.raises(ValueError, match=r"selection.learnability.*Plain has no encode_image and no encode_text"):
        fit(("a", "b"))
    without = fit(("a", "b"), learnability=0.0).selection
    assert without is not None and float(without.lag_weight) == 0


def test_rivals_note_no_lag(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64)
    for number, other in enumerate(({"selector": "clip_score"}, {"learnability": 0.0})):
        (tmp_path / str(number)).mkdir()
        trainer, _, _ = run(tmp_path / str(number), columns_recipe(folder, **other))
        assert float(algorithm_of(trainer).selection.lag_weight) == 0  # pyright: ignore
