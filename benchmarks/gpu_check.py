"""The models against transformers on a GPU: the same logits, how long a prefill takes, what the verifier says of
checkpoints of real shapes and of planted faults, and what the inference engine computes.

    python benchmarks/gpu_check.py [--device cuda|cpu] [--quick] [--write docs/gpu-results.md]

Six parts: logits of tiny models for every kind of prompt; the fixed-length forward of the vision tower that CUDA
graphs have; logits of a model of 2B shapes; times of a prefill of that model beside transformers with its sdpa
attention; `verify --logits` of 2B and 8B shapes and a 30B-A3B cut to 12 layers, and of three faults; every step of
prompts that the inference engine serves. Weights are random, written to a temporary folder (up to 35 GB). With
`--quick` tiny models take the place of real shapes: that runs on a CPU too. The exit code is 1 if a check failed.

How much may differ. In float32, 2e-5, or on a GPU three times what transformers itself differs there from a CPU, if
that is more: both are right, and sums are done in another order. In bfloat16, transformers in float32 is the reference
(the weights are numbers that bfloat16 has): our error may be twice the largest that transformers in bfloat16 has for a
prompt, each the root of the mean square over all its logits. The largest, because a token near the border between two
experts is sent to the wrong one in one program and not in the other.
"""

import argparse
import copy
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from gpu_inference import HEAD as SERVED_HEAD  # noqa: E402
from gpu_inference import Served, served  # noqa: E402
from gpu_verify import HEAD as VERIFIED_HEAD  # noqa: E402
from gpu_verify import Verified, verifications  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from models.planted import lively_checkpoint  # noqa: E402  from the tests, which the line above finds
from models.prompts import Image, Prompt, Text, Video, make_prompt, prompt_of  # noqa: E402
from models.sides import load_theirs, our_logits, their_logits  # noqa: E402
from qwen3vl_convert import make_checkpoint  # noqa: E402
from qwen3vl_convert.make import SIZES  # noqa: E402

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
TOLERANCE = 2e-5
SPREAD = 3.0
ROUNDING = 2.0
PROMPTS = ("text", "image", "images", "video", "mixed", "padded left", "padded right", "packed")
GRIDS = {
    "one image that fills it": [[1, 8, 8]],
    "one image": [[1, 4, 6]],
    "three images": [[1, 4, 6], [1, 2, 2], [1, 6, 4]],
    "a video": [[3, 4, 4]],
    "an image and a video": [[1, 4, 4], [3, 4, 4]],
}
"""Grids of at most FIXED patches, the length of the captured graph."""
FIXED = 64


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A measured difference and how much it may be."""

    part: str
    what: str
    model: str
    dtype: torch.dtype
    measured: float
    bound: float

    @property
    def passed(self) -> bool:
        """Also false for NaN."""
        return self.measured <= self.bound

    def cells(self) -> list[str]:
        verdict = "yes" if self.passed else "**NO**"
        figures = [f"{value:.2e}" for value in (self.measured, self.bound)]
        return [self.part, self.what, self.model, _name(self.dtype), *figures, verdict]


@dataclass(frozen=True)
class Timing:
    """Seconds of a prefill, the best of several."""

    what: str
    ours: float
    theirs: float

    def cells(self) -> list[str]:
        ours, theirs = (f"{1000 * seconds:.1f} ms" for seconds in (self.ours, self.theirs))
        return [self.what, ours, theirs, f"{self.ours / self.theirs:.2f}"]


CHECK_HEAD = ["part", "what", "model", "dtype", "measured", "bound", "passed"]
TIMING_HEAD = ["prefill, bfloat16", "Megatron model", "transformers, sdpa", "ratio"]


@dataclass(frozen=True)
class Run:
    """Where and how large: `folder` is for checkpoints."""

    device: str
    quick: bool
    folder: Path

    @property
    def size(self) -> str:
        """Of the third and fourth part."""
        return "tiny" if self.quick else "2b"


# ---- models ----------------------------------------------------------------------------------------------------------


def build_ours(folder: Path, dtype: torch.dtype, device: str, **settings: Any) -> Any:
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    precision = {"params_dtype": dtype, "pipeline_dtype": dtype, "autocast_dtype": dtype, "bf16": dtype == BFLOAT16}
    place = {"use_cpu_initialization": True, "transformer_impl": "local"} if device == "cpu" else {}
    for name, value in {**precision, **place, **settings}.items():
        setattr(provider, name, value)
    model = provider.provide()
    bridge.load_hf_weights(model, allow_dtype_cast=True)
    return model.eval()


def build_theirs(folder: Path, dtype: torch.dtype, device: str, attention: str = "eager") -> Any:
    return load_theirs(folder, dtype, attention).to(device)


def tiny(run: Run, name: str) -> Path:
    """Weights with which faults show, all of them numbers that bfloat16 has."""
    folder = lively_checkpoint(run.folder / name, SIZES[name])
    weights = load_file(folder / "model.safetensors")
    rounded = {key: weight.to(BFLOAT16).to(FLOAT32) for key, weight in weights.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    return folder


def on(prompt: Prompt, device: str) -> Prompt:
    """The prompt with its tensors there."""
    moved = {name: value.to(device) for name, value in vars(prompt).items() if isinstance(value, Tensor)}
    return replace(prompt, **moved, alone=tuple(on(one, device) for one in prompt.alone))


# ---- logits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Of logits at tokens that are no padding: the greatest, and the root of the mean square."""

    greatest: float
    mean: float


