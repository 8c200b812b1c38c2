"""An online proxy: it learns from every candidate, judges by its moving average, and is part of what a run resumes."""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from runs import (
    Interrupt,
    algorithm_of,
    assert_same,
    assert_same_run,
    launch,
    run,
    run_ranks,
    trainer_of,
    values,
)
from torch import Tensor, nn

from clipcov_stream import ClipCov
from clipcov_stream.batch import size_of
from clipcov_stream.build import SHARE, WIDTHS, affordable_width, build_proxy
from clipcov_stream.config import ProxyConfig
from clipcov_stream.embed import Proxy
from clipcov_stream.evidence import matching
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.model import build_towers, forward_flops
from clipcov_stream.online import (
    BETAS,
    LARGEST_NORM,
    SHARPEST,
    VERSION,
    WARMUP,
    WEIGHT_DECAY,
    OnlineProxy,
    Part,
    learning_weights,
    parts_in_turn,
)
from clipcov_stream.pool import Pool, prepared
from clipcov_stream.towers import EMBED_DIM, SmallTowers

SMALL: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


class Linear(nn.Module):
    """Two linear towers and a scale, and perhaps a batch norm."""

    def __init__(self, seed: int = 0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False) if norm else nn.Identity()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.norm(self.image(image))

    def encode_text(self, text: Tensor) -> Tensor:
        return self.text(text)


