"""Copies: what thumbnails tell apart, their count against loops in NumPy, and what selection makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from corpora import TINY_MODEL, draw_corpus, recipe
from pools import after, assert_same_state, draw
from runs import algorithm_of, run, trainer_of
from test_collectives import on_ranks

from clipcov_stream import ClipCov, Selector, Settings, copies
from clipcov_stream.build import build_selection
from clipcov_stream.config import SelectionConfig
from clipcov_stream.copies import LIKE, MEMORY, SIDE, THUMBNAIL, log_copies, thumbnails
from clipcov_stream.graphed import inputs_of, of_state, with_inputs, with_values
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.model import ClipModel, build_towers
from clipcov_stream.objective import SelectionState
from clipcov_stream.selection import SELECTORS, select

COPIES = Settings(copies=3.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


def pictures(num: int, seed: int = 0, side: int = 48) -> torch.Tensor:
    """Smooth random images, as bytes."""
    coarse = torch.rand(num, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def test_a_thumbnail_is_the_mean_colours_of_its_cells() -> None:
    image = pictures(3, side=4 * SIDE)
    pixels = image.numpy().astype(float)
    for found, own in zip(thumbnails(image).numpy(), pixels, strict=True):
        cells = own.reshape(3, SIDE, 4, SIDE, 4).mean((2, 4)).ravel()
        centred = cells - cells.mean()
        np.testing.assert_allclose(found, centred / np.linalg.norm(centred), atol=1e-6)


def test_a_copy_looks_the_same_and_another_picture_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    image = pictures(40, side=192)
    first = thumbnails(image)
    assert torch.allclose(first.norm(dim=1), torch.ones(40)) and first.shape == (40, THUMBNAIL)
    darker = (image.float() * 0.8 + 10).to(torch.uint8)
    shifted = image.roll((1, -1), dims=(2, 3))
    smaller = torch.nn.functional.interpolate(image.float(), 130, mode="bilinear", antialias=True)
    for copied in (darker, shifted, smaller):
        cosines = first @ thumbnails(copied).T
        assert cosines.diagonal().min() > LIKE
        assert cosines.fill_diagonal_(0).max() < LIKE
    monkeypatch.setattr(copies, "PIXELS", 1)
    assert torch.equal(thumbnails(image), first)
    # A single grey looks like nothing, not even like itself.
    assert not thumbnails(torch.full((2, 3, 9, 9), 100, dtype=torch.uint8)).any()


@pytest.mark.parametrize(("num", "memory"), [(1, 1), (70, 3), (130, MEMORY), (200, 70000)])
def test_copies_are_the_loop_over_what_is_remembered(num: int, memory: int) -> None:
    generator = torch.Generator().manual_seed(num)
    seen = torch.nn.functional.normalize(torch.randn(memory, THUMBNAIL, generator=generator), dim=1)
    seen[: memory // 3] = 0
    which = torch.randint(memory, (num,), generator=generator)
    noise = 0.02 * torch.randn(num, THUMBNAIL, generator=generator)
    rows = torch.nn.functional.normalize(seen[which] + noise, dim=1)
    cosines = rows.double().numpy() @ seen.double().numpy().T
    expected = np.log1p(np.maximum(cosines - LIKE, 0).sum(1) / (1 - LIKE))
    np.testing.assert_allclose(log_copies(rows, seen).numpy(), expected, atol=2e-3)
    assert num == 1 or (expected > 0.1).any()


def with_looks(pool, image: torch.Tensor):
    return replace(pool, thumbnail=thumbnails(image))


def test_pictures_trained_on_lately_come_after_others() -> None:
    """Sixty pairs, of which every other shows one and the same picture: without thumbnails nobody knows."""
    image = pictures(60)
    image[::2] = image[0]
    knobs = {"gate": float("inf"), "unevenness": 0.0, "novelty": 0.0, "balance": 0.0}
    shares = {}
    for weight in (0.0, 3.0):
        state, share = SelectionState.initial(5, Settings(copies=weight, **knobs)), []
        for step in range(6):
            state, survivors, report, _ = select(state, with_looks(draw(60, 5, step), image), 12)
            share.append(float((survivors % 2 == 0).float().mean()))
        shares[weight] = share
        assert ("copies" in report) == (weight > 0)
    assert np.mean(shares[0.0]) > 0.3
    assert shares[3.0][0] > 0.2 and shares[3.0][1:] == [0.0] * 5


def test_without_thumbnails_all_is_as_without_copies() -> None:
    pools = [draw(40, 5, seed) for seed in range(4)]
    with_, without = (after(pools, 8, copies=weight) for weight in (3.0, 0.0))
    assert not with_.looks.any() and len(without.looks) == 0
    assert_same_state(replace(with_, settings=without.settings, looks=without.looks), without)


def test_the_last_survivors_looks_are_remembered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcov_stream.objective.MEMORY", 20)
    state, chosen = SelectionState.initial(5, COPIES), []
    for step in range(4):
        pool = with_looks(draw(30, 5, step), pictures(30, step))
        valid = torch.ones(30, dtype=torch.bool)
        state, survivors, *_ = select(state, replace(pool, valid=valid), 8)
        chosen.append(pool.thumbnail[survivors])
    assert torch.allclose(state.looks, torch.cat(chosen)[-20:], atol=1e-6)
    fresh = SelectionState.initial(5, COPIES)
    assert_same_state(fresh.restored(state.state_dict()), state)
    # Of before, or of a run that did not look: nothing was seen yet.
    old = state.state_dict()
    del old["looks"]
    for before in (old, {**old, "looks": torch.zeros(0, THUMBNAIL)}):
        assert not fresh.restored(before).looks.any()
    assert len(SelectionState.initial(5, Settings()).restored(state.state_dict()).looks) == 0
    with pytest.raises(ValueError, match=r"holds thumbnails of shape \(3, 108\), not \(20, 108\)"):
        fresh.restored({**old, "looks": torch.zeros(3, THUMBNAIL)})
    rival = select(fresh, with_looks(draw(30, 5), pictures(30)), 8, SELECTORS["random"]).state
    assert not rival.looks.any()


def test_a_recording_reads_and_writes_thumbnails() -> None:
    """On a GPU all goes through lists of tensors: what is left out there would be forgotten."""
    state, other = (
        select(SelectionState.initial(5, COPIES), with_looks(draw(20, 5, seed), pictures(20, seed)), 8).state
        for seed in range(2)
    )
    assert not torch.equal(state.looks, other.looks)
    assert_same_state(with_values(replace(other, step=state.step), of_state(state)), state)
    pool = with_looks(draw(20, 5), pictures(20))
    _, copied = with_inputs(state, pool, [value.clone() for value in inputs_of(state, pool)])
    assert torch.equal(copied.thumbnail, pool.thumbnail)


def test_a_thumbnail_that_is_no_number_is_none_and_its_sample_as_good_as_ever() -> None:
    pool = with_looks(draw(20, 5), pictures(20))
    pool.thumbnail[3, 5] = torch.nan
    state = select(SelectionState.initial(5, COPIES), pool, 20).state
    assert state.looks.isfinite().all() and int(state.looks.any(1).sum()) == 19
    assert int(select(SelectionState.initial(5, COPIES), pool, 20).report["num_invalid"]) == 0
    with pytest.raises(ValueError, match="thumbnail has 19 rows, the pool has 20 samples"):
        replace(pool, thumbnail=pool.thumbnail[1:])
    with pytest.raises(ValueError, match=r"thumbnail has shape \(20,\); it must be \(pool, width\)"):
        replace(pool, thumbnail=pool.thumbnail[:, 0])
    narrow = replace(pool, thumbnail=pool.thumbnail[:, :64])
    with pytest.raises(ValueError, match="the pool's thumbnails are 64 wide, they must be 108"):
        select(SelectionState.initial(5, COPIES), narrow, 20)
    select(SelectionState.initial(5, Settings()), narrow, 20)


@pytest.mark.parametrize("without", [set(), {1}, {0, 1}])
def test_ranks_remember_what_all_of_them_trained_on(without: set[int]) -> None:
    def work(rank, all_reduce):
        selector, chosen = Selector("clipcov", rank=rank, all_reduce=all_reduce, settings=COPIES), []
        for step in range(2):
            pool = with_looks(draw(24, 4, 2 * step + rank), pictures(24, 2 * step + rank))
            survivors = selector(replace(pool, thumbnail=None) if rank in without else pool, 5)
            chosen.append(pool.thumbnail[survivors] * (rank not in without))
        return selector.state, chosen

    (state, first), (other, second) = on_ranks(2, work)
    assert_same_state(state, other)
    expected = torch.cat([first[0], second[0], first[1], second[1]])
    assert torch.allclose(state.looks[-20:], expected, atol=1e-6) and not state.looks[:-20].any()


def test_a_run_knows_what_its_embedder_has_seen(tmp_path: Path, corpus: Path) -> None:
    class Images(Callback):
        def before_train_batch(self, state: State, *_: Any) -> None:
            images.append(state.batch["image"].clone())

    images: list[torch.Tensor] = []
    trainer, _, memory = trainer_of(
        tmp_path / "teacher", recipe(corpus, selection={"copies": 3.0}, stream={"min_scale": 1.0}, max_duration="6ba")
    )
    trainer.state.callbacks.append(Images())
    trainer.fit()
    looks = algorithm_of(trainer).selection.looks
    # As the embedder gets them: bytes, which are normalized on their way into a model.
    mean, std = (torch.tensor(of)[:, None, None] for of in (ImageTransform(32).mean, ImageTransform(32).std))
    own = thumbnails(torch.cat(images) * std + mean)
    num = int(looks.any(1).sum())
    # What was trained on since selection began, the last of it last.
    assert num > 0 and torch.allclose(looks[-num:], own[-num:], atol=1e-5)
    assert len(memory.data["selection/copies"]) > 0


def test_more_survivors_than_are_remembered_are_spaced_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcov_stream.objective.MEMORY", 6)
    pool = with_looks(draw(30, 5), pictures(30))
    state, survivors, *_ = select(SelectionState.initial(5, COPIES), pool, 12)
    assert torch.allclose(state.looks, pool.thumbnail[survivors[::2]], atol=1e-6)


@pytest.mark.parametrize("brings", [True, False])
def test_columns_have_thumbnails_if_a_batch_brings_them(brings: bool) -> None:
    """In a Trainer of one's own; the model gets none of them."""

    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 96

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            columns = {f"{side}_embedding": of[index] for side, of in (("image", image), ("text", text))}
            sample = {"image": images[index], "text": torch.randint(1, 99, (16,)), **columns}
            return {**sample, "thumbnail": looks[index]} if brings else sample

    generator = torch.Generator().manual_seed(0)
    image = torch.randn(96, 8, generator=generator)
    text = image + torch.randn(96, 8, generator=generator)
    images = torch.rand(96, 3, 16, 16, generator=generator)
    looks = thumbnails(images)
    clipcov = ClipCov(0.75, "columns", copies=3.0)
    towers = build_towers(config=TINY_MODEL)
    seen: list[set[str]] = []

    class Keys(Callback):
        def before_train_batch(self, state: State, *_: Any) -> None:
            seen.append(set(state.batch))

    model = ClipModel(towers)
    trainer = Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(Pairs(), batch_size=32),  # pyright: ignore[reportArgumentType]
        optimizers=torch.optim.SGD(model.parameters(), 0.1),
        algorithms=[clipcov],
        callbacks=[Keys()],
        device_train_microbatch_size=8,
        max_duration="3ba",
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    assert clipcov.selection is not None and len(seen) == 3
    assert int(clipcov.selection.looks.any(1).sum()) == (24 if brings else 0)
    assert all(keys == {"image", "text"} for keys in seen)


