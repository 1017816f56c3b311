from itertools import islice

import numpy as np
import pytest
import torch
from conftest import photograph, save, shrunk
from torch.utils.data import DataLoader

import device
import images
import slice_images_w_overlapping
from console import ImageError, UserError
from dataset import CropRequest, PairedTiles, crop_pair, draw_batches, draw_colors, split
from images import canny, read_image
from tiles import HR, LR, TEST, TILES, TRAINING, full_area


def test_whole_images_are_held_out(sliced):
    names, held_out = split(sliced, 4)
    assert len(held_out) == 1 and len(names) == 3  # a quarter of four at most
    assert not set(names) & set(held_out)
    for name, (lr, hr) in (names | held_out).items():
        assert lr.name == f"image_600px_{name}.png" and hr.name == f"image_2400px_{name}.png"
    assert split(sliced, 0) == (dict(sorted((names | held_out).items())), {})


def test_crops_of_lr_and_hr_show_the_same_place(sliced):
    names, _ = split(sliced, 0)
    dataset = PairedTiles(sliced, names, 24)
    for draws in islice(draw_batches(len(dataset), 4, (16, 24), seed=1), 4):
        for draw in draws:
            item = dataset[draw]
            lr, hr = (item[kind].permute(1, 2, 0).numpy() for kind in ("lr", "hr"))
            assert lr.shape == (draw.size, draw.size, 3)
            inner = (slice(2, -2), slice(2, -2))
            difference = shrunk(hr)[inner].astype(int) - lr[inner]
            assert np.abs(difference).mean() < 1


@pytest.mark.parametrize("edges", [(), ("lr",), ("lr", "hr")])
def test_colours_change_alike_in_lr_and_hr(sliced, edges):
    dataset = PairedTiles(sliced, split(sliced, 0)[0], 24, color=True, edges=edges)
    for position in range(40):
        item = dataset[CropRequest(0, 16, (0, position))]
        lr, hr = (item[kind].permute(1, 2, 0).numpy() for kind in ("lr", "hr"))
        difference = shrunk(hr)[2:-2, 2:-2].astype(int) - lr[2:-2, 2:-2]
        assert np.abs(difference).mean() < 4 and np.abs(difference.mean()) < 1.5


def test_each_colour_change_comes_every_other_time():
    rng = np.random.default_rng(0)
    drawn = [change for _ in range(400) for change, _ in draw_colors(rng)]
    counts = [drawn.count(change) for change in set(drawn)]
    assert len(counts) == 4 and all(160 < count < 240 for count in counts)


def test_edges_are_those_of_the_whole_tile(sliced):
    names, _ = split(sliced, 0)
    dataset = PairedTiles(sliced, names, 24, edges=("lr", "hr"))
    tile = canny(read_image(dataset.pairs[0][1]))
    for position in range(4):
        item = dataset[CropRequest(0, 24, (0, position))]
        assert item["lr_edges"].shape == (1, 24, 24) and item["hr_edges"].shape == (1, 96, 96)
        assert set(np.unique(item["hr_edges"])) <= {0, 255}
        assert _found(item["hr_edges"][0].numpy(), tile)


def _found(crop: np.ndarray, tile: np.ndarray) -> bool:
    """Whether a crop, turned or mirrored, lies at a multiple of 4 in `tile`; a few misses pass."""
    for flipped in (crop, crop[:, ::-1]):
        for turns in range(4):
            candidate = np.rot90(flipped, turns)
            for top in range(0, tile.shape[0] - 95, 4):
                for left in range(0, tile.shape[1] - 95, 4):
                    if (tile[top : top + 96, left : left + 96] != candidate).mean() < 0.005:
                        return True
    return False


