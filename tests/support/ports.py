"""Ports for the stores of runs."""

import random
import socket

__all__ = ["free_port"]

# Below the ports that the system gives to clients, which come and go all the time, in other
# workers too: between this answer and the start of a store, imports may take seconds.
_PORTS = range(20000, 30000)


def free_port() -> int:
    """Return a port that nobody has at this moment."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
