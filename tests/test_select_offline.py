"""Offline CLIPCov against its formulas written out naively, and the tool on real MDS folders."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import select_offline
import torch
from select_offline import clipcov_greedy, main, spherical_kmeans, unit_rows, usable_rows
from streaming import MDSWriter, StreamingDataset
from streaming.base.format import reader_from_json

# The oracle: float64 NumPy, all of it recomputed at every pick ------------------------------------------------------


def unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def oracle(image, text, labels, num, class_text=None, refresh=200) -> tuple[list[int], list[float]]:
    """Picks and their scores, each from the whole history: no state but the picks so far."""
    x, y, n = unit(image), unit(text), len(image)
    cosine = x @ y.T
    kept = cosine * (cosine > 0)
    members = {k: [i for i in range(n) if labels[i] == k] for k in sorted(set(labels))}
    raw, label_sim, initial = np.zeros(n), np.zeros(n), np.zeros(n)
    for i in range(n):
        k = labels[i]
        own, rest = members[k], [j for j in range(n) if labels[j] != k]
        center = y[own].sum(0) if class_text is None else np.asarray(class_text[k], dtype=np.float64)
        raw[i] = sum(kept[i, j] + kept[j, i] for j in own) / len(own)
        label_sim[i] = y[i] @ center / np.linalg.norm(center)
        itc = np.mean([cosine[i, j] for j in rest]) if rest else 0.0
        tic = np.mean([cosine[j, i] for j in rest]) if rest else 0.0
        initial[i] = raw[i] + 2 * cosine[i, i] + label_sim[i] / 2 - (itc + tic)

    def score_now(i: int, picks: list[int]) -> float:
        own = members[labels[i]]
        picked = [j for j in picks if labels[j] == labels[i]]
        ends = [count for count in range(1, len(picked) + 1) if (count + 1) % refresh == 0]
        value = initial[i]
        for begin, end in zip([0, *ends], ends, strict=False):
            value -= sum(kept[i, j] + kept[j, i] for j in picked[begin:end]) / len(own)
            value -= sum(raw[j] for j in picked[:end]) / len(own)
            value -= sum(label_sim[j] / 2 for j in picked[begin:end]) / len(own)
        return value

    picks, scores = [], []
    for _ in range(num):
        now = [-np.inf if i in picks else score_now(i, picks) for i in range(n)]
        picks.append(int(np.argmax(now)))
        scores.append(now[picks[-1]])
    return picks, scores


def draw(seed: int, n: int, dim: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy pairs of unequal classes, of any length, with cosines of both signs."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.4, n) - 1, classes - 1)
    base = rng.normal(size=(classes, dim))[labels]
    image, text = base + rng.normal(size=(n, dim)), base + 1.5 * rng.normal(size=(n, dim))
    return torch.from_numpy(image * rng.uniform(0.1, 9, (n, 1))), torch.from_numpy(text), torch.from_numpy(labels)


# The maths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("seed", "n", "dim", "classes"), [(0, 30, 4, 3), (1, 41, 9, 5), (2, 25, 3, 1), (3, 12, 2, 12)])
@pytest.mark.parametrize("given", [True, False])
def test_picks_and_scores_are_those_of_the_formulas(refresh, seed, n, dim, classes, given) -> None:
    image, text, labels = draw(seed, n, dim, classes)
    class_text = torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed)) if given else None
    picks, scores = clipcov_greedy(image, text, labels, n, class_text, refresh)
    wanted_picks, wanted_scores = oracle(image.numpy(), text.numpy(), labels.tolist(), n, class_text, refresh)
    assert picks.tolist() == wanted_picks
    assert scores.numpy() == pytest.approx(wanted_scores, rel=1e-6, abs=1e-6)
    assert scores.dtype == torch.float64 and picks.dtype == torch.int64


def test_float32_picks_the_same() -> None:
    image, text, labels = (part.float() if part.is_floating_point() else part for part in draw(4, 60, 16, 4))
    picks, scores = clipcov_greedy(image, text, labels, 40, refresh=5)
    wanted_picks, wanted_scores = oracle(image.numpy(), text.numpy(), labels.tolist(), 40, refresh=5)
    assert picks.tolist() == wanted_picks
    assert scores.numpy() == pytest.approx(wanted_scores, abs=1e-5)


def test_refreshes_matter() -> None:
    """Lest the comparisons above hold because nothing ever changes."""
    image, text, labels = draw(0, 30, 4, 3)
    orders = {tuple(clipcov_greedy(image, text, labels, 30, refresh=refresh)[0].tolist()) for refresh in (1, 2, 3, 31)}
    assert len(orders) == 4


def test_the_first_refresh_comes_one_pick_early_as_released() -> None:
    image, text, labels = draw(5, 20, 4, 1)
    never = clipcov_greedy(image, text, labels, 20, refresh=21)[1]
    at_three = clipcov_greedy(image, text, labels, 20, refresh=4)[1]
    assert at_three[:3].tolist() == never[:3].tolist()
    assert at_three[3] < never[3]


def test_the_deduction_of_raw_accumulates() -> None:
    """Identical pairs: raw = 2, e = L = 1, no other class; the pth pick subtracts the raws of all p once more."""
    image = torch.ones(4, 1, dtype=torch.float64)
    _, scores = clipcov_greedy(image, image, torch.zeros(4, dtype=torch.int64), 4, refresh=1)
    expected, total = 2 + 2 + 0.5, []
    for picked in range(4):
        total.append(expected)
        expected -= (2 + 2 * (picked + 1) + 0.5) / 4
    assert scores.tolist() == pytest.approx(total)


def test_equal_scores_go_to_the_lower_index() -> None:
    image = torch.eye(2, dtype=torch.float64).repeat(5, 1)  # one-hot, so that all sums are exact
    labels = torch.tensor([0, 1] * 5)
    picks, _ = clipcov_greedy(image, image, labels, 10, refresh=100)
    assert picks.tolist() == list(range(10))


def test_easiness_keeps_its_sign() -> None:
    """The threshold cuts sums alone: of two mismatched pairs the worse one still goes last."""
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[-1.0, 0.0], [-0.1, 1.0], [0.0, 1.0]])
    picks, scores = clipcov_greedy(image, text, torch.tensor([0, 1, 2]), 3, image, refresh=1)
    assert picks.tolist() == [2, 1, 0]
    assert scores.tolist() == pytest.approx(oracle(image, text, [0, 1, 2], 3, image, 1)[1], abs=1e-6)


def test_a_smaller_budget_is_the_head_of_a_larger_one() -> None:
    image, text, labels = draw(6, 50, 5, 4)
    whole = clipcov_greedy(image, text, labels, 50, refresh=4)[0]
    assert sorted(whole.tolist()) == list(range(50))
    for num in (1, 7, 49):
        assert torch.equal(clipcov_greedy(image, text, labels, num, refresh=4)[0], whole[:num])


def test_blocks_and_unused_labels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, labels = draw(7, 40, 6, 3)
    picks, scores = clipcov_greedy(image, text, labels, 40, refresh=6)
    monkeypatch.setattr(select_offline, "BLOCK", 50)
    small_picks, small_scores = clipcov_greedy(image, text, labels * 10 + 3, 40, refresh=6)
    assert torch.equal(picks, small_picks)
    assert scores.tolist() == pytest.approx(small_scores.tolist())
    rows = unit_rows(image)
    assert torch.equal(select_offline.nearest(rows, rows), torch.arange(40))


def test_no_matrix_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest similarity matrix asked for is a block of one class."""
    image, text, labels = draw(8, 60, 6, 5)
    sizes = []
    plain = torch.Tensor.__matmul__

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        sizes.append((product := plain(left, right)).numel())
        return product

    monkeypatch.setattr(select_offline, "BLOCK", 100)
    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    clipcov_greedy(image, text, labels, 60, refresh=4)
    assert max(sizes) <= 100


