"""Self-supervised objectives: their losses, what they train, and what they leave alone."""

import sys

import pytest
import torch
import torch.nn.functional as F

from hf_specreg import SpectralPenalty
from hf_specreg.spectral.regularizers.spectral_norm import normalize_spectra
from hf_specreg.training.self_supervision import SelfSupervised, SelfSupervisedConfig
from tests.tiny import tiny

METHODS = ("barlow-twins", "simclr", "vicreg", "byol")


def encoder(name="mlp_2000"):
    return tiny(name, num_classes=0)


def views(count=16, seed=0):
    return torch.rand(count, 2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def objective(method, **settings):
    config = SelfSupervisedConfig(method, projector_hidden=16, projector_out=8, **settings)
    return SelfSupervised(encoder(), config)


def embeddings(objective, images):
    return [objective.projector(objective.encoder(view)) for view in images.unbind(1)]


def barlow_twins(a, b, off_diagonal=5e-3):
    """Zbontar et al. 2021, eq. 1 and 2."""
    a, b = [(z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (a, b)]
    c = a.T @ b / len(a)
    diagonal = c.diagonal()
    return (1 - diagonal).square().sum() + off_diagonal * (c.square().sum() - diagonal @ diagonal)


def nt_xent(a, b, temperature=0.07):
    """Chen et al. 2020, eq. 1, written over all pairs of the 2 N views."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z)).roll(len(a))
    return F.cross_entropy(similarity, partner)


def vicreg(a, b):
    """Bardes et al. 2022, eq. 1 to 6, their weights, lightly's mean of both variances."""
    invariance = (a - b).square().mean()
    variance = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b)) / 2
    covariance = 0.0
    for z in (a, b):
        c = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)
        covariance = covariance + (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]
    return 25 * invariance + 25 * variance + covariance


@pytest.mark.parametrize(
    ("method", "formula"),
    [("barlow-twins", barlow_twins), ("simclr", nt_xent), ("vicreg", vicreg)],
)
def test_the_loss_is_the_papers_formula(method, formula):
    trained = objective(method)
    expected = formula(*embeddings(trained, views()))
    torch.testing.assert_close(trained(views(), None), expected, rtol=1e-4, atol=1e-5)


def test_byol_predicts_the_teachers_embedding_of_the_other_view():
    """Grill et al. 2020, eq. 2, halved: 1 - cosine."""
    trained = objective("byol")
    first, second = embeddings(trained, views())
    teacher_encoder, teacher_projector = trained.teacher
    with torch.no_grad():
        targets = [teacher_projector(teacher_encoder(view)) for view in views().unbind(1)]
    predictions = [trained.predictor(first), trained.predictor(second)]
    cosines = [F.cosine_similarity(predictions[i], targets[1 - i]).mean() for i in (0, 1)]
    expected = 1 - sum(cosines) / 2
    torch.testing.assert_close(trained(views(), None), expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_gets_no_gradient_and_follows_ever_more_slowly():
    trained = objective("byol", teacher_momentum=0.9)
    trained(views(), None).backward()
    teacher = trained.teacher[0].network.hidden.weight
    assert teacher.grad is None
    student = trained.encoder.network.hidden.weight
    with torch.no_grad():
        student.add_(1.0)
    before = teacher.detach().clone()
    trained.after_step(0.5)
    torch.testing.assert_close(teacher - before, torch.full_like(teacher, 0.05))
    before = teacher.detach().clone()
    trained.after_step(1.0)
    assert torch.equal(teacher, before)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_the_penalty_leaves_the_projector_alone(method):
    trained = objective(method)
    penalty = SpectralPenalty(trained.encoder, strength=1.0)
    assert [layer.name for layer in penalty.layers] == ["hidden"]
    penalty().backward()
    assert trained.encoder.network.hidden.weight.grad.norm() > 0
    assert all(p.grad is None for p in trained.projector.parameters())
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(trained(views(), None))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_and_finite_under_mixed_precision(method, dtype):
    """Large pixels, and a batch in which all images are the same."""
    for images in (views() * 100, views(1).expand(16, -1, -1, -1, -1)):
        trained = objective(method)
        with torch.autocast("cpu", dtype=dtype):
            loss = trained(images, None)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        gradients = [p.grad for p in trained.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_under_bfloat16_is_near_that_in_float32(method):
    reference = objective(method)(views(), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(method)(views(), None)
    torch.testing.assert_close(loss, reference, rtol=0.05, atol=0.05)


def test_features_are_those_of_both_views_with_their_graph():
    trained = objective("simclr")
    trained(views(), None)
    for features, view in zip(trained.features, views().unbind(1), strict=True):
        torch.testing.assert_close(features, trained.encoder.features(view))
        assert features.requires_grad


def test_a_teacher_follows_a_student_under_spectral_normalisation():
    student = encoder()
    normalize_spectra(student)
    config = SelfSupervisedConfig("byol", projector_hidden=16, projector_out=8)
    trained = SelfSupervised(student, config)
    trained(views(), None).backward()
    with torch.no_grad():
        student.network.hidden.parametrizations.weight.original.add_(1.0)
    trained.after_step(0.5)
    names = [n for n, _ in trained.encoder.named_parameters()]
    assert [n for n, _ in trained.teacher[0].named_parameters()] == names


def test_an_encoder_with_a_head_is_refused():
    with pytest.raises(ValueError, match="without a head"):
        SelfSupervised(tiny(), SelfSupervisedConfig())


def test_without_lightly_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    with pytest.raises(ImportError, match="lightly: install the extra ssl"):
        objective("simclr")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_other_timm_backbones_can_be_trained(name):
    config = SelfSupervisedConfig("simclr", projector_hidden=8, projector_out=4)
    trained = SelfSupervised(encoder(name), config)
    trained(views(), None).backward()
    assert all(p.grad is not None for p in trained.encoder.parameters() if p.requires_grad)
