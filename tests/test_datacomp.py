"""DataComp's layout through `make_mds.py pairs`: embeddings by uid, whatever metadata is called; parallel runs."""

from __future__ import annotations

import filecmp
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verify_mds
from corpora import recipe, write_recipe
from datacomp import Metadata
from mds_folder import read_split
from PIL import Image
from sources import make, picture, read, rejected, wds, write_tar
from subset_folder import PairFolder

from clipcov_stream.build import columns_embedder
from clipcov_stream.config import StreamConfig, load_config
from clipcov_stream.train import build_trainer

TOOLS = Path(__file__).resolve().parent.parent / "tools"
WIDTHS = {"b32": 512, "l14": 768}


def uid(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def embedding(number: int, name: str) -> np.ndarray:
    draw = np.random.default_rng([number, *name.encode()])
    value = draw.normal(size=WIDTHS[name[:3]])
    return (value / np.linalg.norm(value)).astype(np.float16)


def write_metadata(folder: Path, name: str, numbers: list[int], uids: list[Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "uid": uids or [uid(n) for n in numbers],
        "url": ["http://x/y"] * len(numbers),
        "text": ["z"] * len(numbers),
    }
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    arrays = {
        f"{kind}_{side}": np.stack([embedding(n, f"{kind}_{side}") for n in numbers])
        for kind in WIDTHS
        for side in ("img", "txt")
    }
    np.savez(folder / f"{name}.npz", **arrays)
    return folder


def test_every_one_of_many_uids_is_found(tmp_path: Path) -> None:
    """Also those whose digest ends in zeros, which NumPy's strings leave out."""
    folder = tmp_path / "metadata"
    folder.mkdir()
    uids = [uid(number) for number in range(2000)]
    pq.write_table(pa.table({"uid": uids}), folder / "a.parquet")
    rows = np.arange(1, 2001, dtype=np.float16)[:, None].repeat(WIDTHS["b32"], 1)
    np.savez(folder / "a.npz", b32_img=rows, b32_txt=rows)
    metadata = Metadata.read(folder, "b32")
    assert [int(metadata.find(name)[0][0]) for name in uids] == list(range(1, 2001))


def sample(number: int, **about: Any) -> dict[str, bytes]:
    return wds(f"{number:09d}", picture(number), f"caption {number}".encode(), {"uid": uid(number), **about})


def draw_pool(root: Path, tars: int = 3, per_tar: int = 4) -> Path:
    """DataComp's folders: tars in order of samples, metadata whose files share them out otherwise."""
    shards = root / "shards" / "small"
    shards.mkdir(parents=True)
    for tar in range(tars):
        numbers = range(tar * per_tar, (tar + 1) * per_tar)
        write_tar(shards / f"{tar:08d}.tar", {k: v for n in numbers for k, v in sample(n).items()})
        (shards / f"{tar:08d}_stats.json").write_text(json.dumps({"count": per_tar + 1, "successes": per_tar}))
        # img2dataset's own parquet lies beside the tars and is no metadata: it has no .npz.
        pq.write_table(pa.table({"uid": [uid(n) for n in numbers]}), shards / f"{tar:08d}.parquet")
    everything = list(range(tars * per_tar))[::-1]
    write_metadata(root / "metadata" / "small", "f00d", everything[:3])
    write_metadata(root / "metadata" / "small", "beef", everything[3:])
    return root


@pytest.mark.parametrize("kind", ["b32", "l14"])
def test_every_sample_gets_its_own_embeddings(tmp_path: Path, kind: str) -> None:
    pool = draw_pool(tmp_path / "pool")
    make("pairs", pool / "shards" / "small", tmp_path / "out", "--embeddings", kind)
    samples = read(tmp_path / "out")
    assert [s["uid"] for s in samples] == [uid(n) for n in range(12)]
    for number, found in enumerate(samples):
        assert found["image"] == picture(number) and found["caption"] == f"caption {number}"
        for column, side in (("image_embedding", "img"), ("text_embedding", "txt")):
            assert found[column].dtype == np.float16
            np.testing.assert_array_equal(found[column], embedding(number, f"{kind}_{side}"))
    assert json.loads((tmp_path / "out" / "source.json").read_text())["counts"]["not_downloaded"] == 3
    record = columns_embedder(StreamConfig(8, local=str(tmp_path / "out")))
    assert record is not None and record["logit_scale"] == 100.0 and record["transform"]["size"] == 224
    assert (
        record["model"] == {"b32": "ViT-B-32-quickgelu", "l14": "ViT-L-14-quickgelu"}[kind]
        and record["pretrained"] == "openai"
    )


def test_the_folder_above_the_tars_is_as_good(tmp_path: Path) -> None:
    """Versions of DataComp's code differ in whether tars lie in POOL/shards or in POOL/shards/SCALE."""
    pool = draw_pool(tmp_path / "pool")
    make("pairs", pool / "shards", tmp_path / "out", "--embeddings", "b32")
    assert [s["uid"] for s in read(tmp_path / "out")] == [uid(n) for n in range(12)]
    shutil.copytree(pool / "shards" / "small", pool / "shards" / "medium")
    with pytest.raises(ValueError, match="several folders of tars: medium, small; give one of them"):
        make("pairs", pool / "shards", tmp_path / "again", "--embeddings", "b32")


@pytest.mark.parametrize("place", ["elsewhere", "pool/shards/metadata", "pool/shards/small"])
def test_metadata_may_lie_anywhere(tmp_path: Path, place: str) -> None:
    pool = draw_pool(tmp_path / "pool")
    shutil.copytree(pool / "metadata" / "small", tmp_path / place, dirs_exist_ok=True)
    shutil.rmtree(pool / "metadata")
    told = ["--metadata", tmp_path / place] if place == "elsewhere" else []
    make("pairs", pool / "shards" / "small", tmp_path / "out", "--embeddings", "b32", *told)
    assert [s["uid"] for s in read(tmp_path / "out")] == [uid(n) for n in range(12)]
    assert rejected(tmp_path / "out") == []


def test_the_two_kinds_are_told_apart(tmp_path: Path) -> None:
    pool = draw_pool(tmp_path / "pool", tars=1)
    records = []
    for kind in WIDTHS:
        make("pairs", pool / "shards" / "small", tmp_path / kind, "--embeddings", kind)
        records.append(columns_embedder(StreamConfig(8, local=str(tmp_path / kind))))
    assert records[0]["fingerprint"] != records[1]["fingerprint"]


def test_a_run_trains_on_the_embeddings_that_came_along(tmp_path: Path) -> None:
    pool, out = draw_pool(tmp_path / "pool", tars=4, per_tar=16), tmp_path / "out"
    make("pairs", pool / "shards" / "small", out, "--embeddings", "b32")
    selection = {"embed": "columns", "warmup": "0ba"}
    tree = recipe(tmp_path, selection=selection, max_duration="2ba")
    tree["stream"]["local"] = str(out)
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "train.yaml", tree))))
    trainer.fit()
    assert int(trainer.state.timestamp.batch) == 2
    trainer.close()
    tree["selection"]["logit_scale"] = 50.0
    with pytest.raises(ValueError, match=r"logit_scale=50.0 is not that of the columns' embedder, 100"):
        build_trainer(load_config(str(write_recipe(tmp_path / "train.yaml", tree))))


