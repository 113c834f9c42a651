"""Who is who in a federation of machines: which node may speak for which site, and which clients that site holds.

The SuperLink knows a node by its key, and gives it one number for as long as it is registered. The server's list of sites says which site that number is; what a node
says about itself is compared with it and never believed on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm_fl.data.manifest import sha256_of

MOST = 10_000_000
"""Images that one client may say it has: the server makes a list of them."""
OWN, PARTITION = "own", "partition"
"""Where a site's images come from: its own disk, or its part of the data set that ``[data]`` names (a trial on known images)."""


@dataclass(frozen=True)
class Site:
    """One place that holds images. ``node``: the SuperLink's number for its registered key; None: not registered yet."""

    name: str
    node: int | None = None


def clients_of(index: int, sites: int, clients: int) -> tuple[int, ...]:
    """The clients that site number ``index`` of ``sites`` plays: every ``sites``-th one."""
    return tuple(range(index, clients, sites))


def labels_sha256(class_names: Sequence[str]) -> str:
    """Identity of a label map: SHA-256 over the names in their order."""
    return sha256_of(list(class_names))


def difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """What one list of class names has and the other has not, in a few words."""

    def some(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"

    only = [n for n in theirs if n not in set(ours)], [n for n in ours if n not in set(theirs)]
    return f"only at the site: {some(only[0])}; only at the server: {some(only[1])}"


@dataclass
class Reception:
    """The server's door. ``sites``: all that take part, in client order; ``clients``: how many clients they play together.

    ``open_door``: believe what nodes say of themselves, where no keys are in use (tests, Flower's own simulation).
    """

    sites: Sequence[Site]
    clients: int
    class_names: Sequence[str]
    images: str = PARTITION
    open_door: bool = False
    admitted: dict[int, str] = field(default_factory=dict)  # node -> site
    refused: dict[int, str] = field(default_factory=dict)  # node -> why
    sizes: dict[int, int] = field(default_factory=dict)  # client -> images
    histograms: dict[int, list[int]] = field(
        default_factory=dict
    )  # client -> images of each class, of those who share it

    def owner(self, client: int) -> int | None:
        """The admitted node that plays this client."""
        name = self.sites[client % len(self.sites)].name
        return next((node for node, site in self.admitted.items() if site == name), None)

    def site(self, node: int) -> str:
        """The site's name for records; the node's number where it has none."""
        return self.admitted.get(node) or next((s.name for s in self.sites if s.node == node), f"node {node}")

    def client(self, node: int) -> int:
        """The first client of the site that this node speaks for."""
        names = [s.name for s in self.sites]
        return names.index(self.site(node)) if self.site(node) in names else 0

    def admit(self, node: int, said: Mapping[str, Any]) -> str:
        """Why this node may not take part, or "" and it does."""
        problem = self._why_not(node, said)
        if problem:
            self.refused[node] = problem
            return problem
        name = str(said["site"])
        self.admitted = {n: s for n, s in self.admitted.items() if s != name} | {node: name}
        self.refused.pop(node, None)
        for k, n in said["sizes"].items():
            self.sizes[int(k)] = int(n)
        for k, counts in (said.get("histograms") or {}).items():
            self.histograms[int(k)] = [int(c) for c in counts]
        return ""

    def _why_not(self, node: int, said: Mapping[str, Any]) -> str:
        claimed = str(said.get("site", ""))
        names = [s.name for s in self.sites]
        registered = next((s.name for s in self.sites if s.node == node), None)
        if registered is None and not self.open_door:
            return f"its key belongs to no site of this federation (it says it is {claimed!r})"
        if registered is not None and claimed != registered:
            return f"says it is {claimed!r}, but its key is that of {registered!r}"
        if claimed not in names:
            return f"{claimed!r} is no site of this federation"
        if said.get("refused"):
            return str(said.get("say") or said["refused"])[:400]
        if said.get("labels") != labels_sha256(self.class_names):
            return "its class names are not the server's"
        mine = clients_of(names.index(claimed), len(names), self.clients)
        try:
            sizes = {int(k): int(n) for k, n in said["sizes"].items()}
            shared = {int(k): [int(c) for c in v] for k, v in (said.get("histograms") or {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return "its greeting is not in our form"
        if max(sizes.values(), default=0) > MOST:
            return f"says that a client has {max(sizes.values())} images, more than {MOST}"
        if sorted(sizes) != list(mine) or min(sizes.values(), default=0) < 0:
            return f"plays clients {sorted(sizes)[:8]}, but {claimed!r} has {list(mine)[:8]}"
        if any(len(v) != len(self.class_names) or sum(v) != sizes.get(k) for k, v in shared.items()):
            return "its label histogram does not add up to its images"
        return ""
