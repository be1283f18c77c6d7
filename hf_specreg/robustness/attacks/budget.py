"""How many images a decision-based attack works on at once: as memory allows."""

from hf_specreg.robustness.attacks.probes import BLOCK

MEMORY = 2**29  # bytes of its tensors beside images, result and model, if one image and a block fit
A_PIXEL = 128  # of them for each pixel of an image under attack, at most
FORWARD = 64 * 3 * 224 * 224  # pixels that are classified at once, if it is at least an image


def forward_size(pixels: int) -> int:
    """Return how many images of so many pixels (C H W) are classified at once, at most 1,024."""
    return max(1, min(1024, FORWARD // max(1, pixels)))


def images_at_once(pixels: int, batch_size: int) -> int:
    """Return how many images of so many pixels are attacked at once.

    Args:
        pixels: C H W.
        batch_size: images that are classified at once, for which there are probes and their steps.
    """
    of_probes = 2 * 4 * max(batch_size, BLOCK)
    return max(1, (MEMORY // max(1, pixels) - of_probes) // A_PIXEL)
