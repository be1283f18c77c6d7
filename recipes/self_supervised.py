"""Train an encoder by self-supervision with the spectral penalty, then put linear heads on it.

    python recipes/self_supervised.py --config recipes/configs/mnist_simclr.yaml
    accelerate launch recipes/self_supervised.py --config FILE --ssl.method byol
    python recipes/self_supervised.py --config recipes/configs/mnist_simclr.yaml --resume

It leaves in output_dir, beside what recipes/supervised.py leaves:

    model/        the encoder, without a head
    classifier/   the encoder with the paper's head, a logistic regression on frozen features

All keys and their defaults: hf_specreg/training/config.py, or --help. It needs the extra `ssl`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import set_seed
from torch.utils.data import Dataset

from hf_specreg.data.datasets import ImageSplits
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.robustness.evaluate import evaluate_robustness
from hf_specreg.training.build import (
    build_images,
    build_model,
    build_splits,
    plain_training_images,
    run_metadata,
)
from hf_specreg.training.command import add_metrics, finish, parse_run, process_state
from hf_specreg.training.config import SelfSupervisedRunConfig
from hf_specreg.training.loop import TrainingLoop
from hf_specreg.training.metrics import TrainingResult
from hf_specreg.training.objectives import SelfSupervised
from hf_specreg.training.probe import NeighbourScores, probe_classifier


def parse(arguments: Sequence[str] | None = None) -> tuple[SelfSupervisedRunConfig, bool]:
    """Return the configuration and whether to resume."""
    return parse_run(SelfSupervisedRunConfig, __doc__, arguments)


def train(config: SelfSupervisedRunConfig, *, resume: bool = False) -> TrainingResult:
    """Train the encoder, probe its features, attack the classifier that they give."""
    state = process_state()
    set_seed(config.seed)
    splits = build_splits(config.data)
    encoder = build_model(config.model, ())
    objective = SelfSupervised(encoder, config.ssl)
    images = build_images(splits, encoder, config)
    bank = plain_training_images(splits, encoder, config, config.ssl.bank)
    score = NeighbourScores(
        bank, neighbours=config.ssl.neighbours, batch_size=config.eval_batch_size
    )
    metadata = run_metadata(splits, images)
    loop = TrainingLoop(objective, **images, config=config, score=score, metadata=metadata)
    result = loop.run(resume=resume)
    folder = Path(config.output_dir) / "classifier"
    if state.is_main_process:
        found = probe(result.model_folder, splits, images["test_images"], config, folder)
        result = add_metrics(result, found)
    state.wait_for_everyone()
    if config.report.samples:
        attack(folder, splits, config)
    return result


def probe(
    trained: Path,
    splits: ImageSplits,
    test_images: Dataset,
    config: SelfSupervisedRunConfig,
    folder: Path,
) -> dict[str, float]:
    """Fit the probes on un-augmented training images; save the classifier of the logistic one."""
    names = splits.label_names
    classifier = SpecRegModel.from_pretrained(trained, num_classes=len(names), label_names=names)
    images = plain_training_images(splits, classifier, config, config.probe.images)
    metrics = probe_classifier(classifier, images, test_images, config.probe, seed=config.seed)
    classifier.metadata["metrics"] = {**classifier.metadata["metrics"], **metrics}
    classifier.save_pretrained(folder)
    return metrics


def attack(folder: Path, splits: ImageSplits, config: SelfSupervisedRunConfig) -> None:
    """Attack the classifier on test images, by all processes; leave output_dir/report/."""
    state = process_state()
    output = Path(config.output_dir) / "report"
    report = evaluate_robustness(
        SpecRegModel.from_pretrained(folder),
        splits.test,
        attacks=config.report.attacks,
        eps=config.report.eps,
        samples=min(config.report.samples, len(splits.test)),
        seed=config.seed,
        name=f"{config.ssl.method} {config.model.name}",
        data={"id": config.data.source, "revision": config.data.revision, "split": "test"},
        device=state.device,
        output=output,
        shard=(state.process_index, state.num_processes),
        barrier=state.wait_for_everyone,
    )
    if state.is_main_process:
        report.save(output / "robustness.json")
        report.to_html(output / "report.html")
        print(report.to_markdown(), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says, and print the result as JSON."""
    config, resume = parse(arguments)
    finish(train(config, resume=resume))


if __name__ == "__main__":
    main(sys.argv[1:])
