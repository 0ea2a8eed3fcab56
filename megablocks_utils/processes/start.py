"""Connect the processes of a run, and have them watch each other."""

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, MappingProxyType

import torch
import torch.distributed as dist

from megablocks_utils.config import RunConfig
from megablocks_utils.config.given import GivenOption
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.agreement import broadcast_from_rank0
from megablocks_utils.processes.connection import CONNECT_S, connect_to_store
from megablocks_utils.processes.early_exit import count_covered, stop_announcing
from megablocks_utils.processes.freed_memory import give_back_freed_memory
from megablocks_utils.processes.launch import LaunchEnvironment, reports_errors
from megablocks_utils.processes.liveness import DEFAULT_LIMITS, WatchLimits, describe_self
from megablocks_utils.processes.local_device import (
    check_own_devices,
    choose_device,
    read_device_uuid,
)
from megablocks_utils.processes.meeting import Arrival, Meeting
from megablocks_utils.processes.monitor import authenticate_ranks, start_monitor
from megablocks_utils.processes.network_interface import (
    GLOO_VARIABLE,
    choose_gloo_interface,
    find_local_address,
)
from megablocks_utils.processes.rank_facts import compute_digest, describe_difference, describe_run
from megablocks_utils.processes.refusals import announce

__all__ = ["start_processes", "start_run"]

_STORE_TIMEOUT = timedelta(seconds=30)
# A machine that torchrun waits for again comes soon, or its agent never starts its processes.
_RESTART_LIMIT_S = 50.0
_SECRET_BYTES = 32
# Of a collective: torch's own, where nobody allows a step to take longer.
_GROUP_TIMEOUT, _AFTER_HANG = timedelta(minutes=30), timedelta(minutes=1)


def start_run(
    config: RunConfig, launch: LaunchEnvironment, leftovers: Iterable[GivenOption] = ()
) -> torch.device:
    """Connect the processes of a training run, if all have the same options and versions.

    **Collective:** waits for all ranks.

    Args:
        config: the options.
        launch: which process this is.
        leftovers: options that FSDP1 hands to TrainingArguments.

    Raises:
        ConfigurationError: on every rank, where ranks differ, one was refused or does not come.
    """
    limits = WatchLimits(config.lost_rank_timeout_s, config.hang_timeout_s)
    facts = describe_run(config, leftovers) if launch.world_size > 1 else {}
    device = start_processes(launch, config.output_dir, limits=limits, facts=facts)
    if device.type == "cpu" and config.adapter.packed_format is not None:
        give_back_freed_memory()
    return device


