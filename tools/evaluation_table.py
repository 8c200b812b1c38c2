"""evaluation.json's contents as a table, in Markdown, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = ("top1", "mean_per_class", "image_to_text_r1", "text_to_image_r1", "image_to_text_r5", "text_to_image_r5")
NAMES = {
    "top1": "top-1",
    "mean_per_class": "mean per class",
    "image_to_text_r1": "image->text R@1",
    "text_to_image_r1": "text->image R@1",
    "image_to_text_r5": "image->text R@5",
    "text_to_image_r5": "text->image R@5",
}


def figures_of(one: Mapping[str, Any]) -> dict[str, str]:
    """Row title -> figure of one set of one model; the standard one is starred."""
    found = {}
    for kind in SHOWN:
        if kind in one["metrics"]:
            found[f"{NAMES[kind]}{' *' if kind == one['standard'] else ''}"] = f"{one['metrics'][kind]:.4f}"
    probe = one.get("probe", {})
    for kind in SHOWN[:2] if probe else ():
        title = f"probe {NAMES[kind]}{' *' if kind == one['standard'] else ''}"
        found[title] = f"{probe['metrics'][kind]:.4f}" if "metrics" in probe else "n/a"
    return found


def rows_of(found: Mapping[str, Any]) -> list[list[str]]:
    """The header, and a row per figure: set, images, classes, figure, then each model's."""
    models = found["models"]
    rows = [["set", "images", "classes", "figure", *(model["label"] for model in models)]]
    for name in ("selector", "samples_seen", "samples_streamed"):
        values = [model[name] for model in models]
        cells = ["-" if v is None else f"{v:,}" if isinstance(v, int) else v for v in values]
        rows.append(["", "", "", name, *cells])
    for name in dict.fromkeys(name for model in models for name in model["sets"]):
        ones = [model["sets"].get(name) for model in models]
        first = next(one for one in ones if one is not None)
        figures = [{} if one is None else figures_of(one) for one in ones]
        for number, figure in enumerate(figures_of(first)):
            lead = [first["title"], f"{first['images']:,}", f"{first.get('classes', '-')}"] if number == 0 else [""] * 3
            rows.append([*lead, figure, *(own.get(figure, "n/a") for own in figures)])
    for title in dict.fromkeys(title for model in models for title in model["averages"]):
        values = [average_cell(model["averages"].get(title)) for model in models]
        rows.append([f"average of {title}", "", "", "standard *", *values])
    return rows


def average_cell(one: Mapping[str, Any] | None) -> str:
    """An average, or how many sets it lacks; a model without a single set of it has no average of that title."""
    if one is None:
        return "n/a"
    return f"n/a: {len(one['missing'])} missing" if one["value"] is None else f"{one['value']:.4f}"


def notes_of(found: Mapping[str, Any]) -> list[str]:
    """What the figures do not say themselves: averages, holes, unreadable images, probes, sets that are missing."""
    notes = ["*: the figure that papers give of the set; averages are of these."]
    for model in found["models"]:
        for title, one in model["averages"].items():
            lacking = f"; n/a: missing {', '.join(one['missing'])}" if one["missing"] else ""
            notes.append(f"average of {title}: {', '.join(one['sets'])}{lacking}")
        for name, one in model["sets"].items():
            if one["unreadable"]:
                notes.append(f"{name}: {one['unreadable']} of {one['images']} images unreadable, counted as misses")
            if one.get("classes_present") != one.get("classes"):
                part = f"images of {one['classes_present']:,} of {one['classes']:,} classes"
                averaged = any(name in average["sets"] for average in model["averages"].values())
                notes.append(f"{name}: {part}" + ", so it enters no average" * averaged)
            if "note" in one:
                notes.append(f"{name}: {one['note']}")
            notes += probe_notes(f"{name}, {model['label']}", one.get("probe", {}))
    # What holds for all models is said once.
    return list(dict.fromkeys([*notes, *(f"missing {name}: {reason}" for name, reason in found["missing"].items())]))


def probe_notes(where: str, probe: Mapping[str, Any]) -> list[str]:
    """What a probe was trained on, or why there is none."""
    if "missing" in probe:
        return [f"{where}: no probe, {probe['missing']}"]
    if not probe:
        return []
    dropped = f", {probe['train_unreadable']} unreadable left out" if probe["train_unreadable"] else ""
    return [f"{where}: probe with C = {probe['c']:.3g}, of {probe['train_images']:,} images{dropped}"]


def table(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    rows = rows_of(found)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = zip(row, widths, strict=True)
        cells = [cell.ljust(width) if at in (0, 3) else cell.rjust(width) for at, (cell, width) in enumerate(padded)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", *notes_of(found)])


def markdown(found: Mapping[str, Any]) -> str:
    """The same as a Markdown table with notes."""
    header, *rows = rows_of(found)
    lines = ["| " + " | ".join(header) + " |", "|---|---:|---:|---|" + "---:|" * len(found["models"])]
    lines += ["| " + " | ".join(row).replace("*", "\\*") + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}".replace("*:", "\\*:") for note in notes_of(found))]) + "\n"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """The standard figure of every set, a bar per model, with chance where there are classes."""
    models = found["models"]
    names = list(dict.fromkeys(name for model in models for name in model["sets"]))
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.3 * len(names) * (len(models) + 1)), layout="constrained")
    height = 0.8 / len(models)
    for number, model in enumerate(models):
        own = [(at, model["sets"][name]) for at, name in enumerate(names) if name in model["sets"]]
        values = [one["metrics"][one["standard"]] for _, one in own]
        axes.barh([at + number * height for at, _ in own], values, height, label=model["label"])
    for at, name in enumerate(names):
        one = next(model["sets"][name] for model in models if name in model["sets"])
        if "classes" in one:
            axes.plot([1 / one["classes"]] * 2, [at - height / 2, at + 0.8 - height / 2], color="black", linewidth=1)
    middle = 0.4 - height / 2
    axes.set_yticks([at + middle for at in range(len(names))], names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="standard figure (line: chance)", title="Zero-shot and retrieval")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