def test_what_is_wrong_with_metadata_costs_its_samples_alone(tmp_path: Path) -> None:
    shards, metadata = tmp_path / "shards", tmp_path / "metadata"
    shards.mkdir()
    write_tar(shards / "00000000.tar", {k: v for n in range(18) for k, v in sample(n).items()})
    write_metadata(metadata, "a_good", [0, 1])
    (write_metadata(metadata, "b_no_npz", [2, 3]) / "b_no_npz.npz").unlink()
    write_metadata(metadata, "c_short", [4, 5, 6])
    np.savez(metadata / "c_short.npz", b32_img=np.ones((2, 512), np.float16), b32_txt=np.ones((2, 512), np.float16))
    write_metadata(metadata, "d_cut", [7, 8])
    (metadata / "d_cut.npz").write_bytes((metadata / "d_cut.npz").read_bytes()[:-300])
    write_metadata(metadata, "e_other", [9])
    np.savez(metadata / "e_other.npz", b32_img=np.ones((1, 512), np.float16))
    write_metadata(metadata, "f_no_parquet", [10])
    (metadata / "f_no_parquet.parquet").write_bytes(b"PAR1 cut")
    write_metadata(metadata, "g_odd", [11, 12, 13, 14], [uid(11), None, uid(13), uid(14)])
    arrays = dict(np.load(metadata / "g_odd.npz"))
    arrays["b32_txt"][2] = np.nan
    arrays["b32_img"][3] = 0
    np.savez(metadata / "g_odd.npz", **arrays)
    spoilt = write_metadata(metadata, "h_spoilt", [15, 16, *range(100, 130)]) / "h_spoilt.npz"
    data = bytearray(spoilt.read_bytes())
    data[data.index(embedding(15, "b32_img").tobytes())] ^= 1  # its headers are fine, its checksum is not
    spoilt.write_bytes(data)

    make("pairs", shards, tmp_path / "out", "--embeddings", "b32")
    assert [s["uid"] for s in read(tmp_path / "out")] == [uid(n) for n in (0, 1, 11)]
    log = rejected(tmp_path / "out")
    files = {entry["image"]: entry["reason"] for entry in log if ".tar" not in entry["image"]}
    assert files == {
        "b_no_npz.npz": "npz_missing",
        "c_short.npz": "metadata_misaligned",
        "d_cut.npz": "npz_damaged",
        "e_other.npz": "npz_damaged",
        "f_no_parquet.parquet": "metadata_damaged",
        "g_odd.parquet": "metadata_row_malformed",
    }
    of_samples = {int(entry["image"].split("/")[1][:9]): entry for entry in log if ".tar" in entry["image"]}
    malformed = {number for number, entry in of_samples.items() if entry["reason"] == "embedding_malformed"}
    assert malformed == {13, 14}
    missing = {number for number, entry in of_samples.items() if entry["reason"] == "embedding_missing"}
    assert missing == {2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 17}
    assert "c_short.npz: b32_img has shape (2, 512)" in of_samples[4]["detail"]
    assert "h_spoilt.npz cannot be read: Bad CRC-32" in of_samples[16]["detail"]
    assert f"no metadata has the uid '{uid(17)}'" in of_samples[17]["detail"]
    make("pairs", shards, tmp_path / "again", "--embeddings", "b32", "--workers", 2)
    assert rejected(tmp_path / "again") == log