def drawn_pool(size: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(size, 6, generator=generator)
    return image, image[:, :5] + 0.1 * torch.randn(size, 5, generator=generator), torch.ones(size, dtype=torch.bool)


EQUAL = torch.ones(40)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus"))


def online_recipe(corpus: Path, **sections: Any) -> dict[str, Any]:
    selection = {"embed": "online", "proxy": {"config": SMALL}, "proxy_lr": 1e-2, **sections.pop("selection", {})}
    return recipe(corpus, selection=selection, **sections)


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


def test_a_run_selects_by_a_proxy_that_learns_from_the_stream(tmp_path: Path, corpus: Path) -> None:
    trainer, _, memory = run(tmp_path, online_recipe(corpus, selection={"warmup": "2ba"}))
    clipcov = algorithm_of(trainer)
    online = clipcov.teacher
    assert isinstance(online, OnlineProxy)
    assert online.updates == 6 * 4  # the warm-up's pools too, in parts of 8 of 32
    assert online.samples_streamed == 6 * 32 and online.dataset_size == size_of(trainer.state.dataloader.dataset) > 0
    assert clipcov.selection is not None and clipcov.selection.stream.image_dim == 8
    assert clipcov.settings.half_life == 20 * 32
    assert len(values(memory, "selection/embed_ms")) == 6  # it judges what it is to learn from in the warm-up too
    assert not any(
        torch.equal(a, b) for a, b in zip(online.trained.parameters(), online.model.parameters(), strict=True)
    )


def test_a_recipe_needs_no_proxy_section(tmp_path: Path, corpus: Path) -> None:
    """Of its own width, or as wide as is affordable: beside so small a learner the narrowest."""
    for width, proxy in ((WIDTHS[0], {}), (5, {"proxy": {"width": 5}})):
        selection = {"embed": "online", "warmup": 0, **proxy}
        about = tmp_path / f"{width}.about.json"
        tree = recipe(corpus, selection=selection, max_duration="1ba", metrics_file=str(tmp_path / f"{width}.jsonl"))
        trainer, _, _ = run(tmp_path / str(width), tree)
        clipcov = algorithm_of(trainer)
        assert isinstance(clipcov.proxy, Proxy) and clipcov.proxy.image_size == 32  # of images of 16
        assert clipcov.selection is not None and clipcov.selection.stream.image_dim == EMBED_DIM
        assert isinstance(towers := clipcov.proxy.towers, SmallTowers)
        assert next(iter(towers.convolutions.parameters())).shape[0] == width
        assert json.loads(about.read_text(encoding="utf-8"))["recipe"]["selection"]["proxy"]["width"] == width


@pytest.mark.parametrize(
    "selection",
    [{"proxy": {"config": SMALL}}, {"proxy": {"width": 4}}, {"proxy": {"width": 4}, "copies": 3}],
    ids=["of open_clip", "the default one", "the default one, with copies"],
)
def test_a_resumed_run_equals_a_straight_one(tmp_path: Path, corpus: Path, selection: dict[str, Any]) -> None:
    """In the second pass over the data, of six steps each."""
    saving = {"save_folder": str(tmp_path / "saved"), "save_interval": "2ba", "autoresume": True}
    tree = online_recipe(corpus, selection=selection, **saving)
    tree |= {"run_name": "online", "max_duration": "11ba"}
    straight = run(tmp_path / "straight", {**tree, "save_folder": str(tmp_path / "other")})
    trainer, _, _ = trainer_of(tmp_path / "first", tree)
    trainer.state.callbacks.append(Interrupt(8))
    with pytest.raises(InterruptedError):
        trainer.fit()
    trainer.close()
    resumed = run(tmp_path / "second", tree)
    assert_same_run(resumed, straight, skipped=8)
    online = algorithm_of(resumed[0]).teacher
    assert isinstance(online, OnlineProxy) and 1 < online.passes < 3


def test_it_knows_how_long_a_pass_is_whoever_selects(tmp_path: Path, corpus: Path) -> None:
    tree = online_recipe(corpus, selection={"selector": "neg_clip_loss", "warmup": "1ba"}, max_duration="2ba")
    trainer, _, _ = run(tmp_path, tree)
    clipcov = algorithm_of(trainer)
    online = clipcov.teacher
    assert isinstance(online, OnlineProxy)
    assert clipcov.dataset_size == 0 and online.dataset_size == size_of(trainer.state.dataloader.dataset) > 0


OF_THEIR_OWN = """
import sys
from pathlib import Path
from composer.utils import dist
from clipcov_stream import algorithm
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer, leave_group
trainer = build_trainer(load_config(sys.argv[1]))
own = [int(size) for size in sys.argv[2].split(",")]
algorithm.size_of = lambda dataset: own[dist.get_global_rank()]
trainer.fit()
clipcov = next(of for of in trainer.state.algorithms if isinstance(of, algorithm.ClipCov))
print("passes of", clipcov.teacher.dataset_size, "and ids below", clipcov.dataset_size)
trainer.close()
leave_group()
"""


@pytest.mark.parametrize(("sizes", "known"), [("64,32", 96), ("64,0", 0)])
def test_a_pass_is_one_over_all_ranks_data_sets(tmp_path: Path, corpus: Path, sizes: str, known: int) -> None:
    script = tmp_path / "sizes.py"
    script.write_text(OF_THEIR_OWN, encoding="utf-8")
    path = write_recipe(tmp_path / "recipe.yaml", online_recipe(corpus, max_duration="1ba"))
    said = launch(2, script, str(path), sizes)
    assert f"passes of {known} and ids below 0" in said


def test_another_learning_rate_or_model_is_another_run(tmp_path: Path, corpus: Path) -> None:
    tree = online_recipe(corpus, save_folder=str(tmp_path / "saved"), save_interval="3ba", max_duration="3ba")
    run(tmp_path / "first", tree)
    again = {**tree, "load_path": str(tmp_path / "saved" / "latest-rank0.pt"), "save_folder": None}
    for section, message in (
        ({"proxy_lr": 1e-3}, "selection.proxy_lr=0.01, not 0.001"),
        (
            {"proxy": {"config": {**SMALL, "embed_dim": 4}}},
            r"selection\.proxy=\d+, not \d+ \(numbers that stand for the model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "second", {**again, "selection": {**tree["selection"], **section}})


@pytest.mark.parametrize(
    ("proxy", "num_ranks"),
    [({"config": SMALL}, 2), ({"width": 4}, 2), ({"width": 4}, 4)],
    ids=["of open_clip", "the default one", "the default one, on four"],
)
def test_ranks_have_one_proxy(tmp_path: Path, corpus: Path, proxy: dict[str, Any], num_ranks: int) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", online_recipe(corpus, selection={"proxy": proxy}))
    ranks = run_ranks(tmp_path / "ranks", path, num_ranks)
    for other in ranks[1:]:
        assert_same(ranks[0]["algorithm"]["teacher"], other["algorithm"]["teacher"])
        assert_same(ranks[0]["model"], other["model"])
    assert int(ranks[0]["algorithm"]["teacher"]["updates"]) == 6 * 4
    assert int(ranks[0]["algorithm"]["teacher"]["samples_streamed"]) == 6 * 32  # over all ranks


AVERAGES = """
import sys
import torch
from composer.utils import dist, get_device
from clipcov_stream import online
from clipcov_stream.online import LARGE, average_over_ranks
dist.initialize_dist(get_device("cpu"))
rank, num_ranks = dist.get_global_rank(), dist.get_world_size()
def gradients(rank):
    # Two tables of which few rows were read, one of them all zero; a matrix, and a vector.
    generator = torch.Generator().manual_seed(rank)
    table, other = torch.zeros(LARGE // 8, 8), torch.zeros(LARGE, 1)
    table[torch.randint(len(table), (30,), generator=generator)] = torch.randn(30, 8, generator=generator)
    if rank == 1:
        table[7, 3] = torch.nan
    return [table, torch.randn(5, 4, generator=generator), other, torch.randn(6, generator=generator)]
own, travelled = gradients(rank), []
if sys.argv[1] == "dense":  # what NCCL gets; here no table is large enough to be asked
    online.LARGE = 1 << 60
summed = online.sum_over_ranks
online.sum_over_ranks = lambda tensor, group=None: travelled.append(tensor.numel()) or summed(tensor, group)
average = average_over_ranks(own, torch.distributed.new_group(backend="gloo") if sys.argv[1] == "own" else None)
for got, mine, parts in zip(average, own, zip(*map(gradients, range(num_ranks)))):
    assert got is mine
    torch.testing.assert_close(got, sum(parts) / num_ranks, equal_nan=True)
if sys.argv[1] == "dense":
    assert travelled == [LARGE + 20 + LARGE + 6]
else:  # of the tables 30 rows a rank at most, and which those are
    assert travelled[0] == LARGE // 8 + LARGE and travelled[1] <= num_ranks * 30 * 8 + 8 + 20 + 6
    assert len(travelled) == 2
print("as it should be on rank", rank)
"""


@pytest.mark.parametrize(("num_ranks", "group"), [(2, "default"), (3, "own"), (2, "dense")])
def test_gradients_are_averaged_whatever_rows_were_read(tmp_path: Path, num_ranks: int, group: str) -> None:
    script = tmp_path / "averages.py"
    script.write_text(AVERAGES, encoding="utf-8")
    said = launch(num_ranks, script, group)
    assert "as it should be on rank 0" in said


LEARNS = """
import os, sys
from contextlib import nullcontext
import torch
from composer.utils import dist, get_device
sys.path += sys.argv[2].split(os.pathsep)
from test_online import Linear, shared_pool
from clipcov_stream.online import OnlineProxy, Part
dist.initialize_dist(get_device("cpu"))
rank, num_ranks = dist.get_global_rank(), dist.get_world_size()
group = torch.distributed.new_group(backend="gloo") if sys.argv[3] == "own" else None
norm = sys.argv[4] == "norm"
online = OnlineProxy(Linear(rank, norm), lr=1e-2, momentum=0.9)  # rank 0's weights are what counts
for image, text, valid, weights, parts in shared_pool(num_ranks):
    own = slice(8 * rank, 8 * rank + 8)
    most = [max(int((part // 8 == of).sum()) for of in range(num_ranks)) for part in parts]
    mine = [Part(part[part // 8 == rank] % 8, size) for part, size in zip(parts, most)]
    online.learn(image[own], text[own], valid[own], weights[own], mine, 4, nullcontext, group=group)
if norm:  # a part of which rank 0 alone has any
    part = [Part(torch.arange(8), 8)]
    online.learn(image[own], text[own], valid[own] & (rank == 0), weights[own], part, 4, nullcontext, group=group)
torch.save(online.state_dict(), f"{sys.argv[1]}/rank{rank}.pt")
"""


def shared_pool(num_ranks: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]]:
    """Three pools of 8 candidates a rank, in parts of which ranks have unlike shares: of one a rank has none, of one
    it has none that is valid, of one there is none at all, and of one two ranks have one each."""
    size, generator = 8 * num_ranks, torch.Generator().manual_seed(5)
    pools = []
    for _ in range(3):
        image = torch.randn(size, 6, generator=generator)
        text = image[:, :5] + 0.1 * torch.randn(size, 5, generator=generator)
        valid = torch.ones(size, dtype=torch.bool)
        valid[[1, 6, 7]] = False
        others = torch.cat([torch.tensor([0, 2]), 8 + torch.randperm(size - 8, generator=generator)])
        most, one, rest = others.split([size - 11, 1, 4])
        parts = [most, torch.cat([torch.tensor([6, 7]), rest]), torch.tensor([1]), torch.tensor([3, 4])]
        parts.append(torch.cat([torch.tensor([5]), one]))
        pools.append((image, text, valid, 2 * torch.rand(size, generator=generator), parts))
    return pools


@pytest.mark.parametrize(("num_ranks", "group"), [(2, "default"), (3, "own")])
def test_ranks_learn_together_what_one_learns_from_all(tmp_path: Path, num_ranks: int, group: str) -> None:
    """All candidates of a part are one another's negatives, whichever rank has them."""
    script = tmp_path / "learns.py"
    script.write_text(LEARNS, encoding="utf-8")
    paths = os.pathsep.join(sys.path)
    launch(num_ranks, script, str(tmp_path), paths, group, "plain")
    alone = OnlineProxy(Linear(), lr=1e-2, momentum=0.9)
    for image, text, valid, weights, parts in shared_pool(num_ranks):
        alone.learn(image, text, valid, weights, [Part(part, len(part)) for part in parts], 4, nullcontext)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(num_ranks)]
    assert alone.updates == 15 and not torch.equal(alone.trained.image.weight, Linear().image.weight)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(ranks[0][name], value, msg=name)
    for rank in ranks[1:]:
        assert_same(rank, ranks[0])


def test_ranks_learn_together_with_batch_norm_too(tmp_path: Path) -> None:
    """Of a part of which a rank has one row it takes none: batch norm would have no statistics."""
    script = tmp_path / "learns.py"
    script.write_text(LEARNS, encoding="utf-8")
    launch(2, script, str(tmp_path), os.pathsep.join(sys.path), "default", "norm")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(*ranks)
    assert int(ranks[0]["trained.norm.num_batches_tracked"]) == 3 * 2 + 1
    assert int(ranks[0]["updates"]) == 16 and all(value.isfinite().all() for value in ranks[0].values())
    assert ranks[0]["average.norm.running_mean"].any()
    before = OnlineProxy(Linear(norm=True), lr=1e-2, momentum=0.9).state_dict()
    assert not torch.equal(ranks[0]["trained.image.weight"], before["trained.image.weight"])


@pytest.mark.parametrize(("learner", "side"), [(224, 64), (64, 64), (48, 32), (32, 32)])
def test_the_default_proxy_reads_what_the_learner_reads(learner: int, side: int) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=20)

    def tokens(caption: str) -> Tensor:
        return tokenizer(caption)[0]

    proxy = build_proxy(ProxyConfig(), ImageTransform(learner), tokens, online=True)
    assert proxy.image_size == side
    image, text = torch.randn(2, 3, learner, learner), torch.stack([tokens("a dog"), tokens("a red car")])
    assert proxy.encode_image(image).shape == proxy.encode_text(text).shape == (2, EMBED_DIM)


