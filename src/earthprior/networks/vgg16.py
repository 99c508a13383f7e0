"""VGG16's convolutions, with published weights, as a fixed measure of what images look like.

Declared here because torchvision, where the weights come from, cannot be relied on to import.

Source: Simonyan & Zisserman 2015, arXiv:1409.1556, Table 1, column D.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from earthprior.errors import ParamsError
from earthprior.files import replacing, sha256_file
from earthprior.networks.tensor_file import TensorFileError, read_tensors

logger = logging.getLogger(__name__)

STACK = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the 3 x 3 convolutions; each is followed by a ReLU, each group by a 2 x 2 max pooling."""

LAYERS = tuple(kind for group in STACK for kind in ("convolution", "relu") * len(group) + ("pool",))
"""What stands at each index of torchvision's `features`."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MOST_BYTES = 2**30
"""Of a download; torchvision's file has half of that."""

TIMEOUT_SECONDS = 60
"""Of a server that has gone silent."""

REMEDY = (
    "Download https://download.pytorch.org/models/vgg16-397923af.pth (torchvision's, 528 MB) and give its path, or "
    "give that URL"
)


def _shapes() -> dict[str, tuple[int, ...]]:
    places = [index for index, kind in enumerate(LAYERS) if kind == "convolution"]
    widths = [3, *(width for group in STACK for width in group)]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, channels, width in zip(places, widths, widths[1:], strict=False):
        shapes[f"features.{index}.weight"] = (width, channels, 3, 3)
        shapes[f"features.{index}.bias"] = (width,)
    return shapes


SHAPES = _shapes()
"""The weights by torchvision's names."""


class VGG16(nn.Module):
    """Maps images (B, 3, H, W) in [0, 1] to feature maps, after ImageNet's normalization.

    Only what lies before the last layer wanted is kept. The weights are buffers that no state_dict holds: nothing
    trains them and no checkpoint carries them.

    Args:
        weights: Tensors of the names and shapes of SHAPES.
        layers: Indices into LAYERS, rising; their outputs are given.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Mapping[str, Tensor], layers: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(-1, 1, 1), persistent=False)
        for index, kind in enumerate(LAYERS[: layers[-1] + 1]):
            if kind == "convolution":
                for part in ("weight", "bias"):
                    values = weights[f"features.{index}.{part}"].detach().float().clone()
                    self.register_buffer(f"{part}_{index}", values, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The outputs of the layers wanted, each (B, D, H / 2^i, W / 2^i) rounded down, i poolings deep."""
        x = (images - self.mean) / self.std
        outputs = []
        for index, kind in enumerate(LAYERS[: self.layers[-1] + 1]):
            if kind == "convolution":
                x = F.conv2d(x, self.get_buffer(f"weight_{index}"), self.get_buffer(f"bias_{index}"), padding=1)
            else:
                x = F.relu(x) if kind == "relu" else F.max_pool2d(x, 2)
            if index in self.layers:
                outputs.append(x)
        return outputs


def read_weights(source: str) -> dict[str, Tensor]:
    """The convolutions' weights from a .safetensors file or one of torch.save, every name and shape checked.

    They must be made for ImageNet-normalized images. What a classifier on top would need is ignored; code in a pickle
    is never run.

    Args:
        source: `perceptual.weights`: a path, a file:// URL, or an https:// URL, which is downloaded once, into torch's
            cache for hubs.

    Raises:
        ParamsError: The file cannot be had, cannot be read, or holds something else.
    """
    path = _local_path(source)
    try:
        tensors = read_tensors(path)
    except OSError as error:
        raise _fault(source, f"cannot be read ({error.strerror})", REMEDY) from None
    except TensorFileError as error:
        raise _fault(source, str(error), REMEDY if str(path) == source else f"Remove {path}. {REMEDY}") from None
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    faults = [f"{name} is missing" for name in SHAPES if name not in tensors]
    faults += [f"{name} is unknown" for name in tensors if name not in SHAPES]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in SHAPES.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if faults:
        others = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise _fault(source, f"does not hold VGG16's weights: {'; '.join(faults[:3])}{others}", REMEDY)
    return tensors


def weights_sha256(source: str) -> str:
    """The SHA-256 of the file behind `perceptual.weights`: what a path or URL names may change.

    Raises:
        ParamsError: The file cannot be had.
    """
    try:
        return sha256_file(_local_path(source))
    except OSError as error:
        raise _fault(source, f"cannot be read ({error.strerror})", REMEDY) from None


def _local_path(source: str) -> Path:
    """Where the file is, after a download if need be."""
    try:
        if "\0" in source:
            raise ValueError("a path holds no null bytes")
        if "://" not in source:
            return Path(source).expanduser()
        parts = urlsplit(source)
    except (ValueError, RuntimeError) as error:
        raise _fault(repr(source), f"is neither a path nor a URL ({error})", REMEDY) from None
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    if parts.scheme != "https":
        why = f"is a URL of the kind {parts.scheme}, which cannot be downloaded"
        raise _fault(source, why, "Use https:// or a path")
    try:
        return _download(source)
    except (OSError, ValueError, HTTPException) as error:
        raise _fault(source, f"cannot be downloaded ({error})", REMEDY) from None


def _download(url: str) -> Path:
    """The file behind an https URL in torch's cache for hubs; a name like vgg16-397923af.pth holds its own checksum."""
    name = PurePosixPath(urlsplit(url).path).name
    checksum = re.search(r"-([0-9a-f]{8,64})\.", name)
    if not checksum:
        # Equal names at different places are different files.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # One of several processes downloads, the others wait.
    with FileLock(f"{path}.lock"):
        if path.exists():
            return path
        logger.info("downloading %s", url)
        with replacing(path) as temporary, temporary.open("w+b") as handle:
            with urlopen(url, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - the caller let only https through
                while part := answer.read(2**20):
                    handle.write(part)
                    if handle.tell() > MOST_BYTES:
                        raise ValueError(f"it has more than {MOST_BYTES:,} bytes, and VGG16 has half of that")
                if answer.length:
                    raise OSError(f"the connection broke off {answer.length} bytes before the end")
            handle.seek(0)
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            if checksum and not digest.startswith(checksum[1]):
                raise ValueError(f"its SHA-256 is {digest}, not {checksum[1]}... as its name says")
    return path


def _fault(source: str, why: str, remedy: str) -> ParamsError:
    return ParamsError(f"perceptual.weights: {source} {why}. {remedy}.")
