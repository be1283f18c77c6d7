"""A training step on an accelerator, with every objective: one device, and no wait for it."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch.utils.data import TensorDataset

from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.training.adversarial import AdversarialConfig
from hf_specreg.training.config import RunConfig
from hf_specreg.training.interruption import StopSignal
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import progress_bar
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.optimizer import OptimizerConfig
from hf_specreg.training.self_supervision import SelfSupervised, SelfSupervisedConfig
from tests.fake_device import DEVICE, HostRead, fake_device, place, warm
from tests.tiny import SIZE, tiny

EVERY_TERM = (
    *("jacobian", "metric_eigenvalue", "cross_lipschitz", "volume_element", "input_gradient"),
    *("sensitivity", "l2_sp", "bss", "orthogonality"),
)
LIGHTLYS = "lightly picks pairs by an index of booleans, whose length is a number on the host"


def train_a_step(objective, folder, *, views=False, log=False, **settings):
    """Take the loop's own step on fake images, between two lines of the log or with one."""
    data = TensorDataset(torch.zeros(8, *SIZE, dtype=torch.uint8), torch.zeros(8).long())
    config = RunConfig(
        output_dir=str(folder),
        batch_size=8,
        log_every=1 if log else 100,
        optimizer=OptimizerConfig(lr=0.1, clip_grad=1.0),
        **settings,
    )
    with (
        fake_device(),
        mock.patch.object(Accelerator, "device", torch.device(DEVICE)),
        mock.patch.object(type(objective), "to", lambda module, _: module),
        mock.patch("hf_specreg.training.loop.weights_sha256"),  # once, before the first step
        mock.patch("hf_specreg.encoders.pixels.PixelModel.check"),  # of the first batch alone
    ):
        place(objective)
        accelerator = Accelerator(device_placement=False)
        loop = TrainingLoop(objective, data, data, data, config, accelerator=accelerator)
        warm(loop.penalty)
        loop.objective.train()
        loop.told_to_stop, loop.progress = StopSignal(), progress_bar(Console(quiet=True))
        loop.task = loop.progress.add_task("training")
        shape = (8, 2, *SIZE) if views else (8, *SIZE)
        images = torch.empty(shape, dtype=torch.uint8, device=DEVICE)
        with loop.accelerator.accumulate(loop.objective):
            loop._train_batch(0, 0, images, torch.empty(8, dtype=torch.long, device=DEVICE))
        loop._end_step(0, 0)
    return loop


def adversarial(method, **settings):
    return AdversarialConfig(method=method, steps=None if method == "fgsm" else 2, **settings)


def test_a_step_with_every_regularizer_waits_for_nothing(tmp_path):
    kinds = RegularizersConfig.__dataclass_fields__
    terms = {name: kinds[name].default_factory(strength=0.1) for name in EVERY_TERM}
    terms["sensitivity"] = replace(terms["sensitivity"], images=8)
    augment = AugmentConfig(mixup=0.2, label_smoothing=0.1, noise=0.1)
    loop = train_a_step(
        Supervised(tiny(), augment=augment),
        tmp_path,
        augment=augment,
        regularizers=RegularizersConfig(**terms),
    )
    assert loop.state.step == 1
    assert loop.regularizers.settings.keys() == set(EVERY_TERM)


def test_a_line_of_the_log_is_where_a_step_waits(tmp_path):
    with pytest.raises((HostRead, RuntimeError)) as error:
        train_a_step(Supervised(tiny(), augment=AugmentConfig()), tmp_path, log=True)
    assert error.traceback.filter(lambda entry: entry.name == "_log_training")


@pytest.mark.parametrize(
    "adversary",
    [
        adversarial("fgsm"),
        adversarial("pgd", norm="linf", eps=0.1),
        adversarial("trades"),
    ],
    ids=lambda config: config.method,
)
def test_crafting_adversarial_images_waits_for_nothing(adversary, tmp_path):
    objective = Supervised(tiny(), augment=AugmentConfig(), adversarial=adversary)
    assert train_a_step(objective, tmp_path, adversarial=adversary).state.step == 1


@pytest.mark.parametrize("method", ["barlow-twins", "byol"])
def test_a_self_supervised_step_waits_for_nothing(method, tmp_path):
    objective = SelfSupervised(tiny(num_classes=0), SelfSupervisedConfig(method=method))
    assert train_a_step(objective, tmp_path, views=True).state.step == 1


@pytest.mark.parametrize("method", ["simclr", "vicreg"])
def test_where_lightlys_own_loss_waits(method, tmp_path):
    objective = SelfSupervised(tiny(num_classes=0), SelfSupervisedConfig(method=method))
    with pytest.raises(RuntimeError, match="nonzero") as error:
        train_a_step(objective, tmp_path, views=True)
    assert any("lightly" in str(entry.path) for entry in error.traceback), LIGHTLYS