def test_metadata_that_cannot_be_used_at_all_is_an_error(tmp_path: Path, monkeypatch) -> None:
    pool = draw_pool(tmp_path / "pool", tars=1)
    shards, out = pool / "shards" / "small", tmp_path / "out"
    with pytest.raises(ValueError, match=r"--metadata .* goes with --embeddings b32 or l14"):
        make("pairs", shards, out, "--metadata", pool)
    with pytest.raises(ValueError, match=r"no NAME.parquet beside a NAME.npz in .*--download_npz"):
        make("pairs", shards, out, "--embeddings", "b32", "--metadata", shards)
    for parquet in (pool / "metadata" / "small").glob("*.parquet"):
        pq.write_table(pa.table({"id": [1]}), parquet)
    with pytest.raises(ValueError, match=r"no file of .* can be used: beef.parquet: cannot be read: KeyError.*uid"):
        make("pairs", shards, out, "--embeddings", "b32")
    (tmp_path / "table.csv").write_text("file,caption\n")
    with pytest.raises(ValueError, match="--embeddings b32 goes with webdataset tars"):
        make("pairs", tmp_path / "table.csv", out, "--embeddings", "b32")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'clipcov-stream\[data\]'"):
        make("pairs", shards, out, "--embeddings", "b32")
    assert not out.exists()


