"""Every item of the API documents against the code: each class, base, method, argument, default, type, attribute,
value and error.

`DIFFERENCES` is the whole list of what is otherwise, each with its reason; an item that is not in it must hold, and
one that is in it must not. So a name that goes missing, a default that changes and a difference that is mended are all
red. What these pages do not say is in `tests/models/test_api.py`.
"""

import ast
import builtins
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

import pytest
import torch

from api.documents import DOCUMENTS, LOST, Entry, Item, entries, items
from qwen3vl_convert.make import SIZES

ROOMS = {
    "inference_model": ("qwen3vl_convert.inference",),
    "megatron_bridge": ("qwen3vl_convert.models", "qwen3vl_convert.mappings"),
    "megatron_model": ("qwen3vl_convert.models",),
    "megatron_provider": ("qwen3vl_convert.models",),
    "megatron_vision_model": ("qwen3vl_convert.models", "qwen3vl_convert.models.vision_model"),
}
"""Where the names of each document are, and those of its bases."""

NUMBERS = {
    "inference_model": 301,
    "megatron_bridge": 46,
    "megatron_model": 91,
    "megatron_provider": 269,
    "megatron_vision_model": 89,
}
"""Items read from each document: fewer would mean that the reader has lost some."""

_OTHER_SIGNATURE = "described in the docstring, and no argument of the signature that the same page prints"
DIFFERENCES = {
    "inference_model": {
        "Qwen3VLVisionModel.num_grid_per_side value 0": (
            "what the documentation tool made of int(2304**0.5); it is 48"
        ),
        "Qwen3VLVisionModel.deepstack_visual_indexes value None": (
            "that is the argument; the attribute is what it stands for, (8, 16, 24)"
        ),
    },
    "megatron_model": {
        "Qwen3VLModel describes language_rotary_percent": _OTHER_SIGNATURE + "; it is `rotary_percent` of the provider",
        "Qwen3VLModel.forward describes image_data": _OTHER_SIGNATURE + "; they are `pixel_values`",
        "Qwen3VLModel.forward describes video_start_index": _OTHER_SIGNATURE + "; the token ids say it",
    },
    "megatron_vision_model": {
        "Qwen3VLVisionModel.forward describes x": _OTHER_SIGNATURE + "; it is `hidden_states`",
        "Qwen3VLVisionModel.forward describes packed_seq_params": _OTHER_SIGNATURE + "; made from `grid_thw`",
        "Qwen3VLVisionModel.forward returns torch.Tensor": (
            "a pair, as Megatron-Bridge's own: the features and those of the deepstack mergers, which the text model "
            "needs; see its docstring"
        ),
    },
}  # fmt: skip

LOST_NAMES = {"2048": "hidden_size", "2304": "out_hidden_size"}
"""Two attributes of the provider whose lines the page has lost, both with `hidden` in them, by their values."""

UNEQUAL_NAMES = {"Tensors": "Tensor | Dict", "GPTModel": "MCoreGPTModel"}
"""Aliases in our annotations, and what they are in the documents' terms."""


# ---- the code --------------------------------------------------------------------------------------------------------


def named(document: str, name: str) -> Any:
    for room in map(importlib.import_module, ROOMS[document]):
        if hasattr(room, name):
            return getattr(room, name)
    raise AssertionError(f"{name} is in none of {', '.join(ROOMS[document])}")


def target(document: str, item: Item) -> Any:
    """The class, function or method that an item is of."""
    name, *rest = item.path.split(".")
    found = named(document, name)
    for one in rest:
        found = inspect.getattr_static(found, one)
    return found


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(inspect.unwrap(function)).parameters)
    found.pop("self", None)
    return found


@cache
def instance(name: str) -> Any:
    """One of an inference class, with the documented defaults wherever there are any, without memory."""
    sizes = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 128, "layer_id": 0}
    needed: dict[str, dict[str, Any]] = {
        "Qwen3VisionMLP": {"in_features": 8, "hidden_features": 16},
        "Qwen3VisionAttention": {"embed_dim": 8, "num_heads": 2},
        "Qwen3VisionBlock": {"dim": 8, "num_heads": 2, "intermediate_dim": 16},
        "Qwen3VLVisionPatchMerger": {"dim": 8, "context_dim": 8},
        "Qwen3VLAttention": sizes,
        "Qwen3VLDecoderLayer": {**sizes, "intermediate_size": 16},
        "Qwen3VLForConditionalGeneration": {"config": SIZES["tiny"]},
    }
    with torch.device("meta"):
        return named("inference_model", name)(**needed.get(name, {}))


