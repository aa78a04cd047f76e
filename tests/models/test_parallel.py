"""Every parallel layout computes what one process computes: logits, losses and gradients of a training step.

Weights come from a checkpoint of ours, which Megatron-Core loads strictly into the model at each layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import parallel_rank
from models.parallel import assemble, distance, distances, run_ranks
from models.parallel_rank import Case, Step
from models.planted import lively_checkpoint
from models.prompts import ROWS, Row, Text, prompt_of
from oracles.megatron_world import differences
from qwen3vl_convert import Dims, ParallelLayout, RunOptions, hf_to_megatron, megatron_to_hf
from qwen3vl_convert.make import SIZES
from reference import load_huggingface

pytestmark = pytest.mark.megatron

TOLERANCE = 1e-5
"""Of each tensor: the largest difference beside the largest magnitude. Sums are done in another order; no more."""
RUN = RunOptions(fsync=False)

# Two deepstack features, so two layers at least on the first stage.
DENSE = replace(SIZES["tiny"], vision_depth=3, deepstack=(2, 0), vocab=512)
MOE = replace(SIZES["tiny-moe"], vision_depth=3, deepstack=(2, 0), experts=4)
MODELS = {
    "dense": DENSE,
    "tied": replace(DENSE, tied=True),
    "moe": MOE,
    "deep": replace(DENSE, tied=True, layers=8),  # two layers for each of the chunks of an interleaved pipeline
}
KINDS: list[Row] = [ROWS["text"], ROWS["image"], ROWS["video"], ROWS["mixed"]]


@dataclass(frozen=True)
class Run:
    """A model at a layout. `equal_lengths`: microbatches as Megatron-Core expects them of a pipeline unless told."""

    model: str
    layout: ParallelLayout
    size: int | None = None
    sequence_parallel: bool = False
    equal_lengths: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


VARIABLE = ("variable_seq_lengths", True), ("moe_token_dispatcher_type", "alltoall")
ALLGATHER = (("moe_token_dispatcher_type", "allgather"),)
RECOMPUTE = ("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1)
RUNS = {
    "tp2": Run("dense", ParallelLayout(tp=2)),
    "tp2 sequence parallel": Run("tied", ParallelLayout(tp=2), sequence_parallel=True),
    "tp2 sequence parallel, recompute": Run("dense", ParallelLayout(tp=2), sequence_parallel=True, settings=RECOMPUTE),
    "pp2": Run("dense", ParallelLayout(pp=2), settings=VARIABLE),
    "pp2 tied": Run("tied", ParallelLayout(pp=2), equal_lengths=True),
    "pp2 uneven": Run("tied", ParallelLayout(pp=2, first_stage_layers=3, last_stage_layers=1), equal_lengths=True),
    "pp2 vpp2": Run("deep", ParallelLayout(pp=2, vpp=2), equal_lengths=True),
    "tp2 pp2": Run("tied", ParallelLayout(tp=2, pp=2), settings=VARIABLE),
    "dp2": Run("dense", ParallelLayout(), size=2),
    "ep2": Run("moe", ParallelLayout(ep=2)),
    "ep2 allgather": Run("moe", ParallelLayout(ep=2), equal_lengths=True, settings=ALLGATHER),
    "etp2": Run("moe", ParallelLayout(etp=2)),
    "ep2 etp2": Run("moe", ParallelLayout(ep=2, etp=2)),
    "tp2 ep2 sequence parallel": Run("moe", ParallelLayout(tp=2, ep=2), sequence_parallel=True),
    "tp2 etp2 sequence parallel": Run("moe", ParallelLayout(tp=2, etp=2), sequence_parallel=True),
    "ep2 pp2": Run("moe", ParallelLayout(ep=2, pp=2), settings=VARIABLE),
}


BROKEN = {"etp2"} if version("megatron-core").startswith("0.16") else set()
"""Where Megatron-Core itself is wrong: 0.16 sums gradients of different parts of an expert over data parallel ranks."""
GLOO_SCATTERS_UNEVENLY = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 9)
"""Tokens of experts that are cut differ in number from rank to rank."""


def named(runs: dict[str, Run]) -> list[Any]:
    wrong = pytest.mark.xfail(
        reason="Megatron-Core 0.16 takes experts that only expert tensor parallelism cuts for whole"
    )
    lacking = pytest.mark.skipif(
        not GLOO_SCATTERS_UNEVENLY, reason="gloo has no reduce_scatter of unequal pieces before torch 2.9"
    )
    return [
        pytest.param(name, marks=[wrong] * (name in BROKEN) + [lacking] * ((run.layout.etp or 1) > 1))
        for name, run in runs.items()
    ]


# ---- models and batches ----------------------------------------------------------------------------------------------


Checkpoints = Callable[[str], Path]
Steps = Callable[[str, bool], Step]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Folder of a model's checkpoint, `hf` and `megatron` within, at a layout that no run has."""

    @cache
    def made(model: str) -> Path:
        folder = tmp_path_factory.mktemp(model)
        dims = MODELS[model]
        lively_checkpoint(folder / "hf", dims)
        layout = ParallelLayout(tp=1, pp=4, ep=4 if dims.moe else 1)
        hf_to_megatron(folder / "hf", folder / "megatron", layout=layout, run=RUN)
        return folder

    return made


