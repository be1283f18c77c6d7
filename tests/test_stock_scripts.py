"""docs/stock-scripts.md: every snippet runs as it stands, in the script that it is for."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import timm.task
import torch
import transformers
from lightly.loss import NTXentLoss
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hf_specreg import InputGradientPenalty, SpecRegModel, SpectralPenalty
from tests.pages import only, page
from tests.tiny import vit_config
from tests.training import as_timm_trains, as_transformers_fine_tunes
from tests.training.test_trainer import Digits, arguments, vit

LABELS = ["cow", "hen", "owl"]


def snippet(*parts):
    return only(page("stock-scripts"), *parts)


@pytest.mark.parametrize("asked", ["regularizers=terms", 'penalty={"strength": 1e-2}'])
def test_timms_train_script_has_a_term(tmp_path, monkeypatch, asked):
    monkeypatch.setattr(timm.task, "ClassificationTask", timm.task.ClassificationTask)
    folders = {name: tmp_path / name for name in ("plain", "ours")}
    for folder in folders.values():
        folder.mkdir()
    options = ["--output", str(folders["plain"]), "--epochs", "1"]
    as_timm_trains.main(["images", *options])
    options[1] = str(folders["ours"])
    monkeypatch.setattr(
        sys, "argv", ["specreg_train.py", as_timm_trains.__file__, "images", *options]
    )
    code = snippet("specreg_train.py")
    assert asked in code
    exec(code.replace("regularizers=terms", asked), {})
    plain, ours = (
        torch.load(folder / "last.pth.tar", weights_only=True) for folder in folders.values()
    )
    state = ours["task_state"]["specreg"]
    assert state["step"] == as_timm_trains.BATCHES
    assert ("penalty" in state) == asked.startswith("penalty")
    weights = plain["state_dict"].items()
    assert max((ours["state_dict"][name] - value).abs().max() for name, value in weights) > 1e-5


def test_a_task_has_the_penalty_and_a_regularizer():
    torch.manual_seed(0)
    names = {
        "model": timm.create_model("test_vit", img_size=32, num_classes=5),
        "criterion": nn.CrossEntropyLoss(),
        "images": torch.randn(4, 3, 32, 32),
        "labels": torch.tensor([0, 1, 2, 3]),
    }
    exec(snippet("SensitivityConfig"), names)
    assert names["task"].penalty.burn_in == 1000
    assert names["result"]["penalty"] == 0
    assert names["result"]["sensitivity"] != 0
    assert names["model"].blocks[0].mlp.fc1.weight.grad.abs().max() > 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of three kinds, in folders of that name."""
    folder, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in LABELS:
            (folder / split / label).mkdir(parents=True)
            for number in range(4):
                pixels = draws.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


def of_timm():
    return SpecRegModel.from_timm("test_vit", num_classes=5, input_size=(3, 32, 32), img_size=32)


def of_transformers():
    config = vit_config(image_size=32, patch_size=8, num_channels=3, num_labels=5)
    return SpecRegModel.from_transformers(config, label_names=list("uvwxy"))


@pytest.mark.parametrize("make", [of_timm, of_transformers])
def test_transformers_script_fine_tunes_what_is_saved_and_resumes(
    tmp_path, monkeypatch, pictures, make
):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "saved")
    script = [as_transformers_fine_tunes.__file__, "--model_name_or_path", str(tmp_path / "saved")]
    script += ["--train_dir", f"{pictures}/train", "--validation_dir", f"{pictures}/validation"]
    script += ["--ignore_mismatched_sizes", "True", "--remove_unused_columns", "False"]
    script += ["--do_train", "--per_device_train_batch_size", "2", "--report_to", "none"]
    script += ["--gradient_accumulation_steps", "2", "--use_cpu", "True", "--disable_tqdm", "True"]
    script += ["--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1"]
    code = snippet("specreg_run.py")

    def run(folder, steps):
        monkeypatch.setattr(transformers, "Trainer", transformers.Trainer)
        more = ["--output_dir", str(folder), "--max_steps", str(steps)]
        monkeypatch.setattr(sys, "argv", ["specreg_run.py", *script, *more])
        exec(code, {})
        monkeypatch.undo()

    run(tmp_path / "tuned", 2)
    tuned = SpecRegModel.from_pretrained(tmp_path / "tuned")
    assert tuned.label_names == LABELS
    stock = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert list(stock.config.id2label.values()) == LABELS
    images = torch.rand(2, 3, 32, 32)
    logits = stock.eval()(tuned.normalize(images)).logits
    torch.testing.assert_close(tuned.eval()(images), logits)
    log = json.loads((tmp_path / "tuned/trainer_state.json").read_text())["log_history"]
    assert log[0]["penalty"] > 0
    before = load_file(tmp_path / "tuned/model.safetensors")
    run(tmp_path / "tuned", 4)  # goes on from checkpoint-2
    counted = json.loads((tmp_path / "tuned/checkpoint-4/penalty.json").read_text())
    assert counted["step"] == 4
    after = load_file(tmp_path / "tuned/model.safetensors")
    moved = max((after[name] - value).abs().max() for name, value in before.items())
    assert 0 < moved < 1e-2  # two steps at 5e-5 from those weights, not from fresh ones


