"""Embedders: the teacher's average, the proxy's own input format, chunked passes, columns."""

import contextlib
import platform
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed
from open_clip.transformer import TextTransformer
from torch import nn

from clipcov_stream.embed import (
    Proxy,
    Teacher,
    check_precision,
    check_towers,
    embed_from_columns,
    embed_with_towers,
    is_native,
    positions_at,
    reads_to_end,
    scale_of,
)
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.model import ClipModel, build_towers

CONTEXT = 16


def tiny_clip(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
            text_cfg={"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        )


def inputs(n, side=32, context=CONTEXT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 49000, (n, context), generator=generator)
    text[:, 5:] = 0
    text[:, 4] = 49407
    return torch.randn(n, 3, side, side, generator=generator), text


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.norm = nn.BatchNorm1d(2)


# Teacher


def test_teacher_follows_the_formula_and_warms_up():
    learner = WithBuffers()
    teacher = Teacher(learner, momentum=0.5)
    expected = learner.weight.detach().double()
    for step in range(20):
        with torch.no_grad():
            learner.weight += step + 1.0
            learner.norm.running_mean += 3.0
            learner.norm.num_batches_tracked += 1
        teacher.update(learner, step)
        momentum = min(0.5, (1 + step) / (10 + step))
        expected = momentum * expected + (1 - momentum) * learner.weight.detach().double()
        torch.testing.assert_close(teacher.model.weight.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(teacher.model.norm.running_mean, learner.norm.running_mean)
        assert int(teacher.model.norm.num_batches_tracked) == step + 1


def test_teacher_neither_trains_nor_shares_weights():
    learner = tiny_clip().train()
    teacher = Teacher(learner, momentum=0.9)
    assert learner.training and not teacher.model.training
    assert all(p.requires_grad for p in learner.parameters())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    shared = {p.data_ptr() for p in learner.parameters()} & {p.data_ptr() for p in teacher.model.parameters()}
    assert not shared


def test_teacher_state_goes_on_bit_for_bit(tmp_path):
    learner, other = tiny_clip(0), tiny_clip(1)
    straight = Teacher(learner, momentum=0.9)
    straight.update(other, 3)
    torch.save(straight.state_dict(), tmp_path / "teacher.pt")
    resumed = Teacher(learner, momentum=0.9)
    resumed.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
    before = straight.state_dict()
    for teacher in (straight, resumed):
        teacher.update(other, 4)
    after = straight.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.equal(value, after[name]) for name, value in resumed.state_dict().items())


# Proxy


def test_proxy_renormalizes_and_resizes_as_by_hand():
    towers = tiny_clip()
    own = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    pool = {"pool_mean": (0.1, 0.2, 0.3), "pool_std": (0.5, 0.6, 0.7)}
    image, _ = inputs(5, side=48)

    def column(values):
        return torch.tensor(values).view(1, 3, 1, 1)

    pixels = F.interpolate(image, size=(32, 32), mode="bicubic", antialias=True)
    pixels = pixels * column(pool["pool_std"]) + column(pool["pool_mean"])
    expected = towers.eval().encode_image((pixels - column(own["mean"])) / column(own["std"]))
    got = Proxy(towers, image_size=32, **own, **pool).encode_image(image)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, towers.encode_image(F.interpolate(image, size=(32, 32))), atol=1e-3)


@pytest.mark.parametrize("own", [{}, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}])
def test_proxy_of_the_pools_own_format_changes_nothing(own):
    towers, (image, text) = tiny_clip().eval(), inputs(3)
    proxy = Proxy(towers, image_size=32, context_length=CONTEXT, **own)
    torch.testing.assert_close(proxy.encode_image(image), towers.encode_image(image))
    torch.testing.assert_close(proxy.encode_text(text), towers.encode_text(text))
    torch.testing.assert_close(scale_of(proxy), scale_of(towers))


def test_proxy_pads_short_captions_and_refuses_long_ones():
    towers, (_, text) = tiny_clip(), inputs(3)
    proxy = Proxy(towers, context_length=CONTEXT)
    torch.testing.assert_close(proxy.encode_text(text[:, :9]), towers.encode_text(text))
    with pytest.raises(ValueError, match=r"reads 16 tokens, the learner's captions have 20"):
        proxy.encode_text(F.pad(text, (0, 4)))


def test_proxy_is_frozen():
    proxy = Proxy(tiny_clip().train())
    assert not proxy.towers.training and not any(p.requires_grad for p in proxy.parameters())


# Passes


