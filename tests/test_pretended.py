"""What a GPU would refuse, or wait for: the branches for GPUs on a pretended one (`pretended`)."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pools
import pytest
import torch
from corpora import draw_corpus, recipe
from pretended import DEVICE, DevicePretended, Pretended, pretended_cuda, taken_back
from runs import Interrupt, algorithm_of, assert_same, columns_recipe, proxy_section, run, trainer_of, write_columns
from torch import Tensor, distributed

from clipcov_stream import kernels
from clipcov_stream.embed import AT_ONCE, embed_with_towers, rows_at_once
from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.online import OnlineProxy, parts_in_turn
from clipcov_stream.pool import Pool, survivors_of, with_learner
from clipcov_stream.rivals import NEEDS_LEARNER
from clipcov_stream.selection import SELECTORS, Selected, learn, select
from clipcov_stream.towers import SmallTowers

TABLES = ("concept_balance", "dissect")
"""Selectors whose tables are as long as what they read asks for."""

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not kernels.AVAILABLE, reason="needs Triton's interpreter, which is for CPUs"
)

ON_DEVICE = mock.patch("composer.trainer.trainer.get_device", lambda _: DevicePretended())
READ_BACK = "a copy to the CPU (prepare.py: bits = torch.cat([values.view(torch.int32), index.int()]).cpu())"
"""The choice, which must be known where the rows are, and the metrics with it."""

AFTER_IT = [
    'a stopwatch (prepare.py: figures["embed_ms"] = embed_ms())',
    'a stopwatch (prepare.py: figures["select_ms"] = watch.milliseconds())',
]
AFTER_THE_LOSS = 'a stopwatch (algorithm.py: figures["selection/learn_ms"] = self._learning.milliseconds())'
"""What these read is over by then: with the choice, and with the loss, which Composer reads."""

OF_A_STEP = dict.fromkeys([READ_BACK, *AFTER_IT, AFTER_THE_LOSS], 1)


def there(pool: Pool) -> Pool:
    """The pool on the device."""
    return replace(pool, **{name: value.to(DEVICE) for name, value in vars(pool).items() if isinstance(value, Tensor)})


def chosen(selector: str, on_device: bool) -> list[Selected]:
    """Of three pools, some of whose samples are not valid, with a lag after each."""
    device = DEVICE if on_device else torch.device("cpu")
    state = SelectionState.initial(16, Settings(half_life=1e3, copies=1.0, soft_start=0.5), 0, device, 40)
    function, found = SELECTORS[selector], []
    for seed in range(3):
        pool = pools.draw(96, 16, seed, learner=function in NEEDS_LEARNER)
        generator = torch.Generator().manual_seed(seed)
        looks = torch.randn(96, state.looks.shape[1], generator=generator)
        pool = replace(pool, thumbnail=looks, valid=torch.arange(96) % 9 != 0)
        pool = there(pool) if on_device else pool
        found.append(select(state, pool, 24, function))
        rows = torch.randn(24, 8, generator=generator).to(device)
        seen = with_learner(survivors_of(pool, found[-1].survivors), rows, rows, torch.ones((), device=device))
        state = learn(found[-1].state, seen)
    return found


class TestPretence:
    def test_computes_what_a_cpu_does(self) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(5, 4), torch.randn(4, 3)
        with pretended_cuda():
            ours = x.cuda()
            assert isinstance(ours, Pretended) and ours.device == DEVICE and ours.is_cuda
            ours[ours < 0] = 0.0
            assert torch.equal((ours @ y.to(DEVICE))[1:, None].cpu(), (x.clamp_min(0) @ y)[1:, None])

    def test_a_gradient_too(self) -> None:
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
        layer(x).square().sum().backward()
        with pretended_cuda():
            twin = DevicePretended().module_to_device(torch.nn.Linear(4, 3))
            twin.load_state_dict(layer.state_dict())
            twin(x.to(DEVICE)).square().sum().backward()
            assert torch.equal(twin.weight.grad.cpu(), layer.weight.grad)

    def test_refuses_tensors_of_both_devices_but_numbers(self) -> None:
        with pretended_cuda():
            ours = torch.ones(3, device=DEVICE)
            assert (ours + torch.tensor(2.0)).cpu().tolist() == [3.0] * 3
            index, number = torch.zeros(1, dtype=torch.int64), torch.tensor(2.0)
            for mixed in (
                lambda: ours + torch.ones(3),
                lambda: torch.cat([torch.ones(1), ours]),
                lambda: torch.stack([ours.sum(), number]),
                lambda: torch.ones(3)[index.to(DEVICE)],
                lambda: torch.ones(3)[ours > 0],
                lambda: torch.ones(3).index_put_((index,), ours[:1]),
                lambda: ours.index_put_((index,), torch.ones(1)),
                lambda: ours.index_select(0, index),
            ):
                with pytest.raises(RuntimeError, match="to be on the same device"):
                    mixed()

    def test_counts_what_a_host_waits_for(self) -> None:
        with pretended_cuda() as mode:
            ours = torch.ones(3, device=DEVICE)
            torch.ones(3).to(DEVICE, non_blocking=True)
            assert ours.sum().shape == () and mode.waits == []
            for kind, waiting in {
                "_local_scalar_dense": lambda: float(ours.sum()),
                "a copy to the CPU": ours.tolist,
                "a mask's numbers": lambda: ours[ours > 0],
                "indices from the CPU": lambda: ours[torch.zeros(1, dtype=torch.int64)],
                "nonzero": ours.nonzero,
                "_unique2": ours.unique,
                "_linalg_check_errors": lambda: torch.linalg.inv(torch.eye(2, device=DEVICE)),
                "a copy from the CPU": lambda: torch.tensor(2.0, device=DEVICE),
            }.items():
                mode.waits.clear()
                waiting()
                assert mode.waits == [f"{kind} (elsewhere)"]

    def test_moves_the_devices_tensors_in_the_default_group_alone(self, tmp_path: Path) -> None:
        begun = distributed.is_initialized()  # by a Trainer of an earlier test
        if not begun:
            distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
        own = distributed.new_group(backend="gloo")
        try:
            with pretended_cuda():
                here, there = torch.ones(3), torch.ones(3, device=DEVICE)
                distributed.all_reduce(there)
                distributed.all_reduce(here, group=own)
                for tensor, group in ((here, None), (there, own)):
                    with pytest.raises(RuntimeError, match="group got tensors of the other device"):
                        distributed.all_reduce(tensor, group=group)
        finally:
            distributed.destroy_process_group(own if begun else None)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton's interpreter
class TestSelection:
    @pytest.mark.parametrize("selector", pools.NAMES)
    def test_chooses_as_on_a_cpu_and_waits_for_nothing(self, selector: str) -> None:
        expected = chosen(selector, on_device=False)
        with pretended_cuda() as mode:
            found = chosen(selector, on_device=True)
            waits = {wait.partition(":")[0] for wait in ours_of(mode.waits)}
            assert waits == ({"_local_scalar_dense (rivals.py"} if selector in TABLES else set())
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.survivors.is_cuda
                picked = set(ours.survivors.cpu().tolist())
                assert len(picked) == 24 and len(picked & set(theirs.survivors.tolist())) >= 22
                assert float(ours.report["residual"]) == pytest.approx(float(theirs.report["residual"]), rel=0.1)


def test_an_online_proxy_tells_a_gpu_little() -> None:
    """Of a pool in four parts: so small a model takes as long as the host needs to name its operations."""
    torch.manual_seed(0)
    image, text = torch.rand(96, 3, 64, 64), torch.randint(1, 49000, (96, 77))
    told = []
    with pretended_cuda() as mode:
        online = OnlineProxy(DevicePretended().module_to_device(SmallTowers(4)), 1e-3, 0.99)
        image, here = image.to(DEVICE), image
        rows = rows_at_once(online.model, image, 24)
        for _ in range(2):  # the optimizer's state is made in the first
            told = [mode.launches]
            x, y, _ = embed_with_towers(online.model, image, text, rows, contextlib.nullcontext())
            told.append(mode.launches)
            weights = torch.ones(96, device=DEVICE)
            parts = parts_in_turn(96, 24)
            online.learn(image, text, torch.ones(96).bool(), weights, parts, x.shape[1], contextlib.nullcontext)
            told.append(mode.launches)
        large = [torch.empty(size, device=DEVICE) for size in (AT_ONCE, AT_ONCE + 2)]
        assert [rows_at_once(online.model, of, 24) for of in large] == [AT_ONCE, AT_ONCE // 2 + 1]
        assert rows_at_once(torch.nn.Linear(2, 2), image, 24) == rows_at_once(online.model, here, 24) == 24
    assert rows == 96 and x.shape == y.shape == (96, 64)
    assert told[1] - told[0] <= 50 and told[2] - told[1] <= 4 * 200


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
class TestRuns:
    @pytest.mark.parametrize(
        "selection",
        [
            {"embed": "online"},
            {"embed": "online", "run_ahead": 1, "lag_delay": 1},
            {"embed": "online", "copies": 1.0},
            {"embed": "teacher", "embed_resolution": 8},
            {"embed": "teacher", "embed_patch_dropout": 0.5},
            {"embed": "teacher", "selector": "jest"},
            {"embed": "proxy"},
        ],
        ids=lambda selection: "-".join(map(str, selection.values())),
    )
    def test_a_step_waits_once_to_read_its_choice(
        self, tmp_path: Path, corpus: Path, selection: dict[str, Any]
    ) -> None:
        given = proxy_section(tmp_path) if selection["embed"] == "proxy" else {}
        selection = {"run_ahead": 0, "lag_delay": 0, "warmup": "0ba", **given, **selection}
        waits = [waits_of(tmp_path / steps, corpus, steps, selection) for steps in ("2ba", "4ba")]
        expected = {wait: 1 for wait in OF_A_STEP if wait != AFTER_THE_LOSS or "selector" not in selection}
        assert {wait: number / 2 for wait, number in (waits[1] - waits[0]).items()} == expected

    def test_columns_too(self, tmp_path: Path) -> None:
        tree = columns_recipe(write_columns(tmp_path / "columns", 192))
        waits = [steps_of(tmp_path / steps, {**tree, "max_duration": steps})[1] for steps in ("2ba", "4ba")]
        assert {wait: number / 2 for wait, number in (waits[1] - waits[0]).items()} == OF_A_STEP

    def test_one_choice_for_all_ranks_waits_for_their_pools_numbers(self, tmp_path: Path, corpus: Path) -> None:
        waits = [
            waits_of(tmp_path / steps, corpus, steps, {"embed": "online", "scope": "global", "warmup": "0ba"})
            for steps in ("2ba", "4ba")
        ]
        found = {wait: number / 2 for wait, number in (waits[1] - waits[0]).items()}
        assert set(found.values()) == {1} and len(found) == len(OF_A_STEP) + 3 and found.keys() >= OF_A_STEP.keys()
        assert all(wait.startswith("a copy to the CPU") for wait in found.keys() - OF_A_STEP.keys())

    def test_evaluates_there_as_on_a_cpu(self, tmp_path: Path, corpus: Path) -> None:
        split = {"tasks": ["zeroshot", "retrieval"], "local": str(corpus / "eval"), "batch_size": 9}
        tree = recipe(corpus, selection={"selector": "random"}, max_duration="2ba", eval={"shapes": split})
        expected = run(tmp_path / "cpu", tree)[2].data
        found, _ = steps_of(tmp_path / "there", tree)
        metrics = [name for name in expected if name.startswith("metrics/shapes")]
        assert len(metrics) >= 5
        for name in metrics:
            assert found[name] == pytest.approx(expected[name])

    @pytest.mark.parametrize(
        "selection", [{"embed": "online", "run_ahead": 1, "lag_delay": 1, "copies": 1.0}, {"embed": "teacher"}]
    )
    def test_a_resumed_run_equals_a_straight_one(self, tmp_path: Path, corpus: Path, selection: dict[str, Any]) -> None:
        kept = {"run_name": "there", "save_folder": str(tmp_path / "saved"), "save_interval": "4ba", "autoresume": True}
        kept |= {"ledger": str(tmp_path / "ledger"), "gallery": str(tmp_path / "gallery"), "gallery_interval": "2ba"}

        def ended(name: str, stops: int | None, **sections: Any) -> dict[str, Any]:
            with pretended_cuda(), ON_DEVICE:
                trainer, *_ = trainer_of(tmp_path / name, recipe(corpus, selection=selection, **sections))
                if stops is not None:
                    trainer.state.callbacks.append(Interrupt(stops))
                with contextlib.suppress(InterruptedError):
                    trainer.fit()
                state = {"model": trainer.state.model.state_dict(), "algorithm": algorithm_of(trainer).state_dict()}
                trainer.close()
                return taken_back(state)

        straight = ended("straight", None)
        ended("interrupted", 5, **kept)
        assert_same(ended("resumed", None, **kept), straight)


def waits_of(folder: Path, corpus: Path, max_duration: str, selection: dict[str, Any]) -> Counter[str]:
    """Our own of a run."""
    return steps_of(folder, recipe(corpus, selection=selection, max_duration=max_duration))[1]


def steps_of(folder: Path, tree: dict[str, Any]) -> tuple[dict[str, list[float]], Counter[str]]:
    """What a run logs, and our own waits in it."""
    with pretended_cuda() as mode, ON_DEVICE:
        trainer, _, memory = run(folder, tree)
        assert all(parameter.is_cuda for parameter in trainer.state.model.parameters())
        trainer.close()
    return memory.data, Counter(ours_of(mode.waits))


def ours_of(waits: list[str]) -> list[str]:
    return [wait for wait in waits if not wait.endswith("(elsewhere)")]
