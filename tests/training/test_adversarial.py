"""Adversarial training: where images are moved to, what is trained, what stays as it was."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.training import adversarial
from hf_specreg.training.adversarial import (
    AdversarialConfig,
    adversarial_loss,
    crafting,
    divergence,
    perturbed,
)
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.self_supervision import SelfSupervised, SelfSupervisedConfig
from tests.tiny import SIZE, images, tiny

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
METHODS = ("fgsm", "pgd", "trades")
NORMS = ("l2", "linf")


def objective(name="resnet20_cifar", augment=None, **settings):
    return Supervised(
        tiny(name),
        augment=augment or AugmentConfig(),
        adversarial=AdversarialConfig(**{"method": "pgd", "steps": 2, "eps": 0.1, **settings}),
    ).train()


def distances(moved, from_images, norm):
    order = {"l2": 2, "linf": torch.inf}[norm]
    return torch.linalg.vector_norm((moved - from_images).flatten(1), ord=order, dim=1)


@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.parametrize(
    ("norm", "dual", "steps"), [("linf", 1, {"method": "fgsm"}), ("l2", 2, {"steps": 3})]
)
def test_a_linear_loss_rises_by_eps_times_the_dual_norm_of_its_gradient(scale, norm, dual, steps):
    """Steps that outweigh the start end at eps sign(w), or at eps w / ||w||, however small w is."""
    w = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    middle = 0.2 + 0.6 * images()
    config = AdversarialConfig(**{"method": "pgd", **steps}, norm=norm, eps=0.1, step_size=1e3)
    moved = perturbed(lambda x: (scale * w * x).sum(), middle, config)
    expected = 0.1 * (w.sign() if norm == "linf" else w / w.norm())
    torch.testing.assert_close(moved - middle, expected.expand_as(middle), rtol=0, atol=1e-6)
    rise = (w * (moved - middle)).flatten(1).sum(1)
    torch.testing.assert_close(rise, (0.1 * w.norm(dual)).expand(5), rtol=1e-4, atol=0)


def test_fgsms_step_is_1_25_eps_from_a_uniform_start_and_projected():
    """So where the gradient is positive, pixels end in [eps / 4, eps], 3 of 8 below eps."""
    middle = torch.full((1, 100_000), 0.5)
    config = AdversarialConfig("fgsm", "linf", eps=0.1)
    moved = (perturbed(torch.sum, middle, config) - middle) / 0.1
    assert moved.min() == pytest.approx(0.25, abs=1e-3)
    assert (moved < 0.999).float().mean() == pytest.approx(0.375, abs=0.01)


def test_starts_in_l2_are_uniform_in_the_ball():
    """In d dimensions the share within radius r is r^d."""
    config = AdversarialConfig("pgd", "l2", eps=2.0)
    radii = adversarial._start(torch.zeros(20_000, 3), config).norm(dim=1) / 2
    for radius in (0.3, 0.6, 0.9, 1.0001):
        share = (radii < radius).float().mean()
        assert share == pytest.approx(min(radius, 1) ** 3, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", NORMS)
def test_images_stay_in_the_ball_and_in_their_box(method, norm):
    model = tiny()
    config = AdversarialConfig(method, norm, eps=0.3)
    for batch in (images(8).round(decimals=0), 3 * images(8) - 1):
        moved = perturbed(lambda x: F.cross_entropy(model(x), LABELS), batch, config)
        assert (distances(moved, batch, norm) <= 0.3 * (1 + 1e-5)).all()
        assert distances(moved, batch, norm).max() > 0.1
        assert moved.min() >= min(batch.min(), 0)
        assert moved.max() <= max(batch.max(), 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_crafting_leaves_the_model_as_it_was(method, batch_norm):
    """Its statistics, gradients, modes and features."""
    trained = objective(method=method, steps=None, batch_norm=batch_norm)
    model = trained.encoder
    model.network.norms_off = nn.BatchNorm2d(3).eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with crafting(model, trained.adversarial):
        assert model.network.bn1.training == (batch_norm == "train")
        assert not model.network.norms_off.training
        moved = perturbed(lambda x: model(x).exp().mean(), images(8), trained.adversarial)
    assert not moved.requires_grad
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert trained.features == []
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name


def test_the_mode_of_batch_norms_decides_the_gradient_that_is_followed():
    found = []
    for batch_norm in ("eval", "train"):
        trained = objective(method="fgsm", steps=None, batch_norm=batch_norm)
        torch.manual_seed(0)
        found.append(trained(images(8), LABELS))
    assert found[0] != found[1]


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("augment", [{}, {"label_smoothing": 0.2}, {"mixup": 1.0}])
def test_the_loss_is_the_plain_one_of_images_crafted_against_it(augment, count):
    """On mixed images and labels, on smoothed labels, of the first images alone; batch norms take
    its batch's statistics, and the features are those of this pass.
    """
    augment = AugmentConfig(**augment)
    trained = objective(augment=augment, images=count)
    plain = objective(augment=augment, method="none")
    np.random.seed(0)
    torch.manual_seed(0)
    loss = trained(images(8), LABELS)
    np.random.seed(0)
    torch.manual_seed(0)
    mixed, labels = plain.mixup(images(8), LABELS) if plain.mixup else (images(8), LABELS)
    smoothing = 0.0 if plain.mixup else augment.label_smoothing
    plain.eval()
    first, rest = mixed[:count], mixed[8 if count is None else count :]
    moved = perturbed(
        lambda x: F.cross_entropy(plain.encoder(x), labels[:count], label_smoothing=smoothing),
        first,
        trained.adversarial,
    )
    plain.train()
    moved = torch.cat([moved, rest])
    expected = F.cross_entropy(plain.encoder(moved), labels, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(trained.features, plain.features)
    assert trained.features[0].requires_grad
    torch.testing.assert_close(trained.state_dict(), plain.state_dict())
    assert loss > F.cross_entropy(plain.encoder(mixed), labels, label_smoothing=smoothing)


def test_trades_is_cross_entropy_and_beta_times_the_divergence():
    trained = objective("mlp_2000", method="trades", beta=3.0).double()
    batch = images(8).double()
    torch.manual_seed(0)
    loss = trained(batch, LABELS)
    model, features = trained.encoder, list(trained.features)
    clean = model(batch)
    torch.manual_seed(0)
    moved = perturbed(
        lambda x: F.kl_div(model(x).log_softmax(1), clean.detach().softmax(1), reduction="sum"),
        batch,
        trained.adversarial,
    )
    p, q = clean.softmax(1), model(moved).softmax(1)
    kl = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(loss, F.cross_entropy(clean, LABELS) + 3 * kl.mean())
    torch.testing.assert_close(features, [model.features(x) for x in (batch, moved)])
    noise = batch + 0.1 * F.normalize(torch.randn(8, 64)).reshape(8, *SIZE)
    assert kl.mean() > 2 * divergence(clean, model(noise))


def test_trades_with_beta_0_is_the_plain_loss():
    trained, plain = objective(method="trades", beta=0.0), objective(method="none")
    losses = [o(images(8), LABELS) for o in (trained, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for found, expected in zip(trained.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    """Where the start does not matter: two classes, a linear model, and a step across the ball."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    config = AdversarialConfig("fgsm", "linf", eps=0.1, step_size=0.2)
    batch, labels, gradients = 0.2 + 0.6 * images(8), LABELS.clamp(max=1), []
    for parts in (1, 4):
        model.zero_grad()
        for x, y in zip(batch.chunk(parts), labels.chunk(parts), strict=True):
            loss = adversarial_loss(model, lambda z, y=y: F.cross_entropy(z, y), x, config)
            (loss / parts).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_gradients_of_float32(method, dtype):
    """To every weight, which those cast for crafting must not hide."""
    gradients = []
    for half in (True, False):
        trained = objective(method=method, steps=None)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=half):
            loss = trained(images(8), LABELS)
        assert loss.isfinite()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.95


