"""How error is measured in training: prediction against target, over valid pixels only.

A loss takes prediction and target (B, C, H, W) and valid (B, 1, H, W) bool, and gives one float32 value per chip, (B,),
also under autocast. A chip without valid pixels has loss 0, and what lies under invalid pixels (NaN included) reaches
neither value nor gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from earthprior.networks.vgg16 import VGG16, read_weights
from earthprior.params import Params

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

SSIM_SIGMA_PX = 1.5
SSIM_RADIUS_PX = 5

VGG_LAYERS = (3, 8)
"""relu1_2 and relu2_2, the layers that the tutorial compares."""

GREY_MEAN, GREY_STD = 0.449, 0.226
"""Of ImageNet's pixels in [0, 1]: the means over its three bands of mean and standard deviation."""


def mse(error: Tensor) -> Tensor:
    """Squared error."""
    return error**2


def l1(error: Tensor) -> Tensor:
    """Absolute error."""
    return error.abs()


def charbonnier(error: Tensor) -> Tensor:
    """sqrt(error^2 + 0.001^2), a smooth absolute error. Source: Lai et al. 2017, arXiv:1704.03915, Section 3.2."""
    return torch.sqrt(error**2 + 1e-6)


def mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of (B, C, H, W) over bands and valid (B, 1, H, W) pixels, (B,); 0 for a chip without valid pixels."""
    count = valid.sum((1, 2, 3)) * values.shape[1]
    return torch.where(valid, values, 0.0).sum((1, 2, 3)) / count.clamp(min=1)


def one_minus_ssim(prediction: Tensor, target: Tensor, valid: Tensor, data_range: float) -> Tensor:
    """1 - SSIM around each pixel and in each band, (B, C, H, W), in [0, 2]: 0 where both are the same.

    With m, v and c the local means, variances and covariance in an 11 x 11 Gaussian window of sigma 1.5 px,
    SSIM = (2 m_p m_t + C1) (2 c + C2) / ((m_p^2 + m_t^2 + C1) (v_p + v_t + C2)), C1 = (0.01 L)^2, C2 = (0.03 L)^2.
    Written with d = prediction - target as (1 - m_d^2 / (...)) (1 - v_d / (...)), so that equal images give 1 exactly
    and a small error is not lost in the rounding of two large terms.

    At borders and beside invalid pixels the window holds valid pixels of the chip only, its weights summing to 1. The
    eofm-tutorial pads with zeros instead, as if the world ended there in value 0, which differs in a 5 px frame.

    Args:
        prediction: (B, C, H, W), finite at invalid pixels too.
        target: Likewise.
        valid: (B, 1, H, W) bool.
        data_range: L, what the values span.

    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, Equation 13; the windows Knutsson & Westin 1993,
        doi:10.1109/CVPR.1993.341081 (normalized convolution).
    """
    weight = valid.to(prediction.dtype)
    rows, columns = _window(prediction, -2), _window(prediction, -1)
    total = rows @ weight @ columns
    # Every valid pixel is in its own window; where no pixel is, the value is not used.
    total = torch.where(total > 0, total, 1.0)
    # SSIM's variances do not know the mean, and are rounded less without it.
    centre = mean_per_band(target, valid)[..., None, None]
    p, t, d = prediction - centre, target - centre, prediction - target
    moments = rows @ (weight * torch.stack([t, d, p**2, t**2, d**2])) @ columns / total
    mean_t, mean_d, square_p, square_t, square_d = moments.unbind()
    mean_p = mean_t + mean_d
    variance_p, variance_t, variance_d = (
        (square - mean**2).clamp(min=0) for square, mean in ((square_p, mean_p), (square_t, mean_t), (square_d, mean_d))
    )
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = mean_d**2 / ((mean_p + centre) ** 2 + (mean_t + centre) ** 2 + c1)
    structure = variance_d / (variance_p + variance_t + c2)
    return luminance + structure - luminance * structure


def normal_kl(prediction: Tensor, target: Tensor, valid: Tensor, data_range: float) -> Tensor:
    """KL(N(m_p, s_p) || N(m_t, s_t)) per chip, (B,), nats: how unlike the two are as heaps of values.

    log(s_t / s_p) + (s_p^2 + (m_p - m_t)^2) / (2 s_t^2) - 1/2, with mean m and unbiased standard deviation s over the
    bands and valid pixels of the chip. The eofm-tutorial takes them over the batch; with one chip both are the same.

    A deviation below 0.03 L, L = data_range, counts as that much, as in SSIM's constant: a chip without contrast would
    be a spike that nothing resembles, and own the whole batch's gradient.
    """
    count = valid.sum((1, 2, 3)) * prediction.shape[1]
    mean_p, mean_t = mean_over_valid(prediction, valid), mean_over_valid(target, valid)
    variance_p, variance_t = (
        (torch.where(valid, values - mean[:, None, None, None], 0.0).square().sum((1, 2, 3)) / (count - 1).clamp(min=1))
        .clamp(min=(0.03 * data_range) ** 2)
        for values, mean in ((prediction, mean_p), (target, mean_t))
    )  # fmt: skip
    ratio = variance_p / variance_t
    return 0.5 * (ratio - 1 - ratio.log() + (mean_p - mean_t) ** 2 / variance_t)


def mean_per_band(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of (B, C, H, W) over valid (B, 1, H, W) pixels, (B, C); 0 without any."""
    return torch.where(valid, values, 0.0).sum((2, 3)) / valid.sum((2, 3)).clamp(min=1)


