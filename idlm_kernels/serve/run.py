"""The process of a server: the socket, uvicorn, signals, and the words at its start."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn

from idlm_kernels.serve.app import Server

MAX_CONNECTIONS = 1024  # open at a time; beyond, uvicorn answers 503 without asking the application


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet: a port that is taken is said before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"--host {host} is no address of this machine: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; choose with --host and --port") from None
    return bound


class MachineFailed(RuntimeError):
    """A fault that is no request's ended the server."""


class HttpServer(uvicorn.Server):
    """uvicorn, which says when it listens, and ends when the machine has failed."""

    def __init__(self, server: Server, drain_seconds: int, log_requests: bool = False):
        config = uvicorn.Config(
            server.app,
            log_level="info" if log_requests else "warning",
            access_log=log_requests,
            ws="none",
            lifespan="on",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=drain_seconds,
        )
        super().__init__(config)
        self.on_start: Callable[[], None] = lambda: None
        server.worker.on_fault = self.end

    def end(self) -> None:
        """Take no more requests, finish those that run, and return from `run`."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()


def serve(
    server: Server, listening: socket.socket, drain_seconds: int, on_start: Callable[[], None], log: bool
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs. MachineFailed if the machine does."""
    http = HttpServer(server, drain_seconds, log)
    http.on_start = on_start
    # uvicorn drains, and then raises the signal once more for the handler before its own: a drained server ended well.
    signal.signal(signal.SIGTERM, lambda *_: None)
    http.run([listening])
    if server.worker.fault is not None:
        fault = server.worker.fault
        raise MachineFailed(f"{type(fault).__name__}: {fault}") from fault
