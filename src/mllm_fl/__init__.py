"""MLLM-LLaVA-FL: federated learning on heterogeneous, long-tailed images with a multimodal LLM on the server."""

__version__ = "0.1.0"
