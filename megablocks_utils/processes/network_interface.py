"""The network interface that leads from this machine to the others.

Torch-free. gloo takes the address that the machine's own name resolves to. On Debian that is
127.0.1.1, which no other machine can reach.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Iterable, MutableMapping
from contextlib import suppress

from megablocks_utils.errors import ConfigurationError

__all__ = ["GLOO_VARIABLE", "choose_gloo_interface", "find_local_address"]

GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
_ANY_PORT = 9  # nothing is sent there
_SIOCGIFADDR = 0x8915
_INET6_ADDRESSES = "/proc/net/if_inet6"


def find_local_address(remote: str) -> str:
    """Return this machine's own address on the way to another one; empty for loopback or none."""
    try:
        candidates = socket.getaddrinfo(remote, _ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return ""
    for family, kind, protocol, _, place in candidates:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                address = str(probe.getsockname()[0])
        except OSError:
            continue
        if not _is_loopback(address):
            return address
    return ""


def choose_gloo_interface(
    others: Iterable[str], environ: MutableMapping[str, str] = os.environ
) -> str:
    """Have gloo use the interface that leads to the other machines, where it would choose loopback.

    Args:
        others: addresses of other machines, the most telling first.
        environ: `GLOO_SOCKET_IFNAME` is set here, unless it is.

    Returns:
        One line for people; empty where nothing had to be done.

    Raises:
        ConfigurationError: no interface leads there.
    """
    if environ.get(GLOO_VARIABLE):
        return ""
    host = os.uname().nodename
    own = _resolve(host)
    if own and not _is_loopback(own):
        return ""
    seen = f"resolves to {own}" if own else "does not resolve"
    for other in filter(None, others):
        if (address := find_local_address(other)) and (name := _find_interface(address)):
            environ[GLOO_VARIABLE] = name
            return f"{host} {seen} on itself: {GLOO_VARIABLE} is set to {name} ({address})"
    raise ConfigurationError(
        f"{host} {seen} on itself, which no other machine can reach; set {GLOO_VARIABLE} to the "
        "network interface that leads to them (ip -brief address lists them)."
    )


def _resolve(host: str) -> str:
    """Return the first address of a name, as gloo does; empty where there is none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ""
    return str(found[0][4][0])


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "0.0.0.0", "::")


def _find_interface(address: str) -> str:
    """Return the interface that has an address; empty where none has."""
    for _, name in socket.if_nameindex():
        if address in _list_addresses(name):
            return name
    return ""


def _list_addresses(name: str) -> list[str]:
    request = struct.pack("256s", name.encode()[:15])
    found = []
    # An interface without an IPv4 address has no answer.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        found.append(socket.inet_ntoa(answer[20:24]))
    return found + _list_inet6_addresses(name)


def _list_inet6_addresses(name: str) -> list[str]:
    try:
        with open(_INET6_ADDRESSES, encoding="ascii") as file:
            rows = [line.split() for line in file]
    except OSError:
        return []
    return [
        socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])) for row in rows if row[-1] == name
    ]
