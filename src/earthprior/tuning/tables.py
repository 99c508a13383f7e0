"""A study's trials and dials as tables: trials.csv, and those of its page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pandas as pd
from optuna.trial import FrozenTrial

from earthprior.figures.trials import Dial, Trial, shortened
from earthprior.params.editing import plain
from earthprior.report import Table
from earthprior.tuning.findings import Findings, seconds_of

TOP = 10
_REASONS, _NUMBERS_NAMED, _LONGEST = 20, 10, 300
_ATTRIBUTES = ("reason", "best_epoch", "continues", "same_as", "mlflow_run_id", "fingerprint")


def value_text(value: float | None, metric: str) -> str:
    """An objective's value; a gain with its sign."""
    if value is None:
        return "-"
    return f"{value:+.3f}" if metric.startswith("gain") else f"{value:.4f}"


def setting_text(value: object) -> str:
    """A setting for the eye, numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def trials_table(found: Findings) -> pd.DataFrame:
    """One row a trial, the content of trials.csv.

    Columns: number, state; one per objective, named like `gain_db` for "gain, dB"; the settings under their dotted
    keys, as params.yaml spells them; epochs and the last value reported; seconds, start and end (local time, as Optuna
    keeps it); the user attributes; the gain at each noise level as `gain_db/rho_0.5`.
    """
    names = [re.sub(r"\W+", "_", metric).strip("_").lower() for metric in found.metrics]
    keys = [dial.name for dial in found.dials]
    rows = []
    for raw, trial in zip(found.frozen, found.trials, strict=True):
        said = raw.user_attrs
        row: dict[str, object] = {"number": trial.number, "state": trial.state}
        row |= {name: trial.values[place] if trial.values else None for place, name in enumerate(names)}
        row |= {key: trial.params.get(key) for key in keys}
        row |= {"epochs": len(trial.curve) or None, "last_value": _last(trial), "seconds": seconds_of(raw)}
        row |= {"started": raw.datetime_start, "ended": raw.datetime_complete}
        row |= {name: said.get(name) for name in _ATTRIBUTES}
        row |= {f"gain_db/{level}": gain for level, gain in _levels(raw).items()}
        rows.append(row)
    return _whole(pd.DataFrame(rows, columns=None if rows else ["number", "state", *names]))


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its counts as whole numbers also where some are missing."""
    counts = [name for name in ("epochs", "best_epoch", "continues", "same_as") if name in table]
    return table.astype(dict.fromkeys(counts, "Int64"))


def _last(trial: Trial) -> float | None:
    return trial.curve[max(trial.curve)] if trial.curve else None


def _levels(raw: FrozenTrial) -> Mapping[str, float]:
    found = raw.user_attrs.get("gain_db")
    return found if isinstance(found, dict) else {}


def ranked_table(found: Findings, ranked: Sequence[Trial], caption: str) -> Table:
    """Trials in their order, with values and settings."""
    by_number = {raw.number: raw for raw in found.frozen}
    rows = []
    for trial in ranked:
        raw = by_number[trial.number]
        values = [value_text(value, metric) for value, metric in zip(trial.values, found.metrics, strict=True)]
        settings = [setting_text(trial.params[d.name]) if d.name in trial.params else "-" for d in found.dials]
        epoch, seconds = raw.user_attrs.get("best_epoch", "-"), seconds_of(raw)
        ran = "-" if seconds is None else f"{seconds:,.0f}"
        rows.append([str(trial.number), *values, *(shortened(text, 28) for text in settings), str(epoch), ran])
    columns = ["trial", *found.metrics, *(dial.name for dial in found.dials), "best epoch", "seconds"]
    return Table(columns, rows, caption)


def dials_table(found: Findings) -> Table:
    """Per dial: what was searched, its shares, the best trial's value, and where the good trials are."""
    several, best = len(found.metrics) > 1, found.best[0]
    columns = ["parameter", "searched", *(f"share, {name}" if several else "share" for name in found.shares)]
    columns += [f"trial {best.number}"] * (not several)
    columns += ["the front" if several else f"best {len(found.good)} trials"] * bool(found.good)
    rows = []
    for dial in found.dials:
        row = [dial.name, _searched(dial)]
        row += [f"{share[dial.name]:.0%}" if dial.name in share else "-" for share in found.shares.values()]
        row += [shortened(setting_text(best.params.get(dial.name, "not set")), 40)] * (not several)
        rows.append([*row, *([_where(dial, found.good)] if found.good else [])])
    return Table(columns, rows, words=True)


def _searched(dial: Dial) -> str:
    if dial.choices:
        return ", ".join(shortened(choice, 40) for choice in dial.choices)
    return f"{dial.low:g} to {dial.high:g}" + (", log" if dial.log else "")


def _where(dial: Dial, good: Sequence[Trial]) -> str:
    """The range of a number over some trials; of choices, how many trials took each."""
    values = [trial.params[dial.name] for trial in good if dial.name in trial.params]
    if not values:
        return "not set"
    if not dial.choices:
        return f"{min(values):.4g} to {max(values):.4g}"
    counts = {choice: values.count(choice) for choice in dial.choices if choice in values}
    most = sorted(counts, key=lambda choice: -counts[choice])
    return ", ".join(f"{shortened(choice, 40)} ({counts[choice]})" for choice in most)


def reasons_table(found: Findings) -> Table:
    """Why trials were pruned, failed or broke off; reasons that differ in numbers only share a row."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for raw, trial in zip(found.frozen, found.trials, strict=True):
        if trial.state in ("pruned", "failed", "continued"):
            reason = str(raw.user_attrs.get("reason") or "no reason recorded")
            alike = re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", reason)
            groups.setdefault((trial.state, alike), []).append((trial.number, reason))
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))
    rows = []
    for (state, _), group in largest[:_REASONS]:
        rows.append([str(len(group)), state, shortened(group[0][1], _LONGEST), _numbers([n for n, _ in group])])
    unseen = f"; {len(largest) - _REASONS} rarer reasons are in trials.csv" if len(largest) > _REASONS else ""
    note = "Why trials ended early; where reasons differ in numbers only, the first one's words stand for all"
    return Table(["trials", "state", "reason", "which"], rows, note + unseen, words=True)


def _numbers(numbers: Sequence[int]) -> str:
    text = ", ".join(str(number) for number in numbers[:_NUMBERS_NAMED])
    return text + (f" and {len(numbers) - _NUMBERS_NAMED} more" if len(numbers) > _NUMBERS_NAMED else "")