def batch(dims: Dims, equal_lengths: bool) -> tuple[dict[str, Tensor], ...]:
    """Four microbatches of one sequence: text, image, video, all. Even lengths, as sequence parallelism needs."""
    return tuple(microbatch(dims, row, seed, 50 if equal_lengths else None) for seed, row in enumerate(KINDS))


def microbatch(dims: Dims, row: Row, seed: int, length: int | None) -> dict[str, Tensor]:
    config = {
        "image_token_id": dims.image_token_id,
        "video_token_id": dims.video_token_id,
        "vision_start_token_id": dims.vision_start_token_id,
        "vision_end_token_id": dims.vision_end_token_id,
        "vision_config": {
            "spatial_merge_size": dims.spatial_merge,
            "in_channels": dims.channels,
            "temporal_patch_size": dims.temporal_patch,
            "patch_size": dims.patch,
        },
    }
    found = prompt_of(config, [row]).input_ids.shape[1]
    more = (length or found + found % 2) - found
    inputs = prompt_of(config, [[*row, Text(more)]], seed=seed).inputs()
    ids = inputs["input_ids"]
    labels = ids.roll(-1, dims=1).masked_fill(ids.roll(-1, dims=1) >= 500, -100)
    labels[:, -1] = -100
    return {**inputs, "labels": labels}


def case_of(run: Run, folder: Path) -> Case:
    dims = MODELS[run.model]
    return Case(
        dims,
        folder / "megatron" / "iter_0000000",
        batch(dims, run.equal_lengths),
        run.sequence_parallel,
        dict(run.settings),
    )


# ---- what they compute -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoints) -> Steps:
    """The step of a single process."""

    @cache
    def step(model: str, equal_lengths: bool) -> Step:
        run = Run(model, ParallelLayout(), equal_lengths=equal_lengths)
        [found] = run_ranks(run.layout, parallel_rank.training_step, case_of(run, checkpoint(model)))
        assert isinstance(found, Step)
        return found

    return step


@pytest.mark.parametrize("name", named(RUNS))
def test_as_in_one_process(name: str, checkpoint: Checkpoints, alone: Steps) -> None:
    run = RUNS[name]
    steps = run_ranks(run.layout, parallel_rank.training_step, case_of(run, checkpoint(run.model)), size=run.size)
    apart = distances_of(steps, alone(run.model, run.equal_lengths))
    assert {what: by for what, by in apart.items() if not by <= TOLERANCE} == {}


def test_a_sum_that_is_left_out_is_seen(checkpoint: Checkpoints, alone: Steps) -> None:
    """The comparison is no rubber stamp: without the last step, norms lack what the other rank's tokens say."""
    run = RUNS["tp2 sequence parallel"]
    steps = run_ranks(run.layout, parallel_rank.unfinished_step, case_of(run, checkpoint(run.model)))
    first = Step(steps[0].losses, steps[0].logits, [], 0.0)
    norms = [shard for shard in steps[0].grads if shard.key == "language_model.decoder.final_layernorm.weight"]
    apart = distances_of([Step(first.losses, first.logits, norms, 0.0)], alone(run.model, run.equal_lengths))
    assert apart["logits"] <= TOLERANCE
    assert apart["language_model.decoder.final_layernorm.weight"] > 0.1


def distances_of(steps: list[Step], expected: Step) -> dict[str, float]:
    """How far what the ranks found is from what one process did, by tensor."""
    gradients = assemble([step.grads for step in steps], TOLERANCE)
    return {
        "logits": worst(steps, expected, "logits"),
        "losses": worst(steps, expected, "losses"),
        "norm": max(abs(step.norm - expected.norm) for step in steps) / expected.norm,
        **distances(gradients, assemble([expected.grads])),
    }


def worst(steps: list[Step], expected: Step, what: str) -> float:
    """The largest distance of any microbatch on any rank that has it; all microbatches must be there."""
    wanted: dict[int, Tensor] = getattr(expected, what)
    found = [item for step in steps for item in getattr(step, what).items()]
    assert {number for number, _ in found} == wanted.keys() == set(range(len(KINDS)))
    return max(distance(tensor, wanted[number]) for number, tensor in found)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tp2 pp2", "pp2 vpp2", "ep2 etp2"])
def test_what_the_model_saves(name: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Loaded by the model at this layout, saved by it, and brought back: the original bits."""
    run = RUNS[name]
    source = checkpoint(run.model)
    folder = tmp_path / "saved" / "iter_0000000"
    run_ranks(run.layout, parallel_rank.saved_again, case_of(run, source), folder)
    megatron_to_hf(folder, tmp_path / "hf", config=source / "hf", run=RUN)
    assert differences(load_huggingface(tmp_path / "hf"), load_huggingface(source / "hf")) == []


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [ParallelLayout(pp=2), ParallelLayout(pp=2, vpp=2)], ids=str)
def test_too_few_layers_on_the_first_stage(layout: ParallelLayout) -> None:
    """Deepstack features do not travel to later stages; the others have nothing to complain of."""
    dims = SIZES["tiny"]
    first, second = run_ranks(layout, parallel_rank.refused, Case(dims, Path()))
    layers = dims.layers // (layout.pp * (layout.vpp or 1))
    assert f"first pipeline stage has {layers} text layers, and 3 deepstack features" in first
    assert "num_layers_in_first_pipeline_stage" in first
    assert second == ""
