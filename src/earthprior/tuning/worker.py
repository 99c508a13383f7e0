"""One process's work on a study: trial after trial, until there are as many as wanted."""

from __future__ import annotations

import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

import optuna
import torch
from filelock import FileLock
from optuna.trial import TrialState

from earthprior import outbox
from earthprior.errors import DataError, DivergedError, EarthPriorError, HeldError, Interrupted, Pruned, StorageError
from earthprior.identity import main_root
from earthprior.training.stop import StopRequest
from earthprior.tuning.study import Place, count, folder_name, resubmit, take_up_stale, values_text
from earthprior.tuning.trial import Context, run_trial

POLL_SECONDS = 5.0
FEW = 5
"""Failed trials that a study bears before it is asked whether anything works at all."""

logger = logging.getLogger(__name__)


class Worker:
    """Runs trials of a study; a class because Optuna calls back into it.

    Args:
        study: The study.
        place: Where it is kept.
        context: What the trials share.
        stop: Asked within and between trials.
        after: Called after each trial.
    """

    def __init__(
        self, study: optuna.Study, place: Place, context: Context, stop: StopRequest, after: Callable[[], None]
    ) -> None:
        self.study, self.place, self.context, self.stop, self.after = study, place, context, stop, after
        self.lock: FileLock = place.lock()
        self.ending: EarthPriorError | None = None

    def run(self, wanted: int) -> None:
        """Until `wanted` trials are done; while others run the last ones, wait for what becomes of them.

        Raises:
            Interrupted: Asked to stop; a trial that was running is saved, and queued to be gone on with.
            EarthPriorError: Most trials fail, or the data or the disk is at fault, which no other trial would mend.
        """
        waiting = False
        failed_before = count(self.study).failed
        while True:
            if self.stop.signal_number:
                raise Interrupted("stopped between trials", self.stop.signal_number)
            self.lock.acquire()
            try:
                for number in take_up_stale(self.place, self.study):
                    logger.info("trial %d was left by a process that died; another goes on from its state", number)
                now = count(self.study)
                if now.done >= wanted:
                    return
                failed = now.failed - failed_before
                if failed >= FEW and failed > now.done:
                    raise EarthPriorError(
                        f"{failed} trials failed and {now.done} did not: {self._reasons()}. Mend this; the same "
                        "command goes on"
                    )
                if now.done + now.running < wanted:
                    waiting = False
                    self._one_trial()
                elif not waiting:
                    waiting = True
                    logger.info("tune: other processes run the last %d trials; waiting for them", now.running)
            finally:
                self.lock.release()
            if waiting:
                time.sleep(POLL_SECONDS)
                continue
            self.after()
            if self.ending is not None:
                raise self.ending

    def _one_trial(self) -> None:
        try:
            self.study.optimize(self._objective, n_trials=1, catch=(Exception,))
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            # Silent for too long (a suspended machine, a file system that was away), so others took the trial for
            # abandoned, and Optuna will not be told of it twice.
            if "Cannot tell" not in str(error) and not isinstance(error, optuna.exceptions.UpdateFinishedTrialError):
                raise
            logger.info("a trial was taken up by another process while this one was silent; going on with the next")

    def _objective(self, trial: optuna.Trial) -> Sequence[float]:
        """What Optuna maximizes; whatever goes wrong is the trial's, with its reason."""
        # The trial is asked for, so that others may count it.
        self.lock.release()
        try:
            values = run_trial(trial, self.context, self.stop)
        except optuna.exceptions.UpdateFinishedTrialError:
            raise
        except HeldError as error:
            # Its owner is alive after all; the folder is the owner's.
            self._again(trial, died=True)
            self._note(trial, error)
            time.sleep(POLL_SECONDS)
            raise
        except (Pruned, DivergedError) as error:
            # What diverges counts as pruned: the sampler then keeps away from there, of failures it learns nothing.
            self._note(trial, error)
            self._forget(trial)
            raise optuna.TrialPruned(str(error)) from None
        except (Interrupted, StorageError) as error:
            self._again(trial, died=False)
            self._note(trial, error)
            self.ending = error
            raise
        except DataError as error:
            self._note(trial, error)
            self.ending = error
            raise
        except (EarthPriorError, torch.OutOfMemoryError) as error:
            self._note(trial, error)
            self._forget(trial)
            torch.cuda.empty_cache()
            raise
        except Exception as error:
            with suppress(OSError):
                traceback.print_exc()
            self._note(trial, error)
            raise
        known = trial.user_attrs.get("same_as")
        same = "" if known is None else f" (the very settings of trial {known})"
        logger.info("trial %d: %s%s", trial.number, values_text(self.study, values), same)
        return values

    def _again(self, trial: optuna.Trial, died: bool) -> None:
        resubmit(self.study, self.study.get_trials(deepcopy=False)[trial.number], died)

    def _note(self, trial: optuna.Trial, error: Exception) -> None:
        reason = str(error) or type(error).__name__
        trial.set_user_attr(
            "reason", reason if isinstance(error, EarthPriorError) else f"{type(error).__name__}: {reason}"
        )
        with suppress(OSError):
            print(f"trial {trial.number}: {reason}", file=sys.stderr, flush=True)

    def _forget(self, trial: optuna.Trial) -> None:
        """Delete the state of a trial that nobody will go on from, and keep what MLflow has yet to hear of it."""
        folder = self.context.folder / str(trial.user_attrs.get("folder", folder_name(trial.number)))
        if outbox.set_aside(folder / "state", main_root(self.context.root)):
            shutil.rmtree(folder, ignore_errors=True)

    def _reasons(self) -> str:
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        reasons = [" ".join(str(trial.user_attrs.get("reason", "its process died")).split()) for trial in trials]
        return "; ".join(dict.fromkeys(reasons[-FEW:]))
