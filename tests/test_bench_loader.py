"""The loader's benchmark, run small: every variant runs, from disk and from an S3 server. Nothing here is timed."""

import io
import json

import bench_loader
import numpy as np
import pytest
from PIL import Image


def test_every_variant_runs_from_disk_and_from_the_store(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_loader, "DISTINCT", 8)
    for name in ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)  # the benchmark sets them, and they end with the test
    sizes = ["--pool", "20", "--survivors", "4", "--side", "32", "--image-size", "16", "--dim", "8"]
    run = ["--num-workers", "0", "--steps", "2", "--warmup", "1", "--turns", "1", "--latency", "0.001"]
    with monkeypatch.context() as environment:
        environment.setattr(bench_loader.os, "environ", dict(bench_loader.os.environ))
        bench_loader.main([*sizes, *run, "--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result == json.loads((tmp_path / "bench_loader.json").read_text(encoding="utf-8"))
    found = {(row["source"], row["variant"]): row for row in result["rows"]}
    for source in ("disk", "S3"):
        assert {variant for of, variant in found if of == source} == set(bench_loader.VARIANTS)
        # Five candidates for every survivor are fetched, where they are not curated and shards are fetched whole.
        assert found[source, bench_loader.RANGES]["bytes"] < found[source, bench_loader.AHEAD]["bytes"]
        for variant in bench_loader.VARIANTS[1:-1]:
            assert 3 < found[source, variant]["bytes"] / found[source, bench_loader.IDEAL]["bytes"] < 6
    assert all(0 < row["wait_share"] < 1 and row["survivors_per_s"] > 0 for row in result["rows"])
    assert {row["variant"] for row in result["rows"] if row["source"] == "train"} == set(bench_loader.VARIANTS[2:4])
    assert result["read"].keys() == set(bench_loader.READ)
    assert all(rate > 0 for rates in result["read"].values() for rate in rates)
    page = (tmp_path / "bench_loader.md").read_text(encoding="utf-8")
    assert "| S3 | deferred, ahead |" in page and (tmp_path / "bench_loader.png").stat().st_size > 1000


def test_drawn_images_are_jpegs_of_a_photos_size():
    data = bench_loader.draw_image(np.random.default_rng(0), 256)
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG" and image.size == (256, 256) and 10_000 < len(data) < 60_000


def test_bad_sizes_are_named(capsys):
    for arguments, message in (
        (["--survivors", "640"], "--survivors 640 must be from 2 to less than --pool 640"),
        (["--run-ahead", "0"], "--run-ahead 0 must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            bench_loader.main(arguments)
        assert message in capsys.readouterr().err
