import os

import numpy as np
import pytest
from conftest import photograph, save

import tiles
from images import ImageError, write_png
from tiles import HR, LR, TILES, Grid, cut, join


def areas(area):
    return [(side.start, side.stop) for side in area]


def test_areas_grow_within_the_image_and_find_their_place_in_it():
    image = photograph(0, 60)
    area = slice(2, 20), slice(40, 58)
    outer = tiles.grow(area, 8, image.shape)
    assert areas(outer) == [(0, 28), (32, 60)]
    assert (image[outer][tiles.within(area, outer)] == image[area]).all()
    assert areas(tiles.scaled(area)) == [(8, 80), (160, 232)]
    assert tiles.shape_of(tiles.whole(image.shape)) == (60, 60)


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


def test_too_small_an_image_is_refused(tmp_path):
    with pytest.raises(ImageError, match="5x600"):
        Grid(600, 5)
    path = save(tmp_path, "dot.png", photograph(0, 2))
    with pytest.raises(ImageError, match=r"dot\.png: 2x2"):
        Grid.of(path, 6, 8)


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
    for name in ("0006_01_06.png", "a_b_02_11.png", "noise.png", ".0006_01_02.png"):
        (tmp_path / name).touch()
    found = tiles.find_tiles(tmp_path)
    assert found == {
        "0006": {(1, 6): tmp_path / "0006_01_06.png"},
        "a_b": {(2, 11): tmp_path / "a_b_02_11.png"},
    }
    assert tiles.tile_name("0006", 1, 6) == "0006_01_06.png"
    assert tiles.find_tiles(tmp_path / "none") == {}


def test_images_that_cannot_be_used_are_named(tmp_path):
    for name in ("cat.png", "cat.jpg", "raw.jxl", "notes.txt", ".hidden.png", "B.TIF"):
        (tmp_path / name).touch()
    found, warnings = tiles.find_images(tmp_path)
    assert found == {"B": tmp_path / "B.TIF", "cat": tmp_path / "cat.jpg"}
    assert len(warnings) == 2
    assert "cat.png" in warnings[0] and "cat.jpg" in warnings[0]
    assert "raw.jxl" in warnings[1] and "PNG" in warnings[1]


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


@pytest.fixture
def made(tmp_path):
    """An image, its grid and its tiles, and the stamp that they should have."""
    image = photograph(0, 40)
    path, grid = save(tmp_path, "a.png", image), Grid(40, 40, 2)
    stamp = tiles.tile_stamp(path, grid)
    (tmp_path / TILES).mkdir()
    for at, tile in cut(image, grid).items():
        write_png(tmp_path / TILES / tiles.tile_name("a", *at), tile, stamp)
    return path, grid, tiles.find_tiles(tmp_path / TILES)["a"], stamp


def test_tiles_of_the_image_as_it_is_pass(made):
    _, grid, found, stamp = made
    assert tiles.check_tiles("a", found, grid, stamp, "slice again") == stamp


def test_tiles_may_be_stamped_with_weights_but_only_with_one_set(made):
    _, grid, found, stamp = made
    for at, path in found.items():
        write_png(path, np.zeros((*grid.tile_shape(*at), 3), np.uint8), f"{stamp} | w1")
    assert tiles.check_tiles("a", found, grid, stamp, "test again") == f"{stamp} | w1"
    write_png(found[2, 1], np.zeros((28, 28, 3), np.uint8), f"{stamp} | w2")
    with pytest.raises(ImageError, match=r"a_02_01\.png: .*weights.*; test again"):
        tiles.check_tiles("a", found, grid, stamp, "test again")


def test_other_tiles_are_refused_and_the_first_is_named(made):
    path, grid, found, stamp = made
    tile = np.zeros((28, 28, 3), np.uint8)

    def refused(match, grid=grid, stamp=stamp, found=found):
        with pytest.raises(ImageError, match=f"{match}.*; slice again"):
            tiles.check_tiles("a", found, grid, stamp, "slice again")

    refused(r"a: has no tiles", found={})
    refused(r"a_01_02\.png: missing", found={at: found[at] for at in ((1, 1), (2, 1), (2, 2))})
    refused(r"a_03_01\.png: not one of 2x2", found=found | {(3, 1): path.with_name("a_03_01.png")})
    refused(r"a_01_01\.png: not made from", stamp=stamp + "0")  # --pad 80, not 8
    refused(r"a_01_01\.png: not made from", stamp=stamp[:-1])
    os.utime(path, (0, 0))
    refused(r"a_01_01\.png: not made from", stamp=tiles.tile_stamp(path, grid))
    write_png(found[1, 2], tile[:20], stamp)
    refused(r"a_01_02\.png: not of its place's size")
    write_png(found[1, 1], tile)
    refused(r"a_01_01\.png: not made from")
    found[1, 1].write_text("no image")
    refused(r"a_01_01\.png: not made from")


def test_stamps_are_plain_text_whatever_the_file_is_called(tmp_path):
    path = tmp_path / os.fsdecode("naïve ".encode("latin-1") + b"\xff|.png")
    try:
        path.write_text("x")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    stamp = tiles.source_stamp(path)
    assert stamp.isascii() and stamp.startswith("na%EFve%20%FF%7C.png 1 ")
