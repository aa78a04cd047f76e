"""Attention of many sequences of different lengths that lie one after the other, without padding.

Axes: S or T tokens of all sequences, H heads, K heads of keys and values, D head_dim.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

HALF = (torch.bfloat16, torch.float16)


def attend_within(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Every token looks at all of its own sequence: q, k, v [S, H, D] to [S, H, D]. `cu_seqlens` [sequences + 1].

    On a GPU in half precision one kernel does all; elsewhere sequences of one length are one batch.
    """
    bounds = cu_seqlens.tolist()
    kernel = kernel_for(q.device, q.dtype, q.shape[-1])
    if kernel is not None:
        longest = max((stop - first for first, stop in pairwise(bounds)), default=0)
        return kernel(q, k, v, (cu_seqlens, longest), (cu_seqlens, longest), q.shape[-1] ** -0.5, False)
    out = torch.empty_like(q)
    for length, firsts in by_length(bounds).items():
        _attend_batch((q, k, v), out, length, firsts)
    return out


def by_length(bounds: Sequence[int]) -> dict[int, list[int]]:
    """Where the sequences of each length start."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for first, stop in pairwise(bounds):
        if stop > first:
            found[stop - first].append(first)
    return dict(found)


def _attend_batch(qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, length: int, firsts: list[int]) -> None:
    """Sequences of one length: where they are neighbours, as views."""
    count = len(firsts)
    if firsts == list(range(firsts[0], firsts[0] + length * count, length)):
        where: Any = slice(firsts[0], firsts[0] + length * count)
    else:
        starts = torch.tensor(firsts, device=out.device)
        where = (starts[:, None] + torch.arange(length, device=out.device)).flatten()
    q, k, v = (one[where].view(count, length, *one.shape[1:]).transpose(1, 2) for one in qkv)
    out[where] = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


Lengths = tuple[Tensor, int]
"""(cumulative lengths [sequences + 1], the longest)."""
Kernel = Callable[[Tensor, Tensor, Tensor, Lengths, Lengths, float, bool], Tensor]
"""q [S, H, D], k and v [T, K, D], their lengths, the scale, whether causal with the last tokens of both aligned."""


@cache
def kernel_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel | None:
    """The flash-attention package's kernel, or torch's own of the same; None where neither runs."""
    if device.type != "cuda" or dtype not in HALF or head_dim % 8 or head_dim > _WIDEST:
        return None
    if torch.cuda.get_device_capability(device) < _AMPERE:
        return None
    return _flash_attn() or _torch_varlen()


_AMPERE, _WIDEST = (8, 0), 256
"""What flash attention asks of a GPU, and of a head."""
_ALIGNED = "2.1"
"""The release of flash-attn from which on a causal mask aligns the last tokens."""


def _flash_attn() -> Kernel | None:
    try:
        flash: Any = import_module("flash_attn")
        flash_attn_varlen_func = flash.flash_attn_varlen_func
    except (ImportError, AttributeError):  # a later generation has the name of the package, and other functions
        return None
    if [int(part) for part in flash.__version__.split(".")[:2]] < [int(part) for part in _ALIGNED.split(".")]:
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, of_q: Lengths, of_k: Lengths, scale: float, causal: bool) -> Tensor:
        cu_q, cu_k = (cu.to(q.device, torch.int32, non_blocking=True) for cu, _ in (of_q, of_k))
        found: Tensor = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, of_q[1], of_k[1], softmax_scale=scale, causal=causal
        )
        return found

    return kernel


def _torch_varlen() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    attend: Any = varlen_attn

    def kernel(q: Tensor, k: Tensor, v: Tensor, of_q: Lengths, of_k: Lengths, scale: float, causal: bool) -> Tensor:
        cu_q, cu_k = (cu.to(q.device, torch.int32, non_blocking=True) for cu, _ in (of_q, of_k))
        if scale != q.shape[-1] ** -0.5:
            q = q * (scale * q.shape[-1] ** 0.5)
        groups = q.shape[1] // k.shape[1]  # its first release knows neither grouped heads nor a scale
        k, v = (one.repeat_interleave(groups, dim=1) if groups > 1 else one for one in (k, v))
        window = (-1, 0) if causal else (-1, -1)
        found: Tensor = _windowed(attend)(q, k, v, cu_q, cu_k, of_q[1], of_k[1], window)
        return found

    return kernel


def _windowed(attend: Any) -> Callable[..., Tensor]:
    """torch 2.10 says `is_causal`, later releases say a window."""
    if "window_size" in signature(attend).parameters:
        return lambda *args: attend(*args[:-1], window_size=args[-1])
    return lambda *args: attend(*args[:-1], is_causal=args[-1] == (-1, 0))
