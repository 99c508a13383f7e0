"""The stage `pretrain`: from chips and their statistics to a network that denoises them.

Writes results/pretrain/, see `training.outs`. Until then everything is in `work/pretrain/<fingerprint>/`, where the
same command finds it again after a kill.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from earthprior import build, identity, naming, under_dvc
from earthprior.journal import Journal
from earthprior.params import Params, active
from earthprior.tracking import Tracker, open_tracker
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import only_writer, world
from earthprior.training.run import Home, Run
from earthprior.training.session import Hooks, Session, prepare_torch
from earthprior.training.stop import stop_requests


def run(params: Params, root: Path, accept_code: bool = False) -> None:
    """Pretrain, or continue where an earlier process of the same run was stopped.

    Args:
        params: The whole of params.yaml.
        root: The project's root, holding results/stats/stats.json.
        accept_code: Continue although the code changed since the last checkpoint.

    Raises:
        EarthPriorError: Statistics are missing or stale, or another process trains this run.
        Interrupted: Asked to stop; the state is saved.
        StorageError: The disk is full or failing.
        DivergedError: Loss or gradient became non-finite.
    """
    prepare_torch(params.threads)
    work = Run.of(params, root)
    folder = identity.main_root(root) / "work/pretrain" / work.fingerprint
    home = Home(root, folder, root / "results/pretrain", root / "params.yaml")

    def open_run(tags: Mapping[str, str], journal: Journal) -> Tracker:
        differs = naming.from_commit(params, root)
        name = None if differs else naming.plain_name(params, work.fingerprint)
        return open_tracker(root, name, active(params), tags, journal, differs=differs)

    def done(store: CheckpointStore) -> None:
        if under_dvc.present():
            under_dvc.keep(folder, root)
        else:
            store.delete()

    hooks = Hooks(open_run, done=done, logged=under_dvc.ParamsWatch("pretrain", params, root).look)
    with world(build.device(params)) as (place, device), stop_requests() as stop, only_writer(folder, place):
        session = Session(work, home, hooks, device, place)
        if place.is_first:
            under_dvc.reopen(folder, root)
        place.wait()
        session.run(stop, accept_code)
