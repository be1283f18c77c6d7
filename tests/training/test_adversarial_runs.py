"""Runs with adversarial training: resumed, on two processes, overfitted to one step, in error."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from hf_specreg.data.datasets import DataConfig
from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.recipes import self_supervised, supervised
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.spectral.regularizers.bss import BSSConfig
from hf_specreg.training import overfitting
from hf_specreg.training.adversarial import AdversarialConfig
from hf_specreg.training.checkpoints import CheckpointConfig
from hf_specreg.training.config import RunConfig, SelfSupervisedRunConfig
from hf_specreg.training.model import ModelConfig
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.report import ReportConfig
from hf_specreg.training.self_supervision import SelfSupervised, SelfSupervisedConfig
from tests.forks import forks
from tests.interrupted import Interrupted, interrupted_at
from tests.tiny import ARGS, SIZE, images
from tests.training.test_adversarial import LABELS, METHODS, objective

SETTINGS = {
    "epochs": 2,
    "batch_size": 64,
    "accumulation": 2,
    "data": DataConfig(train_samples=192),
    "checkpoint": CheckpointConfig(every_steps=1, keep=9),
}


def supervised_run(folder):
    return RunConfig(
        output_dir=str(folder),
        augment=AugmentConfig(kind="crop_flip", label_smoothing=0.1),
        model=ModelConfig("resnet20_cifar", input_size=SIZE, args=ARGS["resnet20_cifar"]),
        regularizers=RegularizersConfig(bss=BSSConfig(0.01)),
        adversarial=AdversarialConfig("fgsm", eps=0.3),
        **SETTINGS,
    )


def self_supervised_run(folder):
    return SelfSupervisedRunConfig(
        output_dir=str(folder),
        model=ModelConfig("mlp_2000", input_size=SIZE, args=ARGS["mlp_2000"]),
        ssl=SelfSupervisedConfig("simclr", projector_hidden=16, projector_out=8),
        report=ReportConfig(samples=0),
        adversarial=AdversarialConfig("pgd", steps=2),
        **SETTINGS,
    )


@pytest.mark.parametrize(
    ("recipe", "kind", "run"),
    [
        (supervised, Supervised, supervised_run),
        (self_supervised, SelfSupervised, self_supervised_run),
    ],
)
def test_a_resumed_run_gives_the_weights_of_the_uninterrupted_one(
    tmp_path, monkeypatch, recipe, kind, run
):
    """With accumulation, and a regularizer of the features of the pass that is trained."""
    whole = recipe.train(run(tmp_path / "whole"))
    with monkeypatch.context() as cut_off:
        cut_off.setattr(recipe, kind.__name__, interrupted_at(9, kind))
        with pytest.raises(Interrupted):
            recipe.train(run(tmp_path / "broken"))
    resumed = recipe.train(run(tmp_path / "broken"), resume=True)
    expected, found = [load_file(r.model_folder / "model.safetensors") for r in (whole, resumed)]
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if recipe is supervised:
        lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
        measured = [m for m in map(json.loads, lines) if "validation_pgd_accuracy" in m]
        assert len(measured) == 3  # after each epoch, and at the end
        assert all(0 <= m["validation_fgsm_accuracy"] <= 1 for m in measured)
        config = json.loads((whole.model_folder / "specreg.json").read_text())["config"]
        assert config["adversarial"]["method"] == "fgsm"


def train_parts(parts, model, optimizer, steps=3):
    """Steps on 8 images, of which this process has some parts, or all in turn."""
    trained = getattr(model, "module", model)
    for step in range(steps):
        optimizer.zero_grad()
        before = [b.clone() for b in trained.buffers()]
        for part in sorted(parts, reverse=True):  # the first one's statistics stay
            torch.manual_seed(10 * step + part)
            for buffer, value in zip(trained.buffers(), before, strict=True):
                buffer.data.copy_(value)
            loss = model(images(8)[4 * part :][:4], LABELS[4 * part :][:4])
            (loss / len(parts)).backward()
        optimizer.step()


def parallel(folder, rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for method in METHODS:
        trained = objective(method=method, steps=None)
        model = DistributedDataParallel(trained)
        train_parts([rank], model, torch.optim.SGD(trained.parameters(), lr=0.1))
        save_file(dict(trained.named_parameters()), folder / f"{method}-{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_train_to_the_weights_of_one_that_has_both_parts(tmp_path):
    """Under DistributedDataParallel, with batch norms, each part with its own starts."""
    ranks = [forks().Process(target=parallel, args=(tmp_path, rank)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=100)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    for method in METHODS:
        trained = objective(method=method, steps=None)
        train_parts([0, 1], trained, torch.optim.SGD(trained.parameters(), lr=0.1))
        first, second = [load_file(tmp_path / f"{method}-{rank}.safetensors") for rank in (0, 1)]
        for name, expected in trained.named_parameters():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], expected.data, rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """Right at the image and at the edge of the eps ball, wrong between: one step across the ball
    does not see it.
    """

    def __init__(self, eps):
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(eps))

    def forward(self, pixels):
        moved = (pixels.flatten(1) - 128 / 255).abs() / self.eps
        margin = (moved - 0.6).abs() - 0.3
        return torch.cat([margin, -margin], dim=1)


def check(model, count=400):
    """The check on images of one pixel, which are all of class 0."""
    data = TensorDataset(
        torch.full((count, 1, 1, 1), 128, dtype=torch.uint8),
        torch.zeros(count, dtype=torch.long),
    )
    config = AdversarialConfig("fgsm", "linf", eps=0.1, step_size=0.2)
    checked = overfitting.OverfittingCheck(lambda *_: {"accuracy": 1.0}, config)
    accelerator = Accelerator(cpu=True)
    with torch.no_grad():
        return [checked(model.eval(), DataLoader(data), accelerator) for _ in range(2)]


def test_catastrophic_overfitting_is_said_once_with_a_remedy(caplog):
    for scores in check(Masked(0.1)):
        assert scores["accuracy"] == 1
        assert scores["fgsm_accuracy"] > 0.99
        assert scores["pgd_accuracy"] < 0.01
    (said,) = caplog.messages
    assert "accuracy is 100.0 % under the FGSM step" in said
    assert (
        "0.0 % under 10 PGD steps of the same eps. Train anew with adversarial.method pgd" in said
    )


@pytest.mark.parametrize(("bias", "accuracy"), [(0.2, 1.0), (0.0, 0.0)])
def test_a_model_without_it_is_not_warned_of(caplog, bias, accuracy):
    """A linear one, which is attacked by a step as by many, whether it stands or falls."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.copy_(torch.tensor([bias - 128 / 255, 128 / 255]))
    for scores in check(model):
        assert scores["fgsm_accuracy"] == scores["pgd_accuracy"] == accuracy
    assert not caplog.messages


