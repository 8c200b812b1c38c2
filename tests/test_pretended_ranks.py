"""Ranks on pretended CUDA devices: what NCCL would refuse, and that ranks agree all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import draw_corpus, recipe, write_recipe
from runs import assert_same, launch

from clipcov_stream import kernels

RANKS = """
import sys
from unittest import mock
sys.path.insert(0, sys.argv[3])
import torch
from composer.utils import dist
from clipcov_stream import ClipCov
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer, leave_group
from pretended import DevicePretended, averaging_gradients, pretended_cuda, taken_back
with (
    pretended_cuda(),
    mock.patch("composer.trainer.trainer.get_device", lambda _: DevicePretended()),
    mock.patch("composer.trainer.trainer.prepare_ddp_module", averaging_gradients),
):
    trainer = build_trainer(load_config(sys.argv[1]))
    trainer.fit()
    clipcov = next(a for a in trainer.state.algorithms if isinstance(a, ClipCov))
    assert clipcov.selection.lag.is_cuda and next(trainer.state.model.parameters()).is_cuda
    state = {"algorithm": clipcov.state_dict(), "model": trainer.state.model.state_dict()}
    torch.save(taken_back(state), f"{sys.argv[2]}/rank{dist.get_global_rank()}.pt")
    trainer.close()
leave_group()
"""

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not kernels.AVAILABLE, reason="needs Triton's interpreter, which is for CPUs"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


@pytest.mark.parametrize(
    "selection",
    [
        {"embed": "teacher"},
        {"embed": "teacher", "scope": "global"},
        {"embed": "teacher", "selector": "dissect"},
        {"embed": "online", "copies": 1.0},
        {"embed": "online", "scope": "global"},
        {"embed": "online", "scope": "global", "run_ahead": 1, "lag_delay": 1},
    ],
    ids=lambda selection: "-".join(map(str, selection.values())),
)
def test_two_ranks_agree_there_too(tmp_path: Path, corpus: Path, selection: dict[str, Any]) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    path = write_recipe(
        tmp_path / "recipe.yaml", recipe(corpus, selection={"run_ahead": 0, "lag_delay": 0, **selection})
    )
    launch(2, script, str(path), str(tmp_path), str(Path(__file__).parent))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(ranks[0], ranks[1])
    assert ranks[0]["algorithm"]["samples_seen"] == 6 * 8
