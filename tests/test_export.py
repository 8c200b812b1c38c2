"""Exports of ledgers and subsets against plain loops over what was recorded, on disk and in an object store."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import export
import numpy as np
import pytest
import select_offline
from corpora import draw_corpus, recipe, write_recipe
from streaming import MDSWriter
from streaming.base.compression import compress
from streaming.base.format import reader_from_json
from subset_folder import PairFolder
from test_guard import damage
from test_ledger import gain_of, written

from clipcov_stream.config import load_config
from clipcov_stream.ledger import index_hash, read_ledger
from clipcov_stream.stream import read_json_beside
from clipcov_stream.train import build_trainer

if TYPE_CHECKING:
    from s3 import Bucket

NUM_SAMPLES = 40


def uid_of(i: int) -> str:
    """128 bits, as DataComp's; the first half repeats, so that both halves decide the order."""
    return f"{random.Random(i % 7).getrandbits(64):016x}{random.Random(100 + i).getrandbits(64):016x}"


def folder_of(path: Path, uids: list[str] | None = None, **options: Any) -> Path:
    """Samples whose image, caption and embedding tell their number; several shards."""
    uids = [uid_of(i) for i in range(NUM_SAMPLES)] if uids is None else uids
    columns = {"image": "jpeg", "caption": "str", "uid": "str", "image_embedding": "ndarray:float16:3"}
    with MDSWriter(out=str(path), columns=columns, size_limit=600, **options) as writer:
        for i, uid in enumerate(uids):
            embedding = np.array([i, 1, -i], np.float16)
            # MDSWriter takes bytes as they are.
            image = bytes([255, i]) * (i + 1)
            writer.write({"image": image, "caption": f"é {i}", "uid": uid, "image_embedding": embedding})
    return path


def stored(path: Path) -> list[dict[str, Any]]:
    """Samples of a folder, by Streaming's own reader, images left as bytes."""
    readers: list[Any] = [
        reader_from_json(str(path), None, shard) for shard in json.loads((path / "index.json").read_text())["shards"]
    ]
    for reader in readers:
        reader.column_encodings = ["bytes" if e == "jpeg" else e for e in reader.column_encodings]
    return [reader[i] for reader in readers for i in range(len(reader))]


RANKS = [[[5, 31, 9], [7, 5, 0], [39, 3, 9]], [[22, 2, 8], [5, 1, 31], [6, 7, 22]]]
"""Per rank and step."""


def ledger_for(path: Path, folder: Path, ranks: list[list[list[int]]] = RANKS, first: int = 0) -> Path:
    header = {"num_ranks": len(ranks), "folder": index_hash((folder / "index.json").read_bytes())}
    for rank, steps in enumerate(ranks):
        written(path, steps, rank=rank, first=first, **header)
    return path


def oracle() -> tuple[dict[int, list[int]], list[int]]:
    """Steps by sample, and samples in the order of their first training."""
    steps: dict[int, list[int]] = {}
    for step in range(3):
        for rank in RANKS:
            for sample in rank[step]:
                steps.setdefault(sample, []).append(step)
    return steps, list(steps)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert export.main([str(arg) for arg in argv]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert export.main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("error: ") == 1
    return captured.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "mds")


@pytest.fixture
def ledger(tmp_path: Path, folder: Path) -> Path:
    return ledger_for(tmp_path / "ledger", folder)


@pytest.mark.parametrize("order", ["folder", "trained"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_curated_folder_has_each_sample_once_byte_for_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], order: str, compression: str | None
) -> None:
    folder = folder_of(tmp_path / "mds", compression=compression)
    (folder / "embedder.json").write_text('{"fingerprint": 1, "logit_scale": 50}')
    figures = run(capsys, "mds", ledger_for(tmp_path / "ledger", folder), folder, tmp_path / "out", "--order", order)
    steps, trained = oracle()
    wanted = trained if order == "trained" else sorted(steps)
    whole = stored(folder_of(tmp_path / "plain"))
    for got, number in zip(stored(tmp_path / "out"), wanted, strict=True):
        for name, value in whole[number].items():
            assert np.array_equal(got[name], value), (number, name)
    assert {"records": 18, "written": len(steps), "repeats": 18 - len(steps), "samples": 40}.items() <= figures.items()
    assert read_json_beside(str(tmp_path / "out"), None, None, "embedder.json")["logit_scale"] == 50
    source = json.loads((tmp_path / "out" / "source.json").read_text())
    assert source["arguments"] == {"source": ["ledger"], "folder": "mds", "order": order}
    assert source["counts"]["repeats"] == 18 - len(steps)