def test_a_callback_adds_the_penalty_to_a_trainer_and_its_reporters(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    args = arguments(tmp_path, max_steps=1, report_to=["tensorboard"])
    names = {"model": vit(), "args": args, "images": Digits()}
    exec(snippet("SpecRegCallback", "1e-2"), names)
    exec(snippet("TensorBoardCallback"), names)
    names["trainer"].train()
    assert names["trainer"].state.log_history[0]["penalty"] > 0
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert "train/penalty" in events.Tags()["scalars"]


@pytest.mark.parametrize("by", ["SpecRegTrainer", "SpecRegCallback"])
def test_a_trainer_has_a_regularizer_of_images(tmp_path, by):
    args = arguments(tmp_path, max_steps=1)
    processor = SimpleNamespace(image_std=[0.5])
    names = {"model": vit(), "args": args, "images": Digits(), "processor": processor}
    exec(snippet("pixel_std=processor.image_std", by), names)
    names["trainer"].train()
    assert names["trainer"].state.log_history[0]["input_gradient"] > 0


def test_a_trainer_moves_the_first_images_of_a_batch(tmp_path):
    model, seen = vit(), []

    def see(_, inputs, named):
        (images,) = inputs or [named["pixel_values"]]
        seen.append(images.detach().clone())

    model.register_forward_pre_hook(see, with_kwargs=True)
    args = arguments(tmp_path, max_steps=1, batch=16)
    processor = SimpleNamespace(image_std=[0.5])
    names = {"model": model, "args": args, "images": Digits(), "processor": processor}
    exec(snippet("AdversarialTrainer"), names)
    names["trainer"].train()
    trained_on = seen[-1]
    known = torch.stack([names["images"][i]["pixel_values"] for i in range(len(names["images"]))])
    far = (trained_on[:, None] - known).flatten(2).norm(dim=2).amin(1)
    assert far[8:].max() == 0
    assert 0 < far[:8].min() <= far[:8].max() <= 0.5 / 0.5 + 1e-6


class Lit(pl.LightningModule):
    """A network with a backbone, in the least of Lightning."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = timm.create_model("test_vit", img_size=32, num_classes=5)

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.backbone(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(folder, *, with_penalty=True, steps=2, resume=None):
    """Train optimizer steps of two micro-batches each, by the page's callback."""
    settings = {"max_steps": steps, "accumulate_grad_batches": 2, "accelerator": "cpu"}
    settings |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"default_root_dir": folder}
    names = {"module": Lit(), "settings": settings}
    exec(snippet("on_before_optimizer_step"), names)
    trainer = names["trainer"] if with_penalty else pl.Trainer(**settings)
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=draws)  # a step is an epoch
    batches = torch.utils.data.TensorDataset(images, torch.arange(4))
    loader = torch.utils.data.DataLoader(batches, batch_size=2)
    trainer.fit(names["module"], loader, ckpt_path=resume)
    return trainer, names["module"].backbone


def test_lightning_adds_it_once_a_step_and_keeps_its_state(tmp_path):
    reference = Lit().backbone
    SpectralPenalty(reference, strength=1e-2)().backward()
    (_, plain), (first, ours) = (
        fitted(tmp_path / f"one_{with_penalty}", with_penalty=with_penalty, steps=1)
        for with_penalty in (False, True)
    )
    assert first.callback_metrics["penalty"] > 0
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    for (without, with_it), weight in zip(pairs, reference.parameters(), strict=True):
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close((without - with_it) / 0.1, gradient, rtol=1e-3, atol=1e-4)
    (checkpoint,) = (tmp_path / "one_True/checkpoints").glob("*.ckpt")
    (state,) = [
        state
        for name, state in torch.load(checkpoint, weights_only=True)["callbacks"].items()
        if "AddPenalty" in name
    ]
    assert state["step"] == state["uses"] == 1
    assert state["vectors"]
    again, _ = fitted(tmp_path / "again", resume=checkpoint)
    assert again.callbacks[0].penalty.state_dict()["uses"] == 2


def test_a_module_of_lightning_has_a_regularizer_of_images(tmp_path):
    names = {"Classifier": Lit}
    exec(snippet("Regularized"), names)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    batches = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(batches, batch_size=8)
    ends = []
    for kind in (Lit, names["Regularized"]):
        module = kind()
        settings = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        settings |= {"max_steps": 1, "default_root_dir": tmp_path, "enable_model_summary": False}
        pl.Trainer(**settings, enable_checkpointing=False).fit(module, loader)
        ends.append(module.backbone)
    module.on_save_checkpoint(checkpoint := {})
    again = names["Regularized"]()
    again.on_load_checkpoint(checkpoint)
    assert (module.gradient.step, again.gradient.step) == (1, 1)
    reference = Lit().backbone
    InputGradientPenalty(reference, strength=0.05)(images, labels).backward()
    for plain, ours, weight in zip(*(m.parameters() for m in (*ends, reference)), strict=True):
        torch.testing.assert_close((plain - ours) / 0.1, weight.grad, rtol=1e-3, atol=1e-4)
    assert reference.blocks[0].attn.qkv.weight.grad.abs().max() > 1e-3


class Encoder(nn.Module):
    """A backbone and a projection head, as in lightly's examples."""

    def __init__(self):
        super().__init__()
        pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *pooled)
        self.head = nn.Linear(4, 8)

    def forward(self, images):
        return self.head(self.backbone(images))


def test_a_loop_of_lightly_has_it_on_the_backbone():
    torch.manual_seed(0)
    model = Encoder()
    views = torch.rand(2, 4, 3, 32, 32)
    names = {
        "model": model,
        "criterion": NTXentLoss(),
        "batches": [((views[0], views[1]), None, None)] * 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(snippet("head=()"), names)
    assert names["penalty"].step == 2
    assert [layer.name for layer in names["penalty"].layers] == ["0"]
