"""Does a run that is killed again and again come to the same bits as one that nobody disturbed?

    PYTHONPATH=src python benchmarks/soak_kills.py [--kills 100] [--seed 0] [--jobs 2]
    PYTHONPATH=src python benchmarks/soak_kills.py --kills 8 --command "exp run --temp"

Small projects are made in a temporary folder; `dvc repro`, `dvc exp run`, `dvc exp run --temp` and `earthprior
pretrain` are started in them, killed as tests/kills.py describes, and started again until they are done. The tables
count the kills by signal and who got it, and by moment. Exit code 1 if anything was not as promised: other bits, a
checkpoint that was not continued from, a signal that lost a step, a second writer, points in MLflow twice.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from earthprior.tools import synth
from kills import COMMANDS, Bench, Course, Hit, Kill, run

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Beside the training, in all targets.
STAGES, WHOLE = ("stats", "evaluate"), ("repro", "exp run", "exp run --temp")
# By target: its moments, and the commands that take turns.
TARGETS = {
    "trainer": (("step", "save", "judge", "any", "results"), ("pretrain", "repro pretrain")),
    "group": (("step", "save", "judge", "any", "results", "commit"), ("repro pretrain", "repro", *WHOLE[1:])),
    "dvc": (("step", "save", "judge", "any", "results", "commit"), ("repro", "repro pretrain", *WHOLE[1:])),
}
KILLS_IN_A_RUN = 5
# A run is over early where a kill comes late; what is left of its kills goes to further ones.
MOST_RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument(
        "--command", choices=sorted(COMMANDS.keys() - {"stats"}), action="append", help="only this one, or these"
    )
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        bench = Bench(Path(folder) / "bench", chips)
        print(f"undisturbed: {bench.steps} steps, {bench.seconds:.0f} s", flush=True)
        courses = list(soak(bench, plan(asked.kills, asked.seed, asked.command or COMMANDS), asked.seed, asked.jobs))
    hits = [hit for course in courses for hit in course.hits]
    faults = [fault for course in courses for fault in course.faults]
    print_tables(hits)
    seconds = time.monotonic() - began
    print(f"{len(hits)} kills of {len(courses)} runs, seed {asked.seed}, {seconds / 60:.1f} minutes")
    for fault in faults:
        print(f"FAULT {fault}")
    if len(hits) < asked.kills:
        print(f"FAULT only {len(hits)} of {asked.kills} kills could be delivered")
    sys.exit(bool(faults) or len(hits) < asked.kills)


def chips(folder: Path, n: int, size: int, labels: bool) -> None:
    """What tiny_project.make_repository asks for: n chips with labels of land cover."""
    synth.run(folder, n, 0, 1, 1 / 3, size, force=False)


def plan(count: int, seed: int, wanted: Collection[str] = COMMANDS) -> list[Kill]:
    """Every signal, target and moment in turn, each time by the next of the target's commands.

    Args:
        count: How many.
        seed: Of their order.
        wanted: Commands to choose from; what none of them comes to is left out.
    """
    some = {target: [command for command in commands if command in wanted] for target, (_, commands) in TARGETS.items()}
    whole = [command for command in WHOLE if command in wanted]
    rows = [
        (number, target, moment)
        for target in TARGETS
        for moment in (*TARGETS[target][0] * bool(some[target]), *STAGES * bool(whole))
        for number in SIGNALS
    ]
    random.Random(seed).shuffle(rows)
    turns = {target: itertools.cycle(commands) for target, commands in some.items()}
    whole_turns = itertools.cycle(whole)
    return [
        Kill(next(whole_turns if moment in STAGES else turns[target]), number, target, moment)
        for number, target, moment in itertools.islice(itertools.cycle(rows), count)
    ]


def soak(bench: Bench, kills: Sequence[Kill], seed: int, jobs: int) -> Iterator[Course]:
    """Kill runs until every kill has been delivered, or has been left over too often."""
    waiting, number = [*runs(kills)], 0
    left_over: dict[Kill, int] = defaultdict(int)
    with ThreadPoolExecutor(jobs) as pool:
        going: set[Future[Course]] = set()
        while waiting or going:
            while waiting and len(going) < jobs:
                number += 1
                going.add(pool.submit(run, bench, f"run-{number}", waiting.pop(0), random.Random(f"{seed} {number}")))
            done, going = wait(going, return_when=FIRST_COMPLETED)
            for course in (future.result() for future in done):
                for hit in course.hits:
                    print_hit(hit)
                for kill in course.left:
                    left_over[kill] += 1
                again = [kill for kill in course.left if left_over[kill] <= MOST_RUNS * len(kills)]
                waiting += runs(again)
                yield course


def runs(kills: Sequence[Kill]) -> Iterator[list[Kill]]:
    """The kills by command, a few to a run; those come last that hit its end, or that dvc shrugs off."""
    late = ("results", "commit", "evaluate")

    def place(kill: Kill) -> int:
        shrugged_off = (kill.target, kill.signal) == ("dvc", signal.SIGINT)
        return 10 * shrugged_off + (late.index(kill.moment) + 1 if kill.moment in late else -(kill.moment == "stats"))

    for command in dict.fromkeys(kill.command for kill in kills):
        chosen = [kill for kill in kills if kill.command == command]
        for start in range(0, len(chosen), KILLS_IN_A_RUN):
            yield sorted(chosen[start : start + KILLS_IN_A_RUN], key=place)


def print_hit(hit: Hit) -> None:
    name, target, moment = hit.kill.row
    print(
        f"{name:8} {target:8} {moment:8} {hit.kill.command:15} hit {hit.where:24} {hit.then:20} {hit.lost} lost, "
        f"{'identical' if hit.identical else 'FAULT'}",
        flush=True,
    )


def print_tables(hits: Sequence[Hit]) -> None:
    """By signal and target, and by moment: each kill is in both."""
    by_signal: dict[tuple[str, ...], list[Hit]] = defaultdict(list)
    by_moment: dict[tuple[str, ...], list[Hit]] = defaultdict(list)
    for hit in hits:
        name, target, moment = hit.kill.row
        by_signal[name, target].append(hit)
        by_moment[(moment,)].append(hit)
    print_table(("signal", "to"), {**dict(sorted(by_signal.items())), ("all", ""): list(hits)})
    print_table(("moment",), dict(sorted(by_moment.items())))


def print_table(heads: Sequence[str], rows: Mapping[tuple[str, ...], Sequence[Hit]]) -> None:
    outcomes = ("continued", "began, nothing was saved", "training was done", "went on to the end")
    columns = (*heads, "kills", *outcomes, "identical", "mean steps lost", "mean seconds")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for names, found in rows.items():
        came = [str(sum(hit.then == outcome for hit in found)) for outcome in outcomes]
        same = sum(hit.identical for hit in found)
        lost = sum(hit.lost for hit in found) / max(len(found), 1)
        seconds = sum(hit.seconds for hit in found) / max(len(found), 1)
        print(f"| {' | '.join([*names, str(len(found)), *came, str(same), f'{lost:.1f}', f'{seconds:.0f}'])} |")


if __name__ == "__main__":
    main()
