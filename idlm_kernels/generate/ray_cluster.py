"""A Ray cluster: how to reach it, and how many models fit into it."""

from __future__ import annotations

import logging
import os

import ray

LOCAL = "local"  # the address that starts a Ray on this machine


def connect(address: str) -> None:
    """Use the Ray at an address, "auto" for the one that this machine belongs to, or start one here for "local".

    Raises: ValueError where there is none.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here reports to nobody
    if address == LOCAL:  # a proxy on one machine learns of a replica's end at once: a minute is for load balancers
        os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")
    carried = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "IDLM_BACKEND") if name in os.environ}
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": carried},
            log_to_driver=False,
            logging_level=logging.WARNING,
            **({"include_dashboard": False} if address == LOCAL else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"no Ray answers at {address!r} ({error}); `--ray local` starts one on this machine") from None


def room(device: str, threads: int | None, wanted: int | None) -> tuple[str, int, int]:
    """Device, threads and number of models in the connected cluster: as many as fit where none is wanted.

    device: "auto" takes GPUs where there are any. threads: of a model on CPUs, and the CPUs that it takes; those of
    the smallest machine when None. On GPUs a model takes one of them.

    Raises: ValueError where there is no room.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cores = [int(count) for count in nodes if count >= 1]
    threads = threads or min(cores, default=1)
    most, each = (gpus, "a GPU") if device == "cuda" else (sum(n // threads for n in cores), f"{threads} CPUs")
    if most < (wanted or 1):
        raise ValueError(f"{wanted or 1} models on {each} each are wanted, but the Ray cluster has room for {most}")
    return device, threads, wanted or most
