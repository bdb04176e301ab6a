"""The simulated GPU: where tensors lie, what is refused, and how memory is counted."""

import pytest
import torch
import torch.nn.functional as F

from tokenflow.ops.simulated_gpu import simulated_gpu

MIB = 1 << 20


@pytest.fixture
def gpu():
    with simulated_gpu(total=1 << 30) as gpu:
        yield gpu


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "operation",
    [
        lambda cpu, cuda: cpu + cuda,
        lambda cpu, cuda: torch.cat([cpu, cuda]),
        lambda cpu, cuda: F.linear(cuda, cpu),
        lambda cpu, cuda: torch.where(cuda > 0, cuda, cpu),
        lambda cpu, cuda: cpu[cuda.long()],
        lambda cpu, cuda: cpu.index_put_((torch.arange(4),), cuda),
    ],
)
def test_tensors_of_two_devices_are_refused(gpu, mode, operation):
    with mode(), pytest.raises(RuntimeError, match=r"devices|a tensor on the CPU"):
        operation(torch.zeros(4, 4), torch.zeros(4, 4, device="cuda"))


def test_what_a_gpu_allows_is_allowed(gpu):
    cpu = torch.arange(4.0)
    cuda = cpu.pin_memory().to("cuda", non_blocking=True)
    assert (cuda * torch.tensor(2.0) * 3).device.type == "cuda"
    assert cuda[torch.tensor([0, 1])].shape == (2,)
    cpu[:2] = cuda[:2]  # a copy
    assert torch.equal((cuda + 1).cpu(), torch.zeros(4)) and torch.equal(cpu, torch.arange(4.0))
    assert torch.isfinite(cuda).all()


def test_memory_is_counted_while_tensors_live(gpu):
    a = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    views = [a[1:], a.view(2, -1), a]
    assert gpu.allocated == torch.cuda.memory_allocated() == MIB
    del a
    assert gpu.allocated == MIB  # of the views
    del views
    assert (gpu.allocated, gpu.peak) == (0, MIB)
    one = torch.zeros(1, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == gpu.allocated == 512 > one.nbytes
    assert torch.cuda.mem_get_info() == ((1 << 30) - 512, 1 << 30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [64, 512])
def test_attention_takes_no_memory_for_the_scores(gpu, dtype, channels):
    query = torch.zeros(2, 1, 1024, channels, dtype=dtype, device="cuda")
    before = gpu.allocated
    output = F.scaled_dot_product_attention(query, query, query)
    assert output.shape == query.shape and gpu.peak - before < 2 * query.nbytes


def test_afterwards_torch_is_as_before():
    before = torch.cuda.is_available, torch.cuda.device_count()
    with simulated_gpu(MIB):
        assert torch.cuda.is_available()
    assert before == (torch.cuda.is_available, torch.cuda.device_count())
    assert type(torch.zeros(1)) is torch.Tensor
