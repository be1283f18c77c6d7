"""SpecRegCallback: a stock Trainer's results plus the penalty's gradient, once a step."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import Trainer

from hf_specreg import SpectralPenalty
from hf_specreg.spectral.gradient import add_gradient
from hf_specreg.training.callback import SpecRegCallback
from tests.processes import run
from tests.training import stock_trainers
from tests.training.test_trainer import Digits, arguments, resnet, vit


def trained(folder, model, callbacks, *, resume=None, **kwargs):
    options = {"callbacks": callbacks, "train_dataset": Digits(), "eval_dataset": Digits(8)}
    trainer = Trainer(model, arguments(folder, **kwargs), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The weights that one and two processes train to, by SpecRegTrainer and by the callbacks."""
    folders = {n: tmp_path_factory.mktemp(f"processes_{n}") for n in (1, 2)}
    for processes, folder in folders.items():
        run("tests.training.stock_trainers", str(folder), processes=processes)
    return folders


@pytest.mark.parametrize("kind", stock_trainers.KINDS)
def test_two_processes_train_to_the_weights_of_one(runs, kind):
    """In two micro-batches, with the penalty's layers shared out over the processes."""
    expected = load_file(runs[1] / f"{kind}-0.safetensors")
    first, second = (load_file(runs[2] / f"{kind}-{rank}.safetensors") for rank in (0, 1))
    start = stock_trainers.convnext().state_dict()
    assert any((start[key] - value).abs().max() > 1e-2 for key, value in expected.items())
    for key, value in expected.items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("kind", stock_trainers.KINDS)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_of_several_processes_goes_on_exactly(runs, kind, processes):
    for rank in range(processes):
        whole = load_file(runs[processes] / f"{kind}-{rank}.safetensors")
        resumed = load_file(runs[processes] / f"{kind}-resumed-{rank}.safetensors")
        assert all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.parametrize("processes", [1, 2])
def test_the_callback_and_the_subclass_train_to_the_same_weights(runs, processes):
    subclass, callback = (
        load_file(runs[processes] / f"{kind}-0.safetensors") for kind in ("subclass", "callback")
    )
    for key, value in subclass.items():
        torch.testing.assert_close(callback[key], value, rtol=1e-4, atol=1e-5, msg=key)


def mean_loss(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / (num_items_in_batch or len(labels))


@pytest.mark.parametrize(("make", "own_loss"), [(vit, False), (vit, True), (resnet, False)])
def test_the_gradient_enters_once_and_whole_whatever_the_loss_is_divided_by(
    tmp_path, make, own_loss
):
    options = {"compute_loss_func": mean_loss} if own_loss else {}
    reference = make()
    SpectralPenalty(reference, strength=0.05)().backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named(reference)}
    args = arguments(tmp_path, batch=2, accumulation=4, max_steps=1)
    ends = []
    for callbacks in ([], [SpecRegCallback(penalty={"strength": 0.05})]):
        trainer = Trainer(make(), args, train_dataset=Digits(), callbacks=callbacks, **options)
        trainer.train()
        ends.append({n: p.detach() for n, p in named(trainer.model)})
    plain, ours = ends
    for name, gradient in expected.items():
        moved = (plain[name] - ours[name]) / 0.1
        torch.testing.assert_close(moved, gradient, rtol=1e-3, atol=1e-5)


def named(model):
    return list(model.named_parameters())


def test_every_second_step_after_the_burn_in_has_it_and_evaluation_has_not(tmp_path):
    callback = SpecRegCallback(penalty={"strength": 0.05, "burn_in": 1, "every": 2})
    every = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    trainer = trained(tmp_path, vit(), [callback], batch=2, accumulation=2, **every)
    assert callback.penalty.step == 4
    logged = [line["penalty"] for line in trainer.state.log_history if "loss" in line]
    assert [p > 0 for p in logged] == [False, True, True, True]  # the last that was not 0
    assert logged[1] == logged[2] != logged[3]


