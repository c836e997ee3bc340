"""CSS of the page about a run, beside that of its plots (report_plots.py)."""

STYLE = """
header p b { color: var(--ink); font-weight: 600; }
header p { max-width: 900px; font-size: 15px; }
main { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
h2 { margin: 0 0 12px; font-size: 16px; font-weight: 650; }
h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--soft); overflow-wrap: anywhere; unicode-bidi: isolate; }
h3 i { font-weight: 400; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.small { margin: 0; color: var(--soft); font-size: 12px; }
section > .small { margin-bottom: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 16px; }
.tiles.wide { grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
.big { margin: 0; font-size: 30px; line-height: 1.25; font-weight: 650; letter-spacing: -.01em; }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 18px; margin-top: 8px; }
.columns .big { font-size: 24px; white-space: nowrap; }
.tiles.wide h3 { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 6px; }
.pill { margin-left: auto; padding: 0 8px; border: 1px solid currentColor; border-radius: 99px; font-size: 12px; }
.pill.above { color: var(--good); }
.pill.at { color: var(--warm); }
.pill.below { color: var(--bad); }
.meter { position: relative; height: 5px; margin: 6px 0; border-radius: 3px; background: var(--well); }
.meter b { position: absolute; inset: 0 auto 0 0; border-radius: 3px; background: var(--label); }
.meter i { position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -1px; background: var(--warm); }
.facts { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 0 0 18px; }
.facts dd { margin: 0; font-size: 18px; font-weight: 600; }
.facts dt { color: var(--soft); font-size: 12px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 24px 28px; }
.figures.large, .queries { display: grid; grid-template-columns: minmax(0, 1fr); gap: 28px 40px; }
@media (min-width: 860px) { .figures.large, .queries { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
article h3 { color: var(--ink); font-size: 14px; font-weight: 600; }
ol { list-style: none; margin: 8px 0 0; padding: 0; display: grid; grid-template-columns: repeat(5, minmax(0, 1fr));
  gap: 8px; }
li { border: 2px solid transparent; border-radius: 8px; background: var(--well); overflow: hidden; }
li.right { border-color: var(--good); }
li.right b { color: var(--good); }
li img, li > .none { display: grid; place-items: center; width: 100%; aspect-ratio: 1; object-fit: contain; }
li .small { margin: 5px 7px; }
li .score { display: flex; flex-wrap: wrap; justify-content: space-between; }
.caption { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden;
  line-height: 1.3; font-size: 11px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 18px 5px 0; text-align: start; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-size: 12px; font-weight: 500; }
td { unicode-bidi: isolate; }
.numbers td { white-space: nowrap; }
.numbers td .bad { white-space: normal; }
.prose td { max-width: 460px; overflow-wrap: break-word; }
.prose td:first-child { white-space: nowrap; }
.prose td:last-child { min-width: 220px; max-width: 900px; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
td .bad { padding: 0; }
code { font: 12.5px ui-monospace, monospace; overflow-wrap: normal; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--label); margin-bottom: 8px; }
section h3 { margin: 14px 0 4px; }
article h3 { margin: 0; }
@media (min-width: 1000px) { .figures.large .plot text { font-size: 9px; } }
@media (max-width: 560px) {
  body { padding: 18px 12px 32px; }
  section, .tile { padding: 12px; }
  .tiles, .tiles.wide { gap: 10px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles.wide { grid-template-columns: minmax(0, 1fr); }
  .big { font-size: 24px; }
  .columns { gap: 12px; }
  .columns .big { font-size: 20px; }
  ol { gap: 4px; }
  .prose thead { display: none; }
  .prose tr { display: block; padding: 7px 0; border-bottom: 1px solid var(--line); }
  .prose tr:last-child { border-bottom: 0; }
  .prose td, .prose td:last-child { display: block; max-width: none; min-width: 0; padding: 0; border: 0;
    overflow-wrap: anywhere; }
  .prose td[data-head]::before { content: attr(data-head) " "; color: var(--soft); font-size: 12px; }
  .prose tr :first-child { font-weight: 600; }
}
"""
