"""How a command ends that does not reach its end: its exit code, and what it says last.

0 done; 2 something for the user to mend; 3 training diverged; 4 the disk; 128 + the signal's number (129, 130, 143)
stopped, and nothing lost; 141 nobody reads its output any more. Anything else is a fault of this program, and keeps its
traceback. The last line on stderr is the command that continues.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from earthprior.errors import DeviceMemoryError, EarthPriorError, Interrupted, StorageError, mended_by

OWN_FAULT, NOBODY_READS = 1, 128 + signal.SIGPIPE


def say(error: BaseException, signal_number: int | None, go_on: str, debug: bool) -> int:
    """Tell on stderr what ended a command and how to go on; its exit code.

    Args:
        error: What ended it.
        signal_number: The signal that was received, if any.
        go_on: The command that continues.
        debug: Show the traceback of any error.
    """
    if isinstance(error, SystemExit):
        return _close(error.code if isinstance(error.code, int) else 0 if error.code is None else OWN_FAULT, go_on)
    if isinstance(error, BrokenPipeError):
        _leave_the_pipes()
        return NOBODY_READS
    fault = as_fault(error, signal_number)
    if debug or fault is None:
        with suppress(OSError):
            traceback.print_exception(error)
    if fault is None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _print(f"earthprior: this is a fault of EarthPrior itself ({reason}); please report it with the lines above")
        return _close(OWN_FAULT, go_on)
    _print(f"earthprior: {fault}")
    return _close(fault.exit_code, go_on)


def as_fault(error: BaseException, signal_number: int | None) -> EarthPriorError | None:
    """The user's view of what went wrong; None for what is a fault of this program."""
    if isinstance(error, EarthPriorError):
        return error
    if isinstance(error, KeyboardInterrupt):
        number = signal_number or signal.SIGINT
        return Interrupted(f"stopped by {signal.Signals(number).name}", number)
    if _is_out_of_memory(error):
        return _memory_fault(error)
    if isinstance(error, OSError):
        return _storage_fault(error)
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    # Which is imported already: it takes seconds, and most verbs do without.
    from earthprior import memory

    return memory.is_out_of_memory(error)


def _memory_fault(error: BaseException) -> DeviceMemoryError:
    """What was short, and what needs less of it; a machine's own memory is no reason to go to its CPU."""
    lines = str(error).splitlines() or [""]
    # Where in torch's own source it was found.
    why = re.sub(r"^\[enforce fail at [^\]]*\] [^.]*\. ", "", lines[0])
    told = f" ({why})" if why else ""
    device = not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error)
    return DeviceMemoryError(
        f"out of memory{told}. End other programs that use it, lower operation.readers, "
        f"{'set operation.device to cpu, ' * device}cut each batch into more parts (accumulation_steps), or lower "
        "batch_size or data.crop_px"
    )


def _storage_fault(error: OSError) -> StorageError | None:
    fix = mended_by(error)
    if fix is None:
        return None
    where = f"{_shown(error.filename)}: " if error.filename else ""
    return StorageError(f"{where}{error.strerror}; {fix}")


def _shown(filename: object) -> str:
    """A path from the working directory where that is shorter."""
    text = os.fsdecode(filename) if isinstance(filename, str | bytes | os.PathLike) else str(filename)
    with suppress(OSError, ValueError):
        return min(text, os.path.relpath(text), key=len)
    return text


def continue_command(typed: Sequence[str]) -> str:
    """What to type to go on, as this process was started: by DVC, by torchrun or by hand.

    To be asked at the beginning: a dvc that has died cannot be asked any more.

    Args:
        typed: The arguments of this command.
    """
    if "DVC_STAGE" in os.environ:
        return _dvc_command()
    arguments = shlex.join(typed)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        several = f"--nnodes={nodes} " if nodes > 1 else ""
        per_node = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        return f"torchrun {several}--nproc-per-node={per_node} -m earthprior {arguments}"
    program = "python -m earthprior" if Path(sys.argv[0]).name == "__main__.py" else "earthprior"
    return f"{program} {arguments}"


def _dvc_command() -> str:
    """The command of the dvc that started this stage, or a like one where that dvc is gone."""
    with suppress(psutil.Error):
        words = psutil.Process(os.getppid()).cmdline()
        names = [Path(word).name for word in words[:3]]
        if "dvc" in names:
            arguments = words[names.index("dvc") + 1 :]
            if arguments[:1] == ["repro"] or arguments[:2] == ["exp", "run"]:
                return shlex.join(["dvc", *arguments])
    return "the same dvc exp run" if "DVC_EXP_NAME" in os.environ else "dvc repro"


def _close(code: int, go_on: str) -> int:
    if code:
        # What the user has to change comes first, except after a stop and where only the disk was full.
        _print(f"{'then ' * (code in (2, 3))}continue with: {go_on}")
    return code


def _print(text: str) -> None:
    # The terminal may be what went away. In one write: the processes of torchrun share it, and print's own newline is a
    # write of its own, which another one's line may come before.
    with suppress(OSError):
        print(f"{text}\n", end="", file=sys.stderr, flush=True)


def _leave_the_pipes() -> None:
    """Without this, Python complains at exit of what it could not write."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
