"""timm's tasks with the penalty: once a step and whole, in all that timm's train.py does."""

import pytest
import timm
import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, MultiLabelClassificationTask
from torch import nn

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.spectral.regularizers import (
    BSSConfig,
    InputGradientConfig,
    JacobianConfig,
    L2SPConfig,
    RegularizersConfig,
    SensitivityConfig,
)
from hf_specreg.training.timm_task import regularize_task
from tests.processes import run
from tests.tiny import tiny
from tests.training import as_timm_trains
from tests.training.as_timm_trains import network

PENALTY = {"strength": 0.05}


def batch():
    draws = torch.Generator().manual_seed(0)
    return torch.randn(8, 1, 8, 8, generator=draws), torch.randint(3, (8,), generator=draws)


def task(model=None, *, kind=ClassificationTask, **settings):
    plain = kind(model or network(), nn.CrossEntropyLoss(), verbose=False)
    return regularize_task(plain, **(settings or {"penalty": PENALTY}))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def of_the_penalty(model, **settings):
    """The gradient of the penalty alone, for a model of the same weights."""
    SpectralPenalty(model, **{**PENALTY, **settings})().backward()
    return gradients(model)


def last(folder):
    return torch.load(folder / "last.pth.tar", weights_only=True)


def train(folder, *arguments):
    folder.mkdir(exist_ok=True)
    return as_timm_trains.main(["images", "--output", str(folder), *arguments])


def test_the_loss_has_the_penalty_and_its_gradient_and_the_rest_is_the_tasks():
    images, labels = batch()
    plain = ClassificationTask(network(), nn.CrossEntropyLoss(), verbose=False)
    before = plain(images, labels)
    before["loss"].backward()
    ours = task()
    result = ours(images, labels)
    result["loss"].backward()
    expected = SpectralPenalty(network(), **PENALTY)()
    torch.testing.assert_close(result["penalty"], expected.detach())
    torch.testing.assert_close(result["loss"], before["loss"] + expected)
    assert torch.equal(result["output"], before["output"])
    assert isinstance(ours, ClassificationTask)
    assert set(ours.state_dict()) == set(plain.state_dict())
    wanted, found = of_the_penalty(network()), gradients(ours.trainable_module)
    for name, gradient in gradients(plain.trainable_module).items():
        torch.testing.assert_close(found[name], gradient + wanted.get(name, 0))
    ours.eval()
    assert "penalty" not in ours(images, labels)


def test_a_task_whose_loss_is_of_each_image_is_refused():
    plain = ClassificationTask(network(), nn.CrossEntropyLoss(reduction="none"), verbose=False)
    with pytest.raises(ValueError, match=r"ClassificationTask gave .* of shape \(8,\)"):
        regularize_task(plain, penalty=PENALTY)(*batch())


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_it_enters_a_step_once_and_whole_and_is_computed_once(micro_batches):
    ours, (images, labels) = task(), batch()
    for _ in range(micro_batches):
        loss = ours(images, labels)["loss"]
        loss /= micro_batches  # in place, as train.py
        loss.backward()
    assert ours.penalty.step == 1
    plain = ClassificationTask(network(), nn.CrossEntropyLoss(), verbose=False)
    plain(images, labels)["loss"].backward()
    added = gradients(ours.trainable_module)
    wanted = of_the_penalty(network())
    for name, gradient in gradients(plain.trainable_module).items():
        torch.testing.assert_close(added[name] - gradient, wanted.get(name, 0 * gradient))


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("opt", ["sgd", "muon", "adamw"])
def test_burn_in_and_cadence_count_optimizer_steps_in_any_loop(tells, opt):
    """timm's train.py tells a task by update_ema that a step is done; other loops do not."""
    ours, (images, labels) = task(penalty={**PENALTY, "burn_in": 1, "every": 2}), batch()
    optimizer = create_optimizer_v2(ours.trainable_module, opt=opt, lr=1e-3)
    seen = []
    for step in range(4):
        optimizer.zero_grad()
        penalties = []
        for _ in range(2):
            result = ours(images, labels)
            (result["loss"] / 2).backward()
            penalties.append(result["penalty"].item())
        assert penalties[0] == penalties[1]
        seen.append(penalties[0] > 0)
        optimizer.step()
        if tells:
            ours.update_ema(step=step + 1)
    assert seen == [False, True, False, True]


