"""Filters, offline: random, CLIP score, negCLIPLoss, SemDeDup and C-RHO subsets of an MDS folder.

    python tools/select_rivals.py random FOLDER OUT --fraction 0.05 --mds
    python tools/select_rivals.py clip_score FOLDER OUT --fraction 0.05 --mds
    python tools/select_rivals.py neg_clip_loss FOLDER OUT --fraction 0.3 --mds
    python tools/select_rivals.py sem_dedup FOLDER OUT --fraction 0.05 --mds --clusters 1000
    python tools/select_rivals.py c_rho FOLDER OUT --fraction 0.05 --mds --learner LEARNERS_FOLDER

FOLDER has embedding columns (tools/embed_mds.py). With x_i and y_i the unit embeddings of image and caption, the best
n by score are taken, the lower row first where scores are equal:

    random         a uniform draw
    clip_score     <x_i, y_i>                                     (Hessel et al., EMNLP 2021)
    neg_clip_loss  <x_i, y_i> - (T/2) log sum_{j in B} e^{<x_i, y_j>/T} - (T/2) log sum_{j in B} e^{<x_j, y_i>/T}
                                                                  (Wang et al., NeurIPS 2024, 2405.19547)
    sem_dedup      -max_{j before i in its cluster} <x_i, x_j>    (Abbas et al., 2303.09540)
    c_rho          <x_i, y_i> - <u_i, v_i>                        (Maini et al., T-MARS, ICLR 2024)

All but neg_clip_loss are the CLIPCov paper's baselines. B is a random batch that has i in it, and the score the mean
over --repeats divisions of all samples into batches; T is --temperature, or the embedder's own by FOLDER/embedder.json,
or a trained CLIP's 0.01 as in the released code, as are batches of 32,768 and ten divisions, of which the paper finds
five enough.

sem_dedup orders a spherical k-means cluster by growing cosine to its centre, as the released code does by default, and
where that code keeps what is below a threshold, takes the n least redundant: the threshold that leaves n. The first of
each cluster is redundant to nothing. In c_rho u_i and v_i are the embeddings of a model in training: which pairs the
reference matches and the learner does not yet. The paper does not say which learner; give its columns as --learner.

The output is that of tools/select_offline.py, and tools/export.py reads it. Costs: about 16 n dim bytes of memory,
twice that for c_rho; for sem_dedup k-means and, per cluster of n_k, 2 n_k^2 dim flops, BLOCK cosines at a time; for
neg_clip_loss 4 n |B| dim flops a division, BLOCK cosines at a time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mds_folder import write_source_json
from pairs import positive
from select_offline import BLOCK, spherical_kmeans, unit_rows, usable_rows
from subset_folder import PairFolder, add_subset_options, bar, open_pairs, report, subset_folder, write_subset
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

METHODS = ("random", "clip_score", "neg_clip_loss", "sem_dedup", "c_rho")
COLUMNS = {"image": "image_embedding", "text": "text_embedding"}


def redundancy(
    image: Float[Tensor, "n dim"], labels: Int64[Tensor, " n"], centers: Float[Tensor, "clusters dim"]
) -> Float[Tensor, " n"]:
    """Highest cosine of each row to one before it in its cluster, -1 for the first; the farthest from the centre first.

    Args:
        image: unit rows.
        labels: cluster of each.
        centers: unit rows; rows that no label names are not read.
    """
    closest = torch.full((len(image),), -1.0)
    for label in labels.unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        own = own[torch.argsort(image[own] @ centers[label], stable=True)]
        rows = image[own]
        step = max(1, BLOCK // len(own))
        for start in range(0, len(own), step):
            cosines = rows[start : start + step] @ rows.T
            closest[own[start : start + step]] = (
                cosines.tril(start - 1)
                .masked_fill(torch.ones_like(cosines, dtype=torch.bool).triu(start), -1.0)
                .amax(1)
            )
    return closest


def centers_of(image: Float[Tensor, "n dim"], labels: Int64[Tensor, " n"]) -> Float[Tensor, "clusters dim"]:
    """Normalized mean of each cluster; zeros where a cluster has no row."""
    sums = torch.zeros(int(labels.max()) + 1, image.shape[1]).index_add_(0, labels, image)
    return torch.nn.functional.normalize(sums)


def mean_margin(
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    temperature: float = 0.01,
    batch: int = 32768,
    repeats: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> Float64[Tensor, " n"]:
    """-negCLIPLoss: how much closer a caption is than any other would be, the mean over random divisions into batches.

    The formula is the module's. Batches of a division differ by at most one in size.

    Args:
        image, text: unit rows.
        batch: samples that a normalizer runs over, at most.
        repeats: divisions, drawn from `seed`.
        progress: show a bar on stderr.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(image), dtype=torch.float64)
    for _ in bar(range(repeats), "neg_clip_loss", "divisions", progress):
        for part in torch.randperm(len(image), generator=generator).tensor_split(-(-len(image) // batch)):
            x, y = image[part], text[part]
            step = max(1, BLOCK // len(part))
            for start in range(0, len(part), step):
                rows = slice(start, start + step)
                for own, others in ((x, y), (y, x)):
                    lse = (own[rows] @ others.T).div_(temperature).logsumexp(1).double()
                    total.index_add_(0, part[rows], lse, alpha=-0.5 * temperature)
    return (image * text).sum(1, dtype=torch.float64) + total / repeats


def scores_of(
    method: str, image: Tensor, text: Tensor, labels: Tensor, learner: tuple[Tensor, Tensor] | None, seed: int
) -> Tensor:
    """(n,) what `method` ranks by, the highest first; rows are unit, `learner` holds those of --learner."""
    if method == "random":
        return torch.rand(len(image), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if method == "sem_dedup":
        return -redundancy(image, labels, centers_of(image, labels))
    aligned = (image * text).sum(1)
    if method == "clip_score":
        return aligned
    assert learner is not None
    return aligned - (learner[0] * learner[1]).sum(1)


def check_same_samples(pairs: PairFolder, other: PairFolder, learner: str) -> None:
    """Raise ValueError unless `other`, that of --learner, has the samples of FOLDER in their order.

    Told by their uids, or else captions; of folders that have neither in common, by the index.json that embedder.json
    says they were made from.
    """
    if len(other) != len(pairs):
        raise ValueError(f"--learner {learner!r} has {len(other)} samples, FOLDER has {len(pairs)}")
    remedy = "c_rho compares row by row; embed one folder with both models (tools/embed_mds.py)"
    names = [name for name in ("uid", "caption") if pairs.columns.get(name) == other.columns.get(name) == "str"]
    if names:
        rows = range(len(pairs))
        both = zip(pairs.samples(rows), other.samples(rows), strict=True)
        for row, (own, its) in enumerate(bar(both, "compare", "samples", total=len(pairs))):
            if own[names[0]] != its[names[0]]:
                its, own = (sample[names[0]].decode("utf-8", "replace")[:80] for sample in (its, own))
                raise ValueError(
                    f"--learner {learner!r}: row {row} has the {names[0]} {its!r}, FOLDER {own!r}; {remedy}"
                )
        return
    its, own = ((folder.embedder or {}).get("source_index_sha1") for folder in (other, pairs))
    if its != own and its and own:
        raise ValueError(f"--learner {learner!r} was made from an index.json of sha1 {its}, FOLDER {own}; {remedy}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line asks; returns the figures that are printed last.

    Raises: ValueError for whatever the user can mend; OUT is then as it was.
    """
    began = time.monotonic()
    if (args.method == "c_rho") != (args.learner is not None):
        raise ValueError("--learner is for c_rho, which needs it: a folder with a model in training's embeddings")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature} must be above 0; a trained CLIP's is 0.01")
    pairs = open_pairs(args)
    with subset_folder(args.out, args.overwrite) as folder:
        tables = pairs.embeddings(COLUMNS)
        if args.learner is not None:
            other = PairFolder(args.learner)
            check_same_samples(pairs, other, args.learner)
            tables += other.embeddings(COLUMNS)
        usable = torch.stack([usable_rows(table) for table in tables]).all(0)
        rows = usable.nonzero()[:, 0]
        image, text, *rest = (unit_rows(table[rows]) for table in tables)
        num = args.num or max(1, int(args.fraction * len(rows) + 1e-9))
        if num > len(rows):
            raise ValueError(f"{num} samples to pick, but {len(rows)} of {len(pairs)} are usable (--num)")
        labels = torch.zeros(len(rows), dtype=torch.int64)
        if args.method == "sem_dedup":
            labels = spherical_kmeans(image, args.clusters, args.seed, progress=True)
        if args.method == "neg_clip_loss":
            own = 100.0 if pairs.embedder is None else float(pairs.embedder["logit_scale"])
            temperature = args.temperature or 1 / own
            scores = mean_margin(image, text, temperature, args.batch, args.repeats, args.seed, progress=True)
        else:
            scores = scores_of(args.method, image, text, labels, (rest[0], rest[1]) if rest else None, args.seed)
        picks = torch.argsort(scores, descending=True, stable=True)[:num]
        counts = {
            "samples": len(pairs),
            "invalid": len(pairs) - len(rows),
            "selected": num,
            "alignment_all": (image * text).sum(1, dtype=torch.float64).mean().item(),
            "alignment_selected": (image[picks] * text[picks]).sum(1, dtype=torch.float64).mean().item(),
        }
        write_subset(folder, pairs, rows[picks].tolist(), labels[picks].tolist(), scores[picks].tolist(), args.mds)
        paths = {key: Path(value) for key in ("folder", "learner") if (value := getattr(args, key))}
        arguments = {key: value for key, value in vars(args).items() if key != "out"} | paths
        write_source_json(folder, {"tool": "select_rivals.py", "arguments": arguments}, counts)
    return {**counts, "seconds": round(time.monotonic() - began, 3)}


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; the last line on stdout is one JSON document. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    add_subset_options(parser)
    parser.add_argument("--clusters", type=positive, default=1000, metavar="K", help="of sem_dedup (1000)")
    parser.add_argument("--temperature", type=float, metavar="T", help="of neg_clip_loss (the embedder's, or 0.01)")
    parser.add_argument("--batch", type=positive, default=32768, help="of neg_clip_loss, in samples (32768)")
    parser.add_argument("--repeats", type=positive, default=10, help="of neg_clip_loss: divisions into batches (10)")
    parser.add_argument("--learner", metavar="FOLDER", help="of c_rho: the same samples with another's embeddings")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, of --clusters and of divisions (0)")
    return report(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
