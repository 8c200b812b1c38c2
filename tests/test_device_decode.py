"""JPEGs decoded a batch at a time by torchvision, on a CPU here and by nvJPEG where there is a GPU, against Pillow."""

from __future__ import annotations

import io
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import draw_corpus, recipe, write_recipe
from PIL import Image
from runs import columns_recipe, run, write_columns

from clipcov_stream import build, device_decode
from clipcov_stream.config import load_config
from clipcov_stream.decode import UndecodableImage
from clipcov_stream.device_decode import check_decoder, decoded_on
from clipcov_stream.materialize import ImageTransform, Materializer
from clipcov_stream.train import build_trainer

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def picture(seed: int, width: int = 70, height: int = 50, mode: str = "RGB") -> Image.Image:
    """Smooth, so that decoders differ by their rounding alone."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode_on(device: torch.device, images: list[Any], *limits: int) -> list[torch.Tensor | None]:
    found = dict(decoded_on(device, images, *limits))
    return [found.get(place) for place in range(len(images))]


JPEG = encoded(picture(0), quality=95)
READ_ALIKE = {
    "rgb": JPEG,
    "portrait": encoded(picture(1, 40, 90), quality=95),
    "full chroma": encoded(picture(2), quality=95, subsampling=0),
    "progressive": encoded(picture(3), quality=95, progressive=True),
    "grey": encoded(picture(4, mode="L"), quality=95),
    "one pixel": encoded(picture(5, 1, 1)),
}
LEFT = {
    "png": encoded(picture(6), "PNG"),
    "transparent": encoded(picture(7, mode="RGBA"), "PNG"),
    "cmyk": encoded(picture(8, mode="CMYK")),
    "stored as RGB": encoded(picture(9), quality=95, keep_rgb=True),
    "truncated": JPEG[: len(JPEG) // 2],
    "cut before its end": JPEG[:-2],
    "followed by more": JPEG + b"\0\0",
    "header alone": JPEG[:20] + b"\xff\xd9",
    "empty": b"",
    "no image": b"\xff\xd8\xff not a picture \xff\xd9",
}


def rows_of(images: list[Any]) -> dict[str, Any]:
    return {"image": images, "id": torch.arange(len(images)), "augmentation": torch.arange(len(images)) + 7}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("min_scale", [1.0, 0.4])
def test_pixels_are_pillows_up_to_rounding_and_the_same_images_are_undecodable(device: str, min_scale: float) -> None:
    transform = ImageTransform(32, min_scale=min_scale)
    rows = rows_of([*READ_ALIKE.values(), *LEFT.values()])
    (theirs, failed), (ours, failed_too) = (
        Materializer(transform, None, 2, device=where)(rows, {}) for where in (None, torch.device(device))
    )
    assert failed.tolist() == failed_too.tolist() and 3 <= int(failed.sum()) <= 5
    assert ours["image"].device.type == device and ours["image"].shape == theirs["image"].shape
    gap = (ours["image"].cpu().float() - theirs["image"].float()).abs()
    assert float(gap[: len(READ_ALIKE)].max()) <= 12 and float(gap[: len(READ_ALIKE)].mean()) < 1.5
    assert not gap[len(READ_ALIKE) :].any()  # these are Pillow's own
    # Different pictures: the comparison above could fail.
    assert float((ours["image"][0].float() - ours["image"][2].float()).abs().mean()) > 13


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_left_to_pillow(device: str) -> None:
    images = {**READ_ALIKE, **LEFT}
    found = dict(zip(images, decode_on(torch.device(device), list(images.values())), strict=True))
    assert {name for name, image in found.items() if image is None} == set(LEFT)
    assert {name: tuple(found[name].shape) for name in ("portrait", "grey")} == {  # pyright: ignore
        "portrait": (3, 90, 40),
        "grey": (3, 50, 70),
    }
    assert decode_on(torch.device(device), [picture(0)]) == [None]
    assert decode_on(torch.device(device), []) == []


def test_what_may_be_many_scans_is_left_to_pillow() -> None:
    """A comment full of their markers, of which Pillow's decoder makes nothing."""
    assert device_decode.pixels_of(JPEG[:2] + b"\xff\xfe\0\xca" + b"\xff\xda" * 100 + JPEG[2:]) is None
    assert device_decode.pixels_of(JPEG[:2] + b"\xff\xfe\0\x0a" + b"\xff\xda" * 4 + JPEG[2:]) is not None


@pytest.mark.parametrize("device", DEVICES)
def test_one_image_that_the_decoder_refuses_does_not_take_others_with_it(device: str) -> None:
    """Its Huffman table has more codes than there can be: Pillow opens it, and no decoder can read it."""
    at = JPEG.index(b"\xff\xc4") + 5
    broken = JPEG[:at] + b"\xff" * 16 + JPEG[at + 16 :]
    images = [JPEG, broken, READ_ALIKE["grey"], broken, READ_ALIKE["portrait"]]
    assert device_decode.pixels_of(broken) == 70 * 50
    found = decode_on(torch.device(device), images)
    assert [image is None for image in found] == [False, True, False, True, False]
    ours, failed = Materializer(ImageTransform(8), None, 1, device=torch.device(device))(rows_of(images), {})
    assert failed.tolist() == [False, True, False, True, False] and not ours["image"][failed].any()


