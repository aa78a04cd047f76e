"""Every error that the program raises on purpose, and the exit code that the command line gives it.

    ConvertError                      3
    ├── UsageError                    2   the request itself makes no sense (also a wrong mapping or layout)
    │   └── NotInstalled                  a package that the request needs is missing; an ImportError, too
    ├── InputError                    3   a checkpoint that cannot be used, from missing to hostile
    │   ├── CorruptFile                   a file whose bytes contradict themselves
    │   ├── UnsafeFile                    a pickle or a path that reaches outside what a checkpoint may name
    │   ├── UnsupportedFormat             recognised, named, and not read (quantised, legacy, another framework's names)
    │   ├── ConfigError                   config.json contradicts itself, or lacks what is needed
    │   └── TensorError                   names tensors
    │       ├── MissingTensors
    │       ├── UnknownTensors
    │       ├── DuplicateTensors
    │       └── MisshapenTensor
    └── OutputError                   4   the target cannot be written: exists, no space, no permission

Every message says where, what was expected, what was found and what to do about it.
"""

from collections.abc import Iterable


class ConvertError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 3


class UsageError(ConvertError):
    """The request makes no sense, whatever the checkpoint."""

    exit_code = 2


class NotInstalled(UsageError, ImportError):
    """A package that the request needs is not installed; names it and the command that installs it."""


class InputError(ConvertError):
    """A checkpoint that cannot be used."""


class CorruptFile(InputError):
    """A file whose bytes contradict themselves: truncated, overlapping, with holes."""


class UnsafeFile(InputError):
    """A file that names something outside a checkpoint: a foreign pickle global, a path outside the folder."""


class UnsupportedFormat(InputError):
    """A format that is recognised by name and not read."""


class ConfigError(InputError):
    """A config.json that contradicts itself or lacks what is needed."""


class TensorError(InputError):
    """An error about tensors, which it names."""


class MissingTensors(TensorError):
    """Tensors that the model needs and the checkpoint lacks."""


class UnknownTensors(TensorError):
    """Tensors that no mapping claims."""


class DuplicateTensors(TensorError):
    """A tensor stored twice."""


class MisshapenTensor(TensorError):
    """A tensor whose shape is not what the model's sizes say."""


class OutputError(ConvertError):
    """The target cannot be written."""

    exit_code = 4


def listing(names: Iterable[str], most: int = 8) -> str:
    """`a, b, c and 12 more`, for messages that name many tensors."""
    ordered = sorted(names)
    rest = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {rest} more" if rest > 0 else "")
