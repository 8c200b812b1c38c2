"""The faster pass of a ModifiedResNet: the tower's own embeddings, and the tower left as it was."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from clipcov_stream.embed import embed_with_towers
from clipcov_stream.folded import attended, can_fold, fold, folded
from clipcov_stream.model import build_towers

SIDE = 64


def towers(layers=(2, 1, 1, 2), seed=0):
    """A small CLIP whose batch norms are those of no fresh model: nothing in it is 0 or 1."""
    vision = {"image_size": SIDE, "layers": list(layers), "width": 8, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_towers(config={"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                for value, low, high in ((part.weight, 0.5, 1.5), (part.bias, -0.5, 0.5)):
                    nn.init.uniform_(value, low, high)
                part.running_mean.uniform_(-0.3, 0.3)
                part.running_var.uniform_(0.5, 2.0)
    return model.eval().requires_grad_(False)


def images(n=6, side=SIDE):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_a_folded_convolution_is_the_convolution_and_its_norm():
    conv, norm = nn.Conv2d(3, 4, 3, padding=1, bias=False).double(), nn.BatchNorm2d(4).double().eval()
    norm.weight.data.uniform_(0.5, 2.0)
    norm.bias.data.uniform_(-1.0, 1.0)
    norm.running_mean.uniform_(-1.0, 1.0)
    norm.running_var.uniform_(0.1, 2.0)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        weight, bias = fold(conv, norm)
        found = torch.nn.functional.conv2d(x, weight, bias, padding=1)
        torch.testing.assert_close(found, norm(conv(x)))


@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
@torch.no_grad()
def test_the_attention_pool_gives_the_means_output(side):
    model = towers()
    if side != SIDE:
        config = model.visual.attnpool
        cells = (side // 32) ** 2
        config.positional_embedding = nn.Parameter(torch.randn(cells + 1, config.positional_embedding.shape[1]))
    pool = model.visual.attnpool
    x = torch.randn(5, pool.k_proj.in_features, side // 32, side // 32)
    assert relative(attended(pool, x), pool(x)) < 1e-6


@pytest.mark.parametrize("fuses", [True, False])
@torch.no_grad()
def test_embeddings_are_the_towers_own(fuses, monkeypatch):
    if not fuses:
        monkeypatch.setattr("clipcov_stream.folded.FUSES", frozenset())
    model = towers()
    expected = model.encode_image(images())
    with folded(model):
        assert "forward" in vars(model.visual)
        found = model.encode_image(images())
        again = model.encode_image(images())
    assert not torch.equal(found, expected)  # another order of sums, so it was another pass
    assert relative(found, expected) < 2e-6
    assert torch.equal(found, again)  # nothing it reads is overwritten


@torch.no_grad()
def test_in_bfloat16_it_is_as_close_as_the_tower_is():
    model = towers()
    exact = model.encode_image(images())
    with torch.autocast("cpu", torch.bfloat16):
        own = model.encode_image(images())
        with folded(model):
            found = model.encode_image(images())
    assert relative(found, exact) < 1.5 * max(relative(own, exact), 0.004)


@torch.no_grad()
def test_it_follows_weights_that_move_and_leaves_the_tower_as_it_was():
    model = towers()
    keys, before = set(vars(model.visual)), model.encode_image(images())
    for change in (0.5, -0.25):
        with folded(model):
            assert relative(model.encode_image(images()), before) < 2e-6
        model.visual.conv2.weight.mul_(1 + change)
        model.visual.layer1[0].bn3.running_mean.add_(change)
        after = model.encode_image(images())
        assert relative(after, before) > 1e-3
        before = after
    with pytest.raises(ZeroDivisionError), folded(model):
        raise ZeroDivisionError
    assert set(vars(model.visual)) == keys
    assert torch.equal(model.encode_image(images()), before)


def test_an_unknown_part_is_left_to_its_tower():
    model = towers()
    assert can_fold(model.visual)
    model.visual.act1 = nn.GELU()
    assert not can_fold(model.visual)
    with folded(model):
        assert "forward" not in vars(model.visual)


def other_forward(tower):
    tower.forward = tower.forward


def derived(tower):
    tower.__class__ = type("Derived", (ModifiedResNet,), {})


@pytest.mark.parametrize(
    "change",
    [
        lambda tower: setattr(tower, "bn1", nn.Identity()),
        lambda tower: setattr(tower.layer1[0].downsample, "1", nn.Identity()),
        lambda tower: setattr(tower, "conv2", nn.Conv2d(4, 4, 3, padding=1)),
        lambda tower: tower.layer2[0].conv1.register_forward_hook(lambda *given: None),
        lambda tower: tower.layer2[0].conv1.register_forward_pre_hook(lambda *given: None),
        other_forward,
        derived,
    ],
)
@torch.no_grad()
def test_a_tower_that_is_not_as_it_was_made_runs_as_it_is(change):
    model = towers()
    change(model.visual)
    before, expected = set(vars(model.visual)), model.encode_image(images())
    assert not can_fold(model.visual)
    with folded(model):
        assert torch.equal(model.encode_image(images()), expected)
    assert set(vars(model.visual)) == before


def test_a_cpu_without_bfloat16_convolutions_has_them_unfused():
    code = (
        "import sys, torch; sys.path[:0] = ['tests']; from test_folded import *\n"
        "from clipcov_stream.folded import fuses\n"
        "model = towers()\n"
        "with torch.no_grad(), torch.autocast('cpu', torch.bfloat16), folded(model):\n"
        "    print(fuses(torch.bfloat16), bool(model.encode_image(images()).isfinite().all()))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr[-2000:]


@pytest.mark.parametrize("resolution", [None, 32])
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_passes_over_a_pool_use_it_and_plain_ones_do_not(resolution, training, monkeypatch):
    model = towers().train(training)
    text = torch.ones(6, 16, dtype=torch.int64)
    arguments = (images(), text, 4, contextlib.nullcontext(), resolution)
    calls = []
    original = ModifiedResNet.forward
    monkeypatch.setattr(ModifiedResNet, "forward", lambda *given: calls.append(1) or original(*given))
    found, *_ = embed_with_towers(model, *arguments)
    assert not calls
    expected, *_ = embed_with_towers(model, *arguments, plain=True)
    assert len(calls) == 2  # chunks of 4
    assert relative(found, expected) < 2e-6
    assert model.training is training
