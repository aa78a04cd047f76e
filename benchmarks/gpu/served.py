"""Prompts that the inference engine serves: every step's logits beside transformers', in float32 and bfloat16,
prefilled in chunks and decoded by captured CUDA graphs.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpu.checks import BFLOAT16, FLOAT32, ROUNDING, Run, bound_in_float32, dtype_name, root_mean_square
from gpu.page import Row
from inference_model.worlds import KINDS, ROWS, World, make_world, visual
from qwen3vl_convert.inference import Engine, EngineOptions, Request, SamplingParams, VisualInputs, load_model
from qwen3vl_convert.verify.logits.prompts import Prompt

STEPS = 12


def served(run: Run) -> Iterator[Row]:
    """Each kind of model in each dtype."""
    for kind in KINDS:
        world = make_world(kind, run.work / f"served {kind}")
        for dtype in (FLOAT32, BFLOAT16):
            yield _served(kind, world, dtype, run.device)


def _served(kind: str, world: World, dtype: torch.dtype, device: str) -> Row:
    model = load_model(world.folder, device=device, dtype=dtype)
    insisted = insists(model)
    engine = Engine(model, EngineOptions(page_size=4, kv_tokens=1024, max_step_tokens=24, cuda_graphs=insisted))
    theirs = theirs_on(world, dtype, device)
    found, own = [], []
    for row in ROWS.values():
        prompt = world.prompt(row)
        tokens, logits = serve(engine, prompt)
        first = prompt.input_ids.shape[1] - 1
        exact = world.expected(prompt, tokens)[first:-1]
        found.append(_difference(logits, exact, dtype))
        own.append(_difference(theirs.expected(prompt, tokens, device).cpu()[first:-1], exact, dtype))
    allowed = bound_in_float32(max(own)) if dtype == FLOAT32 else ROUNDING * max(own)
    return row_of(kind, dtype, graphs_of(engine), insisted, max(found), allowed)


def row_of(kind: str, dtype: torch.dtype, graphs: int, insisted: bool, found: float, allowed: float) -> Row:
    """Where graphs are insisted on, none is a failure."""
    said = str(graphs) if insisted else f"{graphs}, as the host chooses the experts"
    cells = (kind, dtype_name(dtype), said, f"{found:.1e}", f"{allowed:.1e}")
    return Row("served", cells, found <= allowed and (graphs > 0 or not insisted))


def insists(model: Any) -> bool:
    """Whether decoding must go by graphs: with `None` an engine goes on without them where a capture fails. On a CPU it
    goes through the same code, and nothing is captured.
    """
    return model.device.type == "cpu" or bool(model.capturable)


def graphs_of(engine: Engine) -> int:
    """How many were captured."""
    graphs = engine._runner.graphs
    return 0 if graphs is None else len(graphs.captured)


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
    return float(gap.abs().max()) if dtype == FLOAT32 else root_mean_square(gap)
