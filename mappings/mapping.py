"""The named equations. Each entry is a few lines: which axes of a Megatron parameter are which axes of which HF
tensors.

Keywords are Megatron-Bridge's, so a table written for it ports line by line: `*` in a name stands for an index, `**`
for the tensors that a model's own table has there, and where the kind, that table or Megatron-Core's module implies the
axes (`implied`) the names alone are enough. Anything else writes them: `AutoMapping("a.weight : c h", "b.weight : c
h")`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qwen3vl_convert.errors import MisshapenTensor, UsageError
from qwen3vl_convert.mappings.equation import Equation, Term, check_shape
from qwen3vl_convert.mappings.layout import Sizes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    Tensors = Tensor | MappingOf[str, Tensor]

EXPERT_LAYOUTS = ("hub", "v5", "per-expert", "scrambled")
"""How experts lie in HF folders: as published, as transformers >= 5.2 saves them, one by one, and as 5.0 and 5.1 saved
them.
"""

FIXED = {"s": 2, "t": 3}
"""Axes whose size is the same in every model: gate and up; q, k and v."""

ANYTHING = "**"
"""Megatron-Bridge's wildcard for the rest of a name, `norm.**` for `norm.weight` and `norm.bias`."""

_BRACES = re.compile(r"{(\w+)}")
_WILDCARD = re.compile(r"(?<!\*)\*(?!\*)")
_STANDS_FOR = (
    (re.compile(r"(language_model\.decoder|language_model|^decoder|^model)\.layers\.$"), "l"),
    (re.compile(r"(vision_model\.decoder\.layers|visual\.blocks)\.$"), "b"),
    (re.compile(r"deepstack_merger_list\.$"), "m"),
    (re.compile(r"experts\.([\w.]*(weight|bias))?$"), "e"),
)


