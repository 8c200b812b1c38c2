"""Figures of runs -> the rows that a report shows. Pure functions of what `run_files` read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from run_files import Run, random_twins

PREFERRED = ("mean_per_class", "top1", "image_to_text_r1", "text_to_image_r1", "top5")
"""Last parts of evaluation figures, the most telling first."""
SAME = {"top1": "mean_per_class", "text_to_image_r1": "image_to_text_r1"}
"""Figures that say much the same as another."""
PARTS = ("waiting for data", "embedding", "selection", "training", "noting the lag")
COPIES = {"duplicate_of": "near-duplicate", "bytes": "image that a pool has twice"}
"""What copies are called, by what made them known."""
NUM_BINS = 6
"""Of classes by their frequency."""


def numbers(runs: Sequence[Run], key: str) -> list[float]:
    """A figure of each run that has it: at the last step at which all of these do, so that a run which stopped early is
    not averaged with one that went on; the last of each where they have no step in common."""
    found = series(runs, key)
    shared = set.intersection(*map(set, found)) if found else set()
    return [float(values[max(shared or values)]) for values in found]


def settled(runs: Sequence[Run], key: str) -> float | None:
    """A figure's mean over the last quarter of the steps that have it, and over runs; None where none has."""
    found = [list(values.values()) for values in series(runs, key)]
    return mean([statistics.fmean(values[-max(1, len(values) // 4) :]) for values in found])


def series(runs: Sequence[Run], key: str) -> list[dict[int, float]]:
    """A figure by step, of each run that has it."""
    found = [{row["step"]: row[key] for row in run.rows if is_number(row.get(key))} for run in runs]
    return [values for values in found if values]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Their sample standard deviation; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def evaluations(runs: Sequence[Run]) -> list[str]:
    """Keys of evaluation figures, the most telling first."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row if is_evaluation(key, row[key]))

    def order(key: str) -> int:
        last = key.rsplit("/", 1)[-1]
        return PREFERRED.index(last) if last in PREFERRED else len(PREFERRED)

    return sorted(keys, key=order)


def telling(keys: Sequence[str], most: int) -> list[str]:
    """Those to look at first: the preferred, but none that says much the same as another of its split."""
    apart = [key for key in keys if f"{key.rpartition('/')[0]}/{SAME.get(key.rpartition('/')[2])}" not in keys]
    preferred = [key for key in apart if key.rpartition("/")[2] in PREFERRED]
    return (preferred or apart)[:most]


def is_evaluation(key: str, value: Any) -> bool:
    return key.startswith("metrics/") and not key.startswith("metrics/train/") and is_number(value)


def titles_of(keys: Sequence[str]) -> dict[str, str]:
    """`metrics/shapes/mean_per_class` -> `shapes: mean per class`; without the split if all are of one."""
    splits = {key.rpartition("/")[0] for key in keys}
    found = {}
    for key in keys:
        _, *split, name = key.split("/")
        name = name.replace("image_to_text_r", "image→text R@").replace("text_to_image_r", "text→image R@")
        name = name.replace("_", " ")
        found[key] = f"{'/'.join(split)}: {name}" if split and len(splits) > 1 else name
    return found


def curve(run: Run, key: str, axis: str) -> tuple[list[float], list[float]]:
    """A figure of a run over samples_seen or samples_streamed, at most one of each step; what came before training is
    at 0."""
    x, y = [], []
    for row in run.rows:
        value = row.get(key)
        if value is not None and is_number(value):
            x.append(float(row.get(f"selection/{axis}", row.get(axis, 0) if axis == "samples_streamed" else 0)))
            y.append(float(value))
    return x, y


def headline(groups: Mapping[str, list[Run]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """A row of the headline table per kind of run: figures as (mean, spread, text, what it is of).

    `ratio` is the first figure over that of the random twin, at step `ratio_step`; None without such a step or twin.
    """
    twins = random_twins(groups)
    rows = []
    for label, runs in groups.items():
        cells = [figure(numbers(runs, key)) for key in keys]
        twin = twins[label]
        ratio, step = over(runs, groups[twin], keys[0]) if twin is not None and keys else (None, None)
        rows.append(
            {
                "label": label,
                "seeds": ", ".join(str(run.seed) for run in runs),
                "num_runs": len(runs),
                "cells": cells,
                "ratio": ratio,
                "ratio_step": step,
                "seen": mean(numbers(runs, "selection/samples_seen")),
                "streamed": mean(numbers(runs, "selection/samples_streamed")),
                "minutes": mean([minutes for run in runs if (minutes := training_minutes(run)) is not None]),
                "status": "; ".join(dict.fromkeys(run.status for run in runs)),
            }
        )
    return rows


def over(runs: Sequence[Run], base: Sequence[Run], key: str) -> tuple[float | None, int | None]:
    """Mean of a figure over its mean of `base`, and the step it is of: the last at which all that have it do.

    (None, None) where they have no step in common, or the mean of `base` is 0 there.
    """
    mine, theirs = series(runs, key), series(base, key)
    if not mine or not theirs:
        return None, None
    shared = set.intersection(*map(set, [*mine, *theirs]))
    if not shared or not (below := statistics.fmean(values[max(shared)] for values in theirs)):
        return None, None
    return statistics.fmean(values[max(shared)] for values in mine) / below, max(shared)


def figure(values: Sequence[float]) -> dict[str, Any]:
    """A table's cell: mean, spread over runs, and each run's own."""
    return {"mean": mean(values), "spread": spread(values), "each": [f"{value:.4g}" for value in values]}


def training_minutes(run: Run) -> float | None:
    """Of all steps recorded, without evaluations."""
    steps = [row["selection/step_ms"] for row in run.rows if "selection/step_ms" in row]
    return sum(steps) / 60_000 if steps else None


def equal_samples(groups: Mapping[str, list[Run]]) -> bool | None:
    """Whether all runs saw, and streamed, as many samples; None if one does not say."""
    runs = [run for each in groups.values() for run in each]
    counts = {(run.last("selection/samples_seen"), run.last("selection/samples_streamed")) for run in runs}
    return None if any(None in count for count in counts) else len(counts) == 1


def step_parts(runs: Sequence[Run]) -> dict[str, float] | None:
    """Mean milliseconds of a step by part, over the steps that select, or all where none does; None if not recorded.

    What is prepared ahead of training takes none of its time: then only what training waited for counts.
    """
    means = []
    for run in runs:
        rows = [row for row in run.rows if "selection/step_ms" in row and "selection/wait_ms" in row][1:]
        rows = [row for row in rows if "selection/select_ms" in row] or rows
        if not rows:
            continue
        ahead = bool(run.recipe.get("selection", {}).get("run_ahead"))
        names = ("step_ms", "wait_ms", "embed_ms", "select_ms", "learn_ms")
        step, wait, embed, select, learn = (
            statistics.fmean(row.get(f"selection/{name}", 0.0) for row in rows) for name in names
        )
        embed, select = (0.0, 0.0) if ahead else (embed, select)
        means.append((wait - embed - select, embed, select, step - wait - learn, learn))
    if not means:
        return None
    return {part: max(0.0, statistics.fmean(each)) for part, each in zip(PARTS, zip(*means, strict=True), strict=True)}


def selecting_records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Gallery records of steps that selected, or were random by choice."""
    return [record for run in runs for record in run.gallery or [] if not record["is_warmup"]]


def summed(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[int]]:
    """Candidates and survivors by kind, over records."""
    total: dict[str, list[int]] = {}
    for record in records:
        for kind, (candidates, kept) in record.get(key, {}).items():
            of_kind = total.setdefault(kind, [0, 0])
            of_kind[0] += candidates
            of_kind[1] += kept
    return total


def truth(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What survivors are made of beside what candidates are; None without records."""
    looked_at, kept = (sum(record["looked_at"][side] for record in records) for side in (0, 1))
    if not looked_at:
        return None
    kinds: dict[str, Any] = {}
    for flag, (candidates, survivors) in summed(records, "flags").items():
        if flag == "mismatched":
            kinds["clean"] = shares((looked_at - candidates, kept - survivors), looked_at, kept)
        kinds[flag] = shares((candidates, survivors), looked_at, kept)
    by = records[0]["copies_by"]
    copies = shares([sum(record["copies"][side] for record in records) for side in (0, 1)], looked_at, kept)
    if copies["counts"][0]:
        kinds[COPIES[by]] = copies
    return {
        "num_records": len(records),
        "looked_at": looked_at,
        "kinds": kinds,
        "copies": copies,
        "groups": [sum(record["groups"][side] for record in records) for side in (0, 1)],
        "copies_by": by,
        "unread": sum(record["num_unread"] for record in records),
    }


def shares(counts: Sequence[int], looked_at: float, kept: float) -> dict[str, Any]:
    """A kind's share of candidates and of survivors, and the share of it that is kept."""
    return {
        "counts": list(counts),
        "of_candidates": counts[0] / looked_at if looked_at else None,
        "of_survivors": counts[1] / kept if kept else None,
        "kept": counts[1] / counts[0] if counts[0] else None,
    }


def by_frequency(classes: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[list[str], dict[str, list[float]]]:
    """Keep rates by kind of run and bins of classes, from the most frequent of all runs' candidates to the rarest.

    Returns: the bins' ranks, and the rates; 0 where a run had no candidate.
    """
    total: dict[str, int] = {}
    for counts in classes.values():
        for kind, (candidates, _) in counts.items():
            total[kind] = total.get(kind, 0) + candidates
    ordered = sorted(total, key=lambda kind: -total[kind])
    bins = [part.tolist() for part in np.array_split(np.arange(len(ordered)), min(NUM_BINS, len(ordered)))]
    ranks = [f"{part[0] + 1}–{part[-1] + 1}" if len(part) > 1 else f"{part[0] + 1}" for part in bins]
    found: dict[str, list[float]] = {}
    for label, counts in classes.items():
        sums = [[sum(counts.get(ordered[at], (0, 0))[side] for at in part) for side in (0, 1)] for part in bins]
        found[label] = [kept / candidates if candidates else 0.0 for candidates, kept in sums]
    return ranks, found


def trained_on(runs: Sequence[Run]) -> dict[str, Any] | None:
    """How often the runs trained on the same samples, from their ledgers; None where there is none."""
    found = [np.concatenate([record.sample for record in run.ledger]) for run in runs if run.ledger]
    found = [samples for samples in found if len(samples)]
    if not found:
        return None
    counts = [np.unique(samples, return_counts=True)[1] for samples in found]
    return {
        "samples": statistics.fmean(len(samples) for samples in found),
        "distinct": statistics.fmean(len(count) for count in counts),
        "most": max(int(count.max()) for count in counts),
    }
