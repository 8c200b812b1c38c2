"""Survivors alone are decoded and tokenized, and nothing else changes: real shards, real Trainer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Trainer
from corpora import draw_corpus, recipe, write_recipe
from PIL import Image
from runs import (
    algorithm_of,
    assert_same,
    assert_same_run,
    columns_recipe,
    online_section,
    proxy_section,
    run,
    run_ranks,
    trained_rows,
    trainer_of,
    values,
    write_columns,
)
from streaming import MDSWriter

from clipcov_stream import ClipCov
from clipcov_stream import materialize as materialize_module
from clipcov_stream import stream as stream_module
from clipcov_stream.config import load_config
from clipcov_stream.materialize import decode_image
from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.pool import Pool
from clipcov_stream.selection import select
from clipcov_stream.train import build_trainer


def tree_of(folder: Path, deferred: bool | None, num_workers: int = 0, **selection: Any) -> dict[str, Any]:
    tree = columns_recipe(folder, **selection)
    tree["stream"] |= {"deferred": deferred, "num_workers": num_workers, "min_scale": 0.4, "shuffle": True}
    # Three pools an epoch: the last steps are in a second one, with other crops.
    return {**tree, "max_duration": "5ba"}


@pytest.mark.parametrize("selection", [{}, {"warmup": "2ba"}, {"selector": "random"}, {"scope": "global"}], ids=str)
def test_survivors_pixels_and_weights_are_those_of_decoding_everything(tmp_path: Path, selection: Any) -> None:
    folder = write_columns(tmp_path / "mds", 96)
    eager = run(tmp_path, tree_of(folder, False, **selection))
    for num_workers in (0, 2):
        deferred = run(tmp_path, tree_of(folder, None, num_workers, **selection))
        assert deferred[0].state.train_dataloader.dataset.deferred  # pyright: ignore
        assert_same_run(deferred, eager)
        assert deferred[1].keys == {"image", "text"}
        assert int(deferred[0].state.timestamp.sample) == 5 * 32
        deferred[0].state.train_dataloader.close()  # pyright: ignore
    assert not torch.equal(eager[1].images[0], eager[1].images[3])


@pytest.mark.parametrize("selector", ["clipcov", "random"])
def test_nothing_discarded_is_decoded_or_tokenized(
    tmp_path: Path, selector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_columns(tmp_path / "mds", 96)
    decoded, read = [], []
    decode = materialize_module.decode_image

    def counted(data: Any, at_least: int | None = None, **limits: Any) -> Any:
        assert at_least is None
        decoded.append(bytes(data))
        return decode(data, **limits)

    for module in (materialize_module, stream_module):
        monkeypatch.setattr(module, "decode_image", counted)
    trainer, recorder, _ = trainer_of(tmp_path, tree_of(folder, None, selector=selector))
    loader: Any = trainer.state.train_dataloader
    tokenize = loader.materialize.tokenizer

    def noted(caption: str) -> torch.Tensor:
        read.append(caption)
        return tokenize(caption)

    loader.materialize.tokenizer = loader.dataset.tokenizer = noted
    trainer.fit()
    trained = torch.cat(recorder.batches)
    assert len(decoded) == len(read) == len(trained) == 5 * 8
    assert torch.equal(torch.stack([tokenize(caption) for caption in read]), trained)
    # Its caption is a sample's number in the folder.
    assert sorted(decoded) == sorted(loader.dataset[int(caption)]["image"] for caption in read)


def photo(seed: int, side: int = 64) -> bytes:
    """A JPEG of side x side pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize("embed", ["proxy", "online"])
