"""The training loop on real digits: it learns, resumes exactly, stops with a reason."""

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from hf_specreg.data.datasets import DataConfig, DataError, build_splits
from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.spectral.regularizers.bss import BSSConfig
from hf_specreg.spectral.regularizers.input_gradient import InputGradientConfig
from hf_specreg.spectral.regularizers.rep_spectral import PenaltyConfig
from hf_specreg.spectral.regularizers.sensitivity import SensitivityConfig
from hf_specreg.training import checkpoints
from hf_specreg.training.adversarial import AdversarialConfig
from hf_specreg.training.checkpoints import (
    CheckpointConfig,
    CheckpointError,
    find_fault,
    latest_checkpoint,
)
from hf_specreg.training.config import RunConfig
from hf_specreg.training.images import build_images, build_loaders, run_metadata
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import DivergedError, StepLog, TrackerConfig
from hf_specreg.training.model import ModelConfig, build_model
from hf_specreg.training.objectives import Supervised
from hf_specreg.training.optimizer import OptimizerConfig
from hf_specreg.training.resume import starting_point
from tests.interrupted import Interrupted, interrupted_at

NARROW = {"channels": [4, 8], "layers": [1, 1]}


def config(tmp_path, **kwargs):
    settings = {
        "output_dir": str(tmp_path / "run"),
        "epochs": 3,
        "batch_size": 128,
        "accumulation": 2,
        "log_every": 3,
        "data": DataConfig(train_samples=600),
        "augment": AugmentConfig(kind="crop_flip", mixup=0.2, label_smoothing=0.1, noise=0.05),
        "model": ModelConfig(
            name="resnet20_cifar",
            input_size=(1, 8, 8),
            args={"channels": [8, 8, 16], "drop_rate": 0.2},
        ),
        "penalty": PenaltyConfig(strength=0.01, burn_in_steps=3, every=2),
        "optimizer": OptimizerConfig(lr=0.05, ema_decay=0.9, warmup_epochs=1, clip_grad=5.0),
        "checkpoint": CheckpointConfig(every_steps=3, keep=3),
    }
    return RunConfig(**{**settings, **kwargs})


def build(run, *, objective=Supervised):
    torch.manual_seed(run.seed)
    splits = build_splits(run.data)
    model = build_model(run.model, splits.label_names)
    images = build_images(splits, model, run)
    objective = objective(model, augment=run.augment)
    return TrainingLoop(objective, **images, config=run, metadata=run_metadata(splits, images))


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_run_lowers_loss_and_sigma_and_leaves_a_loadable_model(tmp_path):
    run = config(
        tmp_path,
        epochs=8,
        accumulation=1,
        batch_size=64,
        augment=AugmentConfig(),
        data=DataConfig(),
        penalty=PenaltyConfig(strength=0.01, burn_in_epochs=4),
        optimizer=OptimizerConfig(lr=0.1),
        checkpoint=CheckpointConfig(keep=1),
    )
    result = build(run).run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.3 * losses[0]
    assert result.metrics["test_accuracy"] > 0.9
    sums = {line["epoch"]: line["sum_sigma2"] for line in lines if "sum_sigma2" in line}
    assert sums[8] < 0.7 * sums[4]
    penalties = {line["epoch"]: line["penalty"] for line in lines if "penalty" in line}
    assert penalties[1] == 0
    assert penalties[7] == pytest.approx(0.01 * sums[8], rel=0.2)
    model = SpecRegModel.from_pretrained(result.model_folder)
    assert model.label_names == [str(n) for n in range(10)]
    assert model.metadata["config"]["penalty"]["strength"] == 0.01
    assert model.metadata["data"]["source"] == "digits"
    assert [p.name for p in checkpoints.all_checkpoints(tmp_path / "run/checkpoints")] == [
        "step_00000176"
    ]
    assert (tmp_path / "run/best/model.safetensors").is_file()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    run = config(tmp_path_factory.mktemp("whole"), checkpoint=CheckpointConfig(keep=9))
    build(run).run()
    return Path(run.output_dir)


