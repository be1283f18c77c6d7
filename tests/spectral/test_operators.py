"""Every layer kind as a linear operator, against the layer itself and against the dense matrix."""

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.pytorch_utils import Conv1D

from hf_specreg.spectral.layers import UnsupportedLayerError, linear_operators
from hf_specreg.spectral.operators import Dense
from hf_specreg.spectral.singular import random_vector, top_singular_value
from tests.spectral.references import dense_matrix

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def weight_of(operator):
    return operator.effective_weight().detach()


@st.composite
def convolutions(draw):
    """A convolution of any geometry that torch accepts, with the input it is fed."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    sizes = [draw(st.integers(3, 7 if dims < 3 else 4)) for _ in range(dims)]
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    same = draw(st.booleans())
    stride = [1 if same else draw(st.integers(1, 3)) for _ in range(dims)]
    padding = "same" if same else [draw(st.integers(0, min(2, n - 1))) for n in sizes]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if same:
        if any(span // 2 >= n for span, n in zip(spans, sizes, strict=True)):
            kernel = [1] * dims
    elif any(n + 2 * p < s for n, p, s in zip(sizes, padding, spans, strict=True)):
        kernel = [1] * dims
    layer = CONVOLUTIONS[dims](
        inputs, outputs, kernel, stride, padding, dilation, groups, padding_mode=mode, bias=False
    )
    return layer, (inputs, *sizes)


@st.composite
def transposed_convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    sizes = [draw(st.integers(2, 4)) for _ in range(dims)]
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    spans = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    padding = [draw(st.integers(0, span // 2)) for span in spans]
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    layer = TRANSPOSED[dims](
        inputs, outputs, kernel, stride, padding, extra, groups, bias=False, dilation=dilation
    )
    return layer, (inputs, *sizes)


def check_operator(layer, shape):
    """W v is the layer; the adjoint and the weight gradient are autograd's; sigma is the
    dense SVD's."""
    torch.manual_seed(0)  # the case alone decides, so that one that fails does so again
    layer.reset_parameters()
    layer = layer.double()
    (operator,) = linear_operators("layer", layer, shape)
    if len(operator.input_shape) < len(shape):  # a convolution as a matrix
        return check_matrix(layer, shape, operator)
    v = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
    weight = operator.effective_weight()
    output = layer(v)
    torch.testing.assert_close(operator.apply(weight, v), output)
    u = torch.randn_like(output)
    by_v, by_weight = torch.autograd.grad(output, [v, layer.weight], u)
    torch.testing.assert_close(operator.adjoint(weight, u), by_v)
    (raw,) = torch.autograd.grad(weight, layer.weight, operator.weight_gradient(v, u))
    torch.testing.assert_close(raw, by_weight)
    check_repeated(operator, weight.detach(), v.detach(), u)
    layer = layer.float()
    weight = weight_of(operator)
    exact = torch.linalg.matrix_norm(dense_matrix(operator, weight).double(), ord=2)
    start = random_vector(operator, weight, torch.Generator().manual_seed(0))
    found = top_singular_value(operator, weight, start, tolerance=2e-5)
    assert found.converged
    torch.testing.assert_close(found.sigma.double(), exact, rtol=1e-4, atol=1e-12)


def check_repeated(operator, weight, v, u):
    """Two at once map, each with its own weight, its own channels."""
    twice, weights = operator.repeated(2), (weight, torch.randn_like(weight))
    vs, us = (v, torch.randn_like(v)), (u, torch.randn_like(u))
    weight, v, u = torch.cat(weights), torch.cat(vs, 1), torch.cat(us, 1)
    images = [operator.apply(*pair) for pair in zip(weights, vs, strict=True)]
    torch.testing.assert_close(twice.apply(weight, v), torch.cat(images, 1))
    adjoints = [operator.adjoint(*pair) for pair in zip(weights, us, strict=True)]
    torch.testing.assert_close(twice.adjoint(weight, u), torch.cat(adjoints, 1))
    gradients = [operator.weight_gradient(*pair) for pair in zip(vs, us, strict=True)]
    torch.testing.assert_close(twice.weight_gradient(v, u), torch.cat(gradients))


def check_matrix(layer, shape, operator):
    """Its singular values are the convolution's: the largest is that of the dense matrix."""
    images = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
    bias = layer(torch.zeros(1, *shape, dtype=torch.float64))
    columns = (layer(images) - bias).flatten(1)
    weight = operator.effective_weight()
    expected = torch.linalg.matrix_norm(columns, ord=2)
    torch.testing.assert_close(torch.linalg.matrix_norm(weight, ord=2), expected)


