"""Time, memory and error of sigma: this package against other ways to the same number.

    python benchmarks/against.py [--threads 2]

- fft, exact: the rep-spectral authors' exact algorithm, from its formula. A circular convolution is
  block diagonal in the Fourier domain, one [out, in] block a frequency; the largest eigenvalue of
  each block^H block, by eigvalsh, with autograd for the gradient.
- fft, power: their fast one. One warm power iteration on every block, with autograd.
- gram: Gram iteration (Delattre et al. 2023): the same blocks, G <- G^H G five times, rescaled, and
  sigma <= ||G||_F^(1/2^5); autograd.
- torch: nn.utils.parametrizations.spectral_norm, one power iteration on the reshaped kernel.
- jacobian: the Frobenius norm of the features' Jacobian by one random projection (Hoffman et al.),
  of a batch, for networks; another number than sigma, so it has no error here.

A use is the value and its gradient. The weights move by 1e-3 of their norm after every use, in a
random direction. Ours, "fft, power" and "torch" are warm: 48 uses, of which the last 16 count; the
others begin anew each time: 3 uses, of which the last 2 count. The time is their mean; the error is
that of the last use, of the worst layer, against the converged sigma of the true operator in
float64. Memory is by how much a warm use raises the peak of a process of its own.
"""

import argparse
import multiprocessing
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from results import network, record, seconds
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from hf_specreg import SpectralPenalty
from hf_specreg.encoders.modules import unwrap
from hf_specreg.spectral.operators import Convolution, LinearOperator
from hf_specreg.spectral.regularizers.jacobian import jacobian_norm

DRIFT, GRAM = 1e-3, 5
WARM, ANEW = (48, 16), (3, 2)  # uses, and how many of the last count


class Only(nn.Module):
    """A layer as a network whose features are its output."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.head = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.head(self.layer(x))


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return the layers, as networks, with the size of their input."""
    torch.manual_seed(0)
    return {
        "3x3, 64 to 64, 32 px": (Only(nn.Conv2d(64, 64, 3, padding=1)), (64, 32, 32)),
        "3x3 / 2, 64 to 128, 32 px": (Only(nn.Conv2d(64, 128, 3, 2, 1)), (64, 32, 32)),
        "3x3, 512 to 512, 4 px": (Only(nn.Conv2d(512, 512, 3, padding=1)), (512, 4, 4)),
        "7x7 / 2, 3 to 64, 112 px": (Only(nn.Conv2d(3, 64, 7, 2, 3)), (3, 112, 112)),
        "linear, 384 to 1536": (Only(nn.Linear(384, 1536)), (1, 1, 384)),
    }


NETWORKS = {
    "resnet18_cifar": ((3, 32, 32), 128),
    "resnet20_cifar": ((3, 32, 32), 128),
    "vit_small_patch16_224": ((3, 224, 224), 8),
}


def blocks(operator: LinearOperator, weight: Tensor, *, half: bool = False) -> Tensor:
    """The operator's blocks [frequencies, out, in * aliases]: of a convolution, as if circular.

    At stride 1 half the frequencies are enough, the others being their conjugates.
    """
    if not isinstance(operator, Convolution):
        return weight[None]
    sizes, stride = operator.input_shape[1:], operator.stride
    padded = weight.new_zeros(*weight.shape[:2], *sizes)
    padded[..., : weight.shape[2], : weight.shape[3]] = weight
    transfer = torch.fft.rfft2(padded) if half and stride == (1, 1) else torch.fft.fft2(padded)
    for dim, s in enumerate(stride, 2):  # frequencies that a stride lets alias act together
        transfer = transfer.unflatten(dim, (s, -1)).movedim(dim, 2).flatten(1, 2) / s**0.5
    return transfer.flatten(2).permute(2, 0, 1)


class Fft:
    """The authors' algorithms and Gram iteration, on all operators of a penalty."""

    def __init__(self, penalty: SpectralPenalty, kind: str):
        self.operators, self.kind = penalty.layers, kind
        self.vectors: dict[str, Tensor] = {}
        self.sigmas: list[Tensor] = []

    def use(self) -> None:
        """Value and gradient."""
        half = self.kind == "gram"
        self.sigmas = [
            self.sigma(o, blocks(o, o.effective_weight(), half=half)) for o in self.operators
        ]
        sum(sigma.square() for sigma in self.sigmas).backward()

    def sigma(self, operator: LinearOperator, matrices: Tensor) -> Tensor:
        """Of all blocks of one operator."""
        if matrices.shape[1] < matrices.shape[2]:  # the smaller side
            matrices = matrices.mH
        if self.kind == "exact":
            return torch.linalg.eigvalsh(matrices.mH @ matrices)[:, -1].max().sqrt()
        if self.kind == "gram":
            gram, log = matrices, torch.zeros(len(matrices))
            for _ in range(GRAM):
                norm = torch.linalg.matrix_norm(gram)
                gram = gram / norm[:, None, None]
                log = 2 * (log + norm.log())
                gram = gram.mH @ gram
            return ((torch.linalg.matrix_norm(gram).log() + log) / 2**GRAM).exp().max()
        with torch.no_grad():
            v = self.vectors.get(operator.name)
            if v is None:
                v = torch.randn_like(matrices[:, 0, :, None])
            u = matrices @ (v / torch.linalg.vector_norm(v, dim=1, keepdim=True))
            u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
            v = matrices.mH @ u
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
            self.vectors[operator.name] = v
        return (u.mH @ matrices @ v).real.max()


