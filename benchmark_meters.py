"""What benchmark.py measures with: seconds, image-forwards, FLOPs and memory of each stage.

An image-forward is one evaluation of the UNet on one image of one text branch, the unit in which
the work of diffusion is told whatever the batches are.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from checkpoints import load_unet_skeleton
from diffusion import StableDiffusion
from run_info import Stopwatch, peak_memory_bytes, reset_peak_memory
from tokenflow_utils import self_attention_layers

MATRIX_SIZE = {"cuda": 8192}  # side of the matrices whose product is timed; others 1024
MATRIX_PRODUCTS = 10  # that are timed, and copies
COPIED_BYTES = 1 << 28  # more than any cache holds


def _sdpa_flops(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# PyTorch's formulas; the CPU's fused attention is not among those of every version.
FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops, **flop_registry}


class OperationCounter(TorchDispatchMode):
    """Counts the FLOPs of what runs within it, by PyTorch's formulas, and the bytes it moves.

    Attributes:
        flops: of products, convolutions and attention.
        bytes: of every operator's inputs and outputs, views left out: what would go through memory
            if no cache kept a result for the next operator.

    As torch.utils.flop_counter.FlopCounterMode does it, but for the record of which module they
    belong to: that needs to be there before the module is entered, and is slow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = FLOPS.get(func._overloadpacket)
        if formula is None:
            # In inference mode a composite operator arrives whole: see what it is made of.
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        found = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=found)
        if not _is_view(func):
            leaves = tree_leaves((args, kwargs, found))
            self.bytes += sum(x.nbytes for x in leaves if isinstance(x, Tensor))
        return found


def _is_view(operator: Any) -> bool:
    """Whether an operator only looks at its input in another way."""
    returns = operator._schema.returns
    alias = returns[0].alias_info if returns else None
    return alias is not None and not alias.is_write


