"""The generated pages, each made from the objects that it describes."""

import ast
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import qwen3vl_convert
from qwen3vl_convert import mappings, verify
from qwen3vl_convert.cli.app import app
from qwen3vl_convert.cli.names import ALIASES, HINTS
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.mappings import Equation, Mapping, MegatronMappingRegistry, Term, qwen3_vl
from qwen3vl_convert.megatron.placement import cut_dimension
from qwen3vl_convert.megatron.stored import stored

_NOTE = "<!-- Written by docs/generate.py: change the code it describes, then run `make docs`. -->\n"


# -- cli.md ------------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options, from the objects that Typer makes of the functions."""
    from typer.main import get_command

    group: Any = get_command(app)
    parts = ["# Commands", _NOTE, _paragraphs(group.help)]
    parts.append("Options before the command: " + ", ".join(f"`{p.opts[0]}` ({p.help})" for p in group.params) + "\n")
    parts += [_command(name, command) for name, command in group.commands.items()]
    return "\n".join([*parts, _names_of_others()])


_NAMES_OF_OTHERS = """## Names that others use

What Megatron-LM, Megatron-Bridge and others call these options works in every command that has them, also with `_`.

| here | also |
| --- | --- |"""
_TOLD = "Of these, which have other values or no counterpart, the error says what to do here:"


def _names_of_others() -> str:
    ours: dict[str, list[str]] = {}
    for name, option in ALIASES.items():
        ours.setdefault(option, []).append(f"`{name}`")
    lines = [f"| `{option}` | {', '.join(names)} |" for option, names in ours.items()]
    told = ", ".join(f"`{name}`" for name in HINTS)
    return f"{_NAMES_OF_OTHERS}\n" + "\n".join(lines) + f"\n\n{_TOLD}\n{told}.\n"


def _command(name: str, command: Any) -> str:
    hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    kinds = {name: typing.get_args(hint)[0] for name, hint in hints.items() if name != "return"}
    helps = {name: hint.__metadata__[0].help for name, hint in hints.items() if name != "return"}
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join(_argument(p) if p.required else f"[{_argument(p)}]" for p in arguments)
    lines = [f"## {name}\n", f"{_paragraphs(command.help)}", f"```\nqwen3vl-convert {name} {usage} [OPTIONS]\n```\n"]
    lines += ["| argument | what it is |", "| --- | --- |"]
    lines += [f"| `{_argument(p)}` | {_cell(_argument_help(p, helps[p.name]))} |" for p in arguments]
    panels = dict.fromkeys(p.rich_help_panel or "Options" for p in options)
    for panel in sorted(panels, key=lambda title: title != "Options"):
        lines += ["", f"| {panel.lower()} | default | what it does |", "| --- | --- | --- |"]
        lines += [_option(p, kinds[p.name]) for p in options if (p.rich_help_panel or "Options") == panel]
    return "\n".join(lines) + "\n"


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _argument_help(parameter: Any, text: str) -> str:
    return text if parameter.required else f"{text} Default: `{parameter.default}`."


def _option(parameter: Any, kind: Any) -> str:
    kinds = [one for one in (typing.get_args(kind) or (kind,)) if one is not types.NoneType]
    names = "`, `".join((*parameter.opts, *parameter.secondary_opts))
    value = {int: " N", bool: ""}.get(kinds[0], f" {_value_name(parameter.opts[0])}")
    default = parameter.default
    if isinstance(default, bool):
        default = parameter.opts[0] if default and parameter.secondary_opts else "off"
    return f"| `{names}{value}` | {'' if default is None else f'`{default}`'} | {_cell(parameter.help)} |"


def _value_name(option: str) -> str:
    return option.removeprefix("--").rpartition("-")[2].upper()


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n")) + "\n"


# -- mapping-table.md --------------------------------------------------------------------------------------------------

