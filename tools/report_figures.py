"""Figures of a report: matplotlib's SVG, drawn to be read on a phone, in print and in the dark.

Every figure is (alternative text, data URL). Colours are CSS variables of the SVG itself, so that it follows the
reader's colour scheme though it is an image; labels stay text.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MplFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, FAINT = "#1c2024", "#d5d9de"
DARK = {INK: "#e6e8ea", FAINT: "#3a4048"}
PALETTE = ("#0b64b5", "#c2410c", "#0f7b53", "#9a3f9c", "#8a6a00", "#0a7d8c")
"""Of all kinds of runs but random, which is grey; each is readable on white, and its pair on near black."""
DARK |= dict(zip(PALETTE, ("#6cb2f2", "#ff9560", "#4fc797", "#df92e0", "#dcb63f", "#52c5d4"), strict=True))
GREY = "#6b7480"
DARK[GREY] = "#9aa4b0"
MARKERS = "osD^vP"
MOST_POINTS = 240
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipcov",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}

Figure = tuple[str, str]
Points = tuple[Sequence[float], Sequence[float]]
"""x and y of a run."""


@dataclass(frozen=True)
class Line:
    """One line: x and y of each run of a kind."""

    label: str
    runs: Sequence[Points]
    colour: str
    marker: str = ""
    dashed: bool = False


def colours(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each kind of run."""
    found: dict[str, tuple[str, str]] = {}
    for label in labels:
        number = sum(colour != GREY for colour, _ in found.values())
        is_random = label.split(",")[0] == "random" and not any(colour == GREY for colour, _ in found.values())
        found[label] = (GREY, "x") if is_random else (PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)])
    return found


def lines(what: str, over: str, drawn: Sequence[Line], from_zero: bool = True, log: bool = False) -> Figure:
    """Lines with their mean and, of several runs, a band of one standard deviation around it.

    Runs that have no x in common are drawn singly, in one colour.
    """
    with mpl.rc_context(STYLE):
        figure, axes = canvas()
        said = []
        for line in drawn:
            parts = comparable(line.runs)
            for number, runs in enumerate(parts):
                x, mean, spread = averaged(runs)
                if len(runs) > 1:
                    axes.fill_between(x, mean - spread, mean + spread, color=line.colour, alpha=0.16, linewidth=0)
                marker, dashes = line.marker if len(x) <= 30 else "", "--" if line.dashed else "-"
                label = "" if number else line.label  # once in the legend
                axes.plot(x, mean, color=line.colour, linestyle=dashes, marker=marker, label=label)
                which = f"run {number + 1} of {line.label}" if len(parts) > 1 else line.label
                said.append(f"{which} ends at {mean[-1]:.3g}")
        axes.set(xlabel=over, ylabel=what)
        if log:
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        legend(figure, axes, [line.label for line in drawn])
        return f"Line plot of {what} over {over}: {'; '.join(said)}.", data_url(figure)


def bars(what: str, over: str, ticks: Sequence[str], drawn: Mapping[str, tuple[Sequence[float], str]]) -> Figure:
    """Groups of upright bars, one of each group per kind of run."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas()
        width, places = 0.8 / max(1, len(drawn)), np.arange(len(ticks))
        for number, (label, (values, colour)) in enumerate(drawn.items()):
            axes.bar(places + (number - (len(drawn) - 1) / 2) * width, values, width * 0.92, color=colour, label=label)
        axes.set_xticks(places, ticks)
        axes.set(xlabel=over, ylabel=what, ylim=(0, None))
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        legend(figure, axes, list(drawn), has_room=False)
        ends = [f"{label} from {values[0]:.0%} to {values[-1]:.0%}" for label, (values, _) in drawn.items() if values]
        return f"Bar chart of {what} over {over}: {'; '.join(ends)}.", data_url(figure)


def stacked(what: str, rows: Mapping[str, Mapping[str, float]], tones: Sequence[str]) -> Figure:
    """One lying bar per row, of the parts it is made of."""
    parts = list(next(iter(rows.values())))
    with mpl.rc_context(STYLE):
        names = [textwrap.fill(row, 20) for row in rows]
        height = 0.9 + sum(0.26 + 0.16 * (1 + name.count("\n")) for name in names)
        figure = MplFigure(figsize=(4.8, height), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(rows))
        hatches = ("", "///", "...", "xx", "")
        for part, tone, hatch in zip(parts, tones, hatches, strict=True):
            values = np.array([row[part] for row in rows.values()])
            style = {"color": tone, "hatch": hatch, "edgecolor": INK, "linewidth": 0}
            axes.barh(range(len(rows)), values, 0.62, left=left, label=part, **style)
            left += values
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.set(xlabel=what)
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper center", ncols=3, fontsize=9, handlelength=1.4, columnspacing=1.2)
        said = [f"{row}: " + ", ".join(f"{part} {value:.0f}" for part, value in of.items()) for row, of in rows.items()]
        return f"Stacked bars of {what}. {'; '.join(said)}.", data_url(figure)


def canvas() -> tuple[MplFigure, Axes]:
    figure = MplFigure(figsize=(4.8, 3.1), layout="constrained")
    return figure, figure.add_subplot()


def legend(figure: MplFigure, axes: Axes, labels: Sequence[str], has_room: bool = True) -> None:
    """Where there is room inside, or above: then the figure grows by it."""
    longest = max(map(len, labels), default=0)
    if has_room and len(labels) <= 3 and longest <= 40:
        if labels:
            axes.legend(loc="best", fontsize=9, handlelength=2.2)
        return
    columns = 2 if longest <= 20 else 1
    handles, texts = axes.get_legend_handles_labels()
    texts = [text if len(text) <= 60 else text[:57] + "…" for text in texts]
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.19 * -(-len(labels) // columns))
    figure.legend(handles, texts, loc="outside upper left", ncols=columns, fontsize=9)


def comparable(runs: Sequence[Points]) -> list[Sequence[Points]]:
    """Runs to average: all together, or each alone where they have no x in common, evaluated at different times."""
    if not runs:
        return []
    return [runs] if set.intersection(*(set(x) for x, _ in runs)) else [[run] for run in runs]


def averaged(runs: Sequence[Points]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x that all runs have, at least one, at most MOST_POINTS of them, and the runs' mean and standard deviation
    there."""
    tables = [dict(zip(x, y, strict=True)) for x, y in runs]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    shared = [shared[round(i)] for i in np.linspace(0, len(shared) - 1, min(len(shared), MOST_POINTS))]
    values = np.array([[table[x] for x in shared] for table in tables], dtype=float)
    spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(shared))
    return np.array(shared, dtype=float), values.mean(0), spread


def amount(value: float) -> str:
    """A number of samples, shortened."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def data_url(figure: MplFigure) -> str:
    """A figure as the data URL of an SVG that follows the colour scheme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    light = dict(zip(DARK, (f"--c{number}" for number in range(len(DARK))), strict=True))
    for colour, name in light.items():
        svg = svg.replace(colour, f"var({name})")
    rules = "".join(f"{name}:{colour};" for colour, name in light.items())
    dark = "".join(f"{name}:{DARK[colour]};" for colour, name in light.items())
    style = f"<style>svg{{{rules}}}@media screen and (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = re.sub(r"(<svg [^>]*>)", lambda match: match[1] + style, svg, count=1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
