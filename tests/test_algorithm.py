"""ClipCov in the real Composer Trainer, on real MDS shards."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from composer import Callback, Trainer
from composer.core import Algorithm, Event
from composer.models import ComposerModel
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from runs import (
    Interrupt,
    algorithm_of,
    assert_same,
    columns_recipe,
    composer,
    launch,
    run,
    run_ranks,
    trained_rows,
    trainer_of,
    values,
    write_columns,
)
from streaming import StreamingDataset
from torch.utils.data import BatchSampler, DataLoader

from clipcov_stream import ClipCov
from clipcov_stream.batch import check_batch, count_survivors, size_of
from clipcov_stream.build import check_same_tokens, tokenizer_of
from clipcov_stream.config import ModelConfig, load_config
from clipcov_stream.embed import is_native
from clipcov_stream.identity import LATER
from clipcov_stream.model import ClipModel, build_towers
from clipcov_stream.objective import LAG_DECAY, SelectionState, Settings
from clipcov_stream.rivals import sem_dedup
from clipcov_stream.selection import SELECTORS
from clipcov_stream.stream import Tokenizer
from clipcov_stream.train import build_trainer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


def test_survivors_alone_are_trained_on_and_counted(tmp_path: Path, corpus: Path) -> None:
    trainer, recorder, memory = trainer_of(tmp_path, recipe(corpus))
    trainer.fit()
    assert [len(batch) for batch in recorder.batches] == [8] * 6
    assert recorder.keys == {"image", "text"}
    assert values(memory, "selection/samples_streamed") == [32 * n for n in range(1, 7)]
    assert values(memory, "selection/samples_seen") == [8 * n for n in range(1, 7)]
    assert set(values(memory, "selection/filter_ratio")) == {0.75}
    assert int(trainer.state.timestamp.sample) == 6 * 32
    for name in ("residual", "residual_random", "residual_total", "residual_total_random", "alignment_pool"):
        # Four of six steps select; the other two are warm-up.
        assert len(values(memory, f"selection/{name}")) == 4
        assert all(np.isfinite(values(memory, f"selection/{name}")))
    assert len(values(memory, "selection/embed_ms")) == len(values(memory, "selection/select_ms")) == 4


def test_the_embedder_alone_sees_a_lower_resolution_and_precision(tmp_path: Path, corpus: Path) -> None:
    seen: dict[str, set[tuple[int, torch.dtype]]] = {"teacher": set(), "learner": set()}

    def watch(trainer: Trainer, who: str, model: ClipModel) -> None:
        def note(module: Any, args: Any, output: torch.Tensor) -> None:
            seen[who].add((args[0].shape[-1], output.dtype))

        model.towers.visual.conv1.register_forward_hook(note)  # pyright: ignore

    tree = recipe(corpus, selection={"embed_resolution": 8, "embed_precision": "amp_bf16"})
    trainer, recorder, memory = trainer_of(tmp_path, tree)

    class Watch(Callback):
        def fit_start(self, state: Any, logger: Any) -> None:
            teacher = algorithm_of(trainer).teacher
            assert teacher is not None
            watch(trainer, "teacher", teacher.model)  # pyright: ignore
            watch(trainer, "learner", state.model)

    trainer.state.callbacks.append(Watch())
    said = pytest.warns(UserWarning, match="embed_precision=amp_bf16: this cpu device has no instructions")
    with contextlib.nullcontext() if is_native(torch.bfloat16, "cpu") else said:
        trainer.fit()
    assert seen == {"teacher": {(8, torch.bfloat16)}, "learner": {(16, torch.float32)}}
    assert [len(batch) for batch in recorder.batches] == [8] * 6
    assert all(np.isfinite(values(memory, "selection/residual")))
    assert "embed_resolution" in algorithm_of(trainer).state_dict()["arguments"]


def test_the_embedder_alone_leaves_patches_out(tmp_path: Path, corpus: Path) -> None:
    seen: dict[str, set[int]] = {"teacher": set(), "learner": set()}
    trainer, recorder, memory = trainer_of(tmp_path, recipe(corpus, selection={"embed_patch_dropout": 0.5}))

    class Watch(Callback):
        def fit_start(self, state: Any, logger: Any) -> None:
            teacher = algorithm_of(trainer).teacher
            assert teacher is not None
            for who, model in (("teacher", teacher.model), ("learner", state.model)):
                block = model.towers.visual.transformer.resblocks[0]  # pyright: ignore
                block.register_forward_pre_hook(lambda module, args, who=who: seen[who].add(args[0].shape[1]))

    trainer.state.callbacks.append(Watch())
    trainer.fit()
    assert seen == {"teacher": {1 + 2}, "learner": {1 + 4}}
    assert [len(batch) for batch in recorder.batches] == [8] * 6
    assert all(np.isfinite(values(memory, "selection/residual")))


def test_a_resolution_that_does_not_fit_the_patches_is_refused(tmp_path: Path, corpus: Path) -> None:
    trainer, _, _ = trainer_of(tmp_path, recipe(corpus, selection={"embed_resolution": 12}))
    with pytest.raises(ValueError, match=r"embed_resolution=12 must be a multiple of 8 for this embedder"):
        trainer.fit()


def test_random_twin_shares_the_warmup_and_then_differs(tmp_path: Path, corpus: Path) -> None:
    _, ours, _ = run(tmp_path, recipe(corpus))
    _, twin, _ = run(tmp_path, recipe(corpus, selection={"selector": "random"}))
    same = [torch.equal(a, b) for a, b in zip(ours.batches, twin.batches, strict=True)]
    assert same[:2] == [True, True]
    assert not any(same[2:])


@pytest.mark.parametrize(("stop", "soft_start"), [(1, 0.0), (4, 0.0), (4, 0.5)])
def test_a_resumed_run_equals_a_straight_one(tmp_path: Path, corpus: Path, stop: int, soft_start: float) -> None:
    # One step, inside the warm-up, and four: two steps after selection has begun, in the middle of the epoch.
    chosen = {"selection": {"soft_start": soft_start}}
    tree = recipe(corpus, max_duration="9ba", save_interval=f"{stop}ba", **chosen)
    straight, expected, metrics = run(tmp_path, tree)
    first, _, _ = trainer_of(tmp_path, {**tree, "save_folder": str(tmp_path / "checkpoints")})
    # Killed, not stopped: a shorter duration would have given the first steps another learning rate.
    first.state.callbacks.append(Interrupt(stop))
    with pytest.raises(InterruptedError):
        first.fit()
    first.close()
    resumed, rest, resumed_metrics = trainer_of(
        tmp_path, {**tree, "load_path": str(tmp_path / "checkpoints" / "latest-rank0.pt")}
    )
    assert int(resumed.state.timestamp.batch) == stop
    resumed.fit()
    assert len(rest.batches) == 9 - stop
    for ours, theirs in zip(rest.batches, expected.batches[stop:], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(expected.batches[-1], expected.batches[-2])
    for (name, ours), theirs in zip(
        resumed.state.model.state_dict().items(), straight.state.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert_same(algorithm_of(resumed).state_dict(), algorithm_of(straight).state_dict())
    for name in ("selection/residual_total", "selection/samples_seen", "loss/train/total"):
        assert values(resumed_metrics, name) == values(metrics, name)[-len(values(resumed_metrics, name)) :]


def test_state_is_tensors_and_primitives(tmp_path: Path, corpus: Path) -> None:
    trainer, _, _ = run(tmp_path, recipe(corpus, max_duration="4ba"))
    path = tmp_path / "state.pt"
    torch.save(algorithm_of(trainer).state_dict(), path)
    assert_same(torch.load(path, weights_only=True), algorithm_of(trainer).state_dict())


RANKS = """
import sys, torch
from composer.utils import dist
from clipcov_stream.algorithm import ClipCov
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer, leave_group
trainer = build_trainer(load_config(sys.argv[1]))
trainer.fit()
clipcov = next(a for a in trainer.state.algorithms if isinstance(a, ClipCov))
torch.save({"algorithm": clipcov.state_dict(), "model": trainer.state.model.module.state_dict()},
           f"{sys.argv[2]}/rank{dist.get_global_rank()}.pt")
