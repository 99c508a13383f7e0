"""EarthPrior: self-supervised pretraining on satellite chips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from earthprior.downstream.saved import load_finetuned
    from earthprior.loading import load_backbone

__all__ = ["__version__", "load_backbone", "load_finetuned"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What loads networks, imported when it is asked for: torch takes seconds, and `earthprior --help` needs none."""
    if name == "load_backbone":
        from earthprior.loading import load_backbone

        return load_backbone
    if name == "load_finetuned":
        from earthprior.downstream.saved import load_finetuned

        return load_finetuned
    raise AttributeError(f"module 'earthprior' has no attribute {name!r}")
