"""A study: where it is kept, who works on it, and which of its trials were left by a process that died."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from earthprior.errors import EarthPriorError
from earthprior.identity import main_root
from earthprior.params import TuneParams
from earthprior.tracking_store import reason, redacted
from earthprior.tuning.presence import PATIENCE_SECONDS, Presence, at_work, here, own_name
from earthprior.tuning.sampling import AddressedSampler, pruner
from earthprior.tuning.space import differences

HEARTBEAT_SECONDS = 60
ATTEMPTS = 5
"""How often a trial's process may die without an epoch gained: one that kills it each time must not do so for ever."""

DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Place:
    """Where a study is kept.

    Attributes:
        name: Of the study.
        folder: For the state of its trials and its report, under the main checkout.
        storage: An Optuna storage URL, or the path of a journal file.
    """

    name: str
    folder: Path
    storage: str

    @classmethod
    def of(cls, root: Path, tune: TuneParams, name: str) -> Place:
        """Of the study of this name in this project; relative paths are the main checkout's."""
        home = main_root(root)
        folder = home / "work/tune" / name
        storage = tune.storage or str(folder / "journal.log")
        if database := re.fullmatch(r"sqlite:///(?!:memory:)(.+)", storage):
            storage = f"sqlite:///{home / database[1]}"
        elif "://" not in storage:
            storage = str(home / storage)
        return cls(name, folder, storage)

    @property
    def journal(self) -> Path | None:
        """The journal file, where there is no database."""
        return None if "://" in self.storage else Path(self.storage)

    @property
    def workers(self) -> Path | None:
        """Where the processes that work on a journal's study say so."""
        return None if self.journal is None else self.journal.with_name(f"{self.journal.name}.workers")

    @property
    def shown(self) -> str:
        """The storage as `optuna-dashboard` takes it, without secrets."""
        return redacted(self.storage)

    def shown_from(self, home: Path) -> str:
        """`shown`, a path in this checkout without what is before it."""
        return self.shown.replace(f"{home}/", "")

    def lock(self) -> FileLock:
        """Held while a trial is asked for, so that no more are begun than wanted."""
        return FileLock(self.folder / "lock")


@dataclass(frozen=True)
class Count:
    """How far a study is."""

    done: int
    running: int
    failed: int


def open_study(
    place: Place, tune: TuneParams, common: Mapping[str, Any], epochs: int, own: Mapping[str, Any] | None = None
) -> optuna.Study:
    """Create the study, or go on with it.

    Args:
        place: Where it is kept.
        tune: The section.
        common: What its trials share, see `space.shared`.
        epochs: Of a trial.
        own: What a new study tries first, see `space.own_values`.

    Raises:
        EarthPriorError: The storage cannot be opened, or holds a study of this name whose trials share something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place.folder.mkdir(parents=True, exist_ok=True)
    directions = [optuna.study.StudyDirection.MAXIMIZE] * (2 if tune.metric == "both" else 1)
    try:
        with place.lock(), _first_contact(place):
            study = optuna.create_study(
                storage=_storage(place),
                study_name=place.name,
                sampler=AddressedSampler(tune),
                pruner=pruner(tune, epochs),
                directions=directions,
                load_if_exists=True,
            )
            if "base" not in study.user_attrs:
                names = {"gain": ["gain, dB"], "probe": ["probe"], "both": ["gain, dB", "probe"]}[tune.metric]
                study.set_user_attr("metrics", names)
                with warnings.catch_warnings():
                    # Shown by optuna-dashboard; the call may yet change.
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    study.set_metric_names(names)
                if own:
                    study.enqueue_trial(dict(own), user_attrs={"own": True})
                study.set_user_attr("base", dict(common))
    except EarthPriorError:
        raise
    except Exception as error:  # noqa: BLE001 (drivers of databases raise what they like)
        raise EarthPriorError(f"tune.storage {place.shown} cannot be used: {reason(error)}") from None
    if changed := differences(study.user_attrs["base"], common):
        listed = "\n".join(f"  {line}" for line in changed)
        raise EarthPriorError(
            f"study {place.name} was made with other settings, so its trials and new ones would not compare:\n{listed}"
            "\nRestore them, or name a new study in tune.study (null makes a name of what is searched)"
        )
    return study


def load_study(place: Place) -> optuna.Study:
    """The study, to be looked at.

    Raises:
        EarthPriorError: There is none.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    missing = f"there is no study {place.name} in {place.shown}; make it with: earthprior tune"
    if place.journal is not None and not place.journal.is_file():
        raise EarthPriorError(missing)
    try:
        with _first_contact(place):
            return optuna.load_study(storage=_storage(place), study_name=place.name)
    except KeyError:
        raise EarthPriorError(missing) from None
    except Exception as error:  # noqa: BLE001 (drivers of databases raise what they like)
        raise EarthPriorError(f"tune.storage {place.shown} cannot be used: {reason(error)}") from None


