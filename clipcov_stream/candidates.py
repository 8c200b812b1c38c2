"""Candidates of one step, read once more: a few to look at, and counts of all by what is known of them.

Dropped candidates are normally never decoded, and training reads none of the columns that know the truth. So they are
read here by their ids, from the shards that the stream has just gone through, and the few that are shown are decoded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from clipcov_stream.decode import UndecodableImage, decode_image
from clipcov_stream.objective import mix
from clipcov_stream.ranges import Span
from clipcov_stream.sidecar import SPAN_COLUMN
from clipcov_stream.stream import PairDataset

CLASS, DUPLICATE, FLAGS = "class_id", "duplicate_of", ("mismatched", "generic")
"""Columns that know the truth: class, name of what is repeated or "", and whether it is so, 0 or 1."""
SHOWN = 12
"""Kept candidates, and dropped ones, of a recorded step."""
LOOKED_AT = 1024
"""Candidates of a pool that are read for the counts, at most; of larger pools so many drawn at random."""
SIDE = 80
"""Of thumbnails, in pixels."""
NUM_WORDS = 60
LONGEST_CAPTION = 300
COMMON = {
    *("and", "are", "but", "for", "from", "has", "have", "her", "his", "into", "its", "not", "our", "that", "the"),
    *("their", "this", "was", "were", "with", "you", "your"),
}
"""Words that say nothing by themselves."""

Counts = dict[str, list[int]]
"""Candidates and survivors, by kind."""


@dataclass(frozen=True)
class Noted:
    """A step's pool and survivors, on the CPU.

    Args:
        candidates: ids of this rank's pool.
        survivors: ids of what was kept of it, and perhaps of other ranks' pools, in the order chosen.
        gain: of each survivor when it was picked, NaN where nothing was gained; None if selection keeps no gains.
        alignment: cosine of each candidate's image and caption; None if nothing was embedded.
        is_warmup: survivors are random because selection has not begun.
    """

    candidates: list[int]
    survivors: list[int]
    gain: list[float] | None
    alignment: list[float] | None
    is_warmup: bool


Entry = tuple[dict[str, Any], Image.Image]
"""What is said of a candidate that is shown, and its thumbnail."""


def recorded(taken: Noted, step: int, loader: Any, words: Sequence[str] | None) -> tuple[dict[str, Any], list[Entry]]:
    """A step's record, and the entries that it shows.

    Args:
        taken: the step's pool and survivors.
        step: its number.
        loader: a `PoolLoader`, of whose data set samples are read.
        words: to count in captions; None takes the most frequent ones of this pool.

    Costs: one read of at most LOOKED_AT encoded samples and 2 * SHOWN more, which are decoded.
    """
    dataset, rows = loader.dataset, range(len(taken.candidates))
    place = {sample: number for number, sample in enumerate(taken.survivors)}
    to_show = chosen_to_show(taken, place)
    generator = torch.Generator().manual_seed(mix(step))
    looked_at = torch.randperm(len(rows), generator=generator)[:LOOKED_AT].tolist()
    read = {row: read_sample(dataset, taken.candidates[row]) for row in {*looked_at, *to_show}}
    samples = {row: sample for row, sample in read.items() if sample is not None}
    to_show = [row for row in to_show if row in samples]
    images = encoded_images(loader, [samples[row] for row in to_show])
    pictures = {row: thumbnail(image) for row, image in zip(to_show, images, strict=True)}
    entries = [
        ({**told(taken, row, place), **said(samples[row], dataset.columns.caption)}, picture)
        for row, picture in pictures.items()
        if picture is not None
    ]
    found = [(samples[row], taken.candidates[row] in place) for row in looked_at if row in samples]
    record = {
        "step": step,
        "is_warmup": taken.is_warmup,
        "pool_size": len(rows),
        "num_kept": sum(sample in place for sample in taken.candidates),
        "looked_at": [len(found), sum(kept for _, kept in found)],
        "num_unread": len(looked_at) - len(found),
        "num_undecodable": len(pictures) - len(entries),
        **counted(found, dataset.columns.caption, dataset.columns.image, words),
        "shown": [{**entry, **encoded_thumbnail(picture)} for entry, picture in entries],
    }
    return record, entries


def chosen_to_show(taken: Noted, place: Mapping[int, int]) -> list[int]:
    """Rows of the pool: SHOWN kept ones from the first pick to the last, and as many dropped ones from the best aligned
    to the worst, or in the pool's order."""
    rows, sample = range(len(taken.candidates)), taken.candidates
    kept = sorted((row for row in rows if sample[row] in place), key=lambda row: place[sample[row]])
    dropped = [row for row in rows if sample[row] not in place]
    if taken.alignment is not None:
        alignment = np.nan_to_num(taken.alignment, nan=-2.0)
        dropped.sort(key=lambda row: -alignment[row])
    return [*evenly(kept, SHOWN), *evenly(dropped, SHOWN)]


def told(taken: Noted, row: int, place: Mapping[int, int]) -> dict[str, Any]:
    """What selection said of a candidate: whether, in which place and for which gain it was kept, and its alignment."""
    sample = taken.candidates[row]
    entry: dict[str, Any] = {"id": sample, "kept": sample in place}
    if sample in place:
        entry["place"] = place[sample]
        if taken.gain is not None and np.isfinite(taken.gain[place[sample]]):
            entry["gain"] = taken.gain[place[sample]]
    if taken.alignment is not None and np.isfinite(taken.alignment[row]):
        entry["alignment"] = taken.alignment[row]
    return entry


