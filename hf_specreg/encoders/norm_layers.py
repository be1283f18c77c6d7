"""What may stand where an encoder has its norms, by names that timm's `norm_layer` takes.

    dynamictanh     DyT(x) = gamma * tanh(alpha x) + beta
    identity        nothing

Importing this module is enough for `timm.create_model(..., norm_layer="dynamictanh")`, and for
loading what was saved from it, where the architecture takes norms by name, as vision transformers,
ConvNeXts and Hiera do. Names go where classes cannot: in a run's configuration (`model.args`) and
in a saved folder's config.json. For maps [B, C, H, W] elsewhere: dynamictanh2d.

The slope of dynamic tanh in channel c is gamma_c alpha / cosh(alpha x)^2, for all x at most
|gamma_c alpha|, which it has at 0. That of a norm is gamma_c / std(x), and has no bound: it grows
as the maps before it shrink.

Source: Zhu, Chen, He, LeCun, Liu, "Transformers without normalization", arXiv:2503.10622.
"""

import torch
from timm.layers import create_norm
from timm.models import convnext
from torch import Tensor, nn

ALPHA = 0.5  # at first, as in the paper


class DynamicTanh(nn.Module):
    """gamma * tanh(alpha x) + beta of tensors [..., C]; alpha is one number.

    Args:
        width: C.
        alpha: at first.
        eps: of the norm whose place it takes; not used.
        device: of the parameters.
        dtype: of the parameters.
    """

    trailing = 0  # dimensions behind the channels

    def __init__(
        self,
        width: int,
        *,
        alpha: float = ALPHA,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.initial = alpha
        self.alpha = nn.Parameter(torch.empty(1, **place))
        self.weight = nn.Parameter(torch.empty(width, **place))
        self.bias = nn.Parameter(torch.empty(width, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put alpha at its first value, gamma at 1 and beta at 0."""
        nn.init.constant_(self.alpha, self.initial)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        gamma, beta = (p.view(-1, *[1] * self.trailing) for p in (self.weight, self.bias))
        return gamma * torch.tanh(self.alpha * x) + beta


class DynamicTanh2d(DynamicTanh):
    """The same of maps [B, C, H, W]."""

    trailing = 2


NORM_LAYERS = {
    "dynamictanh": DynamicTanh,
    "dynamictanh2d": DynamicTanh2d,
    "identity": nn.Identity,
}
# timm's tables have no public way in: under a timm that keeps them elsewhere, timm itself says that
# it does not know the name. ConvNeXt's holds the form for [B, C, H, W] and that for [B, H, W, C].
vars(create_norm).get("_NORM_MAP", {}).update(NORM_LAYERS)
vars(convnext).get("_NORM_MAP", {}).update(
    dynamictanh=(DynamicTanh2d, DynamicTanh), identity=(nn.Identity, nn.Identity)
)
