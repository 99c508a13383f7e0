"""Finetuning in memory: from labelled chips to a network, by the very loop that pretrains; no files, no tracking.

`earthprior bench` fits dozens of networks so. The verb `finetune` adds what a long run needs, see `finetuning`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earthprior.backbone import Backbone
from earthprior.chips.batch import LABEL, Batch, prepare
from earthprior.chips.catalog import ChipRow
from earthprior.chips.crops import grid_crops
from earthprior.chips.loader import RawBatch, load_batches
from earthprior.chips.normalize import Affine
from earthprior.chips.selection import spread
from earthprior.diffusion.precondition import input_channels
from earthprior.downstream import labels as labels_module
from earthprior.downstream.judging import LabelledValidation
from earthprior.downstream.labels import Labels
from earthprior.downstream.saved import FORMAT, Finetuned, network_of
from earthprior.downstream.task import DownstreamTask
from earthprior.errors import ParamsError
from earthprior.networks import NETWORKS
from earthprior.params import DownstreamParams
from earthprior.randomness import seed_of
from earthprior.training.checkpoint import CheckpointStore
from earthprior.training.distributed import World, unwrap
from earthprior.training.loop import Outcome, Trainer
from earthprior.training.order import TrainingChips
from earthprior.training.progress import Progress
from earthprior.training.stop import StopRequest

STANDARDIZING_CROPS = 256
"""That a head's features are standardized on, about; deviations are 2 % off on them, and no more."""

CHIPS_AT_ONCE = 4
KEPT_BYTES = 2_000_000_000
"""More of chips than this is not kept in memory, but read again at each visit."""

NEVER_SECONDS = 1e12


@dataclass(frozen=True)
class Setup:
    """What is finetuned on what.

    Attributes:
        params: Of the finetuning.
        backbone: That it starts from; it is copied.
        labels: Of the catalog.
        device: Where it is trained.
    """

    params: DownstreamParams
    backbone: Backbone
    labels: Labels
    device: torch.device


