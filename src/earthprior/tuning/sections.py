"""The sections of a study's page: what is said about it, and under which pictures and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from earthprior.figures.study_space import MOST_SIDE_BY_SIDE
from earthprior.figures.trials import STATES, Trial, unit_apart
from earthprior.params.editing import plain
from earthprior.report import Picture, Section, Table, count
from earthprior.tuning.findings import ENOUGH_TRIALS, Findings
from earthprior.tuning.tables import dials_table, ranked_table, reasons_table, value_text

TOP = 10
_EDGE = 0.03
"""A best value nearer than this to an end of what was searched, in parts of its width, may lie beyond it."""


def verdict(found: Findings) -> str:
    """The study's result in plain words."""
    going = [f"{found.count(state)} {state}" for state in ("running", "waiting") if found.count(state)]
    open_ = f" The study is not over: {', '.join(going)}." if going else ""
    if not found.best:
        ended = ", ".join(f"{found.count(state)} {state}" for state in ("pruned", "failed") if found.count(state))
        return f"No trial has finished{': ' if ended else ''}{ended}.{open_}"
    if len(found.metrics) > 1:
        ends = [found.best[0], *found.best[1:][-1:]]
        text = f"Of {len(found.finished)} finished trials {len(found.best)} are beaten by no other in both objectives"
        return f"{text}: {'; '.join(f'trial {t.number} has {_values(found, t)}' for t in ends)}.{open_}"
    best = found.best[0]
    text = f"Trial {best.number} is the best of {count(len(found.finished), 'finished trial')}: {_values(found, best)}"
    text += _beside_own(found, best)
    return text + (". No trial beats the linear filter, which is 0 dB." if below(found) else ".") + open_


def _beside_own(found: Findings, best: Trial) -> str:
    """What params.yaml's own values reached, with which a search begins."""
    own = {raw.number for raw in found.frozen if raw.user_attrs.get("own")}
    mine = next((trial for trial in found.finished if trial.number in own), None)
    if mine is None:
        return ""
    if mine.number == best.number:
        return "; these are params.yaml's own values, and no other trial was better"
    return f"; params.yaml's own values reached {_values(found, mine)} (trial {mine.number})"


def below(found: Findings) -> bool:
    """Whether even the best gain is below the linear filter's."""
    return bool(found.best) and found.metrics[0].startswith("gain") and found.best[0].values[0] <= 0


def counted(found: Findings, but: str = "") -> str:
    """How many trials are in each state, leaving one out."""
    return ", ".join(f"{found.count(state)} {state}" for state in STATES if found.count(state) and state != but)


def best(found: Findings, commands: Mapping[int, str]) -> list[Section]:
    """The best trial, or the front, with the lines that repeat them."""
    if not found.best:
        return []
    lines = [commands[trial.number] for trial in found.best if trial.number in commands]
    told = ["This line repeats it as a DVC experiment:"] if len(lines) == 1 else []
    if len(found.metrics) > 1:
        text = "No other trial beats one of these in both objectives. They are in the order of the first."
        told = ["These lines repeat them as DVC experiments, in the order of the table:"] if len(lines) > 1 else told
        return [Section("The front", [text, *told], tables=[ranked_table(found, found.best, "")], commands=lines)]
    trial = found.best[0]
    said = found.attributes(trial)
    text = f"Trial {trial.number}: {_values(found, trial)}."
    text += f" Its best epoch was {said['best_epoch']}." if "best_epoch" in said else ""
    text += f" In MLflow it is run {said['mlflow_run_id']}." if said.get("mlflow_run_id") else ""
    settings = {**trial.params, **(said.get("settings") or {})}
    rows = [[key, plain(value), "searched" if key in trial.params else ""] for key, value in settings.items()]
    shown = [Table(["parameter", "value", ""], rows, "What it has otherwise than params.yaml", words=True)]
    if levels := said.get("gain_db"):
        gains = [f"{gain:+.2f}" for gain in levels.values()]
        names = [name.replace("rho_", "rho ") for name in levels]
        shown.append(Table(["noise level", *names], [["gain, dB", *gains]]))
    return [Section("The best trial", [text, *told], tables=shown if settings else shown[1:], commands=lines)]


def course(found: Findings, paths: Mapping[str, Path]) -> list[Section]:
    """How the search went."""
    captions = {
        "history": "Each trial's value, in the order of their numbers; a pruned trial stands at the last value that it "
        "reported. A triangle is so far below the others that its value is not to scale.",
        "front": "Up and to the right is better. Numbers are trials.",
        "curves": "Validation after each epoch; what is far below the others begins below the picture.",
    }
    shown = _pictures(paths, captions)
    return [Section("The course of the search", pictures=shown)] if shown else []


