"""Where a model's files are, and what they are, without loading one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mllm_fl.errors import UserError

BUNDLED = Path(__file__).parent / "bundled"


def locate(name: str, bundled: str = "mini-llava") -> str:
    """What to load from: the bundled folder for "mini", else ``name`` (a folder or a hub id).

    Raises:
        UserError: the bundled weights are missing, or ``name`` looks like a folder that is not there.
    """
    if name == "mini":
        if not (BUNDLED / bundled / "config.json").exists():
            raise UserError(BUNDLED / bundled, "the bundled model is missing", "run `make teachers`")
        return str(BUNDLED / bundled)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not (Path(name).expanduser() / "config.json").exists():
        raise UserError(
            name,
            "no model folder (no config.json)",
            "give a Hugging Face folder, a hub id such as llava-hf/llava-1.5-7b-hf, or mini",
        )
    return str(Path(name).expanduser()) if looks_local else name


SAYS = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
"""Endings of the files that decide what a model says: configuration, preprocessing, tokenizer, weights."""


def fingerprint(name: str) -> str | None:
    """SHA-256 over a model's files in Hugging Face's layout, by name; None when they are not on this machine.

    Nothing is loaded or fetched: of a hub id the files in the local cache count. ``name`` as in :func:`locate`.
    """
    folder = Path(name).expanduser() if name != "mini" else BUNDLED / "mini-llava"
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            return None
        from transformers.utils import cached_file

        found = cached_file(
            name, "config.json", local_files_only=True,
            _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if found is None:
            return None
        folder = Path(found).parent
    files = sorted(p for p in folder.iterdir() if p.suffix in SAYS and p.is_file())
    if not files:
        return None
    h = hashlib.sha256()
    for path in files:
        with path.open("rb") as f:
            h.update(f"{path.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return h.hexdigest()
