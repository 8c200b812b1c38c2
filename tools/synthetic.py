"""Draws an image-caption corpus: coloured, textured shapes, long-tailed, with the faults of web data built in.

A class is a (texture, colour, shape) triple; count, position and background vary freely and are what captions also
talk about. Web faults come in known doses: captions that belong to another image, near-duplicates of a few hot images,
captions that say nothing. The truth about each sample stands in columns (`class_id`, `mismatched`, `generic`,
`duplicate_of`) that training never reads. Everything derives from (seed, split, index), so any sample can be redrawn.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from classes import write_classes_json
from mds_folder import mds_split
from numpy.typing import NDArray
from PIL import Image
from staged_folder import staged_folder
from tqdm import tqdm

SHAPES = ("circle", "triangle", "cross", "ring")
COLOURS = {
    "red": (205, 40, 40),
    "orange": (240, 130, 20),
    "yellow": (235, 220, 50),
    "green": (50, 150, 60),
    "teal": (40, 165, 170),
    "blue": (45, 80, 205),
    "purple": (130, 55, 165),
    "pink": (240, 130, 180),
    "brown": (120, 75, 40),
    "silver": (170, 175, 180),
}
TEXTURES = ("plain", "striped", "spotted")
BACKGROUNDS = {
    "white": (240, 240, 240),
    "slate": (95, 105, 120),
    "black": (25, 25, 25),
    "sandy": (215, 195, 150),
    "sky": (165, 205, 235),
    "mint": (180, 225, 195),
}
POSITIONS = {"left": (-0.3, 0.0), "right": (0.3, 0.0), "top": (0.0, -0.3), "bottom": (0.0, 0.3), "middle": (0.0, 0.0)}
COUNTS = ("one", "two", "three")
COLOUR_WORDS = {
    "red": ("scarlet", "crimson"),
    "orange": ("tangerine", "amber"),
    "yellow": ("golden", "lemon"),
    "green": ("emerald", "leaf green"),
    "teal": ("turquoise", "cyan"),
    "blue": ("azure", "navy"),
    "purple": ("violet", "plum"),
    "pink": ("rose", "salmon"),
    "brown": ("chestnut", "chocolate"),
    "silver": ("grey", "metallic"),
}
TEXTURE_WORDS = {"plain": ("solid", "flat"), "striped": ("banded", "lined"), "spotted": ("dotted", "speckled")}
WORDINGS = (
    "{count} {thing} on a {background} background",
    "{thing}, {position} of the picture",
    "a drawing of {count} {thing}",
    "{background} card with {count} {thing} at the {position}",
    "{thing}",
    "at the {position}: {count} {thing}",
    "clip art, {thing}, {background}",
    "my new sticker shows {count} {thing}",
    "{count} {thing}",
    "sale! {thing} print, {background} paper",
    "a picture with {thing} placed {position}",
    "look, {count} {thing} over {background}",
)
GENERIC = (
    "image",
    "untitled",
    "free download",
    "click to enlarge",
    "picture of the day",
    "a nice drawing",
    "high quality print",
    "new in our shop",
    "clip art",
    "graphic design idea",
)
TEMPLATES = ("{}", "a drawing of {}", "a picture with {}", "one {}", "two {}", "{} on a white background")
COLUMNS = {"image": "bytes", "caption": "str", "uid": "str", "class_id": "int", "mismatched": "int", "generic": "int"}
TRAIN_COLUMNS = {**COLUMNS, "duplicate_of": "str"}
EVAL_COLUMNS = {"image": "bytes", "caption": "str", "uid": "str", "label": "int"}

Class = tuple[str, str, str]


@dataclass(frozen=True)
class Scene:
    """What an image shows: its class and the free attributes."""

    kind: Class
    count: int
    position: str
    background: str
    seed: int


def class_name(kind: Class) -> str:
    texture, colour, shape = kind
    return f"{texture} {colour} {shape}"


def draw_classes(num_classes: int, seed: int) -> list[Class]:
    """`num_classes` distinct triples, in the order of their frequency."""
    every = list(itertools.product(TEXTURES, COLOURS, SHAPES))
    if not 2 <= num_classes <= len(every):
        raise ValueError(f"--classes {num_classes} must be from 2 to {len(every)}")
    order = np.random.default_rng([seed, 1]).permutation(len(every))
    return [every[i] for i in order[:num_classes]]


def shape_mask(shape: str, u: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """Where a shape of unit radius is, on coordinates u (right) and v (down)."""
    r2 = u * u + v * v
    if shape == "circle":
        return r2 < 0.9
    if shape == "triangle":
        return (v < 0.6) & (v > 1.9 * abs(u) - 0.95)
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95)
    if shape == "ring":
        return (r2 > 0.3) & (r2 < 0.95)
    raise ValueError(f"unknown shape {shape!r}")


def texture_mask(texture: str, u: NDArray[Any], v: NDArray[Any], angle: float) -> NDArray[Any]:
    """Where a texture's second tone is."""
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = u * cos + v * sin, v * cos - u * sin
    if texture == "striped":
        return np.sin(8.0 * a) > 0
    if texture == "spotted":
        return np.cos(6.5 * a) + np.cos(6.5 * b) > 0.7
    return np.zeros_like(u, dtype=bool)


