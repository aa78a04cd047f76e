"""Plan Hugging Face to Megatron: headers in, a proven plan out."""

from dataclasses import asdict, replace
from pathlib import Path

from qwen3vl_convert.conversion import Conversion, padding_of, said, target_dtypes
from qwen3vl_convert.dims import CONFIG_FILE, Dims
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.huggingface.files import auxiliary_files
from qwen3vl_convert.huggingface.hub import Resolved
from qwen3vl_convert.manifest import MANIFEST
from qwen3vl_convert.megatron.placement import held_bytes
from qwen3vl_convert.megatron.stored import stored
from qwen3vl_convert.megatron.target import MegatronOptions, megatron_target
from qwen3vl_convert.model import Model, open_huggingface
from qwen3vl_convert.parallel import ParallelLayout
from qwen3vl_convert.plan import links, make_plan
from qwen3vl_convert.storage import DTYPES


def plan_hf_to_megatron(
    source: Resolved,
    options: MegatronOptions,
    dtype: str = "keep",
    padding: tuple[int | None, int | None] = (None, None),
    experts_layout: str = "auto",
    headless: bool = False,
) -> Conversion:
    """Plan `hf_to_megatron`: reads headers only. `padding` is (padded vocabulary, its divisor), at most one of them."""
    opened = open_huggingface(source.folder, experts_layout, headless)
    options = replace(options, hf_model_id=source.repo, hf_model_revision=source.revision)
    model = replace(opened.model, sizes={**opened.model.sizes, "padded_vocab": _padded(opened.model.dims, *padding)})
    options.layout.validate(model.dims, model.padded_vocab)
    parameters = [one for equation in model.equations for one in stored(equation)]
    linked = links([one.equation for one in parameters], model.sizes, opened.tensors, to="megatron")
    dtypes = target_dtypes(linked, opened.tensors, dtype)

    def itemsize_of(name: str) -> int:
        return DTYPES[dtypes[name]].itemsize

    target = megatron_target(
        parameters, model.sizes, model.dims, dtypes.__getitem__, options, _kept_files(source.folder)
    )
    plan = make_plan(opened.tensors, target, linked, padding_of(model, target.tensors))
    chosen = {
        "layout": asdict(options.layout),
        "dtype": dtype,
        "padded_vocab_size": model.padded_vocab,
        "megatron_core": options.megatron_core,
        "iteration": options.iteration,
        "shard_of": opened.checkpoint.shard_of if len(opened.checkpoint.files) > 1 else None,
    }
    return Conversion(
        direction="hf-to-megatron",
        source=said(source),
        model=model,
        plan=plan,
        options=chosen,
        check_data=opened.check_data,
        notes=(*opened.checkpoint.notes, *_advice(model, options.layout)),
        manifest_path=f"{options.folder}/{MANIFEST}",
        rank_bytes=tuple(held_bytes(parameters, model.sizes, itemsize_of, options.layout, model.dims.tied)),
    )


def _padded(dims: Dims, rows: int | None, divisor: int | None) -> int:
    """Rows of the embedding on Megatron's side."""
    if rows is not None and divisor is not None:
        raise UsageError("--padded-vocab-size and --make-vocab-size-divisible-by exclude each other.")
    if divisor is not None:
        if divisor < 1:
            raise UsageError(f"--make-vocab-size-divisible-by {divisor}: expected 1 or more.")
        return -(-dims.vocab // divisor) * divisor
    if rows is not None and rows < dims.vocab:
        raise UsageError(f"--padded-vocab-size {rows} is less than the model's vocab_size = {dims.vocab}.")
    return rows or dims.vocab


def _kept_files(folder: Path) -> dict[str, bytes | Path]:
    """What travels along to Megatron's side: config.json and the auxiliary files, byte for byte."""
    return {path.name: path.resolve() for path in (folder / CONFIG_FILE, *auxiliary_files(folder))}


def _advice(model: Model, layout: ParallelLayout) -> tuple[str, ...]:
    """What Megatron-Bridge asserts when it builds this model with this pipeline."""
    first = layout.stages(model.dims.layers).count(0)
    deepstack = len(model.dims.deepstack)
    if layout.pp == 1 or first >= deepstack:
        return ()
    return (
        f"Megatron-Bridge wants all {deepstack} deepstack layers on the first pipeline stage, which has {first}: "
        f"it loads this checkpoint under another layout only (the layout of a checkpoint does not bind its reader).",
    )
