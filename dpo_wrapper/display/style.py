"""The style of all pages."""

STYLE = """\
:root { --text: #1d2329; --soft: #56606b; --page: #fff; --box: #f4f6f8; --line: #d3d9df;
  --problem: #b3261e; --note: #2c5f9e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --soft: #a3adb8; --page: #14181c; --box: #1e242a; --line: #3a434c;
    --problem: #ff9c92; --note: #8fbdf5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.25rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 0; }
h4 { font-size: .85rem; font-weight: 600; color: var(--soft); margin: 0 0 .25rem; overflow-wrap: anywhere; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
.settings { display: flex; flex-wrap: wrap; gap: .25rem 2rem; margin: 0; }
.settings div { display: flex; gap: .5rem; } .settings dt { color: var(--soft); }
.settings dd { margin: 0; overflow-wrap: anywhere; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; margin-top: 1rem; align-items: flex-start;
  overflow-x: auto; }
.scrolled { overflow-x: auto; margin: .5rem 0; } .scrolled td { white-space: nowrap; }
.scrolled th:first-child { position: sticky; left: 0; background: var(--page); min-width: 5rem; }
@media (max-width: 30rem) { .scrolled table { font-size: .8rem; } }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .25rem; }
th, td { text-align: right; padding: .15rem .4rem; font-weight: 400; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; } thead th { color: var(--soft); }
.total tbody tr:last-child > * { font-weight: 600; border-bottom: 0; }
article { background: var(--box); border-left: .3rem solid var(--note); border-radius: .3rem;
  padding: .6rem .9rem; margin: .6rem 0; }
.problem { border-color: var(--problem); }
.problem h3 { color: var(--problem); } .note h3 { color: var(--note); }
summary { cursor: pointer; padding: .25rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 32rem; } figure svg { width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
.row { border: 1px solid var(--line); border-radius: .3rem; background: var(--page); padding: .6rem .8rem;
  margin: .6rem 0; }
.row dl { margin: 0; } .row dt { color: var(--soft); font-size: .85rem; }
.row dd { margin: 0 0 .4rem; font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 0 1rem; }
.missing { color: var(--soft); }
pre { background: var(--box); border-radius: .3rem; padding: .6rem .9rem; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, monospace; }
"""
