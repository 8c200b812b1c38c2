"""ClipCov in somebody else's Trainer, with a model and a loader of their own."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Algorithm
from composer.models import ComposerModel
from runs import MemoryLog
from torch.utils.data import BatchSampler, DataLoader

from clipcov_stream import ClipCov
from clipcov_stream.batch import check_batch
from clipcov_stream.embed import Teacher
from clipcov_stream.online import OnlineProxy


class OwnModel(ComposerModel):
    """Somebody else's model: two linear towers, another loss, no logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = torch.nn.Linear(6, 4)
        self.text_tower = torch.nn.Linear(5, 4)
        self.rows: list[int] = []

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return self.image_tower(image)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return self.text_tower(text)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.rows.append(len(batch["pixels"]))
        return self.encode_image(batch["pixels"]) @ self.encode_text(batch["words"]).T

    def loss(self, outputs: torch.Tensor, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, torch.arange(len(outputs)))


def own_trainer(
    algorithms: list[Algorithm], rows: int = 32, sampler: bool = False, loader: Any = None, **kwargs: Any
) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    data = [
        {"pixels": torch.randn(6, generator=generator), "words": torch.randn(5, generator=generator)} for _ in range(64)
    ]
    batches = {"batch_sampler": BatchSampler(range(64), rows, True)} if sampler else {"batch_size": rows}
    return Trainer(
        model=kwargs.pop("model", None) or OwnModel(),
        train_dataloader=loader or DataLoader(data, **batches),  # pyright: ignore[reportArgumentType]
        optimizers=None,
        device="cpu",
        algorithms=algorithms,
        progress_bar=False,
        **{"max_duration": "4ba", **kwargs},
    )


def numbered(samples: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixels": torch.randn(6, generator=generator), "words": torch.randn(5, generator=generator), "id": i}
        for i in range(samples)
    ]