def test_the_default_proxy_is_as_wide_as_a_fiftieth_of_a_step_affords() -> None:
    """Five candidates to judge and to learn from, four forward passes each, for every three of the learner's."""
    learner = build_towers("ViT-B-32")
    cost = forward_flops(learner, 224, 77)
    # Twice the multiply-adds of its matrices, and of attention's products: 12 layers each.
    image = 2 * (50 * 12 * 12 * 768**2 + 49 * 3 * 32**2 * 768 + 12 * 2 * 50**2 * 768 + 768 * 512)
    text = 2 * (77 * 12 * 12 * 512**2 + 12 * 2 * 77**2 * 512 + 512 * 512)
    assert cost == pytest.approx(image + text, rel=0.01)
    assert affordable_width(learner, 0.8) == 32
    shares = [5 * 4 * forward_flops(SmallTowers(width, 64), 64, 77) / (3 * cost) for width in (32, 48)]
    assert shares[0] < SHARE < shares[1]
    assert affordable_width(learner, 0.999) == WIDTHS[0]
    assert affordable_width(learner, 0.0) == WIDTHS[-1]
    assert affordable_width(build_towers(config=SMALL), 0.8) == WIDTHS[0]


def test_the_default_proxys_multiply_adds() -> None:
    """Counted by hand: four convolutions of 9 weights a channel and place, three linear layers."""
    convolutions = 9 * sum(
        (side**2) * inner * outer for side, inner, outer in [(32, 3, 8), (16, 8, 16), (8, 16, 32), (4, 32, 64)]
    )
    assert forward_flops(SmallTowers(8, 64), 64, 77) == 2 * (convolutions + 64 * 64 + 64 * 128 + 128 * 64)


