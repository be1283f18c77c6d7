"""Which gains are found beside the layers of a network: of small ones made for it, and of real
ones.
"""

import gc
import weakref

import pytest
import timm
import torch
from timm.layers import LayerNorm2d, LayerNorm2dFp32, freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F
from transformers import ConvNextConfig, ConvNextForImageClassification

from hf_specreg import FeatureSpace, SpectralPenalty
from hf_specreg.spectral.maps import linear_maps
from hf_specreg.spectral.norms import adjoining_norms


def gains(network, size=(3, 8, 8), head="head"):
    """The names of the gains beside each operator: before it, after it."""
    found = found_norms(network, size, head)
    return {
        name: tuple([n for s in side for n in s.gain.names] for side in (norms.before, norms.after))
        for name, norms in found.items()
    }


def found_norms(network, size, head=None):
    space = FeatureSpace.of(network, head=head, input_size=size)
    return adjoining_norms(space, {o.name: module for module, o in linear_maps(space)})


class Net(nn.Module):
    """Layers by name, and what is computed of them and the images, as a head is fed it."""

    def __init__(self, forward, width=4, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.compute = forward
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.compute(self, x)
        return self.head(x.mean({2: (), 3: 1, 4: (2, 3)}[x.ndim]) if x.ndim > 2 else x)


def convolution(inputs=3, outputs=4, size=1, **options):
    return nn.Conv2d(inputs, outputs, size, **options)


AFTER = {"conv": ([], ["norm.weight", "norm.running_var"])}
LAYER_NORM = ["norm.weight", "norm.std"]


def test_a_batch_norm_that_takes_all_of_an_output_is_the_maps_own():
    parts = {"conv": convolution(), "norm": nn.BatchNorm2d(4)}
    assert gains(Net(lambda m, x: m.norm(m.conv(x)), **parts)) == AFTER


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (y := m.conv(x)) + m.norm(y),
        lambda m, x: m.norm(y := m.conv(x)).relu() * y.sigmoid(),
        lambda m, x: m.norm(y := m.conv(x)).relu() + y.flatten(2).flip(2).reshape(y.shape),
        lambda m, x: m.norm(m.conv(x).relu_()),
        lambda m, x: m.norm(m.conv(x) + x.mean(1, keepdim=True)),
        lambda m, x: m.norm(F.dropout(m.conv(x), 0.5)),  # on in evaluation, too
        lambda m, x: m.norm(F.pad(m.conv(x), (1, 1), value=3.0)),
        lambda m, x: m.norm(m.conv(x).transpose(1, 2)[:, :4].contiguous()),
        lambda m, x: torch.cat([m.conv(x[:, :, :4]), m.norm(m.conv(x))], 2),
    ],
    ids="sum gate moved inplace bias dropout pad channels reuse".split(),
)
def test_a_norm_is_not_folded_into_a_map_whose_output_goes_elsewhere_too(forward):
    parts = {"conv": convolution(), "norm": nn.BatchNorm2d(4)}
    assert gains(Net(forward, **parts)) == {}


def test_an_output_that_is_returned_beside_the_norm_keeps_its_scale():
    class Returning(Net):
        def forward(self, x):
            y = self.conv(x)
            return self.head(self.norm(y).mean((2, 3))), y

    parts = {"conv": convolution(), "norm": nn.BatchNorm2d(4)}
    assert gains(Returning(None, **parts)) == {}


def test_of_two_norms_after_a_map_none_is_its_own_but_one_behind_the_other_are():
    parts = {"conv": convolution(), "first": nn.BatchNorm2d(4), "second": nn.BatchNorm2d(4)}
    both = Net(lambda m, x: m.first(y := m.conv(x)) + m.second(y), **parts)
    assert gains(both) == {}
    chain = Net(lambda m, x: m.second(m.first(m.conv(x))), **parts)
    names = [f"{n}.{t}" for n in ("first", "second") for t in ("weight", "running_var")]
    assert gains(chain) == {"conv": ([], names)}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.norm(m.conv(x).permute(0, 2, 3, 1).roll(1, 2).permute(0, 3, 1, 2)),
        lambda m, x: m.norm(m.conv(x).view(-1, 4, 2, 32)[..., ::2]),
        lambda m, x: m.norm(F.pad(m.conv(x), (1, 1)).contiguous()).relu(),
        lambda m, x: m.norm(F.dropout(m.conv(x) + 1, 0.5, m.training)),
        lambda m, x: m.norm(m.conv(x)),
    ],
    ids="roll view pad dropout plain".split(),
)
def test_moved_entries_are_followed(forward):
    parts = {"conv": convolution(), "norm": nn.BatchNorm2d(4)}
    assert gains(Net(forward, **parts)) == AFTER


