"""One self-contained page about runs: how well, at what cost, and what was kept and dropped.

    python tools/report.py RUN [RUN ...] [-o report.html]

RUN is a metrics file, the folder that holds it, or a folder of such folders. Runs of one kind that differ in their seed
alone are shown together, with their spread. The page needs no network: figures and thumbnails are part of it, and its
Content-Security-Policy forbids everything else. Captions, names and recipes are text of unknown origin, and escaped.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import report_figures as figures
import report_tables as tables
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from run_files import Run, differing, find_runs, flat, grouped, read_run, shown

PAGE = Path(__file__).resolve().parent / "report_page"
MOST_THUMBNAILS = 3 << 20
"""Characters of thumbnails in a page, which is then below 5 MB; what does not fit is counted."""
MOST_COLUMNS, MOST_CURVES = 4, 3
"""Evaluation figures in the headline table, and those that are drawn; all are in a table of their own."""
MOST_CLASSES, MOST_WORDS = 200, 40
RANDOM_SURVIVORS = "random survivors of {}'s pools"
CERTIFICATE = (
    ("aim_residual", "aim_residual_bound", "{}: what it cannot exceed", "from the aim"),
    ("residual_total", "residual_total_random", RANDOM_SURVIVORS, "of all survivors so far"),
    ("residual", "residual_random", RANDOM_SURVIVORS, "of each step's survivors"),
)
"""Metric, the one drawn dashed beside it, what to call that, and the figure's title."""
MATCHES = (("matched_share", "random_share", "{}: survivors still random", "of candidates that match"),)
"""The same."""


