"""What the penalties have in common in a loop of one's own: where they are no term, and that each
stays with its model.
"""

from typing import NoReturn

import torch


def check_recorded(name: str, instead: str = "") -> None:
    """Raise RuntimeError where no gradient is recorded, as in a validation by the training's loss.

    Args:
        name: of the term.
        instead: what to do there.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} would be a loss term without a gradient under torch.no_grad or "
            f"torch.inference_mode: call it in training only{instead}"
        )


def of_its_model(penalty: object, protocol: int) -> NoReturn:
    """Refuse to copy or pickle a penalty: its `__reduce_ex__`."""
    raise TypeError(
        "a penalty belongs to its model and cannot be copied or pickled: make one for the "
        "other model, and give it the state_dict() of this one"
    )
