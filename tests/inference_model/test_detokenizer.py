"""Text comes out as it goes in, whole characters at a time, and ends before the first stop string."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_model.fake_model import Bytes
from qwen3vl_convert.inference.engine.detokenizer import HALF, Detokenizer, Tokenizer


class Pieces:
    """Tokens are pieces of bytes."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[token] for token in ids).decode("utf-8", errors="replace")


class Words:
    """Tokens are words; the space before the first one is dropped, as by SentencePiece."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" w{token}" for token in ids)[1:]


def parts_of(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, stop)
    parts = []
    for token in ids:
        parts.append(detokenizer.add(token))
        if detokenizer.stopped:
            return parts
    return [*parts, detokenizer.finish()]


@settings(deadline=None)
@given(st.text(alphabet="aé中😀 \n", max_size=20), st.data())
def test_characters_come_whole(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    parts = parts_of(Pieces(pieces), range(len(pieces)))
    assert "".join(parts) == text
    assert not any(HALF in part for part in parts)
    whole = 0
    for end, part in enumerate(parts[:-1], 1):
        whole += len(part)
        sent = b"".join(pieces[:end])
        assert text[:whole] == sent.decode(errors="ignore"), "as much as is certain, at once"


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_bytes_that_are_no_text_are_replaced_and_not_lost(ids: list[int]) -> None:
    assert "".join(parts_of(Bytes(), ids)) == bytes(ids).decode(errors="replace")


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60))
@example([1] * 40)
def test_spaces_between_tokens_stay(ids: list[int]) -> None:
    assert "".join(parts_of(Words(), ids)) == Words().decode(ids)


def expected(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string to be complete, and whether there is one."""
    for end in range(1, len(text) + 1):
        places = [at for one in stop if (at := text[:end].find(one)) >= 0]
        if places:
            return text[: min(places)], True
    return text, False


@settings(deadline=None)
@given(st.text(alphabet="ab", max_size=12), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_a_stop_string_and_nothing_of_one_comes_out(text: str, stop: list[str]) -> None:
    detokenizer, out = Detokenizer(Bytes(), stop), ""
    whole, stopped = expected(text, stop)
    for number, character in enumerate(text, 1):
        out += detokenizer.add(ord(character))
        assert whole.startswith(out)
        if detokenizer.stopped:
            break
        held = text[len(out) : number]
        assert not held or any(one.startswith(held) for one in stop), "nothing is held back without a reason"
    assert detokenizer.stopped == stopped
    out += detokenizer.finish()
    assert out == whole


@pytest.mark.parametrize("stop", ["中文", "😀!"])
def test_a_stop_string_whose_characters_come_in_halves(stop: str) -> None:
    parts = parts_of(Bytes(), f"ok{stop}more".encode(), [stop])
    assert "".join(parts) == "ok"


def test_the_first_of_two_stop_strings_that_come_at_once_counts() -> None:
    assert parts_of(Pieces([b"x", b"yabz"]), [0, 1], ["b", "ab"]) == ["x", "y"]


def test_after_a_stop_string_nothing_comes() -> None:
    detokenizer = Detokenizer(Bytes(), ["b"])
    assert [detokenizer.add(ord(one)) for one in "abc"] == ["a", "", ""]
    assert detokenizer.finish() == ""


def test_each_token_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    class Counting(Bytes):
        def decode(self, ids: Sequence[int]) -> str:
            lengths.append(len(ids))
            return super().decode(ids)

    parts_of(Counting(), "中文 text ".encode() * 50)
    assert max(lengths) <= 20
    assert sum(lengths) < 20 * len(lengths)
