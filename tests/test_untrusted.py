"""Folders, images, captions, recipes and checkpoints of strangers: bounded, counted or refused, and run as no code."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_input
import hypothesis.strategies as st
import mutate
import numpy as np
import open_clip
import pytest
import torch
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from hypothesis import HealthCheck, example, given, settings
from PIL import Image
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader
from subset_folder import PairFolder
from torch import Tensor
from torchvision.transforms import v2

from clipcov_stream.captions import MAX_WORDS, SHORTEST_CUT, caption_of, cut, first_of
from clipcov_stream.config import EvalConfig, load_config
from clipcov_stream.decode import MAX_ASPECT, UndecodableImage, decode_image, raw_image
from clipcov_stream.evaluators import streamed_split
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.mds_index import checked_index
from clipcov_stream.reader import bounded
from clipcov_stream.redact import check_url, has_credentials, redacted
from clipcov_stream.stream import Columns, PairDataset, pool_loader
from clipcov_stream.train import build_trainer, main
from clipcov_stream.weights import VALIDATION, is_data

QUIET = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck), database=None)
LONG = settings(QUIET, max_examples=4000)
TOKENIZER = open_clip.SimpleTokenizer(context_length=16)
CASES = {f"{case.group}: {case.what}": case for case in hostile_input.all_cases()}


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_is_made_to_do_harm_gets_what_it_should(name: str) -> None:
    outcome = hostile_input.tried(CASES[name])
    assert outcome.text.startswith(CASES[name].expected), outcome.text
    assert outcome.seconds < 20 and outcome.mib < 1000


def tokenize(caption: str) -> Tensor:
    return first_of(TOKENIZER, 16, caption)


def picture(side: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def written(folder: Path, columns: dict[str, str], rows: list[dict[str, Any]]) -> Path:
    with MDSWriter(columns=columns, out=str(folder)) as writer:
        for row in rows:
            writer.write(row)
    return folder


def dataset(folder: Path, **options: Any) -> PairDataset:
    given_ = {"local": str(folder), "columns": Columns(), "tokenizer": tokenize, "batch_size": 4, **options}
    return PairDataset(transform=ImageTransform(8), num_canonical_nodes=1, **given_)


# Pickles


class Payload:
    """Unpickled, it makes a folder; its value is a concept's index."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"__import__('os').makedirs({str(self.mark)!r}, exist_ok=True) or 3",))


def pickled(tmp_path: Path) -> tuple[Path, Path]:
    mark = tmp_path / "ran"
    rows = [{"image": picture(), "caption": f"{i}", "meta": Payload(mark)} for i in range(4)]
    return written(tmp_path / "mds", {"image": "bytes", "caption": "str", "meta": "pkl"}, rows), mark


def test_a_pickled_column_is_refused_unless_it_is_allowed_by_name(tmp_path: Path) -> None:
    folder, mark = pickled(tmp_path)
    for allowed in ((), ("other",)):
        with pytest.raises(ValueError, match=r"column 'meta' is pickled \(pkl\).*stream.allow_pickle=\[meta\]"):
            dataset(folder, allow_pickle=allowed)
    tree = recipe(tmp_path, selection={"filter_ratio": 0.5})
    tree["stream"] = {"local": str(folder), "global_pool_size": 4, "num_workers": 0}
    config = load_config(str(write_recipe(tmp_path / "recipe.yaml", tree)))
    with pytest.raises(ValueError, match="column 'meta' is pickled"):
        build_trainer(config)
    assert not mark.exists()


def test_an_allowed_pickle_is_loaded_only_where_it_is_read(tmp_path: Path) -> None:
    folder, mark = pickled(tmp_path)
    for deferred in (False, True):
        pool = next(iter(pool_loader(dataset(folder, allow_pickle=["meta"], deferred=deferred), 4)))
        assert len(pool["id"]) == 4 and not mark.exists()
    pool = next(iter(pool_loader(dataset(folder, allow_pickle=["meta"], columns=Columns(concepts="meta")), 4)))
    assert pool["concepts"].tolist() == [[3]] * 4 and mark.exists()


