"""Where MLflow's store and a run in it are, whether the store answers, and how to name it without its secrets."""

from __future__ import annotations

import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from earthprior.files import read_json
from earthprior.identity import main_root

EXPERIMENT = "earthprior"
LOCK_SECONDS, PROBE_SECONDS, REASON_LENGTH = 120.0, 3.0, 300


@dataclass(frozen=True)
class Store:
    """A tracking store.

    Attributes:
        uri: As MLflow takes it; may hold a password.
        shown: As it may be printed and written to files.
        database: The file of a sqlite store, else None.
        experiment: Name of the experiment that new runs go to.
    """

    uri: str
    shown: str
    database: Path | None
    experiment: str

    @property
    def artifact_location(self) -> str | None:
        """Where new experiments keep files: beside a sqlite database; a server decides for itself (None)."""
        return None if self.database is None else (self.database.parent / "mlruns").as_uri()

    @property
    def address(self) -> str | None:
        """Where its pages are: a server's own, or where `mlflow ui` offers those of a sqlite database."""
        if self.uri.startswith(("http://", "https://")):
            return self.shown.rstrip("/")
        return None if self.database is None else "http://127.0.0.1:5000"

    def first_contact(self) -> AbstractContextManager[object]:
        """Hold this during the first contact: it creates or migrates the schema, and two at a time ruin a database."""
        if self.database is None:
            return nullcontext()
        self.database.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.database}.lock", timeout=LOCK_SECONDS)

    def probe(self) -> None:
        """Raise OSError within a few seconds if a server does not answer; any answer will do, a refusal included."""
        if not self.uri.startswith(("http://", "https://")):
            return
        parts = urllib.parse.urlsplit(self.uri)
        address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health"
        try:
            urllib.request.urlopen(address, timeout=PROBE_SECONDS).close()  # noqa: S310 (scheme checked above)
        except urllib.error.HTTPError:
            pass
        except urllib.error.URLError as error:
            # MLflow has its own certificate settings; that a certificate came is an answer.
            if not isinstance(error.reason, ssl.SSLError):
                raise ConnectionError(f"no answer from {self.shown} ({error.reason})") from None
        except OSError as error:
            raise ConnectionError(f"no answer from {self.shown} ({error})") from None


@dataclass(frozen=True)
class RunRef:
    """Where an MLflow run is.

    Attributes:
        tracking_uri: Of its store, without secrets; for the eye.
        experiment: Name of its experiment.
        run_id: None as long as no store has answered.
        uid: By which it is then found, see `outbox.RunRecord`.
    """

    tracking_uri: str
    experiment: str
    run_id: str | None
    uid: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunRef:
        """The inverse of `to_json`."""
        uri, experiment, run_id, uid = (content.get(name) for name in ("tracking_uri", "experiment", "run_id", "uid"))
        return cls(str(uri or ""), str(experiment or ""), str(run_id) if run_id else None, str(uid) if uid else None)

    @classmethod
    def read(cls, path: Path) -> RunRef | None:
        """From a file such as results/pretrain/mlflow_run.json; None if there is none that can be read."""
        try:
            content = read_json(path)
        except (OSError, ValueError):
            return None
        return cls.from_json(content) if isinstance(content, dict) else None


def locate(root: Path, uri: str | None = None) -> Store:
    """The store for a stage that runs in `root`: MLFLOW_TRACKING_URI, else mlflow.db under the main checkout.

    A relative sqlite path is taken from the main checkout too: inside `dvc exp run --temp` it would be lost.

    Args:
        root: The folder that the stage runs in.
        uri: Another one, as `Store.shown` has it.
    """
    home = main_root(root)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    database = None
    match = re.fullmatch(r"sqlite:///(?!:memory:)([^?]+)(\?.*)?", uri)
    if match:
        database = home / urllib.parse.unquote(match[1])
        uri = f"sqlite:///{database}{match[2] or ''}"
    shown = redacted(uri)
    if database is not None and database.is_relative_to(home):
        shown = f"sqlite:///{database.relative_to(home)}"
    return Store(uri, shown, database, os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)


def redacted(text: str) -> str:
    """The text without the user, password and tokens of the URIs in it."""
    text = re.sub(r"(://)[^/\s'\"]*@", r"\1***@", text)
    return re.sub(r"(?i)((?:password|passwd|token|secret|key)=)[^&\s'\"]+", r"\1***", text)


def reason(error: Exception) -> str:
    """One line on what went wrong, safe to print, with the remedy where it is known."""
    text = redacted(" ".join(str(error).split())) or type(error).__name__
    if "_alembic_tmp" in text:
        return "its database is left half-upgraded by an interrupted first use; move mlflow.db away and start again"
    if unanswered := re.match(r"API request to (\S+?)(/api/\S*)? failed with exception", text):
        return f"no answer from {unanswered[1]}"
    return text if len(text) <= REASON_LENGTH else f"{text[:REASON_LENGTH]}..."