@pytest.mark.parametrize("training", [True, False])
def test_chunks_agree_and_leave_the_mode_alone(training):
    model, (image, text) = tiny_clip().train(training), inputs(10)
    whole = embed_with_towers(model, image, text, 10, contextlib.nullcontext())
    for chunk in (1, 4, 5, 99):
        parts = embed_with_towers(model, image, text, chunk, contextlib.nullcontext())
        for part, full in zip(parts, whole, strict=True):
            torch.testing.assert_close(part, full, rtol=1e-4, atol=1e-5)
    assert model.training is training
    assert whole[0].shape == whole[1].shape == (10, 16)
    assert not any(tensor.requires_grad for tensor in whole)


@pytest.mark.parametrize("options", [{}, {"plain": True}, {"resolution": 16}])
def test_images_that_come_as_bytes_are_normalized_a_chunk_at_a_time(options):
    _, text = inputs(7)
    image = torch.randint(0, 256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    normalize, sizes = ImageTransform(32).normalize(), []

    def noted(part):
        sizes.append(len(part))
        return normalize(part)

    model = tiny_clip()
    found = embed_with_towers(model, image, text, 3, contextlib.nullcontext(), normalize=noted, **options)
    wanted = embed_with_towers(model, normalize(image), text, 3, contextlib.nullcontext(), **options)
    assert sizes == [3, 3, 1]
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_passes_run_in_eval_mode_in_the_given_precision_and_return_float32():
    model, (image, text) = tiny_clip().train(), inputs(4)
    modes, dtypes = [], []

    def note(module, _, output):
        modes.append(module.training)
        dtypes.append(output.dtype)

    hook = model.visual.register_forward_hook(note)
    result = embed_with_towers(model, image, text, 2, torch.autocast("cpu", torch.bfloat16))
    hook.remove()
    assert modes == [False, False] and dtypes == [torch.bfloat16] * 2
    assert result[0].dtype == result[1].dtype == torch.float32


def test_mode_is_restored_after_an_error():
    model, (image, text) = tiny_clip().train(), inputs(4, side=30)
    with pytest.raises(Exception):  # noqa: B017  (whatever the tower raises)
        embed_with_towers(model, image, text, 2, contextlib.nullcontext())
    assert model.training


def uneven_captions(n, context=CONTEXT, seed=3):
    """Captions of 2 to `context` tokens, the end token last, zeros behind it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 49000, (n, context), generator=generator)
    length = torch.randint(2, context + 1, (n,), generator=generator)
    places = torch.arange(context)
    text[places == length[:, None] - 1] = 49407
    return text.masked_fill(places >= length[:, None], 0)


def in_a_custom_text_tower(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CustomTextCLIP(
            embed_dim=16,
            vision_cfg={"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
            text_cfg={"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        )


def as_clip_model():
    return ClipModel(build_towers(config={**TINY, "embed_dim": 16}))


TINY = {
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("make", [tiny_clip, in_a_custom_text_tower, as_clip_model, lambda: Proxy(tiny_clip(), 32)])
@pytest.mark.parametrize("chunk", [3, 7, 40])
def test_captions_are_read_to_their_ends_alone_and_nothing_changes(make, chunk):
    model, (image, _), text = make(), inputs(20), uneven_captions(20)
    lengths = []
    tower = next(part for part in model.modules() if isinstance(part, (open_clip.CLIP, TextTransformer)))
    hook = tower.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    plain = embed_with_towers(model, image, text, chunk, contextlib.nullcontext(), plain=True)
    assert set(lengths) == {CONTEXT}
    lengths.clear()
    short = embed_with_towers(model, image, text, chunk, contextlib.nullcontext())
    hook.remove()
    torch.testing.assert_close(short[1], plain[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(short[0], plain[0], rtol=1e-4, atol=1e-5)
    assert min(lengths) == (8 if chunk < 40 else CONTEXT) and set(lengths) <= {8, CONTEXT}
    torch.testing.assert_close(model.eval().encode_text(text), plain[1])  # as it was


def test_captions_that_fit_a_proxys_context_need_not_be_padded_to_it():
    towers, text = tiny_clip(), uneven_captions(6)
    (image, _) = inputs(6)
    longer = F.pad(text, (0, 8))  # the learner's context, 24, is longer than the proxy's
    proxy = Proxy(towers, context_length=CONTEXT)
    got = embed_with_towers(proxy, image, longer, 4, contextlib.nullcontext())[1]
    torch.testing.assert_close(got, towers.eval().encode_text(text), rtol=1e-4, atol=1e-5)
    longer[0, 20] = 49408 - 1
    longer[0, :20] = 5
    with pytest.raises(ValueError, match=r"the proxy reads 16 tokens, the learner's captions have 21"):
        embed_with_towers(proxy, image, longer, 4, contextlib.nullcontext())


class MeanPooled(open_clip.CLIP):
    """An own `encode_text`, which reads all that follows the end token."""

    def encode_text(self, text, normalize=False):
        return self.token_embedding(text).mean(1) @ self.text_projection


class OwnText(nn.Module):
    """open_clip's image tower beside a text tower whose largest token is not the end."""

    def __init__(self):
        super().__init__()
        self.clip, self.words = tiny_clip(), nn.Embedding(49408, 16)

    def encode_image(self, image):
        return self.clip.encode_image(image)

    def encode_text(self, text):
        return self.words(text).sum(1)


def mean_pooled():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MeanPooled(embed_dim=16, output_dict=True, **TINY)


@pytest.mark.parametrize("make", [mean_pooled, OwnText, lambda: Proxy(OwnText()), lambda: ClipModel(mean_pooled())])
def test_captions_are_not_cut_for_a_model_that_reads_them_its_own_way(make):
    model, (image, _), text = make(), inputs(9), uneven_captions(9)
    text[:, 1] = 49407  # the largest, long before the end
    assert reads_to_end(model) is None
    with torch.no_grad():
        want = model.eval().encode_text(text)
    got = embed_with_towers(model, image, text, 4, contextlib.nullcontext())[1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_teacher_of_half_precision_weights_follows_as_one_of_float32(dtype, tmp_path):
    def layers(kind):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).to(kind)

    half, full = layers(dtype), layers(dtype).float()
    teacher, exact = Teacher(half, 0.99), Teacher(full, 0.99)
    with torch.no_grad():
        half[0].weight.add_(0.125)
        full[0].weight.copy_(half[0].weight)
    for step in range(1, 400):
        teacher.update(half, step)
        exact.update(full, step)
        if step == 200:
            torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
            restored = Teacher(half, 0.99)
            restored.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
            teacher = restored
    for mine, theirs in zip(teacher.model.parameters(), exact.model.parameters(), strict=True):
        assert mine.dtype == dtype and torch.equal(mine, theirs.to(dtype))


def test_teacher_of_half_precision_reads_a_state_without_float32():
    half = nn.Linear(5, 5).to(torch.bfloat16)
    teacher = Teacher(half, 0.99)
    teacher.load_state_dict({name: value + 1 for name, value in half.state_dict().items()})
    assert torch.equal(teacher.model.weight, half.weight + 1)
    assert torch.equal(teacher.exact["weight"], (half.weight + 1).float())


def bidirectional_text_tower():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
            text_cfg={
                "context_length": 16,
                "vocab_size": 49408,
                "width": 32,
                "heads": 2,
                "layers": 1,
                "no_causal_mask": True,
            },
        )