trainer.close()
leave_group()
"""


def test_two_ranks_agree(tmp_path: Path, corpus: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    path = write_recipe(tmp_path / "recipe.yaml", recipe(corpus))
    launch([*composer(), "-n", "2", str(script), str(path), str(tmp_path)])
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(ranks[0], ranks[1])
    assert ranks[0]["algorithm"]["samples_seen"] == 6 * 8
    # Four steps selected, from the pools of both ranks.
    assert int(ranks[0]["algorithm"]["selection"]["stream"]["num_samples"]) == 4 * 32
    assert int(ranks[0]["algorithm"]["selection"]["kept"]["num_samples"]) == 4 * 8
    weight = float(ranks[0]["algorithm"]["selection"]["lag_weight"])
    assert weight == pytest.approx(8 * sum(LAG_DECAY**age for age in range(4)))


def test_global_selection_is_the_same_on_any_number_of_ranks(tmp_path: Path, corpus: Path) -> None:
    tree = recipe(corpus, selection={"scope": "global"}, save_folder=str(tmp_path / "{run_name}"), save_interval="4ba")
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    one, two = (run_ranks(tmp_path / str(n), path, n, f"run_name=from{n}") for n in (1, 2))
    expected = trained_rows(one)
    assert len(expected) == 6 and all(len(torch.unique(rows, dim=0)) == 8 for rows in expected)
    # Stopped after four steps on two ranks, and resumed on four and on one.
    saved = f"load_path={tmp_path}/from2/ep0-ba4-rank0.pt"
    four, again = (run_ranks(tmp_path / f"on{n}", path, n, saved, f"run_name=on{n}") for n in (4, 1))
    for ranks, first in ((two, 0), (four, 4), (again, 4)):
        for got, want in zip(trained_rows(ranks), expected[first:], strict=True):
            assert torch.equal(got, want)
        assert_same(ranks[0]["algorithm"], ranks[-1]["algorithm"])
        assert ranks[0]["algorithm"]["samples_seen"] == one[0]["algorithm"]["samples_seen"] == 6 * 8
        lags = (found[0]["algorithm"]["selection"]["lag"] for found in (ranks, one))
        torch.testing.assert_close(*lags, rtol=1e-2, atol=1e-3)
        for name, weight in one[0]["model"].items():
            got = ranks[0]["model"][name]
            if name.endswith("in_proj_bias"):
                # A key's bias changes no softmax: its gradient is rounding alone, which AdamW makes as large as any.
                got, weight = (torch.cat(bias.chunk(3)[::2]) for bias in (got, weight))
            torch.testing.assert_close(got, weight, rtol=1e-3, atol=1e-4, msg=name)


def test_global_selection_needs_ids(tmp_path: Path, corpus: Path) -> None:
    trainer, _, _ = trainer_of(tmp_path, recipe(corpus, selection={"scope": "global"}))
    clipcov, batch = algorithm_of(trainer), next(iter(trainer.state.train_dataloader))
    batch.pop("id")
    trainer.state.batch = batch
    with pytest.raises(ValueError, match="scope='global' needs 'id'"):
        clipcov.apply(Event.AFTER_DATALOADER, trainer.state, trainer.logger)
    with pytest.raises(ValueError, match=r"selection.scope='all' is not one of \['local', 'global'\]"):
        ClipCov(scope="all")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            ("scope", "global"),
            ("selector", "random"),
            ("filter_ratio", 0.5),
            ("seed", 7),
            ("embed", "columns"),
            ("gate", 0.1),
        ],
        *[
            ("coverage", 0.0),
            ("learnability", 0.3),
            ("quality", 9.0),
            ("balance", 0.7),
            ("unevenness", 0.1),
            ("novelty", 1.0),
            ("recent", 64),
            ("repeats", 0.5),
            ("ridge", 0.2),
            ("references", 64),
            ("overshoot", 2.0),
            ("memory", 0.5),
        ],
        *[("warmup", "7ba"), ("half_life", 5.0), ("teacher_momentum", 0.5), ("logit_scale", 3.0)],
        *[("embed_resolution", 16), ("embed_precision", "amp_bf16"), ("embed_patch_dropout", 0.5)],
    ],
)
def test_the_checkpoint_of_another_run_is_refused(key: str, value: Any) -> None:
    arguments: dict[str, Any] = {"filter_ratio": 0.75, "selector": "clipcov"}
    saved = ClipCov(**arguments).state_dict()
    ClipCov(**arguments).load_state_dict(saved)
    with pytest.raises(ValueError, match=rf"began with selection.*{key}=.*, not {value!r}.*load_weights_only"):
        ClipCov(**{**arguments, key: value}).load_state_dict(saved)


@pytest.mark.parametrize("given", [None, 0, 7])
def test_a_run_counts_how_often_it_trained_on_each_sample(tmp_path: Path, corpus: Path, given: int | None) -> None:
    trainer, *_ = trainer_of(tmp_path, recipe(corpus, max_duration="9ba"))
    clipcov, ids = ClipCov(0.75, warmup="2ba", dataset_size=given), []
    trainer.state.algorithms[:] = [clipcov]

    class Ids(Callback):
        def before_train_batch(self, *_: Any) -> None:
            ids.append(clipcov.survivor_ids)

    trainer.state.callbacks.append(Ids())
    with pytest.warns(UserWarning, match="but the data set has 7 samples") if given else contextlib.nullcontext():
        trainer.fit()
    assert clipcov.selection is not None
    size = trainer.state.dataloader.dataset.num_samples if given is None else given
    trained_on = torch.stack([torch.bincount(step % max(size, 1), minlength=size).clamp_max(1) for step in ids[2:]])
    assert clipcov.selection.times.tolist() == trained_on.sum(0)[:size].tolist()
    assert len(clipcov.selection.times) == size and (given == 0 or clipcov.selection.times.any())


def test_the_size_of_a_data_set_is_what_it_says() -> None:
    class Streamed:
        num_samples = 9

        def __len__(self) -> int:
            return 3

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    assert [size_of(of) for of in (Streamed(), [1, 2], Endless(), None)] == [9, 2, 0, 0]


def test_a_checkpoint_from_before_a_knob_is_of_a_run_without_it() -> None:
    saved = ClipCov(filter_ratio=0.75).state_dict()
    saved["arguments"] = {name: value for name, value in saved["arguments"].items() if name not in LATER}
    before = {"unevenness": 0.0, "novelty": 0.0, "repeats": math.inf, "soft_start": 0.0, "warmup": "0ba"}
    ClipCov(filter_ratio=0.75, **before).load_state_dict(saved)
    wanted = "selection.unevenness=0.0, not 0.05; selection.novelty=0.0, not 3.0; selection.repeats=inf, not 2.0"
    with pytest.raises(ValueError, match=wanted):
        ClipCov(filter_ratio=0.75).load_state_dict(saved)


def test_patches_of_a_tower_without_any_cannot_be_left_out(tmp_path: Path, corpus: Path) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    model = {"config": {**TINY_MODEL, "vision_cfg": vision}}
    with pytest.raises(ValueError, match="has no transformer of open_clip's as its image tower"):
        trainer_of(tmp_path, recipe(corpus, model=model, selection={"embed_patch_dropout": 0.5}))


def test_the_checkpoint_of_another_proxy_pool_or_version_is_refused(tmp_path: Path, corpus: Path) -> None:
    proxies = [build_towers(config=TINY_MODEL) for _ in range(2)]
    saved = ClipCov(embed="proxy", proxy=proxies[0]).state_dict()
    ClipCov(embed="proxy", proxy=copy.deepcopy(proxies[0])).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"selection\.proxy="):
        ClipCov(embed="proxy", proxy=proxies[1]).load_state_dict(saved)
    del saved["samples_seen"]
    with pytest.raises(ValueError, match=r"lacks \['samples_seen'\]: another version wrote it"):
        ClipCov(embed="proxy", proxy=proxies[0]).load_state_dict(saved)
    first, *_ = run(tmp_path, recipe(corpus, max_duration="3ba"))
    second, *_ = trainer_of(tmp_path, recipe(corpus, stream={"global_pool_size": 64}))
    algorithm_of(second).load_state_dict(algorithm_of(first).state_dict())
    with pytest.raises(ValueError, match="global_pool_size=32, not 64"):
        second.fit()


def test_a_selector_keeps_its_name_in_another_process() -> None:
    class Mine:
        def __call__(self, pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
            return torch.arange(num_survivors)

    assert ClipCov(selector=Mine()).selector.endswith("Mine")
    assert ClipCov(selector=partial(sem_dedup, eps=0.2)).selector == "sem_dedup, eps=0.2"


def test_a_restored_state_is_saved_again_before_the_first_step(tmp_path: Path, corpus: Path) -> None:
    trainer, _, _ = run(tmp_path, recipe(corpus, max_duration="4ba"))
    saved = algorithm_of(trainer).state_dict()
    again = ClipCov(filter_ratio=0.75, warmup="2ba", soft_start=0.0)
    again.load_state_dict(saved)
    for name in ("selection", "teacher", "samples_seen", "num_invalid"):
        assert_same(again.state_dict()[name], saved[name])


def test_a_resumed_run_takes_the_half_life_it_is_given(tmp_path: Path, corpus: Path) -> None:
    trainer, _, _ = run(tmp_path, recipe(corpus, max_duration="4ba"))
    selection = algorithm_of(trainer).selection
    assert selection is not None and selection.stream.half_life == 20 * 32
    size = algorithm_of(trainer).dataset_size
    other = SelectionState.initial(16, Settings(half_life=99.0), dataset_size=size).restored(selection.state_dict())
    assert other.stream.half_life == other.kept.half_life == 99.0
    assert torch.equal(other.stream.cross_cov, selection.stream.cross_cov)


@pytest.mark.parametrize("selector", ["clipcov", "random"])
def test_ranks_share_batch_norm_statistics(tmp_path: Path, corpus: Path, selector: str) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    tree = recipe(
        corpus,
        model={"config": {**TINY_MODEL, "vision_cfg": vision}},
        selection={"selector": selector},
        max_duration="3ba",
    )
    launch([*composer(), "-n", "2", str(script), str(write_recipe(tmp_path / "recipe.yaml", tree)), str(tmp_path)])
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    means = [name for name in ranks[0]["model"] if name.endswith("running_mean")]
    assert means and all(ranks[0]["model"][name].any() for name in means)
    assert bool(ranks[0]["algorithm"]["teacher"]) == (selector == "clipcov")
    assert_same(ranks[0], ranks[1])


@pytest.mark.parametrize("selector", ["sem_dedup", "dissect", "concept_balance"])
def test_two_ranks_agree_on_what_a_selector_remembers(tmp_path: Path, corpus: Path, selector: str) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    tree = recipe(corpus, selection={"selector": selector})
    tree["stream"]["columns"] = {"concepts": "class_id"}
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    launch([*composer(), "-n", "2", str(script), str(path), str(tmp_path)])
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["algorithm"] for rank in range(2)]
    own = ranks[0]["selection"]["own"]
    assert_same(ranks[0], ranks[1])
    # Four steps of 32 candidates, 8 survivors, over both ranks.
    if selector == "sem_dedup":
        assert own["recent"].shape == (4 * 8, 16)
    elif selector == "dissect":
        assert int(own["known"].sum()) == 4 * 32
    else:
        assert int(own["concept_count"].sum()) == 4 * 32


class OwnModel(ComposerModel):
    """Somebody else's model: two linear towers, another loss, no logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = torch.nn.Linear(6, 4)
        self.text_tower = torch.nn.Linear(5, 4)
        self.rows: list[int] = []

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return self.image_tower(image)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return self.text_tower(text)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.rows.append(len(batch["pixels"]))
        return self.encode_image(batch["pixels"]) @ self.encode_text(batch["words"]).T

    def loss(self, outputs: torch.Tensor, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, torch.arange(len(outputs)))


