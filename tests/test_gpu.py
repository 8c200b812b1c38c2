"""What needs a CUDA device: `pytest -m gpu`. Skipped where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import open_clip
import pytest
import torch

from clipcov_stream.embed import embed_with_towers
from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.pool import Pool, survivors_of, with_learner
from clipcov_stream.selection import learn, select

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def pool_of(num: int, dim: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Pool:
    """Pairs around 40 concepts, of which two thirds match."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(40, dim, generator=torch.Generator().manual_seed(99))
    concept = torch.randint(40, (num,), generator=generator)
    other = torch.where(torch.rand(num, generator=generator) < 0.66, concept, concept.flip(0))
    image = base[concept] + 0.8 * torch.randn(num, dim, generator=generator)
    text = base[other] + 0.8 * torch.randn(num, dim, generator=generator)
    return Pool(image.to(device, dtype), text.to(device, dtype), torch.tensor(20.0, device=device))


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Makes waiting for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_selection_never_waits_for_the_device(dtype: torch.dtype) -> None:
    state = SelectionState.initial(64, Settings(half_life=1e4), device="cuda")
    pools = [pool_of(640, 64, seed, "cuda", dtype) for seed in range(4)]
    learner = torch.randn(128, 32, device="cuda")
    scale = torch.tensor(30.0, device="cuda")
    state, _, _ = select(state, pools[0], 128)  # libraries make their handles
    state = learn(state, survivors_of(pools[0], torch.arange(128, device="cuda")))
    with no_sync():
        for pool in pools[1:]:
            state, survivors, _ = select(state, pool, 128)
            state = learn(state, with_learner(survivors_of(pool, survivors), learner, learner, scale))
    assert len(set(survivors.tolist())) == 128


def test_a_gpu_and_a_cpu_choose_alike() -> None:
    """The same choices but for near ties, which rounding decides."""
    states = {device: SelectionState.initial(64, Settings(), device=device) for device in ("cpu", "cuda")}
    for seed in range(3):
        chosen = {}
        for device in states:
            states[device], survivors, report = select(states[device], pool_of(640, 64, seed, device), 128)
            chosen[device] = set(survivors.tolist()), float(report["residual"])
        assert len(chosen["cpu"][0] & chosen["cuda"][0]) >= 124
        assert chosen["cpu"][1] == pytest.approx(chosen["cuda"][1], rel=1e-2)


def test_the_embedding_pass_reads_captions_from_the_cpu() -> None:
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    )
    text = torch.randint(1, 49000, (20, 16))
    text[:, 6:], text[:, 5] = 0, 49407
    image = torch.randn(20, 3, 32, 32)
    expected = embed_with_towers(model, image, text, 8, contextlib.nullcontext())
    model = model.cuda()
    got = embed_with_towers(model, image.cuda(), text, 8, contextlib.nullcontext())
    for ours, theirs in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-3)
