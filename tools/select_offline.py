"""CLIPCov as published, offline: rank the pairs of an MDS folder within latent classes and write the best of them.

    python tools/select_offline.py FOLDER OUT --fraction 0.1 --class-embeddings prompts.npy --mds
    python tools/select_offline.py FOLDER OUT --num 5000 --clusters 100
    composer yamls/clip_pairs.yaml stream.local=OUT/train                # with --mds

Source: Joshi, Jain, Payani, Mirzasoleiman, AISTATS 2024, arXiv 2403.12267, as its notebook clip_core.ipynb computes it.
With x_i and y_i the unit embeddings of image and caption, V_k the n_k samples of latent class k = class(i),

    S_ij  = max(<x_i, y_j>, 0)  within a class        raw_i = (1/n_k) sum_{j in V_k} (S_ij + S_ji)
    e_i   = <x_i, y_i>, not cut off at 0              L_i   = cos(y_i, text of class k)
    itc_i = <x_i, mean caption of the OTHER classes>  tic_i = <y_i, mean image of the OTHER classes>
    score = raw_i + 2 e_i + L_i / 2 - (itc_i + tic_i)

Picks are the global argmax. Class k is refreshed when its number of picks plus one is a multiple of --refresh (at 199,
399, ...); until then its scores are stale. A refresh lowers all scores of the class by

    (1/n_k) sum_{j newly picked} (S_ij + S_ji) + (1/n_k) sum_{j EVER picked} raw_j + (1/n_k) sum_{j newly picked} L_j/2

so the raw of earlier picks is subtracted once more each time, as released.

Three choices where the notebook is silent, because it loads files that were never published:
  * itc, tic: the mean cosine to every sample of the other classes, the paper's inter-class term; 0 with a single class.
  * --clusters: clusters of images have no class text; the normalized mean of a class's captions stands in for it.
  * equal scores: the lower row goes first.
Not here: the paper's double-greedy pruning, which the notebook does not have either.

OUT/subset.csv has the row in FOLDER, its uid (if there is that column), latent class, rank from 0 and score, by rank:
its first n rows are what --num n would have picked.

Costs: about 24 n dim bytes of memory, since images and captions stay on disk; similarities are never stored whole.
40,000 samples of width 64 in 100 classes: 7 s on one CPU core, 5 of them for imports.
"""

from __future__ import annotations

import argparse
import heapq
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from mds_folder import write_source_json
from pairs import positive
from subset_folder import add_subset_options, bar, open_pairs, report, subset_folder, write_subset
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int64

BLOCK = 2**21
"""Entries of a similarity matrix that are held at a time: 8 MiB in float32, which a cache holds."""


