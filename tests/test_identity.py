"""What a checkpoint of ClipCov holds, and of which runs it goes on."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from runs import (
    Interrupt,
    algorithm_of,
    assert_same,
    run,
    trainer_of,
    values,
)

from clipcov_stream import ClipCov, train
from clipcov_stream.identity import LATER
from clipcov_stream.model import build_towers
from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.rivals import sem_dedup


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


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
            ("copies", 1.0),
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
    arguments: dict[str, Any] = {"filter_ratio": 0.75, "selector": "clipcov", "embed": "teacher"}
    saved = ClipCov(**arguments).state_dict()
    ClipCov(**arguments).load_state_dict(saved)
    with pytest.raises(ValueError, match=rf"began with selection.*{key}=.*, not {value!r}.*load_weights_only"):
        ClipCov(**{**arguments, key: value}).load_state_dict(saved)


def test_a_checkpoint_from_before_a_knob_is_of_a_run_without_it() -> None:
    saved = ClipCov(0.75, "teacher").state_dict()
    saved["arguments"] = {name: value for name, value in saved["arguments"].items() if name not in LATER}
    before = {"unevenness": 0.0, "novelty": 0.0, "repeats": math.inf, "soft_start": 0.0, "warmup": "0ba"}
    ClipCov(0.75, "teacher", **before).load_state_dict(saved)
    wanted = "selection.unevenness=0.0, not 0.05; selection.novelty=0.0, not 3.0; selection.repeats=inf, not 2.0"
    with pytest.raises(ValueError, match=wanted):
        ClipCov(0.75, "teacher").load_state_dict(saved)


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
    with pytest.raises(ValueError, match=r"began with stream\.global_pool_size=32, not 64"):
        second.fit()


def test_a_run_that_goes_on_with_other_pools_ends_with_an_error_of_one_line(tmp_path: Path, corpus: Path) -> None:
    """Not with a traceback, though only its first pool tells."""
    tree = recipe(corpus, run_name="own", save_folder=str(tmp_path / "own"), save_interval="3ba", autoresume=True)
    path = str(write_recipe(tmp_path / "recipe.yaml", tree))
    train.main(path, ["max_duration=3ba"])
    with pytest.raises(SystemExit) as ended:
        train.main(path, ["stream.global_pool_size=64"])
    said = str(ended.value)
    assert said.startswith("error: the checkpoint's run began with stream.global_pool_size=32, not 64. To go on, ")
    assert said.endswith("load_weights_only=true (step, schedule and optimizer then start anew)")


def test_a_selector_keeps_its_name_in_another_process() -> None:
    class Mine:
        def __call__(self, pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
            return torch.arange(num_survivors)

    assert ClipCov(selector=Mine()).selector.endswith("Mine")
    assert ClipCov(selector=partial(sem_dedup, eps=0.2)).selector == "sem_dedup, eps=0.2"


def test_a_restored_state_is_saved_again_before_the_first_step(tmp_path: Path, corpus: Path) -> None:
    trainer, _, _ = run(tmp_path, recipe(corpus, max_duration="4ba"))
    saved = algorithm_of(trainer).state_dict()
    again = ClipCov(0.75, "teacher", warmup="2ba", soft_start=0.0)
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
