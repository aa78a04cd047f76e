"""The main path: open, plan, prove; then lay out, fill, check, publish.

hf_to_megatron(source, target, layout=ParallelLayout(tp=2, pp=2))
megatron_to_hf(source, target, config="Qwen/Qwen3-VL-8B-Instruct")
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
from qwen3vl_convert.errors import InputError, OutputError, UsageError
from qwen3vl_convert.fill import FillOptions, Key, fill, key_of
from qwen3vl_convert.huggingface.config import config_json, portable_config
from qwen3vl_convert.huggingface.files import folder_files
from qwen3vl_convert.huggingface.hub import Resolved, resolve
from qwen3vl_convert.huggingface.target import huggingface_target
from qwen3vl_convert.huggingface.writer import hub_order
from qwen3vl_convert.mappings.registry import names
from qwen3vl_convert.megatron.placement import held_bytes
from qwen3vl_convert.megatron.stored import stored
from qwen3vl_convert.megatron.target import MegatronOptions, megatron_target
from qwen3vl_convert.model import EMBEDDING, OUTPUT, MegatronModel, Model, open_huggingface, open_megatron
from qwen3vl_convert.parallel import ParallelLayout
from qwen3vl_convert.plan import Link, Plan, links, make_plan
from qwen3vl_convert.seal import MANIFEST, check_space, check_written, publishing, refuse_existing
from qwen3vl_convert.storage import DTYPES, StoredTensor

DTYPE_OPTIONS = {"keep": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DEFAULT_SHARD_BYTES = 5 * 10**9
_SHARD = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)

Report = Callable[[str, int, int], None]
"""Called as report(stage, bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a conversion is carried out; none of this changes a byte of the result."""

    fill: FillOptions = field(default_factory=FillOptions)
    overwrite: bool = False
    resume: bool = False
    fsync: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.overwrite and self.resume:
            raise UsageError("--resume and --overwrite exclude each other: one goes on, the other begins anew.")


@dataclass(frozen=True, slots=True)
class Conversion:
    """A planned conversion: everything is known, nothing is written."""

    direction: Literal["hf-to-megatron", "megatron-to-hf"]
    source: str
    model: Model
    plan: Plan
    options: dict[str, Any]
    check_data: Callable[[], list[str]]
    notes: tuple[str, ...]
    manifest_path: str
    rank_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did, or with `dry_run` would do; `to_json()` is what `--json` prints. Sizes in bytes.

    `rank_bytes`: weights that each rank of the layout will hold once it is loaded (empty for a HF folder).
    """

    direction: str
    source: str
    target: str
    model: str
    dtype: str
    experts_layout: str
    options: dict[str, Any]
    tensors: int
    files: dict[str, int]
    data_bytes: int
    total_bytes: int
    free_bytes: int
    buffer_bytes: int
    rank_bytes: tuple[int, ...]
    dry_run: bool
    seconds: dict[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def hf_to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    layout: ParallelLayout | None = None,
    dtype: str = "keep",
    padded_vocab_size: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    experts_layout: str = "auto",
    iteration: int | str = 0,
    megatron_core: str = "any",
    headless: bool = False,
    run: RunOptions | None = None,
    report: Report | None = None,
) -> Result:
    """Convert a Hugging Face folder (or Hub id) to a Megatron `torch_dist` checkpoint. Options as on the command line.

    Raises `UsageError`, `InputError` or `OutputError`; then there is no target.
    """
    began = time.monotonic()
    run = run or RunOptions()
    if not run.dry_run:
        refuse_existing(Path(target), run.overwrite)
    resolved = resolve(source, weights=True)
    options = MegatronOptions(layout or ParallelLayout(), megatron_core, iteration)
    padding = (padded_vocab_size, make_vocab_size_divisible_by)
    conversion = plan_hf_to_megatron(resolved, options, dtype, padding, experts_layout, headless)
    return carry_out(conversion, Path(target), run, report, began)


def megatron_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    config: str | Path | None = None,
    experts_layout: str = "hub",
    max_shard_bytes: int | None = None,
    dtype: str = "keep",
    iteration: int | str | None = None,
    headless: bool = False,
    run: RunOptions | None = None,
    report: Report | None = None,
) -> Result:
    """Convert a Megatron `torch_dist` checkpoint to a Hugging Face folder. Options as on the command line.

    `config`: folder or Hub id for config.json and the auxiliary files. Raises as `hf_to_megatron`.
    """
    began = time.monotonic()
    run = run or RunOptions()
    if not run.dry_run:
        refuse_existing(Path(target), run.overwrite)
    reference = None if config is None else resolve(config, weights=False)
    conversion = plan_megatron_to_hf(
        Path(source), reference, dtype, experts_layout, max_shard_bytes, iteration, headless
    )
    return carry_out(conversion, Path(target), run, report, began)


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
    model = replace(opened.model, sizes={**opened.model.sizes, "padded_vocab": _padded(opened.model.dims, *padding)})
    options.layout.validate(model.dims, model.padded_vocab)
    parameters = [one for equation in model.equations for one in stored(equation)]
    linked = links([one.equation for one in parameters], model.sizes, opened.tensors, to="megatron")
    dtypes = _target_dtypes(linked, opened.tensors, dtype)

    def itemsize_of(name: str) -> int:
        return DTYPES[dtypes[name]].itemsize

    target = megatron_target(
        parameters, model.sizes, model.dims, dtypes.__getitem__, options, _kept_files(source.folder)
    )
    plan = make_plan(opened.tensors, target, linked, _padding(model, target.tensors))
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
        source=_said(source),
        model=model,
        plan=plan,
        options=chosen,
        check_data=opened.check_data,
        notes=(*opened.checkpoint.notes, *_advice(model, options.layout)),
        manifest_path=f"{options.folder}/{MANIFEST}",
        rank_bytes=tuple(held_bytes(parameters, model.sizes, itemsize_of, options.layout, model.dims.tied)),
    )


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
    dims = (
        None
        if reference is None
        else Dims.from_config(read_config(reference.folder), str(reference.folder / CONFIG_FILE))
    )
    probe = open_megatron(source, iteration, dims, "hub", headless)
    manifest = _manifest_of(probe)
    layout = _written_experts(experts_layout, probe, manifest, reference)
    opened = probe if layout in ("hub", "none") else open_megatron(source, iteration, dims, layout, headless)
    model = opened.model
    linked = links([one.equation for one in opened.stored], model.sizes, opened.tensors, to="hf")
    dtypes = _target_dtypes(linked, opened.tensors, dtype)
    shapes = {
        n: t.layout.shape(model.sizes) for e in opened.stored for t in e.equation.hf for n in names(t, model.sizes)
    }
    entries = [(name, dtypes[name], shapes[name]) for name in hub_order(shapes, model.dims)]
    text, auxiliary, notes = _config_and_files(opened, reference, dtypes[EMBEDDING[1]], layout)
    split = _split_of(manifest, reference) if max_shard_bytes is None else None
    limit = DEFAULT_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    target = huggingface_target(entries, text, auxiliary, limit, split)
    plan = make_plan(opened.tensors, target, linked, _padding(model, opened.tensors))
    chosen = {
        "dtype": dtype,
        "experts_layout": layout,
        "max_shard_bytes": max_shard_bytes,
        "iteration": opened.checkpoint.iteration,
    }
    return Conversion(
        direction="megatron-to-hf",
        source=f"{source.name}/{opened.checkpoint.iteration}"
        if source.name != opened.checkpoint.iteration
        else source.name,
        model=model,
        plan=plan,
        options=chosen,
        check_data=opened.check_data,
        notes=(*opened.checkpoint.notes, *notes),
        manifest_path=MANIFEST,
        rank_bytes=(),
    )