_INTRODUCTION = """\
Every tensor of Qwen3-VL, from the tables that the program converts by (`mappings/qwen3_vl.py`). The notation is that of
[notation.md](notation.md): axes outermost first, `*` where parts lie end to end, braces for axes that live in a name.

*In the model* is the parameter's name in Megatron's modules and in the checkpoint's per-layer style, *stored as* its
key and axes in the default (stacked) style of a `torch_dist` checkpoint. *Cut* names the axis that tensor parallelism
divides: `tp`, or `etp` for experts. Whole layers (`l`) go to pipeline stages and whole experts (`e`) to expert parallel
ranks; the vision tower and the embedding are on the first stage, the final norm and the head on the last. What is not
cut is the same on every rank. With more tensor parallel ranks than key-value heads, `linear_qkv` is cut into equal rows
across head groups.
"""


def mapping_table() -> str:
    """Every equation of the registry, dense and MoE."""
    dense, moe = qwen3_vl.TABLES["qwen3_vl"], qwen3_vl.TABLES["qwen3_vl_moe"]
    bias = qwen3_vl.ATTENTION_BIAS
    sections: list[tuple[str, str, Iterable[Mapping]]] = [
        ("Text, dense and MoE", "", [m for m in dense if m in moe and m not in bias and _is_text(m)]),
        ("MLP, dense", "", [m for m in dense if m not in moe]),
        ("Text attention biases", "Where config.json says `attention_bias: true`; no published model does.", bias),
        ("MLP, mixture of experts", "Experts as published on the Hub:", [m for m in moe if m not in dense]),
    ]
    vision = ("Vision, dense and MoE", "", [m for m in dense if not _is_text(m)])
    parts = ["# The mapping table", _NOTE, _INTRODUCTION, _axes()]
    parts += [_section(*section) for section in sections]
    parts += [_expert_layouts(), _section(*vision)]
    return "\n".join(parts)


def _is_text(mapping: Mapping) -> bool:
    return mapping.megatron_param.startswith("language_model.")


def _section(title: str, text: str, found: Iterable[Mapping]) -> str:
    rows = "\n".join(_row(mapping) for mapping in found)
    header = "| in the model | stored as | Hugging Face | cut |\n| --- | --- | --- | --- |"
    return f"## {title}\n\n{text + chr(10) * 2 if text else ''}{header}\n{rows}\n"


def _row(mapping: Mapping) -> str:
    equation = mapping.equation
    disk = "<br>".join(_named(one.equation.megatron) for one in stored(equation))
    theirs = "<br>".join(_named(part) for part in equation.hf)
    return f"| {_named(equation.megatron)} | {disk} | {theirs} | {_cut(equation)} |"


def _named(term: Term) -> str:
    return f"`{term.name}`&nbsp;: `{term.layout.text}`"


def _cut(equation: Equation) -> str:
    one = stored(equation)[0]
    cut = cut_dimension(one)
    if cut is None:
        return ""
    group = one.equation.megatron.layout.groups[cut[0]]
    axis = next(axis for axis in group if axis in qwen3_vl.CUTS)
    return f"`{axis}` by {cut[1]}"


def _expert_layouts() -> str:
    """The experts of a folder in each of the four ways."""
    experts = [m for m in qwen3_vl.TABLES["qwen3_vl_moe"] if m not in qwen3_vl.TABLES["qwen3_vl"]]
    lines = ["## Experts, as other programs write them\n"]
    lines += ["Megatron's side is the same; `--experts-layout` names the other. `half` is half of `h`.\n"]
    lines += ["| `--experts-layout` | stored as | Hugging Face |", "| --- | --- | --- |"]
    for layout in mappings.EXPERT_LAYOUTS:
        for mapping in MegatronMappingRegistry(*experts).with_experts(layout):
            if isinstance(mapping, mappings.ExpertMLPGateUpProjMapping | mappings.ExpertMLPDownProjMapping):
                theirs = "<br>".join(_named(part) for part in mapping.equation.hf)
                lines.append(f"| `{layout}` | {_named(stored(mapping.equation)[0].equation.megatron)} | {theirs} |")
    return "\n".join(lines) + "\n"


_AXIS = re.compile(r"((?:\w+, )*\w+)(?: (.*))?")


