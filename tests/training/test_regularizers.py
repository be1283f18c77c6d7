"""The regularizers in the loop, which hands them images."""

import json
import time
from dataclasses import replace

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import nn

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.data.datasets import DataConfig, build_splits
from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.recipes.supervised import train
from hf_specreg.spectral.regularizers import RegularizersConfig, build_regularizers, orthogonality
from hf_specreg.spectral.regularizers.bss import BSSConfig
from hf_specreg.spectral.regularizers.cross_lipschitz import CrossLipschitzConfig
from hf_specreg.spectral.regularizers.input_gradient import InputGradientConfig
from hf_specreg.spectral.regularizers.jacobian import JacobianConfig, jacobian_norm
from hf_specreg.spectral.regularizers.l2_sp import L2SPConfig
from hf_specreg.spectral.regularizers.orthogonality import OrthogonalityConfig
from hf_specreg.spectral.regularizers.rep_spectral import PenaltyConfig, build_penalty
from hf_specreg.spectral.regularizers.spectral_norm import normalize_spectra
from hf_specreg.spectral.regularizers.volume_element import VolumeElementConfig
from hf_specreg.training.checkpoints import CheckpointConfig
from hf_specreg.training.config import RunConfig
from hf_specreg.training.images import build_images
from hf_specreg.training.model import ModelConfig, build_model
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.optimizer import OptimizerConfig
from tests.tiny import ARGS, SIZE, images, tiny


def run(folder, accumulation=1, **kwargs):
    settings = {
        "output_dir": str(folder),
        "epochs": 1,
        "batch_size": 64,
        "accumulation": accumulation,
        "log_every": 1,
        "data": DataConfig(train_samples=256),
        "augment": AugmentConfig(),
        "model": ModelConfig("mlp_2000", input_size=SIZE, args=ARGS["mlp_2000"]),
        "penalty": PenaltyConfig(strength=0.1),
        "optimizer": OptimizerConfig(lr=0.05, sched="none"),
        "checkpoint": CheckpointConfig(keep=1),
    }
    return RunConfig(**{**settings, **kwargs})


SUM = RegularizersConfig(
    jacobian=JacobianConfig(0.1, projections=None),
    volume_element=VolumeElementConfig(0.01),
    cross_lipschitz=CrossLipschitzConfig(0.1),
    input_gradient=InputGradientConfig(0.1),
    l2_sp=L2SPConfig(0.1),
)


def test_a_run_sums_them_logs_each_and_accumulation_does_not_change_the_weights(tmp_path):
    results = []
    for accumulation in (1, 4):
        folder = tmp_path / str(accumulation)
        results.append(train(run(folder, accumulation, regularizers=SUM)))
    lines = [json.loads(x) for x in (tmp_path / "1/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    for name in ("jacobian", "cross_lipschitz", "input_gradient", "l2_sp", "penalty"):
        assert logged[-1][name] > 0, name
    one, four = (load_file(r.model_folder / "model.safetensors") for r in results)
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=1e-5)
    without = load_file(train(run(tmp_path / "without")).model_folder / "model.safetensors")
    assert (without["hidden.weight"] - one["hidden.weight"]).norm() > 1e-3


def test_an_objective_that_gives_no_loss_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Supervised, "forward", lambda self, images, labels: self.encoder(images))
    with pytest.raises(ValueError, match=r"Supervised gave torch.float32 of shape \(64, 10\)"):
        train(run(tmp_path))


def started_from(config):
    """The hidden weights that a run begins with."""
    set_seed(config.seed)
    return build_model(config.model, [str(n) for n in range(10)]).network.hidden.weight.detach()


