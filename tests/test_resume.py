"""A run resumed with other settings says so, and stops where it would go wrong in silence."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Trainer
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from runs import assert_same, assert_same_run, columns_recipe, run, run_ranks, trained_rows, trainer_of, write_columns

from clipcov_stream import ClipCov
from clipcov_stream.config import load_config
from clipcov_stream.ledger import read_ledger
from clipcov_stream.model import ClipModel, build_towers
from clipcov_stream.recorded import recorded

NEWEST = "saved/latest-rank0.pt"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A checkpoint after four of an epoch's six steps."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, recipe(corpus, max_duration="4ba", save_folder=str(folder / "saved"), save_interval="4ba"))
    return folder / NEWEST


def test_what_differs_is_said(tmp_path: Path, corpus: Path, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = recipe(corpus, load_path=str(saved), max_duration="4ba")
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, tree)
    assert "other settings" not in caplog.text
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, {**tree, "optimizer": {"lr": 0.5}, "max_duration": "6ba", "progress_bar": False})
    (said,) = (record.getMessage() for record in caplog.records if "other settings" in record.getMessage())
    assert said.endswith('checkpoint\'s: optimizer.lr=0.5, was 0.01; max_duration="6ba", was "4ba"')


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"config": {**TINY_MODEL, "embed_dim": 8}}}, "size mismatch for towers.text_projection"),
        (
            {"model": {"config": {**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], "layers": 2}}}},
            r"model.config.text_cfg.layers=2, was 1: weights that it lacks would stay random",
        ),
        ({"model": {"loss": "siglip"}}, 'model.loss="siglip", was "clip"'),
        ({"optimizer": {"name": "sgd"}}, 'optimizer.name="sgd", was "adamw"'),
        ({"selection": {"selector": "random"}}, "selection.selector='clipcov', not 'random'"),
        ({"selection": {"embed_resolution": 8}}, "selection.embed_resolution=None, not 8"),
    ],
)
def test_what_goes_wrong_in_silence_is_refused(
    tmp_path: Path, corpus: Path, saved: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer_of(tmp_path, recipe(corpus, load_path=str(saved), **sections))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"shuffle": False}, "stream: shuffle=True, not False"),
        ({"columns": {"caption": "image"}}, "is encoded as"),
        ({"global_pool_size": 64}, "global_pool_size=32, not 64"),
    ],
)
def test_another_stream_is_refused(
    tmp_path: Path, corpus: Path, saved: Path, stream: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, recipe(corpus, load_path=str(saved), stream=stream))


def test_other_data_in_the_midst_of_an_epoch_is_refused(tmp_path: Path, saved: Path) -> None:
    other = draw_corpus(tmp_path / "other", samples=256)
    with pytest.raises(ValueError, match=r"stream: num_samples=192, not 256. It stands at sample 128 of an epoch"):
        run(tmp_path, recipe(other, load_path=str(saved)))


def test_embeddings_of_another_column_or_width_are_refused(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "columns", 128)
    tree = {**columns_recipe(folder), "save_folder": str(tmp_path / "saved"), "save_interval": "2ba"}
    run(tmp_path, tree)
    onward = {**columns_recipe(folder), "max_duration": "4ba", "load_path": str(tmp_path / NEWEST)}
    swapped = {"columns": {"image_embedding": "text_embedding", "text_embedding": "image_embedding"}}
    with pytest.raises(ValueError, match=r"stream.columns.image_embedding='image_embedding', not 'text_embedding'"):
        run(tmp_path, {**onward, "stream": {**onward["stream"], **swapped}})
    wide = write_columns(tmp_path / "wide", 128, text_dim=12)
    with pytest.raises((ValueError, RuntimeError), match=r"8.*12|12.*8"):
        run(tmp_path, {**onward, "stream": {**onward["stream"], "local": str(wide)}})


class Bare(ClipModel):
    """A model of one's own, whose loss checks nothing."""

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            outputs["image_features"] @ outputs["text_features"].T, torch.arange(len(batch["image"]))
        )


def own_trainer(tmp_path: Path, corpus: Path, *algorithms: ClipCov, **kwargs: Any) -> Trainer:
    """A Trainer that someone else wrote around our loader."""
    built, _, _ = trainer_of(tmp_path, recipe(corpus))
    options: dict[str, Any] = {"device": "cpu", "max_duration": "6ba", "progress_bar": False, "precision": "fp32"}
    model = Bare(build_towers(config=TINY_MODEL))
    return Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        train_dataloader=built.state.dataloader,
        algorithms=list(algorithms),
        device_train_microbatch_size=8,
        **{**options, **kwargs},
    )


def test_a_trainer_of_ones_own_may_not_forget_the_algorithm(tmp_path: Path, corpus: Path) -> None:
    saving = {"save_folder": str(tmp_path / "saved"), "save_interval": "3ba", "max_duration": "3ba"}
    own_trainer(tmp_path, corpus, ClipCov(0.75, "teacher", warmup="2ba"), **saving).fit()
    forgetful = own_trainer(tmp_path, corpus, load_path=str(tmp_path / NEWEST))
    with pytest.raises(RuntimeError, match="trained on survivors, but ClipCov is not among the Trainer's algorithms"):
        forgetful.fit()
    weights = own_trainer(tmp_path, corpus, load_path=str(tmp_path / NEWEST), load_weights_only=True)
    weights.fit()
    assert int(weights.state.timestamp.batch) == 6


