"""A pretended CUDA device, for tests where there is none.

To Python a `Pretended` tensor lies on `cuda:0`; its numbers lie on the CPU and are computed there, so that results can
be compared. What a GPU would refuse is refused: an operation on tensors of both devices, and a collective of a group
that is not for theirs. What it would make the host wait for is counted (`CudaPretended.waits`): values that are read,
shapes that depend on values, copies back, copies there unless they are `non_blocking`, and stopwatches that are read.

It runs the branches for GPUs that ask a tensor, and the kernels by Triton's interpreter, but neither compilers nor
graphs nor streams, nor what asks Composer's device for its name: those are `pytest -m gpu`'s. Nor does it know when a
driver waits on its own, as it may to copy memory that is not pinned.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from composer.devices import DeviceCPU
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import clipcov_stream
from clipcov_stream import graphed, kernels, selection
from clipcov_stream.clock import Stopwatch

DEVICE = torch.device("cuda", 0)
OURS = str(Path(clipcov_stream.__file__).parent) + os.sep
STANDS_FOR = torch.device("meta")
"""What torch itself takes a pretended tensor's device for: one that needs no driver."""

READS = frozenset({
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "multinomial", "_linalg_check_errors", "_linalg_eigh",
    "_linalg_svd", "repeat_interleave",
})  # fmt: skip
"""Operations that hand the host a value, a shape that depends on values, or whether a factorization went well."""

VALUES = frozenset({"_local_scalar_dense", "is_nonzero", "equal", "allclose"})
"""Those of them whose result is the host's."""

INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
"""What takes indices of the CPU too, by a copy, and looks for a mask's numbers first."""

COPIES = frozenset({"copy_", "_to_copy", "copy"})

UNMIXED = frozenset({"stack", "cat", "index_select"})
"""What takes no number of the other device either."""

OF_OBJECTS = frozenset({"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"})
"""Of torch.distributed: they choose the device of what travels themselves."""


class Pretended(Tensor):
    """A tensor whose numbers, `held`, lie on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=STANDS_FOR,
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    @property
    def is_meta(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = Pretended(self.held.clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a file they are the CPU's, as what torch.load is told to map there is."""
        return self.held.clone().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a pretended tensor outside of CudaPretended")


class Devices(TorchFunctionMode):
    """Has torch take the pretended device for the one that stands for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], DEVICE)
        if func == Tensor.data.__set__ and isinstance(args[0], Pretended):  # pyright: ignore[reportAttributeAccessIssue]
            args[0].held = args[1].held
        if func is Tensor.tolist and isinstance(args[0], Pretended):
            return args[0].cpu().tolist()
        if func is Tensor.pin_memory:
            return args[0]
        if func in (torch.tensor, torch.as_tensor) and standing((kwargs or {}).get("device")) is STANDS_FOR:
            made = func(*args, **{**kwargs, "device": None})
            return made if isinstance(made, Pretended) else made.to(STANDS_FOR)
        return func(*tree_map(standing, args), **tree_map(standing, kwargs or {}))


def standing(value: Any) -> Any:
    named = isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] == "cuda")
    return STANDS_FOR if named and torch.device(value).type == "cuda" else value


class CudaPretended(TorchDispatchMode):
    """Runs operations of pretended tensors on what they hold, and says where a GPU would make the host wait.

    Waits are told by the innermost line of the package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches = 0
        """Torch's operations on the device but for views, in this thread: what a GPU is told one by one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        name = func.overloadpacket.__name__
        tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        here = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
        device = kwargs.get("device")
        if not there and device != STANDS_FOR:
            return func(*args, **kwargs)
        if there and mixed(name, args, here):
            shapes = [(tuple(tensor.shape), "cuda" if isinstance(tensor, Pretended) else "cpu") for tensor in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
        self._note(name, args, kwargs, there)
        aliases = [of.alias_info for of in func._schema.returns if of.alias_info is not None]
        self.launches += not (name.startswith(("empty", "new_empty")) or any(not of.is_write for of in aliases))
        back = device is not None and device != STANDS_FOR
        if device is not None:
            kwargs["device"] = "cpu"
        found = func(*tree_map(held, args), **tree_map(held, kwargs))
        if back or name in VALUES:
            return found.clone() if isinstance(found, Tensor) else found
        if name == "copy_" and not isinstance(args[0], Pretended):
            return args[0]
        if name == "_to_copy" and not there:
            found = found.clone()
        # What was changed in place is what it was.
        known = {id(tensor.held): tensor for tensor in there}

        def wrapped(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            return known[id(part)] if id(part) in known else Pretended(part)

        return tree_map(wrapped, found)

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The default group moves what is on the device, as NCCL does, and every other what is on the CPU, as gloo."""
        tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
        group = next(part for part in args if isinstance(part, torch.ScriptObject))
        ours = ProcessGroup.unbox(group).group_name == distributed.group.WORLD.group_name  # pyright: ignore
        wrong = [tensor for tensor in tensors if isinstance(tensor, Pretended) != ours]
        of_objects = any(frame.name in OF_OBJECTS for frame in traceback.extract_stack())
        if wrong and not of_objects and func.overloadpacket.__name__ != "barrier":
            raise RuntimeError(f"{func} of the {'default' if ours else 'own'} group got tensors of the other device")
        found = func(*tree_map(held, args), **tree_map(held, kwargs))
        return (*args[:1], *found[1:]) if isinstance(found, tuple) else found

    def _note(self, name: str, args: Any, kwargs: Any, there: list[Pretended]) -> None:
        if name in READS and there:
            self.wait(name)
        if name in INDEXED:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("a mask's numbers")
            if any(index.ndim and not isinstance(index, Pretended) for index in indices):
                self.wait("indices from the CPU")
        if name in COPIES:
            source = args[0] if name == "_to_copy" else args[1]
            target = kwargs.get("device") if name == "_to_copy" else args[0]
            to_there = target == STANDS_FOR if name == "_to_copy" else isinstance(target, Pretended)
            overlaps = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            if isinstance(source, Pretended) and not (to_there or target is None):
                self.wait("a copy to the CPU")
            elif not isinstance(source, Pretended) and to_there and not overlaps:
                self.wait("a copy from the CPU")

    def wait(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(OURS)]
        where = f"{frames[-1].filename.rpartition('/')[2]}: {frames[-1].line}" if frames else "elsewhere"
        self.waits.append(f"{what} ({where})")


