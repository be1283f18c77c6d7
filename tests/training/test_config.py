"""The run configuration: every setting has a range, and what does not fit is named."""

import json
from dataclasses import fields

import pytest

from hf_specreg.data.datasets import DataConfig
from hf_specreg.data.transforms import AugmentConfig
from hf_specreg.spectral.regularizers import RegularizersConfig
from hf_specreg.spectral.regularizers.bss import BSSConfig
from hf_specreg.spectral.regularizers.input_gradient import InputGradientConfig
from hf_specreg.spectral.regularizers.jacobian import JacobianConfig
from hf_specreg.spectral.regularizers.l2_sp import L2SPConfig
from hf_specreg.spectral.regularizers.rep_spectral import PenaltyConfig
from hf_specreg.spectral.regularizers.sensitivity import SensitivityConfig
from hf_specreg.training.config import RunConfig, SelfSupervisedRunConfig, TransferRunConfig
from hf_specreg.training.metrics import TrackerConfig
from hf_specreg.training.optimizer import OptimizerConfig
from hf_specreg.training.probe import ProbeConfig
from hf_specreg.training.report import ReportConfig
from hf_specreg.training.resume import changes_of_the_run, differences
from hf_specreg.training.self_supervision import SelfSupervisedConfig
from hf_specreg.training.state import recorded_settings
from hf_specreg.training.transfer import TransferConfig


def test_burn_in_is_counted_in_epochs_steps_or_a_fraction():
    assert PenaltyConfig(burn_in_epochs=1.5).burn_in(10, 4) == 15
    assert PenaltyConfig(burn_in_steps=7).burn_in(10, 4) == 7
    assert PenaltyConfig(burn_in_fraction=0.9).burn_in(10, 4) == 36
    assert PenaltyConfig().burn_in(10, 4) == 0
    with pytest.raises(ValueError, match="not several"):
        PenaltyConfig(burn_in_epochs=1, burn_in_steps=7)


def test_values_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"strength \(-1\)"):
        PenaltyConfig(strength=-1)
    with pytest.raises(ValueError, match=r"epochs \(0\) must be at least 1"):
        RunConfig(epochs=0)
    with pytest.raises(ValueError, match=r"clip_grad \(inf\) must be finite"):
        RunConfig(optimizer=OptimizerConfig(clip_grad=float("inf")))
    with pytest.raises(ValueError, match=r"bss.k \(40\) exceeds the images .* \(32\)"):
        RunConfig(
            batch_size=64, accumulation=2, regularizers=RegularizersConfig(bss=BSSConfig(0.1, k=40))
        )
    with pytest.raises(ValueError, match="steps_per_epoch is needed for a stream"):
        RunConfig(data=DataConfig(streaming=True))


@pytest.mark.parametrize(
    ("burn_in", "says"),
    [
        ({"burn_in_epochs": 2}, r"burn_in_epochs \(2\) leaves the term no step of 2 epochs: lower"),
        ({"burn_in_fraction": 1.0}, r"burn_in_fraction \(1\.0\) leaves the term no step"),
    ],
)
def test_a_term_that_would_begin_after_the_training_is_refused(burn_in, says):
    sensitivity = RegularizersConfig(sensitivity=SensitivityConfig(0.1, **burn_in))
    for term in ({"penalty": PenaltyConfig(**burn_in)}, {"regularizers": sensitivity}):
        with pytest.raises(ValueError, match=says):
            RunConfig(epochs=2, **term)
    RunConfig(epochs=2, penalty=PenaltyConfig(0.0, **burn_in))


def test_what_needs_labels_is_refused_where_there_are_none():
    regularizers = RegularizersConfig(input_gradient=InputGradientConfig(0.1))
    with pytest.raises(ValueError, match=r"\['input_gradient'\] need labels: set their strength"):
        SelfSupervisedRunConfig(regularizers=regularizers)


