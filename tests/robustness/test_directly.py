"""On a trained network, results are those of the libraries' own calls."""

import foolbox
import numpy as np
import pyautoattack
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from hf_specreg import evaluate_robustness
from hf_specreg.data.transforms import derived_seed
from hf_specreg.robustness.attacks import make_attacks
from hf_specreg.robustness.classifier import Classifier

EPS = {"l2": [0.2, 0.4, 0.8], "linf": [0.03, 0.06, 0.12]}


@pytest.fixture(scope="module")
def digits():
    """A small convolutional network, trained on half of the digits; of the others, the first."""
    torch.manual_seed(0)
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    labels = torch.from_numpy(found.target)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[::2]), labels[::2]).backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    images, labels = images[1::2][:48], labels[1::2][:48]
    assert (net(images).argmax(1) == labels).float().mean() > 0.9
    return net, images, labels


def ours(digits, name, **settings):
    """Each image's distance, and which images were attacked."""
    net, *data = digits
    attacks, eps = {name: settings}, EPS["linf" if name.endswith("linf") else "l2"]
    report = evaluate_robustness(net, tuple(data), attacks=attacks, eps=eps, progress=False)
    return report.images[f"{name}/distances"], torch.from_numpy(report.images["correct"])


def falls_at(eps, attack, images):
    """The smallest eps at which each image falls to a direct call."""
    distances = np.full(len(images), np.inf, np.float32)
    for e in eps:
        standing = np.isinf(distances)
        if standing.any():
            torch.manual_seed(derived_seed(0, 0))
            fallen = attack(torch.from_numpy(standing), e)
            distances[np.flatnonzero(standing)[fallen.numpy()]] = e
    return distances


@pytest.mark.parametrize(
    ("name", "norm", "kind"),
    [
        ("pgd-l2", "l2", foolbox.attacks.L2ProjectedGradientDescentAttack),
        ("pgd-linf", "linf", foolbox.attacks.LinfProjectedGradientDescentAttack),
    ],
)
def test_pgd_breaks_the_images_that_foolbox_breaks(digits, name, norm, kind):
    net, images, labels = digits
    found, correct = ours(digits, name, steps=20)
    images, labels = images[correct], labels[correct]
    model = foolbox.PyTorchModel(net, bounds=(0, 1))
    attack = kind(steps=20, rel_stepsize=0.1, random_start=True)

    def direct(standing, e):
        x, y = images[standing], labels[standing]
        return net(attack.run(model, x, y, epsilon=e)).argmax(1) != y

    expected = falls_at(EPS[norm], direct, images)
    assert len(set(expected)) == 4  # images fall at each eps, and some at none
    assert np.array_equal(found[correct.numpy()], expected)


def test_deepfool_finds_what_foolbox_finds_pulled_back_to_the_boundary(digits):
    net, images, labels = digits
    found, correct = ours(digits, "deepfool-l2")
    model = foolbox.PyTorchModel(net, bounds=(0, 1))
    x, y = images[correct], labels[correct]
    goal = foolbox.criteria.Misclassification(y)
    points = foolbox.attacks.L2DeepFoolAttack(steps=50, overshoot=0.02).run(model, x, goal)
    distances = (points - x).flatten(1).norm(dim=1).numpy()
    fooled = (net(points).argmax(1) != y).numpy()
    nearer = found[correct.numpy()]
    assert np.array_equal(np.isfinite(nearer), fooled)
    ratios = nearer[fooled] / distances[fooled]
    assert ratios.max() <= 1 + 1e-6
    assert np.median(ratios) > 0.95  # the overshoot of 2 %, and the last of its steps
    half = x + (points - x) * torch.from_numpy(0.999 * nearer / distances)[:, None, None, None]
    assert (net(half).argmax(1) == y)[torch.from_numpy(fooled)].float().mean() > 0.9


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_autoattack_breaks_the_images_that_its_authors_code_breaks(digits, norm):
    net, images, labels = digits
    names = ["apgd-ce", "apgd-t"]
    digits = net, images[:24], labels[:24]
    found, correct = ours(digits, f"autoattack-{norm}", attacks=names)
    images, labels = digits[1:]
    images, labels = images[correct], labels[correct]

    def direct(standing, e):
        x, y = images[standing], labels[standing]
        attack = pyautoattack.AutoAttack(
            net,
            norm={"l2": "L2", "linf": "Linf"}[norm],
            eps=e,
            seed=derived_seed(0, 0) % 2**31,
            version="custom",
            attacks=names,
            device="cpu",
        )
        attack.apgd.n_restarts, attack.apgd_targeted.n_target_classes = 1, 9
        points, _ = attack.run_standard_evaluation(x, y, batch_size=250)
        return net(points).argmax(1) != y

    expected = falls_at(EPS[norm], direct, images)
    assert len(set(expected)) >= 3
    assert np.array_equal(found[correct.numpy()], expected)


def test_attacks_of_gradients_fill_no_batch_up(digits):
    """What they decide is decided again afterwards, so it may be of other company."""
    net, images, labels = digits
    rows = []
    hook = net.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    correct = (net(images).argmax(1) == labels).nonzero()[:2, 0]
    for name in ("pgd-l2", "deepfool-l2"):
        (attack,) = make_attacks([name]).values()
        classifier, seen = Classifier(net), len(rows)
        x, y = images[correct], labels[correct]
        attack.run(classifier, x, y, seeds=[0, 1], eps=[0.2])
        assert 2 in rows[seen:]
        assert rows[-1] == 8  # the decision
    hook.remove()
