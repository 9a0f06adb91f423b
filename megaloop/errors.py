"""The error class for everything a user can cause, and the one kind of it that a run recovers from."""

from __future__ import annotations

__all__ = ["DamagedCheckpoint", "MegaloopError"]


class MegaloopError(Exception):
    """Something the user can mend: bad configuration, bad input, a full disk.

    The message says what was found, what was expected and what to do, in one line. The command line
    prints it and leaves with exit code 2; a traceback is shown only with ``--debug``.
    """


class DamagedCheckpoint(MegaloopError):
    """A checkpoint whose bytes are not those that were saved: missing, truncated or altered. An earlier one may do."""