BAD_INPUT = [
    ({"image": torch.ones(4, 3)}, r"\(4, 3\), \(4, 2\), \(4,\); they must be"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"\(3,\); they must be"),
    ({"num": 0}, "num=0 must be from 1 to 4"),
    ({"num": 5}, "num=5 must be from 1 to 4"),
    ({"refresh": 0}, "refresh=0 must be from 1"),
    ({"labels": torch.tensor([0, -1, 0, 0])}, "labels run from -1 to 0"),
    ({"class_text": torch.ones(1, 2), "labels": torch.arange(4)}, "labels run from 0 to 3; they must be from 0 to 0"),
    ({"class_text": torch.ones(1, 3)}, "class_text has width 3, the samples have 2"),
    ({"class_text": torch.zeros(1, 2)}, "class_text row 0 is zero"),
    ({"text": torch.tensor([[1.0, 0], [0, float("nan")], [1, 1], [1, 1]])}, "text row 1 is zero or not finite"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_INPUT)
def test_bad_tensors(changed, message) -> None:
    good = {"image": torch.ones(4, 2), "text": torch.ones(4, 2), "labels": torch.zeros(4, dtype=torch.int64), "num": 2}
    with pytest.raises(ValueError, match=message):
        clipcov_greedy(**{**good, **changed})


def test_rows_without_direction() -> None:
    rows = torch.tensor([[1.0, 2], [0, 0], [float("inf"), 1], [1e30, -1e30], [1e-30, 0], [float("nan"), 0]])
    assert usable_rows(rows).tolist() == [True, False, False, True, True, False]
    assert unit_rows(rows[[0, 3, 4]]).norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert unit_rows(torch.ones(1, 4, dtype=torch.float16)).dtype == torch.float32


# Clusters ------------------------------------------------------------------------------------------------------------


def test_kmeans_finds_separate_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(60) % 6
    rows = (torch.eye(8)[truth] + 0.05 * torch.randn(60, 8, generator=generator)) * torch.rand(60, 1).add(0.1)
    for seed in range(5):
        labels = spherical_kmeans(rows, 6, seed)
        pairs = set(zip(truth.tolist(), labels.tolist(), strict=True))
        assert len(pairs) == 6
        assert torch.equal(labels, spherical_kmeans(rows, 6, seed))


def test_kmeans_ends_where_no_row_moves() -> None:
    rows = unit_rows(torch.randn(80, 3, generator=torch.Generator().manual_seed(1)))
    labels = spherical_kmeans(rows, 7, seed=2, iterations=1000)
    centers = torch.stack([rows[labels == k].sum(0) for k in labels.unique()])
    assert torch.equal(labels.unique()[(rows @ unit_rows(centers).T).argmax(1)], labels)


def test_kmeans_of_repeats_leaves_clusters_unused() -> None:
    rows = torch.eye(3).repeat(4, 1)
    assert len(spherical_kmeans(rows, 9).unique()) == 3
    assert spherical_kmeans(rows, 1).tolist() == [0] * 12
    for clusters in (0, 13):
        with pytest.raises(ValueError, match=f"clusters={clusters} must be from 1 to the 12 usable"):
            spherical_kmeans(rows, clusters)


# The tool ------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "image": "bytes",
    "caption": "str",
    "uid": "str",
    "label": "int",
    "notes": "json",
    "image_embedding": "ndarray",
    "text_embedding": "ndarray:float32:6",
}
CLASSES = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).numpy()


