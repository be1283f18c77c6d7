import pytest
import torch
from scipy.fft import dctn
from torch import nn

from hf_specreg.robustness.attacks.probes import Probes
from hf_specreg.robustness.attacks.tangent import TangentAttack
from hf_specreg.robustness.classifier import Classifier

CPU = torch.device("cpu")
LENGTH = torch.tensor(0.01)


def drawn(shape, **settings):
    """64 probes around the grey image, and their steps."""
    probes = Probes(torch.Size(shape), 64, CPU, **settings)
    grey = torch.full((probes.steps.shape[1],), 0.5)
    probes.draw(slice(64), grey, LENGTH, torch.Generator().manual_seed(0))
    return probes


@pytest.mark.parametrize("part", [None, 0.25])
def test_probes_are_steps_of_one_length_and_gaussian_ones_are_longer(part):
    unit, gaussian = (drawn((3, 16, 16), low_frequencies=part, gaussian=g) for g in (False, True))
    lengths = unit.steps.norm(dim=1)
    torch.testing.assert_close(lengths, LENGTH.expand(64), rtol=1e-5, atol=0)
    torch.testing.assert_close(unit.points, 0.5 + unit.steps)
    directions = 3 * 16 * 16 * (part or 1) ** 2
    mean = gaussian.steps.norm(dim=1).mean()
    torch.testing.assert_close(mean, LENGTH * directions**0.5, rtol=0.03, atol=0)


def test_steps_of_low_frequencies_have_them_all_alike_and_no_others():
    shape = (3, 16, 24)
    steps = drawn(shape, low_frequencies=0.25, gaussian=True).steps.reshape(-1, *shape)
    found = torch.from_numpy(dctn(steps.double().numpy(), axes=(2, 3), norm="ortho")) / LENGTH
    low = found[:, :, :4, :6]
    assert found.square().sum() == pytest.approx(low.square().sum())
    deviations = low.std(dim=0)
    assert 0.6 < deviations.min()
    assert deviations.max() < 1.4
    assert low.mean(0).abs().max() < 0.5


def test_steps_stay_in_the_box_of_every_point():
    """Cut steps are added to the point without another cut, which float32's rounding allows."""
    probes = Probes(torch.Size((1, 128, 128)), 64, CPU, low_frequencies=0.5)
    centre = torch.rand(128 * 128, generator=torch.Generator().manual_seed(1))
    tiny = 2.0 ** -torch.arange(1, 151, dtype=torch.float64)
    centre[:302] = torch.cat([tiny, 1 - tiny, torch.tensor([0.0, 1.0])]).float()
    probes.draw(slice(64), centre, torch.tensor(500.0), torch.Generator().manual_seed(0))
    assert probes.points.min() == 0
    assert probes.points.max() == 1
    assert (probes.steps == 1 - centre).any(0).all()  # all were cut
    torch.testing.assert_close(probes.points, centre + probes.steps)


def test_where_the_normal_is_of_low_frequencies_it_is_found_with_fewer_queries():
    class Halves(nn.Module):
        """Is the left half brighter?"""

        def forward(self, images):
            left, right = images.flatten(1, 2).chunk(2, dim=2)
            side = (left.mean((1, 2)) - right.mean((1, 2))).float()
            return torch.stack([side, -side], dim=1)

    images = 0.5 + 0.05 * torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[..., :16] += 0.02
    classifier = Classifier(Halves())
    labels = classifier.predict(images)
    assert not labels.any()

    def attacked(**settings):
        attack = TangentAttack(iterations=6, **settings)
        return attack.run(classifier, images, labels, seeds=range(4)).distances

    contrast = images[..., :16].mean((1, 2, 3)) - images[..., 16:].mean((1, 2, 3))
    truth = contrast * (3 * 32 * 32) ** 0.5 / 2
    found = attacked(low_frequencies=0.25, initial_probes=25)
    assert (found >= truth * (1 - 1e-4)).all()
    assert (found < attacked(initial_probes=100)).all()
