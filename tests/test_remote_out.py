"""A remote OUT, and a remote sidecar, through a real S3 client: complete or without index.json."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import embed_mds
import pytest
import torch
from corpora import draw_corpus
from mds_folder import mds_folder
from remote_folder import output_folder, url_to_read
from s3 import Bucket
from sources import COLUMNS, make, write_numbers
from streaming import StreamingDataset
from streaming.base.storage.upload import S3Uploader
from subset_folder import PairFolder
from test_datacomp import draw_pool, uid
from test_embed_mds import in_shards, options
from test_sidecar import trained

from clipcov_stream import sidecar as sidecar_module
from clipcov_stream.sidecar import Sidecar


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go, so that a test sees what is left of them."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pool_goes_to_a_bucket_as_to_a_disk(tmp_path: Path, bucket: Bucket, scratch: Path, workers: int) -> None:
    shards = draw_pool(tmp_path / "pool") / "shards" / "small"
    written = ["--embeddings", "b32", "--workers", workers, "--size-limit", "8kb"]
    make("pairs", shards, f"{bucket.url}/deep/out/", *written)
    make("pairs", shards, tmp_path / "local", *written)
    local = {f"deep/out/{path.name}": path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert bucket.keys() == sorted(local) and len(local) > 5
    for key, data in local.items():
        assert bucket.read(key) == data
    assert list(scratch.iterdir()) == []
    dataset = StreamingDataset(remote=f"{bucket.url}/deep/out", local=str(tmp_path / "cache"), batch_size=1)
    assert [sample["uid"] for sample in dataset] == [uid(number) for number in range(12)]


def test_held_out_pairs_go_to_a_bucket_too(tmp_path: Path, bucket: Bucket, scratch: Path) -> None:
    shards = draw_pool(tmp_path / "pool") / "shards" / "small"
    make("pairs", shards, f"{bucket.url}/out", "--hold-out", 3)
    found = {}
    for place in ("out", "out/held"):
        local = str(tmp_path / place)
        dataset = StreamingDataset(remote=f"{bucket.url}/{place}", local=local, batch_size=1)
        found[place] = [sample["uid"] for sample in dataset]
    assert len(found["out/held"]) == 3 and sorted([*found["out"], *found["out/held"]]) == sorted(map(uid, range(12)))


def test_index_json_comes_last_and_only_after_all_else(bucket: Bucket, scratch: Path, monkeypatch) -> None:
    out, order, upload = f"{bucket.url}/out", [], S3Uploader.upload_file

    def noted(self: S3Uploader, name: str) -> None:
        order.append((name, bucket.keys()))
        upload(self, name)

    monkeypatch.setattr(S3Uploader, "upload_file", noted)
    write_numbers(out, range(30), size_limit=500, source={"tool": "t"})
    last, before = order[-1]
    assert last == "index.json" and before == sorted(f"out/{name}" for name, _ in order[:-1]) and len(before) > 5

    def failing(self: S3Uploader, name: str) -> None:
        if name == "shard.00003.mds":
            raise ConnectionError("the line is cut")
        upload(self, name)

    monkeypatch.setattr(S3Uploader, "upload_file", failing)
    with pytest.raises(ValueError, match=r"OUT='s3://.*/cut' failed; it has no index.json yet: .*line is cut"):
        write_numbers(f"{bucket.url}/cut", range(30), size_limit=500)
    assert bucket.keys("cut/index") == []
    monkeypatch.setattr(S3Uploader, "upload_file", upload)
    write_numbers(f"{bucket.url}/cut", range(30), size_limit=500)
    assert bucket.keys("cut/index") == ["cut/index.json"]
    assert list(scratch.iterdir()) == []


def test_what_was_uploaded_is_looked_for_where_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming's clients for Azure Blob read one URL in two ways."""
    seen: list[tuple[str, str]] = []

    class Service:
        def __init__(self, **_: object) -> None: ...

        def get_container_client(self, container: str) -> Any:
            def upload_blob(name: str, **_: object) -> None:
                seen.append((container, name))

            return SimpleNamespace(exists=lambda: True, upload_blob=upload_blob)

        def get_blob_client(self, container: str, blob: str) -> Any:
            seen.append((container, blob))
            return SimpleNamespace(download_blob=lambda: SimpleNamespace(readinto=lambda file: file.write(b"{}")))

    monkeypatch.setattr("azure.storage.blob.BlobServiceClient", Service)
    monkeypatch.setenv("AZURE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_ACCOUNT_ACCESS_KEY", "key")
    with pytest.raises(ValueError, match=r"has an index\.json already"), output_folder("azure://cc12m/deep/train"):
        pass
    with monkeypatch.context() as absent:
        absent.setattr("remote_folder._check_absent", lambda out: None)
        with output_folder("azure://cc12m/deep/train") as folder:
            (folder / "index.json").write_text("{}")
    assert seen == 2 * [("cc12m", "deep/train/index.json")]
    for url in ("s3://bucket/path", "gs://bucket/path", "azure-dl://container/path", "hf://datasets/a/b"):
        assert url_to_read(url) == url


