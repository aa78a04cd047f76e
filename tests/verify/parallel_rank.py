"""What runs in the processes of `test_parallel`: the comparison as every process that torchrun starts calls it.

As a program it is one of them: `torchrun ... -m verify.parallel_rank HF MEGATRON`; the first prints its report as JSON.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from qwen3vl_convert.errors import CorruptFile
from qwen3vl_convert.model import open_huggingface
from qwen3vl_convert.verify.result import Difference, LogitsReport, WeightsReport
from qwen3vl_convert.verify.verification import LogitsOptions
from qwen3vl_convert.verify.weights.sides import open_beside

EQUAL = WeightsReport(0, 0, (), {}, (0,) * 7, "", ())
DIFFERENT = WeightsReport(
    1,
    1,
    (Difference("lm_head.weight", "output_layer.weight", (1,), 1, (0,), 1.0, 1, 0.0, "planted"),),
    {"rms_eps (run_config.yaml: model)": (1e-6, 1e-5)},
    (1, 0, 0, 0, 0, 0, 0),
    "",
    (),
)
"""What the comparison is told of the weights."""


@dataclass(frozen=True)
class Job:
    """Both checkpoints, and how they are compared. `port`: where the processes meet."""

    huggingface: Path
    megatron: Path
    port: int = 0
    options: LogitsOptions = LogitsOptions(device="cpu")  # noqa: RUF009  frozen
    weights: WeightsReport = EQUAL


@dataclass(frozen=True)
class Found:
    """What a process got: the report, and the logits of each prompt as `Outputs` has them, which only the first has."""

    report: LogitsReport
    logits: list[tuple[Tensor, ...]]


def in_parallel(rank: int, size: int, job: Job) -> Found:
    from qwen3vl_convert.verify.logits import parallel

    with launched(rank, size, job.port):
        return compared(parallel, parallel.compare_logits_in_parallel, job)


def alone(rank: int, size: int, job: Job) -> Found:
    """In one process, as `verify` does it without torchrun."""
    from qwen3vl_convert.verify.logits import compare

    return compared(compare, compare.compare_logits, job)


def compared(module: Any, compare: Callable[..., LogitsReport], job: Job) -> Found:
    """`module` is where the figures of a prompt are asked for; what they are asked of is kept."""
    theirs = open_huggingface(job.huggingface)
    ours = open_beside(theirs, job.megatron)
    logits: list[tuple[Tensor, ...]] = []
    figures = module.compared

    def keeping(outputs: tuple[Tensor, ...], *rest: Any) -> Any:
        logits.append(tuple(outputs))
        return figures(outputs, *rest)

    with mock.patch.object(module, "compared", keeping):
        return Found(compare(theirs, ours, job.options, job.weights), logits)


@contextmanager
def launched(rank: int, size: int, port: int) -> Iterator[None]:
    """The environment that torchrun gives a process."""
    ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    told = {name: str(value) for name, value in {**ranks, "MASTER_PORT": port}.items()}
    with mock.patch.dict(os.environ, told | {"MASTER_ADDR": "127.0.0.1"}):
        yield


def held(rank: int, size: int, job: Job) -> dict[str, tuple[int, ...]]:
    """The shapes of this process's parameters when its model runs. It is built as where there are GPUs."""
    from qwen3vl_convert.verify.logits import parallel, stages

    shapes: dict[str, tuple[int, ...]] = {}
    run, built = stages._run, stages._built

    def looking(chunks: Any, batch: Any) -> Any:
        for chunk in chunks:
            shapes.update({name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()})
        return run(chunks, batch)

    def as_on_gpus(*arguments: Any) -> Any:
        with mock.patch.object(Tensor, "cuda", _to_gpu):
            return built(*arguments)

    places: dict[str, Any] = {"_run": looking, "_built": as_on_gpus}
    with launched(rank, size, job.port), mock.patch.multiple(stages, **places):
        compared(parallel, parallel.compare_logits_in_parallel, job)
    return shapes


def _to_gpu(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """Without the stand-in for it that `cpu_for_cuda` is."""
    if tensor.is_meta:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    return tensor


# ---- faults of a run -------------------------------------------------------------------------------------------------


def raised(rank: int, size: int, job: Job) -> tuple[str, str]:
    """The kind and the text of what the comparison raises in this process."""
    try:
        in_parallel(rank, size, job)
    except Exception as error:  # noqa: BLE001  whatever it is
        return type(error).__name__, str(error)
    return "", ""


def cannot_read(rank: int, size: int, job: Job, where: int) -> tuple[str, str]:
    """One process cannot read a weight of our model."""
    from qwen3vl_convert.models.restore import Restoring

    return _with_fault(rank, size, job, where, Restoring, "parameter")


def cannot_run_theirs(rank: int, size: int, job: Job, where: int) -> tuple[str, str]:
    """Transformers' model fails in the process that runs it."""
    from qwen3vl_convert.verify.logits import parallel

    return _with_fault(rank, size, job, where, parallel, "their_logits")


def _with_fault(rank: int, size: int, job: Job, where: int, place: Any, name: str) -> tuple[str, str]:
    if rank != where:
        return raised(rank, size, job)
    with mock.patch.object(place, name, side_effect=CorruptFile("a planted fault")):
        return raised(rank, size, job)


# ---- under torchrun --------------------------------------------------------------------------------------------------


def main(huggingface: str, megatron: str, fails: str = "") -> int:
    """`fails`: the process in which our model fails, while others wait for what it sends."""
    warnings.simplefilter("ignore")
    from qwen3vl_convert.verify.logits import stages
    from qwen3vl_convert.verify.logits.parallel import compare_logits_in_parallel

    theirs = open_huggingface(Path(huggingface))
    ours = open_beside(theirs, Path(megatron))
    fault = mock.patch.object(stages, "_step", side_effect=CorruptFile("a planted fault"))
    with fault if os.environ["RANK"] == fails else nullcontext():
        report = compare_logits_in_parallel(theirs, ours, LogitsOptions(device="cpu"), EQUAL)
    if os.environ["RANK"] == "0":
        print(json.dumps({"equal": report.equal, **asdict(report)}))
    return 1 if os.environ["RANK"] == "0" and not report.equal else 0  # who ends first is who torchrun hears of


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
