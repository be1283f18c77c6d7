"""Layers are found however a network uses its weights, and whatever it is run on."""

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import Normalize

from hf_specreg import FeatureSpace, SpectralPenalty
from hf_specreg.encoders.trace import trace_layers
from hf_specreg.spectral.layers import UnsupportedLayerError, linear_operators

SIZE = (3, 4, 4)
# Where timm's attention takes q, k and v out of each head's rows.
INTERLEAVED = (
    "efficientformer.Attention",
    "gcvit.WindowAttentionGlobal",
    "maxxvit.AttentionCl",
    "tiny_vit.Attention",
)


def names(model, **options):
    return [layer.name for layer in SpectralPenalty(model, **options).layers]


def test_a_layer_is_fed_what_its_module_is_and_not_what_that_makes_of_it():
    net = nn.Sequential(timm.layers.Conv2dSame(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(64, 2))
    (layer,) = trace_layers(net, head=["2"], input_size=(3, 8, 8))
    assert layer.input_shapes == ((3, 8, 8),)


def test_layers_come_in_the_order_of_the_forward_pass():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.last = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.last(self.first(x.mean((1, 2)))))

    found = trace_layers(Backwards(), head=("head",), input_size=(3, 4, 4))
    assert [layer.name for layer in found] == ["first", "last"]


class Raw(nn.Module):
    """A matrix that is used by itself, in the encoder or on the module that also holds the head."""

    def __init__(self, use, name):
        super().__init__()
        self.use, self.name = use, name
        self.register_parameter(name, nn.Parameter(torch.randn(48, 48)))
        self.fc = nn.Linear(48, 2)

    def forward(self, x):
        return self.fc(self.use(x.flatten(1), getattr(self, self.name)))


USES = {
    "product": lambda x, w: x @ w,
    "transpose": lambda x, w: x @ w.T,
    "of a multiple": lambda x, w: x @ (w * 1.0),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "inner": lambda x, w: torch.inner(x, w),
    "linalg": lambda x, w: torch.linalg.matmul(x, w),
    "attention": lambda x, w: nn.functional.scaled_dot_product_attention(x[None], w[None], w[None])[
        0
    ],
    "mv": lambda x, w: torch.stack([torch.mv(w, row) for row in x]),
    "linear": lambda x, w: nn.functional.linear(x, w.softmax(1)),
    "low rank": lambda x, w: x @ (w[:, :4] @ w[:4]),
    "slice": lambda x, w: torch.cat([x[:, :24] @ w[:24, :24], x[:, 24:]], 1),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("name", ["w", "scale_w", "query_weight"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_raw_matrix_is_an_error_however_it_is_multiplied(use, name, nested):
    model, head = Raw(use, name), "fc"
    if nested:
        model, head = nn.Sequential(model), "0.fc"
    with pytest.raises(UnsupportedLayerError, match=rf"has the weight '{name}'"):
        SpectralPenalty(model, head=head, input_size=SIZE)


@pytest.mark.parametrize("make", [lambda bias: bias, lambda bias: bias * 1.0])
def test_a_learned_mask_of_attention_is_added_and_no_map(make):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.fc = nn.Linear(16, 48), nn.Linear(16, 2)
            self.bias = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            parts = self.qkv(x.flatten(2)).chunk(3, -1)
            attend = nn.functional.scaled_dot_product_attention
            return self.fc(attend(*parts, attn_mask=make(self.bias)).mean(1))

    assert names(Biased(), head="fc", input_size=SIZE) == ["qkv"]


class Made(nn.Module):
    """A matrix of 8 x 8 that is made of what is no matrix, or of what another module computes."""

    def __init__(self, make, **parts):
        super().__init__()
        self.make = make
        self.stem, self.fc = nn.Linear(48, 8), nn.Linear(8, 2)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.fc(nn.functional.linear(self.stem(x.flatten(1)), self.make(self)))


def hypernetwork(fed):
    return {"hyper": nn.Linear(4, 64), "z": fed}


MADE = {
    "flat": (lambda m: m.flat.view(8, 8), {"flat": nn.Parameter(torch.randn(64))}, "'flat'"),
    "hypernetwork": (
        lambda m: m.hyper(m.z).view(8, 8),
        hypernetwork(nn.Parameter(torch.randn(4))),
        r"'hyper' \(Linear\)",
    ),
    "of a constant": (
        lambda m: m.hyper(m.z).view(8, 8),
        hypernetwork(torch.nn.Buffer(torch.randn(4))),
        r"'hyper' \(Linear\)",
    ),
    "of two modules": (
        lambda m: m.one.weight @ m.two.weight,
        {"one": nn.Linear(3, 8, bias=False), "two": nn.Linear(8, 3, bias=False)},
        r"'one' \(Linear\)",
    ),
    "table": (lambda m: m.table.weight, {"table": nn.Embedding(8, 8)}, r"'table' \(Embedding\)"),
}


@pytest.mark.parametrize(("make", "parts", "named"), MADE.values(), ids=MADE)
def test_a_matrix_that_is_made_of_something_else_is_an_error_that_names_it(make, parts, named):
    model = Made(make, **parts)
    with pytest.raises(UnsupportedLayerError, match=named):
        SpectralPenalty(model, head="fc", input_size=SIZE)
    if skip := [name for name, part in parts.items() if isinstance(part, nn.Module)]:
        assert names(model, head="fc", input_size=SIZE, skip=skip) == ["stem"]


def test_positions_that_a_product_of_attention_takes_are_no_linear_map():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.rel_pos = nn.Parameter(torch.randn(7, 16))
            self.latent = nn.Parameter(torch.randn(4, 16))
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
            self.fc = nn.Linear(16, 2)

        def forward(self, x):
            x = x.flatten(2)
            k = self.k(x)
            near = x @ self.rel_pos[:3].T  # looked up, then multiplied by what the image gives
            attention = (self.q(self.latent) @ k.mT).softmax(-1) + near.mean((1, 2))[:, None, None]
            return self.fc((attention @ x).mean(1))

    assert names(Attends(), head="fc", input_size=SIZE) == ["k"]


def test_a_user_s_own_network_and_pixel_mean_are_no_wrapper():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))
            self.network = nn.Linear(48, 8)
            self.proj = nn.Linear(8, 8)
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.proj(self.network((x - self.pixel_mean).flatten(1))))

    assert names(Own(), head="fc", input_size=SIZE) == ["network", "proj"]