def _window(image: Tensor, dim: int) -> Tensor:
    """The Gaussian window as a banded matrix (n, n), n = image.shape[dim], not normalized.

    A product of matrices, unlike a convolution, keeps float32's precision on GPUs by default, which variances need.
    """
    place = torch.arange(image.shape[dim], device=image.device)
    distance = (place[:, None] - place).to(image.dtype)
    return torch.exp(-0.5 * (distance / SSIM_SIGMA_PX) ** 2) * (distance.abs() <= SSIM_RADIUS_PX)


def over_valid(measure: LossFunction) -> LossFunction:
    """The measure in float32, autocast or not, of images that are both 0 at invalid pixels."""

    def loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        with torch.autocast(prediction.device.type, enabled=False):
            prediction, target = (torch.where(valid, values.float(), 0.0) for values in (prediction, target))
            return measure(prediction, target, valid)

    return loss


def pixelwise(measure: Callable[[Tensor], Tensor]) -> LossFunction:
    """The mean of a measure of each pixel's error."""
    return lambda prediction, target, valid: mean_over_valid(measure(prediction - target), valid)


def ssim(data_range: float) -> LossFunction:
    """The mean of 1 - SSIM."""
    return lambda prediction, target, valid: mean_over_valid(
        one_minus_ssim(prediction, target, valid, data_range), valid
    )


def hybrid_light(alpha: float, beta: float, gamma: float, data_range: float) -> LossFunction:
    """alpha mse + beta (1 - SSIM) + gamma KL; a part of weight 0 is not computed."""
    kl = partial(normal_kl, data_range=data_range)
    parts = ((alpha, pixelwise(mse)), (beta, ssim(data_range)), (gamma, kl))
    wanted = [(weight, part) for weight, part in parts if weight > 0]
    return lambda *images: torch.stack([weight * part(*images) for weight, part in wanted]).sum(0)


class Perceptual(nn.Module):
    """The mean absolute difference of VGG16's feature maps, summed over VGG_LAYERS.

    VGG16 sees three bands, chips have any number: each band is shown by itself as a grey image, and the mean over bands
    is taken. No band is left out or mixed with another; colour is not judged, and C bands cost C passes (in one batch).
    Values x, noise and residuals of standard deviation 1 and z-values alike, become the grey 0.449 + 0.226 x of
    an image in [0, 1], so that x is spread as ImageNet's pixels are, and then pass ImageNet's normalization.

    Invalid pixels are 0 in both images; a feature map's position counts by the share of valid pixels under it.

    The weights are read on the first call, so that a pretrained network needs none to be evaluated; they are in no
    state_dict, and no gradient reaches them or the target.

    Args:
        weights: Path or URL, see `networks.vgg16.read_weights`.

    Source: Johnson et al. 2016, arXiv:1603.08155, Section 3.2, with the absolute difference of the eofm-tutorial.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        self._weights = weights
        self._vgg: VGG16 | None = None

    def forward(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """The loss of each chip, (B,).

        Raises:
            ParamsError: The weights cannot be had; on the first call.
        """
        return over_valid(self._distance)(prediction, target, valid)

    def _distance(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        if self._vgg is None:
            self._vgg = VGG16(read_weights(self._weights), VGG_LAYERS).to(prediction.device)
        total = prediction.new_zeros(len(prediction))
        with torch.no_grad():
            wanted = self._vgg(_grey(target))
        for found, map_wanted in zip(self._vgg(_grey(prediction)), wanted, strict=True):
            share = nn.functional.adaptive_avg_pool2d(valid.float(), found.shape[2:])
            difference = (found - map_wanted).abs().mean(1).unflatten(0, prediction.shape[:2])
            total = total + (share * difference).mean(1).sum((1, 2)) / share.sum((1, 2, 3)).clamp(min=1e-6)
        return total


def _grey(chips: Tensor) -> Tensor:
    """Each band of (B, C, H, W) as a grey image in ImageNet's range, (B * C, 3, H, W)."""
    return (GREY_MEAN + GREY_STD * chips.flatten(0, 1)[:, None]).expand(-1, 3, -1, -1)


LOSSES: dict[str, Callable[[Params], LossFunction]] = {
    "mse": lambda params: over_valid(pixelwise(mse)),
    "l1": lambda params: over_valid(pixelwise(l1)),
    "charbonnier": lambda params: over_valid(pixelwise(charbonnier)),
    "ssim": lambda params: over_valid(ssim(params.ssim.data_range)),
    "perceptual": lambda params: Perceptual(str(params.perceptual.weights)),
    "hybrid_light": lambda params: over_valid(
        hybrid_light(**params.loss_weights.model_dump(), data_range=params.ssim.data_range)
    ),
}
"""Makers of losses by name, each from the whole of params.yaml."""
