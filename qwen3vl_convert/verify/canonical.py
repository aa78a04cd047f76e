"""A checkpoint of any format, as the tensors that the hub would have of it: same names, same shapes,
whoever wrote it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qwen3vl_convert.assembled import Assembled, assemble_huggingface, assemble_megatron
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import ConvertError, MissingTensors
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.inspection import is_megatron
from qwen3vl_convert.megatron.checkpoint import read_megatron
from qwen3vl_convert.model import HuggingFaceModel, MegatronModel, open_huggingface, open_megatron
from qwen3vl_convert.verify.settings import stated as trained_with

T = TypeVar("T")


@dataclass(frozen=True)
class Canonical:
    """`shapes` by hub name. `dims`: what the tensors were read with.

    `stated`: what the checkpoint says itself, if it does: its config, and what a trainer would go by.
    """

    path: str
    format: str
    dims: Dims
    stated: tuple[Dims, Dims] | None
    shapes: dict[str, tuple[int, ...]]
    assembled: Assembled
    notes: tuple[str, ...]


def open_canonical(path: str | Path, iteration: int | str | None = None, other: Dims | None = None) -> Canonical:
    """Open a folder, a Hub id or a Megatron checkpoint. `other`: sizes for one that does not state its own.

    A missing output layer is no error here. Raises `InputError`'s kinds.
    """
    if _is_run(path, iteration):
        return _of_run(Path(path), iteration, other)
    folder = resolve(path, weights=True).folder
    theirs = _headless_or_not(lambda headless: open_huggingface(folder, headless=headless))
    assembled = assemble_huggingface(theirs)
    layout = theirs.model.experts_layout
    name = "huggingface" if layout == "none" else f"huggingface, experts: {layout}"
    notes = (*theirs.checkpoint.notes, *_spare(theirs))
    dims = theirs.model.dims
    return Canonical(str(path), name, dims, (dims, dims), assembled.shapes, assembled, notes)


def _of_run(path: Path, iteration: int | str | None, other: Dims | None) -> Canonical:
    checkpoint = read_megatron(path, iteration)
    own = None if checkpoint.config is None else checkpoint.dims()
    ours = _headless_or_not(lambda headless: open_megatron(path, iteration, own or other, "hub", headless))
    assembled = assemble_megatron(ours)
    notes = (*ours.checkpoint.notes, *_spare(ours))
    stated = None if own is None else (own, trained_with(checkpoint, own))
    return Canonical(str(path), "megatron", ours.model.dims, stated, assembled.shapes, assembled, notes)


def states_sizes(path: str | Path, iteration: int | str | None = None) -> bool:
    """Whether a checkpoint can be opened without another's sizes."""
    return not _is_run(path, iteration) or read_megatron(Path(path), iteration).config is not None


def _is_run(path: str | Path, iteration: int | str | None) -> bool:
    return iteration is not None or is_megatron(Path(path))


def _headless_or_not(opened: Callable[[bool], T]) -> T:
    """With a head, or without where there is none."""
    try:
        return opened(False)
    except MissingTensors as error:
        try:
            return opened(True)
        except ConvertError:
            raise error from None


def _spare(opened: HuggingFaceModel | MegatronModel) -> Iterator[str]:
    if opened.surplus_head is not None:
        yield f"{opened.surplus_head.name} is not compared: the model is tied."