def test_a_second_training_and_a_new_model_begin_the_burn_in_again(tmp_path, caplog):
    callback = SpecRegCallback(penalty={"strength": 0.05, "burn_in": 2})
    args = arguments(tmp_path, max_steps=2)
    trainer = Trainer(model_init=vit, args=args, train_dataset=Digits(), callbacks=[callback])
    networks = []
    for _ in range(2):
        trainer.train()
        assert callback.penalty.step == 2
        networks.append(callback.penalty.space.network)
    assert networks[1] is trainer.model is not networks[0]
    said = "penalty: its burn-in of 2 leaves it none of this training's 2 steps"
    assert caplog.text.count(said) == 2


def test_a_checkpoint_that_is_somewhere_else_is_found_or_missed_aloud(tmp_path, caplog):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path / "run", vit(), [SpecRegCallback(penalty={})], **settings)
    checkpoint = str(tmp_path / "run/checkpoint-1")
    for given, warns in (({"resume_from_checkpoint": checkpoint}, False), ({}, True)):
        caplog.clear()
        callback = SpecRegCallback(penalty={})
        folder = tmp_path / f"other_{warns}"
        trained(folder, vit(), [callback], resume=checkpoint, max_steps=2, **given)
        assert ("vectors start anew" in caplog.text) == warns
        assert callback.penalty.step == 2


def test_the_step_is_the_trainers_whatever_a_checkpoint_says(tmp_path, caplog):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, vit(), [SpecRegCallback(penalty={})], **settings)
    count = tmp_path / "checkpoint-1/penalty.json"
    count.write_text(json.dumps({**json.loads(count.read_text()), "step": 7}))
    callback = SpecRegCallback(penalty={})
    trained(tmp_path, vit(), [callback], resume=str(count.parent), max_steps=2)
    assert "the penalty of step 7, and the Trainer is at step 1" in caplog.text
    assert callback.penalty.step == 2


def test_a_checkpoint_that_is_not_where_it_should_be_is_missed_aloud(tmp_path, caplog):
    callback, args = SpecRegCallback(penalty={}), arguments(tmp_path)
    Trainer(vit(), args, train_dataset=Digits(), callbacks=[callback])
    callback.on_save(args, SimpleNamespace(global_step=1), None)
    assert "the penalty's vectors are not saved" in caplog.text


def test_the_scale_of_fp16_is_on_the_gradient_and_a_frozen_encoder_gets_none(tmp_path):
    model = vit()
    callback = SpecRegCallback(penalty={"strength": 0.05})
    Trainer(model, arguments(tmp_path), train_dataset=Digits(), callbacks=[callback])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = torch.optim.SGD(model.parameters())
    begin, fp16 = SimpleNamespace(global_step=0), SimpleNamespace(fp16=True)
    with pytest.raises(ValueError, match="SGD has no scaler of fp16"):
        callback.on_step_begin(fp16, begin, None, optimizer=plain)
    optimizer = AcceleratedOptimizer(plain, scaler=scaler)
    callback.on_step_begin(fp16, begin, None, optimizer=optimizer)
    scaled = {n: p.grad for n, p in named(model) if p.grad is not None}
    reference = vit()
    SpectralPenalty(reference, strength=0.05)().backward()
    for name, parameter in named(reference):
        if parameter.grad is not None:
            torch.testing.assert_close(scaled[name], 1024 * parameter.grad, rtol=1e-3, atol=1e-2)
    frozen = vit().requires_grad_(False)
    penalty = SpectralPenalty(frozen, strength=0.05)
    assert add_gradient(penalty) > 0
    assert all(p.grad is None for _, p in named(frozen))


def test_the_gradient_is_added_in_place_to_what_is_there():
    model = vit()
    for _, parameter in named(model):
        parameter.grad = torch.ones_like(parameter)
    before = {n: p.grad for n, p in named(model)}
    add_gradient(SpectralPenalty(model, strength=0.05), scale=2.0)
    assert all(before[n] is p.grad for n, p in named(model))
    reference = vit()
    SpectralPenalty(reference, strength=0.1)().backward()
    for name, parameter in named(reference):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(before[name], 1 + gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_shards_are_refused_before_training(tmp_path, monkeypatch, kind):
    args = arguments(tmp_path)
    Trainer(vit(), args, train_dataset=Digits())  # makes accelerate's state
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
    with pytest.raises(ValueError, match="use SpecRegTrainer with FSDP2"):
        SpecRegCallback(penalty={}).on_init_end(args, None, None, model=vit())
