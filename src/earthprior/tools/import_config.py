"""`earthprior import-config ssl_train.yaml`: a tutorial's configuration as a params.yaml, and what became of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from earthprior import params
from earthprior.errors import ParamsError
from earthprior.params.editing import overlay, plain, write
from earthprior.tools import tutorial_keys
from earthprior.tools.tutorial_keys import ABSENT, Rule

BLOCK = "Train_Validate"
HEAD = ("theirs", "value", "here", "value", "note")
CARRIED = "Carried over"
ACTS = "Carried over and now acts; there it had no effect"
OFF = "Had no effect there, so it is switched off"
FIXED = "Fixed in the tutorial's code, chosen here"
LEFT = "Not carried over"
DEAD = "Not carried over; it never had an effect"
UNKNOWN = "Unknown, ignored"
GROUPS = (CARRIED, ACTS, OFF, FIXED, LEFT, DEAD, UNKNOWN)


def run(config: Path, root: Path, out: Path | None = None, as_run: bool = False) -> None:
    """Lay a tutorial's configuration over params.yaml and print what became of each key.

    Nothing is written unless the result is a valid params.yaml.

    Args:
        config: The tutorial's ssl_train.yaml.
        root: The project's root, with params.yaml.
        out: Where to write; None means params.yaml itself.
        as_run: Leave off what never had an effect there, so that training does what the tutorial's code did.

    Raises:
        ParamsError: The file cannot be read, has values that are not what their key needs, or the result is not valid.
    """
    if not config.is_file():
        raise ParamsError(f"{config.name} does not exist; give the path of the tutorial's ssl_train.yaml")
    content = params.read_mapping(config)
    block = content.get(BLOCK, content)
    if not isinstance(block, Mapping):
        raise ParamsError(f"{config.name}: {BLOCK} is not a block of keys; see the tutorial's configs/ssl_train.yaml")
    bands = params.load(root / "params.yaml").data.bands
    translation = _Translation(dict(_leaves(block)), as_run)
    translation.translate(bands)
    if translation.faults:
        raise ParamsError("\n".join([f"{config.name} has {len(translation.faults)} fault(s):", *translation.faults]))
    text, changes = _overlay(root / "params.yaml", translation, config.name)
    target = root / "params.yaml" if out is None else out
    write(text, target)
    print(_table(translation.rows))
    print(f"\n{config.name} changed {len(changes)} of {len(translation.values)} values, written to {target.name}")


@dataclass
class _Translation:
    """What becomes of a tutorial's keys.

    Attributes:
        theirs: Their values by dotted key.
        as_run: Leave off what never had an effect there.
        values: Ours by dotted key.
        origins: Their key and value, by our dotted key.
        rows: Of the table, by group.
        faults: Their values that cannot be read, one line each.
    """

    theirs: dict[str, Any]
    as_run: bool
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[Sequence[str]]] = field(default_factory=lambda: {group: [] for group in GROUPS})
    faults: list[str] = field(default_factory=list)

    def translate(self, bands: Sequence[str]) -> None:
        """Go through all keys that the tutorial knows, then through those that are left."""
        fixed = {**tutorial_keys.FIXED, **(tutorial_keys.FIXED_AS_RUN if self.as_run else {})}
        self.values |= {key: value for key, (value, _) in fixed.items()}
        for rule in tutorial_keys.PLAIN_RULES:
            self._apply(rule)
        ours = [self.values.get(f"normalization.{key}") for key in ("normal_strategy", "stat_procedure")]
        self._apply(tutorial_keys.clip_rule(*ours))
        self._bands(bands)
        self._optimizer()
        self._schedule()
        self._options(tutorial_keys.LOSS_OPTIONS, [str(self.values.get("loss_fn"))], "loss_fn")
        for key, (value, note) in fixed.items():
            if key not in self.origins:
                self.rows[FIXED].append(("", "", key, plain(value), note))
        for key, value in self.theirs.items():
            near = difflib.get_close_matches(key, tutorial_keys.KEYS, n=1, cutoff=0.75)
            note = f"there read by nothing, too; was {near[0]} meant?" if near else "there read by nothing, too"
            self.rows[UNKNOWN].append((key, plain(value), "", "", note))

    def _apply(self, rule: Rule) -> Any:
        """Take their value by a rule; returns ours, or ABSENT."""
        given = self.theirs.pop(rule.theirs, ABSENT)
        value = rule.default if given is ABSENT else given
        if value is ABSENT:
            return ABSENT
        shown = "(absent)" if given is ABSENT else plain(given)
        if rule.here is None:
            self.rows[LEFT if rule.acted else DEAD].append((rule.theirs, shown, "", "", rule.note))
            return ABSENT
        try:
            ours = rule.convert(value)
        except ValueError as error:
            self.faults.append(f"  {rule.theirs}: {value!r} is not allowed; {error}")
            return ABSENT
        group = CARRIED if rule.acted else ACTS
        if self.as_run and not rule.acted and rule.off is not ABSENT:
            group, ours = OFF, rule.off
        elif rule.off is not ABSENT and ours == rule.off:
            group = CARRIED
        self.values[rule.here] = ours
        self.origins[rule.here] = f"{rule.theirs}: {shown}"
        self.rows[group].append((rule.theirs, shown, rule.here, plain(ours), rule.note))
        return ours

    def _bands(self, names: Sequence[str]) -> None:
        """Names for so many channels: those that params.yaml has, where the number fits."""

        def named(value: Any) -> list[str]:
            count = tutorial_keys.integer(value)
            if count == len(names):
                return list(names)
            return ["red", "green", "blue", "nir"] if count == 4 else [f"band_{n}" for n in range(1, count + 1)]

        note = "only the number is given there; name the bands in the files' order"
        self._apply(Rule("channels", "data.bands", named, note=note))

    def _optimizer(self) -> None:
        given = str(self.theirs.get("optimizer", "adam")).lower()
        runs = given not in ("sam", "radam", "adabelief")
        note = "" if runs else "there it ends in an error"
        chosen = self._apply(Rule("optimizer", "optimizer", tutorial_keys.optimizer, runs, note, "adam"))
        names = [str(chosen)]
        if chosen == "sam":
            names.append(str(self.theirs.get("base_optimizer", "sgd")).lower())
        self._options(tutorial_keys.OPTIMIZER_OPTIONS, names, "optimizer")

    def _schedule(self) -> None:
        runs = self.theirs.get("scheduler", "none") not in ("", None)
        note = "per step; there per epoch" if runs else "as its README says; there it ends in an error"
        chosen = self._apply(Rule("scheduler", "lr_schedule", tutorial_keys.lr_schedule, runs, note, "none"))
        self._apply(Rule("learning_rate_init", "lr", tutorial_keys.number, default=1e-3))
        if chosen == "onecycle":
            self._apply(Rule("max_lr", "lr", tutorial_keys.number, note="the cycle's peak, as its code takes it"))
        self._options(tutorial_keys.SCHEDULE_OPTIONS, [str(chosen)], "scheduler")

    def _options(self, options: Sequence[tuple[Rule, tuple[str, ...]]], chosen: Sequence[str], selector: str) -> None:
        """Options go to the section of what was chosen; those of another choice are left."""
        for rule, owners in options:
            found = [name for name in chosen if name in owners]
            if found:
                section = "loss_weights" if selector == "loss_fn" else found[0]
                here = f"{section}.{rule.here}"
                self._apply(replace(rule, here=here))
        for rule, _ in options:
            # What is left was of another choice than this one.
            note = f"of no use to {selector} {' over '.join(chosen)}"
            self._apply(Rule(rule.theirs, None, tutorial_keys.anything, False, note))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _overlay(path: Path, translation: _Translation, name: str) -> tuple[str, list[str]]:
    """As `overlay`; a fault in one of our keys also says which of theirs it came from."""
    try:
        return overlay(path, translation.values, f"params.yaml with {name}")
    except ParamsError as error:
        lines = []
        for line in str(error).splitlines():
            origin = translation.origins.get(line.strip().split(":")[0])
            lines.append(f"{line} (from {origin})" if origin else line)
        raise ParamsError("\n".join(lines)) from None


def _table(rows: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Columns in line over all groups, each group under its name."""
    everything = [HEAD, *(row for group in rows.values() for row in group)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(HEAD) - 1)]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        return "  ".join([*cells, row[-1]]).rstrip()

    lines = [line(HEAD)]
    for group, found in rows.items():
        if found:
            lines += ["", group, *(line(row) for row in found)]
    return "\n".join(lines)
