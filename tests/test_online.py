"""An online proxy by itself: what it learns from a pool, by how much, and what its state is."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proxies import EQUAL, SMALL, Linear, drawn_pool
from runs import (
    assert_same,
)
from torch import Tensor, nn

from clipcov_stream.evidence import matching
from clipcov_stream.model import build_towers
from clipcov_stream.online import (
    BETAS,
    LARGEST_NORM,
    SHARPEST,
    VERSION,
    WARMUP,
    WEIGHT_DECAY,
    OnlineProxy,
    learning_weights,
    parts_in_turn,
)
from clipcov_stream.pool import Pool, prepared


def test_an_update_is_adamws_of_the_contrastive_loss() -> None:
    """Against a loop of torch's own parts, over two pools in parts of 16, one of them short, samples left out."""
    image, text, valid = drawn_pool()
    valid[[3, 20]] = False
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1)) * 2
    online, model = OnlineProxy(Linear(), lr=1e-2, momentum=0.9), Linear()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.image.weight, model.text.weight], "weight_decay": WEIGHT_DECAY},
            {"params": [model.logit_scale, model.image.bias], "weight_decay": 0.0},
        ],
        betas=BETAS,
    )
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for update in range(1, 7):
        part = torch.arange(40).split(16)[(update - 1) % 3]
        part = part[valid[part]]
        x, y = F.normalize(model.image(image[part]), dim=1), F.normalize(model.text(text[part]), dim=1)
        logits = model.logit_scale.exp() * x @ y.T
        terms = -0.5 * (logits.log_softmax(0) + logits.log_softmax(1)).diagonal()
        loss = (weights[part] * terms).sum() / len(part)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * update / WARMUP
        optimizer.step()
        momentum = min(0.9, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            average[name] = momentum * average[name] + (1 - momentum) * value
    online.learn(image, text, valid, weights, parts_in_turn(40, 16), 4, nullcontext)
    online.learn(
        4 * image, text, valid, weights, parts_in_turn(40, 16), 4, nullcontext, normalize=lambda part: part / 4
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(online.trained.state_dict()[name], value)
        torch.testing.assert_close(online.model.state_dict()[name], average[name])


def test_passes_are_counted_in_candidates_and_go_on_where_they_were() -> None:
    image, text, valid = drawn_pool()
    online = OnlineProxy(Linear(), lr=1e-2, momentum=0.9)
    online.begin(80)
    for size in (40, 20, 30):
        online.learn(image[:size], text[:size], valid[:size], EQUAL[:size], parts_in_turn(size, 16), 4, nullcontext)
    restored = OnlineProxy(Linear(), lr=1e-2, momentum=0.9)
    restored.load_state_dict(online.state_dict())
    restored.begin(80)  # the same data: it goes on
    assert online.passes == restored.passes == 90 / 80
    for other in (100, 0):  # others, or not known: of those it has seen nothing
        restored.load_state_dict(online.state_dict())
        restored.begin(other)
        restored.learn(image, text, valid, EQUAL, parts_in_turn(40, 16), 4, nullcontext)
        assert restored.passes == (0.4 if other else 0.0)


def matched_pool(share: float, apart: float, size: int = 400, seed: int = 0) -> tuple[Pool, Tensor]:
    """Embeddings of pairs around one another, `share` of them, and others' captions; which match."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(size, 16, generator=generator), dim=1)
    match = torch.rand(size, generator=generator) < share
    text = torch.where(match[:, None], image, image.roll(1, 0)) + apart * torch.randn(size, 16, generator=generator)
    return Pool(image, text, 20.0), match


@pytest.mark.parametrize(("passes", "power"), [(0, 1), (0.9, 1), (1.5, 1.5), (3, 3), (40, 3)])
def test_it_learns_from_a_pair_as_much_as_it_is_likely_to_match(passes: float, power: float) -> None:
    """And the more sharply, the more often it has seen it."""
    pool, match = matched_pool(0.6, 0.05)
    weights = learning_weights(pool, 256, passes)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert weights[~match].quantile(0.9) < 0.5**power and weights[match].min() > 1
    posterior = matching(prepared(pool), 256).posterior(torch.ones(400, dtype=torch.bool))
    torch.testing.assert_close(weights, posterior**power / (posterior**power).mean())


class Layers(nn.Module):
    """Two towers with a hidden layer: enough to learn a thousand pairs by heart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.image(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.text(text)


def told_apart(sharpest: float, num_passes: int) -> list[float]:
    """How well an online proxy tells matching pairs from others, pass after pass over the same 1,024 pairs of which 60%
    match: how often a matching one has more weight than another, each judged before it is learned from again."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1024, 16, generator=generator)
    match = torch.rand(1024, generator=generator) < 0.6
    text = image @ torch.randn(16, 16, generator=generator) / 4 + 0.1 * torch.randn(1024, 16, generator=generator)
    text = torch.where(match[:, None], text, text.roll(1, 0))
    online, found = OnlineProxy(Layers(), lr=1e-2, momentum=0.9), []
    online.begin(1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipcov_stream.online.SHARPEST", sharpest)
        for _ in range(num_passes):
            weights = torch.zeros(1024)
            for rows in torch.randperm(1024, generator=generator).split(256):
                with torch.no_grad():
                    seen = online.model.encode_image(image[rows]), online.model.encode_text(text[rows])
                    pool = Pool(*(F.normalize(side, dim=1) for side in seen), float(online.model.logit_scale.exp()))
                weights[rows] = learning_weights(pool, 256, online.passes)
                all_of_it = torch.ones(256, dtype=torch.bool)
                online.learn(image[rows], text[rows], all_of_it, weights[rows], parts_in_turn(256, 64), 16, nullcontext)
            mine, others = weights[match][:, None], weights[~match]
            found.append(float(((mine > others).double() + 0.5 * (mine == others)).mean()))
    return found


def test_many_passes_do_not_teach_it_mismatched_pairs_by_heart() -> None:
    """They do if it learns from all of them in plain proportion to the pairs' chance to match."""
    plainly, ours = told_apart(1.0, 20), told_apart(SHARPEST, 20)
    assert plainly[0] == ours[0] < 0.8 and max(plainly) > 0.94
    assert sum(ours[-5:]) / 5 > sum(plainly[-5:]) / 5 + 0.05


@pytest.mark.parametrize("seed", range(6))
def test_an_embedder_that_knows_nothing_yet_learns_from_nearly_all(seed: int) -> None:
    pool, _ = matched_pool(0.6, 100.0, seed=seed)
    weights = learning_weights(pool, 256)
    assert weights.quantile(0.05) > 0.35 and weights.quantile(0.95) < 3


def test_what_is_not_valid_or_not_finite_has_no_weight_and_does_not_count() -> None:
    pool, _ = matched_pool(0.6, 0.05)
    whole = learning_weights(Pool(pool.image[2:], pool.text[2:], 20.0), 400)
    image = pool.image.index_fill(0, torch.tensor([0]), torch.nan)
    valid = torch.arange(400) != 1
    weights = learning_weights(Pool(image, pool.text, 20.0, valid=valid), 400)
    assert weights[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(weights[2:], whole)
    wanted = learning_weights(pool, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(learning_weights(pool, 256), wanted)


def test_the_state_of_an_older_online_proxy_is_refused() -> None:
    online = OnlineProxy(Linear(), lr=1e-2, momentum=0.9)
    older = {name: value for name, value in online.state_dict().items() if name != VERSION}
    with pytest.raises(ValueError, match="an older version, which learned from other images"):
        online.load_state_dict(older)


def test_it_learns_to_tell_pairs_that_match() -> None:
    image, text, valid = drawn_pool(128)
    online = OnlineProxy(Linear(), lr=2e-2, momentum=0.9)

    def margin() -> float:
        with torch.no_grad():
            model: Any = online.model
            x, y = F.normalize(model.encode_image(image), dim=1), F.normalize(model.encode_text(text), dim=1)
            cosine = x @ y.T
            return float(cosine.diagonal().mean() - cosine.mean())

    before = margin()
    for _ in range(40):
        online.learn(image, text, valid, torch.ones(128), parts_in_turn(128, 32), 4, nullcontext)
    assert margin() > before + 0.3
    assert not any(p.requires_grad for p in online.model.parameters()) and online.updates == 160


@pytest.mark.parametrize("what", ["a NaN", "none valid", "one valid"])
def test_what_cannot_be_learned_from_changes_nothing_for_good(what: str) -> None:
    """One NaN in the weights would stay; and every part is an update, so that ranks make as many."""
    image, text, valid = drawn_pool()
    online = OnlineProxy(Linear(norm=True), lr=1e-2, momentum=0.9)
    online.learn(image, text, valid, EQUAL, parts_in_turn(40, 20), 4, nullcontext)
    before = copy.deepcopy(online.trained.state_dict())
    if what == "a NaN":
        image = image.index_fill(0, torch.tensor([0, 39]), torch.nan)
    else:
        valid = torch.zeros_like(valid)
        valid[: what == "one valid"] = True
    online.learn(image, text, valid, EQUAL, parts_in_turn(40, 20), 4, nullcontext)
    assert online.updates == 4
    for name, value in online.trained.named_parameters():
        # The moments of the updates before still move it, by no more than two steps do; a NaN is no update.
        assert (value - before[name]).abs().max() < (1e-9 if what == "a NaN" else 3e-3), name
        steps = online.optimizer.state[dict(online.trained.named_parameters())[name]]["step"]
        assert int(steps) == (2 if what == "a NaN" else 4)
    for model in (online.trained, online.model):
        assert all(buffer.isfinite().all() for buffer in model.buffers())
    means = [dict(model.named_buffers())["norm.running_mean"] for model in (online.trained, online.model)]
    assert torch.equal(*means) and not torch.equal(means[0], torch.zeros(4))


def test_a_state_is_restored_in_whatever_layout_it_comes() -> None:
    """Convolutions are channels last, and a fused step takes numbers in the order of memory."""
    image = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = torch.randint(1, 49408, (40, 16), generator=torch.Generator().manual_seed(1))
    valid, runs = torch.ones(40, dtype=torch.bool), []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(OnlineProxy(build_towers(config=SMALL), lr=1e-2, momentum=0.9))
    straight, restored = runs
    straight.learn(image, text, valid, EQUAL, parts_in_turn(40, 20), 8, nullcontext)
    state = straight.state_dict()
    assert any(value.ndim == 4 and not value.is_contiguous() for value in state.values())
    restored.load_state_dict({name: value.contiguous() for name, value in state.items()})
    for online in runs:
        online.learn(image, text, valid, EQUAL, parts_in_turn(40, 20), 8, nullcontext)
    assert_same(restored.state_dict(), straight.state_dict())


def test_logits_are_float32_under_autocast() -> None:
    """In bfloat16 they would be off by a third at a scale of 100."""
    image, text, _ = drawn_pool()
    online = OnlineProxy(Linear(), lr=1e-2, momentum=0.9)
    online.trained.logit_scale.data.fill_(4.6)
    bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    loss = online._loss(image, text, EQUAL, 40, 4, bf16)
    with torch.no_grad(), bf16():
        x, y = online.trained.encode_image(image), online.trained.encode_text(text)
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    logits, own = online.trained.logit_scale.double().exp() * x @ y.T, torch.arange(len(x))
    exact = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert loss.dtype == torch.float32 and abs(loss.item() - exact.item()) < 1e-4


def test_its_state_is_all_of_it() -> None:
    """Weights, average, moments and count: one that is restored goes on bit for bit."""
    image, text, valid = drawn_pool()
    straight = OnlineProxy(Linear(), lr=1e-2, momentum=0.9)
    straight.learn(image, text, valid, EQUAL, parts_in_turn(40, 16), 4, nullcontext)
    state = copy.deepcopy(straight.state_dict())
    resumed = OnlineProxy(Linear(seed=1), lr=1e-2, momentum=0.9)
    resumed.load_state_dict(state)
    for online in (straight, resumed):
        online.learn(image.flip(0), text.flip(0), valid, EQUAL, parts_in_turn(40, 16), 4, nullcontext)
    assert_same(resumed.state_dict(), straight.state_dict())
    fresh = OnlineProxy(Linear(), lr=1e-2, momentum=0.9)
    other = OnlineProxy(Linear(seed=1), lr=1e-2, momentum=0.9)
    other.load_state_dict(fresh.state_dict())  # before the first update there are no moments
    assert_same(other.state_dict(), fresh.state_dict())


class Halves(Linear):
    """A frozen back and a trainable head."""

    def __init__(self) -> None:
        super().__init__()
        self.image.requires_grad_(False)


def test_what_its_owner_froze_stays_as_it_is() -> None:
    model, (image, text, valid) = Halves(), drawn_pool()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    online = OnlineProxy(model, lr=1e-2, momentum=0.9)
    online.learn(image, text, valid, EQUAL, parts_in_turn(40, 16), 4, nullcontext)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith("image.") for name in changed)
    assert not model.image.weight.requires_grad
    fresh = OnlineProxy(Halves(), lr=1e-2, momentum=0.9)
    fresh.load_state_dict(online.state_dict())
    online.learn(image, text, valid, EQUAL, parts_in_turn(40, 16), 4, nullcontext)
    fresh.learn(image, text, valid, EQUAL, parts_in_turn(40, 16), 4, nullcontext)
    assert_same(fresh.state_dict(), online.state_dict())


def test_one_that_is_wholly_frozen_is_trained() -> None:
    model, (image, text, valid) = Linear(), drawn_pool()
    model.requires_grad_(False)
    before = model.image.weight.clone()
    online = OnlineProxy(model, lr=1e-2, momentum=0.9)
    online.learn(image, text, valid, EQUAL, parts_in_turn(40, 16), 4, nullcontext)
    assert not torch.equal(model.image.weight, before)


def test_one_in_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is trained in float32, this one has \['torch.bfloat16'\]: proxy.float"):
        OnlineProxy(Linear().to(torch.bfloat16), lr=1e-2, momentum=0.9)


def test_one_that_cannot_be_copied_is_named() -> None:
    proxy = Linear()
    proxy.image.register_buffer("computed", proxy.image.weight * 2)
    with pytest.raises(ValueError, match=r"embed='online' cannot copy Linear \(selection.proxy\).*embed='proxy'"):
        OnlineProxy(proxy, lr=1e-2, momentum=0.9)
