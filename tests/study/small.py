"""The smallest study: a hidden layer of 32 on the embedded digits, four epochs."""

from dataclasses import replace
from pathlib import Path

from hf_specreg.study.cells import Cells
from hf_specreg.study.command import recipe_of
from hf_specreg.study.config import EvaluationConfig, MethodConfig, StudyConfig
from hf_specreg.study.folder import StudyFolder
from hf_specreg.study.result import Study

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "data": {"source": "digits", "validation_fraction": 0.2},
    "model": {"input_size": [1, 8, 8], "args": {"img_size": 8, "hidden_features": 32}},
    "optimizer.lr": 1.0,
    "penalty": {"strength": 0, "burn_in_epochs": 1},
    "batch_size": 64,
    "epochs": 4,
    "log_every": 20,
}
METHODS = {
    "none": MethodConfig(),
    "weight decay": MethodConfig("optimizer.weight_decay", (0.0001, 0.001)),
    "rep-spectral": MethodConfig("penalty.strength", (0.01,)),
}
SECONDS = ("seconds", "versions", "output_dir", "command")
EVALUATION = EvaluationConfig(
    attacks={"deepfool-l2": {"steps": 5}},
    final_attacks={"tangent": {"iterations": 2}},
    validation=40,
    test=60,
    final=20,
    timing_steps=0,
)


def study(output, **changes):
    """The configuration of the study in a folder."""
    config = StudyConfig(
        base=str(ROOT / "recipes/configs/mnist_mlp.yaml"),
        methods=METHODS,
        output_dir=str(output),
        settings=SETTINGS,
        seeds=(0, 1),
        stopped_epochs=(3,),
        accuracy_margin=0.2,
        evaluation=EVALUATION,
    )
    return replace(config, **changes)


def cells(config):
    """Its cells."""
    return Cells(config, recipe_of(config))


def folder(config):
    """Its folder."""
    return StudyFolder(config.output_dir)


def table(config):
    """What a study found, without how long it took and where."""

    def without(value):
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if not k.endswith(SECONDS)}
            return {k: without(v) for k, v in kept.items() if k not in ("name",)}
        return [without(v) for v in value] if isinstance(value, list) else value

    return without(Study.load(config.output_dir).content)