# --workers ---------------------------------------------------------------------------------------------


def test_the_number_of_workers_does_not_show(tmp_path: Path) -> None:
    pool = draw_pool(tmp_path / "pool", tars=4)
    shards = pool / "shards" / "small"
    broken = (shards / "00000001.tar").read_bytes()
    (shards / "00000001.tar").write_bytes(broken[: broken.index(b"000000006.json") + 40])
    (shards / "00000002.tar").write_bytes(b"")
    # Repeats within a tar, of an earlier tar, and of one that was lost.
    again = sample(0) | wds("x", picture(50), b"first", {"uid": uid(6)}) | wds("y", picture(51), b"", {"uid": "e"})
    again |= wds("z", picture(52), b"second", {"uid": uid(0)})
    write_tar(shards / "00000004.tar", again)
    outs = {}
    for workers in (1, 2, 3):
        outs[workers] = tmp_path / str(workers)
        make("pairs", shards, outs[workers], "--embeddings", "b32", "--workers", workers, "--size-limit", "8kb")
    samples = {workers: read(out) for workers, out in outs.items()}
    expected = [uid(n) for n in (0, 1, 2, 3, 4, 5, 12, 13, 14, 15)] + [f"{uid(0)}#2", uid(6), f"{uid(0)}#3"]
    for workers in outs:
        assert [s["uid"] for s in samples[workers]] == expected
        for one, other in zip(samples[1], samples[workers], strict=True):
            assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
        assert rejected(outs[workers]) == rejected(outs[1])
        assert (outs[workers] / "source.json").read_bytes() == (outs[1] / "source.json").read_bytes()
    reasons = [(entry["row"], entry["reason"]) for entry in rejected(outs[2])]
    assert reasons == [(None, "tar_damaged"), (None, "tar_damaged"), (13, "caption_empty")]
    names = sorted(path.name for path in outs[2].iterdir())
    assert names == sorted(path.name for path in outs[3].iterdir())
    assert filecmp.cmpfiles(outs[2], outs[3], names, shallow=False) == (names, [], [])
    assert len([name for name in names if name.endswith(".mds")]) > 4


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_workers_write_the_shards_asked_for(tmp_path: Path, compression: str) -> None:
    pool, out = draw_pool(tmp_path / "pool"), tmp_path / "out"
    options = ["--workers", 2, "--compression", compression, "--hashes", "md5,sha1"]
    make("pairs", pool / "shards" / "small", out, *options)
    files = {"index.json", "source.json"}
    for shard in json.loads((out / "index.json").read_text())["shards"]:
        stored = shard["zip_data" if compression == "zstd" else "raw_data"]
        data = (out / stored["basename"]).read_bytes()
        assert stored["bytes"] == len(data)
        assert stored["hashes"] == {name: hashlib.new(name, data).hexdigest() for name in ("md5", "sha1")}
        files.add(stored["basename"])
    assert {path.name for path in out.iterdir()} == files and len(files) == 5
    uids = [s["uid"].decode() for s in PairFolder(str(out)).samples(range(12))]
    assert uids == [uid(n) for n in range(12)]


