"""What arms and seeds of one configuration share: where its folders lie, its federation (built once per process), its fresh network."""

from __future__ import annotations

from pathlib import Path

from mllm_fl.config import Config
from mllm_fl.data.federation import Federation
from mllm_fl.data.federation import build as build_federation
from mllm_fl.models.network import Network, build_network
from mllm_fl.runs import config_hash
from mllm_fl.toml import to_dict


def run_path(config: Config, root: Path) -> Path:
    """``root/experiment/name-hash``, the folder of this configuration's run."""
    return root / config.experiment / f"{config.name}-{config_hash(config.resolved())}"


def corpus_path(config: Config, root: Path) -> Path:
    """The corpus that this configuration annotates, equal for runs that ask for equal ones; or the ready one that [pretrain] names."""
    if config.pretrain is not None and config.pretrain.corpus is not None:
        return Path(config.pretrain.corpus).expanduser()
    assert config.annotate is not None
    return root / config.experiment / f"corpus-{config_hash(config.annotate.named_by())}"


def pretrain_path(config: Config, root: Path) -> Path:
    """The folder of the pretrained weights; equal for runs that pretrain equally from equal corpora and seeds."""
    assert config.pretrain is not None
    depends = {
        "pretrain": to_dict(config.pretrain), "annotate": config.annotate.named_by() if config.annotate else None,
        "model": to_dict(config.model), "seed": config.seed, "data": config.data.source, "size": config.data.image_size,
    }  # fmt: skip
    return root / config.experiment / f"pretrain-{config_hash(depends)}"


_federations: dict[str, Federation] = {}


def federation_of(config: Config) -> Federation:
    """The federation of [data]; built once per process for equal tables."""
    key = config_hash(to_dict(config.data))
    if key not in _federations:
        _federations.clear()
        _federations[key] = build_federation(config.data)
    return _federations[key]


def adopt(config: Config, federation: Federation) -> None:
    """Use this federation for the configuration's [data] from now on: the clients' images are elsewhere and cannot be built from it."""
    _federations.clear()
    _federations[config_hash(to_dict(config.data))] = federation


def side_of(federation: Federation) -> int:
    """Pixels a side of the images that clients train on."""
    return int(federation.test.read([0]).shape[-1])


def network_of(config: Config) -> Network:
    """The configuration's network with its first weights, a function of [model], the classes and the seed."""
    classes = len(federation_of(config).class_names)
    return build_network(config.model, classes, config.seed)