def test_nor_begin_it_in_the_midst_of_a_run(tmp_path: Path, corpus: Path) -> None:
    saving = {"save_folder": str(tmp_path / "saved"), "save_interval": "3ba", "max_duration": "3ba"}
    own_trainer(tmp_path, corpus, **saving).fit()
    ours = ClipCov(0.75, "teacher", warmup="2ba")
    with pytest.warns(UserWarning, match="ClipCov"):  # Composer's, of an algorithm that the checkpoint lacks
        late = own_trainer(tmp_path, corpus, ours, load_path=str(tmp_path / NEWEST))
    with pytest.raises(ValueError, match="goes on from step 3 of a run without ClipCov"):
        late.fit()


class Dropping(Callback):
    """Draws from the global generators as a model with dropout would."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, float, float]] = []

    def before_forward(self, state: Any, logger: Any) -> None:
        self.drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))


@pytest.mark.filterwarnings("ignore:No batches were trained")  # Composer's, of an epoch whose last pool it has seen
@pytest.mark.parametrize(("stop", "num_workers"), [(4, 0), (6, 0), (4, 1)])
def test_generators_go_on_as_they_were(tmp_path: Path, corpus: Path, stop: int, num_workers: int) -> None:
    """In the midst of an epoch, where Composer leaves them, and after its last pool."""
    tree = recipe(corpus, max_duration="8ba", save_interval=f"{stop}ba", stream={"num_workers": num_workers})
    draws = []
    for part in ({"save_folder": str(tmp_path / "saved")}, {"load_path": f"{tmp_path}/saved/ep0-ba{stop}-rank0.pt"}):
        trainer, _, _ = trainer_of(tmp_path, {**tree, **part})
        trainer.state.callbacks.append(dropping := Dropping())
        trainer.fit()
        trainer.close()
        draws.append(dropping.drawn)
    assert len(set(draws[0])) == 8
    assert draws[1] == draws[0][stop:]


def test_credentials_are_not_recorded(tmp_path: Path, corpus: Path) -> None:
    tree = recipe(corpus, loggers={"wandb": {"entity": "hush"}}, callbacks={"x": {"token": "hush"}})
    config = load_config(str(write_recipe(tmp_path / "recipe.yaml", tree)))
    # A recipe with such a URL is refused; made by hand it is not.
    stream = dataclasses.replace(config.stream, remote="sftp://user:hush@host/folder")
    found = recorded(dataclasses.replace(config, stream=stream))
    assert found["stream.remote"] == '"sftp://host/folder"'
    assert not any("hush" in value for value in found.values())


def test_neither_the_clock_nor_global_generators_decide(tmp_path: Path, corpus: Path, monkeypatch: Any) -> None:
    def trained(seed: int, clock: float) -> Any:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        then, now = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: then() + clock)
        monkeypatch.setattr(time, "time_ns", lambda: now() + int(1e9 * clock))
        trainer, recorder, _ = run(tmp_path, recipe(corpus))
        monkeypatch.undo()
        return trainer.state.model.state_dict(), recorder.images, recorder.batches

    ours, theirs = trained(1, 0), trained(2, -3e8)
    assert_same(dict(ours[0]), dict(theirs[0]))
    assert_same(ours[1], theirs[1])
    assert_same(ours[2], theirs[2])


@pytest.mark.slow
def test_one_two_four_one_ranks_choose_the_same_survivors(tmp_path: Path, corpus: Path) -> None:
    """One run, each part on another number of ranks, in the second epoch too; test_algorithm compares weights."""
    tree = recipe(
        corpus,
        run_name="chain",
        max_duration="12ba",
        autoresume=True,
        selection={"scope": "global"},
        save_folder=str(tmp_path / "saved"),
        save_interval="3ba",
        ledger=str(tmp_path / "ledger"),
        # Of no duration, so that each part may end where the next begins.
        scheduler={"name": "constant", "t_warmup": "1ba"},
    )
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    apart = (f"save_folder={tmp_path}/apart", f"ledger={tmp_path}/whole")
    expected = trained_rows(run_ranks(tmp_path / "straight", path, 1, *apart))
    found = []
    for part, ranks in enumerate((1, 2, 4, 1)):
        parts = run_ranks(tmp_path / f"part{part}", path, ranks, f"max_duration={3 * (part + 1)}ba")
        found += trained_rows(parts)
        assert_same(parts[0]["algorithm"], parts[-1]["algorithm"])
    assert len(expected) == len(found) == 12
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours, theirs), step
    assert not torch.equal(expected[0], expected[6])
    chain, whole = (read_ledger(tmp_path / name) for name in ("ledger", "whole"))
    for step in range(12):
        ids = np.concatenate([record.sample[record.step == step] for record in chain])
        assert sorted(ids) == sorted(whole[0].sample[whole[0].step == step]), step


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_checkpoint_at_the_end_of_an_epoch_goes_on_with_the_next(tmp_path: Path, num_workers: int) -> None:
    """Streaming says of it that the epoch which is over has just begun."""
    folder = write_columns(tmp_path / "mds", 96)
    tree = {**columns_recipe(folder), "max_duration": "8ba"}
    tree["stream"] |= {"shuffle": True, "num_workers": num_workers, "min_scale": 0.4}
    saved = {"save_folder": str(tmp_path / "saved"), "save_interval": "1ep"}
    straight = run(tmp_path / "straight", {**tree, **saved})
    onward = {**tree, "load_path": str(tmp_path / "saved" / "ep1-ba3-rank0.pt")}
    assert_same_run(run(tmp_path / "resumed", onward), straight, skipped=3)
    # The epochs differ, so that another one would show.
    assert not torch.equal(straight[1].batches[0], straight[1].batches[3])