def corpus(n: int = 50) -> tuple[np.ndarray, np.ndarray]:
    image, text, _ = draw(11, n, 6, 4)
    return image.numpy().astype(np.float32), text.numpy().astype(np.float32)


def write_folder(out: Path, image, text, columns: dict[str, str] | None = None, **options) -> Path:
    columns = columns or COLUMNS
    with MDSWriter(columns=columns, out=str(out), size_limit=2048, **options) as writer:
        for i, (x, y) in enumerate(zip(image, text, strict=True)):
            sample = {
                "image": bytes([i % 256]) * (i % 7 + 1),
                "caption": f"größe {i}, 青",
                "uid": f'u,"{i}',
                "label": -i,
                "notes": {"b": i, "a": [1.5, None]},
                "image_embedding": x,
                "text_embedding": y,
            }
            writer.write({name: sample[name] for name in columns})
    return out


def raw_samples(folder: Path) -> list[dict[str, bytes]]:
    """Every column as its stored bytes."""
    readers = [
        reader_from_json(str(folder), None, s) for s in json.loads((folder / "index.json").read_text())["shards"]
    ]
    for reader in readers:
        reader.column_encodings = ["bytes"] * len(reader.column_names)  # pyright: ignore[reportAttributeAccessIssue]
    return [reader[i] for reader in readers for i in range(len(reader))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "classes.npy", CLASSES)
    return write_folder(tmp_path / "pairs", *corpus())


