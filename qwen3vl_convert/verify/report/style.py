"""How the report and its pictures look: one set of colours for light and dark, told apart without seeing red or green.

Right is blue and round, wrong is orange and square; the divergence goes from the colour of the page to the strongest.
"""

_LIGHTER = ("#e9eef0", "#cadfe3", "#acd0d6", "#8cbecb", "#6ca9c2", "#4a93b8", "#437daf", "#3d66a5", "#384f92")
_DARKER = ("#20282e", "#253744", "#29475a", "#2c586d", "#2e6b7d", "#2f7f8c", "#4c958c", "#67aa8b", "#8fbe8e")
_RAMP_LIGHT, _RAMP_DARK = (*_LIGHTER, "#333776", "#2b1f5c"), (*_DARKER, "#c2d194", "#f3e39a")
"""Equal steps of lightness between a few colours (in OKLab)."""


def _properties(values: dict[str, str], ramp: tuple[str, ...]) -> str:
    shades = {f"k{number}": colour for number, colour in enumerate(ramp)}
    return "".join(f"--{name}:{value};" for name, value in {**values, **shades}.items())


_LIGHT = {
    "paper": "#ffffff",
    "panel": "#f5f7f8",
    "ink": "#1b1f24",
    "muted": "#59636e",
    "rule": "#d8dee3",
    "hair": "#e9edf0",
    "right": "#0b6a8f",
    "right-soft": "#eaf4f8",
    "wrong": "#a83a0c",
    "wrong-soft": "#fdf1ea",
    "room": "#0b6a8f14",
    "limit": "#6b7680",
    "image": "#8a6d1d",
    "video": "#7a3f87",
}
_DARK = {
    "paper": "#14181c",
    "panel": "#1b2025",
    "ink": "#e6e9ec",
    "muted": "#9aa5b0",
    "rule": "#353d45",
    "hair": "#252b31",
    "right": "#5fb8dc",
    "right-soft": "#172a34",
    "wrong": "#ff9468",
    "wrong-soft": "#33211a",
    "room": "#5fb8dc1a",
    "limit": "#86919b",
    "image": "#d9b64e",
    "video": "#c98fd6",
}

COLOURS = (
    f":root{{color-scheme:light dark;{_properties(_LIGHT, _RAMP_LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_properties(_DARK, _RAMP_DARK)}}}}}\n"
)

PICTURES = (
    """
.picture { display: block; font: 11px/1 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.picture text { fill: var(--ink); font-variant-numeric: tabular-nums; }
.picture .title { font-size: 13px; font-weight: 600; }
.picture .tick { fill: var(--muted); }
.picture .value { font-size: 12px; }
.picture .wrong, .picture .flagged { fill: var(--wrong); }
.picture .flagged { font-size: 12px; }
.strong { font-weight: 700; }
.grid { stroke: var(--hair); }
.zero { stroke: var(--rule); stroke-dasharray: 2 3; }
.edge { stroke: var(--hair); }
.room { fill: var(--room); }
.allowed { fill: none; stroke: var(--limit); stroke-width: 1.5px; vector-effect: non-scaling-stroke; }
.good { fill: var(--right); stroke: var(--right); stroke-width: 1.2px; }
.bad { fill: var(--wrong); stroke: var(--wrong); stroke-width: 1.2px; }
.into { fill: var(--paper); }
.reach { stroke: var(--muted); stroke-width: 1.5px; opacity: .5; }
.ring { fill: none; stroke: var(--wrong); stroke-width: 1.8px; }
.flag { stroke: var(--wrong); stroke-dasharray: 3 3; }
.hover { fill: transparent; }
.hover:hover { fill: var(--ink); fill-opacity: .07; }
.bar { fill: var(--right); }
.cell { stroke: var(--paper); stroke-width: .6px; }
.cell:hover { stroke: var(--ink); stroke-width: 1.6px; }
.odd { fill: var(--wrong); }
.kind-i { fill: var(--image); }
.kind-v { fill: var(--video); }
.summary, .tight { display: none; }
@media (max-width: 700px) {
  .every, .roomy { display: none; }
  .cell { stroke-width: .2px; }
  .summary, .tight { display: inline; }
}
"""
    + "\n".join(f".k{number} {{ fill: var(--k{number}); }}" for number in range(len(_RAMP_LIGHT)))
    + "\n"
)

