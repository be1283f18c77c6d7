import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_specreg import RobustnessReport, SpecRegModel
from hf_specreg.encoders.blueprint import FolderError
from hf_specreg.encoders.fused import fuse_norms
from hf_specreg.hub.card import card_files, write_card
from hf_specreg.hub.collection import collect
from hf_specreg.hub.encoder import CardError, Encoder, report_files
from hf_specreg.hub.run import public_name
from hf_specreg.hub.summary import method
from tests.hub.conftest import make_model, report_on


@pytest.fixture
def folder(encoder, tmp_path):
    return shutil.copytree(encoder, tmp_path / "m")


def card_of(folder, **options):
    if "baseline" in options:
        options["baseline"] = of_other_weights(options["baseline"])
    opened = Encoder.open(folder, **{"license": "mit", **options})
    return card_files(opened, "me/resnet")["README.md"].decode()


def of_other_weights(report):
    model = {**report.content["model"], "id": "runs/secret/plain", "weights_sha256": 64 * "5"}
    return RobustnessReport({**report.content, "model": model}, report.images)


def test_every_robust_number_has_its_norm_eps_attack_n_and_seed(folder):
    data = ModelCard(card_of(folder)).data
    report = RobustnessReport.load(folder).content
    robust = [r for r in data.eval_results if r.metric_type == "robust_accuracy"]
    stated = {(r.metric_args["attack"], r.metric_args["eps"]): r.metric_value for r in robust}
    for name, attack in report["attacks"].items():
        for point in attack["robust_accuracy"]:
            assert stated[name, point["eps"]] == pytest.approx(point["value"], abs=1e-6)
    for point in report["worst_case"]:
        assert stated["tangent, pgd-l2", point["eps"]] == pytest.approx(point["value"], abs=1e-6)
    tangent, pgd = "tangent (iterations 2)", "pgd-l2 (steps 5, restarts 1)"
    for result in robust:
        eps, attack = result.metric_args["eps"], result.metric_args["attack"]
        strength = {"tangent": tangent, "pgd-l2": pgd}.get(attack, f"worst of {tangent}, {pgd}")
        assert result.metric_name == f"robust accuracy, L2 {eps:g}, {strength}"
    for result in robust:
        assert result.metric_args["norm"] == "l2"
        assert (result.metric_args["n"], result.metric_args["seed"]) == (12, 0)
        assert result.dataset_name == "org/pictures"
        assert result.dataset_revision == "abc"
    assert len(robust) == 6
    assert data.pipeline_tag == "image-classification"
    assert (data.library_name, data.license, data.datasets) == ("timm", "mit", ["org/pictures"])


def test_attacks_without_gradients_alone_are_said_to_be_so(folder):
    said = "No attack that uses gradients was run"
    assert said not in card_of(folder)
    path = folder / "robustness.json"
    content = json.loads(path.read_text())
    for attack in content["attacks"].values():
        attack["black_box"] = True
    path.write_text(json.dumps(content))
    assert said in card_of(folder)


def test_a_part_of_a_data_set_is_other_data(folder):
    path = folder / "robustness.json"
    content = json.loads(path.read_text())
    splits = {"configuration": "big", "classes": ["a", "b"], "seed": 3}
    content["data"] |= {"splits": splits, "split": "validation"}
    path.write_text(json.dumps(content))
    write_card(Encoder.open(folder, license="mit"), "me/resnet", folder)
    for result in ModelCard((folder / "README.md").read_text()).data.eval_results:
        assert result.dataset_name == "org/pictures (big, classes a, b)"
        assert (result.dataset_type, result.dataset_config) == ("org/pictures", "big")
        assert result.dataset_args == splits
    (row,) = collect(str(folder))
    assert row["data"] == "org/pictures (big, classes a, b), validation split"


def test_what_the_penalty_was_and_cost_is_told(folder):
    card = card_of(folder)
    assert "0.01 x sum of sigma^2 of linear maps up to the features, at every step from epo" in card
    assert "| cost of the penalty | 1.00 % of the training time |" in card


def test_a_schedule_in_steps_is_told_in_steps(tmp_path):
    model = make_model()
    model.metadata["config"]["penalty"] |= {"burn_in_steps": 500, "every": 24}
    model.save_pretrained(tmp_path)
    assert "at one step in 24 from step 500 on" in card_of(tmp_path)