def test_an_evaluation_leaves_pickles_alone_and_refuses_one_that_it_would_read(tmp_path: Path) -> None:
    folder, mark = pickled(tmp_path)
    retrieval = EvalConfig(local=str(folder), batch_size=4)
    loader, _ = streamed_split("pairs", retrieval, ("retrieval",), ImageTransform(8), tokenize)
    (batch,) = loader
    assert len(batch["text"]) == 4 and batch["valid"].all() and not mark.exists()
    rows = [{"image": picture(), "label": Payload(mark)}]
    classes = EvalConfig(local=str(written(tmp_path / "classes", {"image": "bytes", "label": "pkl"}, rows)))
    with pytest.raises(ValueError, match=r"eval\.pets: column 'label' of .* is pickled \(pkl\).*\(a label as int\)"):
        streamed_split("pets", classes, ("zeroshot",), ImageTransform(8), tokenize)
    assert not mark.exists()


def test_a_remote_folder_that_leaves_the_cache_is_refused_before_it_is_written(tmp_path: Path) -> None:
    rows = [{"image": picture(), "caption": f"{i}"} for i in range(4)]
    folder = written(tmp_path / "remote", {"image": "bytes", "caption": "str"}, rows)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][0]["raw_data"]["basename"] = "../outside.mds"
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "outside.mds").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"shard 0: '../outside.mds' is not the name of a file inside of the folder"):
        dataset(folder, local=str(tmp_path / "cache"), remote=str(folder))
    assert (tmp_path / "outside.mds").read_bytes() == b"mine"


def test_a_link_in_the_cache_is_not_written_through(tmp_path: Path) -> None:
    rows = [{"image": picture(), "caption": f"{i}"} for i in range(4)]
    folder = written(tmp_path / "remote", {"image": "bytes", "caption": "str"}, rows)
    (tmp_path / "cache").mkdir()
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "cache" / "shard.00000.mds").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"leads out of .*cache by a link"):
        dataset(folder, local=str(tmp_path / "cache"), remote=str(folder))
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_shards_of_other_columns_than_the_first_are_refused(tmp_path: Path) -> None:
    rows = [{"image": picture(), "caption": f"{i}"} for i in range(4)]
    folder = written(tmp_path / "mds", {"image": "bytes", "caption": "str"}, rows)
    other = written(tmp_path / "other", {"image": "bytes", "caption": "bytes"}, [{**r, "caption": b"x"} for r in rows])
    index, more = (json.loads((path / "index.json").read_bytes()) for path in (folder, other))
    (folder / "shard.00001.mds").write_bytes((other / "shard.00000.mds").read_bytes())
    more["shards"][0]["raw_data"]["basename"] = "shard.00001.mds"
    index["shards"] += more["shards"]
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"shard 1 of .* has the columns .* the first one has"):
        dataset(folder)


# Samples


@pytest.mark.parametrize("deferred", [False, True])
def test_bad_samples_cost_themselves_alone(tmp_path: Path, deferred: bool) -> None:
    """A caption that is no UTF-8 is read the same everywhere; raw pixels that lie are an invalid sample."""
    lie = struct.pack("<3I", 50_000, 50_000, 3) + b"RGB" + bytes(9)
    whole = struct.pack("<3I", 2, 2, 3) + b"RGB" + bytes(range(12))
    captions = [b"a \xed\xa0\xbd dog \xff", b"", b"\x00" * 9, b"a photo " * 100_000]
    rows = [{"image": image, "caption": text} for image, text in zip([whole, lie, whole, b""], captions, strict=True)]
    folder = written(tmp_path / "mds", {"image": "bytes", "caption": "bytes"}, rows)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][0]["column_encodings"] = ["str", "pil"]
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    loader = pool_loader(dataset(folder, deferred=deferred), 4)
    pool = next(iter(loader))
    if deferred:
        assert loader.materialize is not None
        tensors, failed = loader.materialize(pool, {})
        valid = ~failed
        loader.close()
    else:
        tensors, valid = pool, pool["valid"]
    assert valid.tolist() == [True, False, True, False]
    assert not bool(tensors["image"][1].any())
    assert torch.equal(tensors["text"], torch.stack([tokenize(caption_of(text)) for text in captions]))


def test_more_pixels_than_the_recipe_allows_are_an_invalid_sample(tmp_path: Path) -> None:
    rows = [{"image": picture(side), "caption": "x"} for side in (8, 9, 10, 11)]
    folder = written(tmp_path / "mds", {"image": "bytes", "caption": "str"}, rows)
    for deferred in (False, True):
        loader = pool_loader(dataset(folder, max_pixels=81, deferred=deferred), 4)
        pool = next(iter(loader))
        valid = pool["valid"]
        if deferred:
            assert loader.materialize is not None
            valid = ~loader.materialize(pool, {})[1]
            loader.close()
        assert valid.tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match=r"stream.max_pixels=0 must be from 1 to"):
        dataset(folder, max_pixels=0)


