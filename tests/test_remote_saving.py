"""Checkpoints in an object store: saved there by one machine, gone on from by another."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback
from composer.callbacks import CheckpointSaver
from composer.utils import S3ObjectStore
from corpora import draw_corpus, recipe, write_recipe
from runs import assert_same_run, columns_recipe, composer, run, trainer_of, write_columns
from s3 import Bucket
from test_own_trainer import own_trainer
from told import Tell, launched_and_told, one_thread

from clipcov_stream import stored_checkpoints
from clipcov_stream.checkpoints import checkpoints_in
from clipcov_stream.preemption import SaveOnSignal
from clipcov_stream.stored_checkpoints import StoredCheckpoints, newest_stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_columns(tmp_path_factory.mktemp("columns") / "mds", 160)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where uploads are staged; nothing is left there."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(stored_checkpoints, "FIRST_PAUSE", 0.01)
    yield place
    assert not list(place.rglob("*.pt"))


def tree_of(folder: Path, bucket: Bucket | None = None, **settings: Any) -> dict[str, Any]:
    """Eight steps, in epochs of five."""
    tree = {**columns_recipe(folder, run_ahead=2, lag_delay=2), "max_duration": "8ba", "run_name": "told"}
    tree["stream"] |= {"shuffle": True}
    saving = {"save_interval": "100ba", "autoresume": True}
    return {
        **tree,
        **({} if bucket is None else {"save_folder": f"{bucket.url}/runs/{{run_name}}", **saving}),
        **settings,
    }


def saved_in(bucket: Bucket) -> list[str]:
    found = bucket.keys()
    return [key.split("/")[-1] for key in found if key.endswith(".pt")]


def told(tmp_path: Path, tree: dict[str, Any], step: int) -> None:
    """A run that is told to end as a step begins."""
    trainer, _, _ = trainer_of(tmp_path, tree)
    trainer.state.callbacks.append(Tell(step, signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.fit()
    trainer.close()


def test_other_machines_go_on_from_the_newest(
    tmp_path: Path, folder: Path, bucket: Bucket, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice from the same working directory, in which Composer's own resume would find the first one's copy."""
    monkeypatch.chdir(tmp_path)
    straight = run(tmp_path / "straight", tree_of(folder))
    tree = tree_of(folder, bucket)
    told(tmp_path / "first", tree, 2)
    assert bucket.keys() == ["runs/told/.clipcov", "runs/told/ep0-ba3-rank0.pt"]
    shutil.rmtree(machine)
    machine.mkdir()
    told(tmp_path / "second", tree, 5)
    third = run(tmp_path / "third", tree)
    third[0].close()
    assert_same_run(third, straight, skipped=6)
    assert saved_in(bucket) == ["ep0-ba3-rank0.pt", "ep1-ba6-rank0.pt", "ep1-ba8-rank0.pt"]
    with pytest.raises(ValueError, match=r"has ep1-ba8-rank0\.pt, but training begins after step 0.*autoresume=true"):
        trainer_of(tmp_path / "anew", tree | {"autoresume": False})


def test_the_newest_is_by_steps_and_what_else_is_there_is_let_be(bucket: Bucket) -> None:
    assert newest_stored(f"{bucket.url}/a/{{run_name}}", "x") is None
    for name in (
        "a/x/ep0-ba9-rank0.pt",
        "a/x/ep1-ba10-rank0.pt",
        "a/x/ep2-ba10-rank0.pt",
        "a/x/latest-rank0.pt.symlink",
    ):
        bucket.client.put_object(Bucket=bucket.name, Key=name, Body=b"")
    for name in ("a/x/old/ep9-ba99-rank0.pt", "a/xy/ep9-ba99-rank0.pt", "a/x/ep9-ba99-rank0.pt.torn"):
        bucket.client.put_object(Bucket=bucket.name, Key=name, Body=b"")
    assert newest_stored(f"{bucket.url}/a/{{run_name}}", "x") == f"{bucket.url}/a/x/ep2-ba10-rank0.pt"
    assert newest_stored(f"{bucket.url}/a/x/", "") == f"{bucket.url}/a/x/ep2-ba10-rank0.pt"


