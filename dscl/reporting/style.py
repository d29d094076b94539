"""The CSS of the HTML report: light and dark themes, screens of any width, and print."""

from dscl.monitoring.heat_map import EDGE_COLOUR, HEAT_COLOUR, HIGH_INK, LOW_INK

LIGHT = f"""
  --ground: #f6f7f9; --card: #ffffff; --ink: #161a1f; --soft: #565f6b; --rule: {EDGE_COLOUR}; --heat: {HEAT_COLOUR};
  --low: {LOW_INK}; --high: {HIGH_INK}; --note: #fff6df; --shade: #161a1f30; --mark: #1b66a8;
  --c0: #0072b2; --c1: #d55e00; --c2: #00805e; --c3: #b0568c; --c4: #b88400; --c5: #3d9bd6; --c6: #7a4fb5;
  --c7: #4a4f57;
"""
DARK = """
  --ground: #0f1216; --card: #181b20; --ink: #e8ebef; --soft: #a2abb7; --rule: #2e343c; --heat: #5fb0f0;
  --low: #ffffff; --high: #0b0e12; --note: #2b2717; --shade: #000000b0; --mark: #7cc0f5;
  --c0: #56a8e8; --c1: #f08650; --c2: #3fc79a; --c3: #e29cc6; --c4: #e6b43c; --c5: #9ad4f7; --c6: #b79af0;
  --c7: #c3c9d1;
"""
STYLE = (
    f":root {{ color-scheme: light dark;{LIGHT}}}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{{DARK}}} }}\n"
    + "".join(f".c{i} {{ --line: var(--c{i}); }}\n" for i in range(8))
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5; -webkit-text-size-adjust: 100%;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { margin-bottom: 2rem; }
h1 { font-size: 1.9rem; letter-spacing: -0.02em; margin: 0 0 0.25rem; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 2rem 0 0.25rem; }
p { margin: 0.25rem 0 0.75rem; }
a { color: var(--mark); }
.soft, figcaption small { color: var(--soft); font-size: 0.875rem; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 1.5rem;
  margin: 0 0 1.5rem; }
.number { color: var(--soft); font-size: 0.8125rem; font-weight: 600; margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: 0.35rem 1.5rem; margin: 0 0 1rem; }
.facts div { display: flex; gap: 0.4rem; font-size: 0.875rem; min-width: 0; }
.facts dt { color: var(--soft); white-space: nowrap; }
.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.facts .apart dd { color: var(--mark); font-weight: 600; }
.scroll { overflow-x: auto; scrollbar-width: thin; margin: 0 -0.25rem; padding: 0 0.25rem;
  background: linear-gradient(to right, var(--card) 40%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--card) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--soft) 1px, var(--shade) 1px, transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--soft) 1px, var(--shade) 1px, transparent) right / 1rem 100% no-repeat scroll; }
tbody th small { color: var(--soft); font-weight: 400; font-size: 0.85em; display: block; }
td small { color: var(--soft); font-size: 0.8em; }
.scroll + .scroll { margin-top: 1.25rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.5rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 600; font-size: 0.8125rem; vertical-align: bottom; }
thead th[title] { text-decoration: underline dotted; text-underline-offset: 3px; cursor: help; }
th:first-child, .words th, .words td { text-align: left; }
tr > th:first-child { position: sticky; left: 0; background: var(--card); }
tbody th { font-weight: 600; white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
tbody tr:last-child > * { border-bottom: 0; }
.words td { white-space: normal; overflow-wrap: anywhere; min-width: 4rem; }
.notes { background: var(--note); border-radius: 8px; padding: 0.6rem 0.9rem 0.6rem 2rem; margin: 1rem 0 0;
  font-size: 0.875rem; }
.notes li, .toc li { overflow-wrap: anywhere; }
.papers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem;
  margin-top: 1.5rem; }
.published { border: 1px dashed var(--rule); border-radius: 10px; padding: 1rem; }
.published h3 { margin: 0; } .published th, .published td { padding: 0.25rem 0.6rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 1.25rem; }
.maps { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem; }
.charts > *, .maps > * { min-width: 0; max-width: 100%; }
figure { margin: 0.5rem 0 0; }
figcaption { font-weight: 600; font-size: 0.875rem; margin-bottom: 0.35rem; overflow-wrap: anywhere; }
details { margin-top: 1.25rem; }
summary { cursor: pointer; color: var(--mark); font-weight: 600; font-size: 0.9rem; }
dl.words { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.25rem; font-size: 0.9rem;
  margin: 0.5rem 0 0; }
dl.words dt { font-weight: 600; } dl.words dd { margin: 0; color: var(--soft); }
svg { display: block; } svg text { font-size: 12px; fill: var(--ink); }
svg .tick, svg .axis { font-size: 11px; fill: var(--soft); } svg .axis { font-size: 10.5px; }
svg .low { fill: var(--low); } svg .high { fill: var(--high); }
.heat { fill: var(--heat); } .edge, .none { fill: none; stroke: var(--rule); } .none { stroke-dasharray: 2 3; }
.own { stroke: var(--ink); stroke-width: 1.75; }
.chart { width: 100%; height: auto; } .charts .chart { max-width: 440px; }
.wide, .narrow { overflow: visible; } .narrow { display: none; max-width: 500px; }
.grid { stroke: var(--rule); } .mark { stroke: var(--soft); stroke-dasharray: 1 4; }
.line { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: var(--line); stroke: var(--card); stroke-width: 1.5; }
.d1 .line { stroke-dasharray: 7 4; } .d2 .line { stroke-dasharray: 2 4; }
.faint .line { opacity: 0.4; stroke-width: 1.5; } .thin .line { stroke-width: 1.25; }
.other { --line: var(--soft); } .other .line { stroke-dasharray: 5 4; stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; list-style: none; padding: 0;
  margin: 0.25rem 0 0.5rem; font-size: 0.8125rem; }
.legend li { display: flex; align-items: center; gap: 0.4rem; overflow-wrap: anywhere; }
.legend svg { flex: none; }
@media (max-width: 1000px) { .wide .tick, .wide .axis { font-size: 15px; } }
@media (max-width: 640px) { .wide { display: none; } .narrow { display: block; } }
@media (max-width: 560px) {
  tr > th:first-child { border-right: 1px solid var(--rule); }
  main { padding: 1.25rem 0.75rem 3rem; } section { padding: 1.1rem 0.9rem; border-radius: 12px; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; }
  th, td { padding: 0.45rem 0.6rem; } tbody th { min-width: 7rem; max-width: 38vw; }
  dl.words { grid-template-columns: 1fr; gap: 0; } dl.words dd { margin-bottom: 0.5rem; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  html { font-size: 13px; } body { background: #ffffff; } main { max-width: none; padding: 0; }
  section { border: 0; padding: 0 0 1rem; } .scroll { overflow: visible; background: none; }
  tr > th:first-child { position: static; }
  table { font-size: 7.5pt; } th, td { padding: 0.25rem 0.35rem; } .map { max-width: 100%; height: auto; }
  thead th { font-size: inherit; } .charts { grid-template-columns: 1fr 1fr; }
  figure, tr, .published { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""
)
