"""`earthprior reproduce`: make a run again from its commit, its chips and its params, and say whether it is the same.

Its stages are run directly and not through DVC, whose run cache would restore their outs instead of computing them.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from earthprior import checkout, recorded, reproduction
from earthprior.errors import EarthPriorError
from earthprior.files import sha256_file
from earthprior.identity import main_root
from earthprior.recorded import RecordedRun
from earthprior.reproduction import Cause, Moved

SHOWN = 12


def run(root: Path, asked: str, keep: bool = False) -> None:
    """Make a run again and report.

    Args:
        root: The project's root.
        asked: The id of an MLflow run or the name of a DVC experiment.
        keep: Leave the copy in work/reproduce/.

    Raises:
        EarthPriorError: The run came out otherwise, or it cannot be made again.
    """
    root = main_root(root)
    with _folder(root, asked, keep) as folder:
        then = recorded.find(root, asked, folder / "then")
        _check(then)
        copy = folder / "copy"
        commit = _commit(root, then, folder / "experiment")
        _say(f"run {then.title}: copying commit {commit[:10]} to {os.path.relpath(copy, root)}")
        checkout.at(root, commit, copy)
        _say(f"getting the chips, md5 {then.data_md5}")
        checkout.get_chips(root, then, copy)
        checkout.write_params(root, then, copy)
        _run_stages(then, copy)
        now = recorded.of_workspace(copy, folder / "now")
        _report(then, now, copy)


def _say(text: str) -> None:
    print(f"reproduce: {text}", flush=True)


@contextmanager
def _folder(root: Path, asked: str, keep: bool) -> Iterator[Path]:
    """A folder for one reproduction; on the disk of DVC's cache, so that the chips can be links."""
    home = root / "work/reproduce"
    home.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]", "-", asked)[:24]
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=home))
    try:
        yield folder
    finally:
        if keep:
            _say(f"kept in {os.path.relpath(folder, root)}: copy/ (made again), then/ and now/ (what is compared)")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _check(then: RecordedRun) -> None:
    """Before any work."""
    if then.commit is None:
        raise EarthPriorError(
            f"run {then.asked} was made outside Git, so its code is not to be had; commit, and run it anew"
        )
    if not (then.folder / "network.safetensors").is_file() and then.history.empty:
        raise EarthPriorError(f"run {then.asked}: neither weights nor history were kept, so nothing can be compared")
    folder = then.content.get("data", {}).get("dir", "data")
    if folder != "data" or then.data_md5 is None:
        raise EarthPriorError(
            f"run {then.asked} read its chips from {folder} (data.dir), of which DVC keeps no version; put them under "
            "it with `dvc add PATH -o data`, and run anew with data.dir: data"
        )


def _commit(root: Path, then: RecordedRun, scratch: Path) -> str:
    """The commit to make the run from: the DVC experiment's if that is this very run, for it holds uncommitted code."""
    assert then.commit is not None, "_check comes first"
    if then.experiment and then.experiment != then.asked and recorded.experiment_commit(root, then.experiment):
        made = recorded.find(root, then.experiment, scratch)

        def who(run: RecordedRun) -> list[Any]:
            """A name may have been used again; what the training is made of says nothing of its evaluation."""
            return [run.read("config.json").get("fingerprint"), run.read("environment.json").get("code"), run.metrics]

        if made.commit and who(then)[0] and who(then) == who(made):
            return made.commit
    return then.commit


def _run_stages(then: RecordedRun, copy: Path) -> None:
    wanted = ["stats", "pretrain", *(["evaluate"] if then.metrics else [])]
    try:
        pipeline = YAML(typ="safe", pure=True).load((copy / "dvc.yaml").read_text(encoding="utf-8"))
        commands = {name: shlex.split(pipeline["stages"][name]["cmd"]) for name in wanted}
    except (OSError, LookupError, TypeError, AttributeError):
        raise EarthPriorError(
            f"run {then.asked}: dvc.yaml of its commit has no stages {', '.join(wanted)}; it cannot be made again"
        ) from None
    # Those that its commit holds must not be taken for what comes out now.
    shutil.rmtree(copy / "results", ignore_errors=True)
    for place, (name, command) in enumerate(commands.items(), 1):
        _say(f"stage {name} ({place} of {len(wanted)})")
        if code := checkout.call(command, copy):
            raise EarthPriorError(
                f"run {then.asked} could not be made again: its stage {name} ended with exit code {code} and the "
                f"message above.{_code_hint(then, copy)}"
            )


