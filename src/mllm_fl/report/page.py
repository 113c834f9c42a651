"""The report: one HTML file that needs nothing else, and that a reader who was not there understands."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_fl.engines.checkpoint import write_atomic
from mllm_fl.errors import UserError
from mllm_fl.report import figures
from mllm_fl.report.load import RunView, by_arm, config_differences, load_runs
from mllm_fl.report.table import SCORES, Row, compare, footnotes, headers, percent, plain
from mllm_fl.runs import read_json, read_rows

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6673;--line:#d5dae0;--paper:#fff;--tint:#f4f6f8}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa5b1;--line:#3a424b;--paper:#14181c;--tint:#1d2329}}
*{box-sizing:border-box}body{margin:0 auto;max-width:60rem;padding:1.2rem;font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line)}p{margin:.5rem 0}
.lead{font-size:1.08rem}.note,figcaption{color:var(--soft);font-size:.86rem}figure{margin:.6rem 0}svg{max-width:100%;height:auto;display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .5rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:7rem}
td.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible,.act:focus-visible{outline:2px solid #0072b2}
.act{margin:.4rem .4rem 0 0;padding:.25rem .6rem;border:1px solid var(--line);border-radius:.3rem;background:var(--tint);color:inherit;cursor:pointer}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem}.grid figure{min-width:0}
.card{border:1px solid var(--line);border-radius:.4rem;padding:.7rem;background:var(--tint)}.card img{width:6rem;height:6rem;image-rendering:pixelated;float:left;margin:0 .8rem .4rem 0}
.card dl{margin:.2rem 0;font-size:.86rem}.card dt{color:var(--soft)}.card dd{margin:0 0 .3rem}pre{background:var(--tint);padding:.6rem;overflow-x:auto;font-size:.82rem}
@media print{.act{display:none}h2{break-after:avoid}figure,.card{break-inside:avoid}body{max-width:none}}
"""
SCRIPT = """
for(const table of document.querySelectorAll('table.sortable')){table.querySelectorAll('th').forEach((th,i)=>{const b=document.createElement('button');b.textContent=th.textContent;
b.title='sort';th.textContent='';th.append(b);let up=false;b.onclick=()=>{up=!up;const body=table.tBodies[0];[...body.rows].sort((x,y)=>{const a=x.cells[i].dataset.v??x.cells[i].textContent,
c=y.cells[i].dataset.v??y.cells[i].textContent;const d=(isNaN(a)||isNaN(c))?a.localeCompare(c):a-c;return up?d:-d}).forEach(r=>body.append(r));
table.querySelectorAll('th').forEach(o=>o.removeAttribute('aria-sort'));th.setAttribute('aria-sort',up?'ascending':'descending')}});
const copy=document.createElement('button');copy.className='act';copy.textContent='copy as CSV';copy.onclick=async()=>{const text=[...table.rows].map(r=>[...r.cells].map(c=>'"'+c.textContent.replaceAll('"','""')+'"').join(',')).join('\\n');
try{await navigator.clipboard.writeText(text)}catch{const t=document.createElement('textarea');t.value=text;document.body.append(t);t.select();document.execCommand('copy');t.remove()}
copy.textContent='copied'};table.parentElement.after(copy)}
"""


def build(runs: Sequence[Path], out: Path, *, title: str = "mllm-fl", corpus: Path | None = None) -> Path:
    """Write one self-contained page about these run folders; returns its path.

    Args:
        runs: run folders; unfinished ones are named, not counted.
        corpus: a corpus folder, of which a few annotated images are shown.

    Raises:
        UserError: no finished run, runs with different classes, a broken record (with its line), or ``out`` cannot be written.
    """
    views, unfinished = load_runs(runs)
    rows = compare([v.final for v in views])
    parts = [
        f"<h1>{_e(title)}</h1><p class='lead'>{_e(sentence(views, rows))}</p>",
        _section("Accuracy", _table(rows)),
        _section(
            "Over the rounds",
            _figure(
                figures.curves(views),
                "Test accuracy after each evaluated round. Line: mean over seeds; band: one standard deviation.",
            ),
        ),
        _section("Many, medium, few", _figure(figures.group_bars(views), _groups(views[0]))),
        _section("What is taken for what", _confusions(views)),
        _section("Who holds what", _holdings(views[0])),
        _section("Costs", _costs(rows) + _rejected(views)),
    ]
    if corpus is not None:
        parts.append(_section("What the annotator said", _annotations(corpus)))
    parts += [
        _section("What differs between the arms", _differences(views)),
        _section("Provenance", _provenance(views, unfinished)),
    ]
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_e(title)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )
    try:
        write_atomic(out, page.encode("utf-8", "replace"))
    except OSError as e:
        raise UserError(out, f"cannot be written: {e.strerror}", "choose another place with --out FILE") from e
    return out


