"""A corpus filtered beforehand, for benchmarks: what selecting online competes with.

A frozen model embeds every sample of the stream once, a rule keeps a share of them, and training is plain training on
what is kept, as often as it takes. The rules are those of the offline tools:

    clip_score       the highest cosines of image and caption
    neg_clip_loss    the highest margins over other captions and images, at the frozen model's own temperature
    clipcov          CLIPCov as published; its latent classes are the evaluation's, found by their prompts
    sound            a uniform draw from the pairs that match, which the benchmark alone knows: no filter tells them
                     apart better

With `-distinct` after its name a rule is given, for nothing, the truth about duplicates: copies of a hot sample are
left out, as a perfect deduplication would.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import select_offline
import select_rivals
import torch
from bench_corpus import Corpus

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

RULES = ("clip_score", "neg_clip_loss", "clipcov", "sound")
DISTINCT = "-distinct"
BATCH, REPEATS = 8192, 2
"""Of neg_clip_loss. The paper's batches, 32,768, are as large as a whole corpus here."""


def filter_of(text: str) -> tuple[str, float]:
    """`RULE[-distinct]:FRACTION`, for argparse.

    Raises:
        argparse.ArgumentTypeError: another rule, or a fraction outside (0, 1].
    """
    rule, _, share = text.partition(":")
    try:
        fraction = float(share)
    except ValueError:
        fraction = 0.0
    if rule.removesuffix(DISTINCT) not in RULES or not 0 < fraction <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not RULE[{DISTINCT}]:FRACTION, with a rule of {list(RULES)} and a fraction in (0, 1]"
        )
    return rule, fraction


def rows_kept(
    corpus: Corpus,
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    logit_scale: float,
    class_text: Float[Tensor, "classes dim"],
    without: Int64[Tensor, " proxy"],
    rule: str,
    fraction: float,
    seed: int,
) -> Int64[Tensor, " kept"]:
    """The training samples that a filter leaves, ascending.

    Args:
        image, text: a frozen model's embeddings of the whole training split.
        logit_scale: exponentiated, that model's.
        class_text: that model's embeddings of the evaluation's classes.
        without: rows that the frozen model was trained on, which are not in the stream.
        rule, fraction: as `filter_of` has them; the fraction is of the stream, whatever `-distinct` leaves out first.
        seed: of what the rule draws.
    """
    out = torch.zeros(len(corpus.train), dtype=torch.bool).index_fill_(0, without, True)
    num = max(1, int(fraction * int((~out).sum())))
    if rule.endswith(DISTINCT):
        out |= corpus.duplicate
    if rule.removesuffix(DISTINCT) == "sound":
        out |= corpus.mismatched
    rows = (~out).nonzero().squeeze(1)
    num = min(num, len(rows))
    image, text, class_text = (select_offline.unit_rows(table) for table in (image[rows], text[rows], class_text))
    picks = _ranked(rule.removesuffix(DISTINCT), image, text, logit_scale, class_text, num, seed)
    return rows[picks[:num]].sort().values


def _ranked(
    rule: str, image: Tensor, text: Tensor, logit_scale: float, class_text: Tensor, num: int, seed: int
) -> Tensor:
    """At least `num` places, the best first."""
    if rule == "clipcov":
        labels = select_offline.nearest(image, class_text)
        return select_offline.clipcov_greedy(image, text, labels, num, class_text)[0]
    if rule == "neg_clip_loss":
        scores = select_rivals.mean_margin(image, text, 1 / logit_scale, BATCH, REPEATS, seed)
    else:
        method = "random" if rule == "sound" else rule
        scores = select_rivals.scores_of(method, image, text, torch.zeros(0), None, seed)
    return scores.argsort(descending=True, stable=True)


def name_of(rule: str, fraction: float, selector: str, by: str | None = None) -> str:
    """What tables call a selector on what a filter, by another proxy than the cell's, leaves; plain training is
    `random` with nothing to choose from."""
    return f"{'plain' if selector == 'random' else selector} on {rule} {fraction:g}" + (f" by {by}" if by else "")
