"""What needs a CUDA device: `pytest -m gpu`. Skipped where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import open_clip
import pytest
import torch

from clipcov_stream import kernels
from clipcov_stream.embed import embed_with_towers
from clipcov_stream.graphed import WARMUP, GraphedSelect, of_state
from clipcov_stream.herding import Herding
from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.online import OnlineProxy, parts_in_turn
from clipcov_stream.pool import Pool, survivors_of, with_learner
from clipcov_stream.selection import learn, select
from clipcov_stream.selector import Selector
from clipcov_stream.towers import SmallTowers

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


@pytest.fixture(autouse=True)
def compiled_afresh() -> None:
    """Torch compiles a function for so many shapes and no more."""
    torch._dynamo.reset()


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
    pools = [pool_of(640, 64, seed, "cuda", dtype) for seed in range(4)]
    pools = [replace(pool, ids=torch.arange(640, device="cuda") + 99 * seed) for seed, pool in enumerate(pools)]
    learner = torch.randn(128, 32, device="cuda")
    scale = torch.tensor(30.0, device="cuda")
    for run in (select, GraphedSelect()):
        state = SelectionState.initial(64, Settings(half_life=1e4, soft_start=0.5), device="cuda", dataset_size=900)

        def step(state: SelectionState, pool: Pool) -> tuple[SelectionState, torch.Tensor]:
            state, survivors, *_ = run(state, pool, 128)  # noqa: B023
            return learn(state, with_learner(survivors_of(pool, survivors), learner, learner, scale)), survivors

        for _ in range(WARMUP + 1):  # functions compile, libraries make their handles, the graph is recorded
            step(state, pools[0])
        with no_sync():
            for pool in pools:
                state, survivors = step(state, pool)
        assert len(set(survivors.tolist())) == 128


@pytest.mark.parametrize("with_valid", [False, True])
def test_a_graph_replays_select_bit_for_bit(with_valid: bool) -> None:
    """The state it leaves too, over pools of which some have samples that are not valid, and a resume."""

    def fresh() -> SelectionState:
        return SelectionState.initial(64, Settings(half_life=1e4, soft_start=0.5), device="cuda", dataset_size=900)

    run, states = GraphedSelect(), [fresh() for _ in "ab"]
    for step in range(WARMUP + 4):
        ids = (torch.arange(640) + 100 * step).cuda()
        pool = replace(pool_of(640, 64, step, "cuda"), ids=ids)
        if with_valid:
            pool = replace(pool, valid=torch.arange(640, device="cuda") % 7 != step % 7)
        states[0], expected, report, gained = select(states[0], pool, 128)
        states[1], survivors, figures, gain = run(states[1], pool, 128)
        assert torch.equal(survivors, expected) and torch.equal(gain.nan_to_num(), gained.nan_to_num())
        for name, value in report.items():
            torch.testing.assert_close(figures[name], value.float(), rtol=0, atol=0, equal_nan=True)
        assert all(map(torch.equal, of_state(states[1]), of_state(states[0])))
        assert states[1].step == states[0].step == step + 1
        if step == WARMUP + 1:
            states[1] = fresh().restored(states[1].state_dict())


def test_the_kernels_reach_what_exact_picks_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(6000, 128, generator=generator), dim=1)
    text = torch.nn.functional.normalize(image + 0.05 * torch.randn(6000, 128, generator=generator), dim=1)
    worth, aim = torch.rand(6000, generator=generator), image.T @ text / 6000
    rows = (part.cuda() for part in (image, text, worth, aim))
    herding = Herding(*rows, 1.0, torch.rand(6000, generator=generator).cuda() < 0.9, 1200)
    assert kernels.run_on(herding.worth)
    exact, chunked = herding.picks(1).index, herding.picks().index
    lowest, highest, reached = (
        float(herding.objective(index)) for index in (herding.valid.nonzero()[:1200, 0], exact, chunked)
    )
    assert len(set(chunked.tolist())) == 1200 and (reached - lowest) / (highest - lowest) > 0.99


def test_a_gpu_and_a_cpu_choose_alike() -> None:
    """The same choices but for near ties, which rounding decides."""
    states = {device: SelectionState.initial(64, Settings(), device=device) for device in ("cpu", "cuda")}
    for seed in range(3):
        chosen = {}
        for device in states:
            states[device], survivors, report, _ = select(states[device], pool_of(640, 64, seed, device), 128)
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


def test_an_online_proxy_learns_alike_with_captions_on_the_cpu() -> None:
    """Images lie on the device, captions and the mask where the loader left them."""
    image = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = torch.stack([open_clip.SimpleTokenizer(context_length=16)(f"a photo of number {i}")[0] for i in range(48)])
    valid = torch.ones(48, dtype=torch.bool).index_fill(0, torch.tensor([5, 20]), False)
    weights = 2 * torch.rand(48, generator=torch.Generator().manual_seed(1))
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        online = OnlineProxy(SmallTowers(16, 32).to(device), lr=1e-3, momentum=0.9)
        for _ in range(2):
            online.learn(
                image.to(device), text, valid, weights.to(device), parts_in_turn(48, 16), 64, contextlib.nullcontext
            )
        found.append({name: value.cpu() for name, value in online.state_dict().items()})
    assert int(found[1]["updates"]) == 6
    for name, value in found[0].items():
        if name.startswith("average."):
            torch.testing.assert_close(found[1][name], value, rtol=0, atol=2e-2, msg=name)
    # Its optimizer's steps are on the device too, and found there again.
    restored = OnlineProxy(SmallTowers(16, 32).cuda(), lr=1e-3, momentum=0.9)
    restored.load_state_dict(found[1])
    restored.learn(image.cuda(), text, valid, weights.cuda(), parts_in_turn(48, 16), 64, contextlib.nullcontext)
    steps = {int(value) for name, value in restored.state_dict().items() if name.startswith("step.")}
    assert steps == {9}


def test_a_selector_follows_its_pools_to_another_device() -> None:
    """Midway, and from a checkpoint that was loaded onto the CPU between a choice and what the learner made of it."""
    saved = Selector("clipcov", seed=0)
    saved(pool_of(64, 16, 0, "cpu"), 16)
    loaded = Selector("clipcov", seed=0)
    loaded.load_state_dict(saved.state_dict())
    for selector in (saved, loaded):
        rows = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
        selector.learned(rows.cuda(), rows.cuda(), 10.0)
        assert len(set(selector(pool_of(64, 16, 1, "cuda"), 16).tolist())) == 16
        assert selector.state is not None and selector.state.lag.is_cuda and selector.state.step == 2
    assert saved.state is not None and loaded.state is not None
    assert torch.equal(saved.state.lag, loaded.state.lag)
