"""Sidecars: what tools/embed_mds.py --sidecar writes, and training on it as on copied columns."""

from __future__ import annotations

import json
import pickle
import shutil
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import embed_mds
import numpy as np
import pytest
import select_offline
import select_rivals
import torch
from corpora import draw_corpus, recipe, write_recipe
from streaming import MDSWriter, StreamingDataset
from subset_folder import PairFolder
from test_embed_mds import in_shards, options
from test_guard import damage

from clipcov_stream import sidecar as sidecar_module
from clipcov_stream.build import columns_embedder
from clipcov_stream.config import StreamConfig, load_config
from clipcov_stream.sidecar import Sidecar
from clipcov_stream.train import build_trainer

EMBEDDINGS = ["image_embedding", "text_embedding"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """MDS shards with two bad images, with embeddings copied in (`whole`) and in a sidecar (`beside`)."""
    root = tmp_path_factory.mktemp("embedded")
    folder = in_shards(corpus, root / "mds", rows=160, bad=2)
    embed_mds.main(options(root, folder, "whole"))
    embed_mds.main([*options(root, folder, "beside"), "--sidecar"])
    return root


def test_a_sidecar_has_the_embeddings_and_says_where_the_images_lie(embedded: Path) -> None:
    source, whole, beside = (PairFolder(str(embedded / name)) for name in ("mds", "whole", "beside"))
    assert beside.shard_sizes == source.shard_sizes and len(source.shard_sizes) > 4
    assert set(beside.columns) == {*EMBEDDINGS, "caption", "image_span"}
    rows = range(len(source))
    shards = json.loads((embedded / "mds" / "index.json").read_text())["shards"]
    decoded = beside.samples(rows, decode=["image_span"])
    for row, copied, original in zip(decoded, whole.samples(rows), source.samples(rows), strict=True):
        assert all(row[name] == copied[name] for name in (*EMBEDDINGS, "caption"))
        number, offset, length, checksum = row["image_span"].tolist()
        data = (embedded / "mds" / shards[number]["raw_data"]["basename"]).read_bytes()
        assert data[offset : offset + length] == original["image"]
        assert checksum == zlib.crc32(original["image"])
    record = json.loads((embedded / "beside" / "embedder.json").read_text())
    assert record["sidecar"] and record["counts"] == {"samples": 160, "undecodable": 2}
    files = {path.name.split(".")[0] for path in (embedded / "beside").iterdir()}
    assert files == {"shard", "index", "embedder"}


@pytest.mark.parametrize("columns", [{"image": "bytes"}, {"image": "bytes", "a": "str", "b": "int", "j": "str"}])
def test_spans_are_right_whatever_lies_around_the_image(tmp_path: Path, columns: dict[str, str]) -> None:
    values = {"str": lambda i: "é" * i, "int": lambda i: i, "bytes": lambda i: bytes([i]) * (i % 5)}
    with MDSWriter(out=str(tmp_path), columns=columns, size_limit=400) as writer:
        for i in range(40):
            writer.write({name: values[kind](i) for name, kind in columns.items()})
    folder, row = PairFolder(str(tmp_path)), 0
    assert len(folder.shard_sizes) > 1
    for number, size in enumerate(folder.shard_sizes):
        data = (tmp_path / f"shard.{number:05d}.mds").read_bytes()
        spans = folder.spans_of(number, "image")
        assert spans is not None and len(spans) == size
        for shard, offset, length in spans:
            assert (shard, data[offset : offset + length]) == (number, bytes([row]) * (row % 5))
            row += 1
    assert row == 40


def test_compressed_shards_have_no_spans_and_uids_come_along(tmp_path: Path, corpus: Path) -> None:
    rows = list(PairFolder(str(corpus / "train")).samples(range(30)))
    columns = {"image": "bytes", "caption": "str", "uid": "str", "image_embedding": "bytes"}
    with MDSWriter(out=str(tmp_path / "mds"), columns=columns, compression="zstd", size_limit=6000) as writer:
        for row, sample in enumerate(rows):
            old = {"image": sample["image"], "caption": sample["caption"].decode(), "image_embedding": b"old"}
            writer.write({**old, "uid": f"u{row}"})
    embed_mds.main([*options(tmp_path, tmp_path / "mds"), "--sidecar"])  # a second embedder may stand beside a first
    beside = PairFolder(str(tmp_path / "out"))
    assert set(beside.columns) == {*EMBEDDINGS, "caption", "uid"}
    found = list(beside.samples(range(30), decode=["uid", "image_embedding"]))
    assert [sample["uid"] for sample in found] == [f"u{row}" for row in range(30)]
    assert found[0]["image_embedding"].dtype == np.float16


def test_a_sidecar_of_compressed_and_uncompressed_shards_is_refused_before_any_work(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, shards = list(PairFolder(str(corpus / "train")).samples(range(20))), []
    for part, compression in enumerate((None, "zstd")):
        columns = {"image": "bytes", "caption": "str"}
        with MDSWriter(out=str(tmp_path / "mds" / str(part)), columns=columns, compression=compression) as writer:
            for sample in rows:
                writer.write({"image": sample["image"], "caption": sample["caption"].decode()})
        shards += json.loads((tmp_path / "mds" / str(part) / "index.json").read_text())["shards"]
        for info in filter(None, (shards[-1]["raw_data"], shards[-1]["zip_data"])):
            info["basename"] = f"{part}/{info['basename']}"
    (tmp_path / "mds" / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    arguments = options(tmp_path, tmp_path / "mds")
    with pytest.raises(SystemExit):
        embed_mds.main([*arguments, "--sidecar"])
    said = capsys.readouterr().err
    assert "--sidecar: 1/shard.00000.mds of" in said and "is compressed (zstd), and the first shard is not" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.embedding").exists()
    embed_mds.main(arguments)
    assert len(PairFolder(str(tmp_path / "out"))) == 40


def test_a_damaged_shard_is_not_embedded(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = in_shards(corpus, tmp_path / "mds", rows=20)
    damage(folder / "shard.00001.mds")
    for mode in ([], ["--sidecar"]):
        with pytest.raises(SystemExit):
            embed_mds.main([*options(tmp_path, folder), "--restart", *mode])
        assert "shard shard.00001.mds of" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_sidecar_is_read_as_streaming_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "caption": "str",
        "uid": "str",
        "n": "int",
        "a": "ndarray:float16:3",
        "b": "ndarray:int64:2,2",
        "c": "ndarray",
    }
    with MDSWriter(out=str(tmp_path), columns=columns, size_limit=600) as writer:
        for i in range(50):
            arrays = {
                "a": np.full(3, i, np.float16),
                "b": np.full((2, 2), i),
                "c": np.arange(1 + i % 4, dtype=np.int16),
            }
            writer.write({"caption": "é" * i, "uid": f"u{i}", "n": i, **arrays})
    (tmp_path / "embedder.json").write_text('{"sidecar": true}')
    monkeypatch.setattr("clipcov_stream.sidecar.MAX_MAPPED", 2)
    sidecar = pickle.loads(pickle.dumps(Sidecar(str(tmp_path), tmp_path)))
    dataset = StreamingDataset(local=str(tmp_path), batch_size=1)
    for number in np.random.default_rng(0).permutation(50).tolist():
        row, expected = sidecar[number], dataset[number]
        assert row.keys() == expected.keys() and len(sidecar.mapped) <= 2
        for name, value in expected.items():
            assert type(row[name]) is type(value)
            np.testing.assert_array_equal(row[name], value, strict=isinstance(value, np.ndarray))


def trained(tmp_path: Path, folder: Path, corpus: Path, **stream: Any) -> dict[str, torch.Tensor]:
    tree = recipe(corpus, selection={"embed": "columns", "warmup": "0ba"}, max_duration="8ba")
    tree["stream"] |= {"local": str(folder), **stream}
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "train.yaml", tree))))
    trainer.fit()
    trainer.close()
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_sidecar_is_training_on_copied_columns(
    tmp_path: Path, corpus: Path, embedded: Path, workers: int
) -> None:
    sidecar = str(embedded / "beside")
    copied = trained(tmp_path, embedded / "whole", corpus)
    beside = trained(tmp_path, embedded / "mds", corpus, sidecar=sidecar, num_workers=workers)
    assert copied.keys() == beside.keys()
    assert all(torch.equal(copied[name], beside[name]) for name in copied)
    other = trained(tmp_path, embedded / "whole", corpus, shuffle_seed=3)
    assert not all(torch.equal(copied[name], other[name]) for name in copied)