@torch.jit.script
def scripted(x):
    return x.sigmoid()


class OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("opaque", [scripted, OwnBackward.apply], ids=["script", "function"])
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_nothing_is_folded_where_code_may_use_an_output_unseen(opaque):
    parts = {"conv": convolution(), "norm": nn.BatchNorm2d(4)}
    assert gains(Net(lambda m, x: m.norm(y := m.conv(x)) * opaque(y), **parts)) == {}


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda m, x: m.fc(m.norm(x) * m.token), {}),  # a gain of the positions stands between
        (lambda m, x: m.scale(torch.add(x.mean(), m.fc(x), alpha=5)), {}),
    ],
    ids="positions alpha".split(),
)
def test_what_is_no_gain_of_the_channels_stands_between(forward, found):
    parts = {"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4), "scale": Scaled(4)}
    network = Net(forward, **parts)
    network.token = nn.Parameter(torch.ones(3, 1))
    assert gains(network, size=(3, 4)) == found


def test_nothing_is_held_of_the_images_that_norms_were_found_by():
    images = []
    network = Net(lambda m, x: m.norm(m.conv(x)), conv=convolution(), norm=nn.BatchNorm2d(4))
    hook = network.norm.register_forward_pre_hook(
        lambda _, args: images.append(weakref.ref(args[0]))
    )
    penalty = SpectralPenalty(network, head="head", input_size=(3, 8, 8), fold_norm=True)
    hook.remove()
    gc.collect()
    assert penalty.folded
    assert all(image() is None for image in images)


class HandMade(nn.Module):
    """A root mean square norm that none of torch's classes is."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Affine(nn.Module):
    """A layer norm with a weight that is off by one, as Gemma has it."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * (1 + self.gain)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, HandMade, Affine])
def test_the_gain_of_any_norm_is_before_each_map_that_it_feeds(norm):
    parts = {"norm": norm(4), "one": nn.Linear(4, 4), "two": nn.Linear(4, 4), "after": norm(4)}
    network = Net(
        lambda m, x: m.after(m.one(y := m.norm(x)) + m.two(y[:, :2].flatten(0, 1))[:1]), **parts
    )
    names = LAYER_NORM if hasattr(parts["norm"], "weight") else ["norm.gain"]
    assert gains(network, size=(3, 4)) == {"one": (names, []), "two": (names, [])}


def test_a_group_norms_gain_is_before_a_map_and_never_after_it():
    parts = {"norm": nn.GroupNorm(1, 3), "conv": convolution(), "after": nn.GroupNorm(2, 4)}
    network = Net(lambda m, x: m.after(m.conv(m.norm(x))).relu(), **parts)
    assert gains(network) == {"conv": (["norm.weight"], [])}


@pytest.mark.parametrize("norm", [LayerNorm2d, LayerNorm2dFp32])
def test_a_norm_between_two_maps_is_the_firsts_whose_scale_it_undoes(norm):
    parts = {"one": convolution(), "norm": norm(4), "two": convolution(4)}
    found = gains(Net(lambda m, x: m.two(m.norm(m.one(x))), **parts))
    assert found == {"one": ([], LAYER_NORM)}


def test_a_batch_norm_between_two_maps_is_the_firsts_unless_it_goes_past_it():
    parts = {"one": convolution(), "norm": nn.BatchNorm2d(4), "two": convolution(4)}
    names = ["norm.weight", "norm.running_var"]
    assert gains(Net(lambda m, x: m.two(m.norm(m.one(x))), **parts)) == {"one": ([], names)}
    past = Net(lambda m, x: m.two(m.norm(y := m.one(x))) + y, **parts)
    assert gains(past) == {"two": (names, [])}


def test_the_statistics_of_a_batch_are_no_constants():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    assert gains(Net(lambda m, x: m.norm(m.conv(x)), conv=convolution(), norm=norm)) == {}


def test_a_gain_along_other_dimensions_than_the_channels_is_left_out():
    tokens = Net(lambda m, x: m.norm(m.fc(x)), fc=nn.Linear(4, 4), norm=nn.BatchNorm1d(3))
    assert gains(tokens, size=(3, 4)) == {}
    mixing = Net(lambda m, x: m.fc(m.norm(x).mT).mT, fc=nn.Linear(3, 3), norm=nn.LayerNorm(4))
    assert gains(mixing, size=(3, 4)) == {}


class Response(nn.Module):
    """Global response normalisation (ConvNeXt V2)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        norm = x.norm(dim=(1, 2), keepdim=True)
        return x + self.weight * (x * norm / norm.mean(-1, keepdim=True))


def test_global_response_normalisation_is_not_folded():
    parts = {"fc1": nn.Linear(4, 4), "grn": Response(4), "fc2": nn.Linear(4, 4)}
    assert (
        gains(Net(lambda m, x: m.fc2(m.grn(m.fc1(x))).mean((1, 2)), **parts), size=(3, 5, 4)) == {}
    )


class Scaled(nn.Module):
    """Layer scale."""

    def __init__(self, width, **options):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


def test_layer_scale_is_after_the_map_and_behind_its_norm():
    parts = {"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(3), "scale": Scaled(4)}
    network = Net(lambda m, x: x + m.scale(m.fc(x)), **parts)
    assert gains(network, size=(3, 4)) == {"fc": ([], ["scale.gamma"])}
    parts = {"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "scale": Scaled(4)}
    network = Net(lambda m, x: x + m.scale(m.norm(m.fc(x).flatten(0, 1)).reshape_as(x)), **parts)
    names = ["norm.weight", "norm.running_var", "scale.gamma"]
    assert gains(network, size=(3, 4)) == {"fc": ([], names)}


def attend(m, query, other):
    return m.scale(m.attn(query, other, other)[0])


def test_of_attention_the_norm_before_is_of_its_inputs_and_layer_scale_of_its_output():
    parts = {
        "norm": nn.LayerNorm(4),
        "attn": nn.MultiheadAttention(4, 2, batch_first=True),
        "scale": Scaled(4),
    }
    network = Net(lambda m, x: attend(m, y := m.norm(x), y), **parts)
    before, after = (LAYER_NORM, []), ([], ["scale.gamma"])
    inputs = dict.fromkeys((f"attn.in_proj.{n}" for n in "qkv"), before)
    assert gains(network, size=(3, 4)) == inputs | {"attn.out_proj": after}
    across = Net(lambda m, x: attend(m, m.norm(x), x), **parts)
    assert gains(across, size=(3, 4)) == {"attn.out_proj": after}
    parts["token"] = nn.Embedding(1, 4)
    learned = Net(lambda m, x: attend(m, m.token.weight.expand(len(x), 1, 4), m.norm(x)), **parts)
    assert gains(learned, size=(3, 4)) == {"attn.out_proj": after}


def test_a_weight_that_is_handed_to_a_function_has_its_norms_too():
    parts = {"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4), "scale": Scaled(4)}
    network = Net(lambda m, x: m.scale(F.linear(m.norm(x), m.fc.weight)), **parts)
    assert gains(network, size=(3, 4)) == {"fc": (LAYER_NORM, ["scale.gamma"])}


def test_a_map_that_is_used_twice_has_the_norms_that_it_has_in_both_uses():
    parts = {"one": nn.LayerNorm(4), "two": nn.LayerNorm(4), "fc": nn.Linear(4, 4)}
    apart = Net(lambda m, x: m.fc(m.one(x)) + m.fc(m.two(x)), **parts)
    assert gains(apart, size=(3, 4)) == {}
    alike = Net(lambda m, x: m.fc(m.one(x)) + m.fc(m.one(2 * x)), **parts)
    assert gains(alike, size=(3, 4)) == {"fc": (["one.weight", "one.std"], [])}


def test_a_gain_in_place_counts_and_what_was_a_view_of_it_before_does_not():
    def forward(m, x):
        y = m.fc(x)
        view = y.view(-1, 4, 1).flatten(1)
        y.mul_(m.scale.gamma)
        return m.late(view)

    parts = {"fc": nn.Linear(4, 4), "scale": Scaled(4), "late": nn.Linear(4, 4)}
    assert gains(Net(forward, **parts), size=(4,)) == {"fc": ([], ["scale.gamma"])}


def test_looking_for_norms_leaves_no_trace_on_the_model():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
    network = Net(lambda m, x: m.encoder(x), encoder=encoder)
    network.encoder.norm1.eval()
    images = torch.randn(2, 3, 4)
    modes = [m.training for m in network.modules()]
    state = {n: (t, t.clone(), t._version) for n, t in network.state_dict(keep_vars=True).items()}
    torch.manual_seed(1)
    before = network(images)
    drawn = torch.random.get_rng_state()
    found = gains(network, size=(3, 4))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert found["encoder.linear1"] == (["encoder.norm2.weight", "encoder.norm2.std"], [])
    assert set(found) == {"encoder.linear1"} | {f"encoder.self_attn.in_proj.{n}" for n in "qkv"}
    assert modes == [m.training for m in network.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    for name, tensor in network.state_dict(keep_vars=True).items():
        kept, values, version = state[name]
        assert tensor is kept
        assert tensor._version == version
        assert torch.equal(tensor, values)
    torch.manual_seed(1)
    assert torch.equal(network(images), before)


CONVNEXT = {"hidden_sizes": [8, 12, 16, 20], "depths": [1] * 4, "image_size": 32, "num_labels": 2}
VIT = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 2)}
# Of real networks, into how many of their maps norms are folded, and which are not.
REAL = {
    "batch norms": (lambda: timm.create_model("resnet10t"), 14, 14),
    "frozen": (lambda: freeze_batch_norm_2d(timm.create_model("resnet10t")), 14, 14),
    "linear layers": (lambda: timm.create_model("levit_128s"), 50, 50),
    "before activations": (lambda: timm.create_model("resnetv2_18"), 8, 20),
    "group norms": (lambda: timm.create_model("resnet50_gn"), 0, 53),
    "layer norms": (lambda: timm.create_model("vit_tiny_patch16_224", **VIT), 4, 7),
    "rms": (lambda: timm.create_model("vit_tiny_patch16_224", norm_layer="rmsnorm", **VIT), 4, 7),
    "windows": (lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN), 14, 20),
    "layer scale": (lambda: ConvNextForImageClassification(ConvNextConfig(**CONVNEXT)), 12, 16),
    "beside a sum": (lambda: timm.create_model("coatnet_nano_rw_224"), 31, 76),
}


UNDOES = ("running_var", "gamma", "layer_scale_parameter")


@pytest.mark.parametrize(("build", "count", "of"), REAL.values(), ids=REAL)
@pytest.mark.filterwarnings("ignore:fold_norm folds")
def test_folded_maps_of_real_networks_have_the_scale_that_acts(build, count, of):
    """Each map is rescaled and its batch norm or layer scale made to undo it: what the network
    computes stays, and so must the folded sigma."""
    torch.manual_seed(0)
    network = build().eval()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.ndim == 1 and tensor.is_floating_point() and "running_mean" not in name:
            nn.init.uniform_(tensor, 0.5, 2)
    penalty = SpectralPenalty(network, fold_norm=True)
    assert (len(penalty.folded), len(penalty.layers)) == (count, of)
    images = torch.rand(1, *penalty.input_size)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    modules = dict(network.named_modules())
    output, value = logits(network, images), penalty.value()
    with torch.no_grad():
        for layer, norms in list(found_norms(network, penalty.input_size).items())[::3]:
            module = modules.get(layer)
            names = [name for scale in norms.after for name in scale.gain.names]
            scales = [n for n in names if n.endswith(UNDOES)]
            if module is None or not scales:
                continue
            for parameter in module.parameters(recurse=False):
                parameter *= 3
            for name in scales[:1]:
                if name.endswith("running_var"):
                    tensors[name].mul_(9)
                    tensors[name.replace("running_var", "running_mean")].mul_(3)
                else:
                    tensors[name].div_(3)
    torch.testing.assert_close(logits(network, images), output, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(penalty.value(), value, rtol=2e-2, atol=0)


def logits(network, images):
    with torch.no_grad():
        output = network(images)
    return output if isinstance(output, torch.Tensor) else output.logits
