import numpy as np
import pytest
from conftest import photograph, save

import tiles
from console import ImageError
from tiles import HR, LR, SCALE, Grid, cut_tile, join


def cut(image, grid, scale=1):
    return {at: cut_tile(image, grid, *at, scale) for at in grid}


def areas(area):
    return [(side.start, side.stop) for side in area]


def test_areas_grow_within_the_image_and_find_their_place_in_it():
    image = photograph(0, 60)
    area = slice(2, 20), slice(40, 58)
    outer = tiles.grow(area, 8, image.shape)
    assert areas(outer) == [(0, 28), (32, 60)]
    assert (image[outer][tiles.within(area, outer)] == image[area]).all()
    assert areas(tiles.scaled(area)) == [(8, 80), (160, 232)]
    assert tiles.shape_of(tiles.full_area(image.shape)) == (60, 60)


def test_cuts_divide_600_pixels_every_100():
    grid = Grid(600, 600)
    assert grid.cell(1, 1) == (slice(0, 100), slice(0, 100))
    assert grid.cell(2, 6, scale=4) == (slice(400, 800), slice(2000, 2400))
    assert grid.tile_shape(3, 3) == (108, 108)
    assert grid.tile_shape(3, 3, scale=4) == (432, 432)


def test_tile_is_its_cell_and_four_pixels_more():
    image = photograph(0, 60)
    tile = cut(image, Grid(60, 60, tiles=3))[2, 3]  # row 2, column 3: the right border
    assert tile.shape == (28, 28, 3)
    assert (tile[:, :24] == image[16:44, 36:60]).all()
    assert (tile[:, 24:] == image[16:44, [59, 58, 57, 56]]).all()  # reflected


@pytest.mark.parametrize("shape", [(60, 60), (61, 47), (13, 7), (6, 6)])
@pytest.mark.parametrize("scale", [1, 4])
def test_join_undoes_cut_to_the_bit(shape, scale):
    grid = Grid(*shape)
    image = np.random.default_rng(0).integers(0, 256, (*(scale * s for s in shape), 3), np.uint8)
    parts = cut(image, grid, scale)
    assert all(part.shape[:2] == grid.tile_shape(*at, scale) for at, part in parts.items())
    assert (join(parts, grid, scale) == image).all()


@pytest.mark.parametrize("options", [(1, 8), (1, 0), (3, 0), (2, 40)])
def test_any_number_of_tiles_and_any_overlap_will_do(options):
    grid = Grid(23, 9, *options)
    image = photograph(1, 92)[:, :36]
    assert (join(cut(image, grid, 4), grid, 4) == image).all()


def test_join_fades_from_one_tile_into_the_next():
    grid = Grid(40, 40, tiles=2, pad=8)
    parts = cut(np.zeros((40, 40, 3), np.uint8), grid)
    parts = {at: np.full_like(part, 80 * (at[1] - 1)) for at, part in parts.items()}
    row = join(parts, grid)[20, :, 0].astype(int)
    assert (row[:16] == 0).all() and (row[24:] == 80).all()
    assert (np.diff(row[16:24]) == 10).all()


@pytest.mark.parametrize("options", [(6, 8), (2, 4), (3, 0), (1, 0), (5, 7)])
@pytest.mark.parametrize("shape", [(60, 48), (47, 33)])
@pytest.mark.parametrize("scale", [1, SCALE])
def test_tiles_tell_their_grid(tmp_path, options, shape, scale):
    grid, found = Grid(*shape, *options), {}
    for at in grid:
        image = np.zeros((*grid.tile_shape(*at, scale), 3), np.uint8)
        found[at] = save(tmp_path, tiles.tile_name("a", *at), image)
    lr = save(tmp_path, "a.png", np.zeros((*shape, 3), np.uint8))
    assert Grid.of_tiles(lr, found, "again", scale) == grid
    last = found.pop(max(found))
    for wrong in (found, {}, found | {(1, 9): last, max(grid): last}):
        with pytest.raises(ImageError, match=r"a\.png: .*; again"):
            Grid.of_tiles(lr, wrong, "again", scale)
    if scale > 1 or options[0] > 1:
        save(tmp_path, last.name, np.zeros((3, 3, 3), np.uint8))
        with pytest.raises(ImageError, match=r"a\.png: .*; again"):
            Grid.of_tiles(lr, found | {(options[0],) * 2: last}, "again", scale)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("image_600px_0006.png", "0006"),
        ("image_2400px_0006.png", "0006"),
        ("holiday.jpg", "holiday"),
        ("bsds_1_2.jpg", "bsds_1_2"),
        ("0001x4.png", "0001x4"),
    ],
)
def test_image_id(tmp_path, file, name):
    assert tiles.image_id(tmp_path / file) == name


def test_tiles_are_found_by_name(tmp_path):
    names = ["a_01_02.png", "a_b_02_11.png", "1_01_01.png", "1_2_01_01.png", "original_1_6.png"]
    for name in [*names, "noise.png", ".a_01_03.png", "a_01.png"]:
        (tmp_path / name).touch()
    found = tiles.find_tiles(tmp_path)
    assert found == {
        "a": {(1, 2): tmp_path / "a_01_02.png"},
        "a_b": {(2, 11): tmp_path / "a_b_02_11.png"},
        "1": {(1, 1): tmp_path / "1_01_01.png"},
        "1_2": {(1, 1): tmp_path / "1_2_01_01.png"},
        "original": {(1, 6): tmp_path / "original_1_6.png"},
    }
    assert tiles.tile_name("0006", 1, 6) == "0006_01_06.png"
    assert tiles.find_tiles(tmp_path / "none") == {}


def test_images_that_cannot_be_used_are_named(tmp_path):
    for name in ("cat.png", "cat.jpg", "raw.heic", "notes.txt", ".hidden.png", "B.TIF"):
        (tmp_path / name).touch()
    found, problems = tiles.find_images(tmp_path)
    assert found == {"B": tmp_path / "B.TIF", "cat": tmp_path / "cat.jpg"}
    assert len(problems) == 2
    assert any("cat.png" in each and "cat.jpg" in each for each in problems)
    assert any("raw.heic" in each and "PNG" in each for each in problems)


@pytest.mark.parametrize(
    ("lr", "hr", "ids"),
    [
        (["0001x4.png", "0002x4.png"], ["0001.png", "0002.png"], ["0001", "0002"]),
        (["0001x4.png"], [], ["0001x4"]),
        (["0001x4.png"], ["0001x4.png"], ["0001x4"]),
        (["0001x4.png"], ["0001.png", "0001x4.png"], ["0001x4"]),
        (["0001.png", "0001x4.png"], ["0001.png"], ["0001", "0001x4"]),
        (["image_600px_0001x4.png"], ["image_2400px_0001.png"], ["0001"]),
    ],
)
def test_x4_is_left_out_only_where_that_cannot_confuse(tmp_path, lr, hr, ids):
    for size, names in ((LR, lr), (HR, hr)):
        (tmp_path / size).mkdir()
        for name in names:
            (tmp_path / size / name).touch()
    assert list(tiles.find_images(tmp_path / LR)[0]) == ids
