"""The penalties that the spectral one is compared with, each a function that gives a 0-d tensor.

Of the map at the data (J is the Jacobian of a function of one image, such as its features):

    jacobian_norm           mean ||J||_F^2                      Hoffman et al. 2019
    top_metric_eigenvalue   mean lambda_max(J^T J)              arXiv:2405.17181, sec. 4
    cross_lipschitz         mean over l, m ||grad f_l - grad f_m||^2    Hein, Andriushchenko 2017
    volume_element          mean 1/2 log det of the metric      Zavatone-Veth et al. 2023

Of the weights or the features:

    orthogonality           sum ||W W^T - I||                   Bansal et al. 2018
    l2_sp                   distance from where training began  Li et al. 2018
    batch_spectral_shrinkage    smallest singular values of the features    Chen et al. 2019

ll-spectral is `SpectralPenalty(..., scope="all")`. `normalize_spectra` is the hard alternative:
spectral normalisation (Miyato et al. 2018).

Functions of images must treat each image by itself: put batch norms in evaluation mode, or their
statistics join the derivative.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

Function = Callable[[Tensor], Tensor]  # images [B, ...] -> outputs [B, K]


def jacobian_norm(
    function: Function,
    images: Tensor,
    *,
    projections: int | None = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean over images of ||J||_F^2, exactly or by random projections.

    For u uniform on the unit sphere of K dimensions, K E ||J^T u||^2 = ||J||_F^2.

    Args:
        function: images [B, ...] -> outputs [B, K].
        images: [B, ...].
        projections: n, backward passes; None: exact, in K.
        generator: of the projections.

    Source: Hoffman, Roberts, Yaida, "Robust Learning with Jacobian Regularization",
    arXiv:1908.02729.
    """
    if projections is None:
        return _jacobian(function, images).square().sum((1, 2)).mean()
    images, outputs = _tracked(function, images)
    total = outputs.new_zeros(())
    for _ in range(projections):
        u = torch.randn(outputs.shape, generator=generator, device=outputs.device)
        u = nn.functional.normalize(u.to(outputs), dim=1)
        total = total + _pulled_back(outputs, images, u).square().sum(1).mean()
    return outputs.shape[1] * total / projections