def test_a_sidecar_of_another_folder_is_refused(tmp_path: Path, corpus: Path, embedded: Path) -> None:
    other = in_shards(corpus, tmp_path / "mds", rows=159)
    with pytest.raises(ValueError, match=r"belongs to another folder than the stream: .* has [0-9a-f]{40}"):
        trained(tmp_path, other, corpus, sidecar=str(embedded / "beside"))
    with pytest.raises(ValueError, match=r"is not a sidecar: embedder.json does not say so"):
        trained(tmp_path, embedded / "mds", corpus, sidecar=str(embedded / "whole"))
    with pytest.raises(ValueError, match=r"is not a sidecar: .*No such file"):
        Sidecar(str(embedded / "mds"), tmp_path)
    shutil.copytree(embedded / "beside", tmp_path / "beside")
    (tmp_path / "beside" / "embedder.json").unlink()
    with pytest.raises(ValueError, match=r"is not a sidecar: .*embedder.json"):
        trained(tmp_path, embedded / "mds", corpus, sidecar=str(tmp_path / "beside"))


def without(shards: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """A sidecar's shards, whole ones left out, or one of another's length."""
    if part == "shorter":
        return shards[:-1]
    if part == "reordered":
        return [*shards[1:], shards[0]]
    return [*shards, shards[0] | {"raw_data": shards[0]["raw_data"] | {"basename": "more.mds"}}]


@pytest.mark.parametrize("range_reads", [False, True])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("shorter", r"it has {fewer} samples in {less} shards, the stream 160 in {shards}\. A sidecar has all"),
        ("reordered", r"160 samples in {shards} shards, .*, and shard \d+ has \d+ samples, the stream's \d+\."),
        ("longer", r"it has {more} samples in \d+ shards, the stream 160 in {shards}\."),
    ],
)
def test_a_part_of_the_streams_own_sidecar_is_refused(
    tmp_path: Path, corpus: Path, embedded: Path, part: str, message: str, range_reads: bool
) -> None:
    beside = Path(shutil.copytree(embedded / "beside", tmp_path / "beside"))
    index = json.loads((beside / "index.json").read_text())
    shards = index["shards"]
    first, last = shards[0]["samples"], shards[-1]["samples"]
    assert first != last
    figures = {"fewer": 160 - last, "more": 160 + first, "shards": len(shards), "less": len(shards) - 1}
    (beside / "index.json").write_text(json.dumps({**index, "shards": without(shards, part)}))
    with pytest.raises(ValueError, match="is not the whole sidecar of the stream: .*" + message.format(**figures)):
        trained(tmp_path, embedded / "mds", corpus, sidecar=str(beside), range_reads=range_reads)


