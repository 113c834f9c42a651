"""What `mllm-fl deploy init` writes, and what `doctor` says about each layer that does not hold."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import json
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.cli import main
from mllm_fl.deployment import certificates, doctor, layout, processes, template
from mllm_fl.deployment.layout import Layout, Node
from mllm_fl.deployment.server import Settings, dotted
from mllm_fl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def made(tmp_path: Path, config: Path) -> Layout:
    return layout.init(tmp_path / "fed", sites=["a", "b"], config=config, host="localhost")


def test_a_deployment_is_whole_and_its_secrets_are_their_owners(
    made: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("server/ca.key", "server/server.key", "sites/a/key", "sites/b/key"):
        assert stat.S_IMODE((made.folder / place).stat().st_mode) == 0o600, place
    assert (made.folder / "sites" / "a" / "key.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert (made.site("a") / "key").read_bytes() != (made.site("b") / "key").read_bytes()
    inside = {p.name for p in made.site("a").iterdir()}
    assert inside == {"key", "key.pub", "ca.crt", "node.toml", "state"}  # nothing of the server's or of another site's
    assert Layout.read(made.folder) == made
    node = Node.read(made.site("b"))
    assert (node.site, node.host, node.port, node.runtime_port) == ("b", "localhost", 8000, 0)
    assert 'site="b"' in node.node_config() and "partition-id=1 num-partitions=2" in node.node_config()
    for unit in ("systemd/mllm-fl-superlink.service", "systemd/mllm-fl-node@.service", "compose.yaml"):
        text = (made.folder / unit).read_text()
        assert "FLWR_TELEMETRY_ENABLED" in text and "FLWR_DISABLE_UPDATE_CHECK" in text, unit


def test_the_command_line_writes_it_and_does_not_write_it_twice(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["deploy", "init", str(tmp_path / "x"), "--config", str(config), "--sites", "north,south"]
    assert main(words) == 0
    assert "2 sites, server localhost:8000" in capsys.readouterr().out
    assert main(words) == 2
    assert "holds a federation already" in capsys.readouterr().err
    assert main([*words[:2], str(tmp_path / "y"), *words[3:5], "--sites", "a/b"]) == 2
    assert "site 'a/b': cannot name a folder" in capsys.readouterr().err
    assert main(["deploy", "status", str(tmp_path / "nowhere")]) == 2
    assert "no federation.toml here" in capsys.readouterr().err
    assert main(["deploy", "status", str(tmp_path / "x")]) == 0
    assert "no SuperLink answers" in capsys.readouterr().out
    assert main(["deploy", "resume", str(tmp_path / "x")]) == 2
    assert "not a run of a federation" in capsys.readouterr().err


def test_the_app_in_the_repository_is_the_one_that_init_writes() -> None:
    for name, text in template.app().items():
        assert (ROOT / "deploy" / name).read_text() == text, f"deploy/{name}: write it again from template.app()"
    app = tomllib.loads(template.PYPROJECT)["tool"]["flwr"]["app"]
    settings = Settings.of(app["config"])
    assert settings.schedule == Settings("run.toml").schedule and settings.images == "partition"


def test_run_configuration_is_read_strictly() -> None:
    assert dotted("federate.rounds = 3, federate.local.lr = 0.05") == {"federate.rounds": 3, "federate.local.lr": 0.05}
    assert dotted("") == {}
    with pytest.raises(UserError, match="not TOML"):
        dotted("federate.rounds")
    for wrong, says in (({"deadlin": 3}, "unknown"), ({"deadline": -1.0}, "not above 0"), ({"images": "x"}, "unknown")):
        with pytest.raises(UserError, match=says):
            Settings.of({"config": "run.toml"} | wrong)


@contextlib.contextmanager
def server(folder: Path, ahead: float = 0.0, tls: bool = True) -> Iterator[int]:
    """An HTTPS server with the deployment's certificate, whose clock may be off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)
            self.send_header("Date", format_datetime(now, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as s:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "server.crt", folder / "server.key")
            s.socket = context.wrap_socket(s.socket, server_side=True)
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield int(s.server_address[1])
        s.shutdown()


def asked(made: Layout, port: int, host: str = "localhost", **config: Any) -> list[str]:
    node = Node.read(made.site("a"))
    return list(doctor.site(Node(node.folder, "a", host, port, 9094, dict(node.config) | config)))


def test_the_doctor_finds_nothing_wrong_with_what_is_whole(made: Layout) -> None:
    with server(made.server) as port:
        said = asked(made, port)
    assert [line.partition(":")[0] for line in said] == ["version", "name", "TCP", "TLS", "clock", "key", "data"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")
def test_keys_and_certificates_of_the_pages_openssl_lines_are_good(config: Path, tmp_path: Path) -> None:
    made = layout.init(tmp_path / "federation", sites=["north", "south"], config=config, host="localhost")
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"^```console\n(.*?)^```", page, re.M | re.S) if "openssl" in b)
    before = (made.site("north") / "key.pub").read_text(), (made.server / "server.crt").read_text()
    subprocess.run(["bash", "-ec", block], cwd=tmp_path, check=True, capture_output=True)
    assert (made.site("north") / "key.pub").read_text() != before[0]
    assert (made.server / "server.crt").read_text() != before[1]
    node = Node.read(made.site("north"))
    with server(made.server) as port:
        said = list(doctor.site(Node(node.folder, "north", "localhost", port, 9094, dict(node.config))))
    assert [line.partition(":")[0] for line in said] == ["version", "name", "TCP", "TLS", "clock", "key", "data"]


