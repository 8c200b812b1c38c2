"""The commands a user types, in processes of their own: the composer launcher, the recipes, the quickstart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import quickstart
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from streaming import MDSWriter

from clipcov_stream.clock import check_interval
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer, train

ROOT = Path(__file__).resolve().parent.parent
TINY = f"model.config={json.dumps(TINY_MODEL)}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


def composer(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`composer ARGUMENTS`, run in the project's root."""
    command = [str(Path(sys.executable).with_name("composer")), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment, check=False)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def last_metrics(path: Path) -> dict[str, float]:
    merged: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        merged.update(json.loads(line))
    return merged


def test_the_quickstart_recipe_trains_on_two_ranks(tmp_path: Path, corpus: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    done = composer(
        *("-n", "2", "yamls/quickstart.yaml", "max_duration=4ba", "selection.warmup=2ba", "eval_interval=4ba"),
        *(TINY, "stream.global_pool_size=80", "stream.num_workers=0"),
        *(f"stream.local={corpus / 'train'}", f"eval.shapes.local={corpus / 'eval'}", f"metrics_file={metrics}"),
        f"gallery={tmp_path / 'gallery'}",
    )
    figures = last_metrics(metrics)
    assert figures["selection/samples_streamed"] == 4 * 80
    assert figures["selection/samples_seen"] == 4 * 16
    assert 0 <= figures["metrics/shapes/mean_per_class"] <= 1
    ended = done.stdout[done.stdout.index("quickstart_clipcov_0: ") :].splitlines()
    assert ended[0] == "quickstart_clipcov_0: 4 steps, 320 samples streamed, 64 seen"
    assert f"  shapes/mean_per_class: {figures['metrics/shapes/mean_per_class']:.4f}" in ended
    assert f"  metrics: {metrics}" in ended and done.stdout.count("samples streamed") == 1


@pytest.mark.parametrize("embed", ["online", "teacher"])
def test_the_literal_cc12m_command_trains_on_a_local_folder(tmp_path: Path, corpus: Path, embed: str) -> None:
    metrics = tmp_path / "metrics.jsonl"
    other = [] if embed == "online" else [f"selection.embed={embed}"]
    composer(
        *("yamls/clip_cc12m.yaml", "model.name=null", TINY, f"stream.local={corpus / 'train'}"),
        *("stream.global_pool_size=40", "stream.num_workers=0", "max_duration=4ba", "precision=fp32"),
        *("selection.warmup=1ba", f"save_folder={tmp_path / 'checkpoints'}", f"metrics_file={metrics}", *other),
        *(f"ledger={tmp_path / 'ledger'}", f"gallery={tmp_path / 'gallery'}"),
    )
    assert last_metrics(metrics)["selection/samples_seen"] == 4 * 8
    assert (tmp_path / "ledger" / "rank00000.ledger").exists() and (tmp_path / "gallery" / "gallery.jsonl").exists()
    assert (tmp_path / "checkpoints" / "latest-rank0.pt").exists()


def test_module_form_takes_any_recipe(tmp_path: Path, corpus: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    path = write_recipe(tmp_path / "any.yaml", recipe(corpus))
    composer("-n", "1", "-m", "clipcov_stream", str(path), "max_duration=2ba", f"metrics_file={metrics}")
    assert last_metrics(metrics)["selection/samples_seen"] == 2 * 8


def test_without_data_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    done = composer(
        "yamls/clip_cc12m.yaml", f"stream.local={tmp_path}", "precision=fp32", f"save_folder={tmp_path}", check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "has no index.json" in said
    assert "img2dataset" in said
    assert "Traceback" not in said.split("error:")[-1]


def test_who_has_data_is_not_told_how_to_get_it(tmp_path: Path, corpus: Path) -> None:
    tree = recipe(corpus, stream={"how_to_get": "Draw it first."}, selection={"embed": "columns"})
    with pytest.raises(ValueError, match=r"embed_mds\.py") as caught:
        build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", tree))))
    assert "Draw it first" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"stream": {"global_pool_size": 30}},
            r"pool_size=30 \* .*ratio=0.75\) = 7.5 survivors; .* pool of 28 or 32 per",
        ),
        ({"selection": {"filter_ratio": 1.5}}, r"selection.filter_ratio=1.5 must be in \[0, 1\)"),
        ({"selection": {"filter_ratio": 0.96875}}, "= 1 survivors per rank; a contrastive loss needs at least 2"),
        ({"device_train_microbatch_size": 4}, "device_train_microbatch_size=4 must be the survivors per rank, 8"),
        ({"device_train_microbatch_size": "auto"}, "'auto' changes a contrastive loss's negatives"),
        ({"selection": {"selector": "best"}}, "selection.selector='best' is not one of"),
        ({"selection": {"filter_ration": 0.5}}, "selection.filter_ration is not a config key; did you mean 'filter_r"),
        ({"model": {"config": None, "name": "ViT-B-33"}}, "model.name='ViT-B-33' is not an open_clip model"),
        ({"model": {"config": {"embed_dim": 4}}}, "open_clip cannot build"),
        ({"stream": {"local": "nowhere"}}, "stream.local 'nowhere' has no index.json"),
        ({"stream": {"columns": {"caption": "text"}}}, r"no column 'text' \(stream.columns.caption\)"),
        ({"stream": {"global_pool_size": 4096}}, "192 samples per rank, one pool needs 4096"),
        ({"max_duration": "100sp"}, "max_duration='100sp' must be in batches"),
        ({"eval_interval": 2000}, "eval_interval=2000 would be in epochs .*: 2000ba for batches, 1ep for every epoch"),
        ({"eval_interval": -1}, "eval_interval=-1 would be in epochs"),
        ({"scheduler": {"t_warmup": "1ep"}}, "scheduler.t_warmup='1ep' must be in 'dur' or as max_duration='6ba'"),
        ({"scheduler": {"t_warmup": "soon"}}, "scheduler.t_warmup='soon' is not a Composer time"),
        (
            {"stream": {"columns": {"caption": "class_id"}}},
            r"stream.columns.caption\) is encoded as 'int",
        ),
        ({"optimizer": {"name": "adam"}}, "optimizer.name='adam' is not one of"),
        ({"scheduler": {"name": "step"}}, "scheduler.name='step' is not one of"),
        ({"scheduler": {"name": "constant", "alpha_f": 0.1}}, "scheduler.alpha_f=0.1 has no effect with name='const"),
        ({"optimizer": {"name": "sgd", "eps": 1e-3}}, "optimizer.eps=0.001 has no effect with name='sgd'"),
        ({"optimizer": {"name": "adamw", "momentum": 0.5}}, "optimizer.momentum=0.5 has no effect with name='adamw'"),
        (
            {"optimizer": {"name": "decoupled_adamw", "weight_decay": 0.1}},
            r"optimizer.weight_decay=0.1 must be at most 0.001 .* multiply weights by 0.9\. Leave it out for 1e-05",
        ),
        ({"callbacks": {"speed_monitr": {}}}, "callbacks.speed_monitr is not one of Composer's callbacks"),
        ({"callbacks": {"speed_monitor": {"windo": 1}}}, "callbacks.speed_monitor: .*windo"),
        (
            {"eval": {"x": {"remote": "s3://b/x"}}},
            r"eval.x.remote='s3://b/x' needs eval.x.local, the folder where shards",
        ),
        ({"stream": {"num_workers": -1}}, "stream.num_workers=-1 must be at least 0"),
        ({"stream": {"prefetch_factor": 0, "num_workers": 1}}, "stream.prefetch_factor=0 must be at least 1"),
        ({"stream": {"prefetch_factor": -1}}, "stream.prefetch_factor=-1 must be at least 1"),
        ({"stream": {"num_canonical_nodes": -1}}, "stream.num_canonical_nodes=-1 must be at least 0"),
        ({"stream": {"decode_threads": 0}}, "stream.decode_threads=0 must be at least 1, or null"),
        ({"stream": {"decode_threads": -1}}, "stream.decode_threads=-1 must be at least 1, or null"),
        ({"eval": {"x": {"local": "nowhere", "batch_size": 0}}}, "eval.x.batch_size=0 must be at least 1"),
        ({"eval": {"x": {"dataset": "folder", "root": "w", "num_workers": -1}}}, "eval.x.num_workers=-1 must be at l"),
        ({"eval_suite": {"root": "nowhere", "batch_size": 0}}, "eval_suite.batch_size=0 must be at least 1"),
        ({"compile_config": {"backend": "nope"}}, "compile_config={'backend': 'nope'} is not for torch.compile: Inv"),
        ({"compile_config": {"nokey": 1}}, "compile_config={'nokey': 1} is not for torch.compile: .* 'nokey'"),
        ({"eval": {"x": {"tasks": ["segment"], "local": "nowhere"}}}, r"eval.x.tasks=\['segment'\] must be some of"),
    ],
)
def test_bad_recipes_stop_before_training(
    tmp_path: Path, corpus: Path, sections: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", recipe(corpus, **sections)))))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": "uid"}, r"'uid' of .* \(eval\.x\.columns\.label\) is encoded as 'str'; it must be 'int'"),
        ({"image": "nope"}, r"^eval\.x: .* has no column 'nope' \(eval\.x\.columns\.image\)"),
        ({"caption": "label"}, r"\(eval\.x\.columns\.caption\) is encoded as 'int'; it must be 'str'"),
        (
            {"label": "number"},
            r"eval\.x: sample 6 of .* has the label 6 \(eval\.x\.columns\.label='number'\), but "
            r"classes\.json names 6 classes, 0 to 5",
        ),
        ({"label": "below"}, r"eval\.x: sample 0 of .* has the label -1 "),
    ],
)
def test_evaluation_columns_are_looked_at_before_training(
    tmp_path: Path, corpus: Path, columns: dict[str, str], message: str
) -> None:
    kinds = {"image": "bytes", "caption": "str", "label": "int", "uid": "str", "number": "int16", "below": "int64"}
    with MDSWriter(out=str(tmp_path / "split"), columns=kinds, size_limit=1000) as writer:
        for number in range(9):
            own = {"image": bytes(100 * number), "caption": "c" * number, "uid": f"u{number}", "label": number % 6}
            writer.write({**own, "number": number, "below": number - 1})
    shutil.copy(corpus / "eval" / "classes.json", tmp_path / "split")
    split = {"tasks": ["zeroshot", "retrieval"], "local": str(tmp_path / "split"), "columns": columns}
    with pytest.raises(ValueError, match=message):
        build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", recipe(corpus, eval={"x": split})))))


