"""A GPU that is not there: tensors that say cuda:0, keep their numbers on the CPU and refuse to meet CPU tensors.

Each place where the host waits for the device is recorded. Kernels, streams, memory, several ranks and torch.compile are
not pretended.
"""

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from util.data.batches import copy_stream

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
READ_BY_HOST = {  # the host needs a value of the device, or the size of a result
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.bincount.default, aten.repeat_interleave.Tensor, aten._unique2.default, aten.unique_dim.default,
}  # fmt: skip
WAITS: list[tuple[str, str]] = []  # (what waits, "file:line code"), of the GPU that is pretended at present


def place() -> str:
    """The innermost line of this project that is being executed, as "file:line code"."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "?"


class CudaTensor(Tensor):
    """A tensor whose numbers are in `held`, on the CPU. For the autograd engine, too, it is on the CPU."""

    held: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), **layout, device="cpu")
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"CudaTensor({self.held})"

    def __format__(self, spec: str) -> str:
        return format(self.item() if spec else repr(self), spec)

    def get_device(self) -> int:
        return 0

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def to(self, *args, copy: bool = False, memory_format=None, **kwargs) -> Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return Tensor.to(self, dtype=dtype or self.dtype, copy=copy)
        WAITS.append(("copy to the host", place()))
        return self.held.to(dtype=dtype or self.dtype, copy=True, memory_format=memory_format or torch.preserve_format)

    def new_tensor(self, data: Any, device: Any = CUDA) -> Tensor:
        return torch.tensor(data, dtype=self.dtype, device=device)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Sees every operation, those that create a tensor on the device too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """The operation on the CPU; its result is on the GPU if the operation or its arguments say so."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    inside = [x for x in tensors if isinstance(x, CudaTensor)]
    outside = [x for x in tensors if not isinstance(x, CudaTensor) and x.ndim]
    copies = func in (aten._to_copy.default, aten.copy_.default)
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    to_gpu = bool(inside) or (bool(device) and device.type == "cuda")  # autograd asks for "cpu", see CudaTensor
    if func is aten.copy_.default:
        to_gpu = isinstance(args[0], CudaTensor)
    if inside and outside and not copies and func not in INDEXING:
        shapes = [tuple(x.shape) for x in outside]
        raise RuntimeError(f"{func}: tensors on cuda:0 meet tensors on cpu, {shapes}, in {place()}")
    if inside and (func in READ_BY_HOST or (func in INDEXING and waits_for_index(args[1]))):
        WAITS.append((str(func), place()))
    if copies and (to_gpu or inside) and len(inside) < len(tensors) and not is_free_copy(args, kwargs):
        WAITS.append((f"{func} across devices", place()))
    real = tree_map_only(CudaTensor, lambda x: x.held, (args, kwargs))
    if device and device.type == "cuda":
        real[1]["device"] = torch.device("cpu")
    out = func(*real[0], **real[1])
    if not to_gpu:
        return out
    if func is aten._to_copy.default and any(out is x for x in tree_leaves(real)):
        out = out.clone()
    out = tree_map_only(Tensor, CudaTensor, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if inside else out


def waits_for_index(indices: list) -> bool:
    """True for an index of truth values, or one on the CPU."""
    given = [i for i in indices if isinstance(i, Tensor)]
    return any(i.dtype == torch.bool or not isinstance(i, CudaTensor) for i in given)


def is_free_copy(args: tuple, kwargs: dict) -> bool:
    """True for a copy from pinned memory that the host does not wait for."""
    source = args[-1] if len(args) > 1 and isinstance(args[-1], Tensor) else args[0]
    return bool(kwargs.get("non_blocking")) and getattr(source, "pinned", False)


def pin(tensor: Tensor, *_) -> Tensor:
    """Stands for Tensor.pin_memory."""
    tensor = tensor.clone()
    tensor.pinned = True  # type: ignore[attr-defined]
    return tensor


class Autocast(torch.autocast):
    """Autocast of the CPU, in place of the GPU's."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def by_device(lists: list, with_indices: bool = False) -> dict:
    """Stands for torch's grouping of tensors, which reads the device that the autograd engine knows."""
    groups = torch._C._group_tensors_by_device_and_dtype(lists, with_indices)
    return {(group[0][0].device, dtype): (group, indices) for (_, dtype), (group, indices) in groups.items()}


STREAM = MagicMock()
STREAM.return_value.is_capturing.return_value = False
DEVICE_FUNCTIONS = {
    "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1,
    "current_device": lambda: 0, "set_device": lambda device: None, "manual_seed_all": lambda seed: None,
    "get_device_name": lambda device=None: "a pretended GPU", "get_device_capability": lambda device=None: (8, 0),
    "is_bf16_supported": lambda including_emulation=True: True, "max_memory_allocated": lambda device=None: 2**30,
    "Stream": STREAM, "current_stream": STREAM, "stream": lambda stream: nullcontext(),
    "reset_peak_memory_stats": lambda device=None: None, "is_current_stream_capturing": lambda: False, "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None, "synchronize": lambda device=None: None,
}  # fmt: skip


@contextmanager
def pretended_cuda() -> Iterator[list[tuple[str, str]]]:
    """torch with one GPU; returns the list of host waits (what waits, "file:line code"), which grows."""
    WAITS.clear()
    lift_only = torch._C._only_lift_cpu_tensors()
    enter, leave = torch.no_grad.__enter__, torch.no_grad.__exit__  # wrapped tensors do not support inference_mode
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **DEVICE_FUNCTIONS))
        for owner, name, value in (
            (torch, "autocast", Autocast), (torch.accelerator, "is_available", lambda: True),
            (torch.accelerator, "current_stream", STREAM),
            (torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(by_device)),
            (torch.inference_mode, "__enter__", enter), (torch.inference_mode, "__exit__", leave),
            (Tensor, "record_stream", lambda self, stream: None), (Tensor, "pin_memory", pin),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, value))
        stack.callback(copy_stream.cache_clear)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift_only)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter on the GPU is another object
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is seen as a copy
        stack.enter_context(Devices())
        yield WAITS
