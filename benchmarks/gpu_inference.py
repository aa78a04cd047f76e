"""The part of gpu_check that serves prompts with the inference engine: every step's logits beside transformers', in
float32 and bfloat16, prefilled in chunks and decoded by captured CUDA graphs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference_model.worlds import KINDS, NEAR, ROWS, World, make_world, visual
from qwen3vl_convert.inference import Engine, EngineOptions, Request, SamplingParams, VisualInputs, load_model
from qwen3vl_convert.verify.logits.prompts import Prompt

HEAD = ["served", "dtype", "CUDA graphs", "largest difference", "allowed"]
STEPS = 12
SPREAD = 3.0
"""In float32: how often what transformers on the device differs from transformers on a CPU."""
ROUNDING = 2.0
"""In bfloat16: how often what transformers in bfloat16 differs from float32, as the root of the mean square."""


@dataclass(frozen=True)
class Served:
    """All prompts of one model, side by side."""

    what: str
    dtype: str
    graphs: int
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed

    def cells(self) -> list[str]:
        found = f"{self.difference:.1e}"
        return [
            self.what,
            self.dtype,
            str(self.graphs),
            found if self.passed else f"**{found}**",
            f"{self.allowed:.1e}",
        ]


def served(work: Path, device: str) -> Iterator[Served]:
    """All of them, checkpoints made in `work`."""
    for kind in KINDS:
        world = make_world(kind, work / kind)
        for dtype in (torch.float32, torch.bfloat16):
            yield _served(kind, world, dtype, device)


def _served(kind: str, world: World, dtype: torch.dtype, device: str) -> Served:
    engine = Engine(
        load_model(world.folder, device=device, dtype=dtype),
        EngineOptions(page_size=4, kv_tokens=1024, max_step_tokens=24, cuda_graphs=None if device == "cuda" else True),
    )
    theirs = theirs_on(world, dtype, device)
    found, own = [], []
    for row in ROWS.values():
        prompt = world.prompt(row)
        tokens, logits = serve(engine, prompt)
        first = prompt.input_ids.shape[1] - 1
        exact = world.expected(prompt, tokens)[first:-1]
        found.append(_difference(logits, exact, dtype))
        own.append(_difference(theirs.expected(prompt, tokens, device).cpu()[first:-1], exact, dtype))
    allowed = max(NEAR, SPREAD * max(own)) if dtype == torch.float32 else ROUNDING * max(own)
    graphs = engine._runner.graphs
    count = 0 if graphs is None else len(graphs.captured)
    return Served(kind, str(dtype).removeprefix("torch."), count, max(found), allowed)


def theirs_on(world: World, dtype: torch.dtype, device: str) -> World:
    """The same with transformers' model in a dtype on a device."""
    import transformers

    made: Any = transformers.AutoModelForImageTextToText
    model = made.from_pretrained(world.folder, dtype=dtype, attn_implementation="eager").eval()
    return replace(world, theirs=model.to(device))


def serve(engine: Engine, prompt: Prompt) -> tuple[list[int], Tensor]:
    """(tokens, the logits [tokens, vocab] that they were chosen from). A hook would not see what a graph repeats."""
    seen: list[Tensor] = []
    runner: Any = engine._runner
    compute = type(runner)._logits
    runner._logits = lambda *args: _kept(seen, compute(runner, *args))
    pixels = visual(prompt)
    inputs = VisualInputs(**pixels) if any(one is not None for one in pixels.values()) else None
    sampling = SamplingParams(max_new_tokens=STEPS, ignore_eos=True)
    (done,) = engine.generate([Request(token_ids=prompt.input_ids[0].tolist(), visual=inputs, sampling=sampling)])
    del runner._logits
    return list(done.token_ids), torch.cat(seen)


def _kept(seen: list[Tensor], logits: Tensor) -> Tensor:
    seen.append(logits.detach().float().cpu().clone())
    return logits


def _difference(found: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    gap = found.float() - exact.float()
    return float(gap.abs().max() if dtype == torch.float32 else gap.square().mean().sqrt())
