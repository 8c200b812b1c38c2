"""MDS folders of real image files -> pools."""

import contextlib
import io
import json
import random
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from streaming import MDSWriter
from torch import Tensor
from torchvision.transforms import v2

from clipcov_stream.batch import normalizing
from clipcov_stream.decode import ImageTooLarge, scans_of
from clipcov_stream.materialize import ImageTransform, UndecodableImage, crop_box, decode_image
from clipcov_stream.stream import Columns, PairDataset, pool_loader, read_json_beside

SIZE = 8


def tokenize(caption: str) -> Tensor:
    """Eight bytes of a caption."""
    return torch.tensor(list(caption.encode()[:8].ljust(8)), dtype=torch.int64)


def picture(seed: int, side: int = 12) -> Image.Image:
    rng = np.random.default_rng(seed)
    # Smooth, so that JPEG keeps it.
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return coarse.resize((side, side + seed % 3), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole(transform: ImageTransform) -> v2.Compose:
    """Both parts of a transform, for one image."""
    return v2.Compose([transform.crop(), transform.normalize()])


def write(folder: Path, samples: list[dict[str, Any]], columns: dict[str, str]) -> Path:
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def pairs(folder: Path, num_samples: int = 8, images: list[Any] | None = None, encoding: str = "bytes") -> Path:
    images = [encoded(picture(i)) for i in range(num_samples)] if images is None else images
    samples = [{"image": image, "caption": f"caption {i}"} for i, image in enumerate(images)]
    return write(folder, samples, {"image": encoding, "caption": "str"})


def dataset(folder: Path | None, pool_size: int = 4, min_scale: float = 1.0, **options: Any) -> PairDataset:
    options = {"columns": Columns(), "tokenizer": tokenize, "num_canonical_nodes": 1, **options}
    local = None if folder is None else str(folder)
    transform = ImageTransform(SIZE, min_scale=min_scale)
    return PairDataset(**{"local": local, "batch_size": pool_size, "transform": transform, **options})


def test_a_batch_is_a_pool(tmp_path: Path) -> None:
    pools = list(pool_loader(dataset(pairs(tmp_path / "mds", 11)), 4))
    assert len(pools) == 2
    for pool in pools:
        assert {key: (tuple(value.shape), value.dtype) for key, value in pool.items()} == {
            "id": ((4,), torch.int64),
            "valid": ((4,), torch.bool),
            "image": ((4, 3, SIZE, SIZE), torch.float32),
            "text": ((4, 8), torch.int64),
        }
    assert torch.cat([pool["id"] for pool in pools]).tolist() == list(range(8))
    for pool in pools:
        for row, sample in enumerate(pool["id"].tolist()):
            assert torch.equal(pool["text"][row], tokenize(f"caption {sample}"))


def test_evaluation_keeps_the_last_partial_pool(tmp_path: Path) -> None:
    pools = list(pool_loader(dataset(pairs(tmp_path / "mds", 11)), 4, drop_last=False))
    assert [len(pool["id"]) for pool in pools] == [4, 4, 3]


def test_columns_have_the_names_they_are_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4, 5)).astype(np.float16)
    samples = [
        {"jpg": encoded(picture(i)), "txt": f"t{i}", "v": vectors[i], "w": -vectors[i], "y": i % 3, "extra": "ignored"}
        for i in range(4)
    ]
    kinds = {"jpg": "bytes", "txt": "str", "v": "ndarray:float16", "w": "ndarray", "y": "int", "extra": "str"}
    columns = Columns(image="jpg", caption="txt", image_embedding="v", text_embedding="w", label="y")
    pool = next(iter(pool_loader(dataset(write(tmp_path / "mds", samples, kinds), columns=columns), 4)))
    assert set(pool) == {"id", "valid", "image", "text", "image_embedding", "text_embedding", "label"}
    # As they are in the shard, and writable: the suite turns torch's warning on views into an error.
    assert pool["image_embedding"].dtype == pool["text_embedding"].dtype == torch.float16
    np.testing.assert_array_equal(pool["image_embedding"].numpy(), vectors.astype(np.float16))
    np.testing.assert_array_equal(pool["text_embedding"].numpy(), -vectors.astype(np.float16))
    assert pool["label"].tolist() == [0, 1, 2, 0]


