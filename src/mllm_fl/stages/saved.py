"""The model that a run ships, as a file: weights and all that is needed to use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_fl.config import Config
from mllm_fl.data.federation import Federation
from mllm_fl.engines.checkpoint import GONE, fit, load_checkpoint, save_checkpoint
from mllm_fl.models.network import Network, build_network
from mllm_fl.toml import to_dict
from mllm_fl.trees import Tree, clone


def save_model(path: Path, w: Tree, config: Config, federation: Federation) -> None:
    """The deployable model: weights, and beside them all that is needed to use them (classes in order, normalisation, network)."""
    size = list(federation.test.read([0]).shape[-2:])
    record = {
        "class_names": list(federation.class_names), "mean": list(federation.train.mean), "std": list(federation.train.std),
        "image_size": size, "model": to_dict(config.model),
    }  # fmt: skip
    save_checkpoint(path, w, record)


def load_model(path: Path) -> tuple[Network, dict[str, Any]]:
    """A network in evaluation mode from ``model.safetensors``, and its record (class names, normalisation, image size)."""
    from mllm_fl.models.network import ModelConfig

    tensors, record = load_checkpoint(path, GONE)
    network = build_network(ModelConfig(**record["model"]), len(record["class_names"]), 0)
    network.load_state_dict(fit(tensors, clone(network.state_dict()), path))
    return network.eval(), record
