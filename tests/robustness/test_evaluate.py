import copy
import json

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from hf_specreg import FeatureSpace, SpecRegModel, evaluate_robustness
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.labels import DataError
from hf_specreg.encoders.checksum import weights_sha256
from hf_specreg.robustness import provenance
from hf_specreg.robustness.chunks import EvaluationError
from hf_specreg.robustness.classifier import Classifier, ClassifierError
from hf_specreg.robustness.evaluate import CHECK_IMAGES, Measures
from hf_specreg.robustness.images import ImageSet, draw
from hf_specreg.robustness.work import Processes
from tests.forks import forks
from tests.unchanged import unchanged

QUICK = {"tangent": {"iterations": 4}}


UNCHECKED = Measures(pixels=False)


def evaluate(net, images, labels, head="3", **arguments):
    """Attack a network whose head has this name, if it is there."""
    if all(name in dict(net.named_modules()) for name in ([head] if head else [])):
        net = FeatureSpace.of(net, head=head, input_size=images.shape[1:])
    arguments = {"attacks": QUICK, "progress": False, **arguments}
    return evaluate_robustness(net, (images, labels), **arguments)


def without_times(content):
    text = json.loads(json.dumps(content))
    text.pop("wall_seconds")
    text.pop("stage_seconds")
    for attack in text["attacks"].values():
        attack.pop("wall_seconds")
    return text


def test_the_numbers_are_those_of_the_per_image_results(trained):
    report = evaluate(*trained, attacks={**QUICK, "pgd-l2": {"steps": 10}}, eps=[0.1, 0.3, 0.6])
    content, images = report.content, report.images
    net, pixels, labels = trained
    correct = (net(pixels).argmax(1) == labels).numpy()
    assert content["clean"]["accuracy"]["value"] == pytest.approx(correct.mean())
    assert np.array_equal(images["correct"], correct)
    tangent = content["attacks"]["tangent"]
    distances = images["tangent/distances"]
    assert tangent["distance"]["mean"]["value"] == pytest.approx(distances[correct].mean())
    assert tangent["distance"]["n"] == correct.sum()
    assert (distances[~correct] == 0).all()
    assert tangent["queries"] == images["tangent/queries"].sum()
    worst = np.minimum(distances, images["pgd-l2/distances"])
    for point in content["worst_case"]:
        assert point["value"] == pytest.approx((correct & (worst > point["eps"])).mean())
        low, high = point["ci"]
        assert low <= point["value"] <= high
    assert content["lower_bound"]["mean"]["value"] < tangent["distance"]["mean"]["value"]
    assert (images["certified"] <= distances + 1e-6).all()
    assert [layer["name"] for layer in content["layers"]] == ["1"]


def test_the_model_is_left_as_it_was(trained):
    net, images, labels = trained
    with unchanged(net, images[:20]):
        evaluate(net, images[:20], labels[:20], attacks={"pgd-l2": {"steps": 3}})
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_an_interrupted_evaluation_goes_on_to_the_same_report(trained, tmp_path):
    arguments = {"batch_size": 16, "attacks": {**QUICK, "pgd-l2": {"steps": 5}}}
    whole = evaluate(*trained, output=tmp_path / "whole", **arguments)
    again = evaluate(*trained, output=tmp_path / "cut", **arguments)
    chunks = sorted((tmp_path / "cut/chunks").glob("*.npz"))
    kept = chunks[0].read_bytes(), chunks[0].stat().st_mtime_ns
    for chunk in chunks[3::2]:
        chunk.unlink()
    resumed = evaluate(*trained, output=tmp_path / "cut", **arguments)
    assert (chunks[0].read_bytes(), chunks[0].stat().st_mtime_ns) == kept
    expected = without_times(whole.content)
    assert without_times(again.content) == without_times(resumed.content) == expected
    for key, values in whole.images.items():
        assert np.array_equal(values, resumed.images[key]), key