def test_a_proxy_at_low_resolution_scores_images_decoded_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embed: str
) -> None:
    """Every candidate is decoded at a fraction of its size, survivors in full; ahead of training too."""
    folder = tmp_path / "mds"
    with MDSWriter(out=str(folder), columns={"image": "jpeg", "caption": "str"}) as writer:
        for row in range(96):
            writer.write({"image": b"none" if row in (3, 40) else photo(row), "caption": str(row)})
    sizes: list[tuple[int | None, tuple[int, int]]] = []
    decode = materialize_module.decode_image

    def noted(data: Any, at_least: int | None = None, *limits: Any, **named: Any) -> Any:
        image = decode(data, at_least, *limits, **named)
        sizes.append((at_least, image.size))
        return image

    for module in (materialize_module, stream_module):
        monkeypatch.setattr(module, "decode_image", noted)
    runs = []
    for run_ahead in (0, 2):
        # An online proxy has a size of its own.
        small = online_section(8) if embed == "online" else {**proxy_section(tmp_path), "embed_resolution": 8}
        selection = {**small, "run_ahead": run_ahead, "lag_delay": 2}
        tree = columns_recipe(folder, **selection)
        tree["stream"] |= {"num_workers": 0, "shuffle": True}
        sizes.clear()
        runs.append(run(tmp_path, {**tree, "max_duration": "3ba"}))
        # 64 pixels at an eighth are the 8 asked for.
        assert {size for size in sizes if size[0] == 8} == {(8, (8, 8))}
        assert sum(asked is None for asked, _ in sizes) == 3 * 8
        assert {size for size in sizes if size[0] is None} == {(None, (64, 64))}
        runs[-1][0].close()
    assert_same_run(*runs)
    if embed == "online":
        # All are decoded in full where that is asked for, and where the proxy reads no smaller ones than the learner.
        for section, stream, deferred in ((online_section(16), {}, False), (small, {"deferred": False}, False)):
            whole = columns_recipe(folder, **section)
            whole["stream"] |= stream
            trainer, _, memory = run(tmp_path, whole)
            assert trainer.state.train_dataloader.dataset.deferred is deferred  # pyright: ignore
            assert values(memory, "selection/num_invalid")[-1] == 2
            trainer.close()
        saved = algorithm_of(runs[0][0]).state_dict()
        other, _, _ = trainer_of(
            tmp_path, {**columns_recipe(folder, **selection), "stream": {**tree["stream"], **stream}}
        )
        algorithm_of(other).load_state_dict(saved)
        with pytest.raises(
            ValueError, match=r"scored images of 8, this one of the size trained on; set stream\.deferr"
        ):
            other.fit()
    # Found while they were scored, not when they were chosen.
    assert values(runs[0][2], "selection/num_invalid")[-1] == 2


def test_a_small_decoding_shows_the_same_picture() -> None:
    whole = decode_image(photo(1)).resize((16, 16), Image.Resampling.BOX)
    small = decode_image(photo(1), 16)
    assert small.size == (16, 16) and decode_image(photo(1), 33).size == (64, 64)
    assert np.abs(np.asarray(whole, float) - np.asarray(small, float)).mean() < 4
    file = io.BytesIO()
    whole.save(file, "PNG")
    assert decode_image(file.getvalue(), 4).size == (16, 16)  # only JPEGs can


def test_what_reads_pixels_cannot_read_ranges_nor_do_without_them(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64)
    tree = columns_recipe(folder, **proxy_section(tmp_path), embed_resolution=8)
    tree["stream"]["range_reads"] = True
    with pytest.raises(ValueError, match=r"range_reads=true fetches survivors' .* but selection\.embed='proxy'"):
        trainer_of(tmp_path, tree)
    del tree["stream"]["range_reads"]
    trainer, _, _ = trainer_of(tmp_path, tree)
    dataset: Any = trainer.state.train_dataloader.dataset  # pyright: ignore
    dataset.scoring_crop = None
    with pytest.raises(ValueError, match=r"embed_resolution=8: the stream leaves .* no images for the proxy"):
        trainer.fit()


