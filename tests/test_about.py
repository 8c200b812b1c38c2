"""What a run says of itself beside its metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import draw_corpus, recipe, write_recipe
from run_files import find_runs, grouped, random_twins, read_run
from runs import Interrupt

from clipcov_stream.about import plain
from clipcov_stream.config import load_config
from clipcov_stream.records import about_path
from clipcov_stream.train import build_trainer


def test_the_recipe_and_versions_stand_beside_the_metrics(tmp_path: Path) -> None:
    corpus = draw_corpus(tmp_path / "shapes", samples=64, eval_per_class=1)
    path = write_recipe(tmp_path / "recipe.yaml", recipe(corpus, metrics_file=str(tmp_path / "run" / "metrics.jsonl")))
    overrides = ["max_duration=2ba", "selection.warmup=1ba"]
    config = load_config(str(path), overrides)
    stopped = build_trainer(config)
    stopped.state.callbacks.append(Interrupt(1))
    with pytest.raises(InterruptedError):
        stopped.fit()
    about: dict[str, Any] = json.loads((tmp_path / "run" / "metrics.about.json").read_text())
    assert about["started"] and about["ended"] is None
    trainer = build_trainer(config)
    with pytest.warns(UserWarning, match="had lines, but the run starts anew"):
        trainer.fit()
    about = json.loads(about_path(tmp_path / "run" / "metrics.jsonl").read_text())
    assert about["ended"] >= about["started"]
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert about["num_parameters"] == sum(each.numel() for each in trainer.state.model.parameters())
    # It can be trained again: the recipe is one that the parser takes, and means the same; how far it ran ahead of
    # training and how long lags waited, if the recipe left that open, is said.
    again = load_config(str(write_recipe(tmp_path / "again.yaml", about["recipe"])))
    assert again == replace(config, selection=replace(config.selection, run_ahead=0, lag_delay=0))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "selection/step_ms" in row]
    assert steps and all(row["selection/step_ms"] >= row["selection/wait_ms"] > 0 for row in steps)


@pytest.mark.parametrize("embed", ["teacher", "online"])
def test_a_run_and_its_random_twin_are_of_one_recipe(tmp_path: Path, embed: str) -> None:
    """Whatever the recipe leaves open for one of them to decide: else a report would not find the twin."""
    corpus = draw_corpus(tmp_path / "shapes", samples=64, eval_per_class=1)
    for selector in ("random", "clipcov"):
        places = {"run_name": selector, "metrics_file": str(tmp_path / "runs" / "{run_name}" / "metrics.jsonl")}
        tree = recipe(
            corpus, selection={"selector": selector, "embed": embed, "warmup": 0}, max_duration="1ba", **places
        )
        trainer = build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", tree))))
        trainer.fit()
        trainer.close()
    groups = grouped([read_run(path) for path in find_runs(tmp_path / "runs")])
    assert {name: len(runs) for name, runs in groups.items()} == {"random": 1, "clipcov": 1}
    assert random_twins(groups) == {"random": None, "clipcov": "random"}


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("api_key", "abc", "***"),
        ("WANDB_API_KEY", "abc", "***"),
        ("password", "abc", "***"),
        ("remote", "sftp://me:secret@host:22/path", "sftp://***@host:22/path"),
        ("aws_access_key_id", "abc", "***"),
        ("headers", {"Authorization": "Bearer abc"}, {"Authorization": "***"}),
        ("credentials", {"user": "me"}, "***"),
        ("remote", "s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("tokenizer_name", "bert", "bert"),
        ("pass", "", ""),
        ("betas", (0.9, 0.98), [0.9, 0.98]),
        ("what", Path("x"), repr(Path("x"))),
    ],
)
def test_secrets_are_not_written(key: str, value: Any, written: Any) -> None:
    assert plain({"section": {key: value}}) == {"section": {key: written}}
