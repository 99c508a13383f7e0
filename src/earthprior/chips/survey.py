"""One pass over all chips: everything that is wrong with any of them, and the statistics of the training chips.

Nothing is kept per chip but in the ledger, which is on disk: a catalog may have any number of rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from earthprior.chips.band_order import BandOrder
from earthprior.chips.catalog import USAGES, CatalogFile, ChipRow
from earthprior.chips.census import Census, check_rows
from earthprior.chips.finding import Finding, inspect_row, odd_chip
from earthprior.chips.ledger import Ledger
from earthprior.chips.problem_log import ProblemLog
from earthprior.chips.problems import ChipError, Problem, chip_error
from earthprior.chips.read import ChipSpec
from earthprior.chips.readers import alone, ordered_map
from earthprior.chips.statistics import BandStatistics
from earthprior.errors import DataError
from earthprior.files import sha256_file
from earthprior.params import DataParams

LONGEST_NAME = 100
"""Of a CRS, which a file may call as it likes."""

MOST_NAMES, OTHERS = 1000, "others"
"""CRS that are counted by name: more than the zones of the world, and no end of names that files make up."""


@dataclass
class Survey:
    """The outcome of the pass.

    Attributes:
        catalog: The file.
        catalog_sha256: Of its bytes.
        rows: Rows per split that are right in themselves.
        chips: Chips per split that can be used.
        with_pixels: Those of them that have a valid pixel.
        dtype: Of all chips; "" where none can be used.
        bands: Statistics over the valid pixels of the training chips, per band; empty where none were asked for.
        valid_fraction_sum: Over the training chips.
        overlapping_pairs: Pairs of chips of different splits that share ground.
        crs: Chips per CRS, those of the first `MOST_NAMES`; of all others together.
        sizes: Chips per size.
    """

    catalog: CatalogFile
    catalog_sha256: str
    rows: Counter[str] = field(default_factory=Counter)
    chips: Counter[str] = field(default_factory=Counter)
    with_pixels: Counter[str] = field(default_factory=Counter)
    dtype: str = ""
    bands: list[BandStatistics] = field(default_factory=list)
    valid_fraction_sum: float = 0.0
    overlapping_pairs: int = 0
    crs: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    _first: str = ""
    _digest: Any = field(default_factory=hashlib.sha256)

    @property
    def chips_sha256(self) -> str:
        """SHA-256 over the usable chips' paths, splits and pixels, in the catalog's order."""
        return str(self._digest.hexdigest())

    def problem_with_dtype(self, found: Finding) -> Problem | None:
        """The first chip that can be read decides for all."""
        if found.dtype == self.dtype:
            return None
        what = f"has dtype {found.dtype}, but {self._first} and others have {self.dtype}"
        return chip_error(found.row.images[0], found.row.line, what, "Bring all chips to one dtype").problem

    def add(self, found: Finding, bands: int) -> None:
        """Take in a chip that can be used."""
        if not self.dtype:
            self.dtype, self._first = found.dtype, found.row.images[0]
            self.bands = [BandStatistics(found.dtype) for _ in range(bands)]
        usage = found.row.usage
        self.chips[usage] += 1
        self.with_pixels[usage] += found.valid_fraction > 0
        self.valid_fraction_sum += found.valid_fraction if usage == "train" else 0
        name = crs_name(found.crs)
        self.crs[name if name in self.crs or len(self.crs) < MOST_NAMES else OTHERS] += 1
        self.sizes["{} x {}".format(*found.size)] += 1
        for band, summary in zip(self.bands, found.bands, strict=False):
            band.add(summary)
        self._digest.update(repr((usage, found.row.images)).encode())
        self._digest.update(found.digest)


Progress = Callable[[Iterable[Any], Census], Iterable[Any]]


def survey(
    data: DataParams,
    root: Path,
    readers: int,
    log: ProblemLog,
    progress: Progress = lambda chips, census: chips,
    label_column: str | None = None,
    statistics: bool = True,
) -> Survey:
    """Read every chip once.

    The outcome, to the last bit, does not depend on `readers`.

    Args:
        data: Section `data` of params.yaml.
        root: The project's root.
        readers: Threads.
        log: Takes the problems, as they are found.
        progress: Wraps the iterator over chips, to show a bar.
        label_column: A catalog column with label rasters to look at, too.
        statistics: Whether they are asked for; they take time.

    Raises:
        DataError: The catalog as a whole cannot be read, or a read hangs. Faulty chips are problems, not exceptions.
    """
    catalog = CatalogFile(data, root)
    found = Survey(catalog, sha256_file(catalog.path))
    spec = ChipSpec.from_params(data)
    labels = label_column if label_column in catalog.columns else None

    def inspect(row: ChipRow) -> Finding | Problem:
        try:
            return inspect_row(catalog.dir, row, spec, labels, statistics)
        except ChipError as error:
            return error.problem

    order = BandOrder(len(spec.bands))
    with Ledger() as ledger:
        census = check_rows(catalog, ledger, log, readers)
        found.rows = census.rows
        for outcome in progress(_inspect_all(catalog, inspect, readers), census):
            problem = outcome if isinstance(outcome, Problem) else None
            if problem is None and found.dtype:
                problem = found.problem_with_dtype(outcome)
            if problem is not None:
                log.add(problem)
                continue
            found.add(outcome, len(spec.bands) if statistics else 0)
            log.extend(odd_chip(outcome, spec.bands))
            _remember(ledger, order, outcome)
        if sha256_file(catalog.path) != found.catalog_sha256:
            raise DataError(f"{catalog.path.name} changed while its chips were read; give the same command again")
        log.extend(_swapped(ledger, order, spec.bands))
        log.extend(_same_content(ledger))
        found.overlapping_pairs = ledger.overlapping()
        log.extend(_overlapping(ledger))
    return found


def crs_name(crs: str | None) -> str:
    """A CRS in a few words: its code, or the name in its WKT."""
    if crs is None:
        return "none"
    return (crs.split('"')[1] if '"' in crs else crs)[:LONGEST_NAME]


def _inspect_all(
    catalog: CatalogFile, inspect: Callable[[ChipRow], Finding | Problem], readers: int
) -> Iterator[Finding | Problem]:
    """Findings in the catalog's order."""
    first = next(catalog.chips(), None)
    if first is not None:
        # This read is made again below.
        alone(first.images[0], inspect, first)
    yield from ordered_map(inspect, catalog.chips(), lambda row: row.images[0], readers)


