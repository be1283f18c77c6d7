import os
from pathlib import Path

import pytest
import yaml

from hf_specreg.hub.collection import collect
from hf_specreg.hub.zoo import entries
from hf_specreg.recipes import supervised
from recipes import zoo

SMALL = {
    "evaluation": {"attacks": {"fmn-l2": {"steps": 4}}, "samples": 12, "eps": {"digits": [0.5]}},
    "encoders": {
        "plain": {
            "config": "digits.yaml",
            "settings": {"regularizers.sensitivity.strength": 0},
        },
        "sensitive": {"config": "digits.yaml", "baseline": "plain"},
        "elsewhere": {"config": "mnist_mlp.yaml", "data": "mnist"},
        "moved": {
            "config": "digits_transfer.yaml",
            "recipe": "transfer",
            "start": "elsewhere",
        },
    },
}
TINY = {
    **{"epochs": 1, "data.train_samples": 64, "log_every": 1, "optimizer.warmup_epochs": 0},
    **{"penalty.burn_in_epochs": 0, "regularizers.sensitivity.burn_in_epochs": 0},
    "model": {
        **{"name": "mlp_2000", "input_size": [1, 8, 8]},
        "args": {"img_size": 8, "hidden_features": 8},
    },
}


def test_every_entry_is_a_run_and_comes_after_what_it_needs():
    content = yaml.safe_load(Path("recipes/zoo.yaml").read_text())
    known = {name: zoo.Entry(**entry) for name, entry in content["encoders"].items()}
    data = {"mnist": "org/mnist", "cifar10": "org/cifar10"}
    made = zoo.Zoo(known, content["evaluation"], data, {}, Path("runs/zoo"), Path("cards"))
    names = list(known)
    for i, (name, entry) in enumerate(known.items()):
        run = made.run(name)
        terms = run.regularizers
        assert (run.penalty.strength > 0) == name.endswith("rep-spectral")
        assert (terms.input_gradient.strength > 0) == name.endswith("input-gradient")
        assert (run.adversarial.method != "none") == name.endswith("adversarial")
        assert (terms.sensitivity.strength > 0) == name.endswith("sensitivity")
        assert (run.augment.noise > 0) == name.endswith("noise")
        assert run.data.source == data.get(entry.data, "digits")
        for needed in filter(None, (entry.start, entry.baseline)):
            assert needed in names[:i]
            assert known[needed].data == entry.data or needed == entry.start
        if entry.start:
            assert run.model.name == f"runs/zoo/{entry.start}/run/model"
        assert entry.data in content["evaluation"]["eps"]


def test_a_zoo_is_made_once_and_can_be_listed_and_published(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    made = {"file": "small.yaml", "settings": TINY, "output": "out", "cards": "cards/zoo"}
    zoo.make_zoo(**made)
    assert "left out, as their data are not given: elsewhere, moved\n" in capsys.readouterr().out
    rows = {row["encoder"]: row for row in collect("cards/zoo")}
    assert rows["sensitive"]["method"] == "supervised, sensitivity 0.1"
    assert rows["plain"]["method"] == "supervised"
    assert all(0 <= row["ECE"] <= 1 and row["ms an image"] > 0 for row in rows.values())
    assert 'href="zoo/plain/README.md"' in Path("cards/zoo.html").read_text()
    assert "the baseline" in Path("cards/zoo/sensitive/README.md").read_text()
    for name, entry in entries("out").items():
        assert Path(entry["folder"], "README.md").is_file()
        assert Path(entry["report"], "robustness.json").is_file()
        assert name in SMALL["encoders"]
    before = {path: os.stat(path).st_mtime_ns for path in Path("out").rglob("*.safetensors")}
    card = Path("cards/zoo/sensitive/README.md").read_text()
    monkeypatch.setattr(supervised, "train", None)
    monkeypatch.setattr(zoo, "evaluate_robustness", None)
    zoo.make_zoo(**made)
    assert before == {path: os.stat(path).st_mtime_ns for path in before}
    assert Path("cards/zoo/sensitive/README.md").read_text() == card
    zoo.make_zoo(**made, only=["plain"])
    assert list(entries("out")) == ["plain", "sensitive"]
    with pytest.raises(TypeError, match="not callable"):  # other images are attacked anew
        zoo.make_zoo(**made, only=["plain"], samples=6)
    with pytest.raises(zoo.ZooError, match=r"other settings \(there and here\): epochs"):
        zoo.make_zoo(**{**made, "settings": {**TINY, "epochs": 2}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"only": ["x"]}, "there is no 'x' in .*zoo.yaml: it has digits-sup"),
        ({"data": {"minst": "d"}}, "'minst' in .*: did you mean mnist. it has mnist, cifar10"),
    ],
)
def test_what_is_not_in_the_zoo_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        zoo.make_zoo(**given)


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("digits-5to9-transferred", "digits-0to4"),
        ("mnist-to-digits-input-gradient", "mnist-supervised"),
    ],
)
def test_what_an_encoder_needs_is_said_in_one_line_before_it_is_trained(
    tmp_path, capsys, name, needed
):
    folders = [f"--{key}={tmp_path / key}" for key in ("output", "cards")]
    with pytest.raises(SystemExit) as left:
        zoo.main([f"--only=[{name}]", *folders])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert f"zoo.py: error: {name} needs {needed}, which is not in" in said
    assert said.count("\n") == 1
