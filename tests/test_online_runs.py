"""An online proxy in a run: it judges by its moving average, and is part of what a run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from corpora import TINY_MODEL, draw_corpus, recipe
from proxies import SMALL, Linear, online_recipe
from runs import (
    Interrupt,
    algorithm_of,
    assert_same_run,
    run,
    trainer_of,
    values,
)
from torch import Tensor

from clipcov_stream import ClipCov
from clipcov_stream.batch import size_of
from clipcov_stream.build import SHARE, WIDTHS, affordable_width, build_proxy
from clipcov_stream.config import ProxyConfig
from clipcov_stream.embed import Proxy
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.model import build_towers, forward_flops
from clipcov_stream.online import (
    OnlineProxy,
)
from clipcov_stream.towers import EMBED_DIM, SmallTowers


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_run_selects_by_a_proxy_that_learns_from_the_stream(tmp_path: Path, corpus: Path) -> None:
    trainer, _, memory = run(tmp_path, online_recipe(corpus, selection={"warmup": "2ba"}))
    clipcov = algorithm_of(trainer)
    online = clipcov.teacher
    assert isinstance(online, OnlineProxy)
    assert online.updates == 6 * 4  # the warm-up's pools too, in parts of 8 of 32
    assert online.samples_streamed == 6 * 32 and online.dataset_size == size_of(trainer.state.dataloader) > 0
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
    assert clipcov.dataset_size == 0 and online.dataset_size == size_of(trainer.state.dataloader) > 0


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