def _remember(ledger: Ledger, order: BandOrder, found: Finding) -> None:
    row = found.row
    if found.likeness is not None:
        order.add(found.likeness)
        ledger.add_likeness(row.line, found.likeness)
    # All empty chips are alike.
    if found.valid_fraction and not found.constant:
        ledger.add_content(row.line, found.digest)
    if found.crs is not None and found.bounds is not None:
        ledger.add_place(row.line, USAGES.index(row.usage), found.crs, found.bounds)


def _swapped(ledger: Ledger, order: BandOrder, bands: Sequence[str]) -> Iterator[Problem]:
    """Chips whose bands look as if they came in another order than the other chips'."""
    for swap in order.swapped(ledger.likenesses()):
        _, images = ledger.row(swap.line)
        one, other = (bands[position] for position in swap.bands)
        what = (
            f"{one} and {other} look swapped: with the other bands, {one} correlates by {swap.here[0]:.2f} on average "
            f"({swap.elsewhere[0]:.2f} in most chips), {other} by {swap.here[1]:.2f} ({swap.elsewhere[1]:.2f})"
        )
        fix = "Look at the chip, and bring its bands into the order of data.bands"
        yield Problem("warning", images[0], swap.line, what, fix, kind=f"{one} and {other} look swapped")


def _same_content(ledger: Ledger) -> Iterator[Problem]:
    """Copies of a chip under another name: a leak between splits, a waste within one."""
    for again in ledger.same_content():
        # The catalog's own check has told of rows with the same path.
        if again.images == again.first_images:
            continue
        what = f"has the same pixels as {again.first_images[0]} (catalog line {again.first_line})"
        if again.usage == again.first_usage:
            kind = "has the same pixels as an earlier chip"
            yield Problem("warning", again.images[0], again.line, what, "Drop one of them", kind=kind)
        else:
            what += f", but is {USAGES[again.usage]} where that is {USAGES[again.first_usage]}, which leaks"
            kind = "has the same pixels as a chip of another split, which leaks"
            fix = "Drop one, or put both in one split"
            yield Problem("error", again.images[0], again.line, what, fix, kind=kind)


def _overlapping(ledger: Ledger) -> Iterator[Problem]:
    """Chips that share ground with chips of another split."""
    for line, count, partners in ledger.partners():
        usage, images = ledger.row(line)
        others = [(USAGES[rank], names[0]) for rank, names in map(ledger.row, partners)]
        names = ", ".join(f"{name} ({other})" for other, name in others)
        rest = f" and {count - len(partners)} more" if count > len(partners) else ""
        what = f"is {USAGES[usage]}, but overlaps on the ground with {names}{rest}"
        fix = "Split by location (earthprior catalog DIR), or the result flatters"
        kind = "overlaps on the ground with chips of another split"
        yield Problem("warning", images[0], line, what, fix, kind=kind)
