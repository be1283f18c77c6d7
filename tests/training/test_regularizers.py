"""The regularizers by their names in the run configuration, in the loop that hands them images."""

import json
import time
from dataclasses import replace

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import nn

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.spectral import baselines
from hf_specreg.training.build import build_model
from hf_specreg.training.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ProbeConfig,
    ReportConfig,
    RunConfig,
    SelfSupervisedConfig,
    TransferConfig,
)
from hf_specreg.training.regularizers import (
    BSSConfig,
    CrossLipschitzConfig,
    DerivativeConfig,
    JacobianConfig,
    L2SPConfig,
    MetricEigenvalueConfig,
    OrthogonalityConfig,
    PenaltyConfig,
    RegularizersConfig,
    build_regularizers,
    normalize_spectra,
)
from recipes.supervised import train


def model(name="mlp_2000", **args):
    torch.manual_seed(0)
    args = args or {"img_size": 8, "hidden_features": 12}
    return SpecRegModel.from_timm(name, num_classes=3, input_size=(1, 8, 8), **args)


def images(count=5):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def built(encoder, **settings):
    config = RegularizersConfig(**settings)
    return build_regularizers(encoder, config, steps_per_epoch=10, epochs=4)


CASES = {
    "jacobian": (
        JacobianConfig(2.0, projections=None),
        lambda m: baselines.jacobian_norm(m, images(), projections=None),
    ),
    "cross_lipschitz": (
        CrossLipschitzConfig(2.0),
        lambda m: baselines.cross_lipschitz(m, images()),
    ),
    "volume_element": (
        DerivativeConfig(2.0, images=3),
        lambda m: baselines.volume_element(m.features, images()[:3]),
    ),
    "metric_eigenvalue": (
        MetricEigenvalueConfig(2.0, iterations=200),
        lambda m: baselines.top_metric_eigenvalue(m.features, images(), iterations=200),
    ),
    "bss": (
        BSSConfig(2.0, k=2),
        lambda m: baselines.batch_spectral_shrinkage(m.features(images()), k=2),
    ),
    "orthogonality": (
        OrthogonalityConfig(2.0, iterations=300),
        lambda m: baselines.orthogonality([m.network.hidden.weight], iterations=300),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_name_gives_its_function_times_its_strength_with_a_gradient(name):
    settings, function = CASES[name]
    encoder = model()
    (regularizer,) = built(encoder, **{name: settings})
    value = regularizer(images(), [encoder.features(images())])
    torch.testing.assert_close(value, 2 * function(encoder), rtol=1e-3, atol=1e-5)
    value.backward()
    assert encoder.network.hidden.weight.grad.norm() > 0


def test_l2_sp_is_alpha_half_the_distance_and_a_part_of_it_for_the_head():
    encoder = model()
    (regularizer,) = built(encoder, l2_sp=L2SPConfig(0.5, head=0.1))
    head = encoder.network.head
    norm = sum(p.square().sum() for p in head.parameters())
    torch.testing.assert_close(regularizer(images(), []), 0.5 * 0.1 / 2 * norm)
    with torch.no_grad():
        encoder.network.hidden.weight.add_(0.1)
    moved = 0.01 * encoder.network.hidden.weight.numel()
    torch.testing.assert_close(regularizer(images(), []), 0.25 * (moved + 0.1 * norm))


def test_bss_is_the_mean_over_the_views():
    (regularizer,) = built(model(), bss=BSSConfig(1.0))
    a, b = torch.randn(2, 6, 4)
    expected = sum(baselines.batch_spectral_shrinkage(f) for f in (a, b)) / 2
    torch.testing.assert_close(regularizer(images(), [a, b]), expected)


def test_images_are_by_themselves_where_there_is_batch_norm_and_the_modes_are_put_back():
    encoder = model("resnet20_cifar", channels=[4, 8], layers=[1, 1]).train()
    encoder.network.bn1.eval()
    (regularizer,) = built(encoder, jacobian=JacobianConfig(1.0, projections=None))
    statistics = {n: b.clone() for n, b in encoder.named_buffers()}
    whole = regularizer(images(4), [])
    parts = [regularizer(part, []) for part in images(4).split(1)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    assert encoder.training
    assert encoder.network.stages.training
    assert not encoder.network.bn1.training
    assert all(torch.equal(statistics[n], b) for n, b in encoder.named_buffers())


def test_attention_can_be_derived_twice():
    encoder = model("vit_tiny_patch16_224", img_size=8, patch_size=4, depth=1)
    (regularizer,) = built(encoder, jacobian=JacobianConfig(1.0))
    regularizer(images(), []).backward()
    assert encoder.network.blocks[0].attn.qkv.weight.grad.norm() > 0


def test_each_has_its_own_burn_in_and_cadence():
    first, second = built(
        model(),
        jacobian=JacobianConfig(1.0, every=3, burn_in_epochs=0.2),
        l2_sp=L2SPConfig(1.0, burn_in_fraction=0.5),
    )
    assert [step for step in range(12) if first.due(step)] == [2, 5, 8, 11]
    assert [step for step in range(22) if second.due(step)] == [20, 21]


def test_off_is_the_default_and_logits_need_a_head():
    assert built(model()) == []
    headless = SpecRegModel.from_timm("mlp_2000", num_classes=0, input_size=(1, 28, 28))
    with pytest.raises(ValueError, match=r"jacobian.of to features"):
        built(headless, jacobian=JacobianConfig(1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1}, r"strength \(-1\)"),
        ({"every": 0}, r"every \(0\)"),
        ({"burn_in_steps": 1, "burn_in_fraction": 0.5}, "not several"),
        ({"burn_in_fraction": 1.5}, r"\[0, 1\]"),
    ],
)
def test_values_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        JacobianConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (JacobianConfig, "projections", 0),
        (JacobianConfig, "images", 0),
        (L2SPConfig, "head", -1.0),
        (BSSConfig, "k", 0),
        (PenaltyConfig, "lanczos_steps", 1),
        (OptimizerConfig, "encoder_lr", -1.0),
        (OptimizerConfig, "layer_decay", 3.0),
        (SelfSupervisedConfig, "temperature", 0.0),
        (SelfSupervisedConfig, "teacher_momentum", 2.0),
        (SelfSupervisedConfig, "bank", 0),
        (ProbeConfig, "l2", 0.0),
        (ProbeConfig, "images", 0),
        (TransferConfig, "frozen_stages", -1),
        (TransferConfig, "lora_rank", 0),
        (ReportConfig, "samples", -1),
    ],
)
def test_every_setting_has_a_range(kind, name, value):
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be"):
        kind(**{name: value})