# ---- the checks: what is wrong with an item, or nothing --------------------------------------------------------------


def is_there(document: str, item: Item) -> str | None:
    found = target(document, item)
    if item.aspect == "class":
        return None if inspect.isclass(found) else "no class"
    return None if callable(found) else "cannot be called"


def data(document: str, item: Item) -> str | None:
    return None if isinstance(named(document, item.path), logging.Logger) else "no logger"


def is_base(document: str, item: Item) -> str | None:
    module, _, name = item.name.rpartition(".")
    if module.startswith("megatron.bridge"):
        base = named(document, name)
    else:
        base = getattr(importlib.import_module(module), name)
    return None if issubclass(target(document, item), base) else f"no {name}"


def argument(document: str, item: Item) -> str | None:
    """In its place, and by its name; one with stars anywhere."""
    found = parameters(target(document, item))
    if item.name.startswith("*"):
        kind = inspect.Parameter.VAR_KEYWORD if item.name.startswith("**") else inspect.Parameter.VAR_POSITIONAL
        return None if any(one.kind is kind for one in found.values()) else f"found {list(found)}"
    if list(found)[int(item.text) : int(item.text) + 1] != [item.name]:
        return f"found {list(found)}"
    both = found[item.name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return None if both else "cannot be given by place and by name"


def default(document: str, item: Item) -> str | None:
    found = parameters(target(document, item))[item.name].default
    return None if same(found, ast.literal_eval(item.text)) else f"found {found!r}"


def kind(document: str, item: Item) -> str | None:
    """Ours may take more than is documented."""
    if item.name:
        ours = parameters(target(document, item))[item.name].annotation
        return accepts(ours, item.text)
    owner, _, name = item.path.rpartition(".")
    found = inspect.getattr_static(named(document, owner), name, None)
    if isinstance(found, property):
        return accepts(inspect.signature(found.fget).return_annotation, item.text)  # type: ignore[arg-type]
    return accepts(field_of(named(document, owner), name).type, item.text)


def returns(document: str, item: Item) -> str | None:
    """Ours may promise more exactly than is documented."""
    ours = inspect.signature(inspect.unwrap(target(document, item))).return_annotation
    return accepts(item.text, ours)


def describes(document: str, item: Item) -> str | None:
    """`*_input_mask` stands for several."""
    pattern = item.name.replace("*", r"\w+")
    found = parameters(target(document, item))
    return None if any(re.fullmatch(pattern, name) for name in found) else f"found {list(found)}"


def attribute(document: str, item: Item) -> str | None:
    owner, _, name = item.path.rpartition(".")
    found = named(document, owner)
    if is_dataclass(found):
        return None if field_of(found, name) else "no field"
    got = getattr(instance(owner), name, None)
    return None if got is not None or name == "quant_config" else "not there"


def is_property(document: str, item: Item) -> str | None:
    return None if isinstance(target(document, item), property) else "no property"


def value(document: str, item: Item) -> str | None:
    """Of a dataclass a field's default, else that of an instance made with the defaults."""
    owner, _, name = item.path.rpartition(".")
    wanted = ast.literal_eval(item.text)
    found = named(document, owner)
    if not is_dataclass(found):
        got = getattr(instance(owner), name)
        return None if same(got, wanted) else f"found {got!r}"
    field = field_of(found, name if name != LOST else LOST_NAMES[item.text])
    if wanted == "field(…)":
        return None if field.default_factory is not MISSING else "no default_factory"
    return None if same(field.default, wanted) else f"found {field.default!r}"


def raises(document: str, item: Item) -> str | None:
    """By doing what the document says raises."""
    error: type[Exception] = getattr(builtins, item.name)
    try:
        ERRORS[item.path, item.name](target(document, item))
    except error:
        return None
    return "did not raise"


ERRORS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("_maybe_pad_vision_sequence_for_cuda_graph", "ValueError"): lambda pad: pad(
        torch.zeros(5, 2), torch.zeros(5, 1, 1, 2), 5, 4
    ),
}

