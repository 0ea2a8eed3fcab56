"""The interface that gloo is told to use where the machine's name means loopback."""

import socket

import pytest

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes import network_interface
from megablocks_utils.processes.network_interface import (
    choose_gloo_interface,
    find_local_address,
)


@pytest.fixture
def own_name(monkeypatch):
    """Let the machine's own name resolve to an address; None: to none."""

    def resolve_to(address: str | None) -> None:
        monkeypatch.setattr(network_interface, "_resolve", lambda host: address or "")

    return resolve_to


@pytest.fixture
def interface() -> tuple[str, str]:
    """A network interface of this machine and its address, other than loopback."""
    for _, name in socket.if_nameindex():
        for address in network_interface._list_addresses(name):
            if name != "lo" and "." in address:
                return name, address
    pytest.skip("this machine has no network")


@pytest.mark.parametrize("own", ["127.0.1.1", "127.0.0.1", "::1", None])
def test_a_name_that_means_loopback(own, own_name, interface):
    own_name(own)
    name, address = interface
    environ = {}
    line = choose_gloo_interface(["", address], environ)
    assert environ == {"GLOO_SOCKET_IFNAME": name}
    assert line.endswith(f"on itself: GLOO_SOCKET_IFNAME is set to {name} ({address})")


def test_what_is_right_stays(own_name):
    own_name("127.0.1.1")
    environ = {"GLOO_SOCKET_IFNAME": "eth7"}
    assert choose_gloo_interface(["127.0.0.1"], environ) == ""
    own_name("10.0.0.1")
    assert choose_gloo_interface(["127.0.0.1"], environ_before := {}) == "" and not environ_before


def test_no_interface_leads_there(own_name):
    own_name("127.0.1.1")
    with pytest.raises(ConfigurationError, match="resolves to 127.0.1.1 on itself, which no other"):
        choose_gloo_interface(["127.0.0.1", "no.such.host.invalid"], {})
    assert find_local_address("127.0.0.1") == ""
