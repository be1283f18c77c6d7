"""Spectral normalisation, by Miyato et al. 2018: the hard alternative to a penalty."""

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.spectral.maps import linear_maps


def normalize_spectra(model: nn.Module | FeatureSpace) -> None:
    """Divide the weights before the features by their top singular value, as torch does it.

    It is that of the kernel reshaped to a matrix, not of the convolution, which can be larger by up
    to the square root of the kernel's positions.

    Args:
        model: as for `FeatureSpace.of`, or one; changed in place.

    Raises:
        ValueError: a layer has no weight of its own that could be normalised.

    Source: Miyato, Kataoka, Koyama, Yoshida, "Spectral Normalization for Generative Adversarial
    Networks", ICLR 2018.
    """
    space = FeatureSpace.of(model)
    names = [operator.name for _, operator in linear_maps(space, split_qkv=False)]
    modules = dict(space.network.named_modules())
    unknown = [n for n in names if not isinstance(getattr(modules.get(n), "weight", None), Tensor)]
    if unknown:
        raise ValueError(
            f"regularizers.spectral_norm cannot treat {unknown} of "
            f"{type(space.network).__name__}, which have no weight of their own"
        )
    for name in names:
        spectral_norm(modules[name])
