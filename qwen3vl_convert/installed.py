"""What the program can use and does not bring along: one table of imports, the packages that have them and the extras
that install those; and the error that names what is missing and the command that installs it.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from qwen3vl_convert.errors import NotInstalled

PROGRAM = "qwen3vl-convert"
NOT_INSTALLED = "unknown"
"""The program's version in a checkout that nobody has installed."""


@dataclass(frozen=True, slots=True)
class Package:
    """`module` is imported; `package` has it, as pip knows it; each of `extras` of this program installs that."""

    module: str
    package: str
    extras: tuple[str, ...] = ()


PACKAGES = (
    Package("torch", "torch", ("torch",)),
    Package("megatron.core", "megatron-core", ("megatron",)),
    Package("triton", "triton", ("megatron",)),
    Package("transformers", "transformers", ("transformers",)),
    Package("psutil", "psutil", ("transformers", "megatron")),
    Package("PIL", "pillow", ("transformers",)),
    Package("tokenizers", "tokenizers", ("transformers",)),
    Package("jinja2", "jinja2", ("torch",)),
    Package("torchvision", "torchvision", ("video",)),
    Package("av", "av", ("video",)),
    Package("torchcodec", "torchcodec"),
    Package("cv2", "opencv-python-headless"),
    Package("decord", "decord"),
    Package("flash_attn", "flash-attn"),
    Package("transformer_engine", "transformer-engine"),
)
EXTRAS = {"torch": (), "megatron": ("torch",), "transformers": ("torch",), "video": ("torch", "transformers")}
"""Each with those that it brings along."""
_NEEDS_TRITON = (0, 19)
"""The release of megatron-core from which on it cannot be imported without triton, which torch for a CPU lacks."""


def program_version() -> str:
    """The version of the installed program; `unknown` in a bare checkout."""
    return _version(PROGRAM) or NOT_INSTALLED


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def is_installed(module: str) -> bool:
    """Whether there is such a module, without importing it."""
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # the package that it would be in, or a stand-in for the module
        return False


def missing(*modules: str) -> tuple[Package, ...]:
    """Of modules of the table, and of what they import and do not declare, what is not installed."""
    wanted = dict.fromkeys(one for module in modules for one in (module, *_undeclared(module)))
    return tuple(package for package in PACKAGES if package.module in wanted and not is_installed(package.module))


def _undeclared(module: str) -> tuple[str, ...]:
    if module != "megatron.core":
        return ()
    release = tuple(int(part) for part in _version("megatron-core").split(".")[:2] if part.isdecimal())
    return ("psutil", "triton") if release >= _NEEDS_TRITON else ("psutil",)


def need(purpose: str, *modules: str) -> None:
    """Raise `NotInstalled` unless all are there: what needs them, their names, and the command that installs them."""
    if absent := missing(*modules):
        raise _not_installed(purpose, absent)


def _not_installed(purpose: str, absent: Sequence[Package]) -> NotInstalled:
    return NotInstalled(f"{purpose} needs {lacking(absent)}", name=absent[0].module)


def lacking(absent: Sequence[Package]) -> str:
    """`torch, transformers and psutil, which are not installed: pip install ...`."""
    *most, last = (package.package for package in absent)
    names, verb = (f"{', '.join(most)} and {last}", "are") if most else (last, "is")
    return f"{names}, which {verb} not installed: {command(absent)}"


def command(absent: Sequence[Package]) -> str:
    """What to type. Extras choose releases that work; a checkout that is not installed has none."""
    extras: set[str] = set()
    if program_version() != NOT_INSTALLED:
        for package in sorted(absent, key=lambda one: len(one.extras)):
            if not extras.intersection(package.extras):
                extras.update(package.extras[:1])
    rest = [package.package for package in absent if not extras.intersection(package.extras)]
    named = [extra for extra in EXTRAS if extra in extras and not any(extra in EXTRAS[other] for other in extras)]
    return " ".join(["pip install", *([f"'{PROGRAM}[{','.join(named)}]'"] if named else ()), *rest])


@contextmanager
def named(purpose: str, *modules: str) -> Iterator[None]:
    """A module that is imported inside and is missing becomes `NotInstalled`; one of the program's own does not.

    `modules`: what else is named if it is missing too, so that nobody installs one package after the other.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        found = explained(error, purpose, *modules)
        if found is None:
            raise
        raise found from error


def explained(error: ModuleNotFoundError, purpose: str, *modules: str) -> NotInstalled | None:
    """What to tell a user of a failed import; None where it is a mistake of the program's."""
    module = error.name or ""
    top = module.partition(".")[0]
    if isinstance(error, NotInstalled) or top in ("", __name__.partition(".")[0]) or top in sys.stdlib_module_names:
        return None
    known = tuple(package for package in PACKAGES if _is_within(module, package.module))
    if known and is_installed(known[0].module):
        return _too_old(purpose, module, known[0])
    if known:
        return _not_installed(purpose, tuple(dict.fromkeys((*known, *missing(*modules)))))
    imported = f"{purpose} needs the Python module {{}}, which {_importer(error)} imports and which {{}}"
    if is_installed(top):
        text = imported.format(
            module, f"{top}, as it is installed, does not have: install another release, or what adds"
        )
        return NotInstalled(f"{text} it.", name=module)
    return NotInstalled(imported.format(top, "is not installed: install the package that has it."), name=module)


def _is_within(module: str, package: str) -> bool:
    """Whether a module is a package or a part of it, or what the package is a part of."""
    return f"{module}.".startswith(f"{package}.") or package.startswith(f"{module}.")


def _too_old(purpose: str, module: str, package: Package) -> NotInstalled:
    """Of a package that is there, without a module that others of its releases have."""
    name = package.package
    there = f"{name} {_version(name)}".rstrip()
    words = dict.fromkeys([name, *command((package,)).split()[2:]])
    text = f"{purpose} needs {module}, which {there}, as it is installed, does not have"
    return NotInstalled(f"{text}: pip install -U {' '.join(words)}", name=module)


def _importer(error: ModuleNotFoundError) -> str:
    """The package whose import statement failed."""
    name, trace = "something", error.__traceback__
    while trace is not None:
        found = str(trace.tb_frame.f_globals.get("__name__", ""))
        name = name if found.startswith("importlib") else found.partition(".")[0]
        trace = trace.tb_next
    return name