@pytest.mark.parametrize(
    ("step", "burn_in", "entered"),
    [
        (20, {"burn_in_epochs": 2.0}, False),
        (21, {"burn_in_epochs": 2.0}, True),
        (15, {"burn_in_fraction": 0.5}, False),
        (16, {"burn_in_fraction": 0.5}, True),
        (5, {"burn_in_steps": 5}, False),
        (6, {"burn_in_steps": 5}, True),
        (1, {}, True),
        (4, {"burn_in_epochs": 0.35}, False),  # rounded, as in the training
        (5, {"burn_in_epochs": 0.35}, True),
    ],
)
def test_what_was_saved_before_the_penalty_entered_claims_none(tmp_path, step, burn_in, entered):
    model = make_model()
    config = model.metadata["config"]  # of 3 epochs
    later = {"strength": 0.1, "every": 1, "burn_in_steps": 30}
    config |= {
        "penalty": {"strength": 0.01, "scope": "features", "every": 1, **burn_in},
        "regularizers": {"sensitivity": later, "spectral_norm": False},
    }
    model.metadata |= {"step": step, "steps_per_epoch": 10}
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert ("- rep-spectral" in card) == entered
    assert ("without a penalty: a baseline" in card) == (not entered)
    assert "sensitivity" not in card
    assert method(model.metadata) == ("supervised, rep-spectral 0.01" if entered else "supervised")
    assert method({**model.metadata, "before": {"step": 3}}) == method(model.metadata)


def test_a_baseline_claims_no_penalty(tmp_path):
    model = make_model()
    model.metadata["config"]["penalty"]["strength"] = 0.0
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "without a penalty: a baseline" in card
    assert "- rep-spectral" not in card


def test_what_was_trained_with_something_else_is_no_baseline(tmp_path):
    model = make_model()
    config = model.metadata["config"]
    config["penalty"]["strength"] = 0.0
    config["regularizers"] = {"sensitivity": {"strength": 0.1, "every": 1, "burn_in_steps": 5}}
    config["augment"] = {"noise": 0.25}
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "with sensitivity and noise (see the settings below)" in card
    assert "0.25 in [0, 1] pixels" in card
    assert "a baseline" not in card


def test_what_an_earlier_training_added_is_told_and_makes_no_baseline(tmp_path):
    model = make_model()
    first, plain = model.metadata, {"penalty": {"strength": 0.0, "scope": "features"}}
    first["config"]["data"] = {"classes": ["a", "b"]}
    probe = {"config": {**plain, "transfer": {"train": "head"}}, "before": first}
    model.metadata = {"config": {**plain, "transfer": {"train": "all"}}, "before": probe}
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "Trained without a penalty.\n" in card
    earlier = "linear probe; before that: supervised, rep-spectral 0.01, on org/pictures (classes"
    assert f"It started from an encoder that was trained before: {earlier} a, b)." in card
    assert "method: fine-tuned, after linear probe, after supervised, rep-spectral 0.01\n" in card
    model.metadata["before"]["before"] = {"config": plain}
    model.save_pretrained(tmp_path)
    assert "without a penalty: a baseline" in card_of(tmp_path)


def test_without_a_report_nothing_is_claimed(tmp_path):
    make_model().save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "Not measured. Nothing is claimed." in card
    assert "whether it did was not measured" in card
    assert "below" not in card[: card.index("## How robust")]
    assert "model-index" not in card


def test_flags_and_limits_are_in_plain_words(folder):
    path = folder / "robustness.json"
    content = json.loads(path.read_text())
    content["flags"] = ["gradient masking: something odd"]
    path.write_text(json.dumps(content))
    card = card_of(folder)
    limits = card[card.index("What these numbers do not show") : card.index("How it was trained")]
    assert "- gradient masking: something odd" in limits
    assert "- Nothing is certified." in limits
    assert "not in Linf" in limits


def without_pgd(report, factor=1.0):
    """A report of the tangent attack alone, which has converged, its distances scaled."""
    content = {
        **report.content,
        "attacks": {"tangent": report.content["attacks"]["tangent"]},
        "nearest": [],
        "flags": [],
    }
    distances = factor * report.images["tangent/distances"]
    steps = report.images["tangent/trajectory"].copy()
    steps[:, :, 1] = distances[:, None]
    found = {"tangent/distances": distances, "tangent/trajectory": steps}
    return RobustnessReport(content, {**report.images, **found})