def test_the_doctor_names_the_layer_that_fails(made: Layout, tmp_path: Path) -> None:
    def says(words: str, port: int, host: str = "localhost", **config: Any) -> None:
        with pytest.raises(UserError, match=words) as e:
            asked(made, port, host, **config)
        assert "\n" not in str(e.value)

    says("^name: no-such-host.invalid: cannot be resolved", 8000, "no-such-host.invalid")
    [closed] = processes.free_ports(1)
    says(rf"^TCP: localhost:{closed}: no connection.*SuperLink running", closed)
    with server(made.server, tls=False) as port:
        says(r"^TLS: localhost.*(no TLS there|no answer)", port)
    with server(made.server, ahead=-600) as port:
        says("^clock: this machine is (599|600|601) s ahead of the server", port)
    with server(made.server, ahead=600) as port:
        says("^clock: this machine is (599|600|601) s behind the server", port)
    with server(made.server) as port:
        log = made.site("a") / "supernode.log"
        log.write_text("Starting Flower SuperNode\n[code: 2004] Failed to activate SuperNode\n")
        says("^key: the server did not take it.*on the server: mllm-fl deploy register", port)
        log.write_text(log.read_text() + "Starting Flower SuperNode\n")
        says(r"^data=folder:/nowhere: is not a folder; mount it", port, data="folder:/nowhere")
        (tmp_path / "empty" / "cat").mkdir(parents=True)
        says(r"holds no image", port, data=f"folder:{tmp_path}/empty")
        (made.site("a") / "key.pub").write_bytes((made.site("b") / "key.pub").read_bytes())
        says("^key: .*does not belong to key.pub", port)
    other = tmp_path / "other"
    other.mkdir()
    certificates.make_authority(other, other, ["localhost"])
    with server(other) as port:
        says("^TLS: .*not signed by .*ca.crt", port)
    certificates.make_authority(made.server, other, ["elsewhere.example"])
    with server(other) as port:
        says("^TLS: .*the certificate does not name localhost; on the server: mllm-fl deploy renew DIR --host", port)
    certificates.make_authority(made.server, other, ["localhost"], days=-1)
    with server(other) as port:
        says("^TLS: .*the server's certificate has expired; on the server: mllm-fl deploy renew", port)


def test_renewing_keeps_the_authority_that_sites_trust(made: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    before = (made.server / "ca.crt").read_bytes()
    assert main(["deploy", "renew", str(made.folder), "--host", "127.0.0.1"]) == 0
    assert (made.server / "ca.crt").read_bytes() == before
    with server(made.server) as port:
        assert len(asked(made, port, "127.0.0.1")) == 7


def test_a_taken_port_is_said_before_anything_is_started(made: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = int(s.getsockname()[1])
        path = made.folder / "federation.toml"
        path.write_text(path.read_text().replace("8000", str(port)))
        assert main(["deploy", "superlink", str(made.folder)]) == 2
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port}: the port is taken by another process" in err and err.count("\n") == 1


def test_the_servers_doctor_names_what_is_missing(made: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "doctor", str(made.folder)]) == 2
    out, err = capsys.readouterr()
    assert "a, b not registered; mllm-fl deploy register" in err and "certificate: good for 82" in out
    rows = [{"name": "a", "node": "1"}, {"name": "b", "node": "2"}]
    made.sites_json.write_text(json.dumps({"sites": rows}))
    assert main(["deploy", "doctor", str(made.folder)]) == 2
    assert "no SuperLink answers" in capsys.readouterr().err


def test_a_process_that_dies_comes_back_and_the_line_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "FIRST", 0.05)
    monkeypatch.setattr(processes, "LONGEST", 0.05)
    said: list[str] = []
    code = "import sys; print('could not be activated', flush=True); sys.exit(1)"
    with processes.Kept("a", [sys.executable, "-c", code], {}, tmp_path / "log", said.append) as kept:
        for _ in range(600):
            if kept.starts >= 3:
                break
            threading.Event().wait(0.05)
    assert (
        kept.starts >= 3
        and len(said) == 1
        and "still holds this site's last process to be online; trying again" in said[0]
    )
    ended = kept.starts
    threading.Event().wait(0.3)
    assert kept.starts == ended


