"""Model x images x attacks -> per-image results -> a report.

Images are worked through in chunks, and what a chunk gave is a file: a killed evaluation goes on
where it was, and several processes share the chunks out. What is random depends on the seed and on
an image's row, or on its chunk, never on what was done before.
"""

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import datasets
import numpy as np
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hf_specreg.data.datasets import load_splits
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import derived_seed, evaluation_transform
from hf_specreg.encoders.features import check_head, find_input_size, unwrap
from hf_specreg.encoders.model import load_model
from hf_specreg.robustness.attacks import PGD, Attack, describe, make_attacks
from hf_specreg.robustness.bound import Bound, NoBoundError, lipschitz_bound
from hf_specreg.robustness.classifier import Classifier, check_classifier, frozen
from hf_specreg.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from hf_specreg.robustness.report import SCHEMA_VERSION, RobustnessReport
from hf_specreg.robustness.statistics import LEVEL, RESAMPLES, mean, proportion, quantile
from hf_specreg.robustness.threat import NORMS
from hf_specreg.spectral.penalty import SpectralPenalty

DEFAULT_EPS = {"l2": (0.1, 0.25, 0.5), "linf": (1 / 255, 4 / 255, 8 / 255)}
CHECK_IMAGES = 256  # to see that model and data belong together
MASKING_IMAGES = 100  # for the gradient-masking check
SHOWN_IMAGES = 6  # whose adversarial twins are kept
PACKAGES = (
    "hf-specreg",
    "numpy",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "foolbox",
    "pyautoattack",
)


class EvaluationError(ValueError):
    """An evaluation that cannot be done as it was asked for, with what to do."""


