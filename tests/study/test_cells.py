"""A study's cells are what they claim to be, or the study does not begin."""

import json
from dataclasses import replace

import pytest

from hf_specreg.study.cells import StudyRunError
from hf_specreg.study.command import parse
from hf_specreg.study.config import NAME, STOPPED, EvaluationConfig, MethodConfig, StudyConfig
from tests.study.small import EVALUATION, METHODS, ROOT, SETTINGS, cells, study


def test_every_cell_is_the_base_with_its_method_strength_and_seed(tmp_path):
    found = cells(study(tmp_path))
    assert [(c.method, c.strength) for c in found if c.seed == 0] == [
        ("none", None),
        (STOPPED, 3),
        ("weight decay", 0.0001),
        ("weight decay", 0.001),
        ("rep-spectral", 0.01),
    ]
    assert len(found) == 10
    runs = {(c.method, c.strength, c.seed): c.run for c in found}
    assert runs["none", None, 1].seed == 1
    assert runs["none", None, 0].penalty.strength == 0
    assert runs[STOPPED, 3, 0].epochs == 3
    assert runs["weight decay", 0.001, 0].optimizer.weight_decay == 0.001
    assert runs["rep-spectral", 0.01, 0].penalty.strength == 0.01
    assert runs["rep-spectral", 0.01, 0].optimizer == runs["none", None, 0].optimizer
    assert runs["none", None, 0].model.args == {"img_size": 8, "hidden_features": 32}
    assert len({c.name for c in found}) == 10


def test_seeds_come_one_after_the_other_so_that_a_part_of_a_study_compares_all_methods(tmp_path):
    found = cells(study(tmp_path))
    assert [c.seed for c in found] == [0] * 5 + [1] * 5


def test_the_control_is_stopped_at_the_quarters_where_nothing_is_said(tmp_path):
    config = study(tmp_path, stopped_epochs=())
    assert [c.strength for c in cells(config) if c.method == STOPPED and c.seed == 0] == [1, 2, 3]