def test_the_same_draw_gives_the_same_crop(sliced):
    dataset = PairedTiles(sliced, split(sliced, 0)[0], 24, color=True, edges=("lr",))
    first, second = (dataset[CropRequest(3, 20, (0, 7))] for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_sampler_draws_every_tile_once_an_epoch_with_one_size_a_batch():
    batches = list(islice(draw_batches(12, 4, (16, 31), seed=0), 6))
    for epoch in (batches[:3], batches[3:]):
        assert sorted(draw.tile for batch in epoch for draw in batch) == list(range(12))
    assert all(len({draw.size for draw in batch}) == 1 for batch in batches)
    sizes = {batch[0].size for batch in islice(draw_batches(12, 4, (16, 31), seed=0), 300)}
    assert min(sizes) == 16 and max(sizes) == 31


def test_sampler_goes_on_where_it_stopped():
    batches = list(islice(draw_batches(7, 4, (16, 31), seed=0), 6))
    assert list(islice(draw_batches(7, 4, (16, 31), seed=0, start=2), 4)) == batches[2:]


def test_processes_share_a_batch():
    batches = list(islice(draw_batches(7, 4, (16, 31), seed=0), 5))
    shares = [
        list(islice(draw_batches(7, 2, (16, 31), seed=0, rank=rank, world=2), 5)) for rank in (0, 1)
    ]
    assert [a + b for a, b in zip(*shares, strict=True)] == batches


def make_root(root, *sides, tiles=1):
    """A root of sliced training images `0.png`, `1.png`, ... of so many HR pixels a side."""
    for number, side in enumerate(sides):
        save(root / TRAINING / HR, f"{number}.png", photograph(number, side))
    (root / TEST).mkdir()
    slice_images_w_overlapping.main(["--root", str(root), "--tiles", str(tiles)])
    return root


def test_images_smaller_than_the_crops_are_left_out(tmp_path):
    root = make_root(tmp_path, 160, 96, 160)
    dataset = PairedTiles(root, split(root, 0)[0], 36)
    assert dataset.names == ["0", "2"] and dataset.small == ["1"] and len(dataset) == 2


def test_crops_larger_than_all_tiles_are_refused_with_a_size_that_fits(tmp_path):
    root = make_root(tmp_path, 96, 64)
    with pytest.raises(UserError, match="--crop 32"):
        PairedTiles(root, split(root, 0)[0], 64)


def test_missing_tiles_are_refused(tmp_path):
    with pytest.raises(ImageError, match="slice_images_w_overlapping"):
        split(tmp_path, 4)


def test_images_that_are_not_wholly_sliced_are_named_not_passed_over(tmp_path):
    make_root(tmp_path, 64, 64)
    for size in (HR, LR):
        save(tmp_path / TRAINING / size, "2.png", photograph(2)[:64, :64])
        with pytest.raises(ImageError, match=rf"{size}.2\.png: .*slice_images_w_overlapping"):
            split(tmp_path, 0)
        (tmp_path / TRAINING / size / "2.png").unlink()
    (tmp_path / TRAINING / HR / TILES / "1_01_01.png").unlink()
    with pytest.raises(ImageError, match=r"1\.png: .*slice_images_w_overlapping"):
        split(tmp_path, 0)


@pytest.mark.parametrize("size", [LR, HR])
def test_tiles_of_another_image_than_the_present_one_are_refused(tmp_path, size):
    image = make_root(tmp_path, 64, 64) / TRAINING / size / "1.png"
    save(image.parent, image.name, read_image(image)[::-1])
    with pytest.raises(ImageError, match=r"1_01_01\.png.*slice_images_w_overlapping"):
        split(tmp_path, 0)


def test_tiles_of_other_programs_need_no_stamp(tmp_path):
    tile = make_root(tmp_path, 64, 64) / TRAINING / LR / TILES / "1_01_01.png"
    save(tile.parent, tile.name, read_image(tile))
    assert list(split(tmp_path, 0)[0]) == ["0", "1"]


def test_damaged_tiles_come_as_errors_to_be_raised_elsewhere(tmp_path):
    root = make_root(tmp_path, 64, 64)
    dataset = PairedTiles(root, ["0", "1"], 16)
    (root / TRAINING / HR / TILES / "1_01_01.png").write_bytes(b"no image")
    item = dataset[CropRequest(1, 16, (0, 0))]
    assert isinstance(item, ImageError) and "1_01_01.png" in str(item)


@pytest.mark.parametrize("workers", [0, 1])
def test_tiles_in_memory_change_no_crop(sliced, monkeypatch, workers):
    names, edges = split(sliced, 0)[0], ("lr", "hr")
    kept, plain = (PairedTiles(sliced, names, 24, jpeg=0.5, edges=edges) for _ in range(2))
    draws = list(islice(draw_batches(len(kept), 4, (24, 24), 0), 4))
    expected = [[plain[request] for request in requests] for requests in draws]
    kept.keep_in_memory()
    monkeypatch.setattr(images, "read_image", None)
    context = "fork" if workers else None
    loader = DataLoader(
        kept, batch_sampler=draws, num_workers=workers, multiprocessing_context=context
    )
    for batch, items in zip(loader, expected, strict=True):
        for key, value in batch.items():
            same = (value == torch.stack([item[key] for item in items])).float().mean()
            assert same == 1 or (key == "hr_edges" and same > 0.995)


def test_half_of_free_memory_holds_all_tiles_or_none(sliced, monkeypatch):
    dataset = PairedTiles(sliced, split(sliced, 0)[0], 24)
    for free, kept in ((2 * dataset.size, 0), (2 * dataset.size + 2, len(dataset))):
        monkeypatch.setattr(device, "free_ram", lambda free=free: free)
        dataset.keep_in_memory()
        assert len(dataset.in_memory) == kept
    size = sum(array.nbytes for arrays in dataset.in_memory for array in arrays)
    assert size <= 1.1 * dataset.size


def test_non_square_grids_pair_rows_with_rows(tmp_path):
    hr = photograph(1)[:192, :384]
    save(tmp_path / TRAINING / HR, "wide.png", hr)
    (tmp_path / TEST).mkdir()
    slice_images_w_overlapping.main(["--root", str(tmp_path), "--tiles", "2"])
    dataset = PairedTiles(tmp_path, ["wide"], 24)
    assert [(a.name, b.name) for a, b in dataset.pairs] == [
        (f"wide_{at}.png", f"wide_{at}.png") for at in ("01_01", "01_02", "02_01", "02_02")
    ]
    assert (tmp_path / TRAINING / LR / "wide.png").exists()


def test_half_of_the_lr_crops_pass_through_jpeg_and_canny_sees_them(sliced):
    names, _ = split(sliced, 0)
    edges = ("lr", "hr")
    clean = PairedTiles(sliced, names, 24, edges=edges)
    mixed = PairedTiles(sliced, names, 24, jpeg=0.5, edges=edges)
    changed = 0
    for position in range(60):
        draw = CropRequest(position % len(clean), 24, (0, position))
        before, after = clean[draw], mixed[draw]
        assert torch.equal(before["hr"], after["hr"])
        assert torch.equal(before["hr_edges"], after["hr_edges"])
        difference = (before["lr"].float() - after["lr"].float()).abs().mean()
        assert difference < 12
        changed += bool(difference > 0)
        if difference == 0:
            assert torch.equal(before["lr_edges"], after["lr_edges"])
    assert 18 < changed < 42


def test_lr_edges_are_those_of_the_jpeg_that_the_network_sees():
    hr = photograph(0, 96)
    lr = shrunk(hr)
    item = crop_pair(lr, hr, full_area(lr.shape), ("lr", "hr"), quality=60)
    seen = item["lr"].permute(1, 2, 0).numpy()
    assert (item["hr"].permute(1, 2, 0).numpy() == hr).all()
    assert (seen != lr).any() and (item["lr_edges"][0].numpy() == canny(seen)).all()
    assert (canny(seen) != canny(lr)).any() and (item["hr_edges"][0].numpy() == canny(hr)).all()