def test_differences_name_the_key_and_both_values():
    a, b = RunConfig().as_dict(), RunConfig(penalty=PenaltyConfig(strength=0.5)).as_dict()
    assert differences(a, b) == ["penalty.strength: 0.01 and 0.5"]
    assert differences(a, a) == []


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (JacobianConfig, "projections", 0),
        (JacobianConfig, "images", 0),
        (InputGradientConfig, "step", 0.0),
        (InputGradientConfig, "images", 0),
        (InputGradientConfig, "ramp_epochs", -1.0),
        (L2SPConfig, "ramp_epochs", -1.0),
        (L2SPConfig, "head", -1.0),
        (BSSConfig, "k", 0),
        (PenaltyConfig, "lanczos_steps", 1),
        (OptimizerConfig, "encoder_lr", -1.0),
        (OptimizerConfig, "layer_decay", 3.0),
        (SelfSupervisedConfig, "temperature", 0.0),
        (SelfSupervisedConfig, "teacher_momentum", 2.0),
        (SelfSupervisedConfig, "bank", 0),
        (ProbeConfig, "l2", 0.0),
        (ProbeConfig, "images", 0),
        (TransferConfig, "frozen_stages", -1),
        (TransferConfig, "lora_rank", 0),
        (ReportConfig, "samples", -1),
        (AugmentConfig, "noise", -0.1),
        (AugmentConfig, "mixup", -0.2),
        (AugmentConfig, "cutmix", -1.0),
        (AugmentConfig, "label_smoothing", 1.0),
        (DataConfig, "train_samples", 0),
        (OptimizerConfig, "warmup_epochs", -1),
        (OptimizerConfig, "min_lr", -0.1),
        (OptimizerConfig, "decay_rate", -0.5),
        (OptimizerConfig, "decay_epochs", 0),
        (RunConfig, "steps_per_epoch", -1),
    ],
)
def test_every_setting_has_a_range(kind, name, value):
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be"):
        kind(**{name: value})


def test_a_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.warmup_epochs \(3\) must be at most the 2 ep"):
        RunConfig(epochs=2, optimizer=OptimizerConfig(warmup_epochs=3))
    RunConfig(epochs=2, optimizer=OptimizerConfig(warmup_epochs=2))  # as networks stopped early


def test_which_terms_are_of_the_encoder_alone():
    off = {"jacobian", "cross_lipschitz", "input_gradient", "l2_sp"}  # these are of the head too
    terms = {item.name: item.type for item in fields(RegularizersConfig) if item.type is not bool}
    assert {name for name, kind in terms.items() if not kind().of_encoder} == off
    assert JacobianConfig(of="features").of_encoder
    assert PenaltyConfig().of_encoder
    assert not PenaltyConfig(scope="all").of_encoder


def test_spectral_norm_is_not_compiled():
    with pytest.raises(ValueError, match=r"compile does not take .*: set one of the two to no"):
        RunConfig(compile=True, regularizers=RegularizersConfig(spectral_norm=True))


def test_a_run_goes_on_where_a_setting_did_not_exist_yet():
    before = {"epochs": RunConfig().epochs, "regularizers": {"sensitivity": {}}}
    assert changes_of_the_run(before, RunConfig()) == []
    now = RunConfig(regularizers=RegularizersConfig(sensitivity=SensitivityConfig(images=8)))
    assert changes_of_the_run(before, now) == ["regularizers.sensitivity.images: 16 and 8"]


def test_settings_that_are_gone_and_had_no_part_in_the_weights_do_not_stop_a_run():
    now = TransferRunConfig(transfer=TransferConfig(head="probe"))
    before = json.loads(json.dumps(now.as_dict()))
    before["probe"] |= {"epochs": 50, "lr": 0.01}
    assert changes_of_the_run(before, now) == []
    before["probe"]["l2"] = 1.0
    assert changes_of_the_run(before, now) == ["probe.l2: 1.0 and 0.0001"]


def test_what_trackers_are_started_with_is_not_recorded():
    """It may hold an API key, and what is recorded is published."""
    tracker = TrackerConfig(init_kwargs={"comet_ml": {"api_key": "secret"}})
    config = RunConfig(log_with=("comet_ml",), tracker=tracker)
    assert "secret" not in json.dumps(config.as_dict())
    assert "secret" not in json.dumps(recorded_settings(config))