REAL = {  # what flower-supernode 1.41 wrote when it was tried, and what must be said of it
    "certificate verify failed: Hostname mismatch, certificate is not valid for 'localhost'. CERTIFICATE_VERIFY_FAILED": "does not name this host",
    "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate": "not signed by this site's ca.crt",
    "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired": "has expired; on the server: mllm-fl deploy renew",
    "[SSL: WRONG_VERSION_NUMBER] wrong version number": "no TLS at the server's port",
    "[code: 2001] SuperNode authentication is enabled. All SuperNodes must be registered via the CLI": "mllm-fl deploy register",
    "something else": "ended with status 1; ask the doctor (log: ",
}


@pytest.mark.parametrize("line", REAL)
def test_what_flower_says_at_its_end_is_one_line_that_can_be_acted_on(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "FIRST", 60.0)
    said: list[str] = []
    code = f"import sys; print({line!r}, flush=True); sys.exit(1)"
    with processes.Kept("a", [sys.executable, "-c", code], {}, tmp_path / "log", said.append, ask="; ask the doctor"):
        _soon(lambda: said)
    assert len(said) == 1 and REAL[line] in said[0]


def test_a_server_that_is_not_there_is_said_once_and_again_when_it_is(tmp_path: Path) -> None:
    """Flower's SuperNode goes on trying for ever, and says so in its log alone."""
    said: list[str] = []
    code = (
        "import os, time\n"
        "for i in range(4): print('Connection attempt failed, retrying in 1 seconds', flush=True)\n"
        "while not os.path.exists('go'): time.sleep(0.1)\n"
        "print('Connection successful after 3 seconds', flush=True); time.sleep(999)"
    )
    argv = [sys.executable, "-c", code]
    with processes.Kept("a", argv, {}, tmp_path / "log", said.append, tmp_path, watch="no SuperLink answers"):
        _soon(lambda: said)
        (tmp_path / "go").touch()
        _soon(lambda: len(said) > 1)
    assert said[0].startswith("a: no SuperLink answers (log: ")
    assert "the SuperLink answers again" in said[1] and len(said) == 2


def test_a_worker_answers_as_the_process_itself_would(
    tmp_path: Path, nodes: dict[int, dict[str, Any]], config: Path
) -> None:
    from mllm_fl.config import load
    from mllm_fl.deployment import worker
    from mllm_fl.deployment.node import handle
    from mllm_fl.deployment.server import _common, _splits
    from mllm_fl.engines.wire import Parcel, pack, unpack
    from mllm_fl.stages import chain

    [one] = load(config).runs
    facts = _common(one, _splits(chain.federation_of(one)), Settings(str(config)))
    node = nodes[101]
    state = Path(node["state"])
    threading.Thread(target=worker.serve, args=(state,), daemon=True).start()
    for _ in range(600):
        if (state / worker.SOCKET).exists():
            break
        threading.Event().wait(0.05)
    packed = pack(Parcel(facts))
    assert unpack(worker.ask("hello", packed, node, 1)) == unpack(handle("hello", packed, node, 1))
    (state / worker.SOCKET).unlink()
    assert "sizes" in unpack(worker.ask("hello", packed, node, 1)).facts  # without one, by itself


def test_a_process_whose_executor_is_gone_is_started_again_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's SuperLink lives on without its executor, and then starts no run any more."""
    import os
    import signal
    import time

    monkeypatch.setattr(processes, "FIRST", 0.05)
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(999) # executor', ], start_new_session=True).wait(); import time; time.sleep(999)"
    said: list[str] = []

    def executors() -> list[int]:
        pid = kept.process.pid if kept.process is not None else 0
        return (
            [p for p, command in processes.below(pid) if "# executor" in command and "Popen" not in command]
            if pid
            else []
        )

    with processes.Kept(
        "link", [sys.executable, "-c", code], {}, tmp_path / "log", said.append, child="time.sleep(999) # executor "
    ) as kept:
        first = _soon(executors)
        time.sleep(3)  # seen
        os.kill(first[0], signal.SIGKILL)
        second = _soon(lambda: [p for p in executors() if p not in first], 90)
    assert said[0] == "link: its time.sleep(999) # executor  is gone; starting both again"
    assert all(not processes.command_of(p) for p in second)  # a session of its own does not save it from being ended


def _soon(what: Any, seconds: float = 60) -> Any:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")