def test_batches_are_bounded_and_their_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(picture(seed, 20 + seed, 30)) for seed in range(12)]
    whole, sizes = decode_on(torch.device("cpu"), images), []
    decode = device_decode.decode_jpeg

    def counted(data: Any, *args: Any) -> Any:
        sizes.append(len(data))
        return decode(data, *args)

    monkeypatch.setattr(device_decode, "decode_jpeg", counted)
    monkeypatch.setattr(device_decode, "BATCH_PIXELS", 2000)
    parts = decode_on(torch.device("cpu"), images)
    assert sum(sizes) == 12 and max(sizes) <= 3 and len(sizes) > 4
    for part, image in zip(parts, whole, strict=True):
        assert part is not None and image is not None and torch.equal(part, image)
    monkeypatch.setattr(device_decode, "BATCH_PIXELS", 1)  # less than any image has
    assert all(image is not None for image in decode_on(torch.device("cpu"), images))


def test_one_batch_of_whole_images_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(picture(seed, 30, 30)) for seed in range(9)]
    alive: list[weakref.ref[torch.Tensor]] = []
    most, decode = [], device_decode.decode_jpeg

    def noted(data: Any, *args: Any) -> Any:
        found = decode(data, *args)
        alive.extend(weakref.ref(image) for image in found)
        most.append(sum(image() is not None for image in alive))
        return found

    monkeypatch.setattr(device_decode, "decode_jpeg", noted)
    monkeypatch.setattr(device_decode, "BATCH_PIXELS", 2000)  # two of 900
    materialize = Materializer(ImageTransform(8), None, 1, device=torch.device("cpu"))
    _, failed = materialize(rows_of(images), {})
    assert not failed.any() and len(alive) == 9 and max(most) <= 3 and len(most) == 5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: an illegal access")])
def test_a_broken_device_is_not_taken_for_bad_images(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(device_decode, "decode_jpeg", fails)
    with pytest.raises(type(error), match=str(error)):
        decode_on(torch.device("cpu"), [JPEG, JPEG])


def test_a_decoder_is_tried_before_it_is_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    check_decoder(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def lacking(*_: Any) -> Any:
        raise RuntimeError("not compiled with nvJPEG support")

    monkeypatch.setattr(device_decode, "decode_jpeg", lacking)
    with pytest.raises(ValueError, match=r"stream\.decode_device='gpu' cannot decode on cuda:0: not compiled"):
        build.decode_device_of("gpu", True)


def test_a_bomb_is_not_decoded() -> None:
    at = JPEG.index(b"\xff\xc0") + 5
    bomb = JPEG[:at] + b"\xff\xff\xff\xff" + JPEG[at + 4 :]
    assert decode_on(torch.device("cpu"), [bomb, JPEG])[0] is None


def test_images_that_are_still_on_their_way() -> None:
    class Fetching:
        def __call__(self, images: Any) -> Any:
            futures: list[Future[Any]] = [Future() for _ in images]
            for future, image in zip(futures, images, strict=True):
                future.set_result(image)
            return futures

        def close(self) -> None: ...

    transform, rows = ImageTransform(16), rows_of([*READ_ALIKE.values(), *LEFT.values()])
    device = torch.device("cpu")
    (plain, failed), (fetched, failed_too) = (
        Materializer(transform, None, 1, fetch, device=device)(rows, {}) for fetch in (None, Fetching())
    )
    assert torch.equal(plain["image"], fetched["image"]) and torch.equal(failed, failed_too)


def test_an_image_that_never_comes_is_undecodable() -> None:
    lost: Future[Any] = Future()
    lost.set_exception(UndecodableImage("no image there"))
    _, failed = Materializer(ImageTransform(8), None, 1, device=torch.device("cpu"))(rows_of([JPEG, lost]), {})
    assert failed.tolist() == [False, True]


def test_the_same_images_are_too_large_or_too_long() -> None:
    long, large = encoded(picture(0, 400, 20)), encoded(picture(1, 60, 60))
    assert decode_on(torch.device("cpu"), [long, large], 3599) == [None, None]
    for device in (None, torch.device("cpu")):
        materialize = Materializer(ImageTransform(8), None, 1, None, 3599, device)
        assert materialize(rows_of([large]), {})[1].tolist() == [True]


def test_the_recipes_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Survivors decoded by torchvision train a run; on a CPU, as there may be no GPU, through all of the other code."""
    folder = write_columns(tmp_path / "mds", 96)
    tree = {**columns_recipe(folder), "max_duration": "3ba"}
    wanted = run(tmp_path, tree)
    tree["stream"] |= {"decode_device": "gpu"}
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"stream\.decode_device='gpu' needs a CUDA device"):
            run(tmp_path, tree)
    monkeypatch.setattr(build, "decode_device_of", lambda name, deferred: torch.device("cpu"))
    decode, given = device_decode.decode, []

    def counted(device: torch.device, encoded: Any) -> list[torch.Tensor]:
        given.extend(encoded)
        return decode(device, encoded)

    monkeypatch.setattr(device_decode, "decode", counted)
    trained = run(tmp_path, tree)
    # Every survivor came through the device's decoder.
    assert len(given) == sum(len(images) for images in trained[1].images) > 0
    for ours, theirs in zip(trained[1].batches, wanted[1].batches, strict=True):
        assert torch.equal(ours, theirs)  # the same survivors
    gaps = [float((a - b).abs().max()) for a, b in zip(trained[1].images, wanted[1].images, strict=True)]
    assert all(gap < 0.3 for gap in gaps)


def test_a_wrong_key_is_an_error(tmp_path: Path) -> None:
    corpus = draw_corpus(tmp_path / "shapes", samples=64)
    for value, said in (("cuda", "must be 'cpu' or 'gpu'"), ("gpu", "this stream's workers decode every candidate")):
        path = write_recipe(tmp_path / "recipe.yaml", recipe(corpus, stream={"decode_device": value}))
        with pytest.raises(ValueError, match=rf"stream\.decode_device='{value}'.* ?{said}"):
            build_trainer(load_config(str(path)))
