"""Do the kernels that only a GPU has compute what the others compute, and is everything there?"""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.checks import BFLOAT16, FLOAT32, Run, check, dtype_name, fact, synchronize, world
from gpu.page import Row
from gpu.served import graphs_of, insists

HEADS = ((16, 4, 2), (64, 16, 16), (72, 16, 16), (128, 32, 8))
"""(head_dim, heads, heads of keys and values): the tiny models', and those of towers and decoders."""
SEQUENCES: dict[str, tuple[list[int], list[int], bool]] = {
    "three sequences": ([0, 70, 71, 200], [0, 70, 71, 200], False),
    "three causal behind prefixes": ([0, 70, 71, 200], [0, 170, 180, 309], True),
    "one causal": ([0, 130], [0, 130], True),
}
"""By what they are: where queries and keys of each sequence begin, and whether the mask is causal."""
EXPERTS = ((64, 48, 8, 2), (2048, 768, 128, 8))
"""(h, I, E, k): the tiny model's, and those of 30B-A3B."""
TOKENS = (1, 3, 64, 700)


def attention(run: Run) -> Iterator[Row]:
    """The kernel of many lengths. A GPU must have one; a CPU has none."""
    from qwen3vl_convert.inference.attention.segments import kernel_for

    device = torch.device(run.device)
    if kernel_for(device, BFLOAT16, 128) is None:
        yield fact("a kernel for attention of many lengths", "none", run.device == "cpu")
        return
    for head_dim, heads, groups in HEADS:
        kernel = kernel_for(device, BFLOAT16, head_dim)
        for what, sequences in SEQUENCES.items():
            gap = attention_gap(kernel, (head_dim, heads, groups), sequences, device)
            yield check("attention of many lengths", what, f"heads of {head_dim}", BFLOAT16, gap, 0.05)


def attention_gap(
    kernel: Any, shape: tuple[int, int, int], sequences: tuple[list[int], list[int], bool], device: torch.device
) -> float:
    """The largest difference from float64."""
    (head_dim, heads, groups), (of_q, of_k, causal) = shape, sequences
    generator = torch.Generator().manual_seed(head_dim)
    sizes = ((of_q[-1], heads), (of_k[-1], groups), (of_k[-1], groups))
    q, k, v = (torch.randn(*size, head_dim, generator=generator).to(device, BFLOAT16) for size in sizes)
    found = kernel(q, k, v, _lengths(of_q), _lengths(of_k), head_dim**-0.5, causal)
    return float((found.double() - in_float64((q, k, v), of_q, of_k, causal)).abs().max())


def _lengths(bounds: list[int]) -> tuple[Tensor, int]:
    return torch.tensor(bounds, dtype=torch.int32), max(b - a for a, b in itertools.pairwise(bounds))


def in_float64(qkv: tuple[Tensor, Tensor, Tensor], of_q: list[int], of_k: list[int], causal: bool) -> Tensor:
    """[S, H, D], sequence by sequence, by the definition; the last tokens of queries and keys are aligned."""
    groups, found = qkv[0].shape[1] // qkv[1].shape[1], []
    for rows, columns in zip(itertools.pairwise(of_q), itertools.pairwise(of_k), strict=True):
        q = qkv[0][slice(*rows)].double().transpose(0, 1)
        k, v = (one[slice(*columns)].double().repeat_interleave(groups, 1).transpose(0, 1) for one in qkv[1:])
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if causal:
            count, length = scores.shape[1:]
            later = torch.ones(count, length, dtype=torch.bool, device=q.device).triu(length - count + 1)
            scores = scores.masked_fill(later, -torch.inf)
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


def grouped_experts(run: Run) -> Iterator[Row]:
    """One kernel for all experts against one product for each; half of the experts have no token."""
    from qwen3vl_convert.inference.moe import Experts

    device = torch.device(run.device)
    for hidden, inner, count, chosen in EXPERTS[:1] if run.small else EXPERTS:
        with device:
            experts = Experts(hidden, inner, count, None, "experts").to(BFLOAT16)
            for parameter in experts.parameters():
                parameter.data.normal_(0, 0.03)
        if not run.small:
            used = experts.on_device(device, BFLOAT16)
            yield fact(f"the grouped kernel for {count} experts", "used" if used else "not used", used)
        for tokens in TOKENS:
            rows, ends = _sorted_rows(tokens, hidden, count, chosen, device)
            one, other = experts._grouped(rows, ends).float(), experts._one_by_one(rows, ends).float()
            gap = float((one - other).norm() / other.norm())
            yield check("grouped experts", f"{tokens} tokens", f"{count} experts of {inner}", BFLOAT16, gap, 0.02)


