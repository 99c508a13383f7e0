"""A finetuned network as files, and back: model.safetensors and config.json, which need nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from earthprior.backbone import Backbone
from earthprior.downstream.network import DownstreamNetwork, Head, answer
from earthprior.errors import EarthPriorError
from earthprior.files import read_json, write_atomic, write_json
from earthprior.networks.tensor_file import listed, mismatches

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Finetuned(nn.Module):
    """A network that was trained on labels.

    Args:
        network: Backbone and head.
        description: Plain values, which are the content of config.json:
            format: FORMAT.
            kind: segmentation, classification or regression.
            classes: Label values in the order of the scores; empty for numbers.
            label_column: Of the catalog.
            crop_px: What it was trained on.
            side, t: Of the features.
            head: {"kind": linear or nonlinear, "channels"}.
            scale: Mean and deviation of the numbers that it was trained on.
            backbone: See `Backbone`.

    Attributes:
        backbone: With its normalization.
        bands: Names, in the order of x0's channels.
        kind, classes, crop_px: See above.
    """

    def __init__(self, network: DownstreamNetwork, description: Mapping[str, Any]) -> None:
        super().__init__()
        # As it was trained: other layouts round otherwise, and are slower.
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.description = dict(description)
        self.kind = str(description["kind"])
        self.classes: list[int | str] = list(description["classes"])
        self.crop_px = int(description["crop_px"])
        mean, std = description["scale"]
        self._scale = float(mean), float(std)
        self.eval()

    @property
    def backbone(self) -> Backbone:
        """The backbone, as it was finetuned."""
        backbone: Backbone = self.network.backbone
        return backbone

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the bands."""
        return self.backbone.bands

    def normalize(self, raw: Tensor, valid: Tensor | None = None) -> Tensor:
        """What `predict` takes, see `Backbone.normalize`."""
        return self.backbone.normalize(raw, valid)

    @torch.no_grad()
    def predict(self, x0: Tensor, valid: Tensor | None = None) -> Tensor:
        """What it says of chips.

        Args:
            x0: (B, C, H, W), of `normalize`; any size.
            valid: (B, 1, H, W) bool; all where it is None. Acts where chips have one label each.

        Returns:
            Probabilities (B, K, H, W) or (B, K), K = 2 for two classes; or numbers (B, 1) in the label's unit.
        """
        return answer(self.network(x0, valid), self.kind, *self._scale)

    def forward(self, x0: Tensor) -> Tensor:
        """See `predict`."""
        return self.predict(x0)

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json."""
        head = {f"head.{name}": value for name, value in self.network.head.state_dict().items()}
        tensors = {f"backbone.{name}": value for name, value in self.backbone.tensors().items()} | head
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / WEIGHTS, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
        write_json(folder / CONFIG, {**self.description, "backbone": self.backbone.description})


def load_finetuned(path: str | Path) -> Finetuned:
    """A finetuned network.

    Args:
        path: The folder that `earthprior finetune` wrote, a project's root, or model.safetensors itself.

    Raises:
        EarthPriorError: Nothing is found there, or files are damaged or do not belong together.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    if not (folder / CONFIG).is_file() and (folder / "downstream/results/finetune").is_dir():
        folder = folder / "downstream/results/finetune"
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise EarthPriorError(
            f"{path} holds no finetuned network: {', '.join(missing)} is missing; earthprior finetune"
        )
    try:
        description = read_json(folder / CONFIG)
        if description["format"] != FORMAT:
            raise EarthPriorError(f"{folder.name}/{CONFIG} is of another version of EarthPrior; finetune again")
        tensors = load_file(folder / WEIGHTS)
        parts = {
            name: {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
            for name in ("backbone.", "head.")
        }
        network = network_of(Backbone(description["backbone"], parts["backbone."]), description)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise EarthPriorError(f"{folder.name}/ holds a damaged network ({error}); finetune again") from None
    if faults := mismatches(network.head.state_dict(), parts["head."]):
        raise EarthPriorError(f"{folder.name}/{WEIGHTS} does not fit {CONFIG} ({listed(faults)}); finetune again")
    network.head.load_state_dict(parts["head."])
    return Finetuned(network, description)


def network_of(
    backbone: Backbone, description: Mapping[str, Any], train: str = "all", last: int = 1
) -> DownstreamNetwork:
    """The network of a description, its head untrained.

    Args:
        backbone: Below the head.
        description: See `Finetuned`.
        train: See `DownstreamNetwork`.
        last: See `DownstreamNetwork`.
    """
    side, kind = str(description["side"]), str(description["kind"])
    widths: Sequence[int] = backbone.widths[side]
    outputs = len(description["classes"]) or 1
    form = description["head"]
    head = Head(widths, outputs, kind == "segmentation", str(form["kind"]), int(form["channels"]))
    return DownstreamNetwork(backbone, head, side, int(description["t"]), train, last)
