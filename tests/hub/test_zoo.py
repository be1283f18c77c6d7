import shutil

import pytest
import yaml

from hf_specreg.cli import main
from hf_specreg.connection import HubError
from hf_specreg.hub.card import write_card
from hf_specreg.hub.collection import collect
from hf_specreg.hub.encoder import Encoder
from hf_specreg.hub.publish import PublishError
from hf_specreg.hub.zoo import entries, publish_zoo
from tests.hub.conftest import make_model

SLUG = "me/encoders-of-hf-specreg-"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two encoders without reports, with their cards."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in ("digits/plain/model", "b"):
        make_model().save_pretrained(folder / name)
        write_card(Encoder.open(folder / name, license="mit"), f"me/{name[-1]}", folder / name)
    return folder


def items(hub):
    (collection,) = hub.collections.values()
    return [item["id"] for item in collection["items"]]


def test_a_zoo_is_pushed_into_one_collection_and_the_second_time_nothing_is(hub, zoo, capsys):
    for said in ("published", "nothing has changed"):
        main(["publish-zoo", str(zoo), "me"])
        assert items(hub) == ["me/b", "me/digits-plain"]
        assert [len(repo.branches["main"]) for repo in hub.repos.values()] == [2, 2]
        out = capsys.readouterr().out
        assert f"me/b: {said}\nme/digits-plain: {said}\n" in out
        assert f"{hub.url}/collections/{SLUG}" in out
    assert hub.count("POST", "/items") == 2
    assert hub.count("POST", "/commit/") == 2


def test_a_collection_is_listed_by_its_slug_and_its_address(hub, zoo):
    done = publish_zoo(zoo, "me")
    slug = done.collection.removeprefix(f"{hub.url}/collections/")
    names = ["me/b", "me/digits-plain"]
    assert [row["encoder"] for row in collect(slug)] == names
    assert [row["encoder"] for row in collect(done.collection)] == names
    assert [row["method"] for row in collect(slug)] == ["supervised, rep-spectral 0.01"] * 2


@pytest.mark.parametrize("fault", ["503", "drop after"])
def test_what_was_stopped_goes_on_and_makes_nothing_twice(hub, zoo, fault):
    seen = []

    def once(method, path):  # each request that changes something fails the first time
        new = method == "POST" and "collections" in path and path not in seen
        seen.append(path)
        return fault if new else None

    hub.faults = once
    publish_zoo(zoo, "me")
    assert hub.injected[fault] == 2
    assert items(hub) == ["me/b", "me/digits-plain"]
    assert len(hub.collections) == 1


def test_an_encoder_that_cannot_be_pushed_leaves_the_ones_before_in_the_collection(hub, zoo):
    broken = {"on": True}
    hub.faults = lambda method, path: (
        "403" if broken["on"] and method == "POST" and "digits-plain" in path else None
    )
    with pytest.raises(HubError, match="me/digits-plain"):
        publish_zoo(zoo, "me")
    assert items(hub) == ["me/b"]
    broken["on"] = False
    publish_zoo(zoo, "me")
    assert items(hub) == ["me/b", "me/digits-plain"]


def test_a_list_says_the_name_the_report_and_the_license_of_each(zoo, tmp_path):
    folder = tmp_path / "zoo"
    shutil.copytree(zoo / "b", folder / "runs/x")
    (folder / "zoo.yaml").write_text(
        yaml.safe_dump({"one": {"folder": "runs/x", "report": "runs/r", "license": "mit"}})
    )
    path = str(folder)
    assert entries(folder) == {
        "one": {"folder": f"{path}/runs/x", "report": f"{path}/runs/r", "license": "mit"}
    }
    (folder / "zoo.yaml").write_text("one: {fodler: x}")
    with pytest.raises(ValueError, match="one"):
        entries(folder)


def test_two_encoders_of_one_name_and_none_at_all_are_errors(zoo, tmp_path):
    shutil.copytree(zoo / "b", tmp_path / "a-b")
    shutil.copytree(zoo / "b", tmp_path / "a/b")
    with pytest.raises(PublishError, match="would both be named a-b"):
        entries(tmp_path)
    with pytest.raises(PublishError, match="write cards with hf-specreg card"):
        entries(tmp_path / "a/b/plots")
