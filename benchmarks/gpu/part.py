"""One part, in a process of its own: `driver` starts it as `python -m gpu.part NAME --out FOLDER --work FOLDER`."""

import argparse
import platform
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gpu.checks import Checks, Run, give_back, synchronize
from gpu.page import Row, add, write_page
from gpu.parts import REHEARSED, SHAPES, Part, part_named

PACKAGES = ("torch", "transformers", "megatron-core")
OPTIONAL = ("transformer-engine", "flash-attn", "triton", "isal")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    part = part_named(options.name)
    shapes = REHEARSED if options.device == "cpu" else SHAPES
    run = Run(options.device, options.work, None if part.shape is None else shapes[part.shape], options.checkpoint)
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # Where a virtual machine names AMX among its instructions and refuses it, oneDNN's bfloat16 ends the process.
    onednn = partial(torch.backends.mkldnn.flags, enabled=options.device != "cpu")
    add(options.out, part, {"device": options.device, "said": surroundings(options.device)})
    with onednn():
        passed = [recorded(row, options.out, part) for row in rows(run, part)]
    return 0 if passed and all(passed) else 1


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    return parser.parse_args(arguments)


def rows(run: Run, part: Part) -> Iterator[Row]:
    """Of all checks of a part. One that raises is a failed row; the others go on."""
    checks: Sequence[Checks] = import_module(part.module).CHECKS
    for check in checks:
        try:
            yield from check(run)
            synchronize(run.device)  # what a kernel did wrong is this check's
            give_back(run.device)
        except Exception as error:  # noqa: BLE001  whatever it is, it is told, and the rest is still of use
            traceback.print_exc()
            said = " ".join(f"{type(error).__name__}: {error}".split())
            yield Row("errors", (part.name, check.__name__, said[:300]), False)


def recorded(row: Row, out: Path, part: Part) -> bool:
    """Keep it at once, and say so."""
    add(out, part, row)
    write_page(out)
    print("  ".join([*row.cells, "" if row.passed else "FAILED"]).rstrip(), flush=True)
    return row.passed


def surroundings(device: str) -> str:
    """The machine and the packages, for a reader."""
    where = f"{platform.machine()} CPU"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        where = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    packages = [*(f"{name} {_version(name)}" for name in PACKAGES), *_optional()]
    return f"{datetime.now(UTC):%Y-%m-%d}: {where}, Python {platform.python_version()}, {', '.join(packages)}"


def _optional() -> list[str]:
    found = [f"{name} {_version(name)}" for name in OPTIONAL if _version(name)]
    missing = [name for name in OPTIONAL if not _version(name)]
    return found + ([f"no {' or '.join(missing)}"] if missing else [])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
