"""What a finished run is measured by beside its accuracies: each client's share, forgetting, and what it all cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_fl.algorithms.base import Server, Shard, Task
from mllm_fl.data.describe import summary
from mllm_fl.data.federation import Federation
from mllm_fl.engines import flops
from mllm_fl.metrics import forgetting, per_client
from mllm_fl.stages.align import Aligner

if TYPE_CHECKING:
    from mllm_fl.stages.schedule import FederateConfig

RULE = (
    "operations of matrix products, convolutions and attention (a multiply-add is two), counted once on one step and multiplied; "
    "teachers' passes, averaging and a last survey of the clients are left out"
)


def standing(
    scores: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], federation: Federation
) -> dict[str, dict[str, Any]]:
    """``per_client`` of the shipped model's ``scores``; ``forgetting`` and ``history`` (the curve) of the evaluated rounds among ``rows``."""
    histograms = [c["histogram"] for c in summary(federation)["clients"]]
    history = [row["per_class"] for row in rows if row.get("per_class")]
    curve = [(row["round"], row["accuracy"]) for row in rows if row.get("accuracy") is not None]
    return {
        "per_client": per_client(scores["per_class"], histograms),
        "forgetting": forgetting(history),
        "history": {"round": [t for t, _ in curve], "accuracy": [a for _, a in curve]},
    }


def overhead(
    config: FederateConfig,
    task: Task,
    federation: Federation,
    state: Server,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    batch_norm: str = "average",
    aligner: Aligner | None = None,
    shard: Shard | None = None,
    card: Mapping[str, Any] | None = None,
    pretrained: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run cost in operations, bytes, joules and memory, and what its annotations took; None is "not measured".

    ``rows``: what the run appended, by "rounds", "clients" and "timings". ``shard``: the client on whom a visit is counted (default:
    the first that has images). ``card`` and ``pretrained``: the records of stage 1's corpus and weights, where the run used them.
    """
    visits, timings = rows["clients"], rows["timings"]
    flop, why = _flop(config, task, federation, state, rows, batch_norm, aligner, shard)
    if pretrained is not None:
        flop["pretrain"] = pretrained.get("flop")
    mean: Callable[[str], float | None] = lambda key: (  # noqa: E731
        sum(r[key] for r in visits) / len(visits) if visits else None
    )
    return {
        "flop": flop,
        "flop_rule": RULE if why is None else f"not measured: {why}",
        "per_visit": {
            "visits": len(visits),
            "seconds": sum(r["client_seconds"] for r in timings) / len(visits) if visits else None,
            "flop": flop["clients"] / len(visits) if visits and flop.get("clients") is not None else None,
            "bytes_up": mean("bytes_up"),
            "bytes_down": mean("bytes_down"),
        },
        "joules": {name: _total(timings, f"{name}_joules") for name in ("cpu", "gpu")},
        "peak_bytes": {
            name: max((r[key] for r in timings if r.get(key) is not None), default=None)
            for name, key in (
                ("process", "peak_bytes"),
                ("workers", "peak_workers_bytes"),
                ("gpu", "peak_gpu_bytes"),
            )
        },
        "annotation": None if card is None else bill(card),
    }


def bill(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a corpus's annotations took, from its card: questions asked, answers kept, failures, tokens in and out, seconds of answering."""
    kinds = card.get("kinds", {}).values()
    names = {"attempts": "questions", "ok": "answers", "failed": "failed", "prompt_tokens": "prompt_tokens"}
    names |= {"completion_tokens": "completion_tokens", "seconds": "seconds"}
    return {"model": card.get("model"), **{new: sum(k.get(old) or 0 for k in kinds) for old, new in names.items()}}


def _total(timings: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The sum over all rounds; None as soon as one of them was not measured."""
    values = [r.get(key) for r in timings]
    return None if not values or None in values else float(sum(v for v in values if v is not None))


def _flop(
    config: FederateConfig,
    task: Task,
    federation: Federation,
    state: Server,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    batch_norm: str,
    aligner: Aligner | None,
    shard: Shard | None,
) -> tuple[dict[str, Any], str | None]:
    """Operations by stage, and why not where counting failed: a finished run is never lost for want of a count."""
    rounds, visits, test = rows["rounds"], rows["clients"], federation.test
    try:
        if shard is None:
            first = next(k for k, held in enumerate(federation.clients) if held)
            shard = Shard(first, state.round + 1, federation.client(first), task.seed)
        step, visit, update = flops.of_client(task, config.method, state, shard, config.local, batch_norm)
        server = flops.of_server(task, config.method, state, update, sorted(rounds[-1]["clients"])) if rounds else 0
        align = 0
        if aligner is not None:
            one = replace(aligner, config=replace(aligner.config, steps=1))
            times = 1 if aligner.config.when == "end" else len(rounds)
            align = flops.counted(lambda: one(task, state.w, state.round))[1] * aligner.config.steps * times
        passes = sum(bool(r.get("evaluated")) for r in rounds) + 1 + (aligner is not None)
        forward = flops.of_image(task, config.method.deploy(task, state), test)
    except Exception as e:
        return {"clients": None, "server": None, "align": None, "evaluate": None}, f"{type(e).__name__}: {e}"[:200]
    trained = sum(r["samples"] for r in visits)
    return {
        "clients": round(trained * (config.local.epochs * step + visit)),
        "server": server * len(rounds),
        "align": align,
        "evaluate": round(forward * len(test) * passes),
    }, None
