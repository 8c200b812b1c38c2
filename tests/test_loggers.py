"""TensorBoard, W&B and MLflow by the card's two lines of YAML: real runs, read back by each one's own reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from corpora import draw_corpus, recipe, write_recipe

from clipcov_stream.zeroshot import RETRIEVAL_METRICS, ZEROSHOT_METRICS

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, dict[int, float]]
"""metric -> step -> value"""
# wandb and mlflow, at the versions that Composer allows, warn while they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def from_tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (folder / "runs" / "tensorboard").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def from_wandb(folder: Path) -> Found:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    store, found = DataStore(), {}
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if isinstance(value, (int, float)):
                found.setdefault(name, {})[int(row.get("_step", record.history.step.num))] = float(value)
    return found


def from_mlflow(folder: Path) -> Found:
    from mlflow import MlflowClient

    client = MlflowClient(str(folder / "runs" / "mlflow"))
    experiment = client.get_experiment_by_name("clipcov")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: {metric.step: metric.value for metric in values} for name, values in history.items()}


def card_loggers() -> dict[str, dict[str, str]]:
    """The loggers of the method card's YAML, by name."""
    text = (ROOT / "clipcov_stream" / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    found = {}
    for block in blocks:
        section = yaml.safe_load(block)
        if "loggers" in section:
            assert len(block.strip().splitlines()) == 2
            found |= section["loggers"]
    return found


def train(folder: Path, loggers: dict[str, dict[str, str]]) -> Found:
    """A run with these loggers, in `folder`; what its metrics file has of it."""
    corpus = draw_corpus(folder / "shapes")
    split = {"local": str(corpus / "eval"), "tasks": ["zeroshot", "retrieval"]}
    tree = recipe(corpus, run_name="logged", loggers=loggers, eval={"shapes": split}, eval_interval="3ba")
    del tree["selection"]["soft_start"]  # what the default logs
    tree["selection"]["copies"], tree["stream"]["min_scale"] = 3.0, 1.0  # and what is off by default
    path = write_recipe(folder / "recipe.yaml", {**tree, "metrics_file": str(folder / "metrics.jsonl")})
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "clipcov_stream", str(path)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found: Found = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name.startswith(("selection/", "metrics/")):
                found.setdefault(name, {})[row["step"]] = value
    return found


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("tensorboard", from_tensorboard),
        pytest.param("wandb", from_wandb, marks=pytest.mark.slow),
        pytest.param("mlflow", from_mlflow, marks=pytest.mark.slow),
    ],
)
def test_a_logger_has_every_metric_of_selection_and_evaluation(
    tmp_path: Path, name: str, read: Callable[[Path], Found]
) -> None:
    pytest.importorskip(name, reason=f"{name} is in the extra `loggers`")
    ours = train(tmp_path, {name: card_loggers()[name]})
    theirs = read(tmp_path)
    assert sum(metric.startswith("selection/") for metric in ours) > 10
    assert {f"metrics/shapes/{metric}" for metric in (*ZEROSHOT_METRICS, *RETRIEVAL_METRICS)} <= ours.keys()
    assert ours.keys() <= theirs.keys()
    for metric, values in ours.items():
        # mlflow leaves out a value that is the last one's, so values are looked for, not counted.
        known = sorted(values.values())
        for step, value in theirs[metric].items():
            assert any(value == pytest.approx(other, rel=1e-5, abs=1e-9) for other in known), (metric, step, value)
        last = list(values.values())[-1]
        assert list(theirs[metric].values())[-1] == pytest.approx(last, rel=1e-5, abs=1e-9)


def first_columns(path: Path, title: str) -> set[str]:
    """The names in backticks in the first column of the table whose header has `title`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| metric (`" + title))
    names: set[str] = set()
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        names |= set(line.split("|")[1].split("`")[1::2])
    return names


def test_the_tables_name_what_a_run_logs(tmp_path: Path) -> None:
    ours = train(tmp_path, {})
    logged = {name.removeprefix("selection/") for name in ours if name.startswith("selection/")}
    assert logged == first_columns(ROOT / "clipcov_stream" / "README.md", "selection/")
    evaluated = {name.removeprefix("metrics/shapes/") for name in ours if name.startswith("metrics/shapes/")}
    assert evaluated == first_columns(ROOT / "clipcov_stream" / "README.md", "metrics/NAME/")
