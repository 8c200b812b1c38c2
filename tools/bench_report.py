"""Runs of a benchmark -> means, paired intervals, a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Two-sided 95% quantiles of Student's t, by degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
OURS = "clipcov"
FIGURES = (
    "mean_per_class",
    "top1",
    "r1",
    "clean_share",
    "duplicate_share",
    "class_entropy",
    "balanced_residual",
    "embed_ms",
    "select_ms",
)


PLACE = ("corpus", "embed", "pool", "survivors", "steps")
"""What two runs share that are compared with each other."""


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in PLACE)


def title_of(row: dict[str, Any]) -> str:
    return f"{row['corpus']}, embed: {row['embed']}, {row['pool']:,} to {row['survivors']:,}, {row['steps']:,} steps"


def styles(selectors: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Line styles that tell any number of selectors apart: ours wide and black, random grey, colours for the others."""
    colours, dashes = plt.get_cmap("tab10").colors, ("-", "--", ":", "-.")  # pyright: ignore
    found: dict[str, dict[str, Any]] = {}
    others = 0
    for selector in dict.fromkeys(selectors):
        if selector == OURS:
            found[selector] = {"color": "black", "linewidth": 2.5}
        elif selector == "random":
            found[selector] = {"color": "grey", "linewidth": 2.0, "linestyle": "--"}
        else:
            style = dashes[others // len(colours) % len(dashes)]
            found[selector] = {"color": colours[others % len(colours)], "linewidth": 1.2, "linestyle": style}
            others += 1
    return found


def mean_and_interval(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95% interval (Student's t); None for fewer than two values."""
    values = list(values)
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, T95[min(count - 1, len(T95)) - 1] * math.sqrt(variance / count)


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict per place and selector: means over seeds, and our paired lead over it."""
    cells: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((*place_of(row), row["selector"]), {})[row["seed"]] = row
    summary = []
    for (*place, selector), by_seed in cells.items():
        cell: dict[str, Any] = dict(zip(PLACE, place, strict=True)) | {"selector": selector, "seeds": sorted(by_seed)}
        cell |= {key: next(iter(by_seed.values()))[key] for key in ("samples_streamed", "samples_seen")}
        for figure in FIGURES:
            values = [row[figure] for row in by_seed.values() if figure in row]
            if values:
                cell[figure], cell[f"{figure}_95"] = mean_and_interval(values)
        ours = cells.get((*place, OURS), {})
        shared = sorted(ours.keys() & by_seed.keys())
        if selector != OURS and shared:
            for figure in ("mean_per_class", "r1"):
                lead = mean_and_interval(ours[seed][figure] - by_seed[seed][figure] for seed in shared)
                cell[f"{figure}_lead"], cell[f"{figure}_lead_95"] = lead
        summary.append(cell)
    return summary


def table(summary: list[dict[str, Any]], rows: list[dict[str, Any]], code: int | None = None) -> str:
    """Markdown, a table per place, best mean-per-class accuracy first; `code` is the present version's fingerprint."""
    warmups = sorted({row["warmup"] for row in rows})
    lines = [
        f"Warm-up {', '.join(map(str, warmups))} steps with the teacher or an online proxy (clipcov instead has "
        f"a soft start, since 2026-11-28 and unless its variant says otherwise) and none with a proxy; "
        f"seeds {sorted({row['seed'] for row in rows})}; +- is a 95% interval over seeds, of `lead` over paired seeds.",
    ]
    if not all(row.get("bfloat16", True) for row in rows):
        lines.append("\nConvolutions in float32, on a CPU without instructions for bfloat16.")
    if (learners := {row.get("model", "tiny") for row in rows}) != {"tiny"}:
        lines.append(f"\nLearner: {', '.join(sorted(learners))} (`--model`).")
    widths = {row["online_width"] for row in rows if row["embed"] == "online" and "online_width" in row}
    if widths:
        lines.append(f"\nOnline proxy: width {', '.join(map(str, sorted(widths)))} (`--online-width`).")
    older = {(place_of(row), row["selector"]) for row in rows if code is not None and row.get("code") != code}
    if older:
        lines.append("\n\\*: with runs of another version of the code than this table's.")
    for place in dict.fromkeys(map(place_of, summary)):
        cells = [cell for cell in summary if place_of(cell) == place]
        lines += [
            f"\n### {title_of(cells[0])}\n",
            "| selector | mean per class | lead of clipcov | top-1 | R@1 | clean | duplicates | class entropy "
            "| residual | embed ms | select ms | streamed | seen |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for cell in sorted(cells, key=lambda cell: -cell["mean_per_class"]):
            texts = [
                cell["selector"]
                + (" \\*" if (place_of(cell), cell["selector"]) in older else "")
                + of_fewer(cell, cells),
                with_interval(cell, "mean_per_class", ".3f"),
                with_interval(cell, "mean_per_class_lead", "+.3f"),
                f"{cell['top1']:.3f}",
                f"{cell['r1']:.3f}",
                f"{cell['clean_share']:.2f}",
                f"{cell['duplicate_share']:.2f}",
                f"{cell['class_entropy']:.2f}",
                f"{cell['balanced_residual']:.3f}" if "balanced_residual" in cell else "",
                *(f"{cell[name]:.0f}" if name in cell else "" for name in ("embed_ms", "select_ms")),
                *(f"{cell[name]:,}" for name in ("samples_streamed", "samples_seen")),
            ]
            lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def of_fewer(cell: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    """How many seeds a selector has, if others of its place have more."""
    num = len(cell["seeds"])
    return f" ({num} seed{'s' * (num > 1)})" if num < max(len(other["seeds"]) for other in cells) else ""


def with_interval(cell: dict[str, Any], figure: str, form: str) -> str:
    if figure not in cell:
        return ""
    half = cell[f"{figure}_95"]
    return f"{cell[figure]:{form}}" + ("" if half is None else f" +- {half:.3f}")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean-per-class accuracy over samples_seen, on a quarter of the evaluation split; a panel per place."""
    panels = list({place_of(row): title_of(row) for row in rows}.items())
    columns = min(3, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(6 * columns, 4.2 * -(-len(panels) // columns)), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    drawn = styles(row["selector"] for row in rows if not row["selector"].startswith("random ("))
    for (place, title), axis in zip(panels, axes.flat, strict=False):
        for selector, style in drawn.items():
            curves = [row["curve"] for row in rows if (place_of(row), row["selector"]) == (place, selector)]
            if not curves:
                continue
            seen = [point["samples_seen"] for point in curves[0]]
            means = [sum(curve[i]["mean_per_class"] for curve in curves) / len(curves) for i in range(len(seen))]
            axis.plot(seen, means, label=selector, **style)
        axis.set(title=title, xlabel="samples_seen", ylabel="mean per class", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_sizes(summary: list[dict[str, Any]], path: Path) -> None:
    """Mean-per-class accuracy over the sizes, with 95% intervals if there are seeds; a panel per (corpus, embed)."""
    panels = list(dict.fromkeys((cell["corpus"], cell["embed"]) for cell in summary))
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 4.6), squeeze=False)
    drawn = styles(cell["selector"] for cell in summary)
    for panel, axis in zip(panels, axes.flat, strict=True):
        here = [cell for cell in summary if (cell["corpus"], cell["embed"]) == panel]
        for selector, style in drawn.items():
            cells = [cell for cell in here if cell["selector"] == selector]
            names = [
                f"{cell['pool']:,} to {cell['survivors']:,}\n{cell['steps']:,} steps\n"
                f"ratio {1 - cell['survivors'] / cell['pool']:.2f}"
                for cell in cells
            ]
            means, halves = ([cell[key] for cell in cells] for key in ("mean_per_class", "mean_per_class_95"))
            bars = None if None in halves else halves
            axis.errorbar(names, means, bars, label=selector, capsize=3, marker="o", **style)
        axis.set(title=f"{panel[0]}, embed: {panel[1]}", ylabel="mean per class", ylim=(0, None))
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_residuals(summary: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over how far survivors' cross-covariance is from the sound pairs', a panel per place, a point per
    selector."""
    panels = list({place_of(cell): title_of(cell) for cell in summary if "balanced_residual" in cell}.items())
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.4), squeeze=False)
    for (place, title), axis in zip(panels, axes.flat, strict=True):
        cells = [cell for cell in summary if place_of(cell) == place and "balanced_residual" in cell]
        for cell in cells:
            x, y = cell["balanced_residual"], cell["mean_per_class"]
            colour = "black" if cell["selector"] == OURS else "grey"
            bars = (cell["balanced_residual_95"], cell["mean_per_class_95"])
            axis.errorbar(x, y, bars[1], bars[0], color=colour, marker="o", elinewidth=0.6, alpha=0.8)
            axis.annotate(cell["selector"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="residual to the sound pairs, classes balanced", ylabel="mean per class")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
