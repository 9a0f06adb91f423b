"""The error class for everything a user can cause, the kind of it that a run recovers from, and how a run ends that wants to go on."""

from __future__ import annotations

__all__ = ["CONTINUE", "DamagedCheckpoint", "MegaloopError"]

CONTINUE = 75
"""Exit code of a run that a signal ended: all is saved, and it wants to be continued (EX_TEMPFAIL of sysexits.h).

A rank leaves with it after Ctrl-C as well; the local launcher, which knows what it passed on, makes 130 of it."""


class MegaloopError(Exception):
    """Something the user can fix: bad configuration, bad input, a full disk.

    The message says what was found, what was expected and what to do, in one line. The command line
    prints it and leaves with exit code 2; a traceback is shown only with ``--debug``.
    """


class DamagedCheckpoint(MegaloopError):
    """A checkpoint whose bytes are not those that were saved: missing, truncated or altered. An earlier one may do."""
