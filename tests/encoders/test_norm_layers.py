"""Encoders that have dynamic tanh, or nothing, where their norms were."""

import pytest
import timm
import torch
from torch import nn

from hf_specreg import SpectralPenalty
from hf_specreg.encoders.norm_layers import DynamicTanh, DynamicTanh2d
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.training.model import ModelConfig, build_encoder

CONVNEXT = {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
WITHOUT_NORMS = {
    "vit, dynamic tanh": ("vit_tiny_patch16_224", {**VIT, "norm_layer": "dynamictanh"}),
    "vit, nothing": (
        "vit_tiny_patch16_224",
        {**VIT, "norm_layer": "identity", "init_values": 0.1},
    ),
    "convnext, dynamic tanh": ("convnext_atto", {**CONVNEXT, "norm_layer": "dynamictanh"}),
    "convnext of linear layers": (
        "convnext_atto",
        {**CONVNEXT, "norm_layer": "dynamictanh", "conv_mlp": False},
    ),
    "convnext, nothing": (
        "convnext_atto",
        {**CONVNEXT, "norm_layer": "identity", "ls_init_value": 0.1},
    ),
    "hiera": ("hiera_tiny_224", {"norm_layer": "dynamictanh", "stages": [1, 1, 1, 1]}),
}


def in_general_position(module):
    """With every gain and bias away from where it begins."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def test_dynamic_tanh_is_the_papers_of_tokens_and_of_maps():
    torch.manual_seed(0)
    tokens, maps = (in_general_position(kind(5).double()) for kind in (DynamicTanh, DynamicTanh2d))
    maps.load_state_dict(tokens.state_dict())
    x = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    gamma, alpha, beta = tokens.weight, tokens.alpha, tokens.bias
    expected = gamma * (torch.exp(2 * alpha * x) - 1) / (torch.exp(2 * alpha * x) + 1) + beta
    torch.testing.assert_close(tokens(x), expected)
    torch.testing.assert_close(maps(x.movedim(-1, 1)), expected.movedim(-1, 1))
    (slope,) = torch.autograd.grad(tokens(x).sum(), x)
    torch.testing.assert_close(slope, (gamma * alpha / torch.cosh(alpha * x) ** 2).expand_as(x))
    begun = DynamicTanh(5)(x.float())
    torch.testing.assert_close(begun, torch.tanh(x.float() / 2))


@pytest.mark.parametrize(("name", "arguments"), WITHOUT_NORMS.values(), ids=WITHOUT_NORMS)
def test_timm_takes_it_by_name_and_no_map_has_a_free_scale(name, arguments):
    model = timm.create_model(name, num_classes=3, **arguments)
    kinds = {type(module) for module in model.modules()}
    assert not [kind for kind in kinds if kind.__name__.startswith(("LayerNorm", "BatchNorm"))]
    has_tanh = not kinds.isdisjoint({DynamicTanh, DynamicTanh2d})
    assert has_tanh == (arguments["norm_layer"] == "dynamictanh")
    size = (3, 16, 16) if name == "convnext_atto" else None
    assert SpectralPenalty(model, input_size=size).free_scale == ()


class Chain(nn.Module):
    """Maps with dynamic tanh between them, which a sum may go past."""

    def __init__(self, *, residual: bool):
        super().__init__()
        self.residual = residual
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = DynamicTanh(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        y = self.second(self.norm(x))
        return self.head(x + y if self.residual else y)


@pytest.mark.parametrize("residual", [False, True])
def test_folded_both_gains_count_once_as_the_slope_at_0_which_no_input_exceeds(residual):
    torch.manual_seed(0)
    chain = in_general_position(Chain(residual=residual)).double()
    options = {"head": "head", "input_size": (4,), "fold_norm": True}
    penalty = SpectralPenalty(chain, strength=1.0, **options)
    first, second, norm = chain.first.weight, chain.second.weight, chain.norm
    maps = [first, second * (norm.alpha * norm.weight)]
    if not residual:  # alpha is the first map's own
        maps = [norm.alpha * first, second * norm.weight]
    value, expected = penalty(), sum(torch.linalg.matrix_norm(m, 2) ** 2 for m in maps)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    of = (first, second, norm.weight, norm.alpha)
    found, exact = (torch.autograd.grad(v, of) for v in (value, expected))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-7)

    def block(x):
        return chain.second(norm(x))

    def slope(x):
        jacobian = torch.autograd.functional.jacobian(block, x)
        return torch.linalg.matrix_norm(jacobian, 2).item()

    steepest = torch.linalg.matrix_norm(second * (norm.alpha * norm.weight), 2).item()
    assert slope(torch.zeros(4, dtype=torch.double)) == pytest.approx(steepest)
    assert all(slope(torch.randn(4, dtype=torch.double)) < steepest for _ in range(5))


@torch.no_grad()
def test_what_alpha_takes_over_from_the_map_before_it_lowers_the_plain_penalty_only():
    """W / c and c alpha are the same function: the plain penalty's one way out, which folding
    closes. W / c alone is another function, as no layer norm would have it.
    """
    torch.manual_seed(0)
    chain = Chain(residual=False).double()
    x, options = torch.randn(3, 4, dtype=torch.double), {"head": "head", "input_size": (4,)}
    before = chain(x)
    plain = SpectralPenalty(chain, strength=1.0, **options)
    folded = SpectralPenalty(chain, strength=1.0, fold_norm=True, **options)
    values = [penalty.sigmas()["first"] for penalty in (plain, folded)]
    for parameter in chain.first.parameters():
        parameter /= 3
    assert (chain(x) - before).abs().max() > 0.01
    chain.norm.alpha *= 3
    torch.testing.assert_close(chain(x), before)
    after = [penalty.sigmas()["first"] for penalty in (plain, folded)]
    assert after == pytest.approx([values[0] / 3, values[1]], rel=1e-4)


def test_a_convnext_of_stock_timm_has_no_norms_where_its_batch_norms_are_pinned(tmp_path):
    config = ModelConfig(
        name="convnext_atto",
        args={**CONVNEXT, "norm_layer": "batchnorm2d"},
        input_size=(3, 16, 16),
        norms="pinned",
    )
    model = build_encoder(config, list("abc"), RegularizersConfig()).train()
    assert SpectralPenalty(model).free_scale == ()
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(stock(model.normalize(images)), model(images))
