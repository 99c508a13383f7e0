"""Features of chips as a Parquet file: every column of the catalog, and one vector for each chip."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earthprior.backbone import Backbone
from earthprior.chips.batch import Batch
from earthprior.chips.normalize import Affine
from earthprior.errors import DataError
from earthprior.files import replacing
from earthprior.prediction.chips import WholeChips
from earthprior.representations import PooledFeatures

if TYPE_CHECKING:
    import pyarrow as pa

FEATURES, KEY, MADE_OF = "features", "earthprior", "earthprior_made_of"
"""The column of the vectors; of the file's metadata, what they are, and in whole files what they were made of."""

ROWS_AT_ONCE = 2048
"""Of a row group: so many rows are in memory."""

CROPS_AT_ONCE = 16


class Embedder:
    """Chips to vectors: of each level the channels' means, then their standard deviations, over pixels with data.

    Chips that are larger than what the network was trained on are seen in crops of that size, which cover them.

    Args:
        backbone: On the device.
        device: Where features are computed.

    Attributes:
        backbone: See above.
        bands: That chips must have.
        names: Of the vector's numbers.
        facts: What the vectors are, plain values.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        serving = backbone.description["serving"]
        self.backbone, self._device = backbone, device
        self.bands = backbone.bands
        self._side = str(serving.get("side", "decoder"))
        widths = backbone.widths[self._side]
        self._levels = [int(level) for level in serving.get("levels") or range(len(widths))]
        self.names = [
            f"{self._side}_{level}_{kind}_{channel}"
            for level in self._levels
            for kind in ("mean", "std")
            for channel in range(widths[level])
        ]
        self.facts = {
            "fingerprint": backbone.description.get("fingerprint"),
            "rho": backbone.rho,
            "t": backbone.t,
            "side": self._side,
            "levels": self._levels,
            "bands": list(backbone.bands),
            "crop_px": backbone.crop_px,
            "adapted": backbone.adapted,
        }
        self._pooled = PooledFeatures(self._features, backbone.crop_px, CROPS_AT_ONCE, most_crops=10**6)

    def __call__(self, chips: WholeChips) -> NDArray[np.float32]:
        """(B, D), NaN for a chip without data."""
        valid = chips.valid.to(self._device)
        x0 = self.backbone.normalize(chips.pixels.to(self._device), valid)
        unit = torch.ones(len(x0), x0.shape[1], 1, 1, device=self._device)
        found = self._pooled(Batch(x0, valid[:, None], Affine(torch.zeros_like(unit), unit)))
        vectors: NDArray[np.float32] = found.numpy()
        vectors[~chips.valid.flatten(1).any(1).numpy()] = np.nan
        return vectors

    def _features(self, batch: Batch) -> list[Tensor]:
        pyramid = self.backbone.features(batch.x0, side=self._side)
        return [pyramid[level] for level in self._levels]


def schema_of(columns: Sequence[str], embedder: Embedder) -> pa.Schema:
    """Text columns as in the catalog, and the vectors as lists of one length.

    Raises:
        DataError: The catalog has a column of the vectors' name.
    """
    import pyarrow as pa

    if FEATURES in columns:
        raise DataError(f"the catalog has a column {FEATURES!r}, as the vectors are called. Rename it")
    facts = {**embedder.facts, "names": embedder.names}
    return pa.schema(
        [*((column, pa.string()) for column in columns), (FEATURES, pa.list_(pa.float32(), len(embedder.names)))],
        metadata={KEY: json.dumps(facts)},
    )


def is_vectors(path: Path) -> bool:
    """Whether a file is one of vectors."""
    return KEY in _metadata(path)


def made_of(path: Path) -> str | None:
    """What a whole file of vectors was made of; None for any other."""
    return _metadata(path).get(MADE_OF)


def _metadata(path: Path) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowException):
        return {}
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in found.items()}


class Vectors:
    """A Parquet file that is being written, a row group at a time.

    Args:
        writer: pyarrow's.
        schema: See `schema_of`.
    """

    def __init__(self, writer: Any, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._cells: list[Sequence[str]] = []
        self._vectors: list[NDArray[Any]] = []

    def append(self, cells: Sequence[Sequence[str]], vectors: NDArray[Any]) -> None:
        """Rows: their cells, and vectors (B, D)."""
        self._cells.extend(cells)
        self._vectors.append(vectors)
        if len(self._cells) >= ROWS_AT_ONCE:
            self._flush()

    def close(self, made_of: str | None) -> None:
        """Write what waits, and with what the whole is made of, that it is whole."""
        self._flush()
        if made_of:
            self._writer.add_key_value_metadata({MADE_OF: made_of})

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._cells:
            return
        joined = np.concatenate(self._vectors)
        # A chip without data has a list of NaN: null among lists of one length is what Parquet readers stumble over.
        listed = pa.FixedSizeListArray.from_arrays(pa.array(joined.ravel()), joined.shape[1])
        texts = [pa.array(list(column), pa.string()) for column in zip(*self._cells, strict=True)]
        self._writer.write_table(pa.table([*texts, listed], schema=self._schema))
        self._cells, self._vectors = [], []


@contextmanager
def vectors_file(path: Path, schema: pa.Schema) -> Iterator[Vectors]:
    """A Parquet file, complete or not at all."""
    import pyarrow.parquet as pq

    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        yield Vectors(writer, schema)
