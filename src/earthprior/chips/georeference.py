"""Where chips lie on the ground: which of them overlap, and which belong together.

Footprints are compared within one CRS only; neighbours on both sides of a UTM zone's border are not seen.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from earthprior.errors import EarthPriorError

Bounds = tuple[float, float, float, float]

TOLERANCE = 0.001
"""Share of a chip's side that coordinates may be off without touching becoming overlapping, or the reverse."""

RANKS = 3
NAMED = 3
"""Partners of an overlapping chip that are told by name."""

# Many dates of one place are one box, so that each place is compared once; n0, n1, n2 count its chips per rank.
# The tree holds float32, rounded outwards: what it finds is compared again, exactly.
_TABLES = """
CREATE TABLE footprint (
  chip INTEGER PRIMARY KEY, rank INTEGER, crs INTEGER, west REAL, south REAL, east REAL, north REAL);
CREATE TABLE place (
  id INTEGER PRIMARY KEY, crs INTEGER, west REAL, south REAL, east REAL, north REAL,
  n0 INTEGER, n1 INTEGER, n2 INTEGER, first INTEGER);
CREATE TABLE shared (place INTEGER, rank INTEGER, count INTEGER, partners TEXT);
CREATE VIEW meeting AS
  SELECT here.id AS here, here.crs AS crs, here.first AS first, here.n1 AS n1, here.n2 AS n2,
    there.id AS there, there.first AS there_first, there.n0 AS before1, there.n0 + there.n1 AS before2
  FROM place AS here CROSS JOIN tree CROSS JOIN place AS there
  WHERE tree.west < here.east AND tree.east > here.west AND tree.south < here.north AND tree.north > here.south
  AND there.id = tree.id AND there.west < here.east AND there.east > here.west
  AND there.south < here.north AND there.north > here.south;
CREATE VIEW lies AS
  SELECT place.id AS place, footprint.chip AS chip, footprint.rank AS rank
  FROM place CROSS JOIN footprint USING (crs, west, south, east, north);
"""
_PLACES = """
CREATE INDEX footprint_place ON footprint (crs, west, south, east, north, rank);
INSERT INTO place (crs, west, south, east, north, n0, n1, n2, first)
  SELECT crs, west, south, east, north, SUM(rank = 0), SUM(rank = 1), SUM(rank = 2), MIN(chip) FROM footprint
  GROUP BY crs, west, south, east, north;
CREATE INDEX place_crs ON place (crs);
"""
_SHARING = (
    "INSERT INTO shared SELECT here, 1, SUM(before1), NULL FROM meeting WHERE crs = ? AND n1 AND before1 GROUP BY here",
    "INSERT INTO shared SELECT here, 2, SUM(before2), NULL FROM meeting WHERE crs = ? AND n2 AND before2 GROUP BY here",
)


@dataclass(frozen=True)
class Overlaps:
    """Chips of different splits that share ground.

    Attributes:
        pairs: How many pairs of chips.
        partners: For each chip (its position) of the later split, how many chips of earlier splits it overlaps, and the
            positions of the first three.
    """

    pairs: int
    partners: dict[int, tuple[int, list[int]]]