def test_the_images_of_the_check_are_spread_over_the_set():
    some = overfitting._some(TensorDataset(torch.arange(1000)))
    assert [int(x) for (x,) in some] == list(range(0, 1000, 4))


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        (supervised, ["--adversarial.eps", "0"], r"adversarial.eps \(0.*\) must be positive"),
        (
            supervised,
            ["--adversarial.norm", "linf", "--adversarial.eps", "8"],
            r"adversarial.eps \(8.*\) must be in \[0, 1\]",
        ),
        (supervised, ["--adversarial.method", "fgsn"], "must be one of .none., .fgsm."),
        (
            supervised,
            ["--adversarial.method", "fgsm", "--adversarial.steps", "7"],
            r"steps \(7\) of fgsm are 1: for more set method to pgd",
        ),
        (
            supervised,
            ["--adversarial.method", "trades", "--adversarial.images", "8"],
            r"images \(8\) are of fgsm and pgd: trades moves all",
        ),
        (supervised, ["--adversarial.images", "0"], r"images \(0\) must be at least 1"),
        (
            self_supervised,
            ["--adversarial.method", "pgd", "--adversarial.images", "8"],
            r"adversarial.images \(8\) is of classifiers",
        ),
        (
            self_supervised,
            ["--adversarial.method", "trades"],
            "adversarial.method 'trades' compares logits.*set it to fgsm or pgd",
        ),
    ],
)
def test_settings_that_do_not_fit_are_said_in_one_line(capsys, recipe, arguments, message):
    with pytest.raises(SystemExit):
        recipe.parse(arguments)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
