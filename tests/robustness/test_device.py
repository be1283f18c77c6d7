"""Where attacks wait for the device: who is asked next depends on answers, and nothing else does.

Counted with real numbers on the CPU, since decisions are what an attack goes by.
"""

import pytest
import torch
from torch import nn

from hf_specreg.robustness.attacks import make_attacks
from hf_specreg.robustness.attacks.tangent import TangentAttack, _Run
from hf_specreg.robustness.classifier import Classifier, frozen
from tests.fake_device import DEVICE, fake_device, place
from tests.host_reads import host_reads

# Of TangentAttack: before the iterations, and for each of them.
AT_ITS_START = {
    "_Run.run": "which images are adversarial as they are",
    "_Run.start": "which images have a start",
    "_Run.uniform": "whose generators draw",
}
AN_ITERATION = {
    "_Run.step": "which images have a tangent point yet, once a halving of the radius",
    "_Run.estimate_normal": "whose generators draw the probes",
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 3))


def reads_of(name, **settings):
    """How often each function read a number while 4 images were attacked."""
    classifier, images = Classifier(network()), torch.rand(4, 1, 8, 8)
    labels = classifier.predict(images)
    attack = make_attacks({name: settings})[name]
    with frozen(classifier), host_reads() as reads:
        attack.run(classifier, images, labels, seeds=range(4), eps=[0.01])
    return reads


@pytest.mark.parametrize("name", ["pgd-l2", "pgd-linf", "fmn-l2", "fmn-linf"])
def test_steps_along_a_gradient_wait_for_nothing(name):
    assert reads_of(name, steps=2) == reads_of(name, steps=4)


@pytest.mark.parametrize(("name", "a_step"), [("deepfool-l2", 1), ("cw-l2", 4)])
def test_foolboxs_own_loops_ask_whether_all_are_done(name, a_step):
    settings = {"binary_search_steps": 1} if name == "cw-l2" else {}
    few, more = (reads_of(name, steps=steps, **settings) for steps in (2, 4))
    added = more - few
    assert added.keys() <= {"eagerpy"}
    assert added.total() <= 2 * a_step


def test_the_tangent_attack_reads_who_is_asked_next():
    few, more = (reads_of("tangent", iterations=n, initial_probes=64) for n in (2, 4))
    assert few.keys() <= AT_ITS_START.keys() | AN_ITERATION.keys()
    added = more - few
    assert added.keys() == AN_ITERATION.keys()
    assert added["_Run.estimate_normal"] == 2


def test_neither_bisection_nor_probes_mix_devices_or_wait():
    net = network()
    with fake_device():
        place(net)
        images, labels = (
            torch.empty(3, 1, 8, 8, device=DEVICE),
            torch.empty(3, device=DEVICE).long(),
        )
        run = _Run(TangentAttack(), Classifier(net), images, labels, range(3))
        index = torch.arange(3, device=DEVICE)
        run.to_boundary(index, run.x)
        delta = run.distances[0] / 64
        run.probes.draw(slice(64), run.boundary[0].float(), delta, run.generators[0])
        assert run.decide(run.probes.points[:64], index[:1].expand(64)).device.type == DEVICE
