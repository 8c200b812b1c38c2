"""The paper's baselines offline, beside loops in float64 NumPy that know nothing of the tool."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import select_rivals
import torch
from streaming import MDSWriter
from subset_folder import PairFolder

NUM, DIM, CLUSTERS = 60, 6, 5


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = unit(rng.normal(size=(NUM, DIM)))
    image[40:50] = unit(image[:10] + 0.05 * rng.normal(size=(10, DIM)))  # near duplicates
    return image.astype(np.float32), unit(rng.normal(size=(NUM, DIM))).astype(np.float32)


def write(folder: Path, image: np.ndarray, text: np.ndarray) -> Path:
    columns = {"caption": "str", "image": "bytes", "image_embedding": "ndarray", "text_embedding": "ndarray"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for row, (x, y) in enumerate(zip(image, text, strict=True)):
            writer.write({"caption": f"c{row}", "image": b"%d" % row, "image_embedding": x, "text_embedding": y})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs", *draw(0))


def picked(out: Path) -> list[int]:
    with (out / "subset.csv").open(encoding="utf-8", newline="") as file:
        return [int(row["row"]) for row in csv.DictReader(file)]


def select(method: str, folder: Path, out: Path, *options: str) -> list[int]:
    assert select_rivals.main([method, str(folder), str(out), *options]) == 0
    return picked(out)


def test_clip_score_takes_the_best_aligned(folder: Path, tmp_path: Path) -> None:
    image, text = draw(0)
    expected = np.argsort(-np.einsum("nd,nd->n", image.astype(float), text.astype(float)), kind="stable")
    assert select("clip_score", folder, tmp_path / "out", "--num", "7") == expected[:7].tolist()
    assert select("clip_score", folder, tmp_path / "share", "--fraction", "0.2") == expected[:12].tolist()


@pytest.mark.parametrize("block", [1, 100, select_rivals.BLOCK])
@pytest.mark.parametrize("batch", [1, 16, 60, 1000])
def test_neg_clip_loss_is_the_loop_over_batches(batch: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_rivals, "BLOCK", block)
    image, text = draw(0)
    cosine = image.astype(float) @ text.astype(float).T
    # The same divisions, of batches that differ by one at most.
    generator = torch.Generator().manual_seed(5)
    expected = np.diag(cosine).copy()
    for _ in range(3):
        order = torch.randperm(NUM, generator=generator).numpy()
        for part in np.array_split(order, -(-NUM // batch)):
            assert len(part) <= batch
            for i in part:
                for logits in (cosine[i, part] / 0.07, cosine[part, i] / 0.07):
                    expected[i] -= 0.07 / 2 * np.logaddexp.reduce(logits) / 3
    found = select_rivals.mean_margin(torch.from_numpy(image), torch.from_numpy(text), 0.07, batch, 3, seed=5)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_neg_clip_loss_takes_the_highest_margins(folder: Path, tmp_path: Path) -> None:
    image, text = (torch.from_numpy(rows).double() for rows in draw(0))
    logits = image @ text.T / 0.1
    margins = logits.diagonal() - 0.5 * (logits.logsumexp(1) + logits.logsumexp(0))
    expected = margins.argsort(descending=True)[:9].tolist()
    # All in one batch, so that divisions do not matter.
    assert select("neg_clip_loss", folder, tmp_path / "out", "--num", "9", "--temperature", "0.1") == expected


def test_what_made_the_embeddings_stays_beside_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.dumps({"fingerprint": 3, "logit_scale": 12.5}).encode()
    (folder / "embedder.json").write_bytes(record)
    image, text = (torch.from_numpy(rows) for rows in draw(0))
    rows = select("neg_clip_loss", folder, tmp_path / "out", "--num", "9", "--mds")
    expected = select_rivals.mean_margin(image, text, 1 / 12.5).argsort(descending=True)[:9].tolist()
    assert rows == expected != select_rivals.mean_margin(image, text).argsort(descending=True)[:9].tolist()
    assert (tmp_path / "out" / "train" / "embedder.json").read_bytes() == record
    (folder / "embedder.json").write_text("[]")
    assert select_rivals.main(["clip_score", str(folder), str(tmp_path / "bad"), "--num", "9", "--mds"]) == 2
    assert "embedder.json does not say what made the embeddings" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_c_rho_takes_what_the_reference_matches_and_the_learner_does_not(folder: Path, tmp_path: Path) -> None:
    image, text = draw(0)
    own_image, own_text = draw(1)
    learner = write(tmp_path / "learner", own_image, own_text)
    gap = [float(image[i] @ text[i] - own_image[i] @ own_text[i]) for i in range(NUM)]
    expected = sorted(range(NUM), key=lambda i: -gap[i])[:9]
    assert select("c_rho", folder, tmp_path / "out", "--num", "9", "--learner", str(learner)) == expected


@pytest.mark.parametrize(
    ("uid", "caption", "sha", "message"),
    [
        ("u7", "c7", "a", None),
        ("u7", "recaptioned", "b", None),  # a learner may have read other captions of the same samples
        ("u8", "c7", "a", "row 7 has the uid 'u8', FOLDER 'u7'"),
        (None, "c8", "a", "row 7 has the caption 'c8', FOLDER 'c7'"),
        (None, None, "a", None),
        (None, None, "b", "was made from an index.json of sha1 b, FOLDER a"),
    ],
)
def test_c_rho_takes_a_learner_of_the_same_samples_alone(
    uid: str | None, caption: str | None, sha: str, message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    image, text = draw(0)
    for name, seventh, made_from in (("pairs", {"uid": "u7", "caption": "c7"}, "a"), ("learner", {}, sha)):
        other = {"uid": uid, "caption": caption}
        texts = {key: seventh.get(key, value) for key, value in other.items() if value is not None}
        columns = {**dict.fromkeys(texts, "str"), "image_embedding": "ndarray", "text_embedding": "ndarray"}
        with MDSWriter(out=str(tmp_path / name), columns=columns) as writer:
            for row, (x, y) in enumerate(zip(image, text, strict=True)):
                own = {key: value if row == 7 else f"{key[0]}{row}" for key, value in texts.items()}
                writer.write({**own, "image_embedding": x, "text_embedding": y})
        record = {"logit_scale": 50, "source_index_sha1": made_from}
        (tmp_path / name / "embedder.json").write_text(json.dumps(record))
    argv = [
        "c_rho",
        str(tmp_path / "pairs"),
        str(tmp_path / "out"),
        "--num",
        "3",
        "--learner",
        str(tmp_path / "learner"),
    ]
    assert select_rivals.main(argv) == (0 if message is None else 2)
    assert message is None or message in capsys.readouterr().err


@pytest.mark.parametrize("block", [1, 64, select_rivals.BLOCK])
def test_redundancy_is_the_loop_over_those_before(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_rivals, "BLOCK", block)
    image, _ = draw(2)
    labels = np.random.default_rng(3).integers(0, CLUSTERS, NUM)
    centers = unit(np.stack([image[labels == k].astype(float).sum(0) for k in range(CLUSTERS)]))
    expected = np.full(NUM, -1.0)
    for k in range(CLUSTERS):
        own = [int(i) for i in np.flatnonzero(labels == k)]
        own.sort(key=lambda i: float(image[i] @ centers[k]))
        for place, i in enumerate(own):
            for j in own[:place]:
                expected[i] = max(expected[i], float(image[i].astype(float) @ image[j]))
    rows = torch.from_numpy(image)
    found = select_rivals.redundancy(rows, torch.from_numpy(labels), torch.from_numpy(centers).float())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    made = select_rivals.centers_of(rows, torch.from_numpy(labels))
    np.testing.assert_allclose(made.numpy(), centers, atol=1e-6)


def test_sem_dedup_drops_copies_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = unit(rng.normal(size=(20, DIM))).astype(np.float32)
    folder = write(tmp_path / "pairs", np.concatenate([image, image]), np.ones((40, DIM), np.float32))
    rows = select("sem_dedup", folder, tmp_path / "out", "--num", "20", "--clusters", "3")
    assert sorted(row % 20 for row in rows) == list(range(20))  # one of each pair of copies


def test_random_is_a_draw_of_its_seed(folder: Path, tmp_path: Path) -> None:
    first = select("random", folder, tmp_path / "a", "--num", "20", "--seed", "1")
    assert first == select("random", folder, tmp_path / "b", "--num", "20", "--seed", "1")
    assert first != select("random", folder, tmp_path / "c", "--num", "20", "--seed", "2")
    assert len(set(first)) == 20 and first != sorted(first)
    # Every row comes up: 200 draws of a third miss one with chance 60 (2/3)^200.
    counts = torch.zeros(NUM)
    for seed in range(200):
        scores = select_rivals.scores_of("random", torch.zeros(NUM, 1), torch.zeros(NUM, 1), counts, None, seed)
        counts[scores.argsort(descending=True)[:20]] += 1
    assert counts.min() > 30 and counts.max() < 110  # 66.7 each, standard deviation 6.7


def test_unusable_rows_are_counted_and_samples_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, text = draw(0)
    image[3], text[5] = np.nan, 0
    folder = write(tmp_path / "pairs", image, text)
    rows = select("random", folder, tmp_path / "out", "--fraction", "1", "--mds")
    assert set(rows) == set(range(NUM)) - {3, 5}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["invalid"] == 2
    samples = PairFolder(str(tmp_path / "out" / "train")).samples(range(NUM - 2))
    assert [int(sample["image"]) for sample in samples] == sorted(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["clip_score", "--num", "61"], "61 samples to pick, but 60 of 60 are usable"),
        (["clip_score", "--fraction", "1.5"], "--fraction 1.5 must be above 0"),
        (["c_rho", "--num", "3"], "--learner is for c_rho"),
        (["neg_clip_loss", "--num", "3", "--temperature", "0"], "--temperature 0.0 must be above 0"),
        (["random", "--num", "3", "--learner", "LEARNER"], "--learner is for c_rho"),
        (["c_rho", "--num", "3", "--learner", "LEARNER"], "has 1 samples, FOLDER has 60"),
    ],
)
def test_bad_options(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = write(tmp_path / "learner", *(rows[:1] for rows in draw(0)))
    method, *rest = [str(learner) if option == "LEARNER" else option for option in options]
    assert select_rivals.main([method, str(folder), str(tmp_path / "out"), *rest]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
