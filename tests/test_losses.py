import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from console import UserError
from losses import (
    PerceptualLoss,
    discriminator_loss,
    edge_cross_entropy,
    feature_matching,
    generator_terms,
    hinge_discriminator,
    hinge_generator,
    relativistic,
    spectral_distance,
    squared_error,
    subpixel_means,
    vgg_state,
)
from metrics import ssim


def test_hinge_losses():
    on_true, on_predicted = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert hinge_discriminator(on_true, on_predicted) == (0.5 + 1) / 2
    assert hinge_generator(on_predicted) == 0.5


def test_feature_matching_leaves_the_true_features_alone():
    predicted = [torch.ones(2, 3, requires_grad=True)]
    true = [torch.zeros(2, 3, requires_grad=True)]
    loss = feature_matching(predicted, true)
    loss.backward()
    assert loss == 10 and true[0].grad is None and predicted[0].grad is not None


def test_perceptual_loss_is_vgg19s_with_the_usual_normalisation(vgg):
    torch.manual_seed(0)
    sr, hr = torch.rand(2, 2, 3, 32, 32)
    features = torchvision.models.vgg19().features[:12]
    features.load_state_dict(
        {key.removeprefix("features."): value for key, value in torch.load(vgg).items()}
    )
    normalise = torchvision.models.VGG19_Weights.IMAGENET1K_V1.transforms()
    a, b = (
        torchvision.transforms.functional.normalize(x, normalise.mean, normalise.std)
        for x in (sr, hr)
    )
    expected = F.mse_loss(features(a), features(b))
    assert PerceptualLoss(vgg_state(vgg))(sr, hr).item() == pytest.approx(expected.item(), rel=1e-5)


def test_perceptual_loss_reaches_the_generated_image_only(vgg):
    sr, hr = (torch.rand(1, 3, 16, 16, requires_grad=True) for _ in range(2))
    loss = PerceptualLoss(vgg_state(vgg))
    loss(sr, hr).backward()
    assert sr.grad.abs().max() > 0 and hr.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("invalid hash value")])
def test_failed_download_of_vgg_names_the_option(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torchvision.models.VGG19_Weights, "get_state_dict", fail)
    with pytest.raises(UserError, match=r"vgg19.*--vgg"):
        vgg_state(None)


def test_perceptual_loss_names_a_file_without_vgg(tmp_path, vgg):
    state = torch.load(vgg)
    key = "features.5.weight"
    for spoilt in (
        {"a": torch.zeros(1)},
        state | {key: state[key][:, :1]},
        state | {key: torch.full_like(state[key], torch.nan)},
    ):
        torch.save(spoilt, tmp_path / "other.pth")
        with pytest.raises(UserError, match=r"other\.pth"):
            vgg_state(tmp_path / "other.pth")


def test_a_missing_file_of_vgg_is_not_to_be_trained(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth.*--vgg") as error:
        vgg_state(tmp_path / "none.pth")
    assert "train" not in str(error.value)


def test_generator_loss_has_the_originals_weights_on_its_scale():
    sr, hr = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)  # -1 and 0 there
    terms = generator_terms(sr, hr, torch.tensor(2.0), torch.tensor([0.0]))
    assert terms["l1"] == 1
    assert terms["perceptual"] == pytest.approx(0.012)
    assert terms["adversarial"] == pytest.approx(1e-3 * np.log(2))
    assert terms["ssim"].item() == pytest.approx(1 - ssim(sr - 1, hr - 0.5, 2).item())
    assert squared_error(sr, hr) == 1


def test_soft_labels_stay_within_their_ranges():
    on_true, on_generated = torch.tensor([2.0, 2.0]), torch.tensor([-1.5, -1.5])
    softness = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = F.binary_cross_entropy(on_true.sigmoid(), torch.tensor([1.0, 0.7]))
    expected += F.binary_cross_entropy(on_generated.sigmoid(), torch.tensor([0.0, 0.3]))
    assert discriminator_loss(on_true, on_generated, softness) == pytest.approx(expected.item())


def test_a_missing_edge_weighs_four_times_an_invented_one():
    true = torch.tensor([[[[1.0, 0.0]]]])
    missed, invented = torch.tensor([[[[0.25, 0.5]]]]), torch.tensor([[[[0.5, 0.75]]]])
    for probability, expected in (
        (missed, (4 * np.log(4) + np.log(2)) / 2),
        (invented, (4 * np.log(2) + np.log(4)) / 2),
    ):
        assert float(edge_cross_entropy(probability.logit(), true)) == pytest.approx(expected)


def test_relativistic_loss_asks_to_look_more_real_than_the_other_side():
    real, fake = torch.tensor([3.0, 5.0]), torch.tensor([-4.0, -4.0])
    assert relativistic(real, fake) < 0.01
    assert relativistic(fake, real) > 5
    assert relativistic(real, real.flip(0)) == pytest.approx(np.log(2), abs=0.3)


def test_spectral_distance_is_that_of_numpys_spectra():
    sr, hr = (torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    hann = np.hanning(33)[:-1]
    found = []
    for row, col in itertools.product(range(0, 17, 16), range(0, 49, 16)):
        windows = [each[..., row : row + 32, col : col + 32].numpy() for each in (sr, hr)]
        a, b = (np.abs(np.fft.rfft2(each * np.outer(hann, hann))) / 32 for each in windows)
        found.append(np.abs(a - b).mean())
    assert spectral_distance(sr, hr).item() == pytest.approx(np.mean(found), rel=1e-4)


def test_spectral_distance_sees_how_much_texture_there_is_but_not_where():
    torch.manual_seed(0)
    flat, texture = torch.full((1, 3, 128, 128), 0.5), 0.1 * torch.randn(1, 3, 128, 128)
    assert spectral_distance(flat, flat) == 0
    elsewhere = spectral_distance(flat + texture, flat + texture.roll((40, 40), (2, 3)))
    assert elsewhere < spectral_distance(flat, flat + texture) / 1.5


def test_subpixel_means_see_grids_and_casts_but_not_texture():
    torch.manual_seed(0)
    hr = torch.rand(2, 3, 64, 96)
    checkerboard = 0.1 * ((torch.arange(64)[:, None] + torch.arange(96)) % 2 - 0.5)
    assert subpixel_means(hr, hr) == 0
    assert subpixel_means(hr + 0.3, hr) == pytest.approx(0.3**2)
    assert subpixel_means(hr + checkerboard, hr) == pytest.approx(0.05**2, rel=1e-3)
    assert subpixel_means(hr + 0.05 * torch.randn_like(hr), hr) < 0.05**2 / 50
