"""A real MLflow server that is stopped, killed, slow, or refuses: training goes on, and all is delivered once."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from earthprior import mirror
from earthprior.errors import EarthPriorError
from earthprior.files import write_json
from earthprior.journal import Journal
from earthprior.tools import sync_tracking
from earthprior.undelivered import waiting
from mlflow_store import evaluate, open_plain

STEPS = 120

pytestmark = pytest.mark.usefixtures("own_store_only")


@dataclass
class Server:
    """`mlflow server` on a sqlite store."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination",
            (self.folder / "artifacts").as_uri(),
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 55
        while True:
            with suppress(OSError, http.client.HTTPException):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prepared_database: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(prepared_database.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Server(folder, port)
    made.start()
    yield made
    with suppress(ProcessLookupError):
        made.send(signal.SIGKILL)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_RETRY_SECONDS", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@contextmanager
def proxy(target: str, delay_seconds: float = 0.0, refusal: int = 0) -> Iterator[str]:
    """A server before the server, which is slow, or refuses everything but the question whether it is there."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            time.sleep(delay_seconds)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if refusal and self.path != "/health":
                self.answer(refusal, b"<html>refused</html>", "text/html")
                return
            headers = {name: self.headers[name] for name in ("Content-Type",) if name in self.headers}
            request = urllib.request.Request(target + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=20) as response:
                    self.answer(response.status, response.read(), response.headers["Content-Type"])
            except urllib.error.HTTPError as error:
                self.answer(error.code, error.read(), error.headers["Content-Type"])

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def answer(self, status: int, body: bytes, kind: str | None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind or "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://me:hunter2@127.0.0.1:{made.server_address[1]}"
    made.shutdown()
    made.server_close()


def open_training(root: Path, name: str) -> Any:
    journal = Journal(root / "work/pretrain" / name / "metrics.jsonl")
    tracker = open_plain(root, journal, run_name=name, wait_seconds=30)
    (root / "params.yaml").write_text("lr: 1\n")
    return tracker


def log(tracker: Any, steps: range) -> float:
    """Log as a training would; the seconds that all calls took, each of which would wait for some 0.3 at least."""
    begin = time.perf_counter()
    for step in steps:
        tracker.log({"loss": step / 8, "lr": 0.1}, step)
    return time.perf_counter() - begin


def check_whole(uri: str, name: str, evaluated: bool = False) -> None:
    """That the server holds one run of this name, with every point once, its file and its end."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("earthprior")
    (run,) = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == name]
    assert run.info.status == "FINISHED"
    for curve in ("loss", "lr"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, curve)] == list(range(STEPS))
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["params.yaml"]
    assert ("evaluate/gain_db/mean" in run.data.metrics) == evaluated


def deliver(root: Path) -> None:
    sync_tracking.run(root)
    assert waiting(root) == []


def delivered(tracker: Any) -> None:
    """Wait until the server has what was told so far."""
    end = time.monotonic() + 30
    while tracker._mirror._courier.delivery.delivered < tracker._mirror._courier.delivery.total:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_a_server_that_goes_away_and_comes_back(
    server: Server, tmp_path: Path, fault: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    tracker = open_training(tmp_path, fault.name)
    log(tracker, range(STEPS // 2))
    delivered(tracker)
    server.send(fault)
    try:
        assert log(tracker, range(STEPS // 2, STEPS)) < 0.1 * STEPS
        tracker.log_artifact(tmp_path / "params.yaml")
        begin = time.monotonic()
        assert not tracker.close(timeout_seconds=15)
        assert time.monotonic() - begin < 17
        evaluate(tmp_path, tracker.ref)
        with pytest.raises(EarthPriorError, match=r"2 of 2 runs wait(.|\n)*no answer from http://127"):
            sync_tracking.run(tmp_path)
    finally:
        if fault == signal.SIGKILL:
            server.start()
        else:
            server.send(signal.SIGCONT)
    deliver(tmp_path)
    check_whole(server.uri, fault.name, evaluated=True)


def test_a_server_that_is_there_again_while_the_run_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.send(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        tracker = open_training(tmp_path, "back")
        assert time.monotonic() - begin < 10
        log(tracker, range(STEPS // 2))
    finally:
        server.send(signal.SIGCONT)
    end = time.monotonic() + 30
    while "answers again" not in caplog.text:
        assert time.monotonic() < end
        time.sleep(0.05)
    log(tracker, range(STEPS // 2, STEPS))
    tracker.log_artifact(tmp_path / "params.yaml")
    assert tracker.close()
    check_whole(server.uri, "back")


def test_a_slow_server_is_not_waited_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    with proxy(server.uri, delay_seconds=0.3) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = open_training(tmp_path, "slow")
        assert log(tracker, range(STEPS)) < 0.1 * STEPS
        tracker.log_artifact(tmp_path / "params.yaml")
        assert tracker.close()
    check_whole(server.uri, "slow")
    # of the address that it was reached by, the server keeps no password
    for path in server.folder.rglob("*"):
        assert not (path.is_file() and b"hunter2" in path.read_bytes()), path


@pytest.mark.parametrize("status", [401, 413, 500])
def test_a_server_that_refuses_is_delivered_to_later(
    server: Server, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = f"refused-{status}"
    with proxy(server.uri, refusal=status) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = open_training(tmp_path, name)
        log(tracker, range(STEPS))
        tracker.log_artifact(tmp_path / "params.yaml")
        assert not tracker.close(timeout_seconds=20)
        with pytest.raises(EarthPriorError, match="1 of 1 runs wait for MLflow; nothing is lost") as caught:
            sync_tracking.run(tmp_path)
    out, err = capfd.readouterr()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()).decode(errors="replace")
    for text in (out, err, caplog.text, str(caught.value), kept):
        assert "hunter2" not in text
    # the same server in its right mind, at another address
    with proxy(server.uri) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        ((box, record),) = waiting(tmp_path)
        write_json(box.folder / "run.json", {**asdict(record), "tracking_uri": uri.replace("me:hunter2", "***")})
        deliver(tmp_path)
    check_whole(server.uri, name)
