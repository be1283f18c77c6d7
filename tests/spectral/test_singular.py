"""Top singular values: the iterations against the exact references, and the references against
each other."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_specreg.spectral.layers import linear_operators
from hf_specreg.spectral.operators import Dense
from hf_specreg.spectral.singular import (
    _top_by_squaring,
    _top_by_svd,
    bidiagonalize,
    random_vector,
    top_singular_value,
)
from tests.spectral.references import dense_matrix, top_singular_value_dense, top_singular_value_fft


def matrix_operator(weight):
    return Dense("layer", (weight.shape[1],), lambda: weight)


def operator_of(layer, shape):
    (operator,) = linear_operators("layer", layer, shape)
    return operator, operator.effective_weight().detach()


def start(operator, weight):
    return random_vector(operator, weight, torch.Generator().manual_seed(0))


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    kernel=st.sampled_from([3, 5]),
    stride=st.sampled_from([1, 2, 3]),
    dilation=st.sampled_from([1, 2]),
)
def test_fourier_form_matches_dense_svd_of_circular_convolutions(
    dims, groups, kernel, stride, dilation
):
    layer_type = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
    padding = dilation * (kernel - 1) // 2
    layer = layer_type(
        2 * groups,
        3 * groups,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=False,
        padding_mode="circular",
    ).double()
    operator, weight = operator_of(layer, (2 * groups, *(6,) * dims))
    torch.testing.assert_close(
        top_singular_value_fft(operator, weight), top_singular_value_dense(operator, weight)
    )


def test_zero_and_circular_padding_have_different_norms():
    torch.manual_seed(0)
    zeros = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    circular = nn.Conv2d(3, 3, 3, padding=1, bias=False, padding_mode="circular")
    circular.load_state_dict(zeros.state_dict())
    sigma = [top_singular_value_dense(*operator_of(c, (3, 6, 6))) for c in (zeros, circular)]
    assert sigma[0] < 0.99 * sigma[1]


@pytest.mark.parametrize(
    ("dtype", "least", "reached"), [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-12, 1e-10)]
)
def test_more_steps_raise_sigma_towards_the_top_and_reach_it(dtype, least, reached):
    torch.manual_seed(0)
    weight = torch.randn(20, 30).to(dtype)
    operator = matrix_operator(weight)
    v = start(operator, weight)
    sigmas = [bidiagonalize(operator, weight, v, steps=k)[0].item() for k in range(1, 21)]
    assert all(b >= a * (1 - least) for a, b in itertools.pairwise(sigmas))
    exact = torch.linalg.matrix_norm(weight, ord=2).item()
    assert sigmas[-1] == pytest.approx(exact, rel=reached)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 100))
def test_u_and_v_are_unit_vectors_that_give_sigma_and_the_residual(outputs, inputs, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    operator = matrix_operator(weight)
    v = start(operator, weight)
    sigma, u, v, residual = bidiagonalize(operator, weight, v, steps=steps, exact=True)
    for vector in (u, v):
        assert vector.norm().item() == pytest.approx(1)
    torch.testing.assert_close(v @ weight.T, sigma * u)
    torch.testing.assert_close((u @ weight - sigma * v).norm(), residual[0], atol=1e-6, rtol=1e-6)


def test_a_few_steps_bring_a_stale_vector_back():
    """The weights move a little, the vector is stale and its value low; three steps take most
    of that away."""
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(20, 20))
    right, _ = torch.linalg.qr(torch.randn(20, 20))
    weight = left @ torch.diag(torch.linspace(1, 3, 20) ** 2) @ right
    operator = matrix_operator(weight)
    found = top_singular_value(operator, weight, start(operator, weight), tolerance=1e-5)
    moved = weight + 0.3 * torch.randn(20, 20)
    exact = torch.linalg.matrix_norm(moved, ord=2)

    stale = (found.u @ moved @ found.v.T).item()
    recovered = [bidiagonalize(operator, moved, found.v, steps=k)[0].item() for k in (3, 8)]
    assert stale / exact < 1 - 1e-3
    assert 0 <= 1 - recovered[0] / exact < 0.2 * (1 - stale / exact)
    assert recovered[1] == pytest.approx(exact.item(), rel=1e-5)


def kernels_with_a_gap():
    """Kernels [out, in, 3, 3] whose vectors are found in a few steps, so that further steps have
    nothing but rounding left to work on."""
    torch.manual_seed(0)
    low_rank = torch.einsum("ok,ik,hw->oihw", *(torch.randn(32, 2) for _ in "oi"), torch.ones(3, 3))
    return {
        "rank one": torch.randn(64, 1, 1, 1) * torch.randn(1, 64, 1, 1) * torch.ones(3, 3)
        + 0.01 * torch.randn(64, 64, 3, 3),
        "low rank": low_rank + 0.01 * torch.randn(32, 32, 3, 3),
        "ones": 1 + 0.1 * torch.randn(16, 16, 3, 3),
        "few outputs": torch.randn(2, 2, 3, 3),
        "random": torch.randn(32, 32, 3, 3),
    }


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("steps", [4, 8, 16])
@pytest.mark.parametrize("kind", list(kernels_with_a_gap()))
def test_renewals_with_rounded_products_stay_at_the_top(kind, steps, share):
    """Ten in a row, each from what the one before it left, with some noise."""
    kernel = kernels_with_a_gap()[kind]
    outputs, inputs = kernel.shape[:2]
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    layer.weight.data = kernel
    operator, weight = operator_of(layer, (inputs, 3, 3))
    exact = top_singular_value_dense(operator, weight)
    v = top_singular_value(operator, weight, start(operator, weight), tolerance=1e-5).v
    for seed in range(10):
        noise = share * random_vector(operator, weight, torch.Generator().manual_seed(seed))
        _, u, v, _ = bidiagonalize(operator, weight.bfloat16(), v + noise, steps=steps)
        assert u.dtype == v.dtype == torch.float32
        assert (u * operator.apply(weight, v)).sum() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("able", [False, True])
def test_only_large_products_of_convolutions_are_rounded_where_the_processor_can(monkeypatch, able):
    monkeypatch.setattr("hf_specreg.spectral.operators.multiplies_bfloat16", lambda: able)
    large, small, own = nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=64)
    expected = torch.bfloat16 if able else torch.float32
    for layer, shape, dtype in (
        (large, (64, 32, 32), expected),
        (small, (64, 4, 4), torch.float32),
        (own, (64, 128, 128), torch.float32),
        (nn.Linear(2048, 2048), (2048,), torch.float32),
        (nn.Conv2d(64, 64, 3).double(), (64, 32, 32), torch.float64),
    ):
        operator, weight = operator_of(layer, shape)
        assert operator.rounded(weight).dtype == dtype


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
def test_both_ways_to_the_top_of_small_matrices_agree(scale):
    torch.manual_seed(0)
    small = scale * torch.randn(50, 8, 8).triu()
    small[0] = 0
    sigma, left, right = _top_by_squaring(small)
    expected = _top_by_svd(small)[0]
    torch.testing.assert_close(sigma, expected, rtol=1e-4, atol=0)
    image = (small @ right[..., None])[..., 0]
    torch.testing.assert_close(image, sigma[:, None] * left, rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(right.norm(dim=1), torch.ones(50))
    assert left[0].norm() == 0


def test_scaling_the_weight_scales_sigma():
    torch.manual_seed(0)
    operator, weight = operator_of(nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 8, 8))
    v = start(operator, weight)
    sigma = top_singular_value(operator, weight, v, tolerance=1e-5).sigma
    scaled = top_singular_value(operator, -2.5 * weight, v, tolerance=1e-5).sigma
    torch.testing.assert_close(scaled, 2.5 * sigma, rtol=1e-4, atol=0)


def test_sigma_of_a_projection_and_of_a_scaled_identity_are_known():
    weight = torch.zeros(6, 6)
    weight[0, 0] = 1.0
    operator = matrix_operator(weight)
    assert top_singular_value(operator, weight, start(operator, weight)).sigma == pytest.approx(1.0)
    weight = 3.0 * torch.eye(6)
    operator = matrix_operator(weight)
    assert top_singular_value(operator, weight, start(operator, weight)).sigma == pytest.approx(3.0)


def test_a_depthwise_vector_moves_to_the_channel_that_becomes_the_largest():
    """With one unit vector for all channels, those that were not the largest would have died out
    to 0."""
    layer = nn.Conv2d(4, 4, 1, groups=4, bias=False)
    operator, weight = operator_of(layer, (4, 3, 3))
    weight = torch.tensor([4.0, 1.0, 0.5, 0.1]).reshape(4, 1, 1, 1)
    v = start(operator, weight)
    for _ in range(50):
        _, _, v, _ = bidiagonalize(operator, weight, v, steps=4)
    shrunk = weight.clone()
    shrunk[0] = 0.01
    sigma, _, _, _ = bidiagonalize(operator, shrunk, v, steps=1)
    assert sigma.max() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-23, 1e-30])
def test_a_dead_group_does_not_spoil_the_others(scale):
    torch.manual_seed(0)
    operator, weight = operator_of(nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 6, 6))
    expected = top_singular_value_dense(operator, weight[:3].repeat(2, 1, 1, 1)[:4])
    weight[3] *= scale
    found = top_singular_value(operator, weight, start(operator, weight))
    assert found.converged
    assert found.v.isfinite().all()
    torch.testing.assert_close(found.sigma, expected, rtol=1e-3, atol=0)
    sigma, u, v, _ = bidiagonalize(operator, weight, found.v, steps=4)
    assert sigma.isfinite().all()
    assert u.isfinite().all()
    assert v.isfinite().all()


def test_a_warm_vector_that_is_no_longer_the_top_one_is_not_taken_for_it():
    """Halving the top singular value leaves the vector a singular one, of a value that is not the
    top."""
    torch.manual_seed(0)
    weight = torch.randn(60, 60)
    operator = matrix_operator(weight)
    v = top_singular_value(operator, weight, start(operator, weight), tolerance=1e-6).v
    left, values, right = torch.linalg.svd(weight)
    values[0] /= 2
    halved = left @ torch.diag(values) @ right
    found = top_singular_value(operator, halved, v)
    torch.testing.assert_close(found.sigma, values[1], rtol=1e-3, atol=0)


def test_a_layer_that_starts_at_zero_is_seen_once_it_grows():
    torch.manual_seed(0)
    weight = torch.zeros(5, 7)
    operator = matrix_operator(weight)
    v = start(operator, weight)
    found = top_singular_value(operator, weight, v)
    assert found.sigma == 0
    assert found.converged
    _, _, v, _ = bidiagonalize(operator, weight, v, steps=3)
    grown = torch.randn(5, 7)
    sigma, _, _, _ = bidiagonalize(operator, grown, v, steps=5)
    assert sigma.item() == pytest.approx(torch.linalg.matrix_norm(grown, ord=2).item(), rel=1e-3)


def test_non_convergence_is_visible():
    torch.manual_seed(0)
    weight = torch.diag(torch.linspace(0.99, 1, 400))
    operator = matrix_operator(weight)
    found = top_singular_value(
        operator, weight, start(operator, weight), tolerance=1e-6, max_products=24
    )
    assert not found.converged
    assert found.residual > 1e-6


def test_nan_in_the_weight_is_reported_as_not_converged():
    weight = torch.randn(4, 4)
    weight[1, 2] = torch.nan
    operator = matrix_operator(weight)
    found = top_singular_value(operator, weight, start(operator, weight))
    assert not found.converged
    assert found.sigma.isnan()


def test_dense_matrix_of_a_linear_layer_is_its_weight():
    layer = nn.Linear(4, 3)
    operator, weight = operator_of(layer, (4,))
    torch.testing.assert_close(dense_matrix(operator, weight), layer.weight.detach())