def test_a_datacomp_subset_file(tmp_path: Path, folder: Path, ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(capsys, "datacomp", ledger, folder, tmp_path / "subset.npy")
    # As DataComp's own baselines write it.
    uids = [uid_of(i) for i in oracle()[0]]
    wanted = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))
    wanted.sort()
    got = np.load(tmp_path / "subset.npy", allow_pickle=False)
    assert got.dtype == wanted.dtype and np.array_equal(got, wanted)
    assert len({int(high) for high, _ in got.tolist()}) < len(got) > 8
    assert figures["written"] == len(uids) and figures["dropped"] == {}


def test_samples_without_a_uid_of_their_own_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uids = [uid_of(i) for i in range(NUM_SAMPLES)]
    uids[5], uids[31], uids[9], uids[22], uids[2] = "", uids[7], uids[7].upper(), "0x" + uids[22][2:], "７" * 32
    folder = folder_of(tmp_path / "mds", uids)
    figures = run(capsys, "datacomp", ledger_for(tmp_path / "l", folder), folder, tmp_path / "subset.npy")
    assert figures["dropped"] == {"duplicate_uid": 2, "no_uid": 1, "uid_not_128_bit_hex": 2}
    assert figures["written"] == len(oracle()[0]) - 5 == len(np.load(tmp_path / "subset.npy"))
    folder = folder_of(tmp_path / "none", [""] * NUM_SAMPLES)
    said = fails(capsys, "datacomp", ledger_for(tmp_path / "l2", folder), folder, tmp_path / "none.npy")
    assert "no sample has a DataComp uid" in said and not (tmp_path / "none.npy").exists()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_what_was_trained_when(
    tmp_path: Path, folder: Path, ledger: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / f"table.{kind}"
    run(capsys, "table", ledger, folder, out)
    steps, _ = oracle()
    gains = {i: None if i == 9 else gain_of(i, steps[i][0]) for i in steps}
    wanted = [[i, uid_of(i), len(steps[i]), min(steps[i]), max(steps[i]), gains[i]] for i in sorted(steps)]
    names = ["id", "uid", "times", "first_step", "last_step", "first_gain"]
    if kind == "csv":
        rows = list(csv.reader(io.StringIO(out.read_text(encoding="utf-8"))))
        assert rows == [names, *[["" if value is None else str(value) for value in row] for row in wanted]]
        assert [row[0] for row in rows if row[-1] == ""] == ["9"]
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow writes .parquet, and is optional")
        found = parquet.read_table(out)
        assert found.column_names == names
        assert [list(row.values()) for row in found.to_pylist()] == wanted


def test_without_pyarrow_parquet_is_an_error(
    tmp_path: Path,
    folder: Path,
    ledger: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = fails(capsys, "table", ledger, folder, tmp_path / "table.parquet")
    assert "needs pyarrow: pip install pyarrow, or give a .csv" in said
    assert {path.name for path in tmp_path.iterdir()} == {"mds", "ledger"}


def test_what_a_run_trained_on_comes_out_as_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = draw_corpus(tmp_path / "shapes")
    tree = recipe(corpus, ledger=str(tmp_path / "ledger"), run_name="run")
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", tree))))
    trainer.fit()
    trainer.close()
    (record,) = read_ledger(tmp_path / "ledger")
    run(capsys, "mds", tmp_path / "ledger", corpus / "train", tmp_path / "out")
    whole, curated = stored(corpus / "train"), stored(tmp_path / "out")
    assert len(curated) == len(set(record.sample.tolist())) <= 48
    assert curated == [whole[i] for i in sorted(set(record.sample.tolist()))]
    # And it trains.
    tree = recipe(corpus, stream={"local": str(tmp_path / "out")}, selection={"warmup": "1ba"}, max_duration="2ba")
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", tree))))
    trainer.fit()
    trainer.close()


def test_a_subset_of_select_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    columns = {"uid": "str", "image_embedding": "ndarray", "text_embedding": "ndarray"}
    with MDSWriter(out=str(tmp_path / "mds"), columns=columns) as writer:
        for i in range(NUM_SAMPLES):
            image, text = rng.standard_normal((2, 4), np.float32)
            writer.write({"uid": uid_of(i), "image_embedding": image, "text_embedding": text})
    arguments = [str(tmp_path / "mds"), str(tmp_path / "subset"), "--num", "7", "--clusters", "2"]
    assert select_offline.main(arguments) == 0
    capsys.readouterr()
    picks = [int(row["row"]) for row in table(tmp_path / "subset" / "subset.csv")]
    for source in (tmp_path / "subset", tmp_path / "subset" / "subset.csv"):
        run(capsys, "mds", source, tmp_path / "mds", tmp_path / "out", "--order", "trained", "--overwrite")
        assert [sample["uid"] for sample in stored(tmp_path / "out")] == [uid_of(i) for i in picks]
    run(capsys, "table", tmp_path / "subset", tmp_path / "mds", tmp_path / "table.csv")
    rows = table(tmp_path / "table.csv")
    assert [(int(row["id"]), int(row["first_step"])) for row in rows] == sorted((i, n) for n, i in enumerate(picks))
    with MDSWriter(out=str(tmp_path / "other"), columns={"uid": "str"}) as writer:
        for i in range(NUM_SAMPLES):
            writer.write({"uid": uid_of(i + 1)})
    said = fails(capsys, "table", tmp_path / "subset", tmp_path / "other", tmp_path / "other.csv")
    assert "of FOLDER has the uid" in said and "another folder" in said


@pytest.mark.parametrize("remote", [False, True])
def test_a_part_of_a_sidecar_is_not_exported(
    tmp_path: Path, bucket: Bucket, folder: Path, ledger: Path, capsys: pytest.CaptureFixture[str], remote: bool
) -> None:
    (folder / "embedder.json").write_text('{"fingerprint": 1, "logit_scale": 50, "sidecar": true}')
    where = bucket.upload(folder, "mds") if remote else folder
    said = fails(capsys, "mds", ledger, where, tmp_path / "out")
    assert f"FOLDER={str(where)!r} is a sidecar" in said and not (tmp_path / "out").exists()
    run(capsys, "table", ledger, where, tmp_path / "ids.csv")


def test_from_the_store_to_the_store(tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "mds")
    (folder / "embedder.json").write_text("{}")
    ledger, url = ledger_for(tmp_path / "ledger", folder), bucket.upload(folder, "mds")
    num_shards = len(bucket.keys("mds/shard"))
    asked = len(bucket.server.requests)
    run(capsys, "mds", ledger, url, f"{bucket.url}/curated", "--order", "trained")
    fetched = {request.path for request in bucket.server.requests[asked:] if request.method == "GET"}
    assert 1 < len([path for path in fetched if "/mds/shard" in path]) < num_shards
    (tmp_path / "back").mkdir()
    for key in bucket.keys("curated/"):
        (tmp_path / "back" / Path(key).name).write_bytes(bucket.read(key))
    whole = stored(folder)
    for got, number in zip(stored(tmp_path / "back"), oracle()[1], strict=True):
        assert got["image"] == whole[number]["image"] and got["uid"] == uid_of(number)
    assert {"embedder.json", "index.json", "source.json"} <= {path.name for path in (tmp_path / "back").iterdir()}
    for name, command in (("subset.npy", "datacomp"), ("table.csv", "table")):
        run(capsys, command, ledger, folder, tmp_path / name)
        run(capsys, command, ledger, url, f"{bucket.url}/out/{name}")
        assert bucket.read(f"out/{name}") == (tmp_path / name).read_bytes()
        assert "exists; give another, or --overwrite" in fails(capsys, command, ledger, url, f"{bucket.url}/out/{name}")
        run(capsys, command, ledger, url, f"{bucket.url}/out/{name}", "--overwrite")
    assert "no index.json that can be read" in fails(capsys, "mds", ledger, f"{bucket.url}/nothing", tmp_path / "x")
    bucket.client.delete_object(Bucket=bucket.name, Key=bucket.keys("mds/shard")[0])
    said = fails(capsys, "mds", ledger, url, tmp_path / "x")
    assert f"{url}/shard.00000.mds cannot be read" in said and not (tmp_path / "x").exists()


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_damaged_shard_is_named_and_not_exported_as_a_sound_one(
    tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str], compression: str | None, remote: bool
) -> None:
    folder = folder_of(tmp_path / "mds", compression=compression, hashes=["sha1"])
    ledger = ledger_for(tmp_path / "ledger", folder)
    (path,) = folder.glob("shard.00001.*")
    damage(path)
    where = bucket.upload(folder, "mds") if remote else str(folder)
    for command, out in (("mds", "out"), ("datacomp", "subset.npy"), ("table", "table.csv")):
        said = fails(capsys, command, ledger, where, tmp_path / out)
        assert f"shard shard.00001.mds of {where} cannot be used: " in said
        assert f"python tools/verify_mds.py {where} " in said and "its sha1 is" in said
        assert not (tmp_path / out).exists()


def test_without_hashes_what_is_no_shard_is_named(
    tmp_path: Path, folder: Path, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "shard.00001.mds"
    path.write_bytes(path.read_bytes()[::-1])
    said = fails(capsys, "mds", ledger, folder, tmp_path / "out")
    assert "shard.00001.mds of" in said and "samples, the index says" in said


def test_a_shard_is_checked_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "mds", hashes=["sha1"])
    checked = []
    monkeypatch.setattr("subset_folder.check_file", lambda path, info: checked.append(info.basename))
    pairs = PairFolder(str(folder))
    for _ in range(2):
        assert len(list(pairs.samples(range(NUM_SAMPLES)))) == NUM_SAMPLES
        pairs.spans_of(0, "image")
    assert sorted(checked) == sorted(path.name for path in folder.glob("shard.*"))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_shards_in_subfolders_are_found(
    tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str], compression: str | None, remote: bool
) -> None:
    folder, shards = tmp_path / "mds", []
    for part in (0, 1):  # and what Streaming's merge_index makes of the two
        folder_of(folder / str(part), [uid_of(i) for i in range(20 * part, 20 * part + 20)], compression=compression)
        for shard in json.loads((folder / str(part) / "index.json").read_text())["shards"]:
            for info in filter(None, (shard["raw_data"], shard["zip_data"])):
                info["basename"] = f"{part}/{info['basename']}"
            shards.append(shard)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    ledger = ledger_for(tmp_path / "ledger", folder)
    run(capsys, "mds", ledger, bucket.upload(folder, "b/c") if remote else folder, tmp_path / "out")
    assert [sample["uid"] for sample in stored(tmp_path / "out")] == [uid_of(i) for i in sorted(oracle()[0])]


