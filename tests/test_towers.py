"""The default online proxy's towers: what they read, and that they learn from few updates."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipcov_stream.online import OnlineProxy, parts_in_turn
from clipcov_stream.towers import EMBED_DIM, WORDS, SmallTowers, side_for


@pytest.fixture
def towers() -> SmallTowers:
    torch.manual_seed(0)
    return SmallTowers(4, 32).eval()


def padded(words: list[int], context: int, padding: int, left: bool = False) -> Tensor:
    rest = [padding] * (context - len(words))
    return torch.tensor([[*rest, *words] if left else [*words, *rest]])


def of_words(towers: SmallTowers, words: list[int]) -> Tensor:
    return towers.text_head(towers.words(torch.tensor(words)).mean(0))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 49407])
@pytest.mark.parametrize("context", [7, 16, 77])
def test_padding_is_one_word(towers: SmallTowers, context: int, padding: int, left: bool) -> None:
    """Whatever a tokenizer pads with, on either side, and as far as it does."""
    words = [49406, 320, 320, 1929, 11, 5]
    found = towers.encode_text(padded(words, context, padding, left))[0]
    torch.testing.assert_close(found, of_words(towers, [*words, padding]))


@pytest.mark.parametrize("row", [[7], [49406, 7], [49406, 320, 1929, 49407]])
def test_of_a_row_without_padding_every_token_counts(towers: SmallTowers, row: list[int]) -> None:
    torch.testing.assert_close(towers.encode_text(torch.tensor([row]))[0], of_words(towers, row))


def test_a_row_of_one_token_is_that_word(towers: SmallTowers) -> None:
    torch.testing.assert_close(towers.encode_text(torch.full((1, 8), 3))[0], of_words(towers, [3]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_type(towers: SmallTowers, dtype: torch.dtype) -> None:
    text = torch.tensor([[3, 4, 5, 9, 0]])
    assert torch.equal(towers.encode_text(text.to(dtype)), towers.encode_text(text))


def test_a_larger_vocabulary_shares_rows(towers: SmallTowers) -> None:
    text = padded([5, 6, 9], 8, 0)
    assert torch.equal(towers.encode_text(text + WORDS * (text > 0)), towers.encode_text(text))


def test_words_count_in_any_order(towers: SmallTowers) -> None:
    rows = torch.tensor([[3, 4, 5, 9, 0], [5, 3, 4, 9, 0], [3, 4, 6, 9, 0]])
    first, second, other = towers.encode_text(rows)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, other)


def test_larger_images_are_brought_down(towers: SmallTowers) -> None:
    image = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(image, size=(32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(towers.encode_image(image), towers.encode_image(small))
    assert towers.encode_image(image[:, :, :8, :8]).shape == (2, EMBED_DIM)
    assert towers.encode_image((255 * small).byte()).dtype == torch.float32


def test_sides() -> None:
    assert [side_for(size) for size in (16, 32, 48, 64, 224)] == [32, 32, 32, 64, 64]


@pytest.mark.parametrize("width", [0, -1, 1.5])
def test_a_width_that_cannot_be_is_named(width: int) -> None:
    with pytest.raises(ValueError, match=rf"proxy.width={width} must be a whole number of channels, at least 1"):
        SmallTowers(width)


@pytest.mark.parametrize("image_size", [-8, 0, 4, 48, 100])
def test_a_side_that_cannot_be_is_named(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size={image_size} must be a power of two from 8 on"):
        SmallTowers(4, image_size)


def test_sixty_updates_teach_it_colours_and_their_words() -> None:
    """Of noisy tiles of eight colours and captions that name them among filler words; new ones at every update."""
    torch.manual_seed(0)
    online = OnlineProxy(SmallTowers(4, 32), lr=2e-3, momentum=0.9)
    colours, generator = torch.rand(8, 3), torch.Generator().manual_seed(1)

    def pairs(num: int) -> tuple[Tensor, Tensor, Tensor]:
        label = torch.randint(8, (num,), generator=generator)
        image = colours[label][:, :, None, None] + 0.3 * torch.randn(num, 3, 32, 32, generator=generator)
        text = torch.randint(1000, 2000, (num, 8), generator=generator)
        text[:, 3], text[:, 6], text[:, 7] = 100 + label, 49407, 0
        return image, text, label

    for _ in range(12):
        image, text, _ = pairs(160)
        everything = torch.ones(160, dtype=torch.bool), torch.ones(160)
        online.learn(image, text, *everything, parts_in_turn(160, 32), EMBED_DIM, nullcontext)
    image, _, label = pairs(256)
    prompts = torch.tensor([[100 + label, 49407, 0] for label in range(8)])
    with torch.no_grad():
        x, y = online.model.encode_image(image), online.model.encode_text(prompts)
    assert ((F.normalize(x, dim=1) @ F.normalize(y, dim=1).T).argmax(1) == label).float().mean() > 0.8


def test_what_it_cannot_read_is_named(towers: SmallTowers) -> None:
    with pytest.raises(ValueError, match=r"images of shape \(n, 3, height, width\), not \(2, 6\): give ClipCov"):
        towers.encode_image(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"token ids of shape \(n, context\), not \(2, 5\) of torch.float32"):
        towers.encode_text(torch.zeros(2, 5))