class Ground:
    """Footprints of chips in a database, so that ten million of them need no more memory than ten.

    Args:
        database: Where its tables are made.
        reach: By how much every footprint is grown on each side before they are compared, as a share of its own side;
            negative to shrink.

    Raises:
        EarthPriorError: This Python's SQLite was built without R-trees.
    """

    def __init__(self, database: sqlite3.Connection, reach: float) -> None:
        self._database, self._reach = database, reach
        self._waiting: list[tuple[int, int, int, float, float, float, float]] = []
        try:
            database.executescript(_TABLES)
        except sqlite3.OperationalError as error:
            if "no such module" not in str(error):
                raise
            raise EarthPriorError(
                f"the SQLite of this Python ({sqlite3.sqlite_version}) was built without R-trees, by which chips that "
                "overlap are found; use another Python (python.org's, your distribution's and conda's have them)"
            ) from None

    def add(self, chip: int, rank: int, crs: str, bounds: Bounds) -> None:
        """A chip's footprint, in units of its CRS.

        Args:
            chip: Its number; positions or lines, in the order that chips are told in.
            rank: Its split as a number below `RANKS`; of a pair, the higher one is blamed.
            crs: Of the bounds.
            bounds: Left, bottom, right, top.
        """
        system = int.from_bytes(hashlib.blake2b(crs.encode(), digest_size=8).digest(), signed=True)
        self._waiting.append((chip, rank, system, *_grown(bounds, self._reach)))
        if len(self._waiting) == 1000:
            self._flush()

    def overlapping(self) -> int:
        """Find the chips of different ranks whose footprints intersect, for `partners`; the number of pairs."""
        self._flush()
        self._database.executescript(_PLACES)
        for system in self._trees():
            for statement in _SHARING:
                self._database.execute(statement, (system,))
            self._name_partners()
        pairs = "SELECT SUM(count * CASE rank WHEN 1 THEN n1 ELSE n2 END) FROM shared JOIN place ON id = place"
        return self._database.execute(pairs).fetchone()[0] or 0

    def partners(self) -> Iterator[tuple[int, int, list[int]]]:
        """Chip, how many chips of lower rank it overlaps, and the first three of them, in the order of chips."""
        found = self._database.execute(
            "SELECT chip, count, partners FROM shared CROSS JOIN lies USING (place, rank) ORDER BY chip"
        )
        for chip, count, partners in found:
            yield chip, count, [int(partner) for partner in partners.split(",")]

    def touching(self) -> Iterator[tuple[int, int]]:
        """Pairs of chips that are linked: enough of them that chips of intersecting footprints are connected."""
        self._flush()
        self._database.executescript(_PLACES)
        yield from self._database.execute("SELECT chip, first FROM lies JOIN place ON place.id = lies.place")
        for system in self._trees():
            yield from self._database.execute(
                "SELECT first, there_first FROM meeting WHERE crs = ? AND there > here", (system,)
            )

    def _trees(self) -> Iterator[int]:
        """For each CRS, a tree of its places while it is yielded."""
        for (system,) in self._database.execute("SELECT DISTINCT crs FROM place").fetchall():
            self._database.execute("CREATE VIRTUAL TABLE tree USING rtree(id, west, east, south, north)")
            self._database.execute(
                "INSERT INTO tree SELECT id, west, east, south, north FROM place WHERE crs = ?", (system,)
            )
            yield system
            self._database.execute("DROP TABLE tree")

    def _name_partners(self) -> None:
        """The first chips of lower rank, for each place that shares ground."""
        unnamed = self._database.execute("SELECT rowid, place, rank FROM shared WHERE partners IS NULL").fetchall()
        for row, place, rank in unnamed:
            chips = self._database.execute(
                "SELECT chip FROM meeting CROSS JOIN lies ON lies.place = there WHERE here = ? AND rank < ? "
                "ORDER BY chip LIMIT ?",
                (place, rank, NAMED),
            )
            names = ",".join(str(chip) for (chip,) in chips)
            self._database.execute("UPDATE shared SET partners = ? WHERE rowid = ?", (names, row))

    def _flush(self) -> None:
        self._database.executemany("INSERT INTO footprint VALUES (?, ?, ?, ?, ?, ?, ?)", self._waiting)
        self._waiting.clear()


def overlaps_between(crs: Sequence[str | None], bounds: Sequence[Bounds | None], ranks: Sequence[int]) -> Overlaps:
    """Chips of different splits that share ground (more than `TOLERANCE` of a side).

    Args:
        crs: Per chip, None where it has no place.
        bounds: Per chip, in units of its CRS.
        ranks: Per chip, the split as a number below `RANKS`; of a pair, the higher one is blamed.
    """
    ground = _ground_of(crs, bounds, ranks, -TOLERANCE)
    pairs = ground.overlapping()
    return Overlaps(pairs, {chip: (count, partners) for chip, count, partners in ground.partners()})


def connected_groups(crs: Sequence[str | None], bounds: Sequence[Bounds | None]) -> list[int]:
    """A group number per chip: chips that overlap or touch share it, also over others between them.

    Chips without a place are groups of their own, and come last.
    """
    leader = list(range(len(bounds)))

    def leader_of(chip: int) -> int:
        while leader[chip] != chip:
            leader[chip] = chip = leader[leader[chip]]
        return chip

    for one, other in _ground_of(crs, bounds, [0] * len(bounds), TOLERANCE).touching():
        low, high = sorted((leader_of(one), leader_of(other)))
        leader[high] = low
    leaders = [leader_of(chip) for chip in range(len(bounds))]
    placed = [crs[chip] is not None and bounds[chip] is not None for chip in range(len(bounds))]
    order = sorted(set(leaders), key=lambda chip: (not placed[chip], crs[chip] or "" if placed[chip] else "", chip))
    numbers = {chip: number for number, chip in enumerate(order)}
    return [numbers[chip] for chip in leaders]


def _ground_of(
    crs: Sequence[str | None], bounds: Sequence[Bounds | None], ranks: Sequence[int], reach: float
) -> Ground:
    ground = Ground(sqlite3.connect("", isolation_level=None), reach)
    for chip, (system, box, rank) in enumerate(zip(crs, bounds, ranks, strict=True)):
        if system is not None and box is not None:
            ground.add(chip, rank, system, box)
    return ground


def _grown(bounds: Bounds, reach: float) -> Bounds:
    left, bottom, right, top = bounds
    across, along = reach * (right - left), reach * (top - bottom)
    return left - across, bottom - along, right + across, top + along
