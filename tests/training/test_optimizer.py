"""The optimizer's groups of parameters, and the schedule of their learning rates."""

import itertools

import pytest

from hf_specreg import SpecRegModel
from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.optimizer import OptimizerConfig, build_optimizer, build_scheduler
from tests.tiny import tiny, vit_config


def resnet():
    return tiny("resnet20_cifar", layers=[2, 1])


def vit():
    return tiny("vit_tiny_patch16_224", depth=3, embed_dim=16, num_heads=2)


def rates(encoder, *, step=0, epochs=10, steps_per_epoch=10, **settings):
    """The learning rate and weight decay of every parameter, at a step of the schedule."""
    config = OptimizerConfig(**{"opt": "sgd", "lr": 1.0, "weight_decay": 0.1, **settings})
    optimizer = build_optimizer(Supervised(encoder, augment=AugmentConfig()), config)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch=steps_per_epoch, epochs=epochs)
    scheduler.step_update(step)
    names = {id(p): n for n, p in encoder.network.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_the_encoders_rate_is_a_fraction_of_the_heads():
    found = rates(resnet(), encoder_lr=0.2)
    assert found.pop("fc.weight") == (1.0, 0.1)
    assert found.pop("fc.bias") == (1.0, 0.0)
    assert {rate for rate, _ in found.values()} == {0.2}
    assert found["conv1.weight"] == (0.2, 0.1)
    assert found["bn1.weight"] == (0.2, 0.0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sched": "none"}, {0: 1.0, 37: 1.0, 100: 1.0}),
        ({"sched": "none", "warmup_epochs": 2}, {0: 0.0, 10: 0.5, 20: 1.0, 90: 1.0}),
        ({"sched": "cosine"}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ({"sched": "cosine", "min_lr": 0.2}, {0: 1.0, 50: 0.6, 100: 0.2}),
        ({"sched": "multistep", "decay_milestones": (5, 8)}, {48: 1.0, 50: 0.1, 80: 0.01}),
        ({"sched": "step", "decay_epochs": 4, "decay_rate": 0.5}, {39: 1.0, 40: 0.5, 80: 0.25}),
    ],
    ids=["none", "warm-up", "cosine", "min_lr", "multistep", "step"],
)
def test_the_schedule_is_that_of_every_group_times_its_fraction(settings, expected):
    for step, rate in expected.items():
        found = rates(resnet(), encoder_lr=0.25, step=step, **settings)
        assert found["fc.weight"][0] == pytest.approx(rate, abs=1e-9)
        assert found["conv1.weight"][0] == pytest.approx(0.25 * rate, abs=1e-9)


def test_what_the_network_says_is_not_decayed():
    found = rates(vit())
    assert {name for name, (_, decay) in found.items() if decay == 0} >= {"pos_embed", "cls_token"}
    assert found["patch_embed.proj.weight"][1] == 0.1


def test_betas_reach_the_optimizer_and_typos_are_named_at_once():
    config = OptimizerConfig(opt="adamw", betas=(0.8, 0.95))
    optimizer = build_optimizer(Supervised(vit(), augment=AugmentConfig()), config)
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)
    with pytest.raises(ValueError, match="betas are not for sgd"):
        OptimizerConfig(opt="sgd", betas=(0.8, 0.95))
    with pytest.raises(ValueError, match="adamv"):
        OptimizerConfig(opt="adamv")
    with pytest.raises(ValueError, match=r"sched \('cosin'\) must be one of none, cosine"):
        OptimizerConfig(sched="cosin")


def test_layer_decay_falls_towards_the_stem():
    found = {n: rate for n, (rate, _) in rates(vit(), layer_decay=0.5).items()}
    assert found["head.weight"] == 1.0
    chain = ["blocks.2.attn.qkv.weight", "blocks.1.attn.qkv.weight", "blocks.0.attn.qkv.weight"]
    chain.append("patch_embed.proj.weight")
    ratios = [found[b] / found[a] for a, b in itertools.pairwise(chain)]
    assert ratios == pytest.approx([0.5, 0.5, 0.5])
    both = {n: r for n, (r, _) in rates(vit(), layer_decay=0.5, encoder_lr=0.1).items()}
    assert both["blocks.0.attn.qkv.weight"] == pytest.approx(0.1 * found[chain[2]])
    resnets = {n: rate for n, (rate, _) in rates(resnet(), layer_decay=0.5).items()}
    assert resnets["conv1.weight"] < resnets["stages.0.0.conv1.weight"] < resnets["fc.weight"]


def test_layer_decay_of_a_transformers_model_is_an_error():
    with pytest.raises(ValueError, match=r"layer_decay needs a timm network"):
        rates(SpecRegModel.from_transformers(vit_config()), layer_decay=0.5)