def sentence(views: Sequence[RunView], rows: Sequence[Row]) -> str:
    """What happened, in words, with numbers that stand in the table."""
    first = views[0].final
    total, clients = sum(first.get("class_counts") or [0]), len((views[0].federation or {}).get("clients", [])) or None
    what = f"{len(views)} finished run{'s' if len(views) != 1 else ''}, {len(rows)} arm{'s' if len(rows) != 1 else ''}"
    data = f"{total:,} training images of {len(first['class_names'])} classes" + (
        f" on {clients} clients" if clients else ""
    )
    says = f"{what}: {data}."
    by_stage = {
        (r[0].final["stages"].get("pretrain"), r[0].final["stages"].get("align")): a for a, r in by_arm(views).items()
    }
    scores = {r.arm: r.values["mean_last"] for r in rows}
    base = scores.get(by_stage.get((False, False), ""))
    if base is not None and len(by_stage) > 1:
        brought = []
        for stages, words in (((True, False), "pretraining"), ((False, True), "alignment"), ((True, True), "both")):
            value = scores.get(by_stage.get(stages, ""))
            if value is not None:
                brought.append(f"with {words} {100 * value.mean:.1f} %")
        if brought:
            says += f" Federated training alone reaches {100 * base.mean:.1f} %, {', '.join(brought)} (mean of the last rounds)."
    return says


def _e(text: object) -> str:
    return html.escape(plain(str(text)), quote=True)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>" if body else ""


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_e(caption)}</figcaption></figure>"


def _table(rows: Sequence[Row]) -> str:
    titles = headers(rows)
    head = "".join(f"<th scope='col'>{_e(t)}</th>" for t in ("arm", "seeds", *titles.values()))
    body = ""
    for r in rows:
        cells = "".join(_cell(percent(r.values[k]), r.values[k]) for k in SCORES)
        body += f"<tr><td>{_e(r.arm)}</td><td>{len(r.seeds)}</td>{cells}</tr>"
    notes = "".join(f"<p class='note'>{_e(n)}</p>" for n in footnotes(rows))
    return f"<div class='scroll'><table class='sortable'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"


def _cell(text: str, value: Any) -> str:
    known = f" data-v='{100 * value.mean:.6f}'" if value is not None else ""
    return f"<td{known}>{_e(text)}</td>"


def _groups(view: RunView) -> str:
    g, names = view.final["groups"], view.final["class_names"]
    lists = "; ".join(
        f"{k}: {', '.join(map(str, (names[i] for i in g[k][:12])))}{' …' if len(g[k]) > 12 else ''}"
        for k in ("many", "medium", "few")
    )
    return f"{g['rule']}. {lists}"


def _confusions(views: Sequence[RunView]) -> str:
    drawn = figures.confusions(views)
    inner = "".join(
        _figure(s, f"{arm}: rows are true classes, columns predictions, in label order") for arm, s in drawn
    )
    return f"<div class='grid'>{inner}</div>" if drawn else ""


def _holdings(view: RunView) -> str:
    if view.federation is None:
        return ""
    d = view.federation
    sizes = [c["size"] for c in d["clients"]]
    text = (
        f"{d['total']:,} images of {d['dataset']} on {len(sizes)} clients ({min(sizes)} to {max(sizes)} each); partition {d['partition']}, "
        f"alpha {d['alpha']:g}, seed {d['seed']}; images per class: {', '.join(map(str, d['class_counts'][:50]))}."
    )
    return f"<div class='grid'>{_figure(figures.holdings(d), text)}</div>"


