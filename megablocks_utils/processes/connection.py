"""The way to the launcher's store, where processes meet: bad addresses end in one sentence."""

import os
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.launch import LaunchEnvironment

__all__ = ["connect_to_store"]

CONNECT_S = 12.0
_ANSWER_S = 6.0  # of a store that is reached
_RETRY_S = 0.5
_PREFIX = "megablocks_utils"  # the launcher keeps its own keys there
_WANTED = "it must be the host of rank 0, as every host sees it"


def connect_to_store(
    launch: LaunchEnvironment,
    environ: Mapping[str, str] = os.environ,
    *,
    timeout_s: float = CONNECT_S,
) -> dist.Store:
    """Return the store of the launcher, or make it on rank 0 where no launcher has.

    Args:
        launch: which process this is.
        environ: has MASTER_ADDR and MASTER_PORT.
        timeout_s: how long to wait for the store.

    Raises:
        ConfigurationError: for an address where no store answers, or a port that is taken.
    """
    address, port = environ["MASTER_ADDR"].strip(), int(environ["MASTER_PORT"])
    # As torch.distributed.rendezvous decides it.
    is_host = launch.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    last_s = time.monotonic() + timeout_s
    _wait_for_name(address, last_s)
    if not is_host:
        _wait_for_port(address, port, last_s)
    return _open_store(address, port, launch.world_size, is_host=is_host)


def _wait_for_name(address: str, last_s: float) -> None:
    """Wait until a name resolves: that of a new pod does after a while."""
    found: list[str] = []

    def look() -> None:
        while not found and time.monotonic() < last_s:
            try:
                socket.getaddrinfo(address, None)
            except (OSError, UnicodeError):
                time.sleep(_RETRY_S)
            else:
                found.append(address)

    # In a thread: a name server that does not answer holds a call for longer than there is time.
    thread = threading.Thread(target=look, name="resolve MASTER_ADDR", daemon=True)
    thread.start()
    thread.join(max(0.0, last_s - time.monotonic()))
    if not found:
        host = os.uname().nodename
        raise ConfigurationError(
            f"MASTER_ADDR is {address}, but {host} cannot resolve that name; {_WANTED}."
        )


def _wait_for_port(address: str, port: int, last_s: float) -> None:
    reason = "nothing answers"
    while True:
        try:
            left_s = max(_RETRY_S, last_s - time.monotonic())
            with socket.create_connection((address, port), timeout=left_s):
                return
        except OSError as error:
            reason = (error.strerror or str(error) or reason).lower()
        if time.monotonic() > last_s:
            raise ConfigurationError(
                f"MASTER_ADDR is {address} and MASTER_PORT is {port}, but {os.uname().nodename} "
                f"reaches no process there ({reason}); {_WANTED}, with a port that is open to it."
            )
        time.sleep(_RETRY_S)


def _open_store(address: str, port: int, world_size: int, *, is_host: bool) -> dist.Store:
    """Open the store in a thread: torch waits without end for a stranger's answer."""
    found: list[dist.Store] = []
    errors: list[str] = []

    def connect() -> None:
        try:
            store = dist.TCPStore(
                address,
                port,
                world_size,
                is_host,
                timeout=timedelta(seconds=_ANSWER_S),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
        else:
            found.append(dist.PrefixStore(_PREFIX, store))

    thread = threading.Thread(target=connect, name="connect to MASTER_ADDR", daemon=True)
    thread.start()
    thread.join(_ANSWER_S + 1.0)
    if found:
        return found[0]
    raise ConfigurationError(_describe_failure(address, port, "".join(errors), is_host=is_host))


def _describe_failure(address: str, port: int, error: str, *, is_host: bool) -> str:
    if is_host and "EADDRINUSE" in error:
        return (
            f"MASTER_PORT is {port}, but another process of {os.uname().nodename} has taken that "
            "port; it must be one that is free on the host of rank 0."
        )
    if is_host and "EACCES" in error:
        return f"MASTER_PORT is {port}, but only root may take it; it must be 1024 or above."
    return (
        f"MASTER_ADDR is {address} and MASTER_PORT is {port}, but what answers there is no store "
        f"of this run; {_WANTED}, with a port that nothing else uses."
    )
