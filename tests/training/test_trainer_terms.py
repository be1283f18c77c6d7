"""SpecRegTrainer's regularizers: their gradient whole, in float32, per [0, 1] pixel, resumed."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from hf_specreg import (
    InputGradientConfig,
    InputGradientPenalty,
    RegularizersConfig,
    SensitivityConfig,
    SpecRegModel,
    SpecRegTrainer,
)
from hf_specreg.hub.card import card_files
from hf_specreg.hub.encoder import Encoder
from hf_specreg.spectral.regularizers import BSSConfig, JacobianConfig, L2SPConfig
from hf_specreg.training.trainer import _check_shards
from tests.tiny import tiny
from tests.training.test_callback import mean_loss
from tests.training.test_trainer import Digits, arguments, vit

STD = 0.25
GRADIENT = RegularizersConfig(input_gradient=InputGradientConfig(strength=0.5))
SENSITIVE = RegularizersConfig(sensitivity=SensitivityConfig(strength=0.1, images=8))


def trainer(folder, model=None, *, count=8, known=None, **settings):
    """Of the first digits, each of which a step of 8 sees."""
    options = {"regularizers": GRADIENT, "pixel_std": STD, **(known or {})}
    args = arguments(folder, **{"max_steps": 1, **settings})
    return SpecRegTrainer(model or vit(), args, train_dataset=Digits(count), **options)


def resnet():
    return tiny("resnet20_cifar", num_classes=10)


def digits():
    rows = [Digits(8)[i] for i in range(8)]
    images = torch.stack([row["pixel_values"] for row in rows])
    return images, torch.tensor([row["labels"] for row in rows])


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradient_is_that_of_the_penalty_on_all_images(tmp_path, accumulation, own_loss):
    reference = vit()
    InputGradientPenalty(reference, strength=0.5, pixel_std=STD)(*digits()).backward()
    loss = {"compute_loss_func": mean_loss} if own_loss else {}
    args = arguments(tmp_path, batch=8 // accumulation, accumulation=accumulation, max_steps=1)
    plain, ours = vit(), vit()
    Trainer(plain, args, train_dataset=Digits(8), **loss).train()
    known = {"regularizers": GRADIENT, "pixel_std": STD}
    SpecRegTrainer(ours, args, train_dataset=Digits(8), **known, **loss).train()
    for name, weight in reference.named_parameters():
        moved = (plain.get_parameter(name) - ours.get_parameter(name)) / 0.1
        torch.testing.assert_close(moved, weight.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert reference.classifier.weight.grad.norm() > 0.1


def test_terms_of_the_weights_and_the_penalty_enter_once(tmp_path):
    """0.5 x alpha / 2 ||w - w_0||^2 moves nothing at w_0; the head's beta / 2 ||w||^2 does."""
    config = RegularizersConfig(l2_sp=L2SPConfig(strength=1.0, head=0.5))
    known = {"regularizers": config, "penalty": {"strength": 0.05}, "pixel_std": None}
    ends = []
    for accumulation in (1, 4):
        split = {"batch": 8 // accumulation, "accumulation": accumulation}
        ours = trainer(tmp_path, known=known, **split)
        before = ours.model.classifier.weight.detach().clone()
        ours.train()
        ends.append(ours.model.state_dict())
        logged = ours.state.log_history[0]
        assert logged["l2_sp"] == pytest.approx(0.25 * before.square().sum().item(), rel=1e-3)
        assert logged["penalty"] > 0
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6)


def test_under_bf16_terms_are_in_float32(tmp_path):
    ours = trainer(tmp_path, bf16=True)
    seen, forward = [], ours.model.vit.embeddings.patch_embeddings.projection
    forward.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    ours.train()
    expected = InputGradientPenalty(vit(), strength=0.5, pixel_std=STD)(*digits())
    assert ours.state.log_history[0]["input_gradient"] == pytest.approx(expected.item(), rel=1e-5)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("make", [vit, resnet])