def clipcov_greedy(
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    labels: Int64[Tensor, " n"],
    num: int,
    class_text: Float[Tensor, "classes dim"] | None = None,
    refresh: int = 200,
    progress: bool = False,
) -> tuple[Int64[Tensor, " num"], Float64[Tensor, " num"]]:
    """The `num` picks of offline CLIPCov, in order, and the score of each at the moment it was picked.

    Formulas and source: the module's docstring. Between two refreshes the scores of a class are constant, so a class is
    a sorted queue and the argmax is the top of a heap over classes.

    Args:
        image, text: embeddings of any length but 0; cosines are taken. Arithmetic is theirs, at least float32, with
            sums and scores in float64.
        labels: latent class of each sample, from 0; numbers without a sample are fine.
        class_text: embedding of each class's text; None: the mean of its captions.
        refresh: picks of a class between two updates of its scores. One above the size of a class never updates it.
        progress: show bars on stderr.

    Returns:
        picks, distinct indices into the n samples, and scores. Of equal scores the lower index goes first; identical
        samples may still differ by rounding.

    Raises:
        ValueError: shapes that do not fit, num outside 1..n, refresh below 1, a label that is negative or has no
            class_text, rows that are zero or not finite.

    Costs: 4 n_k^2 dim flops per class and 4 n_k dim per pick. Memory: a sorted copy of both embeddings, and BLOCK
        similarities at a time or one row of n_k, whichever is more: never n^2, nor n_k^2 for a large class.
    """
    _check_input(image, text, labels, num, class_text, refresh)
    order = torch.argsort(labels, stable=True)  # a class is then one slice, its samples in their own order
    image, text = unit_rows(image[order]), unit_rows(text[order])
    class_text = None if class_text is None else unit_rows(class_text).to(text)
    image_sum, text_sum = (rows.sum(0, dtype=torch.float64) for rows in (image, text))
    queues: dict[int, _ClassQueue] = {}
    start = 0
    for label, size in enumerate(bar(torch.bincount(labels).tolist(), "score", "classes", progress)):
        if size == 0:
            continue
        x, y, index = (rows[start : start + size] for rows in (image, text, order))
        own_image, own_text = (rows.sum(0, dtype=torch.float64) for rows in (x, y))
        num_others = max(len(order) - size, 1)  # a single class has none; its sums are the totals, so the means are 0
        others = ((image_sum - own_image) / num_others).to(x), ((text_sum - own_text) / num_others).to(y)
        center = F.normalize(own_text, dim=0).to(y) if class_text is None else class_text[label]
        queues[label] = _ClassQueue(index, x, y, center, others, refresh)
        start += size
    heap = [queue.head(label) for label, queue in queues.items()]
    heapq.heapify(heap)
    picks, scores = [], []
    for _ in bar(range(num), "pick", "samples", progress):
        cost, index, label = heap[0]
        picks.append(index)
        scores.append(-cost)
        if queues[label].take():
            heapq.heapreplace(heap, queues[label].head(label))
        else:
            heapq.heappop(heap)
    return torch.tensor(picks), torch.tensor(scores, dtype=torch.float64)


class _ClassQueue:
    """One latent class: the scores of its samples, and those next in line until the next refresh."""

    def __init__(
        self,
        index: Tensor,
        image: Tensor,
        text: Tensor,
        class_text: Tensor,
        others: tuple[Tensor, Tensor],
        refresh: int,
    ) -> None:
        self.index, self.image, self.text, self.refresh = index, image, text, refresh
        self.raw = _cross(image, text, torch.arange(len(index))) / len(index)
        self.label = (text @ class_text).double()
        easy, inter = (image * text).sum(1).double(), (text @ others[0] + image @ others[1]).double()
        self.score = self.raw + 2 * easy + self.label / 2 - inter
        self.raw_picked, self.num_picked = 0.0, 0
        self._line_up()

    def head(self, label: int) -> tuple[float, int, int]:
        """(-score, index, label) of the next in line, ordered as a heap wants it."""
        score, index = self._line[self._next]
        return -score, index, label

    def take(self) -> bool:
        """Count the head as picked, and refresh when it is time; False once nobody is left."""
        self._next += 1
        self.num_picked += 1
        if (self.num_picked + 1) % self.refresh == 0:
            self._deduct(self._places[: self._next])
            self._line_up()
        return self._next < len(self._line)

    def _deduct(self, new: Int64[Tensor, " new"]) -> None:
        size = len(self.index)
        self.raw_picked += self.raw[new].sum().item()
        self.score -= _cross(self.image, self.text, new) / size
        self.score -= (self.raw_picked + self.label[new].sum().item() / 2) / size
        self.score[new] = -torch.inf

    def _line_up(self) -> None:
        """Sort; no more than `refresh` can be taken before the next sort."""
        left = min(len(self.index) - self.num_picked, self.refresh)
        self._places = torch.argsort(self.score, descending=True, stable=True)[:left]
        self._line = list(zip(self.score[self._places].tolist(), self.index[self._places].tolist(), strict=True))
        self._next = 0


