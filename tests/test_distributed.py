from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

from earthprior import build, identity
from earthprior.chips.augment import augment
from earthprior.chips.batch import prepare
from earthprior.files import read_json, sha256_file, write_json
from earthprior.params import Params, active
from earthprior.randomness import seed_of, torch_generator
from earthprior.stages import stats
from earthprior.training import session as sessions
from earthprior.training.distributed import World, adding_up, only_writer, world
from earthprior.training.loop import Trainer
from earthprior.training.order import visits
from earthprior.training.run import Home, Run
from tiny_training import CPU, TINY, Tiny, bits, judged, train

SECONDS = 60
# The stage as torchrun starts it; each process leaves the state that it ended with.
WORKER = """
import os, sys
sys.modules["mlflow"] = None
import torch
from earthprior.training.loop import Trainer

run = Trainer.run
def leaving_its_state(self, *arguments):
    if "JUDGED" in os.environ:
        from tiny_training import judged
        judged(self)
    outcome = run(self, *arguments)
    torch.save(self.state(), f"rank{self.world.rank}.pt")
    return outcome
Trainer.run = leaving_its_state

# The first process takes its time to end, as with a distant MLflow; torchrun must not end it before.
if "SLOWLY" in os.environ:
    import time
    from earthprior.tracking import Tracker
    from earthprior.training import stop
    stop.ONE_REQUEST_SECONDS = 0.1
    close = Tracker.close
    Tracker.close = lambda self, *status: (time.sleep(4), close(self, *status))[1]
with open(f"rank{os.environ['RANK']}.pid", "w") as file:
    file.write(str(os.getpid()))

# In the second process alone: a batch that poisons, or a chip that cannot be read.
if os.environ.get("FAULT") and os.environ["RANK"] == "1":
    from earthprior.errors import DataError
    from earthprior.training import loop
    update, make_share = Trainer._update, loop.make_share
    def unread(raw, number, step, *arguments):
        if step == 2 and os.environ["FAULT"] == "chip":
            raise DataError("chips/chip_004.tif (catalog line 6): truncated")
        return make_share(raw, number, step, *arguments)
    loop.make_share = unread
    def faulty(self, shares):
        if self.step == 2:
            shares[0].batch.x0[0] = torch.nan
        return update(self, shares)
    Trainer._update = faulty

from earthprior.cli import main
sys.argv = ["earthprior", "pretrain"]
try:
    main()
except SystemExit as ended:
    with open(f"rank{os.environ['RANK']}.code", "w") as file:
        file.write(str(ended.code))
    raise
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_chips: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_chips(root / "data", n=12, size=32)
    return root


@pytest.fixture
def params(make_params: Callable[..., Params]) -> Params:
    small = {"epochs": 2, "threads": 1, "operation.checkpoint_every_seconds": 0, "unet_film.dropout_rate": 0.2}
    return make_params({**TINY, **small})


def project(made: Path, params: Params, root: Path) -> Path:
    """A root with chips, statistics, params and the worker's program."""
    shutil.copytree(made, root, dirs_exist_ok=True)
    stats.run(params, root)
    write_json(root / "params.yaml", params.model_dump(mode="json"))
    (root / "worker.py").write_text(WORKER)
    return root