def test_a_resumed_run_goes_on_exactly(tmp_path, make):
    config = RegularizersConfig(
        sensitivity=SensitivityConfig(strength=0.1, images=8),
        jacobian=JacobianConfig(strength=1e-3),
        bss=BSSConfig(strength=0.01),
        l2_sp=L2SPConfig(strength=0.1, burn_in_steps=1),
    )
    known = {"regularizers": config, "pixel_std": STD if make is vit else None}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    whole, again = (trainer(tmp_path, make(), count=32, known=known, **settings) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    first = whole.state.log_history[0]
    assert first["l2_sp"] == 0  # in its burn-in
    assert all(first[name] != 0 for name in ("sensitivity", "jacobian", "bss"))
    assert whole.penalty is None
    assert "penalty" not in first


def test_what_it_saves_says_how_it_was_trained(tmp_path):
    ours = trainer(tmp_path, resnet(), known={"pixel_std": None}, learning_rate=0.01)
    ours.train()
    ours.save_model(str(tmp_path / "saved"))
    config = SpecRegModel.from_pretrained(tmp_path / "saved").metadata["config"]
    assert config["penalty"]["strength"] == 0
    assert config["regularizers"]["input_gradient"]["strength"] == 0.5
    card = card_files(Encoder.open(tmp_path / "saved", license="mit"), "org/name")
    assert "strength 0.5" in card["README.md"].decode()


def test_evaluation_is_without_them(tmp_path):
    ours = trainer(tmp_path)
    plain = Trainer(ours.model, arguments(tmp_path)).evaluate(Digits(8))["eval_loss"]
    assert ours.evaluate(Digits(8))["eval_loss"] == pytest.approx(plain, rel=1e-6)


def test_the_rest_of_an_epoch_may_be_one_image(tmp_path):
    ours = trainer(tmp_path, count=9, known={"regularizers": SENSITIVE}, max_steps=4)
    ours.train()
    assert all(line["sensitivity"] != 0 for line in ours.state.log_history if "loss" in line)


class WithoutLabels(Digits):
    def __getitem__(self, index):
        return {"pixel_values": super().__getitem__(index)["pixel_values"]}


class WithSoftLabels(Digits):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "labels": [0.1] * 10}


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (WithoutLabels(8), "input_gradient is of the labels: pass those"),
        (WithSoftLabels(8), r"one class an image.* \(8, 10\) of torch.float32"),
    ],
)
def test_labels_that_are_no_classes_are_said(tmp_path, images, says):
    ours = trainer(tmp_path)
    ours.train_dataset = images
    ours.compute_loss_func = lambda outputs, labels, **_: outputs["logits"].sum()
    with pytest.raises(ValueError, match=says):
        ours.train()


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"pixel_std": None}, r"pixel_std=processor\.image_std"),
        ({"regularizers": None}, "neither a penalty nor a regularizer.*InputGradientConfig"),
        ({"penalty": {"head": "classifier"}}, "pass head= to SpecRegTrainer"),
        (
            {"regularizers": RegularizersConfig(sensitivity=SensitivityConfig(strength=0.1))},
            r"sensitivity.images \(16\) exceeds .* \(8, by per_device_train_batch_size\)",
        ),
        (
            {"regularizers": RegularizersConfig(bss=BSSConfig(0.1, burn_in_epochs=1))},
            "give bss.burn_in_steps",
        ),
        ({"regularizers": {"l2_sp": {"strength": 0.1}}}, "is a dict: pass a RegularizersConfig"),
    ],
)
def test_what_is_wrong_is_said_before_training(tmp_path, known, says):
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, known=known)


def test_a_network_of_ones_own_is_told_where_its_head_is(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.top = torch.nn.Linear(64, 8), torch.nn.Linear(8, 10)

        def forward(self, pixel_values, labels=None):
            logits = self.top(self.body(pixel_values.flatten(1)).tanh())
            return (
                logits
                if labels is None
                else {
                    "loss": torch.nn.functional.cross_entropy(logits, labels),
                    "logits": logits,
                }
            )

    known = {"head": "top", "input_size": (1, 8, 8), "penalty": {"strength": 0.01}}
    ours = trainer(tmp_path, Own(), known=known)
    ours.train()
    assert [layer.name for layer in ours.penalty.layers] == ["body"]
    assert ours.state.log_history[0]["input_gradient"] > 0


def test_weights_in_shards_are_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    with pytest.raises(ValueError, match=r"\['bss'\] are of whole weights, which FSDP shards"):
        _check_shards(accelerator, terms=["bss"])
