"""The metrics file of a run that was stopped is that of one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from corpora import draw_corpus, recipe
from runs import Interrupt, trainer_of

from clipcov_stream.metrics_file import rewind


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus"))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Lines without what is measured by a clock."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("_ms")} for row in rows]


def tree_of(corpus: Path, folder: Path) -> dict[str, Any]:
    split = {"local": str(corpus / "eval"), "batch_size": 9}
    return recipe(
        corpus,
        run_name="r",
        autoresume=True,
        save_folder=str(folder / "saved"),
        save_interval="2ba",
        metrics_file=str(folder / "metrics.jsonl"),
        max_duration="8ba",
        eval={"shapes": split},
        eval_interval="3ba",
    )


def test_a_url_is_refused_and_no_folder_of_its_name_made(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"metrics_file='s3://b/m\.jsonl' is remote, .* give a local path"):
        trainer_of(tmp_path, recipe(corpus, metrics_file="s3://b/m.jsonl"))
    assert not (tmp_path / "s3:").exists()


@pytest.mark.filterwarnings("ignore:No batches were trained")  # Composer's, of an epoch whose last pool it has seen
@pytest.mark.parametrize("torn", [False, True])
def test_stopped_runs_leave_the_lines_of_a_straight_one(tmp_path: Path, corpus: Path, torn: bool) -> None:
    # Six pools make an epoch: the second stop is in the second.
    ours, straight = tmp_path / "ours", tmp_path / "straight"
    for stop in (5, 7, 99):
        trainer, _, _ = trainer_of(tmp_path, tree_of(corpus, ours))
        trainer.state.callbacks.append(Interrupt(stop))
        if stop < 99:
            with pytest.raises(InterruptedError):
                trainer.fit()
            if torn:
                with (ours / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write('{"step": 5, "loss/tr')
        else:
            trainer.fit()
        trainer.close()
    whole, _, _ = trainer_of(tmp_path, tree_of(corpus, straight))
    whole.fit()
    whole.close()
    expected = lines_of(straight / "metrics.jsonl")
    assert lines_of(ours / "metrics.jsonl") == expected
    assert [row["step"] for row in expected if "loss/train/total" in row] == list(range(1, 9))


def test_a_run_that_starts_anew_loses_no_lines(tmp_path: Path, corpus: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    for number in range(3):
        trainer, _, _ = trainer_of(tmp_path, recipe(corpus, max_duration="3ba", metrics_file=str(metrics)))
        if number == 0:
            trainer.fit()
        else:
            with pytest.warns(UserWarning, match=rf"had lines, but .* are in 'metrics.jsonl.{number}'"):
                trainer.fit()
        trainer.close()
    assert {path.name for path in tmp_path.glob("metrics.jsonl*")} == {
        metrics.name,
        f"{metrics.name}.1",
        f"{metrics.name}.2",
    }
    assert len(lines_of(metrics)) == len(lines_of(tmp_path / "metrics.jsonl.1"))


ROWS = [{"step": 1, "a": 0.5}, {"step": 2}, {"step": 2, "eval": 1.0}, {"step": 3}]


def written(path: Path, tail: str = "") -> list[int]:
    """ROWS and a tail; where each row ends."""
    lines = [json.dumps(row) + "\n" for row in ROWS]
    path.write_text("".join(lines) + tail, encoding="utf-8")
    return [sum(map(len, lines[: number + 1])) for number in range(len(lines))]


def test_a_file_is_cut_where_the_checkpoint_saw_its_end(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for kept in range(1, 5):
        ends = written(path, '{"step": 4')
        rewind(path, 2, ends[kept - 1])
        assert lines_of(path) == ROWS[:kept]


@pytest.mark.parametrize("tail", ["", '{"step": 3, "lo', "\x00\x00", "[]\n", "null\n", '{"step": "x"}\n'])
def test_without_that_lines_up_to_the_step_stay(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "m"
    for step, kept in ((0, 0), (1, 1), (2, 3), (3, 4), (9, 4)):
        written(path, tail)
        rewind(path, step, None)
        assert lines_of(path) == ROWS[:kept]


def test_a_file_that_is_not_the_checkpoints_is_cut_by_steps_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for num_bytes in (0, 5, 10_000):  # the checkpoint knew none; in the midst of a line; beyond the end
        written(path)
        with pytest.warns(UserWarning, match="is not as it was when the checkpoint of step 2 was written"):
            rewind(path, 2, num_bytes)
        assert lines_of(path) == ROWS[:3]
