"""One schema for everything a run can be asked: the stages' own dataclasses, assembled; and the plan of several arms and seeds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_fl.algorithms import find
from mllm_fl.data.federation import DataConfig
from mllm_fl.errors import UserError
from mllm_fl.models.network import ModelConfig
from mllm_fl.models.teacher.clip import TeacherConfig
from mllm_fl.stages.align import AlignConfig
from mllm_fl.stages.annotate_config import AnnotateConfig
from mllm_fl.stages.pretrain import PretrainConfig
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.toml import build, read_toml, set_dotted, to_dict


@dataclass(frozen=True)
class Config:
    """A whole run. A stage is off when its table is absent; ``[federate]`` is always there.

    ``experiment``: the folder under ``runs/``. ``name``: the run's name in it, an arm's name in a plan. ``seed``: initial weights, local
    training, sampling and alignment; the data has its own seed, so that seeds share one federation.
    """

    experiment: str = "default"
    name: str = "run"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    annotate: AnnotateConfig | None = None
    pretrain: PretrainConfig | None = None
    federate: FederateConfig = field(default_factory=FederateConfig)
    align: AlignConfig | None = None

    def __post_init__(self) -> None:
        for key in ("experiment", "name"):
            check_name(getattr(self, key), key)
        if self.federate.clients_per_round > self.data.clients:
            raise UserError(
                "federate.clients_per_round",
                f"{self.federate.clients_per_round} online clients, but data.clients is {self.data.clients}",
            )
        if self.pretrain is not None and self.model.adapter == "none":
            raise UserError("pretrain", "needs an adapter to the teacher's width", 'set model.adapter = "linear"')

    def resolved(self) -> dict[str, Any]:
        """All values, defaults included, as nested plain values."""
        return to_dict(self)


@dataclass(frozen=True)
class Plan:
    """The runs that one TOML file asks for: arms times seeds; a file without arms is one arm."""

    path: Path
    runs: tuple[Config, ...]
    arms: tuple[str, ...]


def from_dict(raw: Mapping[str, Any], place: str) -> Config:
    """A checked configuration from nested dicts; ``[federate.method]`` is read by the class that ``federate.algorithm`` names.

    Raises:
        UserError: anything unknown, of a wrong type, out of range, or contradicting; names ``place`` and the key.
    """
    raw = copy.deepcopy(dict(raw))
    method: dict[str, Any] = {}
    fed = raw.get("federate")
    if isinstance(fed, dict):
        method = fed.pop("method", {})
        if not isinstance(method, dict):
            raise UserError(f"{place}: federate.method", f"expected a table, got {method!r}", "write [federate.method]")
        name = fed.get("algorithm", "fedavg")
        if not isinstance(name, str):
            raise UserError(f"{place}: federate.algorithm", f"expected a string, got {name!r}")
        cls = find(name, f"{place}: federate.algorithm")
        fed = {k: v for k, v in fed.items() if k != "algorithm"}
        federate = build(FederateConfig, fed, place, "federate.")
        chosen = build(cls, method, place, "federate.method.")
        federate = dataclasses.replace(federate, algorithm=name, method=chosen)
        return build(Config, {k: v for k, v in raw.items() if k != "federate"}, place, given={"federate": federate})
    return build(Config, dict(raw), place)


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Read a TOML file: a configuration, and optionally ``seeds = [..]`` and ``[[arm]]`` tables with ``name`` and ``set``.

    An arm's ``set`` holds dotted keys, for example ``set = { "federate.algorithm" = "fedprox", align = false }``.
    ``overrides`` are dotted keys too and are applied last, to every arm.
    """
    raw = read_toml(path)
    place = str(path)
    arms = _arms(raw.pop("arm", [{}]), place)
    seeds = raw.pop("seeds", None)
    if seeds is not None and (not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds)):
        raise UserError(f"{place}: seeds", f"expected a list of whole numbers, got {seeds!r}")
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise UserError(f"{place}: seeds", f"a seed stands twice in {seeds}", "name each once")
    raw.setdefault("experiment", path.stem)
    raw.setdefault("name", path.stem)
    runs: list[Config] = []
    names: list[str] = []
    for arm in arms:
        for seed in seeds if seeds is not None else [raw.get("seed", 0)]:
            one = copy.deepcopy(raw)
            for key, value in {**arm.get("set", {}), **(overrides or {})}.items():
                set_dotted(one, key, value)
            if "seed" not in (overrides or {}):
                one["seed"] = seed
            if "name" in arm:
                one["name"] = arm["name"]
            runs.append(from_dict(one, place))
        names.append(arm.get("name", raw["name"]))
    if len(set(names)) != len(names):
        raise UserError(f"{place}: [[arm]]", "two arms have the same name")
    return Plan(path, tuple(runs), tuple(names))


def check_name(value: Any, place: str) -> None:
    """Whether ``value`` can name a folder and be shown in a terminal.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(value, str):
        raise UserError(place, f"expected a string, got {value!r}")
    way_out = "use letters, digits, - and _"
    if not value or value.startswith(".") or not value.isprintable() or any(c in value for c in "/\\"):
        raise UserError(place, f"{value!r} cannot name a folder", way_out)
    if len(value.encode()) > NAME_BYTES:
        raise UserError(place, f"{len(value.encode())} bytes are too long for a folder's name", f"at most {NAME_BYTES}")


NAME_BYTES = 100
"""A run folder's name is this and nine more; file systems stop at 255."""


def _arms(arms: Any, place: str) -> list[dict[str, Any]]:
    """The ``[[arm]]`` tables, each with its name where there are several, and nothing but ``name`` and ``set``."""
    if not isinstance(arms, list) or not arms or not all(isinstance(arm, dict) for arm in arms):
        raise UserError(f"{place}: arm", f"expected tables, got {arms!r}", "write [[arm]], once for each arm")
    for i, arm in enumerate(arms, 1):
        if set(arm) - {"name", "set"} or (len(arms) > 1 and "name" not in arm):
            raise UserError(f"{place}: [[arm]] number {i}", "needs `name`, and optionally `set`, and nothing else")
        if not isinstance(arm.get("set", {}), dict):
            raise UserError(
                f"{place}: [[arm]] number {i}: set",
                f"expected a table, got {arm['set']!r}",
                'write { "data.alpha" = 0.1 }',
            )
        if "name" in arm:
            check_name(arm["name"], f"{place}: [[arm]] number {i}: name")
    return arms
