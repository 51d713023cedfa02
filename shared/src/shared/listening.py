"""A server's address, taken before anything is loaded."""

import socket

from shared.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address (port 0: any that is free); UserError when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}): give another address") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise UserError(
            f"cannot listen on {host}:{port} ({error}): give another --port, 0 takes a free one"
        ) from error
    return bound
