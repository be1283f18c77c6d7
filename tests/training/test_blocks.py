"""Which modules gather their weights alone, where weights are sharded."""

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.training.blocks import blocks
from tests.architectures import TIMM, TRANSFORMERS


def names(space, *classes):
    of = {module: name for name, module in space.network.named_modules()}
    return [of[module] for module in blocks(space, classes)]


@pytest.fixture(scope="module")
def on_meta():
    """A small network's feature space by its name, without values; each made once."""
    made = {}

    def space(name):
        if name not in made:
            with torch.device("meta"):
                if name in TIMM:
                    network = timm.create_model(name, **TIMM[name])
                else:
                    config = getattr(transformers, name)(**TRANSFORMERS[name])
                    network = transformers.AutoModelForImageClassification.from_config(config)
            made[name] = FeatureSpace.of(network)
        return made[name]

    return space


@pytest.mark.parametrize(
    ("name", "there", "not_there"),
    [
        ("vit_tiny_patch16_224", ["blocks.0", "blocks.1"], ["head", "blocks"]),
        ("ViTConfig", ["vit.layers.0", "vit.layers.1"], ["classifier"]),
        ("PvtV2Config", ["pvt_v2.encoder.layers.0"], []),
        ("resnet20_cifar", ["stages.0", "stages.2"], ["stages.0.0"]),
        # lists in lists
        ("twins_svt_small", ["blocks.0.0", "blocks.3.3", "pos_block.0"], ["blocks.0"]),
        # layers that blocks share
        (
            "coat_tiny",
            ["cpe1", "serial_blocks1.0.mlp", "parallel_blocks.5.mlp2"],
            ["serial_blocks1.0", "parallel_blocks.0"],
        ),
        # lists of layers that run by `forward`, without hooks
        ("hrnet_w18_small", ["stage2.0", "downsamp_modules.0.0"], ["downsamp_modules.0"]),
    ],
)
def test_blocks_of_networks(on_meta, name, there, not_there):
    found = names(on_meta(name))
    assert set(there) <= set(found)
    assert not set(not_there) & set(found)
    assert len(found) == len(set(found))


def test_blocks_are_of_the_classes_that_are_named(on_meta):
    vit = on_meta("vit_tiny_patch16_224")
    assert set(names(vit, "Mlp", "Block")) == {
        *("blocks.0", "blocks.0.mlp", "blocks.1", "blocks.1.mlp")
    }
    found = names(vit, "Mlp", "Block")
    assert found.index("blocks.0.mlp") < found.index("blocks.0")  # as fully_shard takes them
    with pytest.raises(ValueError, match=r"'Blok', and VisionTransformer has no.* one of Block"):
        names(vit, "Mlp", "Blok")
    with pytest.raises(ValueError, match=r"'SerialBlock', and CoaT has no module .* alone uses"):
        names(on_meta("coat_tiny"), "SerialBlock")


def test_a_network_without_blocks_is_warned_of(on_meta):
    regnet = on_meta("regnetx_002")
    with pytest.warns(UserWarning, match="only 0 % of the weights of RegNet are gathered block"):
        assert not blocks(regnet)
    assert len(blocks(regnet, ["Bottleneck"])) == 13


class Odd(nn.Module):
    """Whose layers are shared, tied, run by `forward`, read from outside and not used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.nested = nn.ModuleList([nn.ModuleList([self.layer(), self.layer()])])
        shared = self.layer()
        self.sharing = nn.ModuleList([self.layer(shared), self.layer(shared)])
        self.twice = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))] * 2)
        self.unhooked = nn.ModuleList([self.layer()])
        self.read = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.activated = nn.ModuleList([nn.Sequential(nn.ReLU(), nn.Linear(4, 4))])
        self.alias = self.activated[0][1]  # held here too, and run in the block only
        self.peeked = nn.ModuleList([nn.Linear(4, 4)])
        self.unused = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4)])])
        self.tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 4)
        self.tied[0].weight = self.head.weight

    @staticmethod
    def layer(inner=None):
        return nn.Sequential(inner or nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        x = x.flatten(1).to(self.nested[0][0][0].weight.dtype)  # which uses no weight
        for layer in (*self.nested[0], *self.sharing, *self.twice):
            x = layer(x)
        x = F.linear(self.read[1](self.unhooked[0].forward(x)), self.read[0].weight)
        x = self.peeked[0](self.activated[0](x)) + self.peeked[0].bias
        return self.head(self.tied[1](self.tied[0](x)))


def test_a_network_is_sharded_by_its_blocks_to_the_same_gradients():
    whole, sharded, images = Odd(), Odd(), torch.rand(3, 1, 2, 2)
    space = FeatureSpace.of(sharded, head="head", input_size=(1, 2, 2))
    assert set(names(space)) == {
        *("nested.0.0", "nested.0.1", "sharing.0.0", "twice.0", "unhooked.0.0"),
        *("read.1", "activated.0.1", "tied.1"),
    }
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in blocks(space):
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for network in (whole, sharded):
            network(images).square().sum().backward()
        for (name, expected), found in zip(
            whole.named_parameters(), sharded.parameters(), strict=True
        ):
            if expected.grad is not None:
                torch.testing.assert_close(found.grad.full_tensor(), expected.grad, msg=name)
    finally:
        dist.destroy_process_group()
