"""The server's application as a Ray Serve deployment: replicas on a cluster behind one address.

Each replica is the process of a server without its socket: one engine, one thread, the same FastAPI application. Ray
routes, scales, and starts a replica anew that has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve

from idlm_kernels.generate.generator import Generator
from idlm_kernels.generate.options import EngineOptions
from idlm_kernels.serve.app import Server

NAME = "idlm"
_SECONDS_TO_TELL = 1.0  # that open requests have failed, before the process of a replica ends


@dataclass(frozen=True)
class Replica:
    """What a replica needs. load: the arguments of Generator.from_pretrained. threads: of the CPU, and the CPUs that a
    replica takes from the cluster; on a GPU it takes that GPU. The rest is as in `Server`."""

    load: dict[str, Any]
    sizes: EngineOptions
    model_name: str
    max_waiting: int
    max_body_size: int
    api_key: str | None
    threads: int

    def server(self) -> Server:
        """The server of a replica, in its process."""
        if self.load["device"] == "cpu":
            torch.set_num_threads(self.threads)
        generator = Generator.from_pretrained(**self.load)
        engine = generator.new_engine(replace(self.sizes, max_model_len=generator.max_model_len))
        server = Server(
            engine,
            self.model_name,
            max_waiting=self.max_waiting,
            max_body_size=self.max_body_size,
            api_key=self.api_key,
        )
        server.worker.on_fault = _end_process
        return server


def _end_process() -> None:
    """Leave it to Ray to start a replica where the machine is well."""
    asyncio.get_running_loop().call_later(_SECONDS_TO_TELL, os._exit, 3)


def deployment(replica: Replica, replicas: int | None, most: int, drain_seconds: int) -> serve.Application:
    """replicas: how many; None for one to `most`, by load."""

    def build() -> FastAPI:
        return replica.server().app

    together = replica.sizes.max_num_seqs
    scale: dict[str, Any] = {"num_replicas": replicas}
    if replicas is None:
        scale = {"autoscaling_config": {"min_replicas": 1, "max_replicas": most, "target_ongoing_requests": together}}
    on_gpu = replica.load["device"] == "cuda"
    options: dict[str, Any] = {
        **scale,
        "name": NAME,
        "max_ongoing_requests": together + replica.max_waiting,
        "graceful_shutdown_timeout_s": drain_seconds,
        "ray_actor_options": {"num_gpus": 1} if on_gpu else {"num_cpus": replica.threads},
    }
    return serve.deployment(serve.ingress(build)(), **options).bind()


def run(application: serve.Application, host: str, port: int, on_start: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises RuntimeError where no replica starts."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(application, name=NAME, route_prefix="/")
        on_start()
        ended.wait()
    finally:
        with contextlib.suppress(TimeoutError):  # Ray goes on draining
            serve.delete(NAME)
