"""The one exception that a user meets: one line that names the place and the way out."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, bad environment, or a file that cannot be used.

    ``str(error)`` is one line, ``place: what is wrong; what to do``. The command line prints it
    and exits with status 2; nothing half-written is left behind.
    """

    def __init__(self, place: object, problem: str, way_out: str = "") -> None:
        line = f"{place}: {problem}" + (f"; {way_out}" if way_out else "")
        super().__init__(" ".join(line.split()))
