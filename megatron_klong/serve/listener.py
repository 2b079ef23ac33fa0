"""Where a server listens, and whom the kernel cuts off there; imports no torch."""

import math
import socket

from megatron_klong.serve.config import ServeConfig


def listen(config: ServeConfig) -> socket.socket:
    """Raises OSError. A connection that takes nothing of a reply for `body_seconds` is ended.

    By the kernel, which alone knows what was taken; otherwise a client that stops reading holds its place for ever.
    """
    listener = socket.create_server((config.host, config.port), backlog=1024)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(config.body_seconds * 1000))
    return listener