def test_nothing_is_uploaded_by_a_run_that_fails(bucket: Bucket, scratch: Path) -> None:
    with pytest.raises(RuntimeError), mds_folder(f"{bucket.url}/out", COLUMNS, size_limit=50) as split:
        split.write({"image": b"1" * 60, "uid": "1"})
        raise RuntimeError
    assert bucket.keys() == [] and list(scratch.iterdir()) == []


def test_an_out_that_is_taken_or_cannot_be_written_to_is_said_before_any_work(bucket: Bucket, scratch: Path) -> None:
    write_numbers(f"{bucket.url}/out", range(3))
    before = bucket.keys()
    for out, options_, message in (
        (f"{bucket.url}/out", {}, "has an index.json already; give another OUT"),
        (f"{bucket.url}/out", {"overwrite": True}, "--overwrite cannot replace the remote OUT"),
        (
            "s3://no-such-bucket/out",
            {},
            r"OUT='s3://no-such-bucket/out' cannot be .*; make the bucket first \(no-such-b",
        ),
        ("ftp://host/out", {}, "is none that Streaming uploads to"),
    ):
        with pytest.raises(ValueError, match=message), mds_folder(out, COLUMNS, **options_):
            raise AssertionError("the work began")
    assert bucket.keys() == before and list(scratch.iterdir()) == []


def test_one_run_wins_when_two_write_to_one_out(bucket: Bucket, scratch: Path) -> None:
    out = f"{bucket.url}/out"
    with pytest.raises(ValueError, match=r"has an index\.json already"), mds_folder(out, COLUMNS) as split:
        split.write({"image": b"1", "uid": "late"})
        write_numbers(out, range(3))
    assert len(bucket.keys()) == 2


def test_folders_and_files_of_a_staged_folder_keep_their_names(bucket: Bucket, scratch: Path) -> None:
    with output_folder(f"{bucket.url}/out") as folder:
        for name in ("train", "eval"):
            (folder / name).mkdir()
            (folder / name / "index.json").write_text(name)
        (folder / "notes.txt").write_text("x")
    assert bucket.keys() == ["out/eval/index.json", "out/notes.txt", "out/train/index.json"]


# A remote sidecar --------------------------------------------------------------------------------------


def test_a_sidecar_in_a_bucket_is_fetched_as_needed_and_checked(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = draw_corpus(tmp_path / "shapes")
    folder = in_shards(corpus, tmp_path / "mds", rows=160)
    embed_mds.main([*options(tmp_path, folder, "beside"), "--sidecar"])
    url = bucket.upload(tmp_path / "beside", "sidecar")
    local = trained(tmp_path, folder, corpus, sidecar=str(tmp_path / "beside"))
    for workers in (0, 2):
        here = tmp_path / f"here{workers}"
        shutil.copytree(folder, here)
        remote = trained(tmp_path, here, corpus, sidecar=url, num_workers=workers)
        assert all(torch.equal(local[name], remote[name]) for name in local)
        (cache,) = here.glob(".sidecar-*")
        fetched = {path.name for path in cache.glob("*.mds")}
        shards = json.loads((folder / "index.json").read_text())["shards"]
        assert fetched == {shard["raw_data"]["basename"] for shard in shards}
    sidecar = Sidecar(url, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    captions = [sample["caption"].decode() for sample in PairFolder(str(folder)).samples((0, 1))]
    assert [sidecar[number]["caption"] for number in (0, 1)] == captions
    assert len(list((tmp_path / "fresh").glob(".sidecar-*/*.mds"))) == 1
    data = (tmp_path / "beside" / "shard.00001.mds").read_bytes()
    bucket.client.put_object(Bucket=bucket.name, Key="sidecar/shard.00001.mds", Body=data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setattr(sidecar_module, "FIRST_PAUSE", 0.001)
    with pytest.raises(OSError, match=r"shard.00001.mds of stream.sidecar .* fails its sha1 check"):
        sidecar[sidecar.ends[0]]
    assert len(list((tmp_path / "fresh").glob(".sidecar-*/*.mds"))) == 1
