"""What can go wrong for a user, each with the exit code that `cli.py` gives it.

A message says what (file, catalog row, key, value), why, and how to fix it; it is shown without a traceback.
"""

from __future__ import annotations


class EarthPriorError(Exception):
    """A fault that the user can mend: parameters, data, or a request that makes no sense."""

    exit_code = 2


class ParamsError(EarthPriorError):
    """params.yaml (or a preset) is malformed; the message lists every fault at once."""


class DataError(EarthPriorError):
    """The catalog or the chips are not what the parameters say; the message names file and row."""


class CodeChangedError(EarthPriorError):
    """A checkpoint was written by other code, and continuing would mix two programs."""


class HeldError(EarthPriorError):
    """Another process trains this very run."""


class DivergedError(EarthPriorError):
    """Loss or gradient became non-finite; nothing was written after the last good checkpoint."""

    exit_code = 3


class StorageError(EarthPriorError):
    """The disk is full or failing."""

    exit_code = 4


class Pruned(EarthPriorError):
    """A study gave this training up because others do better; nothing is wrong with it."""


class Interrupted(EarthPriorError):
    """The process was asked to stop; the state is saved and the same command continues.

    Args:
        message: What was saved and the command that continues.
        signal_number: The signal that asked (SIGINT 2 -> exit code 130, SIGTERM 15 -> 143).
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
