"""Pictures that come again and again: with `copies` an online proxy learns from all of one as much as from one."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corpora import draw_corpus, recipe, write_recipe
from runs import algorithm_of, run, run_ranks
from torch import Tensor, nn

from clipcov_stream.copies import LIKE, MEMORY, THUMBNAIL, thumbnails
from clipcov_stream.online import OnlineProxy, learning_weights, parts_in_turn
from clipcov_stream.pool import Pool


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
    """Against float64 and a list of all that came, in pools of several sizes, one larger than what is remembered."""
    generator, online = torch.Generator().manual_seed(0), new_proxy()
    few = drawn_pictures(40, generator)
    came, alike = np.zeros((0, THUMBNAIL)), np.zeros(0)
    for size in (7, 2000, 300, 2500, MEMORY + 100, 300):
        shown = few[torch.randint(40, (size,), generator=generator)] + 0.1 * drawn_pictures(size, generator)
        pictures = thumbnails(shown)
        rows = pictures.double().numpy()
        alike = np.maximum(rows @ came[-MEMORY:].T - LIKE, 0).sum(1) / (1 - LIKE)
        came = np.concatenate([came, rows])
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


def test_a_run_remembers_what_all_ranks_were_shown(tmp_path: Path, corpus: Path) -> None:
    """With pools of its own each rank counts copies in the others' too."""
    tree = recipe(
        corpus, selection={"embed": "online", "proxy": {"width": 4}, "copies": 3, "warmup": 0}, max_duration="2ba"
    )
    trainer, _, _ = run(tmp_path / "one", tree)
    pictures = remembered(algorithm_of(trainer).teacher)
    filled = (pictures != 0).any(1)
    assert int(filled.sum()) == 2 * 32 and filled[-2 * 32 :].all()
    ranks = run_ranks(tmp_path / "two", write_recipe(tmp_path / "recipe.yaml", tree), 2)
    found = [rank["algorithm"]["teacher"]["pictures"] for rank in ranks]
    assert torch.equal(found[0], found[1]) and int((found[0] != 0).any(1).sum()) == 2 * 32
    # Of equally many candidates, in pools that are halves of one rank's: the same ones.
    assert sorted(map(tuple, found[0].tolist())) == sorted(map(tuple, pictures.tolist()))
