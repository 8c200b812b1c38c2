"""Accuracy over compute, from finished runs of bench_selectors.py: what is the better buy, selection or more steps?

    python tools/bench_compute.py tools/results/bench_compute.jsonl

Compute is counted, not timed, in plain training steps on as many samples as survive: forward and backward pass of a
sample are three forward passes, a candidate that the teacher, or a selector that asks the learner, embeds is one more,
and one that an online proxy learns from and embeds is four of the proxy's, whose cost relative to the learner's is that
of their multiply-adds. Selection itself and reading are left out, and so is what a frozen proxy or stored columns cost
beforehand. `random (all streamed)` is plain training. Only runs of one learner and number of survivors are compared.
Prints a table, in which `plain` is what plain training has for the same compute, by straight lines between its runs;
draws NAME.png and writes NAME.md beside the first file; the last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import bench_report
import matplotlib.pyplot as plt
import numpy as np
import torch
from bench_corpus import CONTEXT, SIZE
from bench_model import LEARNING_RATES, towers_of
from bench_selectors import ALL_STREAMED, ONLINE_WIDTH
from torch.utils.flop_counter import FlopCounterMode

from clipcov_stream import SELECTORS
from clipcov_stream.embed import IN_TRAINING
from clipcov_stream.model import forward_flops
from clipcov_stream.rivals import NEEDS_LEARNER
from clipcov_stream.towers import SmallTowers


def flops_of(model: Any) -> int:
    """Of embedding an image and a caption."""
    if hasattr(model, "visual"):
        return forward_flops(model, SIZE, CONTEXT)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_image(torch.zeros(1, 3, SIZE, SIZE))
        model.encode_text(torch.ones(1, CONTEXT, dtype=torch.int64))
    return counter.get_total_flops()


@functools.cache
def online_share(online_width: int = ONLINE_WIDTH, model: str = "tiny") -> float:
    """Cost of the benchmark's online proxy over that of its learner."""
    learner = towers_of(model, 8, SIZE, CONTEXT).eval()
    return forward_flops(SmallTowers(online_width, SIZE), SIZE, CONTEXT) / flops_of(learner)


def steps_of(row: dict[str, Any]) -> float:
    """Compute of a run, in plain steps of its learner."""
    steps = row["samples_seen"] / row["survivors"]
    name = row["selector"].partition(" ")[0]
    if name in ("random", "plain"):
        return steps
    # Rivals' first steps select nothing, where the embedder is in training.
    selecting = steps - (row["warmup"] if name != bench_report.OURS and row["embed"] in IN_TRAINING else 0)
    forward = {"teacher": selecting}.get(row["embed"], 0.0)
    if row["embed"] == "online":
        forward = 4 * steps * online_share(row.get("online_width", ONLINE_WIDTH), row.get("model", "tiny"))
    forward += selecting * (SELECTORS[name] in NEEDS_LEARNER)
    return steps + forward * row["pool"] / (3 * row["survivors"])


def source_of(row: dict[str, Any]) -> str:
    """What a run was trained on, in words."""
    if row["selector"] == ALL_STREAMED:
        return "plain"
    width = row.get("online_width", ONLINE_WIDTH)
    wide = f" of width {width}" * (row["embed"] == "online" and width != ONLINE_WIDTH)
    return f"{row['selector']}, {row['embed']}{wide}"


def points_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds: one for each corpus, selector, embedder and size, with what plain training has."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        source = source_of(row)
        pool = None if source == "plain" else row["pool"]
        place = (row["corpus"], source, pool, row["samples_seen"], round(steps_of(row)))
        groups.setdefault(place, []).append(row)
    points = []
    for (corpus, source, pool, seen, steps), runs in groups.items():
        accuracy, half = bench_report.mean_and_interval(run["mean_per_class"] for run in runs)
        recall = bench_report.mean_and_interval(run["r1"] for run in runs)[0]
        point = {"corpus": corpus, "source": source, "pool": pool, "samples_seen": seen, "compute": steps}
        points.append(point | {"mean_per_class": accuracy, "interval": half, "r1": recall, "seeds": len(runs)})
    for point in points:
        line = sorted((p for p in points if (p["corpus"], p["source"]) == (point["corpus"], "plain")), key=compute)
        if line and line[0]["compute"] <= point["compute"] <= line[-1]["compute"]:
            x = [p["compute"] for p in line]
            for figure in ("mean_per_class", "r1"):
                point[f"plain_{figure}"] = float(np.interp(point["compute"], x, [p[figure] for p in line]))
    return sorted(points, key=lambda point: (point["corpus"], point["source"] != "plain", point["compute"]))


def compute(point: dict[str, Any]) -> float:
    return point["compute"]


def table_of(points: list[dict[str, Any]]) -> str:
    lines = [
        "Compute in plain steps: see tools/bench_compute.py. `plain` columns: plain training at the same compute, "
        "between its own runs.",
        "",
        "| corpus | trained on | pool | samples_seen | compute | mean per class | plain | R@1 | plain | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        plain = [f"{point[key]:.3f}" if key in point else "" for key in ("plain_mean_per_class", "plain_r1")]
        half = "" if point["interval"] is None else f" +- {point['interval']:.3f}"
        cells = [point["corpus"], point["source"], point["pool"] or "", f"{point['samples_seen']:,}", point["compute"]]
        cells += [f"{point['mean_per_class']:.3f}{half}", plain[0], f"{point['r1']:.3f}", plain[1], point["seeds"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def plot(points: list[dict[str, Any]], path: Path) -> None:
    corpora = list(dict.fromkeys(point["corpus"] for point in points))
    figure, axes = plt.subplots(1, len(corpora), figsize=(4.6 * len(corpora), 4.2), squeeze=False)
    for corpus, axis in zip(corpora, axes.flat, strict=True):
        here = [point for point in points if point["corpus"] == corpus]
        for source in dict.fromkeys(point["source"] for point in here):
            line = [point for point in here if point["source"] == source]
            bars = [point["interval"] or 0.0 for point in line]
            style = {"color": "grey", "linestyle": "--"} if source == "plain" else {}
            x, y = [compute(point) for point in line], [point["mean_per_class"] for point in line]
            axis.errorbar(x, y, bars, label=source, marker="o", capsize=3, **style)
            for point in line:
                if point["pool"]:
                    place = (point["compute"], point["mean_per_class"])
                    axis.annotate(str(point["pool"]), place, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set(title=corpus, xlabel="compute, plain steps", ylabel="mean per class", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help=".jsonl files of bench_selectors.py")
    args = parser.parse_args()
    rows = [json.loads(line) for path in args.rows for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows:
        parser.error(f"{', '.join(map(str, args.rows))} hold no runs")
    if len(numbers := {row["survivors"] for row in rows}) > 1:
        parser.error(f"runs of {sorted(numbers)} survivors: their steps do not compare")
    if len(models := {row.get("model", "tiny") for row in rows}) > 1:
        parser.error(f"runs of the learners {sorted(models)}: their steps do not compare")
    if not models <= LEARNING_RATES.keys() and any(row["embed"] == "online" for row in rows):
        parser.error(
            f"what an online proxy costs beside {sorted(models)} is not known here; {sorted(LEARNING_RATES)} are"
        )
    points = points_of(rows)
    text = table_of(points)
    args.rows[0].with_suffix(".md").write_text(text, encoding="utf-8")
    plot(points, args.rows[0].with_suffix(".png"))
    print(text)
    print(json.dumps(points))


if __name__ == "__main__":
    main()
