"""Model x images x attacks -> per-image results -> a report.

Images are worked through in chunks, and what a chunk gave is a file: a killed evaluation goes on
where it was, and several processes share the chunks out. What is random depends on the seed and on
an image's row, or on its chunk, never on what was done before.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_specreg.data.datasets import DIGITS, load_splits, place
from hf_specreg.data.transforms import derived_seed
from hf_specreg.encoders.checksum import weights_sha256
from hf_specreg.encoders.head import check_head
from hf_specreg.encoders.load import load_model
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.encoders.modules import unwrap
from hf_specreg.robustness.aggregate import aggregate, per_image, twins
from hf_specreg.robustness.attacks import Attack, describe, make_attacks
from hf_specreg.robustness.bound import Bound, NoBoundError, lipschitz_bound
from hf_specreg.robustness.chunks import (
    EvaluationError,
    chunk_path,
    claim,
    gather,
    workspace,
    write,
)
from hf_specreg.robustness.classifier import (
    Classifier,
    check_images,
    check_pixels,
    count_classes,
    frozen,
)
from hf_specreg.robustness.images import Images
from hf_specreg.robustness.provenance import device_name, digest, versions
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.stages import Stage, make_stages
from hf_specreg.robustness.threat import NORMS
from hf_specreg.spectral.operators import Dense
from hf_specreg.spectral.penalty import SpectralPenalty
from hf_specreg.spectral.precision import exact_float32

DEFAULT_EPS = {"l2": (0.1, 0.25, 0.5), "linf": (1 / 255, 4 / 255, 8 / 255)}
LARGEST_MATRIX = 2**22  # numbers, whose exact singular values are a matter of seconds
CHECK_IMAGES = 256  # to see that model and data belong together
# What a run's configuration calls the arguments of load_splits.
DATA_SETTINGS = {
    "configuration": "configuration",
    "revision": "revision",
    "image_column": "image_column",
    "label_column": "label_column",
    "ignore_splits": "ignore_splits",
    "classes": "classes",
    "validation_fraction": "validation_fraction",
    "split_seed": "seed",
}
CUT_BY = ("configuration", "revision", "ignore_splits", "classes", "validation_fraction", "seed")


def evaluate_robustness(
    model: nn.Module | str,
    dataset: datasets.Dataset | Dataset | tuple[Tensor, Tensor] | str,
    *,
    split: str = "test",
    revision: str | None = None,
    splits: Mapping[str, Any] | None = None,
    attacks: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("tangent",),
    eps: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    samples: int | None = None,
    seed: int = 0,
    corruptions: bool = False,
    masking_check: bool | None = None,
    fold_norm: bool = False,
    head: str | Sequence[str] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    name: str | None = None,
    data: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    shard: tuple[int, int] = (0, 1),
    barrier: Callable[[], None] = lambda: None,
    check_inputs: bool = True,
    input_size: tuple[int, int, int] | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """Attack a model on a data set, and report how robust it is.

    Args:
        model: from images [B, C, H, W] in [0, 1] to logits [B, K]; it is evaluated in evaluation
            mode and left as it was. Or a folder, a Hub id or a timm name.
        dataset: a `datasets.Dataset` with columns "image" and "label", a torch dataset of (image
            [C, H, W] in [0, 1], label), images [N, C, H, W] in [0, 1] with labels [N], or the name
            of an image set (see `hf_specreg.data.datasets`).
        split: train, validation or test, of an image set given by name.
        revision: of an image set on the Hub.
        splits: of an image set given by name, the arguments of `load_splits`, such as
            validation_fraction or label_column. What is not given is as in the model's training, if
            its specreg.json says that it was trained on this image set: with another cut, images
            that it was trained on could be in its test split.
        attacks: names (see `hf_specreg.robustness.attacks.ATTACKS`), or a mapping from a name to
            settings that differ from its default.
        eps: where robust accuracy is stated, in [0, 1] pixels: a list for attacks of one norm, or
            {"l2": [...], "linf": [...]}. Default: 0.1, 0.25, 0.5 in L2; 1, 4, 8 / 255 in Linf.
        samples: how many images, drawn by `seed`; default: all.
        seed: of everything random.
        corruptions: also measure accuracy under common corruptions.
        masking_check: look for masked gradients by PGD; default: where a white-box attack is
            among the attacks.
        fold_norm: also report the singular values with the batch norms that follow folded in.
        head: the head's dotted name, where it cannot be found; () for none.
        batch_size: images attacked at once. Attacks of libraries draw random numbers by batch, so
            it is one of the settings.
        device: the model is moved there; default: where it is.
        name: of the model, for the report.
        data: what the data are, for the report: "id", "revision", "split".
        output: folder for the chunks, to go on from after an interruption; default: none is kept.
        shard: (rank, processes): this process takes every `processes`-th chunk, from the `rank`-th
            on. All processes need the same `output`.
        barrier: waits for the other processes.
        check_inputs: stop if the model classifies other pixels (normalised, 8-bit) better.
        input_size: (C, H, W) that pictures of a `datasets.Dataset` are brought to; default: the
            model's.
        progress: show it.

    Raises:
        EvaluationError: no images, an eps grid that does not fit the attacks, or an `output` that
            holds another evaluation.
        ClassifierError: the model does not take [0, 1] pixels, its weights are in half precision,
            or the labels are not its own.
        DataError: the image set cannot be loaded, or not split as `splits` says.
        MissingPackageError: the library of an attack is not installed.
    """
    if batch_size < 1 or not 0 <= shard[0] < shard[1]:
        raise EvaluationError(
            f"batch_size ({batch_size}) must be at least 1, and shard {shard} a rank below the "
            "number of processes"
        )
    chosen = make_attacks(attacks)
    grid = _eps_grid(eps, chosen)
    flags = []
    if from_name := isinstance(model, str):
        if "/" not in model and not Path(model).is_dir():
            flags.append(f"the weights are random: {model} is the name of an architecture")
        name, model = name or model, load_model(model)
    weights = weights_sha256(model)
    half = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    if from_name and half:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        flags.append(f"the weights are {names}: attacked in float32")
        model = model.float()
    if device is not None:
        model = model.to(device)
    if isinstance(dataset, str):
        found, flag, options = _split(dataset, split, revision, splits, model)
        flags += flag
        revision = options.pop("revision", None)
        data = {"id": place(dataset), "revision": revision, "split": split, **(data or {})}
        dataset, data["splits"] = found, options
    images = Images(dataset, model, input_size)
    if not len(images):
        raise EvaluationError("the data set has no images")
    if corruptions and images.size[0] not in (1, 3):
        raise EvaluationError(f"corruptions are of 1 or 3 channels, not {images.size[0]}")
    rows = _draw(len(images), samples, seed)
    classifier = Classifier(model, device=device)
    if masking_check is None:
        masking_check = any(not attack.black_box for attack in chosen.values())
    if masking_check:
        make_attacks(["pgd-l2"])
    if shard[1] > 1 and output is None:
        raise EvaluationError("several processes need a common output folder")
    with frozen(classifier), exact_float32(), workspace(output) as folder:
        first, labels = images.read(_draw(len(images), CHECK_IMAGES, seed))
        classes = count_classes(classifier, first)
        check_images(first, labels, classes=classes)
        if check_inputs:
            check_pixels(classifier, first, labels, batch_size=batch_size)
        logits = classifier(first[:batch_size]).detach().cpu()
        settings = {
            "weights_sha256": weights,
            "data": {"images": len(images), **(data or {})},
            "first_images_sha256": digest(first.numpy(), labels.numpy()),
            "first_logits_sha256": digest(logits.numpy()),
            "versions": versions(),
            "device": device_name(classifier),
            "rows_sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
            "attacks": {n: describe(a) for n, a in chosen.items()},
            "eps": grid,
            "seed": seed,
            "batch_size": batch_size,
            "corruptions": corruptions,
            "masking_check": masking_check,
        }
        claim(folder, settings, shard[0] == 0, barrier)
        layers, bound = _layers_and_bound(model, head, images.size, fold_norm)
        stages = make_stages(classifier, chosen, grid, corruptions, masking_check)
        _work(stages, classifier, classes, images, rows, seed, folder, batch_size, shard, progress)
        barrier()
        results = {stage: gather(folder, stage, len(rows), batch_size) for stage in stages}
    content = aggregate(results, chosen, grid, seed, bound)
    content = {
        "model": {
            "id": name or type(unwrap(model)).__name__,
            "architecture": type(unwrap(model)).__name__,
            "weights_sha256": weights,
            "parameters": sum(p.numel() for p in model.parameters()),
            "input_size": list(images.size),
            "classes": int(results["clean"]["logits"].shape[1]),
        },
        "data": {
            "id": None,
            "revision": None,
            "split": None,
            **(data or {}),
            "images": len(images),
            "sha256": digest(results["clean"]["digest"]),
        },
        "n": len(rows),
        "seed": seed,
        "batch_size": batch_size,
        "versions": settings["versions"],
        "device": settings["device"],
        **content,
        "layers": layers,
        "flags": flags + _layer_flags(layers) + content["flags"],
        "wall_seconds": float(sum(stage["seconds"] for stage in results.values())),
    }
    return RobustnessReport(content, per_image(results, rows, chosen, bound), twins(results))


def _split(
    source: str,
    split: str,
    revision: str | None,
    options: Mapping[str, Any] | None,
    model: nn.Module,
) -> tuple[datasets.Dataset, list[str], dict[str, Any]]:
    """A split of an image set, what must be said of it, and the options that it was loaded with."""
    if split not in ("train", "validation", "test"):
        raise EvaluationError(f"split ({split!r}) must be train, validation or test")
    trained, given = _data_settings(model), dict(options or {})
    if revision:
        given["revision"] = revision
    known = _same_source(trained.get("source"), source)
    own = {
        argument: trained[setting]
        for setting, argument in DATA_SETTINGS.items()
        if known and trained.get(setting) not in (None, (), [])
    }
    options = {**own, **given}
    try:
        found = load_splits(source, **options)
    except TypeError as error:
        raise EvaluationError(
            f"splits ({options}) must be arguments of load_splits: {error}"
        ) from error
    if split in found.cut and known and trained.get("streaming"):
        raise EvaluationError(
            f"the model was trained on a stream of {source}, which has no {split} split: what "
            "would be cut now was trained on; take one that it has"
        )
    flags = []
    cut_as_trained = known and not any(_differs(given, own, argument) for argument in CUT_BY)
    chosen = not known and {"validation_fraction", "seed"} <= set(given)
    if split in found.cut and not (cut_as_trained or chosen):
        flags.append(
            f"the {split} split was cut from the training split of {source}: a model that was "
            "trained on another cut has seen some of its images"
        )
    return getattr(found, split), flags, options


def _same_source(trained: Any, source: str) -> bool:
    """Whether a model was trained on this image set: of the same name, or in the same folder."""
    if not isinstance(trained, str) or trained == place(source):
        return trained == place(source)
    here, there = Path(source).expanduser(), Path(trained).expanduser()
    folders = source != DIGITS and trained.startswith((".", "/", "~")) and here.is_dir()
    return folders and here.resolve() == there.resolve()


def _differs(given: Mapping[str, Any], own: Mapping[str, Any], argument: str) -> bool:
    """Whether an argument of `load_splits` was given, and not as in the training."""
    default = signature(load_splits).parameters[argument].default
    a, b = given.get(argument, default), own.get(argument, default)
    a, b = (list(x) if isinstance(x, tuple) else x for x in (a, b))
    return argument in given and a != b


def _data_settings(model: nn.Module) -> Mapping[str, Any]:
    """How a saved model's training loaded its images; empty where it is not known."""
    found = getattr(model, "metadata", None)
    for key in ("config", "data"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _work(
    stages: Mapping[str, Stage],
    classifier: Classifier,
    classes: int,
    images: Images,
    rows: np.ndarray,
    seed: int,
    folder: Path,
    batch_size: int,
    shard: tuple[int, int],
    progress: bool,
) -> None:
    """Do what is not done yet of every stage."""
    rank, processes = shard
    starts = range(0, len(rows), batch_size)[rank::processes]
    show = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images, {task.fields[queries]:,} queries"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress or rank != 0,
        redirect_stdout=False,
    )
    mine = sum(len(rows[start : start + batch_size]) for start in starts)
    with show:
        for name, stage in stages.items():
            classifier.queries = 0
            task = show.add_task(name, total=mine, queries=0)
            for start in starts:
                part = rows[start : start + batch_size]
                path = chunk_path(folder, name, start)
                if not path.exists():
                    pixels, labels = images.read(part)
                    check_images(pixels, labels, classes=classes)
                    seeds = [derived_seed(seed, int(row)) for row in part]
                    places = np.arange(start, start + len(part))
                    begun = time.perf_counter()
                    arrays = stage(pixels, labels, seeds, places)
                    write(path, {**arrays, "seconds": np.array(time.perf_counter() - begun)})
                show.update(task, advance=len(part), queries=classifier.queries)


