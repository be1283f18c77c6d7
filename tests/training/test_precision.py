"""Half precision, memory formats, compilation, clipping, averaging: against the plain run."""

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import hf_specreg.encoders.small  # noqa: F401  registers resnet20_cifar
from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.data.datasets import DataConfig, build_splits
from hf_specreg.spectral.regularizers.rep_spectral import PenaltyConfig
from hf_specreg.training.checkpoints import CheckpointConfig
from hf_specreg.training.config import RunConfig
from hf_specreg.training.images import build_images
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.model import ModelConfig, build_model
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.optimizer import OptimizerConfig

SIZE, STEPS = (3, 8, 8), 12


def network():
    torch.manual_seed(0)
    return timm.create_model("resnet20_cifar", num_classes=5, channels=[8, 16], layers=[1, 1])


def train(model, *, autocast=None, scaler=None, memory_format=torch.contiguous_format):
    """Penalty at every step; the penalties and the sigmas at the end."""
    model = model.to(memory_format=memory_format)
    penalty = SpectralPenalty(model, strength=0.02, input_size=SIZE, renew_every=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    draws = torch.Generator().manual_seed(1)
    values = []
    for _ in range(STEPS):
        images = torch.rand(16, *SIZE, generator=draws).to(memory_format=memory_format)
        labels = torch.randint(5, (16,), generator=draws)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(images), labels)
            values.append(penalty())  # within: it takes itself out
        loss = loss + values[-1]
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return torch.stack(values).detach(), penalty.sigmas()


@pytest.fixture(scope="module")
def plain():
    return train(network())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_plain_run(plain, dtype):
    """The forward pass is rounded, the penalty is not: values differ as far as weights have moved
    apart, which is 1 % after these steps at most."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if dtype == torch.float16 else None
    values, sigmas = train(network(), autocast=dtype, scaler=scaler)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[0], plain[0][0])
    torch.testing.assert_close(values, plain[0], rtol=0.01, atol=0)
    assert sigmas == pytest.approx(plain[1], rel=0.02)


def test_channels_last_gives_the_plain_run_and_gradients_with_the_weights_strides(plain):
    model = network()
    values, sigmas = train(model, memory_format=torch.channels_last)
    torch.testing.assert_close(values, plain[0], rtol=1e-4, atol=0)
    assert sigmas == pytest.approx(plain[1], rel=1e-3)
    model.zero_grad()
    SpectralPenalty(model, input_size=SIZE)().backward()
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[-1] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert all(p.grad.stride() == p.stride() for p in kernels)


def test_a_compiled_model_gives_the_plain_run(plain):
    values, sigmas = train(torch.compile(network(), backend="aot_eager"))
    torch.testing.assert_close(values, plain[0], rtol=1e-4, atol=0)
    renamed = {name.removeprefix("_orig_mod."): s for name, s in sigmas.items()}
    assert renamed == pytest.approx(plain[1], rel=1e-3)


@pytest.mark.slow
def test_a_step_compiled_by_inductor_gives_the_plain_gradient_and_never_recompiles():
    model = network()
    reference = copy.deepcopy(model)
    images, labels = torch.rand(16, *SIZE), torch.randint(5, (16,))
    penalty, other = [SpectralPenalty(m, input_size=SIZE) for m in (model, reference)]

    @torch.compile
    def step(images, labels):
        return F.cross_entropy(model(images), labels) + penalty()

    for use in range(10):
        with torch._dynamo.config.patch(error_on_recompile=use > 1):
            model.zero_grad()
            step(images, labels).backward()
        reference.zero_grad()
        (F.cross_entropy(reference(images), labels) + other()).backward()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5)


def run(folder, **options):
    """A short run of the loop; its metrics by step, and its folder."""
    settings = RunConfig(
        output_dir=str(folder),
        epochs=1,
        batch_size=64,
        log_every=1,
        data=DataConfig(train_samples=320),
        model=ModelConfig(
            name="resnet20_cifar",
            input_size=(1, 8, 8),
            args={"channels": [8, 16], "layers": [1, 1]},
        ),
        penalty=PenaltyConfig(strength=0.05),
        optimizer=OptimizerConfig(**{"lr": 0.05, **options}),
        checkpoint=CheckpointConfig(every_steps=1, keep=10),
    )
    torch.manual_seed(0)
    splits = build_splits(settings.data)
    model = build_model(settings.model, splits.label_names)
    images = build_images(splits, model, settings)
    TrainingLoop(Supervised(model, augment=settings.augment), **images, config=settings).run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def step_1(folder):
    """The weights after the first step."""
    return load_file(folder / "checkpoints/step_00000001/state/model.safetensors")


def test_clipping_says_by_what_the_gradient_and_the_penaltys_in_it_are_multiplied(tmp_path):
    options = {"opt": "momentum", "weight_decay": 0.0}
    wide, narrow = [run(tmp_path / str(c), clip_grad=c, **options)[0] for c in (1e6, 0.5)]
    run(tmp_path / "still", lr=0.0, **options)
    start = step_1(tmp_path / "still")
    assert wide["clipped_to"] == 1
    assert narrow["gradient_norm"] == pytest.approx(wide["gradient_norm"], rel=1e-5)
    assert narrow["clipped_to"] == pytest.approx(0.5 / narrow["gradient_norm"], rel=1e-5)
    assert narrow["clipped_to"] < 1
    moved = {
        c: {k: v - start[k] for k, v in step_1(tmp_path / str(c)).items() if "running" not in k}
        for c in (1e6, 0.5)
    }
    for name, by in moved[1e6].items():
        if by.is_floating_point():
            torch.testing.assert_close(
                moved[0.5][name], narrow["clipped_to"] * by, rtol=1e-3, atol=1e-6
            )


def test_the_sum_of_sigma_squared_is_of_the_averaged_weights_which_are_saved(tmp_path):
    run(tmp_path, ema_decay=0.99, lr=0.2)
    model = SpecRegModel.from_pretrained(tmp_path / "model")
    sigmas = SpectralPenalty(model).sigmas()
    expected = sum(sigma**2 for sigma in sigmas.values())
    assert model.metadata["metrics"]["sum_sigma2"] == pytest.approx(expected, rel=1e-3)


def test_averaged_weights_are_the_average_of_those_that_train_as_without_it(tmp_path):
    run(tmp_path / "plain")
    run(tmp_path / "averaged", ema_decay=0.8)

    def weights(name, step):
        state = tmp_path / name / f"checkpoints/step_{step:08d}/state/model.safetensors"
        return {k.removeprefix("encoder."): v for k, v in load_file(state).items()}

    average = None
    for step in range(1, 6):
        plain, beside = weights("plain", step), weights("averaged", step)
        assert all(torch.equal(plain[name], beside[name]) for name in plain)
        floats = {k: v for k, v in plain.items() if v.is_floating_point()}
        if average is None:  # as it starts: from the weights before the first step
            start = load_file(tmp_path / f"averaged/checkpoints/step_{step:08d}/ema.safetensors")
            average = {k: start[k] for k in floats}
        else:
            average = {k: v + 0.2 * (floats[k] - v) for k, v in average.items()}
    found = load_file(tmp_path / "averaged/checkpoints/step_00000005/ema.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
