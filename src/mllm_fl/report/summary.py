"""What the page says in words before it shows anything: the data, the rule, and what each stage brought."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_fl.report.html import Markup, join, listing, name, paragraph, tag
from mllm_fl.report.reading import Arm, Found
from mllm_fl.report.table import Value, mean_sd, number, percent

OF_STAGES = ("annotate.", "pretrain.", "align.")
WORDS = {(True, False): "pretraining", (False, True): "alignment", (True, True): "pretraining and alignment"}


def lead(found: Found) -> Markup:
    """The sentences under the title."""
    parts: list[object] = [paragraph(_data(found), class_="lead")]
    by_stage = stages(found.arms)
    rule, path = _rule(found)
    base = by_stage.get((False, False))
    if base is not None and len(by_stage) > 1:
        parts.append(paragraph("Accuracy on the test images, ", rule, ":", class_="lead"))
        parts.append(listing(_brought(base, by_stage, path)))
        parts.append(_rare(base, by_stage))
        parts.append(_beyond_stages(found.arms))
    else:
        parts.append(_range(found.arms, path, rule))
    parts.append(_checked(found))
    return join(parts)


def stages(arms: Sequence[Arm]) -> dict[tuple[bool, bool], Arm]:
    """(pretrained, aligned) -> the one arm that is; empty where two arms share a combination, for then more than stages differ."""
    out: dict[tuple[bool, bool], Arm] = {}
    for arm in arms:
        on = arm.first.final.get("stages")
        key = (bool(on.get("pretrain")), bool(on.get("align"))) if isinstance(on, dict) else (False, False)
        if key in out:
            return {}
        out[key] = arm
    return out


def scores(arm: Arm, *path: str) -> list[float | None]:
    """The number at a path of final.json, run by run."""
    return [number(run.final, *path) for run in arm.runs]


def gain(arm: Arm, base: Arm, *path: str) -> Value | None:
    """The difference in fractions; over equal seeds it is taken seed by seed, so that its deviation is that of the gain."""
    ours, theirs = mean_sd(scores(arm, *path)), mean_sd(scores(base, *path))
    if ours is None or theirs is None:
        return None
    a = {run.final.get("seed"): number(run.final, *path) for run in arm.runs}
    b = {run.final.get("seed"): number(run.final, *path) for run in base.runs}
    if a.keys() == b.keys():
        return mean_sd([x - y for x, y in ((a[s], b[s]) for s in a) if x is not None and y is not None])
    return Value(ours.mean - theirs.mean)


def points(value: Value | None) -> str:
    """A difference as "+24.0 points" or "−3.1 ± 0.4 points"."""
    if value is None:
        return "–"
    sign = "−" if value.mean < 0 else "+"
    return f"{sign}{percent(Value(abs(value.mean), value.sd))} points"


def _rule(found: Found) -> tuple[str, tuple[str, ...]]:
    windows = {number(r.final, "mean_last", "rounds") or number(r.final, "mean_last", "n") for r in found.runs}
    once = any(r.final.get("curve") == "unaligned" for r in found.runs)  # then only the last number knows the alignment
    if len(windows) == 1 and None not in windows and not once:
        return f"mean over the evaluated rounds among the last {windows.pop():g}", ("mean_last", "mean")
    return "last round", ("last", "accuracy")


def _data(found: Found) -> Markup:
    first = found.arms[0].first
    counts = [c for c in first.final.get("class_counts") or [] if isinstance(c, int)]
    clients = first.federation.get("clients") or first.config.get("data.clients")
    holders = len(clients) if isinstance(clients, list) else clients
    runs, arms = len(found.runs), len(found.arms)
    said = f"{runs} finished run{'s' * (runs > 1)}, {arms} arm{'s' * (arms > 1)}: {len(found.class_names)} classes"
    if counts:
        said += f", {sum(counts):,} training images"
        if min(counts) > 0:
            said += f" (from {max(counts):,} down to {min(counts):,} a class)"
    if holders:
        said += f" on {holders:,} clients"
    return join([said, "."])


def _brought(base: Arm, by_stage: dict[tuple[bool, bool], Arm], path: tuple[str, ...]) -> list[Markup]:
    items = [join(["federated training alone (", name(base.name), "): ", _strong(base, path), " %"])]
    for key, words in WORDS.items():
        arm = by_stage.get(key)
        if arm is not None:
            change = points(gain(arm, base, *path))
            items.append(join([f"with {words} (", name(arm.name), "): ", _strong(arm, path), f" %, {change}"]))
    return items


def _strong(arm: Arm, path: tuple[str, ...]) -> Markup:
    return tag("strong", percent(mean_sd(scores(arm, *path))))


def _rare(base: Arm, by_stage: dict[tuple[bool, bool], Arm]) -> Markup:
    """What the rare classes gained, last round."""
    groups = base.first.final.get("groups")
    few = groups.get("few") if isinstance(groups, dict) else None
    before = mean_sd(scores(base, "last", "few"))
    if not few or before is None:
        return Markup("")
    said = []
    for key, words in WORDS.items():
        after = mean_sd(scores(by_stage[key], "last", "few")) if key in by_stage else None
        if after is not None:
            said.append(f"{percent(after)} % with {words}")
    rare = f"The {len(few)} rarest classes" if len(few) > 1 else "The rarest class"
    return paragraph(f"{rare}, last round: {percent(before)} % alone, {', '.join(said)}.") if said else Markup("")


def _beyond_stages(arms: Sequence[Arm]) -> Markup:
    """A warning where arms differ in more than stages, for then a difference is not the stage's alone."""
    configs = [{k: v for k, v in run.config.items() if not k.startswith(OF_STAGES)} for arm in arms for run in arm.runs]
    keys = sorted({k for c in configs for k in c if any(o.get(k) != c[k] for o in configs)} - {"name", "seed"})
    if not keys:
        return Markup("")
    more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
    shown = join((tag("code", k) for k in keys[:6]), ", ")
    return paragraph(
        "These runs differ in more than their stages, so a difference is not a stage’s alone: ",
        shown,
        f"{more}.",
        class_="wrong",
    )


def _range(arms: Sequence[Arm], path: tuple[str, ...], rule: str) -> Markup:
    known = [(value, arm) for arm in arms if (value := mean_sd(scores(arm, *path))) is not None]
    if not known:
        return paragraph("None of the runs recorded an accuracy.")
    known.sort(key=lambda pair: -pair[0].mean)
    best, worst = known[0], known[-1]
    said: list[Any] = [
        f"Accuracy on the test images ({rule}): ",
        name(best[1].name),
        " ",
        tag("strong", percent(best[0])),
        " %",
    ]
    if len(known) > 1:
        said += [f", the highest of {len(known)}; the lowest is ", name(worst[1].name), f" with {percent(worst[0])} %"]
    return paragraph(*said, ".", class_="lead")


def _checked(found: Found) -> Markup:
    """Leaks, so that nobody has to ask."""
    leaks = [run.final.get("leaks") for run in found.runs]
    totals = [sum(x.values()) if isinstance(x, dict) else x for x in leaks]
    known = [t for t in totals if isinstance(t, int) and not isinstance(t, bool)]
    if len(known) < len(totals):
        return paragraph(
            "Whether test images are among the other images was not recorded for every run.", class_="note"
        )
    if max(known) == 0:
        return paragraph(
            "No test image was found among the training, alignment and open images that the runs used.", class_="note"
        )
    return paragraph(
        f"Up to {max(known)} test images are also among the other images of a run (declared).", class_="note"
    )
