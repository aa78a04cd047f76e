"""A live model as a Hugging Face folder: laid out, filled tensor by tensor, read back, published with one rename."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen3vl_convert.checksum import crc32
from qwen3vl_convert.conversion import Conversion, said
from qwen3vl_convert.dims import CONFIG_FILE
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.fill import Key, key_of
from qwen3vl_convert.huggingface.config import config_json, portable_config
from qwen3vl_convert.huggingface.files import auxiliary_files
from qwen3vl_convert.huggingface.target import huggingface_target
from qwen3vl_convert.manifest import MANIFEST, manifest_text, refuse_own_source
from qwen3vl_convert.model import EMBEDDING
from qwen3vl_convert.models.live import WHERE, Export
from qwen3vl_convert.models.ranks import rank, together
from qwen3vl_convert.models.source import Source
from qwen3vl_convert.plan import Job, Plan, Target
from qwen3vl_convert.seal import Staging, check_space, check_written, publishing
from qwen3vl_convert.strided import write_from
from qwen3vl_convert.to_huggingface import DEFAULT_SHARD_BYTES


def save_export(export: Export, source: Source, path: Path, max_shard_bytes: int | None, overwrite: bool) -> None:
    """Rank 0 lays the files out, fills them tensor by tensor and publishes them; every step succeeds on all ranks or
    none.
    """
    first = rank() == 0
    crcs: dict[Key, int] = {}
    with ExitStack() as stack:
        with together():
            plan = export.plan(_target(export, source, max_shard_bytes) if first else None)
            staging = stack.enter_context(_laid_out(plan, path, overwrite)) if first else None
        jobs = {job.name: job for job in plan.jobs}
        for name, _, _ in export.entries:
            tensor = export.tensor(jobs[name], only_rank0=True)
            with together():
                if staging is not None:
                    crcs[key_of(jobs[name].chunk)] = _write(tensor, jobs[name], plan, staging)
        with together():
            if staging is not None:
                _publish(plan, staging, crcs, _record(export, source, plan))


def _target(export: Export, source: Source, max_shard_bytes: int | None) -> Target:
    """The files to write: the split, the config and the auxiliary files of the source, where it has them."""
    model, opened = export.opened.model, source.opened
    if (source.dims.sizes(), source.dims.tied) != (model.dims.sizes(), model.dims.tied):
        raise UsageError(
            f"{source.where}: is the config of a model of other sizes. Pass one of the model that is saved."
        )
    dtypes = {name: dtype for name, dtype, _ in export.entries}
    config = portable_config(source.config, model.dims, dtypes[EMBEDDING[1]], model.experts_layout)
    text: bytes | Path = config_json(config).encode()
    if opened is not None and config == source.config:
        text = (opened.checkpoint.folder / CONFIG_FILE).resolve()
    split = None
    if opened is not None and max_shard_bytes is None and len(opened.checkpoint.files) > 1:
        split = opened.checkpoint.shard_of
    resolved = source.resolved(weights=False)
    auxiliary = () if resolved is None else auxiliary_files(resolved.folder)
    return huggingface_target(list(export.entries), text, auxiliary, max_shard_bytes or DEFAULT_SHARD_BYTES, split)


@contextmanager
def _laid_out(plan: Plan, path: Path, overwrite: bool) -> Iterator[Staging]:
    """The files at their final size beside `path`, to be filled; removed on an error."""
    refuse_own_source(replace(plan, source={}), path)  # its source is no file
    check_space(path, plan.target.nbytes)
    with publishing(path, "", overwrite=overwrite) as staging:
        staging.lay_out(plan.target)
        yield staging


def _write(tensor: Tensor, job: Job, plan: Plan, staging: Staging) -> int:
    """Write one tensor and read it back; returns the CRC-32 of its bytes."""
    content = tensor.cpu().reshape(-1).view(torch.uint8).numpy().data
    file = staging.content / job.chunk.file
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        write_from(descriptor, memoryview(content), job.chunk.start, file)
    finally:
        os.close(descriptor)
    crc = int(crc32(content))
    alone = replace(plan, target=Target({}, {}), jobs=(job,))
    check_written(alone, staging.content, {key_of(job.chunk): crc}, 1, _unheard)
    return crc


def _publish(plan: Plan, staging: Staging, crcs: dict[Key, int], record: Conversion) -> None:
    check_written(replace(plan, jobs=()), staging.content, crcs, 1, _unheard)
    (staging.content / MANIFEST).write_text(manifest_text(record, crcs))
    staging.publish(fsync=True)


def _unheard(nbytes: int) -> None:
    """Nobody is told how far it is."""


def _record(export: Export, source: Source, plan: Plan) -> Conversion:
    """What the manifest says of a folder that came from a live model."""
    resolved = source.resolved(weights=False)
    options = {
        "config": None if resolved is None else said(resolved),
        "experts_layout": export.opened.model.experts_layout,
    }
    return Conversion("megatron-to-hf", str(WHERE), export.opened.model, plan, options, list, (), MANIFEST, ())
