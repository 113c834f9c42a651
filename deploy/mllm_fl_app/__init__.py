"""mllm-fl as a Flower app."""
