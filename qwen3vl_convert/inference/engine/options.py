"""How an engine is set up, and how much memory it takes where nobody said."""

import os
import sys
from dataclasses import dataclass

import torch

from qwen3vl_convert.errors import UsageError

GPU_SHARE = 0.85
"""Of the memory that is free after loading; the rest is for what a forward needs."""
CPU_SHARE = 0.25
FEATURE_SHARE = 0.05
"""Of the same, for the features of images."""
MOST_FEATURES = 2 << 30
"""Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes of an engine; the defaults fit most machines."""

    page_size: int = 16
    """Tokens that are stored, and found again in the prefix cache, together."""
    kv_tokens: int | None = None
    """Tokens that the KV pool holds. None: as many as fit into free memory."""
    max_running: int = 64
    """Sequences in one batch."""
    max_step_tokens: int = 2048
    """Tokens of one forward: longer prompts are computed in pieces."""
    context_length: int | None = None
    """The most tokens of one sequence. None: what the model is for."""
    prefix_cache: bool = True
    cuda_graphs: bool | None = None
    """Decode by captured graphs. None: on a GPU, and without them if capturing fails."""
    eos_token_ids: tuple[int, ...] = ()
    """What ends a text beside what config.json says: generation_config.json often names more."""

    def __post_init__(self) -> None:
        for name in ("page_size", "kv_tokens", "max_running", "max_step_tokens", "context_length"):
            value = getattr(self, name)
            if value is None and name in ("kv_tokens", "context_length"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name}: expected a whole number, at least 1, found {value!r}.")
        if isinstance(self.eos_token_ids, int):
            object.__setattr__(self, "eos_token_ids", (self.eos_token_ids,))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the KV pool will be, times the share of them that it may have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    return int(_host_memory() * CPU_SHARE)


def _host_memory() -> int:
    """Bytes available, or where only that is known, all bytes there are."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return min(int(lines["MemAvailable"].split()[0]) * 1024, _container_memory())
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_memory() -> int:
    """Bytes that the control group of this process may use, beyond any where there is no such limit."""
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return int(file.read())
    except (OSError, ValueError):
        return sys.maxsize


def feature_bytes(memory: int) -> int:
    """Bytes for the features of images, of so many that are free."""
    return min(MOST_FEATURES, int(memory * FEATURE_SHARE))


def kv_pages(options: EngineOptions, bytes_per_token: int, context: int, memory: int) -> int:
    """Pages of the pool, the dummy included: as asked for, or as fit into `memory` bytes and can be of use."""
    size = options.page_size
    if options.kv_tokens is not None:
        return 1 + -(-options.kv_tokens // size)
    useful = options.max_running * -(-context // size)
    fitting = memory // (bytes_per_token * size)
    if fitting < 1:
        raise UsageError(
            f"KV pool: expected memory for at least {size} tokens of {bytes_per_token} bytes, found {memory} bytes. "
            f"Free some, load the model in a smaller dtype, or say kv_tokens."
        )
    return 1 + min(useful, fitting)
