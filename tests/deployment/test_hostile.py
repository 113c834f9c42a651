"""Wrong words, odd names, half-made folders: one line that names the place, and nothing written that is wrong."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from mllm_fl.cli import main
from mllm_fl.deployment import layout, processes
from mllm_fl.deployment.layout import Layout, Node, quoted
from mllm_fl.engines.flower import QUIET
from mllm_fl.errors import UserError


def says(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command line says of an error, which is one line and status 2."""
    capsys.readouterr()
    assert main(["deploy", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mllm-fl: ") and err.count("\n") == 1
    return err.removeprefix("mllm-fl: ").rstrip()


@pytest.fixture
def made(tmp_path: Path, config: Path) -> Layout:
    return layout.init(tmp_path / "fed", sites=["a", "b"], config=config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host", 'a"b'), "--host: 'a\"b' is neither a machine's name"),
        (("--host", ""), "--host: '' is neither"),
        (("--host", "http://x.org:80"), "without http:// and port"),
        (("--host", "::1"), "--host: '::1' is neither a machine's name nor an IPv4 address"),
        (("--bind", "here$"), "--bind: 'here$' is neither"),
        (("--port", "0"), "--port: 0 is no port; choose one from 1 to 65535"),
        (("--port", "99999"), "--port: 99999 is no port"),
        (("--sites", "A,a"), "one name twice"),
        (("--sites", ""), "no site"),
        (("--sites", "../x"), "site '../x': cannot name a folder"),
        (("--sites", 'a"b'), "cannot name a folder"),
        (("--sites", "süd"), "cannot name a folder"),
        (("--sites", "superlink"), "is what the server is called"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    words: tuple[str, ...], said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in says(capsys, "init", str(tmp_path / "fed"), "--config", str(config), *words)
    assert not (tmp_path / "fed").exists()


def test_a_folder_of_any_name_works(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flower, TOML, systemd and the shell each have quotation marks of their own."""
    folder = tmp_path / 'our "fed" ü 50% $x'
    made = layout.init(folder, sites=["a"], config=config)
    assert Layout.read(folder) == made
    assert tomllib.loads((made.server / "home" / "config.toml").read_text())["superlink"]["mllm-fl"][
        "root-certificates"
    ] == str(made.server / "ca.crt")
    node = Node.read(made.site("a"))
    assert parse_config_args([node.node_config()]) == dict(node.config)
    unit = (made.folder / "systemd" / "mllm-fl-superlink.service").read_text()
    assert 'our \\"fed\\" ü 50%% $$x"' in unit
    assert f"mllm-fl deploy superlink '{folder}'" in says(capsys, "doctor", str(folder)).replace(
        "register", "superlink"
    )


@pytest.mark.parametrize("text", ["a\\", 'a"b', '\\"', 'ü😀 x="1"', "it's"])
def test_any_text_reaches_a_node_whole(text: str) -> None:
    assert tomllib.loads(f"x = {quoted(text)}") == {"x": text}
    assert parse_config_args([f"x={quoted(text)} y=1"]) == {"x": text, "y": 1}


def test_a_deployment_that_was_interrupted_is_made_whole_by_the_same_command(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "fed", layout._site

    def interrupted(made: Layout, name: str, *rest: int) -> None:
        if name == "b":
            raise KeyboardInterrupt
        real(made, name, *rest)

    monkeypatch.setattr(layout, "_site", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layout.init(folder, sites=["a", "b"], config=config)
    with pytest.raises(UserError, match="no federation.toml here"):
        Layout.read(folder)
    monkeypatch.undo()
    made = layout.init(folder, sites=["a", "b"], config=config)
    assert (made.site("a") / "ca.crt").read_bytes() == (made.site("b") / "ca.crt").read_bytes()


def test_a_deployment_in_the_folder_of_its_own_configuration(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = config.read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["deploy", "init", ".", "--config", "run.toml", "--sites", "a"]) == 0
    assert config.read_text() == before


def test_files_that_someone_has_edited(made: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    folder, site = str(made.folder), str(made.site("a"))

    def edited(path: Path, old: str, new: str, verb: str, where: str) -> str:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        said = says(capsys, verb, where)
        path.write_text(text)
        return said

    federation, node = made.folder / "federation.toml", made.site("a") / "node.toml"
    assert "federation.toml: port: 99999 is no port" in edited(federation, "8000", "99999", "status", folder)
    assert "federation.toml: host: 'a b' is neither" in edited(federation, '"localhost"', '"a b"', "status", folder)
    assert "cannot name a folder" in edited(federation, '["a", "b"]', '["../../etc"]', "status", folder)
    assert "images: 'foo' is unknown" in edited(federation, '"partition"', '"foo"', "status", folder)
    assert "node.toml: port: 0 is no port" in edited(node, "port = 8000", "port = 0", "doctor", site)
    assert "runtime_port: -5 is no port" in edited(node, "runtime_port = 0", "runtime_port = -5", "doctor", site)
    assert "partition_id: 'x' is not a number" in edited(node, "id = 0", 'id = "x"', "doctor", site)
    said = edited(node, "share_histogram = false", 'share_histogram = "maybe"', "doctor", site)
    assert "share_histogram: 'maybe' is not true or false" in said
    assert "sites.json: names other sites than" in edited(made.sites_json, '"a"', '"zzz"', "doctor", folder)
    assert "ca.crt: is not a certificate; restore it" in edited(
        made.server / "ca.crt", "BEGIN", "END", "status", folder
    )
    crt = edited(made.server / "server.crt", "BEGIN", "END", "doctor", folder)
    assert "server.crt: cannot be read as a certificate" in crt
    assert "ca.key: this or ca.crt cannot be read" in edited(made.server / "ca.key", "BEGIN", "END", "renew", folder)


def test_a_certificate_is_not_signed_with_a_key_that_is_not_its_authoritys(
    made: Layout, tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after the page's openssl lines, which keep the authority's key elsewhere."""
    other = layout.init(tmp_path / "other", sites=["a"], config=config)
    before = (made.server / "server.crt").read_bytes()
    shutil.copyfile(other.server / "ca.key", made.server / "ca.key")
    assert "ca.key: is not the key of ca.crt; sign server.crt where" in says(capsys, "renew", str(made.folder))
    assert "'b c' is neither" in says(capsys, "renew", str(made.folder), "--host", "b c")
    assert (made.server / "server.crt").read_bytes() == before


def test_up_does_not_pass_over_a_configuration_that_is_not_the_folders(
    made: Layout, tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(config.read_text().replace("rounds = 3", "rounds = 9"))
    up = ("up", "--local", "--dir", str(made.folder))
    assert "run.toml: is not" in says(capsys, *up, str(other))
    assert "--nodes:" in says(capsys, *up, str(config), "--nodes", "5")


def test_an_address_that_is_not_this_machines_is_not_called_taken(
    made: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.folder / "federation.toml"
    path.write_text(path.read_text().replace("127.0.0.1", "192.0.2.1"))
    assert "192.0.2.1:8000: cannot be listened on here" in says(capsys, "superlink", str(made.folder))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_the_units(made: Layout, tmp_path: Path) -> None:
    units = tmp_path / "units"
    shutil.copytree(made.folder / "systemd", units)
    (units / "mllm-fl-node@.service").rename(units / "mllm-fl-node@north.service")
    for unit in sorted(units.iterdir()):
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=120)
        assert unit.name not in done.stderr + done.stdout and "ignor" not in done.stderr, done.stderr


def test_every_process_of_flower_is_quiet_whatever_its_owner_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for switch in QUIET:
        monkeypatch.setenv(switch, "1" if switch.endswith("ENABLED") else "0")
    found = processes.environment(tmp_path)
    assert (
        {k: found[k] for k in QUIET}
        == QUIET
        == {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
    )


def test_units_and_services_are_quiet_and_come_back(tmp_path: Path, config: Path) -> None:
    """YAML reads no as False and 08 as a number: the services' names are in quotes."""
    made = layout.init(tmp_path / "fed", sites=["no", "08"], config=config)
    services = importlib.import_module("yaml").safe_load((made.folder / "compose.yaml").read_text())["services"]
    assert set(services) == {"superlink", "no", "08"}
    for name, service in services.items():
        assert service["environment"] == QUIET and service["restart"] == "always"
        assert service["command"][:4] == ["python", "-m", "mllm_fl.cli", "deploy"]
        assert set(service) == {"image", "command", "environment", "volumes", "network_mode", "restart"}
        assert service["volumes"] == ([".:/federation"] if name == "superlink" else [f"./sites/{name}:/site"])
    for unit in (made.folder / "systemd").iterdir():
        text = unit.read_text()
        assert "Restart=always" in text and " ".join(f"{k}={v}" for k, v in QUIET.items()) in text