def _costs(rows: Sequence[Row]) -> str:
    head = "".join(f"<th scope='col'>{t}</th>" for t in ("arm", "MB up", "MB down", "seconds, all stages"))
    body = ""
    for r in rows:
        values = [r.values[k] for k in ("bytes_up", "bytes_down", "seconds")]
        shown = [None if v is None else v.mean / (1 if i == 2 else 1e6) for i, v in enumerate(values)]
        body += (
            f"<tr><td>{_e(r.arm)}</td>"
            + "".join(f"<td>{'–' if v is None else f'{v:,.1f}'}</td>" for v in shown)
            + "</tr>"
        )
    return (
        f"<div class='scroll'><table class='sortable'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _rejected(views: Sequence[RunView]) -> str:
    bad = [(v, r) for v in views for r in v.clients if r.get("status") != "ok"]
    if not bad:
        return "<p class='note'>No client update was rejected.</p>"
    rows = "".join(
        f"<tr><td>{_e(v.arm)}</td><td>{v.final['seed']}</td><td>{r['round']}</td><td>{r['client']}</td><td class='text'>{_e(r.get('reason'))}</td></tr>"
        for v, r in bad[:50]
    )
    more = f"<p class='note'>{len(bad) - 50} more.</p>" if len(bad) > 50 else ""
    head = "<th>arm</th><th>seed</th><th>round</th><th>client</th><th>rejected because</th>"
    return f"<div class='scroll'><table class='sortable'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{more}"


def _annotations(corpus: Path, count: int = 6) -> str:
    records = json.loads((corpus / "records.json").read_text(encoding="utf-8"))
    scenes = {s.get("image"): s for s in read_rows(corpus / "scenes.jsonl")}
    card = read_json(corpus / "card.json") if (corpus / "card.json").exists() else {}
    cards = ""
    images = list(dict.fromkeys(r["image"] for r in records))[:count]
    for image in images:
        path = (corpus / image).resolve()
        if not path.is_relative_to(corpus.resolve()) or not path.is_file():
            raise UserError(
                corpus / "records.json", f"image {image!r} is missing", "restore the corpus, or make it again"
            )
        said = ""
        for r in (r for r in records if r["image"] == image):
            turns = [t["value"].replace("<image>", "").strip() for t in r["conversations"]]
            said += "".join(f"<dt>{_e(q)}</dt><dd>{_e(a)}</dd>" for q, a in zip(turns[::2], turns[1::2], strict=False))
        scene = scenes.get(image)
        truth = f"<p class='note'>Truth: {_e(_truth(scene))}</p>" if scene else ""
        picture = base64.b64encode(path.read_bytes()).decode()
        cards += f"<div class='card'><img alt='open image {_e(image)}' src='data:image/png;base64,{picture}'><dl>{said}</dl>{truth}</div>"
    summary = ""
    if isinstance(card.get("agreement"), dict):
        parts = [
            f"{k}: {v['false']} of {v['records']} records state something that the scene contradicts"
            for k, v in card["agreement"].items()
        ]
        summary = f"<p>{_e('; '.join(parts))}. Annotator: {_e(card.get('model'))}.</p>"
    return f"{summary}<div class='grid'>{cards}</div>"


def _truth(scene: dict[str, Any]) -> str:
    keys = ("kind", "name", "weight", "posture", "proportion")
    return ", ".join(f"{k} {scene[k]}" for k in keys if k in scene)


def _differences(views: Sequence[RunView]) -> str:
    rows = config_differences(views)
    if not rows:
        return "<p>Nothing but seeds.</p>"
    head = "<th scope='col'>key</th>" + "".join(f"<th scope='col'>{_e(a)}</th>" for a in by_arm(views))
    body = "".join(
        f"<tr><td>{_e(k)}</td>" + "".join(f"<td>{_e(v)}</td>" for v in values) + "</tr>" for k, values in rows
    )
    return (
        f"<div class='scroll'><table class='sortable'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _provenance(views: Sequence[RunView], unfinished: Sequence[Path]) -> str:
    env = views[0].final.get("environment", {})
    facts = [f"{k}: {v}" for k, v in env.items()]
    facts += [f"leaks of {v.path.name}: {v.final.get('leaks')}" for v in views[:1]]
    facts += [f"alignment images: {v.final['align']}" for v in views if v.final.get("align")][:1]
    facts += [
        f"run {v.path.name}: seed {v.final['seed']}, commit {v.final.get('environment', {}).get('commit')}, command: {v.final.get('command')}"
        for v in views
    ]
    waiting = (
        f"<p class='note'>Unfinished and not counted: {_e(', '.join(p.name for p in unfinished))}.</p>"
        if unfinished
        else ""
    )
    return f"<pre>{html.escape(chr(10).join(map(plain, facts)))}</pre>{waiting}"
