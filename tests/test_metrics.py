import numpy as np
import pytest
import torch
from conftest import CPU, photograph
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from metrics import compare, compare_edges, luma, original_ssim, precision_recall, ssim

HOW = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def to_tensor(image):
    return torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def images():
    a = photograph(0, 64)
    noise = np.random.default_rng(0).normal(0, 12, a.shape)
    return a, np.clip(a + noise, 0, 255).astype(np.uint8)


def test_ssim_is_scikit_images(images):
    expected = structural_similarity(*images, channel_axis=2, **HOW)
    assert ssim(*map(to_tensor, images), 255).item() == pytest.approx(expected, abs=1e-6)


def test_the_originals_ssim_is_of_images_in_minus_one_to_one(images):
    tanh = [image / 127.5 - 1 for image in images]
    expected = structural_similarity(*tanh, channel_axis=2, data_range=2, **HOW)
    unit = [to_tensor(image) / 255 for image in images]
    assert original_ssim(*unit).item() == pytest.approx(expected, abs=1e-6)


def test_luma_is_scikit_images(images):
    expected = rgb2ycbcr(images[0])[..., 0]
    assert np.allclose(luma(to_tensor(images[0]) / 255)[0, 0], expected, atol=1e-2)


@pytest.mark.parametrize("height", [64, 300])
def test_metrics_are_scikit_images_also_in_strips(height):
    hr = np.tile(photograph(1, 64), (5, 1, 1))[:height]
    noise = np.random.default_rng(0).normal(0, 9, hr.shape)
    sr = np.clip(hr + noise, 0, 255).astype(np.uint8)
    surplus = np.pad(hr, ((0, 3), (0, 2), (0, 0)), mode="edge")
    metrics = compare(sr, surplus, CPU)
    a, b = (rgb2ycbcr(each)[4:-4, 4:-4, 0] for each in (sr, hr))
    expected = {
        "PSNR": peak_signal_noise_ratio(b, a, data_range=255),
        "SSIM": structural_similarity(a, b, data_range=255, **HOW),
        "L1": np.abs(sr / 127.5 - hr / 127.5).mean(),
        "SSIM original": structural_similarity(
            sr / 127.5 - 1, hr / 127.5 - 1, channel_axis=2, data_range=2, **HOW
        ),
    }
    assert metrics == pytest.approx(expected, rel=1e-3)


def test_precision_and_recall_count_edges():
    hr_edges, edges = torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
    hr_edges[..., 2] = 1
    edges[..., :4, 2] = 0.9
    edges[..., 0, :4] = 0.8
    edges[..., 4, 4] = 0.4
    precision, recall = precision_recall(edges, hr_edges)
    assert (precision.item(), recall.item()) == (pytest.approx(4 / 7), pytest.approx(4 / 5))
    precision, recall = precision_recall(edges, hr_edges, tolerance=1)
    assert (precision.item(), recall.item()) == (pytest.approx(6 / 7), pytest.approx(1))
    arrays = [(255 * each[0, 0]).byte().numpy() for each in (edges, hr_edges)]
    f1 = 2 * (4 / 7) * (4 / 5) / (4 / 7 + 4 / 5)
    assert compare_edges(*arrays, CPU, tolerance=0)["F1"] == pytest.approx(f1)
