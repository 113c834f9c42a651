"""Why what a client sent is refused. Not a method: the round loops of the simulator, of real devices and of the suite all ask here.

A refused update is recorded with its reason and left out like one that never came; the round goes on with the others.
"""

from __future__ import annotations

from collections.abc import Mapping

from mllm_fl.algorithms.base import Algorithm, Task, Update
from mllm_fl.trees import Tree, why_invalid, why_not_finite, why_of_another_form


def why_refused(method: Algorithm, task: Task, u: Update, w: Tree, limit: float = 1e6) -> str | None:
    """Why an update cannot enter the mean, or None.

    Its weight must be positive and finite; its weights must have the names, shapes and dtypes of ``w``, be finite and at most ``limit`` in
    magnitude; what travels beside them must have the method's ``upload_form`` and be finite.
    """
    if not 0 < u.weight < float("inf"):
        return f"weight {u.weight}"
    return why_invalid(u.w, w, limit) or _beside(u.extra, method.upload_form(task))


def why_answer_refused(method: Algorithm, task: Task, answer: Tree) -> str | None:
    """Why a client's answer to the survey cannot be used, or None: not of the method's ``survey_form``, or not finite."""
    return _beside(answer, method.survey_form(task))


def _beside(extra: Tree, form: Mapping[str, Tree] | None) -> str | None:
    problem = None if form is None else why_of_another_form(extra, form)
    return problem or why_not_finite({k: v for k, v in extra.items() if v.dtype.is_floating_point}, float("inf"))
