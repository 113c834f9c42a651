"""TOML to frozen dataclasses and back: strict, and precise about what is wrong.

The schema is the dataclasses themselves. An unknown key, a value of another type, or a word outside a ``Literal`` is refused
with the file, the dotted key and the nearest right spelling.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from mllm_fl.errors import UserError

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The file as nested dicts.

    Raises:
        UserError: missing, not a file, not UTF-8, or not TOML (with the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a mark
    except FileNotFoundError as e:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        raise UserError(
            path, "no such file", f"did you mean {path.parent / near[0]}?" if near else "give the path of a TOML file"
        ) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(path, f"not valid TOML: {e}") from e
    except OSError as e:
        raise UserError(path, f"cannot be read: {e.strerror}") from e


def build(cls: type[T], raw: dict[str, Any], place: str, prefix: str = "", given: dict[str, Any] | None = None) -> T:
    """An instance of the dataclass ``cls`` from nested dicts; absent keys take the dataclass's defaults.

    ``place`` is the file, ``prefix`` the dotted path of this table. An optional table is switched on by ``true`` or a table; any
    optional value is switched off by ``false`` or absence. ``given``: values that were built elsewhere.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in raw:
        if key not in fields:
            near = _nearest(key, list(fields))
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"{place}: {prefix}{key}", "unknown key", hint)
    kwargs = dict(given or {})
    for key, value in raw.items():
        kwargs[key] = _value(hints[key], value, place, f"{prefix}{key}")
    try:
        return cls(**kwargs)
    except UserError as e:
        raise UserError(place, str(e)) from e


def _nearest(key: str, known: list[str]) -> list[str]:
    """The known key that was probably meant, or none: by initials (learning_rate: lr), spelling, or a part of the word."""
    initials = "".join(part[:1] for part in key.split("_"))
    by_part = [k for k in known if k in key or key in k]
    return [k for k in known if k == initials] or difflib.get_close_matches(key, known, n=1) or by_part[:1]


def _value(hint: Any, value: Any, place: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        if value is False and bool not in inner:
            return None
        if value is True and dataclasses.is_dataclass(inner[0]):
            value = {}
        if len(inner) == 1:
            return _value(inner[0], value, place, key)
        for option in inner:
            try:
                return _value(option, value, place, key)
            except UserError:
                continue
        raise UserError(f"{place}: {key}", f"{value!r} is none of {', '.join(_name(a) for a in inner)}")
    if origin is typing.Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            hint_text = f"did you mean {near[0]!r}?" if near else "choose one of " + ", ".join(repr(a) for a in args)
            raise UserError(f"{place}: {key}", f"{value!r} is not allowed", hint_text)
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{place}: {key}", f"expected a table, got {value!r}", f"write [{key}]")
        return build(typing.cast(type[Any], hint), value, place, f"{key}.")
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{place}: {key}", f"expected a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_value(args[0], v, place, key) for v in value)
        if len(value) != len(args):
            raise UserError(f"{place}: {key}", f"expected {len(args)} values, got {len(value)}")
        return tuple(_value(a, v, place, key) for a, v in zip(args, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool):
        if type(value) is not hint:
            raise UserError(f"{place}: {key}", f"expected {_name(hint)}, got {type(value).__name__} {value!r}")
        return value
    raise TypeError(f"{key}: schema type {hint!r} is not supported")


def _name(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return words.get(hint, str(getattr(hint, "__name__", hint)))


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain values; None (off) is left out, tuples become lists."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value is None:
            continue
        out[f.name] = (
            to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        )
    return out


def dumps(raw: dict[str, Any], prefix: str = "") -> str:
    """Nested dicts of scalars and lists as TOML; feeding it back gives the same dicts."""
    lines = [f"{k} = {_scalar(v)}" for k, v in raw.items() if not isinstance(v, dict)]
    for k, v in raw.items():
        if isinstance(v, dict):
            lines += ["", f"[{prefix}{k}]", dumps(v, f"{prefix}{k}.").rstrip()]
    return "\n".join(lines).strip() + "\n"


def _scalar(v: Any) -> str:
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, float):
        return repr(v) if v == v and abs(v) != float("inf") else str(v)
    if isinstance(v, int):
        return str(v)
    if isinstance(v, list):
        return "[" + ", ".join(_scalar(x) for x in v) + "]"
    return json.dumps(str(v), ensure_ascii=False)


def flatten(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys."""
    out: dict[str, Any] = {}
    for k, v in raw.items():
        if isinstance(v, dict):
            out.update(flatten(v, f"{prefix}{k}."))
        else:
            out[prefix + k] = v
    return out


def set_dotted(raw: dict[str, Any], key: str, value: Any) -> None:
    """Put ``value`` at a dotted key of nested dicts, making tables on the way."""
    *path, last = key.split(".")
    for part in path:
        nested = raw.get(part)
        if not isinstance(nested, dict):
            nested = raw[part] = {}
        raw = nested
    raw[last] = value
