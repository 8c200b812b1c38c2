"""ClipCov in the real Composer Trainer, on real MDS shards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Trainer
from composer.core import Algorithm, Event
from corpora import TINY_MODEL, draw_corpus, recipe
from runs import (
    algorithm_of,
    columns_recipe,
    run,
    trainer_of,
    values,
    write_columns,
)

from clipcov_stream import ClipCov
from clipcov_stream.batch import count_survivors, size_of
from clipcov_stream.build import check_same_tokens, tokenizer_of
from clipcov_stream.config import ModelConfig
from clipcov_stream.embed import is_native
from clipcov_stream.model import ClipModel, build_towers
from clipcov_stream.selection import SELECTORS
from clipcov_stream.stream import Tokenizer
from clipcov_stream.towers import SmallTowers


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


def test_survivors_alone_are_trained_on_and_counted(tmp_path: Path, corpus: Path) -> None:
    trainer, recorder, memory = trainer_of(tmp_path, recipe(corpus))
    trainer.fit()
    assert [len(batch) for batch in recorder.batches] == [8] * 6
    assert recorder.keys == {"image", "text"}
    assert values(memory, "selection/samples_streamed") == [32 * n for n in range(1, 7)]
    assert values(memory, "selection/samples_seen") == [8 * n for n in range(1, 7)]
    assert set(values(memory, "selection/filter_ratio")) == {0.75}
    assert int(trainer.state.timestamp.sample) == 6 * 32
    for name in ("residual", "residual_random", "residual_total", "residual_total_random", "alignment_pool"):
        # Four of six steps select; the other two are warm-up.
        assert len(values(memory, f"selection/{name}")) == 4
        assert all(np.isfinite(values(memory, f"selection/{name}")))
    assert len(values(memory, "selection/embed_ms")) == len(values(memory, "selection/select_ms")) == 4


def test_the_embedder_alone_sees_a_lower_resolution_and_precision(tmp_path: Path, corpus: Path) -> None:
    seen: dict[str, set[tuple[int, torch.dtype]]] = {"teacher": set(), "learner": set()}

    def watch(trainer: Trainer, who: str, model: ClipModel) -> None:
        def note(module: Any, args: Any, output: torch.Tensor) -> None:
            seen[who].add((args[0].shape[-1], output.dtype))

        model.towers.visual.conv1.register_forward_hook(note)  # pyright: ignore

    tree = recipe(corpus, selection={"embed_resolution": 8, "embed_precision": "amp_bf16"})
    trainer, recorder, memory = trainer_of(tmp_path, tree)

    class Watch(Callback):
        def fit_start(self, state: Any, logger: Any) -> None:
            teacher = algorithm_of(trainer).teacher
            assert teacher is not None
            watch(trainer, "teacher", teacher.model)  # pyright: ignore
            watch(trainer, "learner", state.model)

    trainer.state.callbacks.append(Watch())
    said = pytest.warns(UserWarning, match="embed_precision=amp_bf16: this cpu device has no instructions")
    with contextlib.nullcontext() if is_native(torch.bfloat16, "cpu") else said:
        trainer.fit()
    assert seen == {"teacher": {(8, torch.bfloat16)}, "learner": {(16, torch.float32)}}
    assert [len(batch) for batch in recorder.batches] == [8] * 6
    assert all(np.isfinite(values(memory, "selection/residual")))
    assert "embed_resolution" in algorithm_of(trainer).state_dict()["arguments"]


def test_the_embedder_alone_leaves_patches_out(tmp_path: Path, corpus: Path) -> None:
    seen: dict[str, set[int]] = {"teacher": set(), "learner": set()}
    trainer, recorder, memory = trainer_of(tmp_path, recipe(corpus, selection={"embed_patch_dropout": 0.5}))

    class Watch(Callback):
        def fit_start(self, state: Any, logger: Any) -> None:
            teacher = algorithm_of(trainer).teacher
            assert teacher is not None
            for who, model in (("teacher", teacher.model), ("learner", state.model)):
                block = model.towers.visual.transformer.resblocks[0]  # pyright: ignore
                block.register_forward_pre_hook(lambda module, args, who=who: seen[who].add(args[0].shape[1]))

    trainer.state.callbacks.append(Watch())
    trainer.fit()
    assert seen == {"teacher": {1 + 2}, "learner": {1 + 4}}
    assert [len(batch) for batch in recorder.batches] == [8] * 6
    assert all(np.isfinite(values(memory, "selection/residual")))


@pytest.mark.parametrize("embed", ["teacher", "proxy"])
@pytest.mark.parametrize(("tower", "cell"), [("transformer", 8), ("resnet", 32)])
def test_a_resolution_that_the_embedder_cannot_read_is_refused_before_training(
    tmp_path: Path, corpus: Path, embed: str, tower: str, cell: int
) -> None:
    model = TINY_MODEL
    if tower == "resnet":
        vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
        model = {**TINY_MODEL, "embed_dim": 16, "vision_cfg": vision}
    selection: dict[str, Any] = {"embed": embed, "embed_resolution": cell + 4}
    if embed == "proxy":
        torch.save(build_towers(config=model).state_dict(), tmp_path / "proxy.pt")
        selection["proxy"] = {"config": model, "pretrained": str(tmp_path / "proxy.pt")}
    tree = recipe(corpus, selection=selection, model={"config": model})
    with pytest.raises(ValueError, match=rf"embed_resolution={cell + 4} must be a multiple of {cell} for this embedd"):
        trainer_of(tmp_path, tree)
    selection["embed_resolution"] = cell
    trainer, _, _ = trainer_of(tmp_path, recipe(corpus, selection=selection, model={"config": model}))
    assert any(part.training for part in trainer.state.model.modules())


def test_random_twin_shares_the_warmup_and_then_differs(tmp_path: Path, corpus: Path) -> None:
    _, ours, _ = run(tmp_path, recipe(corpus))
    _, twin, _ = run(tmp_path, recipe(corpus, selection={"selector": "random"}))
    same = [torch.equal(a, b) for a, b in zip(ours.batches, twin.batches, strict=True)]
    assert same[:2] == [True, True]
    assert not any(same[2:])


@pytest.mark.parametrize("given", [None, 0, 7])
def test_a_run_counts_how_often_it_trained_on_each_sample(tmp_path: Path, corpus: Path, given: int | None) -> None:
    trainer, *_ = trainer_of(tmp_path, recipe(corpus, max_duration="9ba"))
    clipcov, ids = ClipCov(0.75, "teacher", warmup="2ba", dataset_size=given), []
    trainer.state.algorithms[:] = [clipcov]

    class Ids(Callback):
        def before_train_batch(self, *_: Any) -> None:
            ids.append(clipcov.survivor_ids)

    trainer.state.callbacks.append(Ids())
    with pytest.warns(UserWarning, match="but dataset_size=7:") if given else contextlib.nullcontext():
        trainer.fit()
    assert clipcov.selection is not None
    size = trainer.state.dataloader.dataset.num_samples if given is None else given
    trained_on = torch.stack([torch.bincount(step % max(size, 1), minlength=size).clamp_max(1) for step in ids[2:]])
    assert clipcov.selection.times.tolist() == trained_on.sum(0)[:size].tolist()
    assert len(clipcov.selection.times) == size and (given == 0 or clipcov.selection.times.any())


def test_the_size_of_a_data_set_is_what_it_says() -> None:
    class Streamed:
        num_samples = 9

        def __len__(self) -> int:
            return 3

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    class Batches(Endless):
        def __len__(self) -> int:
            return 3

    of = (Streamed(), [1, 2], Endless(), Batches(), None)
    assert [size_of(SimpleNamespace(dataset=each)) for each in of] == [9, 2, 0, 0, 0]


def test_patches_of_a_tower_without_any_cannot_be_left_out(tmp_path: Path, corpus: Path) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    model = {"config": {**TINY_MODEL, "vision_cfg": vision}}
    with pytest.raises(ValueError, match="has no transformer of open_clip's as its image tower"):
        trainer_of(tmp_path, recipe(corpus, model=model, selection={"embed_patch_dropout": 0.5}))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"filter_ratio": 1.0}, r"selection.filter_ratio=1.0 must be in \[0, 1\)"),
        ({"filter_ratio": -0.1}, r"selection.filter_ratio=-0.1 must be in \[0, 1\)"),
        ({"filter_ratio": float("nan")}, r"selection.filter_ratio=nan"),
        ({"embed": "magic"}, r"selection.embed='magic' is not one of \['teacher', 'proxy', 'online', 'columns'\]"),
        ({"embed": "proxy"}, "embed='proxy' needs a proxy model"),
        ({"selector": "best"}, r"selection.selector='best' is not one of \['c_rho', .*'vas'\]"),
        ({"warmup": "soon"}, "selection.warmup='soon' is not a Composer time"),
        ({"warmup": "10sp"}, "must be in batches"),
        ({"half_life": 0.0}, "selection.half_life=0.0 must be a positive number"),
        ({"coverage": -1.0}, "selection.coverage=-1.0 must be a finite number"),
        ({"gate": 0.0}, "selection.gate=0.0 must be above 0; inf opens every candidate"),
        ({"repeats": -1.0}, "selection.repeats=-1.0 must be at least 0; inf lets no pair wear out"),
        ({"dataset_size": -1}, "dataset_size=-1 must be a number of samples, 0 if it is not known, or None"),
        ({"logit_scale": 0.0}, "selection.logit_scale=0.0"),
        ({"embed_resolution": 0}, "selection.embed_resolution=0 must be at least 1 pixel"),
        ({"embed_patch_dropout": 1.0}, r"selection.embed_patch_dropout=1.0 must be in \[0, 1\), or null"),
        (
            {"embed": "columns", "embed_patch_dropout": 0.5},
            "embed_patch_dropout=0.5 has no effect with embed='columns'",
        ),
        ({"embed_precision": "int8"}, r"embed_precision='int8' is not one of \['fp32', 'amp_fp16', 'amp_bf16'\]"),
        ({"embed": "columns", "embed_resolution": 16}, "embed_resolution=16 has no effect with embed='columns'"),
        ({"filter_ratio": "0.8"}, r"selection.filter_ratio='0.8' is a str; it must be a number, in \[0, 1\)"),
        (
            {"filter_ratio": torch.tensor(0.8)},
            r"selection.filter_ratio=tensor\(0.8000\) is a Tensor; it must be a number",
        ),
        ({"max_invalid_ratio": None}, "selection.max_invalid_ratio=None is a NoneType"),
        ({"teacher_momentum": "1"}, "selection.teacher_momentum='1' is a str"),
        ({"proxy_lr": "1e-3"}, "selection.proxy_lr='1e-3' is a str"),
        ({"embed_chunk": 2.5}, "selection.embed_chunk=2.5 is a float; it must be a whole number, at least 1, or null"),
        ({"embed_resolution": "16"}, "selection.embed_resolution='16' is a str"),
        ({"embedder": "x"}, "selection.embedder='x' is a str"),
        ({"lag_delay": 1.5}, "selection.lag_delay=1.5 is a float; it must be a whole number, at least 0 steps"),
        ({"run_ahead": True}, "selection.run_ahead=True is a bool"),
        ({"dataset_size": 160.0}, "dataset_size=160.0 is a float; it must be a whole number, a number of samples"),
        ({"warmup": -1}, "selection.warmup=-1 must be at least 0 batches"),
        ({"warmup": True}, "selection.warmup=True is a bool"),
        ({"warmup": "-2ba"}, "selection.warmup='-2ba' must not be negative"),
        ({"embed": "proxy", "proxy": SmallTowers}, "selection.proxy=SmallTowers is a class; .* proxy=MODEL"),
    ],
)
def test_bad_arguments_name_the_value_and_the_knob(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipCov(**kwargs)


def test_numbers_of_numpy_are_as_good_as_pythons() -> None:
    knobs: dict[str, Any] = {"filter_ratio": np.float64(0.75), "dataset_size": np.int64(64), "warmup": np.int64(2)}
    knobs |= {"embed_chunk": np.int32(4), "lag_delay": np.int8(1), "proxy_lr": np.float64(0.5)}
    of_numpy = ClipCov(**knobs)
    of_python = ClipCov(**{name: value.item() for name, value in knobs.items()})
    arguments = of_numpy.state_dict()["arguments"]
    assert arguments == of_python.state_dict()["arguments"]
    assert {type(value) for value in arguments.values()} <= {int, float, str, type(None)}


def test_survivors_must_be_a_whole_number_of_at_least_two() -> None:
    assert count_survivors(640, 0.8) == 128
    assert count_survivors(100, 0.0) == 100
    with pytest.raises(ValueError, match=r"pool_size=100 \* \(1 - filter_ratio=0.333\) = 66.7 survivors"):
        count_survivors(100, 0.333)
    with pytest.raises(ValueError, match="at least 2"):
        count_survivors(10, 0.9)


def test_forgotten_algorithm_stops_the_run(tmp_path: Path, corpus: Path) -> None:
    trainer, _, _ = trainer_of(tmp_path, recipe(corpus))
    trainer.state.algorithms = []
    with pytest.raises(RuntimeError, match=r"is ClipCov\s+among the Trainer's algorithms"):
        trainer.fit()


def test_ours_runs_before_other_algorithms(tmp_path: Path, corpus: Path) -> None:
    class Witness(Algorithm):
        rows: list[int]

        def match(self, event: Event, state: Any) -> bool:
            return event == Event.AFTER_DATALOADER

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            self.rows = [len(state.batch["image"])]

    trainer, _, _ = trainer_of(tmp_path, recipe(corpus, max_duration="1ba", selection={"warmup": 0}))
    before, after = Witness(), Witness()
    trainer.state.algorithms = [before, *trainer.state.algorithms, after]
    trainer.fit()
    assert before.rows == after.rows == [8]


def test_images_are_normalized_once_wherever_that_is(tmp_path: Path, corpus: Path) -> None:
    def fitted(as_bytes: bool, transform: Callable[[Any], Any] | None = None) -> tuple[Any, list[Any]]:
        trainer, seen = trainer_of(tmp_path, recipe(corpus, max_duration="4ba"))[0], Witness()
        trainer.state.callbacks.append(seen)
        trainer.state.train_dataloader.as_bytes = as_bytes
        if transform is not None:
            trainer._train_data_spec.batch_transforms = transform
        trainer.fit()
        return trainer, seen.images

    class Witness(Callback):
        def __init__(self) -> None:
            self.images: list[Any] = []

        def before_train_batch(self, state: Any, logger: Any) -> None:
            self.images.append(state.batch["image"])

    def brighter(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "image": batch["image"] * 1.0}

    trainer, images = fitted(as_bytes=True)
    assert all(image.dtype == torch.float32 and image.abs().max() < 3 for image in images)
    loader = trainer.state.train_dataloader
    assert loader.normalizes and next(iter(loader))["image"].dtype == torch.float32  # as before the fit
    for found in (fitted(as_bytes=False)[1], fitted(as_bytes=False, transform=brighter)[1]):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, images, strict=True))
    with pytest.raises(ValueError, match=r"came to ClipCov as torch.float32, .* pool_loader\(..., as_bytes=False\)"):
        fitted(as_bytes=True, transform=brighter)


def test_non_finite_embeddings_are_never_selected_and_are_counted(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64, spoil=6)
    trainer, recorder, memory = run(tmp_path, columns_recipe(folder, max_invalid_ratio=0.5))
    assert values(memory, "selection/num_invalid") == [6, 6]
    tokenize = trainer.state.dataloader.dataset.tokenizer  # pyright: ignore
    spoilt = {tuple(tokenize(str(row)).tolist()) for row in range(6)}
    assert not spoilt & {tuple(row) for row in recorder.batches[0].tolist()}
    stream = algorithm_of(trainer).selection.stream  # pyright: ignore
    assert int(stream.num_samples) == 58
    assert torch.isfinite(stream.cross_cov).all()


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_every_selector_trains(tmp_path: Path, corpus: Path, selector: str) -> None:
    # 192 samples are six pools: the last step is in a second epoch.
    tree = recipe(corpus, max_duration="7ba", selection={"selector": selector})
    if selector == "concept_balance":
        tree["stream"]["columns"] = {"concepts": "class_id"}
    trainer, recorder, memory = run(tmp_path, tree)
    assert [len(batch) for batch in recorder.batches] == [8] * 7
    assert recorder.keys == {"image", "text"}
    assert len(memory.data.get("selection/residual", [])) == (0 if selector == "random" else 5)
    selection = algorithm_of(trainer).selection
    own = {} if selection is None else selection.own
    assert set(own) == {
        "sem_dedup": {"recent"},
        "dissect": {"history", "known"},
        "concept_balance": {"concept_count"},
    }.get(selector, set())


@pytest.mark.parametrize("selector", ["clipcov", "random"])
def test_too_many_bad_images_stop_the_run(tmp_path: Path, selector: str) -> None:
    # 5% of 32 and three standard errors are 5.3.
    folder = write_columns(tmp_path / "mds", 64, bad_images=6)

    def eager(folder: Path, **selection: Any) -> dict[str, Any]:
        tree = columns_recipe(folder, selector=selector, **selection)
        tree["stream"]["deferred"] = False
        return tree

    with pytest.raises(RuntimeError, match=r"6 of 32 samples streamed cannot be used.*max_invalid_ratio=0.05"):
        run(tmp_path, eager(folder))
    _, _, memory = run(tmp_path, eager(folder, max_invalid_ratio=0.2))
    assert values(memory, "selection/num_invalid") == [6, 6]
    few = write_columns(tmp_path / "few", 64, bad_images=5)
    _, _, memory = run(tmp_path, eager(few))
    assert values(memory, "selection/num_invalid") == [5, 5]
    with pytest.raises(RuntimeError, match="5 of 32 samples streamed"):
        run(tmp_path, eager(few, max_invalid_ratio=0.0))


def test_too_few_good_samples_stop_the_run(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64, bad_images=30)
    with pytest.raises(RuntimeError, match="8 survivors are needed, but 30 of the pool's 32 samples cannot be used"):
        run(tmp_path, columns_recipe(folder, max_invalid_ratio=0.99))


def test_columns_of_two_widths_are_refused(tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "mds", 64, text_dim=6)
    with pytest.raises(ValueError, match="different widths: image 8, text 6"):
        run(tmp_path, columns_recipe(folder))


def test_missing_embedding_columns_are_named(tmp_path: Path, corpus: Path) -> None:
    tree = recipe(corpus, selection={"embed": "columns"})
    with pytest.raises(ValueError, match=r"no column 'image_embedding' \(stream.columns.image_embedding\)"):
        trainer_of(tmp_path, tree)


def test_proxy_selects_without_changing_itself(tmp_path: Path, corpus: Path) -> None:
    torch.manual_seed(1)
    proxy = ClipModel(build_towers(config=TINY_MODEL))
    torch.save(proxy.towers.state_dict(), tmp_path / "proxy.pt")
    section = {"config": TINY_MODEL, "pretrained": str(tmp_path / "proxy.pt")}
    trainer, _, memory = run(tmp_path, recipe(corpus, selection={"embed": "proxy", "proxy": section}))
    frozen = algorithm_of(trainer).proxy
    assert frozen is not None
    for ours, theirs in zip(frozen.towers.state_dict().values(), proxy.towers.state_dict().values(), strict=True):  # pyright: ignore
        assert torch.equal(ours, theirs)
    assert len(values(memory, "selection/residual")) == 4


def test_a_proxy_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    def letters(caption: str) -> torch.Tensor:
        return torch.tensor([ord(letter) for letter in caption[:8].ljust(8, "\0")])

    def tokens(length: int) -> Tokenizer:
        return tokenizer_of(
            build_towers(config={**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], "context_length": length}}),
            ModelConfig(config=TINY_MODEL),
        )

    for length in (4, 8, 16, 77):
        check_same_tokens(tokens(77), tokens(length))
        check_same_tokens(tokens(length), tokens(77))
    with pytest.raises(ValueError, match=r"selection.proxy reads .*both need one tokenizer"):
        check_same_tokens(letters, tokens(16))


@pytest.mark.parametrize("pretrained", [None, "nowhere.pt"])
def test_proxy_that_cannot_be_loaded_is_refused(tmp_path: Path, corpus: Path, pretrained: str | None) -> None:
    section = {"config": TINY_MODEL, "pretrained": pretrained}
    with pytest.raises(ValueError, match=r"selection\.proxy"):
        trainer_of(tmp_path, recipe(corpus, selection={"embed": "proxy", "proxy": section}))


def test_metrics_file_has_one_record_per_step(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(tmp_path, recipe(corpus, metrics_file=str(path)))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seen = {row["step"]: row["selection/samples_seen"] for row in rows if "selection/samples_seen" in row}
    assert seen == {step: 8 * step for step in range(1, 7)}


def test_every_evaluation_is_filed_under_its_own_step(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    split = {"tasks": ["retrieval"], "local": str(corpus / "eval"), "batch_size": 9}
    # 192 samples are six pools an epoch: the evaluation at the end of the first belongs to step 6.
    tree = recipe(corpus, metrics_file=str(path), max_duration="8ba", eval={"shapes": split}, eval_interval="1ep")
    trainer, _, _ = trainer_of(tmp_path, tree)
    trainer.eval()
    trainer.fit()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evaluated = [row for row in rows if "metrics/shapes/image_to_text_r1" in row]
    assert [row["step"] for row in evaluated] == [0, 6, 8]
    assert [row["samples_streamed"] for row in evaluated] == [0, 6 * 32, 8 * 32]
    assert not any("loss/train/total" in row for row in evaluated)