def _sorted_rows(tokens: int, hidden: int, count: int, chosen: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows sorted by expert, where those of each expert end), with experts of the lower half only."""
    x = torch.randn(tokens, hidden, device=device).to(BFLOAT16)
    picks = torch.stack([torch.randperm(count // 2, device=device)[:chosen] for _ in range(tokens)])
    sorted_picks, order = picks.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_picks, torch.arange(count, device=device), right=True, out_int32=True)
    return x[order // chosen], ends


def decoding_by_graphs(run: Run) -> Iterator[Row]:
    """The same answers with captured graphs, insisted on, as without; in bfloat16, where a padded batch is rounded
    otherwise and the words of random weights lie close together, only that there are graphs.
    """
    from qwen3vl_convert.inference import load_model

    for size, dtype in (("tiny", FLOAT32), ("tiny", BFLOAT16), ("tiny-moe", BFLOAT16)):
        model = load_model(checkpoint(run, size), device=run.device, dtype=dtype)
        if not insists(model):
            yield fact(f"graphs of {size}", "this GPU has no grouped kernel for experts", True)
            continue
        plain, captured = answers(model, False), answers(model, True)
        equal = sum(one == other for one, other in zip(plain[0], captured[0], strict=True))
        said = f"{equal} of {len(plain[0])} answers equal, {captured[1]} graphs"
        alike = equal == len(plain[0]) or dtype == BFLOAT16
        yield fact(f"decoding {size} in {dtype_name(dtype)} by graphs", said, alike and captured[1] > 0)


def answers(model: Any, graphs: bool) -> tuple[list[tuple[int, ...]], int]:
    """(the tokens of six prompts that are served together, how many graphs were captured)."""
    from qwen3vl_convert.inference import Engine, EngineOptions, Request, SamplingParams

    engine = Engine(model, EngineOptions(kv_tokens=2048, page_size=4, cuda_graphs=graphs))
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)
    prompts = [[7 + number, 9, 11, 13][: 1 + number % 4] * 5 for number in range(6)]
    done = engine.generate([Request(token_ids=prompt, sampling=sampling) for prompt in prompts])
    return [one.token_ids for one in done], graphs_of(engine)


def process_groups(run: Run) -> Iterator[Row]:
    """Of one process, twice: the second must find nothing left of the first."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        with world(run.device):
            backend = torch.distributed.get_backend()
        times.append(f"{time.perf_counter() - began:.1f} s")
    yield fact("process groups", f"{backend}, {' and '.join(times)}", backend == ("gloo" if run.small else "nccl"))


def gradients(run: Run) -> Iterator[Row]:
    """A loss of the Megatron model on the device, and what goes back from it."""
    for size in ("tiny", "tiny-moe"):
        with world(run.device):
            yield _gradient(run, size)
            synchronize(run.device)


def _gradient(run: Run, size: str) -> Row:
    from gpu.models import build_ours

    model = build_ours(checkpoint(run, size), BFLOAT16, run.device).train()
    ids = torch.randint(5, 480, (2, 16), generator=torch.Generator().manual_seed(0)).to(run.device)
    loss = model(ids, labels=ids)
    loss.mean().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    numbers = bool(loss.isfinite().all()) and all(bool(one.isfinite().all()) for one in found)
    moved = sum(bool(one.any()) for one in found)
    where = next(model.parameters()).device
    said = f"loss {float(loss.mean()):.3f} on {where}, {moved} of {len(found)} gradients are not zero"
    return fact(f"gradients of {size}", said, numbers and moved > 0 and where.type == run.device)


def checkpoint(run: Run, size: str) -> Path:
    """A folder of a tiny model, made when first asked for."""
    from qwen3vl_convert import make_checkpoint

    folder = run.work / f"sanity {size}"
    if not folder.exists():
        make_checkpoint(folder, size)
    return folder


CHECKS: tuple[Callable[[Run], Iterator[Row]], ...] = (
    attention,
    grouped_experts,
    decoding_by_graphs,
    process_groups,
    gradients,
)
