import numpy as np
import pytest
import torch
from PIL import Image

from hf_specreg.robustness.nearest import Nearest, moved, nearest_adversarial


class Linear(torch.nn.Module):
    """Two classes by the mean of grey 4x4 pixels, at 0.5: the distance is known."""

    input_size, preprocessing, label_names = (1, 4, 4), {}, ["dark", "light"]

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(8.0))

    def forward(self, images):
        z = self.weight * (images.flatten(1).mean(1) - 0.5)
        return torch.stack([-z, z], 1)


@pytest.fixture(scope="module")
def model():
    return Linear()


def test_the_nearest_of_a_linear_model_is_at_its_known_distance(model):
    picture = Image.new("RGB", (9, 9), (102, 102, 102))  # 0.4; 16 pixels of 0.1 are 0.4 in L2
    with torch.inference_mode():  # in which an attack's gradients must be taken all the same
        found = nearest_adversarial(model, picture, seed=1)
    assert found.norm == "l2"
    assert found.image.shape == (1, 4, 4)
    assert found.distance == pytest.approx(0.4, rel=0.02)
    near, far = moved(model, found, 0.2), moved(model, found, 0.5)
    nearest = f"The nearest that was found is at L2 distance {found.distance:.3f}."
    assert near.said == f"dark; at eps 0.2 still dark. {nearest}"
    assert far.said.startswith("dark becomes light at L2 distance 0.4")
    assert near.before == far.before
    assert near.before["dark"] == pytest.approx(torch.tensor(1.6).sigmoid().item(), abs=1e-4)
    assert near.before["dark"] > near.after["dark"] > 0.5 > far.after["dark"]
    assert near.picture.size == far.difference.size == (256, 256)
    assert np.asarray(moved(model, found, 0.0).difference).std() == 0
    assert np.asarray(far.difference).max() == 255


def test_a_class_that_changes_on_the_way_is_said(model):
    found = Nearest(torch.full((1, 4, 4), 0.4), torch.full((1, 4, 4), 0.6), 0.8, "l2")
    said = moved(model, found, 0.5).said
    assert said.startswith("dark becomes light at eps 0.5 already")


def test_classes_of_one_name_are_told_apart(model):
    twice = Linear()
    twice.label_names = ["crane", "crane"]
    found = Nearest(torch.full((1, 4, 4), 0.4), torch.full((1, 4, 4), 0.6), 0.8, "l2")
    shown = moved(twice, found, 0.5)
    assert list(shown.before) == ["crane (1)", "crane (2)"]
    assert sum(shown.before.values()) == pytest.approx(1)
    assert shown.said.startswith("crane (1) becomes crane (2) at eps 0.5 already")


def test_a_way_ends_at_the_adversarial_image_and_stays_within_eps(model):
    found = nearest_adversarial(model, Image.new("L", (4, 4), 150))
    for eps in (0.0, 0.1, found.distance, 7.0):
        gone = (found.at(eps) - found.image).norm().item()
        assert gone == pytest.approx(min(eps, found.distance), abs=1e-5)
    torch.testing.assert_close(found.at(7.0), found.adversarial)


def test_where_nothing_is_found_nothing_moves(model):
    constant = Linear()
    constant.weight.data.zero_()
    found = nearest_adversarial(constant, Image.new("L", (4, 4), 150), settings={"steps": 3})
    assert found.distance == float("inf")
    assert "no adversarial image" in moved(constant, found, 1.0).said
    assert torch.equal(found.at(1.0), found.image)


def test_an_attack_at_fixed_eps_is_refused(model):
    with pytest.raises(ValueError, match="pgd-l2 looks within a fixed eps: take fmn-l2"):
        nearest_adversarial(model, Image.new("L", (4, 4)), attack="pgd-l2")