def test_a_resumed_run_looks_as_the_straight_one(tmp_path: Path, corpus: Path) -> None:
    selection, stream = {"copies": 3.0, "warmup": "0ba"}, {"min_scale": 1.0}
    tree = recipe(corpus, selection=selection, stream=stream, save_interval="3ba", max_duration="6ba")
    straight, *_ = run(tmp_path / "a", {**tree, "save_folder": str(tmp_path / "saved")})
    half = str(tmp_path / "saved" / "ep0-ba3-rank0.pt")
    resumed, *_ = run(tmp_path / "b", {**tree, "load_path": half})
    one, other = (algorithm_of(trainer).selection for trainer in (straight, resumed))
    assert_same_state(one, other)
    assert int(one.looks.any(1).sum()) == 6 * 8


def built(min_scale: float = 1.0, **knobs: Any) -> ClipCov:
    return build_selection(
        SelectionConfig(**knobs), ImageTransform(32, min_scale=min_scale), lambda caption: torch.zeros(4)
    )


def test_a_recipe_says_where_copies_cannot_be_told(tmp_path: Path, corpus: Path) -> None:
    tree = recipe(corpus, selection={"copies": 3.0}, stream={"min_scale": 0.8})
    with pytest.warns(UserWarning, match=r"stream.min_scale=0.8 crops them at random"):
        trainer_of(tmp_path, tree)
    with pytest.raises(ValueError, match=r"selection.copies=3.0: with embed='columns' no image is decoded"):
        built(embed="columns", copies=3.0, logit_scale=9.0)
    with pytest.warns(UserWarning, match=r"stream.min_scale=0.9 crops them at random.*Set stream.min_scale=1"):
        assert built(0.9, embed="teacher", copies=3.0).settings.copies == 3.0
    built(embed="teacher", copies=3.0)
    built(0.9, embed="teacher", copies=0.0)
