"""What the server runs: the same stages as in a simulation, with clients that are elsewhere.

Flower starts it (``deploy/mllm_fl_app/server_app.py``) with what ``flwr run --run-config`` says. Everything a run leaves lies in its run folder as always; beside it ``deployment.json`` (who took
part) and ``status.json`` (what it waits for), which ``mllm-fl deploy status`` and ``resume`` read.
"""

from __future__ import annotations

import dataclasses
import json
import time
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_fl import __version__
from mllm_fl.atomic import write_atomic
from mllm_fl.config import Config, load
from mllm_fl.data.sources import Splits, load_source
from mllm_fl.deployment.sites import SitesFederation, read_sites
from mllm_fl.engines.exchange import Schedule
from mllm_fl.engines.reception import OWN, PARTITION, Reception, Site
from mllm_fl.engines.remote import RemoteEngine
from mllm_fl.errors import UserError
from mllm_fl.runs import RunFolder, read_json

if TYPE_CHECKING:
    from mllm_fl.algorithms.base import Algorithm, Task
    from mllm_fl.data.federation import Federation
    from mllm_fl.engines.base import OnEvent
    from mllm_fl.engines.config import EngineConfig
    from mllm_fl.engines.link import Link
    from mllm_fl.engines.local import LocalConfig


@dataclass(frozen=True)
class Settings:
    """``[tool.flwr.app.config]``: what ``flwr run --run-config`` may change. Times in seconds.

    ``config``: the TOML file of the run. ``arm``, ``seed`` (-1: the file's): one run of it. ``set``: values in TOML, comma-separated: ``federate.rounds = 3``.
    ``sites``: the list that binds node keys to sites; "": any node may take part, as what it says it is, and ``nodes`` are waited for. ``images``: "own" or "partition".
    """

    config: str
    arm: str = ""
    seed: int = -1
    set: str = ""
    runs: str = "runs"
    sites: str = ""
    nodes: int = 2
    images: str = PARTITION
    schedule: Schedule = field(default_factory=Schedule)

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> Settings:
        """From Flower's run configuration, whose keys have hyphens.

        Raises:
            UserError: a value of another type, or out of range.
        """
        values = {str(k).replace("-", "_"): v for k, v in run_config.items()}
        times = {k: float(values.pop(k)) for k in ("deadline", "wait", "poll") if k in values}
        counts = {k: int(values.pop(k)) for k in ("minimum", "attempts") if k in values}
        schedule = Schedule(**times, **counts)  # type: ignore[arg-type]
        known = {f.name for f in dataclasses.fields(cls)}
        wrong = sorted(values.keys() - known)
        if wrong:
            raise UserError(f"--run-config {wrong[0]}", "unknown", f"known: {', '.join(sorted(known))}")
        if values.get("images", PARTITION) not in (OWN, PARTITION):
            raise UserError("--run-config images", f"{values['images']!r} is unknown", f'use "{OWN}" or "{PARTITION}"')
        return cls(schedule=schedule, **values)

    def resolved(self, sites: int) -> Config:
        """The one configuration that is asked for, with the engine that this is.

        Raises:
            UserError: no such arm, several arms or seeds, or values in ``set`` that are not TOML.
        """
        overrides = dotted(self.set) | {"federate.engine.name": "flower"}
        if self.images == OWN:
            overrides["data.clients"] = sites
        plan = load(Path(self.config), overrides)
        found = [c for c in plan.runs if not self.arm or c.name == self.arm]
        if self.seed >= 0:
            found = [dataclasses.replace(c, seed=self.seed) for c in found][:1] if self.arm else found
            found = [c for c in found if c.seed == self.seed]
        if len({c.name for c in found}) != 1:
            raise UserError(self.config, f"{len(found)} runs fit", f"name one with arm: {', '.join(plan.arms)}")
        config = found[0]
        engine = config.federate.engine
        engine = dataclasses.replace(
            engine,
            precision="fp32" if engine.precision == "auto" else engine.precision,
            layout="nchw" if engine.layout == "auto" else engine.layout,
            workers=None,
            device="cpu",
        )
        return dataclasses.replace(config, federate=dataclasses.replace(config.federate, engine=engine))


def dotted(text: str) -> dict[str, Any]:
    """``federate.rounds = 3, model.width = 4`` as dotted keys.

    Raises:
        UserError: not TOML.
    """
    try:
        nested = tomllib.loads(f"x = {{ {text} }}")["x"]
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"set={text!r}", f"not TOML: {e}", 'write for example set="federate.rounds = 3"') from e

    def flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for k, v in table.items():
            out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
        return out

    return flat(nested, "")


