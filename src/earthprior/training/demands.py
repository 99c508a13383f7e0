"""What params.yaml asks of chips, processes and memory; refused before any work where they cannot give it."""

from __future__ import annotations

from earthprior import memory
from earthprior.errors import ParamsError
from earthprior.params import LearningParams, Params


def check_batch_size(params: LearningParams, chips: int, processes: int) -> None:
    """Refuse a batch that does not come out even.

    Raises:
        ParamsError: Batches cannot be shared out evenly, or an epoch fills none.
    """
    shares = processes * params.accumulation_steps
    if params.batch_size % shares:
        parts = f" of accumulation_steps {params.accumulation_steps}" if params.accumulation_steps > 1 else ""
        raise ParamsError(
            f"batch_size {params.batch_size} cannot be shared out evenly to {processes} processes{parts}; "
            f"use a multiple of {shares}"
        )
    fault = params.epoch_fault(chips)
    if fault:
        raise ParamsError(fault)


def check_memory(params: Params, chips: int, processes: int) -> None:
    """Refuse what is hopeless; whether the rest fits shows when it is used.

    Raises:
        ParamsError: This machine cannot hold a batch, the linear denoiser or an epoch's order.
    """
    data, bands, px = params.data, len(params.data.bands), params.data.train_px
    batch = -(-params.batch_size // processes)
    part = -(-batch // params.accumulation_steps)
    # Of each chip of a batch the view; of each in a part of it whole chips in the loader's three buffers, the noise,
    # and what the network is told.
    view, beside = 4 * px**2, 3 * (2 * data.read_px**2 + 4 * px**2)
    memory.require(
        {
            f"batch_size {params.batch_size:,}": bands * (batch * view + part * beside),
            # Its matrices, complex and double while they are fitted, and as many again on the way.
            f"data.crop_px {px:,} with {bands} data.bands": 3 * px * (px // 2 + 1) * bands**2 * 16,
            f"data.crops_per_chip {data.crops_per_chip:,}": 16 * chips * data.crops_per_chip,
        }
    )