def difference(found: Tensor, expected: Tensor, prompt: Prompt) -> Difference:
    if found.shape != expected.shape:
        raise SystemExit(f"Logits: expected the shape {tuple(expected.shape)}, found {tuple(found.shape)}.")
    valid = prompt.valid.to(found.device)
    gap = (found.float() - expected.to(found.device).float())[valid]
    return Difference(float(gap.abs().max()), float(gap.square().mean().sqrt()))


def logits_of_tiny_models(run: Run) -> Iterator[Check]:
    """Part one."""
    for name in ("tiny", "tiny-moe"):
        folder = tiny(run, name)
        yield from in_float32(run, name, folder)
        yield from in_bfloat16(run, "logits", name, folder, {prompt: prompt for prompt in PROMPTS})


def in_float32(run: Run, name: str, folder: Path) -> Iterator[Check]:
    ours, theirs = (build(folder, FLOAT32, run.device) for build in (build_ours, build_theirs))
    config = theirs.config.to_dict()
    on_cpu = theirs if run.device == "cpu" else copy.deepcopy(theirs).to("cpu")
    for what in PROMPTS:
        prompt = make_prompt(what, config)
        there = on(prompt, run.device)
        expected = their_logits(theirs, there)
        spread = difference(expected, their_logits(on_cpu, prompt), there).greatest
        found = difference(our_logits(ours, there), expected, there).greatest
        yield Check("logits", what, name, FLOAT32, found, max(TOLERANCE, SPREAD * spread))


def in_bfloat16(run: Run, part: str, name: str, folder: Path, prompts: dict[str, Any]) -> Iterator[Check]:
    """`prompts`: by what they are called, a prompt or the name of one."""
    exact, theirs = (build_theirs(folder, dtype, run.device) for dtype in (FLOAT32, BFLOAT16))
    ours = build_ours(folder, BFLOAT16, run.device)
    found, yardstick = {}, 0.0
    for what, given in prompts.items():
        prompt = on(make_prompt(given, exact.config.to_dict()) if isinstance(given, str) else given, run.device)
        expected = their_logits(exact, prompt)
        yardstick = max(yardstick, difference(their_logits(theirs, prompt), expected, prompt).mean)
        found[what] = difference(our_logits(ours, prompt), expected, prompt).mean
    yield from (Check(part, what, name, BFLOAT16, measured, ROUNDING * yardstick) for what, measured in found.items())