def select(folder: Path, out: Path, *options: object) -> int:
    options = options or ("--num", 20, "--clusters", 4)
    return main([str(folder), str(out), *map(str, options)])


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "subset.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def figures(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_tool_picks_what_the_formulas_pick(folder, tmp_path, capsys) -> None:
    options = ("--num", 20, "--class-embeddings", tmp_path / "classes.npy", "--refresh", 3)
    assert select(folder, tmp_path / "out", *options) == 0
    printed, (image, text) = figures(capsys), corpus()
    labels = (unit(image) @ unit(CLASSES).T).argmax(1).tolist()
    picks, scores = oracle(image, text, labels, 20, CLASSES, refresh=3)
    table = rows_of(tmp_path / "out")
    assert list(table[0]) == ["row", "uid", "class", "rank", "score"]
    assert [int(row["row"]) for row in table] == picks
    assert [row["uid"] for row in table] == [f'u,"{i}' for i in picks]
    assert [int(row["class"]) for row in table] == [labels[i] for i in picks]
    assert [int(row["rank"]) for row in table] == list(range(20))
    assert [float(row["score"]) for row in table] == pytest.approx(scores, abs=1e-5)
    alignment = (unit(image) * unit(text)).sum(1)
    assert printed.pop("seconds") > 0
    assert printed.pop("alignment_all") == pytest.approx(alignment.mean(), abs=1e-6)
    assert printed.pop("alignment_selected") == pytest.approx(alignment[picks].mean(), abs=1e-6)
    covered = len({labels[i] for i in picks}) / len(set(labels))
    assert printed == {
        "samples": 50,
        "invalid": 0,
        "classes": len(set(labels)),
        "selected": 20,
        "classes_covered": covered,
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["source.json", "subset.csv"]
    source = json.loads((tmp_path / "out" / "source.json").read_text())
    assert source["arguments"]["folder"] == "pairs" and source["arguments"]["class_embeddings"] == "classes.npy"
    assert source["counts"]["selected"] == 20 and str(tmp_path) not in json.dumps(source)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_chosen_samples_are_copied_byte_for_byte(compression, tmp_path) -> None:
    folder = write_folder(tmp_path / "pairs", *corpus(), compression=compression)
    plain = raw_samples(write_folder(tmp_path / "plain", *corpus()))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) > 3
    assert select(folder, tmp_path / "out", "--fraction", 0.3, "--clusters", 4, "--mds") == 0
    chosen = sorted(int(row["row"]) for row in rows_of(tmp_path / "out"))
    assert len(chosen) == 15
    assert raw_samples(tmp_path / "out" / "train") == [plain[row] for row in chosen]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    dataset = StreamingDataset(local=str(tmp_path / "out" / "train"), batch_size=1, shuffle=False)
    assert [dataset[i]["label"] for i in range(len(dataset))] == [-row for row in chosen]
    assert dataset[0]["notes"] == {"b": chosen[0], "a": [1.5, None]}
    assert np.array_equal(dataset[0]["image_embedding"], corpus()[0][chosen[0]])


def test_pickled_columns_are_copied_but_never_loaded(tmp_path, monkeypatch) -> None:
    columns = {"notes": "pkl", "image_embedding": "ndarray", "text_embedding": "ndarray"}
    folder = write_folder(tmp_path / "pairs", *corpus(), columns=columns)
    monkeypatch.setattr("pickle.loads", lambda data: pytest.fail("a pickle was loaded"))
    assert select(folder, tmp_path / "out", "--num", 5, "--clusters", 2, "--mds") == 0
    table, source = rows_of(tmp_path / "out"), raw_samples(folder)
    assert list(table[0]) == ["row", "class", "rank", "score"]
    chosen = sorted(int(row["row"]) for row in table)
    assert raw_samples(tmp_path / "out" / "train") == [source[row] for row in chosen]


