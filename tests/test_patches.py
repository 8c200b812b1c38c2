"""Patches left out while candidates are scored: which, and that nothing else changes."""

import contextlib

import open_clip
import pytest
import torch
from torch import nn

from clipcov_stream.embed import embed_with_towers
from clipcov_stream.patches import fewer_patches, kept_patches


def vit(side=32, patch=8, **vision):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": side, "layers": 2, "width": 32, "head_width": 16, "patch_size": patch, **vision},
            text_cfg={"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
        )
    return model.eval()


def inputs(n=6, side=32):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1)), torch.ones(
        n, 8, dtype=torch.int64
    )


@pytest.mark.parametrize("rows, columns", [(4, 4), (7, 7), (14, 14), (2, 9), (1, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.25, 0.5, 0.75, 0.99])
def test_patches_kept_are_as_many_as_asked_and_spread_over_the_image(rows, columns, dropout):
    kept = kept_patches(rows, columns, dropout)
    assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < rows * columns
    assert len(kept) == max(1, round(rows * columns * (1 - dropout)))
    if rows >= 7 and dropout <= 0.5:
        halves = [
            (sum(place // columns < rows // 2 for place in kept)),
            sum(place % columns < columns // 2 for place in kept),
        ]
        expected = [len(kept) * (rows // 2) / rows, len(kept) * (columns // 2) / columns]
        assert halves == pytest.approx(expected, abs=0.08 * len(kept))
        assert {place // columns for place in kept} == set(range(rows))
        assert {place % columns for place in kept} == set(range(columns))


@torch.no_grad()
def test_the_tower_sees_the_patches_kept_and_no_other():
    """Whatever lies in the others; and as open_clip's own tower does on those tokens alone."""
    model, (image, _) = vit(), inputs()
    kept = kept_patches(4, 4, 0.5)
    other = image.clone()
    for place in set(range(16)) - set(kept):
        row, column = divmod(place, 4)
        other[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 7.0
    with fewer_patches(model, 0.5):
        found, changed = model.encode_image(image), model.encode_image(other)
    assert torch.equal(found, changed)
    visual = model.visual
    tokens = visual.conv1(image).flatten(2).permute(0, 2, 1)
    tokens = torch.cat([visual.class_embedding.expand(6, 1, -1), tokens], 1) + visual.positional_embedding
    tokens = visual.transformer(visual.ln_pre(tokens[:, [0, *(1 + place for place in kept)]]))
    expected = visual.ln_post(tokens)[:, 0] @ visual.proj
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model.encode_image(image), atol=1e-3)


@pytest.mark.parametrize("vision", [{}, {"patch_dropout": 0.5}, {"pool_type": "avg"}])
@torch.no_grad()
def test_a_pass_over_a_pool_leaves_them_out_in_any_chunks_and_no_hook_behind(vision):
    model, (image, text) = vit(**vision), inputs()
    before = model.encode_image(image)
    passes = [
        embed_with_towers(model, image, text, chunk, contextlib.nullcontext(), patch_dropout=0.5)[0] for chunk in (2, 6)
    ]
    torch.testing.assert_close(*passes)
    assert not torch.allclose(passes[0], before, atol=1e-3)
    whole, *_ = embed_with_towers(model, image, text, 6, contextlib.nullcontext(), patch_dropout=0.0)
    torch.testing.assert_close(whole, before)
    assert torch.equal(model.encode_image(image), before)
    with pytest.raises(ZeroDivisionError), fewer_patches(model, 0.5):
        raise ZeroDivisionError
    assert torch.equal(model.encode_image(image), before)


@torch.no_grad()
def test_it_goes_with_another_resolution():
    model, (image, text) = vit(), inputs()
    found, *_ = embed_with_towers(model, image, text, 6, contextlib.nullcontext(), resolution=16, patch_dropout=0.25)
    whole, *_ = embed_with_towers(model, image, text, 6, contextlib.nullcontext(), resolution=16)
    assert found.shape == (6, 16) and bool(found.isfinite().all()) and not torch.allclose(found, whole, atol=1e-3)


def test_a_tower_without_patches_is_named():
    message = r"embed_patch_dropout=0.5: Linear has no transformer of open_clip's"
    with pytest.raises(ValueError, match=message), fewer_patches(nn.Linear(2, 2), 0.5):
        pass