def check_settings(
    attacks: Sequence[str] | Mapping[str, Mapping[str, Any]],
    eps: Sequence[float] | Mapping[str, Sequence[float]] | None,
) -> None:
    """Raise what `evaluate_robustness` would raise of its attacks and eps."""
    _eps_grid(eps, make_attacks(attacks))


def _eps_grid(
    eps: Sequence[float] | Mapping[str, Sequence[float]] | None, attacks: Mapping[str, Attack]
) -> dict[str, list[float]]:
    norms = {attack.norm for attack in attacks.values()}
    if eps is None:
        grid = dict(DEFAULT_EPS)
    elif isinstance(eps, Mapping):
        if set(eps) - set(NORMS):
            raise EvaluationError(f"eps has norms {sorted(eps)}; known are {', '.join(NORMS)}")
        grid = {**DEFAULT_EPS, **eps}
    elif len(norms) > 1:
        raise EvaluationError(
            "the attacks are of several norms, so eps must be {'l2': [...], 'linf': [...]}"
        )
    else:
        grid = {**DEFAULT_EPS, **dict.fromkeys(norms, eps)}
    for norm, values in grid.items():
        if not len(values) or any(not 0 < e < np.inf for e in values):
            raise EvaluationError(f"eps of {norm} must be positive numbers, not {list(values)}")
    return {norm: sorted(float(e) for e in values) for norm, values in grid.items()}


