"""EarthPrior: self-supervised pretraining on satellite chips."""

from __future__ import annotations

__version__ = "0.1.0"
