"""The gallery against the ledger and the folder itself, across crashes, resumption, ranks and ways of reading."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Trainer
from corpora import draw_corpus, recipe, write_recipe
from PIL import Image
from runs import algorithm_of, run_ranks, write_columns
from streaming import StreamingDataset

from clipcov_stream import candidates
from clipcov_stream.candidates import SHOWN, Noted, chosen_to_show, counted, evenly, vocabulary
from clipcov_stream.config import load_config
from clipcov_stream.gallery import has_order
from clipcov_stream.ledger import read_ledger
from clipcov_stream.records import GALLERY_FILE as FILE
from clipcov_stream.records import read_gallery
from clipcov_stream.train import build_trainer

POOL, STEPS = 32, 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


class Crash(Callback):
    """Raises in the middle of step number `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_forward(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) == self.step:
            raise InterruptedError


class Gains(Callback):
    """What the algorithm says of its survivors, by step."""

    def __init__(self) -> None:
        self.by_step: list[dict[int, float]] = []

    def before_forward(self, state: Any, logger: Any) -> None:
        (selection,) = state.algorithms
        gains = getattr(selection, "survivor_gains", None)
        gains = torch.full((len(selection.survivor_ids),), torch.nan) if gains is None else gains
        self.by_step.append(dict(zip(selection.survivor_ids.tolist(), gains.tolist(), strict=True)))


def tree_of(corpus: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """Six pools in the folder's order, each of which is recorded."""
    beside = {"ledger": str(folder / "ledger"), "gallery": str(folder / "gallery"), "gallery_interval": "1ba"}
    tree = recipe(corpus, run_name="run", **{**beside, **sections})
    tree["stream"] |= {"shuffle": False}
    return tree


def trainer_of(folder: Path, tree: dict[str, Any], *callbacks: Callback) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(load_config(str(write_recipe(folder / "recipe.yaml", tree))))
    trainer.state.callbacks.extend(callbacks)
    return trainer


def fit(trainer: Trainer) -> None:
    trainer.fit()
    trainer.close()


def survivors_by_step(folder: Path) -> list[list[int]]:
    """What each step trained on, in the order chosen, by the ledger."""
    (record,) = read_ledger(folder / "ledger")
    return [record.sample[record.step == step].tolist() for step in np.unique(record.step)]


def of_folder(corpus: Path) -> list[dict[str, Any]]:
    """Every sample, as Streaming itself reads it."""
    samples = StreamingDataset(local=str(corpus / "train"), shuffle=False, batch_size=1)
    return [samples[number] for number in range(samples.num_samples)]


def test_records_are_the_pools_and_what_the_ledger_has_of_them(tmp_path: Path, corpus: Path) -> None:
    gains = Gains()
    fit(trainer_of(tmp_path, tree_of(corpus, tmp_path), gains))
    header, records = read_gallery(tmp_path / "gallery")
    truth = of_folder(corpus)
    assert header["classes"] == json.loads((corpus / "train" / "classes.json").read_text())["classnames"]
    assert [record["step"] for record in records] == list(range(STEPS))
    assert [record["is_warmup"] for record in records] == [True] * 2 + [False] * 4
    for record, survivors in zip(records, survivors_by_step(tmp_path), strict=True):
        step, kept = record["step"], set(survivors)
        pool = range(step * POOL, (step + 1) * POOL)
        assert (record["pool_size"], record["num_kept"], record["looked_at"]) == (POOL, len(kept), [POOL, len(kept)])
        for kind in {truth[sample]["class_id"] for sample in pool}:
            of_kind = {sample for sample in pool if truth[sample]["class_id"] == kind}
            assert record["classes"][str(kind)] == [len(of_kind), len(of_kind & kept)]
        for flag in ("mismatched", "generic"):
            of_kind = {sample for sample in pool if truth[sample][flag]}
            assert record["flags"][flag] == [len(of_kind), len(of_kind & kept)]
        copies = {sample for sample in pool if truth[sample]["duplicate_of"]}
        assert record["copies"] == [len(copies), len(copies & kept)]
        groups = [{truth[sample]["duplicate_of"] for sample in part} for part in (copies, copies & kept)]
        assert record["groups"] == [len(group) for group in groups]
        for word, (of_pool, of_kept) in record["words"].items():
            with_word = {sample for sample in pool if word in vocabulary(truth[sample]["caption"])}
            assert [of_pool, of_kept] == [len(with_word), len(with_word & kept)]
        shown = record["shown"]
        assert len(shown) == len(kept) + SHOWN  # 8 of 8 kept, 12 of 24 dropped
        assert [entry["id"] for entry in shown if entry["kept"]] == survivors
        assert [entry["place"] for entry in shown if entry["kept"]] == list(range(len(survivors)))
        for entry in shown:
            sample = truth[entry["id"]]
            assert entry["kept"] == (entry["id"] in kept)
            assert (entry["caption"], entry["class"]) == (sample["caption"], str(sample["class_id"]))
            assert entry.get("flags", []) == [flag for flag in ("mismatched", "generic") if sample[flag]]
            assert entry.get("duplicate_of", "") == sample["duplicate_of"]
            assert ("alignment" in entry) == (not record["is_warmup"])
            gain = gains.by_step[step].get(entry["id"], np.nan)
            assert entry.get("gain", np.nan) == pytest.approx(gain, nan_ok=True)
        dropped = [entry["alignment"] for entry in shown if not entry["kept"] and "alignment" in entry]
        assert dropped == sorted(dropped, reverse=True)
    entry = records[-1]["shown"][-1]
    ours = Image.open(io.BytesIO(base64.b64decode(entry["jpeg"])))
    theirs = [Image.open(io.BytesIO(sample["image"])) for sample in truth]
    assert ours.size == theirs[0].size == (entry["width"], entry["height"])
    # One more JPEG: it is the sample's own picture that it is closest to.
    apart = [np.abs(np.asarray(ours, int) - np.asarray(other, int)).mean() for other in theirs]
    assert int(np.argmin(apart)) == entry["id"]


def test_alignments_are_the_cosines_of_the_columns(tmp_path: Path) -> None:
    local = write_columns(tmp_path / "mds", 96)
    tree = tree_of(tmp_path, tmp_path, selection={"embed": "columns", "warmup": "0ba"}, max_duration="3ba")
    tree["stream"]["local"] = str(local)
    fit(trainer_of(tmp_path, tree))
    rows = StreamingDataset(local=str(local), shuffle=False, batch_size=1)
    entries = [entry for record in read_gallery(tmp_path / "gallery")[1] for entry in record["shown"]]
    assert len(entries) == 3 * 20
    for entry in entries:
        image, text = (rows[entry["id"]][key].astype(float) for key in ("image_embedding", "text_embedding"))
        cosine = image @ text / np.linalg.norm(image) / np.linalg.norm(text)
        assert entry["alignment"] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize("ahead", [0, 2])
def test_only_what_is_shown_is_decoded_and_running_ahead_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    local = write_columns(tmp_path / "mds", 200)
    decoded: list[int] = []
    original = candidates.decode_image

    def noted(*arguments: Any) -> Image.Image:
        decoded.append(1)
        return original(*arguments)

    monkeypatch.setattr(candidates, "decode_image", noted)
    chosen = {"embed": "columns", "warmup": "1ba", "lag_delay": 2, "run_ahead": ahead}
    tree = tree_of(tmp_path, tmp_path, selection=chosen, gallery_interval="2ba")
    tree["stream"]["local"] = str(local)
    fit(trainer_of(tmp_path, tree))
    _, records = read_gallery(tmp_path / "gallery")
    assert [record["step"] for record in records] == [1, 3, 5]
    assert len(decoded) == sum(len(record["shown"]) for record in records) == 3 * 20
    for record in records:
        survivors = survivors_by_step(tmp_path)[record["step"]]
        assert [entry["id"] for entry in record["shown"] if entry["kept"]] == survivors
        assert record["copies_by"] == "bytes"
        assert record["looked_at"] == [POOL, 8]


def test_a_resumed_run_leaves_the_straight_runs_gallery(tmp_path: Path, corpus: Path) -> None:
    fit(trainer_of(tmp_path / "straight", tree_of(corpus, tmp_path / "straight")))
    saving = {"save_folder": str(tmp_path / "saved"), "save_interval": "2ba"}
    tree = tree_of(corpus, tmp_path / "again", **saving)
    with pytest.raises(InterruptedError):
        trainer_of(tmp_path / "again", tree, Crash(5)).fit()
    path = tmp_path / "again" / "gallery" / FILE
    straight = (tmp_path / "straight" / "gallery" / FILE).read_bytes()
    cut = path.read_bytes()
    assert cut == b"".join(straight.splitlines(keepends=True)[:6])  # five whole steps and the header
    path.write_bytes(cut[:-40])  # as a kill in the middle of a write leaves it
    assert len(read_gallery(path)[1]) == 4
    fit(trainer_of(tmp_path / "again", {**tree, "load_path": str(tmp_path / "saved" / "latest-rank0.pt")}))
    assert path.read_bytes() == straight


def test_a_run_that_starts_anew_sets_its_names_gallery_aside(tmp_path: Path, corpus: Path) -> None:
    tree = tree_of(corpus, tmp_path, max_duration="1ba", selection={"warmup": "0ba"}, ledger=None)
    path = tmp_path / "gallery" / FILE
    fit(trainer_of(tmp_path, tree))
    old = path.read_bytes()
    for number in (1, 2):
        with pytest.warns(UserWarning, match=rf"gallery=.* had lines, .* they are in 'gallery\.jsonl\.{number}'"):
            fit(trainer_of(tmp_path, tree))
        assert path.read_bytes() == old == path.with_name(f"{FILE}.{number}").read_bytes()
    path.write_bytes(old.splitlines(keepends=True)[0])  # killed before its first record: nothing is lost
    fit(trainer_of(tmp_path, tree))
    assert path.read_bytes() == old and len(list(path.parent.iterdir())) == 3


@pytest.mark.parametrize(
    ("gain", "num_ranks", "ordered"),
    [(None, 1, True), ([np.nan] * 2, 1, True), (None, 2, False), ([np.nan] * 2, 2, False), ([np.nan, 1.0], 2, True)],
)
def test_ranks_shares_have_an_order_by_gain_alone(gain: list[float] | None, num_ranks: int, ordered: bool) -> None:
    assert has_order(gain, num_ranks) is ordered


def test_galleries_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path, corpus: Path) -> None:
    tree = tree_of(corpus, tmp_path, max_duration="1ba", selection={"warmup": "0ba"})
    fit(trainer_of(tmp_path, tree))
    with pytest.raises(ValueError, match=r"seed=0, not 1; give another folder"):
        trainer_of(tmp_path, {**tree, "seed": 1, "ledger": None}).fit()
    path = tmp_path / "gallery" / FILE
    header, record = path.read_text().splitlines()
    path.write_text(f"{header}\n{record[:50]}\n{record}\n")
    with pytest.raises(ValueError, match="is damaged"):
        read_gallery(path)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="not a gallery of this version"):
        read_gallery(path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"gallery": "s3://bucket/gallery"}, "is remote"),
        ({"gallery_interval": "1ep"}, r"gallery_interval='1ep' must be above 0, in batches"),
        ({"gallery_interval": "0ba"}, r"gallery_interval='0ba' must be above 0"),
        ({"gallery_interval": "often"}, r"gallery_interval='often' is not a Composer time"),
    ],
)
def test_bad_keys_stop_before_training(tmp_path: Path, corpus: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tree_of(corpus, tmp_path, **sections))


def test_an_interval_is_a_share_of_the_run(tmp_path: Path, corpus: Path) -> None:
    # An epoch is six pools.
    lasting = {"max_duration": "2ep", "gallery_interval": "0.25dur", "scheduler": {"t_warmup": "1ep"}}
    fit(trainer_of(tmp_path, tree_of(corpus, tmp_path, **lasting)))
    assert [record["step"] for record in read_gallery(tmp_path / "gallery")[1]] == [2, 5, 8, 11]


def test_a_gallery_needs_an_algorithm_that_names_its_candidates(tmp_path: Path, corpus: Path) -> None:
    trainer = trainer_of(tmp_path, tree_of(corpus, tmp_path))
    trainer.state.algorithms.remove(algorithm_of(trainer))
    with pytest.raises(ValueError, match="no algorithm says what its candidates were"):
        trainer.fit()


def test_loggers_that_take_images_get_both_sheets(tmp_path: Path, corpus: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tree = tree_of(corpus, tmp_path, gallery_interval="3ba")
    tree["loggers"] = {"tensorboard": {"log_dir": str(tmp_path / "board"), "flush_interval": 1}}
    fit(trainer_of(tmp_path, tree))
    (folder,) = {events.parent for events in (tmp_path / "board").rglob("events.out.*")}
    board = event_accumulator.EventAccumulator(str(folder), size_guidance={"images": 0})
    board.Reload()
    assert set(board.Tags()["images"]) == {"gallery/kept", "gallery/dropped"}
    assert "selection/step_ms" in board.Tags()["scalars"]
    sheets = {
        name: [Image.open(io.BytesIO(event.encoded_image_string)) for event in board.Images(name)]
        for name in ("gallery/kept", "gallery/dropped")
    }
    assert {name: len(of) for name, of in sheets.items()} == {"gallery/kept": 2, "gallery/dropped": 2}
    kept, dropped = (np.asarray(of[-1].convert("RGB")) for of in sheets.values())
    assert kept.shape == dropped.shape  # 8 and 12 thumbnails are two rows of six
    assert (kept != 255).any(2).mean() > 0.02 and not np.array_equal(kept, dropped)


def test_copies_are_equal_bytes_where_no_column_says_so() -> None:
    pool = [("a", "red shoe", True), ("a", "red shoes", False), ("b", "the red hat", True), ("c", "x", False)]
    found = [({"image": name.encode(), "caption": caption}, kept) for name, caption, kept in pool]
    record = counted(found, "caption", "image", None)
    assert (record["copies"], record["groups"], record["copies_by"]) == ([2, 1], [1, 1], "bytes")
    assert record["words"] == {"red": [3, 2], "shoe": [1, 1], "shoes": [1, 0], "hat": [1, 1]}
    assert counted(found, "caption", "image", ["hat", "scarf"])["words"] == {"hat": [1, 1], "scarf": [0, 0]}
    assert "classes" not in record and "flags" not in record
    apart = [
        ({**sample, "duplicate_of": name}, kept) for (sample, kept), name in zip(found, ["h", "", "h", ""], strict=True)
    ]
    record = counted(apart, "caption", "image", None)
    assert (record["copies"], record["groups"], record["copies_by"]) == ([2, 2], [1, 1], "duplicate_of")
    unread = counted([({"caption": "red"}, True)], "caption", "image", None)  # as with range reads
    assert (unread["copies"], unread["groups"], unread["copies_by"]) == ([0, 0], [0, 0], None)


@pytest.mark.parametrize(("length", "most"), [(0, 5), (3, 5), (5, 5), (128, 12), (13, 12)])
def test_rows_are_spaced_evenly(length: int, most: int) -> None:
    rows = evenly(range(length), most)
    assert len(rows) == min(length, most) and rows == sorted(set(rows))
    if length > most:
        gaps = np.diff(rows)
        assert rows[0] == 0 and rows[-1] == length - 1 and gaps.max() - gaps.min() <= 1


def test_dropped_candidates_go_from_the_best_aligned_to_the_worst() -> None:
    alignment = [0.1, np.nan, 0.9, 0.5, -0.2]
    taken = Noted(candidates=[7, 8, 9, 10, 11], survivors=[10, 7], gain=None, alignment=alignment, is_warmup=False)
    assert chosen_to_show(taken, {10: 0, 7: 1}) == [3, 0, 2, 4, 1]


@pytest.mark.slow  # 20 s: starts two ranks
@pytest.mark.parametrize("selector", ["clipcov", "clip_score"])
def test_global_selection_shows_what_other_ranks_train_on(tmp_path: Path, corpus: Path, selector: str) -> None:
    tree = tree_of(corpus, tmp_path, selection={"scope": "global", "selector": selector}, max_duration="12ba")
    run_ranks(tmp_path / "ranks", write_recipe(tmp_path / "recipe.yaml", tree), 2)
    records = read_gallery(tmp_path / "gallery")[1]
    ledgers = read_ledger(tmp_path / "ledger")
    kept_here = []
    for record in records:
        everywhere = {sample for ledger in ledgers for sample in ledger.sample[ledger.step == record["step"]].tolist()}
        own = set(ledgers[0].sample[ledgers[0].step == record["step"]].tolist())
        shown = {entry["id"]: entry["kept"] for entry in record["shown"]}
        assert {sample for sample, kept in shown.items() if kept} == everywhere & shown.keys()
        assert record["pool_size"] == POOL // 2
        placed = {"place" in entry for entry in record["shown"] if entry["kept"]}
        assert placed <= {selector == "clipcov" and not record["is_warmup"]}  # no gains, no order
        kept_here.append({sample for sample, kept in shown.items() if kept} - own)
    assert any(kept_here)  # survivors of this rank's pool that the other rank trained on
