"""The linear denoiser: a Wiener filter per spatial frequency, across bands, fitted on the training chips.

Nothing is learned by gradient, and yet it takes away most of the noise; so it is the baseline that a network has to
beat, and, as a skip (`diffusion.precondition: wiener`), the estimate that a network refines. A filter fits chips of one
size only; for another one `sized` makes a filter of the same spectra.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from earthprior.diffusion.spectra import resampled
from earthprior.errors import DataError
from earthprior.files import write_atomic

if TYPE_CHECKING:
    from earthprior.chips.batch import Batch
    from earthprior.diffusion.schedule import NoiseSchedule

SIZES_KEPT = 4
"""Filters of other sizes that are remembered; one of 512 px takes 20 MB and seconds to make."""


class LinearDenoiser(nn.Module):
    """x0_hat = mean + U diag(alpha l / (alpha^2 l + sigma^2)) U^H (xt - alpha mean), per spatial frequency.

    U diag(l) U^H is the C x C cross-spectral matrix of the chips at that frequency, mean the bands' means.

    Args:
        mean: (C,) band means of x0.
        std: () population standard deviation of x0 over all valid pixels and bands.
        eigenvalues: (H, W // 2 + 1, C), power in x0 units squared, orthonormal FFT.
        eigenvectors: (H, W // 2 + 1, C, C) complex, columns.
        width: W, px, which the half spectrum alone does not tell.

    Source: the minimum-mean-square-error estimate for Gaussian data, e.g. Gonzalez & Woods, Digital Image Processing,
        Section 5.8, here with a matrix per frequency.
    """

    mean: Tensor
    std: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(self, mean: Tensor, std: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, width: int) -> None:
        super().__init__()
        self.width = width
        # No submodules: they would come into state_dicts, and are the work of a moment.
        self._sized: dict[tuple[int, int, torch.device], LinearDenoiser] = {}
        self.register_buffer("mean", mean.float().reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", std.float(), persistent=False)
        self.register_buffer("eigenvalues", eigenvalues.float(), persistent=False)
        self.register_buffer("eigenvectors", eigenvectors.to(torch.complex64), persistent=False)

    @property
    def bands(self) -> int:
        """C."""
        return int(self.eigenvalues.shape[-1])

    @property
    def height(self) -> int:
        """H, px."""
        return int(self.eigenvalues.shape[0])

    def denoise(self, xt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The linear estimate of x0.

        Args:
            xt: Noisy chips (B, C, H, W), float32.
            alpha: (B, 1, 1, 1).
            sigma: (B, 1, 1, 1).

        Returns:
            x0_hat (B, C, H, W), float32.

        Raises:
            ValueError: The chips are not of the size that the filter was fitted on.
        """
        if xt.shape[-2:] != (self.height, self.width):
            raise ValueError(f"the linear denoiser fits {self.height} x {self.width} px, not {tuple(xt.shape[-2:])}")
        with torch.autocast(xt.device.type, enabled=False):
            centred = torch.fft.rfft2(xt.float() - alpha * self.mean, norm="ortho")
            # (B, C, H, F) -> (H, F, C, B): one small matrix product per frequency, all chips at once.
            along = self.eigenvectors.mH @ centred.permute(2, 3, 1, 0)
            power = self.eigenvalues[..., None]
            a, s = alpha.reshape(-1), sigma.reshape(-1)
            estimate = self.eigenvectors @ (along * (a * power / (a**2 * power + s**2)))
            x0_hat: Tensor = torch.fft.irfft2(estimate.permute(3, 2, 0, 1), s=(self.height, self.width), norm="ortho")
            return x0_hat.add(self.mean)

    def sized(self, height: int, width: int) -> LinearDenoiser:
        """The filter for chips of another size, by `spectra.resampled`; itself at its own size.

        Args:
            height: px.
            width: px.
        """
        if (height, width) == (self.height, self.width):
            return self
        key = (height, width, self.mean.device)
        if key not in self._sized:
            while len(self._sized) >= SIZES_KEPT:
                self._sized.pop(next(iter(self._sized)))
            with torch.no_grad():
                spectra = resampled(self.eigenvalues, self.eigenvectors, self.width, (height, width))
            self._sized[key] = LinearDenoiser(self.mean, self.std, *spectra, width)
        return self._sized[key]

    def expected_mse(self, schedule: NoiseSchedule) -> Tensor:
        """The filter's own mean squared error in x0 at every timestep, (T,) float32.

        Mean over frequencies and bands of l sigma^2 / (alpha^2 l + sigma^2).
        """
        # Not 1 - alpha_bar, which in float32 is off by a per cent at the first timestep.
        alpha_sq = schedule.alpha.double()[:, None] ** 2
        sigma_sq = schedule.sigma.double()[:, None] ** 2
        # Frequencies inside the half spectrum stand for two.
        weight = torch.full((self.eigenvalues.shape[1],), 2.0, dtype=torch.float64, device=self.eigenvalues.device)
        weight[0] = 1
        if self.width % 2 == 0:
            weight[-1] = 1
        total = torch.zeros(schedule.timesteps, dtype=torch.float64, device=weight.device)
        for row in self.eigenvalues.double():
            power = row.flatten()[None]
            error = power * sigma_sq / (alpha_sq * power + sigma_sq)
            total += (error * weight.repeat_interleave(self.bands)[None]).sum(1)
        return (total / (self.height * self.width * self.bands)).float()

    def parts(self) -> dict[str, Tensor]:
        """All its numbers but the width, by name, real and on the CPU."""
        tensors = {
            "mean": self.mean.flatten(),
            "std": self.std,
            "eigenvalues": self.eigenvalues,
            "eigenvectors": torch.view_as_real(self.eigenvectors),
        }
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(self, path: Path) -> None:
        """Write the filter as safetensors, atomically."""
        write_atomic(path, save(self.parts(), metadata={"width": str(self.width)}))

    @classmethod
    def load(cls, path: Path) -> LinearDenoiser:
        """Read what `save` wrote.

        Raises:
            DataError: The file is damaged, or holds something else.
        """
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as handle:
                width = int((handle.metadata() or {})["width"])
        except (SafetensorError, LookupError, ValueError) as error:
            raise DataError(f"{path.name} is damaged ({error})") from None
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.dtype == torch.float32}
        *frequencies, bands = found.get("eigenvalues") or (0,)
        shapes = {"mean": (bands,), "std": (), "eigenvalues": (*frequencies, bands)}
        shapes["eigenvectors"] = (*frequencies, bands, bands, 2)
        # The half spectrum of W columns has W // 2 + 1.
        if [width // 2 + 1] != frequencies[1:] or any(found.get(name) != shape for name, shape in shapes.items()):
            raise DataError(f"{path.name} is damaged (its tensors are no linear denoiser's)")
        vectors = torch.view_as_complex(tensors["eigenvectors"])
        return cls(tensors["mean"], tensors["std"], tensors["eigenvalues"], vectors, width)

    def digest(self) -> str:
        """SHA-256 of all its numbers, by which a run that continues knows it again."""
        parts = (self.mean, self.std, self.eigenvalues, torch.view_as_real(self.eigenvectors))
        content = b"".join(part.detach().cpu().contiguous().numpy().tobytes() for part in parts)
        return hashlib.sha256(content + str(self.width).encode()).hexdigest()


def fit(batches: Iterable[Batch], average_d4: bool) -> LinearDenoiser:
    """Fit the linear denoiser on clean crops of one size.

    Args:
        batches: Crops (B, C, H, W); those with invalid pixels count for mean and std, but not for the spectra.
        average_d4: Average the spectra over the eight flips and quarter turns (square crops), which steadies a fit on
            few chips.

    Raises:
        DataError: No crop is free of invalid pixels.
    """
    count = 0
    sums: Tensor | None = None
    spectra: Tensor | None = None
    centre: Tensor | None = None
    crops = 0
    size = (0, 0)
    for batch in batches:
        x0 = batch.x0.double()
        size = (x0.shape[-2], x0.shape[-1])
        masked = torch.where(batch.valid, x0, 0.0)
        moments = torch.stack([masked.sum((0, 2, 3)), (masked**2).sum((0, 2, 3))])
        sums = moments if sums is None else sums + moments
        count += int(batch.valid.sum())
        whole = x0[batch.valid.flatten(1).all(1)]
        if len(whole) == 0:
            continue  # which the FFT refuses
        for view in _d4_views(whole) if average_d4 else [whole]:
            spectrum = torch.fft.rfft2(view, norm="ortho").permute(2, 3, 1, 0)
            outer = spectrum @ spectrum.mH
            spectra = outer if spectra is None else spectra + outer
            centre = spectrum[0, 0].sum(1) if centre is None else centre + spectrum[0, 0].sum(1)
            crops += view.shape[0]
    if sums is None or spectra is None or centre is None or crops == 0:
        raise DataError(
            f"no {size[0]} px crop of the training chips is free of invalid pixels, so the linear denoiser cannot be "
            "fitted; lower data.crop_px, or check data.nodata"
        )
    mean = sums[0] / count
    std = (sums[1].sum() / (count * len(mean)) - (sums[0].sum() / (count * len(mean))) ** 2).clamp(min=0).sqrt()
    spectra, centre = spectra / crops, centre / crops
    # The chips' mean sits in the zero frequency; only the scatter about it is signal to be estimated. The crops that
    # the spectra are of may have another mean than all valid pixels, hence all four terms.
    dc = mean.to(spectra.dtype) * (size[0] * size[1]) ** 0.5
    spectra[0, 0] += torch.outer(dc, dc.conj()) - torch.outer(centre, dc.conj()) - torch.outer(dc, centre.conj())
    eigenvalues, eigenvectors = torch.linalg.eigh(spectra.cpu())
    floor = eigenvalues.amax() * 1e-12
    linear = LinearDenoiser(mean.cpu(), std.cpu(), eigenvalues.clamp(min=float(floor)), eigenvectors, size[1])
    return linear.to(sums.device)


def _d4_views(crops: Tensor) -> list[Tensor]:
    """The eight flips and quarter turns of square crops."""
    turned = [torch.rot90(crops, turns, (-2, -1)) for turns in range(4)]
    return turned + [view.flip(-1) for view in turned]
