"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

from mllm_fl.atomic import write_atomic
from mllm_fl.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """:func:`mllm_fl.atomic.write_atomic` into a folder that is made if it is not there.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise UserError(
            path, f"cannot be written ({error.strerror or error})", "choose a writable folder with free space"
        ) from None