def first_valid(pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
    """The first of the pool that may be chosen."""
    return torch.sort((~pool.valid).int(), stable=True).indices[:num_survivors]


def test_an_undecodable_survivor_is_replaced(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64, bad_images=5)
    states: list[Any] = []

    def spy(pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
        states.append(state)
        return first_valid(pool, num_survivors, state)

    tree = columns_recipe(folder, max_invalid_ratio=0.9)
    trainer, recorder, memory = trainer_of(tmp_path, tree)
    clipcov = algorithm_of(trainer)
    clipcov.function = spy
    trainer.fit()
    tokenize = trainer.state.train_dataloader.dataset.tokenizer  # pyright: ignore
    for step, rows in enumerate((range(5, 13), range(32, 40))):
        assert torch.equal(recorder.batches[step], torch.stack([tokenize(str(row)) for row in rows]))
    assert values(memory, "selection/num_invalid") == [5, 5]
    # Chosen twice from the first pool, from the same state but for the candidates it now counts.
    assert [state.step for state in states] == [0, 0, 1]
    assert [int(state.kept.num_samples) for state in states] == [0, 0, 8]
    assert [int(state.stream.num_samples) for state in states] == [32, 27, 59]
    assert int(clipcov.selection.stream.num_samples) == 59  # pyright: ignore


@pytest.mark.parametrize("selector", ["clipcov", "random"])
def test_undecodable_survivors_are_never_trained_on_and_counted_once(tmp_path: Path, selector: str) -> None:
    folder = write_columns(tmp_path / "mds", 64, bad_images=20)
    tree = columns_recipe(folder, selector=selector, max_invalid_ratio=0.9)
    trainer, recorder, memory = run(tmp_path, tree)
    tokenize = trainer.state.train_dataloader.dataset.tokenizer  # pyright: ignore
    good = {tuple(tokenize(str(row)).tolist()) for row in range(20, 64)}
    assert {tuple(row) for batch in recorder.batches for row in batch.tolist()} <= good
    found = values(memory, "selection/num_invalid")
    # All bad ones are in the first pool; those that were never chosen stay unknown.
    assert 0 < found[0] <= 20 and found[1] == found[0]
    if selector == "random":
        eager = run(tmp_path, {**tree, "stream": {**tree["stream"], "deferred": False}})
        assert all(torch.equal(a, b) for a, b in zip(recorder.batches, eager[1].batches, strict=True))


def test_gains_are_of_the_choice_that_is_trained_on(tmp_path: Path) -> None:
    """Of a selection that was told which of the images first chosen are none, not of the one that chose them."""
    folder = write_columns(tmp_path / "mds", 64, bad_images=20)
    knobs = {"max_invalid_ratio": 0.9, "learnability": 0.0}
    _, recorder, _ = run(tmp_path, columns_recipe(folder, **knobs))
    state, settings = None, Settings(learnability=0.0, half_life=float("inf"))
    for step, pool in enumerate(trainer_of(tmp_path, columns_recipe(folder, **knobs))[0].state.train_dataloader):
        rows = [pool[f"{side}_embedding"].float() for side in ("image", "text")]
        valid, again = torch.ones(len(rows[0]), dtype=torch.bool), -1
        state = SelectionState.initial(rows[0].shape[1], settings) if state is None else state
        while again:
            chosen = select(state, Pool(*rows, 100.0, valid=valid), 8)
            bad = chosen.survivors[pool["id"][chosen.survivors] < 20]
            again, valid[bad] = len(bad), False
        state = chosen.state
        np.testing.assert_allclose(recorder.gains[step], chosen.gain, rtol=1e-5, atol=1e-6)
        assert not valid.all() or step


@pytest.mark.parametrize("scope", ["local", "global"])
def test_ranks_choose_anew_together(tmp_path: Path, scope: str) -> None:
    folder = write_columns(tmp_path / "mds", 64, bad_images=12)
    tree = {**columns_recipe(folder, scope=scope, max_invalid_ratio=0.9), "max_duration": "4ba"}
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    two = run_ranks(tmp_path / "two", path, 2)
    assert_same(two[0]["algorithm"], two[1]["algorithm"])
    assert two[0]["algorithm"]["num_invalid"] > 0
    # What is undecodable would be trained on as a blank image.
    assert all(bool(image.any()) for rank in two for batch in rank["batches"] for image in batch["image"])
    if scope == "global":
        one = run_ranks(tmp_path / "one", path, 1)
        assert one[0]["algorithm"]["num_invalid"] == two[0]["algorithm"]["num_invalid"]
        for got, want in zip(trained_rows(two), trained_rows(one), strict=True):
            assert torch.equal(got, want)


def test_candidates_stay_encoded_only_where_no_pixels_are_needed(tmp_path: Path) -> None:
    corpus = draw_corpus(tmp_path / "shapes")

    def loader_of(**sections: Any) -> Any:
        tree = recipe(corpus, **sections)
        return build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", tree)))).state.train_dataloader

    assert loader_of(selection={"selector": "random"}).dataset.deferred
    assert not loader_of().dataset.deferred
    assert not loader_of(stream={"deferred": False}, selection={"selector": "random"}).dataset.deferred
    with pytest.raises(ValueError, match=r"stream\.deferred=true .* selection\.embed='teacher' .* embeds their pixels"):
        loader_of(stream={"deferred": True})
    deferred = loader_of(selection={"selector": "random"})
    trainer = trainer_of(tmp_path, recipe(corpus))[0]
    own = Trainer(
        model=trainer.state.model,  # pyright: ignore
        train_dataloader=deferred,
        max_duration="1ba",
        algorithms=[ClipCov(0.75, embed="teacher", warmup=0)],
        optimizers=trainer.state.optimizers[0],
        device="cpu",
        progress_bar=False,
    )
    with pytest.raises(ValueError, match=r"leaves candidates encoded, but selection\.embed='teacher'"):
        own.fit()


def test_a_forgotten_algorithm_stops_a_run_on_encoded_candidates(tmp_path: Path) -> None:
    tree = columns_recipe(write_columns(tmp_path / "mds", 64))
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", tree))))
    trainer.state.algorithms = []
    with pytest.raises(RuntimeError, match="still encoded: is ClipCov among the Trainer's algorithms"):
        trainer.fit()