def evaluate_robustness(
    model: nn.Module | str,
    dataset: datasets.Dataset | Dataset | tuple[Tensor, Tensor] | str,
    *,
    split: str = "test",
    revision: str | None = None,
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
        ClassifierError: the model does not take [0, 1] pixels, or the labels are not its own.
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
    if isinstance(model, str):
        if "/" not in model and not Path(model).is_dir():
            flags.append(f"the weights are random: {model} is the name of an architecture")
        name, model = name or model, load_model(model)
    if device is not None:
        model = model.to(device)
    if isinstance(dataset, str):
        data = {"id": dataset, "revision": revision, "split": split, **(data or {})}
        dataset = _split(dataset, split, revision)
    images = _Images(dataset, model, input_size)
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
    with frozen(classifier), _reproducible(), _workspace(output) as folder:
        first, labels = images.read(_draw(len(images), CHECK_IMAGES, seed))
        if check_inputs:
            check_classifier(classifier, first, labels, batch_size=batch_size)
        logits = classifier(first[:batch_size]).detach().cpu()
        settings = {
            "weights_sha256": weights_sha256(model),
            "data": {"images": len(images), **(data or {})},
            "first_images_sha256": _digest(first.numpy(), labels.numpy()),
            "first_logits_sha256": _digest(logits.numpy()),
            "versions": _versions(),
            "device": _device_name(classifier),
            "rows_sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
            "attacks": {n: describe(a) for n, a in chosen.items()},
            "eps": grid,
            "seed": seed,
            "batch_size": batch_size,
            "corruptions": corruptions,
            "masking_check": masking_check,
        }
        _claim(folder, settings, shard[0] == 0, barrier)
        layers, bound = _layers_and_bound(model, head, images.size, fold_norm)
        stages = _stages(classifier, chosen, grid, seed, corruptions, masking_check)
        _work(stages, classifier, images, rows, folder, batch_size, shard, progress)
        barrier()
        results = {stage: _gather(folder, stage, len(rows), batch_size) for stage in stages}
    content = _aggregate(results, chosen, grid, seed, bound)
    content = {
        "schema": SCHEMA_VERSION,
        "model": {
            "id": name or type(unwrap(model)).__name__,
            "architecture": type(unwrap(model)).__name__,
            "weights_sha256": settings["weights_sha256"],
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
            "sha256": _digest(results["clean"]["digest"]),
        },
        "n": len(rows),
        "seed": seed,
        "batch_size": batch_size,
        "intervals": {
            "level": LEVEL,
            "means": "bootstrap",
            "proportions": "Clopper-Pearson",
            "resamples": RESAMPLES,
        },
        "versions": settings["versions"],
        "device": settings["device"],
        **content,
        "layers": layers,
        "flags": flags + _layer_flags(layers) + content["flags"],
        "wall_seconds": float(sum(stage["seconds"] for stage in results.values())),
    }
    return RobustnessReport(content, _per_image(results, rows, chosen), _twins(results))


def _split(source: str, split: str, revision: str | None) -> datasets.Dataset:
    splits = load_splits(source, revision=revision)
    if split not in ("train", "validation", "test"):
        raise EvaluationError(f"split ({split!r}) must be train, validation or test")
    return getattr(splits, split)


class _Images:
    """Any of the kinds of data set, read as float images in [0, 1] and labels."""

    def __init__(self, dataset: Any, model: nn.Module, input_size: tuple[int, int, int] | None):
        if isinstance(dataset, datasets.Dataset):
            missing = {"image", "label"} - set(dataset.column_names)
            if missing:
                raise EvaluationError(
                    f"the data set has columns {dataset.column_names}, but not {sorted(missing)}: "
                    "rename_columns gives them these names"
                )
            size = input_size or find_input_size(model)
            options = getattr(model, "preprocessing", {})
            transform = evaluation_transform(size, **options)
            dataset = LabelledImages(dataset, input_size=size, evaluate=transform)
        elif isinstance(dataset, tuple) and all(isinstance(part, Tensor) for part in dataset):
            dataset = TensorDataset(*dataset)
        self.dataset = dataset
        if len(dataset):
            self.size = tuple(self.read(np.arange(1))[0].shape[1:])

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W] and labels [B]; 8-bit pixels are divided by 255."""
        rows = [int(row) for row in rows]
        if isinstance(self.dataset, LabelledImages | TensorDataset):
            images, labels = self.dataset[rows]
        else:
            pairs = [self.dataset[row] for row in rows]
            if not all(isinstance(image, Tensor) for image, _ in pairs):
                raise EvaluationError(
                    f"the data set gives {type(pairs[0][0]).__name__}, not tensors [C, H, W] in "
                    "[0, 1]: give it a transform such as torchvision's ToTensor"
                )
            images = torch.stack([image for image, _ in pairs])
            labels = torch.tensor([int(label) for _, label in pairs])
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return images, labels.long()


Stage = Callable[[Tensor, Tensor, list[int], np.ndarray], dict[str, np.ndarray]]


def _stages(
    classifier: Classifier,
    attacks: Mapping[str, Attack],
    grid: Mapping[str, Sequence[float]],
    seed: int,
    corruptions: bool,
    masking_check: bool,
) -> dict[str, Stage]:
    """What is done with a chunk, by name: (images, labels, seeds, places) -> arrays.

    `places` are the images' places among those that are evaluated.
    """

    def clean(images, labels, seeds, places):
        device = classifier.device
        logits = classifier(images.to(device)).detach()
        invalid = classifier.invalid(images.to(device))
        digests = [
            hashlib.sha256(image.numpy().tobytes() + bytes(str(int(label)), "ascii")).digest()
            for image, label in zip(images, labels, strict=True)
        ]
        return {
            "logits": logits.cpu().numpy(),
            "labels": labels.numpy(),
            "correct": ((logits.argmax(1).cpu() == labels) & ~invalid.cpu()).numpy(),
            "invalid": invalid.cpu().numpy(),
            "digest": np.frombuffer(b"".join(digests), np.uint8).reshape(len(images), -1),
        }

    def attacked(attack: Attack) -> Stage:
        def stage(images, labels, seeds, places):
            known = torch.from_numpy(clean(images, labels, seeds, places)["correct"])
            count = len(images)
            distances, queries = np.zeros(count, np.float32), np.zeros(count, np.int64)
            arrays = {}
            if known.any():
                own = [s for s, k in zip(seeds, known.tolist(), strict=True) if k]
                result = attack.run(
                    classifier, images[known], labels[known], seeds=own, eps=grid[attack.norm]
                )
                distances[known] = result.distances.cpu().numpy()
                queries[known] = result.queries.cpu().numpy()
                if result.trajectory is not None:
                    trajectory = np.zeros((count, *result.trajectory.shape[1:]))
                    trajectory[known] = result.trajectory.numpy()
                    arrays["trajectory"] = trajectory
                if places[0] == 0:
                    arrays["shown"] = images[known][:SHOWN_IMAGES].numpy()
                    arrays["twins"] = result.adversarials[:SHOWN_IMAGES].cpu().numpy()
            return {"distances": distances, "queries": queries, **arrays}

        return stage

    def corrupted(images, labels, seeds, places):
        hits = np.zeros((len(images), len(CORRUPTIONS), len(SEVERITIES)), bool)
        for i, kind in enumerate(CORRUPTIONS):
            for j, severity in enumerate(SEVERITIES):
                keys = [derived_seed(s, i, j) for s in seeds]
                changed = corrupt(images, kind, severity, seeds=keys).to(classifier.device)
                hits[:, i, j] = (classifier.predict(changed).cpu() == labels).numpy()
        return {"hits": hits}

    def masking(images, labels, seeds, places):
        """On the first images: do steps help PGD, does it win unbounded, are there gradients?"""
        count = len(images)
        known = torch.from_numpy(clean(images, labels, seeds, places)["correct"])
        known &= torch.from_numpy(places < MASKING_IMAGES)
        arrays = {
            k: np.zeros(count, bool)
            for k in ("looked", "stands_10", "stands_100", "stands_unbounded", "no_gradient")
        }
        if known.any():
            arrays["looked"] = known.numpy()
            x, y = images[known].to(classifier.device), labels[known].to(classifier.device)
            own = [s for s, k in zip(seeds, known.tolist(), strict=True) if k]
            largest = max(grid["l2"])
            for key, attack, e in (
                ("stands_10", PGD(norm="l2", steps=10), largest),
                ("stands_100", PGD(norm="l2", steps=100), largest),
                ("stands_unbounded", PGD(norm="linf", steps=100), 1.0),
            ):
                found = attack.run(classifier, x, y, seeds=own, eps=[e])
                arrays[key][known] = found.distances.isinf().cpu().numpy()
            x.requires_grad_(True)
            with torch.enable_grad():
                logits = classifier(x)
                rivals = logits.scatter(1, y[:, None], -torch.inf).max(1).values
                margin = (logits.gather(1, y[:, None])[:, 0] - rivals).sum()
                (gradient,) = torch.autograd.grad(margin, x)
            arrays["no_gradient"][known] = (gradient.flatten(1) == 0).all(1).cpu().numpy()
        return arrays

    stages: dict[str, Stage] = {"clean": clean}
    stages |= {attack: attacked(a) for attack, a in attacks.items()}
    if corruptions:
        stages["corruptions"] = corrupted
    if masking_check:
        stages["masking"] = masking
    return stages


def _work(
    stages: Mapping[str, Stage],
    classifier: Classifier,
    images: _Images,
    rows: np.ndarray,
    folder: Path,
    batch_size: int,
    shard: tuple[int, int],
    progress: bool,
) -> None:
    """Do what is not done yet of every stage."""
    seed = json.loads((folder / "settings.json").read_text())["seed"]
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
                path = _chunk(folder, name, start)
                if not path.exists():
                    pixels, labels = images.read(part)
                    seeds = [derived_seed(seed, int(row)) for row in part]
                    places = np.arange(start, start + len(part))
                    begun = time.perf_counter()
                    arrays = stage(pixels, labels, seeds, places)
                    _write(path, {**arrays, "seconds": np.array(time.perf_counter() - begun)})
                show.update(task, advance=len(part), queries=classifier.queries)


def _chunk(folder: Path, stage: str, start: int) -> Path:
    return folder / f"{stage.replace(' ', '_')}-{start:07d}.npz"


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EvaluationError(
            f"{path} cannot be written ({error}); what was done before is kept, and the same "
            "command goes on from there"
        ) from error


def _gather(folder: Path, stage: str, count: int, batch_size: int) -> dict[str, np.ndarray]:
    """Return a stage's arrays over all images."""
    parts = []
    for start in range(0, count, batch_size):
        path = _chunk(folder, stage, start)
        try:
            with np.load(path) as file:
                parts.append(dict(file))
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            raise EvaluationError(
                f"{path} cannot be read ({error}); delete it and start the same command again"
            ) from error
    merged = {"seconds": np.array(sum(float(p.pop("seconds")) for p in parts))}
    for key in parts[0].keys() & {"shown", "twins"}:
        merged[key] = parts[0][key]
    for key in {k for p in parts for k in p} - {"shown", "twins"}:
        shape = next(p[key].shape[1:] for p in parts if key in p)
        # A chunk in which nothing is classified correctly has no trajectories.
        filled = [p.get(key, np.zeros((len(_first(p)), *shape))) for p in parts]
        merged[key] = np.concatenate(filled)
    return merged