def mattered(found: Findings, paths: Mapping[str, Path]) -> list[Section]:
    """Which parameters made a difference, and where the good values are."""
    if not found.dials:
        return []
    captions = {"importances": ""}
    for place, metric in enumerate(found.metrics):
        captions[f"slices_{place + 1}"] = (
            f"The {unit_apart(metric)[0]} over each parameter. Darker is later; a cross was pruned; a bar is the "
            "median of the finished trials with that choice. A parameter that acts only beside others shows the trials "
            "that had it."
        )
    captions["parallel"] = (
        "A line is a trial, through its settings to its value: the darker the better, black is the best "
        f"{unit_apart(found.metrics[0])[0]}, grey was pruned."
    )
    if len(found.dials) > MOST_SIDE_BY_SIDE:
        captions["parallel"] += f" {MOST_SIDE_BY_SIDE} of {len(found.dials)} parameters; trials.csv has all."
    text = [_shares_told(found), *_at_the_edge(found)]
    return [Section("What mattered", text, _pictures(paths, captions), [dials_table(found)] if found.best else [])]


def trials(found: Findings) -> list[Section]:
    """The best trials, and why others ended early."""
    shown = []
    if found.finished:
        some = f"The best {TOP} of {len(found.finished)} finished trials; trials.csv has all"
        caption = some if len(found.finished) > TOP else "The finished trials, best first"
        shown.append(ranked_table(found, found.finished[:TOP], caption))
    reasons = reasons_table(found)
    shown += [reasons] if reasons.rows else []
    return [Section("Trials", tables=shown)] if shown else []


def _values(found: Findings, trial: Trial) -> str:
    pairs = zip(trial.values, found.metrics, strict=True)
    told = [(*unit_apart(metric), value_text(value, metric)) for value, metric in pairs]
    return " and ".join(f"{name} {value} {unit}".strip() for name, unit, value in told)


def _shares_told(found: Findings) -> str:
    """The importances in words, with what they rest on; or why there are none."""
    judged = [trial for trial in found.trials if trial.reached() is not None]
    pruned = sum(trial.state == "pruned" for trial in judged)
    rest = f"{count(len(judged) - pruned, 'finished trial')}" + (f" and {pruned} pruned" if pruned else "")
    if len(found.dials) == 1:
        return f"Only one parameter was searched, {found.dials[0].name}, so there are no shares to compare."
    if len(judged) < ENOUGH_TRIALS:
        why = f"with fewer than {ENOUGH_TRIALS} the answer is too often wrong"
        return f"Which parameter mattered most is not told from {rest}: {why}."
    if not found.shares:
        return "Fewer than two parameters took several values in all trials, so there are no shares to compare."
    text = ""
    for metric, shares in found.shares.items():
        (first, most), (second, less) = list(shares.items())[:2]
        text += f"{first} made the greatest difference to the {unit_apart(metric)[0]}: {most:.0%} of the spread "
        text += f"between trials; next is {second} with {less:.0%}. "
    text += f"This rests on {rest} (a random forest fitted to them"
    text += "; a pruned one counts with what it would have come to, had it gone on as the others did" * (pruned > 0)
    text += "). In synthetic studies where one parameter mattered twice as much as the next, it was named first about "
    text += "four times in five; the order behind it often is not right, and a share below 15% may be chance."
    left = [dial.name for dial in found.dials if dial.name not in next(iter(found.shares.values()))]
    return text + (
        f" Without a share, since not all trials had it or it never changed: {', '.join(left)}." * bool(left)
    )


def _at_the_edge(found: Findings) -> list[str]:
    """A hint to search further where the best trial stands at an end of what was searched."""
    ends = []
    for dial in found.dials if found.best and len(found.metrics) == 1 else ():
        value = found.best[0].params.get(dial.name)
        if value is not None and not dial.choices and dial.high > dial.low:
            low, high = dial.place(dial.low), dial.place(dial.high)
            part = (dial.place(value) - low) / (high - low)
            if min(part, 1 - part) < _EDGE:
                ends.append(f"{dial.name} = {value:.4g}, searched from {dial.low:g} to {dial.high:g}")
    told = "The best trial is at an end of what was searched, so better may lie beyond, where the key allows it: "
    return [f"{told}{'; '.join(ends)}."] if ends else []


def _pictures(paths: Mapping[str, Path], captions: Mapping[str, str]) -> list[Picture]:
    return [Picture(paths[name], name, caption) for name, caption in captions.items() if name in paths]
