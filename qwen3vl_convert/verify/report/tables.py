"""The tables of the report: prompts, tensors, settings, the points of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3vl_convert.quantities import amount, apart, direction, figure, share
from qwen3vl_convert.verify.report.groups import grouped
from qwen3vl_convert.verify.report.markup import Child, Markup, breakable, element, joined
from qwen3vl_convert.verify.report.words import by_severity, elements, excess, place_name, worst
from qwen3vl_convert.verify.result import Difference, LogitsReport, PromptResult, WeightsReport

_MOST_TENSORS = 15
"""Before the rest is folded up."""


@dataclass(frozen=True, slots=True)
class Column:
    """`title` stands beside each value where the page is narrow."""

    title: str
    kind: str | None = None


Row = list[Child]


def table(label: str, columns: Sequence[Column], rows: Sequence[Row]) -> Markup:
    """The first cell of a row is its header. Where the page is narrow, each row is a card."""
    head = [element("th", one.title, scope="col", role="columnheader", class_=one.kind) for one in columns]
    groups = [
        element("thead", element("tr", head, role="row"), role="rowgroup"),
        element("tbody", [_row(columns, row) for row in rows], role="rowgroup"),
    ]
    return element("table", groups, class_="cards", role="table", aria_label=label)


def _row(columns: Sequence[Column], row: Row) -> Markup:
    cells = [element("th", row[0], scope="row", role="rowheader", class_=columns[0].kind)]
    for column, child in zip(columns[1:], row[1:], strict=True):
        value = element("span", child)
        cells.append(element("td", value, role="cell", class_=column.kind, data_label=column.title))
    return element("tr", cells, role="row")


def beyond(said: str) -> Markup:
    """A value that fails: in the colour and with the mark that it has in the pictures, and in words."""
    mark = element("span", " ■", aria_hidden="true")
    return element("span", said, mark, element("span", " (fails)", class_="spoken"), class_="bad-text")


def number(title: str) -> Column:
    return Column(title, "number")


def prompts_table(logits: LogitsReport) -> Markup:
    columns = [
        Column("Prompt", "short"),
        *map(number, ("Tokens", "Largest difference", "Allowed", "Own errors")),
        *map(number, ("KL, largest", "KL, mean", "Same first token", "Same first five")),
    ]
    return table("The logits of each prompt", columns, [_prompt(prompt) for prompt in logits.prompts])


def _prompt(prompt: PromptResult) -> Row:
    most, allowed = apart(prompt.max_abs, prompt.allowed)
    mean = sum(prompt.kl) / len(prompt.kl) if prompt.kl else 0.0
    return [
        prompt.name,
        f"{len(prompt.kl):,}",
        most if prompt.passed else beyond(most),
        allowed,
        ", ".join(map(figure, prompt.own_errors)),
        *map(figure, (worst(prompt.kl), mean)),
        share(prompt.top1, 0),
        share(prompt.top5, 0),
    ]


def tensors_table(weights: WeightsReport) -> Markup:
    """The worst tensors, the others folded up."""
    ordered = by_severity(weights.differences)
    shown, rest = ordered[:_MOST_TENSORS], ordered[_MOST_TENSORS:]
    made = _tensors("The tensors that differ most", shown)
    if not rest:
        return made
    folded = element("summary", f"The other {amount(len(rest), 'tensor')}")
    return joined([made, element("details", folded, _tensors("The other tensors that differ", rest))])


def _tensors(label: str, differences: Sequence[Difference]) -> Markup:
    columns = [
        Column("Tensor", "tensor"),
        Column("What probably happened", "guess"),
        *map(number, ("Elements that differ", "The first at", "Largest difference", "Most ULPs", "Cosine")),
    ]
    return table(label, columns, [_tensor(one) for one in differences])


def _tensor(one: Difference) -> Row:
    key = element("span", breakable(one.megatron_name), class_="name under")
    name = Markup(element("span", breakable(one.name), class_="name") + key)
    if one.dtypes:
        said = f"{one.dtypes[0]} for Hugging Face, {one.dtypes[1]} for Megatron; not compared further"
        return [name, f"{one.guess} {said}".strip(), *["–"] * 5]
    total = elements(one.shape)
    part = element("span", f"{share(one.count / total)} of {list(one.shape)}" if total else "", class_="under")
    return [
        name,
        one.guess or element("span", "no guess", class_="muted"),
        Markup(f"{one.count:,}{part}"),
        str(list(one.first)),
        figure(one.max_abs),
        f"{one.max_ulp:,}",
        direction(one.cosine),
    ]


def settings_table(weights: WeightsReport) -> Markup:
    columns = [Column("Setting"), Column("Hugging Face"), Column("Megatron")]
    rows: list[Row] = [[name, _value(theirs), _value(ours)] for name, (theirs, ours) in weights.settings.items()]
    return table("Settings that differ", columns, rows)


def _value(value: object) -> Markup:
    return element("span", str(value), class_="name")


def points_table(logits: LogitsReport) -> Markup:
    """What the picture shows, for those who do not see it: the worst point of each group."""
    columns = [Column("Worst point of each layer"), *map(number, ("Difference", "Allowed", "Times the allowed"))]
    groups = [group for tower in ("vision", "text") for group in grouped(logits.points, tower, logits.deepstack)]
    rows: list[Row] = []
    for point in (group.worst for group in groups):
        times = apart(excess(point), 1.0)[0]
        said: Child = times if point.passed else beyond(times)
        rows.append([breakable(place_name(point)), *apart(point.difference, point.allowed), said])
    return table("The worst point of each layer", columns, rows)