def carry_out(
    conversion: Conversion, target: Path, run: RunOptions, report: Report | None = None, began: float | None = None
) -> Result:
    """Lay out, fill, check and publish a planned conversion; with `run.dry_run`, only say what that would be."""
    tell: Report = report or (lambda stage, done, total: None)
    clock = _Clock(began)
    clock.lap("plan")
    plan = conversion.plan
    if run.dry_run:
        return _result(conversion, target, run, clock, conversion.notes, _free(target))
    _refuse_own_source(plan, target)
    free = check_space(target, plan.target.nbytes)
    notes = (*conversion.notes, *conversion.check_data())
    clock.lap("check source")
    fingerprint = _fingerprint(conversion)
    with publishing(target, fingerprint, overwrite=run.overwrite, resume=run.resume) as staging:
        if not staging.resumed:
            staging.lay_out(plan.target)
        clock.lap("lay out")
        crcs = fill(
            plan, staging.content, run.fill, _meter(tell, "fill", plan.data_bytes), staging.done, staging.finished
        )
        clock.lap("fill")
        if _fingerprint(conversion) != fingerprint:
            raise InputError(f"{conversion.source}: was changed while it was read. Convert again when it is complete.")
        try:
            check_written(plan, staging.content, crcs, run.fill.workers, _meter(tell, "check", plan.data_bytes))
        except OutputError:
            staging.discard()  # what is not what was written is nothing to go on from
            raise
        clock.lap("check")
        (staging.content / conversion.manifest_path).write_text(_manifest(conversion, crcs))
        staging.publish(run.fsync)
        clock.lap("publish")
    return _result(conversion, target, run, clock, notes, free)