def test_a_repeated_run_writes_the_same(folder, tmp_path) -> None:
    for name in ("one", "two"):
        assert select(folder, tmp_path / name, "--num", 30, "--clusters", 5, "--seed", 3, "--mds") == 0
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) >= 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_unusable_embeddings_are_counted_and_left_out(tmp_path, capsys) -> None:
    image, text = corpus()
    image[3, 2], text[7, 0], image[9] = np.nan, np.inf, 0
    folder = write_folder(tmp_path / "pairs", image, text)
    assert select(folder, tmp_path / "out", "--fraction", 1, "--clusters", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 samples with a NaN, inf or zero embedding, never picked: rows 3, 7, 9" in lines
    printed = json.loads(lines[-1])
    assert (printed["invalid"], printed["selected"], printed["samples"]) == (3, 47, 50)
    rows = sorted(int(row["row"]) for row in rows_of(tmp_path / "out"))
    assert rows == [row for row in range(50) if row not in (3, 7, 9)]
    keep = np.array(rows)
    clean = write_folder(tmp_path / "clean", image[keep], text[keep])
    assert select(clean, tmp_path / "other", "--fraction", 1, "--clusters", 3) == 0
    assert [int(r["row"]) for r in rows_of(tmp_path / "out")] == [
        rows[int(r["row"])] for r in rows_of(tmp_path / "other")
    ]
    assert select(folder, tmp_path / "more", "--num", 48, "--clusters", 3) == 2
    assert "48 samples to pick, but 47 of 50 are usable (--num)" in capsys.readouterr().err


def test_other_column_names_and_types(tmp_path) -> None:
    image, text = corpus()
    columns = {"a": "ndarray:float16", "b": "ndarray:float64:2,3", "uid": "int"}
    with MDSWriter(columns=columns, out=str(tmp_path / "pairs")) as writer:
        for x, y in zip(image, text, strict=True):
            writer.write({"a": x.astype(np.float16), "b": y.astype(np.float64).reshape(2, 3) * 1e300, "uid": 1})
    names = ("--image-embedding", "a", "--text-embedding", "b")
    assert select(tmp_path / "pairs", tmp_path / "inf", "--num", 20, "--clusters", 4, *names) == 2  # no float32 holds b
    with MDSWriter(columns=columns, out=str(tmp_path / "small")) as writer:
        for x, y in zip(image, text, strict=True):
            writer.write({"a": x.astype(np.float16), "b": y.astype(np.float64).reshape(2, 3), "uid": 1})
    assert select(tmp_path / "small", tmp_path / "out", "--num", 20, "--clusters", 4, *names) == 0
    assert list(rows_of(tmp_path / "out")[0]) == ["row", "class", "rank", "score"]  # uid is text or absent


def test_out_is_replaced_only_on_request(folder, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert select(folder, out, "--num", 5, "--clusters", 2) == 0
    first = (out / "subset.csv").read_bytes()
    assert select(folder, out, "--num", 6, "--clusters", 2) == 2
    assert "is not empty; give another folder, or --overwrite" in capsys.readouterr().err
    assert select(folder, out, "--num", 99, "--clusters", 2, "--overwrite") == 2
    assert (out / "subset.csv").read_bytes() == first
    for options in (("--mds",), (), ()):  # plain by MDS, MDS by plain, plain by plain
        assert select(folder, out, "--num", 6, "--clusters", 2, "--overwrite", *options) == 0
        assert len(rows_of(out)) == 6 and (out / "train").exists() == bool(options)
    (out / "mine.txt").write_text("keep")
    assert select(folder, out, "--num", 6, "--clusters", 2, "--overwrite") == 2
    assert (out / "mine.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.npy", "out", "pairs"]


def test_the_source_is_never_overwritten(folder, tmp_path, capsys) -> None:
    before = sorted(path.name for path in folder.iterdir())
    for out in (folder, tmp_path):
        assert select(folder, out, "--num", 5, "--clusters", 2, "--overwrite") == 2
        assert "is or holds FOLDER=" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_interrupted_run_leaves_nothing(folder, tmp_path, monkeypatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(select_offline, "write_subset", interrupt)
    with pytest.raises(KeyboardInterrupt):
        select(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.npy", "pairs"]


BAD_OPTIONS = [
    (("--fraction", 0, "--clusters", 2), "--fraction 0.0 must be above 0 and at most 1"),
    (("--fraction", 1.5, "--clusters", 2), "--fraction 1.5 must be above 0"),
    (("--fraction", "nan", "--clusters", 2), "--fraction nan must be above 0"),
    (("--num", 51, "--clusters", 2), "51 samples to pick, but 50 of 50 are usable (--num)"),
    (("--num", 5, "--clusters", 51), "clusters=51 must be from 1 to the 50 usable samples (--clusters)"),
    (("--num", 5, "--clusters", 2, "--image-embedding", "x"), "--image-embedding 'x' is no ndarray column"),
    (("--num", 5, "--clusters", 2, "--text-embedding", "caption"), "['image_embedding', 'text_embedding']"),
    (("--num", 5, "--class-embeddings", "none.npy"), "'none.npy' cannot be read"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(options, message, folder, tmp_path, capsys) -> None:
    assert select(folder, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num", 0, "--clusters", 2), "--num: '0' must be a whole number above 0"),
        (("--num", 1, "--clusters", 0), "--clusters: '0' must be"),
        (("--num", 1, "--clusters", 2, "--refresh", 0), "--refresh: '0' must be"),
        (("--num", 1, "--fraction", 0.1, "--clusters", 2), "not allowed with"),
        (("--num", 1), "--class-embeddings --clusters is required"),
        (("--clusters", 2), "--fraction --num is required"),
    ],
)
def test_bad_command_lines(options, message, folder, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        select(folder, tmp_path / "out", *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.ones((3, 5)), "of shape (3, 5); give a .npy file of numbers of shape (classes, 6) (--class-embeddings)"),
        (np.ones(6), "of shape (6,)"),
        (np.ones((0, 6)), "of shape (0, 6)"),
        (np.array([["a"] * 6]), "holds <U1"),
        (np.array([[1.0] * 6, [np.nan] * 6, [0.0] * 6]), "rows [1, 2] are zero or not finite"),
        (np.array([{}], dtype=object), "cannot be read"),
    ],
)
def test_bad_class_embeddings(table, message, folder, tmp_path, capsys) -> None:
    np.save(tmp_path / "bad.npy", table, allow_pickle=True)
    assert select(folder, tmp_path / "out", "--num", 5, "--class-embeddings", tmp_path / "bad.npy") == 2
    assert message in capsys.readouterr().err


def test_bad_folders(folder, tmp_path, capsys) -> None:
    def complaint(path: object) -> str:
        assert main([str(path), str(tmp_path / "out"), "--num", "5", "--clusters", "2"]) == 2
        return capsys.readouterr().err

    assert "has no index.json" in complaint(tmp_path / "nowhere") and "local MDS folder" in complaint("s3://bucket/x")
    assert "did you mean one of its splits, ['pairs']?" in complaint(tmp_path)
    (tmp_path / "odd").mkdir()
    for text in ("{", "{}", '{"version": 2, "shards": [{"version": 2, "format": "xyz"}]}'):
        (tmp_path / "odd" / "index.json").write_text(text)
        assert "is not the index of an MDS folder" in complaint(tmp_path / "odd")
    (tmp_path / "odd" / "index.json").write_text('{"version": 2, "shards": []}')
    assert "has no samples" in complaint(tmp_path / "odd")
    image, text = corpus()
    ragged = write_folder(tmp_path / "ragged", [*image[:4], image[4, :5]], text[:5])
    assert "row 4 of" in (error := complaint(ragged)) and "widths [5, 6]" in error and "--text-embedding" in error
    wide = write_folder(tmp_path / "wide", np.ones((3, 7)), text[:3])
    assert "row 0 of" in (error := complaint(wide)) and "widths [7, 6]" in error
    mixed = json.loads((folder / "index.json").read_text())
    mixed["shards"][1]["column_names"][0] = "other"
    (folder / "index.json").write_text(json.dumps(mixed))
    assert "shards with other columns" in complaint(folder)


def test_broken_and_missing_shards(folder, tmp_path, capsys) -> None:
    shard = folder / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:700])
    assert select(folder, tmp_path / "out") == 2
    assert "shard.00001.mds of" in capsys.readouterr().err
    shard.unlink()
    assert select(folder, tmp_path / "out") == 2
    assert "FileNotFoundError" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_as_a_script(folder, tmp_path) -> None:
    script = Path(select_offline.__file__)
    command = [sys.executable, str(script), str(folder), str(tmp_path / "out"), "--num", "5", "--clusters", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["selected"] == 5
    assert "pick: 100%" in done.stderr and "5/5" in done.stderr