def _cross(
    image: Float[Tensor, "size dim"], text: Float[Tensor, "size dim"], chosen: Int64[Tensor, " chosen"]
) -> Float64[Tensor, " size"]:
    """sum_{j in chosen} S_ij + S_ji for each i."""
    total = torch.zeros(len(image), dtype=torch.float64)
    for part in chosen.split(max(1, BLOCK // len(image))):
        total += (image @ text[part].T).clamp_(min=0).sum(1).double()
        total += (text @ image[part].T).clamp_(min=0).sum(1).double()
    return total


def spherical_kmeans(
    rows: Float[Tensor, "n dim"], clusters: int, seed: int = 0, iterations: int = 50, progress: bool = False
) -> Int64[Tensor, " n"]:
    """Cluster of each row by cosine: k-means++ seeding, then Lloyd's steps with normalized means.

    Args: rows: of any length but 0.  clusters: at most n.  iterations: of Lloyd's, at most; it stops when no row moves.
    Returns: cluster numbers. Some may go unused, and do where fewer directions than clusters are distinct.
    Raises: ValueError for clusters outside 1..n.
    Costs: n * clusters * dim * 2 flops for seeding and for each step; BLOCK cosines of memory. The same seed, machine
        and number of threads give the same clusters.
    """
    if not 1 <= clusters <= len(rows):
        raise ValueError(f"clusters={clusters} must be from 1 to the {len(rows)} usable samples (--clusters)")
    rows = unit_rows(rows)
    generator = torch.Generator().manual_seed(seed)
    centers = rows[torch.randint(len(rows), (1,), generator=generator)]
    distance = 1 - rows @ centers[0]
    for _ in bar(range(clusters - 1), "seed", "clusters", progress):
        distance[distance < 1e-6] = 0  # repeats of a centre: what is left of them is rounding
        cumulative = distance.double().cumsum(0)
        if cumulative[-1] == 0:
            break
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        new = rows[torch.searchsorted(cumulative, draw, right=True).clamp_(max=len(rows) - 1)]
        centers = torch.cat([centers, new])
        distance = torch.minimum(distance, 1 - rows @ new[0])
    labels = nearest(rows, centers)
    for _ in bar(range(iterations), "k-means", "steps", progress):
        sums = torch.zeros_like(centers).index_add_(0, labels, rows)
        centers = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums), centers)
        before, labels = labels, nearest(rows, centers)
        if torch.equal(before, labels):
            break
    return labels


