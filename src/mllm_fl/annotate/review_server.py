"""The local page of a review: the standard library's HTTP server on this machine alone, behind an address that nobody can guess."""

from __future__ import annotations

import io
import json
import secrets
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from PIL import Image

from mllm_fl.annotate.records import IMAGE, Record
from mllm_fl.annotate.review import Review
from mllm_fl.data.decode import to_rgb
from mllm_fl.errors import UserError

SIDE = 768  # pixels of the longer side that a picture is shown with at most
LONGEST = 1 << 20  # bytes of one request
POLICY = "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_ASSETS = {
    "": ("page.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}


class ReviewServer:
    """Serves one review until :meth:`close`, or until the page says that it is finished.

    ``why``: per record what the checks found, ``truth``: per picture what is known of it; both are shown beside it.

    Raises:
        UserError: the port is taken.
    """

    def __init__(
        self,
        review: Review,
        why: Mapping[str, Mapping[str, str]] | None = None,
        truth: Mapping[str, str] | None = None,
        port: int = 0,
    ) -> None:
        self.review, self.finished = review, threading.Event()
        self._why, self._truth = why or {}, truth or {}
        self._lock = threading.Lock()
        self.token = secrets.token_urlsafe(16)
        if not 0 <= port <= 65535:
            raise UserError("--port", f"{port} is not in 0 to 65535", "0 takes any free one")
        handler = type("Handler", (_Handler,), {"owner": self})
        try:
            self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError as e:
            raise UserError(
                f"port {port}", f"cannot be listened on ({e.strerror})", "choose another with --port"
            ) from None
        self._http.daemon_threads = True
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self.url = f"http://{self.host}/{self.token}/"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> ReviewServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Answer no more."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def data(self) -> dict[str, Any]:
        """All that the page shows."""
        sample = [self._shown(r) for r in self.review.sample]
        return {"corpus": self.review.folder.name, "sample": sample, **self.state()}

    def _shown(self, r: Record) -> dict[str, Any]:
        turns = [{"speaker": t.speaker, "text": t.text.replace(IMAGE, "").strip()} for t in r.turns]
        return {
            "id": r.id,
            "kind": r.kind,
            "image": r.image,
            "turns": turns,
            "why": dict(self._why.get(r.id, {})),
            "truth": self._truth.get(r.image, ""),
        }

    def state(self) -> dict[str, Any]:
        """What changes with each decision."""
        made = {d.id: {"decision": d.decision, "answers": list(d.answers)} for d in self.review.decisions.values()}
        return {"decisions": made, "estimate": self.review.estimate().text()}

    def decide(self, body: Any) -> dict[str, Any]:
        """Write one decision down. Raises :class:`UserError` when it is none."""
        if (
            not isinstance(body, dict)
            or not isinstance(body.get("id"), str)
            or not isinstance(body.get("decision"), str)
        ):
            raise UserError("decision", "lacks id or decision", "reload the page")
        answers = body.get("answers") or []
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise UserError("decision", "its answers are no list of texts", "reload the page")
        with self._lock:
            self.review.decide(body["id"], body["decision"], answers)
            return self.state()

    def picture(self, place: str) -> bytes:
        """The picture of the sample's record at this position, as PNG. Raises ``ValueError`` when there is none."""
        record = self.review.sample[int(place)] if place.isdigit() and int(place) < len(self.review.sample) else None
        if record is None:
            raise ValueError("no such record")
        drawn = to_rgb(self.review.folder / record.image)
        drawn.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        drawn.save(out, "PNG")
        return out.getvalue()


class _Handler(BaseHTTPRequestHandler):
    """GET the page, its data and pictures; POST a decision. Anything without the token, or under another host's name, is not found."""

    owner: ReviewServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self._name()
        if name in _ASSETS:
            file, kind = _ASSETS[name]
            self._send(200, (files("mllm_fl.annotate") / "review_page" / file).read_bytes(), f"{kind}; charset=utf-8")
        elif name == "data.json":
            self._json(200, self.owner.data())
        elif name is not None and name.startswith("image/"):
            try:
                self._send(200, self.owner.picture(name.removeprefix("image/")), "image/png")
            except ValueError as e:
                self._json(404, {"error": str(e)})
        else:
            self._json(404, {"error": "not found"})

    def do_POST(self) -> None:
        name, length = self._name(), self.headers.get("Content-Length", "")
        self.close_connection = True  # what was not read must not be taken for the next request
        if name not in ("decide", "finish") or self.headers.get("Origin") not in (None, f"http://{self.owner.host}"):
            self._json(404, {"error": "not found"})
        elif not length.isdigit() or int(length) > LONGEST or self.headers.get_content_type() != "application/json":
            self._json(400, {"error": "expected JSON of at most one megabyte"})
        elif name == "finish":
            self._json(200, self.owner.state())
            self.owner.finished.set()
        else:
            try:
                self._json(200, self.owner.decide(json.loads(self.rfile.read(int(length)))))
            except ValueError:
                self._json(400, {"error": "not JSON"})
            except UserError as e:
                self._json(400, {"error": str(e)})

    def _name(self) -> str | None:
        """What follows the token; None without it, or when the request was made under another name than this machine's (DNS rebinding)."""
        given = self.path.partition("?")[0].split("/", 2)
        if (
            len(given) != 3
            or not secrets.compare_digest(given[1].encode(), self.owner.token.encode())
            or self.headers.get("Host") != self.owner.host
        ):
            return None
        return given[2]

    def _json(self, status: int, body: Any) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for key, value in (
            ("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"), ("Content-Security-Policy", POLICY),
        ):  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


def known(truth: Mapping[str, Any]) -> str:
    """What is known of a picture, in a line for the page."""
    if scene := truth.get("glyph"):
        return ", ".join(f"{k} {scene[k]}" for k in ("kind", "name", "weight", "posture", "proportion") if k in scene)
    if truth.get("captions"):
        return " / ".join(truth["captions"])
    if truth.get("labels"):
        return ", ".join(truth["labels"])
    return " ".join(str(truth[k]) for k in ("colour", "shape") if truth.get(k))
