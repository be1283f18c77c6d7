"""SpecRegCallback with regularizers: a stock Trainer's results plus their gradient, once a step."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from hf_specreg import (
    InputGradientConfig,
    InputGradientPenalty,
    RegularizersConfig,
    SpecRegTrainer,
)
from hf_specreg.spectral.regularizers import BSSConfig, L2SPConfig, SensitivityConfig
from hf_specreg.training.callback import SpecRegCallback
from tests.training.stock_trainers import convnext
from tests.training.test_trainer import Digits, arguments, vit

STD = 0.25
GRADIENT = InputGradientConfig(strength=0.5)


def callback(pixel_std=STD, **terms):
    config = RegularizersConfig(**(terms or {"input_gradient": GRADIENT}))
    return SpecRegCallback(regularizers=config, pixel_std=pixel_std)


def trained(folder, callbacks, **settings):
    """The model after a step of the first 8 digits, what it was called with, and the Trainer."""
    model, seen = vit(), []
    model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    args = arguments(folder, **{"max_steps": 1, **settings})
    trainer = Trainer(model, args, train_dataset=Digits(8), callbacks=callbacks)
    trainer.train()
    return model, [kwargs for kwargs in seen if "labels" in kwargs], trainer


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradient_is_that_of_the_penalty_on_the_first_micro_batch(tmp_path, accumulation):
    split = {"batch": 8 // accumulation, "accumulation": accumulation}
    plain, seen, _ = trained(tmp_path, [], **split)
    ours, _, trainer = trained(tmp_path, [callback()], **split)
    reference = vit()
    penalty = InputGradientPenalty(reference, strength=0.5, pixel_std=STD)
    value = penalty(seen[0]["pixel_values"], seen[0]["labels"])
    value.backward()
    for name, weight in reference.named_parameters():
        moved = (plain.get_parameter(name) - ours.get_parameter(name)) / 0.1
        torch.testing.assert_close(moved, weight.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert reference.classifier.weight.grad.norm() > 0.1
    assert trainer.state.log_history[0]["input_gradient"] == pytest.approx(value.item(), rel=1e-5)


def test_terms_begin_after_their_burn_in_in_each_training_and_the_hook_is_taken_off(tmp_path):
    after = InputGradientConfig(strength=0.5, burn_in_steps=1)
    added = callback(input_gradient=after, l2_sp=L2SPConfig(strength=0.1))
    args = arguments(tmp_path, max_steps=2)
    trainer = Trainer(vit(), args, train_dataset=Digits(), callbacks=[added])
    for _ in range(2):
        trainer.train()
        logged = [line for line in trainer.state.log_history if "loss" in line][-2:]
        assert [line["input_gradient"] > 0 for line in logged] == [False, True]
        assert all(line["l2_sp"] > 0 for line in logged)
        assert not trainer.model._forward_pre_hooks
    assert "input_gradient" not in trainer.evaluate(Digits(8))


def test_terms_that_begin_after_the_training_are_warned_of(tmp_path, caplog):
    trained(tmp_path, [callback(l2_sp=L2SPConfig(strength=0.1, burn_in_steps=1))])
    assert "l2_sp: its burn-in of 1 leaves it none of this training's 1 steps" in caplog.text
    caplog.clear()
    trained(tmp_path, [callback()])
    assert "burn-in" not in caplog.text


def test_under_bf16_terms_are_in_float32(tmp_path):
    _, seen, trainer = trained(tmp_path, [callback()], bf16=True)
    penalty = InputGradientPenalty(vit(), strength=0.5, pixel_std=STD)
    expected = penalty(seen[0]["pixel_values"], seen[0]["labels"]).item()
    assert trainer.state.log_history[0]["input_gradient"] == pytest.approx(expected, rel=1e-5)


def test_the_scale_of_fp16_is_on_the_gradient(tmp_path):
    model, added = vit(), callback()
    args = arguments(tmp_path)
    Trainer(model, args, train_dataset=Digits(), callbacks=[added])
    optimizer = torch.optim.SGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    begin, fp16 = SimpleNamespace(global_step=0, max_steps=1), SimpleNamespace(fp16=True)
    with pytest.raises(ValueError, match="SGD has no scaler of fp16"):
        added.on_step_begin(fp16, begin, None, optimizer=optimizer)
    added.on_train_begin(args, begin, None, model=model)
    added.on_step_begin(fp16, begin, None, optimizer=AcceleratedOptimizer(optimizer, scaler=scaler))
    batch = {"pixel_values": torch.rand(4, 1, 8, 8), "labels": torch.arange(4)}
    for _ in range(2):  # the second micro-batch adds nothing
        model.train()(**batch)
    reference = vit()
    penalty = InputGradientPenalty(reference, strength=0.5, pixel_std=STD)
    penalty(*batch.values()).backward()
    for name, weight in reference.named_parameters():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, 1024 * weight.grad, rtol=1e-4, atol=1e-3, msg=name)


def test_labels_that_the_model_is_not_given_are_said(tmp_path):
    with pytest.raises(ValueError, match="input_gradient is of the labels: pass those"):
        trained(tmp_path, [callback()], label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (SpecRegCallback, "neither a penalty nor"),
        (lambda: SpecRegCallback(penalty={"head": "fc"}), "pass head= to SpecRegCallback"),
        (lambda: callback(bss=BSSConfig(strength=0.1)), "bss is of .* use SpecRegTrainer"),
        (lambda: callback(pixel_std=None), r"pixel_std=processor\.image_std"),
        (lambda: callback(sensitivity=SensitivityConfig(0.1)), r"images \(16\) exceeds .* \(8, by"),
    ],
)
def test_what_is_wrong_is_said_before_training(tmp_path, make, says):
    with pytest.raises(ValueError, match=says):
        Trainer(vit(), arguments(tmp_path), train_dataset=Digits(), callbacks=[make()])


def test_shards_and_copies_of_the_model_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    Trainer(vit(), args, train_dataset=Digits())  # makes accelerate's state
    copied = SimpleNamespace(n_gpu=2)
    with pytest.raises(ValueError, match="copied to 2 devices in each step"):
        callback().on_init_end(copied, None, None, model=vit())
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="FSDP shards: use DistributedDataParallel"):
        callback().on_init_end(args, None, None, model=vit())


def test_penalty_and_regularizers_together_train_to_the_weights_of_the_subclass(tmp_path):
    """Also where the run is resumed from its first step."""
    terms = {
        "penalty": {"strength": 0.05},
        "regularizers": RegularizersConfig(input_gradient=GRADIENT, l2_sp=L2SPConfig(strength=0.1)),
        "pixel_std": STD,
    }
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    ends = {}
    for name, resumed in (("subclass", False), ("callback", False), ("resumed", True)):
        folder = tmp_path / ("callback" if resumed else name)
        args, images = arguments(folder, **settings), Digits()
        if name == "subclass":
            trainer = SpecRegTrainer(convnext(), args, train_dataset=images, **terms)
        else:
            added = SpecRegCallback(**terms)
            trainer = Trainer(convnext(), args, train_dataset=images, callbacks=[added])
        checkpoint = str(folder / "checkpoint-1") if resumed else None
        trainer.train(resume_from_checkpoint=checkpoint)
        logged = [line for line in trainer.state.log_history if "loss" in line][-1]
        assert min(logged[n] for n in ("penalty", "input_gradient", "l2_sp")) > 0
        ends[name] = {n: p.detach() for n, p in trainer.model.named_parameters()}
    for name, weight in ends["subclass"].items():
        torch.testing.assert_close(ends["callback"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(ends["callback"][name], ends["resumed"][name]), name