@dataclass(frozen=True)
class Mapping(ABC):
    """Base of the named equations; a subclass is its keywords and the equation they stand for."""

    parts: ClassVar[tuple[str, ...]] = ("hf_param",)
    """The keywords that name HF tensors, in the order of the equation."""

    megatron_param: str

    def __post_init__(self) -> None:
        for one in self.each():
            one.equation  # noqa: B018  a wrong mapping is refused when it is declared

    def each(self) -> "tuple[Mapping, ...]":
        """The mappings of one parameter each that this one stands for: itself, unless its names have `**`."""
        if ANYTHING not in self.megatron_param:
            return (self,)
        from qwen3vl_convert.mappings.implied import rests

        keywords = {"megatron_param": self.megatron_param, **{part: getattr(self, part) for part in self.parts}}
        return tuple(
            replace(self, **{keyword: name.replace(ANYTHING, rest) for keyword, name in keywords.items()})
            for rest in rests(*_all_named(*keywords.values()))
        )

    @cached_property
    @abstractmethod
    def equation(self) -> Equation:
        """What the keywords stand for."""

    def __str__(self) -> str:
        equations = "\n".join(str(one.equation) for one in self.each())
        return f"{type(self).__name__}\n{equations}"

    def hf_to_megatron(self, hf_weights: "Tensors", sizes: Sizes | None = None, **place: int) -> "Tensor":
        """The Megatron parameter made of HF tensors (one, or a dict by keyword: `{"q": ..., "k": ..., "v": ...}`).

        `sizes` gives what shapes do not tell (for `QKVMapping`: kv, g or d). `place` picks an entry of an axis that is
        a dimension of the HF tensor and an index in Megatron's name: `e=3` for expert 3 of a stack. Returns a new
        contiguous tensor of the same dtype. Raises `MisshapenTensor`.
        """
        tensors = self._by_part(hf_weights)
        equation = self.equation.ranked(next(iter(tensors.values())).dim())
        sizes = equation.solve({name: tuple(t.shape) for name, t in tensors.items()}, FIXED | dict(sizes or {}))
        first = next(iter(tensors.values()))
        out = first.new_empty(equation.megatron.layout.shape(equation.full(sizes)))
        for pair, part in zip(equation.pairs(sizes, self._chosen(equation, place)), equation.hf, strict=True):
            pair.megatron.of(out).copy_(pair.hf.of(tensors[part.name]))
        return out

    def megatron_to_hf(self, megatron_weights: "Tensor", sizes: Sizes | None = None) -> "Tensors":
        """The HF tensors that a whole Megatron parameter is made of: one, or a dict by keyword.

        `sizes` as for `hf_to_megatron`. A stack of experts comes back as the slice of this expert.
        """
        equation = _without_names(self.equation.ranked(megatron_weights.dim()))
        known = equation.known(FIXED | dict(sizes or {}))
        shape = tuple(megatron_weights.shape)
        known |= {
            a: s for a, s in equation.megatron.layout.solve(shape, known, equation.megatron.name).items() if a != "*"
        }
        self._need(equation, known)
        check_shape(equation.megatron, equation.megatron.name, shape, equation.full(known))
        out = [megatron_weights.new_empty(part.layout.shape(known)) for part in equation.hf]
        for pair, tensor in zip(equation.pairs(known, dict.fromkeys(equation.place_axes, 0)), out, strict=True):
            pair.hf.of(tensor).copy_(pair.megatron.of(megatron_weights))
        return out[0] if len(out) == 1 else dict(zip(self.parts, out, strict=True))

    def _by_part(self, weights: "Tensors") -> dict[str, "Tensor"]:
        given = weights if isinstance(weights, MappingOf) else {self.parts[0]: weights}
        if set(given) != set(self.parts[: len(self.equation.hf)]):
            raise UsageError(f"{self}\n  expected the tensors {', '.join(self.parts)}, found {', '.join(given)}.")
        return {term.name: given[part] for part, term in zip(self.parts, self.equation.hf, strict=True)}

    @staticmethod
    def _chosen(equation: Equation, place: MappingOf[str, int]) -> dict[str, int]:
        stacked = {a for part in equation.hf for a in part.layout.axes} & set(equation.place_axes)
        if stacked - place.keys():
            raise UsageError(f"{equation}\n  say which entry: {', '.join(f'{a}=' for a in sorted(stacked))}")
        return dict.fromkeys(equation.place_axes, 0) | dict(place)

    @staticmethod
    def _need(equation: Equation, known: Sizes) -> None:
        unknown = {a for part in equation.hf for a in part.layout.axes} - known.keys()
        if unknown:
            raise UsageError(f"{equation}\n  needs the size of {', '.join(sorted(unknown))}: pass sizes={{...}}.")


def _without_names(equation: Equation) -> Equation:
    """The equation of one place: axes that live in Megatron's name are no dimensions of the HF tensors either."""
    terms = []
    for part in equation.hf:
        layout = part.layout
        for axis in equation.megatron.name_axes:
            layout = layout.without(axis) if axis in layout.axes else layout
        terms.append(Term(part.name, layout))
    megatron = Term(re.sub(r"{\w+}", "0", equation.megatron.name), equation.megatron.layout)
    terms = [Term(re.sub(r"{\w+}", "0", t.name), t.layout) for t in terms]
    return replace(equation, megatron=megatron, hf=tuple(terms))


def _term(text: str, implied: str | None, beside: str = "") -> Term:
    """`name` or `name : layout`; a bare name takes the axes that the kind implies. `beside`: Megatron's, for HF's."""
    named = _named_wildcards(text, beside)
    if " : " in named:
        return Term.parse(named)
    if ANYTHING in named:
        raise stands_for_several(text)
    if implied is None:
        raise UsageError(
            f"{text!r}: nothing implies its axes beside written ones; write them, as in {with_axes(text)}."
        )
    return Term.parse(f"{named} : {implied}")


def stands_for_several(text: str) -> UsageError:
    """That a name with `**` has no equation of its own."""
    return UsageError(f"{text}: `**` stands for several tensors, which have an equation each: see each().")