def evenly(rows: Sequence[int], most: int) -> list[int]:
    """At most `most` of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def read_sample(dataset: PairDataset, sample_id: int) -> dict[str, Any] | None:
    """All columns of a sample, texts and numbers decoded; None if its shard is not at hand any more."""
    shard, row = dataset.spanner[sample_id]
    try:
        return dataset.readable(dataset.shards[shard][row])
    except (OSError, IndexError, ValueError):  # a cache with a limit has let go of it, perhaps just now
        return None


def encoded_images(loader: Any, samples: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Encoded images of samples; a folder that is read by ranges is asked for them."""
    if loader.dataset.source is None:
        return [loader.dataset.encoded_image(sample) for sample in samples]
    return list(loader.materialize.fetch([Span(*sample[SPAN_COLUMN].tolist()) for sample in samples]))


def thumbnail(encoded: Any) -> Image.Image | None:
    """At most SIDE pixels wide and high; None where there is no image in it."""
    try:
        image = decode_image(encoded.result() if isinstance(encoded, Future) else encoded, SIDE)
    except UndecodableImage:
        return None
    image.thumbnail((SIDE, SIDE))
    return image


def encoded_thumbnail(picture: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return {"jpeg": base64.b64encode(buffer.getvalue()).decode(), "width": picture.width, "height": picture.height}


def said(sample: Mapping[str, Any], caption: str | None) -> dict[str, Any]:
    """A sample's caption, and what its folder knows about it."""
    known: dict[str, Any] = {"caption": "" if caption is None else str(sample[caption])[:LONGEST_CAPTION]}
    if CLASS in sample:
        known["class"] = str(sample[CLASS])
    if flags := [flag for flag in FLAGS if sample.get(flag)]:
        known["flags"] = flags
    if sample.get(DUPLICATE):
        known["duplicate_of"] = str(sample[DUPLICATE])
    return known


def counted(
    found: Sequence[tuple[Mapping[str, Any], bool]], caption: str | None, image: str, words: Sequence[str] | None
) -> dict[str, Any]:
    """Candidates and survivors by kind.

    Returns: `classes` by their value; `flags`; `copies`, those that say what they are a duplicate of, or else those
        whose bytes the pool has twice; `groups` of copies, those with a candidate and those with a survivor;
        `copies_by`, what makes them copies, None where images were not read; `words`, those whose captions have a word.
    """
    columns = found[0][0] if found else {}
    captions = [vocabulary(str(sample[caption])) if caption else set() for sample, _ in found]
    if words is None:
        every = Counter(word for caption_words in captions for word in sorted(caption_words))
        words = [word for word, _ in every.most_common(NUM_WORDS)]
    of_words: Counts = {word: [0, 0] for word in words}
    for caption_words, (_, kept) in zip(captions, found, strict=True):
        for word in caption_words & of_words.keys():
            of_words[word][0] += 1
            of_words[word][1] += kept
    record: dict[str, Any] = {"words": of_words}
    if CLASS in columns:
        record["classes"] = tally((str(sample[CLASS]), kept) for sample, kept in found)
    if flags := [flag for flag in FLAGS if flag in columns]:
        record["flags"] = {flag: [0, 0] for flag in flags}
        record["flags"] |= tally((flag, kept) for sample, kept in found for flag in flags if sample[flag])
    by = DUPLICATE if DUPLICATE in columns else "bytes" if isinstance(columns.get(image), bytes) else None
    groups = tally((name, kept) for sample, kept in found if (name := copy_name(sample, by, image)))
    if by == "bytes":
        groups = {name: counts for name, counts in groups.items() if counts[0] > 1}
    record["copies_by"] = by
    record["copies"] = [sum(counts[side] for counts in groups.values()) for side in (0, 1)]
    record["groups"] = [len(groups), sum(counts[1] > 0 for counts in groups.values())]
    return record


def copy_name(sample: Mapping[str, Any], by: str | None, image: str) -> str | None:
    """What is the same for all copies of a sample; None for a sample that is known to be none."""
    if by == "bytes":
        return hashlib.sha1(sample[image]).hexdigest()
    return None if by is None else str(sample[by])


def tally(kinds: Iterable[tuple[str, bool]]) -> Counts:
    """Candidates and survivors of each kind."""
    counts: Counts = {}
    for kind, kept in kinds:
        of_kind = counts.setdefault(kind, [0, 0])
        of_kind[0] += 1
        of_kind[1] += kept
    return counts


def vocabulary(caption: str) -> set[str]:
    """The words of a caption that say something, in lower case."""
    return set(re.findall(r"[^\W\d_]{3,24}", caption.lower())) - COMMON


def class_names(dataset: PairDataset) -> list[str] | None:
    """What the stream's own classes.json calls its classes; None where it has none."""
    stream = dataset.streams[0]
    try:
        names = json.loads(Path(stream.local, stream.split or "", "classes.json").read_bytes())["classnames"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names]


def contact_sheet(entries: Sequence[tuple[dict[str, Any], Image.Image]]) -> np.ndarray:
    """(height, width, 3) uint8: thumbnails in rows of six, with the beginning of their captions below."""
    across, line = 6, 11
    cell = (SIDE + 12, SIDE + 3 * line + 8)
    sheet = Image.new("RGB", (across * cell[0], max(1, -(-len(entries) // across)) * cell[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=line - 2)
    for number, (entry, picture) in enumerate(entries):
        left, top = number % across * cell[0] + 6, number // across * cell[1] + 4
        sheet.paste(picture, (left, top))
        text = re.sub(r"\s+", " ", entry["caption"])
        for row, start in enumerate(range(0, min(len(text), 54), 18)):
            draw.text((left, top + SIDE + row * line), text[start : start + 18], fill="black", font=font)
    return np.asarray(sheet)
