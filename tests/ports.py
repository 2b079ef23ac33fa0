"""Ports for servers under test."""

import random
import socket

_NOBODY_ELSES = range(10_000, 20_000)
"""Linux takes the local ends of connections from 32768 on: a port from there can be lost before it is used.

The processes of a Slurm job meet between 20000 and 30000."""


def free_port() -> int:
    """A port on loopback that nobody listens on, nor will by chance."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """So many different ones."""
    found: list[int] = []
    for port in random.sample(_NOBODY_ELSES, len(_NOBODY_ELSES)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no port is free")