@functools.cache
def grid(side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Coordinates from -1 to 1 of a square's pixels: right, down."""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def render(scene: Scene, size: int) -> NDArray[np.uint8]:
    """(size, size, 3) pixels of a scene, drawn at twice the size and averaged down."""
    rng = np.random.default_rng(scene.seed)
    x, y = grid(2 * size)
    base = (np.array(BACKGROUNDS[scene.background]) + rng.normal(0, 8, 3)).astype(np.float32)
    slope = rng.normal(0, 10, (2, 1, 1, 3)).astype(np.float32)
    image = base + slope[0] * x[..., None] + slope[1] * y[..., None]
    texture, colour, shape = scene.kind
    tone = np.array(COLOURS[colour], dtype=np.float32) + rng.normal(0, 12, 3)
    second = tone * 0.45 if tone.mean() > 100 else tone * 0.5 + 120
    center = np.array(POSITIONS[scene.position]) * (1.0 if scene.count == 1 else 0.5) + rng.normal(0, 0.08, 2)
    radius = (0.75, 0.52, 0.46)[scene.count - 1] * float(rng.uniform(0.85, 1.15))
    start = rng.uniform(0, 2 * np.pi)
    for number in range(scene.count):
        turn = start + 2 * np.pi * number / scene.count
        reach = 0.0 if scene.count == 1 else 1.2 * radius
        offset = center + reach * np.array([np.cos(turn), np.sin(turn)])
        tilt = float(rng.uniform(-0.35, 0.35))
        # Python floats keep the arrays in float32, half the time of float64.
        dx, dy = (x - float(offset[0])) / radius, (y - float(offset[1])) / radius
        cos, sin = math.cos(tilt), math.sin(tilt)
        u, v = dx * cos + dy * sin, dy * cos - dx * sin
        inside = shape_mask(shape, u, v)
        image[inside] = tone
        image[inside & texture_mask(texture, u, v, rng.uniform(-0.4, 0.4))] = second
    small = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4
    small += rng.normal(0, 5, (size, size, 3))
    return small.clip(0, 255).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def near_duplicate(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The same picture, shifted by up to a pixel and a little brighter or darker, as re-uploads are."""
    shift = rng.integers(-1, 2, 2)
    moved = np.roll(pixels, tuple(shift), axis=(0, 1)).astype(np.float32)
    return (moved * rng.uniform(0.92, 1.08)).clip(0, 255).astype(np.uint8)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of a scene: one of many wordings, with synonyms now and then."""
    texture, colour, shape = scene.kind
    if rng.random() < 0.25:
        colour = pick(rng, COLOUR_WORDS[colour])
    if rng.random() < 0.25:
        texture = pick(rng, TEXTURE_WORDS[texture])
    noun = shape if scene.count == 1 else (shape + "es" if shape.endswith("s") else shape + "s")
    return pick(rng, WORDINGS).format(
        thing=f"{texture} {colour} {noun}",
        count=COUNTS[scene.count - 1],
        position=scene.position,
        background=scene.background,
    )


def draw_scene(rng: np.random.Generator, kind: Class) -> Scene:
    return Scene(
        kind=kind,
        count=int(rng.integers(1, 4)),
        position=pick(rng, tuple(POSITIONS)),
        background=pick(rng, tuple(BACKGROUNDS)),
        seed=int(rng.integers(1 << 62)),
    )


@dataclass(frozen=True)
class Corpus:
    """The law that training samples are drawn from.

    Args:
        classes: in order of frequency.
        tail: class k has weight (k + 1) ** -tail; 0 is balanced.
        mismatched, duplicates, generic: shares of samples with another scene's caption, that repeat a hot scene, and
            whose caption says nothing.
        num_hot: how many hot scenes recur.
        size: side of the images, in pixels.
    """

    classes: list[Class]
    tail: float
    mismatched: float
    duplicates: float
    generic: float
    num_hot: int
    size: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("mismatched", "duplicates", "generic"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be in [0, 1]")
        if self.tail < 0 or self.num_hot < 1 or self.size < 8:
            raise ValueError(
                f"--tail {self.tail} must be at least 0, --hot {self.num_hot} at least 1, --size {self.size} at least 8"
            )

    @functools.cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        weights = np.cumsum(np.arange(1, len(self.classes) + 1) ** -float(self.tail))
        return weights / weights[-1]

    def draw_class(self, rng: np.random.Generator) -> int:
        return int(np.searchsorted(self._cumulative, rng.random(), side="right"))

    def sample(self, index: int) -> dict[str, Any]:
        """Sample number `index` of the training split."""
        rng = np.random.default_rng([self.seed, 2, index])
        is_duplicate = rng.random() < self.duplicates
        if is_duplicate:
            hot = int(rng.integers(self.num_hot))
            law = np.random.default_rng([self.seed, 3, hot])
        else:
            hot, law = -1, rng
        class_id = self.draw_class(law)
        scene = draw_scene(law, self.classes[class_id])
        # A hot scene recurs with its faults: its caption is drawn from its own law.
        mismatched, generic = law.random() < self.mismatched, law.random() < self.generic
        told = draw_scene(law, self.classes[self.draw_class(law)]) if mismatched else scene
        caption = pick(law, GENERIC) if generic else describe(told, law)
        pixels = render(scene, self.size)
        if is_duplicate:
            pixels = near_duplicate(pixels, rng)
            if not generic and rng.random() < 0.5:
                caption = describe(told, rng)
        return {
            "image": jpeg(pixels, int(rng.integers(85, 96))),
            "caption": caption,
            "uid": f"train-{index:08d}",
            "class_id": class_id,
            "mismatched": int(mismatched),
            "generic": int(generic),
            "duplicate_of": f"hot-{hot:04d}" if is_duplicate else "",
        }

    def eval_sample(self, index: int) -> dict[str, Any]:
        """Sample number `index` of the clean, balanced evaluation split; classes take turns."""
        rng = np.random.default_rng([self.seed, 4, index])
        label = index % len(self.classes)
        scene = draw_scene(rng, self.classes[label])
        return {
            "image": jpeg(render(scene, self.size), 92),
            "caption": describe(scene, rng),
            "uid": f"eval-{index:08d}",
            "label": label,
        }


def add_parser(subparsers: Any) -> None:
    """Add `synthetic OUT` to the command line."""
    parser = subparsers.add_parser(
        "synthetic",
        help="draw a corpus with known faults: OUT/train and OUT/eval",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; holds train/ and eval/")
    parser.add_argument("--samples", type=int, default=40_000, help="size of the training split")
    parser.add_argument("--classes", type=int, default=120, help="number of (texture, colour, shape) classes")
    parser.add_argument("--eval-per-class", type=int, default=8, help="images per class of the eval split")
    parser.add_argument("--size", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--tail", type=float, default=1.0, help="Zipf exponent of the class frequencies; 0 is balanced")
    parser.add_argument("--mismatched", type=float, default=0.4, help="share of captions that belong to another image")
    parser.add_argument("--duplicates", type=float, default=0.2, help="share of samples that repeat a hot image")
    parser.add_argument("--hot", type=int, default=64, help="number of hot images")
    parser.add_argument("--generic", type=float, default=0.1, help="share of captions that say nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw both splits; OUT appears only when both are complete."""
    if args.samples < 1 or args.eval_per_class < 1:
        raise ValueError(f"--samples {args.samples} and --eval-per-class {args.eval_per_class} must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be at least 0")
    classes = draw_classes(args.classes, args.seed)
    corpus = Corpus(classes, args.tail, args.mismatched, args.duplicates, args.generic, args.hot, args.size, args.seed)
    options = {key: value for key, value in vars(args).items() if key not in ("run", "out", "overwrite", "command")}
    source = {"tool": "make_mds.py synthetic", **options}
    with staged_folder(args.out, overwrite=args.overwrite) as folder:
        with mds_split(folder / "train", TRAIN_COLUMNS, source=source) as writer:
            for index in tqdm(range(args.samples), desc="train", unit="sample"):
                writer.write(corpus.sample(index))
        with mds_split(folder / "eval", EVAL_COLUMNS, source=source) as writer:
            for index in tqdm(range(args.eval_per_class * len(classes)), desc="eval", unit="sample"):
                writer.write(corpus.eval_sample(index))
        for split in ("train", "eval"):
            write_classes_json(folder / split, [class_name(kind) for kind in classes], TEMPLATES)
    print(
        f"{Path(args.out)}: {args.samples} training samples of {len(classes)} classes "
        f"({args.mismatched:.0%} mismatched, {args.duplicates:.0%} near-duplicates, {args.generic:.0%} generic), "
        f"{args.eval_per_class * len(classes)} for evaluation"
    )
