"""What becomes of each key of a tutorial's configuration: our values, and the rows of the table that says so."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from earthprior.params import Params
from earthprior.params.editing import plain
from earthprior.params.plain import shown as bounded
from earthprior.tools import tutorial_keys, tutorial_values
from earthprior.tools.tutorial_keys import ABSENT, Rule

CARRIED = "Carried over"
ACTS = "Carried over and now acts; there it had no effect, or ended in an error"
NEUTRAL = "Had no effect there, and this value has none here"
OFF = "Had no effect there, so it is switched off"
FIXED = "Fixed in the tutorial's code, chosen here"
USELESS = "Of no use to what is chosen"
LEFT = "Not carried over"
DEAD = "Not carried over; it never had an effect"
UNKNOWN = "Unknown, ignored"
GROUPS = (CARRIED, ACTS, NEUTRAL, OFF, FIXED, USELESS, LEFT, DEAD, UNKNOWN)

LONGEST_VALUE = 100
"""Characters of a value in a message."""


@dataclass
class Translation:
    """What becomes of a tutorial's keys.

    Attributes:
        theirs: Their values by dotted key; used up by `translate`.
        before: Our parameters, for what they leave open.
        as_run: Leave off what never had an effect there.
        values: Ours by dotted key.
        origins: Their key and value, by our dotted key.
        rows: Of the table, by group.
        faults: Their values that cannot be read, one line each.
    """

    theirs: dict[str, Any]
    before: Params
    as_run: bool
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[Sequence[str]]] = field(default_factory=lambda: {group: [] for group in GROUPS})
    faults: list[str] = field(default_factory=list)

    def translate(self) -> None:
        """Go through all keys that the tutorial knows, then through those that are left."""
        fixed = {**tutorial_keys.FIXED, **(tutorial_keys.FIXED_AS_RUN if self.as_run else {})}
        self.values |= {key: value for key, (value, _) in fixed.items()}
        for rule in tutorial_keys.PLAIN_RULES:
            self._apply(rule)
        ours = [self.values.get(f"normalization.{key}") for key in ("normal_strategy", "stat_procedure")]
        self._apply(tutorial_keys.clip_rule(*ours))
        named_bands = tutorial_values.named_bands(self.before.data.bands)
        note = "only the number is given there; name the bands in the files' order"
        self._apply(Rule("channels", "data.bands", named_bands, note=note))
        self._optimizer()
        self._schedule()
        loss_fn = str(self.values.get("loss_fn", self.before.loss_fn))
        self._options(tutorial_keys.LOSS_OPTIONS, [loss_fn], f"loss_fn {loss_fn}", "loss_weights")
        timesteps = self.values.get("diffusion.timesteps", 0)
        if 1 < timesteps < self.before.evaluate.steps:
            fixed["evaluate.steps"] = timesteps, "as many as there are timesteps, which is what it takes"
        for key, (value, note) in fixed.items():
            self.values.setdefault(key, value)
            if key not in self.origins:
                self.rows[FIXED].append(("", "", key, plain(value), note))
        for key, value in self.theirs.items():
            near = difflib.get_close_matches(key, tutorial_keys.KEYS, n=1, cutoff=0.75)
            note = f"there read by nothing, too; was {near[0]} meant?" if near else "there read by nothing, too"
            self.rows[UNKNOWN].append((key, _short(plain(value)), "", "", note))

    def _apply(self, rule: Rule) -> Any:
        """Take their value by a rule; returns ours, or ABSENT."""
        given = self.theirs.pop(rule.theirs, ABSENT)
        shown = "(absent)" if given is ABSENT else _short(plain(given))
        # What nothing reads may be null as well as missing.
        value = rule.default if given is ABSENT or (given is None and not rule.acted) else given
        if given is ABSENT and value is ABSENT:
            return ABSENT
        if rule.here is None or value is ABSENT:
            self.rows[LEFT if rule.acted else DEAD].append((rule.theirs, shown, "", "", rule.note))
            return ABSENT
        off = self.as_run and not rule.acted and rule.off is not ABSENT
        try:
            ours = rule.convert(value)
        except ValueError as error:
            if not off:
                self.faults.append(f"  {rule.theirs}: {bounded(value)} is not allowed; {error}")
                return ABSENT
            ours = ABSENT
        group = CARRIED if rule.acted else NEUTRAL if ours == rule.off else OFF if off else ACTS
        ours = rule.off if off else ours
        self.values[rule.here] = ours
        self.origins[rule.here] = f"{rule.theirs}: {shown}"
        self.rows[group].append((rule.theirs, shown, rule.here, plain(ours), rule.note))
        return ours

    def _leave(self, key: str, note: str, group: str = USELESS) -> None:
        """A key of theirs, if it is there, that has no place here."""
        given = self.theirs.pop(key, ABSENT)
        if given is not ABSENT:
            self.rows[group].append((key, _short(plain(given)), "", "", note))

    def _peek(self, key: str, convert: tutorial_values.Convert, default: Any) -> Any:
        """Their value without using it up; where it cannot be read, which its rule will say, the default."""
        try:
            return convert(self.theirs.get(key, default))
        except ValueError:
            return default

    def _optimizer(self) -> None:
        given = str(self.theirs.get("optimizer", "adam")).lower()
        runs = given not in ("sam", "radam", "adabelief")
        note = "" if runs else "there it ends in an error"
        chosen = self._apply(Rule("optimizer", "optimizer", tutorial_values.optimizer, runs, note, "adam"))
        names = [str(chosen)]
        if chosen == "sam":
            names.append(str(self.theirs.get("base_optimizer", "sgd")).lower())
        if "eps" in self.theirs and self._peek("scheduler", tutorial_values.lr_schedule, "none") == "plateau":
            note = "there also the least change that plateau makes; here it makes any"
            self.rows[LEFT].append(("eps", plain(self.theirs["eps"]), "", "", note))
        self._options(tutorial_keys.OPTIMIZER_OPTIONS, names, f"optimizer {' over '.join(names)}")

    def _schedule(self) -> None:
        name = self._peek("scheduler", tutorial_values.lr_schedule, "none")
        epochs = int(self.values.get("epochs", self.before.epochs))
        if name == "onecycle":
            self._one_cycle_rate()
        else:
            self._rate(name, epochs)
        runs = self.theirs.get("scheduler", "none") != ""
        note = tutorial_keys.SCHEDULE_NOTES.get(name, "") if runs else "as its README says; there it ends in an error"
        convert: tutorial_values.Convert = tutorial_values.lr_schedule
        chosen = [name]
        if self._never_falls(name, epochs):
            note = f"{name} falls for the first time after the run's {epochs} epochs, or in warm-up only: it never does"
            convert, chosen = (lambda _: "none"), []
            for rule, owners in tutorial_keys.SCHEDULE_OPTIONS:
                if name in owners:
                    self._leave(rule.theirs, "the rate never falls, see scheduler")
        self._apply(Rule("scheduler", "lr_schedule", convert, runs, note, "none"))
        self._options(tutorial_keys.SCHEDULE_OPTIONS, chosen, f"scheduler {name}")

    def _rate(self, name: str, epochs: int) -> None:
        self._apply(Rule("learning_rate_init", "lr", tutorial_values.number, default=1e-3))
        self._leave("max_lr", f"not read by scheduler {name}")
        note, longest = "there from a tenth of the rate, per epoch", max(epochs - 1, 0)
        if self._peek("warmup_period", tutorial_values.integer, 0) > longest:
            note += f"; shortened, for it fills all {epochs} epochs"
        self._apply(
            Rule(
                "warmup_period", "warmup_epochs", lambda value: min(tutorial_values.integer(value), longest),
                note=note, default=0,
            )
        )  # fmt: skip

    def _one_cycle_rate(self) -> None:
        """The cycle's peak is `max_lr`; there warm-up, to `learning_rate_init`, is written over its beginning."""
        note = "the cycle's peak, as its code takes it"
        self._apply(Rule("max_lr", "lr", tutorial_values.number, note=note, default=1e-3))
        if self._peek("warmup_period", tutorial_values.number, 0) > 0:
            self._leave("learning_rate_init", "there warm-up ends with it; the cycle's peak is max_lr", LEFT)
            self._leave(
                "warmup_period", "there written over the cycle's beginning; here the cycle has its own rise", LEFT
            )
        else:
            self._leave("learning_rate_init", "not read by scheduler onecycle, whose peak is max_lr")
            self._leave("warmup_period", "scheduler onecycle has a rise of its own")

    def _never_falls(self, name: str, epochs: int) -> bool:
        """Whether the run is over before a schedule that falls at given epochs does so for the first time."""
        warmup = int(self.values.get("warmup_epochs", 0))
        if name == "step":
            size: int = self._peek("step_size", tutorial_values.integer, 30)
            return size > 0 and (warmup // size + 1) * size >= epochs
        if name == "multistep":
            falls = self._peek("milestones", tutorial_values.milestones, [30, 60, 90])
            return not any(warmup < epoch < epochs for epoch in falls)
        return False

    def _options(
        self, options: Sequence[tutorial_keys.Option], chosen: Sequence[str], chooser: str, section: str | None = None
    ) -> None:
        """Options go to the section of what was chosen; those of another choice are left."""
        for rule, owners in options:
            found = [name for name in chosen if name in owners]
            if found:
                self._apply(replace(rule, here=rule.here and f"{section or found[0]}.{rule.here}"))
        for rule, _ in options:
            self._leave(rule.theirs, f"not read by {chooser}")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