def decoded(data: bytes) -> Tensor | None:
    """What comes of any bytes: nothing, or a crop; anything else fails the test."""
    try:
        image = decode_image(data, max_pixels=1 << 20)
    except UndecodableImage:
        return None
    assert image.mode == "RGB"
    return ImageTransform(8).crop()(image)


@st.composite
def image_bytes(draw: st.DrawFn) -> bytes:
    number = draw(st.integers(0, 10**9))
    return mutate.image(mutate.random.Random(number), SEEDS)


SEEDS = mutate.images()


def test_every_seed_of_the_fuzzer_is_a_whole_image() -> None:
    assert all(decoded(seed) is not None for seed in SEEDS) and len(SEEDS) > 70
    assert all(raw_image(seed).size == (5, 6) for seed in mutate.raw_images())


@QUIET
@given(st.binary(max_size=200) | image_bytes())
@example(b"\xff\xd8\xff")
def test_any_bytes_are_an_image_or_undecodable(data: bytes) -> None:
    crop = decoded(data)
    assert crop is None or (crop.shape == (3, 8, 8) and crop.dtype == torch.uint8)


@pytest.mark.slow
@LONG
@given(st.binary(max_size=200) | image_bytes())
def test_any_bytes_are_an_image_or_undecodable_at_length(data: bytes) -> None:
    decoded(data)


@QUIET
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_ordinary_shapes_are_cropped_as_torchvision_crops_them(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    image = decode_image(buffer.getvalue())
    long, short = max(width, height), min(width, height)
    assert max(image.size) == min(long, MAX_ASPECT * short) and min(image.size) == short
    if long <= MAX_ASPECT * short:
        theirs = v2.Compose([v2.Resize(8, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(8)])
        assert torch.equal(
            ImageTransform(8).crop()(image), v2.functional.pil_to_tensor(theirs(Image.fromarray(pixels)))
        )


# Captions

TEXT = st.text(st.characters(codec="utf-8"), max_size=300) | st.text(max_size=40)


def check_caption(caption: str) -> None:
    """The tokens open_clip gives, wherever it gives any, from text as from bytes."""
    tokens = tokenize(caption)
    assert tokens.shape == (16,) and int(tokens[0]) == TOKENIZER.sot_token_id
    assert TOKENIZER.eot_token_id in tokens.tolist()
    data = caption.encode("utf-8", "surrogatepass")
    assert torch.equal(tokens, tokenize(caption_of(data)))
    if len(caption) <= SHORTEST_CUT and caption.isprintable():
        assert torch.equal(tokens, TOKENIZER(caption)[0])


@QUIET
@given(TEXT)
@example("\ud800")
@example("")
@example("<end_of_text> a cat")
def test_captions_of_any_characters_have_the_tokens_of_open_clip(caption: str) -> None:
    check_caption(caption)


@pytest.mark.slow
@LONG
@given(TEXT)
def test_captions_of_any_characters_have_the_tokens_of_open_clip_at_length(caption: str) -> None:
    check_caption(caption)


@QUIET
@given(
    st.lists(st.sampled_from(["a photo of", "dogs", "\u4e2d\u6587", "\n", " ", "12oz", "&amp;"]), min_size=1),
    st.integers(1, 40),
)
def test_a_cut_changes_no_token_that_is_read(words: list[str], times: int) -> None:
    caption = " ".join(words * times * 50)
    assert len(cut(caption, 16)) <= max(SHORTEST_CUT, len(caption) if len(caption) <= SHORTEST_CUT else 0)
    assert torch.equal(tokenize(caption), TOKENIZER(caption)[0])


def test_a_tokenizer_forgets_words_and_keeps_its_special_ones() -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    before = tokenizer("a dog <end_of_text> b")
    tokenizer.cache.update({f"word{number}": "x" for number in range(MAX_WORDS + 1)})
    assert torch.equal(first_of(tokenizer, 8, "a dog <end_of_text> b"), before[0])
    assert len(tokenizer.cache) < 10


# Shards and indices


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    folder = tmp_path_factory.mktemp("small") / "mds"
    return folder, *mutate.folder(folder)


def test_the_bounded_reader_reads_what_streamings_reads(small: Any) -> None:
    folder, index, _ = small
    (shard,) = checked_index(index, folder)
    ours, theirs = (MDSReader.from_json(str(folder), None, shard) for _ in range(2))
    for row in range(len(theirs)):
        mine, other = bounded(ours)[row], theirs[row]
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[name], other[name]) for name in mine)