def own_trainer(
    algorithms: list[Algorithm], rows: int = 32, sampler: bool = False, loader: Any = None, **kwargs: Any
) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    data = [
        {"pixels": torch.randn(6, generator=generator), "words": torch.randn(5, generator=generator)} for _ in range(64)
    ]
    batches = {"batch_sampler": BatchSampler(range(64), rows, True)} if sampler else {"batch_size": rows}
    return Trainer(
        model=OwnModel(),
        train_dataloader=loader or DataLoader(data, **batches),  # pyright: ignore[reportArgumentType]
        optimizers=None,
        max_duration="4ba",
        device="cpu",
        algorithms=algorithms,
        progress_bar=False,
        **kwargs,
    )


@pytest.mark.filterwarnings("ignore:No optimizer was specified")
class TestOwnTrainer:
    def test_three_lines_are_enough(self) -> None:
        clipcov = ClipCov(filter_ratio=0.75, warmup="1ba", image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov])
        trainer.fit()
        assert set(trainer.state.model.rows) == {8}
        assert clipcov.samples_seen == 32

    def test_a_loader_with_a_batch_sampler_is_measured_at_its_first_pool(self) -> None:
        clipcov = ClipCov(filter_ratio=0.75, warmup="1ba", image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov], sampler=True)
        trainer.fit()
        assert set(trainer.state.model.rows) == {8}
        assert clipcov.selection is not None and clipcov.selection.stream.half_life == 20 * 32
        with pytest.raises(ValueError, match="device_train_microbatch_size=4 must be the survivors per rank"):
            own_trainer(
                [ClipCov(0.75, warmup=0, image_key="pixels", text_key="words")],
                sampler=True,
                device_train_microbatch_size=4,
            ).fit()

    def test_pools_that_grow_are_refused(self) -> None:
        class Growing:
            def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
                for rows in (16, 16, 32):
                    yield {"pixels": torch.randn(rows, 6), "words": torch.randn(rows, 5)}

            def __len__(self) -> int:
                return 3

        clipcov = ClipCov(0.75, warmup=0, image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov], loader=Growing(), device_train_microbatch_size=4)
        with pytest.raises(ValueError, match=r"device_train_microbatch_size=4 must be .* pool_size=32"):
            trainer.fit()
        assert trainer.state.model.rows == [4, 4]

    def test_a_function_called_random_gets_embeddings(self) -> None:
        pools = []

        def random(pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
            pools.append(pool)
            return torch.arange(num_survivors)

        own_trainer([ClipCov(0.75, selector=random, warmup=0, image_key="pixels", text_key="words")]).fit()
        assert len(pools) == 4

    @pytest.mark.parametrize("warmup", ["4ba", "2ep", "1dur"])
    def test_a_warmup_that_never_ends_is_warned_of(self, warmup: str) -> None:
        with pytest.warns(UserWarning, match="is as long as max_duration=.*every survivor will be random"):
            own_trainer([ClipCov(0.75, warmup=warmup, image_key="pixels", text_key="words")]).fit()

    def test_entries_without_rows_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"entries \['epoch'\] of the batch have no rows"):
            check_batch({"image": torch.zeros(2, 1), "epoch": 3}, "image")

    def test_a_function_is_a_selector(self) -> None:
        def first(pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
            return torch.arange(num_survivors)

        clipcov = ClipCov(0.75, selector=first, warmup=0, image_key="pixels", text_key="words")
        own_trainer([clipcov]).fit()
        assert clipcov.selector == "first"
        assert clipcov.selection is not None
        assert int(clipcov.selection.stream.num_samples) == 128

    def test_a_model_without_towers_is_refused(self) -> None:
        class Blind(OwnModel):
            encode_text = None  # pyright: ignore[reportAssignmentType]

        trainer = own_trainer([ClipCov(0.75, warmup=0, image_key="pixels", text_key="words")])
        trainer.state.model = Blind()
        with pytest.raises(ValueError, match="has no encode_text; selection needs both towers"):
            trainer.fit()

    def test_microbatch_that_splits_survivors_is_refused(self) -> None:
        clipcov = ClipCov(0.75, image_key="pixels", text_key="words")
        with pytest.raises(ValueError, match=r"device_train_microbatch_size=4 must be the survivors per rank.*= 8"):
            own_trainer([clipcov], device_train_microbatch_size=4).fit()

    def test_pool_that_does_not_divide_is_refused(self) -> None:
        with pytest.raises(ValueError, match="must be a whole number"):
            own_trainer([ClipCov(0.8, image_key="pixels", text_key="words")]).fit()

    def test_wrong_key_names_what_is_there(self) -> None:
        with pytest.raises(ValueError, match=r"key 'image' \(image_key\); the batch is \['pixels', 'words'\]"):
            own_trainer([ClipCov(0.75, warmup=0)]).fit()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"filter_ratio": 1.0}, r"selection.filter_ratio=1.0 must be in \[0, 1\)"),
        ({"filter_ratio": -0.1}, r"selection.filter_ratio=-0.1 must be in \[0, 1\)"),
        ({"filter_ratio": float("nan")}, r"selection.filter_ratio=nan"),
        ({"embed": "magic"}, r"selection.embed='magic' is not one of \['teacher', 'proxy', 'columns'\]"),
        ({"embed": "proxy"}, "embed='proxy' needs proxy model"),
        ({"selector": "best"}, r"selection.selector='best' is not one of \['c_rho', .*'vas'\]"),
        ({"warmup": "soon"}, "selection.warmup='soon' is not a Composer time"),
        ({"warmup": "10sp"}, "must be in batches"),
        ({"half_life": 0.0}, "selection.half_life=0.0 must be a positive number"),
        ({"coverage": -1.0}, "selection.coverage=-1.0 must be a finite number"),
        ({"gate": 0.0}, "selection.gate=0.0 must be above 0; inf opens every candidate"),
        ({"repeats": -1.0}, "selection.repeats=-1.0 must be at least 0; inf lets no pair wear out"),
        ({"dataset_size": -1}, "dataset_size=-1 must be a number of samples, 0 if it is not known, or None"),
        ({"logit_scale": 0.0}, "selection.logit_scale=0.0"),
        ({"embed_resolution": 0}, "selection.embed_resolution=0 must be at least 1 pixel"),
        ({"embed_patch_dropout": 1.0}, r"selection.embed_patch_dropout=1.0 must be in \[0, 1\), or null"),
        (
            {"embed": "columns", "embed_patch_dropout": 0.5},
            "embed_patch_dropout=0.5 has no effect with embed='columns'",
        ),
        ({"embed_precision": "int8"}, r"embed_precision='int8' is not one of \['fp32', 'amp_fp16', 'amp_bf16'\]"),
        ({"embed": "columns", "embed_resolution": 16}, "embed_resolution=16 has no effect with embed='columns'"),
    ],
)
def test_bad_arguments_name_the_value_and_the_knob(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipCov(**kwargs)


def test_survivors_must_be_a_whole_number_of_at_least_two() -> None:
    assert count_survivors(640, 0.8) == 128
    assert count_survivors(100, 0.0) == 100
    with pytest.raises(ValueError, match=r"pool_size=100 \* \(1 - filter_ratio=0.333\) = 66.7 survivors"):
        count_survivors(100, 0.333)
    with pytest.raises(ValueError, match="at least 2"):
        count_survivors(10, 0.9)


def test_forgotten_algorithm_stops_the_run(tmp_path: Path, corpus: Path) -> None:
    trainer, _, _ = trainer_of(tmp_path, recipe(corpus))
    trainer.state.algorithms = []
    with pytest.raises(RuntimeError, match=r"is ClipCov\s+among the Trainer's algorithms"):
        trainer.fit()


def test_ours_runs_before_other_algorithms(tmp_path: Path, corpus: Path) -> None:
    class Witness(Algorithm):
        rows: list[int]

        def match(self, event: Event, state: Any) -> bool:
            return event == Event.AFTER_DATALOADER

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            self.rows = [len(state.batch["image"])]

    trainer, _, _ = trainer_of(tmp_path, recipe(corpus, max_duration="1ba", selection={"warmup": 0}))
    before, after = Witness(), Witness()
    trainer.state.algorithms = [before, *trainer.state.algorithms, after]
    trainer.fit()
    assert before.rows == after.rows == [8]


def test_non_finite_embeddings_are_never_selected_and_are_counted(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64, spoil=6)
    trainer, recorder, memory = run(tmp_path, columns_recipe(folder, max_invalid_ratio=0.5))
    assert values(memory, "selection/num_invalid") == [6, 6]
    tokenize = trainer.state.dataloader.dataset.tokenizer  # pyright: ignore
    spoilt = {tuple(tokenize(str(row)).tolist()) for row in range(6)}
    assert not spoilt & {tuple(row) for row in recorder.batches[0].tolist()}
    stream = algorithm_of(trainer).selection.stream  # pyright: ignore
    assert int(stream.num_samples) == 58
    assert torch.isfinite(stream.cross_cov).all()


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_every_selector_trains(tmp_path: Path, corpus: Path, selector: str) -> None:
    # 192 samples are six pools: the last step is in a second epoch.
    tree = recipe(corpus, max_duration="7ba", selection={"selector": selector})
    if selector == "concept_balance":
        tree["stream"]["columns"] = {"concepts": "class_id"}
    trainer, recorder, memory = run(tmp_path, tree)
    assert [len(batch) for batch in recorder.batches] == [8] * 7
    assert recorder.keys == {"image", "text"}
    assert len(memory.data.get("selection/residual", [])) == (0 if selector == "random" else 5)
    selection = algorithm_of(trainer).selection
    own = {} if selection is None else selection.own
    assert set(own) == {
        "sem_dedup": {"recent"},
        "dissect": {"history", "known"},
        "concept_balance": {"concept_count"},
    }.get(selector, set())


@pytest.mark.parametrize("selector", ["clipcov", "random"])
def test_too_many_bad_images_stop_the_run(tmp_path: Path, selector: str) -> None:
    # 5% of 32 and three standard errors are 5.3.
    folder = write_columns(tmp_path / "mds", 64, bad_images=6)

    def eager(folder: Path, **selection: Any) -> dict[str, Any]:
        tree = columns_recipe(folder, selector=selector, **selection)
        tree["stream"]["deferred"] = False
        return tree

    with pytest.raises(RuntimeError, match=r"6 of 32 samples streamed cannot be used.*max_invalid_ratio=0.05"):
        run(tmp_path, eager(folder))
    _, _, memory = run(tmp_path, eager(folder, max_invalid_ratio=0.2))
    assert values(memory, "selection/num_invalid") == [6, 6]
    few = write_columns(tmp_path / "few", 64, bad_images=5)
    _, _, memory = run(tmp_path, eager(few))
    assert values(memory, "selection/num_invalid") == [5, 5]
    with pytest.raises(RuntimeError, match="5 of 32 samples streamed"):
        run(tmp_path, eager(few, max_invalid_ratio=0.0))


def test_too_few_good_samples_stop_the_run(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64, bad_images=30)
    with pytest.raises(RuntimeError, match="8 survivors are needed, but 30 of the pool's 32 samples cannot be used"):
        run(tmp_path, columns_recipe(folder, max_invalid_ratio=0.99))


def test_columns_of_two_widths_are_refused(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64, text_dim=6)
    with pytest.raises(ValueError, match="different widths: image 8, text 6"):
        run(tmp_path, columns_recipe(folder))


def test_missing_embedding_columns_are_named(tmp_path: Path, corpus: Path) -> None:
    tree = recipe(corpus, selection={"embed": "columns"})
    with pytest.raises(ValueError, match=r"no column 'image_embedding' \(stream.columns.image_embedding\)"):
        trainer_of(tmp_path, tree)


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


def test_proxy_selects_without_changing_itself(tmp_path: Path, corpus: Path) -> None:
    torch.manual_seed(1)
    proxy = ClipModel(build_towers(config=TINY_MODEL))
    torch.save(proxy.towers.state_dict(), tmp_path / "proxy.pt")
    section = {"config": TINY_MODEL, "pretrained": str(tmp_path / "proxy.pt")}
    trainer, _, memory = run(tmp_path, recipe(corpus, selection={"embed": "proxy", "proxy": section}))
    frozen = algorithm_of(trainer).proxy
    assert frozen is not None
    for ours, theirs in zip(frozen.towers.state_dict().values(), proxy.towers.state_dict().values(), strict=True):  # pyright: ignore
        assert torch.equal(ours, theirs)
    assert len(values(memory, "selection/residual")) == 4


def test_a_proxy_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    def letters(caption: str) -> torch.Tensor:
        return torch.tensor([ord(letter) for letter in caption[:8].ljust(8, "\0")])

    def tokens(length: int) -> Tokenizer:
        return tokenizer_of(
            build_towers(config={**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], "context_length": length}}),
            ModelConfig(config=TINY_MODEL),
        )

    for length in (4, 8, 16, 77):
        check_same_tokens(tokens(77), tokens(length))
        check_same_tokens(tokens(length), tokens(77))
    with pytest.raises(ValueError, match=r"selection.proxy reads .*both need one tokenizer"):
        check_same_tokens(letters, tokens(16))


