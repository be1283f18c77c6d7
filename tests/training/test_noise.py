"""Gaussian noise on the training pixels: what the loss and the regularizers get."""

import pytest
import torch
from accelerate import Accelerator

from hf_specreg.data.datasets import DataConfig, build_splits
from hf_specreg.data.transforms import AugmentConfig, add_noise
from hf_specreg.spectral.regularizers import RegularizersConfig, VolumeElementConfig
from hf_specreg.spectral.regularizers.rep_spectral import PenaltyConfig
from hf_specreg.training.config import RunConfig, SelfSupervisedRunConfig
from hf_specreg.training.images import build_images
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.model import ModelConfig
from hf_specreg.training.objectives import Objective
from tests.tiny import ARGS, SIZE, tiny


class Recorded(Objective):
    """Keeps the images that it gets."""

    def __init__(self):
        super().__init__(tiny())
        self.images = []

    def forward(self, images, labels):
        self.images.append(images)
        first = images[:, 0] if images.ndim == 5 else images
        return self.encoder(first).square().mean()


def received(folder, kind, augment, epochs=1):
    """What the objective and a regularizer get in all epochs."""
    seen = []

    class Recording(VolumeElementConfig):
        def penalty(self, function, images):
            seen.append(images)
            return images.new_zeros(())

    run = kind(
        output_dir=str(folder),
        epochs=epochs,
        batch_size=64,
        data=DataConfig(train_samples=256),
        model=ModelConfig("mlp_2000", input_size=SIZE, args=ARGS["mlp_2000"]),
        augment=augment,
        penalty=PenaltyConfig(strength=0.0),
        regularizers=RegularizersConfig(volume_element=Recording(strength=1.0)),
    )
    objective = Recorded()
    images = build_images(build_splits(run.data), objective.encoder, run)
    loop = TrainingLoop(objective, **images, config=run, score=lambda *_: {"accuracy": 0.0})
    loop.run()
    return torch.cat(objective.images), torch.cat(seen)


@pytest.mark.parametrize(
    ("kind", "variation"), [(RunConfig, "crop_flip"), (SelfSupervisedRunConfig, "simclr")]
)
def test_the_loss_and_the_regularizers_get_the_same_noise_on_the_same_images(
    tmp_path, kind, variation
):
    plain, _ = received(tmp_path / "plain", kind, AugmentConfig(variation))
    noisy, seen = received(tmp_path / "noisy", kind, AugmentConfig(variation, noise=0.1))
    noise = noisy - plain
    assert noise.numel() >= 256 * 64
    assert abs(noise.mean()) < 4 * 0.1 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(0.1, rel=0.03)
    assert noisy.min() < 0  # not clipped
    assert noisy.max() > 1
    views = noise.unbind(1) if noise.ndim == 5 else noise.split(128)
    correlation = torch.corrcoef(torch.stack([view.flatten() for view in views]))[0, 1]
    assert abs(correlation) < 0.05
    assert torch.equal(seen, noisy[:, 0] if noisy.ndim == 5 else noisy)


@pytest.mark.parametrize(("variation", "again"), [("none", True), ("crop_flip", False)])
def test_an_epoch_has_the_same_images_in_other_crops(tmp_path, variation, again):
    images, _ = received(tmp_path, RunConfig, AugmentConfig(variation), epochs=2)
    first, second = (torch.unique(epoch, dim=0) for epoch in images.flatten(1).chunk(2))
    assert torch.equal(first, second) == again


def test_processes_draw_noise_of_their_own(tmp_path, monkeypatch):
    noisy = []
    for process in (0, 1):
        monkeypatch.setattr(Accelerator, "process_index", process)
        clean, _ = received(tmp_path / f"clean{process}", RunConfig, AugmentConfig())
        images, _ = received(tmp_path / f"{process}", RunConfig, AugmentConfig(noise=0.1))
        noisy.append(images - clean)
    correlation = torch.corrcoef(torch.stack([noise.flatten() for noise in noisy]))[0, 1]
    assert abs(correlation) < 0.05


def test_none_draws_nothing():
    images, state = torch.rand(2, *SIZE), torch.get_rng_state()
    assert add_noise(images, 0.0) is images
    assert torch.equal(torch.get_rng_state(), state)