def test_a_comparison_says_in_words_who_is_easier_to_attack(folder):
    report = RobustnessReport.load(folder)
    for factor, verdict in (
        (0.5, "resnet is harder to attack than the baseline: in L2 the nearest"),
        (2.0, "resnet is easier to attack than the baseline: in L2 the nearest"),
        (1.0, "No difference between resnet and the baseline is shown: in L2 the nearest"),
    ):
        own, baseline = without_pgd(report), without_pgd(report, factor)
        card = card_of(folder, report=own, baseline=baseline)
        assert f"{verdict} adversarial images that tangent found" in card
        assert "below it is compared with a baseline" in card
        said = f"parameters, weights {16 * '5'}... (SHA-256)."
        assert re.search(rf"The baseline is plain, ResNet, [\d,]+ {re.escape(said)}", card)
        assert "Robust accuracy against that of the baseline: " in card
        assert "Accuracy is " in card
        assert "comparisons with the baseline are stated; each holds at 95 % by itself" in card


def test_a_card_says_of_a_less_accurate_encoder_what_the_comparison_says(folder):
    report = RobustnessReport.load(folder)
    own, baseline = without_pgd(report), without_pgd(report, 0.5)
    baseline.images["correct"] = np.ones(report.content["n"], bool)
    own.images["correct"] = report.images["correct"] & (np.arange(report.content["n"]) % 3 > 0)
    card = card_of(folder, report=own, baseline=baseline)
    assert "resnet is less accurate than the baseline by " in card
    assert "is harder to attack than the baseline" not in card


def test_nothing_is_said_to_be_harder_where_gradients_look_masked(folder):
    report = without_pgd(RobustnessReport.load(folder))
    masked = without_pgd(report, 0.5)
    masked.content["flags"] = ["gradient masking: PGD does not improve"]
    card = card_of(folder, report=report, baseline=masked)
    assert "cannot be said: the gradients of the baseline look masked" in card
    assert "is harder" not in card.replace("Whether resnet is harder", "")


def test_an_image_for_which_nothing_was_found_leaves_no_mean_to_judge_by(folder):
    report = without_pgd(RobustnessReport.load(folder))
    baseline = without_pgd(report, 1.01)
    first = np.flatnonzero(report.images["correct"])[0]
    report.images["tangent/distances"][first] = np.inf
    card = card_of(folder, report=report, baseline=baseline)
    assert "resnet is easier to attack than the baseline" in card  # nearer on all others
    assert "are farther on 1 and nearer on 10 of the same 11 images, medians " in card
    assert "(for 1 and 0 nothing was found, which is farthest)" in card
    assert "on average" not in card


def test_the_n_of_a_mean_distance_is_that_of_the_images_with_one(folder):
    path = folder / "robustness.json"
    content = json.loads(path.read_text())
    distance = content["attacks"]["tangent"]["distance"]
    distance["not_found"] = 2
    path.write_text(json.dumps(content))
    results = ModelCard(card_of(folder)).data.eval_results
    nearest, mean = (r for r in results if r.metric_type == "adversarial_distance")
    assert nearest.metric_args["attack"] == "tangent, pgd-l2"
    assert nearest.metric_value <= mean.metric_value
    assert mean.metric_args["n"] == distance["n"] - 2
    assert mean.metric_args["not_found"] == 2
    assert mean.metric_args["of"] == content["n"]
    assert mean.metric_name == (
        "mean L2 distance found by tangent (iterations 2), for 9 of 11 images"
    )


def test_attacks_at_fixed_eps_alone_are_compared_too(folder):
    report = RobustnessReport.load(folder)
    only = {n: a for n, a in report.content["attacks"].items() if n == "pgd-l2"}
    fixed = RobustnessReport({**report.content, "attacks": only, "nearest": []}, report.images)
    card = card_of(folder, report=fixed, baseline=fixed)
    assert "Robust accuracy against that of the baseline: +0.0 points (-" in card


def test_folded_and_skipped_layers_are_told(tmp_path):
    model = make_model()
    folded = {"fold_norm": True, "skip": ["conv1", "bn1"], "ramp_epochs": 4.0}
    model.metadata["config"]["penalty"] |= folded
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "with the norms beside them folded in, but for conv1 and bn1, at every step" in card
    assert "at every step from epoch 2 on, rising from 0 for 4 epochs |" in card
    assert "method: supervised, rep-spectral 0.01 (folded, without conv1 and bn1)\n" in card