PAGE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; background: var(--paper); }
body {
  margin: 0 auto; padding: clamp(1rem, 4vw, 3.5rem) clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1, h2, h3, p, dl, dd, ul, table, figure { margin: 0; padding: 0; }
h1 {
  font-size: clamp(1.35rem, 1rem + 1.7vw, 2.1rem); line-height: 1.2; font-weight: 650; letter-spacing: -.012em;
  text-wrap: balance; overflow-wrap: anywhere;
}
h2 { font-size: 1.2rem; line-height: 1.3; font-weight: 650; margin: 0 0 .35rem; }
p { max-width: 72ch; text-wrap: pretty; overflow-wrap: anywhere; }
.name {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: .86em; line-height: 1.4; overflow-wrap: anywhere;
}
.word { white-space: nowrap; }
.muted, .lead { color: var(--muted); }
.lead { margin-bottom: 1.1rem; }
.bad-text { color: var(--wrong); font-weight: 600; white-space: nowrap; }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
section { margin-top: 3rem; }
header .kicker { color: var(--muted); font-size: .9rem; margin-bottom: .7rem; }
.verdict {
  border-left: 5px solid var(--right); background: var(--right-soft); border-radius: 3px;
  padding: 1.1rem 1.4rem 1.2rem;
}
.verdict.differs { border-color: var(--wrong); background: var(--wrong-soft); }
.verdict .answer {
  font-size: .8rem; font-weight: 700; letter-spacing: .09em; text-transform: uppercase;
  color: var(--right); margin-bottom: .3rem;
}
.verdict.differs .answer { color: var(--wrong); }
.verdict h1 + p { margin-top: .65rem; }
.checks {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 0 2rem;
  margin-top: 1.2rem; list-style: none;
}
.checks li {
  border-top: 1px solid var(--rule); padding: .6rem 0 .7rem;
  display: grid; grid-template-columns: 1.5rem 1fr; align-content: start;
}
.checks .mark { color: var(--right); font-weight: 700; }
.checks .differs .mark, .checks .differs strong { color: var(--wrong); }
.checks .not-run .mark { color: var(--muted); }
.checks strong { font-weight: 650; }
.checks span.said { grid-column: 2; color: var(--muted); font-size: .9rem; line-height: 1.4; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 0 3.5rem; }
.facts { display: grid; grid-template-columns: minmax(8.5rem, max-content) 1fr; align-content: start; }
.facts dt, .facts dd {
  border-bottom: 1px solid var(--hair); padding: .42rem 0; line-height: 1.45; overflow-wrap: anywhere;
}
.facts dt { color: var(--muted); padding-right: 1.5rem; }
figure { margin-top: 1rem; }
svg.picture { margin-left: 56px; width: calc(100% - 62px); }
svg.ulps { max-width: 40rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem 1rem .5rem 0; border-bottom: 1px solid var(--hair); vertical-align: top; text-align: left; }
thead th {
  border-bottom: 1px solid var(--rule); color: var(--muted); font-size: .92em; font-weight: 600;
  line-height: 1.3; vertical-align: bottom;
}
tbody th { font-weight: 500; }
th.number, td.number { text-align: right; }
td.number { white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
.under { display: block; color: var(--muted); font-size: .84rem; line-height: 1.45; }
.tensor .under { font-size: .74rem; font-weight: 400; margin-top: .15rem; }
.short { min-width: 8.5rem; }
.tensor { min-width: 18rem; }
.tensor .name { font-size: .8rem; }
.guess { min-width: 12rem; }
details { margin-top: .9rem; }
summary { cursor: pointer; color: var(--right); width: fit-content; padding: .25rem 0; }
summary:focus-visible { outline: 2px solid var(--right); outline-offset: 3px; border-radius: 2px; }
.prompt { border-top: 1px solid var(--hair); padding: .8rem 0 .9rem; }
.prompt h3 { font-size: 1rem; font-weight: 600; }
.prompt .contents { white-space: pre-wrap; margin-top: .35rem; max-width: none; }
ul.plain { padding-left: 1.15rem; max-width: 76ch; }
ul.plain li + li { margin-top: .3rem; }
footer {
  margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--rule);
  color: var(--muted); font-size: .88rem;
}
@media screen and (max-width: 66rem) {
  .cards, .cards tbody, .cards th, .cards td { display: block; width: auto; min-width: 0; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .cards tr {
    display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .45rem 1rem;
    border-top: 1px solid var(--rule); padding: .75rem 0 .95rem;
  }
  .cards th, .cards td { border: 0; padding: 0; overflow-wrap: anywhere; }
  .cards th, .cards .guess { grid-column: 1 / -1; }
  .cards th { font-weight: 600; }
  .cards td::before { content: attr(data-label); display: block; color: var(--muted); font-size: .82rem; }
  .cards td.number { text-align: left; white-space: normal; }
}
@media (max-width: 34rem) {
  .facts { grid-template-columns: 1fr; }
  .facts dt { border: 0; padding: .5rem 0 0; font-size: .85rem; line-height: 1.3; }
  .facts dd { padding: .05rem 0 .5rem; }
  .verdict { padding: 1rem; }
  section { margin-top: 2.4rem; }
}
@media print {
  .tensor, .guess, .short { min-width: 0; }
  th, td { padding: .25rem .6rem .25rem 0; }
  table { font-size: 8pt; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section { margin-top: 1.8rem; }
  h3, .verdict, tr, .prompt, figure { break-inside: avoid; }
  h2, .lead { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; opacity: 1; }
  summary { display: none; }
}
"""
