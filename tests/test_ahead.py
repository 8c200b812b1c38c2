"""Selection ahead of training: the engine by itself, then the real Trainer on real shards, alone and over ranks."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from composer import Callback, Trainer
from composer.core import Event
from corpora import draw_corpus, recipe, write_recipe
from forked import run_forked
from runs import (
    Interrupt,
    MemoryLog,
    Recorder,
    algorithm_of,
    assert_same,
    assert_same_run,
    columns_recipe,
    online_section,
    proxy_section,
    run,
    run_ranks,
    trainer_of,
    values,
    write_columns,
)
from torch.utils.data import DataLoader

from clipcov_stream import ClipCov
from clipcov_stream.ahead import ENOUGH, Ahead
from clipcov_stream.build import build_selection
from clipcov_stream.config import SelectionConfig
from clipcov_stream.lags import Lags
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.prepare import Preparation, ReadyPool, Ticket


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_work_runs_as_far_ahead_as_it_may_and_no_further(depth: int) -> None:
    begun: list[tuple[int, int]] = []
    now = 0

    def work(item: int, ticket: int) -> int:
        begun.append((item, ticket))
        return item * item

    ahead = Ahead(iter(range(9)), depth, lambda steps: now + steps, work)
    assert not begun  # nothing is asked for yet
    for now in range(9):
        assert next(ahead) == now * now
        wait_for(lambda: len(begun) == min(now + depth + 1, 9))  # noqa: B023
        time.sleep(0.01)
        assert len(begun) == min(now + depth + 1, 9)
    # Each item has the ticket of its own number, whenever that was issued.
    assert begun == [(item, item) for item in range(9)]
    assert list(ahead) == []
    assert not threads()


def test_work_is_done_in_another_thread_with_as_many_threads_of_its_own() -> None:
    before = torch.get_num_threads()
    found = list(
        Ahead(iter("a"), 1, lambda steps: steps, lambda *_: (threading.current_thread(), torch.get_num_threads()))
    )
    assert found[0][0] is not threading.current_thread() and found[0][1] == before


@pytest.mark.parametrize("where", ["items", "work"])
def test_an_error_is_raised_where_its_item_is_asked_for(where: str) -> None:
    def items() -> Iterator[int]:
        yield from (0, 1)
        if where == "items":
            raise OSError("item 2")
        yield 2

    def work(item: int, ticket: Any) -> int:
        if item == 2:
            raise OSError("item 2")
        return item

    ahead = Ahead(items(), 3, lambda steps: steps, work)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="item 2"):
        next(ahead)
    assert list(ahead) == [] and not threads()


@pytest.mark.parametrize("finishes", [False, True])
def test_a_consumer_that_stops_ends_the_thread(finishes: bool) -> None:
    begun, gate, done = threading.Event(), threading.Event(), []

    def work(item: int, ticket: Any) -> int:
        if item:
            begun.set()
            gate.wait()
        done.append(item)
        return item

    ahead = Ahead(iter(range(100)), 3, lambda steps: steps, work, finishes)
    assert next(ahead) == 0
    assert begun.wait(10)
    threading.Timer(0.05, gate.set).start()
    del ahead
    gc.collect()
    assert not threads()
    # It was in the middle of item 1; what else it had tickets for is done only if others may wait for it.
    assert done == ([0, 1, 2, 3] if finishes else [0, 1])


def test_work_that_raises_stop_iteration_is_an_error() -> None:
    def work(item: int, ticket: Any) -> int:
        return next(iter(())) if item == 2 else item

    ahead = Ahead(iter(range(6)), 1, lambda steps: steps, work)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(RuntimeError, match="work raised StopIteration"):
        next(ahead)


def test_all_end_where_one_has_nothing_left() -> None:
    answers = iter([True, True, False])
    ahead = Ahead(iter(range(6)), 1, lambda steps: steps, lambda item, _: item, True, lambda has: has and next(answers))
    assert list(ahead) == [0, 1]


def test_no_ticket_no_work() -> None:
    done: list[int] = []
    ahead = Ahead(iter(range(9)), 3, lambda steps: steps if steps < 2 else None, lambda item, _: done.append(item))
    next(ahead)
    wait_for(lambda: len(done) == 2)
    ahead.close()
    assert done == [0, 1] and list(ahead) == []


def test_a_lag_is_read_a_fixed_number_of_steps_later() -> None:
    def lag(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(float(step)), torch.tensor(1.0)

    for delay in (0, 2):
        lags = Lags(delay)
        for step in range(6):
            for ahead in range(delay + 1):
                found = lags.read_by(ahead)
                wanted = step + ahead - 1 - delay
                assert (found is None) if wanted < 0 else (found is not None and int(found[0]) == wanted)
            lags.note(lag(step))
            again = Lags(delay)
            again.load(lags.waiting(), lags.newest)
            assert again.kept == lags.kept and len(lags.waiting()) == min(step, delay)


def ahead_recipe(folder: Path, run_ahead: int, num_workers: int = 0, **selection: Any) -> dict[str, Any]:
    tree = columns_recipe(folder, **{"run_ahead": run_ahead, "lag_delay": 3, "warmup": "1ba", **selection})
    tree["stream"] |= {"num_workers": num_workers, "min_scale": 0.4, "shuffle": True}
    # Four pools an epoch: the run ends in the middle of the second.
    return {**tree, "max_duration": "7ba"}


@pytest.mark.parametrize(
    "selection",
    [
        {},
        {"scope": "global"},
        {"selector": "random"},
        {"learnability": 0.0, "lag_delay": 0},
        {"embed": "proxy"},
        online_section(),
        online_section(8),  # of candidates decoded small
        {"embed": "online", "copies": 3},  # the default one, with batch norm and a large table of words
    ],
    ids=str,
)
def test_running_ahead_changes_nothing(tmp_path: Path, selection: dict[str, Any]) -> None:
    folder = write_columns(tmp_path / "mds", 128)
    if selection.get("embed") == "proxy":
        selection = proxy_section(tmp_path)
    straight = run(tmp_path, ahead_recipe(folder, 0, **selection))
    for run_ahead, num_workers in ((1, 0), (3, 0), (3, 2)):
        tree = ahead_recipe(folder, run_ahead, num_workers, **selection)
        trainer, recorder, memory = run(tmp_path, tree)
        assert not threads()  # though the run ended within an epoch
        assert_same_run((trainer, recorder, memory), straight)
        assert int(trainer.state.timestamp.sample) == 7 * 32
        for name in ("samples_streamed", "samples_seen", "num_invalid", "residual_total"):
            assert memory.data.get(f"selection/{name}") == straight[2].data.get(f"selection/{name}")
        ours, theirs = (algorithm_of(of).teacher for of in (trainer, straight[0]))
        if ours is not None and theirs is not None:  # an online proxy is there for who asks for it afterwards
            assert_same(ours.state_dict(), theirs.state_dict())
        assert len(values(memory, "selection/wait_ms")) == 7 and min(values(memory, "selection/wait_ms")) >= 0
        trainer.close()
    assert not torch.equal(straight[1].batches[-1], straight[1].batches[-2])


class Evaluating(Callback):
    """Evaluation that lasts until a thread has seen it."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def eval_batch_start(self, state: Any, logger: Any) -> None:
        self.begun.set()
        time.sleep(0.06)

    def eval_end(self, state: Any, logger: Any) -> None:
        self.begun.clear()


