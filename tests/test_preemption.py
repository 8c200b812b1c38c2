"""Runs that are told to end save where they stand, and go on as if they had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback
from corpora import draw_corpus, opened, recipe, write_recipe
from forked import run_forked
from runs import assert_same_run, columns_recipe, composer, run, run_ranks, synthetic_bytes, trainer_of, write_columns
from told import Tell, launched_and_told, one_thread
from torch.utils.data._utils import signal_handling

from clipcov_stream.checkpoints import checkpoints_in
from clipcov_stream.eval_data import ImagesDataset, image_loader
from clipcov_stream.image_sets import LabelledImages
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.preemption import SaveOnSignal
from clipcov_stream.stream import pool_loader

AHEAD = {"run_ahead": 2, "lag_delay": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_columns(tmp_path_factory.mktemp("columns") / "mds", 160)


def tree_of(folder: Path, saved: Path | None = None, **stream: Any) -> dict[str, Any]:
    """Eight steps, in epochs of five; a checkpoint by the clock only at the end."""
    tree = {**columns_recipe(folder, **AHEAD), "max_duration": "8ba", "run_name": "told"}
    tree["stream"] |= {"shuffle": True, **stream}
    saving = {"save_folder": str(saved), "save_interval": "100ba", "autoresume": True}
    return tree if saved is None else {**tree, **saving}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("step", "numbers"),
    [
        (0, (signal.SIGTERM,)),
        (3, (signal.SIGINT, signal.SIGTERM, signal.SIGTERM)),  # as from a terminal and then from a launcher
        (2, (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)),  # the launcher's overtook it
        (4, (signal.SIGTERM,)),  # the last of an epoch
        (6, (signal.SIGINT,)),
    ],
)
def test_a_run_that_was_told_to_end_loses_no_step(
    tmp_path: Path,
    folder: Path,
    num_workers: int,
    step: int,
    numbers: tuple[int, ...],
    capfd: pytest.CaptureFixture[str],
) -> None:
    straight = run(tmp_path / "straight", tree_of(folder))
    tree = tree_of(folder, tmp_path / "saved", num_workers=num_workers)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer, recorder, _ = trainer_of(tmp_path, tree)
    trainer.state.callbacks.append(Tell(step, *numbers))
    with pytest.raises(SystemExit) as told:
        trainer.fit()
    assert told.value.code == 128 + numbers[0]
    os.kill(os.getpid(), signal.SIGTERM)  # of a launcher, which is late
    trainer.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    name = signal.Signals(numbers[0]).name
    said = capfd.readouterr()
    assert f"{name}: ends after this step" in said.err
    assert f"told: {name}, ends after step {step + 1}; saved" in said.out
    (checkpoint,) = checkpoints_in(tmp_path / "saved")
    assert checkpoint.name.endswith(f"-ba{step + 1}-rank0.pt")
    assert len(recorder.batches) == step + 1
    resumed = run(tmp_path, tree)
    assert_same_run(resumed, straight, skipped=step + 1)


def test_what_is_never_saved_still_ends_in_order(
    tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer, recorder, _ = trainer_of(tmp_path, tree_of(folder))
    trainer.state.callbacks.append(Tell(2, signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.fit()
    trainer.close()
    assert len(recorder.batches) == 3 and "nothing is saved: no save_folder" in capfd.readouterr().out


@pytest.mark.parametrize("before", [(), (signal.SIGTERM,)])
def test_a_second_interrupt_ends_at_once(tmp_path: Path, folder: Path, before: tuple[int, ...]) -> None:
    trainer, _, _ = trainer_of(tmp_path, tree_of(folder, tmp_path / "saved"))
    trainer.state.callbacks.append(Tell(2, *before, signal.SIGINT, signal.SIGINT))
    with pytest.raises(SystemExit) as told:
        trainer.fit()
    trainer.close()
    assert told.value.code == 128 + signal.SIGINT
    assert checkpoints_in(tmp_path / "saved") == []


def test_a_checkpoint_that_is_due_is_written_once(tmp_path: Path, folder: Path) -> None:
    """Its saver may come before or after."""
    for first in (True, False):
        tree = tree_of(folder, tmp_path / f"saved{first}") | {"save_interval": "3ba"}
        trainer, _, _ = trainer_of(tmp_path / f"{first}", tree)
        callbacks = trainer.state.callbacks
        callbacks.sort(key=lambda each: isinstance(each, SaveOnSignal) != first)
        callbacks.append(Tell(2, signal.SIGTERM))
        with pytest.raises(SystemExit):
            trainer.fit()
        trainer.close()
        assert [path.name for path in checkpoints_in(tmp_path / f"saved{first}")] == ["ep0-ba3-rank0.pt"]


def test_a_run_whose_last_step_it_is_ends_as_ever(tmp_path: Path, folder: Path) -> None:
    trainer, recorder, _ = trainer_of(tmp_path, tree_of(folder, tmp_path / "saved"))
    trainer.state.callbacks.append(Tell(7, signal.SIGTERM))
    trainer.fit()
    assert len(recorder.batches) == 8 and checkpoints_in(tmp_path / "saved")[0].name == "ep1-ba8-rank0.pt"


@pytest.mark.parametrize("at", ["before_train_batch", "eval_batch_start"])
def test_an_evaluation_that_is_due_is_run_between_two_checkpoints(tmp_path: Path, at: str) -> None:
    corpus = draw_corpus(tmp_path / "corpus")
    tree = recipe(corpus, max_duration="4ba", save_folder=str(tmp_path / "saved"), save_interval="100ba")
    tree |= {"eval": {"shapes": {"local": str(corpus / "eval"), "batch_size": 6}}, "eval_interval": "2ba"}
    tree |= {"metrics_file": str(tmp_path / "metrics.jsonl"), "run_name": "told", "autoresume": True}
    straight = run(tmp_path / "straight", {**tree, "save_folder": None, "metrics_file": None, "autoresume": False})

    class TellNow(Callback):
        ended, there = 0, False

        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            step = int(state.timestamp.batch)
            if event.value == at and step == (1 if at == "before_train_batch" else 2):
                os.kill(os.getpid(), signal.SIGTERM)
            if event.value == "eval_end":
                self.ended += 1
                self.there = bool(checkpoints_in(tmp_path / "saved"))

    trainer, recorder, _ = trainer_of(tmp_path, tree)
    trainer.state.callbacks.append(teller := TellNow())
    with pytest.raises(SystemExit):
        trainer.fit()
    trainer.close()
    assert teller.ended == 1 and len(recorder.batches) == 2
    assert teller.there == (at == "before_train_batch")
    assert [path.name for path in checkpoints_in(tmp_path / "saved")] == ["ep0-ba2-rank0.pt"]
    assert_same_run(run(tmp_path, tree), straight, skipped=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if any(key.startswith("metrics/") for key in line)] == [2, 4]


def test_where_the_reader_of_its_words_is_gone_it_saves_all_the_same(tmp_path: Path, folder: Path) -> None:
    """As `2>&1 | tee log`, of which Ctrl-C ends both."""
    script = tmp_path / "told.py"
    script.write_text(
        "import os, signal, sys\n"
        "from composer import Callback\n"
        "import clipcov_stream.train as train\n"
        "build = train.build_trainer\n"
        "class Tell(Callback):\n"
        "    def before_train_batch(self, state, logger):\n"
        "        if int(state.timestamp.batch) == 2:\n"
        "            read, write = os.pipe()\n"
        "            os.close(read)\n"
        "            os.dup2(write, 1)\n"
        "            os.dup2(write, 2)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "def built(config):\n"
        "    trainer = build(config)\n"
        "    trainer.state.callbacks.append(Tell())\n"
        "    return trainer\n"
        "train.build_trainer = built\n"
        "train.main(sys.argv[1], [])\n",
        encoding="utf-8",
    )
    path = write_recipe(tmp_path / "recipe.yaml", tree_of(folder, tmp_path / "saved"))
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, timeout=120, check=False)
    assert done.returncode in (130, 120)  # 120: Python itself could not flush stdout at its end
    assert [path.name for path in checkpoints_in(tmp_path / "saved")] == ["ep0-ba3-rank0.pt"]


def test_after_an_exception_signals_are_as_before(tmp_path: Path, folder: Path) -> None:
    class Fail(Callback):
        def before_train_batch(self, state: Any, logger: Any) -> None:
            raise InterruptedError

    before = signal.getsignal(signal.SIGTERM)
    trainer, _, _ = trainer_of(tmp_path, tree_of(folder))
    trainer.state.callbacks.append(Fail())
    with pytest.raises(InterruptedError):
        trainer.fit()
    with pytest.raises(SystemExit) as told:  # Composer's own handler
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert told.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    trainer.close()


LOADER = """
import sys, time, torch
from clipcov_stream.workers import begin_worker
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        if index > 7 and sys.argv[1] == "stuck":
            time.sleep(600)
        return index
