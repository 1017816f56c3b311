import numpy as np
from conftest import photograph

import images
from sheets import CAPTION, DETAIL, GAP, crop_detail, draw_preview, draw_sheet, find_details
from tiles import SCALE


def test_a_sheet_shows_details_of_images_of_any_size():
    small, large = photograph(0, 40), photograph(1, 300)
    sheet = draw_sheet([[("small", small), ("large", large)], [("right", large)]], [(0, 1), (1, 1)])
    below, beside = GAP + CAPTION, 2 * GAP + DETAIL
    assert sheet.shape == (2 * (DETAIL + CAPTION + GAP) + GAP, beside + DETAIL + GAP, 3)
    assert (sheet[below : below + 40, GAP : GAP + 40] == small).all()
    detail = sheet[below : below + DETAIL, beside : beside + DETAIL]
    assert (detail == large[:DETAIL, -DETAIL:]).all()
    below += DETAIL + CAPTION + GAP
    detail = sheet[below : below + DETAIL, GAP : GAP + DETAIL]
    assert (detail == large[-DETAIL:, -DETAIL:]).all()


def test_a_preview_shows_edges_dark_on_white_if_there_are_some():
    lr, sr = photograph(0, 50), photograph(0, 200)
    edges = np.zeros((200, 200), np.uint8)
    columns = [images.bicubic(lr, SCALE), 255 - np.stack([edges] * 3, 2), sr]
    center, y = find_details(lr, DETAIL // SCALE)[0], 2 * (GAP + CAPTION) + DETAIL
    for hr_edges, expected in ((edges, columns), (None, columns[::2])):
        sheet = draw_preview(lr, sr, hr_edges)
        for number, image in enumerate(expected):  # below the whole image
            x = GAP + number * (DETAIL + GAP)
            assert (sheet[y : y + DETAIL, x : x + DETAIL] == crop_detail(image, center)).all()