def prompts_of_2b(config: dict[str, Any], quick: bool) -> dict[str, Prompt]:
    side = 2 if quick else 16
    image, video = Image(1, side, side), Video(4, side, side // 2, gap=3)
    return {
        "image": prompt_of(config, [[Text(40), image, Text(40)]]),
        "video": prompt_of(config, [[Text(40), video, Text(40)]]),
        "image and video, two rows": prompt_of(config, [[Text(9), image, Text(20), video, Text(9)], [Text(30), image]]),
    }


def logits_of_2b_shapes(run: Run, folder: Path) -> Iterator[Check]:
    """Part three."""
    prompts = prompts_of_2b(config_of(folder), run.quick)
    yield from in_bfloat16(run, f"logits, {run.size} shapes", run.size, folder, prompts)


def config_of(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    config: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    return config


# ---- the vision tower at a fixed length ------------------------------------------------------------------------------


def fixed_length_vision(run: Run) -> Iterator[Check]:
    """Part two. Padded in training, as captured graphs need it; otherwise not."""
    settings = {"vision_cuda_graph_impl": "transformer_engine", "max_vision_cuda_graph_seq_length": FIXED}
    folder = run.folder / "tiny"
    exact, rounded = (build_ours(folder, dtype, run.device, **settings) for dtype in (FLOAT32, BFLOAT16))
    for what, grids in GRIDS.items():
        grid = torch.tensor(grids)
        patches = torch.randn(int(grid.prod(1).sum()), 1536, generator=torch.Generator().manual_seed(0)).to(run.device)
        expected, plain = features(exact.eval(), patches, grid), features(rounded.eval(), patches, grid)
        padded, padded_rounded = features(exact.train(), patches, grid), features(rounded.train(), patches, grid)
        bound = TOLERANCE * max(1.0, float(expected.abs().max()))
        yield Check("vision, fixed length", what, "tiny", FLOAT32, float((padded - expected).abs().max()), bound)
        yardstick = ROUNDING * root_mean_square(plain - expected)
        measured = root_mean_square(padded_rounded - expected)
        yield Check("vision, fixed length", what, "tiny", BFLOAT16, measured, yardstick)


@torch.no_grad()
def features(model: Any, patches: Tensor, grid: Tensor) -> Tensor:
    """Of the merger and the deepstack mergers, [1 + deepstack, V, h] in float32."""
    tower = model.vision_model
    lengths: list[int] = []
    hook = tower.decoder.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: lengths.append(len((args or (kwargs["hidden_states"],))[0])), with_kwargs=True
    )
    merged, deepstack = tower(patches, grid)
    hook.remove()
    if lengths != [FIXED if tower.training else len(patches)]:
        raise SystemExit(f"The vision layers saw {lengths} patches; in training they are to see {FIXED}.")
    return torch.stack([merged, *deepstack]).float()


def root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


# ---- times -----------------------------------------------------------------------------------------------------------


def times_of_a_prefill(run: Run, folder: Path) -> Iterator[Timing]:
    """Part four: tokens of text with an image of as many features, all logits."""
    tokens, side = (16, 4) if run.quick else (1024, 32)
    ours = build_ours(folder, BFLOAT16, run.device)
    theirs = build_theirs(folder, BFLOAT16, run.device, attention="sdpa")
    row: list[Text | Image | Video] = [Text(tokens // 2), Image(1, side, side), Text(tokens // 2)]
    for rows in (1, 4):
        prompt = on(prompt_of(config_of(folder), [row] * rows), run.device)
        what = f"{run.size} shapes, {tokens} tokens and an image of {side * side} features, batch {rows}"
        work = partial(our_logits, ours, prompt), partial(their_logits, theirs, prompt)
        yield Timing(what, *alternately(*work, repeat=2 if run.quick else 8))


def alternately(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], repeat: int) -> tuple[float, float]:
    """Seconds: the best of several runs of each, in turn; the first of each does not count."""
    taken = [(seconds(ours), seconds(theirs)) for _ in range(repeat)]
    best, other = (min(times[1:]) for times in zip(*taken, strict=True))
    return best, other


def seconds(work: Callable[[], Tensor]) -> float:
    """From one moment at which the device is idle to the next."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- the page --------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
`make gpu-check` compares the Megatron model with transformers on the machine's GPU, in float32 and bfloat16, times a
prefill of both, and ends with exit code 1 if anything differs by more than it should. How much that is, and why, is
said at the top of `benchmarks/gpu_check.py`.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


Checked = Sequence[Check | Verified | Served]


def counted(checked: Checked) -> str:
    """How many checks there were, and how many failed."""
    return f"{len(checked)} checks, {sum(not one.passed for one in checked)} failed"


def report(
    checks: list[Check],
    timings: list[Timing],
    verified: list[Verified],
    answers: list[Served],
    options: argparse.Namespace,
) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "megatron-core"))
    command = " ".join(["python benchmarks/gpu_check.py", *arguments_said(options)])
    return (
        "# On a GPU\n\n"
        f"{INTRODUCTION}\n"
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}: {machine(options.device)}, "
        f"Python {platform.python_version()}, {packages},\n"
        f"{layers(options.device)}. {counted([*checks, *verified, *answers])}.\n\n"
        f"{table(CHECK_HEAD, [check.cells() for check in checks])}\n"
        "Measured is the greatest difference in float32, and the root mean square error in bfloat16.\n\n"
        f"{table(TIMING_HEAD, [timing.cells() for timing in timings])}\n"
        "Best of several runs, the two in turn; a ratio below one means that the Megatron model took less time.\n\n"
        f"{table(VERIFIED_HEAD, [one.cells() for one in verified])}\n"
        "Of the prompt that came nearest to what is allowed, or beyond it. The time has the reading of weights in it; "
        "memory is the device's.\n\n"
        f"{table(SERVED_HEAD, [one.cells() for one in answers])}\n"
        "Prompts of text, images and video, one after the other, prefilled in chunks of 24 tokens and decoded for 12 "
        "steps by captured graphs; figures as in the first table.\n"
    )


def arguments_said(options: argparse.Namespace) -> list[str]:
    return [f"--device {options.device}"] + ["--quick"] * options.quick


def machine(device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()} CPU"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def layers(device: str) -> str:
    from qwen3vl_convert.models.specs import transformer_engine_works

    if device != "cpu" and transformer_engine_works():
        return f"layers of Transformer Engine {version('transformer-engine')}"
    return "layers of torch's kernels (no Transformer Engine)"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the program -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # Where a virtual machine names AMX among its instructions and refuses it, oneDNN's bfloat16 ends the process.
    onednn = partial(torch.backends.mkldnn.flags, enabled=options.device != "cpu")
    folder = tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.work)
    with folder as name, world(options.device), onednn(), torch.no_grad():
        checks, timings = everything(Run(options.device, options.quick, Path(name)))
    folder = tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.work)
    with folder as name, onednn():  # in a world of its own
        verified = [said(one) for one in verifications(Path(name), options.device, options.quick)]
        answers = [said(one) for one in served(Path(name), options.device)]
    if options.write:
        options.write.write_text(report(checks, timings, verified, answers, options))
    checked = [*checks, *verified, *answers]
    print(counted(checked))
    return 0 if all(one.passed for one in checked) else 1


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model instead of the 2B shapes")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; left as it was found")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a page with all figures")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here. On a CPU: --device cpu --quick.")
    return options


def world(device: str) -> AbstractContextManager[Any]:
    """Process groups for this process alone. A backend has to be named where a GPU is not to be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core at import, of what is not installed
        from qwen3vl_convert.models import parallel_world
    alone: AbstractContextManager[Any] = parallel_world(
        rank=0, world_size=1, backend="gloo" if device == "cpu" else None
    )
    return alone


def everything(run: Run) -> tuple[list[Check], list[Timing]]:
    """The first four parts, each figure printed as soon as it is there."""
    checks, timings = [], []
    for check in chain(logits_of_tiny_models(run), fixed_length_vision(run)):
        checks.append(said(check))
    folder = run.folder / "shapes"
    make_checkpoint(folder, run.size)
    for check in logits_of_2b_shapes(run, folder):
        checks.append(said(check))
    for timing in times_of_a_prefill(run, folder):
        timings.append(said(timing))
    return checks, timings


def said(figure: Any) -> Any:
    print("  ".join(figure.cells()), flush=True)
    return figure


if __name__ == "__main__":
    sys.exit(main())
