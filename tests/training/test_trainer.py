"""SpecRegTrainer: Trainer's results plus the penalty's gradient, under accumulation and resume."""

import functools
import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate.utils import DistributedType
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_specreg import RegularizersConfig, SpecRegModel, SpecRegTrainer, SpectralPenalty
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform
from hf_specreg.encoders.blueprint import FolderError
from hf_specreg.hub.card import card_files
from hf_specreg.hub.encoder import Encoder
from hf_specreg.spectral.regularizers import L2SPConfig
from hf_specreg.spectral.regularizers.spectral_norm import normalize_spectra
from hf_specreg.training.trainer import _check_shards
from hf_specreg.training.transfer import TransferConfig, add_lora
from tests.tiny import vit_config


@functools.cache
def training_images():
    transform = evaluation_transform((1, 8, 8))
    rows = load_splits("digits").train.take(64)
    return LabelledImages(rows, input_size=(1, 8, 8), evaluate=transform)


class Digits(Dataset):
    def __init__(self, count=64):
        self.images = training_images()
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image, label = self.images[index]
        return {"pixel_values": image.float() / 255, "labels": label}


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(vit_config(num_hidden_layers=2, num_labels=10))


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10
    )
    config.image_size = 8
    return ResNetForImageClassification(config)


def arguments(folder, *, batch=8, accumulation=1, **kwargs):
    settings = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**settings, **kwargs})


