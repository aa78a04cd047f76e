"""Both checkpoints as the same Hugging Face tensors: any box of one, as the folder and as Megatron's chunks have it.

The equations align them, as for a conversion; `Assembled` carries the conversion out for one box in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qwen3vl_convert.assembled import Assembled
from qwen3vl_convert.errors import ConvertError, MisshapenTensor, MissingTensors
from qwen3vl_convert.mappings import Layout
from qwen3vl_convert.megatron.checkpoint import read_megatron
from qwen3vl_convert.model import EMBEDDING, OUTPUT, HuggingFaceModel, MegatronModel, open_megatron
from qwen3vl_convert.plan import Box, Link, Target, links, make_plan, pieces
from qwen3vl_convert.reader import read_box
from qwen3vl_convert.storage import DTYPES, Chunk, StoredTensor
from qwen3vl_convert.strided import Array
from qwen3vl_convert.verify.weights.bits import rounded

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sides:
    """The tensors that both checkpoints have. `tolerant`: of different dtypes the wider one is rounded to the other."""

    theirs: dict[str, StoredTensor]
    ours: Assembled
    tolerant: bool = False

    def dtypes(self, name: str) -> tuple[str, str] | None:
        """(HF, Megatron) where they differ."""
        pair = self.theirs[name].dtype, " and ".join(self.ours.dtypes(name))
        return None if pair[0] == pair[1] else pair

    def common(self, name: str) -> tuple[str, ...]:
        """The dtypes in which the elements can be compared: one, none, or of bfloat16 and float16 either."""
        theirs, ours = self.theirs[name].dtype, self.ours.dtypes(name)
        if (theirs,) == ours:
            return ours
        if not self.tolerant or len(ours) > 1:
            return ()
        widths = [DTYPES[dtype].itemsize for dtype in (theirs, ours[0])]
        if widths[0] == widths[1]:
            return ours[0], theirs
        return (theirs,) if widths[0] < widths[1] else ours

    def read(self, name: str, box: Box, dtype: str) -> tuple[Array, Array]:
        """(theirs, ours): the bits of a box in a common dtype."""
        return self.read_theirs(name, box, dtype), self.read_ours(name, box, dtype)

    def read_theirs(self, name: str, box: Box, dtype: str) -> Array:
        tensor = self.theirs[name]
        return self._in(read_box(tensor, box), name, tensor.dtype, dtype)

    def read_ours(self, name: str, box: Box, dtype: str, linked: tuple[Link, ...] | None = None) -> Array:
        (stored,) = self.ours.dtypes(name)
        return self._in(self.ours.read(name, box, stored, linked), name, stored, dtype)

    def _in(self, bits: Array, name: str, source: str, target: str) -> Array:
        """Bits in a common dtype: untouched where both sides have it; else every NaN is made the same."""
        return bits if self.dtypes(name) is None else rounded(bits, source, target)

    def pieces(self, name: str, limit: int) -> Iterator[Box]:
        """Contiguous boxes of at most `limit` bytes that tile a tensor, in order."""
        tensor = self.theirs[name]
        whole = Chunk((0,) * len(tensor.shape), tensor.shape, Path(), 0)
        return pieces(whole, DTYPES[tensor.dtype].itemsize, limit)

    def key(self, name: str) -> str:
        """The name on Megatron's disk."""
        first, *others = self.ours.keys(name)
        return f"{first} (and {len(others)} more)" if others else first


def open_beside(
    theirs: HuggingFaceModel, path: Path, iteration: int | str | None = None, headless: bool = False
) -> MegatronModel:
    """A Megatron checkpoint as the model that a HF folder is. Raises `InputError`'s kinds.

    One that says that its head is tied, and has none, is opened even if the folder's is not: `align` compares that
    head with the embedding.
    """
    dims, layout = theirs.model.dims, theirs.model.experts_layout
    chosen = "hub" if layout == "none" else layout
    try:
        return open_megatron(path, iteration, dims, chosen, headless)
    except MissingTensors:
        checkpoint = read_megatron(path, iteration)
        says_tied = checkpoint.config is not None and checkpoint.dims().tied
        if dims.tied or not says_tied or OUTPUT[0] in checkpoint.tensors:
            raise
    return open_megatron(path, iteration, replace(dims, tied=True), chosen, headless)


def align(theirs: HuggingFaceModel, ours: MegatronModel, tolerant: bool = False) -> Sides:
    """Both sides by HF name, proven complete: every element of the one has its counterpart in the other.

    A head that only one side has, because the other is tied, stands beside the other's embedding.
    """
    linked = links([one.equation for one in ours.stored], ours.model.sizes, ours.tensors, to="hf")
    tensors, source = dict(theirs.tensors), dict(ours.tensors)
    extra = tensors.pop(OUTPUT[1], None) if not ours.model.output_layer else None
    _check_shapes(tensors, linked)
    make_plan(source, Target(tensors, {}), linked, _padding(ours))
    aligned = {name: tuple(linked[name]) for name in tensors}
    if extra is not None:
        tensors[OUTPUT[1]] = extra
        aligned[OUTPUT[1]] = aligned[EMBEDDING[1]]
    elif ours.surplus_head is not None:
        tensors[OUTPUT[1]] = replace(tensors[EMBEDDING[1]], name=OUTPUT[1])
        source[OUTPUT[0]] = ours.surplus_head
        aligned[OUTPUT[1]] = (_head_link(ours.surplus_head, ours),)
    return Sides(tensors, Assembled(source, aligned), tolerant)


def _check_shapes(tensors: dict[str, StoredTensor], linked: dict[str, list[Link]]) -> None:
    for name, tensor in tensors.items():
        if any(link.target.shape != tensor.shape for link in linked.get(name, ())):
            raise ConvertError(f"{name}: expected {linked[name][0].target.shape}, found {tensor.shape}.")


def _padding(ours: MegatronModel) -> dict[str, int]:
    surplus = (ours.model.padded_vocab - ours.model.dims.vocab) * ours.model.dims.hidden
    return {name: surplus for name in (EMBEDDING[0], OUTPUT[0]) if name in ours.tensors}


def _head_link(head: StoredTensor, ours: MegatronModel) -> Link:
    """The rows of a spare head that stand for the vocabulary."""
    vocab, hidden = ours.model.dims.vocab, ours.model.dims.hidden
    if len(head.shape) != 2 or head.shape[0] < vocab or head.shape[1] != hidden:
        raise MisshapenTensor(
            f"{ours.checkpoint.folder}: {head.name}: expected ({vocab} rows or more, {hidden}), found {head.shape}. "
            f"The model is tied: remove the tensor."
        )
    layout = Layout("vocab h")
    rows = layout.open({"vocab": head.shape[0], "h": hidden}).narrow("vocab", 0, vocab)
    return Link(layout.open({"vocab": vocab, "h": hidden}), head.name, rows)