def test_that_batch_norms_are_pinned_is_told(folder, tmp_path):
    told = "Trained on in training mode they\nwould take each batch's statistics"
    assert told not in card_of(folder)
    model = make_model()
    model.metadata["config"]["model"] = {"name": "test_resnet", "norms": "fused"}
    fuse_norms(model)
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "| batch norms | fused into the linear maps before them, and pinned |" in card
    assert told in card
    assert b'"norms": "pinned"' in report_files(Encoder.open(tmp_path), "me/m")["specreg.json"]


def test_the_card_is_written_anew_but_notes_and_license_stay(folder):
    encoder = Encoder.open(folder, license="mit")
    write_card(encoder, "me/resnet", folder)
    path = folder / "README.md"
    text = path.read_text().replace("*Intended use, what you saw, what to know.*", "Mine.\n\n# Too")
    path.write_text(text.replace("## How it was trained", "## Edited"))
    write_card(Encoder.open(folder), "me/resnet", folder)
    again = path.read_text()
    assert "Mine.\n\n# Too\n<!-- end of notes -->" in again
    assert "## Edited" not in again
    assert "license: mit" in again
    assert (folder / "plots/sigmas_l2.png").read_bytes()[:4] == b"\x89PNG"


def test_a_card_that_is_written_elsewhere_keeps_the_notes_there(folder, tmp_path):
    place, hint = tmp_path / "cards", "*Intended use, what you saw, what to know.*"
    write_card(Encoder.open(folder, license="mit"), "me/resnet", place)
    card = place / "README.md"
    card.write_text(
        card.read_text().replace(hint, "Theirs.").replace("---\n", "---\nlanguage: en\n", 1)
    )
    write_card(Encoder.open(folder), "me/resnet", place)
    assert "language: en\n" in card.read_text()
    assert "Theirs." in card.read_text()
    assert "license: mit" in card.read_text()
    write_card(Encoder.open(folder, license="mit"), "me/resnet", folder)
    own = folder / "README.md"
    own.write_text(own.read_text().replace(hint, "Mine."))
    write_card(Encoder.open(folder), "me/resnet", tmp_path / "new")
    assert "Mine." in (tmp_path / "new/README.md").read_text()


def test_the_same_folder_gives_the_same_bytes(folder):
    encoders = [Encoder.open(folder, license="mit") for _ in range(2)]
    first, again = (card_files(e, "me/m") | report_files(e, "me/m") for e in encoders)
    assert first == again


def test_the_pictures_of_the_data_stay_at_home(folder, tmp_path):
    report = RobustnessReport.load(folder)
    assert len(report.twins["shown"])
    for name, content in report_files(Encoder.open(folder), "me/m").items():
        (tmp_path / name).write_bytes(content)
    published = RobustnessReport.load(tmp_path / "robustness.json")
    assert published.twins == {}
    assert (published.images["tangent/distances"] == report.images["tangent/distances"]).all()


def test_a_report_of_other_weights_is_refused_naming_both(folder):
    other = make_model()
    with torch.no_grad():
        other.network.fc.bias.add_(1)
    with pytest.raises(CardError, match=r"of weights \w{16}\.\.\., but .*m holds \w{16}\.\.\."):
        Encoder.open(folder, report=report_on(other, "other"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"input_size": [3, 64, 64]}, r"the images \[3, 64, 64\], but .* of \[3, 32, 32\]: eval"),
        ({"architecture": "VGG"}, "the network VGG, but .* of ResNet: evaluate"),
    ],
)
def test_a_report_of_another_size_or_network_is_refused(folder, other, said):
    path = folder / "robustness.json"
    content = json.loads(path.read_text())
    content["model"] |= other
    path.write_text(json.dumps(content))
    with pytest.raises(CardError, match=said):
        Encoder.open(folder)


def test_a_baseline_of_the_same_weights_is_refused(encoder):
    with pytest.raises(CardError, match="the baseline's report is of the weights in"):
        Encoder.open(encoder, baseline=encoder)


def test_a_baseline_needs_a_report(tmp_path, encoder):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(CardError, match="has no report to compare with"):
        Encoder.open(tmp_path, baseline=encoder)


