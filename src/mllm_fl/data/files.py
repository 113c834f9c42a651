"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from mllm_fl.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, fsync, rename: a reader never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            path, f"cannot be written ({error.strerror or error})", "choose a writable folder with free space"
        ) from None
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