def test_a_strong_regularizer_gets_smaller_in_a_run(tmp_path):
    for name, settings in (("l2_sp", L2SPConfig(5.0)), ("jacobian", JacobianConfig(3e3))):
        values, start = [], started_from(run(tmp_path))
        for strength in (0.0, settings.strength):
            config = RegularizersConfig(**{name: replace(settings, strength=strength)})
            folder = tmp_path / f"{name}_{strength}"
            result = train(run(folder, regularizers=config))
            trained = SpecRegModel.from_pretrained(result.model_folder)
            if name == "jacobian":
                values.append(jacobian_norm(trained, images(), projections=None))
            else:
                values.append((trained.network.hidden.weight - start).norm())
        assert values[1] < 0.7 * values[0], name


def test_every_term_has_a_ramp_in_epochs():
    epochs = {"burn_in_epochs": 1, "ramp_epochs": 2}
    steps = {"steps_per_epoch": 5, "epochs": 4}
    penalty = build_penalty(tiny(), PenaltyConfig(**epochs), seed=0, **steps)
    config = RegularizersConfig(l2_sp=L2SPConfig(1.0, **epochs), bss=BSSConfig(1.0, **epochs))
    terms = build_regularizers(tiny(), config, **steps)
    assert [(each.burn_in, each.ramp) for each in (penalty, *terms)] == [(5, 10)] * 3


def test_the_strength_rises_in_a_run_and_the_terms_labels_are_those_of_its_images(
    tmp_path, monkeypatch
):
    """Also under mixup, whose labels are of no one image."""
    seen = []

    def term(self, space):
        def compute(images, labels, features):
            seen.extend(zip((images * 255).round().byte(), labels.tolist(), strict=True))
            return images.new_ones(())

        return compute

    monkeypatch.setattr(InputGradientConfig, "term", term)
    settings = InputGradientConfig(1.0, burn_in_steps=1, ramp_epochs=0.5)
    config = run(
        tmp_path,
        regularizers=RegularizersConfig(input_gradient=settings),
        augment=AugmentConfig(mixup=1.0),
    )
    train(config)
    splits = build_splits(config.data)
    pictures = build_images(splits, tiny(num_classes=10), config)["train_images"]
    pairs = {
        (p.numpy().tobytes(), int(label)) for p, label in map(pictures.__getitem__, range(256))
    }
    assert len(seen) == 2 * 64  # not where the ramp begins
    assert {(p.numpy().tobytes(), label) for p, label in seen} <= pairs
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["input_gradient"] for line in lines if "input_gradient" in line]
    assert found == [0, 0, 0.5, 1]


def test_the_penaltys_share_of_the_time_is_not_that_of_the_others(tmp_path, monkeypatch):
    """The others are slow, also backwards."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square().sum()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(0.3)
            return None

    monkeypatch.setattr(orthogonality, "orthogonality", lambda w, iterations: Slow.apply(w[0]))
    regularizers = RegularizersConfig(orthogonality=OrthogonalityConfig(1.0))
    train(run(tmp_path, regularizers=regularizers))
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shares = [line["penalty_share"] for line in lines if "penalty_share" in line]
    assert max(shares) < 0.5


def test_spectral_normalisation_is_trained_with_and_saved_as_plain_weights(tmp_path):
    regularizers = RegularizersConfig(spectral_norm=True)
    penalty = PenaltyConfig(strength=0.0)
    folder = train(run(tmp_path / "run", regularizers=regularizers, penalty=penalty)).model_folder
    assert set(load_file(folder / "model.safetensors")) == set(tiny().network.state_dict())
    trained = SpecRegModel.from_pretrained(folder)
    assert SpectralPenalty(trained).sigmas()["hidden"] == pytest.approx(1, abs=0.05)
    again = SpecRegModel.from_pretrained(tmp_path / "run/best")
    assert isinstance(again.network.hidden, nn.Linear)


def test_a_parametrized_model_is_saved_as_it_acts(tmp_path):
    encoder = tiny("resnet20_cifar")
    normalize_spectra(encoder)
    encoder.train()
    encoder(images())
    encoder.eval()
    encoder.save_pretrained(tmp_path)
    assert encoder.network.conv1.parametrizations
    again = SpecRegModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images()), encoder(images()))