def test_a_shard_is_unpacked_to_the_size_that_the_index_says_and_no_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "mds", compression="zstd")
    index = json.loads((folder / "index.json").read_text())
    packed = index["shards"][1]["zip_data"]
    bomb = compress("zstd", bytes(1 << 24))
    (folder / packed["basename"]).write_bytes(bomb)
    packed["bytes"] = len(bomb)
    (folder / "index.json").write_text(json.dumps(index))
    said = fails(capsys, "mds", ledger_for(tmp_path / "ledger", folder), folder, tmp_path / "out")
    assert "shard.00001.mds of" in said and f"to the {index['shards'][1]['raw_data']['bytes']} bytes" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("mds", "{tmp}/none", "{mds}", "{tmp}/out"), "no ledger there (a folder with rank00000.ledger)"),
        (("mds", "{ledger}", "{tmp}/none", "{tmp}/out"), "has no index.json"),
        (("mds", "{ledger}", "{other}", "{tmp}/out"), "FOLDER is not the one trained on"),
        (("mds", "{empty}", "{mds}", "{tmp}/out"), "has no samples: no step was finished"),
        (("mds", "{ledger}", "{mds}", "{mds}"), "is or holds FOLDER"),
        (("mds", "{outside}", "{mds}", "{tmp}/out"), "FOLDER has 40 samples, but SOURCE has ids 3 to 40"),
        (("mds", "{ledger}", "{mds}", "{ledger}"), "is not empty"),
        (("datacomp", "{ledger}", "{mds}", "{tmp}/out.csv"), "must end in .npy"),
        (("table", "{ledger}", "{mds}", "{tmp}/out.txt"), "must end in one of ['.csv', '.parquet']"),
        (("table", "{ledger}", "{mds}", "{tmp}/there.csv"), "exists; give another file, or --overwrite"),
        (("table", "{tmp}/there.csv", "{mds}", "{tmp}/out.csv"), "is no subset.csv of tools/select_offline.py"),
        (("datacomp", "{plainledger}", "{plain}", "{tmp}/out.npy"), "has no str column 'uid'"),
    ],
)
def test_what_cannot_be_exported_says_why(
    tmp_path: Path, folder: Path, ledger: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    places = {"tmp": tmp_path, "mds": folder, "ledger": ledger, "other": folder_of(tmp_path / "other", ["x"] * 40)}
    places["empty"] = ledger_for(tmp_path / "empty", folder, [[]])
    places["outside"] = ledger_for(tmp_path / "outside", folder, [[[3, 40]]])
    (tmp_path / "there.csv").write_text("a,b\n1,2\n")
    with MDSWriter(out=str(tmp_path / "plain"), columns={"caption": "str"}) as writer:
        for i in range(NUM_SAMPLES):
            writer.write({"caption": str(i)})
    places |= {"plain": tmp_path / "plain", "plainledger": ledger_for(tmp_path / "pl", tmp_path / "plain")}
    before = sorted(path.name for path in tmp_path.iterdir())
    assert message in fails(capsys, *(part.format(**places) for part in argv))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["table", "mds", "datacomp"])