def with_axes(name: str) -> str:
    """How axes are written after a name, for errors: two of a weight, one of a bias."""
    return f"`{name} : {_bare(name, 'c h')}`"


def _named_wildcards(text: str, beside: str = "") -> str:
    """Megatron-Bridge's `*` in names as axes: `layers.*.x` as `layers.{l}.x`.

    A `*` that stands in no known place is the axis that Megatron's name, `beside`, has at the `*` of the same number.
    """
    name, colon, layout = text.partition(" : ")
    theirs = dict(enumerate(_BRACES.findall(_named_wildcards(beside).partition(" : ")[0]))) if beside else {}
    count = 0
    while star := _WILDCARD.search(name):
        known = (axis for pattern, axis in _STANDS_FOR if pattern.search(name[: star.start()]))
        axis = next(known, theirs.get(count, f"index{count}"))
        name, count = f"{name[: star.start()]}{{{axis}}}{name[star.end() :]}", count + 1
    return name + colon + layout


def _all_named(megatron: str, *hf: str) -> tuple[str, ...]:
    return (_named_wildcards(megatron), *(_named_wildcards(name, megatron) for name in hf))


def _bare(text: str, weight: str) -> str:
    """The axes that a kind implies for a weight, or for its bias: the first dimension alone."""
    is_bias = re.search(r"bias(\*|{\w+})?$", text.partition(" : ")[0])
    return re.sub(r"(\([^)]*\)|\S+) .*", r"\1", weight) if is_bias else weight


@dataclass(frozen=True)
class AutoMapping(Mapping):
    """One tensor, one parameter. Which axes are cut follows from their names; `padded` is one that Megatron may pad.

    Names without axes have those that a model's own table or the kind of Megatron-Core's module implies; `UsageError`
    where neither does.
    """

    hf_param: str
    padded: str | None = field(default=None, kw_only=True)

    @cached_property
    def equation(self) -> Equation:
        if not any(" : " in text for text in (self.megatron_param, self.hf_param)):
            from qwen3vl_convert.mappings.implied import implied

            known = implied(*_all_named(self.megatron_param, self.hf_param))
            return known if self.padded is None else replace(known, padded=self.padded)
        return Equation(
            _term(self.megatron_param, None), (_term(self.hf_param, None, self.megatron_param),), padded=self.padded
        )


@dataclass(frozen=True)
class ReplicatedMapping(Mapping):
    """One tensor, one parameter, the same on every tensor parallel rank; any shape when no axes are written."""

    hf_param: str

    @cached_property
    def equation(self) -> Equation:
        return Equation(
            _term(self.megatron_param, "..."), (_term(self.hf_param, "...", self.megatron_param),), uncut=True
        )


@dataclass(frozen=True)
class QKVMapping(Mapping):
    """Separate q, k, v; Megatron keeps, per key-value group, its query heads, then its key, then its value."""

    parts: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    q: str
    k: str
    v: str

    @cached_property
    def equation(self) -> Equation:
        layouts = ("(kv g d) h", "(kv d) h", "(kv d) h")
        parts = zip((self.q, self.k, self.v), layouts, strict=True)
        hf = tuple(_term(t, _bare(t, layout), self.megatron_param) for t, layout in parts)
        return Equation(_term(self.megatron_param, _bare(self.megatron_param, "(kv * d) h")), hf)


@dataclass(frozen=True)
class ConcatenatedQKVMapping(Mapping):
    """The vision tower's `attn.qkv`, all q then all k then all v; Megatron keeps q, k, v per head."""

    hf_param: str

    @cached_property
    def equation(self) -> Equation:
        ours = _term(self.megatron_param, _bare(self.megatron_param, "(n t vd) v"))
        return Equation(ours, (_term(self.hf_param, _bare(self.hf_param, "(t n vd) v"), self.megatron_param),))