def test_a_damaged_description_is_named(folder):
    (folder / "specreg.json").write_text('{"config": {"penalty": {"strength": "much"}}}')
    with pytest.raises(FolderError, match=r"specreg.json: config/penalty"):
        Encoder.open(folder)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/pictures", "org/pictures"),
        ("digits", "digits"),
        ("../shared/data/mnist", "mnist"),
        ("/home/someone/secret/set", "set"),
        ("~/set", "set"),
        ("data/private/set", "set"),
        ("file:///home/someone/set", "set"),
        ("hf-hub:org/name@v1", "hf-hub:org/name@v1"),
        ("C:\\Users\\someone\\set", "set"),
        (".", "local"),
    ],
)
def test_local_paths_are_published_by_their_last_part(source, name):
    assert public_name(source) == name


def test_no_way_to_a_folder_is_published_from_wherever_the_push_is(tmp_path):
    model = make_model()
    model.metadata["config"]["data"] = {"source": "./data/patients"}
    model.metadata["data"] = {"source": "./data/patients"}
    model.metadata["config"]["output_dir"] = "runs/patients_2024"
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "data/patients" not in card
    assert "Trained on patients with" in card
    assert "datasets:" not in card
    published = report_files(Encoder.open(tmp_path), "me/m")["specreg.json"].decode()
    assert "data/patients" not in published
    assert "runs/" not in published


def test_the_started_from_license_and_base_model(tmp_path):
    model = SpecRegModel.from_timm("test_resnet", num_classes=3, input_size=(3, 32, 32))
    settings = {"name": "test_resnet.r160_in1k", "library": "timm", "pretrained": True}
    model.metadata = {"config": {"model": settings}}
    model.save_pretrained(tmp_path)
    opened = Encoder.open(tmp_path)
    front = yaml.safe_load(card_files(opened, "me/m")["README.md"].split(b"---")[1])
    assert front["base_model"] == "timm/test_resnet.r160_in1k"
    assert front["license"] == "apache-2.0"


def test_the_card_says_how_a_self_supervised_or_transferred_encoder_was_trained(folder):
    encoder = SpecRegModel.from_pretrained(folder)
    off = {"strength": 0.0, "every": 1}
    encoder.metadata = {
        "config": {
            "penalty": {"strength": 0.1, "scope": "features", "every": 24, "burn_in_fraction": 0.9},
            "regularizers": {
                "l2_sp": {"strength": 0.5, "every": 1, "burn_in_steps": 7},
                "jacobian": off,
                "spectral_norm": True,
            },
            "adversarial": dict(method="pgd", norm="linf", eps=0.125, steps=1, images=16),
            "ssl": {"method": "simclr"},
            "transfer": {"train": "lora"},
        },
        "metrics": {"test_accuracy": 0.5, "test_images": 10, "logistic_accuracy": 0.75},
        "before": {"config": {"output_dir": "/home/me/secret", "data": {"source": "/home/me/set"}}},
    }
    encoder.save_pretrained(folder)
    (folder / "robustness.json").unlink()
    card = card_of(folder)
    for said in (
        "at one step in 24 from 90 % of the training on",
        "| self-supervision | simclr |",
        "| trained | low-rank updates (LoRA) and the head |",
        "| l2_sp | strength 0.5, at every step from step 7 on |",
        "| spectral_norm | yes |",
        "| adversarial training | pgd, Linf eps 0.125, 1 step, of the first 16 images of each "
        "micro-batch |",
        "| test accuracy of nearest neighbours | 50.00 % (n = 10) |",
        "| test accuracy of a logistic regression on the features | 75.00 % |",
    ):
        assert said in card, said
    assert "jacobian" not in card
    run = Encoder.open(folder, license="mit").run
    assert "spectral norm, PGD Linf 0.125 of 16 images" in method(run)
    assert "/home/me" not in json.dumps(run)


def test_a_norm_layer_that_stock_timm_lacks_is_imported_first(tmp_path):
    arguments = {"img_size": 32, "depth": 1, "num_classes": 3, "input_size": (3, 32, 32)}
    for name in ("dynamictanh", "rmsnorm"):
        model = SpecRegModel.from_timm("test_vit", norm_layer=name, **arguments)
        model.save_pretrained(tmp_path / name)
    card = card_of(tmp_path / "dynamictanh")
    assert "import hf_specreg.encoders.norm_layers  # registers dynamictanh" in card
    assert "Its norm layer `dynamictanh` is registered with timm" in card
    assert "import hf_specreg" not in card_of(tmp_path / "rmsnorm").partition("From pixels")[0]