def test_two_processes_share_the_images_out(trained, tmp_path):
    net, images, labels = trained
    arguments = {"batch_size": 16, "output": tmp_path}
    with pytest.raises(EvaluationError, match="cannot be read"):  # the other one has not worked
        evaluate(net, images, labels, processes=Processes(0, 2), **arguments)
    first = {p.name for p in (tmp_path / "chunks").glob("*.npz")}
    assert len(first) == 4  # of 7 chunks
    context, found = forks(), []
    barrier = context.Barrier(2, timeout=60)
    for rank in range(2):
        receive, send = context.Pipe(duplex=False)
        context.Process(target=share, args=(rank, barrier, trained, arguments, send)).start()
        send.close()
        found.append(receive)
    found = [receive.recv() for receive in found]
    assert len(list((tmp_path / "chunks").glob("*.npz"))) == 2 * 7
    expected = without_times(evaluate(*trained, batch_size=16).content)
    assert [without_times(content) for content in found] == [expected] * 2


def share(rank, barrier, trained, arguments, send):
    """One of two processes that share the images out; sends what its report says."""
    torch.set_num_threads(1)
    report = evaluate(*trained, processes=Processes(rank, 2, barrier.wait), **arguments)
    send.send(report.content)


def test_a_rank_beyond_the_processes_is_an_error():
    with pytest.raises(EvaluationError, match=r"rank \(2\) must be"):
        Processes(2, 2)


def test_chunks_of_a_black_box_attack_are_small(trained, tmp_path):
    """So that little is lost when it is stopped, whatever the batch of the others is."""
    evaluate(*trained, attacks={**QUICK, "pgd-l2": {"steps": 3}}, output=tmp_path, batch_size=50)
    names = [p.name.partition("-0")[0] for p in (tmp_path / "chunks").glob("*.npz")]
    assert {n: names.count(n) for n in ("clean", "tangent", "pgd-l2")} == {
        "clean": 2,
        "tangent": 7,
        "pgd-l2": 2,
    }


@pytest.mark.parametrize(("count", "batch_size"), [(17, 64), (3, 2), (1, 64)])
def test_a_last_chunk_of_one_image_is_attacked(trained, count, batch_size):
    net, images, labels = trained
    right = net(images).argmax(1) == labels
    attacks = {"tangent": {"iterations": 1}, "pgd-l2": {"steps": 2}}
    arguments = {"attacks": attacks, "batch_size": batch_size, "measures": UNCHECKED}
    report = evaluate(net, images[right][:count], labels[right][:count], **arguments)
    assert (report.images["tangent/distances"] > 0).all()


class Noisy(nn.Module):
    """Answers of which some change from call to call, as with noise on the input."""

    def __init__(self, net, noise):
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, x):
        return self.net(x + self.noise * torch.randn_like(x))


@pytest.mark.parametrize("noise", [0.3, 0.01])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-3, 0), (1, 1e3)])
def test_random_answers_are_refused_at_any_scale_of_the_logits(trained, noise, scale, offset):
    net, images, labels = trained
    noisy = Noisy(nn.Sequential(net, Affine(scale, offset)), noise)
    with pytest.raises(ClassifierError, match="other logits for the same images a second time"):
        evaluate(noisy, images, labels)


class Affine(nn.Module):
    def __init__(self, scale, offset):
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, logits):
        return self.scale * logits + self.offset


def test_statistics_of_the_batch_are_refused(trained):
    net, images, labels = trained
    norm = nn.BatchNorm2d(1, track_running_stats=False)
    with pytest.raises(ClassifierError, match=r"in other batches .*running statistics"):
        evaluate(nn.Sequential(norm, net), images, labels, measures=UNCHECKED)


def test_an_encoder_without_a_head_is_refused():
    model = SpecRegModel.from_timm("mlp_2000", num_classes=0, input_size=(1, 8, 8), img_size=8)
    with pytest.raises(ClassifierError, match="an encoder without a head"):
        evaluate_robustness(model, "digits", attacks=QUICK)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_whatever_the_caller_switched_off(trained, off):
    net, images, labels = trained
    with off():
        report = evaluate(net, images[:10] + 0, labels[:10], attacks={"pgd-l2": {"steps": 2}})
    assert report.content["n"] == 10