def mixed(name: str, args: Any, here: list[Tensor]) -> bool:
    """Whether an operation on tensors of the device, and on those `here` on the CPU, is one that a GPU refuses."""
    if name in COPIES:
        return False
    if name in INDEXED:  # args: what is indexed, indices and, if they are put there, values
        values = args[2] if len(args) > 2 else None
        return not isinstance(args[0], Pretended) or any(values is tensor and tensor.ndim for tensor in here)
    return any(tensor.ndim or name in UNMIXED for tensor in here)


def held(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


@contextlib.contextmanager
def pretended_cuda() -> Iterator[CudaPretended]:
    """Within it tensors, and modules by `moved`, can be on a CUDA device that there is not."""
    run, launch, milliseconds = threading.Thread.run, kernels.launch, Stopwatch.milliseconds

    def run_too(thread: threading.Thread) -> None:
        """Modes are a thread's own."""
        with CudaPretended() as another, Devices():
            another.waits = mode.waits
            run(thread)

    def read(watch: Stopwatch) -> float:
        mode.wait("a stopwatch")
        return milliseconds(watch)

    def launch_there(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launch(kernel, grid, *map(held, arguments), **options)

    with (
        mock.patch.object(threading.Thread, "run", run_too),
        mock.patch.object(kernels, "launch", launch_there),
        mock.patch.object(selection, "aside", lambda run, device: run),
        mock.patch.object(graphed, "WARMUP", math.inf),
        mock.patch.object(Stopwatch, "milliseconds", read),
        mock.patch("torch.compile", lambda function, **_: function),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
        CudaPretended() as mode,
        Devices(),
    ):
        yield mode


class DevicePretended(DeviceCPU):
    """For a Trainer."""

    def module_to_device(self, module: Any) -> Any:
        return moved(module)

    def tensor_to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(DEVICE, non_blocking=True)


def moved(module: nn.Module) -> nn.Module:
    """The module, its parameters, which stay what they are to an optimizer, and buffers on the pretended device."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            there = nn.Parameter(parameter.data.to(DEVICE), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, there)
        for name, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[name] = buffer.to(DEVICE)
    return module


def averaging_gradients(module: nn.Module, _: Any = None) -> nn.Module:
    """In place of DistributedDataParallel, whose work is not done in Python."""

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        distributed.all_reduce(parameter.grad)
        parameter.grad.div_(distributed.get_world_size())

    for parameter in module.parameters():
        distributed.broadcast(parameter.data, 0)
        parameter.register_post_accumulate_grad_hook(average)
    return module


def taken_back(value: Any) -> Any:
    """A state on the CPU."""
    return tree_map(lambda part: part.detach().cpu() if isinstance(part, Tensor) else part, value)