class WorkCounter:
    """Counts image-forwards, FLOPs and bytes of each stage; made by `counting`.

    FLOPs and bytes are counted for the first UNet or VAE call of each sort and taken
    again for the others: calls of one sort have the same stage, batch shape, place among the
    calls of their timestep and kind of timestep, and so the same operations.

    Attributes:
        stage: the running one; set by `Meter`.
        images: image-forwards of the UNet, by stage.
        flops, bytes: of UNet and VAE, by stage; empty where they are not counted.
    """

    def __init__(self, count_flops: bool, kinds: Mapping[int, object]) -> None:
        self.stage = ""
        self.images: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._count_flops, self.kinds = count_flops, kinds
        self._known: dict[tuple, tuple[int, int]] = {}
        self._timestep, self._call = None, 0
        self._running: dict[nn.Module, tuple[tuple, OperationCounter | None]] = {}

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook: of the UNet, and of the VAE's encoder and decoder."""
        x = args[0] if args else kwargs["sample"]
        key = (self.stage, type(module).__name__, tuple(x.shape))
        if isinstance(module, UNet2DConditionModel):
            self.images[self.stage] += len(x)
            t = int(args[1] if len(args) > 1 else kwargs["timestep"])
            self._call = self._call + 1 if t == self._timestep else 0
            self._timestep = t
            key += (self.kinds.get(t), self._call)
        if not self._count_flops:
            return
        counter = None if key in self._known else OperationCounter()
        self._running[module] = key, counter
        if counter is not None:
            counter.__enter__()

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The forward hook of the same modules."""
        if not self._count_flops:
            return
        key, counter = self._running.pop(module)
        if counter is not None:
            counter.__exit__(None, None, None)
            self._known[key] = counter.flops, counter.bytes
        flops, moved = self._known[key]
        self.flops[self.stage] += flops
        self.bytes[self.stage] += moved


@contextmanager
def counting(
    models: StableDiffusion, count_flops: bool = False, kinds: Mapping[int, object] | None = None
) -> Iterator[WorkCounter]:
    """Counts the work of some models; without FLOPs at no cost that could be timed.

    Args:
        kinds: of timesteps: those of one kind (the default) take the same operations.
    """
    counter = WorkCounter(count_flops, kinds or {})
    with ExitStack() as undo:
        for module in (models.unet, models.vae.encoder, models.vae.decoder):
            before = module.register_forward_pre_hook(counter.before, with_kwargs=True)
            undo.callback(before.remove)
            after = module.register_forward_hook(counter.after, always_call=True)
            undo.callback(after.remove)
        yield counter


class Meter(Stopwatch):
    """A stopwatch that also notes the peak memory of each stage, and tells a counter the stage.

    Attributes:
        seconds: by stage, not rounded.
        peak: bytes by stage; on a CPU of the process, the models included.
        processor: seconds of processor time by stage, of all threads of this process.
    """

    def __init__(self, device: torch.device, counter: WorkCounter) -> None:
        super().__init__(device)
        self.counter = counter
        self.peak: dict[str, int] = {}
        self.processor: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.counter.stage = stage
        reset_peak_memory(self.device)
        start = time.process_time()
        with super().__call__(stage):
            yield
        self.processor[stage] = self.processor.get(stage, 0.0) + time.process_time() - start
        self.peak[stage] = max(self.peak.get(stage, 0), peak_memory_bytes(self.device))

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def seconds_of(work: Any, device: torch.device) -> tuple[float, Any]:
    """Calls work() and returns the seconds that it and its kernels took, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    found = work()
    synchronize(device)
    return time.perf_counter() - start, found


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device's kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what the device can do at most, as measured."""
    size = MATRIX_SIZE.get(device.type, 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    times = [seconds_of(lambda: a @ b, device)[0] for _ in range(MATRIX_PRODUCTS)]
    return 2 * size**3 / statistics.median(times)


def limit_memory(device: torch.device, gib: float) -> None:
    """Lets PyTorch take no more of a CUDA device's memory than this: beyond, it runs out."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a large tensor."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds_of(lambda: target.copy_(source), device)[0] for _ in range(MATRIX_PRODUCTS)]
    return 2 * COPIED_BYTES / statistics.median(times)


def keyframe_bytes(
    checkpoint: Path, grid: tuple[int, int], branches: int, itemsize: int
) -> dict[str, int]:
    """What one more keyframe holds in memory during a keyframe pass, from the layers' shapes.

    Args:
        checkpoint: whose UNet it is; its weights are not read.
        grid: (h, w) of the latents.
        branches: of the edit pass.
        itemsize: bytes of a number.

    Returns:
        bytes of: "base" (T_base of all layers), "tokens" (the source's), "keys_values" (of the
        largest layer, since one layer runs at a time), "skips" (the edit's hidden states that
        wait for the decoder, and the largest of those at work), "total".
    """
    unet = load_unet_skeleton(checkpoint)
    tokens: list[int] = []  # numbers of each layer's tokens
    hidden: list[int] = []  # numbers of each skip connection

    def note_tokens(module: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens.append((args[0] if args else kwargs["hidden_states"]).numel())

    def note_hidden(module: nn.Module, args: tuple, output: tuple[Tensor, tuple]) -> None:
        hidden.extend(x.numel() for x in output[1])

    for layer in self_attention_layers(unet):
        attention = unet.get_submodule(layer.removesuffix(".processor"))
        attention.register_forward_pre_hook(note_tokens, with_kwargs=True)
    for block in unet.down_blocks:
        block.register_forward_hook(note_hidden)
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, unet.config.in_channels, *grid)
        unet(x, torch.tensor(1), torch.empty(1, 77, unet.config.cross_attention_dim))
    found = {
        "base": branches * sum(tokens) * itemsize,
        "tokens": sum(tokens) * itemsize,
        "keys_values": 2 * branches * max(tokens) * itemsize,
        "skips": branches * (sum(hidden) + max(hidden)) * itemsize,
    }
    return found | {"total": sum(found.values())}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line nearest to some points (least squares)."""
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)