def top_metric_eigenvalue(
    function: Function,
    images: Tensor,
    *,
    iterations: int = 5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean over images of lambda_max(J^T J), by power iteration on K dimensions.

    u <- J J^T u / ||J J^T u||, then lambda = ||J^T u||^2; its gradient is taken at that u.

    Args:
        function: images [B, ...] -> outputs [B, K].
        images: [B, ...].
        iterations: of the power method.
        generator: of the first u.

    Source: arXiv:2405.17181, where it is computed for the feature metric.
    """
    images, outputs = _tracked(function, images)
    u = torch.randn(outputs.shape, generator=generator, device=outputs.device).to(outputs)
    # J v is the derivative by u of <v, J^T u>, which is linear in u.
    dual = torch.zeros_like(outputs, requires_grad=True)
    pulled = _pulled_back(outputs, images, dual)
    for _ in range(iterations):
        v = _pulled_back(outputs, images, nn.functional.normalize(u, dim=1)).detach()
        (u,) = torch.autograd.grad(pulled, dual, v, retain_graph=True)
    u = nn.functional.normalize(u, dim=1).detach()
    return _pulled_back(outputs, images, u).square().sum(1).mean()


def cross_lipschitz(function: Function, images: Tensor) -> Tensor:
    """Return the mean over images of 1 / K^2 sum_{l, m} ||grad f_l - grad f_m||^2.

    Args:
        function: images [B, ...] -> logits [B, K]; K backward passes.
        images: [B, ...].

    Source: Hein, Andriushchenko, "Formal Guarantees on the Robustness of a Classifier against
    Adversarial Manipulation", NeurIPS 2017, eq. 5.
    """
    gradients = _jacobian(function, images)
    classes = gradients.shape[1]
    # sum_{l, m} ||g_l - g_m||^2 = 2 K sum_l ||g_l||^2 - 2 ||sum_l g_l||^2
    own, common = gradients.square().sum((1, 2)), gradients.sum(1).square().sum(1)
    return (2 * classes * own - 2 * common).mean() / classes**2


def volume_element(function: Function, images: Tensor, *, damping: float = 1e-6) -> Tensor:
    """Return the mean over images of 1/2 log det of the metric that the features pull back.

    Of J [K, d], where K < d, the metric J^T J has no more than K eigenvalues that are not 0: the
    determinant is over those, that of J J^T.

    Args:
        function: images [B, ...] -> features [B, K]; K backward passes.
        images: [B, ...], of d numbers each.
        damping: added to every eigenvalue, so that features that do not move have a logarithm.

    Source: Zavatone-Veth, Yang, Rubinfien, Pehlevan, "Neural networks learn to magnify areas near
    decision boundaries", arXiv:2301.11375.
    """
    jacobian = _jacobian(function, images)
    if jacobian.shape[1] > jacobian.shape[2]:
        jacobian = jacobian.mT
    gram = jacobian @ jacobian.mT
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.slogdet(gram + damping * eye).logabsdet.mean() / 2


def orthogonality(
    weights: Iterable[Tensor],
    *,
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return sum ||W W^T - I|| (largest absolute eigenvalue), by power iteration.

    Kernels are reshaped to matrices of a row an output channel. Where that has more rows than
    columns, it is W^T W - I: the other can never be 0.

    Args:
        weights: [out, ...] each.
        iterations: of the power method.
        generator: of its first vectors.

    Source: Bansal, Chen, Wang, "Can We Gain More from Orthogonality Regularizations in Training
    Deep CNNs?", NeurIPS 2018: the spectral restricted isometry property, SRIP.
    """
    total = torch.zeros(())
    for weight in weights:
        matrix = weight.flatten(1)
        if matrix.shape[0] > matrix.shape[1]:
            matrix = matrix.T
        excess = matrix @ matrix.T - torch.eye(len(matrix), dtype=weight.dtype).to(weight)
        v = torch.randn(len(matrix), generator=generator, device=weight.device).to(weight)
        with torch.no_grad():
            for _ in range(iterations):
                v = nn.functional.normalize(excess @ v, dim=0)
        total = total.to(weight) + torch.linalg.vector_norm(excess @ v)
    return total


def l2_sp(
    parameters: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    *,
    alpha: float = 0.1,
    beta: float = 0.01,
) -> Tensor:
    """Return alpha / 2 ||w - w_0||^2 + beta / 2 ||w_new||^2.

    Args:
        parameters: of the model, by name.
        start: those that were pretrained, as they were; the rest, the head, is w_new.
        alpha: of the parameters in `start`.
        beta: of the others.

    Raises:
        ValueError: a name or a shape of `start` is not among the parameters.

    Source: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with
    Convolutional Networks", ICML 2018.
    """
    for name, value in start.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(f"no parameter {name} of shape {tuple(value.shape)} to keep near")
    terms = [
        beta / 2 * p.square().sum()
        if name not in start
        else alpha / 2 * (p - start[name].detach().to(p)).square().sum()
        for name, p in parameters.items()
    ]
    return torch.stack(terms).sum()


def batch_spectral_shrinkage(features: Tensor, *, k: int = 1) -> Tensor:
    """Return the sum of the k smallest squared singular values of a batch's features.

    Args:
        features: [B, D].
        k: how many.

    Raises:
        ValueError: the matrix has fewer than k.

    Source: Chen, Wang, Fu, Long, Wang, "Catastrophic Forgetting Meets Negative Transfer: Batch
    Spectral Shrinkage for Safe Transfer Learning", NeurIPS 2019.
    """
    if not 1 <= k <= min(features.shape):
        raise ValueError(f"features {tuple(features.shape)} do not have {k} singular values")
    features = features.to(torch.promote_types(features.dtype, torch.float32))  # not in half
    return torch.linalg.svdvals(features)[-k:].square().sum()


def normalize_spectra(model: nn.Module, names: Iterable[str]) -> None:
    """Divide weights by their top singular value from now on, as torch does it.

    It is that of the kernel reshaped to a matrix, not of the convolution, which can be larger by up
    to the square root of the kernel's positions.

    Args:
        model: changed in place.
        names: dotted names of the linear and convolutional layers, such as
            `[layer.name for layer in SpectralPenalty(model, split_qkv=False).layers]`.

    Source: Miyato, Kataoka, Koyama, Yoshida, "Spectral Normalization for Generative Adversarial
    Networks", ICLR 2018.
    """
    for name in names:
        spectral_norm(model.get_submodule(name))


def _tracked(function: Function, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images that require a gradient, and the outputs [B, K] for them."""
    images = images.detach().requires_grad_(True)
    with torch.enable_grad():
        return images, function(images).flatten(1)


def _pulled_back(outputs: Tensor, images: Tensor, u: Tensor) -> Tensor:
    """J^T u for each image, [B, d], with a graph of its own."""
    (gradient,) = torch.autograd.grad(outputs, images, u, create_graph=True)
    return gradient.flatten(1)


def _jacobian(function: Function, images: Tensor) -> Tensor:
    """J of each image, [B, K, d], row by row."""
    images, outputs = _tracked(function, images)
    rows = [
        _pulled_back(outputs, images, torch.zeros_like(outputs).index_fill_(1, index, 1.0))
        for index in torch.arange(outputs.shape[1], device=outputs.device)
    ]
    return torch.stack(rows, dim=1)