def unchecked(folder: Path) -> PairFolder:
    """A folder whose shards count as looked at, so that damage gets past the checksums."""
    pairs = PairFolder(str(folder))
    pairs.sound.update(range(len(pairs.shard_sizes)))
    return pairs


def check_shard(folder: Path, shard: bytes, number: int) -> None:
    damaged = mutate.mutated(mutate.random.Random(number), shard)
    path = folder / "shard.00000.mds"
    path.write_bytes(damaged)
    try:
        for row in unchecked(folder).samples(range(6), decode=["v"]):
            assert sum(len(value) for name, value in row.items() if name != "v") <= len(damaged)
    except ValueError:
        pass
    finally:
        path.write_bytes(shard)


@QUIET
@given(number=st.integers(0, 10**9))
def test_damaged_shards_are_read_or_an_error(small: Any, number: int) -> None:
    check_shard(small[0], small[2], number)


@pytest.mark.slow
@LONG
@given(number=st.integers(0, 10**9))
def test_damaged_shards_are_read_or_an_error_at_length(small: Any, number: int) -> None:
    check_shard(small[0], small[2], number)


def test_offsets_that_promise_gigabytes_are_refused_before_memory_is_taken(small: Any) -> None:
    folder, _, shard = small
    path = folder / "shard.00000.mds"
    path.write_bytes(shard[:8] + b"\xff\xff\xff\xff" + shard[12:])
    try:
        with pytest.raises(ValueError, match=r"sample 0 of shard.00000.mds is said to lie from byte \d+ to 4294967295"):
            list(unchecked(folder).samples([0]))
    finally:
        path.write_bytes(shard)


@QUIET
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda below: st.lists(below) | st.dictionaries(st.text(), below),
        max_leaves=8,
    )
)
def test_any_json_is_an_index_or_an_error(value: Any) -> None:
    data = json.dumps({"version": 2, "shards": value} if isinstance(value, list) else value).encode()
    try:
        assert checked_index(data, "x") == []
    except ValueError as error:
        assert str(error).startswith("index.json of x: ")


# Credentials

SECRETS = {
    "s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMIbPxRfi@bucket/x": ["AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMIbPxRfi"],
    "sftp://me:hunter2hunter2@host:22/x": ["hunter2"],
    "https://a.blob.core.windows.net/c/x?sv=2024&sig=Zm9vYmFy%3D&se=1": ["Zm9vYmFy"],
    "https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=deadbeef": ["AKIA%2F1", "deadbeef"],
    "https://hf_abcdefghijklmnopqrstuvwxyz@huggingface.co/x": ["hf_abcdefghij"],
}


@pytest.mark.parametrize("url", sorted(SECRETS))
def test_credentials_in_urls_are_refused_and_never_repeated(tmp_path: Path, url: str) -> None:
    assert has_credentials(url)
    assert not any(secret in redacted(f"cannot read {url}: 403") for secret in SECRETS[url])
    texts = []
    tree = {**recipe(tmp_path), "stream": {"remote": url, "local": str(tmp_path / "cache"), "global_pool_size": 4}}
    for act in (
        lambda: check_url(url, "x"),
        lambda: dataset(tmp_path, remote=url, local=str(tmp_path / "cache")),
        lambda: load_config(str(write_recipe(tmp_path / "recipe.yaml", tree))),
        lambda: load_config(str(write_recipe(tmp_path / "plain.yaml", recipe(tmp_path))), [f"save_folder={url}"]),
        lambda: load_config(str(write_recipe(tmp_path / "plain.yaml", recipe(tmp_path))), [f"loggers.x.y=[{url!r}"]),
    ):
        with pytest.raises(ValueError) as raised:
            act()
        texts.append(str(raised.value))
    assert not any(secret in text for text in texts for secret in SECRETS[url])


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a:b@c", "oci://bucket@namespace/x", "sftp://me@host:22/x", "hf://datasets/a/b", "/data/a:b@c?sig=1"],
)
def test_urls_without_credentials_stay_as_they_are(url: str) -> None:
    check_url(url, "x")
    assert redacted(url) == url or url.startswith("/")


