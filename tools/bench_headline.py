"""The README's table and plot, and the table of all cells, from the benchmark's own rows.

    python tools/bench_headline.py            # prints the tables and draws tools/results/headline.png

Rows are those of `SOURCES` in tools/results; where two files have the same run, the later file's counts. With `online`
all are of one version of the code; with other embedders clipcov's count in its own file alone, that of the present
defaults. The best rival is that of the highest mean; leads are over
the better of it and random, paired by seed, with a 95% interval (Student's t). A filter is shown with the share that it
was best at, of those that were tried, a choice that online selection does not get. Nothing is trained here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench_report import OURS, mean_and_interval

RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT = "online"
OF_DEFAULT = ("bench_online", "bench_online_clean")
OWN = "bench_ten"
SOURCES = (
    *("bench_noisy", "bench_others", "bench_fresh_noisy", "bench_fresh", "bench_seeds04", OWN),
    *OF_DEFAULT,
)
SIZE = (640, 128, 240)
"""Pool, survivors, steps."""
CORPORA = {
    "shapes": "shapes, 40% mismatched",
    "fashion_noisy": "product photos, 40% mismatched",
    "shapes_light": "shapes, 15% mismatched",
    "shapes_heavy": "shapes, 60% mismatched",
    "shapes_clean": "shapes, clean",
    "fashion": "product photos, clean",
    "emoji": "emoji, clean",
}
IN_README = ("shapes_light", "shapes", "shapes_heavy", "fashion_noisy", "shapes_clean", "fashion", "emoji")
EMBEDS = {
    DEFAULT: "online: no reference, the default",
    "teacher": "teacher: no reference",
    "proxy-noisy": "proxy trained on noisy pairs",
    "proxy-clean": "proxy trained on clean pairs",
}
CLEAN = ("shapes_clean", "fashion", "emoji")
RIVALS = {"vas": "v", "neg_clip_loss": "n", "rho": "r", "jest_topk": "j"}
"""With their letters in the table of all cells."""
FILTERS = "bench_filters"
FILTERED = ("shapes_light", "shapes", "shapes_heavy", "fashion_noisy")
PROXIES = {"proxy-noisy": "noisy", "proxy-clean": "clean"}
PERFECT = "plain on sound-distinct 1"
"""Plain training on all pairs that match and are no copies, which the benchmark alone knows."""
Runs = dict[tuple[str, str, str], dict[int, dict[str, Any]]]
"""(corpus, embed, selector) -> runs by seed."""


def read_runs(folder: Path = RESULTS) -> Runs:
    """The runs of the main table.

    Raises:
        ValueError: selectors of a cell that ran with other seeds than each other.
    """
    found: Runs = {}
    for name in SOURCES:
        for row in map(json.loads, (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()):
            cell = (row["corpus"], row["embed"], row["selector"])
            ours = row["selector"] == OURS
            wanted = ours or row["selector"] in rivals_on(row["corpus"], row["embed"]) or row["selector"] == "random"
            counts = row["embed"] == DEFAULT if name in OF_DEFAULT else ours == (name == OWN)
            if wanted and (row["pool"], row["survivors"], row["steps"]) == SIZE and counts:
                found.setdefault(cell, {})[row["seed"]] = row
    codes = {row["code"] for (_, embed, _), runs in found.items() if embed == DEFAULT for row in runs.values()}
    if len(codes) > 1:
        raise ValueError(f"rows of {DEFAULT} are of {len(codes)} versions of the code: {sorted(codes)}")
    for (corpus, embed, selector), runs in found.items():
        if runs.keys() != found[corpus, embed, OURS].keys():
            raise ValueError(f"{selector} ran on {corpus}, {embed} with seeds {sorted(runs)}, {OURS} with others")
    return found


def rivals_on(corpus: str, embed: str) -> list[str]:
    """Those with as many seeds as clipcov. On clean corpora and with online two: the others were behind after a few
    (with online on clean corpora: were not run)."""
    return ["rho", "jest_topk"] if corpus in CLEAN or embed == DEFAULT else list(RIVALS)


def mean(runs: Runs, corpus: str, embed: str, selector: str) -> float:
    return mean_and_interval(row["mean_per_class"] for row in runs[corpus, embed, selector].values())[0]


def best_rival(runs: Runs, corpus: str, embed: str) -> str:
    return max(rivals_on(corpus, embed), key=lambda name: mean(runs, corpus, embed, name))


def lead(runs: Runs, corpus: str, embed: str) -> tuple[float, float]:
    """Of clipcov over the best rival or random, whichever is better, and half of its interval."""
    names = (best_rival(runs, corpus, embed), "random")
    other = runs[corpus, embed, max(names, key=lambda name: mean(runs, corpus, embed, name))]
    ours = runs[corpus, embed, OURS]
    value, half = mean_and_interval(ours[seed]["mean_per_class"] - other[seed]["mean_per_class"] for seed in ours)
    assert half is not None
    return value, half


def short(value: float, sign: str = "") -> str:
    """`.123`, as the documents have it."""
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


def accuracies(runs: Runs, corpus: str, embed: str) -> dict[str, str]:
    """Of random, rival and clipcov, the best in bold."""
    names = {"random": "random", "rival": best_rival(runs, corpus, embed), OURS: OURS}
    means = {key: mean(runs, corpus, embed, name) for key, name in names.items()}
    return {key: f"**{short(v)}**" if v == max(means.values()) else short(v) for key, v in means.items()}


def readme_table(runs: Runs) -> str:
    lines = ["| corpus | random | rival | clipcov | lead |", "|---|---|---|---|---|"]
    for corpus in IN_README:
        cell = accuracies(runs, corpus, DEFAULT)
        value, half = lead(runs, corpus, DEFAULT)
        figures = (cell["random"], cell["rival"], cell[OURS], f"{short(value, '+')} ± {short(half)}")
        lines.append(f"| {CORPORA[corpus]} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def full_table(runs: Runs) -> str:
    lines = [f"| corpus | {' | '.join(EMBEDS.values())} |", f"|{'---|' * (1 + len(EMBEDS))}"]
    for corpus, title in CORPORA.items():
        texts = [title]
        for embed in EMBEDS:
            cell, letter = accuracies(runs, corpus, embed), RIVALS[best_rival(runs, corpus, embed)]
            value, half = lead(runs, corpus, embed)
            figures = f"{cell[OURS]} / {letter} {cell['rival']} / {cell['random']}"
            texts.append(f"{figures}: {short(value, '+')} ± {short(half)}")
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def read_filters(folder: Path = RESULTS) -> Runs:
    """The runs on what filters leave, beside clipcov's and random's of the same seeds."""
    found: Runs = {}
    for row in map(json.loads, (folder / f"{FILTERS}.jsonl").read_text(encoding="utf-8").splitlines()):
        if (row["pool"], row["survivors"], row["steps"]) == SIZE:
            found.setdefault((row["corpus"], row["embed"], row["selector"]), {})[row["seed"]] = row
    return found


def best_filter(runs: Runs, corpus: str, embed: str, distinct: bool) -> str:
    """The filter and share of the highest mean, with or without the truth about duplicates, among those with as many
    seeds as clipcov."""
    seeds = runs[corpus, embed, OURS].keys()
    names = [
        name
        for (*place, name), own in runs.items()
        if place == [corpus, embed] and own.keys() == seeds and name.startswith("plain on ") and "sound" not in name
    ]
    return max((n for n in names if ("-distinct" in n) == distinct), key=lambda n: mean(runs, corpus, embed, n))


def filters_table(runs: Runs) -> str:
    """Mean per class (R@1) of plain training on what filters leave."""

    def cell(corpus: str, embed: str, name: str) -> str:
        recall = mean_and_interval(row["r1"] for row in runs[corpus, embed, name].values())[0]
        rule = name.removeprefix("plain on ").replace("-distinct", "").replace("clipcov", "CLIPCov")
        named = "" if name in (OURS, "random", PERFECT) else f" {rule.replace(' 0.', ' .')}"
        return f"{short(mean(runs, corpus, embed, name))} ({short(recall)}){named}"

    titles = ("random", "best filter", "and duplicates gone", "a perfect filter", OURS, "lead over the best filter")
    lines = [f"| corpus, proxy's pairs | {' | '.join(titles)} |", f"|{'---|' * 7}"]
    for corpus in FILTERED:
        for embed, pairs in PROXIES.items():
            best = best_filter(runs, corpus, embed, distinct=False)
            ours, other = runs[corpus, embed, OURS], runs[corpus, embed, best]
            value, half = mean_and_interval(ours[s]["mean_per_class"] - other[s]["mean_per_class"] for s in ours)
            names = ("random", best, best_filter(runs, corpus, embed, distinct=True), PERFECT, OURS)
            texts = [f"{CORPORA[corpus]}, {pairs}", *(cell(corpus, embed, name) for name in names)]
            lines.append(f"| {' | '.join(texts)} | {short(value, '+')} ± {short(half or 0.0)} |")
    return "\n".join(lines) + "\n"


def plot(runs: Runs, path: Path, embed: str = DEFAULT, shown: str = "shapes") -> None:
    """Left: every corpus, with 95% intervals over seeds. Right: one of them over samples_seen."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.3), width_ratios=(1.25, 1))
    styles = {
        "random": ("0.6", "o", "random"),
        "rival": ("tab:orange", "s", "better of rho and jest_topk"),
        OURS: ("black", "D", OURS),
    }
    for place, corpus in enumerate(reversed(IN_README)):
        for shift, (key, (colour, marker, label)) in zip((0.22, 0.0, -0.22), styles.items(), strict=True):
            name = best_rival(runs, corpus, embed) if key == "rival" else key
            values = [row["mean_per_class"] for row in runs[corpus, embed, name].values()]
            value, half = mean_and_interval(values)
            left.errorbar(value, place + shift, xerr=half, color=colour, marker=marker, capsize=2, label=label)
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[:3], labels[:3], loc="lower right", fontsize=8)
    left.set_yticks(range(len(IN_README)), [CORPORA[corpus] for corpus in reversed(IN_README)])
    title = "30,720 samples seen of 153,600 streamed"
    left.set(xlabel="zero-shot accuracy, mean per class", xlim=(0, None), title=title)
    left.grid(alpha=0.3, axis="x")
    for key, (colour, _, _) in styles.items():
        name = best_rival(runs, shown, embed) if key == "rival" else key
        curves = [row["curve"] for row in runs[shown, embed, name].values()]
        seen = [point["samples_seen"] for point in curves[0]]
        points = [mean_and_interval(curve[i]["mean_per_class"] for curve in curves) for i in range(len(seen))]
        right.plot(seen, [value for value, _ in points], color=colour, label=name)
        low, high = ([value + sign * (half or 0.0) for value, half in points] for sign in (-1, 1))
        right.fill_between(seen, low, high, color=colour, alpha=0.15, linewidth=0)
    right.legend(fontsize=8, loc="upper left")
    right.set(
        xlabel="samples seen",
        ylabel="mean per class, a quarter of the split",
        xlim=(0, None),
        ylim=(0, None),
        title=CORPORA[shown],
    )
    right.grid(alpha=0.3)
    seeds = len(runs[shown, embed, OURS])
    figure.suptitle(f"Judged by a small model that learns along the way; {seeds} seeds, 95% intervals", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = read_runs()
    plot(runs, args.out / "headline.png")
    print(readme_table(runs))
    print(full_table(runs))
    print(filters_table(read_filters()))
    counts = {}
    for embed in EMBEDS:
        leads = [lead(runs, corpus, embed) for corpus in CORPORA]
        first, beyond = sum(value > 0 for value, _ in leads), sum(value > half for value, half in leads)
        counts[embed] = {"cells": len(leads), "first": first, "beyond_interval": beyond}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
