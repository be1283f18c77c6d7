"""What SpecRegTrainer records of the penalty, and settings of Trainer that a SpecRegModel takes."""

import json

import pytest
import torch

from hf_specreg import SpecRegTrainer
from hf_specreg.hub.card import card_files
from hf_specreg.hub.encoder import Encoder
from tests.tiny import tiny
from tests.training.test_trainer import Digits, arguments, of_timm, of_transformers, trained


def test_all_that_shapes_the_penalty_is_recorded_and_told(tmp_path):
    shape = {"fold_norm": True, "fold_gradient": "exact", "skip": ["conv1"], "split_qkv": False}
    trainer = SpecRegTrainer(
        tiny("resnet20_cifar", num_classes=10),
        arguments(tmp_path, max_steps=3),
        train_dataset=Digits(),
        penalty={"strength": 0.05, "burn_in": 2, "ramp": 3, **shape},
    )
    trainer.train()
    trainer.save_model(str(tmp_path))
    recorded = json.loads((tmp_path / "specreg.json").read_text())["config"]["penalty"]
    assert recorded.items() >= {**shape, "burn_in_steps": 2, "ramp_steps": 3}.items()
    card = card_files(Encoder.open(tmp_path, license="mit"), "me/m")["README.md"].decode()
    assert "folded in, but for conv1, at every step from step 2 on, rising from 0 for 3 ste" in card
    assert "method: supervised, rep-spectral 0.05 (folded, without conv1)\n" in card


@pytest.mark.parametrize("make", [of_timm, of_transformers])
def test_activation_checkpointing_reaches_the_network_and_changes_no_weight(tmp_path, make):
    plain, again = make(), make()
    trained(tmp_path, plain, learning_rate=0.01)
    trained(tmp_path, again, learning_rate=0.01, gradient_checkpointing=True)
    switched = [getattr(m, "grad_checkpointing", False) for m in again.network.modules()]
    switched += [getattr(m, "gradient_checkpointing", False) for m in again.network.modules()]
    assert any(switched)
    for (name, weight), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)


def test_a_network_without_checkpointing_is_named(tmp_path):
    model = tiny("resnet20_cifar", num_classes=10)
    with pytest.raises(ValueError, match="has no activation checkpointing: leave gradient_check"):
        trained(tmp_path, model, gradient_checkpointing=True)


def test_label_smoothing_is_that_of_the_cross_entropy(tmp_path):
    model = of_timm().eval()
    images = torch.stack([Digits(8)[i]["pixel_values"] for i in range(8)])
    labels = torch.tensor([Digits(8)[i]["labels"] for i in range(8)])
    args = arguments(tmp_path, label_smoothing_factor=0.1, per_device_eval_batch_size=8)
    trainer = SpecRegTrainer(model, args, train_dataset=Digits(), penalty={})
    expected = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
    assert trainer.evaluate(Digits(8))["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[-2]["penalty"] > 0
