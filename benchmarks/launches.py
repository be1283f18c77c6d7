"""How many kernels a warm use of the penalty, value and gradient, would launch on a GPU.

    python benchmarks/launches.py

Operator calls on "meta" tensors, which have shapes and no numbers, so that the branches for
accelerators are taken and nothing is computed. Views and allocations count nothing, any other call
1; of operations on lists 1 for as many tensors as CUDA's kernels take at once. `.grad` is there
already, as the loss's gradient is.
"""

import math
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import torch
from results import network, record
from torch.utils._python_dispatch import TorchDispatchMode

from hf_specreg import FeatureSpace, SpectralPenalty

NETWORKS = ["resnet50", "vit_base_patch16_224"]
FREE = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.set_")
LIST = 30  # tensors of a list that one launch takes, at least
CHUNK, CHUNKS = 65536, 320  # and parts of so many numbers


class Launches(TorchDispatchMode):
    """Counts the kernels of what runs within, by operation."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "_foreach_" in name:
            parts = sum(math.ceil(t.numel() / CHUNK) for t in args[0])
            self.of[name] += max(math.ceil(len(args[0]) / LIST), math.ceil(parts / CHUNKS))
        elif not func.is_view and not name.startswith(FREE):
            self.of[name] += 1
        return func(*args, **(kwargs or {}))


def warm(name: str) -> tuple[torch.nn.Module, SpectralPenalty]:
    """Return a network on "meta", and its penalty with the vectors that a first use would find."""
    model = network(name)
    space = FeatureSpace.of(model, input_size=(3, 224, 224))
    model.to("meta")
    penalty = SpectralPenalty(space)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    shapes = {n: s for stack in penalty._sum.stacks for n, s in stack.vectors.items()}
    vectors = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
    state = {**penalty.state_dict(), "step": 1, "uses": 1, "vectors": vectors}
    state["pace"] |= {"halvings": 0, "wait": math.inf}  # settled: "meta" has no numbers to look at
    penalty.load_state_dict(state)
    return model, penalty


def counted(penalty: SpectralPenalty) -> Counter:
    """Return the launches of one use."""
    no_autocast = mock.patch.object(torch, "autocast", return_value=nullcontext())
    with no_autocast, Launches() as launches:  # of which "meta" has none
        penalty().backward()
    return launches.of


def main() -> None:
    """Count, print and write down."""
    rows = []
    for name in NETWORKS:
        _, penalty = warm(name)
        for _ in range(penalty.renew_every):
            counted(penalty)  # every D is there
        uses = [counted(penalty) for _ in range(penalty.renew_every)]
        renew, penalty._sum.triplets.is_due = penalty._sum.triplets.is_due, lambda *_, **__: False
        between = counted(penalty)
        penalty._sum.triplets.is_due = renew
        totals = [use.total() for use in uses]
        most = ", ".join(f"{n.removeprefix('aten.')} {c}" for n, c in between.most_common(4))
        mean = sum(totals) / len(totals)
        rows.append([name, str(len(penalty.layers)), str(between.total()), f"{mean:.0f}", most])
    record(
        "Kernels that a use of the penalty launches",
        ["network", "maps", "between renewals", "mean over a cycle of renewals", "most of them"],
        rows,
        "Operator calls of a warm use, value and gradient, on tensors without numbers; views and "
        "allocations are free. Nothing was run on a GPU.",
    )


if __name__ == "__main__":
    main()
