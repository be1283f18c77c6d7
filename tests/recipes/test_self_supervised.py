"""The real script on real digits: encoder, classifier, report; exact resume of every method."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hf_specreg import RobustnessReport, SpecRegModel
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.recipes import self_supervised
from hf_specreg.recipes.self_supervised import main, parse, train
from hf_specreg.training.config import SelfSupervisedRunConfig
from hf_specreg.training.features import features_of
from hf_specreg.training.images import plain_training_images
from hf_specreg.training.self_supervision import SelfSupervised
from tests.interrupted import Interrupted, interrupted_at
from tests.processes import run as run_recipe

ROOT = Path(__file__).parents[2]
TINY = [
    *("--config", str(ROOT / "recipes/configs/digits_barlow_twins.yaml")),
    *("--epochs", "2", "--data.train_samples", "256", "--batch_size", "64"),
    *("--model.args", '{"img_size": 8, "hidden_features": 32}', "--log_every", "1"),
    *("--ssl.projector_hidden", "16", "--ssl.projector_out", "8", "--checkpoint.every_steps", "3"),
]
SHORT = [*TINY, "--epochs", "1", "--penalty.burn_in_fraction", "0.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssl")
    arguments = ["--report.samples", "8", "--report.attacks", '{"tangent": {"iterations": 2}}']
    config, _ = parse([*TINY, *arguments, "--output_dir", str(folder)])
    return folder, config, train(config)


def test_it_leaves_a_headless_encoder_and_a_classifier_of_the_same_features(run):
    folder, config, result = run
    encoder = SpecRegModel.from_pretrained(folder / "model")
    classifier = SpecRegModel.from_pretrained(folder / "classifier")
    assert encoder.num_classes == 0
    assert classifier.label_names == [str(n) for n in range(10)]
    splits = load_splits("digits", validation_fraction=0.2)
    images = plain_training_images(splits, encoder, config, None)
    cpu = Accelerator(cpu=True)
    features, _ = features_of(encoder, images, cpu)
    again, labels = features_of(classifier, images, cpu)
    assert torch.equal(features, again)
    test = plain_training_images(
        load_splits("digits", validation_fraction=0.2), classifier, config, None
    )
    pixels, labels = test.__getitems__(range(len(test)))
    with torch.no_grad():
        accuracy = classifier.eval()(pixels.float() / 255).argmax(1).eq(labels).float().mean()
    assert accuracy > 0.6
    assert result.metrics["logistic_accuracy"] > 0.6
    assert classifier.metadata["metrics"]["logistic_accuracy"] == pytest.approx(
        result.metrics["logistic_accuracy"]
    )


def test_features_are_measured_while_training_and_the_penalty_comes_last(run):
    folder, config, result = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "validation_effective_rank" in line]
    assert len(epochs) == 3  # after each epoch, and at the end with the test images
    assert all(line["validation_effective_rank"] >= 1 for line in epochs)
    assert result.metrics["test_collapsed"] == 0.0
    assert config.penalty.burn_in_fraction == 0.9
    penalties = [line["penalty"] for line in lines if "penalty" in line]
    assert penalties[:7] == [0] * 7
    assert penalties[7] > 0


def test_the_report_is_of_the_classifier(run):
    folder, _, result = run
    report = RobustnessReport.load(folder / "classifier_report")
    assert report.content["n"] == 8
    assert report.content["data"]["id"] == "digits"
    assert report.content["attacks"].keys() == {"tangent"}
    assert 0 <= report.content["clean"]["accuracy"]["value"] <= 1
    assert result.metrics["probe_images"] == 256


@pytest.mark.parametrize("method", ["barlow-twins", "simclr", "vicreg", "byol"])
def test_a_resumed_run_gives_the_weights_of_the_uninterrupted_one(tmp_path, monkeypatch, method):
    """BYOL's teacher is in the checkpoint too."""
    arguments = [*TINY, "--ssl.method", method, "--penalty.burn_in_fraction", "0.2"]
    whole, _ = parse([*arguments, "--output_dir", str(tmp_path / "whole")])
    expected = load_file(train(whole).model_folder / "model.safetensors")

    broken, _ = parse([*arguments, "--output_dir", str(tmp_path / "broken")])
    with monkeypatch.context() as patch:
        patch.setattr(self_supervised, "SelfSupervised", interrupted_at(6, SelfSupervised))
        with pytest.raises(Interrupted):
            train(broken)
    resumed = load_file(train(broken, resume=True).model_folder / "model.safetensors")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_the_result_is_printed(tmp_path, capsys):
    main([*SHORT, "--output_dir", str(tmp_path)])
    result = json.loads(capsys.readouterr().out)
    assert {"logistic_accuracy", "probe_images", "test_accuracy"} <= result.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": AugmentConfig(kind="none")}, r"augment.kind \('none'\) must give two views"),
        ({"augment": AugmentConfig(kind="byol", mixup=0.2)}, "need labels"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfSupervisedRunConfig(**settings)


def test_two_processes_leave_the_encoder_of_one_with_classifier_and_report(tmp_path):
    """No image is drawn at random differently: augmentation is by seed, epoch and index."""
    arguments = [*SHORT, "--ssl.method", "byol", "--report.samples", "8", "--optimizer.opt", "sgd"]
    arguments += ["--report.attacks", '{"tangent": {"iterations": 2}}']
    results = []
    for processes, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        arguments += ["--output_dir", str(folder)]
        results.append(
            json.loads(
                run_recipe("hf_specreg.recipes.self_supervised", *arguments, processes=processes)
            )
        )
        assert RobustnessReport.load(folder / "classifier_report").content["n"] == 8
    assert results[0]["test_images"] == results[1]["test_images"] == 360
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
    assert results[0]["test_accuracy"] == pytest.approx(results[1]["test_accuracy"], abs=0.02)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit", {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1}),
        ("dinov2", {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1}),
        ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    ],
)
def test_the_classifier_of_a_transformers_encoder_has_the_features_that_were_trained(
    tmp_path, name, args
):
    args |= {"num_channels": 1}
    if name != "resnet":
        args |= {"num_attention_heads": 2, "intermediate_size": 16}
    more = ["--model.library", "transformers", "--model.name", name]
    more += ["--model.args", json.dumps(args), "--model.input_size", "[1, 8, 8]"]
    result = train(parse([*SHORT, *more, "--output_dir", str(tmp_path)])[0])
    encoder = SpecRegModel.from_pretrained(tmp_path / "model").eval()
    classifier = SpecRegModel.from_pretrained(tmp_path / "classifier").eval()
    images = torch.rand(3, 1, 8, 8)
    assert encoder.num_classes == 0
    assert torch.equal(encoder(images), classifier.features(images))
    assert result.metrics["logistic_accuracy"] > 0.3


def test_a_model_whose_head_no_probe_can_replace_is_refused_before_training(tmp_path):
    more = ["--model.name", "deit_tiny_distilled_patch16_224"]
    more += ["--model.args", '{"img_size": 8, "patch_size": 4, "depth": 1}']
    with pytest.raises(ValueError, match="a probe cannot take its place"):
        train(parse([*TINY, *more, "--model.input_size", "[1, 8, 8]"])[0])
