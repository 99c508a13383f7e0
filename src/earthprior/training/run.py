"""What is trained, and where it is at home."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earthprior import build, identity
from earthprior.chips.selection import read_stats
from earthprior.params import Params, active


@dataclass(frozen=True)
class Run:
    """What is trained, and who it is.

    Attributes:
        params: The whole of params.yaml.
        stats: The content of results/stats/stats.json.
        foreign_files: See `build.foreign_files`.
        fingerprint: What the weights are made of, see `identity.fingerprint`.
    """

    params: Params
    stats: Mapping[str, Any]
    foreign_files: Mapping[str, str]
    fingerprint: str

    @classmethod
    def of(cls, params: Params, root: Path) -> Run:
        """The run of these params on the statistics of this project.

        Raises:
            EarthPriorError: There are no statistics, the noise schedule is degenerate, or a file cannot be had.
        """
        stats, stats_sha256 = read_stats(root)
        build.schedule(params)  # its faults before any work
        foreign = build.foreign_files(params)
        return cls(params, stats, foreign, identity.fingerprint(active(params) | foreign, stats_sha256))


@dataclass(frozen=True)
class Home:
    """Where a training is at home.

    Attributes:
        root: The project's root, with the chips and their statistics.
        folder: Its state, until it is done.
        results: Its outs.
        params_path: Its params.yaml, kept with the MLflow run.
    """

    root: Path
    folder: Path
    results: Path
    params_path: Path

    def shown(self, path: Path) -> str:
        """A path as messages have it, from the root."""
        return os.path.relpath(path, self.root)
