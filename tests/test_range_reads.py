"""stream.range_reads in the real Trainer: it changes nothing but what is fetched."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import embed_mds
import numpy as np
import pytest
import torch
from bench_loader import draw_image
from corpora import draw_corpus, recipe, write_recipe
from runs import Interrupt, assert_same, assert_same_run, run, run_ranks, trained_rows, trainer_of
from streaming import MDSWriter
from subset_folder import PairFolder
from test_embed_mds import in_shards, options

from clipcov_stream import ranges as ranges_module
from clipcov_stream.ledger import folder_hash
from clipcov_stream.records import read_gallery

if TYPE_CHECKING:
    from s3 import Bucket, Request


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """MDS shards of a few samples with two bad images, and their sidecar, `beside`."""
    root = tmp_path_factory.mktemp("embedded")
    embed_mds.main([*options(root, in_shards(corpus, root / "mds", rows=160, bad=2), "beside"), "--sidecar"])
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges_module, "FIRST_PAUSE", 0.001)


def is_shard(request: Request) -> bool:
    """Whether it gets some of a shard of the source, of what is under mds/."""
    return request.method == "GET" and re.search(r"/mds/.*\.mds$", request.path) is not None


def tree_of(embedded: Path, range_reads: bool = True, selection: Any = None, **stream: Any) -> dict[str, Any]:
    chosen = {"embed": "columns", "warmup": "1ba", "lag_delay": 2, **(selection or {})}
    tree = recipe(embedded, selection=chosen, max_duration="7ba")
    where = {"local": str(embedded / "mds"), "sidecar": str(embedded / "beside")}
    tree["stream"] |= {**where, "range_reads": range_reads, "min_scale": 0.4, **stream}
    return tree  # five pools an epoch: the run ends in the middle of the second


@pytest.mark.parametrize("selection", [{}, {"scope": "global"}, {"selector": "random"}], ids=str)
def test_ranges_change_nothing(tmp_path: Path, embedded: Path, selection: dict[str, Any]) -> None:
    whole = run(tmp_path, tree_of(embedded, False, selection))
    for num_workers, run_ahead in ((0, 0), (2, 0), (0, 2), (2, 2)):
        tree = tree_of(embedded, True, {**selection, "run_ahead": run_ahead}, num_workers=num_workers)
        by_ranges = run(tmp_path, tree)
        dataset: Any = by_ranges[0].state.train_dataloader.dataset  # pyright: ignore
        assert dataset.streams[0].local == str(embedded / "beside")
        assert_same_run(by_ranges, whole)
        assert by_ranges[2].data["selection/num_invalid"] == whole[2].data["selection/num_invalid"]
        assert folder_hash(dataset) == folder_hash(whole[0].state.train_dataloader.dataset)  # pyright: ignore
        by_ranges[0].close()
    assert not torch.equal(whole[1].images[-1], whole[1].images[-2])


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a_gallery_shows_the_same_by_ranges(tmp_path: Path, embedded: Path, run_ahead: int) -> None:
    found = {}
    for range_reads in (False, True):
        tree = tree_of(embedded, range_reads, {"run_ahead": run_ahead})
        tree |= {"gallery": str(tmp_path / str(range_reads)), "gallery_interval": "2ba", "run_name": "run"}
        run(tmp_path, tree)[0].close()
        found[range_reads] = read_gallery(tmp_path / str(range_reads))[1]
    assert [record["step"] for record in found[True]] == [1, 3, 5]
    for by_ranges, whole in zip(found[True], found[False], strict=True):
        assert [(e["id"], e["kept"], e["caption"], e["jpeg"]) for e in by_ranges["shown"]] == [
            (e["id"], e["kept"], e["caption"], e["jpeg"]) for e in whole["shown"]
        ]
        assert (whole["copies_by"], by_ranges["copies_by"]) == ("bytes", None)  # it fetches only what it shows
        same = ("words", "looked_at", "num_kept", "num_unread", "num_undecodable")
        assert [by_ranges[key] for key in same] == [whole[key] for key in same]


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a_run_killed_and_resumed_from_the_store_equals_one_on_whole_shards(
    tmp_path: Path, embedded: Path, bucket: Bucket, run_ahead: int
) -> None:
    straight = run(tmp_path, tree_of(embedded, False))
    before = len(bucket.server.settled())  # of other tests
    where = {"remote": bucket.upload(embedded / "mds", "mds"), "sidecar": bucket.upload(embedded / "beside", "beside")}
    ahead = {"run_ahead": run_ahead}
    first = tree_of(embedded, True, ahead, **where, local=str(tmp_path / "first"), num_workers=2)
    saved = {"save_interval": "3ba", "save_folder": str(tmp_path / "checkpoints")}
    trainer, _, _ = trainer_of(tmp_path, {**first, **saved})
    trainer.state.callbacks.append(Interrupt(3))
    with pytest.raises(InterruptedError):
        trainer.fit()
    trainer.close()
    # On another machine, whose cache is empty.
    second = tree_of(embedded, True, ahead, **where, local=str(tmp_path / "second"), range_cache="10mb")
    resumed = run(tmp_path, {**second, "load_path": str(tmp_path / "checkpoints" / "latest-rank0.pt")})
    assert_same_run(resumed, straight, skipped=3)
    resumed[0].close()
    asked = [request for request in bucket.server.settled()[before:] if is_shard(request)]
    assert asked and all(request.byte_range for request in asked)
    assert not list(tmp_path.glob("*/shard*")) and list((tmp_path / "second").glob(".ranges-*.sqlite"))


def test_spans_travel_between_ranks(tmp_path: Path, embedded: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", tree_of(embedded, True, {"scope": "global", "run_ahead": 1}))
    two = run_ranks(tmp_path / "two", path, 2)
    whole = run_ranks(tmp_path / "whole", path, 2, "stream.range_reads=false", "selection.run_ahead=0")
    for ours, theirs in zip(two, whole, strict=True):
        assert_same(ours["algorithm"], theirs["algorithm"])
        assert_same(dict(ours["model"]), dict(theirs["model"]))
    for ours, theirs in zip(trained_rows(two), trained_rows(whole), strict=True):
        assert torch.equal(ours, theirs)


@functools.cache
def photos() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [draw_image(rng, 224) for _ in range(480)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_little_more_than_survivors_is_fetched(tmp_path: Path, bucket: Bucket, shuffle: bool) -> None:
    """At filter_ratio 0.9, counted at the server: at most 1.3 times the survivors' own bytes, and the sidecar."""
    folder = tmp_path / "mds"
    with MDSWriter(out=str(folder), columns={"image": "jpeg", "caption": "str"}, size_limit=1 << 20) as writer:
        for number, image in enumerate(photos()):
            writer.write({"image": image, "caption": f"{number}"})
    embed_mds.main([*options(tmp_path, folder, "beside"), "--sidecar"])
    where = {"remote": bucket.upload(folder, "mds"), "sidecar": bucket.upload(tmp_path / "beside", "beside")}
    selection = {"filter_ratio": 0.9, "warmup": "0ba", "run_ahead": 1}
    stream = {**where, "local": str(tmp_path / "local"), "global_pool_size": 80, "shuffle": shuffle}
    before = len(bucket.server.settled())
    trainer, recorder, _ = run(tmp_path, {**tree_of(tmp_path, True, selection, **stream), "max_duration": "6ba"})
    trainer.close()
    requests = bucket.server.settled()[before:]
    tokenize = trainer.state.train_dataloader.dataset.tokenizer  # pyright: ignore
    number_of = {tuple(tokenize(f"{number}").tolist()): number for number in range(480)}
    survivors = {number_of[tuple(row)] for batch in recorder.batches for row in batch.tolist()}
    own = sum(len(photos()[number]) for number in survivors)
    total = sum(request.num_bytes for request in requests)
    sidecar = sum(path.stat().st_size for path in (tmp_path / "beside").iterdir())
    ranged = [request for request in requests if is_shard(request)]
    fetched = sum(request.num_bytes for request in ranged)
    print(f"shuffle={shuffle}: {len(survivors)} survivors of {own:,} bytes; {fetched:,} by {len(ranged)} ranges")
    print(f"{total:,} in all, {sidecar:,} in the sidecar: {(total - sidecar) / own:.3f} of the survivors'")
    assert len(survivors) == 48
    assert total <= 1.3 * own + sidecar
    assert all(request.byte_range for request in ranged) and len(ranged) <= 48
    largest = max(path.stat().st_size for path in folder.glob("*.mds"))
    assert max(request.num_bytes for request in ranged) < largest / 4
    assert len(list(folder.glob("*.mds"))) >= 5 and not list((tmp_path / "local").glob("*.mds"))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("stream", "selection", "message"),
    [
        ({"sidecar": None}, {}, r"range_reads=true needs stream\.sidecar.*embed_mds\.py --sidecar"),
        ({"sidecar": None}, {"embed": "teacher"}, r"range_reads=true .* selection\.embed='teacher' .*decodes every"),
        ({}, {"selector": "rho"}, r"range_reads=true .* selection\.selector='rho' decodes every"),
        ({"deferred": False}, {}, r"range_reads=true .* stream\.deferred=false decodes every"),
        ({"range_cache": "20gb"}, {}, r"range_cache='20gb' keeps what is fetched from stream\.remote \(None\)"),
        ({"range_cache": "many"}, {}, r"range_cache='many' is not a number of bytes"),
        ({"range_reads": False, "range_cache": 5}, {}, r"range_cache=5 needs stream\.range_reads=true"),
        ({"columns": {"image": "jpg"}}, {}, r"no column 'jpg' \(stream\.columns\.image\)"),
        ({"columns": {"concepts": "concepts"}}, {}, r"no column 'concepts' \(stream\.columns\.concepts\)"),
    ],
)
def test_what_cannot_be_read_by_ranges_is_refused(
    tmp_path: Path, embedded: Path, stream: dict[str, Any], selection: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tree_of(embedded, **{"selection": selection, **stream}))


