"""What selection kept and what it dropped, now and then, for a report and for loggers that take images.

    gallery.jsonl        a header, then a line of JSON per recorded step (`candidates.recorded`)

Where a folder knows the truth about its samples (columns `class_id`, `duplicate_of`, `mismatched`, `generic`, as
`tools/make_mds.py synthetic` writes them) candidates and survivors are counted by it; elsewhere by the words of their
captions, and by equal bytes of their images.

A step is written by one call once its optimizer step is done, so a process that is killed leaves whole lines and at
most one torn at the end. A resumed run drops the lines of steps that are to come; one that starts anew sets a gallery
of its name aside, as gallery.jsonl.1, gallery.jsonl.2, ..., with a warning.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from torch import Tensor

from clipcov_stream.candidates import Noted, class_names, contact_sheet, recorded
from clipcov_stream.records import GALLERY_FILE, read_gallery, set_aside
from clipcov_stream.stream import PairDataset

MOST_BYTES = 32 << 20
"""Of the file: a record takes about 60 kB, so the default interval of a twentieth stays far below."""


class Gallery(Callback):
    """Records what was kept and dropped in `folder`; give it to the Trainer as a callback, beside `ClipCov`.

    With several ranks it is rank 0's pool that is recorded. Loggers that take images (TensorBoard, W&B, MLflow) get a
    sheet of each, `gallery/kept` and `gallery/dropped`.

    Args:
        folder: local. Of one run alone.
        interval: between recorded steps, as a Composer time in batches ("50ba") or of the whole run ("0.05dur").
        about: what tells runs apart (seed, selector, ...), strings and numbers, for the header.

    Raises:
        ValueError: a remote folder, an interval in another unit; at the start of training a folder with another run's
            gallery, and data that is not a `PairDataset`.

    Costs: per recorded step, one read of at most LOOKED_AT encoded samples, and 2 * SHOWN decoded.
    """

    def __init__(self, folder: str, interval: str | int = "0.05dur", **about: str | float | None) -> None:
        if "://" in folder:
            raise ValueError(f"gallery={folder!r} is remote, where nothing can be appended to a file; give a local one")
        self.path = Path(folder) / GALLERY_FILE
        self.interval = parse_interval(interval)
        self.about = about
        self._every, self._is_full = 1, False
        self._words: list[str] | None = None
        self._noted: Noted | None = None
        self._has_order = True

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop what an earlier process recorded of the steps that are to come."""
        self._every, self._noted = batches_of(self.interval, state), None
        dataset = getattr(state.dataloader, "dataset", None)
        if not isinstance(dataset, PairDataset):
            raise ValueError(f"gallery: candidates are read from a PairDataset, not {type(dataset).__name__}")
        notes_alignment(state)
        if dist.get_global_rank() != 0:
            return
        run = {"version": 1, "run_name": state.run_name, **self.about}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        records = []
        if self.path.exists():
            saved, records = read_gallery(self.path)
            other = [f"{key}={saved.get(key)!r}, not {run[key]!r}" for key in run if saved.get(key) != run[key]]
            if other:
                raise ValueError(f"{self.path} is the gallery of a run with {'; '.join(other)}; give another folder")
        step = int(state.timestamp.batch)
        if step == 0 and records:
            set_aside(self.path, "gallery")
        records = [record for record in records if record["step"] < step]
        self._words = next((list(record["words"]) for record in records if record["words"]), None)
        header = {**run, "classes": class_names(dataset)}
        new = self.path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in (header, *records)), encoding="utf-8")
        new.replace(self.path)

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Note the pool and its survivors: algorithms run before callbacks, so these are chosen."""
        if (int(state.timestamp.batch) + 1) % self._every:
            return
        selecting = [each for each in state.algorithms if getattr(each, "pool_ids", None) is not None]
        if not selecting:
            raise ValueError(
                "gallery: no algorithm says what its candidates were; it needs ClipCov, and pools with 'id'"
            )
        selection: Any = selecting[0]
        self._noted = noted(selection)
        num_ranks = dist.get_world_size() if selection.scope == "global" else 1
        self._has_order = has_order(self._noted.gain, num_ranks)

    def batch_end(self, state: State, logger: Logger) -> None:
        taken, self._noted = self._noted, None
        if taken is None or dist.get_global_rank() != 0:
            return
        if self.path.stat().st_size > MOST_BYTES:
            if not self._is_full:
                warnings.warn(f"{self.path} has {MOST_BYTES >> 20} MiB: no more is recorded in it", stacklevel=2)
            self._is_full = True  # steps are still noted: other ranks take part in it
            return
        step = int(state.timestamp.batch) - 1  # the clock has moved on to the next step
        loader: Any = state.dataloader
        record, thumbnails = recorded(taken, step, loader, self._words)
        if not self._has_order:
            record["shown"] = [without_place(entry) for entry in record["shown"]]
        self._words = self._words or list(record["words"]) or None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if any(takes_images(destination) for destination in logger.destinations):
            for name, kept in (("kept", True), ("dropped", False)):
                sheet = contact_sheet([each for each in thumbnails if each[0]["kept"] is kept])
                logger.log_images(sheet, name=f"gallery/{name}", channels_last=True, use_table=False)


def noted(selection: Any) -> Noted:
    """What `ClipCov` says of the step; with scope="global" also what other ranks train on of this rank's pool."""
    survivors, gain = selection.survivor_ids.tolist(), as_list(getattr(selection, "survivor_gains", None))
    if selection.scope == "global" and dist.get_world_size() > 1:
        shares: Any = dist.all_gather_object((survivors, gain))
        survivors = [sample for ids, _ in shares for sample in ids]
        if gain is not None:
            gain = [value for _, values in shares for value in values]
            # Each rank's share is in order; by gain is nearly the order in which all were chosen, random ones last.
            order = np.argsort(-np.nan_to_num(gain, nan=-np.inf), kind="stable").tolist()
            survivors, gain = [survivors[place] for place in order], [gain[place] for place in order]
    alignment = as_list(selection.alignment)
    is_warmup = selection.uses_embeddings and alignment is None
    return Noted(selection.pool_ids.tolist(), survivors, gain, alignment, is_warmup)


