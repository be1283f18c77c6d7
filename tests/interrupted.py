"""A training that is cut off at one of its batches, as that of a killed process."""

from hf_specreg.training.objectives import Supervised


class Interrupted(Exception):
    pass


def interrupted_at(call, objective=Supervised):
    """An objective that fails at its n-th call."""

    class Broken(objective):
        calls = 0

        def forward(self, images, labels):
            self.calls += 1
            if self.calls == call:
                raise Interrupted
            return super().forward(images, labels)

    return Broken
