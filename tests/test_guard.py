"""Shards that are damaged, missing or stuck: an error that names them, or skipped alike; never a short epoch.

Streaming's own behaviour, without the guards: the epoch ends early without an error, or hangs with workers.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from corpora import write_recipe
from forked import run_forked
from runs import Interrupt, assert_same_run, columns_recipe, run, run_ranks, synthetic_bytes, trainer_of
from streaming import MDSWriter, StreamingDataset
from streaming.base.compression import compress, decompress, get_compressions

from clipcov_stream import checked, remote
from clipcov_stream.checked import BadShard, CheckedStream, check_file, check_header, decompressed
from clipcov_stream.guard import GuardedDataset
from clipcov_stream.remote import read_agreed, within

if TYPE_CHECKING:
    from s3 import Bucket

ROWS = 160  # five pools of 32


def write_shards(folder: Path, hashes: tuple[str, ...] = ("sha1", "xxh64"), compression: str | None = None) -> Path:
    """An MDS folder with embedding columns, in shards of some eight samples."""
    rng, images = np.random.default_rng(0), synthetic_bytes(ROWS)
    columns = {"image": "bytes", "caption": "str", "image_embedding": "ndarray", "text_embedding": "ndarray"}
    options: dict[str, Any] = {"size_limit": 6000, "hashes": [*hashes], "compression": compression}
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for row, image in enumerate(images):
            rows = rng.normal(size=(2, 8)).astype(np.float16)
            writer.write({"image": image, "caption": f"{row}", "image_embedding": rows[0], "text_embedding": rows[1]})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("whole") / "mds")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Any:
    return run(tmp_path_factory.mktemp("straight"), tree_of(folder))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checked, remote):
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)


def tree_of(folder: Path, run_ahead: int = 0, **stream: Any) -> dict[str, Any]:
    tree = columns_recipe(folder, run_ahead=run_ahead, lag_delay=2, max_invalid_ratio=0.9)
    tree["stream"] |= {"timeout": 30, "shuffle": True, **stream}
    return {**tree, "max_duration": "7ba"}  # the run ends in the middle of the second epoch


def damage(path: Path) -> None:
    """Turn one bit over in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def shard_of(folder: Path, number: int = 3) -> Path:
    return sorted(folder.glob("shard.*"))[number]


def rows_in(folder: Path, number: int = 3) -> set[int]:
    """Ids of the samples of one shard."""
    shards = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]
    first = sum(shard["samples"] for shard in shards[:number])
    return set(range(first, first + shards[number]["samples"]))


@pytest.mark.parametrize("trouble", ["damaged", "missing", "truncated"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a_bad_shard_in_the_store_ends_the_run_by_its_name(
    tmp_path: Path, folder: Path, trouble: str, num_workers: int, run_ahead: int
) -> None:
    store = copied(folder, tmp_path / "store")
    shard = shard_of(store)
    if trouble == "damaged":
        damage(shard)
    elif trouble == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-7])
    where = {"remote": str(store), "local": str(tmp_path / "cache"), "num_workers": num_workers}
    trainer, _, _ = trainer_of(tmp_path, tree_of(folder, run_ahead, **where))
    reason = {"damaged": "its xxh64 is", "missing": "FileNotFoundError", "truncated": "bytes, the index says"}[trouble]
    with pytest.raises(
        (RuntimeError, BadShard), match=rf"(?s)shard {shard.name} of {store} cannot be used: .*{reason}"
    ):
        trainer.fit()
    trainer.close()
    assert int(trainer.state.timestamp.batch) < 5
    # What is bad has no name under which a later run would take it.
    assert not (tmp_path / "cache" / shard.name).exists()


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_damaged_cache_is_fetched_again(tmp_path: Path, straight: Any, folder: Path, compression: str | None) -> None:
    store = write_shards(tmp_path / "store", compression=compression)
    where = {"remote": str(store), "local": str(tmp_path / "cache")}
    run(tmp_path, tree_of(folder, **where))
    shards = sorted((tmp_path / "cache").glob("*.mds"))
    whole = [path.read_bytes() for path in shards]
    damage(shards[1])
    shards[2].write_bytes(b"")
    before = [shards[number].read_bytes() for number in (1, 2)]
    assert_same_run(run(tmp_path, tree_of(folder, **where)), straight)
    assert before != [shards[number].read_bytes() for number in (1, 2)]
    assert [path.read_bytes() for path in shards] == whole
    assert not list((tmp_path / "cache").glob("*.part"))