def test_an_empty_folder_is_refused(tmp_path: Path, embedded: Path) -> None:
    (tmp_path / "index.json").write_text('{"version": 2, "shards": []}')
    with pytest.raises(ValueError, match=r"is an MDS folder without samples"):
        trainer_of(tmp_path, tree_of(embedded, local=str(tmp_path)))


def test_compressed_shards_and_sidecars_without_spans_or_of_others_are_refused(
    tmp_path: Path, corpus: Path, embedded: Path
) -> None:
    rows = list(PairFolder(str(corpus / "train")).samples(range(40)))
    with MDSWriter(
        out=str(tmp_path / "zip"), columns={"image": "bytes", "caption": "str"}, compression="zstd"
    ) as writer:
        for sample in rows:
            writer.write({"image": sample["image"], "caption": sample["caption"].decode()})
    embed_mds.main([*options(tmp_path, tmp_path / "zip", "none"), "--sidecar"])
    where = {"local": str(tmp_path / "zip"), "sidecar": str(tmp_path / "none")}
    with pytest.raises(ValueError, match=r"range_reads=true: the shards of .* are compressed \(zstd"):
        trainer_of(tmp_path, tree_of(embedded, **where))
    shutil.copytree(embedded / "beside", tmp_path / "spanless")
    record = json.loads((tmp_path / "spanless" / "embedder.json").read_text())
    index = json.loads((tmp_path / "spanless" / "index.json").read_text())
    for shard in index["shards"]:
        at = shard["column_names"].index("image_span")
        for key in ("column_names", "column_encodings", "column_sizes"):
            shard[key].pop(at)
    (tmp_path / "spanless" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"range_reads=true needs the column 'image_span' of stream\.sidecar"):
        trainer_of(tmp_path, tree_of(embedded, sidecar=str(tmp_path / "spanless")))
    with pytest.raises(ValueError, match=r"belongs to another folder than the stream"):
        trainer_of(tmp_path, tree_of(embedded, sidecar=str(tmp_path / "none")))
    shutil.copytree(embedded / "beside", tmp_path / "other")
    record = {**record, "embedded": {"image": "thumbnail", "caption": "caption"}}
    (tmp_path / "other" / "embedder.json").write_text(json.dumps(record))
    message = re.escape("says where the column 'thumbnail' lies, but stream.columns.image is 'image'")
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tree_of(embedded, sidecar=str(tmp_path / "other")))