def curves(groups: Mapping[str, list[Run]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Every evaluation figure over both axes."""
    style, titles = figures.colours(list(groups)), tables.titles_of(keys)
    found = []
    for key in tables.telling(keys, MOST_CURVES):
        drawn = []
        for axis in ("samples_seen", "samples_streamed"):
            of_axis = []
            for label, runs in groups.items():
                points = [points for run in runs if (points := tables.curve(run, key, axis))[0]]
                if points:
                    of_axis.append(figures.Line(label, points, *style[label]))
            drawn.append(figures.lines(titles[key], axis, of_axis))
        found.append({"title": titles[key], "figures": drawn})
    return found


def pairs_of_lines(
    groups: Mapping[str, list[Run]], of: Sequence[tuple[str, str, str, str]], unit: str
) -> list[dict[str, Any]]:
    """Figures of what selection logs, over samples_streamed.

    CERTIFICATE: residuals from what selection aims at, beside their bound, and from the whole stream's, beside what
    random survivors of the same pools would leave. MATCHES: the share of pairs that match, by the run's own estimate,
    beside how many survivors were random because it knew little yet.
    """
    style = figures.colours(list(groups))
    found = []
    for name, beside, called, what in of:
        drawn = []
        for label, runs in groups.items():
            for key, title in ((name, label), (beside, called.format(label))):
                curves_of = [tables.curve(run, f"selection/{key}", "samples_streamed") for run in runs]
                if points := [points for points in curves_of if points[0]]:
                    drawn.append(figures.Line(title, points, style[label][0], dashed=key == beside))
        if drawn:
            found.append({"title": what, "figures": [figures.lines(f"{unit} {what}", "samples_streamed", drawn)]})
    return found


def galleries(groups: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """One run of each kind: its last recorded step, and some before it as far as the page has room."""
    shown = {label: next((run for run in runs if run.gallery), None) for label, runs in groups.items()}
    room = MOST_THUMBNAILS // max(1, sum(run is not None for run in shown.values()))
    found = []
    for label, run in sorted(shown.items(), key=lambda item: is_random(item[0])):
        if run is None or not run.gallery:
            continue
        selecting = [record for record in run.gallery if not record["is_warmup"]] or run.gallery
        last = len(selecting) - 1
        wanted = dict.fromkeys([last, last // 2, 0, *range(last, -1, -max(1, last // 4))])
        records, left = [], room
        for place in wanted:
            size = sum(len(entry["jpeg"]) for entry in selecting[place]["shown"])
            if size <= left and len(records) < 5:
                records.append(selecting[place])
                left -= size
        found.append(
            {
                "label": label,
                "run": run.name,
                "records": [
                    shown_record(record, run.classes, run.selector != "random")
                    for record in sorted(records, key=lambda record: -record["step"])
                ],
                "num_recorded": len(run.gallery),
                "num_warmup": len(run.gallery) - len([r for r in run.gallery if not r["is_warmup"]]),
            }
        )
    return found


def shown_record(record: Mapping[str, Any], classes: Sequence[str] | None, in_order: bool) -> dict[str, Any]:
    """A gallery's step as the page shows it; the places of picks that were made in no order are left out, and of a soft
    start's random ones, which gained nothing."""
    gained = any("gain" in entry for entry in record["shown"])
    in_order = in_order and not record["is_warmup"]
    entries = [
        {
            **entry,
            "url": "data:image/jpeg;base64," + entry["jpeg"],
            "class": class_name(entry.get("class"), classes),
            "facts": facts(entry, in_order and ("gain" in entry or not gained)),
        }
        for entry in record["shown"]
    ]
    sides = (("kept", [e for e in entries if e["kept"]]), ("dropped", [e for e in entries if not e["kept"]]))
    return {**record, "sides": sides, "num_dropped": record["pool_size"] - record["num_kept"]}


def facts(entry: Mapping[str, Any], in_order: bool) -> list[str]:
    """What selection said of a candidate."""
    said = [f"pick {entry['place'] + 1}"] if in_order and "place" in entry else []
    said += [f"gain {entry['gain']:.2f}"] if "gain" in entry else []
    said += [f"cos {entry['alignment']:.2f}"] if "alignment" in entry else []
    return [fact.replace(" ", "\u00a0") for fact in said]  # a line breaks between them alone


def class_name(kind: str | None, classes: Sequence[str] | None) -> str | None:
    """A class as its folder's classes.json calls it, or as the samples do."""
    if kind is None or not kind.isdecimal():
        return kind
    return classes[int(kind)] if classes and int(kind) < len(classes) else f"class {kind}"


def survival(groups: Mapping[str, list[Run]]) -> dict[str, Any]:
    """Who survives, by what the galleries counted."""
    style = figures.colours(list(groups))
    records = {label: tables.selecting_records(runs) for label, runs in groups.items()}
    found = {label: truth for label, of in records.items() if (truth := tables.truth(of)) is not None}
    words = {label: tables.summed(records[label], "words") for label in found}
    classes = {label: counts for label in found if (counts := named_classes(groups[label]))}
    figure = None
    if max(map(len, classes.values()), default=0) > 1:
        ticks, rates_of = tables.by_frequency(classes)
        drawn = {label: (rates_of[label], style[label][0]) for label in classes}
        figure = figures.bars("share of candidates kept", "classes by frequency, the most frequent first", ticks, drawn)
    return {
        "truth": found,
        "has_rows": any(truth["kinds"] for truth in found.values()),
        "knows_matches": any("clean" in truth["kinds"] for truth in found.values()),
        "figure": figure,
        "classes": rates(classes, MOST_CLASSES),
        "words": rates(words, MOST_WORDS),
        "ledger": {label: on for label, runs in groups.items() if (on := tables.trained_on(runs)) is not None},
    }


def named_classes(runs: Sequence[Run]) -> dict[str, list[int]]:
    """Candidates and survivors by class, as each run's folder calls it."""
    total: dict[str, list[int]] = {}
    for run in runs:
        for kind, counts in tables.summed(tables.selecting_records([run]), "classes").items():
            of_class = total.setdefault(class_name(kind, run.classes) or kind, [0, 0])
            of_class[:] = [old + new for old, new in zip(of_class, counts, strict=True)]
    return total


def rates(by_label: Mapping[str, Mapping[str, Sequence[int]]], most: int) -> dict[str, Any]:
    """A table of keep rates: the kinds with the most candidates, a column per kind of run."""
    total: dict[str, int] = {}
    for counts in by_label.values():
        for kind, (candidates, _) in counts.items():
            total[kind] = total.get(kind, 0) + candidates
    kinds = sorted(total, key=lambda kind: -total[kind])[:most]
    rows = [
        {
            "name": kind,
            "candidates": total[kind],
            "kept": [
                counts[kind][1] / counts[kind][0] if counts.get(kind, [0])[0] else None for counts in by_label.values()
            ],
        }
        for kind in kinds
    ]
    return {"labels": list(by_label), "rows": rows, "num_left_out": len(total) - len(kinds)}


def step_times(groups: Mapping[str, list[Run]]) -> dict[str, Any] | None:
    """Where a step's time goes, by kind of run."""
    parts = {label: of for label, runs in groups.items() if (of := tables.step_parts(runs)) is not None}
    if not parts:
        return None
    ahead = any(run.recipe.get("selection", {}).get("run_ahead") for runs in groups.values() for run in runs)
    return {
        "parts": tables.PARTS,
        "rows": parts,
        "figure": figures.stacked("milliseconds of a step", parts, (figures.GREY, *figures.PALETTE[:4])),
        "ahead": ahead,
    }


def recipes(groups: Mapping[str, list[Run]]) -> dict[str, Any]:
    """Every run's recipe and versions, and what tells them apart."""
    runs = [run for each in groups.values() for run in each]
    apart = differing(runs)
    return {
        "apart": [
            (key, [json.dumps(shown(flat(run.recipe).get(key)), ensure_ascii=False) for run in runs]) for key in apart
        ],
        "runs": [
            {
                "name": run.name,
                "path": shown(str(run.metrics_file)),
                "selector": run.selector,
                "seed": run.seed,
                "status": run.status,
                "about": {key: shown(value) for key, value in run.about.items() if key not in ("recipe", "versions")},
                "versions": run.about.get("versions", {}),
                "yaml": yaml.safe_dump(
                    shown(without_empty(run.recipe)), sort_keys=False, allow_unicode=True, default_flow_style=None
                ),
            }
            for run in runs
        ],
    }


def without_empty(tree: Any) -> Any:
    """A recipe without the keys that are not set."""
    if not isinstance(tree, Mapping):
        return tree
    return {key: without_empty(value) for key, value in tree.items() if value is not None and value != {}}


def tiles(
    groups: Mapping[str, list[Run]],
    rows: Sequence[Mapping[str, Any]],
    title: str | None,
    who: Mapping[str, Any],
) -> list[tuple[str, str]]:
    """The few figures that say most, of the first kind of run that is not random: (figure, what it is)."""
    ours = next((row for row in rows if not is_random(row["label"])), rows[0])
    found = []
    if title and (value := ours["cells"][0]["mean"]) is not None:
        found.append((f"{value:.3f}", f"{title}, {ours['label']}"))
    if ours["ratio"] is not None:
        what = f"as much as random survivors reach with the same settings, at step {ours['ratio_step']:,}"
        found.append((f"{ours['ratio']:.2f}×", f"{what}, the last at which both were evaluated"))
    truth = who["truth"].get(ours["label"])
    if (matched := tables.settled(groups[ours["label"]], "selection/matched_share")) is not None:
        found.append((f"{matched:.0%}", "of candidates match their caption, by the run's own estimate"))
    if truth is None:
        return found
    for kind, what in (("clean", "match their caption"), ("near-duplicate", "are near-duplicates")):
        of = truth["kinds"].get(kind)
        if of is not None and of["of_survivors"] is not None:
            found.append((f"{of['of_survivors']:.0%}", f"of survivors {what}, of candidates {of['of_candidates']:.0%}"))
    return found


def is_random(label: str) -> bool:
    return label.split(",")[0] == "random"


def title_of(runs: Sequence[Run]) -> str:
    """What the page is about."""
    names = list(dict.fromkeys(run.selector for run in runs))
    others = [name for name in names if name != "random"]
    return f"{', '.join(others)} against random" if others and "random" in names else ", ".join(names)


def page(runs: Sequence[Run]) -> str:
    """The page about `runs`, HTML."""
    groups = grouped(runs)
    keys = tables.evaluations(runs)
    who = survival(groups)
    titles, first = tables.titles_of(keys), tables.telling(keys, MOST_COLUMNS)
    rows = tables.headline(groups, first)
    css, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        css=Markup(css),
        script=Markup(script),
        css_hash=sha256(css),
        script_hash=sha256(script),
        title=title_of(runs),
        num_runs=len(runs),
        groups=groups,
        columns=[titles[key] for key in first],
        titles=list(titles.values()),
        headline=rows,
        every={label: [tables.figure(tables.numbers(of, key)) for key in keys] for label, of in groups.items()},
        tiles=tiles(groups, rows, titles[first[0]] if first else None, who),
        equal=tables.equal_samples(groups),
        curves=curves(groups, keys),
        certificates=pairs_of_lines(groups, CERTIFICATE, "residual"),
        matches=pairs_of_lines(groups, MATCHES, "share"),
        galleries=galleries(groups),
        who=who,
        times=step_times(groups),
        evaluated=[(run.name, run.evaluation) for of in groups.values() for run in of if run.evaluation],
        recipes=recipes(groups),
        missing=[(run.name, run.missing) for of in groups.values() for run in of if run.missing],
    )


def sha256(text: str) -> str:
    """As a Content-Security-Policy names what stands between <style> or <script>."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_report(places: Sequence[Path], out: Path) -> list[Run]:
    """Write the page about the runs in `places` to `out`, and return them.

    Raises:
        ValueError: no runs there, or metrics that cannot be read.
    """
    files = dict.fromkeys(path.resolve() for place in places for path in find_runs(place))
    runs = [read_run(path) for path in files]
    html = page(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="metrics file, its folder, or a folder of runs"
    )
    parser.add_argument(
        "-o", "--out", type=Path, help="page to write (report.html, in the run's folder if that is all that is given)"
    )
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = (args.runs[0] if len(args.runs) == 1 and args.runs[0].is_dir() else Path()) / "report.html"
    start = time.perf_counter()
    try:
        runs = write_report(args.runs, args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        for what in run.missing:
            print(f"{run.name}: no {what}")
    size = args.out.stat().st_size
    seconds = time.perf_counter() - start
    print(f"{args.out}: {len(runs)} run{'s' * (len(runs) != 1)}, {size / 1e6:.2f} MB, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