def test_the_users_own_damaged_shard_is_named_and_left_alone(tmp_path: Path, folder: Path) -> None:
    own = copied(folder, tmp_path / "own")
    damage(shard_of(own))
    before = shard_of(own).read_bytes()
    trainer, _, _ = trainer_of(tmp_path, tree_of(own))
    with pytest.raises(BadShard, match=rf"shard {shard_of(own).name} of {own} .*verify_mds.*on_bad_shard=skip"):
        trainer.fit()
    assert shard_of(own).read_bytes() == before


def unpacked(store: Path, cache: Path) -> Path:
    """A cache as a compressed store leaves it: shards without their zips."""
    GuardedDataset(CheckedStream(remote=str(store), local=str(cache)), batch_size=1)  # fetches the index alone
    for shard in json.loads((store / "index.json").read_bytes())["shards"]:
        data = decompress(shard["compression"], (store / shard["zip_data"]["basename"]).read_bytes())
        (cache / shard["raw_data"]["basename"]).write_bytes(data)
    return cache


def test_notes_in_a_shared_folder_for_temporary_files_are_not_this_runs(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Containers may share TMPDIR and not /dev/shm, and then number their runs alike.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = shard_of(folder, 0).name
    dataset = GuardedDataset(CheckedStream(local=str(folder)), batch_size=1)
    theirs = tmp_path / f"{dataset._shm_prefix_int:06}_bad_shards" / name
    theirs.parent.mkdir()
    theirs.write_text(json.dumps({"shard": name, "error": "theirs", "is_fatal": True}), encoding="utf-8")
    assert dataset[0]["caption"] == "0" and dataset.bad_shards() == {}


def test_a_state_that_was_loaded_is_said_again_until_it_is_iterated(folder: Path) -> None:
    dataset = GuardedDataset(CheckedStream(local=str(folder)), batch_size=1)
    assert dataset.state_dict(0, True)["epoch"] == 0
    state = {**dataset.state_dict(0, True), "epoch": 3}
    dataset.load_state_dict(state)
    assert dataset.state_dict(0, True) == state
    assert len(list(dataset)) == ROWS
    assert dataset.state_dict(0, True) == {**state, "epoch": 4}


BOMBS = """
import sys
from pathlib import Path
from clipcov_stream.checked import decompressed

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024

before = peak()
for path in map(Path, sys.argv[1:]):
    try:
        decompressed(path.name, path.read_bytes(), 1000)
    except OSError as error:
        assert "to the 1000 bytes that the index says" in str(error), error
    else:
        raise AssertionError(path)
print(peak() - before)
"""


def test_what_is_decompressed_takes_no_more_memory_than_the_index_promises(tmp_path: Path) -> None:
    size = 1 << 29
    names = ("br:1", "bz2:1", "gz:1", "snappy", "zstd:1")
    for name in names:
        (tmp_path / name).write_bytes(compress(name, bytes(size)))
    command = [sys.executable, "-c", BOMBS, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100


@pytest.mark.parametrize("compression", sorted(get_compressions()))
def test_what_is_decompressed_is_what_was_compressed(compression: str) -> None:
    data = b"".join(synthetic_bytes(8))
    packed = compress(compression, data)
    assert decompressed(compression, packed, len(data)) == data
    assert len(decompressed(compression, packed, len(data) + 1)) == len(data)  # which the check of its size finds
    assert decompressed(compression, compress(compression, b""), 0) == b""
    for promised, given in ((len(data) - 1, packed), (len(data), packed[:-1])):
        with pytest.raises(OSError, match=rf"cannot be decompressed \({compression}\) to the {promised} bytes that"):
            decompressed(compression, given, promised)


def test_a_shard_that_unpacks_to_more_than_its_index_says_is_bad(tmp_path: Path) -> None:
    own = write_shards(tmp_path / "own", hashes=(), compression="zstd")
    index = json.loads((own / "index.json").read_bytes())
    bomb = compress("zstd", bytes(1 << 26))
    packed = index["shards"][0]["zip_data"]
    (own / packed["basename"]).write_bytes(bomb)
    packed["bytes"] = len(bomb)
    (own / "index.json").write_text(json.dumps(index), encoding="utf-8")
    promised = index["shards"][0]["raw_data"]["bytes"]
    dataset = GuardedDataset(CheckedStream(local=str(own)), batch_size=1)
    with pytest.raises(BadShard, match=rf"cannot be decompressed \(zstd\) to the {promised} bytes that the index says"):
        dataset[0]
    assert dataset[max(rows_in(own))]


@pytest.mark.parametrize("number", [None, errno.EIO, errno.EMFILE, errno.EACCES])
def test_an_unpacked_cache_read_as_the_users_own_keeps_its_only_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    cache = unpacked(write_shards(tmp_path / "store", compression="zstd"), tmp_path / "cache")
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    dataset = GuardedDataset(CheckedStream(local=str(cache)), batch_size=1)
    errors, check = [OSError(number, "trouble")] * (number is not None), checked.check_file

    def check_at_first_not(*args: Any) -> None:
        if errors:
            raise errors.pop()
        check(*args)

    monkeypatch.setattr(checked, "check_file", check_at_first_not)
    if number in checked.OF_THIS_MACHINE:
        with pytest.raises(BadShard, match="trouble"):
            dataset[0]
    else:
        assert dataset[0]["caption"] == "0"
    damage(shard_of(cache))
    before[shard_of(cache).name] = shard_of(cache).read_bytes()
    with pytest.raises(BadShard, match="its xxh64 is"):
        dataset[min(rows_in(cache))]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def test_the_users_own_damaged_shard_is_unpacked_anew(tmp_path: Path) -> None:
    own = write_shards(tmp_path / "own", compression="zstd")
    zips = {path.name for path in own.iterdir()}
    # To Streaming a folder of another spelling is another folder, whose zips it drops.
    dataset = GuardedDataset(CheckedStream(local=str(own), remote=f"{own}/"), batch_size=1)
    first = min(rows_in(own))
    assert dataset[first]["caption"] == str(first)
    (shard,) = own.glob("*.mds")
    whole = shard.read_bytes()
    damage(shard)
    assert GuardedDataset(CheckedStream(local=str(own)), batch_size=1)[first]["caption"] == str(first)
    assert shard.read_bytes() == whole
    assert {path.name for path in own.iterdir()} == zips | {shard.name}


def test_an_error_of_this_machine_deletes_no_cached_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_shards(tmp_path / "store", compression="zstd")
    cache = unpacked(store, tmp_path / "cache")
    before = {path.name: path.read_bytes() for path in cache.iterdir()}

    def refuse(*args: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(checked, "check_file", refuse)
    with pytest.raises(BadShard, match="Too many open files"):
        GuardedDataset(CheckedStream(local=str(cache), remote=str(store)), batch_size=1)[0]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_shard_is_skipped_and_counted(tmp_path: Path, folder: Path, num_workers: int) -> None:
    own = copied(folder, tmp_path / "own")
    damage(shard_of(own))
    trainer, recorder, memory = run(tmp_path, tree_of(own, num_workers=num_workers, on_bad_shard="skip"))
    assert int(trainer.state.timestamp.batch) == 7
    lost = rows_in(own)
    assert memory.data["stream/bad_shards"][-1] == 1
    assert len(lost) <= memory.data["selection/num_invalid"][-1] <= 2 * len(lost)
    assert memory.data["selection/num_invalid"][4] == len(lost)  # the whole first epoch
    assert len(recorder.batches) == 7 and all(len(batch) == 8 for batch in recorder.batches)
    dataset: Any = trainer.state.train_dataloader.dataset  # pyright: ignore
    forbidden = {tuple(dataset.tokenizer(str(row)).tolist()) for row in lost}
    assert not forbidden & {tuple(row.tolist()) for batch in recorder.batches for row in batch}


@pytest.mark.parametrize("deferred", [True, False])
def test_a_pool_of_skipped_samples_alone_has_the_form_of_any_other(
    tmp_path: Path, folder: Path, deferred: bool
) -> None:
    own = copied(folder, tmp_path / "own")
    for number in range(4):
        damage(shard_of(own, number))
    tree = tree_of(own, on_bad_shard="skip", shuffle=False, deferred=deferred)
    loader: Any = trainer_of(tmp_path, tree)[0].state.train_dataloader
    pools = list(loader)
    lost = sum(len(rows_in(own, number)) for number in range(4))
    assert len(pools) == 5 and sum(int((~pool["valid"]).sum()) for pool in pools) == lost
    for pool in pools:
        assert pool.keys() == pools[-1].keys()
        assert {key: len(pool[key]) for key in pool} == dict.fromkeys(pool, 32)
    assert torch.cat([pool["id"] for pool in pools]).tolist() == list(range(ROWS))


def test_too_many_bad_shards_end_the_run(tmp_path: Path, folder: Path) -> None:
    own = copied(folder, tmp_path / "own")
    for number in (1, 2, 5):
        damage(shard_of(own, number))
    trainer, _, _ = trainer_of(tmp_path, tree_of(own, on_bad_shard="skip", max_bad_shards=2))
    with pytest.raises(BadShard, match=r"3 shards of .* cannot be used, more than stream\.max_bad_shards=2 \(shard\."):
        trainer.fit()


def test_a_resumed_run_skips_what_the_first_did(tmp_path: Path, folder: Path) -> None:
    own = copied(folder, tmp_path / "own")
    damage(shard_of(own))
    skipping = {"on_bad_shard": "skip", "num_workers": 2}
    whole = run(tmp_path / "whole", tree_of(own, **skipping))
    saved = {"save_folder": str(tmp_path / "saved"), "save_interval": "3ba"}
    first, _, _ = trainer_of(tmp_path / "first", {**tree_of(own, **skipping), **saved})
    first.state.callbacks.append(Interrupt(4))
    with pytest.raises(InterruptedError):
        first.fit()
    shutil.copy(shard_of(folder), shard_of(own))  # it is repaired: the run would now choose otherwise
    resuming = {**tree_of(own, **skipping), "load_path": str(tmp_path / "saved" / "ep0-ba3-rank0.pt")}
    assert_same_run(run(tmp_path / "second", resuming), whole, skipped=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stuck_store_is_an_error_in_time(tmp_path: Path, folder: Path, bucket: Bucket, num_workers: int) -> None:
    url = bucket.upload(folder, "mds")
    where = {"remote": url, "local": str(tmp_path / "cache"), "num_workers": num_workers, "timeout": 3}
    trainer, _, _ = trainer_of(tmp_path, tree_of(folder, **where))
    released = threading.Event()

    def stuck(method: str, path: str, byte_range: str) -> None:
        if path.endswith(shard_of(folder).name):
            released.wait(60)

    begun = time.monotonic()
    try:
        with (
            bucket.server.failing(stuck),
            pytest.raises(RuntimeError, match=rf"(?s)shard {shard_of(folder).name} of {url} .*stream\.timeout=3 s"),
        ):
            trainer.fit()
        assert time.monotonic() - begun < 15
    finally:
        released.set()
        trainer.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_by_itself_raises_for_a_short_epoch(tmp_path: Path, folder: Path, num_workers: int) -> None:
    loader: Any = trainer_of(tmp_path, tree_of(folder, num_workers=num_workers))[0].state.train_dataloader
    ids = loader.dataset._get_work
    loader.dataset._get_work = lambda epoch, sample: ids(epoch, sample)[:32]
    with pytest.raises(RuntimeError, match=rf"epoch 0 ended after {max(1, num_workers)} of 5 pools of {folder}"):
        list(loader)


def test_a_dead_background_thread_is_an_error(tmp_path: Path, folder: Path) -> None:
    loader: Any = trainer_of(tmp_path, tree_of(folder))[0].state.train_dataloader

    def fail(shard_id: int, blocking: bool = True) -> None:
        raise ValueError("no room")

    loader.dataset.prepare_shard = fail
    with pytest.raises(RuntimeError, match=r"the thread that fetches shards of .* has failed: ValueError\('no room'\)"):
        list(loader)


@pytest.mark.parametrize("on_bad_shard", ["raise", "skip"])
def test_damage_that_no_hash_shows_is_found_in_the_header_or_when_it_is_read(tmp_path: Path, on_bad_shard: str) -> None:
    own = write_shards(tmp_path / "own", hashes=())
    data = bytearray(shard_of(own).read_bytes())
    data[4:8] = np.uint32(1 << 30).tobytes()
    shard_of(own).write_bytes(data)
    trainer, _, memory = trainer_of(tmp_path, tree_of(own, on_bad_shard=on_bad_shard))
    if on_bad_shard == "raise":
        with pytest.raises(BadShard, match="its table of offsets is damaged"):
            trainer.fit()
    else:
        trainer.fit()
        assert memory.data["stream/bad_shards"][-1] == 1


def test_an_array_that_says_it_is_another_is_an_error_by_the_samples_name(tmp_path: Path) -> None:
    own = write_shards(tmp_path / "own", hashes=())
    path = shard_of(own)
    data = bytearray(path.read_bytes())
    (begin,) = np.frombuffer(data[4:8], np.uint32)
    data[begin : begin + 4] = np.uint32(1 << 30).tobytes()  # the size of the sample's first column
    path.write_bytes(data)
    trainer, _, _ = trainer_of(tmp_path, tree_of(own))
    with pytest.raises(BadShard, match=rf"sample 0 of shard {path.name} of {own} cannot be read"):
        trainer.fit()
    trainer, _, memory = run(tmp_path, tree_of(own, on_bad_shard="skip"))
    assert memory.data["selection/num_invalid"][4] == 1 and memory.data["stream/bad_shards"][-1] == 0


def test_a_header_is_what_the_writer_wrote(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]
    for number, shard in enumerate(index):
        check_header(shard_of(folder, number), shard["samples"])
        with pytest.raises(OSError, match="samples, the index says"):
            check_header(shard_of(folder, number), shard["samples"] + 1)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(OSError, match="it says it has no samples"):
        check_header(tmp_path / "empty", 3)


@pytest.mark.parametrize("name", [None, "sha1", "xxh64"])
def test_every_bit_counts(folder: Path, tmp_path: Path, name: str | None) -> None:
    dataset = StreamingDataset(local=str(folder), batch_size=1)
    info = dataset.shards[0].raw_data  # pyright: ignore
    path = Path(shutil.copy(shard_of(folder, 0), tmp_path))
    check_file(path, info, name)
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(len(whole), size=20):
        data = bytearray(whole)
        data[at] ^= 1 << int(at) % 8
        path.write_bytes(data)
        with pytest.raises(OSError, match=f"its {name or 'xxh64'} is"):
            check_file(path, info, name)


def test_a_full_cache_of_an_earlier_run_makes_room(tmp_path: Path, straight: Any, folder: Path) -> None:
    where = {"remote": str(folder), "local": str(tmp_path / "cache")}
    run(tmp_path, tree_of(folder, **where))
    before = len(list((tmp_path / "cache").glob("*.mds")))
    limit = 5 * shard_of(folder).stat().st_size + (folder / "index.json").stat().st_size
    assert_same_run(run(tmp_path, tree_of(folder, **where, cache_limit=limit, predownload=32)), straight)
    kept = list((tmp_path / "cache").glob("*.mds"))
    assert sum(path.stat().st_size for path in kept) <= limit and len(kept) < before


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"timeout": -1}, r"stream\.timeout=-1\.0 must be a number of seconds, or 0"),
        ({"on_bad_shard": "ignore"}, r"stream\.on_bad_shard='ignore' is not one of \['raise', 'skip'\]"),
        ({"max_bad_shards": -1}, r"stream\.max_bad_shards=-1 must be at least 0"),
        ({"cache_limit": "1gb"}, r"stream\.cache_limit='1gb' deletes shards .* is the only copy; set stream\.remote"),
        ({"validate_hash": "md5"}, r"stream\.validate_hash='md5': .* has no such hash .*\['sha1', 'xxh64'\]"),
    ],
)
def test_what_cannot_be_guarded_is_refused(tmp_path: Path, folder: Path, stream: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tree_of(folder, **stream))


