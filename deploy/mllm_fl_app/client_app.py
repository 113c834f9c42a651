"""A site's side: images, memory and teacher stay here; what is sent is what the method declares."""

from mllm_fl.deployment.worker import ask
from mllm_fl.engines.flower import client_app

app = client_app(ask)
