"""What is trained of a pretrained encoder, and what is left as it came."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.data.datasets import DataConfig, build_splits
from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.report import ReportConfig, of_report
from hf_specreg.training.transfer import TransferConfig, prepare_transfer, stages
from tests.tiny import images, tiny, vit_config


def resnet():
    return tiny("resnet20_cifar", layers=[2, 1])


def vit():
    return tiny("vit_tiny_patch16_224", depth=3, embed_dim=16, num_heads=2)


def hf_vit():
    return SpecRegModel.from_transformers(vit_config(num_hidden_layers=3), num_classes=3)


def padded_as_by_tensorflow():
    return tiny("test_efficientnet", pad_type="same")


def dilated():
    return tiny("test_resnet", output_stride=8)


def standardised():
    return tiny("test_nfnet")


def trained_names(encoder):
    return {n for n, p in encoder.network.named_parameters() if p.requires_grad}


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


@pytest.mark.parametrize(
    "make", [resnet, vit, hf_vit, padded_as_by_tensorflow, dilated, standardised]
)
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


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (standardised, "conv2"),
        (dilated, "layer4.0.conv1"),
        (padded_as_by_tensorflow, "conv_dw"),
    ],
)
def test_lora_on_a_convolution_that_takes_none_is_an_error_before_anything_is_changed(make, target):
    encoder = make()
    before = trained_names(encoder)
    with pytest.raises(ValueError, match=rf"LoRA on '[a-z0-9.]*{target}' \(\w+\) is no addition"):
        prepare_transfer(encoder, TransferConfig(train="lora", lora_targets=(target,)))
    assert trained_names(encoder) == before


def test_a_network_of_standardised_convolutions_alone_takes_no_lora():
    encoder = tiny("test_nfnet", attn_layer="")
    with pytest.raises(ValueError, match="nor a convolution that takes LoRA"):
        prepare_transfer(encoder, TransferConfig(train="lora"))


def test_lora_on_nothing_and_without_peft_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="not found in the base model"):
        prepare_transfer(resnet(), TransferConfig(train="lora", lora_targets=("nothing",)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="peft: install the extra lora"):
        prepare_transfer(resnet(), TransferConfig(train="lora"))


def test_the_report_of_a_run_names_a_folder_as_one_and_says_how_it_was_cut(tmp_path, monkeypatch):
    (tmp_path / "data/mnist").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = DataConfig("data/mnist", revision="abc", classes=("1", "2"))
    accelerator = SimpleNamespace(
        device="cpu", process_index=0, num_processes=1, wait_for_everyone=None
    )
    config = SimpleNamespace(data=data, report=ReportConfig(), seed=0, output_dir="run")
    splits = build_splits(DataConfig(held_out_samples=7))
    assert of_report(config, splits, accelerator)["about"] == {
        **{"id": "./data/mnist", "revision": "abc", "split": "test", "cut": True},
        "splits": {"classes": ("1", "2"), "validation_fraction": 0.1, "seed": 0},
    }
    config.data = replace(data, held_out_samples=7)
    about = of_report(config, replace(splits, cut=()), accelerator)["about"]
    assert about["split"] == "7 of the test"
    assert not about["cut"]
