import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import photograph
from skimage.color import rgb2ycbcr
from skimage.metrics import structural_similarity

from losses import (
    PerceptualLoss,
    discriminator_loss,
    edge_cross_entropy,
    feature_matching,
    generator_loss,
    hinge_discriminator,
    hinge_generator,
    luma,
    precision_recall,
    ssim,
)
from models import WeightError


def to_tensor(picture):
    return torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def pictures():
    a = photograph(0, 64)
    noise = np.random.default_rng(0).normal(0, 12, a.shape)
    return a, np.clip(a + noise, 0, 255).astype(np.uint8)


def test_ssim_is_scikit_images(pictures):
    expected = structural_similarity(
        *pictures, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(*map(to_tensor, pictures), 255).item() == pytest.approx(expected, abs=1e-6)
    tanh = [to_tensor(picture) / 127.5 - 1 for picture in pictures]
    assert ssim(*tanh, 2).item() == pytest.approx(expected, abs=0.02)  # its means are shifted


def test_luma_is_scikit_images(pictures):
    expected = rgb2ycbcr(pictures[0])[..., 0]
    assert np.allclose(luma(to_tensor(pictures[0]))[0, 0], expected, atol=1e-2)


def test_precision_and_recall_count_edges():
    true, predicted = torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
    true[..., 2] = 1
    predicted[..., :4, 2] = 0.9
    predicted[..., 0, :4] = 0.8
    predicted[..., 4, 4] = 0.4
    precision, recall = precision_recall(predicted, true)
    assert (precision.item(), recall.item()) == (pytest.approx(4 / 7), pytest.approx(4 / 5))
    precision, recall = precision_recall(predicted, true, tolerance=1)
    assert (precision.item(), recall.item()) == (pytest.approx(6 / 7), pytest.approx(1))


def test_hinge_losses():
    on_true, on_predicted = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert hinge_discriminator(on_true, on_predicted) == (0.5 + 1) / 2
    assert hinge_generator(on_predicted) == 0.5


def test_feature_matching_leaves_the_true_features_alone():
    predicted = [torch.ones(2, 3, requires_grad=True)]
    true = [torch.zeros(2, 3, requires_grad=True)]
    loss = feature_matching(predicted, true)
    loss.backward()
    assert loss == 1 and true[0].grad is None and predicted[0].grad is not None


def test_perceptual_loss_is_vgg19s_with_the_usual_normalisation(vgg):
    torch.manual_seed(0)
    sr, hr = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    features = torchvision.models.vgg19().features[:12]
    features.load_state_dict(
        {key.removeprefix("features."): value for key, value in torch.load(vgg).items()}
    )
    normalise = torchvision.models.VGG19_Weights.IMAGENET1K_V1.transforms()
    a, b = (
        torchvision.transforms.functional.normalize((x + 1) / 2, normalise.mean, normalise.std)
        for x in (sr, hr)
    )
    expected = F.mse_loss(features(a), features(b))
    assert PerceptualLoss(vgg)(sr, hr).item() == pytest.approx(expected.item(), rel=1e-5)


def test_perceptual_loss_reaches_the_generated_picture_only(vgg):
    sr, hr = (torch.rand(1, 3, 16, 16, requires_grad=True) for _ in range(2))
    loss = PerceptualLoss(vgg)
    loss(sr, hr).backward()
    assert sr.grad.abs().max() > 0 and hr.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_perceptual_loss_names_a_file_without_vgg(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightError, match=r"other\.pth"):
        PerceptualLoss(tmp_path / "other.pth")


def test_generator_loss_has_the_originals_weights():
    sr, hr = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)
    terms = generator_loss(sr, hr, torch.tensor(2.0), torch.tensor([0.5]))
    assert terms["l1"] == 0.5
    assert terms["perceptual"] == pytest.approx(0.012)
    assert terms["adversarial"] == pytest.approx(1e-3 * np.log(2))
    assert terms["ssim"] == 1 - ssim(sr, hr, 2)


def test_soft_labels_stay_within_their_ranges():
    on_true, on_generated = torch.tensor([0.9, 0.9]), torch.tensor([0.2, 0.2])
    softness = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = F.binary_cross_entropy(on_true, torch.tensor([1.0, 0.7]))
    expected += F.binary_cross_entropy(on_generated, torch.tensor([0.0, 0.3]))
    assert discriminator_loss(on_true, on_generated, softness) == expected


def test_a_missing_edge_weighs_four_times_an_invented_one():
    true = torch.tensor([[[[1.0, 0.0]]]])
    missed, invented = torch.tensor([[[[0.25, 0.5]]]]), torch.tensor([[[[0.5, 0.75]]]])
    assert float(edge_cross_entropy(missed, true)) == pytest.approx((4 * np.log(4) + np.log(2)) / 2)
    assert float(edge_cross_entropy(invented, true)) == pytest.approx(
        (4 * np.log(2) + np.log(4)) / 2
    )