@dataclass(frozen=True)
class GatedMLPMapping(Mapping):
    """Separate gate and up; Megatron keeps all gate rows, then all up rows (per rank: its gate rows, its up rows)."""

    parts: ClassVar[tuple[str, ...]] = ("gate", "up")
    gate: str
    up: str

    @cached_property
    def equation(self) -> Equation:
        width = "i" if "{e}" in _named_wildcards(self.megatron_param) else "f"  # an expert's, or a dense layer's
        hf = tuple(_term(t, _bare(t, f"{width} h"), self.megatron_param) for t in (self.gate, self.up))
        return Equation(_term(self.megatron_param, _bare(self.megatron_param, f"(* {width}) h")), hf, apart="*")


@dataclass(frozen=True)
class _ExpertMapping(AutoMapping):
    """An expert parameter: Megatron's name carries the expert, the HF side depends on who wrote the folder.

    The name may be one expert's, `...experts.linear_fc1.weight3` (counted over all ranks): then that is the expert that
    `hf_to_megatron` picks, and the equation is that of all of them.
    """

    experts_layout: str = "hub"

    def __post_init__(self) -> None:
        if self.experts_layout not in EXPERT_LAYOUTS:
            raise UsageError(f"experts layout {self.experts_layout!r}: expected one of {', '.join(EXPERT_LAYOUTS)}.")
        if self.padded is not None:
            raise UsageError(f"{self.megatron_param}: padded={self.padded!r}: Megatron pads no axis of an expert.")
        super().__post_init__()

    def laid_out(self, experts_layout: str) -> Self:
        """The same mapping against another HF layout."""
        return replace(self, experts_layout=experts_layout)

    def hf_to_megatron(  # type: ignore[override]  # what the base has second, `sizes`, may stand second here too
        self,
        hf_weights: "Tensors",
        megatron_module: "Module | Sizes | None" = None,
        *,
        sizes: Sizes | None = None,
        **place: int,
    ) -> "Tensor":
        """One expert's parameter; with a module of Megatron-Core's, as this rank holds it.

        `hf_weights`: the tensor of all experts; or one expert's own, a dict by keyword (`{"gate": ..., "up": ...}`).
        The expert is the one in the mapping's name, or `e=3`. A module's config gives the sizes, and its process group
        the part that expert tensor parallelism leaves to this rank; nothing is communicated. Sizes alone may stand in
        its place. Raises `MisshapenTensor`.
        """
        if isinstance(hf_weights, MappingOf) and self.experts_layout in ("hub", "v5"):
            return self.laid_out("per-expert").hf_to_megatron(hf_weights, megatron_module, sizes=sizes)
        tensors = self._by_part(hf_weights)
        place = ({} if self.expert is None else {"e": self.expert}) | place
        module, sizes = _module_and_sizes(megatron_module, sizes)
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        full = self._solved(shapes, FIXED | _sizes_of(module) | dict(sizes))
        local, part = self._local(full, module)
        chosen = self._chosen(self.equation, place)
        first = next(iter(tensors.values()))
        out = first.new_empty(self.equation.megatron.layout.shape(self.equation.full(local)))
        views = zip(self.equation.pairs(full, chosen), self.equation.pairs(local, chosen), strict=True)
        for (theirs, ours), term in zip(views, self.equation.hf, strict=True):
            here = theirs.hf.narrow(_CUT, part * local[_CUT], local[_CUT])
            ours.megatron.of(out).copy_(here.of(tensors[term.name]))
        return out

    def megatron_to_hf(  # type: ignore[override]
        self,
        megatron_weights: "Tensor",
        megatron_module: "Module | Sizes | None" = None,
        *,
        sizes: Sizes | None = None,
    ) -> "Tensors":
        """One expert's slice of the HF tensor of all, or its own tensors by keyword.

        With a module `megatron_weights` is what this rank holds, and all ranks of its expert tensor parallel group call
        this together and get the whole.
        """
        module, sizes = _module_and_sizes(megatron_module, sizes)
        parts = _gathered(megatron_weights, _group_of(module))
        equation = _without_names(self.equation)
        known = equation.known(FIXED | _sizes_of(module) | dict(sizes))
        known = {axis: size for axis, size in known.items() if axis != _CUT or len(parts) == 1}
        shape, name = tuple(megatron_weights.shape), equation.megatron.name
        local = known | {a: n for a, n in equation.megatron.layout.solve(shape, known, name).items() if a != "*"}
        self._need(equation, local)
        full = local | {_CUT: local[_CUT] * len(parts)}
        check_shape(equation.megatron, name, shape, equation.full(local))
        out = [megatron_weights.new_empty(term.layout.shape(full)) for term in equation.hf]
        place = dict.fromkeys(equation.place_axes, 0)
        for number, part in enumerate(parts):
            views = zip(equation.pairs(full, place), equation.pairs(local, place), out, strict=True)
            for theirs, ours, tensor in views:
                theirs.hf.narrow(_CUT, number * local[_CUT], local[_CUT]).of(tensor).copy_(ours.megatron.of(part))
        return out[0] if len(out) == 1 else dict(zip(self.parts, out, strict=True))

    def _validate_patterns(self, *args: Any, **kwargs: Any) -> None:
        """Megatron-Bridge's check that both names have as many wildcards, which these have not: an expert is an index
        in the one and a dimension in the other. What must hold is that the equation is a bijection.
        """
        self.equation  # noqa: B018  raises UsageError

    @cached_property
    def expert(self) -> int | None:
        """The expert that Megatron's name is of, if it is of one."""
        found = _ONE_EXPERT.search(self.megatron_param.partition(" : ")[0])
        return None if found is None else int(found[2])

    @property
    def _pattern(self) -> str:
        """Megatron's name with the expert as an axis."""
        name, colon, layout = self.megatron_param.partition(" : ")
        return _ONE_EXPERT.sub(r"\1{e}", name) + colon + layout

    def _solved(self, shapes: MappingOf[str, tuple[int, ...]], known: Sizes) -> dict[str, int]:
        """Sizes of all axes; where the shapes are those of the other fused layout, the error says so."""
        try:
            return self.equation.solve(shapes, known)
        except MisshapenTensor as error:
            other = {"hub": "v5", "v5": "hub"}.get(self.experts_layout)
            if other is not None and self.laid_out(other)._fits(shapes, known):
                remedy = f'mapping.laid_out("{other}")'
                raise MisshapenTensor(f'{error} That is the "{other}" layout: use {remedy}.') from None
            raise

    def _fits(self, shapes: MappingOf[str, tuple[int, ...]], known: Sizes) -> bool:
        try:
            self.equation.solve(shapes, known)
        except MisshapenTensor:
            return False
        return True

    def _local(self, full: dict[str, int], module: Any) -> tuple[dict[str, int], int]:
        """(sizes of what this rank holds, which of the parts of the cut axis that is)."""
        group = _group_of(module)
        part, parts = (0, 1) if group is None else (group.rank(), group.size())
        if full[_CUT] % parts:
            raise UsageError(f"{self}\n  expert tensor parallel size {parts} does not divide {_CUT} = {full[_CUT]}.")
        return full | {_CUT: full[_CUT] // parts}, part

    def _one_by_one(self, projection: str, layout: str) -> Term:
        return _term(f"{self.hf_param.rpartition('.')[0]}.{{e}}.{projection}.weight : {layout}", None, self._pattern)


_CUT = "i"
"""The axis of an expert that expert tensor parallelism divides."""
_ONE_EXPERT = re.compile(r"(experts\.[\w.]*(?:weight|bias))(\d+)$")


def _module_and_sizes(given: Any, sizes: Sizes | None) -> tuple[Any, Sizes]:
    """(module, sizes) from a second argument that may be either, as Megatron-Bridge's is a module and ours sizes."""
    return (None, {**given, **(sizes or {})}) if isinstance(given, MappingOf) else (given, sizes or {})


def _sizes_of(module: Any) -> dict[str, int]:
    """Axes that the config of a module of Megatron-Core's gives."""
    config = getattr(module, "config", None)
    named = {"h": "hidden_size", "i": "moe_ffn_hidden_size", "e": "num_moe_experts"}
    found = {axis: getattr(config, name, None) for axis, name in named.items()}
    return {axis: size for axis, size in found.items() if size}


def _group_of(module: Any) -> Any:
    """The expert tensor parallel group: the module's own, else Megatron-Core's; None where there is none."""
    own = getattr(module, "tp_group", None) or getattr(module, "_tp_group", None)
    if module is None or own is not None:
        return own
    try:
        from megatron.core import parallel_state
    except ImportError:
        return None
    return parallel_state.get_expert_tensor_parallel_group(check_initialized=False)


def _gathered(weights: "Tensor", group: Any) -> list["Tensor"]:
    """What each rank of a group holds."""
    if group is None or group.size() == 1:
        return [weights]
    import torch.distributed

    parts = [weights.new_empty(weights.shape) for _ in range(group.size())]
    torch.distributed.all_gather(parts, weights.contiguous(), group=group)
    return parts


@dataclass(frozen=True)
class ExpertMLPGateUpProjMapping(_ExpertMapping):
    """Gate and up of one expert: `gate_up_proj` of all experts, or gate_proj and up_proj of each."""

    @cached_property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("hf_param",) if self.experts_layout in ("hub", "v5") else ("gate", "up")

    @cached_property
    def equation(self) -> Equation:
        if self.experts_layout == "per-expert":
            hf = tuple(self._one_by_one(projection, "i h") for projection in ("gate_proj", "up_proj"))
            return Equation(_term(self._pattern, "(* i) h"), hf, apart="*")
        if self.experts_layout == "scrambled":
            # transformers 5.0 cut the published [h, 2i] across h: "gate" has the first half of the rows, "up" the rest.
            hf = tuple(self._one_by_one(projection, "half (s i)") for projection in ("gate_proj", "up_proj"))
            return Equation(_term(self._pattern, "(s i) (* half)"), hf, apart="s")
        fused = "e h (s i)" if self.experts_layout == "hub" else "e (s i) h"
        return Equation(_term(self._pattern, "(s i) h"), (_term(self.hf_param, fused, self._pattern),), apart="s")


@dataclass(frozen=True)
class ExpertMLPDownProjMapping(_ExpertMapping):
    """Down of one expert: `down_proj` of all experts, or of each."""

    @cached_property
    def equation(self) -> Equation:
        if self.experts_layout == "per-expert":
            hf = self._one_by_one("down_proj", "h i")
        elif self.experts_layout == "scrambled":
            hf = self._one_by_one("down_proj", "i h")
        else:
            hf = _term(self.hf_param, "e i h" if self.experts_layout == "hub" else "e h i", self._pattern)
        return Equation(_term(self._pattern, "h i"), (hf,))


def FusedGatedExpertMapping(
    megatron_param: str, hf_param: str, *, transpose_on_export: bool = False
) -> ExpertMLPGateUpProjMapping:
    """What later releases of Megatron-Bridge call `ExpertMLPGateUpProjMapping`. Their `transpose_on_export` says that
    the folder has each matrix as published, [in, out]: "hub"; without it [out, in]: "v5".
    """
    return ExpertMLPGateUpProjMapping(megatron_param, hf_param, "hub" if transpose_on_export else "v5")


def FusedExpertMapping(
    megatron_param: str, hf_param: str, *, transpose_on_export: bool = False
) -> ExpertMLPDownProjMapping:
    """The same for `ExpertMLPDownProjMapping`."""
    return ExpertMLPDownProjMapping(megatron_param, hf_param, "hub" if transpose_on_export else "v5")


def laid_out(mapping: Any, experts_layout: str) -> Any:
    """A mapping against another HF expert layout; mappings of other things are returned as they are."""
    return mapping.laid_out(experts_layout) if isinstance(mapping, _ExpertMapping) else mapping