CHECKS: dict[str, Callable[[str, Item], str | None]] = {
    "class": is_there, "function": is_there, "method": is_there, "data": data, "base": is_base, "argument": argument,
    "default": default, "type": kind, "returns": returns, "describes": describes, "attribute": attribute,
    "property": is_property, "value": value, "raises": raises,
}  # fmt: skip


def field_of(found: Any, name: str) -> Any:
    return next((field for field in fields(found) if field.name == (LOST_NAMES.get(name, name))), None)


def same(found: Any, wanted: Any) -> bool:
    """Equal and of one type, but for 1 and 1.0, and a list and a tuple."""
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        return list(found) == list(wanted)
    return bool(found == wanted) and isinstance(found, bool) == isinstance(wanted, bool)


def accepts(wide: Any, narrow: Any) -> str | None:
    """What is wrong, where not every alternative of the type `narrow` is one of `wide`."""
    wider, narrower = alternatives(wide), alternatives(narrow)
    if {"Any", ""} & wider or all(any(is_a(one, other) for other in wider) for one in narrower):
        return None
    return f"found {wide}"


def is_a(one: str, other: str) -> bool:
    """`dict[str, Any]` is a `dict`."""
    return one == other or one.partition("[")[0] == other or other.partition("[")[0] == one


def alternatives(annotation: Any) -> set[str]:
    """`Optional[torch.Tensor]` as Tensor and None; names without their modules."""
    if annotation in (inspect.Signature.empty, None):
        return {"None"} if annotation is None else {""}
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"(\w+\.)+(?=\w)", "", text).replace("List[", "list[")
    while found := re.search(r"(Optional|Union)\[((?:[^\[\]]|\[[^\]]*\])*)\]", text):
        inside = f"{found[2]} | None" if found[1] == "Optional" else found[2].replace(", ", " | ")
        text = text[: found.start()] + inside + text[found.end() :]
    for ours, theirs in UNEQUAL_NAMES.items():
        text = re.sub(rf"\b(?<!MCore){ours}\b", theirs, text)
    return {one.strip() for one in re.split(r" \| (?![^\[]*\])", text)}


# ---- the tests -------------------------------------------------------------------------------------------------------


def owners() -> Iterator[Any]:
    """A test for every class with what is in it, and for every function."""
    for document in DOCUMENTS:
        found: dict[str, list[Entry]] = {}
        for entry in entries(document):
            found.setdefault(entry.owner or entry.name, []).append(entry)
        marks = [pytest.mark.megatron] if document.startswith("megatron") else []
        for name, parts in found.items():
            yield pytest.param(document, parts, id=f"{document}-{name}", marks=marks)


@pytest.mark.parametrize(("document", "parts"), list(owners()))
def test_what_is_documented_is_so(document: str, parts: list[Entry]) -> None:
    known = DIFFERENCES.get(document, {})
    every = [item for entry in parts for item in items(entry)]
    wrong = {}
    for item in every:
        if item.path.endswith(LOST) and item.aspect == "attribute":
            continue
        try:
            problem = CHECKS[item.aspect](document, item)
        except (AttributeError, KeyError, AssertionError) as missing:
            problem = repr(missing)
        if problem:
            wrong[str(item)] = problem
    new = {item: problem for item, problem in wrong.items() if item not in known}
    mended = [str(item) for item in every if str(item) in known and str(item) not in wrong]
    assert not new, "not as documented"
    assert not mended, "listed as different, and as documented"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_item_is_read(document: str) -> None:
    """And every difference is one of them."""
    every = [str(item) for entry in entries(document) for item in items(entry)]
    assert len(every) == NUMBERS[document]
    assert DIFFERENCES.get(document, {}).keys() <= set(every)


@pytest.mark.megatron
def test_arguments_of_our_own_are_optional() -> None:
    """A call as documented works, whatever we have added behind."""
    for document in DOCUMENTS:
        for entry in entries(document):
            if entry.sort in ("method", "function") or (entry.sort == "class" and entry.parameters):
                path = ".".join(filter(None, (entry.owner, entry.name)))
                ours = list(parameters(target(document, Item(path, entry.sort))).values())
                more = [one for one in ours[len(entry.parameters) :] if one.kind.name[:3] != "VAR"]
                assert all(one.default is not one.empty for one in more), f"{path}: {more}"
