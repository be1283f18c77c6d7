"""What a configuration makes of an encoder's batch norms."""

import pytest
import torch

from hf_specreg.encoders.pinned import batch_norms, is_pinned, pin_norms
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.training.model import ModelConfig, build_encoder, build_model
from tests.tiny import ARGS, SIZE, images, tiny

NAMES = ("a", "b", "c")


def test_a_fresh_encoder_is_pinned_at_mean_0_and_variance_1_with_fixups_start():
    config = ModelConfig(
        "resnet20_cifar", input_size=SIZE, args=ARGS["resnet20_cifar"], norms="pinned"
    )
    network = build_encoder(config, NAMES, RegularizersConfig()).train().network
    assert all(is_pinned(norm) for norm in batch_norms(network).values())
    assert not network.stages[0][0].bn2.weight.any()
    assert not any(m.running_mean.any() for m in batch_norms(network).values())


@pytest.mark.parametrize("norms", ["pinned", "fused"])
def test_a_saved_encoder_keeps_its_function(norms, tmp_path):
    model = tiny("resnet20_cifar")
    model(images())  # statistics of its own
    model.save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), "saved", norms=norms)
    encoder = build_encoder(config, NAMES, RegularizersConfig()).train()
    encoder.network.fc = model.network.fc  # a run's head is fresh
    torch.testing.assert_close(encoder(images()), model.eval()(images()))
    assert encoder.network.bn1.weight.requires_grad == (norms == "pinned")


def test_an_encoder_that_was_saved_pinned_stays_pinned(tmp_path):
    model = tiny("resnet20_cifar")
    pin_norms(model)
    model.save_pretrained(tmp_path)
    encoder = build_encoder(ModelConfig(str(tmp_path), "saved"), NAMES, RegularizersConfig())
    assert all(is_pinned(norm) for norm in batch_norms(encoder).values())


def test_a_fresh_encoder_has_nothing_to_fuse():
    with pytest.raises(ValueError, match="a fresh one has nothing to fuse, take 'pinned'"):
        ModelConfig("resnet18", norms="fused")


@pytest.mark.parametrize(
    ("library", "name", "near"), [("timm", "resnt18", "resnet18"), ("transformers", "vitt", "vit")]
)
def test_a_name_that_a_library_does_not_have_is_said_with_near_ones(library, name, near):
    said = rf"model.name \('{name}'\) is no model of {library}: did you mean .*\b{near}\b"
    with pytest.raises(ValueError, match=said):
        build_model(ModelConfig(name, library), NAMES)


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "tv_resnet34"])
def test_a_name_with_the_tag_of_weights_or_of_an_earlier_timm_is_known(name):
    assert build_model(ModelConfig(name), NAMES).num_classes == 3
