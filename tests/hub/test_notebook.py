import ast
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from hf_specreg import SpecRegModel
from hf_specreg.cli import main
from hf_specreg.hub.encoder import CardError, Encoder, card_metadata
from hf_specreg.hub.notebook import notebook
from hf_specreg.hub.space import write_space
from tests.pages import only, page

TINY = {"input_size": (1, 8, 8), "img_size": 8, "hidden_features": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny classifier of digits."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    model = SpecRegModel.from_timm("mlp_2000", num_classes=10, **TINY)
    model.metadata = {
        "data": {"source": "digits"},
        "config": {"output_dir": "/home/someone/secret-project/run"},
    }
    model.save_pretrained(folder)
    return folder


def cells(content, kind):
    return [cell["source"] for cell in content["cells"] if cell["cell_type"] == kind]


def test_a_notebook_is_valid_and_its_cells_run(folder, capsys):
    content = json.loads(notebook(Encoder.open(folder), str(folder)))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        code = cell["cell_type"] == "code"
        assert set(cell) - {"execution_count", "outputs"} == {
            *("cell_type", "id", "metadata", "source")
        }
        assert ("outputs" in cell) == code
    names = {}
    for source in cells(content, "code"):
        exec(compile(source, "cell", "exec"), names)
    said = capsys.readouterr().out
    assert "(1, 8, 8) -> 10 classes" in said
    assert names["features"].shape == (1, 16)
    assert f"L2 distance {names['found'].distance:.3f}" in said
    assert f"which is within eps {names['found'].distance:.3g}." in said
    assert names["pair"].size == (512, 256)


def test_a_notebook_without_the_package_says_so_at_once(folder, monkeypatch):
    first, *_ = cells(json.loads(notebook(Encoder.open(folder), str(folder))), "code")
    monkeypatch.setitem(sys.modules, "hf_specreg", None)
    with pytest.raises(ImportError, match=r"not installed.* clone .* pip install '.\[attacks\]'"):
        exec(compile(first, "cell", "exec"), {})


def test_a_picture_is_attacked_as_shown(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20), (90, 9, 200)).save("image.png")
    exec(only(page("zoo"), "moved").replace("runs/digits/model", str(folder)), {})
    assert "L2 distance" in capsys.readouterr().out
    assert Image.open("difference.png").size == (256, 256)


def test_an_encoder_without_a_head_is_not_attacked_and_one_of_unknown_data_makes_noise(tmp_path):
    SpecRegModel.from_timm("mlp_2000", num_classes=0, **TINY).save_pretrained(tmp_path)
    content = json.loads(notebook(Encoder.open(tmp_path), "me/it's"))
    text = "\n".join(cells(content, "code"))
    assert "effect_noise" in text
    assert "nearest_adversarial" not in text
    assert 'from_pretrained("me/it\'s")' in text
    with pytest.raises(CardError, match="has no head"):
        write_space(tmp_path, tmp_path / "space")


def test_a_space_is_an_app_its_requirements_and_its_metadata(folder, tmp_path, capsys):
    main(["space", str(folder), "--output", str(tmp_path / "own"), "--license", "mit"])
    said = capsys.readouterr().out
    assert "app.py" in said
    assert "does not install hf_specreg yet" in said
    source = "hf-specreg[attacks] @ git+https://x.example/it"
    given = ["--repo_id", "me/it", "--requirement", source]
    main(["space", str(folder), "--output", str(tmp_path / "hub"), *given])
    assert "yet" not in capsys.readouterr().out
    app = (tmp_path / "own/app.py").read_text()
    ast.parse(app)
    assert "MODEL = 'model'" in app
    assert (tmp_path / "own/requirements.txt").read_text().startswith("# ")
    copied = SpecRegModel.from_pretrained(tmp_path / "own/model")
    assert copied.metadata["config"]["output_dir"] == "run"
    about = card_metadata((tmp_path / "own/README.md").read_text())
    assert (about["sdk"], about["app_file"], about["license"]) == ("gradio", "app.py", "mit")
    assert "MODEL = 'me/it'" in (tmp_path / "hub/app.py").read_text()
    assert not (tmp_path / "hub/model").exists()
    assert card_metadata((tmp_path / "hub/README.md").read_text())["models"] == ["me/it"]
    assert (tmp_path / "hub/requirements.txt").read_text() == f"{source}\n"


def test_a_space_has_the_name_of_the_run_as_a_person_wrote_it(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "it's <1>" / "model").parent
    write_space(run / "model", tmp_path / "space")
    app = (tmp_path / "space/app.py").read_text()
    assert """gr.Blocks(title="it's <1>")""" in app
    assert "# it's <1>" in (tmp_path / "space/README.md").read_text()


def test_a_picture_is_of_the_splits_that_were_trained_on(folder):
    opened = Encoder.open(folder)
    opened.run["config"] = {"data": {"classes": ["1", "2"], "split_seed": 3, "revision": None}}
    text = notebook(opened, "me/it").decode()
    assert "load_splits('digits', classes=['1', '2'], seed=3).test[0]" in text
    report = {"id": "org/set", "revision": "abc", "splits": {"classes": ["7"], "x": 1}}
    reported = replace(opened, report=SimpleNamespace(content={"data": report}))
    text = notebook(reported, "me/it").decode()
    assert "load_splits('org/set', revision='abc', classes=['7']).test[0]" in text
    assert "hf-specreg[" not in text
