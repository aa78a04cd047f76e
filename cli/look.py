"""inspect, explain and make-checkpoint: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3vl_convert.cli.console import Console, table
from qwen3vl_convert.cli.options import (
    Ep,
    Etp,
    Iteration,
    Json,
    Overwrite,
    Pp,
    Quiet,
    Tp,
    Vpp,
    parse_bytes,
    parse_iteration,
)
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.quantities import amount, size

if TYPE_CHECKING:
    from qwen3vl_convert.dims import Dims
    from qwen3vl_convert.explanation import Explanation
    from qwen3vl_convert.inspection import Inspection


def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint of either format, or a Hub id.")],
    iteration: Iteration = None,
    json: Json = False,
) -> None:
    """What is this checkpoint: format, dialect, model, layout, dtype, sizes; and is it complete?"""
    from qwen3vl_convert.inspection import inspect as run

    found = run(path, parse_iteration(iteration))
    console = Console(json)
    console.notes(found.notes)
    console.result(found.to_json(), lambda: _show_inspection(found))
    if not found.complete:
        raise typer.Exit(3)


def _show_inspection(found: "Inspection") -> None:
    from qwen3vl_convert.inspection import sizes_said

    dtypes = ", ".join(f"{dtype} ({count:,} elements)" for dtype, count in found.dtypes.items())
    rows = [
        ("format", f"{found.format}; {found.dialect}"),
        ("model", f"{found.model}, {found.published_size or 'no published size'}, {found.parameters:,} parameters"),
        *([("written with", sizes_said(found.layout))] if found.layout else []),
        ("dtype", dtypes),
        ("tensors", f"{found.tensors:,} in {amount(found.files, 'file')}, {size(found.nbytes)}"),
        ("complete", "yes" if found.complete else f"NO: {found.problem}"),
    ]
    table(found.path, rows)
    if found.dims:
        table("sizes", [(name, str(value)) for name, value in found.dims.items()])


def explain(
    name: Annotated[str, typer.Argument(help="A tensor's name, Megatron's or Hugging Face's.")],
    size_or_config: Annotated[
        str,
        typer.Option(
            "--model",
            help="A published size (2b, 4b, 8b, 32b, 30b-a3b, 235b-a22b, tiny ...) or a folder with a config.json.",
        ),
    ] = "auto",
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = None,
    ep: Ep = 1,
    etp: Etp = 1,
    rank: Annotated[int | None, typer.Option(help="Show the slices that this global rank holds.")] = None,
    experts_layout: Annotated[str, typer.Option(help="HF expert layout: hub, v5, per-expert or scrambled.")] = "hub",
    json: Json = False,
) -> None:
    """The equation behind a name, and the exact slice of it that a rank holds."""
    from qwen3vl_convert.explanation import explain as run
    from qwen3vl_convert.parallel import ParallelLayout

    dims = _dims_of(size_or_config, name)
    layout = ParallelLayout(tp, pp, vpp, ep, etp)
    found = run(name, dims, layout=layout, rank=rank, experts_layout=experts_layout)
    Console(json).result(found.to_json(), lambda: _show_explanation(found, str(layout)))


def _dims_of(model: str, name: str) -> "Dims":
    """Sizes of a published model, of a folder, or of the model that a name fits."""
    from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
    from qwen3vl_convert.make import SIZES

    if model == "auto":
        moe = any(part in name for part in ("expert", "router", "pre_mlp_layernorm", "mlp.gate."))
        return SIZES["30b-a3b" if moe else "8b"]
    if model.lower() in SIZES:
        return SIZES[model.lower()]
    if not (Path(model) / CONFIG_FILE).is_file():
        raise UsageError(f"--model {model}: expected one of {', '.join(SIZES)}, or a folder with a config.json.")
    return Dims.from_config(read_config(Path(model)), model)


def _show_explanation(found: "Explanation", layout: str) -> None:
    print(f"{found.mapping}\n{found.equation}\n")
    print("axes:      " + ", ".join(f"{axis} = {count}" for axis, count in found.axes.items()))
    print("on disk:   " + "\n           ".join(found.stored_as))
    if found.rank is None:
        return
    print(f"\nrank {found.rank} of {layout} holds:" + ("" if found.slices else " nothing of it"))
    for part in found.slices:
        axes = ", ".join(f"{axis} {a}:{b}" for axis, (a, b) in part.hf_axes.items())
        ours, theirs = (_ranges(box) or axes for box in (part.megatron_box, part.hf_box))
        print(f"  [{ours}] = {part.hf}[{theirs}]" + ("" if axes in (ours, theirs) else f"\n      {axes}"))


def _ranges(box: tuple[tuple[int, int], ...] | None) -> str:
    return ", ".join(f"{a}:{b}" for a, b in box or ())


def make_checkpoint(
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    size_name: Annotated[
        str, typer.Option("--size", help="tiny, tiny-moe, 2b, 4b, 8b, 32b, 30b-a3b or 235b-a22b.")
    ] = "tiny",
    layers: Annotated[int | None, typer.Option(help="Cut the text model to this many layers.")] = None,
    seed: Annotated[int, typer.Option(help="Other weights for another seed.")] = 0,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    experts_layout: Annotated[str, typer.Option(help="hub, v5, per-expert or scrambled.")] = "hub",
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A Hugging Face folder with random weights of real shapes, for trials. The same seed gives the same bits."""
    from dataclasses import asdict

    from qwen3vl_convert.conversion import DTYPE_OPTIONS
    from qwen3vl_convert.make import make_checkpoint as run

    chosen = DTYPE_OPTIONS.get(dtype)
    if chosen is None:
        raise UsageError(f"--dtype {dtype}: expected bf16, fp16 or fp32.")
    dims = run(
        target,
        size_name,
        layers=layers,
        seed=seed,
        dtype=chosen,
        experts_layout=experts_layout,
        max_shard_bytes=parse_bytes(max_shard_size, "--max-shard-size"),
        overwrite=overwrite,
    )
    total = sum(path.stat().st_size for path in target.iterdir())
    summary = f"{dims.model_type}, {dims.layers} layers, random weights, {size(total)}: {target}"
    Console(json, quiet).result({"target": str(target), "nbytes": total, "dims": asdict(dims)}, lambda: print(summary))