class Ours:
    """This package."""

    def __init__(self, penalty: SpectralPenalty):
        self.penalty = penalty

    def use(self) -> None:
        """Value and gradient."""
        self.penalty().backward()

    @property
    @torch.no_grad()
    def sigmas(self) -> list[Tensor]:
        """u^T W v by the vectors of the last use."""
        vectors = self.penalty.state_dict()["vectors"]
        return [
            (vectors[f"{o.name}.u"] * o.apply(o.effective_weight(), vectors[f"{o.name}.v"])).sum()
            for o in self.penalty.layers
        ]


class TorchSpectralNorm:
    """torch's parametrization, on all layers that have a weight of their own."""

    def __init__(self, penalty: SpectralPenalty, model: nn.Module):
        modules = dict(unwrap(model).named_modules())
        names = [o.name if o.name in modules else o.name.rpartition(".")[0] for o in penalty.layers]
        self.modules = [spectral_norm(modules[name]) for name in dict.fromkeys(names)]
        self.sigmas: list[Tensor] = []

    def use(self) -> None:
        """The normalised weights and their gradient."""
        weights = [module.weight for module in self.modules]
        self.sigmas = [
            (module.parametrizations.weight.original.flatten()[0] / weight.flatten()[0]).abs()
            for module, weight in zip(self.modules, weights, strict=True)
        ]
        sum(weight.sum() for weight in weights).backward()

    def remove(self) -> None:
        """Give the layers their own weights back."""
        for module in self.modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


class Jacobian:
    """Of the features, by one random projection."""

    sigmas = None

    def __init__(self, model: nn.Module, images: Tensor):
        self.model, self.images = model.eval(), images

    def use(self) -> None:
        """Value and gradient."""
        jacobian_norm(self.model, self.images).backward()


def method(name: str, model: nn.Module, size: tuple[int, ...], batch: int):
    """Return a method on a network."""
    penalty = SpectralPenalty(model, input_size=size, head=None if batch else "head")
    if name == "torch":
        return TorchSpectralNorm(penalty, model)
    if name == "jacobian":
        return Jacobian(model, torch.rand(batch, *size))
    return Ours(penalty) if name == "ours" else Fft(penalty, name.removeprefix("fft, "))


def build(case: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """Return the network or layer of a case, its input's size, and a batch; 0 for a layer."""
    if case in NETWORKS:
        return network(case), *NETWORKS[case]
    return *layers()[case], 0


def drift(model: nn.Module, draws: torch.Generator) -> None:
    """Move every weight by DRIFT of its norm."""
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=draws)
            p.add_(noise * (DRIFT * p.norm() / noise.norm()))


def run(case: str, name: str, threads: int) -> tuple[float, float, float | None]:
    """Return the time of a use, the MiB by which it raises what the process holds, and the largest
    relative error of a sigma in the last.
    """
    torch.set_num_threads(threads)
    model, size, batch = build(case)
    head = None if batch else "head"
    exact = SpectralPenalty(model, input_size=size, head=head, split_qkv=name != "torch")
    chosen, draws = method(name, model, size, batch), torch.Generator().manual_seed(1)
    uses, counted = WARM if name in ("ours", "torch", "fft, power") else ANEW
    times = []
    for use in range(uses):
        if use:
            drift(model, draws)
        times.append(seconds(chosen.use))
    raised = peak(chosen.use)
    error = None
    if chosen.sigmas is not None:
        found = [sigma.item() for sigma in chosen.sigmas]
        if name == "torch":
            chosen.remove()
        truth = exact_sigmas(exact, model)
        error = max(abs(s / t - 1) for s, t in zip(found, truth, strict=True))
    return statistics.fmean(times[-counted:]), raised, error


def exact_sigmas(penalty: SpectralPenalty, model: nn.Module) -> list[float]:
    """Return converged singular values, in float64."""
    model.double()
    values = penalty.top_singular_values(tolerance=1e-5)
    return [value.sigma.item() for value in values.values()]


def peak(work: Callable[[], None]) -> float:
    """Return by how many MiB the work raises what this process holds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """In KiB."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def in_its_own_process(function: Callable, *arguments):
    """Return the function's result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rows = []
    for case in [*layers(), *NETWORKS]:
        ours = None
        names = ["ours", "fft, power", "fft, exact", "gram", "torch"]
        for name in names + (["jacobian"] if case in NETWORKS else []):
            try:
                time, memory, error = in_its_own_process(run, case, name, arguments.threads)
            except (RuntimeError, MemoryError) as failure:
                rows.append([case, name, "", "", "", f"failed: {str(failure)[:60]}"])
                continue
            ours = ours or time
            shown = "" if error is None else f"{error:.2%}"
            rows.append(
                [case, name, f"{1000 * time:.3g}", f"{time / ours:.3g}", f"{memory:.0f}", shown]
            )
            print(rows[-1], flush=True)
    record(
        "Other ways to sigma",
        ["layer or network", "method", "a use, ms", "times ours", "peak, MiB", "error of sigma"],
        rows,
        "A use is the value and its gradient, of random weights that move by 0.1 % of their norm "
        "between uses; the error is that of the worst layer in the last use, after 48 uses of the "
        "warm methods (ours, fft power, torch). The Fourier methods take convolutions for "
        "circular; torch takes kernels for matrices.",
    )


if __name__ == "__main__":
    main()