@pytest.mark.parametrize("tells", [True, False])
def test_a_step_that_fp16_skips_keeps_the_penalty_and_its_gradient(tells):
    ours, (images, labels) = task(), batch()
    optimizer = torch.optim.SGD(ours.trainable_module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in ours.trainable_module.parameters()]
    for broken in (True, False):
        optimizer.zero_grad()
        result = ours(images, labels)
        scaler.scale(result["loss"] * (float("inf") if broken else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(
            not torch.equal(a, b)
            for a, b in zip(before, ours.trainable_module.parameters(), strict=True)
        )
        assert moved == (not broken)
        if tells:
            ours.update_ema()
    assert ours.penalty.step == (2 if tells else 1)
    assert all(p.isfinite().all() for p in ours.trainable_module.parameters())


def test_what_is_frozen_gets_no_gradient_and_all_frozen_has_its_value():
    model = network()
    model.blocks.requires_grad_(False)
    ours, (images, labels) = task(model), batch()
    ours(images, labels)["loss"].backward()
    assert all(p.grad is None for p in model.blocks.parameters())
    assert model.patch_embed.proj.weight.grad.abs().max() > 0
    for name, module in model.named_children():
        module.requires_grad_(name == "head")
    head_only = task(model)
    assert head_only(images, labels)["penalty"] > 0


@pytest.mark.parametrize("of", [network, tiny])
def test_terms_of_the_data_are_of_images_in_pixels_as_in_the_recipes(of):
    config = RegularizersConfig(
        jacobian=JacobianConfig(strength=0.1, projections=None),
        input_gradient=InputGradientConfig(strength=0.1),
        sensitivity=SensitivityConfig(strength=0.1),
        bss=BSSConfig(strength=0.1),
        l2_sp=L2SPConfig(strength=0.1, burn_in_steps=1),
    )
    model = of()
    ours, (images, labels) = task(model, regularizers=config), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ours(images, labels)
    result["loss"].backward()
    terms = ("jacobian", "input_gradient", "sensitivity", "bss")
    assert all(result[name] != 0 for name in terms)
    assert result["l2_sp"] == 0
    assert "penalty" not in result
    normalised = not isinstance(model, SpecRegModel)
    std = sum(model.pretrained_cfg["std"]) / 3 if normalised else 1.0
    mean_square = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda x: model(x[None])[0], image).square().sum()
            for image in images
        ]
    ).mean()
    torch.testing.assert_close(result["jacobian"], 0.1 * mean_square.detach() / std**2)


