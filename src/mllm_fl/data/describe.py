"""A federation in numbers and as a picture for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import Federation, build
from mllm_fl.data.longtail import achieved_imbalance, groups

WIDTH = 80
SHADES = ((0.50, "█"), (0.25, "▓"), (0.05, "▒"), (0.0, "░"))  # by a class's share of the client's images
ROWS = 60  # clients that are drawn one by one


def describe(config: DataConfig) -> dict[str, Any]:
    """The object that ``mllm-fl data describe --json`` prints; pixels are not decoded for it."""
    return summary(build(config))


def summary(federation: Federation) -> dict[str, Any]:
    """Class counts, hashes, and per client size, SHA-256 of the sorted indices, and images per class (of the first clients, where ``population`` says that there are more)."""
    manifest = federation.manifest
    imbalance = manifest.imbalance_factor
    more = {"population": len(manifest.clients)} if len(manifest.clients) > len(manifest.listed) else {}
    return more | {
        "dataset": manifest.dataset,
        "imbalance_factor": int(imbalance) if imbalance == int(imbalance) else imbalance,
        "partition": manifest.partition,
        "alpha": manifest.alpha,
        "seed": manifest.seed,
        "class_counts": list(manifest.class_counts),
        "total": manifest.total,
        "subset_sha256": manifest.subset_sha256,
        "clients": [
            {
                "size": len(indices),
                "sha256": digest,
                "histogram": federation.histogram(k),
            }
            for k, (indices, digest) in enumerate(zip(manifest.listed, manifest.client_sha256, strict=True))
        ],
    }


def render(description: dict[str, Any], class_names: Sequence[str] = ()) -> str:
    """The same for people: class counts and who holds what, at most 80 columns wide."""
    counts, clients = description["class_counts"], description["clients"]
    cut = groups(counts)
    head = [
        f"{description['dataset']}: {description['total']:,} images of {len(counts)} classes on {description.get('population', len(clients)):,} clients",
        f"partition {description['partition']}, alpha {description['alpha']:g}, seed {description['seed']}",
        f"imbalance asked for {description['imbalance_factor']:g}, reached {achieved_imbalance(counts):.4g}",
        f"many {len(cut.many)}, medium {len(cut.medium)}, few {len(cut.few)} classes",
        f"  ({cut.rule})",
        f"subset {description['subset_sha256']}",
    ]
    return "\n".join([*head, "", *_class_table(counts, class_names), "", *_picture(clients, len(counts))])


def _class_table(counts: list[int], names: Sequence[str]) -> list[str]:
    """One bar a class up to twenty classes, else the counts alone in rows of ten."""
    if len(counts) > 20:
        cell = max(5, len(f"{max(counts):,}") + 1)
        lines = ["images per class, ten classes a row"]
        rows = range(0, min(len(counts), 200), 10)
        lines += [f"{c:>6} |" + "".join(f"{n:>{cell},}" for n in counts[c : c + 10]) for c in rows]
        return lines + ([f"       ... and {len(counts) - 200} more classes"] if len(counts) > 200 else [])
    shown = [_clip(name, 18) for name in names] or [""] * len(counts)
    label = max(map(len, shown))
    room = WIDTH - label - 14
    return [
        f"{c:>3} {name:<{label}} {n:>7,} " + "█" * max(n > 0, round(room * n / max(counts)))
        for c, (name, n) in enumerate(zip(shown, counts, strict=True))
    ]


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _picture(clients: list[dict[str, Any]], classes: int) -> list[str]:
    """A row per client, a column per class (or per few classes), shaded by the share of the client's images."""
    per_column = -(-classes // 50)
    column = f"{per_column} classes a column" if per_column > 1 else "one column a class"
    wide = 2 if classes <= 25 else 1
    lines = [f"client   size  {column}: ░ some  ▒ >= 5 %  ▓ >= 25 %  █ >= 50 %"]
    for k, client in enumerate(clients[:ROWS]):
        histogram = np.array(client["histogram"] + [0] * (-classes % per_column)).reshape(-1, per_column).sum(1)
        share = histogram / max(1, client["size"])
        cells = "".join(next((mark for at_least, mark in SHADES if s >= at_least and s > 0), "·") * wide for s in share)
        held = int(np.count_nonzero(client["histogram"]))
        lines.append(f"{k:>6} {client['size']:>6,}  {cells}  {held} class{'' if held == 1 else 'es'}")
    sizes = [client["size"] for client in clients]
    if len(clients) > ROWS:
        lines.append(f"   ... and {len(clients) - ROWS} more clients")
    return [*lines, f"sizes from {min(sizes):,} to {max(sizes):,}"]
