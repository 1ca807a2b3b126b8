"""Errors that a user can act on.

`UserError` is the only exception the command line prints without a traceback: its message says what is wrong, shows the
value, and names the next step. Everything else is a defect and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something outside the code is wrong; the message ends with what to do next. Exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The command or the recipe is not valid. Exit code 2."""

    exit_code = 2


class WaitingForPeople(UserError):
    """Human labels are missing; everything that does not need them goes on. Exit code 3."""

    exit_code = 3