def test_steps_of_another_machine_are_missed_and_joined(
    tmp_path: Path, folder: Path, ledger: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = {"table": "out.csv", "mds": "out", "datacomp": "out.npy"}[command]
    later = ledger_for(tmp_path / "later", folder, [[[1, 2], [3, 4]], [[10, 11], [12, 13]]], first=2)
    assert export.main([command, str(later), str(folder), str(tmp_path / out)]) == 0
    said = capsys.readouterr()
    assert "SOURCE lacks 2 steps, 0 to 1: " in said.err and "give that one's ledger folder too" in said.err
    assert json.loads(said.out.splitlines()[-1])["missing_steps"] == 2
    figures = run(capsys, command, later, ledger, folder, tmp_path / f"all_{out}")
    # Of step 2, which the first machine had trained too, what the second made of it.
    undone = [sample for rank in RANKS for sample in rank[2]]
    assert (figures["missing_steps"], figures["records"]) == (0, 18 - len(undone) + 8)
    if command == "table":
        ids = {int(row["id"]) for row in table(tmp_path / "all_out.csv")}
        assert ids == {5, 31, 9, 7, 0, 22, 2, 8, 1} | {1, 2, 3, 4, 10, 11, 12, 13}


def test_a_torn_step_is_left_out_and_said(
    tmp_path: Path, folder: Path, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ledger / "rank00001.ledger"
    path.write_bytes(path.read_bytes()[:-5])
    assert export.main(["table", str(ledger), str(folder), str(tmp_path / "table.csv")]) == 0
    said = capsys.readouterr().out
    assert "torn: 47 bytes of a step that was not written in full" in said
    assert json.loads(said.splitlines()[-1])["records"] == 15