@pytest.mark.parametrize("interval", [0, 1, "1ep", "2000ba", "0.1dur"])
def test_an_evaluation_interval_has_a_unit_or_none_to_mistake(interval: str | int) -> None:
    check_interval(interval, "eval_interval")


def test_retrieval_over_empty_captions_is_refused(tmp_path: Path, corpus: Path) -> None:
    with MDSWriter(out=str(tmp_path / "labelled"), columns={"image": "bytes", "caption": "str"}) as writer:
        writer.write({"image": b"", "caption": " "})
    split = {"tasks": ["retrieval"], "local": str(tmp_path / "labelled")}
    with pytest.raises(ValueError, match=r"eval\.x\.tasks has retrieval, but captions in .* are empty"):
        build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", recipe(corpus, eval={"x": split})))))


def test_autoresume_goes_on_from_the_newest_checkpoint(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = recipe(
        corpus, run_name="again", autoresume=True, save_interval="2ba", save_folder=str(tmp_path / "checkpoints")
    )
    path = str(write_recipe(tmp_path / "recipe.yaml", tree))
    first = build_trainer(load_config(path, ["max_duration=2ba", "selection.warmup=1ba"]))
    train(first)
    first.close()
    assert "goes on" not in capsys.readouterr().out
    second = build_trainer(load_config(path, ["max_duration=5ba", "selection.warmup=1ba"]))
    assert int(second.state.timestamp.batch) == 2
    train(second)
    assert int(second.state.timestamp.batch) == 5
    assert "again: goes on from step 2\n" in capsys.readouterr().out


def test_a_short_epoch_is_an_error(tmp_path: Path, corpus: Path) -> None:
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", recipe(corpus)))))
    dataset = trainer.state.dataloader.dataset  # pyright: ignore
    ids = dataset._get_work
    # What Streaming does when a shard cannot be read: the iterator just ends.
    dataset._get_work = lambda epoch, sample: ids(epoch, sample)[:64]
    with pytest.raises(RuntimeError, match="epoch 0 ended after 2 of 6 pools"):
        trainer.fit()


def test_quickstart_tool_compares_two_runs(tmp_path: Path, corpus: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "tools/quickstart.py", "--data", str(corpus), "--out", str(tmp_path), "--steps", "4"),
            *(TINY, "stream.global_pool_size=40", "stream.num_workers=0", "selection.warmup=2ba", "eval_interval=2ba"),
            "eval_first=true",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert [run["selector"] for run in result["runs"]] == ["random", "clipcov"]
    for run in result["runs"]:
        assert [point["samples_seen"] for point in run["curve"]] == [0, 2 * 8, 4 * 8]
        assert [point["samples_streamed"] for point in run["curve"]] == [0, 2 * 40, 4 * 40]
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    assert f"report: {tmp_path / 'report.html'}" in done.stdout
    for name in ("random_0", "clipcov_0"):
        assert (tmp_path / name / "checkpoints" / "latest-rank0.pt").exists() and any(
            (tmp_path / name / "ledger").iterdir()
        )
    assert "clipcov against random" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_quickstart_takes_the_corpus_that_is_there_and_says_if_it_cannot_draw_one(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quickstart.draw(corpus)
    assert capfd.readouterr().out == ""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("not to be lost")
    with pytest.raises(SystemExit, match=r"data could not be drawn, exit code [12]"):
        quickstart.draw(tmp_path / "data")
    assert "is not empty; give another folder" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.txt"]
