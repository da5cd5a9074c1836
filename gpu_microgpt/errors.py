"""Failures a user can act on: one clear line each, shown without a traceback."""

from __future__ import annotations

import sys


class UserError(Exception):
    """What was got, what was wanted, what to do: in one line. The command line exits 2."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or impossible."""


class DataError(UserError):
    """A corpus or a prompt cannot be used."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, found or trusted."""


class BackendError(UserError):
    """The asked-for backend or precision cannot run here."""


class DeviceError(UserError):
    """The GPU failed, was lost or is out of memory during a run."""


class DivergedError(UserError):
    """The loss or the gradient norm became NaN or infinite."""


def warn(message: str) -> None:
    """One line on stderr about something that was got round."""
    print(f"warning: {message}", file=sys.stderr)
