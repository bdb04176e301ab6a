"""A CUDA device that computes nothing: the whole program runs on it, and its memory is counted.

Tensors on the simulated device are PyTorch's fake tensors, which have a shape, a dtype and a
device, but no values; tensors on the CPU are real. An operator whose tensors lie on two devices
raises, as on a GPU. What is copied to the CPU is 0; a value that Python reads is 1, or true.

Not counted are CUDA's context, cuDNN's workspaces, and what the allocator loses to fragments.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

aten = torch.ops.aten

BLOCK = 512  # bytes; CUDA's allocator rounds up to it
LARGEST_FLASH_HEAD = 256  # channels; the flash kernel takes no more
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class SimulatedGPU(TorchDispatchMode):
    """Runs the operators of fake tensors, and counts their bytes; `simulated_gpu` enters it.

    Attributes:
        allocated, peak, highest: bytes now, and the most since `reset_peak` and `next_stage`. They
            may exceed any GPU's memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.peak = self.highest = 0
        self.fake = FakeTensorMode()
        self._storages: dict[int, weakref.ref] = {}

    def reset_peak(self) -> None:
        self.peak = self.allocated

    def next_stage(self) -> int:
        """The most bytes since the last call."""
        highest, self.highest = self.highest, self.allocated
        return highest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        leaves, spec = tree_flatten((args, kwargs))
        devices = [x.type for x in leaves if isinstance(x, torch.device)]
        if not any(isinstance(x, FakeTensor) for x in leaves) and "cuda" not in devices:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket is aten.to:  # under inference_mode it arrives whole
            with self:
                return func.decompose(*args, **kwargs)
        if func in READS:
            return True
        if func is aten._to_copy.default and "cpu" in devices:
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and not all(isinstance(x, FakeTensor) for x in args[:2]):
            return args[0]  # the one operator that may take tensors of two devices
        if func in INDEXING and not isinstance(args[0], FakeTensor):
            raise RuntimeError(f"{func}: a tensor on the CPU, with indices or values on a GPU")
        plain = [isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in leaves]
        faked = (
            self.fake.from_tensor(x) if real else x for x, real in zip(leaves, plain, strict=True)
        )
        args, kwargs = tree_unflatten(faked, spec)
        with self.fake:
            found = func(*args, **kwargs)
        for tensor in tree_leaves(found):
            if isinstance(tensor, FakeTensor):
                self._count(tensor)
        return found

    def _count(self, tensor: FakeTensor) -> None:
        """Counts a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            del self._storages[key]
            self.allocated -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.highest = max(self.highest, self.allocated)


class _Functions(TorchFunctionMode):
    """What PyTorch decides before an operator is called: pinning, and the kernel of attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.pin_memory:
            return args[0]
        chosen = _attention if func is F.scaled_dot_product_attention else func
        return chosen(*args, **kwargs or {})


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention by the kernels that a GPU would choose; without one PyTorch takes softmax(QK)V."""
    if query.device.type != "cuda":
        return F.scaled_dot_product_attention(query, key, value, **options)
    mask, causal = options.get("attn_mask"), options.get("is_causal", False)
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and mask is None and query.shape[-1] <= LARGEST_FLASH_HEAD:
        return aten._scaled_dot_product_flash_attention(query, key, value, is_causal=causal)[0]
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, False, is_causal=causal
    )[0]


def is_simulated() -> bool:
    """Whether a GPU is simulated now."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@contextmanager
def simulated_gpu(total: int) -> Iterator[SimulatedGPU]:
    """Plays a CUDA device with `total` bytes of memory while the block runs."""
    gpu = SimulatedGPU()
    played = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: gpu.reset_peak(),
        "memory_allocated": lambda *_: gpu.allocated,
        "max_memory_allocated": lambda *_: gpu.peak,
        "mem_get_info": lambda *_: (max(0, total - gpu.allocated), total),
        "get_device_name": lambda *_: "simulated",
    }
    with gpu.fake, gpu, _Functions(), mock.patch.multiple(torch.cuda, **played):
        yield gpu
