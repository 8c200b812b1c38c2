"""Folders in an object store: boto3 against a server on loopback, through Streaming's own back end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from azure.core.exceptions import ResourceNotFoundError
from botocore.exceptions import ClientError
from corpora import draw_corpus, recipe, write_recipe
from google.api_core.exceptions import Forbidden, NotFound
from oci.exceptions import ServiceError
from streaming import MDSWriter
from streaming.base.storage.download import GCSDownloader
from test_stream import dataset, encoded, pairs, picture

from clipcov_stream.build import columns_embedder
from clipcov_stream.config import StreamConfig, load_config
from clipcov_stream.remote import is_missing, is_remote, read_remote
from clipcov_stream.stream import pool_loader, read_json_beside
from clipcov_stream.train import build_trainer

if TYPE_CHECKING:
    from composer import Trainer
    from s3 import Bucket


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


def trainer_of(folder: Path, tree: dict[str, Any], **top: Any) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    return build_trainer(load_config(str(write_recipe(folder / "recipe.yaml", {**tree, **top}))))


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


def fit(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer.fit()
    trainer.close()
    return weights_of(trainer)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_written_to_the_store_streams_back(tmp_path: Path, bucket: Bucket, num_workers: int) -> None:
    images = [encoded(picture(i)) for i in range(24)]
    # Three shards, so that more than one is fetched.
    with MDSWriter(out=f"{bucket.url}/pairs", columns={"image": "bytes", "caption": "str"}, size_limit=2048) as writer:
        for i, image in enumerate(images):
            writer.write({"image": image, "caption": f"caption {i}"})
    assert len(bucket.keys("pairs/shard")) >= 3
    remote = dataset(tmp_path / "cache", remote=f"{bucket.url}/pairs")
    local = dataset(pairs(tmp_path / "mds", images=images))
    from_store, from_disk = list(pool_loader(remote, 4, num_workers)), list(pool_loader(local, 4))
    assert len(from_store) == len(from_disk) == 6
    for there, here in zip(from_store, from_disk, strict=True):
        assert there.keys() == here.keys()
        assert all(torch.equal(there[key], here[key]) for key in here)


def test_training_from_the_store_and_resuming_there_is_training_from_disk(
    tmp_path: Path, corpus: Path, bucket: Bucket
) -> None:
    url = bucket.upload(corpus / "train", "shapes/train")
    local = recipe(corpus, max_duration="5ba")
    straight = trainer_of(tmp_path / "disk", local)
    before = weights_of(straight)
    wanted = fit(straight)

    def remote(cache: str) -> dict[str, Any]:
        return recipe(corpus, max_duration="5ba", stream={"remote": url, "local": str(tmp_path / cache)})

    saved = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "3ba"}
    # 5 of an epoch's 6 pools, resumed after 3: in the middle of it, on another machine, whose cache is empty.
    whole = fit(trainer_of(tmp_path / "first", remote("cache"), **saved))
    resumed = trainer_of(
        tmp_path / "second", remote("other"), load_path=str(tmp_path / "checkpoints" / "ep0-ba3-rank0.pt")
    )
    assert not list((tmp_path / "other").glob("*.mds"))
    again = fit(resumed)
    assert list((tmp_path / "other").glob("*.mds"))
    for name, value in wanted.items():
        assert torch.equal(whole[name], value) and torch.equal(again[name], value), name
    assert any(not torch.equal(before[name], wanted[name]) for name in wanted)


def test_zero_shot_evaluation_reads_its_split_and_classes_from_the_store(
    tmp_path: Path, corpus: Path, bucket: Bucket
) -> None:
    stream = {"remote": bucket.upload(corpus / "train", "train"), "local": str(tmp_path / "cache")}
    remote = {"remote": bucket.upload(corpus / "eval", "eval"), "local": str(tmp_path / "eval")}
    figures = {}
    for name, split in {"here": {"local": str(corpus / "eval")}, "there": remote}.items():
        trainer = trainer_of(
            tmp_path / name, recipe(corpus, stream=stream, max_duration="3ba", eval={"x": {**split, "batch_size": 9}})
        )
        trainer.fit()
        trainer.eval()
        figures[name] = {key: float(value.compute()) for key, value in trainer.state.eval_metrics["x"].items()}
        trainer.close()
    assert figures["here"] == figures["there"] and figures["here"]


def test_the_recipe_runs_from_the_store_in_a_process_of_its_own(tmp_path: Path, corpus: Path, bucket: Bucket) -> None:
    url, metrics = bucket.upload(corpus / "train", "train"), tmp_path / "metrics.jsonl"
    path = write_recipe(tmp_path / "any.yaml", recipe(corpus))
    overrides = [f"stream.remote={url}", f"stream.local={tmp_path / 'cache'}", "max_duration=2ba"]
    command = [sys.executable, "-m", "clipcov_stream", str(path), *overrides, f"metrics_file={metrics}"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert max(steps) == 2


def test_json_beside_the_shards_is_read_from_the_store(bucket: Bucket) -> None:
    remote = f"{bucket.url}/pairs"
    config = StreamConfig(global_pool_size=4, remote=remote, split="train")
    assert columns_embedder(config) is None
    record = {"fingerprint": 7, "logit_scale": 50.0, "name": "prüf"}
    bucket.client.put_object(Bucket=bucket.name, Key="pairs/train/embedder.json", Body=json.dumps(record).encode())
    assert columns_embedder(config) == record
    assert read_json_beside(None, remote + "/", "train", "embedder.json") == record
    bucket.client.put_object(Bucket=bucket.name, Key="pairs/train/embedder.json", Body=b"{")
    with pytest.raises(ValueError, match=rf"cannot read {remote}/train/embedder\.json: "):
        columns_embedder(config)
    with pytest.raises(ValueError, match=rf"cannot read {remote}/train/classes\.json: .*not found"):
        read_json_beside(None, remote, "train", "classes.json")


@pytest.mark.parametrize("where", ["{bucket}/nothing", "{bucket}", "s3://no-such-bucket/pairs"])
def test_a_folder_that_is_not_there_names_its_url_and_the_knob(tmp_path: Path, bucket: Bucket, where: str) -> None:
    remote = where.format(bucket=bucket.url)
    with pytest.raises(ValueError, match=rf"stream\.remote '{remote}' has no index\.json \(checked {remote}/index"):
        dataset(tmp_path / "cache", remote=remote)


def test_a_store_that_cannot_be_asked_is_an_error_with_its_own_words(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=r"stream\.remote 's3://b/x': cannot read s3://b/x/index\.json: NoCredentials"):
        dataset(tmp_path / "cache", remote="s3://b/x")
    with pytest.raises(ValueError, match=r"'ftp://b/x': cannot read ftp://b/x/index\.json: .*Unsupported remote"):
        dataset(tmp_path / "cache", remote="ftp://b/x")
    with pytest.raises(ValueError, match=r"cannot read s3://b/x/embedder\.json"):
        # Not "no such file": a run would go on with another logit scale, in silence.
        columns_embedder(StreamConfig(global_pool_size=4, remote="s3://b/x"))


def test_a_cached_index_needs_no_store(tmp_path: Path, bucket: Bucket) -> None:
    folder = pairs(tmp_path / "mds", 8)
    with bucket.server.asked() as requests:
        assert len(list(pool_loader(dataset(folder, remote=f"{bucket.url}/gone"), 4))) == 2
    assert not requests


def test_every_back_end_says_missing_in_its_own_way() -> None:
    class LocalEntryNotFoundError(FileNotFoundError):
        """Hugging Face's, when it reached no server."""

    class EntryNotFoundError(Exception):
        response = SimpleNamespace(status_code=404)

    azure: Any = SimpleNamespace(status_code=404, reason="Not Found")
    missing = [FileNotFoundError(), NotFound("x"), ResourceNotFoundError(response=azure), EntryNotFoundError()]
    for error in [*missing, ServiceError(404, "ObjectNotFound", {}, "x")]:
        assert is_missing(error), error
    for error in [PermissionError(), Forbidden("x"), ServiceError(401, "NotAuthenticated", {}, "x"), ValueError("404")]:
        assert not is_missing(error), error
    assert not is_missing(LocalEntryNotFoundError())


@pytest.mark.parametrize(
    ("code", "kind"), [("404", FileNotFoundError), ("NoSuchKey", FileNotFoundError), ("403", OSError), ("503", OSError)]
)
def test_what_a_gs_bucket_refuses_is_not_missing(
    monkeypatch: pytest.MonkeyPatch, code: str, kind: type[OSError]
) -> None:
    """With GCS_KEY Streaming asks by S3's protocol; 403 it calls "not found", and other answers it swallows."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ClientError({"Error": {"Code": code}}, "HeadObject")

    def create(self: GCSDownloader) -> None:
        self._gcs_client = SimpleNamespace(download_file=refuse)  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr(GCSDownloader, "_create_gcs_client", create)
    with pytest.raises(OSError, match="not found" if code != "503" else "was not downloaded") as raised:
        read_remote("gs://b/embedder.json")
    assert type(raised.value) is kind
    config = StreamConfig(global_pool_size=4, remote="gs://b")
    if kind is FileNotFoundError:
        assert columns_embedder(config) is None
    else:
        with pytest.raises(ValueError, match=r"cannot read gs://b/embedder\.json"):
            columns_embedder(config)


def test_urls_are_told_from_paths(bucket: Bucket) -> None:
    urls = ["s3://b/x", "gs://b/x", "hf://datasets/a/b", "dbfs:/Volumes/x", "sftp://u@h/x"]
    assert all(map(is_remote, urls))
    assert not any(map(is_remote, ["data/x", "/data/x", "./s3/x", "", None]))
    with pytest.raises(FileNotFoundError):
        read_remote(f"{bucket.url}/x")
