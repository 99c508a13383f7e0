"""What a person names to be predicted: scenes, folders of them, catalogs; each becomes a list of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from earthprior.chips.catalog import path_fault
from earthprior.chips.content import is_tiff
from earthprior.chips.problems import chip_error
from earthprior.chips.records import records
from earthprior.errors import DataError
from earthprior.params.plain import shown


@dataclass(frozen=True)
class Image:
    """One scene or chip.

    Attributes:
        folder: What its files are relative to.
        files: One, or several whose bands are stacked.
        stem: What its results are called, a relative path without suffix.
        line: Of the catalog, or 0.
        cells: Of the catalog's row, by column; none without a catalog.
    """

    folder: Path
    files: tuple[str, ...]
    stem: str
    line: int = 0
    cells: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """Of its files."""
        return [self.folder / name for name in self.files]


@dataclass(frozen=True)
class Catalog:
    """A CSV file of images.

    Attributes:
        path: The file; its paths are relative to its folder.
        image_columns: Whose files are stacked.
    """

    path: Path
    image_columns: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """The header.

        Raises:
            DataError: There is none, or it lacks an image column.
        """
        _, header = next(records(self.path))
        missing = [column for column in self.image_columns if column not in header]
        if missing:
            raise DataError(
                f"{self.path.name} has no column {missing[0]!r}, which should hold the images' paths "
                f"(data.image_columns); found {shown(header)}"
            )
        return header

    def images(self) -> Iterator[Image]:
        """Every row.

        Raises:
            DataError: The file is no CSV, or a row has too many or too few cells.
        """
        header = self.columns
        rows = records(self.path)
        next(rows)
        for line, cells in rows:
            if len(cells) != len(header):
                raise DataError(
                    f"{self.path.name} line {line}: the row has {len(cells)} cells, the header {len(header)}. Add the "
                    "missing commas, or quote cells that hold a comma"
                )
            row = dict(zip(header, cells, strict=True))
            files = tuple(row[column] for column in self.image_columns)
            yield Image(self.path.parent, files, _stem(files[0], line), line, row)


def _stem(file: str, line: int) -> str:
    """Of a catalog's path, which may be none; what is wrong with it is told when it is opened."""
    path = PurePosixPath(file)
    return str(path.with_suffix("")) if path.name and not path_fault(file) else f"line_{line}"


def find(named: Sequence[Path], image_columns: tuple[str, ...], not_in: Path) -> list[Image]:
    """All images that are named.

    Args:
        named: GeoTIFFs, folders (with all below them), catalogs (.csv).
        image_columns: Of the catalogs.
        not_in: A folder that is left out, as results lie there.

    Raises:
        DataError: Something is not there, or is none of these; or two images would have one name.
    """
    found: list[Image] = []
    for path in named:
        if path.is_dir():
            inside = sorted(_tiffs(path, not_in.absolute()))
            if not inside:
                raise DataError(f"{path} holds no GeoTIFF (.tif, .tiff)")
            found += [Image(path, (name,), name[: name.rindex(".")]) for name in inside]
        elif path.suffix.lower() == ".csv":
            found += Catalog(path, image_columns).images()
        elif is_tiff(path.name):
            if not path.exists():
                raise DataError(f"{path} not found")
            found.append(Image(path.parent, (path.name,), path.stem))
        else:
            what = (
                "not found" if not path.exists() else "is neither a GeoTIFF (.tif), nor a folder, nor a catalog (.csv)"
            )
            raise DataError(f"{path} {what}")
    return _apart(found)


def _tiffs(folder: Path, not_in: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).absolute() != not_in]
        yield from (
            (here / name).relative_to(folder).as_posix() for name in files if is_tiff(name) and not name.startswith(".")
        )


def _apart(images: list[Image]) -> list[Image]:
    """With names that tell them apart: of files of one name in several folders, with these folders."""
    if _alike(images):
        places = [image.folder.absolute() for image in images]
        common = Path(os.path.commonpath(places))
        images = [
            replace(image, stem=(place.relative_to(common) / image.stem).as_posix())
            for image, place in zip(images, places, strict=True)
        ]
    for one, other in _alike(images):
        raise DataError(
            f"the results of {one.paths[0]} and {other.paths[0]} would have one name, {one.stem}. Rename one of them, "
            "or predict them into different folders (--out)"
        )
    return images


def _alike(images: Iterable[Image]) -> list[tuple[Image, Image]]:
    """Different images of one name; the same one twice, as catalogs have it, is none."""
    first: dict[str, Image] = {}
    return [(before, image) for image in images if (before := first.setdefault(image.stem, image)).paths != image.paths]


def check_apart_from_results(images: Sequence[Image], results: Iterable[Path]) -> None:
    """Results must never replace what they are made of.

    Raises:
        ChipError: One would.
    """
    sources = {path.absolute(): image for image in images for path in image.paths}
    for path in results:
        image = sources.get(path.absolute())
        if image:
            what = "would be replaced by its own map"
            raise chip_error(image.files[0], image.line, what, "Choose another folder with --out")
