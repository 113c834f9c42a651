"""Round by round: who was online, whose update was averaged, rejected or never came, and what interrupted a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mllm_fl.report import plots
from mllm_fl.report.html import Markup, figure, join, listing, name, paragraph, section, table, tag
from mllm_fl.report.reading import Found, Run

SHOWN = 40  # rejected updates that are listed one by one
DRAWN = 6  # runs whose rounds are drawn
CLIENTS, ROUNDS = 1000, 5000  # of a run that is drawn


def timeline(found: Found) -> Markup:
    """The section: pictures of the runs with the most trouble, counts, rejected updates with their reasons, interruptions."""
    sent = sum(len(run.clients) for run in found.runs)
    parts: list[object] = [_pictures(found)]
    bad = [(run, row) for run in found.runs for row in run.clients if row.get("status", "ok") != "ok"]
    if not sent:
        parts.append(paragraph("The runs recorded no client rows."))
    elif not bad:
        parts.append(paragraph(f"None of the {sent:,} client updates was rejected."))
    else:
        counts = Counter(run.label for run, _ in bad)
        said = [f"{label}: {n:,} of {len(run.clients):,}" for run, label, n in _by_run(found, counts)]
        parts += [paragraph(f"{len(bad):,} of {sent:,} client updates were rejected and not averaged:"), listing(said)]
        body = [[run.label, row.get("round"), row.get("client"), row.get("reason") or "–"] for run, row in bad[:SHOWN]]
        parts.append(table("Rejected updates", ["run", "round", "client", "why"], body))
        if len(bad) > SHOWN:
            parts.append(paragraph(f"{len(bad) - SHOWN:,} more are in the runs' clients.jsonl.", class_="note"))
    other = [
        f"{run.label}: {event} ×{n}"
        for run in found.runs
        for event, n in Counter(str(e.get("event")) for e in run.events).items()
        if event not in ("finished", "update rejected")
    ]
    return section(
        "timeline",
        "Round by round: drop-outs, rejected updates, interruptions",
        *parts,
        listing(other) if other else "",
    )


def states(run: Run) -> list[list[str | None]]:
    """What became of each client (outer) in each recorded round (inner): "averaged", "rejected", "no answer", or None for offline."""
    online = [list(row["clients"]) for row in run.rounds if isinstance(row.get("clients"), list)]
    if len(online) < len(run.rounds) or not online:
        return []
    place = {row["round"]: i for i, row in enumerate(run.rounds)}
    width = len(run.federation.get("clients") or ()) or 1 + max(k for there in online for k in there)
    out: list[list[str | None]] = [[None] * len(online) for _ in range(width)]
    for i, there in enumerate(online):
        for k in there:
            if isinstance(k, int) and 0 <= k < width:
                out[k][i] = "no answer"
    for row in run.clients:
        k, at = row.get("client"), place.get(row.get("round"))
        if isinstance(k, int) and 0 <= k < width and at is not None:
            out[k][at] = "averaged" if row.get("status", "ok") == "ok" else "rejected"
    return out


def _pictures(found: Found) -> Markup:
    """Runs with the most trouble first; else the first run of each arm."""
    known = [(run, grid) for run in found.runs if (grid := states(run))]
    counted = [(run, grid, Counter(s for row in grid for s in row if s)) for run, grid in known]
    first = {id(arm.first) for arm in found.arms}
    counted.sort(key=lambda c: (-(c[2]["rejected"] + c[2]["no answer"]), id(c[0]) not in first))
    distinct = list({str(c[1]): c for c in reversed(counted)}.values())[
        ::-1
    ]  # seeds share a schedule: one picture stands for all
    chosen = [c for c in distinct if len(c[1]) <= CLIENTS and len(c[1][0]) <= ROUNDS][:DRAWN]
    if not chosen:
        return Markup("")
    pictures = []
    for i, (run, grid, counts) in enumerate(chosen):
        said = f"{sum(counts.values()):,} online: " + ", ".join(f"{counts[s]:,} {s}" for s in plots.STATES)
        svg = plots.participation(f"t{i}", grid, f"Clients by rounds of {run.label}. {said}")
        pictures.append(figure(svg, tag("strong", name(run.label)), f": {said}"))
    colours = [
        tag("li", tag("span", class_="swatch", style=f"background:{_css(s)}", aria_hidden="true"), f" {s}")
        for s in plots.STATES
    ]
    legend = tag("ul", *colours, tag("li", "empty: offline"), class_="legend")
    alike, rest = len(counted) - len(distinct), len(distinct) - len(chosen)
    notes = [f"{alike} more runs had exactly such rounds as one that is drawn."] if alike else []
    notes += [f"{rest} more are not drawn: those with the most rejected or missing updates are."] if rest else []
    note = " ".join(notes)
    grid_ = tag("div", *pictures, class_="grid")
    return join([legend, grid_, paragraph(note, class_="note") if note else ""])


def _css(state: str) -> str:
    return "rgb(" + ",".join(f"{255 * part:.0f}" for part in plots.STATES[state]) + ")"


def _by_run(found: Found, counts: Mapping[str, int]) -> list[tuple[Run, str, int]]:
    return [(run, run.label, counts[run.label]) for run in found.runs if counts.get(run.label)]
