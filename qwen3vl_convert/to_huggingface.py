"""Plan Megatron to Hugging Face: headers in, a proven plan out."""

import re
from pathlib import Path
from typing import Any

from qwen3vl_convert.conversion import Conversion, padding_of, said, target_dtypes
from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.huggingface.config import config_json, portable_config
from qwen3vl_convert.huggingface.files import auxiliary_files, has_weights, weight_map
from qwen3vl_convert.huggingface.hub import Resolved
from qwen3vl_convert.huggingface.target import huggingface_target
from qwen3vl_convert.huggingface.writer import hub_order
from qwen3vl_convert.manifest import MANIFEST, read_manifest
from qwen3vl_convert.mappings.registry import names
from qwen3vl_convert.model import EMBEDDING, MegatronModel, open_huggingface, open_megatron
from qwen3vl_convert.plan import links, make_plan

DEFAULT_SHARD_BYTES = 5 * 10**9
_SHARD = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)


def plan_megatron_to_hf(
    source: Path,
    reference: Resolved | None = None,
    dtype: str = "keep",
    experts_layout: str = "hub",
    max_shard_bytes: int | None = None,
    iteration: int | str | None = None,
    headless: bool = False,
) -> Conversion:
    """Plan `megatron_to_hf`: reads headers only."""
    dims = None if reference is None else _dims_of(reference.folder)
    probe = open_megatron(source, iteration, dims, "hub", headless)
    manifest = read_manifest(probe.checkpoint.folder)
    layout = _written_experts(experts_layout, probe, manifest, reference)
    opened = probe if layout in ("hub", "none") else open_megatron(source, iteration, dims, layout, headless)
    model = opened.model
    linked = links([one.equation for one in opened.stored], model.sizes, opened.tensors, to="hf")
    dtypes = target_dtypes(linked, opened.tensors, dtype)
    shapes = _shapes(opened)
    entries = [(name, dtypes[name], shapes[name]) for name in hub_order(shapes, model.dims)]
    text, auxiliary, notes = _config_and_files(opened, reference, dtypes[EMBEDDING[1]], layout)
    split = _split_of(manifest, reference) if max_shard_bytes is None else None
    limit = DEFAULT_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    target = huggingface_target(entries, text, auxiliary, limit, split)
    plan = make_plan(opened.tensors, target, linked, padding_of(model, opened.tensors))
    chosen = {
        "config": None if reference is None else said(reference),
        "dtype": dtype,
        "experts_layout": layout,
        "max_shard_bytes": max_shard_bytes,
        "iteration": opened.checkpoint.iteration,
    }
    return Conversion(
        direction="megatron-to-hf",
        source="/".join(dict.fromkeys((source.resolve().name, opened.checkpoint.iteration))),
        model=model,
        plan=plan,
        options=chosen,
        check_data=opened.check_data,
        notes=(*opened.checkpoint.notes, *notes),
        manifest_path=MANIFEST,
        rank_bytes=(),
    )


def _dims_of(folder: Path) -> Dims:
    return Dims.from_config(read_config(folder), str(folder / CONFIG_FILE))


def _shapes(opened: MegatronModel) -> dict[str, tuple[int, ...]]:
    """The HF tensors to write."""
    sizes = opened.model.sizes
    terms = [term for one in opened.stored for term in one.equation.hf]
    return {name: term.layout.shape(sizes) for term in terms for name in names(term, sizes)}


def _written_experts(option: str, opened: MegatronModel, manifest: dict[str, Any], reference: Resolved | None) -> str:
    """The expert layout to write."""
    if option not in ("hub", "v5", "per-expert", "match"):
        raise UsageError(f"--experts-layout {option}: expected hub, v5, per-expert or match.")
    if not opened.model.dims.moe:
        if option in ("v5", "per-expert"):
            raise UsageError(f"--experts-layout {option}: the model is dense. Leave the option out.")
        return "none"
    if option != "match":
        return option
    if reference is not None and has_weights(reference.folder):
        return open_huggingface(reference.folder, headless=not opened.model.output_layer).model.experts_layout
    layout = manifest.get("experts_layout")
    if layout not in ("hub", "v5", "per-expert"):
        raise UsageError("--experts-layout match: neither --config nor the checkpoint's manifest says which. Name one.")
    return str(layout)


def _split_of(manifest: dict[str, Any], reference: Resolved | None) -> dict[str, str] | None:
    """How the source was split into files, or else how the model of the config is, where that is safe to take over."""
    options = manifest.get("options")
    split = options.get("shard_of") if isinstance(options, dict) else None
    if not isinstance(split, dict):
        return None if reference is None else weight_map(reference.folder)
    return split if all(isinstance(file, str) and _SHARD.fullmatch(file) for file in split.values()) else None


def _config_and_files(
    opened: MegatronModel, reference: Resolved | None, dtype: str, layout: str
) -> tuple[bytes | Path, tuple[Path, ...], tuple[str, ...]]:
    """(config.json as text or as the file to copy, auxiliary files, notes)."""
    checkpoint = opened.checkpoint
    notes: tuple[str, ...] = ()
    if reference is not None:
        origin, auxiliary = reference.folder / CONFIG_FILE, auxiliary_files(reference.folder)
        config = read_config(reference.folder)
    else:
        if checkpoint.config is None or checkpoint.config_from is None:
            raise UsageError("pass --config")
        origin, auxiliary, config = checkpoint.config_from, checkpoint.auxiliary, checkpoint.config
        if origin.name != CONFIG_FILE:
            notes = (f"config.json is rebuilt from {origin.name}: what that does not say has transformers' defaults.",)
        if not auxiliary:
            notes += ("No tokenizer or processor was found with the checkpoint: pass --config to have them copied.",)
    portable = portable_config(config, opened.model.dims, dtype, layout)
    unchanged = portable == config and origin.name == CONFIG_FILE
    return (origin.resolve() if unchanged else config_json(portable).encode()), auxiliary, notes
