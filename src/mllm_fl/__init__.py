"""MLLM-LLaVA-FL: federated learning on heterogeneous, long-tailed images with a multimodal LLM on the server.

Importing the package loads nothing heavy; the names below are fetched from their modules on first use.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Algorithm": "mllm_fl.algorithms.base",
    "Config": "mllm_fl.config",
    "UserError": "mllm_fl.errors",
    "build_report": "mllm_fl.report",
    "from_dict": "mllm_fl.config",
    "load": "mllm_fl.config",
    "load_model": "mllm_fl.stages.chain",
    "run": "mllm_fl.stages.chain",
}
__all__ = ["Algorithm", "Config", "UserError", "__version__", "build_report", "from_dict", "load", "load_model", "run"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mllm_fl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), "build" if name == "build_report" else name)


def __dir__() -> list[str]:
    return __all__