def run(folder, accumulation=1, **kwargs):
    settings = {
        "output_dir": str(folder),
        "epochs": 1,
        "batch_size": 64,
        "accumulation": accumulation,
        "log_every": 1,
        "data": DataConfig(train_samples=256),
        "augment": AugmentConfig(),
        "model": ModelConfig(
            name="mlp_2000", input_size=(1, 8, 8), args={"img_size": 8, "hidden_features": 12}
        ),
        "penalty": PenaltyConfig(strength=0.1),
        "optimizer": OptimizerConfig(lr=0.05, sched="none"),
        "checkpoint": CheckpointConfig(keep=1),
    }
    return RunConfig(**{**settings, **kwargs})


SUM = RegularizersConfig(
    jacobian=JacobianConfig(0.1, projections=None),
    volume_element=DerivativeConfig(0.01),
    cross_lipschitz=CrossLipschitzConfig(0.1),
    l2_sp=L2SPConfig(0.1),
)


def test_a_run_sums_them_logs_each_and_accumulation_does_not_change_the_weights(tmp_path):
    results = []
    for accumulation in (1, 4):
        folder = tmp_path / str(accumulation)
        results.append(train(run(folder, accumulation, regularizers=SUM)))
    lines = [json.loads(x) for x in (tmp_path / "1/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    for name in ("jacobian", "cross_lipschitz", "l2_sp", "penalty"):
        assert logged[-1][name] > 0, name
    one, four = (load_file(r.model_folder / "model.safetensors") for r in results)
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=1e-5)
    without = load_file(train(run(tmp_path / "without")).model_folder / "model.safetensors")
    assert (without["hidden.weight"] - one["hidden.weight"]).norm() > 1e-3


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
                values.append(baselines.jacobian_norm(trained, images(), projections=None))
            else:
                values.append((trained.network.hidden.weight - start).norm())
        assert values[1] < 0.7 * values[0], name


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

    monkeypatch.setattr(baselines, "orthogonality", lambda w, iterations: Slow.apply(w[0]))
    regularizers = RegularizersConfig(orthogonality=OrthogonalityConfig(1.0))
    train(run(tmp_path, regularizers=regularizers))
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shares = [line["penalty_share"] for line in lines if "penalty_share" in line]
    assert max(shares) < 0.5


def test_spectral_normalisation_is_trained_with_and_saved_as_plain_weights(tmp_path):
    regularizers = RegularizersConfig(spectral_norm=True)
    penalty = PenaltyConfig(strength=0.0)
    folder = train(run(tmp_path / "run", regularizers=regularizers, penalty=penalty)).model_folder
    assert set(load_file(folder / "model.safetensors")) == set(model().network.state_dict())
    trained = SpecRegModel.from_pretrained(folder)
    assert SpectralPenalty(trained).sigmas()["hidden"] == pytest.approx(1, abs=0.05)
    again = SpecRegModel.from_pretrained(tmp_path / "run/best")
    assert isinstance(again.network.hidden, nn.Linear)


def test_a_parametrized_model_is_saved_as_it_acts(tmp_path):
    encoder = model("resnet20_cifar", channels=[4, 8], layers=[1, 1])
    normalize_spectra(encoder)
    encoder.train()
    encoder(images())
    encoder.eval()
    encoder.save_pretrained(tmp_path)
    assert encoder.network.conv1.parametrizations
    again = SpecRegModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images()), encoder(images()))
