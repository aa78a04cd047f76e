"""What probably happened to a tensor that differs: one of the usual things, checked on the bits, in a sentence.

A guess is never made from likeness. Each undoes what it suspects and compares every element; only "looks still
initialised" is statistics, and says so. What differs in some experts of a stack is looked at expert by expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qwen3vl_convert.model import OUTPUT, HuggingFaceModel, MegatronModel
from qwen3vl_convert.plan import Box
from qwen3vl_convert.verify.weights.alternatives import find_alternative
from qwen3vl_convert.verify.weights.elsewhere import EXPERT, Atlas, Elsewhere
from qwen3vl_convert.verify.weights.entries import ENTRIES
from qwen3vl_convert.verify.weights.orders import ORDERS
from qwen3vl_convert.verify.weights.part import Group, Hypothesis, Part
from qwen3vl_convert.verify.weights.places import listed, only_there
from qwen3vl_convert.verify.weights.sides import Sides
from qwen3vl_convert.verify.weights.values import FIRST, LAST, not_finite

_WHOLE, _ROWS = 320 << 20, 64 << 20
"""Bytes of a tensor that is looked at as a whole (the largest matrix of the published models has 262 MB); a longer one,
a table of embeddings, is looked at in blocks of so many bytes.
"""
_TRIES = 4
"""Parts that may stay unexplained before the rest is left alone: in a trained stack there is nothing to find."""


@dataclass(frozen=True, slots=True)
class _Finding:
    """What happened to one part; `label` says which expert or rows it was, "" for all of a tensor."""

    label: str
    text: str = ""
    elsewhere: Elsewhere | None = None

    @property
    def said(self) -> str:
        """Without the expert where that is not what was mistaken, so that what befell many is said once."""
        return self.text if self.elsewhere is None else str(self.elsewhere.without_expert())

    @property
    def of_experts(self) -> bool:
        return self.elsewhere is not None and self.elsewhere.axis == EXPERT and self.elsewhere.here.expert is not None


class Guesser:
    """What is known of both checkpoints when guessing; made once for all tensors."""

    def __init__(self, sides: Sides, theirs: HuggingFaceModel, ours: MegatronModel) -> None:
        self.sides, self.theirs, self.ours, self.atlas = sides, theirs, ours, Atlas(sides, theirs)

    def guess(self, name: str) -> str:
        """In words, or "" where it is none of the usual things. The tensor must be one that differs."""
        dtype, findings, whole = self.sides.common(name)[0], list[_Finding](), True
        for label, box, expert in self._boxes(name):
            part = self._part(name, box, dtype)
            if not part.unequal.any():
                whole = False
                continue
            findings.append(self._look(part, expert, label))
            if len(findings) == _TRIES and not any(finding.text for finding in findings):
                break
        return "; ".join(text for text in (self._head(name), _together(findings, whole)) if text)

    def _part(self, name: str, box: Box, dtype: str) -> Part:
        theirs, ours = self.sides.read(name, box, dtype)
        cast = self.sides.dtypes(name) is not None
        return Part(name, box, dtype, theirs, ours, self._groups(name, box), cast)

    def _boxes(self, name: str) -> Iterator[tuple[str, Box, int | None]]:
        """(label, box, expert) of the parts that are looked at one after the other."""
        tensor = self.sides.theirs[name]
        rest, zeros = tensor.shape[1:], (0,) * len(tensor.shape[1:])
        if self.atlas.stacked(name):
            for expert in range(tensor.shape[0]):
                yield f"expert {expert}", ((expert, *zeros), (1, *rest)), expert
            return
        rows = tensor.shape[0] if tensor.nbytes <= _WHOLE else max(1, _ROWS * tensor.shape[0] // tensor.nbytes)
        for first in range(0, tensor.shape[0], rows):
            count = min(rows, tensor.shape[0] - first)
            label = f"rows {first}:{first + count}" if count < tensor.shape[0] else ""
            yield label, ((first, *zeros), (count, *rest)), None

    def _groups(self, name: str, box: Box) -> tuple[Group, ...]:
        """The axes of each dimension; a dimension that a part has some entries of is one axis."""
        spot, shape = self.atlas.spots.get(name), self.sides.theirs[name].shape
        if spot is None:
            return tuple(((f"dim {i}", size),) for i, size in enumerate(box[1]))
        sizes = self.theirs.model.sizes
        groups = (tuple((axis, sizes.get(axis, 1)) for axis in group) for group in spot.term.layout.groups)
        return tuple(
            group if part == whole else ((group[0][0] if len(group) == 1 else "rows", part),)
            for group, part, whole in zip(groups, box[1], shape, strict=True)
        )

    def _look(self, part: Part, expert: int | None, label: str) -> _Finding:
        """The hypotheses one after the other, those that are quick to tell first."""
        strange, mended = not_finite(part)
        if strange:
            rest = self._look(mended, expert, label).text if mended.unequal.any() else ""
            return _Finding(label, f"{strange}; and of the others: {rest}" if rest else strange)
        if text := _first(FIRST, part):
            return _Finding(label, text)
        elsewhere = None if self._head(part.name) else self.atlas.look(part, expert)
        if elsewhere is not None:
            return _Finding(label, str(elsewhere), elsewhere)
        whole = part.box[1] == self.sides.theirs[part.name].shape
        text = _first(ORDERS, part) or (find_alternative(part, self.sides, self.ours) if whole else "")
        return _Finding(label, text or _first(ENTRIES, part) or _first(LAST, part) or only_there(part))

    def _head(self, name: str) -> str:
        """Of the head of a model that is tied on one side."""
        if name != OUTPUT[1] or (self.theirs.model.output_layer and self.ours.model.output_layer):
            return ""
        if self.theirs.model.output_layer:
            return "the folder has a head of its own, and the Megatron checkpoint is tied: compared with its embedding"
        return "tied head not tied: the Megatron checkpoint has an output layer that is not the folder's embedding"


def _first(hypotheses: tuple[Hypothesis, ...], part: Part) -> str:
    return next((text for hypothesis in hypotheses if (text := hypothesis.find(part))), "")


def _together(findings: list[_Finding], whole: bool) -> str:
    """One sentence per thing that happened, with the experts that it happened to unless it was all of them."""
    said = list(dict.fromkeys(finding.text for finding in findings if finding.of_experts))
    by_text: dict[str, list[str]] = {}
    for finding in findings:
        if not finding.of_experts:
            by_text.setdefault(finding.said, []).append(finding.label)
    everywhere = whole and len(by_text) == 1 and not said
    grouped = [text if everywhere or not labels[0] else _labelled(labels, text) for text, labels in by_text.items()]
    return "; ".join(text for text in ([listed(said)] if said else []) + grouped if text)


def _labelled(labels: list[str], text: str) -> str:
    """`experts 3, 7: transposed`."""
    kind = labels[0].split()[0]
    numbers = listed([label.removeprefix(f"{kind} ") for label in labels])
    subject = f"{kind.removesuffix('s')}s {numbers}" if len(labels) > 1 else labels[0]
    return f"{subject}: {text}" if text else f"only {subject}"
