"""Pictures of a training under way: the same noisy chips, denoised by the averaged weights of one epoch after another.

They go to MLflow, where one steps through them. Nothing of the training depends on them: they draw no random numbers,
and what goes wrong with them is told and left at that.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from earthprior.chips.batch import Batch
from earthprior.chips.normalize import Normalizer
from earthprior.chips.selection import Selection, middle_crops
from earthprior.evaluation.denoising import panels
from earthprior.figures import denoising_figure
from earthprior.figures.style import save_png
from earthprior.files import sweep
from earthprior.params import Params
from earthprior.tasks.diffusion import DiffusionTask
from earthprior.tracking import Tracker
from earthprior.tracking_view import PICTURES
from earthprior.training.shares import autocast
from earthprior.training.validate import evaluating

logger = logging.getLogger(__name__)

CHIPS = 2
RHOS = (0.5, 2.0)
AT_MOST = 20
"""So many after the first; fewer where they would take more time than GRACE_SECONDS and SHARE of the run."""

GRACE_SECONDS, SHARE = 1.0, 0.03


class Pictures:
    """The pictures of one run.

    Args:
        folder: For the files, which stay there until the run is done.
        params: Of the run.
        selection: Its chips.
        normalizer: Of the run.
        device: Where its network is.
        tracker: Takes the pictures; their steps are percents of the run's epochs, so that runs of any length compare.
        epoch: How many are done already.
    """

    def __init__(
        self,
        folder: Path,
        params: Params,
        selection: Selection,
        normalizer: Normalizer,
        device: torch.device,
        tracker: Tracker,
        epoch: int,
    ) -> None:
        self._folder, self._params, self._device, self._tracker = folder, params, device, tracker
        self._read = partial(middle_crops, params, selection.folder, selection.validate, CHIPS, normalizer, device)
        self._batch: tuple[Batch, list[str]] | None = None
        self._began, self._first_epoch = time.monotonic(), epoch
        self._cost = 0.0
        self._done: dict[Path, int] = {}
        self._off = not tracker.mirrors
        sweep(folder)
        for path in sorted(folder.glob("percent-*.png")):
            # Of an earlier process: MLflow may have missed it.
            self._hand_over(path)

    def draw_if_due(self, task: DiffusionTask, network: nn.Module, epoch: int) -> None:
        """`draw`, as often as there is time for, evenly over the run."""
        epochs = self._params.epochs
        total = (time.monotonic() - self._began) * epochs / max(epoch - self._first_epoch, 1)
        since = percent(epoch, epochs) - max(self._done.values(), default=-100)
        if 100 * self._cost <= since * (GRACE_SECONDS + SHARE * total):
            self.draw(task, network, epoch)

    def draw(self, task: DiffusionTask, network: nn.Module, epoch: int) -> None:
        """Draw what the network (the averaged weights) makes of the chips, if there is no picture of this time yet.

        Args:
            task: What is trained.
            network: Of the averaged weights.
            epoch: How many are done.
        """
        path = self._folder / f"percent-{percent(epoch, self._params.epochs):03d}.png"
        if self._off or path in self._done:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._batch = self._batch or self._read()
            began = time.monotonic()
            with evaluating(task, network), autocast(self._params, self._device):
                shown = panels(task, *self._batch, RHOS)
            if shown:
                save_png(denoising_figure(shown, self._params.data.bands), path)
                self._hand_over(path)
            self._cost = time.monotonic() - began
        except Exception as error:  # noqa: BLE001 (a picture is no reason for a training to fail)
            self._off = True
            logger.warning("no more pictures of this run (%s); the training goes on", " ".join(str(error).split()))

    def _hand_over(self, path: Path) -> None:
        self._done[path] = step = int(path.stem.rpartition("-")[2])
        self._tracker.log_picture(path, PICTURES, step)


def percent(epoch: int, epochs: int) -> int:
    """How far a run is, in so coarse steps that there are AT_MOST of them."""
    return 100 // AT_MOST * (AT_MOST * epoch // epochs)