def main(link: Link, run_config: Mapping[str, Any], run_id: int) -> dict[str, Any]:
    """Run or resume the run that ``run_config`` names, over ``link``; returns final.json's content.

    Raises:
        UserError: of any stage; the run folder's status.json repeats it.
    """
    from mllm_fl.stages import chain

    settings = Settings.of(run_config)
    sites = read_sites(Path(settings.sites)) if settings.sites else _anyone(settings.nodes)
    config = settings.resolved(len(sites))
    path = chain.run_path(config, Path(settings.runs))
    status = Status(path)
    try:
        if config.align is not None and config.align.control == "clients":
            raise UserError(
                "align.control",
                "'clients' deals the server's images to clients, which are elsewhere",
                "leave it out, or simulate",
            )
        server = load_source(config.data) if settings.images == OWN else _splits(chain.federation_of(config))
        clients = len(sites) if settings.images == OWN else config.data.clients
        reception = Reception(sites, clients, server.train.class_names, settings.images, open_door=not settings.sites)
        begun = _gathered(link, settings, reception, _common(config, server, settings), config, path, run_id, status)
        if settings.images == OWN:
            sites_of = SitesFederation.of(server, begun["sites"], begun["sizes"], begun["histograms"], config.data)
            chain.adopt(config, sites_of)

        def opened(
            engine: EngineConfig,
            task: Task,
            algorithm: Algorithm,
            local: LocalConfig,
            batch_norm: str,
            on_event: OnEvent,
        ) -> RemoteEngine:
            common = _common(config, server, settings) | {"run": begun["id"], "population": list(task.population)}
            return RemoteEngine(
                link, reception, task, common, settings.schedule, config.federate.checkpoint_every, on_event, status
            )

        final = chain.run(config, Path(settings.runs), command=f"flwr run {run_id}", opened=opened)
        status({"finished": True})
        return final
    except BaseException as e:
        status({"stopped": str(e) if isinstance(e, UserError) else type(e).__name__})
        raise


def _gathered(
    link: Link,
    settings: Settings,
    reception: Reception,
    common: dict[str, Any],
    config: Config,
    path: Path,
    run_id: int,
    status: Status,
) -> dict[str, Any]:
    """``deployment.json``: who takes part with how many images, heard before the first round, or read if the run was begun."""
    with RunFolder(path, config.resolved()) as folder:
        place, names, begun = path / "deployment.json", [s.name for s in reception.sites], dict[str, Any]()
        if place.exists():
            begun = read_json(place)
            if begun["sites"] != names:
                raise UserError(place, f"was begun with the sites {begun['sites']}", f"bring them back, not {names}")
        elif folder.final is None:
            RemoteEngine(link, reception, None, common, settings.schedule, 1, folder.event, status).gather()
            begun = {
                "id": f"{path.name}-{uuid.uuid4().hex[:12]}",
                "sites": names,
                "sizes": {str(k): n for k, n in sorted(reception.sizes.items())},
                "histograms": {str(k): v for k, v in sorted(reception.histograms.items())},
                "version": __version__,
            }
        begun |= {"run_id": str(run_id), "settings": _plain(settings)}
        folder.write_json("deployment.json", begun)
        return begun


def _splits(federation: Federation) -> Splits:
    return Splits(federation.train, federation.test)


def _common(config: Config, server: Splits, settings: Settings) -> dict[str, Any]:
    """What every message says."""
    return {
        "version": __version__,
        "config": json.loads(json.dumps(config.resolved())),
        "classes": list(server.train.class_names),
        "images": settings.images,
        "size": int(server.test.read([0]).shape[-1]),
        "mean": list(server.train.mean),
        "std": list(server.train.std),
        "histograms": True,
    }


def _anyone(nodes: int) -> list[Site]:
    return [Site(f"site-{i + 1}") for i in range(nodes)]


def _plain(settings: Settings) -> dict[str, Any]:
    """The settings as ``--run-config`` would say them."""
    values = dataclasses.asdict(settings)
    return {k: v for k, v in (values | values.pop("schedule")).items() if k != "schedule"}


class Status:
    """``status.json``: what the server does now; written when it changes, at most every second else."""

    def __init__(self, path: Path) -> None:
        self.path, self._last, self._at = path / "status.json", "", 0.0

    def __call__(self, state: dict[str, Any]) -> None:
        what = json.dumps({k: v for k, v in state.items() if k != "seconds"}, sort_keys=True)
        if what == self._last and time.monotonic() - self._at < 1:
            return
        self._last, self._at = what, time.monotonic()
        if self.path.parent.is_dir():
            write_atomic(self.path, (json.dumps(state | {"time": round(time.time(), 1)}) + "\n").encode())
