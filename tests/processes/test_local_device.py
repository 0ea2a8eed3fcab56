"""Which device a process takes, how its group is made, and what is seen of one GPU for two."""

import os
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes import start
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.processes.liveness import WatchLimits
from megablocks_utils.processes.local_device import check_own_devices, choose_device
from megablocks_utils.processes.meeting import Arrival
from megablocks_utils.processes.status_store import Member
from tests.conftest import hide_gpus_from_processes


@pytest.fixture
def put_gpus(monkeypatch):
    """Let torch see some GPUs; returns the list of those that were made current."""

    def put(count: int) -> list[torch.device]:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return put


@pytest.mark.parametrize(
    ("local_rank", "num_visible", "wanted"),
    [(3, 8, "cuda:3"), (0, 1, "cuda:0"), (1, 1, "cuda:0"), (7, 1, "cuda:0"), (1, 0, "cpu")],
)
def test_the_device_also_where_each_process_sees_its_own_alone(
    local_rank, num_visible, wanted, put_gpus
):
    current = put_gpus(num_visible)
    device = choose_device(LaunchEnvironment(local_rank, local_rank, 8))
    assert str(device) == wanted
    assert current == ([device] if num_visible else [])


def arrival(rank: int, uuid: str) -> Arrival:
    member = Member(rank, "node3", "machine", 100 + rank, "7")
    return Arrival(member, 2, "10.0.0.3", "NVIDIA H100", "digest", uuid)


def test_two_processes_on_one_gpu_are_refused():
    check_own_devices([arrival(0, ""), arrival(1, "")])  # on a CPU
    check_own_devices([arrival(0, "GPU-a"), arrival(1, "GPU-b")])
    sent = [Arrival.from_text(arrival(rank, "GPU-a").as_text()) for rank in (0, 1)]
    with pytest.raises(ConfigurationError) as refusal:
        check_own_devices(sent)
    assert str(refusal.value).startswith(
        "rank 0 (process 100 on node3) and rank 1 use the same GPU (NVIDIA H100, GPU-a), but "
    )


@pytest.mark.parametrize(("hang_s", "minutes"), [(5.0, 30), (600.0, 30), (7200.0, 121)])
def test_the_group_of_gpus(hang_s, minutes, monkeypatch):
    """Its limit is later than the run's own; and NCCL connects at the start."""
    made, reduced = {}, []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **made_: made.update(made_))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: reduced.append(tensor.device.type))
    device = torch.device("meta")  # in the place of a GPU
    limits = replace(WatchLimits(), hang_s=hang_s)
    start._connect_group(dist.HashStore(), LaunchEnvironment(1, 1, 2), device, limits)
    assert made["timeout"] == timedelta(minutes=minutes)
    assert reduced == ["meta"] and "device_id" not in made

    def fail(tensor):
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    monkeypatch.setattr(dist, "all_reduce", fail)
    with pytest.raises(ConfigurationError, match=r"rank 1 on .* \(NCCL error: unhandled"):
        start._connect_group(dist.HashStore(), LaunchEnvironment(1, 1, 2), device, limits)


def test_processes_that_tests_start_see_no_gpu(put_gpus, monkeypatch):
    """As many as ranks would be needed, where a test starts several."""
    put_gpus(1)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    for controls_workers, wanted in ((True, "5"), (False, "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
        option = SimpleNamespace(numprocesses=2 if controls_workers else None)
        hide_gpus_from_processes(SimpleNamespace(option=option))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted
