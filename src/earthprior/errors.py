"""What can go wrong for a user, each with the exit code that `cli.py` gives it.

A message says what (file, catalog row, key, value), why, and how to fix it; it is shown without a traceback.
"""

from __future__ import annotations

import errno

# Whatever file they are about, the disk is at fault and not the program.
DISK = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "your quota of disk space is used up; free some",
    errno.EFBIG: "a limit on the size of files (ulimit -f) is in the way; raise it",
    errno.EIO: "the disk or network share fails; look at it before you go on",
    errno.EROFS: "this file system is mounted read-only; mount it writable, or work elsewhere",
    errno.ESTALE: "the network share was taken away; mount it again",
}
# Of a file that has a name, these are the owner's to mend.
NAMED = {
    errno.EACCES: "look at its owner and permissions (ls -ld), and its folder's",
    errno.EPERM: "look at its owner and permissions (ls -ld), and its folder's",
    errno.ENOENT: "it was there before; was it moved or deleted meanwhile?",
    errno.ENOTDIR: "a file stands where a folder is needed; move it away",
    errno.EEXIST: "a file stands where a folder is needed; move it away",
    errno.EISDIR: "a folder stands where a file is needed; move it away",
    errno.ENAMETOOLONG: "work under a shorter path",
}


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


class DeviceMemoryError(EarthPriorError):
    """The memory of the device or the machine is too small for what params.yaml asks."""


class StorageError(EarthPriorError):
    """The disk is full or failing."""

    exit_code = 4


def mended_by(error: OSError) -> str | None:
    """How to mend what the operating system refused; None for what may as well be a fault of the program."""
    return DISK.get(error.errno or 0) or (NAMED.get(error.errno or 0) if error.filename else None)


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
