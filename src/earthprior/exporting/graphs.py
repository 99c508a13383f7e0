"""The features as graphs that run without this package: torch.export and ONNX, each compared with the backbone."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from earthprior.backbone import Backbone
from earthprior.errors import EarthPriorError
from earthprior.files import replacing

TOLERANCE = 1e-3
"""Largest difference that is rounding, as a share of a level's largest value."""

INPUT = "x0"


class _Features(nn.Module):
    """The backbone at the level and side that serve best, as a tuple, which graphs want."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x0: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(x0))


def write_graphs(backbone: Backbone, folder: Path) -> dict[str, dict[str, Any]]:
    """Write GRAPHS, and say how far each is from the backbone.

    Batches may have any size. Height and width may be any multiples of the network's stride; with the precondition
    wiener, whose filter is made for one size, they are `crop_px`.

    Args:
        backbone: On the CPU, in evaluation mode.
        folder: Where.

    Returns:
        By file name: "max_abs_difference", "largest_value", and "height" and "width" of its input; or "left_out", why
        the exporter of this torch cannot write it.

    Raises:
        EarthPriorError: A graph differs by more than TOLERANCE.
    """
    fixed = backbone.precondition == "wiener"
    stride, size = int(backbone.network.stride), backbone.crop_px
    # A dimension of 1 would be taken for a constant.
    shape = (2, len(backbone.bands), *([size] * 2 if fixed else [4 * stride, 6 * stride]))
    others = [(1, *shape[1:])] if fixed else [(1, *shape[1:]), (3, shape[1], 2 * stride, 8 * stride)]
    side = str(size) if fixed else f"multiples of {stride}"
    told: dict[str, dict[str, Any]] = {}
    with torch.no_grad(), _quiet():
        program = _traced(_Features(backbone).eval(), torch.zeros(shape), stride, fixed)
    for name, make in GRAPHS.items():
        with torch.no_grad(), _quiet():
            try:
                run = make(program, folder / name)
            except Exception as error:  # noqa: BLE001 - exporters raise whatever they like
                (folder / name).unlink(missing_ok=True)
                why = str(error).strip().splitlines() or [""]
                told[name] = {"left_out": f"{type(error).__name__}: {why[0][:200]}"}
                continue
            differences = [_difference(backbone, run, sizes) for sizes in (shape, *others)]
        worst, largest = max(differences), max(value for _, value in differences)
        if not worst[0] <= TOLERANCE * largest:
            raise EarthPriorError(
                f"{name} differs from the backbone by {worst[0]:.2e} where the largest value is {largest:.3g}: that is "
                "more than rounding, so it must not be used; report this with the versions of torch and onnx"
            )
        told[name] = {"max_abs_difference": worst[0], "largest_value": largest, "height": side, "width": side}
    return told


Run = Callable[[Tensor], Sequence[Tensor]]


def _traced(features: nn.Module, example: Tensor, stride: int, fixed: bool) -> ExportedProgram:
    return torch.export.export(features, (example,), dynamic_shapes=_dynamic(stride, fixed))


def _torch_export(program: ExportedProgram, path: Path) -> Run:
    """`torch.export.load(path).module()(x0)`."""
    with replacing(path) as temporary:
        torch.export.save(program, temporary)
    read: Run = torch.export.load(path).module()
    return read


def _onnx(program: ExportedProgram, path: Path) -> Run:
    """A graph with its weights inside, run by onnxruntime."""
    import onnxruntime

    levels = [f"level_{index}" for index in range(len(program.graph_signature.user_outputs))]
    graph = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=levels)
    assert graph is not None
    with replacing(path) as temporary:
        graph.save(str(temporary), external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x0: [torch.from_numpy(level) for level in session.run(None, {INPUT: x0.numpy()})]


GRAPHS: dict[str, Callable[[ExportedProgram, Path], Run]] = {
    "backbone.pt2": _torch_export,
    "backbone.onnx": _onnx,
}


def _dynamic(stride: int, fixed: bool) -> dict[str, dict[int, Any]]:
    batch = torch.export.Dim("batch", min=1)
    if fixed:
        return {INPUT: {0: batch}}
    rows, columns = torch.export.Dim("rows", min=1), torch.export.Dim("columns", min=1)
    return {INPUT: {0: batch, 2: stride * rows, 3: stride * columns}}


def _difference(backbone: Backbone, run: Run, shape: Sequence[int]) -> tuple[float, float]:
    """The largest difference, and the largest value."""
    x0 = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    wanted, found = backbone(x0), run(x0)
    if [level.shape for level in wanted] != [level.shape for level in found]:
        return float("inf"), 1.0
    differences = [float((one - other).abs().max()) for one, other in zip(wanted, found, strict=True)]
    return max(differences), max(float(level.abs().max()) for level in wanted)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' talk of what they skip and deprecate."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
