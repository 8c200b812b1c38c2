"""Pictures that come again and again: with `copies` an online proxy learns from all of one as much as from one."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corpora import draw_corpus, recipe, write_recipe
from runs import algorithm_of, launch, run
from torch import Tensor, nn

from clipcov_stream.copies import LIKE, MEMORY, THUMBNAIL, log_copies, thumbnails
from clipcov_stream.online import OnlineProxy, learning_weights, parts_in_turn
from clipcov_stream.pool import Pool
from clipcov_stream.prepare import Preparation


class Layers(nn.Module):
    """Two towers with a hidden layer, for pictures of 3 x 6 x 6."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(THUMBNAIL, 64), nn.ReLU(), nn.Linear(64, 16))
        self.text = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.image(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.text(text)


def new_proxy() -> OnlineProxy:
    return OnlineProxy(Layers(), lr=1e-2, momentum=0.9, counts_copies=True)


def remembered(online: object) -> Tensor:
    assert isinstance(online, OnlineProxy) and online.pictures is not None
    return online.pictures


def drawn_pictures(num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, 3, 6, 6, generator=generator)


def test_counts_are_of_the_last_candidates() -> None:
    """Against float64 and a list of all that came, in pools of several sizes; of one that is larger than what is
    remembered, every so many-th."""
    generator, online = torch.Generator().manual_seed(0), new_proxy()
    few = drawn_pictures(40, generator)
    came, alike = np.zeros((0, THUMBNAIL)), np.zeros(0)
    for size in (7, 2000, 300, 2500, 2 * MEMORY + 100, 300):
        shown = few[torch.randint(40, (size,), generator=generator)] + 0.1 * drawn_pictures(size, generator)
        pictures = thumbnails(shown)
        rows = pictures.double().numpy()
        alike = np.maximum(rows @ came[-MEMORY:].T - LIKE, 0).sum(1) / (1 - LIKE)
        came = np.concatenate([came, rows if size <= MEMORY else rows[np.arange(MEMORY) * size // MEMORY]])
        np.testing.assert_allclose(online.recurring(pictures).exp().numpy(), 1 + alike, rtol=2e-3)
    assert alike.min() > 1


def test_of_n_copies_each_teaches_an_nth() -> None:
    generator = torch.Generator().manual_seed(1)
    image = F.normalize(torch.randn(300, 16, generator=generator), dim=1)
    valid = torch.rand(300, generator=generator) < 0.9
    pool = Pool(image, image + 0.1 * torch.randn(300, 16, generator=generator), 20.0, valid=valid)
    counts = torch.randint(0, 30, (300,), generator=generator)
    plain = learning_weights(pool, 256)
    torch.testing.assert_close(learning_weights(pool, 256, recurs=torch.zeros(300)), plain)
    weights = learning_weights(pool, 256, recurs=counts.float().log1p())
    wanted = plain / (1 + counts)
    torch.testing.assert_close(weights, wanted * (valid.sum() / wanted.sum()))


@pytest.mark.parametrize("what", [math.nan, math.inf, 0.0])
def test_what_is_no_picture_is_like_no_other(what: float) -> None:
    """Not finite, or of one grey."""
    generator, online = torch.Generator().manual_seed(2), new_proxy()
    shown = drawn_pictures(50, generator)
    shown[:5] = what
    for _ in range(2):
        found = online.recurring(thumbnails(shown))
    assert torch.equal(found[:5], torch.zeros(5)) and found[5:].min() > math.log(1.9)
    assert remembered(online).isfinite().all() and int((remembered(online) != 0).any(1).sum()) == 2 * 45


def taken_for_matches(counted: bool) -> tuple[float, float]:
    """What is learned at the end from a mismatched pair that recurs, and from one that does not; a matching one's is 1.

    Of every pool of 256 a third are 12 pictures with captions of others, a fifth of the rest is mismatched too.
    """
    generator, online = torch.Generator().manual_seed(3), new_proxy()
    told = torch.randn(THUMBNAIL, 16, generator=generator) / 10
    hot = drawn_pictures(12, generator)
    for _ in range(40):
        shown, recurs = drawn_pictures(256, generator), torch.rand(256, generator=generator) < 1 / 3
        which = torch.randint(12, (256,), generator=generator)
        shown[recurs] = hot[which[recurs]]
        of = torch.where(
            torch.rand(256, generator=generator)[:, None] < 0.2, shown.flatten(1).roll(1, 0), shown.flatten(1)
        )
        wrong = (of != shown.flatten(1)).any(1) & ~recurs
        of[recurs] = hot.roll(1, 0)[which[recurs]].flatten(1)
        captions = of @ told
        with torch.no_grad():
            seen = online.model.encode_image(shown), online.model.encode_text(captions)
            pool = Pool(*(F.normalize(side, dim=1) for side in seen), float(online.model.logit_scale.exp()))
        plain = learning_weights(pool, 256)
        weights = learning_weights(pool, 256, recurs=online.recurring(thumbnails(shown))) if counted else plain
        online.learn(
            shown, captions, torch.ones(256, dtype=torch.bool), weights, parts_in_turn(256, 64), 16, nullcontext
        )
    match = plain[~recurs & ~wrong].mean()
    return float(plain[recurs].mean() / match), float(plain[wrong].mean() / match)


def test_a_caption_that_recurs_with_another_picture_is_not_learned_by_heart() -> None:
    """It is where copies are not counted: what recurs then passes for a match."""
    plainly, ours = taken_for_matches(False), taken_for_matches(True)
    assert plainly[0] > 0.8 and ours[0] < 0.6
    assert ours[1] < 0.3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus"))


RECORDED = """
import sys
import torch
from composer.utils import dist
from clipcov_stream import prepare
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer, leave_group
own, counts = [], []
plainly = prepare.Preparation._recurring
def recurring(self, online, pictures, valid, placement):
    found = plainly(self, online, pictures, valid, placement)
    own.append(pictures)
    counts.append(found)
    return found
prepare.Preparation._recurring = recurring
trainer = build_trainer(load_config(sys.argv[1]))
trainer.fit()
torch.save({"own": own, "counts": counts}, sys.argv[2].replace("RANK", str(dist.get_global_rank())))
trainer.close()
leave_group()
"""


@pytest.mark.parametrize("scope", ["local", "global"])
def test_copies_are_counted_among_what_all_ranks_were_shown(tmp_path: Path, corpus: Path, scope: str) -> None:
    """Into the second pass over the data, where every picture recurs."""
    script = tmp_path / "recorded.py"
    script.write_text(RECORDED, encoding="utf-8")
    selection = {"embed": "online", "proxy": {"width": 4}, "copies": 3, "warmup": 0, "scope": scope}
    tree = recipe(corpus, selection=selection, stream={"min_scale": 1.0}, max_duration="8ba")
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    launch(2, script, str(path), str(tmp_path / "RANK.pt"))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    came, most = torch.zeros(0, THUMBNAIL), 0.0
    for step in range(8):
        own = [rank["own"][step] for rank in ranks]
        expected = [log_copies(pictures, came) if len(came) else torch.zeros(len(pictures)) for pictures in own]
        found = [rank["counts"][step] for rank in ranks]
        if scope == "local":
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(found[0], found[1])
            torch.testing.assert_close(found[0].sort().values, torch.cat(expected).sort().values, atol=1e-4, rtol=1e-4)
        came, most = torch.cat([came, *own]), max(most, float(found[0].min()))
    assert most > math.log(1.9)


def test_what_is_not_valid_is_not_remembered() -> None:
    generator, online = torch.Generator().manual_seed(4), new_proxy()
    pictures, valid = thumbnails(drawn_pictures(20, generator)), torch.arange(20) % 4 > 0
    pictures[0] = math.nan
    preparation: Any = SimpleNamespace(group=None)
    for _ in range(2):
        found = Preparation._recurring(preparation, online, pictures, valid, None)
    torch.testing.assert_close(found, valid * math.log(2), atol=1e-3, rtol=0.0)
    assert int((remembered(online) != 0).any(1).sum()) == 2 * 15


def test_a_state_without_copies_is_refused_where_they_are_counted() -> None:
    counting, plain = new_proxy(), OnlineProxy(Layers(), lr=1e-2, momentum=0.9)
    with pytest.raises(ValueError, match="counted no copies"):
        counting.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="counted no copies"):
        counting.load_state_dict({**counting.state_dict(), "pictures": torch.zeros(3, THUMBNAIL)})
    plain.load_state_dict(counting.state_dict())  # what it does not read does it no harm


def test_only_clipcov_counts_copies(tmp_path: Path, corpus: Path) -> None:
    for selector, counts in (("clipcov", True), ("rho", False)):
        selection = {"embed": "online", "proxy": {"width": 4}, "selector": selector, "copies": 3, "warmup": 0}
        trainer, _, _ = run(tmp_path / selector, recipe(corpus, selection=selection, max_duration="1ba"))
        online = algorithm_of(trainer).teacher
        assert isinstance(online, OnlineProxy) and (online.pictures is not None) == counts
