"""Cross-spectral matrices of chips of one size, read at the frequencies of another size."""

from __future__ import annotations

import torch
from torch import Tensor


def resampled(eigenvalues: Tensor, eigenvectors: Tensor, width: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Spectra for chips of another size, over the same frequencies in cycles per px.

    With an orthonormal FFT the power at a frequency is that of the imagery, whatever the chip's size. So the C x C
    matrices are interpolated bilinearly over frequency, periodic in both directions; between positive matrices that
    gives positive ones. Below the lowest frequency that the fitted chips resolve, it is a guess between that one and
    the scatter of the chips' means.

    Args:
        eigenvalues: (H, W // 2 + 1, C).
        eigenvectors: (H, W // 2 + 1, C, C), complex columns.
        width: W, px.
        size: Height and width of the other chips, px.

    Returns:
        Eigenvalues and eigenvectors for that size, float32 and complex64.
    """
    vectors = eigenvectors.to(torch.complex128)
    matrices = (vectors * eigenvalues.double()[..., None, :]) @ vectors.mH
    height, half = matrices.shape[:2]
    # Of real chips the spectrum at -f is the conjugate of that at f.
    rows = -torch.arange(height, device=matrices.device) % height
    columns = width - torch.arange(half, width, device=matrices.device)
    whole = torch.cat([matrices, matrices[rows][:, columns].conj()], dim=1)
    wanted_rows = torch.fft.fftfreq(size[0], dtype=torch.float64, device=matrices.device)
    wanted_columns = torch.fft.rfftfreq(size[1], dtype=torch.float64, device=matrices.device)
    values, columns_of = torch.linalg.eigh(_at(_at(whole, wanted_rows, 0), wanted_columns, 1))
    return values.clamp(min=float(eigenvalues.min())).float(), columns_of.to(torch.complex64)


def _at(spectrum: Tensor, frequencies: Tensor, axis: int) -> Tensor:
    """Linear interpolation along one axis, which is periodic with one cycle per px."""
    count = spectrum.shape[axis]
    place = frequencies * count
    before = place.floor()
    weight = (place - before).reshape([-1 if dim == axis else 1 for dim in range(spectrum.ndim)])
    low = spectrum.index_select(axis, before.long() % count)
    high = spectrum.index_select(axis, (before.long() + 1) % count)
    return low * (1 - weight) + high * weight