def trained(folder, model, *, kind=SpecRegTrainer, **kwargs):
    options = {"penalty": {"strength": 0.05}} if kind is SpecRegTrainer else {}
    trainer = kind(model, arguments(folder, **kwargs), train_dataset=Digits(), **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("make", [vit, resnet])
def test_accumulation_gives_the_penaltys_gradient_once_and_whole(tmp_path, make):
    """1 x 8 and 4 x 2 images a step; the weights after one step differ by rounding only.

    ViT's Trainer divides the loss by the micro-batches, and where the model scales it by the number
    of items itself, it does not: both kinds occur. Batch norm's statistics are of the micro-batch,
    so the ResNet is held to the difference that the penalty makes.
    """
    steps = {}
    for accumulation in (1, 4):
        for kind in (Trainer, SpecRegTrainer):
            model = make()
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            batch = 8 // accumulation
            settings = {"batch": batch, "accumulation": accumulation, "max_steps": 1}
            trained(tmp_path, model, kind=kind, **settings)
            after = dict(model.named_parameters())
            steps[accumulation, kind] = {n: after[n].detach() - before[n] for n in before}
    reference = make()
    penalty = SpectralPenalty(reference, strength=0.05)
    penalty().backward()
    for name, parameter in reference.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for accumulation in (1, 4):
            plain, ours = (steps[accumulation, kind][name] for kind in (Trainer, SpecRegTrainer))
            torch.testing.assert_close(plain - ours, 0.1 * expected, rtol=1e-3, atol=1e-6)
    assert any(p.grad is not None and p.grad.norm() > 1e-3 for p in reference.parameters())


def test_a_loss_that_is_scaled_already_is_not_divided_and_neither_is_the_penalty(tmp_path):
    def mean_loss(outputs, labels, num_items_in_batch=None):
        loss = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return loss / num_items_in_batch

    found = []
    for accumulation in (1, 4):
        model = vit()
        args = arguments(tmp_path, batch=8 // accumulation, accumulation=accumulation, max_steps=1)
        SpecRegTrainer(
            model,
            args,
            train_dataset=Digits(),
            compute_loss_func=mean_loss,
            penalty={"strength": 0.5},
        ).train()
        found.append(model.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_gives_the_weights_of_the_uninterrupted_one(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "run", vit(), **settings)
    again = SpecRegTrainer(
        vit(),
        arguments(tmp_path / "run", **settings),
        train_dataset=Digits(),
        penalty={"strength": 0.05},
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert again.penalty.step == whole.penalty.step == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_network_with_parametrizations_is_resumed_and_not_from_merged_weights(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model, other = vit(), vit()
    normalize_spectra(model)
    normalize_spectra(other)
    whole = trained(tmp_path / "run", model, **settings)
    again = SpecRegTrainer(
        other,
        arguments(tmp_path / "run", **settings),
        train_dataset=Digits(),
        penalty={"strength": 0.05},
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    (tmp_path / "run/checkpoint-2/trained.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no trained.safetensors.* without save_only_model"):
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))


def test_shards_are_loaded_by_their_own_names(tmp_path, monkeypatch):
    """And not anew by those that transformers gives a ViT's weights in a file."""
    whole = trained(tmp_path, vit(), max_steps=1, save_strategy="steps", save_steps=1)
    loaded = Mock()
    monkeypatch.setattr("hf_specreg.training.trainer.load_network", loaded)
    whole._load_renamed(str(tmp_path / "checkpoint-1"))
    loaded.assert_called_once()
    monkeypatch.setattr(whole, "is_fsdp_enabled", True)
    whole._load_renamed(str(tmp_path / "checkpoint-1"))
    loaded.assert_called_once()


@pytest.mark.parametrize(("kind", "only"), [(Trainer, False), (SpecRegTrainer, True)])
def test_a_checkpoint_without_vectors_is_gone_on_from_with_a_warning(tmp_path, caplog, kind, only):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    settings |= {"save_only_model": only}
    trained(tmp_path / "run", vit(), kind=kind, **settings)
    longer = arguments(tmp_path / "run", **{**settings, "max_steps": 3})
    again = SpecRegTrainer(vit(), longer, train_dataset=Digits(), penalty={})
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert "the penalty's vectors start anew" in caplog.text
    assert again.penalty.step == 3


def test_terms_that_begin_after_the_training_are_warned_of(tmp_path, caplog):
    regularizers = RegularizersConfig(l2_sp=L2SPConfig(0.1, burn_in_steps=2))
    for strength in (0.05, 0.0):
        penalty = {"strength": strength, "burn_in": 3}
        terms = {"penalty": penalty, "regularizers": regularizers}
        args = arguments(tmp_path, max_steps=2)
        SpecRegTrainer(vit(), args, train_dataset=Digits(), **terms).train()
        assert "l2_sp: its burn-in of 2 leaves it none of this training's 2 steps" in caplog.text
        assert ("penalty: its burn-in of 3" in caplog.text) == bool(strength)
        caplog.clear()


def test_a_second_training_has_its_own_burn_in(tmp_path):
    trainer = SpecRegTrainer(
        vit(),
        arguments(tmp_path, max_steps=3),
        train_dataset=Digits(),
        penalty={"strength": 0.05, "burn_in": 2},
    )
    for _ in range(2):
        trainer.train()
        assert trainer.penalty.step == 3
        logged = [line["penalty"] for line in trainer.state.log_history if "loss" in line]
        assert logged[-3:-1] == [0, 0]
        assert logged[-1] > 0


@pytest.mark.parametrize(
    ("kind", "state", "says"),
    [
        ("FSDP", {"is_fsdp2": False}, "FSDP1 shards: use FSDP2"),
        ("DEEPSPEED", {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "ZeRO-3 shards"),
    ],
)
def test_shards_that_hide_the_weights_are_refused(kind, state, says):
    with pytest.raises(ValueError, match=says):
        _check_shards(SimpleNamespace(distributed_type=DistributedType(kind), **state))


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("FSDP", {"is_fsdp2": True}),
        ("DEEPSPEED", {"deepspeed_plugin": SimpleNamespace(zero_stage=2)}),
        ("MULTI_GPU", {}),
    ],
)
def test_shards_that_do_not_are_taken(kind, state):
    _check_shards(SimpleNamespace(distributed_type=DistributedType(kind), **state))


def test_a_spec_reg_model_is_not_trained_in_shards():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    with pytest.raises(ValueError, match=r"train its \.network under FSDP"):
        _check_shards(accelerator, ours=True)


def test_the_penalty_of_a_frozen_encoder_is_logged(tmp_path):
    model = vit()
    model.vit.requires_grad_(False)
    trainer = trained(tmp_path, model)
    assert trainer.state.log_history[0]["penalty"] > 0


def test_it_runs_with_transformers_of_before_the_scaling_was_an_attribute(tmp_path, monkeypatch):
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga", raising=False)
    trainer = SpecRegTrainer(vit(), arguments(tmp_path), penalty={})
    trainer.current_gradient_accumulation_steps = 4
    trainer.model_accepts_loss_kwargs = False
    assert trainer._divisor(None) == 4
    trainer.model_accepts_loss_kwargs = True
    assert trainer._divisor(8) == 1


def test_what_it_saves_is_loaded_by_transformers_and_by_this_package(tmp_path):
    trainer = trained(tmp_path / "run", vit())
    trainer.save_model(str(tmp_path / "saved"))
    with pytest.raises(FolderError, match=r"no image processor.*processing_class"):
        SpecRegModel.from_pretrained(tmp_path / "saved")
    size = {"height": 8, "width": 8}
    trainer.processing_class = ViTImageProcessor(size=size, image_mean=[0.2], image_std=[0.3])
    trainer.save_model(str(tmp_path / "saved"))
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    expected = trainer.model(images).logits
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(stock(images).logits, expected)
    ours = SpecRegModel.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(ours(images * 0.3 + 0.2), expected)
    penalty = ours.metadata["config"]["penalty"]
    assert (penalty["strength"], penalty["scope"], penalty["burn_in_steps"]) == (
        0.05,
        "features",
        0,
    )
    card = Encoder.open(tmp_path / "saved", license="mit")
    assert "0.05 x sum of sigma^2" in card_files(card, "org/name")["README.md"].decode()


def test_the_penalty_is_logged_and_evaluation_is_without_it(tmp_path):
    trainer = trained(tmp_path, vit())
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line["penalty"] > 0 for line in logs)
    steps = trainer.penalty.step
    loss = trainer.evaluate(Digits())["eval_loss"]
    assert trainer.penalty.step == steps
    plain = Trainer(trainer.model, arguments(tmp_path)).evaluate(Digits())["eval_loss"]
    assert loss == pytest.approx(plain, rel=1e-6)


def test_burn_in_and_every_count_optimizer_steps(tmp_path):
    trainer = SpecRegTrainer(
        vit(),
        arguments(tmp_path, batch=2, accumulation=4, max_steps=4),
        train_dataset=Digits(),
        penalty={"strength": 0.05, "burn_in": 2},
    )
    trainer.train()
    assert trainer.penalty.step == 4
    penalties = [line["penalty"] for line in trainer.state.log_history if "loss" in line]
    assert penalties[:2] == [0, 0]
    assert all(p > 0 for p in penalties[2:])


def of_timm():
    torch.manual_seed(0)
    return SpecRegModel.from_timm("resnet10t", num_classes=10, input_size=(1, 8, 8))


def of_transformers():
    return SpecRegModel.from_transformers(vit().config, label_names=[f"no {n}" for n in range(10)])


def normalized():
    """With parametrizations, which what is saved has computed."""
    model = of_timm()
    normalize_spectra(model)
    return model


def with_lora():
    model = of_transformers()
    add_lora(model, TransferConfig(train="lora", lora_rank=2))
    return model


@pytest.mark.parametrize("make", [of_timm, of_transformers, normalized, with_lora])
def test_a_spec_reg_model_is_trained_saved_and_resumed(tmp_path, make):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    before, model = make(), make()
    model.metadata = {"config": {"data": {"source": "digits"}}}
    trainer = trained(tmp_path / "run", model, **settings)
    assert trainer.penalty.input_size == (1, 8, 8)
    assert trainer.state.log_history[0]["penalty"] > 0
    predicted = trainer.predict(Digits(8))
    assert predicted.predictions.shape == (8, 10)
    images = torch.stack([Digits(8)[i]["pixel_values"] for i in range(8)])
    saved = SpecRegModel.from_pretrained(tmp_path / "run/checkpoint-4").eval()
    expected = torch.as_tensor(predicted.predictions)
    torch.testing.assert_close(saved(images), expected, rtol=1e-5, atol=1e-5)
    assert saved.label_names == before.label_names
    assert saved.metadata["config"]["penalty"]["strength"] == 0.05
    assert saved.metadata["before"] == model.metadata
    again = SpecRegTrainer(
        make(),
        arguments(tmp_path / "run", **settings),
        train_dataset=Digits(),
        penalty={"strength": 0.05},
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize("make", [of_timm, of_transformers])
def test_the_best_checkpoint_of_a_spec_reg_model_is_loaded_at_the_end(tmp_path, make):
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    best_first, scores = {"metric_for_best_model": "score"}, iter([1.0, 0.5])
    settings = {"eval_steps": 1, "load_best_model_at_end": True, "max_steps": 2}
    model = make()
    trainer = SpecRegTrainer(
        model,
        arguments(tmp_path, **every_step, **best_first, **settings, learning_rate=0.01),
        train_dataset=Digits(),
        eval_dataset=Digits(8),
        compute_metrics=lambda _: {"score": next(scores)},
        penalty={"strength": 0.01},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = SpecRegModel.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(best[name], value) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "checkpoint-2/specreg.json").read_text())["step"] == 2
    trainer.save_model(str(tmp_path / "last"))
    assert json.loads((tmp_path / "last/specreg.json").read_text())["step"] == 1


def test_what_a_timm_network_lacks_is_said_before_training(tmp_path):
    network = of_timm().network
    with pytest.raises(
        ValueError, match=r"timm's ResNet does not take.*SpecRegModel\(model, input"
    ):
        SpecRegTrainer(network, arguments(tmp_path), penalty={})
    headless = SpecRegModel.from_timm("resnet10t", num_classes=0)
    with pytest.raises(ValueError, match="has no head to train: load it with num_classes"):
        SpecRegTrainer(headless, arguments(tmp_path), penalty={})


def test_a_model_whose_head_is_not_known_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match="cannot find the head"):
        SpecRegTrainer(torch.nn.Linear(3, 2), arguments(tmp_path), penalty={})
