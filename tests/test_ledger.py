"""The ledger against what a run was seen to train on, across crashes, kills, resumption and ranks."""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Trainer
from corpora import draw_corpus, recipe, write_recipe
from forked import run_forked
from streaming import MDSWriter, StreamingDataset

from clipcov_stream import Pool, Selector
from clipcov_stream.config import load_config
from clipcov_stream.ledger import (
    Ledger,
    Record,
    agreed,
    append,
    end_before,
    index_hash,
    read_file,
    read_ledger,
    rewind,
    samples_of,
)
from clipcov_stream.objective import Settings
from clipcov_stream.train import build_trainer

SURVIVORS = 8
BLOCK = 16 + 12 * SURVIVORS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


class Seen(Callback):
    """What every step trains on, by its pixels and tokens."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def before_train_batch(self, state: Any, logger: Any) -> None:
        assert set(state.batch) == {"image", "text"}
        self.batches.append({key: value.clone() for key, value in state.batch.items()})


class Crash(Callback):
    """Raises in the middle of step number `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_forward(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) == self.step:
            raise InterruptedError


def recorded(corpus: Path, ledger: Path, **sections: Any) -> dict[str, Any]:
    return recipe(corpus, max_duration="9ba", run_name="run", ledger=str(ledger), **sections)


def trainer_of(folder: Path, tree: dict[str, Any], *callbacks: Callback) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(load_config(str(write_recipe(folder / "recipe.yaml", tree))))
    trainer.state.callbacks.extend(callbacks)
    return trainer


def fit(trainer: Trainer) -> None:
    trainer.fit()
    trainer.close()


def only(folder: Path) -> Record:
    (record,) = read_ledger(folder)
    return record


def test_the_ledger_is_what_was_trained_on(tmp_path: Path, corpus: Path) -> None:
    seen = Seen()
    # Without augmentation, so that a sample has the same pixels whenever it is read.
    trainer = trainer_of(tmp_path, recorded(corpus, tmp_path / "ledger", stream={"min_scale": 1.0}), seen)
    fit(trainer)
    record, loader = only(tmp_path / "ledger"), trainer.state.train_dataloader
    assert record.step.tolist() == [step for step in range(9) for _ in range(SURVIVORS)]
    assert record.torn_bytes == 0 and len(seen.batches) == 9
    for step, batch in enumerate(seen.batches):
        pool = loader.collate_fn([loader.dataset[int(i)] for i in record.sample[record.step == step]])
        pool["image"] = loader.normalize(pool["image"])
        # Row by row: the order chosen is kept.
        assert torch.equal(batch["text"], pool["text"]) and torch.equal(batch["image"], pool["image"]), step
    index = (corpus / "train" / "index.json").read_bytes()
    wanted = {"run_name": "run", "folder": index_hash(index), "pool_size": 32, "num_samples": 192, "num_ranks": 1}
    assert wanted.items() <= record.header.items()
    assert {"version": 2, "seed": 0, "selector": "clipcov", "filter_ratio": 0.75}.items() <= record.header.items()
    size = (tmp_path / "ledger" / "rank00000.ledger").stat().st_size
    assert 9 * BLOCK < size < 9 * BLOCK + 1000


def with_columns(corpus: Path, folder: Path) -> Path:
    """The corpus, with numbered captions and embeddings of no meaning."""
    rng, source = np.random.default_rng(0), StreamingDataset(local=str(corpus / "train"), batch_size=1)
    columns = {"image": "bytes", "caption": "str", "image_embedding": "ndarray", "text_embedding": "ndarray"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for number, sample in enumerate(source):
            image, text = rng.standard_normal((2, 4), np.float32)
            kept = {"image": sample["image"], "caption": f"number {number}"}
            writer.write({**kept, "image_embedding": image, "text_embedding": text})
    return folder


def test_ids_stay_with_their_samples_where_selection_runs_on_columns(tmp_path: Path, corpus: Path) -> None:
    folder, seen = with_columns(corpus, tmp_path / "mds"), Seen()
    tree = recorded(corpus, tmp_path / "ledger", selection={"embed": "columns"}, stream={"local": str(folder)})
    trainer = trainer_of(tmp_path, tree, seen)
    fit(trainer)
    record, tokenizer = only(tmp_path / "ledger"), trainer.state.train_dataloader.dataset.tokenizer
    assert len(record.step) == 9 * SURVIVORS == 9 * len(set(record.sample[:SURVIVORS].tolist()))
    for step, batch in enumerate(seen.batches):
        captions = [tokenizer(f"number {i}") for i in record.sample[record.step == step]]
        assert torch.equal(batch["text"], torch.stack(captions)), step


@pytest.mark.parametrize("selector", ["clipcov", "clip_score"])
def test_gains_are_those_of_a_selector_that_is_given_the_same_pools(
    tmp_path: Path, corpus: Path, selector: str
) -> None:
    folder = with_columns(corpus, tmp_path / "mds")
    # Without a learner's lag, which a selector outside of training does not know.
    knobs = {"embed": "columns", "selector": selector, "learnability": 0.0, "warmup": "2ba"}
    sections = {"selection": knobs, "stream": {"local": str(folder)}}
    tree = {**recorded(corpus, tmp_path / "ledger", **sections), "max_duration": "4ba"}
    fit(trainer_of(tmp_path, tree))
    record = only(tmp_path / "ledger")
    assert record.sample.shape == record.gain.shape == (4 * SURVIVORS,)
    chosen = record.step >= 2
    assert np.isnan(record.gain[~chosen]).all()
    if selector == "clip_score":
        assert np.isnan(record.gain).all()
        return
    assert np.isfinite(record.gain[chosen]).all() and len(set(record.gain[chosen].tolist())) > SURVIVORS
    selecting = Selector(selector, seed=tree.get("seed", 0), settings=Settings(learnability=0.0))
    pools = list(trainer_of(tmp_path, {**tree, "ledger": None}).state.train_dataloader)
    for step in (2, 3):
        rows = [torch.nn.functional.normalize(pools[step][f"{name}_embedding"].float()) for name in ("image", "text")]
        survivors = selecting(Pool(*rows, 100.0), SURVIVORS)
        assert pools[step]["id"][survivors].tolist() == record.sample[record.step == step].tolist()
        assert selecting.gain is not None
        np.testing.assert_allclose(selecting.gain, record.gain[record.step == step], rtol=1e-4, atol=1e-5)


def test_no_ledger_unless_asked_for(tmp_path: Path, corpus: Path) -> None:
    trainer = trainer_of(tmp_path, recipe(corpus))
    assert not any(isinstance(callback, Ledger) for callback in trainer.state.callbacks)


@pytest.mark.parametrize(("saved", "crashed"), [(2, 5), (7, 7)])
def test_crashed_and_resumed_equals_straight(tmp_path: Path, corpus: Path, saved: int, crashed: int) -> None:
    fit(trainer_of(tmp_path, recorded(corpus, tmp_path / "straight")))
    wanted = (tmp_path / "straight" / "rank00000.ledger").read_bytes()
    ledger = tmp_path / "ledger"
    checkpoints = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": f"{saved}ba"}
    first = trainer_of(tmp_path, recorded(corpus, ledger, **checkpoints), Crash(crashed))
    with pytest.raises(InterruptedError):
        first.fit()
    first.close()
    # The step that crashed was never trained.
    assert only(ledger).step.max() == crashed - 1
    with (ledger / "rank00000.ledger").open("ab") as file:
        file.write(wanted[-BLOCK : -BLOCK // 2])  # what a kill in the middle of a write would leave
    assert only(ledger).torn_bytes == BLOCK // 2
    newest = tmp_path / "checkpoints" / "latest-rank0.pt"
    fit(trainer_of(tmp_path, recorded(corpus, ledger, load_path=str(newest))))
    assert (ledger / "rank00000.ledger").read_bytes() == wanted


KILLED = """
import os, signal, sys
from composer import Callback
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer, leave_group
class Kill(Callback):
    def after_backward(self, state, logger):
        if int(state.timestamp.batch) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
trainer = build_trainer(load_config(sys.argv[1], sys.argv[3:]))
trainer.state.callbacks.append(Kill())
trainer.fit()
trainer.close()
leave_group()
"""


def columns_of(record: Record) -> list[np.ndarray]:
    return [record.sample, record.step, record.gain]


def test_two_ranks_killed_and_resumed_equal_straight(tmp_path: Path, corpus: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    # Global, where ranks exchange survivors: the ids must travel with them.
    tree = recorded(corpus, tmp_path / "{seed}", selection={"scope": "global"}, autoresume=True, save_interval="4ba")
    path = str(write_recipe(tmp_path / "recipe.yaml", {**tree, "save_folder": str(tmp_path / "saved")}))

    def launch(kill_at: int, *overrides: str, num_ranks: int = 2) -> int:
        done = run_forked(tmp_path, num_ranks, script, path, str(kill_at), *overrides)
        said.append(done.stdout + done.stderr)
        return done.returncode

    said: list[str] = []
    straight, ledger = tmp_path / "straight", tmp_path / "0"
    assert launch(-1, f"ledger={straight}", "autoresume=false", "save_folder=null") == 0
    assert launch(6) != 0
    steps = {int(record.step.max()) for record in read_ledger(ledger)}
    assert steps <= {3, 4, 5}  # a rank may have been stopped before its own turn
    # A step that a rank trained is missing in its file: whoever goes on is told, and nothing was cut off.
    second = ledger / "rank00001.ledger"
    before, first = second.read_bytes(), (ledger / "rank00000.ledger").read_bytes()
    rewind(second, 3)
    short = second.read_bytes()
    for num_ranks in (2, 1):
        assert launch(-1, num_ranks=num_ranks) != 0
        assert "of rank 1 ends after step 2, but training goes on from step 4" in said[-1], said[-1]
    assert second.read_bytes() == short and (ledger / "rank00000.ledger").read_bytes() == first
    second.write_bytes(before)
    assert launch(-1) == 0
    for rank in range(2):
        name = f"rank{rank:05}.ledger"
        assert (ledger / name).read_bytes() == (straight / name).read_bytes()
    records = read_ledger(ledger)
    assert [record.rank for record in records] == [0, 1]
    for step in range(9):
        ids = np.concatenate([record.sample[record.step == step] for record in records])
        assert len(set(ids.tolist())) == len(ids) == SURVIVORS
    # One rank that chooses from the same pools: every sample's gain has travelled to the rank that trained it.
    fit(build_trainer(load_config(path, [f"ledger={tmp_path / 'one'}", "autoresume=false", "save_folder=null"])))
    one, two = only(tmp_path / "one"), [np.concatenate(parts) for parts in zip(*map(columns_of, records), strict=True)]
    by_step, by_step_too = np.lexsort(columns_of(one)[:2]), np.lexsort(two[:2])
    for ours, theirs in zip(columns_of(one), two, strict=True):
        np.testing.assert_allclose(ours[by_step], theirs[by_step_too], rtol=1e-3, atol=1e-3)


# Files ---------------------------------------------------------------------------------------------------------------


def gain_of(sample: int, step: int) -> float:
    """Any number that float32 holds, and now and then none."""
    return math.nan if sample == 9 else sample / 8 - step


def written(place: Path, blocks: list[list[int]], rank: int = 0, first: int = 0, **header: Any) -> Path:
    """A ledger by the format's description, with none of the package's own code; from the step `first` on."""
    text = json.dumps({"version": 2, "rank": rank, "num_ranks": 1, **header}).encode()
    data = b"CLEDGER2" + struct.pack("<II", len(text), zlib.crc32(text)) + text
    for step, ids in enumerate(blocks, first):
        body = b"".join(struct.pack("<Qf", i, gain_of(i, step)) for i in ids)
        head = struct.pack("<QI", step, len(ids))
        data += head + struct.pack("<I", zlib.crc32(head + body)) + body
    place.mkdir(exist_ok=True)
    path = place / f"rank{rank:05}.ledger"
    path.write_bytes(data)
    return path


STEPS = [[5, 2, 9], [7, 1, 2**40], [0, 3, 4], [8, 6, 5]]


def test_the_format_is_as_described(tmp_path: Path) -> None:
    path = written(tmp_path / "a", STEPS, seed=3)
    record = read_file(path)
    assert record.sample.tolist() == [i for ids in STEPS for i in ids]
    assert record.step.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    wanted = [gain_of(i, step) for step, ids in enumerate(STEPS) for i in ids]
    np.testing.assert_array_equal(record.gain, np.array(wanted, np.float32))
    assert np.isnan(record.gain).sum() == 1 and record.header["seed"] == 3
    ours = io.BytesIO()
    for step, ids in enumerate(STEPS):
        gains = torch.tensor([gain_of(i, step) for i in ids])
        append(ours, step, samples_of(torch.tensor(ids), gains))
    assert path.read_bytes().endswith(ours.getvalue())


def test_a_file_cut_anywhere_keeps_its_whole_steps(tmp_path: Path) -> None:
    path = written(tmp_path / "a", STEPS)
    whole, block = path.read_bytes(), 16 + 3 * 12
    for cut in range(1, 2 * block + 1):
        path.write_bytes(whole[:-cut])
        record = read_file(path)
        kept = 4 - -(-cut // block)
        assert record.sample.tolist() == [i for ids in STEPS[:kept] for i in ids]
        assert record.torn_bytes == (-cut) % block
    for at in range(1, block):  # or filled with zeros, as a machine that lost power may leave it
        path.write_bytes(whole[:-at] + bytes(at) if any(whole[-at:]) else whole)
        assert len(read_file(path).sample) in (9, 12)


def test_damage_elsewhere_than_at_the_end_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a", [*STEPS, *STEPS])
    whole, start = path.read_bytes(), len(path.read_bytes()) - 8 * 52
    path.write_bytes(whole[: start + 60] + b"\xff" + whole[start + 61 :])
    with pytest.raises(ValueError, match=rf"is damaged at byte {start + 52}: {7 * 52} bytes follow"):
        read_file(path)
    with pytest.raises(ValueError, match=rf"is damaged at byte {start + 52}"):
        rewind(path, 7)
    path.write_bytes(whole[:20] + b"\xff" + whole[21:])
    with pytest.raises(ValueError, match="is damaged in its header"):
        read_file(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="is not a ledger of this version"):
        read_file(path)


def test_damage_in_the_first_block_is_an_error(tmp_path: Path) -> None:
    """There the header says how large a block can be."""
    path = written(tmp_path / "a", STEPS, pool_size=3)
    whole, start = path.read_bytes(), len(path.read_bytes()) - 4 * 52
    path.write_bytes(whole[: start + 20] + b"\xff" + whole[start + 21 :])
    for read in (read_file, lambda damaged: rewind(damaged, 4)):
        with pytest.raises(ValueError, match=rf"is damaged at byte {start}: {4 * 52} bytes follow"):
            read(path)
    path.write_bytes(whole[: start + 20])
    assert read_file(path).torn_bytes == 20 and rewind(path, 4) == -1


def test_steps_that_do_not_ascend_are_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a", STEPS)
    whole = path.read_bytes()
    for again, step in ((whole[-52:], 3), (whole[-2 * 52 : -52], 2)):  # what two live runs of one name wrote
        path.write_bytes(whole + again)
        with pytest.raises(
            ValueError, match=rf"is damaged: step {step}, which ends at byte \d+, follows step 3, as if"
        ):
            read_ledger(tmp_path / "a")


def test_steps_to_come_that_never_reached_the_disk_are_dropped(tmp_path: Path) -> None:
    """After a loss of power a file may have its length but not its data: of several steps, all after a checkpoint."""
    path = written(tmp_path / "a", [*STEPS, *STEPS])
    whole = path.read_bytes()
    path.write_bytes(whole[: -5 * 52] + bytes(5 * 52))
    with pytest.raises(ValueError, match=f"is damaged at byte {len(whole) - 5 * 52}"):
        rewind(path, 4)
    assert rewind(path, 3) == 2 and path.read_bytes() == whole[: -5 * 52]


def test_whole_steps_to_come_are_no_damage_however_many(tmp_path: Path) -> None:
    """Of a rank that came or came back at step 10, and was stopped before the next checkpoint."""
    for before in ([], STEPS[:2]):
        path = written(tmp_path / "a", before, pool_size=3)
        whole = path.read_bytes()
        with path.open("ab") as file:
            for step in range(10, 30):
                append(file, step, samples_of(torch.arange(3), None))
        assert end_before(path, 10) == (len(before) - 1, len(whole))
        assert rewind(path, 10) == len(before) - 1 and path.read_bytes() == whole


def test_what_one_rank_cannot_read_is_an_error() -> None:
    def lost() -> int:
        raise OSError("no disk")

    with pytest.raises(ValueError, match="no disk"):
        agreed(lost)
    assert agreed(lambda: 3) == [3]


def test_rewinding_drops_steps_to_come(tmp_path: Path) -> None:
    path = written(tmp_path / "a", STEPS)
    for step in (9, 4, 2, 0):
        assert rewind(path, step) == min(step, 4) - 1
        assert read_file(path).sample.tolist() == [i for ids in STEPS[:step] for i in ids]


def test_a_folder_that_lacks_a_rank_or_mixes_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no ledger there \(a folder with rank00000\.ledger\)"):
        read_ledger(tmp_path)
    written(tmp_path / "a", STEPS, rank=1, num_ranks=3)
    with pytest.raises(ValueError, match=r"has files of ranks \[1\]; it must have one of each of \[0, 1, 2\]"):
        read_ledger(tmp_path / "a")
    for rank in (0, 2):
        written(tmp_path / f"node{rank}", STEPS, rank=rank, num_ranks=3)
    places = [tmp_path / "node2", tmp_path / "a" / "rank00001.ledger", tmp_path / "node0"]
    assert [record.rank for record in read_ledger(*places)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"has files of ranks \[0, 1, 1, 2\]"):
        read_ledger(*places, tmp_path / "a")
    written(tmp_path / "b", STEPS, seed=1)
    written(tmp_path / "b", STEPS, rank=1, seed=2)
    with pytest.raises(ValueError, match="is the ledger of a run with seed=2, not 1"):
        read_ledger(tmp_path / "b")


def test_another_runs_ledger_is_never_touched(tmp_path: Path, corpus: Path) -> None:
    ledger = tmp_path / "ledger"
    fit(trainer_of(tmp_path, {**recorded(corpus, ledger), "max_duration": "3ba"}))
    before = (ledger / "rank00000.ledger").read_bytes()
    other = trainer_of(tmp_path, {**recorded(corpus, ledger), "seed": 1, "run_name": "other"})
    with pytest.raises(ValueError, match=r"run_name='run', not 'other'; seed=0, not 1; give another folder"):
        other.fit()
    assert (ledger / "rank00000.ledger").read_bytes() == before


def test_a_run_that_starts_anew_sets_its_ledger_aside(tmp_path: Path, corpus: Path) -> None:
    ledger, tree = tmp_path / "ledger", {**recorded(corpus, tmp_path / "ledger"), "max_duration": "3ba"}
    fit(trainer_of(tmp_path, tree))
    path = ledger / "rank00000.ledger"
    before = path.read_bytes()
    other = written(ledger, STEPS, rank=1, num_ranks=2)  # of a run on more ranks
    for number in (1, 2):
        with pytest.warns(UserWarning, match=rf"had steps, but .* are in 'rank00000\.ledger\.{number}'"):
            fit(trainer_of(tmp_path, tree))
        assert (ledger / f"{path.name}.{number}").read_bytes() == before == path.read_bytes()
    assert not other.exists() and read_file(ledger / f"{other.name}.1").step.max() == 3
    rewind(path, 0)  # one without a step, as a kill before the first leaves it, is gone on with
    fit(trainer_of(tmp_path, tree))
    assert path.read_bytes() == before and len(list(ledger.iterdir())) == 4


def test_a_gap_is_an_error_and_a_late_beginning_a_warning(tmp_path: Path, corpus: Path) -> None:
    ledger = tmp_path / "ledger"
    saved = {"save_folder": str(tmp_path / "saved"), "save_interval": "4ba"}
    first = trainer_of(tmp_path, recorded(corpus, ledger, **saved), Crash(5))
    with pytest.raises(InterruptedError):
        first.fit()
    first.close()
    newest = str(tmp_path / "saved" / "latest-rank0.pt")
    rewind(ledger / "rank00000.ledger", 2)
    with pytest.raises(ValueError, match="ends after step 1, but training goes on from step 4"):
        trainer_of(tmp_path, recorded(corpus, ledger, load_path=newest)).fit()
    # On a new machine without the old one's disk; killed before its first checkpoint, it begins once more.
    killed = trainer_of(tmp_path, recorded(corpus, tmp_path / "late", load_path=newest), Crash(7))
    with pytest.warns(UserWarning, match="begins at step 4, not at 0"), pytest.raises(InterruptedError):
        killed.fit()
    killed.close()
    assert set(only(tmp_path / "late").step.tolist()) == {4, 5, 6}
    late = trainer_of(tmp_path, recorded(corpus, tmp_path / "late", load_path=newest))
    with pytest.warns(UserWarning, match="begins at step 4, not at 0"):
        late.fit()
    late.close()
    assert set(only(tmp_path / "late").step.tolist()) == {4, 5, 6, 7, 8}


def test_a_ledger_may_be_switched_on_or_off_at_a_checkpoint(tmp_path: Path, corpus: Path) -> None:
    without = {key: value for key, value in recorded(corpus, tmp_path).items() if key != "ledger"}
    saved = {"save_folder": str(tmp_path / "saved"), "save_interval": "4ba"}
    fit(trainer_of(tmp_path, {**without, **saved, "save_num_checkpoints_to_keep": 9}))
    middle = str(tmp_path / "saved" / "ep0-ba4-rank0.pt")
    tree = recorded(corpus, tmp_path / "on", load_path=middle, save_folder=str(tmp_path / "again"))
    with pytest.warns(UserWarning, match="Ledger is not in the state_dict"):  # Composer's, of any new callback
        on = trainer_of(tmp_path, tree)
    with pytest.warns(UserWarning, match="begins at step 4"):
        fit(on)
    fit(trainer_of(tmp_path, recorded(corpus, tmp_path / "straight")))
    late, whole = only(tmp_path / "on"), only(tmp_path / "straight")
    assert np.array_equal(late.sample, whole.sample[whole.step >= 4])
    off = trainer_of(
        tmp_path, {**without, "max_duration": "10ba", "load_path": str(tmp_path / "again" / "latest-rank0.pt")}
    )
    fit(off)
    assert int(off.state.timestamp.batch) == 10


def test_what_a_ledger_needs(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match="ledger='s3://b/x' is remote"):
        Ledger("s3://b/x")
    trainer = trainer_of(tmp_path, recorded(corpus, tmp_path / "ledger"))
    ledger = next(callback for callback in trainer.state.callbacks if isinstance(callback, Ledger))
    trainer.state.batch = {"image": torch.zeros(1), "text": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"needs the samples' 'id' in the batch, a dict, which has \['image', 'text'\]"
    ):
        ledger.after_dataloader(trainer.state, trainer.logger)
    with pytest.raises(ValueError, match=r"ledger='runs/\{run_name\}' needs a run_name"):
        load_config(str(write_recipe(tmp_path / "r.yaml", recipe(corpus, ledger="runs/{run_name}"))))
