"""A corpus held in memory, with known faults, for benchmarks that train the same small model many times.

    shapes=data/shapes                             a folder of `make_mds.py synthetic`: its own truth and eval split
    fashion=data/fashion                           a folder of `make_mds.py classes`: an eval split is held out
    fashion_noisy=data/fashion:mismatched=0.4,duplicates=0.2
    fashion_1=data/fashion:seed=1                  another draw of what is held out, and of the faults; 0 if not given

Images are decoded and captions tokenized once, by the same code that trains.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from clipcov_stream.materialize import ImageTransform
from clipcov_stream.stream import Columns, PairDataset

SIZE, CONTEXT = 32, 24
EVAL_PER_CLASS, LEAST_PER_CLASS = 32, 24


@dataclass(frozen=True)
class Split:
    """Samples in memory. `image` (n, 3, s, s) uint8, `text` (n, context) token ids, `label` (n,) true classes."""

    image: Tensor
    text: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def at(self, rows: Any) -> Split:
        return Split(self.image[rows], self.text[rows], self.label[rows])


@dataclass(frozen=True)
class Corpus:
    """A training stream with its truth, and a clean evaluation split.

    Args:
        train, eval: samples. A training sample's `label` is its image's class, whatever its caption says.
        mismatched, duplicate: (n,) bool, the truth about each training sample: its caption is another image's or says
            nothing; it is a copy of a hot sample.
        prompts: (classes, templates, context) token ids.
        vocab_size: token ids are below it; they are renumbered so that small models need no large table.
    """

    name: str
    train: Split
    eval: Split
    mismatched: Tensor
    duplicate: Tensor
    prompts: Tensor
    vocab_size: int


def load_corpus(text: str) -> Corpus:
    """A corpus from `NAME=FOLDER[:mismatched=F,duplicates=F,seed=N]`.

    Raises:
        ValueError: another form, or a folder without what is needed.
    """
    name, separator, rest = text.partition("=")
    folder, _, faults = rest.partition(":")
    if not separator or not name or not folder:
        raise ValueError(f"--corpus {text!r} is not of the form NAME=FOLDER[:mismatched=F,duplicates=F,seed=N]")
    given: dict[str, str] = {}
    for item in filter(None, faults.split(",")):
        key, _, value = item.partition("=")
        if not (fraction(value) if key in ("mismatched", "duplicates") else key == "seed" and value.isdecimal()):
            raise ValueError(
                f"--corpus {text!r}: {item!r} must be mismatched or duplicates, with a fraction in [0, 1), or seed, "
                "with a whole number"
            )
        given[key] = value
    path = Path(folder)
    if (path / "train" / "index.json").is_file():
        if any(float(value) for value in given.values()):
            raise ValueError(
                f"--corpus {text!r}: a drawn corpus has its faults already; make_mds.py synthetic draws others"
            )
        corpus = drawn(name, path)
    else:
        seed, *doses = int(given.get("seed", 0)), float(given.get("mismatched", 0)), float(given.get("duplicates", 0))
        corpus = spoilt(held_out(name, path, seed), *doses, seed=seed + 1)
    return renumbered(corpus)


def fraction(text: str) -> bool:
    """Whether it is a number in [0, 1)."""
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def drawn(name: str, folder: Path) -> Corpus:
    """A corpus of `make_mds.py synthetic`."""
    train, truth = read(folder / "train", "class_id", ("mismatched", "generic", "duplicate_of"))
    split, _ = read(folder / "eval", "label")
    return Corpus(
        name,
        train,
        split,
        mismatched=truth["mismatched"] | truth["generic"],
        duplicate=truth["duplicate_of"],
        prompts=prompts_of(folder / "eval"),
        vocab_size=49408,
    )


def held_out(name: str, folder: Path, seed: int) -> Corpus:
    """A labelled folder, with a balanced evaluation split taken out of the classes that can spare it.

    The classes evaluated are those with at least `LEAST_PER_CLASS` samples, or the ten largest if there are fewer; each
    gives up to `EVAL_PER_CLASS` samples, at most a third of what it has. An image that is held out leaves the training
    split with all its captions and copies.
    """
    every, _ = read(folder, "label")
    order = np.random.default_rng(seed).permutation(len(every))
    labels = every.label.numpy()[order]
    counts = np.bincount(labels)
    classes = np.flatnonzero(counts >= LEAST_PER_CLASS)
    if len(classes) < 10:
        classes = np.sort(np.argsort(-counts)[:10])
    held = np.concatenate([order[labels == c][: min(EVAL_PER_CLASS, counts[c] // 3)] for c in classes])
    image = identical(every.image)
    rest = np.flatnonzero(~np.isin(image, image[held]))
    split = every.at(torch.from_numpy(held))
    number = torch.full((len(counts),), -1)
    number[classes] = torch.arange(len(classes))
    clean = torch.zeros(len(rest), dtype=torch.bool)
    return Corpus(
        name,
        every.at(torch.from_numpy(rest)),
        replace(split, label=number[split.label]),
        mismatched=clean,
        duplicate=clean,
        prompts=prompts_of(folder)[classes],
        vocab_size=49408,
    )


def identical(image: Tensor) -> NDArray[np.int64]:
    """(n,) numbers, equal for images of equal pixels."""
    rows = np.ascontiguousarray(image.flatten(1).numpy())
    return np.unique(rows.view(np.dtype((np.void, rows.shape[1]))).ravel(), return_inverse=True)[1].ravel()


def spoilt(corpus: Corpus, mismatched: float, duplicates: float, seed: int) -> Corpus:
    """The corpus with captions shuffled among a fraction of its samples, and a fraction replaced by 40 hot ones."""
    rng, train = np.random.default_rng(seed), corpus.train
    source = np.arange(len(train))
    copies = rng.permutation(len(train))[: round(duplicates * len(train))]
    hot = rng.permutation(len(train))[:40]
    share = 1 / np.arange(1, len(hot) + 1)
    source[copies] = rng.choice(hot, len(copies), p=share / share.sum())
    train = train.at(torch.from_numpy(source))
    wrong = rng.permutation(len(train))[: round(mismatched * len(train))]
    text = train.text.clone()
    text[wrong] = train.text[np.roll(wrong, 1)]
    flags = {"mismatched": np.isin(np.arange(len(train)), wrong), "duplicate": np.isin(np.arange(len(train)), copies)}
    return replace(corpus, train=replace(train, text=text), **{k: torch.from_numpy(v) for k, v in flags.items()})


def read(folder: Path, label: str, truth: tuple[str, ...] = ()) -> tuple[Split, dict[str, Tensor]]:
    """Every sample of an MDS folder, and which of them have something in the columns of truth."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    dataset = PairDataset(
        local=str(folder),
        columns=Columns(label=label),
        transform=ImageTransform(SIZE),
        tokenizer=lambda caption: tokenizer(caption)[0],
        batch_size=1,
    )
    image = torch.zeros(len(dataset), 3, SIZE, SIZE, dtype=torch.uint8)
    text = torch.zeros(len(dataset), CONTEXT, dtype=torch.int64)
    labels = torch.zeros(len(dataset), dtype=torch.int64)
    flags = {key: torch.zeros(len(dataset), dtype=torch.bool) for key in truth}
    for row in tqdm(range(len(dataset)), desc=f"reading {folder}", mininterval=2):
        sample = dataset.get_item(row)
        image[row], text[row], labels[row] = sample["image"], sample["text"], sample["label"]
        if truth:
            raw = dataset.readable(super(PairDataset, dataset).get_item(row))
            for key in truth:
                flags[key][row] = bool(raw[key])
    return Split(image, text, labels), flags


def prompts_of(folder: Path) -> Tensor:
    """(classes, templates, context) token ids of a folder's classes.json."""
    classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    names, templates = classes["classnames"], classes["templates"]
    return torch.stack([tokenizer([template.replace("{}", name) for template in templates]) for name in names])


def renumbered(corpus: Corpus) -> Corpus:
    """Token ids renumbered without gaps; the order, and so padding as 0, stays."""
    texts = (corpus.train.text, corpus.eval.text, corpus.prompts)
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), *(text.flatten() for text in texts)]).unique()
    train, split, prompts = (torch.searchsorted(ids, text) for text in texts)
    return replace(
        corpus,
        train=replace(corpus.train, text=train),
        eval=replace(corpus.eval, text=split),
        prompts=prompts,
        vocab_size=len(ids),
    )