def _code_hint(then: RecordedRun, copy: Path) -> str:
    causes = reproduction.causes(then, then, copy / "src/earthprior", None)
    code = next(cause for cause in causes if cause.kind == "code")
    if not code.differing:
        return ""
    return f" The run was made with other code than its commit has ({_listed(code.differing)}), which was not kept"


def _digest(copy: Path) -> str | None:
    """Of the copy's code, as that code reckons it."""
    program = "from earthprior.identity import code_hash; print(code_hash().digest)"
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _report(then: RecordedRun, now: RecordedRun, copy: Path) -> None:
    """Say what came out.

    Raises:
        EarthPriorError: Something else than before, with the verdict in one line.
    """
    outs = reproduction.compared_outs(then, now)
    digest = None if then.read("environment.json") else _digest(copy)
    causes = reproduction.causes(then, now, copy / "src/earthprior", digest)
    print()
    for cause in causes:
        print(f"  {cause.kind:<10}{_state(cause)}")
    for name, same in outs.items():
        absent = "not kept" if then.metrics or name != "metrics.json" else "the run was not evaluated"
        print(f"  {name:<21}{absent if same is None else 'identical' if same else 'differs'}")
    numbers = reproduction.moved(then, now)
    if False not in outs.values():
        if outs["network.safetensors"] is None:
            kept = ", ".join(name for name, same in outs.items() if same)
            raise EarthPriorError(f"run {then.title}: {kept} identical, but its weights were not kept to compare")
        print(f"\nidentical: {_praise(then, outs)}")
        return
    _print_moved(numbers)
    other = ", ".join(name for name, same in outs.items() if same is False)
    raise EarthPriorError(f"run {then.title} came out otherwise ({other}): {_blame(causes)}{_headline(numbers)}")


def _state(cause: Cause) -> str:
    if cause.differing is None:
        return "not recorded"
    return f"differs: {_listed(cause.differing)}" if cause.differing else "same"


def _listed(texts: Sequence[str]) -> str:
    more = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def _praise(then: RecordedRun, outs: dict[str, bool | None]) -> str:
    kept = ", ".join(name for name, same in outs.items() if same)
    weights = then.folder / "network.safetensors"
    digest = f"; the weights' SHA-256 is {sha256_file(weights)}" if weights.is_file() else ""
    return f"{kept} of run {then.title}, to the bit{digest}"


def _blame(causes: Sequence[Cause]) -> str:
    guilty = [cause.kind for cause in causes if cause.differing]
    unknown = [cause.kind for cause in causes if cause.differing is None]
    if guilty:
        text = f"{' and '.join(guilty)} differ{'s' * (len(guilty) == 1)}"
        return text + (f" ({', '.join(unknown)} not recorded)" if unknown else "")
    if unknown:
        return f"nothing that was recorded differs, but {', '.join(unknown)} were not recorded"
    return "nothing that was recorded differs, which the code of stats and evaluate is not; or it is not the same twice"


def _headline(numbers: Sequence[Moved]) -> str:
    for number in numbers:
        if number.name == "validation gain, dB: mean" and number.then is not None and number.now is not None:
            return f"; validation gain {number.then:+.4f} -> {number.now:+.4f} dB ({number.now - number.then:+.2g})"
    return ""


def _print_moved(numbers: Sequence[Moved]) -> None:
    """A table of what moved."""
    changed = [number for number in numbers if number.then != number.now]
    if not changed:
        return
    width = max(len(number.name) for number in changed)
    print(f"\n  {'':<{width}} {'then':>14} {'now':>14} {'difference':>12}")
    for number in changed:
        then, now = (math.nan if value is None else value for value in (number.then, number.now))
        print(f"  {number.name:<{width}} {then:>14.8g} {now:>14.8g} {now - then:>+12.3g}")
    if len(changed) < len(numbers):
        print(f"  {len(numbers) - len(changed)} other numbers are the same")
