"""Addresses where no store of the run answers, and ports that are taken: one sentence in time."""

import os
import socket
import time

import pytest

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes import connection
from megablocks_utils.processes.connection import connect_to_store
from megablocks_utils.processes.launch import LaunchEnvironment
from tests.support.ports import free_port

HOST = os.uname().nodename


def refused(rank: int, address: str, port: int) -> str:
    environ = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    started_s = time.monotonic()
    with pytest.raises(ConfigurationError) as caught:
        connect_to_store(LaunchEnvironment(rank, 0, 2), environ, timeout_s=0.4)
    assert time.monotonic() - started_s < 10
    return str(caught.value)


@pytest.fixture
def taken_port():
    """A port where something listens that never answers."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("rank", "address"),
    [(0, "no.such.host.invalid"), (1, "no.such.host.invalid"), (1, "a..b"), (0, "x" * 300)],
)
def test_a_name_that_does_not_resolve(rank, address):
    sentence = refused(rank, address, 29500)
    assert sentence.startswith(f"MASTER_ADDR is {address}, but {HOST} cannot resolve that name; ")


def test_nobody_listens():
    port = free_port()
    assert refused(1, "127.0.0.1", port).startswith(
        f"MASTER_ADDR is 127.0.0.1 and MASTER_PORT is {port}, but {HOST} reaches no process there "
        "(connection refused); "
    )


def test_the_port_is_taken(taken_port, monkeypatch):
    monkeypatch.setattr(connection, "_ANSWER_S", 0.4)
    assert refused(0, "127.0.0.1", taken_port) == (
        f"MASTER_PORT is {taken_port}, but another process of {HOST} has taken that port; it must "
        "be one that is free on the host of rank 0."
    )
    assert "but what answers there is no store of this run; " in refused(1, "127.0.0.1", taken_port)


def test_the_store_of_rank_0_is_shared_with_the_others():
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    stores = [connect_to_store(LaunchEnvironment(rank, 0, 2), environ) for rank in range(2)]
    stores[1].set("x", "1")
    assert stores[0].get("x") == b"1"
