"""HTML and SVG put together so that nothing untrusted can become markup: what is not `Markup` is escaped."""

import html
import unicodedata
from typing import TypeAlias


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child: TypeAlias = "str | list[Markup]"

_EMPTY = frozenset({"meta", "br", "wbr", "hr"})
"""HTML elements that have no end tag."""


def element(tag: str, *children: Child, **attributes: str | float | None) -> Markup:
    """`<tag a-b="1">children</tag>` for `element("tag", ..., a_b=1)`. `None` leaves an attribute out."""
    inner = "".join(child if isinstance(child, Markup) else text(child) for child in _flat(children))
    given = "".join(
        f' {_attribute(name)}="{text(_number(value))}"' for name, value in attributes.items() if value is not None
    )
    return Markup(f"<{tag}{given}>" if tag in _EMPTY else f"<{tag}{given}>{inner}</{tag}>")


def text(untrusted: str) -> Markup:
    """Escaped. Characters that could hide or reorder the rest, or that no file may hold, are shown by their numbers."""
    return Markup(html.escape("".join(map(_visible, untrusted)), quote=True))


def sentence(said: str) -> Markup:
    """Words that may also be broken after each part of a module's name."""
    return Markup(text(said).replace(".", ".<wbr>"))


def breakable(name: str) -> Markup:
    """A path or a tensor name that may be broken after each of its parts."""
    return Markup(text(name).replace(".", ".<wbr>").replace("/", "/<wbr>").replace("_", "_<wbr>"))


def joined(parts: "list[Markup] | tuple[Markup, ...]") -> Markup:
    return Markup("".join(parts))


def _flat(children: tuple[Child, ...]) -> list[str]:
    return [one for child in children for one in ([child] if isinstance(child, str) else child)]


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") and character not in "\n\t"
    return f"\\u{ord(character):04x}" if hidden else character
