"""A method's hooks change none of their arguments and store nothing on the object: seen while a run goes on, at no cost.

torch counts the writes into every tensor; the counters are compared, not the values. ``mllm-fl check-method`` looks closer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mllm_fl.algorithms.base import Algorithm
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree


@contextmanager
def pure(algorithm: Algorithm, hooks: str, given: Mapping[str, Tree]) -> Iterator[None]:
    """While this is open the trees in ``given`` (what they are -> leaves) and the object's own fields must stay as they are.

    Raises:
        UserError: one was written into, grew, shrank, or a field was stored; names the method, the leaf and the way out.
    """
    leaves = {what: dict(tree) for what, tree in given.items()}
    written = {(what, k): v._version for what, tree in leaves.items() for k, v in tree.items()}
    fields = dict(vars(algorithm))
    yield
    name = type(algorithm).__name__
    for what, tree in leaves.items():
        now = given[what]
        changed = [k for k, v in tree.items() if now.get(k) is not v or v._version != written[what, k]]
        changed += [k for k in now if k not in tree]
        if changed:
            raise UserError(
                f"federate.algorithm: {name}",
                f"{hooks} changed {what} in place ({changed[0]})",
                "clone what you write into and return it; `mllm-fl check-method` names the hook",
            )
    stored = [k for k, v in vars(algorithm).items() if k not in fields or fields[k] is not v]
    if stored:
        raise UserError(
            f"federate.algorithm: {name}",
            f"{hooks} stored {stored[0]!r} on the object",
            "keep it in Server.extra, or return it as the client's memory",
        )
