"""The API documents of this folder, read: what they promise, item by item.

The `.txt` files are pages of two projects' API references as they were published, one of pymllm (of mllm; MIT licence;
sphinx-autoapi's source, in one line) and four of Megatron-Bridge (NVIDIA; Apache-2.0; the text of Sphinx's pages, in
two shapes). They are never edited: where the code differs on purpose, `test_documents.py` has the reason.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
DOCUMENTS = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


@dataclass(frozen=True)
class Parameter:
    """One argument, its annotation and default as the document spells them ("" where it has none)."""

    name: str
    kind: str = ""
    default: str = ""


@dataclass(frozen=True)
class Entry:
    """A class, function, method, attribute, property or data. `owner` is the class that it is in, or ""."""

    sort: str
    owner: str
    name: str
    parameters: tuple[Parameter, ...] = ()
    returns: str = ""
    kind: str = ""
    value: str = ""
    bases: tuple[str, ...] = ()
    described: tuple[str, ...] = ()
    raises: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One thing that can be true or not: of `path`, the `aspect`, of `name`, as `text` says."""

    path: str
    aspect: str
    name: str = ""
    text: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.path, self.aspect, self.name, self.text) if part)


def entries(document: str) -> list[Entry]:
    text = (FOLDER / f"{document}.txt").read_text()
    return list(_autoapi(text) if ".. py:module::" in text else _Page(text).entries())


def items(entry: Entry) -> Iterator[Item]:
    """Every item of an entry."""
    path = ".".join(filter(None, (entry.owner, entry.name)))
    yield Item(path, entry.sort)
    for aspect, texts in (("base", entry.bases), ("describes", entry.described), ("raises", entry.raises)):
        yield from (Item(path, aspect, text) for text in texts)
    for number, parameter in enumerate(entry.parameters):
        yield Item(path, "argument", parameter.name, "" if parameter.name.startswith("*") else str(number))
        if parameter.default:
            yield Item(path, "default", parameter.name, parameter.default)
        if parameter.kind:
            yield Item(path, "type", parameter.name, parameter.kind)
    if entry.returns:
        yield Item(path, "returns", text=entry.returns)
    if entry.kind:
        yield Item(path, "type", text=entry.kind)
    if entry.value:
        yield Item(path, "value", text=entry.value)


def _parameters(signature: str) -> tuple[Parameter, ...]:
    (function,) = ast.parse(f"def f({signature}): pass").body
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    plain = [
        Parameter(one.arg, _source(one.annotation), _source(default))
        for one, default in zip(arguments.args, defaults, strict=True)
    ]
    starred = [("*", arguments.vararg), ("**", arguments.kwarg)]
    return (*plain, *(Parameter(f"{stars}{one.arg}") for stars, one in starred if one))


def _source(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node)


# ---- sphinx-autoapi's source -----------------------------------------------------------------------------------------

_DIRECTIVE = re.compile(r"\.\. py:(class|data|function|attribute|property|method):: (\w+)(.*?)(?= \.\. py:|$)")
_FIELD = re.compile(r" :(\w+): (\S.*?)(?= \.\. | :\w+: |$)")


def _autoapi(text: str) -> Iterator[Entry]:
    owner = ""
    for sort, name, rest in _DIRECTIVE.findall(text.strip()):
        signature, body = _parenthesised(rest)
        fields = dict(_FIELD.findall(body))
        if sort in ("class", "function", "data"):
            owner = ""
        yield Entry(
            sort,
            owner,
            name,
            _parameters(signature),
            kind=fields.get("type", ""),
            value=fields.get("value", ""),
            bases=tuple(re.findall(r"Bases: :py:obj:`([\w.]+)`", body)),
            described=tuple(re.findall(r" :param (\w+):", body)),
        )
        owner = name if sort == "class" else owner


def _parenthesised(text: str) -> tuple[str, str]:
    """(what is in the parentheses at the beginning, the rest)."""
    if not text.startswith("("):
        return "", text
    depth = 0
    for at, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return text[1:at], text[at + 1 :]
    raise ValueError(f"no end of the signature: {text[:80]}")


# ---- the text of Sphinx's pages --------------------------------------------------------------------------------------

