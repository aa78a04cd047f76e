"""What is this checkpoint? Format, who wrote it how, which model, which layout, what is in it; from headers alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import ConvertError, InputError
from qwen3vl_convert.huggingface.experts import experts_layout
from qwen3vl_convert.huggingface.folder import HuggingFaceCheckpoint, read_folder
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.megatron.checkpoint import MegatronCheckpoint, read_megatron
from qwen3vl_convert.megatron.pickled import Instance
from qwen3vl_convert.megatron.run_config import read_run_config
from qwen3vl_convert.megatron.stored import STACKS, local_spec_of, style_of
from qwen3vl_convert.model import open_huggingface, open_megatron
from qwen3vl_convert.storage import StoredTensor

HUGGINGFACE, MEGATRON = "huggingface", "megatron torch_dist"
_PARALLEL = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found. `complete`: every tensor of the model is there and no other; else `problem` says what is
    wrong.
    """

    path: str
    format: str
    dialect: str
    model: str
    published_size: str | None
    dtypes: dict[str, int]
    tensors: int
    parameters: int
    nbytes: int
    files: int
    layout: dict[str, int]
    dims: dict[str, Any]
    complete: bool
    problem: str | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path: str | Path, iteration: int | str | None = None) -> Inspection:
    """Inspect a checkpoint of either format. Raises `InputError`'s kinds when it cannot even be read."""
    if iteration is not None or is_megatron(Path(path)):
        return _inspect_megatron(Path(path), iteration)
    return _inspect_huggingface(path)


def is_megatron(folder: Path) -> bool:
    """Whether a path looks like a Megatron checkpoint, of any kind: what exactly is told when it is read."""
    names = (".metadata", "latest_checkpointed_iteration.txt", "release")
    if any((folder / name).exists() for name in names):
        return True
    return folder.is_dir() and any(True for pattern in ("iter_*", "mp_rank_*") for _ in folder.glob(pattern))


def _inspect_huggingface(path: str | Path) -> Inspection:
    checkpoint = read_folder(resolve(path, weights=True).folder)
    problem, layout = None, "unknown"
    try:
        layout = experts_layout(checkpoint.tensors, checkpoint.dims)
        headless = not checkpoint.dims.tied and "lm_head.weight" not in checkpoint.tensors
        open_huggingface(checkpoint.folder, headless=headless)
    except ConvertError as error:
        problem = str(error)
    return Inspection(
        path=str(path),
        format=HUGGINGFACE,
        dialect=huggingface_dialect(checkpoint, layout),
        layout={},
        files=len(checkpoint.files),
        notes=checkpoint.notes,
        **_common(checkpoint.tensors, checkpoint.dims, problem),
    )


def _inspect_megatron(path: Path, iteration: int | str | None) -> Inspection:
    checkpoint = read_megatron(path, iteration)
    dims, problem = None, None
    try:
        dims = checkpoint.dims()
        headless = not dims.tied and "language_model.output_layer.weight" not in checkpoint.tensors
        open_megatron(path, iteration, headless=headless)
    except ConvertError as error:
        problem = str(error)
    return Inspection(
        path=str(checkpoint.folder),
        format=MEGATRON,
        dialect=megatron_dialect(checkpoint),
        layout=written_with(checkpoint),
        files=len({chunk.file for tensor in checkpoint.tensors.values() for chunk in tensor.chunks}),
        notes=checkpoint.notes,
        **_common(checkpoint.tensors, dims, problem),
    )


def _common(tensors: dict[str, StoredTensor], dims: Dims | None, problem: str | None) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.numel
    return {
        "model": dims.model_type if dims else "unknown",
        "published_size": dims and published_size(dims),
        "dtypes": dtypes,
        "tensors": len(tensors),
        "parameters": sum(dtypes.values()),
        "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dims": asdict(dims) if dims else {},
        "complete": problem is None,
        "problem": problem,
    }


_SHAPE = ("model_type", "layers", "hidden", "heads", "kv_heads", "head_dim", "experts", "expert_ffn", "vision_depth")


def published_size(dims: Dims) -> str | None:
    """The name in `SIZES` of the model that has these sizes, or None."""
    return next((n for n, d in SIZES.items() if all(getattr(d, f) == getattr(dims, f) for f in _SHAPE)), None)


def huggingface_dialect(checkpoint: HuggingFaceCheckpoint, experts_layout: str) -> str:
    """How a folder calls its tensors, and has its experts."""
    experts = "" if experts_layout == "none" else f", experts: {experts_layout}"
    return f"names: {checkpoint.prefix}{experts}"


def megatron_dialect(checkpoint: MegatronCheckpoint) -> str:
    """How a checkpoint has its layers, and where its common state is."""
    keys = checkpoint.tensors
    styles = {style_of(keys, axis) for axis in STACKS}
    common = "common.pt" if (checkpoint.folder / "common.pt").exists() else "common_state"
    norm = ", MoE norm of the local layer spec" if local_spec_of(keys) else ""
    return f"keys: {' and '.join(sorted(styles))}{norm}, {common}"


def written_with(checkpoint: MegatronCheckpoint) -> dict[str, int]:
    """The parallel sizes that the checkpoint says it was written with; it can be loaded with any."""
    try:
        run_config = read_run_config(checkpoint.folder / "run_config.yaml") or {}
    except InputError:  # told with the sizes, if it matters for them
        return {}
    arguments = checkpoint.common.get("args")
    stated = run_config.get("model") or (arguments.state if isinstance(arguments, Instance) else None)
    known = stated if isinstance(stated, dict) else {}
    return {short: known[name] for short, name in _PARALLEL.items() if isinstance(known.get(name), int)}


def sizes_said(layout: dict[str, int]) -> str:
    """`TP2 PP1 EP2 ETP1`; "" for none."""
    return " ".join(f"{name.upper()}{size}" for name, size in layout.items())
