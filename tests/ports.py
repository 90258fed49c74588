"""Ports on loopback for servers that are processes of their own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port(number: int = 0) -> Iterator[int]:
    """A port (0: any) that nobody else is given, neither before its server starts nor after it stopped.

    The system gives a port that was free a moment ago to the next who asks for any; tests run side
    by side, so that a stopped server was followed by one of another test, which answered in its
    place.  A server that reuses addresses, as all here do, may listen beside the socket that holds.
    """
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", number))  # alone: another holder is refused
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not so our server
        yield int(holder.getsockname()[1])