def test_two_answers_in_a_row_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*given: Any) -> None:
        waiting = iter(given)

        def read(url: str, timeout: float) -> bytes:
            answer = next(waiting)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(remote, "read_remote", read)

    answers(b"old", b"new", b"new")
    assert read_agreed("s3://any") == b"new"
    answers(b"new", OSError("reset"), b"new", FileNotFoundError(), b"new", b"new")
    assert read_agreed("s3://any") == b"new"
    answers(FileNotFoundError("none"), FileNotFoundError("none"))
    with pytest.raises(FileNotFoundError, match="none"):
        read_agreed("s3://any")
    answers(*(bytes([number]) for number in range(6)))
    with pytest.raises(OSError, match="no two of 6 answers in a row agree"):
        read_agreed("s3://any")


def test_two_threads_note_one_shard_at_once(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, replace = CheckedStream(local=str(folder)), os.replace
    stream.notes = tmp_path / "notes"

    def after_another(part: Path, path: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        other = threading.Thread(target=stream.note, args=("shard.00000.mds", "theirs"))
        other.start()
        other.join()
        replace(part, path)

    monkeypatch.setattr(os, "replace", after_another)
    stream.note("shard.00000.mds", "own")
    assert stream.noted() == {"shard.00000.mds": {"shard": "shard.00000.mds", "error": "own", "is_fatal": False}}
    assert [path.name for path in stream.notes.iterdir()] == ["shard.00000.mds"]


def test_within_gives_what_the_work_gives_or_ends_the_wait() -> None:
    assert within(None, divmod, 7, 2) == within(5, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        within(5, divmod, 1, 0)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nothing came within 0\.05 s"):
        within(0.05, threading.Event().wait, 20)
    unless: Future[str] = Future()
    assert within(None, divmod, 7, 2, unless=unless) == (3, 1)
    unless.set_result("enough")
    with pytest.raises(InterruptedError, match="enough"):
        within(None, threading.Event().wait, 20, unless=unless)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("num_ranks", [2])
def test_a_bad_shard_ends_all_ranks(tmp_path: Path, folder: Path, num_ranks: int) -> None:
    own = copied(folder, tmp_path / "own")
    damage(shard_of(own))
    path = write_recipe(tmp_path / "recipe.yaml", tree_of(own))
    done = run_forked(tmp_path, num_ranks, "-m", "clipcov_stream", path, timeout=150)
    assert done.returncode != 0
    assert f"shard {shard_of(own).name} of {own} cannot be used" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["local", "global"])
def test_ranks_skip_alike(tmp_path: Path, folder: Path, scope: str) -> None:
    own = copied(folder, tmp_path / "own")
    damage(shard_of(own))
    tree = tree_of(own, on_bad_shard="skip")
    tree["selection"]["scope"] = scope
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    ranks = run_ranks(tmp_path / "ranks", path, 2)
    assert [len(rank["batches"]) for rank in ranks] == [7, 7]
    lost = len(rows_in(own))
    assert {rank["algorithm"]["num_invalid"] for rank in ranks} & set(range(lost, 2 * lost + 1))
    assert ranks[0]["algorithm"]["num_invalid"] == ranks[1]["algorithm"]["num_invalid"]