def test_the_pairs_held_out_depend_on_no_number_of_workers(tmp_path: Path) -> None:
    shards = draw_pool(tmp_path / "pool", tars=4) / "shards" / "small"
    again = wds("x", picture(3), b"an image once more", {"uid": uid(5)}) | wds("y", b"", b"rejected", {"uid": "e"})
    write_tar(shards / "00000004.tar", again | sample(16))
    whole, outs = tmp_path / "whole", {workers: tmp_path / str(workers) for workers in (1, 2)}
    options = ["--embeddings", "b32", "--compression", "zstd"]
    make("pairs", shards, whole, *options)
    for workers, out in outs.items():
        make("pairs", shards, out, "--hold-out", 5, "--workers", workers, *options)
        assert verify_mds.main([str(out), "--all"]) == verify_mds.main([str(out / "held"), "--all"]) == 0
    every = list(read_split(whole))
    kept, held = ({workers: list(read_split(out / place)) for workers, out in outs.items()} for place in ("", "held"))
    for found in (kept, held):
        assert [sample["uid"] for sample in found[1]] == [sample["uid"] for sample in found[2]]
        for sample_ in (*found[1], *found[2]):
            (other,) = (one for one in every if one["uid"] == sample_["uid"])
            assert all(np.array_equal(sample_[key], other[key]) for key in other)
    assert len(every) == 17 and len(held[1]) in (5, 6) and len(kept[1]) + len(held[1]) == 17
    assert not {sample["image"] for sample in kept[1]} & {sample["image"] for sample in held[1]}
    assert rejected(outs[1]) == rejected(outs[2]) != [] and (outs[1] / "held" / "embedder.json").is_file()
    for out in outs.values():
        counts = json.loads((out / "source.json").read_text())["counts"]
        assert (counts["held"], counts["uids_repeated"]) == (len(held[1]), 1)


def test_what_workers_cannot_do_is_said(tmp_path: Path) -> None:
    pool = draw_pool(tmp_path / "pool", tars=1)
    shards, out = pool / "shards" / "small", tmp_path / "out"
    for options in (["--limit", 3], ["--shuffle-seed", 1]):
        with pytest.raises(ValueError, match="leave out --limit, --shuffle-seed"):
            make("pairs", shards, out, "--workers", 2, *options)
    (tmp_path / "table.csv").write_text("file,caption\n")
    with pytest.raises(ValueError, match="a table is read by one process"):
        make("pairs", tmp_path / "table.csv", out, "--workers", 2)
    for path in shards.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no usable sample"):
        make("pairs", shards, out, "--format", "webdataset", "--workers", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool", "table.csv"]


def large_tars(folder: Path, tars: int = 4) -> Path:
    folder.mkdir()
    buffer = io.BytesIO()
    Image.effect_noise((600, 600), 90).convert("RGB").save(buffer, "PNG")
    for tar in range(tars):
        files = {k: v for n in range(60) for k, v in wds(f"{tar}{n:03d}", buffer.getvalue(), b"x").items()}
        write_tar(folder / f"{tar:05d}.tar", {name.replace(".jpg", ".png"): data for name, data in files.items()})
    return folder


def begin(source: Path, out: Path) -> subprocess.Popen[str]:
    """A run of two workers, both at work."""
    command = [sys.executable, str(TOOLS / "make_mds.py"), "pairs", str(source), str(out), "--workers", "2"]
    env = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True, env=env)
    deadline = time.monotonic() + 120
    while len(list(out.parent.glob(".out.partial-*/parts/*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_parallel_run_leaves_no_out_and_no_process(tmp_path: Path, how: signal.Signals) -> None:
    source, out = large_tars(tmp_path / "in"), tmp_path / "out"
    with begin(source, out) as process:
        process.send_signal(how)
        assert process.wait(60) != 0
    assert not out.exists()
    deadline = time.monotonic() + 60
    while True:  # the session holds the run's processes and nothing else
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    make("pairs", source, out, "--limit", 3)
    assert len(read(out)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_death_of_a_worker_is_an_error_and_no_hang(tmp_path: Path) -> None:
    source, out = large_tars(tmp_path / "in"), tmp_path / "out"
    with begin(source, out) as process:
        workers = [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
        workers[0].kill()
        assert process.wait(60) == 2
        assert process.stderr is not None
        assert "error: a process died, perhaps of too little memory; use fewer --workers" in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