def test_a_tower_that_sees_the_padding_reads_it_all():
    model = bidirectional_text_tower()
    assert reads_to_end(model) is None
    image, text = inputs(5)[0], uneven_captions(5)
    got = embed_with_towers(model, image, text, 2, contextlib.nullcontext())[1]
    torch.testing.assert_close(got, model.encode_text(text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_clip, in_a_custom_text_tower, as_clip_model])
def test_a_lower_resolution_has_resized_images_and_position_embeddings(make):
    """Against open_clip's own resizing of position embeddings, in a second model of the lower resolution."""
    model, (image, text) = make(), inputs(5)
    towers = getattr(model, "towers", model)
    cfg = {**TINY, "embed_dim": 16, "vision_cfg": {**TINY["vision_cfg"], "image_size": 16}}
    small = open_clip.CLIP(**cfg) if isinstance(towers, open_clip.CLIP) else open_clip.CustomTextCLIP(**cfg)
    weights = towers.state_dict()
    resize_pos_embed(weights, small)
    visual = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
    small.visual.load_state_dict(visual)
    pixels = F.interpolate(image, size=(16, 16), mode="bicubic", antialias=True)
    expected = small.visual.eval()(pixels)
    got = embed_with_towers(model, image, text, 2, contextlib.nullcontext(), resolution=16)[0]
    torch.testing.assert_close(F.normalize(got, dim=1), F.normalize(expected, dim=1), rtol=1e-4, atol=1e-4)
    same = embed_with_towers(model, image, text, 2, contextlib.nullcontext(), resolution=32)[0]
    plain = embed_with_towers(model, image, text, 2, contextlib.nullcontext())[0]
    torch.testing.assert_close(same, plain)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_a_proxy_reads_a_lower_resolution_in_its_own_format():
    towers, (image, text) = tiny_clip(), inputs(4, side=48)
    proxy = Proxy(towers, image_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    got = embed_with_towers(proxy, image, text, 4, contextlib.nullcontext(), resolution=16)[0]
    low = Proxy(towers, image_size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    assert proxy.image_size == 32
    names = positions_at(proxy, 16)
    assert list(names) == ["towers.visual.positional_embedding"] and len(*names.values()) == 2
    towers.visual.positional_embedding = nn.Parameter(names["towers.visual.positional_embedding"])
    torch.testing.assert_close(got, low.encode_image(image), rtol=1e-4, atol=1e-5)


def test_a_resnet_reads_lower_resolutions_in_whole_cells():
    cfg = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    model, (image, text) = build_towers(config={**TINY, "embed_dim": 16, "vision_cfg": cfg}), inputs(3, side=64)
    got = embed_with_towers(model, image, text, 2, contextlib.nullcontext(), resolution=32)[0]
    assert got.shape == (3, 16) and torch.isfinite(got).all()
    (name, positions), *more = positions_at(model, 32).items()
    assert name == "visual.attnpool.positional_embedding" and len(positions) == 2 and not more
    own = model.visual.attnpool.positional_embedding
    torch.testing.assert_close(positions[1], own[1:].mean(0), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match=r"embed_resolution=48 must be a multiple of 32"):
        embed_with_towers(model, image, text, 2, contextlib.nullcontext(), resolution=48)


def test_a_resolution_that_a_tower_cannot_read_is_a_clear_error():
    class Fixed(nn.Module):
        def encode_image(self, image):
            raise RuntimeError("my positions do not fit")

        def encode_text(self, text):
            return text

    with pytest.raises(ValueError, match=r"embed_resolution=16: the embedder cannot read .*my positions do not fit"):
        embed_with_towers(Fixed(), inputs(2)[0], torch.ones(2, 2), 2, contextlib.nullcontext(), resolution=16)


def test_logit_scale_is_exponentiated_and_defaults_to_clips():
    model = tiny_clip()
    torch.testing.assert_close(scale_of(model), model.logit_scale.detach().exp())
    assert not scale_of(model).requires_grad and scale_of(model).shape == ()

    class Bare(nn.Module):
        def encode_image(self, image):
            return image

        def encode_text(self, text):
            return text

    rows = torch.ones(3, 2)
    assert embed_with_towers(Bare(), rows, rows, 2, contextlib.nullcontext())[2] == 100.0


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(), reason="reads Linux's flags")
def test_whether_a_cpu_has_instructions_for_bfloat16_is_what_its_flags_say():
    flags = Path("/proc/cpuinfo").read_text().split()
    wide = {"avx512bw", "avx512vl", "avx512dq"} <= set(flags)
    assert is_native(torch.bfloat16, "cpu") == (wide or "avx_ne_convert" in flags)
    assert is_native(torch.float32, "cpu") and is_native(torch.bfloat16, "mps") and is_native(torch.float16, "cuda")


@pytest.mark.parametrize(("precision", "dtype"), [("amp_bf16", torch.bfloat16), ("amp_fp16", torch.float16)])
def test_a_precision_that_saves_nothing_is_warned_of(precision, dtype):
    check_precision(None, "cpu")
    check_precision("fp32", "cpu")
    said = pytest.warns(UserWarning, match=f"embed_precision={precision}: this cpu device has no instructions")
    with contextlib.nullcontext() if is_native(dtype, "cpu") else said:
        check_precision(precision, "cpu")


def test_models_without_towers_are_refused():
    with pytest.raises(ValueError, match=r"learner Linear has no encode_image and no encode_text"):
        check_towers(nn.Linear(2, 2), "learner")
    with pytest.raises(ValueError, match=r"proxy Linear"):
        Proxy(nn.Linear(2, 2))
    check_towers(tiny_clip(), "learner")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_proxy_of_halves_says_what_makes_it_read(dtype):
    image, text = inputs(2)
    with pytest.raises(ValueError, match=rf"CLIP.encode_image with weights of {dtype} failed .*model.float.*amp_bf16"):
        embed_with_towers(Proxy(tiny_clip().to(dtype)), image, text, 2, contextlib.nullcontext())


def test_teacher_copies_weights_that_are_whole_numbers():
    learner = nn.Linear(3, 2)
    learner.register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    teacher = Teacher(learner, 0.5)
    with torch.no_grad():
        learner.codes += 7
        learner.weight += 1
    before = teacher.model.weight.clone()
    teacher.update(learner, 100)
    assert teacher.model.codes.tolist() == [7, 7]
    torch.testing.assert_close(teacher.model.weight, (before + learner.weight.detach()) / 2)


# Columns


def test_columns():
    batch = {"x": torch.ones(3, 2, dtype=torch.float16), "y": torch.zeros(3, 2)}
    image, text, scale = embed_from_columns(batch, "x", "y", 50.0)
    assert torch.equal(image, batch["x"]) and torch.equal(text, batch["y"]) and scale == 50.0
    for keys in (("x", "z"), ("z", "y")):
        with pytest.raises(ValueError, match=r"needs 'z' in the batch, which has \['x', 'y'\].*stream\.columns"):
            embed_from_columns(batch, *keys, 50.0)