@pytest.mark.filterwarnings("ignore:.*has no instructions for it")
@pytest.mark.parametrize("precision", [None, "amp_bf16", "amp_fp16"])
def test_float16_is_for_embedding_alone(tmp_path: Path, corpus: Path, precision: str | None) -> None:
    """Its gradients would underflow without a scale."""
    trainer, _, _ = trainer_of(tmp_path, online_recipe(corpus, selection={"warmup": 0}, max_duration="1ba"))
    clipcov = algorithm_of(trainer)
    clipcov.embed_precision = precision
    assert isinstance(clipcov.proxy, Proxy)
    encode, autocast = clipcov.proxy.encode_image, {True: set[bool](), False: set[bool]()}

    def spied(image: Tensor) -> Tensor:
        autocast[torch.is_grad_enabled()].add(torch.is_autocast_enabled("cpu"))
        return encode(image)

    clipcov.proxy.encode_image = spied
    trainer.fit()
    assert autocast == {True: {precision == "amp_bf16"}, False: {precision is not None}}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"proxy": Linear(), "proxy_lr": 0.0}, "selection.proxy_lr=0.0 must be a finite number above 0"),
        (
            {"proxy": Linear(), "embed_resolution": 16},
            "embed_resolution=16: an online proxy embeds images as it learns .* or use embed='teacher' or 'proxy'",
        ),
        ({"proxy": Linear(), "embed_patch_dropout": 0.5}, "embed_patch_dropout=0.5: an online proxy embeds images"),
        ({"proxy": Linear(), "run_ahead": 2, "lag_delay": 1}, "run_ahead=2 must be at most selection.lag_delay=1"),
    ],
)
def test_bad_arguments_name_the_value_and_the_knob(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipCov(embed="online", **kwargs)


@pytest.mark.parametrize(
    ("proxy", "embed", "message"),
    [
        ({"width": 8, "config": SMALL}, "online", r"proxy.width=8 is for an online proxy .* without"),
        ({"width": 8, "pretrained": "x.pt"}, "proxy", r"proxy.width=8 is for an online proxy"),
        ({"width": 0}, "online", "proxy.width=0 must be a whole number of channels"),
        ({"pretrained": "x.pt"}, "online", r"proxy.pretrained='x.pt' needs the selection.proxy.name or .config"),
    ],
)
def test_a_proxy_that_is_described_twice_or_by_half_is_refused(
    tmp_path: Path, corpus: Path, proxy: dict[str, Any], embed: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, recipe(corpus, selection={"embed": embed, "proxy": proxy}))


def test_without_a_proxy_it_makes_one_of_its_own(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each seed, and nobody's random numbers are touched; it is what judges and learns."""
    made: list[Any] = []
    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
        made.extend(ClipCov(seed=seed).proxy for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (list(proxy.parameters()) for proxy in made)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
    trainer, _, _ = trainer_of(tmp_path, recipe(corpus, max_duration="3ba"))
    clipcov = ClipCov(0.75, warmup="1ba", soft_start=0.0)
    trainer.state.algorithms[:] = [clipcov]
    trainer.fit()
    assert isinstance(clipcov.teacher, OnlineProxy) and clipcov.teacher.updates == 3 * 4
    assert clipcov.survivor_gains is not None and clipcov.survivor_gains.isfinite().all()


def test_a_frozen_proxy_still_needs_weights(tmp_path: Path, corpus: Path) -> None:
    tree = online_recipe(corpus, selection={"embed": "proxy", "proxy": {"config": TINY_MODEL}})
    with pytest.raises(ValueError, match=r"proxy.pretrained is missing.*selection.embed=online"):
        run(tmp_path, tree)


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