def _axes() -> str:
    """What the letters mean, from the legend of the tables, and their sizes in the published models."""
    legend = " ".join((qwen3_vl.__doc__ or "").partition("Axes: ")[2].split())
    models = [name for name in SIZES if not name.startswith("tiny")]
    sizes = {name: SIZES[name].sizes() for name in models}
    lines = ["## Axes\n", f"| axis | what it is | {' | '.join(models)} |", f"| --- | --- |{' ---: |' * len(models)}"]
    for entry in legend.split(" · "):
        match = _AXIS.fullmatch(entry)
        if match is None:
            raise ValueError(f"the legend of mappings/qwen3_vl.py: {entry!r} is no `axis meaning`")
        for axis in match[1].split(", "):
            values = " | ".join(str(sizes[name].get(axis, "")) for name in models)
            meaning = entry if (match[2] or "of").startswith("of") else match[2]
            lines.append(f"| `{axis}` | {meaning} | {values} |")
    return "\n".join(lines) + "\n"


# -- python-api.md -----------------------------------------------------------------------------------------------------

_API = """\
What `import qwen3vl_convert` offers, the mappings room, and `verify`. Importing it imports neither torch nor Megatron;
a name is loaded when it is first used. Every error raised on purpose is a `ConvertError`.
"""


def python_api() -> str:
    """Public names with their signatures and docstrings, as the sources spell them."""
    rooms = (
        ("qwen3vl_convert", qwen3vl_convert, qwen3vl_convert.__all__),
        ("qwen3vl_convert.verify", verify, verify.__all__),
        ("qwen3vl_convert.mappings", mappings, mappings.__all__),
    )
    return _rooms("Python", _API, rooms)


_MODELS_API = """\
What `import qwen3vl_convert.models` offers: Qwen3-VL on Megatron-Core, providers that build it, bridges that fill it.
It needs megatron-core; nothing of it is imported before a name is used. How to train with it:
[training.md](training.md).
"""


def models_api() -> str:
    """The same for the models room, whose import needs megatron-core."""
    import warnings

    from qwen3vl_convert import models

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core says what is not installed
        return _rooms("Models", _MODELS_API, (("qwen3vl_convert.models", models, models.__all__),))


_INFERENCE_API = """\
What `import qwen3vl_convert.inference` offers: the inference model, part by part, and the engine that serves it. It
needs torch. How to use it: [generate.md](generate.md).
"""


def inference_api() -> str:
    """The same for the inference room, whose import needs torch."""
    from qwen3vl_convert import inference

    names = [name for name in inference.__all__ if name != "logger"]
    return _rooms("Inference", _INFERENCE_API, (("qwen3vl_convert.inference", inference, names),))


def _rooms(page: str, introduction: str, rooms: Iterable[tuple[str, Any, Iterable[str]]]) -> str:
    parts, seen = [f"# {page}", _NOTE, introduction], set()
    for title, room, names in rooms:
        fresh = [name for name in names if name not in seen]
        seen |= set(fresh)
        parts += [f"## {title}\n", *(_entry(name, getattr(room, name)) for name in sorted(fresh, key=_kind_first))]
    return "\n".join(parts)


def _kind_first(name: str) -> tuple[bool, str]:
    """Functions before classes, then by name."""
    return name[:1].isupper(), name.lower()


def _entry(name: str, value: Any) -> str:
    node = _definition(name, value)
    if isinstance(node, ast.FunctionDef):
        return f"### {name}\n\n{_code(_signature(node))}\n{_documentation(node)}"
    if isinstance(node, ast.ClassDef):
        return f"### {name}\n\n{_code(_class(node, value))}\n{_documentation(node)}{_methods(value)}"
    return f"### {name}\n\n{_code(_written(node))}\n{_documentation_below(name, value)}"


@cache
def _parsed(module: str) -> ast.Module:
    source = Path(importlib.import_module(module).__file__ or "").read_text()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for part in _shown(node):
            part.text = ast.get_source_segment(source, part)  # type: ignore[attr-defined]
    return tree


