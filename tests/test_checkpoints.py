"""Checkpoints are whole or not there, and autoresume finds the newest that is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import draw_corpus, recipe, write_recipe
from runs import Interrupt, algorithm_of, assert_same, run, trainer_of

from clipcov_stream import checkpoints
from clipcov_stream.checkpoints import checkpoints_in, fault_of, newest_whole, step_of, whole_writes, write_whole
from clipcov_stream.ledger import read_ledger
from clipcov_stream.train import main


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus"))


def saved(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        torch.save({"number": number, "weights": torch.arange(1000)}, folder / name)
    return [folder / name for name in names]


def test_a_file_is_whole_only_if_every_byte_of_it_is(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, "ep0-ba1-rank0.pt")
    whole = path.read_bytes()
    assert fault_of(path) is None
    for share in (0, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        assert fault_of(path)
    middle = whole.index(torch.arange(1000).numpy().tobytes()) + 4000
    path.write_bytes(whole[:middle] + b"\xff" + whole[middle + 1 :])
    assert "does not match its checksum" in str(fault_of(path))
    # Of which torch.load says nothing.
    assert int(torch.load(path)["weights"][500]) != 500
    path.write_bytes(whole[:-100] + bytes(100))
    assert fault_of(path)


def test_the_newest_whole_one_is_by_steps_not_by_name_or_time(tmp_path: Path) -> None:
    names = ["ep0-ba9-rank0.pt", "ep1-ba10-rank0.pt", "ep0-ba10-rank0.pt", "ep0-ba2-rank0.pt"]
    nine, late, _, two = saved(tmp_path, *names)
    saved(tmp_path, "latest-rank0.pt", "ep0-ba99-rank1.pt", "notes.pt", "epoch.pt", ".partial-ep9-ba99-rank0.pt")
    os.utime(two, (4e9, 4e9))
    assert newest_whole(tmp_path) == late
    os.truncate(late, 50)
    os.truncate(tmp_path / names[2], 50)
    with pytest.warns(UserWarning, match=r"torn .*ep1-ba10-rank0.pt \(.*ep0-ba10-.* goes on from ep0-ba9-rank0.pt"):
        assert newest_whole(tmp_path) == nine
    # Out of the way of those to come, and not lost.
    assert checkpoints_in(tmp_path) == [nine, two]
    assert (tmp_path / "ep1-ba10-rank0.pt.torn").stat().st_size == 50
    assert newest_whole(tmp_path) == nine


def test_a_folder_of_torn_ones_is_an_error_and_an_empty_one_is_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "nowhere") is None
    (path,) = saved(tmp_path, "ep0-ba1-rank0.pt")
    os.truncate(path, 9)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: ep0-ba1-rank0.pt \(.*Delete them"):
        newest_whole(tmp_path)
    assert path.exists()


def test_a_write_that_ends_early_leaves_the_name_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "ep0-ba1-rank0.pt"
    place.write_bytes(b"before")

    def write(state_dict: dict[str, Any], filename: str) -> None:
        Path(filename).write_bytes(b"half")
        assert place.read_bytes() == b"before"
        if state_dict["fails"]:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match=r"checkpoint .*ep0-ba1-rank0.pt could not be written with \d+ bytes .* is gone"):
        write_whole(write, {"fails": True}, str(place))
    assert place.read_bytes() == b"before"
    write_whole(write, {"fails": False}, str(place))
    assert place.read_bytes() == b"half"
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_composers_writer_is_its_own_again_after_an_error() -> None:
    write = checkpoints.checkpoint._write_checkpoint_file
    with pytest.raises(KeyError), whole_writes():
        assert checkpoints.checkpoint._write_checkpoint_file is not write
        raise KeyError
    assert checkpoints.checkpoint._write_checkpoint_file is write


@pytest.mark.parametrize("damage", ["torn", "no link", "link to nothing", "partial"])
def test_autoresume_survives_what_a_kill_leaves(tmp_path: Path, corpus: Path, damage: str) -> None:
    folder = tmp_path / "saved"
    tree = recipe(corpus, run_name="r", autoresume=True, save_folder=str(folder), save_interval="2ba")
    first, _, _ = trainer_of(tmp_path, tree)
    first.state.callbacks.append(Interrupt(5))
    with pytest.raises(InterruptedError):
        first.fit()
    first.close()
    newest, link = folder / "ep0-ba4-rank0.pt", folder / "latest-rank0.pt"
    assert newest.exists() and link.is_symlink()
    if damage == "torn":
        os.truncate(newest, newest.stat().st_size // 2)
        with pytest.warns(UserWarning, match="goes on from ep0-ba2-rank0.pt"):
            second, _, _ = trainer_of(tmp_path, tree)
    else:
        if damage == "partial":
            (folder / ".partial-ep1-ba6-rank0.pt").write_bytes(b"half")
        else:
            link.unlink()
        if damage == "link to nothing":
            link.symlink_to("ep9-ba99-rank0.pt")
        second, _, _ = trainer_of(tmp_path, tree)
    assert int(second.state.timestamp.batch) == (2 if damage == "torn" else 4)
    second.fit()
    second.close()
    assert not list(folder.glob(".partial-*"))
    straight, _, _ = run(tmp_path, recipe(corpus))
    for ours, theirs in zip(
        second.state.model.state_dict().values(), straight.state.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert_same(algorithm_of(second).state_dict(), algorithm_of(straight).state_dict())


def test_a_resumed_run_keeps_as_many_checkpoints_as_it_may(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "saved"
    keep = {"save_num_checkpoints_to_keep": 2, "save_interval": "1ba", "max_duration": "6ba"}
    tree = recipe(corpus, run_name="r", autoresume=True, save_folder=str(folder), **keep)
    for stop in (2, 4, 99):
        trainer, _, _ = trainer_of(tmp_path, tree)
        trainer.state.callbacks.append(Interrupt(stop))
        if stop < 99:
            with pytest.raises(InterruptedError):
                trainer.fit()
        else:
            trainer.fit()
        trainer.close()
        (folder / "ep0-ba0-rank0.pt").write_bytes(b"another run's, which stays")
        assert [step_of(path) for path in checkpoints_in(folder)] == [min(stop, 6), min(stop, 6) - 1, 0]


def test_what_autoresume_needs(tmp_path: Path, corpus: Path) -> None:
    for missing in ("run_name", "save_folder"):
        sections = {"run_name": "r", "save_folder": str(tmp_path), "autoresume": True, missing: None}
        with pytest.raises(ValueError, match=f"autoresume=true needs a {missing}"):
            trainer_of(tmp_path, recipe(corpus, **sections))


def test_a_complete_run_that_is_begun_again_is_refused_before_it_writes(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    files = {"metrics_file": str(runs / "r.jsonl"), "ledger": str(runs / "ledger"), "gallery": str(runs / "gallery")}
    tree = recipe(corpus, run_name="r", save_folder=str(runs / "saved"), save_interval="2ba", **files)
    split = {"local": str(corpus / "eval"), "batch_size": 64}
    tree |= {"max_duration": "4ba", "eval": {"shapes": split}, "eval_first": True}
    path = str(write_recipe(tmp_path / "recipe.yaml", tree))
    main(path, [])

    def contents() -> dict[Path, bytes]:
        return {each: each.read_bytes() for each in runs.rglob("*") if each.is_file()}

    before = contents()
    monkeypatch.setenv("CLIPCOV_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"has ep0-ba4-rank0.pt, but training begins after step 0: .*autoresume=true"):
        main(path, [])
    assert contents() == before
    main(path, ["autoresume=true", "max_duration=6ba"])
    assert set(read_ledger(runs / "ledger")[0].step.tolist()) == set(range(6))
    assert sorted(each.name for each in runs.iterdir()) == ["gallery", "ledger", "r.about.json", "r.jsonl", "saved"]


def test_a_complete_run_started_again_ends_at_once(
    tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, folder = tmp_path / "metrics.jsonl", tmp_path / "saved"
    tree = recipe(corpus, run_name="r", autoresume=True, save_folder=str(folder), metrics_file=str(metrics))
    split = {"local": str(corpus / "eval"), "batch_size": 64}
    tree |= {"max_duration": "3ba", "save_interval": "3ba", "eval": {"shapes": split}, "eval_first": True}
    path = str(write_recipe(tmp_path / "recipe.yaml", tree))
    main(path, [])
    once = metrics.read_text(encoding="utf-8").splitlines()
    main(path, [])
    assert "nothing is left to train" in caplog.text
    # What came after the checkpoint, the last evaluation, is there once more and not twice.
    again = metrics.read_text(encoding="utf-8").splitlines()
    assert again == once and "metrics/shapes" in once[-1]
    # Killed right after its last checkpoint.
    metrics.write_text("\n".join(once[:-1]) + "\n", encoding="utf-8")
    main(path, [])
    assert metrics.read_text(encoding="utf-8").splitlines() == once