def test_a_model_without_gradients_is_refused_before_white_box_attacks_alone(trained):
    net, images, labels = trained

    class Detached(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return net(x)

    with pytest.raises(ClassifierError, match=r"gradient in the image .*black-box attacks alone"):
        evaluate(Detached(), images, labels, attacks={"pgd-l2": {}})
    report = evaluate(Detached(), images[:10], labels[:10], attacks={"tangent": {"iterations": 1}})
    assert report.content["n"] == 10


def test_finished_attacks_are_kept_whatever_the_others_are(trained, tmp_path):
    arguments = {"output": tmp_path, "samples": 10, "measures": UNCHECKED}
    tangent, pgd = {"tangent": {"iterations": 1}}, {"pgd-l2": {"steps": 2}}
    first = evaluate(*trained, attacks=tangent, **arguments)
    chunk = tmp_path / "chunks/tangent-0000000.npz"
    kept = chunk.stat().st_mtime_ns
    both = evaluate(*trained, attacks={**pgd, **tangent}, **arguments)
    assert chunk.stat().st_mtime_ns == kept
    key = "tangent/distances"
    assert np.array_equal(first.images[key], both.images[key])
    evaluate(*trained, attacks=pgd, **arguments)
    for other in ({"tangent": {"iterations": 2}}, {"pgd-l2": {"steps": 3}}):
        with pytest.raises(EvaluationError, match=f"chunks of {next(iter(other))} with other se"):
            evaluate(*trained, attacks=other, **arguments)
    chunk.unlink()
    evaluate(*trained, attacks={"tangent": {"iterations": 2}}, **arguments)


def test_a_model_is_found_by_its_path(tmp_path):
    model = SpecRegModel.from_timm("mlp_2000", input_size=(1, 8, 8), img_size=8, hidden_features=8)
    model.save_pretrained(tmp_path)
    options = {"attacks": QUICK, "samples": 3, "progress": False, "measures": UNCHECKED}
    assert evaluate_robustness(tmp_path, "digits", **options).name == str(tmp_path)


def test_images_that_change_under_an_evaluation_are_noticed(trained, tmp_path):
    net, images, labels = trained
    images, labels = images.repeat(4, 1, 1, 1)[:300], labels.repeat(4)[:300]
    arguments = {"output": tmp_path, "attacks": {"tangent": {"iterations": 1}}}
    evaluate(net, images, labels, **arguments)
    for chunk in (tmp_path / "chunks").glob("tangent-*.npz"):
        chunk.unlink()
    looked_at = draw(300, CHECK_IMAGES, 0)
    changed = images.clone()
    changed[np.setdiff1d(np.arange(300), looked_at)] *= 0.9  # none that is looked at first
    with pytest.raises(EvaluationError, match="are others than when the evaluation began"):
        evaluate(net, changed, labels, **arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": 0.5}, "must be a list"),
        ({"eps": {"l2": 0.5}}, r"eps of l2 \(0.5\) must be a list of numbers"),
        ({"eps": ["a"]}, r"eps of l2 must be positive numbers, not \['a'\]"),
        ({"attacks": []}, "must be attacks"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_are_none_are_errors_that_name_them(trained, wrong, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(*trained, **wrong)


def test_what_is_correct_is_judged_once(trained, monkeypatch):
    """Else an image at the boundary is correct in one stage and at distance 0 in another."""
    judged, judge = [], Classifier.judge

    def watched(self, images, labels):
        judged.append(len(images))
        return judge(self, images, labels)

    monkeypatch.setattr(Classifier, "judge", watched)
    evaluate(*trained, attacks={**QUICK, "pgd-l2": {"steps": 3}})
    assert sum(judged) == len(trained[1])


def test_chunks_of_another_state_of_the_code_are_not_mixed_in(trained, tmp_path, monkeypatch):
    net, images, labels = trained
    first = evaluate(net, images[:10], labels[:10], output=tmp_path)
    assert len(first.content["versions"]["hf-specreg source"]) == 12
    monkeypatch.setattr(provenance, "_source", lambda: "0" * 12)
    with pytest.raises(EvaluationError, match="with other versions"):
        evaluate(net, images[:10], labels[:10], output=tmp_path)


def test_the_time_of_every_stage_is_stated(trained):
    report = evaluate(*trained, samples=20, attacks={**QUICK, "pgd-l2": {"steps": 3}})
    seconds = report.content["stage_seconds"]
    assert list(seconds) == ["clean", "tangent", "pgd-l2", "masking"]
    assert sum(seconds.values()) == report.content["wall_seconds"]


def test_another_evaluations_folder_is_refused(trained, tmp_path):
    net, images, labels = trained
    evaluate(net, images[:10], labels[:10], output=tmp_path)
    with pytest.raises(EvaluationError, match=r"with other seed: take another output"):
        evaluate(net, images[:10], labels[:10], output=tmp_path, seed=1)
    with pytest.raises(EvaluationError, match=r"with other data, .*rows_sha256"):
        evaluate(net, images[:9], labels[:9], output=tmp_path)
    with pytest.raises(EvaluationError, match="with other first_images_sha256"):
        evaluate(net, 0.99 * images[:10], labels[:10], output=tmp_path)
    with pytest.raises(EvaluationError, match=r"with other .*first_logits_sha256"):
        evaluate(Stairs(net), images[:10], labels[:10], output=tmp_path, head=())


def test_a_broken_chunk_is_named(trained, tmp_path):
    net, images, labels = trained
    evaluate(net, images[:10], labels[:10], output=tmp_path)
    chunk = tmp_path / "chunks/tangent-0000000.npz"
    chunk.write_bytes(chunk.read_bytes()[:400])
    with pytest.raises(EvaluationError, match=r"tangent-0000000.npz cannot be read.*delete it"):
        evaluate(net, images[:10], labels[:10], output=tmp_path)


def test_samples_are_drawn_by_the_seed(trained):
    first, again, other = (evaluate(*trained, samples=10, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.images["row"], again.images["row"])
    assert not np.array_equal(first.images["row"], other.images["row"])
    assert without_times(first.content) == without_times(again.content)


class Brightness(nn.Module):
    """Tells four levels of brightness apart, once its pixels are turned back into [0, 1]."""

    def __init__(self, undo):
        super().__init__()
        self.undo = undo

    def forward(self, images):
        levels = torch.tensor([0.2, 0.4, 0.6, 0.8])
        return -100 * (self.undo(images).mean((1, 2, 3))[:, None] - levels).square()


@pytest.fixture
def levels():
    labels = torch.arange(100) % 4
    noise = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return 0.2 + 0.2 * labels[:, None, None, None] + 0.1 * (noise - 0.5), labels


@pytest.mark.parametrize(
    ("undo", "name"),
    [
        (lambda x: x / 255, r"8-bit pixels in \[0, 255\]"),
        (lambda x: (x + 1) / 2, r"pixels in \[-1, 1\]"),
        (lambda x: 0.22 * x + 0.5, "normalised by their own mean"),
    ],
    ids=["8-bit", "signed", "normalised"],
)
def test_a_model_that_expects_other_pixels_is_caught(levels, undo, name):
    with pytest.raises(ClassifierError, match=f"{name}.*put the normalisation inside"):
        evaluate(Brightness(undo), *levels)
    report = evaluate(Brightness(undo), *levels, samples=20, measures=UNCHECKED)
    assert report.content["layers"] == []
    assert "cannot find the head" in report.content["lower_bound"]["unavailable"]


def test_a_model_that_takes_unit_pixels_passes_the_check(levels):
    assert evaluate(Brightness(lambda x: x), *levels).content["clean"]["correct"] == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (255 * x, y), r"pixels go from .* not from 0 to 1"),
        (lambda x, y: (x - 0.5, y), "pixels go from -"),
        (lambda x, y: (x.index_fill(0, torch.tensor([3]), torch.nan), y), "NaN"),
        (lambda x, y: (x, y + 1), "labels go from 1 to 4, but the model has 4"),
        (lambda x, y: (x[:, :, :7], y), "cannot be run on images"),
        (lambda x, y: (x[:0], y[:0]), "no images"),
        (lambda x, y: (x, y[:90]), "images and labels must be as many, not 100 and 90"),
    ],
    ids=["8-bit", "shifted", "nan", "labels", "size", "empty", "lengths"],
)
def test_images_and_labels_that_do_not_fit_are_named(trained, change, message):
    net, images, labels = trained
    with pytest.raises((ClassifierError, EvaluationError), match=message):
        evaluate(net, *change(images, labels))


def test_a_part_of_a_torch_dataset_is_a_data_set(trained):
    net, images, labels = trained
    part = torch.utils.data.Subset(torch.utils.data.TensorDataset(images, labels), range(0, 20, 2))
    report = evaluate_robustness(net, part, attacks=QUICK, progress=False)
    assert report.images["label"].tolist() == labels[:20:2].tolist()
    pictures = [(Image.new("L", (8, 8)), 0), (Image.new("L", (8, 8)), 1)]
    with pytest.raises(EvaluationError, match="gives Image, not tensors"):
        evaluate_robustness(net, pictures, attacks=QUICK)


def test_a_layer_that_cannot_be_analysed_does_not_cost_the_report(trained):
    net, images, labels = trained
    broken = copy.deepcopy(net)
    broken[1].weight.data[0, 0] = torch.nan
    report = evaluate(broken, images[:10], labels[:10], measures=UNCHECKED)
    assert report.content["layers"][0]["sigma"] is None
    assert "did not converge" in report.content["lower_bound"]["unavailable"]
    assert report.content["clean"]["invalid"] == 10


def test_a_network_with_a_module_called_head_is_no_surprise(trained):
    _, images, labels = trained

    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.head = nn.Flatten(), nn.Linear(64, 4)

        def forward(self, x):
            return self.head(self.flat(x))

    arguments = {"attacks": QUICK, "progress": False, "measures": UNCHECKED}
    report = evaluate_robustness(Headed(), (images, labels), **arguments)
    assert "pass head=" in report.content["lower_bound"]["unavailable"]


def test_nothing_is_left_on_the_model(trained):
    net, images, labels = trained
    evaluate(net, images[:10], labels[:10])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_images_are_sent_to_where_the_model_is(trained):
    """The model may be elsewhere than the data; here a device without values stands for a GPU."""
    net, images, _ = trained
    classifier = Classifier(copy.deepcopy(net).to("meta"))
    assert classifier(images).device.type == "meta"
    assert Classifier(copy.deepcopy(net).double())(images).dtype == torch.float32


def test_eight_bit_pixels_of_a_torch_dataset_are_scaled(trained):
    net, images, labels = trained
    pixels = (255 * images).round().to(torch.uint8)
    rows = [(image, int(label)) for image, label in zip(pixels, labels, strict=True)]
    report = evaluate_robustness(net, rows, attacks=QUICK, progress=False)
    assert report.content["clean"]["accuracy"]["value"] > 0.9


def test_eps_must_fit_the_attacks(trained):
    net, images, labels = trained
    both = ["pgd-l2", "pgd-linf"]
    with pytest.raises(EvaluationError, match="of several norms"):
        evaluate(net, images, labels, attacks=both, eps=[0.1])
    with pytest.raises(EvaluationError, match="must be positive"):
        evaluate(net, images, labels, eps=[0.0])
    with pytest.raises(EvaluationError, match="known are l2, linf"):
        evaluate(net, images, labels, eps={"l1": [0.1]})
    report = evaluate(
        net, images[:10], labels[:10], attacks=both, eps={"l2": [0.2], "linf": [0.02]}
    )
    assert [(p["norm"], p["eps"]) for p in report.content["worst_case"]] == [
        ("l2", 0.2),
        ("linf", 0.02),
    ]


class NaNOnSome(nn.Module):
    def __init__(self, net, threshold):
        super().__init__()
        self.net, self.threshold = net, threshold

    def forward(self, images):
        bad = images[:, 0, 0, 0] > self.threshold
        return torch.where(bad[:, None], torch.nan, self.net(images))


def test_nan_is_counted_as_wrong_and_does_not_spread(trained):
    net, images, labels = trained
    threshold = images[:, 0, 0, 0].sort().values[-5].item()  # 4 images lie above
    report = evaluate(NaNOnSome(net, threshold), images, labels, head=())
    assert report.content["clean"]["invalid"] == 4
    assert not report.images["correct"][images[:, 0, 0, 0] > threshold].any()
    assert any(flag.startswith("4 images have logits") for flag in report.content["flags"])
    assert np.isfinite(report.images["tangent/distances"][report.images["correct"]]).all()


def test_a_model_that_is_always_wrong_is_reported_not_attacked(trained):
    net, images, _ = trained
    wrong = (net(images).argmax(1) + 1) % 4
    report = evaluate(net, images, wrong, attacks={**QUICK, "pgd-l2": {}}, measures=UNCHECKED)
    assert report.content["clean"]["accuracy"]["value"] == 0
    assert report.content["attacks"]["tangent"]["distance"]["mean"]["value"] is None
    assert report.content["flags"] == ["no image is classified correctly: nothing was attacked"]


class Stairs(nn.Module):
    """The same decisions, with no gradient to follow."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net((64 * images).round() / 64)


def test_masked_gradients_are_flagged_and_honest_ones_are_not(trained):
    net, images, labels = trained
    attacks = {"tangent": {"iterations": 10}, "pgd-l2": {}}
    eps = [0.3, 1.0, 2.0]
    honest = evaluate(net, images, labels, attacks=attacks, eps=eps)
    assert not any(flag.startswith("gradient masking") for flag in honest.content["flags"])
    masked = evaluate(Stairs(net), images, labels, attacks=attacks, eps=eps, head=())
    flags = " ".join(masked.content["flags"])
    assert "black-box attacks break" in flags
    assert "gradient of exactly zero" in flags
    assert "withstand PGD of unbounded eps" in flags
    assert "PGD does not improve with steps" in flags


def test_accuracy_under_corruptions_is_reported(trained):
    report = evaluate(*trained, samples=40, measures=Measures(corruptions=True))
    found = report.content["corruptions"]
    assert len(found["by_kind"]) == 6
    values = [p["value"] for points in found["by_kind"].values() for p in points]
    assert len(values) == 30
    assert found["mean"]["value"] == pytest.approx(np.mean(values))


def test_an_accuracy_under_corruptions_of_all_images_is_not_certain(trained):
    class Same(nn.Module):
        def forward(self, x):
            zero = 0 * x.flatten(1).sum(1)
            return torch.stack([zero + 1, zero], 1)

    images = trained[1][:12]
    measures = Measures(corruptions=True, pixels=False)
    report = evaluate(Same(), images, torch.zeros(12, dtype=torch.long), measures=measures)
    assert report.content["corruptions"]["mean"] == {"value": 1.0, "ci": [None, None]}
    assert "(6 kinds, 5 severities): 100.0 %\n" in report.to_markdown()


def test_an_image_set_with_pictures_is_read_by_the_models_preprocessing():
    model = SpecRegModel.from_timm("resnet20_cifar", num_classes=2, input_size=(3, 16, 16))
    pictures = [Image.new("RGB", (20, 24), (10 * i, 60, 90)) for i in range(12)]
    rows = {"image": pictures, "label": [0, 1] * 6}
    arguments = {"attacks": {"tangent": {"iterations": 1}}, "progress": False}
    report = evaluate_robustness(
        model,
        datasets.Dataset.from_dict(rows),
        measures=Measures(pixels=False, fold_norm=True),
        **arguments,
    )
    assert report.content["model"]["input_size"] == [3, 16, 16]
    assert report.content["n"] == 12
    assert len(report.content["layers"]) == 21
    assert sum("sigma_folded" in layer for layer in report.content["layers"]) == 21
    assert "unavailable" in report.content["lower_bound"]
    missing = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1] * 6})
    with pytest.raises(EvaluationError, match=r"not \['image'\]: rename_columns"):
        evaluate_robustness(model, missing, **arguments)


def test_models_and_data_are_found_by_name():
    arguments = {"attacks": {"tangent": {"iterations": 1}}, "samples": 8, "progress": False}
    four_channels = torch.rand(8, 4, 8, 8), torch.arange(8)
    with pytest.raises(ClassifierError, match="cannot be run on images"):
        evaluate_robustness("resnet20_cifar", four_channels, **arguments)
    with pytest.raises(FileNotFoundError, match="neither a folder, a Hub id"):
        evaluate_robustness("no_such_network", "digits", **arguments)
    with pytest.raises(DataError, match="must be train, validation or test"):
        evaluate_robustness("resnet20_cifar", ImageSet("digits", "dev"), **arguments)
    report = evaluate_robustness("resnet20_cifar", "digits", measures=UNCHECKED, **arguments)
    assert report.content["data"]["id"] == "digits"
    assert report.content["data"]["split"] == "test"
    assert report.content["model"]["id"] == "resnet20_cifar"


def test_the_warnings_of_an_attacks_library_are_flags(trained):
    net, images, labels = trained

    class Rounded(nn.Module):
        def forward(self, images):
            return (50 * images).round() / 50 + 0 * images

    attacks = {"autoattack-l2": {"attacks": ["apgd-t"]}}
    flat = nn.Sequential(Rounded(), *net).eval()
    report = evaluate(flat, images, labels, attacks=attacks, eps=[0.1], head="4", batch_size=50)
    said = [f for f in report.content["flags"] if f.startswith("autoattack-l2, on at least one")]
    assert len(said) == 1
    assert "zero gradient" in said[0]


def test_a_set_given_by_name_is_split_as_the_model_was_trained():
    size = (1, 8, 8)
    model = SpecRegModel.from_timm("mlp_2000", input_size=size, img_size=8, hidden_features=8)
    arguments = {"attacks": QUICK, "samples": 5, "progress": False}
    for settings in ({"validation_fraction": 0.3}, {"split_seed": 1, "validation_fraction": 0.2}):
        model.metadata = {"config": {"data": {"source": "digits", **settings}}}
        seed = settings.get("split_seed", 0)
        own = load_splits("digits", validation_fraction=settings["validation_fraction"], seed=seed)
        report = evaluate_robustness(model, "digits", **arguments)
        data = report.content["data"]
        assert data["images"] == len(own.test)
        labels = np.asarray(own.test["label"])[report.images["row"]]
        assert np.array_equal(report.images["label"], labels)
        assert not any("cut from the training split" in f for f in report.content["flags"])
    trained = set(own.train["row"])
    other = load_splits("digits", validation_fraction=0.3, seed=2)
    assert trained & set(other.test["row"])  # which is why the cut must be the model's own


def test_a_cut_that_may_not_be_the_models_own_is_said():
    model = SpecRegModel.from_timm("mlp_2000", input_size=(1, 8, 8), img_size=8, hidden_features=8)
    arguments = {"attacks": QUICK, "samples": 5, "progress": False}
    report = evaluate_robustness(model, "digits", **arguments)
    assert any("cut from the training split of digits" in f for f in report.content["flags"])
    report = evaluate_robustness(model, ImageSet("digits", options={"seed": 3}), **arguments)
    assert any("cut from the training split of digits" in f for f in report.content["flags"])
    chosen = {"validation_fraction": 0.2, "seed": 3}
    report = evaluate_robustness(model, ImageSet("digits", options=chosen), **arguments)
    assert report.content["data"]["splits"] == chosen
    assert report.content["data"]["cut"]
    assert "(cut from its training split)" in report.to_markdown()
    assert not any("cut from" in f for f in report.content["flags"])
    with pytest.raises(DataError, match=r"splits .*fraction.* must be arguments of load_spl"):
        evaluate_robustness(model, ImageSet("digits", options={"fraction": 0.2}), **arguments)


def test_images_that_an_earlier_training_saw_are_counted():
    model = SpecRegModel.from_timm("mlp_2000", input_size=(1, 8, 8), img_size=8, hidden_features=8)
    arguments = {"attacks": QUICK, "samples": 5, "progress": False}
    last, first = ({"config": {"data": {"source": "digits", "split_seed": s}}} for s in (1, 0))
    between = {"config": {"data": {"source": "org/images"}}}
    model.metadata = {**last, "before": {**between, "before": first}}
    flags = evaluate_robustness(model, "digits", **arguments).content["flags"]
    before, now = load_splits("digits", seed=0), load_splits("digits", seed=1)
    seen = len(set(before.train["row"]) & set(now.test["row"]))
    said = f"an earlier training of the model saw {seen} of the {len(now.test)} images of the test"
    assert [f.startswith(said) for f in flags if "seen" in f or "saw" in f] == [True]
    model.metadata = {**between, "before": last}
    report = evaluate_robustness(model, "digits", **arguments)
    assert report.content["data"]["splits"] == {"seed": 1}
    assert not any("seen" in f or "saw" in f for f in report.content["flags"])
    model.metadata = {"config": {"seed": 0}, "before": last}
    flags = evaluate_robustness(model, "digits", **arguments).content["flags"]
    assert any("cut from the training split of digits" in f for f in flags)


def test_what_is_given_of_the_split_adds_to_what_the_training_says():
    model = SpecRegModel.from_timm("mlp_2000", input_size=(1, 8, 8), img_size=8, hidden_features=8)
    settings = {"source": "digits", "validation_fraction": 0.3, "split_seed": 1}
    model.metadata = {"config": {"data": settings}}
    arguments = {"attacks": QUICK, "samples": 5, "progress": False}
    report = evaluate_robustness(
        model, ImageSet("digits", options={"label_column": "label"}), **arguments
    )
    expected = {"label_column": "label", "validation_fraction": 0.3, "seed": 1}
    assert report.content["data"]["splits"] == expected
    assert not any("cut from" in f for f in report.content["flags"])
    report = evaluate_robustness(model, ImageSet("digits", options={"seed": 2}), **arguments)
    assert any("cut from" in f for f in report.content["flags"])
    model.metadata["config"]["data"]["streaming"] = True
    with pytest.raises(DataError, match="trained on a stream of digits, which has no test"):
        evaluate_robustness(model, "digits", **arguments)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: x[350].fill_(torch.nan), "NaN or infinite"),
        (lambda x, y: x[350].add_(1), "not from 0 to 1"),
        (lambda x, y: y[350:351].fill_(9), "labels go from 0 to 9"),
    ],
    ids=["nan", "box", "label"],
)
def test_every_image_is_checked_whatever_the_model_takes(trained, spoil, message):
    net, images, labels = trained
    images, labels = images.repeat(4, 1, 1, 1), labels.repeat(4)
    spoil(images, labels)
    with pytest.raises(ClassifierError, match=message):
        evaluate(net, images, labels, measures=UNCHECKED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_of_a_module_and_lifted_of_a_folder(trained, dtype, tmp_path):
    net, images, labels = trained
    with pytest.raises(ClassifierError, match=r"float16.*give model\.float\(\)"):
        evaluate(copy.deepcopy(net).to(dtype), images[:10], labels[:10])
    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_attention_heads": 1}
    widths = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    model = SpecRegModel.from_transformers(transformers.ViTConfig(**size, **widths), num_classes=4)
    model.to(dtype).save_pretrained(tmp_path)
    lifted = SpecRegModel.from_pretrained(tmp_path)
    assert {p.dtype for p in lifted.parameters()} == {torch.float32}
    options = {"attacks": QUICK, "progress": False, "measures": UNCHECKED}
    report = evaluate_robustness(str(tmp_path), (images[:10], labels[:10]), **options)
    assert report.content["model"]["weights_sha256"] == weights_sha256(lifted)


def test_the_bound_is_a_certificate_only_of_exact_singular_values(trained):
    net, images, labels = trained
    exact = evaluate(net, images[:10], labels[:10]).content["lower_bound"]
    assert exact["exact"]
    assert exact["factors"]["1"] == pytest.approx(
        torch.linalg.matrix_norm(net[1].weight.double(), 2).item(), rel=1e-9
    )
    convolves = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    found = evaluate(convolves, images[:40], labels[:40], measures=UNCHECKED)
    assert found.content["lower_bound"]["exact"] is False


def test_there_is_no_bound_of_a_network_inside_unknown_arithmetic(trained):
    net, images, labels = trained

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = net

        def forward(self, x):
            return self.network(255 * x)

    arguments = {"head": "network.3", "measures": UNCHECKED}
    found = evaluate(Wrapper(), images[:10], labels[:10], **arguments)
    assert "mul is not known" in found.content["lower_bound"]["unavailable"]
    assert found.content["layers"]
