"""Parameter counts come from global shapes; bytes from what the rank holds."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megablocks_utils.planning.model.gpus import find_peak_flops
from megablocks_utils.quantization.packing import pack_all
from megablocks_utils.training.report.parameters import (
    ParameterCounts,
    count_local_bytes,
    count_parameters,
    describe_packed,
)
from megablocks_utils.training.report.utilization import mfu_per_token_rate

DENSE = 5 * 3 + 7 * 3  # tied embedding once, and a frozen projection
EXPERTS = 8 * 4 * 3


class TinyMoE(nn.Module):
    """Hold a tied embedding, a frozen projection and 8 experts."""

    def __init__(self, device=None):
        super().__init__()
        self.embed = nn.Embedding(5, 3, device=device)
        self.head = nn.Linear(3, 5, bias=False, device=device)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(3, 7, bias=False, device=device).requires_grad_(False)
        self.experts = nn.Parameter(torch.empty(8, 4, 3, device=device))


@pytest.fixture
def fake_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "ep"))
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_of_a_plain_model(device):
    model = TinyMoE(device)
    counts = count_parameters(model, {"experts": model.experts}, top_k=2)
    assert counts == ParameterCounts(
        total=DENSE + EXPERTS,
        active=DENSE + 2 * 4 * 3,
        trainable=5 * 3 + EXPERTS,
        flops_per_token=6 * (5 * 3 + 2 * 4 * 3) + 4 * 7 * 3,
    )


def test_utilization_is_that_of_the_active_weights(monkeypatch):
    """A head of its own computes, the embedding then does not; GPUs are known by their names."""
    model = TinyMoE()
    model.head.weight = nn.Parameter(torch.empty(5, 3))
    counts = count_parameters(model, {"experts": model.experts}, top_k=2)
    flops = 6 * (5 * 3 + 2 * 4 * 3) + 4 * 7 * 3
    assert counts.flops_per_token == flops
    assert count_parameters(model, {"experts": model.experts}, None).flops_per_token is None
    gpu, rates = torch.device("cuda", 0), {}
    for name in (
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA GB200",
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
        rates[name.split()[1]] = mfu_per_token_rate(counts, gpu, 8)
    assert rates.pop("A100-SXM4-80GB") == pytest.approx(flops / (8 * 312e12))
    assert rates == {"H100": None, "GB200": None}  # the last H100, on PCIe, has another peak
    assert find_peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert mfu_per_token_rate(counts, torch.device("cpu"), 8) is None


def test_counts_are_global_and_bytes_local_when_experts_are_sharded(fake_ranks):
    model = TinyMoE()
    placements = [Shard(0), Shard(0)]
    experts = distribute_tensor(model.experts.data, fake_ranks, placements, src_data_rank=None)
    model.experts = nn.Parameter(experts)
    counts = count_parameters(model, {"experts": model.experts}, top_k=2)
    flops = 6 * (15 + 24) + 4 * 21
    assert counts == ParameterCounts(DENSE + EXPERTS, DENSE + 24, 15 + EXPERTS, flops)
    assert count_local_bytes([model.experts]) == EXPERTS * 4 // 8
    assert count_local_bytes(model.parameters()) == (DENSE + EXPERTS // 8) * 4


def test_replicas_count_once_and_are_held_whole(fake_ranks):
    local = torch.empty(2, 4, 3, dtype=torch.bfloat16)
    experts = DTensor.from_local(local, fake_ranks, [Replicate(), Shard(0)])
    assert experts.shape == (8, 4, 3)
    assert count_local_bytes([experts]) == EXPERTS * 2 // 4


def test_packed_weights_are_named_with_what_they_take_here(fake_ranks):
    adapter = torch.empty(2, 4, 3)
    assert describe_packed([adapter]) is None
    local = pack_all("int8", torch.ones(2, 4, 256), is_transposed=False)
    experts = DTensor.from_local(local, fake_ranks, [Replicate(), Shard(0)], run_check=False)
    # A scale of four bytes for 256 numbers.
    wanted = "the experts' frozen weights, in int8, 1.016 bytes each"
    assert describe_packed([adapter, experts]) == wanted
    none_here = pack_all("int8", torch.ones(0, 4, 256), is_transposed=False)
    assert describe_packed([none_here]) == "the experts' frozen weights, in int8"
