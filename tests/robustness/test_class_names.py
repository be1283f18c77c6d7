"""A data set's classes are found among a model's by name, whatever their numbers."""

import datasets
import pytest
import torch
import transformers
from PIL import Image

from hf_specreg import SpecRegModel, evaluate_robustness
from hf_specreg.encoders.labels import class_names, imagenet_names
from hf_specreg.robustness.class_names import class_order
from hf_specreg.robustness.classifier import ClassifierError
from hf_specreg.robustness.report import RobustnessReport
from tests.tiny import vit_config

LEVELS = {"a": 40, "b": 120, "c": 200}


@pytest.fixture(scope="module")
def model():
    """Tells three levels of brightness apart, by the names a, b and c."""
    torch.manual_seed(0)
    sizes = {"img_size": 4, "hidden_features": 8, "input_size": (1, 4, 4)}
    found = SpecRegModel.from_timm("mlp_2000", num_classes=3, label_names=list(LEVELS), **sizes)
    images = torch.tensor([[v / 255] * 16 for v in LEVELS.values()]).reshape(3, 1, 4, 4)
    optimizer = torch.optim.Adam(found.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(found(images), torch.arange(3)).backward()
        optimizer.step()
    assert found(images).argmax(1).tolist() == [0, 1, 2]
    return found


def evaluated(model, names, *, images=5, used=None):
    """The report of pictures of these classes, numbered in this order."""
    labels = [label for label in range(len(names)) if names[label] in (used or names)] * images
    levels = [LEVELS[names[label][-1].lower()] + i // 3 for i, label in enumerate(labels)]
    rows = {"image": [Image.new("L", (4, 4), level) for level in levels], "label": labels}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    attacks = {"tangent": {"iterations": 3}, "pgd-l2": {"steps": 3}}
    return evaluate_robustness(model, data, attacks=attacks, eps=[0.05], progress=False)


@pytest.mark.parametrize(
    ("names", "moved"),
    [
        (["a", "b", "c"], None),
        (["a", "b"], None),
        (["b", "c"], "label 0, 'b', is the model's class 1"),
        (["0_c", "1_b", "2_a"], "label 0, '0_c', is the model's class 2"),
        (["C", "A"], "label 0, 'C', is the model's class 2"),
    ],
)
def test_a_model_that_is_right_is_found_right_by_the_names_of_its_classes(model, names, moved):
    report = evaluated(model, names)
    assert report.content["clean"]["accuracy"]["value"] == 1
    flags = [flag for flag in report.content["flags"] if "matched by name" in flag]
    assert [flag.endswith(moved) for flag in flags] == ([True] if moved else [])
    assert set(report.images["label"].tolist()) == set(range(len(names)))
    assert (report.images["certified"] > 0).all()
    for attack in ("tangent", "pgd-l2"):
        assert (report.images["certified"] <= report.images[f"{attack}/distances"] + 1e-6).all()


def test_models_that_number_their_classes_differently_are_compared_on_the_same_images(model):
    other = SpecRegModel.from_timm("mlp_2000", num_classes=3, **model.model_args)
    other.load_state_dict(model.state_dict())
    order = [2, 0, 1]
    head = other.network.get_submodule(other.head[0])
    for values in (head.weight.data, head.bias.data):
        values.copy_(values[order].clone())
    other.label_names = [model.label_names[i] for i in order]
    reports = [evaluated(each, ["b", "c"]) for each in (model, other)]
    (first, second) = RobustnessReport.compare(reports).nearest
    assert first["n"] == 10
    assert second["mean"]["value"] == pytest.approx(first["mean"]["value"], rel=1e-5)


def test_a_torch_data_sets_classes_are_names_unless_its_labels_are_changed(model):
    class Folder(torch.utils.data.Dataset):
        classes, target_transform = ["b", "c"], None

        def __len__(self):
            return 2

        def __getitem__(self, i):
            label = self.target_transform(i) if self.target_transform else i
            return torch.full((1, 4, 4), LEVELS[self.classes[i]] / 255), label

    for change in (None, lambda label: label + 1):
        data = Folder()
        data.target_transform = change
        part = torch.utils.data.Subset(data, [1, 0])
        report = evaluate_robustness(
            model, part, attacks={"tangent": {"iterations": 1}}, eps=[0.05], progress=False
        )
        assert report.images["correct"].all()


def test_names_that_contradict_are_an_error_with_the_remedy(model):
    with pytest.raises(ClassifierError, match=r"classes 'xa', which are none of the model's 3, 'a"):
        evaluated(model, ["xa", "b"])
    with pytest.raises(ClassifierError, match=r"'xa'.*ClassLabel\(names=.*splits: \{classes"):
        evaluated(model, ["b", "xa", "c"])
    with pytest.raises(ClassifierError, match=r"label 3, 'c', exceeds the model's 3 classes"):
        evaluated(model, ["xa", "xb", "b", "c"], used=["b", "c"])


def test_names_of_classes_without_images_do_not_matter(model):
    report = evaluated(model, ["a", "b", "xc"], used=["a", "b"])
    assert report.content["clean"]["accuracy"]["value"] == 1


def test_as_many_classes_of_another_spelling_are_a_flag(model):
    report = evaluated(model, ["a", "b", "xc"])
    assert report.content["clean"]["accuracy"]["value"] == 1
    assert any("calls 'xc' what the model calls 'c'" in f for f in report.content["flags"])


@pytest.mark.parametrize(
    ("names", "own", "classes", "order"),
    [
        (["automobile", "cat"], ["car", "cat"], 2, None),
        (["0", "1", "2"], ["cat", "dog", "hen"], 3, None),
        (["cat", "dog", "hen"], ["LABEL_0", "LABEL_1", "LABEL_2"], 3, None),
        (["cat", "dog"], None, 2, None),
        (["cat", "dog"], ["only one logit"], 2, None),
        (["3", "8"], [str(i) for i in range(10)], 10, [3, 8, 0, 1, 2, 4, 5, 6, 7, 9]),
        (["crane", "Ox", "crane"], ["crane", "ox", "crane"], 3, None),
        (["bull", "crow"], ["cow", "crow", "ox, bull"], 3, [2, 1, 0]),
        ([], ["cat", "dog"], 2, None),
    ],
)
def test_labels_are_the_models_numbers_unless_names_say_otherwise(names, own, classes, order):
    assert class_order(names, own, classes=classes)[0] == order


def test_a_name_of_several_classes_tells_nothing():
    with pytest.raises(ClassifierError, match=r"classes 'crane', which are none of the model's 3"):
        class_order(["ox", "crane"], ["crane", "ox", "crane"], classes=3)


def test_labels_of_fewer_classes_without_names_are_said_to_be_taken_as_numbers():
    for names, own in ((["cat", "dog"], None), (["0", "1"], ["cat", "dog", "hen"])):
        order, (said,) = class_order(names, own, classes=3)
        assert order is None
        assert said.startswith("the data set has 2 classes and the model 3, and no names tell")


@pytest.mark.parametrize("names", [["n03000684", "n01440764"], ["chain_saw", "tench"]])
@pytest.mark.parametrize("named", [False, True])
def test_a_subset_of_imagenet_is_found_by_wordnets_ids_and_by_lemmas(names, named):
    own = [", ".join(lemmas) for _, *lemmas in imagenet_names(1000)] if named else None
    order, (said,) = class_order(names, own, classes=1000)
    assert order[:2] == [491, 0]
    assert sorted(order) == list(range(1000))
    assert "label 0" in said


def test_models_of_every_library_state_their_classes(model, tmp_path):
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    assert class_names(transformers.ViTForImageClassification(vit_config(**names))) == [
        "cat",
        "dog",
    ]
    assert class_names(model) == class_names(torch.nn.DataParallel(model)) == list(LEVELS)
    assert class_names(torch.nn.Linear(2, 2)) is None
    assert class_names(SpecRegModel.from_timm("resnet20_cifar")) is None
