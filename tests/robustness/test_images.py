"""What kinds of images and labels are evaluated, and what is said of the others."""

import datasets
import numpy as np
import pytest
import torch
from torch import nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.robustness.chunks import EvaluationError
from hf_specreg.robustness.images import Images
from hf_specreg.robustness.subject import Subject

N, SIZE = 12, (1, 4, 4)
LABELS = torch.arange(N) % 3


@pytest.fixture
def subject():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    return Subject.of(FeatureSpace.of(net, head="1", input_size=SIZE))


def pixels():
    return torch.rand(N, *SIZE, generator=torch.Generator().manual_seed(0))


def test_images_without_labels_are_refused(subject):
    with pytest.raises(EvaluationError, match=r"images alone have no labels: give \(images, lab"):
        Images(pixels(), subject)


@pytest.mark.parametrize(
    "give",
    [
        lambda x, y: (x.numpy(), y.numpy()),
        lambda x, y: [x, y],
        lambda x, y: (x.numpy(), y.tolist()),
        lambda x, y: [(image, np.int64(label)) for image, label in zip(x, y, strict=True)],
    ],
    ids=["numpy", "list", "labels listed", "pairs"],
)
def test_pairs_of_arrays_are_read_as_pairs_of_tensors(give, subject):
    images, labels = Images(give(pixels(), LABELS), subject).read(np.arange(N))
    assert torch.equal(images, pixels())
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (LABELS[:, None], r"not torch.int64 \(12, 1\): give labels.squeeze\(1\)"),
        (nn.functional.one_hot(LABELS), r"not torch.int64 \(12, 3\): give labels.argmax\(1\)"),
        (LABELS.float(), r"not torch.float32 \(12,\): labels.long\(\)"),
        (np.array(["cat"] * N), "images and labels must be numbers: "),
        ([None] * N, "images and labels must be numbers: "),
        (LABELS[:5], "must be as many, not 12 and 5"),
    ],
    ids=["column", "one-hot", "float", "names", "none", "few"],
)
def test_labels_that_are_no_integer_each_are_refused_with_a_remedy(labels, says, subject):
    with pytest.raises(EvaluationError, match=says):
        Images((pixels(), labels), subject)


@pytest.mark.parametrize("label", [None, "cat", 0.5, torch.tensor([0, 1])])
def test_a_torch_data_set_gives_an_integer_an_image(label, subject):
    with pytest.raises(EvaluationError, match=r"one of each image, not .*target_transform"):
        Images([(image, label) for image in pixels()], subject)


@pytest.mark.parametrize(
    ("labels", "kind", "says"),
    [
        (["cat", "dog"] * 6, datasets.Value("string"), r"cast_column\('label', ClassLabel"),
        ([0.0, 1.0] * 6, datasets.Value("float64"), r"must be integers, not Value\('float64'\)"),
        ([[0], [1]] * 6, datasets.Sequence(datasets.Value("int64")), "must be integers, not List"),
        ([0, None] * 6, datasets.Value("int64"), "6 of the 12 images have no label"),
    ],
    ids=["names", "float", "list", "none"],
)
def test_a_label_column_that_holds_no_classes_is_refused_with_a_remedy(labels, kind, says, subject):
    pictures = [np.zeros((4, 4), np.uint8)] * N
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    with pytest.raises(EvaluationError, match=says):
        Images(rows, subject)


def test_images_are_read_as_they_lie_in_memory_for_every_attack(subject):
    pictures = torch.rand(N, 4, 4, 3).permute(0, 3, 1, 2)
    pairs = [(image, int(label)) for image, label in zip(pictures, LABELS, strict=True)]
    for given in ((pictures, LABELS), ((255 * pictures).byte(), LABELS), pairs):
        assert Images(given, subject).read(np.arange(N))[0].is_contiguous()


@pytest.mark.parametrize(
    ("give", "says"),
    [
        (lambda rows: datasets.DatasetDict(train=rows, test=rows), "its splits, 'train', 'test'"),
        (lambda rows: torch.utils.data.DataLoader(rows), r"a DataLoader .*: give its \.dataset"),
        (lambda rows: rows.to_iterable_dataset(), "load it without streaming"),
    ],
    ids=["splits", "loader", "stream"],
)
def test_what_has_no_rows_is_refused_with_a_remedy(give, says, subject):
    rows = datasets.Dataset.from_dict({"image": [[0.0]] * N, "label": [0] * N})
    with pytest.raises(EvaluationError, match=says):
        Images(give(rows), subject)


@pytest.mark.parametrize("samples", [0, 10.5, "5"])
def test_so_many_samples_are_none(samples, subject):
    with pytest.raises(EvaluationError, match=r"must be an integer of at least 1"):
        Images((pixels(), LABELS), subject, samples=samples)


@pytest.mark.parametrize("kind", ["uint8", "bool", "int64"])
def test_whole_labels_of_any_type_are_taken(kind, subject):
    pictures = [np.zeros((4, 4), np.uint8)] * N
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    columns = {"image": pictures, "label": [0, 1] * 6}
    rows = datasets.Dataset.from_dict(columns, features=features)
    assert Images(rows, subject).read(np.arange(2))[1].tolist() == [0, 1]
