"""Whether records have the form that the page relies on; what is absent is allowed and shown as "–"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError

WAY_OUT = "restore the file, or delete the run folder and run again"


def check_final(final: Mapping[str, Any], path: Path) -> None:
    """Refuse a final.json without classes or scores, or with values of another form.

    Raises:
        UserError: naming the key.
    """
    names, last = final.get("class_names"), final.get("last")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(path, "class_names is not a list of names", WAY_OUT)
    if not isinstance(last, dict):
        raise UserError(path, "has no scores of the last round ('last')", WAY_OUT)
    n = len(names)
    confusion = last.get("confusion")
    if confusion is not None and not (
        isinstance(confusion, list) and len(confusion) == n and all(_is_counts(r, n) for r in confusion)
    ):
        raise UserError(path, f"last.confusion is not a table of {n} × {n} counts", WAY_OUT)
    for key, values in (("last.per_class", last.get("per_class")), ("class_counts", final.get("class_counts"))):
        if values is not None and not (isinstance(values, list) and len(values) == n):
            raise UserError(path, f"{key} has not one value for each of the {n} classes", WAY_OUT)
    if final.get("seed") is not None and type(final["seed"]) is not int:
        raise UserError(path, f"seed is {final['seed']!r}, not a whole number", WAY_OUT)
    _check_groups(final.get("groups"), n, path)
    leaks = final.get("leaks")
    found = list(leaks.values()) if isinstance(leaks, dict) else [] if leaks is None else [leaks]
    if not _is_counts(found, len(found)):
        raise UserError(path, "leaks are not counts", WAY_OUT)


def _check_groups(groups: Any, classes: int, path: Path) -> None:
    if groups is None:
        return
    for key in ("many", "medium", "few"):
        indices = groups.get(key) if isinstance(groups, dict) else None
        if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < classes for i in indices):
            raise UserError(path, f"groups.{key} is not a list of classes (0 .. {classes - 1})", WAY_OUT)


def check_federation(federation: Mapping[str, Any], classes: int, path: Path) -> None:
    """Refuse a record of who holds what that is not one count per client and class; an empty record is none at all.

    Raises:
        UserError: naming the first such client.
    """
    if not federation:
        return
    clients = federation.get("clients")
    if not isinstance(clients, list) or not clients:
        raise UserError(path, "lists no clients", WAY_OUT)
    for k, client in enumerate(clients):
        if not isinstance(client, dict) or not _is_counts(client.get("histogram"), classes):
            raise UserError(path, f"client {k} has not one count for each of the {classes} classes", WAY_OUT)


def _is_counts(values: Any, n: int) -> bool:
    """Whether this is a list of n counts."""
    return isinstance(values, list) and len(values) == n and all(type(v) is int and v >= 0 for v in values)
