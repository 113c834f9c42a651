"""The server's side: the round loop, its checkpoints and its records are mllm-fl's own."""

from mllm_fl.deployment.server import main
from mllm_fl.engines.flower import server_app

app = server_app(main)