def nearest(rows: Float[Tensor, "n dim"], centers: Float[Tensor, "classes dim"]) -> Int64[Tensor, " n"]:
    """The centre of highest inner product with each row, the first of equals; BLOCK products at a time."""
    parts = rows.split(max(1, BLOCK // len(centers)))
    return torch.cat([(part @ centers.T).argmax(1) for part in parts])


def unit_rows(rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Rows of length 1, in float32 or better. Scaled by the largest entry first, lest its square overflow."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return F.normalize(rows / rows.abs().amax(1, keepdim=True))


def usable_rows(rows: Float[Tensor, "n dim"]) -> Bool[Tensor, " n"]:
    """True where every entry is finite and one is not 0, so that the row has a direction."""
    return rows.isfinite().all(1) & (rows != 0).any(1)


def _check_input(
    image: Tensor, text: Tensor, labels: Tensor, num: int, class_text: Tensor | None, refresh: int
) -> None:
    if image.ndim != 2 or image.shape != text.shape or labels.shape != image.shape[:1]:
        shapes = ", ".join(str(tuple(part.shape)) for part in (image, text, labels))
        raise ValueError(f"image, text and labels have shapes {shapes}; they must be (n, dim), (n, dim) and (n,)")
    for name, value, most in (("num", num, len(image)), ("refresh", refresh, float("inf"))):
        if not 1 <= value <= most:
            raise ValueError(f"{name}={value} must be from 1 to {most}")
    for name, rows in {"image": image, "text": text, "class_text": class_text}.items():
        if rows is not None and not usable_rows(rows).all():
            row = int((~usable_rows(rows)).nonzero()[0])
            raise ValueError(f"{name} row {row} is zero or not finite and has no cosine; leave such rows out")
    most = float("inf") if class_text is None else len(class_text) - 1
    if labels.min() < 0 or labels.max() > most:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; they must be from 0 to {most}")
    if class_text is not None and class_text.shape[1] != image.shape[1]:
        raise ValueError(f"class_text has width {class_text.shape[1]}, the samples have {image.shape[1]}")


def load_class_text(path: str, dim: int) -> Float[Tensor, "classes dim"]:
    """Class text embeddings of a .npy file.

    Raises: ValueError for a file that cannot be read, another shape or width, and for rows without direction.
    """
    wanted = f"give a .npy file of numbers of shape (classes, {dim}) (--class-embeddings)"
    try:
        table = np.lib.format.open_memmap(Path(path).expanduser(), mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be read: {error}; {wanted}") from error
    if table.ndim != 2 or table.shape[1] != dim or len(table) == 0 or table.dtype.kind not in "fiu":
        raise ValueError(f"{path!r} holds {table.dtype} of shape {table.shape}; {wanted}")
    rows = torch.from_numpy(np.array(table, np.float32))
    if not usable_rows(rows).all():
        raise ValueError(f"{path!r}: rows {(~usable_rows(rows)).nonzero()[:5, 0].tolist()} are zero or not finite")
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line asks; returns the figures that are printed last.

    Raises: ValueError for whatever the user can mend; OUT is then as it was.
    """
    began = time.monotonic()
    pairs = open_pairs(args)
    with subset_folder(args.out, args.overwrite) as folder:
        columns = {"--image-embedding": args.image_embedding, "--text-embedding": args.text_embedding}
        image, text = pairs.embeddings(columns)
        usable = usable_rows(image) & usable_rows(text)
        rows, invalid = usable.nonzero()[:, 0], (~usable).nonzero()[:, 0].tolist()
        if invalid:
            image, text = image[rows], text[rows]
            shown = ", ".join(map(str, invalid[:20])) + (", ..." if len(invalid) > 20 else "")
            print(f"{len(invalid)} samples with a NaN, inf or zero embedding, never picked: rows {shown}")
        num = args.num or max(1, int(args.fraction * len(rows) + 1e-9))
        if num > len(rows):
            raise ValueError(f"{num} samples to pick, but {len(rows)} of {len(pairs)} are usable (--num)")
        image, text, class_text = unit_rows(image), unit_rows(text), None
        if args.class_embeddings:
            class_text = load_class_text(args.class_embeddings, image.shape[1])
            labels = nearest(image, unit_rows(class_text))
        else:
            labels = spherical_kmeans(image, args.clusters, args.seed, progress=True)
        picks, scores = clipcov_greedy(image, text, labels, num, class_text, args.refresh, progress=True)
        alignment = (image * text).sum(1, dtype=torch.float64)
        classes = len(labels.unique())
        counts = {
            "samples": len(pairs),
            "invalid": len(invalid),
            "classes": classes,
            "selected": num,
            "classes_covered": len(labels[picks].unique()) / classes,
            "alignment_all": alignment.mean().item(),
            "alignment_selected": alignment[picks].mean().item(),
        }
        write_subset(folder, pairs, rows[picks].tolist(), labels[picks].tolist(), scores.tolist(), args.mds)
        paths = {key: Path(value) for key in ("folder", "class_embeddings") if (value := getattr(args, key))}
        arguments = {key: value for key, value in vars(args).items() if key != "out"} | paths
        write_source_json(folder, {"tool": "select_offline.py", "arguments": arguments}, counts)
    return {**counts, "seconds": round(time.monotonic() - began, 3)}


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; the last line on stdout is one JSON document. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subset_options(parser)
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument("--class-embeddings", metavar="FILE", help=".npy (classes, dim): class texts, embedded")
    classes.add_argument("--clusters", type=positive, metavar="K", help="spherical k-means of the images instead")
    parser.add_argument("--seed", type=int, default=0, help="of --clusters (0)")
    parser.add_argument("--image-embedding", default="image_embedding", metavar="NAME", help="column (image_embedding)")
    parser.add_argument("--text-embedding", default="text_embedding", metavar="NAME", help="column (text_embedding)")
    parser.add_argument("--refresh", type=positive, default=200, help="picks of a class between updates of it (200)")
    return report(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
