"""A real OpenAI-compatible server (`transformers serve` on a tiny random LLaVA), and a proxy before it that misbehaves as told."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tests.tiny_llava import save_tiny

from mllm_fl.models.bridge import bridge_torchvision

_START = (
    "import sys; sys.modules['torchvision'] = None\n"  # its build beside a CPU torch cannot read images
    "from transformers.cli.transformers import app; app()"
)
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ '<image>\\n' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %} {% endfor %}ASSISTANT:"
)


def talkative(folder: Path) -> Path:
    """A saved LLaVA that says a few words, other ones for other pictures: every second word of its vocabulary ends the answer."""
    save_tiny(folder)
    bridge_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # at its initial scale a random model says the same about everything
    model.generation_config.eos_token_id = list(range(5, model.config.text_config.vocab_size, 2))
    model.save_pretrained(folder)
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    processor.chat_template = _TEMPLATE
    processor.save_pretrained(folder)
    return folder


@contextmanager
def serve(model: Path, log: Path) -> Iterator[str]:
    """The address of `transformers serve` with this model, on the loopback; ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [
        sys.executable,
        "-c",
        _START,
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"transformers serve ended: {log.read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


class Proxy(ThreadingHTTPServer):
    """Forwards to ``upstream``. ``faults``: request number (from 1) -> what goes wrong with it; ``on``: called at every stage of a request.

    Faults: a status ("500"), "429 0.2" (with Retry-After), "cut" (half a reply), "slow" (longer than the client waits), "invalid" (no JSON),
    "length" (the text cut off, and said so), "French" (the text replaced).
    """

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream.removeprefix("http://").partition("/")[0]
        self.faults: dict[int, str] = {}
        self.on: Callable[[str, int], None] = lambda stage, number: None
        self.lock = threading.Lock()
        self.asked: list[str] = []  # picture and question of every request that came
        self.answered: list[str] = []  # of every good reply that went out whole
        self.inside, self.most = 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


def seen(picture: bytes, question: str) -> str:
    """By what the proxy tells one question from another."""
    return f"{hashlib.sha256(picture).hexdigest()[:16]} {question}"


@contextmanager
def proxied(upstream: str) -> Iterator[Proxy]:
    """A proxy in a thread."""
    found = Proxy(upstream)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        said = json.loads(content)["messages"][-1]["content"]
        what = seen(base64.b64decode(said[0]["image_url"]["url"].partition("base64,")[2]), said[1]["text"])
        s = self.server
        with s.lock:
            s.asked.append(what)
            number = len(s.asked)
            s.inside += 1
            s.most = max(s.most, s.inside)
        try:
            s.on("came", number)
            self._reply(s.faults.get(number, ""), content, what)
            s.on("went", number)
        finally:
            with s.lock:
                s.inside -= 1

    def _reply(self, fault: str, content: bytes, what: str) -> None:
        word, _, rest = fault.partition(" ")
        if word.isdigit():
            return self._send(int(word), b'{"error": {"message": "not now"}}', {"Retry-After": rest} if rest else {})
        if word == "slow":
            time.sleep(float(rest))
        if word == "invalid":
            return self._send(200, b'{"id": "1", "choices": [')
        status, body = self._forward(content)
        if word in ("length", "French"):
            reply = json.loads(body)
            choice = reply["choices"][0]
            choice["message"]["content"] = (
                "La lettre est noire." if word == "French" else choice["message"]["content"][:3]
            )
            choice["finish_reason"] = "stop" if word == "French" else "length"
            body = json.dumps(reply).encode()
        if word == "cut":
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return None
        self._send(status, body)
        if status == 200:
            with self.server.lock:
                self.server.answered.append(what)
        return None

    def _forward(self, content: bytes) -> tuple[int, bytes]:
        there = http.client.HTTPConnection(self.server.upstream, timeout=120)
        there.request("POST", self.path, content, {"Content-Type": "application/json"})
        reply = there.getresponse()
        return reply.status, reply.read()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
