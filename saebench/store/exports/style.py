"""The style sheet of exported pages: grays, orange for activation, blue for its opposite, light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: light-dark(#ffffff, #14161a); --text: light-dark(#20242b, #e4e7ec);
  --hot: light-dark(#f28c1e, #d9650f); --hot-text: light-dark(#9a4a00, #ffb066);
  --cold: light-dark(#2f7fc1, #3f8fd6); --link: light-dark(#0b63b0, #7db8f0);
  --quiet: color-mix(in srgb, var(--text) 62%, var(--page));
  --line: color-mix(in srgb, var(--text) 14%, transparent);
  --shade: color-mix(in srgb, var(--text) 5%, transparent);
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.6rem 1.4rem 4rem; max-width: 78rem;
  background: var(--page); color: var(--text);
  font: 0.95rem/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--link); outline-offset: 2px;
  border-radius: 2px; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.7rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
h3 { font-size: 0.95rem; font-weight: 650; margin: 1.5rem 0 0.4rem; }
.facts, .note { color: var(--quiet); font-size: 0.86rem; margin: 0.1rem 0 0; overflow-wrap: anywhere; }
header { border-bottom: 1px solid var(--line); padding-bottom: 0.9rem; }
article { padding-top: 1.7rem; }
article + article { margin-top: 2.6rem; border-top: 1px solid var(--line); }
.title { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0.2rem 0.8rem; }
.label { font-size: 1.05rem; color: var(--hot-text); overflow-wrap: anywhere; min-width: 0; }
.badge { font-size: 0.78rem; padding: 0.05rem 0.5rem; border-radius: 1rem; background: var(--shade);
  border: 1px solid var(--line); color: var(--quiet); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.4rem, 1fr)); gap: 1px; margin: 1rem 0 0;
  border: 1px solid var(--line); border-radius: 0.5rem; overflow: hidden; }
dl > div { padding: 0.5rem 0.8rem 0.55rem; box-shadow: 0 0 0 1px var(--line); min-width: 0; }
dt, dd.more { color: var(--quiet); font-size: 0.8rem; }
dd { margin: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
dd.value { font-size: 1.25rem; font-weight: 600; line-height: 1.3; }
.columns { display: grid; grid-template-columns: minmax(0, 11fr) minmax(0, 9fr); gap: 0 2.4rem; }
ol { list-style: none; margin: 0; padding: 0; }
li { display: grid; grid-template-columns: 3.2rem minmax(0, 1fr); gap: 0.7rem; padding: 0.5rem 0;
  border-top: 1px solid var(--line); }
li .value { text-align: right; color: var(--hot-text); font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.65; unicode-bidi: isolate; }
.t { --strength: calc(var(--a) * 0.86 + 8%); padding: 0.1em 0; border-radius: 2px;
  background: color-mix(in srgb, var(--hot) var(--strength), transparent);
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.t.cold { background: color-mix(in srgb, var(--cold) var(--strength), transparent); }
.peak { box-shadow: inset 0 -2px 0 var(--hot-text); }
.cut, .origin { color: var(--quiet); }
.origin { font-size: 0.78rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
summary { cursor: pointer; font-weight: 650; margin: 1.1rem 0 0.5rem; }
table { width: 100%; border-collapse: collapse; font-size: 0.88rem; }
th { text-align: right; font-weight: 500; color: var(--quiet); padding: 0.2rem 0.5rem; }
td { text-align: right; padding: 0.2rem 0.5rem; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0.35rem; }
th.l, td.l { text-align: left; white-space: normal; }
code { font: 0.86rem/1.4 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; background: var(--shade); border-radius: 3px;
  padding: 0.05rem 0.25rem;
  unicode-bidi: isolate; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0 1.4rem; }
td.bar { --tint: color-mix(in srgb, var(--hot) 26%, transparent); --length: calc(var(--w) * 0.94);
  padding-right: 0.35rem;
  background: linear-gradient(to left, var(--tint) var(--length), transparent var(--length)); }
td.bar.cold { --tint: color-mix(in srgb, var(--cold) 26%, transparent); }
svg { display: block; width: 100%; height: auto; }
svg rect { fill: var(--hot); }
svg line { stroke: var(--line); }
svg text { fill: var(--quiet); font-size: 11px; }
.scroll { overflow-x: auto; }
footer { margin-top: 3rem; color: var(--quiet); font-size: 0.8rem; }
@media (max-width: 860px) { .columns { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 480px) {
  body { padding: 1rem 0.9rem 3rem; }
  li { grid-template-columns: 2.6rem minmax(0, 1fr); gap: 0.5rem; }
  .pair { grid-template-columns: minmax(0, 1fr); }
}
@media print { details > * { display: block; } article { break-before: page; } }
""".strip()
