"""Swapped bands are suspected by how alike bands are, and sound chips are not."""

from __future__ import annotations

import shutil
import tracemalloc

import numpy as np
import pytest
import rasterio
from scipy.ndimage import gaussian_filter

from earthprior.chips.band_order import BandOrder, likeness
from earthprior.chips.catalog import load_catalog
from earthprior.tools import check

PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def landscape(seed: int, size: int = 48, order: tuple[int, ...] = (0, 1, 2, 3)) -> np.ndarray:
    """Red, green and blue follow the soil; nir follows the plants, which hide it."""
    noise = np.random.default_rng(seed)
    soil, plants = (gaussian_filter(noise.standard_normal((size, size)), 3.0, mode="wrap") * 12 for _ in range(2))
    share = noise.uniform(0.2, 0.5)
    bands = [1000 + 200 * (soil - share * plants) + 20 * noise.standard_normal(soil.shape) for _ in range(3)]
    nir = 2000 + 500 * (plants + 0.2 * soil) + 30 * noise.standard_normal(soil.shape)
    return np.stack([*bands, nir])[list(order)].clip(1, 60_000).astype(np.uint16)


def test_likeness_is_fishers_z_of_each_pair():
    pixels = landscape(0).reshape(4, -1)[:, :2000]
    z = likeness(pixels)
    wanted = [np.arctanh(np.corrcoef(pixels[one], pixels[other])[0, 1]) for one, other in PAIRS]
    np.testing.assert_allclose(z, wanted, rtol=1e-5)
    assert likeness(pixels[:2]) is None
    assert likeness(pixels[:, :200]) is None
    assert likeness(np.tile(pixels, (5, 1))) is None
    assert likeness(np.where(np.arange(4)[:, None] == 1, 7, pixels)) is None
    assert np.isfinite(likeness(np.repeat(pixels[:1], 3, axis=0))).all()


@pytest.mark.parametrize("swap", [(3, 1, 2, 0), (0, 3, 2, 1), (0, 1, 3, 2)])
def test_the_two_bands_are_found(swap):
    order = BandOrder(4)
    chips = [(line, likeness(landscape(line, order=swap if line in (5, 17) else (0, 1, 2, 3)).reshape(4, -1)))
             for line in range(40)]  # fmt: skip
    for _, z in chips:
        order.add(z)
    found = list(order.swapped(chips))
    assert [one.line for one in found] == [5, 17]
    for one in found:
        assert 3 in one.bands
        assert one.bands == tuple(position for position in range(4) if swap[position] != position)
        # nir, the later of the two, has taken the other's place among the visible bands
        assert one.here[1] > one.elsewhere[1] + 0.4
    assert not list(BandOrder(4).swapped(chips))


def test_a_thousand_bands_take_no_memory():
    """Half a million pairs."""
    tracemalloc.start()
    order = BandOrder(1000)
    assert likeness(np.random.default_rng(0).standard_normal((1000, 400))) is None
    assert not list(order.swapped([]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("described", [True, False])
def test_descriptions_are_proof_and_pixels_a_suspicion(tmp_path, make_params, write_chip, described):
    names = ("red", "green", "blue", "nir")
    with (tmp_path / "catalog.csv").open("w") as handle:
        print("image,usage", file=handle)
        for number in range(20):
            swap = (3, 1, 2, 0) if number == 7 else (0, 1, 2, 3)
            known = tuple(names[band] for band in swap) if described else None
            pixels = landscape(number, 32, swap)
            write_chip(tmp_path / f"{number}.tif", pixels, x=1000.0 * number, descriptions=known)
            print(f"{number}.tif,{'train' if number % 5 else 'validate'}", file=handle)
    params = make_params({"data.dir": str(tmp_path)})
    if described:
        with pytest.raises(
            Exception, match=r"7\.tif \(catalog line 9\): its bands are described as nir, green, blue, re"
        ):
            check.run(params, tmp_path)
    else:
        check.run(params, tmp_path)
        (line,) = (tmp_path / "work/check/bad_chips.csv").read_text().splitlines()[1:]
        assert line.startswith('warning,7.tif,9,"red and nir look swapped: with the other bands, red correlates by ')


def test_real_chips(tmp_path, real_data, make_params):
    """None of 120 chips of ten dates is suspected; of one date's twelve, swapped, many are."""
    shutil.copytree(real_data / "naip_prairie_5m_224", tmp_path / "data", copy_function=shutil.copyfile)
    params = make_params({"data.chip_size": 224, "data.crop_px": 56})
    catalog = load_catalog(params.data, tmp_path)
    check.run(params, tmp_path)
    assert (tmp_path / "work/check/bad_chips.csv").read_text().count("\n") == 1
    swapped = [row.images[0] for row in catalog.rows if "20120731" in row.images[0]]
    for image in swapped:
        with rasterio.open(tmp_path / "data" / image) as source:
            pixels, profile = source.read(), source.profile
        with rasterio.open(tmp_path / "data" / image, "w", **profile) as target:
            target.write(pixels[[3, 1, 2, 0]])
    check.run(params, tmp_path)
    found = (tmp_path / "work/check/bad_chips.csv").read_text().splitlines()[1:]
    assert len(found) >= 4
    assert all("20120731" in line and "red and nir look swapped" in line for line in found)