@pytest.mark.parametrize("resolution", [None, 8])
def test_pools_prepared_while_training_evaluates_are_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolution: int | None
) -> None:
    """Composer's state then has another loader, which needs nothing normalized."""
    folder, section = write_columns(tmp_path / "mds", 128), proxy_section(tmp_path)
    section = {**section, **({} if resolution is None else {"embed_resolution": resolution})}
    prepare, late, evaluating = Preparation.__call__, [], Evaluating()

    def waiting(self: Preparation, *args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            if late:  # the first is what training waits for
                evaluating.begun.wait(2)
            late.append(self.state.dataloader is not self.loader)
        return prepare(self, *args)

    monkeypatch.setattr(Preparation, "__call__", waiting)
    evaluation = {"val": {"local": str(folder), "batch_size": 32, "tasks": ["retrieval"]}}
    runs = []
    for run_ahead in (0, 3):
        tree = {**ahead_recipe(folder, run_ahead, **section), "eval": evaluation, "eval_interval": "1ba"}
        trainer, recorder, memory = trainer_of(tmp_path, tree)
        trainer.state.callbacks.append(evaluating)
        trainer.fit()
        runs.append((trainer, recorder, memory))
        trainer.close()
    assert any(late) and not late[0]
    assert_same_run(*runs)


def test_the_delay_of_the_lag_is_what_changes_survivors(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 128)
    now, later = (run(tmp_path, ahead_recipe(folder, 0, lag_delay=delay, learnability=5.0)) for delay in (0, 3))
    same = [torch.equal(a, b) for a, b in zip(now[1].batches, later[1].batches, strict=True)]
    # Step 1 is the first that selects, step 2 the first that could read its lag.
    assert same[:2] == [True, True] and not all(same)


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("run_ahead", [0, 3])
@pytest.mark.parametrize("section", [{}, online_section()], ids=["columns", "online"])
def test_a_run_killed_ahead_and_resumed_equals_a_straight_one(
    tmp_path: Path, stop: int, run_ahead: int, section: dict[str, Any]
) -> None:
    folder = write_columns(tmp_path / "mds", 128)
    straight = run(tmp_path, ahead_recipe(folder, 0, **section))
    tree = {
        **ahead_recipe(folder, 3, **section),
        "save_interval": f"{stop}ba",
        "save_folder": str(tmp_path / "checkpoints"),
    }
    first, _, _ = trainer_of(tmp_path, tree)
    first.state.callbacks.append(Interrupt(stop))
    with pytest.raises(InterruptedError):
        first.fit()
    first.close()
    assert not threads()
    saved = {"load_path": str(tmp_path / "checkpoints" / "latest-rank0.pt")}
    resumed, rest, log = trainer_of(tmp_path, {**ahead_recipe(folder, run_ahead, **section), **saved})
    loader: Any = resumed.state.train_dataloader
    assert int(resumed.state.timestamp.batch) == stop
    read: list[int] = []
    get = type(loader.dataset).get_item
    loader.dataset.get_item = lambda sample, retry=7: read.append(sample) or get(loader.dataset, sample, retry)
    resumed.fit()
    assert_same_run((resumed, rest, log), straight, skipped=stop)
    # Nothing that was trained on before is read again, and nothing for steps that will not come.
    assert len(read) == (7 - stop) * 32
    resumed.close()


@pytest.mark.parametrize("section", [{}, online_section()], ids=["columns", "online"])
def test_checkpoints_hold_the_step_they_are_of(tmp_path: Path, section: dict[str, Any]) -> None:
    folder = write_columns(tmp_path / "mds", 128)
    saved = []
    for run_ahead in (0, 3):
        where = tmp_path / str(run_ahead)
        tree = {**ahead_recipe(folder, run_ahead, **section), "save_interval": "1ba", "save_folder": str(where)}
        run(tmp_path, tree)
        states = [torch.load(path, weights_only=False)["state"] for path in sorted(where.glob("ep*-ba*.pt"))]
        saved.append([(state["algorithms"], state["model"], state["dataset_state"]) for state in states])
    assert len(saved[0]) == 7
    assert len(dict(saved[0][-1][0])["ClipCov"]["lags"]) == 3
    for straight, ahead in zip(*saved, strict=True):
        assert_same(dict(straight[0]), dict(ahead[0]))
        assert_same(dict(straight[1]), dict(ahead[1]))
        assert straight[2] == ahead[2]


@pytest.mark.parametrize(
    "selection",
    [{}, {"scope": "global"}, online_section(8), {**online_section(8), "scope": "global"}],
    ids=["local", "global", "local-online", "global-online"],
)
def test_ranks_run_ahead_alike(tmp_path: Path, selection: dict[str, Any]) -> None:
    folder = write_columns(tmp_path / "mds", 128, bad_images=9)
    path = write_recipe(tmp_path / "recipe.yaml", ahead_recipe(folder, 0, max_invalid_ratio=0.5, **selection))
    straight = run_ranks(tmp_path / "straight", path, 2)
    ahead = run_ranks(tmp_path / "ahead", path, 2, "selection.run_ahead=3", "stream.num_workers=1")
    assert straight[0]["algorithm"]["num_invalid"] > 0
    for rank in range(2):
        assert_same(ahead[rank]["algorithm"], straight[rank]["algorithm"])
        assert_same(dict(ahead[rank]["model"]), dict(straight[rank]["model"]))
        for a, b in zip(ahead[rank]["batches"], straight[rank]["batches"], strict=True):
            assert_same(a, b)


@pytest.mark.parametrize(("num_workers", "section"), [(0, {}), (2, {}), (0, online_section())], ids=str)
def test_a_second_fit_goes_on_alike(tmp_path: Path, num_workers: int, section: dict[str, Any]) -> None:
    folder = write_columns(tmp_path / "mds", 128)
    runs = []
    for run_ahead in (0, 2):
        tree = {**ahead_recipe(folder, run_ahead, num_workers, **section), "max_duration": "3ba"}
        trainer, recorder, memory = run(tmp_path, tree)
        trainer.fit(duration="4ba")
        assert len(recorder.batches) == 7 and not threads()
        trainer.close()
        runs.append((trainer, recorder, memory))
    assert_same_run(*runs)


RAISES = """
import sys
from composer import Callback
from composer.utils import dist
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer
class Raise(Callback):
    def batch_start(self, state, logger):
        if int(state.timestamp.batch) == 3 and dist.get_global_rank() == dist.get_world_size() - 1:
            raise InterruptedError("stop here")
trainer = build_trainer(load_config(sys.argv[1]))
trainer.state.callbacks.append(Raise())
trainer.fit()
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_error_in_training_ends_every_process(tmp_path: Path, num_ranks: int) -> None:
    folder = write_columns(tmp_path / "mds", 256)
    path = write_recipe(tmp_path / "recipe.yaml", ahead_recipe(folder, 3, num_workers=1))
    script = tmp_path / "raises.py"
    script.write_text(RAISES, encoding="utf-8")
    # Well below what a thread gets to end by itself.
    done = run_forked(tmp_path, num_ranks, script, path, timeout=100)
    assert done.returncode != 0
    assert "InterruptedError: stop here" in done.stdout + done.stderr


def test_an_error_in_the_thread_stops_the_run(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 128)
    trainer, recorder, _ = trainer_of(tmp_path, ahead_recipe(folder, 3, warmup="2ba"))

    def broken(pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
        raise OSError("the selector broke")

    algorithm_of(trainer).function = broken
    with pytest.raises(OSError, match="the selector broke"):
        trainer.fit()
    assert len(recorder.batches) == 2 and not threads()


def test_a_short_epoch_is_an_error_ahead_too(tmp_path: Path) -> None:
    trainer, _, _ = trainer_of(tmp_path, ahead_recipe(write_columns(tmp_path / "mds", 128), 3))
    dataset: Any = trainer.state.train_dataloader.dataset  # pyright: ignore
    ids = dataset._get_work
    dataset._get_work = lambda epoch, sample: ids(epoch, sample)[:64]
    with pytest.raises(RuntimeError, match="epoch 0 ended after 2 of 4 pools"):
        trainer.fit()


SHORT = """
import sys
from composer.utils import dist
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer
trainer = build_trainer(load_config(sys.argv[1]))
dataset = trainer.state.train_dataloader.dataset
ids = dataset._get_work
if dist.get_global_rank() == 1:
    dataset._get_work = lambda epoch, sample: ids(epoch, sample)[:32]
trainer.fit()
"""


def test_an_epoch_that_is_short_on_one_rank_ends_on_all(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", ahead_recipe(write_columns(tmp_path / "mds", 128), 3))
    script = tmp_path / "short.py"
    script.write_text(SHORT, encoding="utf-8")
    done = run_forked(tmp_path, 2, script, path, timeout=100)
    assert done.returncode != 0
    assert "of 4 pools" in done.stdout + done.stderr


def test_too_few_good_samples_stop_the_run_ahead_too(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64, bad_images=30)
    tree = columns_recipe(folder, max_invalid_ratio=0.99, run_ahead=1, lag_delay=1)
    with pytest.raises(RuntimeError, match="8 survivors are needed, but 30 of the pool's 32 samples cannot be used"):
        run(tmp_path, tree)


def test_pools_that_composer_reads_again_and_throws_away(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 128)
    tree = {**ahead_recipe(folder, 0), "save_interval": "2ba", "save_folder": str(tmp_path / "checkpoints")}
    first, _, _ = trainer_of(tmp_path, tree)
    first.state.callbacks.append(Interrupt(2))
    with pytest.raises(InterruptedError):
        first.fit()
    first.close()
    runs = []
    for run_ahead in (0, 2):
        made, _, _ = trainer_of(tmp_path, ahead_recipe(folder, run_ahead))
        recorder = Recorder()
        own = Trainer(
            model=made.state.model,  # pyright: ignore
            train_dataloader=made.state.train_dataloader,
            max_duration="7ba",
            algorithms=[algorithm_of(made)],
            callbacks=[recorder],
            optimizers=made.state.optimizers[0],
            device="cpu",
            progress_bar=False,
            load_path=str(tmp_path / "checkpoints" / "latest-rank0.pt"),
            # Without the stream's state it begins the epoch anew.
            load_ignore_keys=["state/dataset_state"],
        )
        own.fit()
        assert len(recorder.batches) == 5 and not threads()
        runs.append((own, recorder, MemoryLog()))
    assert_same_run(*runs)


def test_survivors_of_another_step_are_refused(tmp_path: Path) -> None:
    made, _, _ = trainer_of(tmp_path, ahead_recipe(write_columns(tmp_path / "mds", 128), 1))
    clipcov, pool = algorithm_of(made), next(iter(made.state.train_dataloader))  # pyright: ignore
    prepared = clipcov._preparation(made.state)(pool, Ticket(4, False), None)
    made.state.batch = ReadyPool(pool["id"], prepared)
    with pytest.raises(RuntimeError, match=r"step 0 got survivors that were prepared for step 4.*run_ahead=0"):
        clipcov.apply(Event.AFTER_DATALOADER, made.state, made.logger)


def test_a_trainer_of_ones_own_runs_ahead(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 128)
    straight = run(tmp_path, ahead_recipe(folder, 0))
    made, _, _ = trainer_of(tmp_path, ahead_recipe(folder, 0))
    recorder, clipcov = Recorder(), ClipCov(0.75, embed="columns", warmup="1ba", lag_delay=3, run_ahead=3)
    Trainer(
        model=made.state.model,  # pyright: ignore
        train_dataloader=made.state.train_dataloader,
        max_duration="7ba",
        algorithms=[clipcov],
        callbacks=[recorder],
        optimizers=made.state.optimizers[0],
        schedulers=None,
        device="cpu",
        progress_bar=False,
    ).fit()
    # The learning rate differs, so the lag and what follows from it do.
    assert torch.equal(recorder.images[0], straight[1].images[0])
    assert torch.equal(recorder.images[1], straight[1].images[1])
    assert len(recorder.batches) == 7 and not threads()


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"run_ahead": -1}, r"selection\.run_ahead=-1 must be at least 0 steps"),
        ({"lag_delay": -2}, r"selection\.lag_delay=-2 must be at least 0 steps"),
        (
            {"run_ahead": 2, "embed": "teacher"},
            r"run_ahead=2: selection with embed='teacher', .* follows .*run_ahead=0, or use",
        ),
        ({"run_ahead": 2, "selector": "rho"}, r"run_ahead=2: .* selector='rho' follows the model in training"),
        ({"run_ahead": 2, "lag_delay": 1}, r"run_ahead=2 must be at most selection\.lag_delay=1.*learnability=0"),
        ({"run_ahead": 2, "lag_delay": 0}, r"run_ahead=2 must be at most selection\.lag_delay=0.*learnability=0"),
    ],
)
def test_what_cannot_run_ahead_is_refused(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipCov(**{"embed": "columns", **selection})


def test_what_reads_no_lag_runs_ahead_without_delay() -> None:
    for other in ({"learnability": 0.0}, {"selector": "clip_score"}, {"selector": "random", "embed": "teacher"}):
        ClipCov(**{"embed": "columns", "run_ahead": 5, **other})
    saved = ClipCov(embed="columns", run_ahead=1, lag_delay=2).state_dict()
    ClipCov(embed="columns", run_ahead=0, lag_delay=2).load_state_dict(saved)
    with pytest.raises(ValueError, match="lag_delay=2, not 1"):
        ClipCov(embed="columns", run_ahead=0, lag_delay=1).load_state_dict(saved)


@pytest.mark.filterwarnings("ignore:No optimizer was specified")
def test_a_loader_that_cannot_run_ahead_is_named(tmp_path: Path) -> None:
    made, _, _ = trainer_of(tmp_path, recipe(draw_corpus(tmp_path / "shapes")))
    loader = DataLoader([{"image": torch.zeros(1), "text": torch.zeros(1)}] * 8, batch_size=8)  # pyright: ignore
    trainer = Trainer(
        model=made.state.model,  # pyright: ignore
        train_dataloader=loader,
        max_duration="1ba",
        algorithms=[ClipCov(0.75, selector="random", run_ahead=1)],
        device="cpu",
        progress_bar=False,
    )
    with pytest.raises(ValueError, match=r"run_ahead=1 needs a loader from .*pool_loader, not DataLoader"):
        trainer.fit()


def test_a_warmup_that_cannot_be_foreseen_is_refused(tmp_path: Path) -> None:
    made, _, _ = trainer_of(tmp_path, ahead_recipe(write_columns(tmp_path / "mds", 128), 1, warmup="0.5dur"))
    made.state.max_duration = "1000tok"
    with pytest.raises(ValueError, match=r"warmup=0.5dur of max_duration=\S+ .*run_ahead=1 cannot foresee"):
        algorithm_of(made)._start_ahead(made.state)


@pytest.mark.parametrize(
    ("selection", "wanted"),
    [
        ({"embed": "columns"}, ENOUGH),
        ({"embed": "online"}, ENOUGH),
        ({"embed": "teacher"}, 0),
        ({"embed": "teacher", "selector": "random"}, 0),
        ({"embed": "columns", "selector": "random"}, ENOUGH),
        ({"embed": "columns", "selector": "rho"}, 0),
        ({"embed": "columns", "run_ahead": 0}, 0),
        ({"embed": "columns", "lag_delay": 0}, 0),
        ({"embed": "columns", "lag_delay": 1}, 1),
        ({"embed": "columns", "lag_delay": 5}, ENOUGH),
        ({"embed": "columns", "lag_delay": 5, "run_ahead": 4}, 4),
        ({"embed": "columns", "lag_delay": 2, "run_ahead": 0}, 0),
        ({"embed": "online", "lag_delay": 2}, ENOUGH),
        ({"embed": "online", "lag_delay": 2, "selector": "rho"}, 0),
        ({"embed": "teacher", "lag_delay": 2}, 0),
        ({"embed": "teacher", "lag_delay": 2, "selector": "random"}, ENOUGH),
        ({"embed": "online", "lag_delay": 2, "selector": "random"}, ENOUGH),
    ],
    ids=str,
)
def test_a_recipe_that_does_not_say_how_far_runs_as_far_ahead_as_it_may(selection: dict[str, Any], wanted: int) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    built = build_selection(SelectionConfig(**selection), ImageTransform(32), lambda caption: tokenizer(caption)[0])
    assert built.run_ahead == wanted
    # The delay changes what is chosen: it is the same for all selectors, and whether it is made use of or not.
    assert built.lag_delay == selection.get("lag_delay", 0 if selection["embed"] == "teacher" else ENOUGH)
    # Small images are for who looks at them.
    reads = selection["embed"] == "online" and selection.get("selector") is None
    assert built.scoring_size == (32 if reads else None)