def start_processes(
    launch: LaunchEnvironment,
    output_dir: str | None = None,
    *,
    limits: WatchLimits = DEFAULT_LIMITS,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> torch.device:
    """Connect the processes of the run and return this rank's device.

    **Collective:** waits for all ranks. A run of one process makes a group of one, so that there is
    one code path.

    Args:
        launch: which process this is.
        output_dir: where to look for checkpoints when a rank is lost; None: ranks are not watched.
        limits: how long to wait for other ranks.
        facts: what must be the same on all ranks, by name.

    Raises:
        ConfigurationError: on every rank, where ranks differ, one was refused or does not come.
    """
    device = choose_device(launch)
    # Gathering experts that are sharded twice takes two all-gathers: nothing to warn of.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if dist.is_initialized():
        return device
    if launch.world_size == 1:
        _init_group(dist.HashStore(), launch, device, limits)
        return device
    stop_announcing()
    store = connect_to_store(launch, timeout_s=_connect_limit_s(limits))
    meeting, arrivals = _meet(store, launch, device, limits, {**facts, "device": device.type})
    if output_dir is not None:
        members = [arrival.member for arrival in arrivals]
        own_store = dist.PrefixStore(f"{meeting.name}/status", _clone(store))
        start_monitor(members, launch.rank, own_store, output_dir, limits)
    lines = [
        _prepare_gloo(launch, arrivals),
        _describe_devices(launch, arrivals),
        _describe_restarts(launch),
    ]
    for line in filter(None, lines):
        sys.stderr.write(f"{line}\n")
    _connect_group(dist.PrefixStore(f"{meeting.name}/group", store), launch, device, limits)
    authenticate_ranks(broadcast_from_rank0(lambda: secrets.token_bytes(_SECRET_BYTES)))
    return device


def _connect_limit_s(limits: WatchLimits) -> float:
    """Return how long to wait for the store.

    Where torchrun has told the address and rank 0 is to open the store there, rank 0 may still be
    importing. An address that somebody wrote by hand may be wrong.
    """
    is_by_agents = "TORCHELASTIC_RUN_ID" in os.environ
    is_open = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return limits.hang_s if is_by_agents and not is_open else CONNECT_S


def _clone(store: dist.Store) -> dist.Store:
    """Return another client of the same store."""
    client: dist.Store = store.clone()  # type: ignore[attr-defined]  # missing from torch's stubs
    client.set_timeout(_STORE_TIMEOUT)
    return client


def _meet(
    store: dist.Store,
    launch: LaunchEnvironment,
    device: torch.device,
    limits: WatchLimits,
    facts: Mapping[str, str],
) -> tuple[Meeting, list[Arrival]]:
    """Wait until all processes have come, and see that they run the same."""
    me = Arrival(
        describe_self(launch.rank),
        launch.world_size,
        find_local_address(os.environ["MASTER_ADDR"].strip()),
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        compute_digest(facts),
        read_device_uuid(device),
    )
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    limit_s = min(limits.hang_s, _RESTART_LIMIT_S) if is_restart else limits.hang_s
    try:
        meeting = Meeting(store, me, facts, reports=reports_errors())
        with _refused_by_sigterm():
            arrivals = meeting.wait(limit_s)
        _check_facts(meeting, arrivals)
        check_own_devices(arrivals)
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigurationError(
            f"the store at {place}, where the processes meet, has gone before all had come: what "
            "held it, the launcher there or rank 0, has ended."
        ) from error
    except ConfigurationError as error:
        if not meeting.is_known_to_all:
            covers = count_covered(launch)
            announce(store, me.member, str(error), covers=covers, world_size=launch.world_size)
        raise
    return meeting, arrivals


def _check_facts(meeting: Meeting, arrivals: list[Arrival]) -> None:
    """Refuse ranks that differ from rank 0; every rank raises the same."""
    other = next((a.member for a in arrivals if a.digest != arrivals[0].digest), None)
    if other is None:
        return
    first = arrivals[0].member
    facts, of_rank_0 = (meeting.read_facts(member.rank) for member in (other, first))
    meeting.wait_until_read()
    raise ConfigurationError(
        describe_difference(
            facts,
            of_rank_0,
            rank=f"rank {other.rank} on {other.host}",
            rank_0=f"rank 0 on {first.host}",
        )
    )


@contextmanager
def _refused_by_sigterm() -> Iterator[None]:
    """Let a launcher that ends this process, while it waits for others, be known to them."""

    def refuse(number: int, frame: FrameType | None) -> None:
        raise ConfigurationError("its launcher has ended it by SIGTERM while it waited for others.")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, refuse)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare_gloo(launch: LaunchEnvironment, arrivals: list[Arrival]) -> str:
    """Have gloo take an address that other machines reach; return what to say of it."""
    me = arrivals[launch.rank]
    others = {a.address for a in arrivals if a.member.machine != me.member.machine}
    if not others:
        return ""
    line = choose_gloo_interface([os.environ["MASTER_ADDR"].strip(), *sorted(others)])
    return line if reports_errors() else ""


def _describe_devices(launch: LaunchEnvironment, arrivals: list[Arrival]) -> str:
    """Return a line for people where machines have devices of different kinds, on rank 0."""
    hosts = {arrival.device: arrival.member.host for arrival in reversed(arrivals)}
    if launch.rank != 0 or len(hosts) == 1:
        return ""
    kinds = [f"{device} on {host}" for device, host in sorted(hosts.items())]
    return f"devices of different kinds: {join_words(kinds, 'and')}; the slowest sets the pace"


def _describe_restarts(launch: LaunchEnvironment) -> str:
    """Return a line for people, on rank 0, where torchrun will not take in another host.

    Its agents tell the address of their store in the first round only (torch 2.13).
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if launch.rank != 0 or launch.has_one_host or restarts in ("", "0") or not is_shared:
        return ""
    return (
        "a host that is lost cannot come back or be replaced: torchrun does that only with "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every host"
    )


def _connect_group(
    store: dist.Store, launch: LaunchEnvironment, device: torch.device, limits: WatchLimits
) -> None:
    try:
        _init_group(store, launch, device, limits)
        # NCCL connects with the first collective: better here than after the model is read.
        dist.all_reduce(torch.zeros(1, device=device))
    except RuntimeError as error:
        names = f"{GLOO_VARIABLE} and NCCL_SOCKET_IFNAME"
        raise ConfigurationError(
            f"rank {launch.rank} on {os.uname().nodename} cannot connect to the other ranks "
            f"({str(error).splitlines()[0]}); if a firewall is not behind it, set "
            f"{names if device.type == 'cuda' else GLOO_VARIABLE} to the network interface that "
            "leads to the other machines."
        ) from error


def _init_group(
    store: dist.Store, launch: LaunchEnvironment, device: torch.device, limits: WatchLimits
) -> None:
    """Make the default process group.

    Without `device_id`, which would have meshes split the group: torch 2.13 hands NCCL's options
    to gloo there. `monitor` ends a run that hangs with a sentence, so torch's own limit is later.
    """
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=max(_GROUP_TIMEOUT, timedelta(seconds=limits.hang_s) + _AFTER_HANG),
    )
