"""tools/embed_mds.py: embeddings of real MDS folders, its resumption, and training on what it wrote."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import embed_mds
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from forked import run_forked
from streaming import MDSWriter, StreamingDataset
from subset_folder import PairFolder

from clipcov_stream.build import build_selection, columns_embedder, tokenizer_of, transform_of
from clipcov_stream.config import ModelConfig, SelectionConfig, StreamConfig, load_config
from clipcov_stream.materialize import ImageTransform, decode_image
from clipcov_stream.model import build_towers
from clipcov_stream.train import build_trainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


def checkpoint(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    path = folder / f"towers{seed}.pt"
    torch.save(build_towers(config=TINY_MODEL).state_dict(), path)
    return path


def options(tmp_path: Path, folder: Path, out: str = "out", seed: int = 0) -> list[str]:
    made = write_recipe(tmp_path / "model.yaml", recipe(folder))
    weights = checkpoint(tmp_path, seed)
    return [str(folder), str(tmp_path / out), "--recipe", str(made), "--pretrained", str(weights), "--device", "cpu"]


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def in_shards(corpus: Path, folder: Path, rows: int = 60, encoding: str = "bytes", bad: int = 0) -> Path:
    """Some of a corpus in shards of a few samples; the first images spoilt."""
    pairs = PairFolder(str(corpus / "train"))
    columns = {"image": encoding, "caption": "str", "note": "str"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=6000, hashes=["sha1"]) as writer:
        for row, sample in enumerate(pairs.samples(range(rows))):
            image = sample["image"] if row >= bad else sample["image"][:40]
            value = decode_image(image) if encoding == "pil" else image
            writer.write({"image": value, "caption": sample["caption"].decode(), "note": f"n{row}"})
    (folder / "source.json").write_text("{}")
    return folder


@pytest.mark.parametrize("encoding", ["bytes", "png", "pil"])
def test_embeddings_are_the_models_own_of_every_sample(tmp_path: Path, corpus: Path, encoding: str) -> None:
    folder = in_shards(corpus, tmp_path / "mds", encoding=encoding)
    embed_mds.main([*options(tmp_path, folder), "--batch-size", "7"])
    towers = build_towers(config=TINY_MODEL, pretrained=str(tmp_path / "towers0.pt")).eval()
    transform, tokenizer = transform_of(towers), tokenizer_of(towers, ModelConfig(config=TINY_MODEL))
    before, after = PairFolder(str(folder)), PairFolder(str(tmp_path / "out"))
    assert after.shard_sizes == before.shard_sizes and len(before.shard_sizes) > 2
    assert set(after.columns) - set(before.columns) == {"image_embedding", "text_embedding"}
    old = list(before.samples(range(60)))
    new = list(after.samples(range(60), decode=["image_embedding", "text_embedding"]))
    for name in before.columns:
        assert [sample[name] for sample in old] == [sample[name] for sample in new]
    originals = list(PairFolder(str(corpus / "train")).samples(range(60)))
    crop, normalize = transform.crop(), transform.normalize()
    with torch.no_grad():
        pixels = normalize(torch.stack([crop(decode_image(sample["image"])) for sample in originals]))
        image = F.normalize(towers.encode_image(pixels), dim=1)
        tokens = torch.stack([tokenizer(sample["caption"].decode()) for sample in originals])
        text = F.normalize(towers.encode_text(tokens), dim=1)
    np.testing.assert_allclose(np.stack([s["image_embedding"] for s in new]), image.numpy(), atol=2e-3)
    np.testing.assert_allclose(np.stack([s["text_embedding"] for s in new]), text.numpy(), atol=2e-3)
    assert new[0]["image_embedding"].dtype == np.float16
    record = json.loads((tmp_path / "out" / "embedder.json").read_text())
    assert record["model"] == TINY_MODEL and record["pretrained"] == "towers0.pt"
    assert record["logit_scale"] == pytest.approx(float(towers.logit_scale.exp()))
    assert record["counts"] == {"samples": 60, "undecodable": 0}
    assert (tmp_path / "out" / "source.json").read_text() == "{}"
    assert not list(tmp_path.glob(".out*"))
    # Streaming itself reads it.
    dataset = StreamingDataset(local=str(tmp_path / "out"), batch_size=1)
    assert dataset[59]["note"] == "n59"


def test_undecodable_images_are_counted_and_their_embeddings_nan(tmp_path: Path, corpus: Path, capsys) -> None:
    folder = in_shards(corpus, tmp_path / "mds", bad=2)
    embed_mds.main(options(tmp_path, folder))
    assert "60 samples embedded, 2 images undecodable" in capsys.readouterr().out
    rows = list(PairFolder(str(tmp_path / "out")).samples(range(60), decode=["image_embedding", "text_embedding"]))
    missing = [bool(np.isnan(row[name]).all()) for row in rows for name in ("image_embedding", "text_embedding")]
    assert missing == [True] * 4 + [False] * 116


@pytest.mark.parametrize("mode", [[], ["--sidecar"]])
def test_killed_and_resumed_makes_the_same_bytes(tmp_path: Path, corpus: Path, mode: list[str]) -> None:
    folder = in_shards(corpus, tmp_path / "mds", rows=120)
    arguments = [*options(tmp_path, folder, "straight"), *mode]

    def command() -> list[str]:
        # One sample at a time, so that the kill finds it at work; all three alike, as rounding depends on the batch.
        return [str(ROOT / "tools" / "embed_mds.py"), *arguments, "--batch-size", "1"]

    assert run_forked(tmp_path, 1, *command()).returncode == 0
    arguments[1] = str(tmp_path / "resumed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command()], env=environment, stderr=subprocess.DEVNULL)
    staging = tmp_path / ".resumed.embedding"
    deadline = time.monotonic() + 120
    while len(list(staging.glob("part.?????"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = list(staging.glob("part.?????"))
    assert not (tmp_path / "resumed").exists() and len(finished) >= 2
    assert run_forked(tmp_path, 1, *command()).returncode == 0
    assert same_files(tmp_path / "straight", tmp_path / "resumed")
    assert not staging.exists()


def test_another_model_does_not_go_on_with_what_one_began(tmp_path: Path, corpus: Path) -> None:
    folder = in_shards(corpus, tmp_path / "mds")
    arguments = options(tmp_path, folder)
    staging = tmp_path / ".out.embedding"
    embed_mds.check_staging(staging, {"fingerprint": 1}, restart=False)
    with pytest.raises(SystemExit):
        embed_mds.main(arguments)
    embed_mds.main([*arguments, "--restart"])
    assert len(PairFolder(str(tmp_path / "out"))) == 60


@pytest.mark.parametrize("mode", [[], ["--sidecar"]])
def test_two_ranks_make_the_same_folder(tmp_path: Path, corpus: Path, mode: list[str]) -> None:
    folder = in_shards(corpus, tmp_path / "mds")
    embed_mds.main([*options(tmp_path, folder, "alone"), *mode])
    arguments = [*options(tmp_path, folder, "together"), *mode]
    assert run_forked(tmp_path, 2, ROOT / "tools" / "embed_mds.py", *arguments).returncode == 0
    # Not the same bytes: ranks have fewer threads each, which changes the order of sums.
    names = ["image_embedding", "text_embedding"]
    tables = [PairFolder(str(tmp_path / out)).samples(range(60), decode=names) for out in ("alone", "together")]
    for one, other in zip(*tables, strict=True):
        for name in names:
            np.testing.assert_allclose(one.pop(name), other.pop(name), atol=1e-3)
        assert one == other
    assert len({path.name for path in (tmp_path / "together").iterdir()} & {"index.json", "embedder.json"}) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--image", "pixels"], "--image 'pixels' is not a column"),
        (["--caption", "image"], "--caption 'image' is not a column .* encoded as one of ['str']"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--name", "ViT-B-32"], "give --name, an open_clip model, or --recipe"),
        (["--pretrained", "nowhere.pt"], "nowhere.pt"),
        pytest.param(
            *(["--device", "gpu"], "--device gpu needs a CUDA device"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, corpus: Path, capsys, extra: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        embed_mds.main([*options(tmp_path, corpus / "train"), *extra])
    error = capsys.readouterr().err
    assert all(part in error for part in message.split(" .* "))
    assert not (tmp_path / "out").exists()


def test_a_run_says_which_model_it_is_of(tmp_path: Path, corpus: Path) -> None:
    tree = recipe(corpus, run_name="own", save_folder=str(tmp_path / "own"), save_interval="3ba")
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "train.yaml", tree))))
    trainer.fit()
    trainer.close()
    folder = in_shards(corpus, tmp_path / "mds", rows=12)
    for out, pretrained in (("run", "own"), ("file", "own/latest-rank0.pt")):
        arguments = [str(folder), str(tmp_path / out), "--pretrained", str(tmp_path / pretrained)]
        embed_mds.main([*arguments, "--device", "cpu"])
    whole = ["--recipe", str(tmp_path / "train.yaml"), "--pretrained", str(tmp_path / "own" / "latest-rank0.pt")]
    embed_mds.main([str(folder), str(tmp_path / "recipe"), *whole, "--device", "cpu"])
    wanted = (tmp_path / "recipe" / "shard.00000.mds").read_bytes()
    assert all((tmp_path / out / "shard.00000.mds").read_bytes() == wanted for out in ("run", "file"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "ViT-B-23"], "--name 'ViT-B-23' is not an open_clip model; did you mean ViT-B-32"),
        (["--name", "ViT-B-32"], "--pretrained is missing"),
        ([], "--pretrained is missing: a run's folder or a checkpoint, or open_clip's weights with --name"),
        (["--pretrained", "nowhere"], "nowhere is neither a checkpoint nor a run's folder"),
    ],
)
def test_a_model_that_is_none_is_said(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        embed_mds.main([str(corpus / "train"), str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err


def test_an_existing_out_or_an_embedded_folder_is_refused(tmp_path: Path, corpus: Path, capsys) -> None:
    arguments = options(tmp_path, in_shards(corpus, tmp_path / "mds"))
    embed_mds.main(arguments)
    with pytest.raises(SystemExit):
        embed_mds.main(arguments)
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        embed_mds.main([arguments[1], str(tmp_path / "twice"), *arguments[2:]])
    assert "has columns ['image_embedding', 'text_embedding'] already" in capsys.readouterr().err


def test_training_on_columns_takes_the_embedders_scale_and_keeps_to_it(tmp_path: Path, corpus: Path) -> None:
    embed_mds.main(options(tmp_path, corpus / "train"))
    selection = {"embed": "columns", "warmup": "0ba"}
    tree = recipe(corpus, selection=selection, save_folder=str(tmp_path / "saved"), save_interval="3ba")
    tree["stream"]["local"] = str(tmp_path / "out")
    columns = {"image_embedding": "image_embedding", "text_embedding": "text_embedding"}
    tree["stream"]["columns"] = columns

    def trainer(**changes: object):
        path = write_recipe(tmp_path / "train.yaml", {**tree, **changes})
        return build_trainer(load_config(str(path)))

    first = trainer()
    clipcov = next(a for a in first.state.algorithms if hasattr(a, "embed_chunk"))
    record = json.loads((tmp_path / "out" / "embedder.json").read_text())
    assert clipcov.logit_scale == pytest.approx(record["logit_scale"]) != 100.0  # pyright: ignore
    first.fit()
    first.close()
    with pytest.raises(ValueError, match=r"selection.logit_scale=50.0 is not that of the columns' embedder, 14.29"):
        trainer(selection={**tree["selection"], "logit_scale": 50.0})
    embed_mds.main(options(tmp_path, corpus / "train", "other", seed=1))
    elsewhere = {**tree["stream"], "local": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=r"began with selection.embedder=\d+, not \d+"):
        trainer(stream=elsewhere, save_folder=None, load_path=str(tmp_path / "saved" / "latest-rank0.pt"))


def test_columns_without_a_record_are_taken_for_a_trained_clips_and_it_is_said() -> None:
    def built(embedder: dict[str, object] | None = None, **knobs: object) -> float:
        config = SelectionConfig(embed="columns", **knobs)  # pyright: ignore[reportArgumentType]
        return build_selection(config, ImageTransform(32), lambda caption: torch.zeros(4), embedder).logit_scale

    with pytest.warns(UserWarning, match=r"taken for a trained CLIP's, selection\.logit_scale=100; set it"):
        assert built() == 100.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert built(logit_scale=7.0) == 7.0
        assert built({"logit_scale": 9.0, "fingerprint": 1}) == 9.0
        built(selector="random")


def test_a_broken_record_of_the_embedder_is_an_error_and_a_missing_one_is_not(tmp_path: Path) -> None:
    stream = StreamConfig(global_pool_size=8, local=str(tmp_path))
    assert columns_embedder(stream) is None
    (tmp_path / "embedder.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"cannot read .*embedder.json"):
        columns_embedder(stream)
    (tmp_path / "embedder.json").write_text('{"model": "ViT-B-32"}')
    with pytest.raises(ValueError, match=r"embedder.json of .* has no fingerprint and logit_scale"):
        columns_embedder(stream)