@pytest.mark.parametrize(
    ("layer", "size", "is_matrix"),
    [
        (nn.Conv2d(4, 6, 1, bias=False), 7, True),
        (nn.Conv2d(4, 6, 1, stride=2, bias=False), 7, True),
        (nn.Conv2d(3, 5, 4, stride=4, bias=False), 9, True),
        (nn.Conv2d(3, 5, 2, stride=3, padding=1, bias=False), 9, True),
        (nn.Conv2d(3, 5, 2, stride=3, dilation=2, bias=False), 9, True),
        (nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), 9, False),
        (nn.Conv2d(3, 5, 2, stride=3, padding=1, bias=False), 2, False),  # no patch is whole
        (
            nn.Conv2d(3, 5, 1, padding=1, padding_mode="circular", bias=False),
            4,
            False,
        ),  # some count twice
        (nn.Conv2d(4, 6, 1, groups=2, bias=False), 7, False),
    ],
)
def test_a_convolution_whose_patches_do_not_overlap_is_a_matrix(layer, size, is_matrix):
    torch.manual_seed(0)
    shape = (layer.in_channels, size, size)
    (operator,) = linear_operators("layer", layer, shape)
    assert isinstance(operator, Dense) == is_matrix
    check_operator(layer, shape)


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_convolution_of_any_geometry_is_the_layer_and_its_sigma_matches_dense_svd(case):
    check_operator(*case)


@settings(max_examples=60, deadline=None)
@given(transposed_convolutions())
def test_transposed_convolution_of_any_geometry_is_the_layer_and_its_sigma_matches_dense_svd(case):
    check_operator(*case)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_linear_of_any_shape_is_the_layer_and_its_sigma_matches_dense_svd(inputs, outputs):
    check_operator(nn.Linear(inputs, outputs, bias=False), (inputs,))


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.layers.Conv2dSame(4, 6, 3, stride=2, bias=False),
        lambda: timm.layers.StdConv2d(4, 6, 3, stride=2, padding=1),
        lambda: timm.layers.StdConv2dSame(4, 6, 3, stride=2),
        lambda: timm.layers.ScaledStdConv2d(4, 6, 3, padding=1, groups=2, bias=False),
        lambda: timm.layers.ScaledStdConv2dSame(4, 6, 4, stride=3, bias=False),
        lambda: WeightStandardizedConv2d(4, 6, 3, stride=2),
        lambda: WeightStandardizedConv2d(4, 6, 3, stride=2, padding=None),
    ],
    ids=["same", "std", "std-same", "scaled-std-grouped", "scaled-std-same", "bit-same", "bit"],
)
def test_convolutions_of_timm_and_transformers_act_with_their_effective_weight(make):
    torch.manual_seed(0)
    check_operator(make(), (4, 7, 8))


def test_conv1d_of_transformers_is_a_linear_map_of_its_transposed_weight():
    layer = Conv1D(5, 3)
    (operator,) = linear_operators("layer", layer, (4, 3))
    x = torch.randn(2, 3)
    torch.testing.assert_close(
        operator.apply(operator.effective_weight(), x), layer(x) - layer.bias
    )


