"""Keys of a recipe that are handed on to Composer, Streaming or PyTorch: that they arrive, and a run still runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import draw_corpus, recipe, write_recipe
from runs import launch, run, trainer_of

TIMEOUT = """
import sys
import torch
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer, leave_group
trainer = build_trainer(load_config(sys.argv[1]))
trainer.fit()
groups = [torch.distributed.group.WORLD]
print("waits", *(group._get_backend(torch.device("cpu")).options._timeout for group in groups))
trainer.close()
leave_group()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


@pytest.mark.parametrize(
    "selection", [{}, {"selector": "rho", "warmup": 0}, {"embed": "online", "proxy": {"width": 4}}]
)
def test_a_compiled_model_trains_as_it_would(tmp_path: Path, corpus: Path, selection: dict[str, Any]) -> None:
    """Traced but not compiled: then even the last bit is the same."""
    split = {"tasks": ["zeroshot", "retrieval"], "local": str(corpus / "eval"), "batch_size": 9}
    tree = recipe(corpus, selection=selection, eval={"shapes": split}, eval_interval="3ba")
    plain, plain_seen, _ = run(tmp_path / "plain", tree)
    traced, traced_seen, _ = run(tmp_path / "traced", {**tree, "compile_config": {"backend": "eager"}})
    assert "forward" in vars(traced.state.model) and "forward" not in vars(plain.state.model)
    for ours, theirs in zip(traced_seen.batches, plain_seen.batches, strict=True):
        assert torch.equal(ours, theirs)
    own = traced.state.model.state_dict()
    for name, value in plain.state.model.state_dict().items():
        assert torch.equal(own[name], value), name


def test_a_checkpoint_is_written_again_where_asked(tmp_path: Path, corpus: Path) -> None:
    tree = recipe(
        corpus, save_folder=str(tmp_path / "saved"), save_interval="2ba", max_duration="2ba", selection={"warmup": 0}
    )
    run(tmp_path / "first", tree)
    saved = tmp_path / "saved" / "ep0-ba2-rank0.pt"
    before = saved.stat().st_mtime_ns
    with pytest.raises(ValueError, match="or set save_overwrite=true"):
        trainer_of(tmp_path / "second", tree)
    assert saved.stat().st_mtime_ns == before
    run(tmp_path / "third", {**tree, "save_overwrite": True})
    assert saved.stat().st_mtime_ns > before


def test_workers_keep_as_many_pools_as_asked(tmp_path: Path, corpus: Path) -> None:
    tree = recipe(corpus)
    tree["stream"] |= {"num_workers": 1, "prefetch_factor": 3, "download_retry": 5, "download_timeout": 7}
    trainer, _, _ = trainer_of(tmp_path, tree)
    loader: Any = trainer.state.dataloader
    assert loader.prefetch_factor == 3
    assert (loader.dataset.stream.download_retry, loader.dataset.stream.download_timeout) == (5, 7)
    trainer.fit()
    trainer.close()


def test_metrics_go_to_the_console_where_asked(tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer, _, _ = run(tmp_path, recipe(corpus, log_to_console=True, console_log_interval="2ba"))
    trainer.close()
    said = "".join(capfd.readouterr())
    assert 3 <= said.count("selection/samples_seen") < 6  # of six steps, the first beside every second


def test_ranks_wait_for_one_another_as_long_as_asked(tmp_path: Path, corpus: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(TIMEOUT, encoding="utf-8")
    path = write_recipe(tmp_path / "recipe.yaml", recipe(corpus, dist_timeout=77, max_duration="1ba"))
    assert launch(2, script, str(path)).count("waits 0:01:17") == 2
