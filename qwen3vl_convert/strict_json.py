"""JSON of unknown origin: one object, no key twice, and an error that names the file."""

import json
from typing import Any

from qwen3vl_convert.errors import InputError


class _DuplicateKey(ValueError):
    """A key that stands twice in one object; parsers differ on which of the two counts."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKey(f"the key {twice!r} stands twice")
    return table


def parse_object(raw: bytes, where: str, error: type[InputError], remedy: str) -> dict[str, Any]:
    """The JSON object in `raw`; whatever else `raw` is raises `error`, which names `where` and ends with `remedy`."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique)
    except _DuplicateKey as cause:
        raise error(f"{where}: {cause}; expected each key once. {remedy}") from None
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: expected a JSON object in UTF-8, found something else ({cause}). {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {type(value).__name__}. {remedy}")
    return value