@pytest.mark.parametrize("tool", [select_rivals, select_offline])
def test_of_a_sidecar_ids_may_be_picked_and_no_part_written(
    tmp_path: Path, embedded: Path, capsys: pytest.CaptureFixture[str], tool: ModuleType
) -> None:
    method = ["clip_score"] if tool is select_rivals else []
    argv = [*method, str(embedded / "beside"), str(tmp_path / "out"), "--num", "20", "--clusters", "2"]
    assert tool.main([*argv, "--mds"]) == 2
    said = capsys.readouterr().err
    assert "is a sidecar" in said and "leave --mds out" in said and not (tmp_path / "out").exists()
    assert tool.main(argv) == 0
    assert len((tmp_path / "out" / "subset.csv").read_text().splitlines()) == 21


def test_a_shard_missing_from_a_sidecar_ends_the_run(tmp_path: Path, corpus: Path, embedded: Path) -> None:
    shutil.copytree(embedded / "beside", tmp_path / "beside")
    (tmp_path / "beside" / "shard.00002.mds").unlink()
    with pytest.raises(OSError, match=r"shard.00002.mds of stream.sidecar .* cannot be used"):
        trained(tmp_path, embedded / "mds", corpus, sidecar=str(tmp_path / "beside"))


def test_what_another_process_fetched_meanwhile_is_not_fetched_again(
    tmp_path: Path, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Path(shutil.copytree(embedded / "beside", tmp_path / "cache"))
    cached = beside / "shard.00002.mds"
    whole, check = cached.read_bytes(), sidecar_module.check_file
    cached.write_bytes(whole[:-1])
    sidecar = Sidecar(str(beside), tmp_path)
    sidecar.is_remote = True  # as if `beside` were its cache
    looks = []

    def check_and_then(path: Path, info: Any) -> None:
        looks.append(path)
        try:
            check(path, info)
        finally:
            cached.write_bytes(whole)  # by another process, once this one has seen the damage

    def refuse(shard: Any, part: Path) -> None:
        raise AssertionError("it is there")

    monkeypatch.setattr(sidecar_module, "check_file", check_and_then)
    monkeypatch.setattr(sidecar, "_download", refuse)
    sidecar._make_sound(sidecar.shards[2], cached)
    assert cached.read_bytes() == whole and looks[0] == cached

    cached.write_bytes(b"damaged")
    monkeypatch.setattr(sidecar_module, "check_file", check)
    monkeypatch.setattr(sidecar, "_download", lambda shard, part: part.write_bytes(whole))
    sidecar._make_sound(sidecar.shards[2], cached)
    assert cached.read_bytes() == whole


def test_the_embedder_is_the_sidecars(embedded: Path) -> None:
    stream = StreamConfig(8, local=str(embedded / "mds"), sidecar=str(embedded / "beside"))
    record = columns_embedder(stream)
    assert record == json.loads((embedded / "beside" / "embedder.json").read_text())


def test_a_run_does_not_go_on_with_what_another_began(tmp_path: Path, corpus: Path, capsys) -> None:
    folder = in_shards(corpus, tmp_path / "mds", rows=20)
    arguments = options(tmp_path, folder)
    embed_mds.main([*arguments, "--sidecar"])
    record = json.loads((tmp_path / "out" / "embedder.json").read_text())
    shutil.rmtree(tmp_path / "out")
    embed_mds.check_staging(tmp_path / ".out.embedding", record, restart=False)
    for other, what in (([], "sidecar"), (["--sidecar", "--caption", "note"], "embedded")):
        with pytest.raises(SystemExit):
            embed_mds.main([*arguments, *other])
        assert f"was begun with other settings ({what})" in capsys.readouterr().err