def _draw(count: int, samples: int | None, seed: int) -> np.ndarray:
    if samples is None or samples >= count:
        return np.arange(count)
    if samples < 1:
        raise EvaluationError(f"samples ({samples}) must be at least 1")
    return np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))


def _layers_and_bound(
    model: nn.Module,
    head: str | Sequence[str] | None,
    size: tuple[int, int, int],
    fold_norm: bool,
) -> tuple[list[dict[str, Any]], Bound | str]:
    """The top singular values up to the features, and the bound or why there is none.

    Nothing that goes wrong here is a reason not to attack the model.
    """
    layers: list[dict[str, Any]] = []
    network = unwrap(model)
    try:
        names = check_head(network, head)
        penalty = SpectralPenalty(network, head=names, input_size=size)
        try:
            values = penalty.top_singular_values()
            with_norms = penalty.top_singular_values(fold_norm=True) if fold_norm else {}
        finally:
            penalty.detach()
        for name, value in values.items():
            layer = {
                "name": name,
                "sigma": _finite(value.sigma.item()),
                "residual": _finite(value.residual),
                "converged": value.converged,
            }
            if name in with_norms:
                layer["sigma_folded"] = _finite(with_norms[name].sigma.item())
            layers.append(layer)
        if not all(layer["converged"] for layer in layers):
            return layers, "a singular value did not converge"
        if network is not model and type(model) is not SpecRegModel:
            return layers, f"what {type(model).__name__} does around the network is not known"
        sigmas = {k: v.sigma.item() * (1 + v.residual) for k, v in values.items()}
        matrices = {m.name: m.effective_weight() for m in penalty.layers if isinstance(m, Dense)}
        exact = {k: _norm(w) for k, w in matrices.items() if w.numel() <= LARGEST_MATRIX}
        std = model.pixel_std if isinstance(model, SpecRegModel) else torch.ones(1)
        bound = lipschitz_bound(
            network, names, sigmas | exact, pixel_std=std, exact=set(exact) == set(sigmas)
        )
        return layers, bound
    except NoBoundError as error:
        return layers, str(error)
    except Exception as error:
        return layers, f"no singular values: {error}"


@torch.no_grad()
def _norm(weight: Tensor) -> float:
    """A matrix's top singular value, but for float64's rounding."""
    return torch.linalg.matrix_norm(weight.double(), ord=2).item()


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def _layer_flags(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    vague = [layer["name"] for layer in layers if not layer["converged"]]
    if not vague:
        return []
    return [f"the singular values of {', '.join(vague)} did not converge"]
