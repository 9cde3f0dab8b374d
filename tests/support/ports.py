"""Ports for the servers of tests, which the kernel gives to nobody else in the meantime."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def free_port() -> int:
    """A port of 127.0.0.1 that only a server which says SO_REUSEADDR can take, as most do.

    It stays bound here, where nobody listens, until this process ends.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return int(held.getsockname()[1])