_OPENED = re.compile(r"(class )?([\w.]+)\(")
_CLOSED = re.compile(r"(?:class )?([\w.]+)(?:\((.*)\))?(?: ([^#]+))?#")
_ARGUMENT = re.compile(r"\*{0,2}\w+(: .+|=.+)?,")
_ATTRIBUTE = re.compile(r"(\w+): (.+)#")
_DESCRIBED = re.compile(r"(?:• )?([\w*]+)(?: \([^)]*\))? – .*")
_INHERITED = re.compile(r"^(\w+): .*\(default (\S+)\)$|Note: (\w+) in parent class .* Default value of (\d+) ")
_SECTIONS = {"Parameters:": "described", "Raises:": "raises", "Returns:": "", "Return type:": ""}
LOST = "?"
"""The name of an attribute whose line the page has lost; its value is there."""


class _Page:
    """The lines of a page, read from top to bottom."""

    def __init__(self, text: str) -> None:
        lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
        self.lines = [line for line in lines if line]
        self.at = self.lines.index("API#") + 1
        self.summaries = [line.removesuffix("|").strip() for line in self.lines[: self.at - 1]]
        self.owner = ""

    def entries(self) -> Iterator[Entry]:
        while self.at < len(self.lines):
            line = self.lines[self.at]
            self.at += 1
            if found := _ATTRIBUTE.fullmatch(line):
                yield from self._attribute(*found.groups())
            elif found := _OPENED.fullmatch(line):
                yield from self._callable(line, found[2], *self._signature())
            elif found := _CLOSED.fullmatch(line):
                yield from self._callable(line, found[1], found[2] or "", found[3] or "")
            else:
                raise ValueError(f"no entry begins with this line: {line}")

    def _attribute(self, name: str, kind: str) -> Iterator[Entry]:
        values = self._body()
        yield Entry("attribute", self.owner, name, kind=kind, value=_unquoted(values[0]))
        yield from (Entry("attribute", self.owner, LOST, value=_unquoted(value)) for value in values[1:])

    def _signature(self) -> tuple[str, str]:
        """(arguments of the following lines, what is returned)."""
        first = self.at
        while _ARGUMENT.fullmatch(self.lines[self.at]):
            self.at += 1
        arguments = " ".join(self.lines[first : self.at])
        closing = re.fullmatch(r"\)(?: (.+))?#", self.lines[self.at])
        self.at += closing is not None
        return arguments, (closing and closing[1]) or ""

    def _callable(self, header: str, path: str, signature: str, returns: str) -> Iterator[Entry]:
        is_class, is_function = header.startswith("class "), "." in path
        name, body = path.rpartition(".")[2], self._body()
        sort = "class" if is_class else "function" if is_function else "method"
        described, raised = _sections(body)
        owner = "" if is_class or is_function else self.owner
        yield Entry(
            sort,
            owner,
            name,
            _parameters(signature),
            returns,
            bases=self._bases(body),
            described=described,
            raises=raised,
        )
        if is_class:
            self.owner = name
            inherited = (tuple(filter(None, match.groups())) for text in body if (match := _INHERITED.search(text)))
            yield from (Entry("attribute", name, one, value=_unquoted(value)) for one, value in inherited)

    def _body(self) -> list[str]:
        """The lines up to the next entry."""
        first = self.at
        while self.at < len(self.lines) and not self._begins(self.lines[self.at]):
            self.at += 1
        return self.lines[first : self.at]

    @staticmethod
    def _begins(line: str) -> bool:
        return any(pattern.fullmatch(line) for pattern in (_ATTRIBUTE, _OPENED, _CLOSED))

    def _bases(self, body: list[str]) -> tuple[str, ...]:
        """What follows `Bases:`; a docstring may stick to it, whose beginning is in the summary above."""
        text = " ".join(body)
        found = re.match(r"Bases: ([\w.]+.*)", text)
        if not found:
            return ()
        ends = [found[1].index(summary) for summary in self.summaries if summary and summary in found[1]]
        return (found[1][: min(ends)].strip(),) if ends else (found[1].split()[0],)


def _sections(body: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(described parameters, errors) of a docstring."""
    found: dict[str, list[str]] = {"described": [], "raises": []}
    section = ""
    for line in body:
        section = _SECTIONS.get(line, section)
        if section and (match := _DESCRIBED.fullmatch(line)):
            found[section].append(match[1])
    return tuple(found["described"]), tuple(found["raises"])


def _unquoted(value: str) -> str:
    """A value as Python writes it: the page has typographic quotes."""
    return f"'{value[1:-1]}'" if value[0] in "\u2018\u201c" else value
