"""An MDS folder is there in full or not at all, and the next writer cleans up."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import make_mds
import pairs
import pytest
from corpora import draw_corpus
from mds_folder import Rejection, mds_folder, mds_split
from sources import COLUMNS, read, write_files, write_numbers
from staged_folder import staged_folder
from streaming import StreamingDataset


def test_streaming_dataset_reads_the_folder(tmp_path):
    write_numbers(tmp_path / "out", range(9), size_limit="1kb", source={"tool": "t", "path": tmp_path / "x.csv"})
    dataset = StreamingDataset(local=str(tmp_path / "out"), batch_size=1)
    assert [(s["uid"], s["image"]) for s in dataset] == [(str(i), bytes([i]) * 100) for i in range(9)]
    assert len(json.loads((tmp_path / "out" / "index.json").read_text())["shards"]) > 1
    text = (tmp_path / "out" / "source.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["path"] == "x.csv"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing(tmp_path, error):
    with pytest.raises(error), mds_folder(tmp_path / "out", COLUMNS, size_limit=50) as split:
        split.write({"image": b"1", "uid": "1"})
        split.reject(Rejection(1, "a.jpg", "image_empty", "0 bytes"))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_out_and_the_next_one_cleans_up(tmp_path):
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(pairs.__file__).parent)!r})
        from mds_folder import mds_folder
        with mds_folder("out", {COLUMNS}, size_limit=1000) as split:
            for i in range(10**9):
                split.write({{"image": b"x" * 900, "uid": str(i)}})
                if i == 20:
                    print("writing", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    env = {**os.environ, "PYTHONPATH": str(Path(pairs.__file__).parent.parent)}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    assert any(left.glob("*.mds"))
    write_numbers(tmp_path / "out", range(3))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    write_numbers(tmp_path / "out", range(3))
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "out").rename(tmp_path / f".out.replaced-{os.uname().nodename}-{gone.pid}")
    with pytest.raises(ValueError, match="not empty; give another folder, or --overwrite"):
        write_numbers(tmp_path / "out", range(1))
    assert len(read(tmp_path / "out")) == 3


def test_the_folder_of_a_running_process_is_left_alone(tmp_path):
    other = tmp_path / f".out.partial-{os.uname().nodename}-{os.getppid()}"
    other.mkdir()
    write_numbers(tmp_path / "out", range(3))
    assert other.is_dir()


def test_overwrite_replaces_only_once_complete(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_numbers(out, range(3))
    with pytest.raises(RuntimeError), mds_folder(out, COLUMNS, overwrite=True) as split:
        split.write({"image": b"1", "uid": "new"})
        assert len(read(out)) == 3
        raise RuntimeError
    assert len(read(out)) == 3
    write_numbers(out, range(5), overwrite=True)
    assert len(read(out)) == 5
    assert list(tmp_path.iterdir()) == [out]


def test_overwrite_deletes_nothing_that_the_tools_did_not_write(tmp_path):
    thesis = {"thesis.txt": b"years of work"}
    cases = {
        "site": ({"site/index.json": b"{}"}, "no MDS index.json"),
        "page": ({"index.json": b"{}"}, "no list of shards"),
        "torn": ({"train/index.json": b'{"version": 2, '}, "not JSON"),
        "beside": ({}, "it holds 'thesis.txt'"),
        "below": ({"notes/a.txt": b"a"}, "it holds '"),
    }
    for name, (files, message) in cases.items():
        out = tmp_path / name
        if name in ("beside", "below"):
            write_numbers(out, range(3))
        write_files(out, {**files, **thesis})
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=f"{message}.*--overwrite will not delete it"):
            write_numbers(out, range(1), overwrite=True)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(cases)


def test_overwrite_replaces_what_the_tools_and_training_leave_in_a_folder(tmp_path):
    out = tmp_path / "out"
    for files in (
        {f"{name}.json": b"{}" for name in ("source", "classes", "embedder")} | {"rejected.jsonl": b""},
        {".sidecar-1f/shard.00000.mds": b"", ".ranges-1f.sqlite.lock": b""},
    ):
        write_numbers(out, range(3), compression="zstd", overwrite=True)
        write_files(out, {"shard.00000.mds": b"unpacked", **files})
    write_numbers(out, range(3), overwrite=True)
    corpus = draw_corpus(tmp_path / "shapes")  # train/ and eval/
    write_numbers(corpus, range(3), overwrite=True)
    for folder in (out, corpus):
        assert {path.name for path in folder.iterdir()} == {"index.json", "shard.00000.mds"}


def test_out_must_be_free(tmp_path):
    (tmp_path / "file").write_text("x")
    write_files(tmp_path / "home", {"thesis.txt": b"years of work"})
    for out, message in (
        ("file", "is a file"),
        ("home", "will not delete it"),
        ("sftp://host/x", "none that Streaming uploads to"),
        ("s3://bucket/x", "--overwrite cannot replace the remote"),
    ):
        with pytest.raises(ValueError, match=message):
            write_numbers(out if "://" in out else tmp_path / out, range(1), overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_two_splits_appear_together(tmp_path):
    with pytest.raises(ValueError, match="no usable sample"), staged_folder(tmp_path / "out") as folder:
        with mds_split(folder / "train", COLUMNS) as split:
            split.write({"image": b"1", "uid": "1"})
        with mds_split(folder / "eval", COLUMNS):
            pass
    assert list(tmp_path.iterdir()) == []
    with staged_folder(tmp_path / "out") as folder:
        for name in ("train", "eval"):
            with mds_split(folder / name, COLUMNS) as split:
                split.write({"image": b"1", "uid": name})
    assert [read(tmp_path / "out" / name)[0]["uid"] for name in ("train", "eval")] == ["train", "eval"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("size_limit", "64 apples", "--size-limit '64 apples'"),
        ("size_limit", 2**32, "below 4gb"),
        ("compression", "zip", "--compression 'zip' is unknown"),
        ("hashes", ["crc"], "--hashes 'crc' is unknown"),
    ],
)
def test_writer_options_are_checked_before_anything_is_written(tmp_path, option, value, message):
    with pytest.raises(ValueError, match=message):
        write_numbers(tmp_path / "out", range(1), **{option: value})
    assert list(tmp_path.iterdir()) == []


def test_a_seed_that_cannot_be_is_named(tmp_path, capsys):
    assert make_mds.main(["synthetic", str(tmp_path / "out"), "--seed", "-1"]) == 2
    assert "--seed -1 must be at least 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_sample_above_the_size_limit_gets_a_shard_of_its_own(tmp_path):
    write_numbers(tmp_path / "out", range(3), size_limit=10)
    shards = json.loads((tmp_path / "out" / "index.json").read_text())["shards"]
    assert [shard["samples"] for shard in shards] == [1, 1, 1]