def test_captions_are_not_read_where_none_is_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "mds", [{"image": encoded(picture(0))}] * 4, {"image": "bytes"})
    pool = next(iter(pool_loader(dataset(folder, columns=Columns(caption=None), tokenizer=None), 4)))
    assert set(pool) == {"id", "valid", "image"}


@pytest.mark.parametrize("encoding", ["bytes", "png", "pil", "jpeg"])
def test_every_image_encoding_gives_the_same_pixels(tmp_path: Path, encoding: str) -> None:
    images = [picture(i) for i in range(4)]
    if encoding == "jpeg":
        images = [Image.open(io.BytesIO(encoded(image, "JPEG"))) for image in images]
    # MDSWriter would compress a JPEG anew; bytes it takes as they are.
    kept = {"bytes": encoded, "jpeg": lambda image: image.fp.getvalue()}.get(encoding, lambda image: image)
    stream = dataset(pairs(tmp_path / "mds", images=[kept(image) for image in images], encoding=encoding))
    for i, image in enumerate(images):
        assert stream[i]["valid"]
        torch.testing.assert_close(stream[i]["image"], ImageTransform(SIZE).crop()(image))


def test_a_jpeg_array_is_refused_or_read(tmp_path: Path) -> None:
    # Streaming's jpeg_array is a list of pictures; reading it as one must not make every sample undecodable.
    images = [[encoded(picture(i), "JPEG")] for i in range(4)]
    folder = pairs(tmp_path / "mds", images=images, encoding="jpeg_array")
    try:
        stream = dataset(folder)
    except ValueError as error:
        assert "jpeg_array" in str(error)
    else:
        assert all(stream[i]["valid"] for i in range(4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_travel_as_bytes_if_the_consumer_normalizes_them(tmp_path: Path, num_workers: int) -> None:
    images = [b"no image" if n == 5 else encoded(picture(n), "PNG") for n in range(8)]
    folder = pairs(tmp_path / "mds", images=images)
    loader = pool_loader(dataset(folder, 4), 4, num_workers)
    whole = list(loader)
    assert all(pool["image"].dtype == torch.float32 for pool in whole)
    loader.normalizes = False
    for pool in loader:  # persistent workers have begun to normalize, and go on
        assert (normalizing(loader, pool["image"]) is None) == (num_workers > 0) == (not loader.leaves_bytes)
    loader = pool_loader(dataset(shutil.copytree(folder, tmp_path / "other"), 4), 4, num_workers)
    loader.normalizes = False
    raw = list(loader)
    for pool, wanted in zip(raw, whole, strict=True):
        assert pool["image"].dtype == torch.uint8 and normalizing(loader, pool["image"]) is not None
        assert torch.equal(loader.normalize(pool["image"])[pool["valid"]], wanted["image"][wanted["valid"]])
        assert not pool["image"][~pool["valid"]].any()
        with pytest.raises(ValueError, match=r"came to ClipCov as torch.float32, .* as_bytes=False"):
            normalizing(loader, pool["image"] / 255)
    assert sum(int((~pool["valid"]).sum()) for pool in raw) == 1
    loader.close()
    assert loader.normalizes
    for pool, wanted in zip(loader, whole, strict=True):
        assert torch.equal(pool["image"], wanted["image"])
    assert normalizing([], whole[0]["image"]) is None  # anybody else's loader


@pytest.mark.parametrize("encoding", ["bytes", "jpeg", "png"])
def test_an_undecodable_image_spoils_itself_alone(tmp_path: Path, encoding: str) -> None:
    kind = "JPEG" if encoding == "jpeg" else "PNG"
    good = encoded(picture(1, side=16), kind)
    folder = pairs(tmp_path / "mds", images=[good, b"", good[: len(good) // 2], b"text", good], encoding=encoding)
    pool = next(iter(pool_loader(dataset(folder, 5), 5)))
    assert pool["valid"].tolist() == [True, False, False, False, True]
    assert pool["image"][1:4].eq(0).all()
    assert torch.equal(pool["image"][0], pool["image"][4]) and pool["image"][0].ne(0).any()
    assert torch.equal(pool["text"][2], tokenize("caption 2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local": "{tmp}/none"}, r"stream\.local '.*none' has no index\.json \(checked .*index\.json\).*make_mds"),
        ({"remote": "{tmp}/none"}, r"stream\.remote '.*none' has no index\.json"),
        ({"local": None}, r"neither local nor remote is set; stream\.local"),
        (
            {"local": None, "remote": "{tmp}/mds"},
            r"stream\.remote='.*/mds' needs stream\.local, the folder where shards",
        ),
        ({"split": "val"}, r"'.*mds/val' has no index\.json"),
        (
            {"columns": Columns(image="jpg")},
            r"no column 'jpg' \(stream\.columns\.image\); it has \['caption', 'i",
        ),
        ({"columns": Columns(label="y")}, r"no column 'y' \(stream\.columns\.label\)"),
        (
            {"columns": Columns(image="caption")},
            r"'caption' of '.*mds' \(stream\.columns\.image\) is encoded as 'str'; an image column is",
        ),
    ],
)
def test_a_stream_that_cannot_be_read_says_which_knob(tmp_path: Path, options: dict, message: str) -> None:
    folder = pairs(tmp_path / "mds")
    options = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        dataset(**{"folder": folder, **options})


def test_a_folder_without_samples_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": []}))
    with pytest.raises(ValueError, match=r"is an MDS folder without samples"):
        dataset(tmp_path)


def test_pool_size_must_be_the_datasets(tmp_path: Path) -> None:
    stream = dataset(pairs(tmp_path / "mds"), 4)
    with pytest.raises(ValueError, match="pool_size=8 differs from the dataset's batch_size=4"):
        pool_loader(stream, 8)


def test_a_stream_smaller_than_a_pool_is_an_error(tmp_path: Path) -> None:
    stream = dataset(pairs(tmp_path / "mds", 3), 4)
    with pytest.raises(ValueError, match=r"3 samples per rank, one pool needs 4; lower stream\.\w+ to 3 or less"):
        pool_loader(stream, 4)
    assert [len(pool["id"]) for pool in pool_loader(stream, 4, drop_last=False)] == [3]


def pixels(loader: Any) -> dict[int, Tensor]:
    """Image by sample id of one epoch."""
    return {int(i): image for pool in loader for i, image in zip(pool["id"], pool["image"], strict=True)}


def test_augmentation_depends_on_seed_epoch_and_id_alone(tmp_path: Path) -> None:
    source = pairs(tmp_path / "mds", 12)
    epochs: dict[int, list[dict[int, Tensor]]] = {}
    for num_workers in (0, 1, 2):
        folder = shutil.copytree(source, tmp_path / f"copy{num_workers}")
        torch.manual_seed(num_workers)
        # Shuffled by another seed each time: neither the order nor the worker may matter.
        stream = dataset(folder, 4, min_scale=0.3, seed=5, shuffle=True, shuffle_seed=num_workers)
        loader = pool_loader(stream, 4, num_workers)
        epochs[num_workers] = [pixels(loader) for _ in range(2)]
        del loader, stream
    for epoch in range(2):
        assert len(epochs[0][epoch]) == 12
        for num_workers in (1, 2):
            assert epochs[num_workers][epoch].keys() == epochs[0][epoch].keys()
            for i, image in epochs[0][epoch].items():
                assert torch.equal(epochs[num_workers][epoch][i], image), (num_workers, epoch, i)
    assert not any(torch.equal(epochs[0][0][i], epochs[0][1][i]) for i in range(12)), "epochs repeat their crops"
    other = dataset(shutil.copytree(source, tmp_path / "other"), 4, min_scale=0.3, seed=6)
    assert not any(torch.equal(epochs[0][0][i], image) for i, image in pixels(pool_loader(other, 4)).items())


def test_augmentation_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    stream = dataset(pairs(tmp_path / "mds"), min_scale=0.3)
    torch.manual_seed(0)
    random.seed(0)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    first = stream[3]["image"]
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    torch.rand(5)
    assert torch.equal(stream[3]["image"], first)


def test_crops_keep_the_share_of_the_area_they_promise() -> None:
    # A ramp along each axis shows where a crop begins and ends.
    ramp = np.zeros((64, 64, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, (np.arange(64) * 4)[:, None]
    image, transform = Image.fromarray(ramp), ImageTransform(64, min_scale=0.5)
    shares = []
    for seed in range(50):
        out = transform.augmented(image, seed) / 4
        shares.append(float((out[0].max() - out[0].min() + 1) * (out[1].max() - out[1].min() + 1)) / 64**2)
    assert 0.47 < min(shares) < 0.65 and max(shares) <= 1.01


def test_crops_are_torchvisions_own() -> None:
    boxes = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        # Of the flattest no crop fits, and the middle is taken.
        height, width = (3, 40) if seed % 8 == 0 else rng.integers(4, 50, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        min_scale = float(rng.uniform(0.05, 0.99))
        theirs = v2.RandomResizedCrop(SIZE, (min_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        torch.manual_seed(seed)
        wanted = v2.Compose([theirs, v2.PILToTensor()])(image)
        assert torch.equal(ImageTransform(SIZE, min_scale=min_scale).augmented(image, seed), wanted)
        boxes.add(crop_box(height, width, (min_scale, 1.0), torch.Generator().manual_seed(seed)))
    assert len(boxes) > 150


@pytest.mark.parametrize("encoding", ["bytes", "png", "pil", "jpeg"])
@pytest.mark.parametrize("min_scale", [0.3, 1.0])
def test_rows_made_later_are_those_of_a_decoded_pool(tmp_path: Path, encoding: str, min_scale: float) -> None:
    images: list[Any] = [picture(i) for i in range(8)]
    if encoding in ("bytes", "jpeg"):
        images = [encoded(image, "JPEG") for image in images]
    if encoding == "bytes":
        images[5] = b"no image"
    source = pairs(tmp_path / "mds", images=images, encoding=encoding)
    pools = {}
    for deferred, num_workers in ((False, 0), (True, 0), (True, 2)):
        folder = shutil.copytree(source, tmp_path / f"{deferred}{num_workers}")
        options = {"min_scale": min_scale, "seed": 3, "deferred": deferred, "shuffle": True}
        loader = pool_loader(dataset(folder, 4, **options), 4, num_workers, decode_threads=3)
        loader.normalizes = False
        pools[deferred, num_workers] = list(loader)
        if not deferred:
            assert loader.materialize is None
            continue
        assert loader.materialize is not None
        for pool, wanted in zip(pools[True, num_workers], pools[False, 0], strict=True):
            assert isinstance(pool["image"], list) and isinstance(pool["text"], list)
            rows = {key: [pool[key][i] for i in (2, 0, 3)] for key in ("image", "text")}
            rows |= {key: pool[key][[2, 0, 3]] for key in ("id", "augmentation")}
            tensors, failed = loader.materialize(rows, {})
            for key in ("image", "text"):
                assert torch.equal(tensors[key], wanted[key][[2, 0, 3]])
            assert failed.tolist() == (~wanted["valid"][[2, 0, 3]]).tolist()
        loader.close()
    if encoding == "bytes":
        assert sum(int((~pool["valid"]).sum()) for pool in pools[False, 0]) == 1


def test_decode_threads_must_be_some(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stream\.decode_threads=0 must be at least 1, or null"):
        pool_loader(dataset(pairs(tmp_path / "mds"), 4, deferred=True), 4, decode_threads=0)


@pytest.mark.parametrize("shape", [(8, 8), (20, 12), (9, 31), (5, 6)])
def test_transform_equals_that_of_open_clip(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    wanted = open_clip.transform.image_transform(SIZE, is_train=False)(image)
    torch.testing.assert_close(whole(ImageTransform(SIZE))(image), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((40, 40, 40, 255), (0, 0, 2, 4))
    decoded = np.asarray(decode_image(encoded(image.convert(mode))))
    assert (decoded[:, 2:] == 255).all() and (decoded[:, :2] == 40).all()


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_a_transparent_colour_is_laid_on_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])
        data = encoded(image, "GIF", transparency=1)
    else:
        data = encoded(Image.new("RGB", (4, 4), (0, 0, 255)), transparency=(0, 0, 255))
    assert (np.asarray(decode_image(data)) == 255).all()


GREYS = (np.arange(64) * 4).astype(np.uint8).reshape(8, 8)


def grey_file(kind: str) -> bytes:
    image = Image.fromarray(GREYS)
    if kind == "16-bit PNG":
        return encoded(Image.fromarray(GREYS.astype(np.uint16) * 257))
    if kind == "16-bit TIFF":
        return encoded(Image.fromarray(GREYS.astype(np.uint16) * 257), "TIFF")
    if kind == "12-bit TIFF":  # two values in three bytes
        first, second = (GREYS.astype(np.uint16) * 16).reshape(-1, 2).T
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
        data = encoded(Image.fromarray(GREYS.astype(np.uint16)), "TIFF")
        entry = struct.pack("<HHI", 258, 3, 1)
        return data.replace(entry + b"\x10\0", entry + b"\x0c\0")[:-128] + packed + bytes(32)
    if kind.endswith("-bit PGM"):
        most = 2 ** int(kind[:2]) - 1
        values = np.round(GREYS / 255 * most).astype(">u2")
        return f"P5 8 8 {most}\n".encode() + values.tobytes()
    if kind == "32-bit TIFF":  # which do not say that they are from 0 to 252; they are seen from 0 to 255
        return encoded(Image.fromarray(GREYS.astype(np.int32) * 1_000_003 - 2**30), "TIFF")
    if kind == "float TIFF":
        return encoded(Image.fromarray(GREYS.astype(np.float32) / 255), "TIFF")
    if kind == "grey PNG":
        return encoded(image)
    if kind == "palette PNG":
        return encoded(image.convert("RGB").quantize(64, kmeans=2))
    if kind == "CMYK TIFF":
        return encoded(image.convert("RGB").convert("CMYK"), "TIFF")
    return encoded(image.convert("RGB").convert("CMYK"), "JPEG", quality=100)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("grey PNG", 0),
        ("palette PNG", 4),
        ("CMYK TIFF", 1),
        ("CMYK JPEG", 12),
        ("16-bit PNG", 1),
        ("16-bit TIFF", 1),
        ("12-bit TIFF", 1),
        ("16-bit PGM", 1),
        ("12-bit PGM", 1),
        ("32-bit TIFF", 4),
        ("float TIFF", 4),
    ],
)
def test_grey_palette_deep_and_cmyk_images_keep_their_tones(kind: str, tolerance: int) -> None:
    image = decode_image(grey_file(kind))
    assert image.mode == "RGB"
    off = np.abs(np.asarray(image).astype(int) - GREYS[..., None])
    assert off.max() <= tolerance


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((8, 8), 7, np.int32), "all values of an image without a range of its own are 7"),
        (np.full((8, 8), 0.5, np.float32), "are 0.5"),
        (np.where(GREYS, GREYS, np.nan).astype(np.float32), "not finite"),
        (np.where(GREYS, GREYS, -np.inf).astype(np.float32), "not finite"),
    ],
)
def test_values_that_no_contrast_comes_out_of_are_undecodable(values: np.ndarray, message: str) -> None:
    with pytest.raises(UndecodableImage, match=message):
        decode_image(encoded(Image.fromarray(values), "TIFF"))


def jpeg(progressive: bool = False) -> bytes:
    return encoded(picture(1), "JPEG", progressive=progressive)


SCANS = b"\xff\xda" * 101
"""Their markers alone."""


@pytest.mark.parametrize("what", ["video behind the end", "a preview"])
def test_what_is_no_scan_does_not_count_as_one(what: str) -> None:
    whole_ = jpeg()
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(SCANS)) + SCANS
    data = whole_ + SCANS if what == "video behind the end" else whole_[:2] + comment + whole_[2:]
    assert (np.asarray(decode_image(data)) == np.asarray(decode_image(whole_))).all()


@pytest.mark.parametrize(
    "between", [b"", b"\xff\xfe\0\x04\xff\xd9", b"\xff\xfe\0\0", b"\xff\xd0", b"\xff\xff", b"\xff\0"]
)
def test_scans_count_whatever_is_between_them(between: bytes) -> None:
    """Their number is exact: libjpeg would decode every one."""
    data = jpeg(progressive=True)
    last, own = data.rindex(b"\xff\xda"), data.count(b"\xff\xda")
    scan = between + data[last:-2]
    decode_image(data[:-2] + scan * (100 - own) + b"\xff\xd9" + SCANS)
    with pytest.raises(UndecodableImage, match="a JPEG of 101 scans; at most 100"):
        decode_image(data[:-2] + scan * (101 - own) + b"\xff\xd9")


@pytest.mark.parametrize("unit", [b"\xff", b"\xff\0", b"\xff\xd0", b"\xff\x02", b"\xff\xfe\0\x02", b"\xff\xc4\0\0"])
def test_to_look_for_scans_takes_little_time(unit: bytes) -> None:
    data = jpeg()[:-2] + unit * (16_000_000 // len(unit)) + b"\xff\xd9"
    begin = time.perf_counter()
    with contextlib.suppress(ImageTooLarge):
        assert scans_of(data) == 1
    assert time.perf_counter() - begin < 3


@pytest.mark.parametrize("limit", [16, 40])
def test_a_decompression_bomb_is_undecodable(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (8, 8)))
    decode_image(data)
    # Pillow raises above twice its limit, and only warns above the limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UndecodableImage, match="DecompressionBomb"):
        decode_image(data)


@pytest.mark.parametrize("data", [b"", b"text", encoded(picture(1))[:40], None, 3])
def test_what_is_no_image_is_undecodable(data: Any) -> None:
    with pytest.raises(UndecodableImage):
        decode_image(data)


@pytest.mark.parametrize("split", [None, "train"])
def test_a_remote_folder_is_cached(tmp_path: Path, split: str | None) -> None:
    pairs(tmp_path / "remote" / (split or ""))
    cache = tmp_path / "cache"
    pool = next(iter(pool_loader(dataset(cache, remote=str(tmp_path / "remote"), split=split), 4)))
    assert pool["valid"].all() and pool["id"].tolist() == [0, 1, 2, 3]
    assert (cache / (split or "") / "index.json").exists() and list(cache.rglob("*.mds"))


def test_json_beside_a_folder(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "classes.json").write_text('{"classnames": ["été"]}', encoding="utf-8")
    assert read_json_beside(str(tmp_path), None, "eval", "classes.json") == {"classnames": ["été"]}
    assert read_json_beside("elsewhere", str(tmp_path / "eval"), None, "classes.json") == {"classnames": ["été"]}
    with pytest.raises(ValueError, match=r"cannot read .*/classes\.json: .*No such file"):
        read_json_beside(str(tmp_path), None, None, "classes.json")
    (tmp_path / "eval" / "classes.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*/eval/classes\.json: "):
        read_json_beside(str(tmp_path), None, "eval", "classes.json")