WRONG = {
    "a key that is none": (
        {"strong": MethodConfig("penalty.strenght", (1.0,))},
        r"method 'strong': .*penalty.strenght.*did you mean penalty.strength",
    ),
    "a value out of range": (
        {"strong": MethodConfig("penalty.strength", (-1.0,))},
        r"method 'strong': .*strength \(-1.*must be not negative",
    ),
    "a strength without effect": (
        {"weak": MethodConfig("penalty.strength", (0.0, 1.0))},
        "weak 0 changes nothing: its settings are those of none",
    ),
    "two that are one": (
        {
            "a": MethodConfig("penalty.strength", (1.0,)),
            "b": MethodConfig("penalty.strength", (1,)),
        },
        "b 1 changes nothing: its settings are those of a 1",
    ),
    "data of its own": (
        {"more": MethodConfig("data.train_samples", (100,))},
        "more 100 has data of its own",
    ),
    "one folder for two": (
        {
            "a b": MethodConfig("penalty.strength", (1.0,)),
            "a-b": MethodConfig("penalty.strength", (1.0,), {"penalty.scope": "all"}),
        },
        "two methods would share the folders",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_study_that_cannot_be_is_refused_before_anything_is_trained(name, tmp_path):
    methods, said = WRONG[name]
    with pytest.raises(StudyRunError, match=said):
        cells(study(tmp_path, methods={"none": MethodConfig(), **methods}))


def test_a_base_that_is_no_file_is_named(tmp_path):
    with pytest.raises(StudyRunError, match=r"base: there is no file or name 'nowhere\.yaml'"):
        cells(study(tmp_path, base="nowhere.yaml"))


@pytest.mark.parametrize("epochs", [4, 1])
def test_the_control_must_stop_before_the_end(epochs, tmp_path):
    stopped = () if epochs == 1 else (2, 4)
    with pytest.raises(StudyRunError, match=f"stopped_epochs .* below the {epochs} epochs"):
        cells(study(tmp_path, settings={**SETTINGS, "epochs": epochs}, stopped_epochs=stopped))


def test_a_setting_can_name_the_network_of_another_study_by_strength_and_seed(tmp_path):
    settings = {"model.name": "runs/other/cells/a_{strength}_seed{seed}/run/model"}
    methods = {"none": MethodConfig(), "after a": MethodConfig(None, (0.001, 1), settings)}
    names = {
        (c.strength, c.seed): c.run.model.name
        for c in cells(study(tmp_path, methods=methods))
        if c.method == "after a"
    }
    assert names[0.001, 1] == "runs/other/cells/a_0.001_seed1/run/model"
    assert names[1, 0] == "runs/other/cells/a_1_seed0/run/model"
    assert len(set(names.values())) == 4


def test_attacks_are_checked_before_anything_is_trained(tmp_path):
    wrong = replace(EVALUATION, final_attacks={"tangnet": {}})
    with pytest.raises(ValueError, match="no attack 'tangnet'"):
        cells(study(tmp_path, evaluation=wrong))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/studies").glob("*.yaml")), ids=str)
def test_every_study_can_be_begun_by_the_command_in_its_head(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it and its base are found by their names
    assert f"hf-specreg study --config {path.stem}" in path.read_text()
    config, _ = parse(["--config", path.stem])
    assert len(config.seeds) >= 3
    claim = "rep-spectral", "ll-spectral"  # the paper's
    assert (claim in config.pairs) == (set(claim) <= config.methods.keys())
    assert len(cells(replace(config, seeds=(0,)))) >= 3 * len(config.methods)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {}}, "the first of the methods is the plain network"),
        ({"methods": {"a": METHODS["rep-spectral"]}}, "the first of the methods is the plain"),
        ({"methods": {"none": MethodConfig(), "b": MethodConfig()}}, "'b' has no strengths"),
        ({"methods": {"none": MethodConfig(), STOPPED: METHODS["weight decay"]}}, "always there"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": ()}, "must be there"),
        ({"accuracy_margin": 2.0}, "accuracy_margin"),
        ({"methods": {"none": MethodConfig(), "a|b": METHODS["rep-spectral"]}}, r"methods: 'a\|b'"),
        ({"methods": {"<b>": MethodConfig()}}, "methods: '<b>' must have .* no |, <, > or line"),
        ({"methods": {"a\nb": MethodConfig()}}, r"methods: 'a\\nb' must have"),
        ({"methods": {"m" * 61: MethodConfig()}}, "must have 1 to 60 letters"),
        ({"pairs": (("weight decay", "none"),)}, r"\['weight decay', 'none'\] must be two of weig"),
        ({"pairs": (("weight decay", "noise"),)}, "must be two of weight decay, rep-spectral"),
        ({"pairs": (("weight decay", "weight decay"),)}, "must be two of weight decay"),
        (
            {"pairs": (("weight decay", "rep-spectral"), ("rep-spectral", "weight decay"))},
            r"pairs \(.*\) name one twice",
        ),
        ({"output_dir": "runs/a<b"}, "output_dir: 'a<b' must have"),
        ({"output_dir": "."}, "output_dir: '' must have"),
    ],
)
def test_settings_that_make_no_study_are_named(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        study(tmp_path, **changes)


def test_settings_of_parts_are_checked_too():
    with pytest.raises(ValueError, match="go with a key"):
        MethodConfig("penalty.strength")
    with pytest.raises(ValueError, match="twice"):
        MethodConfig("penalty.strength", (1.0, 1.0))
    with pytest.raises(ValueError, match="ood_classes"):
        EvaluationConfig(ood_classes=("cat",))
    with pytest.raises(ValueError, match="each once"):
        EvaluationConfig(final_attacks={"fmn-l2": {}})
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"strengths .* must be finite"):
            MethodConfig("penalty.strength", (0.1, strength))
    for eps in ((), (0.5, 1.0, 0.5)):
        with pytest.raises(ValueError, match=r"eps .* each once"):
            EvaluationConfig(eps=eps)
    assert StudyConfig("base", METHODS).plain == "none"


def test_names_that_a_study_takes_are_those_that_its_format_does():
    names = json.loads((ROOT / "hf_specreg/study/study.schema.json").read_text())["$defs"]["name"]
    assert names["pattern"] == f"^{NAME}$"


@pytest.mark.parametrize("attacks", [{"fmn-linf": {}}, {"pgd-l2": {}, "fmn-linf": {}}, {}])
def test_attacks_that_find_no_distances_to_compare_by_are_refused(attacks, tmp_path):
    wrong = replace(EVALUATION, attacks=attacks)
    with pytest.raises(
        StudyRunError, match=r"find no minimum distances in L2.*add one of .*fmn-l2"
    ):
        cells(study(tmp_path, evaluation=wrong))


def test_the_settings_of_all_cells_can_be_nested_or_dotted(tmp_path):
    dotted = {**SETTINGS, "optimizer.lr": 0.5}
    assert cells(study(tmp_path, settings=dotted)).plain.optimizer.lr == 0.5


def test_no_of_a_yaml_file_is_a_word_where_one_is_asked_for(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "base: digits\nmethods: {none: {}}\nsettings: {mixed_precision: no, channels_last: no, "
        "data.in_memory: yes, regularizers.sensitivity.strength: 0}\n"
    )
    config, _ = parse(["--config", str(path)])
    plain = cells(config).plain
    assert (plain.mixed_precision, plain.channels_last, plain.data.in_memory) == ("no", False, True)


def test_settings_of_the_command_line_stand_beside_those_of_the_file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "base: b.yaml\nsettings: {data: {train_samples: 5}, epochs: 3}\nmethods: {none: {}}\n"
    )
    config, _ = parse(
        ["--config", str(path), "--settings.data.source", "folder", "--settings.epochs=4"]
    )
    assert config.settings == {"data.train_samples": 5, "epochs": 4, "data.source": "folder"}
