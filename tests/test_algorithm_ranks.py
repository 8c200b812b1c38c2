"""ClipCov over several ranks: real processes, gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composer.core import Event
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from runs import (
    algorithm_of,
    assert_same,
    launch,
    run_ranks,
    trained_rows,
    trainer_of,
)

from clipcov_stream import ClipCov
from clipcov_stream.objective import LAG_DECAY

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


SIZES = """
import sys
from pathlib import Path
from composer.utils import dist
from clipcov_stream.algorithm import ClipCov
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer, leave_group
trainer = build_trainer(load_config(sys.argv[1]))
kept = [of for of in trainer.state.algorithms if not isinstance(of, ClipCov)]
trainer.state.algorithms[:] = [*kept, ClipCov(0.75, "teacher", warmup=0, dataset_size=32 * dist.get_global_rank())]
try:
    trainer.fit()
except ValueError as error:
    Path(sys.argv[2], f"rank{dist.get_global_rank()}.txt").write_text(str(error))
trainer.close()
leave_group()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


def test_two_ranks_agree(tmp_path: Path, corpus: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    path = write_recipe(tmp_path / "recipe.yaml", recipe(corpus))
    launch(2, script, str(path), str(tmp_path))
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


def test_global_selection_by_an_online_proxy_too(tmp_path: Path, corpus: Path) -> None:
    """It learns from the same parts of the global pool, whoever has their candidates."""
    selection = {"scope": "global", "embed": "online", "proxy": {"config": TINY_MODEL}, "proxy_lr": 1e-2}
    tree = recipe(corpus, selection=selection, save_folder=str(tmp_path / "{run_name}"), save_interval="4ba")
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    one, two = (run_ranks(tmp_path / str(n), path, n, f"run_name=from{n}") for n in (1, 2))
    expected = trained_rows(one)
    saved = f"load_path={tmp_path}/from2/ep0-ba4-rank0.pt"
    four = run_ranks(tmp_path / "on4", path, 4, saved, "run_name=on4")
    for ranks, first in ((two, 0), (four, 4)):
        for got, want in zip(trained_rows(ranks), expected[first:], strict=True):
            assert torch.equal(got, want)
        assert_same(ranks[0]["algorithm"], ranks[-1]["algorithm"])
        proxies = [found[0]["algorithm"]["teacher"] for found in (ranks, one)]
        assert int(proxies[0]["updates"]) == int(proxies[1]["updates"]) == 6 * 4
        for name, value in proxies[1].items():
            if name.startswith("average.") and not name.endswith("in_proj_bias"):
                torch.testing.assert_close(proxies[0][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_global_selection_needs_ids(tmp_path: Path, corpus: Path) -> None:
    trainer, _, _ = trainer_of(tmp_path, recipe(corpus, selection={"scope": "global"}))
    clipcov, batch = algorithm_of(trainer), next(iter(trainer.state.train_dataloader))
    batch.pop("id")
    trainer.state.batch = batch
    with pytest.raises(ValueError, match="scope='global' needs 'id'"):
        clipcov.apply(Event.AFTER_DATALOADER, trainer.state, trainer.logger)
    with pytest.raises(ValueError, match=r"selection.scope='all' is not one of \['local', 'global'\]"):
        ClipCov(scope="all")


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
    launch(2, script, str(write_recipe(tmp_path / "recipe.yaml", tree)), str(tmp_path))
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
    launch(2, script, str(path), str(tmp_path))
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


def test_ranks_that_are_given_other_sizes_of_the_data_set_all_say_so(tmp_path: Path, corpus: Path) -> None:
    script = tmp_path / "sizes.py"
    script.write_text(SIZES, encoding="utf-8")
    path = write_recipe(tmp_path / "recipe.yaml", recipe(corpus))
    launch(2, script, str(path), str(tmp_path))
    for rank in range(2):
        said = (tmp_path / f"rank{rank}.txt").read_text(encoding="utf-8")
        assert said == "dataset_size must be the same on all ranks, not [0, 32]"
