"""A pretrained backbone: a plain `nn.Module` that turns normalized chips into pyramids of features.

It knows no task and no params.yaml: what it is made of is a description (plain values, as in JSON) and tensors by name.
`earthprior export` writes both into a folder, and this module into a file that needs only torch and safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from earthprior.chips.normalize import Normalizer
from earthprior.diffusion.linear import LinearDenoiser
from earthprior.diffusion.precondition import input_channels, network_input
from earthprior.errors import EarthPriorError
from earthprior.files import read_json
from earthprior.networks import NETWORKS
from earthprior.networks.sides import SIDES, check_side
from earthprior.networks.tensor_file import TensorFileError, listed, mismatches, read_tensors

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "backbone.safetensors"
NORMALIZATION = ("apply_normalization", "normal_strategy", "stat_procedure", "clip_percent", "clip_val", "statistics")
TABLES, FILTER = ("alpha", "sigma"), ("mean", "std", "eigenvalues", "eigenvectors")


class Backbone(nn.Module):
    """A pretrained network behind its normalization and its noise level.

    Args:
        description: Plain values, which `description` gives back:
            format: FORMAT.
            network: {"name": a key of NETWORKS, "options": what it is built with, "out_channels": of its head}.
            bands: Names, in the order of x0's channels.
            crop_px: What it was pretrained on.
            precondition: none, scalar or wiener, see `diffusion.precondition`.
            linear_width: Of the linear filter, px; None without one.
            normalization: NORMALIZATION, the section of params.yaml and the statistics that it uses.
            serving: {"t", "rho", "side", ...}: the noise level that features are taken at unless told otherwise.
            adapted: What was changed for other bands, sentences.
        tensors: `network.*`; `alpha` and `sigma` (T,); with a precondition `linear.*`; which `tensors` gives back.

    Attributes:
        bands: See above.
        crop_px: See above.
        widths: Channels per level, finest first, by side; level i is at 1 / 2**i of the resolution.
        t: The timestep that serves features best.
        rho: Its noise-to-signal ratio.
        adapted: See above.

    Raises:
        EarthPriorError: The tensors are not those that the description needs; they are named.
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(self, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.description = dict(description)
        self.bands: tuple[str, ...] = tuple(description["bands"])
        self.crop_px = int(description["crop_px"])
        self.t, self.rho = int(description["serving"]["t"]), float(description["serving"]["rho"])
        self.adapted: list[str] = list(description.get("adapted", []))
        self.precondition = str(description["precondition"])
        self.network = _network(description, tensors)
        self.widths: dict[str, tuple[int, ...]] = dict.fromkeys(SIDES, self.network.widths)
        self.linear = _linear(description, tensors)
        for name in TABLES:
            self.register_buffer(name, tensors[name].float(), persistent=False)
        normalization = description["normalization"]
        self._normalizer = Normalizer(SimpleNamespace(**normalization), normalization["statistics"])  # type: ignore[arg-type]
        self.eval()

    def normalize(self, raw: Tensor, valid: Tensor | None = None) -> Tensor:
        """What `features` takes, from values as in the files.

        Args:
            raw: (B, C, H, W), any numeric dtype, physical values, bands as in `bands`.
            valid: (B, H, W) bool, true where there is data; without it, wherever all bands are finite.

        Returns:
            x0 (B, C, H, W) float32; pixels without data hold the neutral value.
        """
        self._check(raw)
        x0, _ = self._normalizer.normalize(raw, raw.isfinite().all(1) if valid is None else valid)
        return x0

    def features(self, x0: Tensor, t: int | Tensor | None = None, side: str = "decoder") -> list[Tensor]:
        """Features of clean chips, one tensor per level, finest first; deterministic and differentiable.

        The network is told of noise as at timestep t, and none is mixed in: xt = alpha x0. So features do not
        depend on where a chip is cut, or on chance.

        Args:
            x0: (B, C, H, W), normalized, of any size. With the precondition wiener, sizes other than `crop_px` get the
                linear filter that `LinearDenoiser.sized` makes.
            t: Timestep, one for all or (B,); `t` by default.
            side: decoder, or encoder: what the skips carry.

        Returns:
            Tensors (B, widths[side][i], ceil(H / 2**i), ceil(W / 2**i)).

        Raises:
            EarthPriorError: x0 has other channels, or t or side are none of this backbone.
        """
        self._check(x0)
        if not x0.is_floating_point():
            raise EarthPriorError(f"x0 holds {x0.dtype} values, as files do; give features what normalize returns")
        check_side(side)
        steps = self._steps(t, x0)
        alpha, sigma = (table[steps].reshape(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        inputs, _ = network_input(self.precondition, alpha * x0, alpha, sigma, self.linear)
        pyramid: list[Tensor] = self.network.features(inputs, steps, side=side)
        return pyramid

    def forward(self, x0: Tensor) -> list[Tensor]:
        """`features` at the level and side that serve best."""
        return self.features(x0, side=str(self.description["serving"].get("side", "decoder")))

    def tensors(self) -> dict[str, Tensor]:
        """All that it is made of beside the description, on the CPU, as safetensors takes it."""
        found = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        found |= {name: getattr(self, name) for name in TABLES}
        if self.linear is not None:
            found |= {f"linear.{name}": tensor for name, tensor in self.linear.parts().items()}
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in found.items()}

    def _check(self, chips: Tensor) -> None:
        if not isinstance(chips, Tensor):
            raise EarthPriorError(f"chips are a {type(chips).__name__}; give a tensor, e.g. torch.from_numpy(chips)")
        if chips.ndim != 4 or chips.shape[1] != len(self.bands):
            raise EarthPriorError(
                f"chips of shape {tuple(chips.shape)}: this backbone takes (B, {len(self.bands)}, H, W), the bands "
                f"{', '.join(self.bands)} in this order; for other ones, load it with bands=[...]"
            )

    def _steps(self, t: int | Tensor | None, x0: Tensor) -> Tensor:
        """Timesteps (B,)."""
        last = len(self.alpha) - 1
        if isinstance(t, Tensor) and t.ndim:
            if t.shape != x0.shape[:1] or t.is_floating_point():
                what = f"t has shape {tuple(t.shape)} and holds {t.dtype}"
                raise EarthPriorError(f"{what}: give one timestep, an integer, or one for each of the chips")
            # A GPU would have to wait for the answer, so that only what lies on the host is looked at.
            if t.device.type == "cpu" and not bool(((t >= 0) & (t <= last)).all()):
                raise EarthPriorError(f"t: {t.tolist()} are no timesteps of this backbone - choose 0 to {last}")
            return t.to(x0.device)
        step = self.t if t is None else int(t)
        if not 0 <= step <= last:
            raise EarthPriorError(f"t: {step} is no timestep of this backbone - choose 0 to {last}")
        return torch.full((x0.shape[0],), step, device=x0.device)


def read(path: str | Path) -> Backbone:
    """The backbone that `earthprior export` wrote.

    Args:
        path: The folder, or the .safetensors file in it.

    Raises:
        EarthPriorError: A file is missing, damaged, or not of the other.
    """
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    weights = path if path.suffix == ".safetensors" else folder / WEIGHTS
    try:
        description = read_json(folder / CONFIG)
        found = description["format"], set(description) >= {"network", "bands", "serving", "normalization"}
    except FileNotFoundError:
        raise EarthPriorError(f"{folder / CONFIG} is missing; {WEIGHTS} cannot be read without it") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EarthPriorError(f"{folder / CONFIG} cannot be read ({error}); export the backbone again") from None
    if found != (FORMAT, True):
        raise EarthPriorError(f"{folder / CONFIG} is not what this version's `earthprior export` writes")
    try:
        tensors = read_tensors(weights)
    except FileNotFoundError:
        raise EarthPriorError(f"{weights} is missing; export the backbone again") from None
    except (OSError, TensorFileError) as error:
        raise EarthPriorError(f"{weights} {error}; export the backbone again") from None
    try:
        return Backbone(description, tensors)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise EarthPriorError(f"{folder / CONFIG} describes no backbone ({why}); export the backbone again") from None


def _network(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The network with its weights; its own random ones are never drawn."""
    section = description["network"]
    if section["name"] not in NETWORKS:
        raise EarthPriorError(f"network: {section['name']!r} is unknown - this version knows {', '.join(NETWORKS)}")
    channels = input_channels(description["precondition"], len(description["bands"]))
    with torch.device("meta"):
        network = NETWORKS[section["name"]](channels, section["out_channels"], **section["options"])
    wanted = {f"network.{key}": tensor for key, tensor in network.state_dict().items()}
    wanted |= {key: tensors[key] for key in TABLES if key in tensors}
    found = {key: tensor for key, tensor in tensors.items() if not key.startswith("linear.")}
    faults = mismatches(wanted, found) + [f"missing: {key}" for key in TABLES if key not in tensors]
    if faults:
        raise EarthPriorError(f"the weights do not fit the backbone's description ({listed(faults)})")
    own = {key: tensors[f"network.{key}"].clone() for key in network.state_dict()}
    network.load_state_dict(own, strict=True, assign=True)
    for part in network.READ_OUT:
        # It has no part in features; several processes wait for the gradient of every weight that asks for one.
        network.get_submodule(part).requires_grad_(False)
    return network


def _linear(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LinearDenoiser | None:
    """The linear filter, where the precondition needs one."""
    if description["precondition"] == "none":
        return None
    parts = {name: tensors[f"linear.{name}"] for name in FILTER if f"linear.{name}" in tensors}
    width, bands = description.get("linear_width"), len(description["bands"])
    height = parts["eigenvalues"].shape[0] if "eigenvalues" in parts else 0
    half = (width or 0) // 2 + 1
    shapes = {"mean": (bands,), "std": (), "eigenvalues": (height, half, bands)}
    shapes["eigenvectors"] = (height, half, bands, bands, 2)
    wanted = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if width is None or (faults := mismatches(wanted, parts)):
        raise EarthPriorError(
            f"the linear filter does not fit the backbone's description ({listed(faults) if width else 'no width'})"
        )
    vectors = torch.view_as_complex(parts["eigenvectors"].float().contiguous())
    return LinearDenoiser(parts["mean"], parts["std"], parts["eigenvalues"], vectors, int(width))
