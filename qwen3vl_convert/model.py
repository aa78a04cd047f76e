"""A checkpoint of either format, opened: its tensors, the sizes of the model, and the equations that hold for it.

Everything that decides what a checkpoint *is* happens here, from headers: which expert layout, which style of keys,
whether there is an output layer, how far the vocabulary is padded. What contradicts itself is refused here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import InputError, MisshapenTensor, MissingTensors, UnknownTensors, UsageError
from qwen3vl_convert.huggingface.experts import experts_layout as detect_experts
from qwen3vl_convert.huggingface.folder import HuggingFaceCheckpoint, read_folder
from qwen3vl_convert.mappings import Equation, Mapping, MegatronMappingRegistry, Term, mapping_registry
from qwen3vl_convert.mappings.qwen3_vl import TABLES
from qwen3vl_convert.megatron.checkpoint import MegatronCheckpoint, read_megatron
from qwen3vl_convert.megatron.stored import Stored, on_disk
from qwen3vl_convert.plan import check_names
from qwen3vl_convert.reader import are_equal, is_padding
from qwen3vl_convert.storage import StoredTensor

EMBEDDING = ("language_model.embedding.word_embeddings.weight", "model.language_model.embed_tokens.weight")
OUTPUT = ("language_model.output_layer.weight", "lm_head.weight")
"""Names of the tensors that a tied model shares: (Megatron, HF)."""


@dataclass(frozen=True, slots=True)
class Model:
    """What the equations of a checkpoint hold for. `sizes` has every axis, and `padded_vocab` where Megatron pads.

    `equations` are against module names on Megatron's side and against this HF `experts_layout`.
    """

    dims: Dims
    sizes: dict[str, int]
    equations: tuple[Equation, ...]
    experts_layout: str
    output_layer: bool

    @property
    def padded_vocab(self) -> int:
        return self.sizes.get("padded_vocab", self.dims.vocab)


@dataclass(frozen=True, slots=True)
class HuggingFaceModel:
    """A Hugging Face folder that is a complete model. `tensors`: the ones that the equations use."""

    checkpoint: HuggingFaceCheckpoint
    model: Model
    tensors: dict[str, StoredTensor]
    surplus_head: StoredTensor | None

    def check_data(self) -> list[str]:
        """What headers cannot tell; returns notes. Raises `InputError`."""
        return _check_surplus(self.surplus_head, self.tensors[EMBEDDING[1]], str(self.checkpoint.folder))


@dataclass(frozen=True, slots=True)
class MegatronModel:
    """A Megatron checkpoint that is a complete model. `stored`: the equations against its keys."""

    checkpoint: MegatronCheckpoint
    model: Model
    stored: tuple[Stored, ...]
    tensors: dict[str, StoredTensor]
    surplus_head: StoredTensor | None

    def check_data(self) -> list[str]:
        """What headers cannot tell: that padding is padding. Returns notes. Raises `InputError`."""
        notes = _check_surplus(self.surplus_head, self.tensors[EMBEDDING[0]], str(self.checkpoint.folder))
        vocab = self.model.dims.vocab
        for name in (EMBEDDING[0], OUTPUT[0]):
            tensor = self.tensors.get(name)
            if tensor is None or tensor.shape[0] == vocab:
                continue
            if not is_padding(tensor, vocab):
                raise InputError(
                    f"{self.checkpoint.folder}: {name} has {tensor.shape[0]} rows and the config says "
                    f"vocab_size = {vocab}; the rows beyond are not padding (they differ). "
                    f"Pass --config with the vocab_size that it was trained with."
                )
            notes.append(f"{name}: {tensor.shape[0] - vocab} rows of padding are dropped.")
        return notes


def open_huggingface(folder: Path, experts_layout: str = "auto", headless: bool = False) -> HuggingFaceModel:
    """Open a Hugging Face folder as a complete model. Raises `InputError`'s kinds, naming tensors.

    `headless`: the model has no output layer, as embedding models; without it a missing one is an error.
    """
    checkpoint = read_folder(folder)
    dims, tensors = checkpoint.dims, dict(checkpoint.tensors)
    layout = detect_experts(tensors, dims, experts_layout)
    head, surplus = _head(dims, tensors, OUTPUT[1], headless, str(folder))
    registry = _registry(dims, head, layout, tensors, "hf")
    equations, sizes = _complete(registry.equations, dims.sizes(), tensors, "hf")
    expected = {name for equation in equations for term in equation.hf for name in _names(term, sizes)}
    check_names(expected, tensors, str(folder))
    return HuggingFaceModel(checkpoint, Model(dims, sizes, equations, layout, head), tensors, surplus)


def open_megatron(
    path: Path,
    iteration: int | str | None = None,
    dims: Dims | None = None,
    experts_layout: str = "hub",
    headless: bool = False,
) -> MegatronModel:
    """Open a Megatron checkpoint as a complete model. Raises `InputError`'s kinds, naming tensors.

    `dims`: the model's sizes, where the checkpoint does not say them or a better authority is at hand.
    `experts_layout`: the HF layout that the equations are to be against.
    """
    checkpoint = read_megatron(path, iteration)
    where, remedy = str(checkpoint.folder), "Is --config that of another model?"
    tensors = dict(checkpoint.tensors)
    model, stored, surplus = complete_megatron(
        tensors, dims or checkpoint.dims(), experts_layout, headless, where, remedy
    )
    return MegatronModel(checkpoint, model, stored, tensors, surplus)


def complete_megatron(
    tensors: dict[str, StoredTensor], dims: Dims, experts_layout: str, headless: bool, where: str, remedy: str
) -> tuple[Model, tuple[Stored, ...], StoredTensor | None]:
    """(the model that stored Megatron tensors are, its equations against their keys, a spare head of a tied model).

    The spare head is taken out of `tensors`. Raises `InputError`'s kinds, naming tensors of `where`, with the `remedy`
    for tensors that are not this model's.
    """
    head, surplus = _head(dims, tensors, OUTPUT[0], headless, where)
    layout = experts_layout if dims.moe else "none"
    registry = _registry(dims, head, layout, tensors, "megatron")
    sizes = {**dims.sizes(), "padded_vocab": _rows(tensors, dims, where)}
    stored = on_disk(registry.equations, tensors)
    completed, sizes = _complete([one.equation for one in stored], sizes, tensors, "megatron")
    stored = tuple(replace(one, equation=equation) for one, equation in zip(stored, completed, strict=True))
    expected = {name for one in stored for name in _names(one.equation.megatron, sizes)}
    check_names(expected, tensors, where, remedy)
    return Model(dims, sizes, registry.equations, layout, head), stored, surplus


def _head(
    dims: Dims, tensors: dict[str, StoredTensor], name: str, headless: bool, where: str
) -> tuple[bool, StoredTensor | None]:
    """(whether the model has an output layer of its own, a spare one of a tied model: taken out of `tensors`)."""
    if dims.tied:
        return False, tensors.pop(name, None)
    if headless and name in tensors:
        raise UsageError(f"{where}: --headless, but the checkpoint has {name}. Leave the option out.")
    if not headless and name not in tensors:
        raise MissingTensors(
            f"{where} lacks {name}, and its config says that it is not tied to the embedding. "
            f"For a model without output layer (an embedding model), pass --headless."
        )
    return not headless, None


def _check_surplus(head: StoredTensor | None, embedding: StoredTensor, where: str) -> list[str]:
    if head is None:
        return []
    if not are_equal(head, embedding):
        raise InputError(
            f"{where}: the config says that {head.name} is tied to {embedding.name}, and they differ. "
            f"Set tie_word_embeddings to false to keep it, or remove the tensor."
        )
    return [f"{head.name} equals {embedding.name} and is left out: the model is tied."]


def _registry(
    dims: Dims, head: bool, layout: str, tensors: dict[str, StoredTensor], side: str
) -> MegatronMappingRegistry:
    """The mappings that hold for a checkpoint: the model's table, and of the registered ones those it has tensors for.

    A mapping of something that the model has none of (a vision tower without deepstack mergers) does not hold.
    """
    whole = mapping_registry(dims.model_type, attention_bias=dims.attention_bias, head=head)
    kept = [m for m in whole if m in TABLES[dims.model_type] or _present(m, tensors, side)]
    sizes = dims.sizes()
    kept = [m for m in kept if all(sizes.get(axis, 1) for axis in m.equation.megatron.axes)]
    return MegatronMappingRegistry(*kept).with_experts(layout if layout != "none" else "hub")


def _present(mapping: Mapping, tensors: Iterable[str], side: str) -> bool:
    equation = mapping.equation
    terms = (equation.megatron,) if side == "megatron" else equation.hf
    return any(term.match(name) is not None for term in terms for name in tensors)


def _complete(
    equations: Iterable[Equation], sizes: dict[str, int], tensors: dict[str, StoredTensor], side: str
) -> tuple[tuple[Equation, ...], dict[str, int]]:
    """Fill in what the table's sizes do not say about registered mappings: ranks for `...`, and axes of their own."""
    known = dict(sizes)
    done = []
    for equation in equations:
        for term in (equation.megatron,) if side == "megatron" else equation.hf:
            found = {n: place for n in tensors if (place := term.match(n)) is not None} if _open(term, known) else {}
            for name, place in found.items():
                known |= {a: max(known.get(a, 0), i + 1) for a, i in place.items() if a not in sizes}
                equation = equation.ranked(len(tensors[name].shape))
            for name in list(found)[:1]:
                layout = (equation.megatron if side == "megatron" else term).layout.ranked(len(tensors[name].shape))
                known |= layout.solve(tensors[name].shape, equation.known(known), name)
        done.append(equation)
    known.pop("*", None)
    return tuple(done), known


def _open(term: Term, sizes: dict[str, int]) -> bool:
    return any(axis not in sizes and axis != "*" for axis in term.axes)


def _names(term: Term, sizes: dict[str, int]) -> Iterable[str]:
    from qwen3vl_convert.mappings.registry import names

    return names(term, sizes)


def _rows(tensors: dict[str, StoredTensor], dims: Dims, where: str) -> int:
    """Rows of the stored embedding: the vocabulary, and maybe padding."""
    embedding = tensors.get(EMBEDDING[0])
    if embedding is None:
        raise MissingTensors(f"{where} lacks {EMBEDDING[0]}: it is no complete Qwen3-VL model.")
    if len(embedding.shape) != 2:
        raise MisshapenTensor(
            f"{where}: {EMBEDDING[0]}: expected ({dims.vocab} rows or more, {dims.hidden}), found {embedding.shape}."
        )
    if embedding.shape[0] < dims.vocab:
        raise UnknownTensors(
            f"{where}: {EMBEDDING[0]} has {embedding.shape[0]} rows, fewer than the config's "
            f"vocab_size = {dims.vocab}. Pass --config with the vocab_size that it was trained with."
        )
    return embedding.shape[0]
