"""tools/report.py: what it says of runs, and the page in a real Chromium."""

from __future__ import annotations

import base64
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report
import report_figures as figures
import report_tables as tables
from browser import chromium
from corpora import TINY_MODEL, draw_corpus
from PIL import Image
from run_files import find_runs, grouped, random_twins, read_run

from clipcov_stream.candidates import encoded_thumbnail
from clipcov_stream.ledger import encoded_header, path_of

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"
METRIC = "metrics/shapes/mean_per_class"
PIXEL = str(encoded_thumbnail(Image.new("RGB", (8, 8), "red"))["jpeg"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's output on a tiny corpus: two real runs and the report that it ends with."""
    root = tmp_path_factory.mktemp("quickstart")
    corpus = draw_corpus(root / "shapes")
    tiny = (f"model.config={json.dumps(TINY_MODEL)}", "stream.global_pool_size=40", "stream.num_workers=0")
    command = [sys.executable, "tools/quickstart.py", "--data", str(corpus), "--out", str(root / "out"), "--steps", "4"]
    done = subprocess.run(
        [*command, *tiny, "selection.warmup=1ba", "eval_interval=2ba", "gallery_interval=1ba"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"report: {root / 'out' / 'report.html'}" in done.stdout
    return root / "out"


def write_run(folder: Path, selector: str, seed: int, scores: list[float], **recipe: Any) -> Path:
    """A run as training leaves it: an evaluation every ten steps, with `scores`."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for number, score in enumerate(scores, 1):
            step = 10 * number
            steps = {"selection/samples_seen": 128 * step, "selection/samples_streamed": 640 * step}
            times = {"selection/step_ms": 100.0, "selection/wait_ms": 60.0}
            if selector != "random":
                times |= {"selection/embed_ms": 40.0, "selection/select_ms": 10.0, "selection/learn_ms": 5.0}
                steps |= {"selection/residual_total": 1 / step, "selection/residual_total_random": 2 / step}
                steps |= {"selection/aim_residual": 3 / step, "selection/aim_residual_bound": 4 / step}
                steps |= {"selection/matched_share": number / 10, "selection/random_share": 1 / number}
            file.write(json.dumps({"step": step, **steps, **times}) + "\n")
            file.write(json.dumps({"step": step, METRIC: score, "samples_streamed": 640 * step}) + "\n")
    tree = {"run_name": f"{selector}_{seed}", "seed": seed, "selection": {"selector": selector, "seed": seed}, **recipe}
    about = {"recipe": tree, "versions": {"torch": "2.7.0"}, "started": "a", "ended": "b"}
    (folder / "metrics.about.json").write_text(json.dumps(about))
    return folder


def write_gallery(folder: Path, caption: str, run_name: str | None = None) -> None:
    """A gallery beside a run's metrics, of that run unless another is named."""
    entry = {"id": 1, "caption": caption, "class": "0", "duplicate_of": caption, "flags": [caption], "jpeg": PIXEL}
    shown = [{**entry, "kept": kept, "place": 0, "gain": 1.5, "alignment": 0.5} for kept in (True, False)]
    counts = {"words": {caption: [9, 4]}, "classes": {"0": [9, 4]}, "flags": {"mismatched": [4, 0]}}
    record = {"step": 9, "is_warmup": False, "pool_size": 10, "num_kept": 5, "looked_at": [10, 5], "num_unread": 0}
    record |= {"num_undecodable": 0, "copies_by": "duplicate_of", "copies": [2, 1], "groups": [1, 1], "shown": shown}
    (folder / "gallery").mkdir()
    run_name = run_name or read_run(folder / "metrics.jsonl").name
    lines = ({"version": 1, "run_name": run_name, "classes": [caption]}, {**record, **counts})
    (folder / "gallery" / "gallery.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Text(HTMLParser):
    """What a browser would make of a page: its elements, and the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text.append(data)

    @classmethod
    def of(cls, page: str) -> Text:
        parsed = cls()
        parsed.feed(page)
        return parsed

    @property
    def said(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def page_of(*places: Path) -> str:
    return report.page([read_run(path) for place in places for path in find_runs(place)])


def test_figures_are_means_and_spreads_over_seeds(tmp_path: Path) -> None:
    scores = {0: [0.1, 0.21], 1: [0.1, 0.26], 2: [0.1, 0.22]}
    for seed, of_seed in scores.items():
        write_run(tmp_path / f"c{seed}", "clipcov", seed, of_seed)
        write_run(tmp_path / f"r{seed}", "random", seed, [0.1, 0.1 + seed / 100])
    groups = grouped([read_run(path) for path in find_runs(tmp_path)])
    assert [(label, len(runs)) for label, runs in groups.items()] == [("random", 3), ("clipcov", 3)]
    random, clipcov = tables.headline(groups, [METRIC])
    last = [of_seed[-1] for of_seed in scores.values()]
    assert clipcov["cells"][0]["mean"] == pytest.approx(np.mean(last))
    assert clipcov["cells"][0]["spread"] == pytest.approx(np.std(last, ddof=1))
    assert clipcov["ratio"] == pytest.approx(np.mean(last) / 0.11) and random["ratio"] is None
    assert (clipcov["seen"], clipcov["streamed"], clipcov["minutes"]) == (2560, 12800, pytest.approx(0.2 / 60))
    said = Text.of(page_of(tmp_path)).said
    assert f"{statistics.fmean(last):.3f} ± {statistics.stdev(last):.3f}" in said
    assert "2.09× as much as random survivors reach with the same settings, at step 20, the last at which" in said
    assert "All saw, and streamed, as many samples as each other" in said


def test_a_run_that_stopped_early_is_compared_where_both_were(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "clipcov", 0, [0.1, 0.2, 0.3])
    short = write_run(tmp_path / "b", "clipcov", 1, [0.3, 0.4])
    about = json.loads((short / "metrics.about.json").read_text())
    (short / "metrics.about.json").write_text(json.dumps({**about, "ended": None}))
    with (short / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "metrics/sha')  # killed in the middle of a line
    groups = grouped([read_run(path) for path in find_runs(tmp_path)])
    (row,) = tables.headline(groups, [METRIC])
    assert row["cells"][0]["mean"] == pytest.approx((0.2 + 0.4) / 2)
    assert row["status"] == "finished; at step 20, not ended"
    assert not tables.equal_samples(groups)


def test_the_random_twin_has_all_the_same_settings_and_a_step_in_common(tmp_path: Path) -> None:
    def settings(value: int) -> dict[str, Any]:
        return {"stream": {"global_pool_size": value, "num_workers": value, "batch_size": value}}

    write_run(tmp_path / "r1", "random", 0, [0.1, 0.2, 0.4], **settings(1))
    write_run(tmp_path / "c1", "clipcov", 1, [0.3, 0.5], **settings(1))
    write_run(tmp_path / "c2", "clipcov", 0, [0.3, 0.5], **settings(2))  # no random run has these settings
    three = settings(1)
    three["stream"]["batch_size"] = 3  # the third key that differs, which no label has
    write_run(tmp_path / "c3", "clipcov", 0, [0.3, 0.5], **three)
    write_run(tmp_path / "r3", "random", 0, [0.1, 0.1], **three)
    (tmp_path / "clipcov").mkdir()
    (tmp_path / "clipcov" / "metrics.jsonl").write_text(json.dumps({"step": 20, METRIC: 0.5}) + "\n")
    runs = [read_run(path) for path in find_runs(tmp_path)]
    groups = grouped(runs)
    rows = {groups[row["label"]][0].metrics_file.parent.name: row for row in tables.headline(groups, [METRIC])}
    found = {name: (row["ratio"], row["ratio_step"]) for name, row in rows.items()}
    none = (None, None)
    assert found.pop("c1") == (pytest.approx(0.5 / 0.2), 20) and found.pop("c3") == (pytest.approx(5), 20)
    assert found == {"r1": none, "r3": none, "c2": none, "clipcov": none}  # the last has no recipe
    apart = [write_run(tmp_path / "other" / name, name, 0, [0.1]) for name in ("clipcov", "random")]
    metrics = apart[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 10', '"step": 11'))
    rows = tables.headline(grouped([read_run(path / "metrics.jsonl") for path in apart]), [METRIC])
    assert [row["ratio"] for row in rows] == [None, None]


def test_a_page_says_how_much_of_the_stream_matches(tmp_path: Path) -> None:
    """By the mean of the last quarter of a run's steps; random survivors say nothing of it."""
    for name, selector, seed in (("a", "clipcov", 0), ("b", "clipcov", 1), ("c", "random", 0)):
        write_run(tmp_path / name, selector, seed, [0.1] * 8)
    *ours, twin = (read_run(tmp_path / name / "metrics.jsonl") for name in ("a", "b", "c"))
    assert tables.settled(ours, "selection/matched_share") == pytest.approx((0.7 + 0.8) / 2)
    assert tables.settled(ours[:1], "selection/random_share") == pytest.approx((1 / 7 + 1 / 8) / 2)
    assert tables.settled([twin], "selection/matched_share") is None
    page = report.page([*ours, twin])
    assert "<strong>75%</strong><span>of candidates match their caption, by the run" in page
    assert re.search(r"clipcov: survivors still random ends at 0\.125", page)
    alone = report.page([twin])
    assert "No estimate was recorded" in alone and "of candidates match their caption, by" not in alone


def test_runs_of_other_recipes_are_other_kinds(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "clipcov", 0, [0.1], stream={"global_pool_size": 640, "shuffle_seed": 1})
    write_run(tmp_path / "b", "clipcov", 1, [0.1], stream={"global_pool_size": 640, "shuffle_seed": 2})
    write_run(tmp_path / "c", "clipcov", 0, [0.1], stream={"global_pool_size": 320, "shuffle_seed": 1})
    groups = grouped([read_run(path) for path in find_runs(tmp_path)])
    assert {label: len(runs) for label, runs in groups.items()} == {
        "clipcov, global_pool_size=640": 2,
        "clipcov, global_pool_size=320": 1,
    }
    assert "stream.global_pool_size" in Text.of(page_of(tmp_path)).said


def test_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    runs = [read_run(find_runs(write_run(tmp_path / "a", "clipcov", 0, [0.1, 0.2, 0.3]))[0])]
    assert list((tables.step_parts(runs) or {}).values()) == [10.0, 40.0, 10.0, 35.0, 5.0]
    ahead = write_run(tmp_path / "b", "clipcov", 0, [0.1, 0.2], selection={"selector": "clipcov", "run_ahead": 2})
    runs = [read_run(find_runs(ahead)[0])]
    assert list((tables.step_parts(runs) or {}).values()) == [60.0, 0.0, 0.0, 35.0, 5.0]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.jsonl").write_text('{"step": 1, "selection/wait_ms": 3}\n')
    assert tables.step_parts([read_run(tmp_path / "c" / "metrics.jsonl")]) is None


def test_keep_rates_are_of_all_records(tmp_path: Path) -> None:
    write_gallery(write_run(tmp_path / "a", "clipcov", 0, [0.1]), "shoe")
    write_gallery(write_run(tmp_path / "b", "clipcov", 1, [0.1]), "shoe")
    groups = grouped([read_run(path) for path in find_runs(tmp_path)])
    truth = tables.truth(tables.selecting_records(groups["clipcov"])) or {}
    kinds = truth["kinds"]
    assert kinds["mismatched"] == {"counts": [8, 0], "of_candidates": 0.4, "of_survivors": 0.0, "kept": 0.0}
    assert kinds["clean"] == {"counts": [12, 10], "of_candidates": 0.6, "of_survivors": 1.0, "kept": 10 / 12}
    assert kinds["near-duplicate"] == {"counts": [4, 2], "of_candidates": 0.2, "of_survivors": 0.2, "kept": 0.5}
    assert report.survival(groups)["words"]["rows"] == [{"name": "shoe", "candidates": 18, "kept": [8 / 18]}]


def test_bins_hold_all_classes_once() -> None:
    often = {str(kind): [100 - kind, 10] for kind in range(40)}
    seldom = {str(kind): [1, kind % 2] for kind in range(0, 40, 3)}
    ranks, rates = tables.by_frequency({"a": often, "b": seldom})
    assert ranks[:2] == ["1–7", "8–14"] and ranks[-1] == "35–40"
    in_order = sorted(range(40), key=lambda kind: -(100 - kind) - (kind % 3 == 0))
    first, last = in_order[:7], in_order[34:]
    assert rates["a"][0] == pytest.approx(70 / sum(100 - kind for kind in first))
    ours = [kind for kind in last if kind % 3 == 0]
    assert rates["b"][-1] == pytest.approx(sum(kind % 2 for kind in ours) / len(ours))
    assert tables.by_frequency({"a": {"0": [3, 1]}, "b": {"1": [1, 1]}}) == (["1", "2"], {"a": [1 / 3, 0], "b": [0, 1]})


def test_hostile_text_is_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", HOSTILE, 0, [0.1], run_name=HOSTILE, how_to_get=HOSTILE)
    write_gallery(run, HOSTILE)
    write_run(tmp_path / "b", "random", 0, [0.1], how_to_get="else")
    page = page_of(tmp_path)
    assert "{{ 7 * 7 }}" in Text.of(page).said and "<script>alert" not in page
    parsed = Text.of(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert "src" not in attributes or str(attributes["src"]).startswith("data:image/"), (tag, attributes)
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert all(image["alt"] for image in images)
    assert sum(HOSTILE in str(image["alt"]) for image in images) >= 2


@pytest.mark.parametrize("content", ["whole", "{", "[]", '{"models": [{}]}'])
def test_figures_of_an_evaluation_afterwards_are_shown(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "a", "clipcov", 0, [])
    assert any("evaluations (eval.NAME.local" in what for what in read_run(folder / "metrics.jsonl").missing)
    one = {"title": "CIFAR-10", "standard": "top1", "metrics": {"top1": 0.4321}, "images": 1234, "classes": 10}
    model = {"label": HOSTILE, "selector": "clipcov", "samples_seen": 64, "samples_streamed": 640}
    found = {"models": [{**model, "sets": {"cifar10": one}, "averages": {}}], "missing": {}}
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(found) if content == "whole" else content)
    html, missing = page_of(folder), read_run(folder / "metrics.jsonl").missing
    if content == "whole":
        said = Text.of(html).said
        assert all(text in said for text in ("CIFAR-10", "1,234", "top-1 *", "0.4321", HOSTILE))
        assert "<img src=x" not in html and not any("evaluat" in what for what in missing)
    else:
        assert any("evaluation.json cannot be read" in what for what in missing)


def test_what_is_missing_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss/train/total": 3.0}\n')
    said = Text.of(page_of(tmp_path / "run")).said
    for key in ("eval.NAME.local", "gallery=runs/{run_name}/gallery", "ledger=runs/{run_name}/ledger", "metrics_file"):
        assert key in said, key
    assert "run: no recipe and versions" in said


def test_random_alone_and_empty_metrics_make_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "r", "random", 0, [0.1])
    said = Text.of(page_of(tmp_path / "r")).said
    assert "No residual was recorded" in said and "× as much as random" not in said
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "metrics.jsonl").write_text("")
    assert "1 run of 1 kind" in Text.of(page_of(tmp_path / "e")).said


def test_runs_are_found_by_file_folder_and_folder_of_folders(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", "random", 0, [0.1])
    write_run(tmp_path / "runs" / "b", "clipcov", 0, [0.1])
    both = [tmp_path / "runs" / name / "metrics.jsonl" for name in "ab"]
    assert find_runs(tmp_path / "runs") == both
    assert find_runs(both[0].parent) == find_runs(both[0]) == both[:1]
    # Also a file beside the folder of the same name that has the checkpoints.
    for name in ("metrics.jsonl", "metrics.about.json"):
        shutil.copy(tmp_path / "runs" / "a" / name, tmp_path / name.replace("metrics", "cc"))
    (tmp_path / "cc").mkdir()
    assert find_runs(tmp_path / "cc") == find_runs(tmp_path) == [tmp_path / "cc.jsonl"]
    with pytest.raises(ValueError, match="no run there; a run is a metrics file"):
        find_runs(tmp_path / "nothing")
    assert report.main([str(tmp_path / "nothing")]) == 2
    (tmp_path / "bad.jsonl").write_text("{\n{}\n")
    assert report.main([str(tmp_path / "bad.jsonl")]) == 2


def test_all_runs_of_a_folder_are_found_and_none_of_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = write_run(tmp_path / "runs" / "q", "random", 0, [0.1]) / "metrics.jsonl"
    for name in ("metrics.jsonl", "metrics.about.json"):
        shutil.copy(inner.with_name(name), tmp_path / "runs" / name.replace("metrics", "b"))
    assert find_runs(tmp_path / "runs") == [tmp_path / "runs" / "b.jsonl", inner]
    # A name with a dot has no suffix to take off: lr0.jsonl is of another run.
    (tmp_path / "lr0.jsonl").write_text("")
    (tmp_path / "lr0.5").mkdir()
    with pytest.raises(ValueError, match="no run there"):
        find_runs(tmp_path / "lr0.5")
    (tmp_path / "lr0.5.jsonl").write_text("")
    assert find_runs(tmp_path / "lr0.5") == [tmp_path / "lr0.5.jsonl"]
    monkeypatch.chdir(inner.parent)
    assert find_runs(Path()) == [Path("metrics.jsonl")]


def write_ledger(folder: Path, run_name: str) -> None:
    folder.mkdir()
    header = {"version": 2, "run_name": run_name, "pool_size": 4, "num_ranks": 1, "rank": 0}
    path_of(folder, 0).write_bytes(encoded_header(header))


def test_a_gallery_and_a_ledger_are_shown_only_of_their_own_run(tmp_path: Path) -> None:
    own = tmp_path / "own"
    run = write_run(
        tmp_path / "a", "clipcov", 0, [0.1], run_name="a", **{k: str(own / k) for k in ("gallery", "ledger")}
    )
    write_gallery(run, "theirs", "b")
    write_ledger(run / "ledger", "b")
    missing = " ".join(read_run(run / "metrics.jsonl").missing)
    assert missing.count("is of run 'b', not 'a'") == 2
    shutil.copytree(run, own)  # both where the recipe says, of run a
    for key in ("gallery", "ledger"):
        shutil.rmtree(own / key)
    write_gallery(own, "ours", "a")
    write_ledger(own / "ledger", "a")
    read = read_run(run / "metrics.jsonl")
    assert read.classes == ["ours"] and [record.header["run_name"] for record in read.ledger or []] == ["a"]
    assert read.missing == ()
    moved = tmp_path / "moved"
    own.rename(moved)  # with its metrics, gallery and ledger together
    read = read_run(moved / "metrics.jsonl")
    assert read.classes == ["ours"] and read.ledger and read.missing == ()


def test_a_page_shows_no_folder_of_the_machine_it_was_made_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = tmp_path / "jane doe" / "deep" / "er"
    monkeypatch.chdir(
        write_run(tmp_path / "here", "random", 0, [0.1], stream={"local": str(tmp_path / "here" / "mds")})
    )
    paths = {"gallery": str(away / "gallery"), "remotes": ["s3://bucket/a", f"file://{away}/b"]}
    run = write_run(away, "clipcov", 0, [0.1], stream={"local": str(away / "mds")}, **paths)
    write_gallery(run, "shoe")
    (run / "gallery" / "gallery.jsonl").write_text("{}\n")
    (run / "ledger").mkdir()  # whose run nothing says
    page = page_of(tmp_path / "here", away)
    assert "jane" not in page and str(tmp_path) not in page
    said = Text.of(page).said
    for shown in ("metrics metrics.jsonl", '"mds"', '"…/er/mds"', "local=…/er/mds", "file://…/er/b", "s3://bucket/a"):
        assert shown in said, shown
    assert "…/er/gallery/gallery.jsonl is not a gallery of this version" in said
    assert "…/er/ledger is of no run that it names, not 'clipcov_0'" in said


def test_runs_evaluated_at_different_times_are_all_drawn() -> None:
    runs = [([1.0, 2.0], [0.1, 0.2]), ([1.5, 2.5], [0.1, 0.4])]
    text, url = figures.lines("top1", "samples_seen", [figures.Line("clipcov", runs, "#0b64b5")])
    assert text.endswith(": run 1 of clipcov ends at 0.2; run 2 of clipcov ends at 0.4.")
    _, one = figures.lines("top1", "samples_seen", [figures.Line("clipcov", runs[:1], "#0b64b5")])
    drawn = [base64.b64decode(each.partition(",")[2]).decode() for each in (url, one)]
    strokes = [svg.count("stroke-width: 1.8") for svg in drawn]
    assert strokes[0] == strokes[1] + 1  # a line more, and no second entry of the legend
    assert [svg.count(">clipcov<") for svg in drawn] == [1, 1]
    text, _ = figures.lines("top1", "samples_seen", [figures.Line("clipcov", [*runs[:1] * 2], "#0b64b5")])
    assert text.endswith(": clipcov ends at 0.2.")


def test_a_pick_without_a_place_is_shown_without_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "jest", 0, [0.1])
    write_gallery(run, "shoe")
    assert "pick 1" in Text.of(page_of(run)).said
    path = run / "gallery" / "gallery.jsonl"
    path.write_text(path.read_text().replace('"place": 0, ', ""))
    said = Text.of(page_of(run)).said
    assert "pick 1" not in said and "Kept: 1 of 5" in said


def test_classes_are_named_by_decimal_numbers_alone() -> None:
    names = ["shoe", "hat"]
    found = [report.class_name(kind, names) for kind in ("1", "2", "²", "red", None)]
    assert found == ["hat", "class 2", "²", "red", None]


def test_thumbnails_stay_within_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a", "clipcov", 0, [0.1])
    write_gallery(run, "shoe")
    path = run / "gallery" / "gallery.jsonl"
    header, record = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(x) + "\n" for x in (header, *({**record, "step": s} for s in range(9)))))
    groups = grouped([read_run(path) for path in find_runs(run)])
    (gallery,) = report.galleries(groups)
    assert [each["step"] for each in gallery["records"]] == [8, 6, 4, 2, 0]
    monkeypatch.setattr(report, "MOST_THUMBNAILS", 5 * len(PIXEL))
    (gallery,) = report.galleries(groups)
    assert [each["step"] for each in gallery["records"]] == [8, 4]


def test_real_runs_that_differ_in_their_selector_are_twins(trained: Path) -> None:
    groups = grouped([read_run(path) for path in find_runs(trained)])
    assert random_twins(groups) == {"random": None, "clipcov": "random"}
    assert all(run.gallery for runs in groups.values() for run in runs)


def test_the_same_runs_give_the_same_page(trained: Path) -> None:
    assert page_of(trained) == page_of(trained) == (trained / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages to open, by name: real runs, and hostile ones."""
    folder = tmp_path_factory.mktemp("hostile")
    write_gallery(write_run(folder / "a", HOSTILE, 0, [0.1], run_name=HOSTILE), HOSTILE)
    report.write_report([folder], folder / "report.html")
    return {"real": trained / "report.html", "hostile": folder / "report.html"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """A page in a window, and whatever it complained of or asked for."""
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    asked = ("file:", "data:")
    page.on("request", lambda request: None if request.url.startswith(asked) else faults.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    return page, faults


@pytest.mark.parametrize("name", ["real", "hostile"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_the_page_opens_without_faults_at_any_width(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    page, faults = opened(browser, pages[name], width, scheme)
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(sizes) > 3 and min(sizes) > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = "[...document.querySelectorAll('img')].filter(image => !image.alt).length"
    assert page.evaluate(unnamed) == 0 and page.evaluate("document.documentElement.lang") == "en"
    assert faults == []
    page.close()


def test_the_table_sorts_by_the_heading_that_is_pressed(browser: Any, pages: dict[str, Path]) -> None:
    page, faults = opened(browser, pages["real"], 1280)
    heading = page.locator("#headline th", has_text="minutes")
    column = heading.evaluate("heading => heading.cellIndex")
    values = (
        f"[...document.querySelectorAll('#headline tbody tr')].map(row => Number(row.cells[{column}].dataset.value))"
    )
    heading.locator("button").click()
    falling = page.evaluate(values)
    assert heading.get_attribute("aria-sort") == "descending" and falling == sorted(falling, reverse=True)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending" and page.evaluate(values) == falling[::-1] != falling
    page.locator("#headline th button", has_text="runs").press("Enter")  # by the keyboard, as text
    labels = page.locator("#headline tbody th").all_text_contents()
    assert labels == ["clipcov", "random"] and heading.get_attribute("aria-sort") is None
    ratio = page.locator("#headline th button", has_text="random").last
    for _ in range(2):  # random's own ratio is missing, and stays last either way
        ratio.click()
        assert page.locator("#headline tbody th").all_text_contents() == ["clipcov", "random"]
    assert faults == []
    page.close()


def test_the_page_prints(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    page, faults = opened(browser, pages["real"], 1280)
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 30
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    page.set_viewport_size({"width": 760, "height": 1000})  # A4 within its margins, about
    assert page.evaluate("document.documentElement.scrollWidth") <= 760
    assert faults == []
    page.close()


def test_the_page_of_real_runs_says_what_they_were(browser: Any, pages: dict[str, Path]) -> None:
    assert pages["real"].stat().st_size < 5_000_000
    page, faults = opened(browser, pages["real"], 1280)
    text = page.inner_text("body")
    assert re.search(r"2 runs of 2 kinds\. All saw, and streamed, as many samples", text)
    assert "What was kept, what was dropped" in text and "mismatched" in text
    kept = page.locator(".thumbs.kept").first.locator("li")
    assert kept.count() == 8 and kept.locator("img").count() == 8
    assert page.locator("pre").first.text_content().startswith("model:\n")
    assert faults == []
    page.close()
