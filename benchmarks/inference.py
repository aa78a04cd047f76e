"""How fast the engine prefills and decodes, beside transformers' `generate` on the same weights in the same run.

    python benchmarks/inference.py                       # CPU: 2B shapes cut to 8 layers, fp32, batch 1 and 8
    python benchmarks/inference.py --device cuda         # 2B, 8B and 30B-A3B cut to 12 layers, bf16, batch 1, 8, 32

Weights and prompts are random; both run every prompt to the same number of tokens, in turns, and the middle of the
repeats counts. Prefill is the time until every prompt of a batch has its first token. On a GPU the last column is how
much of the memory's bandwidth, as a copy on that GPU reaches it, decoding gets from reading each weight and each cached
key and value once.
"""

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.huggingface.config import rebuild_config
from qwen3vl_convert.inference import (
    Engine,
    EngineOptions,
    Qwen3VLForConditionalGeneration,
    Request,
    SamplingParams,
)
from qwen3vl_convert.inference.loading import uninitialised
from qwen3vl_convert.make import SIZES

CPU = ({"2b": 8}, (1, 8), torch.float32)
GPU = ({"2b": None, "8b": None, "30b-a3b": 12}, (1, 8, 32), torch.bfloat16)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """What is run: `batch` prompts of `prompt` tokens each, and `tokens` more of each."""

    batch: int
    prompt: int
    tokens: int


@dataclass(frozen=True)
class Rates:
    """Seconds of a batch's prefill, and of one step of decoding."""

    prefill: float
    step: float


@dataclass(frozen=True)
class Measured:
    """One line of the table. `graphs`: how many CUDA graphs were captured; `share`: of the bandwidth that a copy has,
    on a GPU.
    """

    model: str
    shape: Shape
    graphs: int
    ours: Rates
    theirs: Rates
    share: float | None

    def cells(self) -> tuple[str, ...]:
        prefilled, ours, other = self.shape.batch * self.shape.prompt, self.ours, self.theirs
        return (
            self.model,
            str(self.shape.batch),
            str(self.graphs) if self.share is not None else "-",
            f"{prefilled / ours.prefill:.0f}",
            f"{prefilled / other.prefill:.0f}",
            f"{other.prefill / ours.prefill:.2f}",
            f"{self.shape.batch / ours.step:.1f}",
            f"{self.shape.batch / other.step:.1f}",
            f"{other.step / ours.step:.2f}",
            "" if self.share is None else f"{self.share:.0%}",
        )


def cut(size: str, layers: int | None) -> Dims:
    """The text model of a size with fewer layers; of the vision tower, which is not run, one block."""
    dims = replace(SIZES[size], vision_depth=1, deepstack=(0,))
    return replace(dims, layers=layers or dims.layers)


# ---- the two programs ------------------------------------------------------------------------------------------------


def engine_of(dims: Dims, device: torch.device, dtype: torch.dtype, shape: Shape) -> Engine:
    with uninitialised(device, dtype):
        model = Qwen3VLForConditionalGeneration(dims)
    randomise(model)
    room = shape.batch * (shape.prompt + shape.tokens + 32)
    options = EngineOptions(
        kv_tokens=room,
        max_running=shape.batch,
        max_step_tokens=max(2048, shape.batch * shape.prompt),
        context_length=shape.prompt + shape.tokens + 32,
        prefix_cache=False,
        cuda_graphs=device.type == "cuda" and model.capturable,  # insisted on: without it would be another measurement
    )
    return Engine(model, options)


def transformers_of(dims: Dims, device: torch.device, dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    config: Any = transformers.AutoConfig.for_model(**rebuild_config(dims)[0])
    auto: Any = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    rotary = model.model.language_model.rotary_emb
    frequencies = 1.0 / dims.rope_theta ** (torch.arange(0, dims.head_dim, 2, device=device).float() / dims.head_dim)
    rotary.inv_freq.copy_(frequencies)
    model.tie_weights()
    randomise(model)
    return model


def randomise(model: torch.nn.Module) -> None:
    """Weights with which numbers stay where real ones are: speed must not profit from zeros or suffer from NaN."""
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)