def test_an_evaluation_that_is_due_is_run_between_two_uploads(tmp_path: Path, bucket: Bucket) -> None:
    corpus = draw_corpus(tmp_path / "corpus")
    tree = recipe(corpus, max_duration="4ba", save_folder=f"{bucket.url}/runs", save_interval="100ba")
    tree |= {"eval": {"shapes": {"local": str(corpus / "eval"), "batch_size": 6}}, "eval_interval": "2ba"}
    seen: list[tuple[list[str], int]] = []

    class Look(Callback):
        def eval_batch_start(self, state: Any, logger: Any) -> None:
            seen.append((saved_in(bucket), num_puts()))

    def num_puts() -> int:
        return sum(method == "PUT" and path.endswith(".pt") for method, path, _ in asked)

    trainer, _, _ = trainer_of(tmp_path, tree | {"run_name": "told"})
    trainer.state.callbacks += [Tell(1, signal.SIGTERM), Look()]
    with bucket.server.asked() as asked, pytest.raises(SystemExit):
        trainer.fit()
    trainer.close()
    assert seen[0][0] == saved_in(bucket) == ["ep0-ba2-rank0.pt"]
    assert num_puts() == 2 * seen[0][1] > 0


def test_an_upload_that_fails_is_tried_again_then_superseded(
    tmp_path: Path, folder: Path, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that is out for one checkpoint costs that one, and is made known; the run goes on."""
    tree = tree_of(folder, bucket, save_interval="2ba", autoresume=False)
    trainer, _, _ = trainer_of(tmp_path, tree)
    (saver,) = (each for each in trainer.state.callbacks if isinstance(each, StoredCheckpoints))

    class Slow(Callback):
        """Steps that take longer than an upload."""

        def batch_start(self, state: Any, logger: Any) -> None:
            if saver._upload is not None:
                saver._upload.exception()

    def out(method: str, path: str, byte_range: str) -> str | None:
        return "error" if method in ("PUT", "POST") and "-ba4-" in path else None

    trainer.state.callbacks.append(Slow())
    with bucket.server.failing(out), caplog.at_level(logging.WARNING):
        trainer.fit()
    trainer.close()
    assert saver.num_given_up == 1
    assert f"checkpoint ep0-ba4-rank0.pt was not uploaded to '{bucket.url}/runs/told' (1 so far): " in caplog.text
    assert [name.split("-")[1] for name in saved_in(bucket)] == ["ba2", "ba6", "ba8"]


def test_training_does_not_wait_for_a_store(
    tmp_path: Path, folder: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While one upload hangs the newest waits its turn, and older ones are given up."""
    hangs, upload = threading.Event(), stored_checkpoints.upload

    def held(url: str, run_name: str, path: Path) -> None:
        hangs.wait(60)
        upload(url, run_name, path)

    class Release(Callback):
        def fit_end(self, state: Any, logger: Any) -> None:
            hangs.set()

    monkeypatch.setattr(stored_checkpoints, "upload", held)
    trainer, _, _ = trainer_of(tmp_path, tree_of(folder, bucket, save_interval="2ba"))
    trainer.state.callbacks.insert(0, Release())
    trainer.fit()
    trainer.close()
    assert saved_in(bucket) == ["ep0-ba2-rank0.pt", "ep1-ba8-rank0.pt"]
    assert "checkpoint ep0-ba4-rank0.pt was not uploaded" in caplog.text and "(2 so far)" in caplog.text


def test_the_last_must_be_there(tmp_path: Path, folder: Path, bucket: Bucket, machine: Path) -> None:
    """And is kept where it was written, under a name that the next start does not remove."""
    trainer, _, _ = trainer_of(tmp_path, tree_of(folder, bucket, max_duration="2ba"))

    def out(method: str, path: str, byte_range: str) -> str | None:
        return "error" if method in ("PUT", "POST") and path.endswith(".pt") else None

    with bucket.server.failing(out), pytest.raises(OSError, match=r"ep0-ba2-rank0\.pt was not uploaded .* it is at "):
        trainer.fit()
    trainer.close()
    (kept,) = machine.rglob("*.not-uploaded")
    again, _, _ = trainer_of(tmp_path / "again", tree_of(folder, bucket, max_duration="1ba"))
    again.fit()
    again.close()
    assert kept.exists()
    kept.unlink()


@pytest.mark.filterwarnings("ignore:No optimizer was specified")
def test_the_last_must_be_there_though_others_steps_came_after(
    bucket: Bucket, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saver that does not save at the end, whose only upload failed in the midst; a newer file is not removed."""

    def fails(*_: object) -> None:
        raise InterruptedError("no store")

    monkeypatch.setattr(stored_checkpoints, "upload", fails)
    saver = StoredCheckpoints(f"{bucket.url}/own", save_interval=lambda state, event: state.timestamp.batch == 2)

    class Slow(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            if saver._upload is not None:
                saver._upload.exception()

    trainer = own_trainer([], callbacks=[saver, Slow()], run_name="own", max_duration="5ba")
    newer = Path(saver.folder.format(run_name="own"), "ep9-ba99-rank0.pt.not-uploaded")
    newer.touch()
    with pytest.raises(OSError, match=r"ep0-ba2-rank0\.pt was not uploaded .* no store; it is at "):
        trainer.fit()
    trainer.close()
    assert sorted(path.name for path in machine.rglob("ep*")) == ["ep0-ba2-rank0.pt.not-uploaded", newer.name]


def test_a_store_that_cannot_be_used_is_found_before_training(tmp_path: Path, folder: Path, bucket: Bucket) -> None:
    with pytest.raises(ValueError, match=r"save_folder='s3://none-such/x' cannot be listed: .*NoSuchBucket"):
        trainer_of(tmp_path / "a", tree_of(folder, bucket, save_folder="s3://none-such/x"))
    with pytest.raises(
        ValueError, match=r"save_folder='sftp://host/x' must be KIND://BUCKET/FOLDER, KIND one of s3, gs"
    ):
        trainer_of(tmp_path / "b", tree_of(folder, bucket, save_folder="sftp://host/x"))
    with pytest.raises(ValueError, match=r"must be KIND://BUCKET/FOLDER"):
        trainer_of(tmp_path / "c", tree_of(folder, bucket, save_folder=bucket.url))
    trainer, recorder, _ = trainer_of(tmp_path / "d", tree_of(folder, bucket))

    def refuses(method: str, path: str, byte_range: str) -> str | None:
        return "missing" if method == "PUT" else None

    with bucket.server.failing(refuses), pytest.raises(OSError, match="cannot be written to, and nothing was trained"):
        trainer.fit()
    trainer.close()
    assert recorder.batches == []
    with pytest.raises(ValueError, match=r"without # and \?"):
        trainer_of(tmp_path / "e", tree_of(folder, bucket, run_name="a#1"))


@pytest.mark.filterwarnings("ignore:No optimizer was specified")
def test_what_would_be_overwritten_or_not_be_found(bucket: Bucket) -> None:
    with pytest.raises(ValueError, match=r"filename='step\{batch\}\.pt': checkpoints in a store are found by"):
        StoredCheckpoints(f"{bucket.url}/own", filename="step{batch}.pt")
    bucket.client.put_object(Bucket=bucket.name, Key="own/ep0-ba9-rank0.pt", Body=b"")
    trainer = own_trainer([], callbacks=[StoredCheckpoints(f"{bucket.url}/own")])
    with pytest.raises(ValueError, match=r"own' has ep0-ba9-rank0\.pt, but training begins after step 0"):
        trainer.fit()
    trainer.close()
    trainer = own_trainer([], callbacks=[StoredCheckpoints(f"{bucket.url}/own", overwrite=True)], max_duration="1ba")
    trainer.fit()
    trainer.close()


def test_a_folder_that_lists_nothing_and_has_something_is_not_new(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Composer's client makes of an empty page."""
    bucket.client.put_object(Bucket=bucket.name, Key="own/.clipcov", Body=b"")
    assert newest_stored(f"{bucket.url}/own", "") is None
    monkeypatch.setattr(S3ObjectStore, "list_objects", lambda store, prefix: [])
    with pytest.raises(ValueError, match=r"own' cannot be listed: OSError: it has \.clipcov and lists nothing"):
        newest_stored(f"{bucket.url}/own", "")
    assert newest_stored(f"{bucket.url}/other", "") is None


def test_composers_own_saver_keeps_what_it_says(tmp_path: Path) -> None:
    """Of which a step's second checkpoint would remove the first, and itself."""
    corpus = draw_corpus(tmp_path / "corpus")
    tree = recipe(corpus, max_duration="4ba", run_name="told")
    tree |= {"eval": {"shapes": {"local": str(corpus / "eval"), "batch_size": 6}}, "eval_interval": "2ba"}
    trainer, _, _ = trainer_of(tmp_path, tree)
    saver = CheckpointSaver(str(tmp_path / "saved"), save_interval="1ba", num_checkpoints_to_keep=1)
    trainer.state.callbacks += [saver, Tell(1, signal.SIGTERM)]
    saver.init(trainer.state, trainer.logger)
    with pytest.raises(SystemExit):
        trainer.fit()
    trainer.close()
    assert [path.name for path in checkpoints_in(tmp_path / "saved")] == ["ep0-ba2-rank0.pt"]


@pytest.mark.filterwarnings("ignore:No optimizer was specified", "ignore:.*resumption.*:UserWarning")
def test_a_trainer_of_ones_own(bucket: Bucket, machine: Path) -> None:
    url, weights = f"{bucket.url}/own", []
    for number, stop in enumerate((2, 9)):
        saver = StoredCheckpoints(url, save_interval="100ba")
        callbacks = [SaveOnSignal(), saver, Tell(stop, signal.SIGTERM)]
        path = newest_stored(url, "own")
        assert (path is None) == (number == 0)
        torch.manual_seed(0)
        trainer = own_trainer([], callbacks=callbacks, run_name="own", max_duration="6ba", load_path=path)
        with pytest.raises(SystemExit) if stop < 6 else nullcontext():
            trainer.fit()
        trainer.close()
        weights.append(trainer.state.model.state_dict())
    torch.manual_seed(0)
    straight = own_trainer([], max_duration="6ba")
    straight.fit()
    assert saved_in(bucket) == ["ep1-ba3-rank0.pt", "ep2-ba6-rank0.pt"]
    assert all(torch.equal(weight, weights[-1][name]) for name, weight in straight.state.model.state_dict().items())
    assert not list(machine.glob("clipcov-*"))


@pytest.mark.parametrize("patient", [True, False])
def test_what_ends_a_run_in_the_midst_of_an_upload(
    tmp_path: Path,
    folder: Path,
    bucket: Bucket,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    patient: bool,
) -> None:
    """After an error what was saved is uploaded; who presses Ctrl-C twice finds the newest on the disk."""
    hangs, upload = threading.Event(), stored_checkpoints.upload

    def held(url: str, run_name: str, path: Path) -> None:
        hangs.wait(60)
        upload(url, run_name, path)

    class Fail(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            if int(state.timestamp.batch) == 5:
                hangs.set() if patient else None
                raise InterruptedError if patient else SystemExit(130)

    monkeypatch.setattr(stored_checkpoints, "upload", held)
    trainer, _, _ = trainer_of(tmp_path, tree_of(folder, bucket, save_interval="2ba"))
    trainer.state.callbacks.append(Fail())
    try:
        trainer.fit()
    except (InterruptedError, SystemExit):
        trainer.close()
    left = [path.name for path in machine.rglob("ep*")]
    if patient:
        assert saved_in(bucket) == ["ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt"] and not left
    else:
        assert saved_in(bucket) == [] and left == ["ep0-ba4-rank0.pt.not-uploaded"]
        assert f"ep0-ba4-rank0.pt was not uploaded to '{bucket.url}/runs/told'" in caplog.text
        assert "ep0-ba4-rank0.pt.not-uploaded'" in caplog.text
    hangs.set()


FAILS = """
import sys, time
from composer import Callback
from clipcov_stream import stored_checkpoints, train
build, upload = train.build_trainer, stored_checkpoints.upload
class Fail(Callback):
    def batch_start(self, state, logger):
        if int(state.timestamp.batch) == 5:
            raise InterruptedError("of a step")
def built(config):
    trainer = build(config)
    trainer.state.callbacks.append(Fail())
    return trainer
def slow(*arguments):
    time.sleep(1)
    upload(*arguments)
train.build_trainer, stored_checkpoints.upload = built, slow
train.main(sys.argv[1], [])
"""


def test_a_recipe_that_fails_uploads_what_it_has_saved(tmp_path: Path, folder: Path, bucket: Bucket) -> None:
    """Which it could not as Python ends."""
    path = write_recipe(tmp_path / "recipe.yaml", tree_of(folder, bucket, save_interval="2ba"))
    script = tmp_path / "fails.py"
    script.write_text(FAILS, encoding="utf-8")
    command = [sys.executable, str(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=one_thread())
    assert done.returncode == 1 and "InterruptedError: of a step" in done.stderr
    assert saved_in(bucket) == ["ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt"]


def test_a_signal_while_the_last_is_uploaded_waits_for_it(
    tmp_path: Path, folder: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = stored_checkpoints.upload

    def told_meanwhile(url: str, run_name: str, path: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        upload(url, run_name, path)

    monkeypatch.setattr(stored_checkpoints, "upload", told_meanwhile)
    monkeypatch.setattr(stored_checkpoints, "SLICE", 0.1)
    trainer, _, _ = trainer_of(tmp_path, tree_of(folder, bucket, max_duration="1ba"))
    trainer.fit()
    trainer.close()
    assert saved_in(bucket) == ["ep0-ba1-rank0.pt"]


KILLED = """
import os, signal, sys, time
from composer import Callback
from clipcov_stream import stored_checkpoints
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer
upload = stored_checkpoints.upload
def held(url, run_name, path):
    if "-ba6-" in path.name:
        time.sleep(600)
    upload(url, run_name, path)
stored_checkpoints.upload = held
class Kill(Callback):
    def before_train_batch(self, state, logger):
        step = int(state.timestamp.batch)
        if step == 4:
            saver._upload.exception()
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
trainer = build_trainer(load_config(sys.argv[1]))
saver, = (each for each in trainer.state.callbacks if isinstance(each, stored_checkpoints.StoredCheckpoints))
trainer.state.callbacks.append(Kill())
trainer.fit()
"""


def test_a_run_killed_in_the_midst_of_an_upload_goes_on_from_the_one_before(
    tmp_path: Path, folder: Path, bucket: Bucket, machine: Path
) -> None:
    """And leaves nothing behind that the next start does not remove."""
    straight = run(tmp_path / "straight", tree_of(folder))
    tree = tree_of(folder, bucket, save_interval="3ba")
    path, script = write_recipe(tmp_path / "recipe.yaml", tree), tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script), str(path)], timeout=120, check=False, env=one_thread())
    assert done.returncode == -signal.SIGKILL
    assert [file.name for file in machine.rglob("*.pt")] == ["ep1-ba6-rank0.pt"]
    assert saved_in(bucket) == ["ep0-ba3-rank0.pt"]
    again = run(tmp_path / "again", tree)
    again[0].close()
    assert_same_run(again, straight, skipped=3)


@pytest.mark.alone
def test_ranks_that_are_all_told_to_end_upload_first(
    tmp_path: Path, folder: Path, bucket: Bucket, machine: Path
) -> None:
    """A real launcher, whose whole process group gets the signal; and both go on from there."""
    metrics = tmp_path / "metrics.jsonl"
    tree = tree_of(folder, bucket, max_duration="100000ba", save_interval="3ba", metrics_file=str(metrics))
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    command = [*composer(), "-n", "2", "-m", "clipcov_stream", str(path)]
    said = launched_and_told(command, tmp_path, metrics, signal.SIGTERM, True, 25)
    newest = newest_stored(tree["save_folder"], "told")
    assert newest is not None, said
    step = int(newest.split("-ba")[1].split("-")[0])
    assert f"ends after step {step:,}; saved" in said
    command += [f"max_duration={step + 1}ba"]
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=one_thread())
    assert f"told: goes on from step {step:,}" in resumed.stdout and resumed.returncode == 0, resumed.stderr