loader = torch.utils.data.DataLoader(
    Data(), 4, num_workers=2, worker_init_fn=begin_worker, persistent_workers=sys.argv[1] != "stuck"
)
batches = iter(loader)
next(batches), next(batches)  # one of each worker: both have begun
print("read", flush=True)
"""


@pytest.mark.parametrize("how", ["idle", "stuck"])
def test_a_process_whose_loader_is_alive_ends(tmp_path: Path, how: str) -> None:
    """Python ends workers by one SIGTERM, and waits."""
    script = tmp_path / "loader.py"
    script.write_text(LOADER, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script), how], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout == "read\n", done.stderr


def test_workers_outlive_a_signal_to_their_group(tmp_path: Path) -> None:
    script = tmp_path / "loader.py"
    script.write_text(
        LOADER.replace("import sys", "import os, signal, subprocess, sys")
        + "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        + "for _ in range(3):\n"
        + "    order = f'import os; os.killpg({os.getpid()}, {int(signal.SIGTERM)})'\n"
        + "    subprocess.run([sys.executable, '-c', order], start_new_session=True)\n"
        + "    time.sleep(0.5)\n"
        + "print(sum(len(batch) for batch in batches), flush=True)\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script), "idle"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert done.stdout == "read\n992\n", done.stderr


def loader_of(kind: str, tmp_path: Path) -> Any:
    """Eight images or more in pools or batches of eight, by one worker."""
    transform = ImageTransform(16)
    if kind == "training":
        return pool_loader(opened(draw_corpus(tmp_path / "corpus") / "train", tmp_path / "local"), 8, num_workers=1)
    images = LabelledImages([(image, 0) for image in synthetic_bytes(8)], ("shape",), ("{}",))
    return image_loader(ImagesDataset(images, transform, torch.tensor), transform, 8, num_workers=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_workers_outlive_a_signal_that_comes_before_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    first = signal_handling._set_worker_signal_handlers

    def told_at_once() -> None:
        first()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", told_at_once)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    batches = iter(loader_of(kind, tmp_path))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert next(batches)["image"].shape == (8, 3, 16, 16)


ORPHAN = """
import multiprocessing, os, time
from clipcov_stream.workers import begin_worker
def work(parent):
    while os.getppid() == parent:
        time.sleep(0.01)
    begin_worker()
    time.sleep(40)
multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(),)).start()
os._exit(0)
"""


def test_a_worker_whose_parent_was_gone_before_it_began_ends() -> None:
    # Until its end of the pipe is closed.
    subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, timeout=30, check=True)


def test_a_run_with_workers_for_evaluation_ends(tmp_path: Path) -> None:
    corpus = draw_corpus(tmp_path / "corpus")
    section = {"local": str(corpus / "eval"), "batch_size": 6, "num_workers": 1}
    tree = recipe(corpus, max_duration="2ba", eval={"shapes": section}, eval_interval="1ba")
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    command = [sys.executable, "-m", "clipcov_stream", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=one_thread())
    assert done.returncode == 0, done.stderr


TOLD = """
import os, signal, sys
from composer import Callback
from composer.utils import dist
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer
class Tell(Callback):
    def before_train_batch(self, state, logger):
        if int(state.timestamp.batch) == 2 and dist.get_global_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
trainer = build_trainer(load_config(sys.argv[1]))
trainer.state.callbacks.append(Tell())
trainer.fit()
"""


def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path: Path, folder: Path) -> None:
    tree = tree_of(folder, tmp_path / "saved")
    straight = run_ranks(tmp_path / "straight", write_recipe(tmp_path / "straight.yaml", tree_of(folder)), 2)
    path, script = write_recipe(tmp_path / "told.yaml", tree), tmp_path / "told.py"
    script.write_text(TOLD, encoding="utf-8")
    done = run_forked(tmp_path, 2, script, path)
    assert done.codes == [143, 143]
    assert "Traceback" not in done.stdout + done.stderr
    (checkpoint,) = checkpoints_in(tmp_path / "saved")
    assert checkpoint.name == "ep0-ba3-rank0.pt"
    resumed = run_ranks(tmp_path / "resumed", path, 2)
    for ours, theirs in zip(resumed, straight, strict=True):
        assert len(ours["batches"]) == 5
        for mine, other in zip(ours["batches"], theirs["batches"][3:], strict=True):
            assert torch.equal(mine["image"], other["image"]) and torch.equal(mine["text"], other["text"])
        assert all(torch.equal(weight, theirs["model"][name]) for name, weight in ours["model"].items())


@pytest.mark.alone
@pytest.mark.parametrize(
    ("launcher", "number", "to_all"),
    [
        ("composer", signal.SIGINT, True),  # Ctrl-C in a terminal
        ("composer", signal.SIGTERM, True),  # Slurm, a machine that shuts down
        ("composer", signal.SIGTERM, False),  # a container's first process
        ("torchrun", signal.SIGINT, True),
        ("torchrun", signal.SIGTERM, False),
    ],
)
def test_real_launchers_real_signals(tmp_path: Path, folder: Path, launcher: str, number: int, to_all: bool) -> None:
    """With workers in the same process group; nothing is left running, and what was trained is there."""
    metrics, saved = tmp_path / "metrics.jsonl", tmp_path / "saved"
    tree = tree_of(folder, saved, num_workers=2) | {"max_duration": "100000ba", "metrics_file": str(metrics)}
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    command = {
        "composer": [*composer(), "-n", "2", "-m", "clipcov_stream", str(path)],
        "torchrun": [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2", "-m", "clipcov_stream"],
    }[launcher]
    command = command if launcher == "composer" else [*command, str(path)]
    said = launched_and_told(command, tmp_path, metrics, number, to_all, 60)
    assert len(checkpoints_in(saved)) == 1, said
    checkpoint = checkpoints_in(saved)[0]
    step = int(checkpoint.name.split("-ba")[1].split("-")[0])
    assert f"ends after step {step:,}; saved" in said
    assert said.count("Traceback") <= 1, said  # the launcher's, which tells of its own end by one
    if not to_all or number != signal.SIGINT:
        return  # goes on as the others do
    command = [*command, f"max_duration={step + 1}ba"]
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=one_thread())
    assert f"told: goes on from step {step:,}" in resumed.stdout, resumed.stderr