class BackboneNormalizer:
    """A backbone's own normalization, as the loop takes it."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def normalize(self, raw: Tensor, valid: Tensor) -> tuple[Tensor, Affine]:
        """x0, and no way back: nobody here asks for it."""
        nothing = torch.zeros(len(raw), raw.shape[1], 1, 1, device=raw.device)
        return self._backbone.normalize(raw, valid), Affine(nothing, nothing + 1)


def reader(setup: Setup, rows: Sequence[ChipRow]) -> Callable[[Iterable[Sequence[int]]], Generator[RawBatch]]:
    """What reads chips for the loop: from memory where they are few."""
    data = setup.params.data
    # Two bytes a value, and the label's.
    if len(rows) * data.read_px**2 * (2 * len(data.bands) + 3) <= KEPT_BYTES:
        return KeptChips(setup, rows).read
    return lambda order: read(setup, rows, order)


class KeptChips:
    """Labelled chips in memory, read once: where they are few, decoding them again and again would cost the most.

    Args:
        setup: Whose chips they are.
        rows: The chips.
    """

    def __init__(self, setup: Setup, rows: Sequence[ChipRow]) -> None:
        self._rows = list(rows)
        (self._chips,) = read(setup, self._rows, [range(len(self._rows))])

    def read(self, order: Iterable[Sequence[int]]) -> Generator[RawBatch]:
        """As `loader.load_batches`."""
        kept = self._chips
        for indices in order:
            place = torch.tensor(list(indices))
            extra = {name: tensor[place] for name, tensor in kept.extra.items()}
            # uint16 lacks indexing in torch, as most operations.
            pixels = torch.from_numpy(kept.pixels.numpy()[place.numpy()])
            yield RawBatch(pixels, kept.valid[place], [self._rows[index] for index in indices], extra)


def read(setup: Setup, rows: Sequence[ChipRow], order: Iterable[Sequence[int]]) -> Generator[RawBatch]:
    """Raw chips with their labels."""
    labels, params = setup.labels, setup.params
    extra = {LABEL: labels.read}
    return load_batches(labels.folder, rows, order, labels.spec, params.operation.readers, extra=extra)


def whole_chips(setup: Setup, rows: Sequence[ChipRow]) -> Iterator[Batch]:
    """Whole chips with their labels, normalized, in their order, a few at a time."""
    return (batch for batch, _ in with_rows(setup, rows))


def with_rows(setup: Setup, rows: Sequence[ChipRow]) -> Iterator[tuple[Batch, list[ChipRow]]]:
    """`whole_chips`, each batch with its rows."""
    order = [range(first, min(first + CHIPS_AT_ONCE, len(rows))) for first in range(0, len(rows), CHIPS_AT_ONCE)]
    normalizer = BackboneNormalizer(setup.backbone)
    for raw in read(setup, rows, order):
        yield prepare(raw, normalizer, setup.device), raw.rows


def fit(setup: Setup, train_rows: Sequence[ChipRow], validate_rows: Sequence[ChipRow] = ()) -> Finetuned:
    """Finetune on some chips; the same call gives the same bits.

    Args:
        setup: What is finetuned.
        train_rows: Labelled chips.
        validate_rows: Labelled chips that choose the epoch where `keep` is best; without them nothing is judged.

    Raises:
        DivergedError: Loss or gradient became non-finite.
        DeviceMemoryError: There is too little memory.
        DataError: A chip or label cannot be read.
    """
    params = setup.params
    params = params.model_copy(
        update={"operation": params.operation.model_copy(update={"checkpoint_every_seconds": NEVER_SECONDS})}
    )
    trainer = make_trainer(
        Setup(params, setup.backbone, setup.labels, setup.device),
        TrainingChips(train_rows, reader(setup, train_rows), BackboneNormalizer(setup.backbone)),
        validate_rows,
        World(),
    )
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), "in memory", {})
        progress = Progress(trainer.total_steps, 0, params.epochs, enabled=False)
        outcome = trainer.run(store, lambda metrics, step, epoch: None, StopRequest(), progress)
    return finetuned(setup, trainer, outcome)


def make_trainer(setup: Setup, chips: TrainingChips, validate_rows: Sequence[ChipRow], world: World) -> Trainer:
    """The trainer at its first step.

    Args:
        setup: What is finetuned.
        chips: That it is trained on.
        validate_rows: See `fit`.
        world: This process among others.
    """
    params, labels, device = setup.params, setup.labels, setup.device
    check(params, setup.backbone)
    counts, scale = labels_module.facts(labels, chips.rows)
    description = describe(setup, scale)
    torch.manual_seed(seed_of(params.seed, "head"))
    network = network_of(copied(setup.backbone), description, params.train, params.last_levels).to(device).eval()
    network.backbone.network.activation_checkpointing = params.operation.activation_checkpointing
    standardize(setup, network, chips.rows)
    weights = labels_module.balanced(counts) if params.class_weights == "balanced" and len(counts) else None
    task = DownstreamTask(network, labels.task, weights, scale, params.lr_decay).to(device)
    validation = None
    if validate_rows:
        px, at_once = params.data.train_px, params.val_batch_size
        judged = list(validate_rows)
        validation = LabelledValidation(
            labels.task, len(labels.classes), lambda: with_rows(setup, judged), len(judged), px, at_once
        )
    return Trainer(params, task, chips, validation, device, world)


def finetuned(setup: Setup, trainer: Trainer, outcome: Outcome) -> Finetuned:
    """The averaged weights of a training that is done, the last ones or the best."""
    task = trainer.task
    assert isinstance(task, DownstreamTask)
    network = unwrap(task.network)
    network.load_state_dict(outcome.best if setup.params.keep == "best" else outcome.last)
    scale = (float(task.scale[0]), float(task.scale[1]))
    return Finetuned(network, describe(setup, scale))  # type: ignore[arg-type]


def describe(setup: Setup, scale: tuple[float, float]) -> dict[str, Any]:
    """See `Finetuned`."""
    params, backbone = setup.params, setup.backbone
    return {
        "format": FORMAT,
        "kind": setup.labels.task,
        "classes": list(setup.labels.classes),
        "label_column": setup.labels.column,
        "crop_px": params.data.train_px,
        "side": params.side or str(backbone.description["serving"].get("side", "decoder")),
        "t": backbone.t if params.t is None else params.t,
        "head": {"kind": params.head, "channels": params.head_channels},
        "scale": list(scale),
        "backbone": backbone.description,
    }


def check(params: DownstreamParams, backbone: Backbone) -> None:
    """Refuse what cannot be.

    Raises:
        ParamsError: Bands or timestep are not the backbone's, or nothing would be learned.
    """
    if tuple(params.data.bands) != backbone.bands:
        raise ParamsError(
            f"data.bands of downstream/params.yaml are {list(params.data.bands)}, the pretrained network knows "
            f"{list(backbone.bands)}; give the same names in the same order"
        )
    last = len(backbone.alpha) - 1
    if params.t is not None and params.t > last:
        raise ParamsError(f"t: {params.t} is no timestep of the pretrained network; give 0 to {last}, or null")


@torch.no_grad()
def standardize(setup: Setup, network: Any, rows: Sequence[ChipRow]) -> None:
    """Standardize the head's features on crops of the training chips."""
    params = setup.params
    px = params.data.train_px if setup.labels.task == "segmentation" else params.data.read_px
    chosen = spread(rows, STANDARDIZING_CROPS)

    def pyramids() -> Iterator[tuple[list[Tensor], Tensor]]:
        for chips in whole_chips(setup, chosen):
            crops = grid_crops(chips, px)
            step = max(1, len(crops) * len(chosen) // (STANDARDIZING_CROPS * len(chips)))
            part = crops[torch.arange(0, len(crops), step)]
            for first in range(0, len(part), params.val_batch_size):
                some = part[slice(first, first + params.val_batch_size)]
                yield network.pyramid(some.x0), some.valid

    network.head.standardize(pyramids())


def copied(backbone: Backbone) -> Backbone:
    """A backbone of its own weights."""
    return Backbone(backbone.description, backbone.tensors())


def untrained(backbone: Backbone, seed: int) -> Backbone:
    """The same network as before its pretraining, behind the same normalization: its weights are a function of seed."""
    network, channels = backbone.description["network"], input_channels(backbone.precondition, len(backbone.bands))
    torch.manual_seed(seed_of(seed, "weights"))
    fresh = NETWORKS[network["name"]](channels, network["out_channels"], **network["options"])
    own = {f"network.{name}": tensor for name, tensor in fresh.state_dict().items()}
    return Backbone(backbone.description, backbone.tensors() | own)
