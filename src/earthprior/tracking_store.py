"""Where MLflow's store and a run in it are, whether the store answers, and how to name it without its secrets."""

from __future__ import annotations

import os
import re
import sqlite3
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
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

    @contextmanager
    def first_contact(self) -> Iterator[None]:
        """Hold this during the first contact: it creates or migrates the schema, and two at a time ruin a database.

        Raises:
            RuntimeError: An earlier first contact was interrupted, and left the database half-upgraded.
        """
        if self.database is None:
            yield
            return
        self.database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.database}.lock", timeout=LOCK_SECONDS):
            try:
                yield
            except Exception as error:
                if self._leftovers():
                    raise RuntimeError(explained(LEFTOVER, self.shown)) from error
                raise

    def _leftovers(self) -> bool:
        """Whether the database has tables that live only during a migration."""
        query = "select count(*) from sqlite_master where name like ? escape '~'"
        try:
            with closing(sqlite3.connect(str(self.database), timeout=PROBE_SECONDS)) as connection:
                found: int = connection.execute(query, (LEFTOVER.replace("_", "~_") + "%",)).fetchone()[0]
        except sqlite3.Error:
            return False
        return found > 0

    def probe(self) -> None:
        """Raise OSError within a few seconds if the store cannot be had; a server's answer may be a refusal."""
        if self.database is not None:
            self._probe_database(self.database)
        elif self.uri.startswith(("http://", "https://")):
            self._probe_server()

    def _probe_database(self, database: Path) -> None:
        """MLflow would try for minutes to open what is none."""
        if not database.exists():
            return
        if not (database.is_file() and os.access(database, os.R_OK | os.W_OK)):
            raise PermissionError(f"{self.shown} is no file that can be written; check what it is, and its mode")
        try:
            with closing(sqlite3.connect(database, timeout=PROBE_SECONDS)) as connection:
                connection.execute("select count(*) from sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise ConnectionError(explained(f"{self.shown}: {error}", self.shown)) from None

    def _probe_server(self) -> None:
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
    return re.sub(r"(?i)((?:password|passwd|pwd|token|secret|key|signature|sig|auth)=)[^&\s'\"]+", r"\1***", text)


LEFTOVER = "_alembic_tmp"
REMEDIES = {
    LEFTOVER: "was left half-upgraded by an interrupted first use; move it away, and a new one is made",
    "out-of-date database schema": "was made by another version of MLflow; use that one, or `mlflow db upgrade`",
    "Can't locate revision": "was made by a newer version of MLflow; use that one",
    "file is not a database": "is damaged, or no SQLite database; move it away, and a new one is made",
    "database disk image is malformed": "is damaged; move it away, and a new one is made",
    "database or disk is full": "has no space left on its disk; free some",
    "disk I/O error": "cannot be written, its disk is full or failing",
    "readonly database": "cannot be written; check its mode and its folder's",
    "unable to open database": "cannot be opened; check its folder and its mode",
    "database is locked": "is locked by another process",
}
"""What a database answers, and what that means for whoever reads it."""


def explained(text: str, name: str = "its database") -> str:
    """The text, or what it means, where that is known, of a database of this name."""
    return next((f"{name} {meaning}" for sign, meaning in REMEDIES.items() if sign in text), text)


def reason(error: Exception, name: str = "its database") -> str:
    """One line on what went wrong, safe to print, with the remedy where it is known."""
    text = explained(redacted(" ".join(str(error).split())) or type(error).__name__, name)
    if unanswered := re.match(r"API request to (\S+?)(/api/\S*)? failed with exception", text):
        return f"no answer from {unanswered[1]}"
    return text if len(text) <= REASON_LENGTH else f"{text[:REASON_LENGTH]}..."