def test_settings_that_a_task_cannot_keep_are_errors():
    for settings, says in (
        ({"penalty": {"shared": True}}, "cannot be shared"),
        ({"penalty": {"head": "head"}}, "pass head= to regularize_task"),
        ({"penalty": None}, "neither a penalty nor a regularizer"),
        ({"penalty": 0.01}, "penalty is a float: pass arguments of SpectralPenalty by name"),
        (
            {"regularizers": RegularizersConfig(spectral_norm=True)},
            "spectral_norm changes the model",
        ),
        (
            {"regularizers": RegularizersConfig(l2_sp=L2SPConfig(1.0, burn_in_epochs=1))},
            "give l2_sp.burn_in_steps",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            task(**settings)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="does not say how its images are normalised"):
        task(
            bare,
            head="3",
            input_size=(1, 8, 8),
            regularizers=RegularizersConfig(jacobian=JacobianConfig(strength=1.0)),
        )


def test_a_task_that_cannot_be_regularized_stays_as_it_was():
    with pytest.raises(ValueError, match="a VisionTransformer is no task of timm: make one first"):
        regularize_task(model := network(), penalty=PENALTY)
    assert type(model) is type(network())
    plain = ClassificationTask(network(), nn.CrossEntropyLoss(), verbose=False)
    before = set(vars(plain))
    with pytest.raises(TypeError, match="strenght"):
        regularize_task(plain, penalty={"strenght": 1.0})
    jacobian = RegularizersConfig(jacobian=JacobianConfig(strength=1.0))
    with pytest.raises(ValueError, match="pixel_std"):  # when the penalty is made
        regularize_task(plain, penalty=PENALTY, regularizers=jacobian, pixel_std=2.0)
    assert type(plain) is ClassificationTask
    assert set(vars(plain)) == before
    expected = task()(*batch())["penalty"]
    assert torch.equal(regularize_task(plain, penalty=PENALTY)(*batch())["penalty"], expected)
    with pytest.raises(ValueError, match="regularized before"):
        regularize_task(plain, penalty=PENALTY)


def test_no_settings_are_the_penaltys_defaults():
    expected = SpectralPenalty(network())()
    torch.testing.assert_close(task(penalty={})(*batch())["penalty"], expected.detach())


def test_the_head_and_the_input_size_are_the_penaltys_and_the_regularizers():
    model = network()
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # which names no head
    config = RegularizersConfig(bss=BSSConfig(strength=0.1))
    ours = task(model, penalty={}, regularizers=config, head="head", input_size=(1, 8, 8))
    result = ours(*batch())
    assert result["penalty"] > 0
    assert result["bss"] > 0
    assert ours.penalty.space.input_size == (1, 8, 8)


def test_several_labels_an_image_train_too_but_for_terms_of_the_cross_entropy():
    plain = MultiLabelClassificationTask(network(), verbose=False)
    binary = ClassificationTask(network(), BinaryCrossEntropy(), verbose=False)
    config = RegularizersConfig(input_gradient=InputGradientConfig(strength=0.1))
    for refused in (plain, binary):
        with pytest.raises(ValueError, match="input_gradient is of the cross-entropy"):
            regularize_task(refused, regularizers=config)
    ours = regularize_task(plain, penalty=PENALTY)
    assert ours(batch()[0], torch.rand(8, 3))["penalty"] > 0


def test_patches_of_naflex_train_but_for_terms_of_images():
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    model = timm.create_model("naflexvit_base_patch16_gap", num_classes=3, **sizes)
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    patches = {
        "patches": torch.randn(2, 6, 48),
        "patch_coord": torch.stack([rows, columns], -1).view(6, 2).expand(2, 6, 2),
        "patch_valid": torch.ones(2, 6, dtype=torch.bool),
    }
    labels, size = torch.tensor([0, 1]), (3, 16, 16)
    weights = RegularizersConfig(l2_sp=L2SPConfig(strength=1.0))
    result = task(model, penalty={}, regularizers=weights, input_size=size)(patches, labels)
    assert result["penalty"] > 0
    assert result["l2_sp"] > 0
    data = RegularizersConfig(sensitivity=SensitivityConfig(strength=0.1))
    with pytest.raises(ValueError, match="sensitivity is of images"):
        task(model, regularizers=data, input_size=size)(patches, labels)


def test_what_the_head_is_fed_is_seen_in_compiled_code():
    config, (images, labels) = RegularizersConfig(bss=BSSConfig(strength=0.1)), batch()
    plain, ours = (task(regularizers=config) for _ in range(2))
    ours.compile(backend="aot_eager")
    for shift in range(2):
        results = [t(images + shift, labels) for t in (plain, ours)]
        for result in results:
            result["loss"].backward()
        torch.testing.assert_close(results[1]["bss"], results[0]["bss"])
        expected, found = (gradients(t._network[0]) for t in (plain, ours))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--kd", "feature"],
        ["--kd", "logit", "--amp-dtype", "float16"],
        ["--opt", "muon", "--amp-dtype", "bfloat16", "--clip-grad", "1"],
        ["--torchcompile", "eager"],
    ],
)
def test_what_timms_train_script_does_is_resumed_exactly(tmp_path, options):
    options = ["--strength", "0.05", "--grad-accum-steps", "2", *options]
    whole = train(tmp_path / "whole", *options)
    assert whole.penalty.step == 2 * 3
    train(tmp_path / "first", *options, "--epochs", "2")
    again = train(
        tmp_path / "again", *options, "--resume", str(tmp_path / "whole/checkpoint-0.pth.tar")
    )
    assert again.penalty.step == 2 * 3
    expected, found = last(tmp_path / "whole"), last(tmp_path / "again")
    for key in ("state_dict", "state_dict_ema"):
        for name, value in expected[key].items():
            assert torch.equal(found[key][name], value), name
    plain = train(tmp_path / "plain", *options[2:])
    assert not hasattr(plain, "penalty")
    sums = [SpectralPenalty(t.get_eval_model())() for t in (whole, plain)]
    assert sums[0] < sums[1]


def test_two_processes_of_timms_train_script_train_to_the_weights_of_one(tmp_path):
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        arguments = ["images", "--output", str(folder), "--strength", "0.05"]
        run(
            "tests.training.as_timm_trains",
            *arguments,
            "--grad-accum-steps",
            "2",
            processes=processes,
        )
    one, two = (last(tmp_path / str(n)) for n in (1, 2))
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=1e-5)
    assert one["task_state"]["specreg"]["step"] == two["task_state"]["specreg"]["step"] == 6