@pytest.mark.parametrize(
    "constrain",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_parametrized_weight_is_the_computed_one_and_the_gradient_reaches_the_raw_one(constrain):
    torch.manual_seed(0)
    layer = constrain(nn.Linear(6, 6, bias=False)).eval()
    (operator,) = linear_operators("layer", layer, (6,))
    x = torch.randn(1, 6)
    torch.testing.assert_close(operator.apply(operator.effective_weight(), x), layer(x))
    scores = torch.randn(6, 6)
    (operator.effective_weight() * scores).sum().backward()
    gradients = [p.grad for p in layer.parameters()]
    assert gradients
    assert all(g is not None and g.abs().max() > 0 for g in gradients)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("constrain", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_older_weight_hooks_give_the_weight_of_now_not_of_the_last_forward(constrain):
    torch.manual_seed(0)
    layer = constrain(nn.Linear(5, 4, bias=False)).eval()
    layer(torch.randn(1, 5))
    with torch.no_grad():
        next(layer.parameters()).mul_(3).add_(0.1)
    (operator,) = linear_operators("layer", layer, (5,))
    weight = operator.effective_weight()
    assert weight.requires_grad
    x = torch.randn(1, 5)
    torch.testing.assert_close(operator.apply(weight, x), layer(x))


def test_stacked_qkv_of_timm_is_three_maps_or_one():
    layer = nn.Linear(4, 12)
    arguments = {"name": "attn.qkv", "module": layer, "input_shape": (9, 4)}
    parent = "timm.layers.attention.Attention"
    parts = linear_operators(**arguments, parent=parent)
    assert [p.name for p in parts] == ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v"]
    torch.testing.assert_close(torch.cat([weight_of(p) for p in parts]), layer.weight.detach())
    (whole,) = linear_operators(**arguments, parent=parent, split_qkv=False)
    torch.testing.assert_close(weight_of(whole), layer.weight.detach())


@pytest.mark.parametrize("parent", ["timm.models.tiny_vit.Attention", "elsewhere.Attention"])
def test_qkv_of_an_interleaved_or_unknown_layout_is_one_map(parent):
    operators = linear_operators("attn.qkv", nn.Linear(4, 12), (9, 4), parent=parent)
    assert [o.name for o in operators] == ["attn.qkv"]


def test_multihead_attention_gives_its_projections():
    attention = nn.MultiheadAttention(8, 2)
    operators = linear_operators("attn", attention, (3, 8))
    names = ["attn.in_proj.q", "attn.in_proj.k", "attn.in_proj.v", "attn.out_proj"]
    assert [o.name for o in operators] == names
    whole = linear_operators("attn", attention, (3, 8), split_qkv=False)
    assert [tuple(weight_of(o).shape) for o in whole] == [(24, 8), (8, 8)]
    mixed = nn.MultiheadAttention(8, 2, kdim=5, vdim=6)
    widths = [o.input_shape[0] for o in linear_operators("attn", mixed, (3, 8))]
    assert widths == [8, 5, 6, 8]


def test_lora_penalises_the_effective_weight_and_its_gradient_reaches_the_adapters():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(3, 4, 3, padding=1))
    config = peft.LoraConfig(target_modules=["0", "1"], r=2, lora_alpha=8, init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model)
    for layer, shape in ((model[0], (6,)), (model[1], (3, 5, 5))):
        (operator,) = linear_operators("layer", layer, shape)
        x = torch.randn(1, *shape)
        weight = operator.effective_weight()
        expected = layer(x) - layer(torch.zeros_like(x))
        torch.testing.assert_close(operator.apply(weight, x), expected, rtol=1e-4, atol=1e-5)
        weight.square().sum().backward()
        assert layer.lora_A["default"].weight.grad.abs().max() > 0
        assert layer.lora_B["default"].weight.grad.abs().max() > 0


def test_norms_embeddings_and_layer_scale_are_no_linear_maps():
    for layer in (
        nn.LayerNorm(4),
        nn.BatchNorm2d(4),
        nn.Embedding(3, 4),
        timm.layers.LayerScale(4),
    ):
        assert linear_operators("layer", layer, (4,)) == []


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_over_several_dimensions_is_no_linear_map(norm):
    module = norm([4, 8, 8])
    assert linear_operators("norm", module, (4, 8, 8)) == []
    with pytest.raises(UnsupportedLayerError, match="'norm'"):  # a matrix that is multiplied too
        linear_operators("norm", module, (4, 8, 8), used_directly=["weight"])

    class Own(norm):
        def forward(self, x):
            return x * self.weight

    with pytest.raises(UnsupportedLayerError, match="'norm'"):
        linear_operators("norm", Own([4, 8, 8]), (4, 8, 8))


def test_unknown_weights_are_an_error_that_names_layer_class_and_remedy():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

    class Squared(nn.Linear):
        def forward(self, x):
            return x @ self.weight.square().T

    for layer in (Mixture(), Squared(4, 3), nn.LSTM(4, 3)):
        kind = type(layer).__name__
        with pytest.raises(
            UnsupportedLayerError, match=rf"'block.mix' \({kind}\).*skip=\['block.mix'\]"
        ):
            linear_operators("block.mix", layer, (4,))


def test_a_token_table_is_left_out_unless_it_multiplies():
    table = nn.Module()
    table.register_parameter("pos_embed", nn.Parameter(torch.randn(5, 4)))
    assert linear_operators("net", table, (5, 4)) == []
    with pytest.raises(UnsupportedLayerError, match="pos_embed"):
        linear_operators("net", table, (5, 4), used_directly=["pos_embed"])