@pytest.mark.usefixtures("quick")
def test_a_range_that_cannot_be_had_ends_the_run(tmp_path: Path, embedded: Path, bucket: Bucket) -> None:
    url = bucket.upload(embedded / "mds", "mds")
    for run_ahead in (0, 2):
        stream = {"remote": url, "local": str(tmp_path / f"local{run_ahead}")}
        trainer, _, _ = trainer_of(tmp_path, tree_of(embedded, True, {"run_ahead": run_ahead}, **stream))
        with (
            bucket.server.failing(lambda method, path, byte_range: "error" if byte_range else None),
            pytest.raises(OSError, match=rf"cannot read .* of shard \d+, {url}/shard\.\d+\.mds, after 6 attempts"),
        ):
            trainer.fit()
        trainer.close()


@pytest.mark.parametrize("encoding", ["png", "pil"])
def test_every_image_encoding_is_read_by_ranges(tmp_path: Path, corpus: Path, encoding: str) -> None:
    folder = in_shards(corpus, tmp_path / "mds", rows=70, encoding=encoding)
    embed_mds.main([*options(tmp_path, folder, "beside"), "--sidecar"])
    whole, by_ranges = (run(tmp_path, {**tree_of(tmp_path, on), "max_duration": "2ba"}) for on in (False, True))
    assert_same_run(by_ranges, whole)