@pytest.mark.parametrize("pretrained", [None, "nowhere.pt"])
def test_proxy_that_cannot_be_loaded_is_refused(tmp_path: Path, corpus: Path, pretrained: str | None) -> None:
    section = {"config": TINY_MODEL, "pretrained": pretrained}
    with pytest.raises(ValueError, match=r"selection\.proxy"):
        trainer_of(tmp_path, recipe(corpus, selection={"embed": "proxy", "proxy": section}))


def test_metrics_file_has_one_record_per_step(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(tmp_path, recipe(corpus, metrics_file=str(path)))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seen = {row["step"]: row["selection/samples_seen"] for row in rows if "selection/samples_seen" in row}
    assert seen == {step: 8 * step for step in range(1, 7)}


def test_every_evaluation_is_filed_under_its_own_step(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    split = {"tasks": ["retrieval"], "local": str(corpus / "eval"), "batch_size": 9}
    # 192 samples are six pools an epoch: the evaluation at the end of the first belongs to step 6.
    tree = recipe(corpus, metrics_file=str(path), max_duration="8ba", eval={"shapes": split}, eval_interval="1ep")
    trainer, _, _ = trainer_of(tmp_path, tree)
    trainer.eval()
    trainer.fit()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evaluated = [row for row in rows if "metrics/shapes/image_to_text_r1" in row]
    assert [row["step"] for row in evaluated] == [0, 6, 8]
    assert [row["samples_streamed"] for row in evaluated] == [0, 6 * 32, 8 * 32]
    assert not any("loss/train/total" in row for row in evaluated)