def run_ours(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Seconds until every prompt has its first token."""
    sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    done = engine.generate([Request(token_ids=prompt, sampling=sampling) for prompt in prompts])
    return max(one.first_token_seconds or 0.0 for one in done)


def run_theirs(model: Any, prompts: list[list[int]], tokens: int) -> float:
    """The same. What asks whether to stop is asked after every token."""
    began = time.perf_counter()
    first: list[float] = []

    def asked(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not first:
            if ids.is_cuda:
                torch.cuda.synchronize()
            first.append(time.perf_counter() - began)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[asked],
        )
    return first[0]


# ---- timing ----------------------------------------------------------------------------------------------------------


Run = Callable[[list[list[int]], int], float]
"""Runs prompts to so many tokens; seconds until each has its first."""


def rates(runs: dict[str, Run], vocab: int, shape: Shape, repeat: int, sync: Callable[[], None]) -> dict[str, Rates]:
    """Of each program, in turns."""
    found: dict[str, list[Rates]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            generator = torch.Generator().manual_seed(turn)
            special = min(1000, vocab // 4)  # tokens with a meaning of their own are at both ends
            prompts = torch.randint(special, vocab - special, (shape.batch, shape.prompt), generator=generator).tolist()
            sync()
            began = time.perf_counter()
            first = run(prompts, 1 + shape.tokens)
            sync()
            whole = time.perf_counter() - began
            if turn:  # the first warms up
                found[name].append(Rates(first, (whole - first) / shape.tokens))
    return {
        name: Rates(statistics.median(r.prefill for r in of), statistics.median(r.step for r in of))
        for name, of in found.items()
    }


def timed(run: Callable[[], object], sync: Callable[[], None]) -> float:
    sync()
    began = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - began


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(timed(partial(target.copy_, source), torch.cuda.synchronize) for _ in range(10))
    return 2 * source.nbytes / best


def bytes_per_step(dims: Dims, dtype: torch.dtype, shape: Shape) -> float:
    """What one step of decoding must read: every weight that is used, once, and all keys and values.

    Of experts as many as that many draws of `top_k` are expected to hit.
    """
    attention = dims.hidden * dims.head_dim * (2 * dims.heads + 2 * dims.kv_heads)
    mlp = 3.0 * dims.hidden * dims.ffn
    if dims.moe:
        hit = dims.experts * (1 - (1 - dims.top_k / dims.experts) ** shape.batch)
        mlp = 3 * dims.hidden * dims.expert_ffn * hit + dims.hidden * dims.experts
    weights = dims.layers * (attention + mlp) + dims.vocab * dims.hidden
    length = shape.prompt + shape.tokens / 2
    cache = 2 * dims.layers * dims.kv_heads * dims.head_dim * length * shape.batch
    return (weights + cache) * dtype.itemsize


# ---- the table -------------------------------------------------------------------------------------------------------


def measure(size: str, layers: int | None, shape: Shape, where: str, precision: str, repeat: int) -> Measured:
    """Raises RuntimeError if a CUDA graph cannot be captured."""
    device, dtype, dims = torch.device(where), _DTYPES[precision], cut(size, layers)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    engine, theirs = engine_of(dims, device, dtype, shape), transformers_of(dims, device, dtype)
    runs = {
        "ours": lambda prompts, tokens: run_ours(engine, prompts, tokens),
        "theirs": lambda prompts, tokens: run_theirs(theirs, prompts, tokens),
    }
    found = rates(runs, dims.vocab, shape, repeat, sync)
    share = None
    if device.type == "cuda":
        share = bytes_per_step(dims, dtype, shape) / found["ours"].step / bandwidth(device)
    graphs = engine._runner.graphs
    captured = 0 if graphs is None else len(graphs.captured)
    return Measured(f"{size}, {dims.layers} layers", shape, captured, found["ours"], found["theirs"], share)


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


HEAD = (
    *("model", "batch", "CUDA graphs", "prefill, tokens/s", "transformers", "ratio"),
    *("decode, tokens/s", "transformers", "ratio", "bandwidth"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sizes", nargs="+", help="as 2b, or 2b:8 for 8 layers")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--dtype", choices=_DTYPES)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    sizes, batches, dtype = GPU if options.device == "cuda" else CPU
    options.dtype = options.dtype or next(name for name, one in _DTYPES.items() if one == dtype)
    if options.sizes:
        sizes = {one.partition(":")[0]: int(one.partition(":")[2] or 0) or None for one in options.sizes}
    warnings.simplefilter("ignore")
    print(line(HEAD), line(["---"] * len(HEAD)), sep="\n", flush=True)
    for size, layers in sizes.items():
        for batch in options.batches or batches:
            shape = Shape(batch, options.prompt, options.tokens)
            found = measure(size, layers, shape, options.device, options.dtype, options.repeat)
            print(line(found.cells()), flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
