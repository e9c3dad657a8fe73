"""How many pages of KV cache a machine has room for."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from idlm_kernels.generate.options import EngineOptions
from idlm_kernels.generate.pages import page_size_for
from idlm_kernels.generate.policy import PlanPolicy
from idlm_kernels.model.transformer import Transformer

_MEMINFO = Path("/proc/meminfo")


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device without pushing anything out."""
    if device.type == "cuda":  # what torch holds and does not use counts as free
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:  # what the kernel itself reckons: free pages alone leave out the file cache, which gives way
        available = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        available = None
    if available is not None:
        return int(available[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS has the second
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def pages_in_memory(model: Transformer, options: EngineOptions, policy: PlanPolicy, fraction: float) -> int:
    """Pages for max_num_seqs full requests, or as many as fit a share of the free memory if those are fewer."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"gpu_memory_utilization must be a number, got {type(fraction).__name__}")
    if not 0 < fraction <= 1:
        raise ValueError(f"gpu_memory_utilization is {fraction}, wanted above 0 and at most 1")
    num_slots = options.max_model_len - 1 + policy.widest.max_rows
    page_size = page_size_for(options.page_size, num_slots)
    per_request = -(-num_slots // page_size)
    fitting = int(free_memory(model.device) * fraction) // model.page_bytes(page_size)
    if fitting < per_request:
        raise ValueError(
            f"{fraction:.0%} of the free memory holds {fitting} pages of {page_size} tokens, but a request of "
            f"{options.max_model_len} tokens needs {per_request}: lower max_model_len or max_tokens, or raise "
            "gpu_memory_utilization"
        )
    return min(options.max_num_seqs * per_request, fitting)