def torchrun(root: Path, **more: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_GLOO_LAZY_INIT": "1", "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py"]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> str:
    """What the processes said; all of them are gone afterwards."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(process.communicate()[0]) from None


def fails(tags: Any, journal: Any) -> Any:
    raise AssertionError("nothing is tracked here")


def one_process_playing_two(params: Params, root: Path) -> Trainer:
    """The same training in one process, which adds up the halves of every gradient itself."""
    stats = read_json(root / "results/stats/stats.json")
    # As the two processes do it; a test before this one may have left another number of threads.
    sessions.prepare_torch(params.threads)
    run, home = Run(params, stats, {}, "f"), Home(root, root, root, root)
    session = sessions.Session(run, home, sessions.Hooks(fails), CPU, World())
    trainer = session.trainer(None)
    orders = [list(visits(params, len(session.selection.train), World(rank, 2), 0)) for rank in range(2)]
    trainer.task.train()
    for step in range(trainer.total_steps):
        trainer.optimizer.zero_grad()
        for rank in range(2):
            address = (params.seed, "step", step, rank)
            generator = torch_generator(*address)
            (raw,) = session._read([orders[rank][step]])
            batch = augment(prepare(raw, session.normalizer, CPU), params.augmentation, params.data.crop_px, generator)
            torch.manual_seed(seed_of(*address, "dropout"))
            (trainer.task.loss(batch, generator).total / 2).backward()
        nn.utils.clip_grad_norm_(trainer.task.network.parameters(), params.grad_clip or torch.inf)
        trainer.optimizer.step()
        trainer.lr_schedule.step()
        trainer.average.update_parameters(trainer.task.network)
    return trainer


def test_two_processes_train_one_network_as_one_process_would(made: Path, params: Params, tmp_path: Path) -> None:
    root = project(made, params, tmp_path)
    process = torchrun(root)
    alone = one_process_playing_two(params, tmp_path)
    said = end(process)
    assert process.returncode == 0, said
    assert "(2 processes, 1 threads)" in said
    assert said.count("pretrain ") == 1, "only the first process speaks"

    first, second = (torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("network", "average", "optimizer", "lr_schedule"):
        assert bits(first[part]) == bits(second[part]), part
    for name, value in alone.task.network.state_dict().items():
        torch.testing.assert_close(first["network"][name], value, rtol=1e-3, atol=1e-5)
    for name, value in alone.average.state_dict().items():
        torch.testing.assert_close(first["average"][name], value, rtol=1e-3, atol=1e-5)

    assert sorted(path.name for path in (root / "results/pretrain").iterdir()) == [
        "config.json", "environment.json", "history.csv", "linear.safetensors", "mlflow_run.json",
        "network.safetensors",
    ]  # fmt: skip
    trained, _ = build.pretrained_task(root / "results/pretrain")
    assert bits(trained.network.state_dict()) == bits(first["best"])


@pytest.mark.soak
def test_two_processes_with_two_parts_each_do_what_one_does_with_four(
    made: Path, make_params: Callable[..., Params], tmp_path: Path
) -> None:
    """With all that the processes must agree on: SAM's way up, the history of losses, the rate, the early end."""
    dials = {
        **TINY, "threads": 1, "batch_size": 8, "epochs": 6, "early_stopping_epochs": 2, "optimizer": "sam",
        "sam.base_optimizer": "sgd", "lr_schedule": "plateau", "plateau.patience": 0, "unet_film.dropout_rate": 0.2,
        "diffusion.timestep_sampling": "importance", "diffusion.timesteps": 50,
    }  # fmt: skip
    params = make_params({**dials, "accumulation_steps": 2})
    root = project(made, params, tmp_path)
    process = torchrun(root, JUDGED="yes")
    alone = judged(Tiny(root, make_params({**dials, "accumulation_steps": 4})).trainer())
    train(alone, tmp_path / "alone")
    said = end(process)
    assert process.returncode == 0, said
    assert said.count("stopped early after epoch 4 of 6") == 1

    first, second = (torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("step", "network", "average", "optimizer", "lr_schedule", "task", "best_epoch", "epoch_loss"):
        assert bits(first[part]) == bits(second[part]), part
    expected = alone.state()
    assert (first["step"], expected["step"]) == (8, 8)
    assert first["optimizer"]["param_groups"][0]["lr"] == expected["optimizer"]["param_groups"][0]["lr"]
    for part in ("network", "task"):
        for name, value in expected[part].items():
            torch.testing.assert_close(first[part][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.soak
def test_two_processes_that_are_asked_to_stop_leave_together(made: Path, params: Params, tmp_path: Path) -> None:
    longer = params.model_copy(update={"epochs": 60})
    root = project(made, longer, tmp_path)
    fingerprint = identity.fingerprint(active(longer), sha256_file(root / "results/stats/stats.json"))
    folder = root / "work/pretrain" / fingerprint
    process = torchrun(root, SLOWLY="yes")
    deadline = time.monotonic() + SECONDS
    while not list(folder.glob("ckpt-*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in range(2):
        os.kill(int((root / f"rank{rank}.pid").read_text()), signal.SIGTERM)
    said = end(process)
    saved = max(int(path.stem[5:]) for path in folder.glob("ckpt-*.json"))
    last = "continue with: torchrun --nproc-per-node=2 -m earthprior pretrain"
    assert f"earthprior: saved step {saved} of 240\n{last}\n" in said, said


@pytest.mark.parametrize(("fault", "code"), [("poison", 3), pytest.param("chip", 2, marks=pytest.mark.soak)])
def test_what_ends_one_process_ends_all_with_the_same_code_and_words(
    made: Path, params: Params, fault: str, code: int, tmp_path: Path
) -> None:
    rarely = params.operation.model_copy(update={"checkpoint_every_seconds": 3600})
    root = project(made, params.model_copy(update={"operation": rarely}), tmp_path)
    process = torchrun(root, FAULT=fault)
    said = end(process)
    assert [int((root / f"rank{rank}.code").read_text()) for rank in range(2)] == [code, code], said
    words = [line for line in said.splitlines() if line.startswith("earthprior: ")]
    assert len(words) == 2, said
    assert "Traceback" not in said.split("continue with:")[0]
    assert said.splitlines().count("then continue with: torchrun --nproc-per-node=2 -m earthprior pretrain") == 2, said
    if fault == "chip":
        told = "chips/chip_004.tif (catalog line 6): truncated. Stopped before step 3 of 8; ckpt-00000002"
        assert list(root.glob("work/pretrain/*/ckpt-00000002.pt")), "no step is lost"
        first, second = sorted(words)
        assert first.startswith(f"earthprior: another process ended: {told}")
        assert second.startswith(f"earthprior: {told}")
        return
    assert words[0] == words[1]
    assert "training diverged at step 3 of 8" in words[0]
    (record,) = root.glob("work/pretrain/*/diverged.json")
    losses = [chip["loss"] for chip in read_json(record)["chips"]]
    assert [index for index, loss in enumerate(losses) if loss == "NaN"] == [2], "the first chip of the second process"
    assert f"Worst of the 4 chips: {read_json(record)['chips'][2]['file']} " in words[0]


def test_alone_nothing_is_wrapped_and_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    network = nn.Linear(2, 2)
    with world(CPU) as (place, device):
        assert (place, device) == (World(0, 1), CPU)
        assert place.is_first
        assert place.wrap(network, device) is network
        assert place.largest(15, device) == 15
        assert place.from_first(0.5, device) == 0.5
        assert place.gather(torch.tensor([1, 2])).tolist() == [1, 2]
        with adding_up(network):
            network(torch.ones(2)).sum().backward()
        place.wait()
    assert not torch.distributed.is_initialized()


def test_who_only_looks_at_a_folder_keeps_nobody_out(tmp_path: Path) -> None:
    """As another run does that begins at the same moment and wants to name its neighbours."""
    looking = FileLock(tmp_path / "lock", thread_local=False)
    looking.acquire()
    threading.Timer(0.05, looking.release).start()
    with only_writer(tmp_path, World()):
        assert (tmp_path / "owner").read_text().startswith(f"pid {os.getpid()} on ")