def _first(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    return arrays["distances"] if "distances" in arrays else next(iter(arrays.values()))


class _workspace:
    """The folder of the chunks: the user's, or a temporary one."""

    def __init__(self, output: str | Path | None):
        if output is None:
            self.context = tempfile.TemporaryDirectory()
        else:
            folder = Path(output) / "chunks"
            folder.mkdir(parents=True, exist_ok=True)
            self.context = nullcontext(folder)

    def __enter__(self) -> Path:
        return Path(self.context.__enter__())

    def __exit__(self, *exception) -> None:
        self.context.__exit__(*exception)


def _claim(
    folder: Path, settings: dict[str, Any], first: bool, barrier: Callable[[], None]
) -> None:
    """Write down what the chunks are of; refuse a folder that holds others."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if first and not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=2))
        partial.replace(path)
    barrier()
    known = json.loads(path.read_text())
    changed = [k for k in settings if settings[k] != known.get(k)]
    if changed:
        raise EvaluationError(
            f"{folder} holds an evaluation with other {', '.join(changed)}: take another output "
            "folder, or delete this one"
        )


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


def weights_sha256(model: nn.Module) -> str:
    """Return the hash of a model's weights and buffers, its pixel normalisation among them: names,
    shapes, types and bytes.
    """
    found = hashlib.sha256()
    network = unwrap(model)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    tensors |= {n: b for n, b in model.named_buffers() if n.endswith(("pixel_mean", "pixel_std"))}
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _layers_and_bound(
    model: nn.Module,
    head: str | Sequence[str] | None,
    size: tuple[int, int, int],
    fold_norm: bool,
) -> tuple[list[dict[str, Any]], Bound | str]:
    """The top singular values up to the features, and the certified bound or why there is none.

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
        # What Lanczos finds is a little below the top: by the residual at most, once converged.
        sigmas = {k: v.sigma.item() * (1 + v.residual) for k, v in values.items()}
        std = next((m.pixel_std for m in model.modules() if hasattr(m, "pixel_std")), torch.ones(1))
        return layers, lipschitz_bound(network, names, sigmas, pixel_std=std)
    except NoBoundError as error:
        return layers, str(error)
    except Exception as error:
        return layers, f"no singular values: {error}"


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def _aggregate(
    results: Mapping[str, Mapping[str, np.ndarray]],
    attacks: Mapping[str, Attack],
    grid: Mapping[str, Sequence[float]],
    seed: int,
    bound: Bound | str,
) -> dict[str, Any]:
    clean = results["clean"]
    correct = clean["correct"]
    content: dict[str, Any] = {
        "clean": {
            "accuracy": proportion(correct),
            "correct": int(correct.sum()),
            "invalid": int(clean["invalid"].sum()),
        },
        "attacks": {},
        "worst_case": [],
    }
    for name, attack in attacks.items():
        distances = results[name]["distances"]
        queries = results[name]["queries"][correct]
        entry: dict[str, Any] = {
            "norm": attack.norm,
            "black_box": attack.black_box,
            "settings": describe(attack),
            "queries": int(queries.sum()),
            "queries_per_image": float(queries.mean()) if len(queries) else None,
            "robust_accuracy": [
                {"eps": e, **proportion(correct & (distances > e))} for e in grid[attack.norm]
            ],
            "wall_seconds": float(results[name]["seconds"]),
        }
        if attack.minimum_distance:
            entry["distance"] = _distances(distances[correct], seed)
        content["attacks"][name] = entry
    for norm in NORMS:
        of_norm = [results[n]["distances"] for n, a in attacks.items() if a.norm == norm]
        if of_norm:
            worst = np.min(of_norm, axis=0)
            content["worst_case"] += [
                {"norm": norm, "eps": e, **proportion(correct & (worst > e))} for e in grid[norm]
            ]
    if isinstance(bound, str):
        content["lower_bound"] = {"unavailable": bound}
    else:
        logits, labels = torch.from_numpy(clean["logits"]), torch.from_numpy(clean["labels"])
        clean["certified"] = bound.distances(logits, labels).numpy()
        certified = clean["certified"][correct]
        content["lower_bound"] = {
            "lipschitz": bound.lipschitz,
            "factors": bound.factors,
            "n": int(correct.sum()),
            "mean": mean(certified, seed=seed),
            "median": quantile(certified, 0.5, seed=seed),
        }
    content["corruptions"] = None
    if "corruptions" in results:
        hits = results["corruptions"]["hits"]
        content["corruptions"] = {
            "mean": mean(hits.mean((1, 2)), seed=seed),
            "by_kind": {
                kind: [
                    {"severity": s, **proportion(hits[:, i, j])} for j, s in enumerate(SEVERITIES)
                ]
                for i, kind in enumerate(CORRUPTIONS)
            },
        }
    content["flags"] = _flags(results, attacks, grid)
    return content


def _distances(distances: np.ndarray, seed: int) -> dict[str, Any]:
    found = distances[np.isfinite(distances)]
    return {
        "n": len(distances),
        "not_found": int(len(distances) - len(found)),
        "mean": mean(found.astype(float), seed=seed),
        "median": quantile(distances, 0.5, seed=seed),
        "quartile_1": quantile(distances, 0.25, seed=seed),
        "quartile_3": quantile(distances, 0.75, seed=seed),
    }


def _flags(
    results: Mapping[str, Mapping[str, np.ndarray]],
    attacks: Mapping[str, Attack],
    grid: Mapping[str, Sequence[float]],
) -> list[str]:
    """What a reader must know before believing the numbers, in words.

    The signs of masked gradients are those of Athalye, Carlini, Wagner, "Obfuscated Gradients Give
    a False Sense of Security", ICML 2018.
    """
    flags = []
    correct = results["clean"]["correct"]
    n = int(correct.sum())
    if not n:
        return ["no image is classified correctly: nothing was attacked"]
    invalid = int(results["clean"]["invalid"].sum())
    if invalid:
        flags.append(f"{invalid} images have logits that are NaN or infinite; counted as wrong")
    for name, attack in attacks.items():
        missing = int(np.isinf(results[name]["distances"][correct]).sum())
        if attack.minimum_distance and missing:
            flags.append(
                f"{name} found no adversarial image for {missing} of {n}: the mean distance leaves "
                "them out"
            )
    for norm in NORMS:
        boxes = {
            black: [
                results[n]["distances"][correct]
                for n, a in attacks.items()
                if a.norm == norm and a.black_box == black
            ]
            for black in (True, False)
        }
        if not boxes[True] or not boxes[False]:
            continue
        black, white = np.min(boxes[True], axis=0), np.min(boxes[False], axis=0)
        for e in grid[norm]:
            only = int(((black <= e) & (white > e)).sum())
            if only > max(2, 0.05 * n):
                flags.append(
                    f"gradient masking: at eps {e:g} ({norm}) black-box attacks break {only} of "
                    f"{n} images that no white-box attack breaks"
                )
    masking = results.get("masking")
    if masking is not None and masking["looked"].any():
        looked = masking["looked"]
        total = int(looked.sum())
        few, many = (int(masking[k][looked].sum()) for k in ("stands_10", "stands_100"))
        if many > few + max(2, 0.05 * total):
            flags.append(
                f"gradient masking: PGD with 100 steps breaks {total - many} of {total} images, "
                f"with 10 steps {total - few}: more steps do not help"
            )
        largest = max(grid["l2"])
        of_l2 = [results[n]["distances"] <= largest for n, a in attacks.items() if a.norm == "l2"]
        if of_l2:
            broken = looked & np.any(of_l2, axis=0)
            few, many = (int((masking[k] & broken).sum()) for k in ("stands_10", "stands_100"))
            if many > max(2, 0.05 * total) and many > 0.8 * few:
                flags.append(
                    f"gradient masking: PGD does not improve with steps: of {int(broken.sum())} "
                    f"images that are broken at eps {largest:g} (l2), it misses {few} with 10 "
                    f"steps and {many} with 100"
                )
        unbounded = int(masking["stands_unbounded"][looked].sum())
        if unbounded > max(2, 0.05 * total):
            flags.append(
                f"gradient masking: {unbounded} of {total} images withstand PGD of unbounded eps "
                "(Linf 1), which no classifier can"
            )
        flat = int(masking["no_gradient"][looked].sum())
        if flat > max(2, 0.05 * total):
            flags.append(
                f"gradient masking: {flat} of {total} images have a gradient of exactly zero"
            )
    return flags


def _per_image(
    results: Mapping[str, Mapping[str, np.ndarray]],
    rows: np.ndarray,
    attacks: Mapping[str, Attack],
) -> dict[str, np.ndarray]:
    clean = results["clean"]
    arrays = {"row": rows, "label": clean["labels"], "correct": clean["correct"]}
    arrays["predicted"] = clean["logits"].argmax(1)
    if "certified" in clean:
        arrays["certified"] = clean["certified"]
    for name in attacks:
        for key in ("distances", "queries", "trajectory"):
            if key in results[name]:
                arrays[f"{name}/{key}"] = results[name][key]
    return arrays


def _twins(results: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A few images with what the first attack made of them."""
    for name, arrays in results.items():
        if "twins" in arrays and len(arrays["twins"]):
            return {"attack": np.array(name), **{k: arrays[k] for k in ("shown", "twins")}}
    return {}


def _layer_flags(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    vague = [layer["name"] for layer in layers if not layer["converged"]]
    if not vague:
        return []
    return [f"the singular values of {', '.join(vague)} did not converge"]


@contextmanager
def _reproducible() -> Iterator[None]:
    """Full float32, and the same algorithm whatever the batch, where CUDA could choose."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=False,
            deterministic=True,
            allow_tf32=False,
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _device_name(classifier: Classifier) -> str:
    device = classifier.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {str(classifier.dtype).removeprefix('torch.')}"


def _digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