def _shown(node: ast.AST) -> Iterator[ast.AST]:
    """What of a node is shown as it is written."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        yield node
    if isinstance(node, ast.FunctionDef):
        every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
        yield from (one.annotation for one in every if one and one.annotation)
        yield from (default for default in (*node.args.defaults, *node.args.kw_defaults) if default)
        yield from (node.returns,) if node.returns else ()


def _written(node: ast.AST) -> str:
    return str(node.text)  # type: ignore[attr-defined]


def _home(name: str, value: Any) -> str:
    """The module that defines a name; constants do not know theirs."""
    if hasattr(value, "__module__"):
        return str(value.__module__)
    rooms = ("mapping", "equation", "layout", "registry")
    candidates = [f"qwen3vl_convert.mappings.{room}" for room in rooms]
    return next(m for m in candidates if any(name in _targets(node) for node in _parsed(m).body))


def _targets(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _definition(name: str, value: Any) -> ast.stmt:
    for node in _parsed(_home(name, value)).body:
        if name in _targets(node) or (isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name):
            return node
    raise LookupError(name)


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _signature(node: ast.FunctionDef, method: bool = False) -> str:
    """`def name(...) -> type`, a parameter a line where one line does not hold them."""
    arguments = node.args
    if method and arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments = ast.arguments(**{**vars(arguments), "args": arguments.args[1:]})
    returns = f" -> {_annotation(node.returns)}" if node.returns else ""
    parts = list(_parameters(arguments))
    line = f"{node.name}({', '.join(parts)}){returns}"
    return line if len(line) <= 100 else f"{node.name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def _annotation(node: ast.expr) -> str:
    return re.sub("['\"]", "", _written(node))


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(plain) - len(arguments.defaults)), *arguments.defaults]
    yield from (_parameter(one, default) for one, default in zip(plain, defaults, strict=True))
    if arguments.vararg:
        yield "*" + _parameter(arguments.vararg, None)
    elif arguments.kwonlyargs:
        yield "*"
    yield from (_parameter(one, d) for one, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    if arguments.kwarg:
        yield "**" + _parameter(arguments.kwarg, None)


def _parameter(one: ast.arg, default: ast.expr | None) -> str:
    kind = f": {_annotation(one.annotation)}" if one.annotation else ""
    return f"{one.arg}{kind}" + (f" = {_written(default)}" if default else "")


def _class(node: ast.ClassDef, value: type) -> str:
    bases = ", ".join(base.__name__ for base in value.__mro__[1:-1] if not base.__name__.startswith("_"))
    bases = bases.partition(", ")[0].replace("ABC", "")
    fields = [f"    {field}" for field in _fields(value)]
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    return "\n".join([head + (":" if fields else ""), *fields])


def _fields(value: type) -> Iterator[str]:
    """The fields of a dataclass, its bases' first; one that is declared again once, as it is in the end."""
    found: dict[str, str] = {}
    for one in reversed(value.__mro__):
        if one.__module__.startswith("qwen3vl_convert"):
            node = _definition(one.__name__, one)
            fields = (f for f in getattr(node, "body", ()) if isinstance(f, ast.AnnAssign))
            found |= {text.partition(":")[0]: text for text in map(_written, fields)}
    yield from (text for text in found.values() if "ClassVar" not in text and not text.startswith("_"))


def _methods(value: type) -> str:
    """Public methods and properties that say something about themselves, those of private bases included."""
    out = []
    shown = [value, *(base for base in value.__mro__[1:] if base.__name__.startswith("_"))]
    nodes = [_definition(one.__name__, one) for one in shown if one.__module__.startswith("qwen3vl_convert")]
    for one in {f.name: f for node in reversed(nodes) for f in getattr(node, "body", ()) if _is_shown(f)}.values():
        names = {ast.unparse(decorator) for decorator in one.decorator_list}
        is_value = names & {"property", "cached_property"}
        returns = _annotation(one.returns) if one.returns else ""
        out.append(_code(f"{one.name}: {returns}" if is_value else _signature(one, method=True)))
        out.append(_documentation(one))
    return "".join(f"\n{part}" for part in out)


def _is_shown(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and bool(ast.get_docstring(node))


def _documentation(node: ast.FunctionDef | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").strip() + "\n"


def _documentation_below(name: str, value: Any) -> str:
    """The string under a constant."""
    body = _parsed(_home(name, value)).body
    at = next(index for index, node in enumerate(body) if name in _targets(node))
    after = body[at + 1] if at + 1 < len(body) else None
    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return (inspect.cleandoc(str(after.value.value)) if is_text else "") + "\n"  # type: ignore[union-attr]