@pytest.mark.parametrize("call", [7, 12, 21])
def test_a_resumed_run_gives_the_weights_of_the_uninterrupted_one_bit_for_bit(
    tmp_path, whole, call
):
    """With augmentation, noise, mixup, dropout, momentum, averaging, accumulation and a cadence."""
    expected = weights(whole / "model")
    broken = config(tmp_path / "broken")
    with pytest.raises(Interrupted):
        build(broken, objective=interrupted_at(call)).run()
    torch.manual_seed(99)
    resumed = weights(build(broken).run(resume=True).model_folder)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.fixture(scope="module")
def as_usual(tmp_path_factory):
    """Settings of a short run with terms of every kind, and the weights that it gives."""
    terms = {"sensitivity": SensitivityConfig(0.01, images=4), "bss": BSSConfig(0.01)}
    settings = {
        "epochs": 2,
        "batch_size": 32,
        "accumulation": 1,
        "data": DataConfig(train_samples=96),
        "augment": AugmentConfig(noise=0.05),
        # with at least 8 channels before a strided 1x1 convolution: see RunConfig.channels_last
        "model": ModelConfig(
            input_size=(1, 8, 8), name="resnet20_cifar", args={**NARROW, "channels": [8, 16]}
        ),
        "penalty": PenaltyConfig(strength=0.01),
        "regularizers": RegularizersConfig(**terms),
    }
    run = config(tmp_path_factory.mktemp("as_usual"), **settings)
    return settings, weights(build(run).run().model_folder)