def test_a_run_leaves_no_secret_in_anything_it_writes(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run from a store, and one that fails at it: logs, checkpoints, ledger, metrics, errors, every byte."""
    secrets = {"AWS_SECRET_ACCESS_KEY": "q8Zr/topsecretkey0001", "HF_TOKEN": "hf_QQQQQQQQQQQQQQQQQQQQQQQQ"}
    secrets |= {
        "AZURE_ACCOUNT_ACCESS_KEY": "azurekeyazurekey0002==",
        "AWS_SESSION_TOKEN": "sessiontoken0003sessiontoken",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    draw_corpus(tmp_path / "corpus")
    url = bucket.upload(tmp_path / "corpus" / "train", "train")
    out = tmp_path / "out"
    tree = recipe(tmp_path, max_duration="2ba", save_interval="1ba", run_name="r", log_to_console=True)
    tree["console_log_interval"] = "1ba"
    tree |= {
        "save_folder": str(out / "ckpt"),
        "metrics_file": str(out / "metrics.jsonl"),
        "ledger": str(out / "ledger"),
    }
    tree["stream"] = {"remote": url, "local": str(out / "cache"), "global_pool_size": 32, "num_workers": 0}
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    command = [sys.executable, "-m", "clipcov_stream", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [done.stdout.encode(), done.stderr.encode()]
    for override, why in (
        (f"stream.remote={url}x", "no index.json"),
        (f"stream.remote=s3://k:{secrets['AWS_SECRET_ACCESS_KEY']}@b/x", "has credentials in its URL"),
        (f"stream.remote=s3://{secrets['AWS_SESSION_TOKEN']}/x", "no index.json"),
    ):
        with pytest.raises(SystemExit, match=f"error: stream.remote.*{why}") as raised:
            main(str(path), [override, f"stream.local={tmp_path}/none"])
        texts.append(str(raised.value).encode())
    files = [path for path in out.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".pt", ".jsonl", ".ledger", ".mds"} <= kinds and len(files) >= 6
    for data in (*texts, *(path.read_bytes() for path in files)):
        assert not [name for name, value in secrets.items() if value.encode() in data]


# Checkpoints


def test_a_checkpoint_that_holds_code_is_refused_and_one_of_ours_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VALIDATION, raising=False)
    monkeypatch.setenv(VALIDATION, os.environ.get(VALIDATION, "clipcov_stream.weights.is_data"))
    draw_corpus(tmp_path / "corpus")
    tree = recipe(tmp_path / "corpus", max_duration="3ba", save_folder=str(tmp_path / "ckpt"), save_interval="3ba")
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", tree))))
    trainer.fit()
    trainer.close()
    (saved,) = (path for path in (tmp_path / "ckpt").rglob("*.pt") if not path.is_symlink())
    assert is_data(saved)
    assert is_data(tmp_path / ".metadata") and is_data(tmp_path / "__0_0.distcp", [(0, 8)])  # FSDP's, not judged
    again = {**tree, "max_duration": "4ba", "load_path": str(saved), "save_folder": None}
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "again.yaml", again))))
    trainer.fit()
    assert int(trainer.state.timestamp.batch) == 4
    trainer.close()
    mark = tmp_path / "ran"
    content = torch.load(saved, weights_only=False)
    torch.save({**content, "extra": Payload(mark)}, tmp_path / "evil.pt")
    again["load_path"] = str(tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"load_path or autoresume, is refused: it .* holds more than data.*eval"):
        build_trainer(load_config(str(write_recipe(tmp_path / "evil.yaml", again))))
    again |= {"load_path": None, "selection": {"filter_ratio": 0.5, "embed": "proxy"}}
    again["selection"]["proxy"] = {"config": TINY_MODEL}
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Payload(mark)))
    for name in ("evil.pt", "weights.pt"):
        again["selection"]["proxy"]["pretrained"] = str(tmp_path / name)
        with pytest.raises(ValueError, match="cannot be loaded into this model"):
            build_trainer(load_config(str(write_recipe(tmp_path / "proxy.yaml", again))))
    assert not mark.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()  # it would have run
