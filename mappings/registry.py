"""Which mapping claims a name. Order never decides: two mappings that claim one name are an error."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points

from qwen3vl_convert.errors import DuplicateTensors, UnknownTensors, UsageError, listing
from qwen3vl_convert.mappings.equation import Equation, Term
from qwen3vl_convert.mappings.layout import Sizes
from qwen3vl_convert.mappings.mapping import Mapping, laid_out

ENTRY_POINTS = "qwen3vl_convert.mappings"


@dataclass(frozen=True)
class Claim:
    """The mapping that a name belongs to, and which index each axis in the name has."""

    mapping: Mapping
    term: Term
    place: dict[str, int]


@dataclass(frozen=True, init=False)
class MegatronMappingRegistry:
    """The mappings of one model, `MegatronMappingRegistry(*mappings)`; one with `**` in its names becomes several.

    Raises `UsageError` when two of them claim one name.
    """

    mappings: tuple[Mapping, ...]

    def __init__(self, *mappings: Mapping) -> None:
        object.__setattr__(self, "mappings", tuple(one for mapping in mappings for one in mapping.each()))
        self._refuse_rivals()

    def _refuse_rivals(self) -> None:
        for side in ("megatron", "hf"):
            terms = [(term, m) for m in self.mappings for term in _terms(m.equation, side)]
            for index, (term, mapping) in enumerate(terms):
                sample = term.at(dict.fromkeys(term.name_axes, 0))
                for other, rival in terms[:index] + terms[index + 1 :]:
                    if other.match(sample) is not None:
                        raise UsageError(f"{sample} is claimed twice:\n{mapping}\nand\n{rival}\nDeclare it once.")

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self.mappings)

    def __len__(self) -> int:
        return len(self.mappings)

    @cached_property
    def equations(self) -> tuple[Equation, ...]:
        return tuple(mapping.equation for mapping in self.mappings)

    def megatron_to_hf_lookup(self, name: str) -> Claim:
        """The claim on a Megatron parameter's name. Raises `UnknownTensors`, with the nearest names."""
        return self._lookup("megatron", name)

    def hf_to_megatron_lookup(self, name: str) -> Claim:
        """The claim on a HF tensor's name. Raises `UnknownTensors`, with the nearest names."""
        return self._lookup("hf", name)

    def lookup(self, name: str) -> Claim:
        """The claim on a name of either side."""
        try:
            return self._lookup("megatron", name)
        except UnknownTensors:
            return self._lookup("hf", name)

    def _lookup(self, side: str, name: str) -> Claim:
        claims = [
            Claim(mapping, term, place)
            for mapping in self.mappings
            for term in _terms(mapping.equation, side)
            if (place := term.match(name)) is not None
        ]
        if len(claims) > 1:
            raise DuplicateTensors(f"{name} is claimed twice:\n{claims[0].mapping}\nand\n{claims[1].mapping}")
        if not claims:
            raise UnknownTensors(f"{name}: no mapping claims it.{self._suggest(name)}")
        return claims[0]

    def _suggest(self, name: str) -> str:
        import difflib

        known = [term.name for e in self.equations for term in (e.megatron, *e.hf)]
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
        return f" Did you mean {' or '.join(near)}?" if near else " Use register_mapping() for tensors of your own."

    def with_experts(self, experts_layout: str) -> "MegatronMappingRegistry":
        """The same registry against another HF expert layout: hub, v5, per-expert or scrambled."""
        return MegatronMappingRegistry(*(laid_out(mapping, experts_layout) for mapping in self.mappings))

    def extended(self, mappings: Iterable[Mapping]) -> "MegatronMappingRegistry":
        return MegatronMappingRegistry(*self.mappings, *mappings)

    def hf_names(self, sizes: Sizes) -> dict[str, tuple[int, ...] | None]:
        """Every HF tensor of a model of these sizes, with its shape (None where any shape is allowed)."""
        named: dict[str, tuple[int, ...] | None] = {}
        for equation in self.equations:
            for term in equation.hf:
                shape = None if term.layout.axes == ("...",) else term.layout.shape(sizes)
                for name in names(term, sizes):
                    if name in named:
                        raise DuplicateTensors(f"{name} is claimed twice, once by {term}.")
                    named[name] = shape
        return named


def names(term: Term, sizes: Sizes) -> Iterator[str]:
    """The names of a kind, one per index of the axes that live in them."""
    places: list[dict[str, int]] = [{}]
    for axis in term.name_axes:
        if axis not in sizes:
            raise UsageError(f"{term}: the number of {axis} is not known; sizes has {listing(sizes, 40)}.")
        places = [{**place, axis: index} for place in places for index in range(sizes[axis])]
    for place in places:
        yield term.at(place)


def _terms(equation: Equation, side: str) -> tuple[Term, ...]:
    return (equation.megatron,) if side == "megatron" else equation.hf


_REGISTERED: dict[str, list[Mapping]] = {}


def register_mapping(model: str, mapping: Mapping) -> Mapping:
    """Add a mapping of your own to a model (`qwen3_vl` or `qwen3_vl_moe`); returns it.

    Raises `UsageError` when the model is unknown or another mapping claims one of its names.
    """
    from qwen3vl_convert.mappings.qwen3_vl import TABLES

    if model not in TABLES:
        raise UsageError(f"register_mapping({model!r}): expected one of {', '.join(TABLES)}.")
    registered = _REGISTERED.setdefault(model, [])
    MegatronMappingRegistry(*TABLES[model], *registered, mapping)
    registered.append(mapping)
    return mapping


def unregister_mapping(model: str, mapping: Mapping) -> None:
    """Take a mapping back that `register_mapping` added."""
    _REGISTERED.get(model, []).remove(mapping)


def mapping_registry(model: str, *, attention_bias: bool = True, head: bool = True) -> MegatronMappingRegistry:
    """The registry of a model: its table, the mappings of installed distributions, and those registered by the program.

    `attention_bias` and `head`: whether the model has biases in its text attention, and an output layer of its own
    (not tied to the embedding).
    """
    from qwen3vl_convert.mappings.qwen3_vl import ATTENTION_BIAS, OUTPUT, TABLES

    if model not in TABLES:
        raise UsageError(f"no mappings for the model {model!r}: expected one of {', '.join(TABLES)}.")
    absent = (() if attention_bias else ATTENTION_BIAS) + (() if head else OUTPUT)
    table = tuple(mapping for mapping in TABLES[model] if mapping not in absent)
    return MegatronMappingRegistry(*table, *_installed(model), *_REGISTERED.get(model, ()))


def _installed(model: str) -> Iterator[Mapping]:
    """Mappings of distributions: each entry point is a function from a model name to its mappings."""
    for entry in _entry_points(tuple(sys.path)):
        provide: Callable[[str], Iterable[Mapping]] = entry.load()
        yield from provide(model)


@cache
def _entry_points(_: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Of the distributions on sys.path, which are looked through once: that takes as long as a small conversion."""
    return tuple(entry_points(group=ENTRY_POINTS))