class _Clock:
    """Seconds per stage."""

    def __init__(self, began: float | None) -> None:
        self.last = began if began is not None else time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self.last, 3)
        self.last = now


def _meter(tell: Report, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(stage, done, total)

    return progress


def _result(
    conversion: Conversion, target: Path, run: RunOptions, clock: _Clock, notes: tuple[str, ...], free: int
) -> Result:
    plan, model = conversion.plan, conversion.model
    return Result(
        direction=conversion.direction,
        source=conversion.source,
        target=str(target),
        model=model.dims.model_type,
        dtype=", ".join(sorted({tensor.dtype for tensor in plan.target.tensors.values()})),
        experts_layout=model.experts_layout,
        options={key: value for key, value in conversion.options.items() if key != "shard_of"},
        tensors=len(plan.target.tensors),
        files=dict(sorted(plan.target.sizes.items())),
        data_bytes=plan.data_bytes,
        total_bytes=plan.target.nbytes,
        free_bytes=free,
        buffer_bytes=run.fill.buffer_bytes,
        rank_bytes=conversion.rank_bytes,
        dry_run=run.dry_run,
        seconds=clock.seconds,
        notes=notes,
    )


def _free(target: Path) -> int:
    return check_space(target, 0)


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


def _padding(model: Model, megatron: dict[str, StoredTensor]) -> dict[str, int]:
    """Elements of padding in the Megatron tensors that have any."""
    surplus = (model.padded_vocab - model.dims.vocab) * model.dims.hidden
    return {name: surplus for name in (EMBEDDING[0], OUTPUT[0]) if surplus and name in megatron}


def _target_dtypes(linked: dict[str, list[Link]], source: dict[str, StoredTensor], option: str) -> dict[str, str]:
    """The dtype of every target tensor: the one asked for, or that of its sources, which must agree."""
    if option not in DTYPE_OPTIONS:
        raise UsageError(f"--dtype {option}: expected one of {', '.join(DTYPE_OPTIONS)}.")
    asked = DTYPE_OPTIONS[option]
    dtypes = {}
    for name, into in linked.items():
        found = {source[link.source_name].dtype for link in into}
        if asked is None and len(found) > 1:
            raise InputError(
                f"{name} would be made of tensors of different dtypes, {' and '.join(sorted(found))}. "
                f"Pass --dtype bf16, fp16 or fp32."
            )
        dtypes[name] = asked or found.pop()
    return dtypes


def _kept_files(folder: Path) -> dict[str, bytes | Path]:
    """What travels along to Megatron's side: config.json and the auxiliary files, byte for byte."""
    return {path.name: path.resolve() for path in (folder / CONFIG_FILE, *folder_files(folder).auxiliary)}


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


def _manifest_of(opened: MegatronModel) -> dict[str, Any]:
    """Our own manifest beside a checkpoint, as far as it is one; it only ever gives defaults."""
    try:
        manifest = json.loads((opened.checkpoint.folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _written_experts(option: str, opened: MegatronModel, manifest: dict[str, Any], reference: Resolved | None) -> str:
    """The expert layout to write."""
    if option not in ("hub", "v5", "per-expert", "match"):
        raise UsageError(f"--experts-layout {option}: expected hub, v5, per-expert or match.")
    if not opened.model.dims.moe:
        return "none"
    if option != "match":
        return option
    if reference is not None and folder_files(reference.folder).weights:
        return open_huggingface(reference.folder, headless=not opened.model.output_layer).model.experts_layout
    layout = manifest.get("experts_layout")
    if layout not in ("hub", "v5", "per-expert"):
        raise UsageError("--experts-layout match: neither --config nor the checkpoint's manifest says which. Name one.")
    return str(layout)


def _split_of(manifest: dict[str, Any], reference: Resolved | None) -> dict[str, str] | None:
    """How the source was split into files, where that is known and safe to take over."""
    options = manifest.get("options")
    split = options.get("shard_of") if isinstance(options, dict) else None
    if not isinstance(split, dict):
        return None
    return split if all(isinstance(file, str) and _SHARD.fullmatch(file) for file in split.values()) else None


def _config_and_files(
    opened: MegatronModel, reference: Resolved | None, dtype: str, layout: str
) -> tuple[bytes | Path, tuple[Path, ...], tuple[str, ...]]:
    """(config.json as text or as the file to copy, auxiliary files, notes)."""
    checkpoint = opened.checkpoint
    notes: tuple[str, ...] = ()
    if reference is not None:
        origin, auxiliary = reference.folder / CONFIG_FILE, folder_files(reference.folder).auxiliary
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


def _said(source: Resolved) -> str:
    """A source as the manifest names it: a Hub id with its commit, or the name of a folder (not a path of this machine)."""
    return f"{source.repo}@{source.revision}" if source.repo else source.folder.resolve().name


def _version() -> str:
    try:
        return version("qwen3vl-convert")
    except PackageNotFoundError:
        return "unknown"


def _fingerprint(conversion: Conversion) -> str:
    """What must be the same for an interrupted run to be resumed: sources, options and the layout of the output."""
    plan = conversion.plan
    stats = [(str(path), *_state(path)) for path in sorted(_read_files(plan))]
    equations = [str(equation) for equation in conversion.model.equations]
    what = [_version(), conversion.direction, conversion.options, stats, equations, sorted(plan.target.sizes.items())]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    for name, offset, content in plan.target.literals:
        digest.update(f"{name} {offset} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _read_files(plan: Plan) -> set[Path]:
    """Every file that carrying the plan out reads."""
    chunks = {chunk.file for tensor in plan.source.values() for chunk in tensor.chunks}
    return chunks | set(plan.target.copied.values())


def _refuse_own_source(plan: Plan, target: Path) -> None:
    """Raise `UsageError` when replacing the target would remove what is converted."""
    real = target.resolve()
    for path in _read_files(plan):
        if real in path.resolve().parents:
            raise UsageError(f"{target} holds {path}, which is to be converted. Choose another target.")


def _manifest(conversion: Conversion, crcs: dict[Key, int]) -> str:
    """What the output is made of, and a checksum of every tensor (one per chunk); the same for the same input."""
    tensors: dict[str, Any] = {}
    for job in conversion.plan.jobs:
        entry = tensors.setdefault(
            job.name, {"dtype": job.dtype, "shape": conversion.plan.target.tensors[job.name].shape, "crc32": []}
        )
        entry["crc32"].append(f"{crcs[key_of(job.chunk)]:08x}")
    manifest = {
        "made_by": f"qwen3vl-convert {_version()}",
        "direction": conversion.direction,
        "source": conversion.source,
        "model": conversion.model.dims.model_type,
        "experts_layout": conversion.model.experts_layout,
        "options": conversion.options,
        "itemsize": {name: DTYPES[name].itemsize for name in sorted({job.dtype for job in conversion.plan.jobs})},
        "tensors": tensors,
    }
    return json.dumps(manifest, indent=1) + "\n"