@pytest.mark.filterwarnings("ignore:No optimizer was specified")
class TestOwnTrainer:
    def test_three_lines_are_enough(self) -> None:
        clipcov = ClipCov(0.75, "teacher", warmup="1ba", image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov])
        trainer.fit()
        assert set(trainer.state.model.rows) == {8}
        assert clipcov.samples_seen == 32

    def test_a_loader_with_a_batch_sampler_is_measured_at_its_first_pool(self) -> None:
        clipcov = ClipCov(0.75, "teacher", warmup="1ba", image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov], sampler=True)
        trainer.fit()
        assert set(trainer.state.model.rows) == {8}
        assert clipcov.selection is not None and clipcov.selection.stream.half_life == 20 * 32
        with pytest.raises(ValueError, match="device_train_microbatch_size=4 must be the survivors per rank"):
            own_trainer(
                [ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")],
                sampler=True,
                device_train_microbatch_size=4,
            ).fit()

    def test_pools_that_grow_are_refused(self) -> None:
        class Growing:
            def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
                for rows in (16, 16, 32):
                    yield {"pixels": torch.randn(rows, 6), "words": torch.randn(rows, 5)}

            def __len__(self) -> int:
                return 3

        clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov], loader=Growing(), device_train_microbatch_size=4)
        with pytest.raises(ValueError, match=r"device_train_microbatch_size=4 must be .* pool_size=32"):
            trainer.fit()
        assert trainer.state.model.rows == [4, 4]

    @pytest.mark.filterwarnings("ignore:Cannot split tensor")  # Composer, of the shorter pool
    @pytest.mark.parametrize(
        ("samples", "duration", "message"),
        [
            (67, "1ep", r"of 67 samples ends in a pool of 3: .* = 0.8 survivors; .*DataLoader with drop_last=True"),
            (67, "3ba", "drop_last=True"),
            (67, "2ba", None),  # the epoch's end is not reached
            (72, "1ep", None),  # 2 survivors of the last 8
            (68, "1ep", "1 survivors per rank.*drop_last=True"),
        ],
    )
    def test_a_last_pool_without_survivors_is_refused_at_the_start(
        self, samples: int, duration: str, message: str | None
    ) -> None:
        data: Any = [{"pixels": torch.randn(6), "words": torch.randn(5)} for _ in range(samples)]
        clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov], loader=DataLoader(data, 32), max_duration=duration)
        if message is None:
            trainer.fit()
            assert int(trainer.state.timestamp.batch) == (2 if duration == "2ba" else 3)
        else:
            with pytest.raises(ValueError, match=message):
                trainer.fit()
            assert trainer.state.model.rows == []

    def test_an_epoch_cut_short_never_comes_to_its_last_pool(self) -> None:
        data: Any = [{"pixels": torch.randn(6), "words": torch.randn(5)} for _ in range(67)]
        clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov], loader=DataLoader(data, 32), train_subset_num_batches=2)
        trainer.fit()
        assert trainer.state.model.rows == [8] * 4

    def test_a_function_called_random_gets_embeddings(self) -> None:
        pools = []

        def random(pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
            pools.append(pool)
            return torch.arange(num_survivors)

        own_trainer([ClipCov(0.75, "teacher", selector=random, warmup=0, image_key="pixels", text_key="words")]).fit()
        assert len(pools) == 4

    @pytest.mark.parametrize("warmup", ["4ba", "2ep", "1dur"])
    def test_a_warmup_that_never_ends_is_warned_of(self, warmup: str) -> None:
        with pytest.warns(UserWarning, match="is as long as max_duration=.*every survivor will be random"):
            own_trainer([ClipCov(0.75, "teacher", warmup=warmup, image_key="pixels", text_key="words")]).fit()

    @pytest.mark.filterwarnings("ignore:No batches were trained")  # of the epoch that the checkpoint is at the end of
    @pytest.mark.parametrize("is_loaded", [False, True])
    def test_a_run_that_is_prolonged_does_not_warm_up_again(self, is_loaded: bool, tmp_path: Path) -> None:
        calls = []

        def first(pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
            calls.append(len(calls))
            return torch.arange(num_survivors)

        def trainer(**kwargs: Any) -> Trainer:
            clipcov = ClipCov(0.75, "teacher", selector=first, warmup="0.5dur", image_key="pixels", text_key="words")
            return own_trainer([clipcov], run_name="own", **kwargs)

        whole = trainer(save_folder=str(tmp_path), save_interval="1ba")
        whole.fit()
        assert len(calls) == 2  # of 4 steps
        if is_loaded:
            trainer(load_path=str(tmp_path / "latest-rank0.pt"), max_duration="12ba").fit()
        else:
            whole.fit(duration="8ba")
        assert len(calls) == 2 + 8
        # From the midst of the warm-up it goes on, to half of 12 steps.
        trainer(load_path=str(tmp_path / "ep0-ba1-rank0.pt"), max_duration="12ba").fit()
        assert len(calls) == 10 + 6

    def test_entries_without_rows_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"entries \['epoch'\] of the batch have no rows"):
            check_batch({"image": torch.zeros(2, 1), "epoch": 3}, "image")

    def test_a_function_is_a_selector(self) -> None:
        def first(pool: Any, num_survivors: int, state: Any) -> torch.Tensor:
            return torch.arange(num_survivors)

        clipcov = ClipCov(0.75, "teacher", selector=first, warmup=0, image_key="pixels", text_key="words")
        own_trainer([clipcov]).fit()
        assert clipcov.selector == "first"
        assert clipcov.selection is not None
        assert int(clipcov.selection.stream.num_samples) == 128

    def test_a_model_without_towers_is_refused(self) -> None:
        class Blind(OwnModel):
            encode_text = None  # pyright: ignore[reportAssignmentType]

        trainer = own_trainer([ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")])
        trainer.state.model = Blind()
        with pytest.raises(ValueError, match="has no encode_text; selection needs both towers"):
            trainer.fit()

    def test_microbatch_that_splits_survivors_is_refused(self) -> None:
        clipcov = ClipCov(0.75, "teacher", image_key="pixels", text_key="words")
        with pytest.raises(ValueError, match=r"device_train_microbatch_size=4 must be the survivors per rank.*= 8"):
            own_trainer([clipcov], device_train_microbatch_size=4).fit()

    def test_pool_that_does_not_divide_is_refused(self) -> None:
        with pytest.raises(ValueError, match="must be a whole number"):
            own_trainer([ClipCov(0.8, "teacher", image_key="pixels", text_key="words")]).fit()

    def test_wrong_key_names_what_is_there(self) -> None:
        with pytest.raises(ValueError, match=r"key 'image' \(image_key\); the batch is \['pixels', 'words'\]"):
            own_trainer([ClipCov(0.75, "teacher", warmup=0)]).fit()

    def test_a_second_data_set_has_counts_of_its_own(self) -> None:
        clipcov = ClipCov(0.75, "teacher", warmup=0, soft_start=0.0, image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov], loader=DataLoader(numbered(64), 32, drop_last=True), max_duration="6ba")
        trainer.fit()
        assert clipcov.selection is not None and clipcov.selection.times.sum() == 6 * 8
        with pytest.warns(UserWarning, match="has 96 samples now, and had 64: .* counted anew"):
            trainer.fit(train_dataloader=DataLoader(numbered(96), 32, drop_last=True), duration="3ba")
        assert len(clipcov.selection.times) == 96 and clipcov.selection.times.sum() == 3 * 8

    def test_a_clipcov_is_of_one_trainer(self) -> None:
        clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")
        first = own_trainer([clipcov])
        first.fit()
        with pytest.raises(ValueError, match="has selected for another Trainer"):
            own_trainer([clipcov]).fit()
        assert first.state.timestamp.batch == 4
        first.close()
        atexit.unregister(first.engine._close)
        del first
        gc.collect()
        with pytest.raises(ValueError, match="has selected for another Trainer"):
            own_trainer([clipcov]).fit()
        # One whose first Trainer came to nothing is as new.
        clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")
        with pytest.raises(ValueError, match="must be the survivors"):
            own_trainer([clipcov], device_train_microbatch_size=4).fit()
        again = own_trainer([clipcov])
        again.fit()
        assert isinstance(clipcov.teacher, Teacher)
        assert torch.equal(clipcov.teacher.model.image_tower.weight, again.state.model.image_tower.weight) is False
        assert clipcov.samples_seen == 32

    def test_a_clock_that_is_reset_changes_no_count(self) -> None:
        memory = MemoryLog()
        data: Any = [{**sample, "valid": torch.tensor(i % 32 > 0)} for i, sample in enumerate(numbered(64))]
        clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words", max_invalid_ratio=0.05)
        trainer = own_trainer([clipcov], loader=DataLoader(data, 32), loggers=memory, max_duration="20ba")
        trainer.fit()
        trainer.fit(reset_time=True, duration="20ba")
        assert clipcov.num_invalid == 40 and clipcov.tally.samples_streamed == 40 * 32
        streamed, seen = (memory.data[f"selection/samples_{name}"] for name in ("streamed", "seen"))
        assert [int(a) == 4 * int(b) for a, b in zip(streamed, seen, strict=True)] == [True] * 40

    @pytest.mark.filterwarnings("ignore:Cannot split tensor")
    def test_a_run_resumes_at_a_short_pool_of_a_loader_that_states_no_size(self, tmp_path: Path) -> None:
        class Batches:
            def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
                generator = torch.Generator().manual_seed(0)
                for rows in (32, 32, 16):
                    pixels = torch.randn(rows, 6, generator=generator)
                    yield {"pixels": pixels, "words": torch.randn(rows, 5, generator=generator)}

            def __len__(self) -> int:
                return 3

        def trainer(**kwargs: Any) -> Trainer:
            clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")
            return own_trainer([clipcov], loader=Batches(), run_name="own", device_train_microbatch_size=8, **kwargs)

        whole = trainer(save_folder=str(tmp_path), save_interval="2ba")
        whole.fit()
        resumed = trainer(load_path=str(tmp_path / "ep0-ba2-rank0.pt"))
        resumed.fit()
        assert resumed.state.model.rows == [4, 8] and whole.state.model.rows == [8, 8, 4, 8]
        mine, theirs = resumed.state.model.state_dict(), whole.state.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)

        class Smaller(Batches):
            def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
                for _ in range(3):
                    yield {"pixels": torch.randn(16, 6), "words": torch.randn(16, 5)}

        clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")
        options = {"run_name": "own", "device_train_microbatch_size": 8, "max_duration": "9ba"}
        other = own_trainer([clipcov], loader=Smaller(), load_path=str(tmp_path / "ep0-ba2-rank0.pt"), **options)
        with pytest.raises(ValueError, match=r"began with stream\.global_pool_size=32, not 16"):
            other.fit()

    @pytest.mark.parametrize(
        ("outputs", "message"),
        [
            ({"logit_scale": 20.0}, None),
            ({"logit_scale": torch.tensor([20.0])}, None),
            ({"logit_scale": torch.ones(8)}, r"output logit_scale must be one number, exponentiated, not shape \(8,\)"),
            ({"logit_scale": "20"}, "not '20'"),
        ],
    )
    def test_a_scale_in_the_outputs_is_one_number(self, outputs: dict[str, Any], message: str | None) -> None:
        trainer = own_trainer([ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")])
        forward = trainer.state.model.forward

        def with_features(batch: Any) -> Any:
            model = trainer.state.model
            image, text = model.encode_image(batch["pixels"]), model.encode_text(batch["words"])
            return {"image_features": image, "text_features": text, "logits": forward(batch), **outputs}

        trainer.state.model.forward = with_features
        trainer.state.model.loss = lambda found, batch: torch.nn.functional.cross_entropy(
            found["logits"], torch.arange(len(found["logits"]))
        )
        if message is None:
            trainer.fit()
        else:
            with pytest.raises(ValueError, match=message):
                trainer.fit()

    def test_captions_that_are_no_tokens_are_a_clear_error(self) -> None:
        data: Any = [{"pixels": torch.randn(6), "words": "a caption"} for _ in range(64)]
        clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")
        with pytest.raises(ValueError, match=r"'words' \(text_key\) as a tensor of tokens, not list"):
            own_trainer([clipcov], loader=DataLoader(data, 32)).fit()

    def test_a_model_that_cannot_be_copied_has_no_teacher(self) -> None:
        trainer = own_trainer([ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")])
        tower = trainer.state.model.image_tower
        tower.register_buffer("computed", tower.weight * 2)
        with pytest.raises(ValueError, match=r"embed='teacher' cannot copy OwnModel: .*embed='online', 'proxy'"):
            trainer.fit()


class Coloured(OwnModel):
    """It reads images of three channels and token ids."""

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return self.image_tower(image.mean((2, 3)).repeat(1, 2))

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return self.text_tower(text.float() / 10)


@pytest.mark.filterwarnings("ignore:No optimizer was specified")
@pytest.mark.filterwarnings("ignore:.*has no instructions for it")
@pytest.mark.parametrize("precision", [None, "amp_bf16"])
def test_by_default_a_small_model_of_its_own_judges(precision: str | None) -> None:
    """Whatever the learner is: it takes what the loader gives, images of 24 pixels and five ids here."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "pixels": torch.randn(3, 24, 24, generator=generator),
            "words": torch.randint(1, 60000, (5,), generator=generator),
        }
        for _ in range(64)
    ]
    clipcov = ClipCov(0.75, embed_precision=precision, image_key="pixels", text_key="words")
    loader = DataLoader(data, batch_size=32)  # pyright: ignore[reportArgumentType]
    trainer = own_trainer([clipcov], loader=loader, model=Coloured())
    trainer.fit()
    assert isinstance(clipcov.teacher, OnlineProxy) and clipcov.teacher.updates == 4 * 4
    assert trainer.state.model.rows == [8] * 4 and clipcov.selection is not None


@pytest.mark.filterwarnings("ignore:No optimizer was specified")
def test_what_the_default_judge_cannot_read_is_named() -> None:
    with pytest.raises(ValueError, match=r"reads images of shape .* not \(8, 6\).*embed='teacher'"):
        own_trainer([ClipCov(0.75, image_key="pixels", text_key="words")]).fit()


def drawn(pool: int = 16, **others: Any) -> list[dict[str, Any]]:
    """Pools for `Coloured`, as dicts, with the entries of `others`."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixels": torch.randn(pool, 3, 8, 8, generator=generator),
            "words": torch.randint(1, 99, (pool, 5), generator=generator),
            "image_embedding": torch.randn(pool, 6, generator=generator),
            "text_embedding": torch.randn(pool, 6, generator=generator),
            **others,
        }
        for _ in range(2)
    ]


def trained(pools: list[dict[str, Any]], model: OwnModel | None = None, **kwargs: Any) -> list[int]:
    """Rows of the batches that a model was trained on, in two steps, of such pools."""
    keys = {"image_key": "pixels", "text_key": "words"}
    clipcov = ClipCov(0.75, **{"warmup": 0, "soft_start": 0.0, **keys, **kwargs})
    loader = DataLoader(pools, batch_size=None)  # pyright: ignore[reportArgumentType]
    trainer = own_trainer([clipcov], loader=loader, model=model or Coloured(), max_duration="2ba")
    trainer.fit()
    return trainer.state.model.rows


class Heads(OwnModel):
    """It trains on the embeddings themselves."""

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.rows.append(len(batch["image_embedding"]))
        return self.encode_image(batch["image_embedding"]) @ self.encode_text(batch["text_embedding"]).T

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return self.text_tower(text[:, :5])


class Floats(Coloured):
    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return super().encode_image(image.float())


class Outside(Coloured):
    """It has no features in its outputs, and reads no captions for them."""

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        self.rows.append(len(batch["pixels"]))
        return self.encode_image(batch["pixels"]) @ self.text_tower.weight[:, :4]


class Pairs(Coloured):
    def encode_image(self, image: torch.Tensor) -> Any:
        return super().encode_image(image), image


class Several(Coloured):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.ones(2))


MASK = torch.arange(16) % 8 > 0
BYTES = [b"x"] * 16
FLAT = r"copies=1.0 looks at images .* not \(16, 6\): set selection.copies=0"


@pytest.mark.filterwarnings("ignore:No optimizer was specified")
class TestOwnBatches:
    def test_heads_are_trained_on_columns(self) -> None:
        pools = [{key: pool[key] for key in ("image_embedding", "text_embedding")} for pool in drawn()]
        keys = {"image_key": "image_embedding", "text_key": "text_embedding"}
        assert trained(pools, Heads(), embed="columns", **keys) == [4, 4]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
    @pytest.mark.parametrize("side", [8, 72])
    def test_the_default_judge_reads_images_of_any_type(self, dtype: torch.dtype, side: int) -> None:
        pools = [{**pool, "pixels": torch.rand(16, 3, side, side).mul(99).to(dtype)} for pool in drawn()]
        assert trained(pools, Floats()) == [4, 4]

    @pytest.mark.parametrize(
        "others",
        [
            {"valid": MASK.tolist()},
            {"valid": MASK.long()},
            {"id": torch.arange(16).to(torch.uint32)},
            {"id": list(range(16))},
            {"id": [f"key{i}" for i in range(16)]},
            {"concepts": ["dog"] * 16},
            {"thumbnail": BYTES},
        ],
    )
    @pytest.mark.parametrize("embed", ["columns", "teacher"])
    def test_what_comes_beside_a_pool_may_be_a_users_own(self, others: dict[str, Any], embed: str) -> None:
        assert trained(drawn(**others), embed=embed, dataset_size=64, max_invalid_ratio=0.2) == [4, 4]

    def test_columns_may_be_lists(self) -> None:
        pools = [{**pool, "text_embedding": pool["text_embedding"].tolist()} for pool in drawn()]
        assert trained(pools, embed="columns") == [4, 4]

    @pytest.mark.parametrize(
        ("others", "kwargs", "message"),
        [
            ({"valid": torch.ones(16, 3)}, {}, r"the batch's 'valid' has shape \(16, 3\)"),
            ({"valid": ["yes"] * 16}, {}, "the batch's 'valid' must be a tensor .* not list of str"),
            ({"concepts": ["dog"] * 16}, {"selector": "concept_balance"}, "the batch's 'concepts' must be a tensor"),
            ({"thumbnail": BYTES}, {"embed": "columns", "copies": 1.0}, "the batch's 'thumbnail' must be a tensor"),
            ({"thumbnail": MASK[:, None]}, {"embed": "columns", "copies": 1.0}, "copies=1.0 reads .*copies=0"),
            ({"text_embedding": ["x"] * 16}, {"embed": "columns"}, "the batch's 'text_embedding' must be a tensor"),
            ({"pixels": [torch.ones(3, 8, 8)] * 16}, {}, "'pixels' .image_key. as a tensor of images, not list of"),
            ({"pixels": torch.ones(16, 6), "words": torch.ones(16, 5)}, {"embed": "teacher", "copies": 1.0}, FLAT),
        ],
    )
    def test_what_cannot_be_read_is_named(self, others: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            trained(drawn(**others), OwnModel() if message == FLAT else None, **kwargs)

    @pytest.mark.parametrize(
        ("words", "key", "message"),
        [
            (["a cat"] * 16, "words", r"reads 'words' \(text_key\) as a tensor, not list.*selection.learnability=0"),
            (torch.ones(16, 5), "captions", r"'captions' \(text_key\) as a tensor, not in a batch of \['pixels'"),
        ],
    )
    def test_a_lag_without_captions_says_what_it_needs(self, words: Any, key: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            trained(drawn(words=words), Outside(), embed="columns", text_key=key)
        assert trained(drawn(words=words), Outside(), embed="columns", text_key=key, learnability=0.0) == [4, 4]

    def test_ids_beyond_the_data_set_are_warned_of_once(self) -> None:
        pools = [{**pool, "id": torch.arange(16) + 16 * at} for at, pool in enumerate(drawn())]
        with pytest.warns(UserWarning) as said:
            trained(pools, embed="columns", dataset_size=10)
        assert sum("ids of the pool reach" in str(each.message) for each in said) == 1

    def test_a_second_fit_with_other_pools_says_so(self) -> None:
        clipcov = ClipCov(0.75, "teacher", warmup=0, image_key="pixels", text_key="words")
        trainer = own_trainer([clipcov])
        trainer.fit()
        with pytest.raises(ValueError, match=r"has selected from 32 candidates a step, .* this fit's loader gives 64"):
            trainer.fit(train_dataloader=DataLoader(numbered(64), 64), duration="1ba", device_train_microbatch_size=16)

    @pytest.mark.parametrize("embed", ["teacher", "online", "proxy"])
    def test_towers_that_return_no_tensor_are_named(self, embed: str) -> None:
        model = {} if embed == "teacher" else {"proxy": Pairs()}
        with pytest.raises(ValueError, match=r"Pairs\.encode_image returned a tuple; selection needs a tensor"):
            trained(drawn(), embed=embed, model=Pairs() if embed == "teacher" else None, **model)

    @pytest.mark.parametrize("embed", ["teacher", "columns"])
    def test_a_logit_scale_of_several_numbers_is_named(self, embed: str) -> None:
        with pytest.raises(ValueError, match=r"Several has logit_scale of shape \(2,\); .* one number"):
            trained(drawn(), Several(), embed=embed)
