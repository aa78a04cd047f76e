"""A checkpoint of any format, as the tensors that the hub would have of it: same names, same shapes, whoever wrote it.

Megatron's chunks come by their equations. Experts of another Hugging Face layout come by two equations at once: the
published layout and theirs stand against the same Megatron parameter, and what reaches the same box of it is the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from qwen3vl_convert.conversion import padding_of
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import ConvertError, MissingTensors
from qwen3vl_convert.huggingface.hub import resolve
from qwen3vl_convert.inspection import is_megatron
from qwen3vl_convert.mappings import Equation, Layout, View, mapping_registry
from qwen3vl_convert.mappings.equation import Pair
from qwen3vl_convert.mappings.layout import Axis
from qwen3vl_convert.megatron.checkpoint import read_megatron
from qwen3vl_convert.model import HuggingFaceModel, MegatronModel, Model, open_huggingface, open_megatron
from qwen3vl_convert.plan import Link, Target, links, make_plan
from qwen3vl_convert.storage import Chunk, StoredTensor
from qwen3vl_convert.verify.settings import stated as trained_with
from qwen3vl_convert.verify.weights.sides import Assembled

T = TypeVar("T")
Linked = dict[str, list[Link]]


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
    linked = _identity(theirs.tensors, theirs.model) | _published(theirs.model)
    assembled = _assembled(theirs.tensors, linked, {})
    layout = theirs.model.experts_layout
    name = "huggingface" if layout == "none" else f"huggingface, experts: {layout}"
    notes = (*theirs.checkpoint.notes, *_spare(theirs))
    dims = theirs.model.dims
    return Canonical(str(path), name, dims, (dims, dims), _shapes(linked), assembled, notes)


def _of_run(path: Path, iteration: int | str | None, other: Dims | None) -> Canonical:
    checkpoint = read_megatron(path, iteration)
    own = None if checkpoint.config is None else checkpoint.dims()
    ours = _headless_or_not(lambda headless: open_megatron(path, iteration, own or other, "hub", headless))
    linked = links([one.equation for one in ours.stored], ours.model.sizes, ours.tensors, to="hf")
    assembled = _assembled(ours.tensors, linked, padding_of(ours.model, ours.tensors))
    notes = (*ours.checkpoint.notes, *_spare(ours))
    stated = None if own is None else (own, trained_with(checkpoint, own))
    return Canonical(str(path), "megatron", ours.model.dims, stated, _shapes(linked), assembled, notes)


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


def _shapes(linked: Linked) -> dict[str, tuple[int, ...]]:
    return {name: into[0].target.shape for name, into in linked.items()}


def _assembled(source: dict[str, StoredTensor], linked: Linked, padding: dict[str, int]) -> Assembled:
    """Proven complete, as a conversion is."""
    target = {name: _virtual(name, into, source) for name, into in linked.items()}
    make_plan(source, Target(target, {}), linked, padding)
    return Assembled(source, {name: tuple(into) for name, into in linked.items()})


def _virtual(name: str, into: list[Link], source: dict[str, StoredTensor]) -> StoredTensor:
    shape = into[0].target.shape
    return StoredTensor(name, source[into[0].source_name].dtype, shape, (Chunk((0,) * len(shape), shape, Path(), 0),))


def _identity(tensors: dict[str, StoredTensor], model: Model) -> Linked:
    """Every tensor as it is, but for those of experts that lie otherwise on the hub."""
    linked = {}
    own = {term for equation, _ in _experts(model) for term in equation.hf}
    for name, tensor in tensors.items():
        if not any(term.match(name) is not None for term in own):
            layout = Layout(" ".join(f"dim{i}" for i in range(len(tensor.shape))))
            view = layout.open({f"dim{i}": size for i, size in enumerate(tensor.shape)})
            linked[name] = [Link(view, name, view)]
    return linked


def _experts(model: Model) -> list[tuple[Equation, Equation]]:
    """(the equation of the folder's experts, that of the hub's) where they are not the same."""
    registry = mapping_registry(
        model.dims.model_type, attention_bias=model.dims.attention_bias, head=model.output_layer
    )
    layouts = (registry.with_experts(layout) for layout in (_layout(model), "hub"))
    pairs = zip(*(registered.equations for registered in layouts), strict=True)
    return [(own, published) for own, published in pairs if own != published]


def _layout(model: Model) -> str:
    return "hub" if model.experts_layout == "none" else model.experts_layout


def _published(model: Model) -> Linked:
    """Links from experts of another layout into the tensors of the hub's."""
    linked: Linked = {}
    for own, published in _experts(model):
        for place in own.places(model.sizes):
            (theirs,) = published.pairs(model.sizes, place)
            into = linked.setdefault(theirs.hf_name, [])
            into += [link for mine in own.pairs(model.sizes, place) for link in _joined(theirs, mine)]
    return linked


def _joined(target: Pair, source: Pair) -> Iterator[Link]:
    """What two HF tensors have in common by way of one Megatron parameter: each box of it that both reach."""
    for ranges in target.megatron.clip(*source.megatron.bounds()):
        middle, into = target.megatron.narrowed(ranges), target.hf.narrowed(ranges)
        for others in source.megatron.clip(*middle.bounds()):
            by_step = _by_step(source.megatron.narrowed(others), source.hf.narrowed(others))
            axes = _by_step(middle, into)
            same = tuple(replace(by_step[step], name=axis.name) for step, axis in axes.items())
            out = replace(source.hf.narrowed(others), axes=same)
            yield Link(replace(into, axes=tuple(axes.values())), source.hf_name, out)


def _by_step(megatron: View, hf: View) -> dict[tuple[int, int], Axis]:
    """The axes of the HF view, by the Megatron dimension and the step there that are the same axis."""
    pairs = zip(megatron.axes, hf.axes, strict=True)
    return {(ours.dim, ours.step): theirs for ours, theirs in pairs if ours.size > 1}
