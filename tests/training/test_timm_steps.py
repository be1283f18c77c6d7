"""When timm's tasks see that an optimizer step is done, in loops that do not say so."""

import gc

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from tests.training.test_timm_task import PENALTY, batch, task


class WritesToData(torch.optim.SGD):
    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(1e-3 * p.grad)


@pytest.mark.parametrize(
    "kind", [lambda weights: torch.optim.AdamW(weights, lr=1e-3, fused=True), WritesToData]
)
def test_a_step_that_leaves_the_weights_versions_as_they_were_is_one_too(kind):
    ours, (images, labels) = task(penalty={**PENALTY, "burn_in": 1}), batch()
    parts = [list(m.parameters()) for m in ours.trainable_module.children()]
    optimizers = [kind(part) for part in parts if part]
    other = kind([nn.Parameter(torch.ones(1))])
    seen = []
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(2):
            other.param_groups[0]["params"][0].grad = torch.ones(1)
            other.step()
            result = ours(images, labels)
            (result["loss"] / 2).backward()
            seen.append(result["penalty"].item())
        for optimizer in optimizers:
            optimizer.step()
    assert seen[:2] == [0, 0]
    assert seen[2] == seen[3] > seen[4] == seen[5] > 0
    assert ours.penalty.step == 3


def test_what_watches_optimizers_goes_with_the_task():
    before = dict(_global_optimizer_post_hooks)
    ours = task()
    assert len(_global_optimizer_post_hooks) == len(before) + 1
    del ours
    gc.collect()
    assert _global_optimizer_post_hooks == before
