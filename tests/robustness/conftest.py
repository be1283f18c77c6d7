import copy

import pytest
import torch
from torch import nn

from hf_specreg import FeatureSpace, evaluate_robustness


@pytest.fixture(scope="session")
def trained():
    """A small network that has learnt an easy task on 8x8 pictures: which quadrant is bright."""
    torch.manual_seed(0)
    images = 0.25 + 0.3 * torch.rand(600, 1, 8, 8)
    labels = torch.arange(600) % 4
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.15
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[100:]), labels[100:]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net.train(), images[:100], labels[:100]


@pytest.fixture(scope="session")
def reports(trained):
    """Of that network and of one that is a little weaker; to be copied before it is changed."""
    net, images, labels = trained
    worse = copy.deepcopy(net)
    worse[3].weight.data[0] *= 0.8
    attacks = {"tangent": {"iterations": 5}, "pgd-l2": {"steps": 5}, "pgd-linf": {"steps": 5}}
    return [
        evaluate_robustness(
            FeatureSpace.of(model, head="3", input_size=(1, 8, 8)),
            (images, labels),
            attacks=attacks,
            name=name,
            progress=False,
        )
        for name, model in (("plain", net), ("weaker", worse))
    ]
