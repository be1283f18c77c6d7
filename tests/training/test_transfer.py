"""What is trained of a pretrained encoder, and what is left as it came."""

import itertools
import sys

import pytest
import torch
import transformers

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.training.build import build_optimizer, build_scheduler
from hf_specreg.training.config import (
    AugmentConfig,
    OptimizerConfig,
    RunConfig,
    TransferConfig,
)
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.transfer import prepare_transfer, stages


def resnet(**kwargs):
    torch.manual_seed(0)
    return SpecRegModel.from_timm(
        "resnet20_cifar", num_classes=3, input_size=(1, 8, 8), channels=[4, 8], layers=[2, 1]
    )


def vit():
    torch.manual_seed(0)
    args = {"img_size": 8, "patch_size": 4, "depth": 3, "embed_dim": 16, "num_heads": 2}
    return SpecRegModel.from_timm(
        "vit_tiny_patch16_224", num_classes=3, input_size=(1, 8, 8), **args
    )


def hf_vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return SpecRegModel.from_transformers(config, num_classes=3)


def trained_names(encoder):
    return {n for n, p in encoder.network.named_parameters() if p.requires_grad}


def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_linear_probe_trains_the_head_alone():
    encoder = resnet()
    prepare_transfer(encoder, TransferConfig(train="head"))
    assert trained_names(encoder) == {"fc.weight", "fc.bias"}
    objective = Supervised(encoder, augment=AugmentConfig()).train()
    statistics = encoder.network.bn1.running_mean.clone()
    objective(images(), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert torch.equal(encoder.network.bn1.running_mean, statistics)
    assert encoder.network.conv1.weight.grad is None


@pytest.mark.parametrize(
    ("make", "frozen", "first_trained"),
    [
        (
            resnet,
            {"conv1.weight", "bn1.bias", "stages.0.1.conv2.weight"},
            "stages.1.0.conv1.weight",
        ),
        (
            vit,
            {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"},
            "blocks.1.attn.qkv.weight",
        ),
        (
            hf_vit,
            {
                "vit.embeddings.cls_token",
                "vit.embeddings.patch_embeddings.projection.weight",
                "vit.layers.0.mlp.fc1.weight",
            },
            "vit.layers.1.mlp.fc1.weight",
        ),
    ],
)
def test_two_frozen_stages_are_the_stem_and_the_first_after_it(make, frozen, first_trained):
    encoder = make()
    everything = trained_names(encoder)
    prepare_transfer(encoder, TransferConfig(frozen_stages=2))
    trained = trained_names(encoder)
    assert frozen <= everything - trained
    assert first_trained in trained
    heads = {n for n in everything if n.startswith(tuple(encoder.head))}
    assert heads <= trained
    found = stages(encoder)
    assert everything - trained == {n for n, stage in found.items() if stage < 2}


def test_stages_of_a_wrapped_timm_model_are_timms():
    config = transformers.TimmWrapperConfig(architecture="resnet18", num_labels=3)
    wrapped = SpecRegModel.from_transformers(config, num_classes=3, input_size=(3, 32, 32))
    plain = SpecRegModel.from_timm("resnet18", num_classes=3, input_size=(3, 32, 32))
    assert stages(wrapped) == {f"timm_model.{n}": s for n, s in stages(plain).items()}
    assert stages(plain)["layer1.1.conv1.weight"] == stages(plain)["layer1.0.conv1.weight"] == 1


def test_freezing_all_stages_leaves_the_head_and_more_is_an_error():
    encoder = resnet()
    prepare_transfer(encoder, TransferConfig(frozen_stages=3))
    assert trained_names(encoder) == {"fc.weight", "fc.bias"}
    with pytest.raises(ValueError, match=r"frozen_stages \(4\) must be at most 3"):
        prepare_transfer(resnet(), TransferConfig(frozen_stages=4))


@pytest.mark.parametrize("make", [resnet, vit, hf_vit])
def test_lora_is_penalised_as_it_acts_and_saved_as_a_plain_model(tmp_path, make):
    encoder = make()
    untouched = make().network.state_dict()
    prepare_transfer(encoder, TransferConfig(train="lora", lora_rank=2))
    lora = {n for n in trained_names(encoder) if "lora_" in n}
    assert lora
    assert trained_names(encoder) - lora == {
        n for n in trained_names(encoder) if n.startswith(tuple(encoder.head))
    }
    with torch.no_grad():
        for name, parameter in encoder.network.named_parameters():
            if name in lora:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    penalty = SpectralPenalty(encoder, strength=1.0)
    penalty().backward()
    gradients = {n: p.grad for n, p in encoder.network.named_parameters() if p.grad is not None}
    assert gradients.keys() == lora
    assert all(g.norm() > 0 for g in gradients.values())
    encoder.eval()
    encoder.save_pretrained(tmp_path)
    again = SpecRegModel.from_pretrained(tmp_path).eval()
    assert again.network.state_dict().keys() == untouched.keys()
    torch.testing.assert_close(again(images()), encoder(images()), rtol=1e-4, atol=1e-5)
    expected = SpectralPenalty(again).sigmas()
    assert penalty.sigmas() == pytest.approx(expected, rel=1e-3)
    assert lora <= trained_names(encoder)


def test_lora_on_nothing_and_without_peft_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="not found in the base model"):
        prepare_transfer(resnet(), TransferConfig(train="lora", lora_targets=("nothing",)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"hf-specreg\[lora\]"):
        prepare_transfer(resnet(), TransferConfig(train="lora"))


def rates(encoder, *, step=0, epochs=10, steps_per_epoch=10, **settings):
    """The learning rate and weight decay of every parameter, at a step of the schedule."""
    config = OptimizerConfig(**{"opt": "sgd", "lr": 1.0, "weight_decay": 0.1, **settings})
    optimizer = build_optimizer(Supervised(encoder, augment=AugmentConfig()), config)
    scheduler = build_scheduler(
        optimizer, RunConfig(epochs=epochs, optimizer=config), steps_per_epoch
    )
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
        rates(hf_vit(), layer_decay=0.5)