def test_under_fp16_images_are_crafted_in_float32():
    trained = objective()
    seen = []
    for half in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            with crafting(trained.encoder, trained.adversarial):
                moved = perturbed(
                    lambda x: F.cross_entropy(1e-4 * trained.encoder(x), LABELS),
                    images(8),
                    trained.adversarial,
                )
                assert trained.encoder(moved).dtype == torch.float32
        seen.append(moved)
    assert torch.equal(*seen)


@pytest.mark.parametrize("method", ["barlow-twins", "simclr", "vicreg", "byol"])
def test_self_supervision_trains_on_a_first_view_that_raises_its_loss(method):
    settings = SelfSupervisedConfig(method, projector_hidden=16, projector_out=8)
    config = AdversarialConfig("pgd", "l2", eps=0.5, batch_norm="train")
    torch.manual_seed(0)
    trained = SelfSupervised(tiny(num_classes=0), settings, adversarial=config).train()
    plain = copy.deepcopy(trained)
    plain.adversarial = AdversarialConfig()
    views = torch.stack([images(16), images(32)[16:]], dim=1)
    torch.manual_seed(0)
    loss = trained(views, None)
    assert loss > plain(views, None) + 1e-3
    loss.backward()
    assert all(p.grad is not None for p in trained.encoder.parameters())
    features = trained.features
    torch.manual_seed(0)
    with crafting(trained, config):
        first = perturbed(lambda x: trained._loss(x, views[:, 1]), views[:, 0], config)
    assert (distances(first, views[:, 0], "l2") <= 0.5 * (1 + 1e-5)).all()
    expected = [trained.encoder(view) for view in (first, views[:, 1])]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
