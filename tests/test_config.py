"""Strict TOML: every mistake names the file, the key and the way out; what was resolved can be fed back."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm_fl.algorithms.fedprox import FedProx
from mllm_fl.config import Config, from_dict, load
from mllm_fl.errors import UserError
from mllm_fl.runs import config_hash
from mllm_fl.toml import dumps, read_toml


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table2.toml"
    path.write_text(text)
    return path


MISTAKES = [
    ("arm = 3", r"table2.toml: arm: expected tables, got 3; write \[\[arm\]\]"),
    ("[arm]\nname = 'a'", r"table2.toml: arm: expected tables, got .*; write \[\[arm\]\]"),
    ("arm = []", r"table2.toml: arm: expected tables"),
    ("[[arm]]\nset = 'x'", r"\[\[arm\]\] number 1: set: expected a table, got 'x'"),
    ('[[arm]]\nname = "a\\u001b[31mred"', r"\[\[arm\]\] number 1: name: 'a\\x1b\[31mred' cannot name a folder"),
    ("[[arm]]\nname = '../up'", r"\[\[arm\]\] number 1: name: '../up' cannot name a folder"),
    ("[[arm]]\nname = 3", r"\[\[arm\]\] number 1: name: expected a string, got 3"),
    (f"experiment = '{'ü' * 51}'", r"experiment: 102 bytes are too long for a folder's name; at most 100"),
    ("seeds = [0, 1, 0]", r"table2.toml: seeds: a seed stands twice in \[0, 1, 0\]"),
    (
        "federate.local.learning_rate = 0.1",
        r"table2.toml: federate.local.learning_rate: unknown key; did you mean 'lr'\?",
    ),
    ("federate.local.epoch = 1", r"federate.local.epoch: unknown key; did you mean 'epochs'\?"),
    ("federat.rounds = 1", r"table2.toml: federat: unknown key; did you mean 'federate'\?"),
    ("federate.rounds = 'many'", r"federate.rounds: expected a whole number, got str 'many'"),
    ("federate.rounds = 1.5", r"federate.rounds: expected a whole number, got float 1.5"),
    ("federate.rounds = true", r"federate.rounds: expected a whole number, got bool True"),
    ("federate.rounds = 0", r"table2.toml: federate.rounds: 0 is below 1"),
    (
        "federate.algorithm = 'fedprx'",
        r"table2.toml: federate.algorithm: unknown method 'fedprx'; did you mean 'fedprox'\?",
    ),
    ("federate.algorithm = 'no_such_module:X'", r"federate.algorithm: no module 'no_such_module'"),
    ("federate.algorithm = 'json:JSONDecoder'", r"is not a subclass of mllm_fl.algorithms.base.Algorithm"),
    ("federate.method.mu = 0.1", r"federate.method.mu: unknown key"),
    ("federate.algorithm = 'fedprox'\nfederate.method.mu = -1", r"federate.method.mu: FedProx needs mu in"),
    ("model.adapter = 'linaer'", r"model.adapter: 'linaer' is not allowed; did you mean 'linear'\?"),
    ("model = 3", r"model: expected a table, got 3; write \[model\]"),
    ("data.clients = 5", r"federate.clients_per_round: 8 online clients, but data.clients is 5"),
    ("data.alpha = 0", r"data.alpha"),
    ("pretrain = true", r"pretrain: needs an adapter to the teacher's width; set model.adapter"),
    ("name = 'a/b'", r"name: 'a/b' cannot name a folder"),
    ("seeds = 3", r"seeds: expected a list of whole numbers"),
    ("[[arm]]\nname = 'a'\n[[arm]]\nset = {}", r"\[\[arm\]\] number 2: needs `name`"),
    ("[[arm]]\nname = 'a'\n[[arm]]\nname = 'a'", r"two arms have the same name"),
    ("x = = 1", r"table2.toml: not valid TOML: .*line 1"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[t[0].split("\n")[0] for t in MISTAKES])
def test_mistakes_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(UserError, match=r"table3.toml: no such file; did you mean .*table2.toml\?"):
        load(tmp_path / "table3.toml")


def test_resolved_configuration_fed_back_is_the_same(tmp_path: Path) -> None:
    config = load(
        write(
            tmp_path,
            "seed = 3\nalign = true\nfederate.algorithm = 'fedprox'\nfederate.method.mu = 1\ndata.imbalance_factor = 30",
        )
    ).runs[0]
    again = tmp_path / "resolved.toml"
    again.write_text(dumps(config.resolved()))
    assert from_dict(read_toml(again), "x") == config
    assert config_hash(config.resolved()) == config_hash(from_dict(read_toml(again), "x").resolved())
    assert config.federate.method == FedProx(mu=1.0)


def test_arms_and_seeds_multiply_and_tables_switch_on_and_off(tmp_path: Path) -> None:
    text = """
    seeds = [0, 1]
    [align]
    beta = 2
    [[arm]]
    name = "plain"
    set = { align = false }
    [[arm]]
    name = "aligned"
    set = { "federate.rounds" = 5 }
    """
    plan = load(write(tmp_path, text))
    assert plan.arms == ("plain", "aligned")
    assert [(c.name, c.seed, c.align is not None, c.federate.rounds) for c in plan.runs] == [
        ("plain", 0, False, 200), ("plain", 1, False, 200), ("aligned", 0, True, 5), ("aligned", 1, True, 5),
    ]  # fmt: skip
    assert len({config_hash(c.resolved()) for c in plan.runs}) == 4
    assert plan.runs[2].align is not None and plan.runs[2].align.beta == 2.0


def test_false_switches_any_optional_value_off() -> None:
    raw: dict[str, dict[str, object]] = {
        "pretrain": {"feature_mse": 1.0, "lm_samples": 4},
        "model": {"adapter": "linear"},
    }
    assert from_dict(raw, "x").pretrain.lm_samples == 4  # type: ignore[union-attr]
    raw["pretrain"]["lm_samples"] = False
    assert from_dict(raw, "x").pretrain.lm_samples is None  # type: ignore[union-attr]


def test_defaults_are_a_configuration() -> None:
    assert from_dict({}, "x") == Config()


def test_a_users_own_method_is_found_by_module_and_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_module.py").write_text(
        "from dataclasses import dataclass\nfrom mllm_fl.algorithms.base import Algorithm\n\n"
        "@dataclass(frozen=True)\nclass MyMethod(Algorithm):\n    strength: float = 0.5\n"
    )
    monkeypatch.chdir(tmp_path)
    plan = load(write(tmp_path, "federate.algorithm = 'my_module:MyMethod'\nfederate.method.strength = 2"))
    method = plan.runs[0].federate.method
    assert type(method).__name__ == "MyMethod"
    assert vars(method) == {"strength": 2.0}


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 7\r\n")
    assert load(path).runs[0].seed == 7
