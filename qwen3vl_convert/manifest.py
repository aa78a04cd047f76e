"""The manifest beside an output, and the fingerprint by which an interrupted run is known again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from qwen3vl_convert.checksum import crc32
from qwen3vl_convert.conversion import Conversion
from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.fill import Key, key_of
from qwen3vl_convert.installed import program_version
from qwen3vl_convert.plan import Plan

MANIFEST = "qwen3vl_convert.json"


def manifest_text(conversion: Conversion, crcs: dict[Key, int]) -> str:
    """What the output is made of, and a CRC-32 of every tensor (one per chunk); the same for the same input."""
    tensors: dict[str, Any] = {}
    for job in conversion.plan.jobs:
        entry = tensors.setdefault(
            job.name, {"dtype": job.dtype, "shape": conversion.plan.target.tensors[job.name].shape, "crc32": []}
        )
        entry["crc32"].append(f"{crcs[key_of(job.chunk)]:08x}")
    manifest = {
        "made_by": f"qwen3vl-convert {program_version()}",
        "direction": conversion.direction,
        "source": conversion.source,
        "model": conversion.model.dims.model_type,
        "experts_layout": conversion.model.experts_layout,
        "options": conversion.options,
        "copied": {
            name: f"{crc32(path.read_bytes()):08x}" for name, path in sorted(conversion.plan.target.copied.items())
        },
        "tensors": tensors,
    }
    return json.dumps(manifest, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Our own manifest beside a checkpoint, as far as it is one; it only ever gives defaults."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def fingerprint_of(conversion: Conversion) -> str:
    """What must be the same for an interrupted run to be resumed: sources, options and the layout of the output."""
    plan = conversion.plan
    stats = [(str(path), *_state(path)) for path in sorted(files_read(plan))]
    equations = [str(equation) for equation in conversion.model.equations]
    what = [
        program_version(),
        conversion.direction,
        conversion.options,
        stats,
        equations,
        sorted(plan.target.sizes.items()),
    ]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    for name, offset, content in plan.target.literals:
        digest.update(f"{name} {offset} {len(content)} ".encode() + content)
    return digest.hexdigest()


def files_read(plan: Plan) -> set[Path]:
    """Every file that carrying the plan out reads."""
    chunks = {chunk.file for tensor in plan.source.values() for chunk in tensor.chunks}
    return chunks | set(plan.target.copied.values())


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def refuse_own_source(plan: Plan, target: Path) -> None:
    """Raise `UsageError` when replacing the target would remove what is converted."""
    real = target.resolve()
    for path in files_read(plan):
        if real in path.resolve().parents:
            raise UsageError(f"{target} holds {path}, which is to be converted. Choose another target.")