def count(study: optuna.Study) -> Count:
    """Trials done, running and failed; one that another goes on from has not failed."""
    trials = study.get_trials(deepcopy=False)
    continued = {trial.user_attrs.get("continues") for trial in trials}
    failed = [trial for trial in trials if trial.state == TrialState.FAIL and trial.number not in continued]
    return Count(
        done=sum(trial.state in DONE for trial in trials),
        running=sum(trial.state == TrialState.RUNNING for trial in trials),
        failed=len(failed),
    )


def resubmit(study: optuna.Study, trial: FrozenTrial, died: bool = True) -> None:
    """Put a trial's settings into the queue, to go on from its state; once, and not for ever, see ATTEMPTS."""
    if any(other.user_attrs.get("continues") == trial.number for other in study.get_trials(deepcopy=False)):
        return
    attributes, epochs = trial.user_attrs, int(trial.user_attrs.get("epoch", 0))
    # Asked to stop, or further than the attempt before it: no sign of a trial that kills its process.
    counts = died and epochs <= attributes.get("epochs_before", 0)
    attempt = int(attributes.get("attempt", 1)) + counts
    if attempt > ATTEMPTS:
        return
    carried: dict[str, Any] = {key: attributes[key] for key in ("settings", "own") if key in attributes}
    follower = optuna.trial.create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={
            "continues": trial.number,
            "folder": trial.user_attrs.get("folder", folder_name(trial.number)),
            "attempt": attempt,
            "epochs_before": epochs,
            **carried,
        },
        system_attrs={key: value for key, value in trial.system_attrs.items() if key == "fixed_params"},
    )
    study.add_trial(follower)


def folder_name(number: int) -> str:
    """Of a trial's state; one that goes on from another has that one's."""
    return f"trial-{number:03d}"


def take_up_stale(place: Place, study: optuna.Study) -> list[int]:
    """Queue the trials again whose process has died; their numbers.

    For a journal, processes elsewhere are judged by their presence; for a database, by its own heartbeat.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    taken = [trial for trial in running if _abandoned(trial, place.workers)]
    for trial in taken:
        # In this order: killed in between, the follower is there, and no second one is made.
        resubmit(study, trial)
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    if place.workers is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        left = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        taken += [trial for trial in running if trial.number not in {t.number for t in [*left, *taken]}]
    return [trial.number for trial in taken]


def _abandoned(trial: FrozenTrial, workers: Path | None) -> bool:
    worker = trial.user_attrs.get("worker")
    if worker is not None:
        # Without a folder of presences it is the database's heartbeat that tells of processes elsewhere.
        return not at_work(workers or Path(), worker) if workers is not None or here(worker) else False
    # Its process has not come to say who it is: it was killed there, or will say so in a moment.
    now = datetime.now()  # noqa: DTZ005 (as Optuna writes it)
    return (now - (trial.datetime_start or now)).total_seconds() > PATIENCE_SECONDS


@contextmanager
def working(place: Place) -> Iterator[str]:
    """Be known as at work on the study; the name that this process is known by."""
    if place.workers is None:
        yield own_name()
        return
    with Presence(place.workers) as presence:
        yield presence.name


def values_text(study: optuna.Study, values: Sequence[float] | None) -> str:
    """What a trial reached, for the eye: gain +0.81 dB, probe 0.3812."""
    texts = []
    for metric, value in zip(study.user_attrs["metrics"], values or (), strict=False):
        name, _, unit = str(metric).partition(", ")
        texts.append(f"{name} {value:+.4f} {unit}" if unit else f"{name} {value:.4f}")
    return ", ".join(texts) or "unfinished"


def best_trials(study: optuna.Study) -> Sequence[FrozenTrial]:
    """The best finished trial, or the Pareto front; none while nothing has finished."""
    if not any(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)):
        return []
    if len(study.directions) == 1:
        return [study.best_trial]
    return [trial for trial in study.best_trials if "same_as" not in trial.user_attrs]


def _storage(place: Place) -> BaseStorage:
    if place.journal is not None:
        place.journal.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(place.journal)
        return JournalStorage(JournalFileBackend(str(place.journal)))
    with warnings.catch_warnings():
        # The heartbeat is what finds trials whose machine died; that its interface may change is no news to users.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(
            place.storage,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=int(PATIENCE_SECONDS),
            heartbeat_stale_trial_callback=resubmit,
        )


def _drop_torn_line(journal: Path) -> None:
    """Remove what a full disk or a power cut left of a line; Optuna would write behind it, and read neither again."""
    if not journal.is_file() or not journal.stat().st_size:
        return
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        with journal.open("rb+") as handle:
            content = handle.read()
            if not content.endswith(b"\n"):
                handle.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _first_contact(place: Place) -> Any:
    """A database's first use makes its tables, and two at a time ruin a sqlite file."""
    database = place.storage.removeprefix("sqlite:///") if place.storage.startswith("sqlite:///") else None
    if database is None:
        return nullcontext()
    Path(database).parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{database}.lock")