def has_order(gain: Sequence[float] | None, num_ranks: int) -> bool:
    """Whether survivors of pools that `num_ranks` ranks chose from together come in the order chosen.

    Several ranks' shares are merged by gain: without one, one rank's follow another's.
    """
    return num_ranks == 1 or (gain is not None and bool(np.isfinite(gain).any()))


def without_place(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "place"}


def as_list(values: Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()


def notes_alignment(state: State) -> None:
    """Have the selection keep its candidates' alignments."""
    for algorithm in state.algorithms:
        if hasattr(algorithm, "notes_alignment"):
            algorithm.notes_alignment = True  # pyright: ignore[reportAttributeAccessIssue]


def takes_images(destination: LoggerDestination) -> bool:
    return type(destination).log_images is not LoggerDestination.log_images


def parse_interval(interval: str | int) -> Time:
    """Composer time from a string or a number of batches.

    Raises:
        ValueError: not a Composer time, one that is not above 0, or in another unit than ba and dur.
    """
    try:
        time = Time.from_input(interval, TimeUnit.BATCH)
    except (ValueError, TypeError) as error:
        raise ValueError(f"gallery_interval={interval!r} is not a Composer time such as '50ba'") from error
    if time.unit not in (TimeUnit.BATCH, TimeUnit.DURATION) or time.value <= 0:
        raise ValueError(f"gallery_interval={interval!r} must be above 0, in batches (ba) or duration (dur)")
    return time


def batches_of(interval: Time, state: State) -> int:
    """An interval in steps.

    Raises:
        ValueError: a share of a duration that is not known in steps.
    """
    if interval.unit == TimeUnit.BATCH:
        return int(interval.value)
    end, length = state.max_duration, state.dataloader_len
    if end is not None and end.unit == TimeUnit.EPOCH and length is not None:
        return max(1, round(interval.value * end.value * int(length)))
    if end is None or end.unit != TimeUnit.BATCH:
        raise ValueError(
            f"gallery_interval={interval.to_timestring()!r} of max_duration={end} is not known in steps; give it in "
            "batches (ba)"
        )
    return max(1, round(interval.value * end.value))
