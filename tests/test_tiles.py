import numpy as np
import pytest
from conftest import photograph, save
from PIL import Image

import tiles
from tiles import Grid, PictureError, cut, join


def test_cuts_divide_600_pixels_every_100():
    grid = Grid(600, 600)
    assert grid.cell(1, 1) == (slice(0, 100), slice(0, 100))
    assert grid.cell(2, 6, scale=4) == (slice(400, 800), slice(2000, 2400))
    assert grid.tile_shape(3, 3) == (108, 108)
    assert grid.tile_shape(3, 3, scale=4) == (432, 432)


def test_tile_is_its_cell_and_four_pixels_more():
    picture = photograph(0, 60)
    tile = cut(picture, Grid(60, 60, tiles=3))[2, 3]  # row 2, column 3: the right border
    assert tile.shape == (28, 28, 3)
    assert (tile[:, :24] == picture[16:44, 36:60]).all()
    assert (tile[:, 24:] == picture[16:44, [59, 58, 57, 56]]).all()  # reflected


@pytest.mark.parametrize("shape", [(60, 60), (61, 47), (13, 7), (6, 6)])
@pytest.mark.parametrize("scale", [1, 4])
def test_join_undoes_cut_to_the_bit(shape, scale):
    grid = Grid(*shape)
    picture = np.random.default_rng(0).integers(0, 256, (*(scale * s for s in shape), 3), np.uint8)
    parts = cut(picture, grid, scale)
    assert all(part.shape[:2] == grid.tile_shape(*at, scale) for at, part in parts.items())
    assert (join(parts, grid, scale) == picture).all()


def test_join_fades_from_one_tile_into_the_next():
    grid = Grid(40, 40, tiles=2, pad=8)
    parts = cut(np.zeros((40, 40, 3), np.uint8), grid)
    parts = {at: np.full_like(part, 80 * (at[1] - 1)) for at, part in parts.items()}
    row = join(parts, grid)[20, :, 0].astype(int)
    assert (row[:16] == 0).all() and (row[24:] == 80).all()
    assert (np.diff(row[16:24]) == 10).all()


def test_too_small_a_picture_is_refused():
    with pytest.raises(PictureError, match="5x600"):
        Grid(600, 5)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("image_600px_0006.png", "0006"),
        ("image_2400px_0006.png", "0006"),
        ("holiday.jpg", "holiday"),
        ("bsds_1_2.jpg", "bsds_1_2"),
    ],
)
def test_picture_id(tmp_path, file, name):
    assert tiles.picture_id(tmp_path / file) == name


def test_tiles_are_found_by_name(tmp_path):
    for name in ("0006_01_06.png", "a_b_02_11.png", "noise.png"):
        (tmp_path / name).touch()
    found = tiles.find_tiles(tmp_path)
    assert found == {
        "0006": {(1, 6): tmp_path / "0006_01_06.png"},
        "a_b": {(2, 11): tmp_path / "a_b_02_11.png"},
    }
    assert tiles.tile_name("0006", 1, 6) == "0006_01_06.png"


def test_of_two_pictures_with_one_id_one_is_named(tmp_path):
    for name in ("cat.png", "cat.jpg"):
        save(tmp_path, name, photograph(0, 8))
    found, complaints = tiles.find_pictures(tmp_path)
    assert list(found) == ["cat"]
    assert "cat.png" in complaints[0] and "cat.jpg" in complaints[0]


def test_png_keeps_pixels_and_stamp(tmp_path):
    picture = photograph(1, 50)
    tiles.write_png(tmp_path / "a.png", picture, "made from b")
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == picture).all()
    assert tiles.read_stamp(tmp_path / "a.png") == "made from b"
    assert tiles.read_stamp(tmp_path / "none.png") is None


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), tiles.replacing(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_are_read_upright_and_in_rgb(tmp_path):
    picture = photograph(0, 40)[:30]
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright
    best = {"exif": exif, "quality": 100, "subsampling": 0}
    image.save(tmp_path / "camera.jpg", **best)
    image.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[image], **best)
    for name in ("camera.jpg", "phone.jpg"):
        assert tiles.picture_size(tmp_path / name) == (40, 30)
        upright = tiles.read_picture(tmp_path / name)
        assert np.abs(upright.astype(int) - np.rot90(picture, -1)).mean() < 2
    image.convert("L").save(tmp_path / "grey.png")
    assert tiles.read_picture(tmp_path / "grey.png").shape == (30, 40, 3)


def test_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    path = save(tmp_path, "cut.png", photograph(0, 100))
    path.write_bytes(path.read_bytes()[:2000])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    for name in ("text.png", "cut.png", "deep.png"):
        with pytest.raises(PictureError, match=name):
            tiles.read_picture(tmp_path / name)
    with pytest.raises(PictureError, match=r"text\.png"):
        tiles.picture_size(tmp_path / "text.png")


def test_size_is_told_without_reading_the_picture(tmp_path):
    path = save(tmp_path, "cut.png", photograph(0, 100))
    path.write_bytes(path.read_bytes()[:2000])
    assert tiles.picture_size(path) == (100, 100)
