import shutil

import pytest
from huggingface_hub import HfApi

from hf_specreg import SpecRegModel
from hf_specreg.cli import main
from hf_specreg.encoders.checksum import weights_sha256
from hf_specreg.hub.card import card_files
from hf_specreg.hub.encoder import CardError, Encoder
from hf_specreg.hub.publish import push
from hf_specreg.robustness.text import table
from hf_specreg.study.plots import picture
from hf_specreg.study.result import Study, StudyError
from hf_specreg.study.tables import sections
from hf_specreg.study.verdict import cautions, verdict
from tests.study.example import make_content


@pytest.fixture
def folder(encoder, tmp_path):
    return shutil.copytree(encoder, tmp_path / "m")


def card_of(folder, study):
    opened = Encoder.open(folder, license="mit", study=study)
    return card_files(opened, "me/resnet")["README.md"].decode()


def study_of(folder, method="jacobian", strength=0.01, seed=1):
    """A study of which the folder's encoder is a cell."""
    content = make_content()
    (cell,) = (
        c
        for c in content["cells"]
        if (c["method"], c["strength"], c["seed"]) == (method, strength, seed)
    )
    cell["weights_sha256"] = weights_sha256(SpecRegModel.from_pretrained(folder))
    return Study(content)


def test_a_card_cites_the_study_that_its_encoder_is_a_cell_of(folder):
    study = study_of(folder)
    files = card_files(Encoder.open(folder, license="mit", study=study), "me/resnet")
    card, content = files["README.md"].decode(), study.content
    row = next(r for r in content["table"] if r["method"] == "jacobian")
    assert "This encoder is jacobian at 0.01, seed 1, in the study *example*." in card
    assert f"**{verdict(row, content)}**" in card
    assert "is harder to attack than the plain network at equal accuracy" in card
    assert table(*sections(content)["distances"][2:]) in card
    for said in (
        content["command"],
        f"- {content['flags'][0]}",
        "- its strength is: regularizers.jacobian.strength",
        "- attacks of every cell: fmn-l2 (steps 100, restarts 1), on 500 validation and 1,000 test",
        "![Accuracy against distance](plots/study.png)",
        "### By itself",
        "what a study shows of it",
    ):
        assert said in card, said
    assert files["plots/study.png"] == picture(content)


def test_a_card_says_all_that_the_study_warns_of(folder):
    study = study_of(folder)
    study.content["attacks"]["final"] = study.content["attacks"]["cells"]
    for said in cautions(study.content):
        assert f"- {said}" in card_of(folder, study=study)
    assert len(cautions(study.content)) > len(study.content["flags"])


@pytest.mark.parametrize(
    ("method", "strength", "said"),
    [
        ("jacobian", 0.1, "**The study chose 0.01 instead (largest distance among those within"),
        ("cross-Lipschitz", 0.1, "**The study chose no strength of it (no strength loses at most"),
        ("none", None, "**It is the plain network that the study compares all methods with.**"),
        ("stopped earlier", 50, "**It is the plain network stopped earlier, which the study"),
    ],
)
def test_a_cell_that_was_not_chosen_takes_no_credit(folder, method, strength, said):
    (folder / "robustness.json").unlink()
    card = card_of(folder, study=study_of(folder, method, strength))
    assert said in card
    assert "is harder to attack" not in card.split("|")[0]
    assert "Not measured" not in card
    assert "### By itself" not in card


def test_an_unfinished_study_says_nothing_yet(folder):
    content = study_of(folder).content
    content["table"] = content["final"] = []
    card = card_of(folder, Study(content))
    assert "The study is not finished: it says nothing of this strength" in card
    assert "is harder to attack" not in card


def test_an_encoder_that_is_none_of_a_studys_cells_is_refused(folder, tmp_path):
    Study(make_content(names=(), seeds=(0,))).save(tmp_path / "study")
    with pytest.raises(CardError, match=r"m holds weights \w{16}\.\.\., which are none of the cel"):
        card_of(folder, study=tmp_path / "study")
    with pytest.raises(StudyError, match="cannot be read as a study"):
        card_of(folder, study=tmp_path / "nothing")


def test_a_cited_study_names_no_way_to_a_folder(folder):
    study = study_of(folder)
    study.content["command"] = (
        "python recipes/study.py --config=/home/me/secret/a.yaml --settings.x=[/home/me/b] ~/me/c"
    )
    study.content["data"]["id"] = "/home/me/patients"
    study.content["methods"]["jacobian"]["settings"] = {"model.name": "/home/me/runs/model"}
    card = card_of(folder, study=study)
    assert "/me" not in card.replace("me/resnet", "")
    assert "python recipes/study.py --config=a.yaml --settings.x=[b] c" in card
    assert "- also set: model.name model" in card


def test_the_command_and_the_push_take_a_study(hub, folder, tmp_path, capsys):
    study_of(folder).save(tmp_path / "study")
    main(["card", str(folder), "--study", str(tmp_path / "study"), "--license", "mit"])
    assert "plots/study.png" in capsys.readouterr().out
    assert "in the study *example*" in (folder / "README.md").read_text()
    push(folder, "me/cited", study=tmp_path / "study")
    assert "plots/study.png" in HfApi().list_repo_files("me/cited")
    push(folder, "me/cited")
    assert "plots/study.png" not in HfApi().list_repo_files("me/cited")
