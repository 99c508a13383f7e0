"""One process's work on a bench: fit after fit, until none is left.

Several processes may work on one table. Each claims a fit by a lock that dies with it, so a fit that was left by a kill
is taken up by whoever comes next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from filelock import FileLock, Timeout

from earthprior.bench.fits import Fitter
from earthprior.bench.plan import Fit, budget_text, chosen, ready
from earthprior.bench.table import Row, Table
from earthprior.training.progress import duration

POLL_SECONDS = 2.0

logger = logging.getLogger(__name__)


def work(fits: Sequence[Fit], fitter: Fitter, table: Table, after: Callable[[], None]) -> None:
    """Do fits in their order; while others do the last ones, wait for them. A fit that is interrupted is not kept.

    Args:
        fits: Of the plan.
        fitter: Does them.
        table: Where they are kept.
        after: Called after each fit.
    """
    bench, available = fitter.bench, len(fitter.ground.labelled)
    claims = table.path.parent / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    while True:
        scores = table.scores()
        if all(fit in scores for fit in fits):
            return
        for fit in ready(fits, bench, available, scores):
            try:
                claim = FileLock(claims / _name(fit)).acquire(timeout=0)
            except Timeout:
                continue
            with claim:
                now = table.scores()
                value = fit.value if fit.value is not None else chosen(fit, bench, available, now)
                if fit not in now and value is not None:
                    row = fitter.run(fit, value)
                    table.append(row)
                    _tell(row, fitter.metrics[0], len(fits), len(now) + 1)
            after()
            break
        else:
            time.sleep(POLL_SECONDS)


def _name(fit: Fit) -> str:
    value = "" if fit.value is None else f"-{fit.value:g}"
    return f"{fit.purpose}-{fit.method}-{budget_text(fit.budget)}-{fit.seed}{value}.lock"


def _tell(row: Row, metric: str, wanted: int, done: int) -> None:
    score = row.scores[metric]
    logger.info("%d/%d %s: %.3f, %s", done, wanted, row.fit.shown, score.value, duration(row.seconds))
