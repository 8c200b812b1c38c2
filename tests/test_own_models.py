"""What models and data sets of one's own may do: keep things on themselves, shuffle, compile, be named anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Trainer
from test_own_trainer import OwnModel, numbered, own_trainer
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler

from clipcov_stream import ClipCov
from clipcov_stream.batch import num_drawn, size_of
from clipcov_stream.checkpoints import WholeCheckpoints, restore_generators
from clipcov_stream.embed import Teacher
from clipcov_stream.online import OnlineProxy

pytestmark = pytest.mark.filterwarnings("ignore:No optimizer was specified")
KEYS: dict[str, Any] = {"image_key": "pixels", "text_key": "words"}


class Router(OwnModel):
    """A layer keeps its part of the loss on itself, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(4, 3)
        self.uneven = torch.zeros(())
        self.passes = 0

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        found = super().encode_image(image)
        self.uneven = self.router(found).softmax(1).mean(0).square().sum()
        return found

    def loss(self, outputs: torch.Tensor, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().loss(outputs, batch) + self.uneven


def test_what_a_model_keeps_of_its_training_pass_is_left_to_its_loss() -> None:
    model = Router()
    before = model.router.weight.clone()
    clipcov = ClipCov(0.75, "columns", warmup=0, **KEYS)
    data: Any = [
        {**sample, "image_embedding": sample["pixels"], "text_embedding": torch.randn(6)} for sample in numbered(64)
    ]
    own_trainer([clipcov], model=model, loader=DataLoader(data, 32)).fit()
    assert model.passes == 2 * 4  # one more of the survivors, for the lag
    assert clipcov.selection is not None and float(clipcov.selection.lag_weight) > 0
    assert not torch.equal(model.router.weight, before)


class Dropping(OwnModel):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(batch), 0.3, self.training)


@pytest.mark.parametrize("step", [2, 5])
def test_a_loader_that_shuffles_resumes_bit_for_bit(tmp_path: Path, step: int) -> None:
    """In the first epoch of four steps by an order drawn from torch's generator, before dropout draws from it; in the
    second by a generator of the loader's own."""

    def trainer(folder: str, **kwargs: Any) -> Trainer:
        clipcov = ClipCov(0.75, "teacher", warmup=0, **KEYS)
        generator = None if step < 4 else torch.Generator().manual_seed(0)
        loader = DataLoader(numbered(128), 32, shuffle=True, generator=generator)
        saver = WholeCheckpoints(str(tmp_path / folder), save_interval="1ba")
        options = {"max_duration": f"{step + 2}ba", "run_name": "own", "seed": 7, "model": Dropping()}
        made = own_trainer([clipcov], loader=loader, callbacks=[saver], **options, **kwargs)
        restore_generators(made)
        return made

    whole = trainer("whole")
    whole.fit()
    saved = next((tmp_path / "whole").glob(f"ep*-ba{step}-rank0.pt"))
    resumed = trainer("resumed", load_path=str(saved))
    resumed.fit()
    mine, theirs = resumed.state.model.state_dict(), whole.state.model.state_dict()
    assert len(resumed.state.model.rows) == 2
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_compiled_layer_is_copied_with_its_model() -> None:
    model = OwnModel()
    model.image_tower = torch.compile(model.image_tower, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]
    teacher, images = Teacher(model, 0.5), torch.randn(3, 6)
    before = teacher.model.encode_image(images)
    assert torch.equal(before, model.encode_image(images))
    with torch.no_grad():
        model.image_tower.weight.zero_()
    assert torch.equal(teacher.model.encode_image(images), before)


def test_a_compiled_model_has_a_teacher_that_is_not_itself() -> None:
    class Through(OwnModel):
        """Its towers go through forward, as FSDP would have it."""

        def forward(self, batch: dict[str, torch.Tensor]) -> Any:
            if "only" in batch:
                return self.image_tower(batch["only"])
            return super().forward(batch)

        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            return self({"only": image})

    clipcov = ClipCov(0.75, "teacher", warmup=0, learnability=0.0, **KEYS)
    trainer = own_trainer([clipcov], model=Through(), compile_config={"backend": "eager"})
    trainer.fit()
    assert isinstance(clipcov.teacher, Teacher)
    images = torch.randn(3, 6)
    weight, bias = clipcov.teacher.model.image_tower.weight, clipcov.teacher.model.image_tower.bias
    torch.testing.assert_close(clipcov.teacher.model.encode_image(images), images @ weight.T + bias)
    assert not torch.equal(weight, trainer.state.model.image_tower.weight)


def test_a_data_sets_own_names_are_its_own() -> None:
    class Part(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.rows, self.selected = numbered(96), list(range(64))

        def __len__(self) -> int:
            return len(self.selected)

        def __getitem__(self, index: int) -> Any:
            return self.rows[self.selected[index]]

    data = Part()
    own_trainer([ClipCov(0.75, "teacher", warmup=0, **KEYS)], loader=DataLoader(data, 32)).fit()
    assert data.selected == list(range(64))


def test_what_a_loader_says_of_its_size() -> None:
    class Counting(list[Any]):
        def num_samples(self) -> int:
            return 9

    samples, half = numbered(64), SubsetRandomSampler(range(32))
    assert size_of(DataLoader(Counting(samples), 8)) == 64
    assert size_of(DataLoader(samples, batch_size=None)) == 0  # items are pools, for all that is known
    assert (size_of(DataLoader(samples, 8, sampler=half)), num_drawn(DataLoader(samples, 8, sampler=half))) == (64, 32)
    others = (DataLoader(samples, 8), DataLoader(samples, 8, sampler=RandomSampler(samples, num_samples=9)))
    assert [num_drawn(loader) for loader in (*others, SimpleNamespace())] == [0, 0, 0]


def test_a_pass_is_what_the_sampler_draws() -> None:
    clipcov = ClipCov(0.75, proxy=OwnModel(), warmup=0, **KEYS)
    loader = DataLoader(numbered(128), 32, sampler=SubsetRandomSampler(range(64)))
    own_trainer([clipcov], loader=loader, max_duration="3ba").fit()
    assert isinstance(clipcov.teacher, OnlineProxy) and clipcov.teacher.passes == 1.5
    assert clipcov.selection is not None and len(clipcov.selection.times) == 128


def test_an_online_proxy_that_could_learn_nothing_is_refused() -> None:
    class Frozen(OwnModel):
        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().encode_image(image)

        def encode_text(self, text: torch.Tensor) -> torch.Tensor:
            return super().encode_text(text).detach()

    with pytest.raises(ValueError, match=r"neither encode_image nor encode_text of this Frozen has any.*embed='proxy'"):
        own_trainer([ClipCov(0.75, proxy=Frozen(), warmup=0, **KEYS)]).fit()
    model = OwnModel()
    with pytest.raises(ValueError, match="this proxy is the Trainer's model"):
        own_trainer([ClipCov(0.75, proxy=model, warmup=0, **KEYS)], model=model).fit()