def test_a_network_behind_torchvision_s_normalize_is_run_with_values():
    network = timm.create_model("test_resnet", num_classes=3)
    model = nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), network)
    found = names(model, head="1.fc", input_size=(3, 64, 64))
    assert found == [f"1.{n}" for n in names(network, input_size=(3, 64, 64))]


class Branches(nn.Module):
    """It branches on values, holds a tensor that is no buffer, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.offset = torch.ones(3, 1, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.a, self.b = nn.Linear(48, 8), nn.Linear(48, 8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = (x + self.offset + torch.rand(1)).flatten(1)
        self.seen += 1
        return self.fc(self.a(x) if x.mean() > 0 else self.b(x))


def test_a_network_that_needs_values_is_run_once_on_copies_and_leaves_no_trace():
    model = Branches()
    state = torch.get_rng_state()
    assert names(model, head="fc", input_size=SIZE) == ["a"]
    assert model.seen == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_a_network_hides_no_layer(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(48, 8)
            self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            x = self.stem(x.flatten(1))
            return self.fc(checkpoint(self.block, x, use_reentrant=reentrant))

    found = names(Checkpointed(), head="fc", input_size=SIZE)
    assert found == ["stem", "block.0", "block.2"]


def test_a_network_of_two_inputs_is_run_on_example_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = nn.Linear(48, 8), nn.Embedding(5, 8)
            self.mix = nn.Linear(8, 8)
            self.fc = nn.Linear(8, 2)

        def forward(self, pixels, tokens):
            return self.fc(self.mix(self.image(pixels.flatten(1)) + self.text(tokens).mean(1)))

    model = Two()
    inputs = torch.rand(2, *SIZE), torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(RuntimeError, match=r"FeatureSpace.of\(model, example_inputs="):
        SpectralPenalty(model, head="fc", input_size=SIZE)
    space = FeatureSpace.of(model, head="fc", example_inputs=inputs)
    assert space.input_size == SIZE
    assert names(space) == ["image", "mix"]
    by_name = {"pixels": inputs[0], "tokens": inputs[1]}
    again = FeatureSpace.of(model, head="fc", example_inputs=by_name)
    assert names(again) == ["image", "mix"]
    assert torch.equal(space.features(inputs), again.features(by_name))
    assert torch.equal(space.logits(inputs), model(*inputs))


def test_clip_is_run_on_example_inputs_up_to_the_image_s_embedding():
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    part["num_attention_heads"] = 2
    config = transformers.CLIPConfig(
        vision_config={**part, "image_size": 16, "patch_size": 8},
        text_config={**part, "vocab_size": 9, "max_position_embeddings": 6},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    inputs = {"pixel_values": torch.rand(2, 3, 16, 16), "input_ids": torch.ones(2, 4).long()}
    space = FeatureSpace.of(model, example_inputs=inputs)
    found = names(space)
    assert found[-1] == "visual_projection"
    assert not [n for n in found if n.startswith("text")]
    assert space.features(inputs).shape == (2, 8)


def test_the_maps_of_several_stages_are_features():
    model = timm.create_model("test_resnet", features_only=True).eval()
    space = FeatureSpace.of(model, head=(), input_size=(3, 64, 64))
    images = torch.rand(2, 3, 64, 64)
    expected = torch.cat([m.flatten(1) for m in model(images)], 1)
    assert torch.equal(space.features(images), expected)
    plain = timm.create_model("test_resnet", num_classes=0)
    assert len(space.layers) == len(FeatureSpace.of(plain, input_size=(3, 64, 64)).layers)


def test_a_head_of_several_inputs_is_fed_all_of_them():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 2)

        def forward(self, pair, *, third, scale=1.0):
            return self.linear(torch.cat([*pair, third], 1)) * scale

    class Fed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(48, 8), nn.Linear(48, 4), nn.Linear(48, 4)
            self.head = Head()

        def forward(self, x):
            x = x.flatten(1)
            return self.head((self.a(x), self.b(x)), third=self.c(x))

    model = Fed()
    space = FeatureSpace.of(model, head="head", input_size=SIZE)
    assert names(space) == ["a", "b", "c"]
    images = torch.rand(2, *SIZE)
    features = space.features(images)
    assert features.shape == (2, 16)
    assert torch.equal(model.head.linear(features), space.logits(images))


def test_a_convolution_used_at_two_sizes_is_measured_where_it_is_larger():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            small = nn.functional.adaptive_avg_pool2d(x, 1)
            return self.fc((self.conv(small) + self.conv(x)).mean((2, 3)))

    model = Twice()
    with torch.no_grad():
        model.conv.weight[:] = 1.0  # larger, the more pixels a patch has
    (layer,) = SpectralPenalty(model, head="fc", input_size=(3, 8, 8)).layers
    assert layer.input_shape == (3, 8, 8)
    with torch.no_grad():
        model.conv.weight[:] = 0.0
        model.conv.weight[:, :, 0, 0] = -1.0
        model.conv.weight[:, :, 1, 1] = 1.0
    assert len(SpectralPenalty(model, head="fc", input_size=(3, 8, 8)).layers) == 1


def test_one_weight_in_two_convolutions_counts_once_as_the_larger():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Conv2d(3, 3, 3, padding=8, dilation=8)  # the centre alone, on 8x8
            self.close = nn.Conv2d(3, 3, 3, padding=1)
            self.close.weight = self.wide.weight
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc((self.wide(x) + self.close(x)).mean((2, 3)))

    model = Shared()
    nn.init.ones_(model.wide.weight)
    assert names(model, head="fc", input_size=(3, 8, 8)) == ["close"]
    with torch.no_grad():
        model.wide.weight[:] = torch.tensor([[[-1, 0, -1], [0, 1, 0], [-1, 0, -1]]]).float()
    assert len(names(model, head="fc", input_size=(3, 8, 8))) == 1


@pytest.mark.parametrize(
    ("wrap", "inner"),
    [
        (torch.optim.swa_utils.AveragedModel, lambda m: m.module),
        (timm.utils.ModelEmaV3, lambda m: m.module),
        (torch.compile, lambda m: m._orig_mod),
    ],
)
def test_averages_of_weights_and_compiled_models_are_seen_through(wrap, inner):
    model = timm.create_model("test_resnet", num_classes=3)
    wrapped = wrap(model)
    space = FeatureSpace.of(wrapped)
    assert space.network is space.model is inner(wrapped)
    assert space.head == ("fc",)


def test_timm_s_encoders_that_have_no_head_are_all_encoder():
    with torch.device("meta"):
        model = timm.create_model("qwen3_vit_88m_enc")
    assert FeatureSpace.of(model).head == ()


def test_a_stacked_qkv_is_cut_in_thirds_only_if_these_are_q_k_and_v():
    def parts(qkv, parent):
        found = linear_operators("attn.qkv", qkv, (64,), parent=f"timm.models.{parent}")
        return [operator.name.removeprefix("attn.") for operator in found]

    of_vit = "vision_transformer.Attention"
    assert parts(nn.Linear(64, 192), of_vit) == ["qkv.q", "qkv.k", "qkv.v"]
    assert parts(nn.Linear(64, 64 + 16 + 16), of_vit) == ["qkv"]  # keys of several queries
    for parent in INTERLEAVED:
        assert parts(nn.Linear(64, 192), parent) == ["qkv"]
