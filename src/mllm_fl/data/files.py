"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mllm_fl.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, fsync, rename: a reader never meets half a file."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(
            path, f"cannot be written ({error.strerror or error})", "choose a writable folder with free space"
        ) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