@pytest.mark.parametrize("setting", ["channels_last", "compile"])
def test_layout_and_compilation_change_weights_by_rounding_and_a_resumed_run_not_at_all(
    tmp_path, as_usual, setting, monkeypatch
):
    settings, expected = as_usual
    frames = CompileCounterWithBackend("aot_eager")  # needs no compiler
    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **kw: compile_with(m, backend=frames, **kw)
    )
    run = config(tmp_path, **settings, **{setting: True})
    loop = build(run)
    whole = weights(loop.run().model_folder)
    assert whole.keys() == expected.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], expected[name], rtol=1e-3, atol=1e-4)
    kernel = loop.encoder.network.stages[0][0].conv1.weight
    last = setting == "channels_last"
    assert kernel.is_contiguous(memory_format=torch.channels_last) == last
    assert (frames.frame_count > 0) == (setting == "compile")
    broken = replace(run, output_dir=str(tmp_path / "broken"))
    with pytest.raises(Interrupted):
        build(broken, objective=interrupted_at(5)).run()
    resumed = weights(build(broken).run(resume=True).model_folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def copied(tmp_path, whole):
    """A copy of that run, to do harm to."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_not_resumed_in_another_precision(tmp_path, copied, monkeypatch):
    """The configuration does not say: accelerate's environment decides, then and now."""
    loop = build(config(tmp_path))
    monkeypatch.setattr(loop.accelerator.state, "_mixed_precision", "bf16")
    with pytest.raises(CheckpointError, match=r"mixed_precision 'no', and 'bf16' is in effect"):
        loop.run(resume=True)


def test_other_processes_since_the_checkpoint_are_said(tmp_path, copied, capsys):
    progress = latest_checkpoint(copied / "checkpoints") / "progress.json"
    state = build(config(tmp_path)).state
    conditions = json.loads(progress.read_text())["conditions"]
    assert conditions == {"mixed_precision": "no", "device": "cpu", "processes": 1}
    state._check_conditions(progress.parent, {**conditions, "processes": 4, "device": "cuda"})
    said = " ".join(capsys.readouterr().err.split())
    assert "was trained with processes 4, and goes on with 1" in said
    assert "was trained with device cuda, and goes on with cpu" in said


def test_a_resume_reads_a_checkpoint_to_check_it_once(tmp_path, copied, monkeypatch):
    read = []
    fingerprint = checkpoints._fingerprint
    monkeypatch.setattr(checkpoints, "_fingerprint", lambda p: read.append(p) or fingerprint(p))
    for _ in range(2):
        starting_point(config(tmp_path), resume=True)
    assert len(read) == len(set(read)) > 5
    read[0].write_bytes(b"changed")
    assert "was cut short or changed" in find_fault(latest(copied))


def latest(folder):
    return checkpoints.all_checkpoints(folder / "checkpoints")[-1]


def test_a_step_that_the_scaler_of_fp16_skips_counts_for_nothing(tmp_path, monkeypatch):
    """As on a GPU, whose scaler skips the steps of infinite gradients and lowers its scale."""
    loop = build(config(tmp_path, epochs=1, penalty=PenaltyConfig(strength=0.01), log_every=1))
    skipped, taken = iter([True, False, True, False]), []
    step, average = loop.optimizer.step, loop.state.ema.update

    def some_steps():
        loop.optimizer._is_overflow = loop.accelerator.sync_gradients and next(skipped)
        if not loop.optimizer._is_overflow:
            step()

    monkeypatch.setattr(loop.optimizer, "step", some_steps)
    monkeypatch.setattr(
        loop.state.ema, "update", lambda *args, step: taken.append(step) or average(*args, step)
    )
    result = loop.run()
    assert loop.steps_per_epoch == 4
    assert (result.step, loop.penalty.step, taken) == (2, 2, [1, 2])
    rates = [line["lr"] for line in logged(tmp_path / "run") if "lr" in line]
    assert rates == pytest.approx([0.05 / 4, 0.05 / 2])


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_validation_and_sigmas_follow_their_own_interval_and_the_end(tmp_path, whole):
    run = config(tmp_path, eval_every_epochs=2)
    result = build(run).run()
    epochs = [line["epoch"] for line in logged(tmp_path / "run") if "sum_sigma2" in line]
    assert epochs == [2, 3, 3]  # once more with the test split
    before, now = weights(whole / "model"), weights(result.model_folder)
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_workers_stay_between_epochs_and_end_with_the_run(tmp_path, whole):
    run = config(tmp_path, data=DataConfig(train_samples=600, num_workers=1))
    loop = build(run)
    loader, workers, score = loop.loader.base_dataloader, set(), loop.score

    def noting(*arguments):
        workers.update(loader._iterator._workers if loader._iterator else ())
        return score(*arguments)

    loop.score = noting
    now, before = weights(loop.run().model_folder), weights(whole / "model")
    assert [worker.is_alive() for worker in workers] == [False]  # of three epochs
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_batches_for_a_gpu_are_pinned(tmp_path):
    run = config(tmp_path)
    images = build_splits(run.data).train
    for pinned in (False, True):
        loaders, _ = build_loaders((images,) * 3, run, 1, pin_memory=pinned)
        assert [loader.pin_memory for loader in loaders] == [pinned] * 3


def test_trackers_are_started_with_their_project_and_arguments(tmp_path):
    tracker = TrackerConfig("mine", {"tensorboard": {"filename_suffix": ".of_this_run"}})
    run = config(tmp_path, epochs=1, log_with=("tensorboard",), tracker=tracker)
    build(run).run()
    assert list((tmp_path / "run/mine").rglob("*.of_this_run"))
    with pytest.raises(ValueError, match=r"init_kwargs are of \['tensorboard'\], which log_with"):
        config(tmp_path, tracker=tracker)


def test_the_seed_decides_the_run(tmp_path):
    runs = [
        config(tmp_path / name, epochs=1, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, again, other = [weights(build(run).run().model_folder) for run in runs]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_a_checkpoint_cut_short_is_noticed_and_the_one_before_it_used(tmp_path, copied, caplog):
    *_, before, last = checkpoints.all_checkpoints(copied / "checkpoints")
    file = last / "state/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert latest_checkpoint(copied / "checkpoints") == before
    assert f"{last.name} is not whole (state/model.safetensors was cut short" in caplog.text
    assert build(config(tmp_path)).run(resume=True).step == 12


def test_nan_stops_the_run_with_step_batch_and_last_good_checkpoint(tmp_path):
    run = config(tmp_path)

    class Poisoned(Supervised):
        calls = 0

        def forward(self, images, labels):
            self.calls += 1
            return super().forward(images, labels) * (torch.nan if self.calls == 10 else 1.0)

    with pytest.raises(
        DivergedError, match=r"loss is \[nan\].*step 5 \(epoch 1, batch 1\).*step_00000004"
    ):
        build(run, objective=Poisoned).run()
    for checkpoint in checkpoints.all_checkpoints(tmp_path / "run/checkpoints"):
        assert all(w.isfinite().all() for w in weights(checkpoint / "model").values())


def test_weights_that_are_not_finite_never_get_into_a_checkpoint(tmp_path):
    """The loss of the step is finite; the step itself makes the weights infinite."""
    run = config(tmp_path, optimizer=OptimizerConfig(lr=1e30), augment=AugmentConfig())
    with pytest.raises(DivergedError, match=r"Lower optimizer\.lr"):
        build(run).run()
    assert checkpoints.all_checkpoints(tmp_path / "run/checkpoints") == []
    assert not (tmp_path / "run/best").exists()


@pytest.mark.parametrize("what", ["validation loss", "test loss", "sigma of conv1"])
def test_a_run_that_diverges_in_its_last_step_leaves_no_model(tmp_path, what, monkeypatch):
    """The losses of its steps are finite, and so are its weights."""
    run = config(
        tmp_path,
        epochs=1,
        accumulation=1,
        data=DataConfig(train_samples=128),
        penalty=PenaltyConfig(strength=0.0),
        optimizer=OptimizerConfig(lr=1e3),
    )
    loop = build(run)
    score = loop.score

    def finite_elsewhere(encoder, loader, accelerator):
        own = what == f"{'test' if loader is loop.test else 'validation'} loss"
        return {**score(encoder, loader, accelerator), **({} if own else {"loss": 1.0})}

    loop.score = finite_elsewhere
    if what == "sigma of conv1":
        monkeypatch.setattr(loop.penalty, "sigmas", lambda: {"conv1": torch.inf})
    with pytest.raises(DivergedError, match=f"the {what} is (nan|inf) after step 1; .*Lower"):
        loop.run()
    assert not (tmp_path / "run/model").exists()
    assert (tmp_path / "run/best").exists() == (what == "test loss")
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_pruning_keeps_the_checkpoint_just_written_and_drops_those_of_a_rewound_run(tmp_path):
    for step in (80, 120):
        checkpoints.save_checkpoint(tmp_path, step, {}, lambda into: None, keep=2)
    (tmp_path / "step_00000120/progress.json").write_text("{")
    checkpoints.save_checkpoint(tmp_path, 100, {}, lambda into: None, keep=1)
    assert [p.name for p in checkpoints.all_checkpoints(tmp_path)] == ["step_00000100"]
    assert checkpoints.latest_checkpoint(tmp_path).name == "step_00000100"


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 1, {}, lambda into: None, keep=1)

    def full(into):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left.*step_00000001.*Free some space"):
        checkpoints.save_checkpoint(tmp_path, 2, {}, full, keep=1)
    assert checkpoints.latest_checkpoint(tmp_path).name == "step_00000001"
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_another_run_is_neither_overwritten_nor_continued(tmp_path, copied):
    run = config(tmp_path)
    with pytest.raises(CheckpointError, match="already holds a run"):
        build(run).run()
    other = replace(run, batch_size=64)
    with pytest.raises(CheckpointError, match=r"batch_size: 128 and 64"):
        build(other).run(resume=True)
    for file in (copied / "checkpoints").rglob("progress.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        build(run).run(resume=True)


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path, copied):
    """Without the interval of evaluation, a configuration, and what was in effect."""
    folder = latest(copied)
    progress = json.loads((folder / "progress.json").read_text())
    del progress["config"]["eval_every_epochs"], progress["config"]["data"]["configuration"]
    del progress["config"]["penalty"]["fold_gradient"], progress["conditions"]
    (folder / "progress.json").write_text(json.dumps(progress))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["progress.json"] = checkpoints._fingerprint(folder / "progress.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert build(config(tmp_path)).run(resume=True).step == 12


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew_and_says_so(
    tmp_path, capsys
):
    settings = {"epochs": 1, "checkpoint": CheckpointConfig()}
    broken = config(tmp_path / "broken", **settings)
    with pytest.raises(Interrupted):
        build(broken, objective=interrupted_at(3)).run()
    resumed = weights(build(broken).run(resume=True).model_folder)
    said = " ".join(capsys.readouterr().err.split())
    assert "has no checkpoint yet: the run begins anew" in said
    whole = weights(build(config(tmp_path / "whole", **settings)).run().model_folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    shutil.rmtree(tmp_path / "broken/run/checkpoints")
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="holds a finished run, without its checkpoints"):
            build(broken).run(resume=resume)


def test_processes_that_find_different_checkpoints_stop(tmp_path, monkeypatch):
    loop = build(config(tmp_path, epochs=1))
    monkeypatch.setattr(loop.accelerator, "gather", lambda own: torch.cat([own, own + 121]))
    with pytest.raises(CheckpointError, match=r"steps \[-1, 120\].*filesystem that all nodes"):
        loop.run()


def test_the_best_epochs_weights_are_kept(tmp_path):
    accuracies = iter([0.5, 0.9, 0.7, 0.6])
    run = config(tmp_path, checkpoint=CheckpointConfig(keep=9))
    loop = build(run)
    loop.score = lambda *_: {"accuracy": next(accuracies)}
    loop.run()
    best = weights(tmp_path / "run/best")
    steps = loop.steps_per_epoch
    of_epochs = [
        weights(tmp_path / f"run/checkpoints/step_{epoch * steps:08d}/model") for epoch in (1, 2, 3)
    ]
    equal = [all(torch.equal(best[name], of[name]) for name in best) for of in of_epochs]
    assert equal == [False, True, False]


def test_a_resumed_run_keeps_the_best_of_the_epochs_before(tmp_path):
    run = config(tmp_path, checkpoint=CheckpointConfig(keep=9))
    accuracies = iter([0.5, 0.9, 0.7, 0.6])
    steps = build(run).steps_per_epoch
    for resume in (False, True):
        in_the_third = interrupted_at(2 * steps * run.accumulation + 1)
        loop = build(run, objective=Supervised if resume else in_the_third)
        loop.score = lambda *_: {"accuracy": next(accuracies)}
        with nullcontext() if resume else pytest.raises(Interrupted):
            loop.run(resume=resume)
    best = weights(tmp_path / "run/best")
    of_epoch = weights(tmp_path / f"run/checkpoints/step_{2 * steps:08d}/model")
    assert all(torch.equal(best[name], of_epoch[name]) for name in best)


def test_an_error_that_is_not_the_disks_is_not_called_one(tmp_path):
    def broken(folder):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        checkpoints.save_checkpoint(tmp_path, 1, {}, broken, keep=1)


def test_accumulation_gives_the_same_weights_as_one_large_batch(tmp_path):
    plain = {"augment": AugmentConfig(), "epochs": 1, "optimizer": OptimizerConfig(lr=0.05)}
    model = ModelConfig(
        name="mlp_2000", input_size=(1, 8, 8), args={"img_size": 8, "hidden_features": 30}
    )
    penalty = PenaltyConfig(strength=0.1)
    results = []
    for accumulation in (1, 4):
        run = config(
            tmp_path / str(accumulation),
            accumulation=accumulation,
            model=model,
            penalty=penalty,
            **plain,
        )
        results.append(weights(build(run).run().model_folder))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def test_the_penaltys_share_of_the_time_counts_its_backward_pass():
    steps = StepLog(torch.device("cpu"))
    weight = torch.ones(3, requires_grad=True)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.2)
            return grad.expand(3)

    loss = weight.square().sum()
    with steps.penalty_time():
        penalty = Slow.apply(weight)
    steps.count_backward(penalty, loss)
    (loss + penalty).backward()
    steps.add(1, 0, 0, loss=loss, penalty=penalty, images=4)
    assert steps.summary(lambda losses: losses)["penalty_share"] > 0.8


def test_images_left_out_are_counted_and_named(tmp_path, caplog):
    rows = build_splits(DataConfig(train_samples=40)).train.to_list()
    rows[4]["image"]["bytes"] = b"no image"
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    columns = {key: [row[key] for row in rows] for key in ("image", "label")}
    (tmp_path / "set/data").mkdir(parents=True)
    for name in ("train", "validation", "test"):
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / f"set/data/{name}-00000-of-00001.parquet")
    data = DataConfig(source=str(tmp_path / "set"), skip_unreadable=True)
    loop = build(config(tmp_path, data=data, batch_size=16, augment=AugmentConfig()))
    assert loop.state.metadata["data"]["unreadable"] == dict.fromkeys(
        ("train_images", "validation_images", "test_images"), 1
    )
    assert "left out of train_images: row 4 (" in caplog.text
    with pytest.raises(DataError, match="1 of 40 images cannot be read: row 4"):
        build(config(tmp_path, data=replace(data, skip_unreadable=False), batch_size=16))


def test_several_seeds_are_tested_on_the_same_images():
    first, second = [build_splits(DataConfig()) for _ in range(2)]
    assert first.test["row"][:] == second.test["row"][:]
    other = build_splits(DataConfig(split_seed=1))
    assert first.test["row"][:] != other.test["row"][:]
    assert not set(first.test["row"]) & set(first.train["row"])


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not installed: \\['wandb'\\]"):
        build(config(tmp_path, log_with=("wandb",)))


def test_mixup_needs_an_even_micro_batch(tmp_path):
    with pytest.raises(ValueError, match="must be even"):
        build(config(tmp_path, batch_size=126))


@pytest.mark.parametrize("burn_in", [{"burn_in_steps": 12}, {"burn_in_fraction": 0.99}])
def test_a_burn_in_of_all_steps_is_an_error_unless_there_is_no_penalty(tmp_path, burn_in):
    with pytest.raises(ValueError, match=r"leaves the term no step of 3 epochs of 4 steps: lower"):
        build(config(tmp_path, penalty=PenaltyConfig(0.01, **burn_in)))
    build(config(tmp_path, penalty=PenaltyConfig(0.0, **burn_in)))


def test_a_term_of_more_images_than_a_micro_batch_has_is_an_error(tmp_path):
    regularizers = RegularizersConfig(input_gradient=InputGradientConfig(0.1, images=65))
    with pytest.raises(ValueError, match=r"images \(65\) exceeds the images of a micro-batch \(64"):
        build(config(tmp_path, regularizers=regularizers))
    of_part = AdversarialConfig("pgd", images=65)
    with pytest.raises(ValueError, match=r"adversarial.images \(65\) exceeds .* \(64, by batch"):
        build(config(tmp_path, adversarial=of_part))


def test_a_batch_larger_than_the_data_or_not_divisible_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size \(1024\) exceeds the 600 training images"):
        build(config(tmp_path, batch_size=1024))
    with pytest.raises(ValueError, match=r"batch_size \(127\) must be divisible"):
        build(config(tmp_path, batch_size=127))


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """48 training images and 16 to validate, as parquet; without the five seconds that datasets
    waits at each end of a stream, for an interpreter that may be about to exit.
    """
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    from tests.data.test_data import random_picture, save_parquet, table

    def rows(count, first):
        pictures = [random_picture(first + i) for i in range(count)]
        return table([i % 2 for i in range(count)], pictures)

    save_parquet(tmp_path / "set", train=rows(48, 0), validation=rows(16, 100))
    return str(tmp_path / "set")


def streamed(tmp_path, source, **settings):
    model = ModelConfig(
        name="mlp_2000", input_size=(3, 8, 8), args={"img_size": 8, "hidden_features": 20}
    )
    return config(
        tmp_path,
        **{
            "data": DataConfig(source=source, streaming=True),
            "augment": AugmentConfig(),
            "model": model,
            "batch_size": 8,
            "steps_per_epoch": 5,
            "checkpoint": CheckpointConfig(every_steps=2, keep=3),
            **settings,
        },
    )


def test_a_run_on_a_stream_resumes_within_an_epoch_to_the_same_bits(tmp_path, stream):
    whole = weights(build(streamed(tmp_path / "whole", stream)).run().model_folder)
    broken = streamed(tmp_path / "broken", stream)
    with pytest.raises(Interrupted):
        build(broken, objective=interrupted_at(19)).run()
    resumed = weights(build(broken).run(resume=True).model_folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stream_that_is_shorter_than_an_epoch_says_so(tmp_path, stream):
    with pytest.raises(ValueError, match=r"epoch 0 ended after 12 of 14 batches.*steps_per_epoch"):
        build(streamed(tmp_path, stream, steps_per_epoch=7)).run()
