"""Every wanted picture has a state, and a retry touches only what is not ok: files, archives, and a real HTTP server on the loopback."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.annotate.corpora import png

from mllm_fl.annotate.acquire import FILE, Wanted, acquire, coverage, listed, of_file, of_url, of_zip, read
from mllm_fl.errors import UserError


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in its head, and nothing behind."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + head
        + struct.pack(">I", zlib.crc32(b"IHDR" + head))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


class Site:
    """A web site that counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked[self.path] += 1
                status, headers, body = site.pages.get(self.path, (404, {}, b""))
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()
    yield found
    found.server.shutdown()
    found.server.server_close()


def states(folder: Path) -> dict[str, str]:
    return {path: f"{a.state} {a.why}".strip() for path, a in read(folder).items()}


def test_states_of_addresses_and_a_retry_that_touches_only_what_is_not_ok(site: Site, tmp_path: Path) -> None:
    site.pages = {
        "/ok.png": (200, {}, png(1)), "/twin.png": (200, {}, png(1)), "/text": (200, {}, b"<html>no picture</html>"), "/secret": (403, {}, b""), "/law": (451, {}, b""),
        "/noai": (200, {"X-Robots-Tag": "noai, nofollow"}, png(2)), "/bomb": (200, {}, bomb()), "/busy": (503, {}, b""),
    }  # fmt: skip
    wanted = [
        Wanted(f"images/{n}", of_url(site.url + p, 5.0), site.url + p)
        for n, p in enumerate(["/ok.png", "/twin.png", "/gone", "/text", "/secret", "/law", "/noai", "/bomb", "/busy"])
    ]
    wanted += [
        Wanted("images/refused", of_url("http://127.0.0.1:9/x", 5.0)),
        Wanted("images/out", of_url(site.url + "/ok.png"), opt_out=True),
        Wanted("images/file", of_url("file:///etc/passwd")),
    ]
    acquire(wanted, tmp_path, threads=1)
    assert states(tmp_path) == {
        "images/0": "ok", "images/1": "duplicate equals images/0", "images/2": "dead HTTP 404", "images/3": "corrupt not an image", "images/4": "blocked HTTP 403", "images/5": "blocked HTTP 451",
        "images/6": "blocked the site says noai", "images/7": "corrupt far too many pixels", "images/8": "dead HTTP 503", "images/refused": "dead [Errno 111] Connection refused",
        "images/out": "blocked its holder has opted out", "images/file": "dead no http(s) address",
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["0"]
    assert site.asked["/ok.png"] == 1
    site.pages["/busy"] = (200, {}, png(3))
    found = acquire(wanted, tmp_path, threads=1)
    assert found["images/8"].state == "ok" and site.asked["/busy"] == 2 and site.asked["/gone"] == 2
    assert site.asked["/ok.png"] == 1 == site.asked["/twin.png"]  # one is ok, the other equals it
    assert coverage(found.values()) == {"wanted": 12, "ok": 2, "dead": 3, "corrupt": 2, "duplicate": 1, "blocked": 4}


def test_files_and_archives(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2)[:60])
    archive = zipfile.ZipFile(io.BytesIO(), "w")
    archive.writestr("in/c.png", png(3))
    wanted = [
        Wanted("images/a.png", of_file(tmp_path / "a.png"), licence="CC0"), Wanted("images/b.png", of_file(tmp_path / "b.png")), Wanted("images/x.png", of_file(tmp_path / "x.png")),
        Wanted("images/c.png", of_zip(archive, "in/c.png")), Wanted("images/d.png", of_zip(archive, None)),
    ]  # fmt: skip
    found = acquire(wanted, tmp_path / "out")
    assert [a.state for a in found.values()] == ["ok", "corrupt", "dead", "ok", "dead"]
    assert found["images/a.png"].licence == "CC0" and (tmp_path / "out/images/a.png").read_bytes() == png(1)


def test_killed_in_the_middle_of_a_line_it_goes_on(tmp_path: Path) -> None:
    calls: list[int] = []

    def fetch(n: int) -> Wanted:
        def get() -> bytes:
            calls.append(n)
            return png(n)

        return Wanted(f"images/{n}.png", get)

    acquire([fetch(n) for n in range(4)], tmp_path)
    text = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(text[: text.rfind(b'{"path"') + 30])  # three lines and a half
    assert len(read(tmp_path)) == 3
    calls.clear()
    assert coverage(acquire([fetch(n) for n in range(4)], tmp_path).values())["ok"] == 4
    assert calls == [3]
    assert (tmp_path / FILE).read_bytes() == text


def test_a_file_that_is_gone_is_fetched_again(tmp_path: Path) -> None:
    wanted = [Wanted("images/0.png", lambda: png(0))]
    acquire(wanted, tmp_path)
    (tmp_path / "images/0.png").unlink()
    acquire(wanted, tmp_path)
    assert (tmp_path / "images/0.png").read_bytes() == png(0)


@pytest.mark.parametrize("path", ["../x.png", "/etc/x.png", "images/../../x.png", "C:\\x.png"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match="leaves the image folder"):
        acquire([Wanted(path, lambda: png(0))], tmp_path / "out")
    assert not (tmp_path / "x.png").exists()


def test_lists_of_addresses(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a dog\thttp://x/1.jpg\nhttps://x/2.jpg\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"url": "http://x/1.jpg", "licence": "CC0"}) + "\n")
    assert list(listed(tmp_path / "a.tsv")) == [
        {"url": "http://x/1.jpg", "caption": "a dog"},
        {"url": "https://x/2.jpg"},
    ]
    assert list(listed(tmp_path / "b.jsonl")) == [{"url": "http://x/1.jpg", "licence": "CC0"}]
    (tmp_path / "c.tsv").write_text("no address\n")
    with pytest.raises(UserError, match=r"c.tsv: line 1: ends in no http\(s\) address"):
        list(listed(tmp_path / "c.tsv"))
