import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    TrainingArguments,
    pipeline,
)

from hf_specreg import RobustnessReport, SpecRegModel, SpecRegTrainer
from hf_specreg.connection import HubError
from hf_specreg.hub.card import write_card
from hf_specreg.hub.encoder import CardError, Encoder, card_metadata
from hf_specreg.hub.metrics import eval_results_file
from hf_specreg.hub.publish import PublishError, push
from tests.hub.conftest import make_model, report_on
from tests.hub.server import _Handler

REPO = "me/resnet"


def files_of(hub, repo=REPO, branch="main"):
    return hub.repos[repo].branches[branch][-1].files


def publish(encoder, repo=REPO, **options):
    return push(encoder, repo, **{"license": "apache-2.0", **options})


def logits(model, inputs):
    with torch.no_grad():
        output = model(inputs)
    return getattr(output, "logits", output)


def test_a_push_is_one_commit_with_everything_in_it(hub, encoder):
    pushed = publish(encoder)
    assert pushed.changed
    history = hub.repos[REPO].branches["main"]
    assert len(history) == 2
    assert pushed.commit == history[-1].oid
    files = files_of(hub)
    assert set(files) == {
        *("README.md", "config.json", "model.safetensors", "specreg.json", "notebook.ipynb"),
        *("robustness.json", "robustness.npz", "robustness.parquet"),
        ".eval_results/hf_specreg.yaml",
        *(f"plots/{name}_l2.png" for name in ("robust_accuracy", "distances", "sigmas")),
    }
    assert files["model.safetensors"] == (encoder / "model.safetensors").read_bytes()
    assert json.loads(files["robustness.json"])["model"]["id"] == REPO


def test_an_unchanged_push_sends_nothing_and_makes_no_commit(hub, encoder):
    first = publish(encoder)
    hub.requests.clear()
    again = publish(encoder)
    assert again.commit == first.commit
    assert not again.changed
    assert hub.count("PUT", "/lfs/") == 0
    assert hub.count("POST", "/commit/") == 0


def test_only_what_changed_is_sent_again(hub, encoder):
    publish(encoder)
    hub.requests.clear()
    assert publish(encoder, license="mit").changed
    assert hub.count("PUT", "/lfs/") == 0
    assert hub.count("POST", "/commit/") == 1


def test_no_way_on_this_machine_and_no_token_is_published(hub, encoder):
    publish(encoder, token="hf_writer")
    for name, content in files_of(hub).items():
        for secret in (b"secret-project", b"hf_writer", str(encoder.parent).encode()):
            assert secret not in content, name


def test_every_stock_library_loads_it_with_the_same_logits(hub, encoder, monkeypatch):
    publish(encoder)
    images = torch.rand(2, 3, 32, 32)
    local = SpecRegModel.from_pretrained(encoder).eval()
    expected = logits(local, images)
    for _ in range(2):  # from the Hub, then from the cache while nothing can be reached
        inputs = local.normalize(images)
        torch.testing.assert_close(
            logits(SpecRegModel.from_pretrained(REPO).eval(), images), expected
        )
        by_timm = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
        torch.testing.assert_close(logits(by_timm, inputs), expected)
        by_auto = AutoModelForImageClassification.from_pretrained(REPO).eval()
        torch.testing.assert_close(logits(by_auto, inputs), expected)
        assert AutoImageProcessor.from_pretrained(REPO) is not None
        classify = pipeline("image-classification", model=REPO)
        assert len(classify(_picture())) == 3
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        hub.faults = lambda method, path: "500"


def _picture():
    from PIL import Image

    return Image.new("RGB", (40, 40), (200, 30, 30))


def test_it_loads_where_this_package_is_not_installed(hub, encoder):
    publish(encoder)
    code = (
        "import sys; sys.modules['hf_specreg'] = None\n"
        "import timm, transformers\n"
        f"timm.create_model('hf-hub:{REPO}', pretrained=True)\n"
        f"transformers.AutoModelForImageClassification.from_pretrained('{REPO}')\n"
        "print('loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("loaded"), done.stderr


def test_a_transformers_model_and_its_processor_are_published(hub, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = SpecRegModel.from_transformers(config, num_classes=4, input_size=(3, 32, 32)).eval()
    model.push_to_hub(REPO, license="mit")
    assert "preprocessor_config.json" in files_of(hub)
    images = torch.rand(2, 3, 32, 32)
    again = AutoModelForImageClassification.from_pretrained(REPO).eval()
    torch.testing.assert_close(logits(again, model.normalize(images)), logits(model, images))


def test_what_the_trainer_pushes_from_a_checkpoint_loads(hub, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = SpecRegModel.from_transformers(config, num_classes=4, input_size=(3, 32, 32))
    row = {"pixel_values": torch.rand(3, 32, 32), "labels": 1}
    settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "every_save"}
    settings |= {"save_steps": 1, "max_steps": 1, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), **settings, disable_tqdm=True)
    trainer = SpecRegTrainer(
        model, arguments, train_dataset=[row] * 4, penalty={"strength": 0.01, "every": 2}
    )
    trainer.train()
    trainer.push_in_progress.wait_until_done()
    again = SpecRegModel.from_pretrained(REPO).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again(images), model.eval()(images))
    assert again.metadata["config"]["penalty"]["every"] == 2


def test_a_headless_encoder_is_a_feature_extractor(hub, tmp_path):
    model = make_model(num_classes=0)
    model.push_to_hub(REPO, license="mit")
    images = torch.rand(2, 3, 32, 32)
    again = SpecRegModel.from_pretrained(REPO).eval()
    torch.testing.assert_close(again(images), model(images))
    stock = timm.create_model(f"hf-hub:{REPO}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(logits(stock, model.normalize(images)), model(images))
    front = yaml.safe_load(files_of(hub)["README.md"].split(b"---")[1])
    assert front["pipeline_tag"] == "image-feature-extraction"


def test_push_to_hub_takes_a_report(hub):
    model = make_model()
    model.push_to_hub(REPO, report=report_on(model, "mine"), license="mit", private=True)
    assert "robustness.json" in files_of(hub)
    assert hub.repos[REPO].private


def test_a_pull_request_leaves_the_branch_alone(hub, encoder):
    publish(encoder)
    before = hub.repos[REPO].branches["main"][-1].oid
    pushed = publish(encoder, license="mit", create_pr=True)
    assert pushed.pull_request.endswith("/discussions/1")
    assert hub.repos[REPO].branches["main"][-1].oid == before
    assert b"license: mit" in files_of(hub, branch="refs/pr/1")["README.md"]


def test_a_branch_is_made_and_loaded_from(hub, encoder):
    publish(encoder, revision="v2")
    assert "model.safetensors" not in files_of(hub)
    assert "model.safetensors" in files_of(hub, branch="v2")
    SpecRegModel.from_pretrained(REPO, revision="v2")
    with pytest.raises(FileNotFoundError, match="no such revision"):
        SpecRegModel.from_pretrained(REPO, revision="v3")


def test_what_a_person_wrote_on_the_hub_is_kept(hub, encoder):
    publish(encoder)
    card = files_of(hub)["README.md"].decode()
    noted = card.replace("*Intended use, what you saw, what to know.*", "For beetles only.")
    noted = noted.replace("# resnet", "# rewritten by hand")
    hub.repos[REPO].commit("main", {"README.md": noted.encode()}, "notes")
    publish(encoder)
    card = files_of(hub)["README.md"].decode()
    assert "For beetles only." in card
    assert "rewritten by hand" not in card


def test_front_matter_that_is_the_owners_is_kept(hub, encoder):
    publish(encoder, license="other")
    card = files_of(hub)["README.md"].decode()
    own = {
        **{"license_name": "ours", "license_link": "LICENSE", "language": ["en", "no"]},
        **{"extra_gated_prompt": "Say why.", "extra_gated_fields": {"Country": "country"}},
    }
    front = yaml.safe_dump({**own, "tags": ["mine"], "pipeline_tag": "depth-estimation"})
    front = front.replace("'no'", "no")
    kept = [line for line in card.splitlines(True) if not line.startswith(("pipeline_tag", "tags"))]
    noted = "".join(kept).replace("---\n", f"---\n{front}", 1)
    hub.repos[REPO].commit("main", {"README.md": noted.encode()}, "front matter")
    push(encoder, REPO)
    again = card_metadata(files_of(hub)["README.md"].decode())
    assert {key: again.get(key) for key in own} == own
    assert again["pipeline_tag"] == "image-classification"
    assert "hf-specreg" in again["tags"]
    assert not push(encoder, REPO).changed
    publish(encoder, license="mit")
    again = card_metadata(files_of(hub)["README.md"].decode())
    assert "license_name" not in again
    assert again["language"] == ["en", "no"]


def test_notes_that_differ_are_not_chosen_between(hub, encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "m")
    publish(folder)
    card = files_of(hub)["README.md"].decode()

    def noted(text):
        return card.replace("*Intended use, what you saw, what to know.*", text)

    (folder / "README.md").write_text(noted("Mine.\n\n\n\nEnd."))
    hub.repos[REPO].commit("main", {"README.md": noted("Theirs.").encode()}, "notes")
    with pytest.raises(PublishError, match="--notes folder or --notes hub"):
        publish(folder)
    publish(folder, notes="hub")
    assert b"Theirs." in files_of(hub)["README.md"]
    publish(folder, notes="folder")
    assert b"Mine.\n\n\n\nEnd." in files_of(hub)["README.md"]


def test_what_is_out_of_date_is_deleted_and_what_is_others_stays(hub, encoder, tmp_path):
    publish(encoder)
    hub.repos[REPO].commit("main", {"plots/own.png": b"own", "notes.txt": b"own"}, "own")
    other = make_model()
    with torch.no_grad():
        other.network.fc.bias.add_(1)
    other.save_pretrained(tmp_path)
    publish(tmp_path)
    assert set(files_of(hub)) == {
        *("README.md", "config.json", "model.safetensors", "specreg.json", "notebook.ipynb"),
        *("plots/own.png", "notes.txt"),
    }
    assert b"Not measured" in files_of(hub)["README.md"]


def test_a_report_of_the_same_weights_is_not_deleted(hub, encoder, tmp_path):
    publish(encoder)
    make_model().save_pretrained(tmp_path)
    with pytest.raises(CardError, match=r"has a report of these weights, .* give it again"):
        publish(tmp_path)
    assert "robustness.json" in files_of(hub)
    hub.repos[REPO].commit("main", {"robustness.json": b"[]"}, "damaged")
    publish(tmp_path)
    assert "robustness.json" not in files_of(hub)


def test_a_commit_that_lands_late_is_recognised_as_ours(hub, encoder):
    publish(encoder)
    mine = []

    def late():  # the first attempt's commit lands when the second's is about to be made
        if not mine:
            mine.append(True)
            hub.land_twice = True

    hub.before_commit = late
    pushed = publish(encoder, license="mit")
    history = hub.repos[REPO].branches["main"]
    assert pushed.commit == history[-1].oid
    assert len(history) == 3


def test_a_repository_that_was_moved(hub, encoder):
    publish(encoder)
    hub.moved[REPO] = "me/elsewhere"
    with pytest.raises(PublishError, match="was moved to me/elsewhere: push there"):
        publish(encoder, license="mit")


def test_a_pull_request_makes_nothing_else(hub, encoder):
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a repository"):
        publish(encoder, "stranger/resnet", create_pr=True)
    assert hub.repos == {}


def test_eval_results_are_written_where_the_data_set_is_on_the_hub(
    hub, encoder, tmp_path, monkeypatch
):
    publish(encoder)
    entries = yaml.safe_load(files_of(hub)[".eval_results/hf_specreg.yaml"])
    assert entries[0]["dataset"] == {"id": "org/pictures", "task_id": "accuracy", "revision": "abc"}
    assert "eps 0.1" in entries[1]["notes"]
    publish(encoder, eval_results=False)
    assert ".eval_results/hf_specreg.yaml" not in files_of(hub)
    opened = Encoder.open(encoder)
    (tmp_path / "data/mnist").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for elsewhere in ("digits", "./org/pictures", "/org/pictures", "data/mnist", None):
        opened.report.content["data"]["id"] = elsewhere
        assert eval_results_file(opened) == {}
    assert eval_results_file(replace(opened, report=None)) == {}
    for other in ({"cut": True}, {"split": "100 of the test"}, {"splits": {"classes": ["a", "b"]}}):
        opened = Encoder.open(encoder)
        assert eval_results_file(opened)
        opened.report.content["data"] |= other
        assert eval_results_file(opened) == {}


def test_eval_results_are_of_the_whole_test_split_alone(encoder):
    opened = Encoder.open(encoder)
    data = opened.report.content["data"]
    for part in ({"split": "validation"}, {"split": None}, {"splits": {"classes": ["a"]}}):
        content = {**opened.report.content, "data": {**data, **part}}
        report = RobustnessReport(content, opened.report.images)
        assert eval_results_file(replace(opened, report=report)) == {}
    data["splits"] = {"configuration": "big"}
    (text,) = eval_results_file(opened).values()
    assert all(entry["notes"].endswith(" (big)") for entry in yaml.safe_load(text))


def test_per_image_results_are_a_table_beside_the_arrays(hub, encoder):
    publish(encoder)
    table = pq.read_table(pa.BufferReader(files_of(hub)["robustness.parquet"]))
    images = RobustnessReport.load(encoder).images
    assert set(table.column_names) == {name for name in images if "trajectory" not in name}
    for name in table.column_names:
        np.testing.assert_array_equal(table.column(name).to_numpy(), images[name])


def test_other_ranks_do_nothing(hub, encoder, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert publish(encoder) is None
    assert not hub.requests


def test_results_on_a_card_of_another_library_are_no_report_of_this_one(hub, tmp_path):
    make_model().save_pretrained(tmp_path)
    results = "model-index: [{name: x, results: []}]"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{results}\n---\n# By a Trainer\n")
    publish(tmp_path)
    assert "Not measured" in files_of(hub)["README.md"].decode()


class TestRefusedBeforeAnythingIsSent:
    @pytest.fixture(autouse=True)
    def nothing_was_sent(self, hub):
        yield
        assert not [r for r in hub.requests if r[0] in ("POST", "PUT")]

    def test_a_stale_report(self, hub, encoder):
        other = make_model()
        other.network.conv1[0].weight.data += 1
        with pytest.raises(CardError, match=r"report is of weights \w+\.\.\., but .* holds \w+"):
            publish(encoder, report=report_on(other, "other"))

    def test_weights_that_are_not_finite(self, hub, encoder, tmp_path):
        model = make_model()
        model.network.conv1[0].weight.data[0] = torch.nan
        model.save_pretrained(tmp_path)
        with pytest.raises(PublishError, match=r"conv1.0.weight has values that are NaN"):
            publish(tmp_path)

    def test_a_card_that_would_lose_its_report(self, hub, encoder, tmp_path):
        make_model().save_pretrained(tmp_path)
        opened = Encoder.open(tmp_path, report=encoder, license="mit")
        write_card(opened, REPO, tmp_path)
        with pytest.raises(CardError, match="shows a report that is not given"):
            publish(tmp_path)

    def test_no_license(self, hub, encoder):
        with pytest.raises(CardError, match="needs a license"):
            push(encoder, REPO)

    def test_labels_that_do_not_match_the_head(self, hub, encoder, tmp_path):
        make_model(label_names=["a", "b", "c"]).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["label_names"] = ["a", "b"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(PublishError, match="2 label_names for a head of 3 classes"):
            publish(tmp_path)

    def test_an_invalid_name(self, hub, encoder):
        with pytest.raises(PublishError, match="no name of a repository"):
            publish(encoder, "me/a/b")

    def test_a_token_that_cannot_write(self, hub, encoder):
        with pytest.raises(PublishError, match="cannot write to me: make one with write access"):
            publish(encoder, token="hf_reader")

    def test_a_fine_grained_token_for_another_place(self, hub, encoder, monkeypatch):
        user = {
            "name": "me",
            "orgs": [{"name": "org"}],
            "auth": {
                "accessToken": {
                    "role": "fineGrained",
                    "fineGrained": {
                        "scoped": [{"entity": {"name": "org"}, "permissions": ["repo.write"]}]
                    },
                }
            },
        }
        monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: user)
        with pytest.raises(PublishError, match="cannot write to me"):
            publish(encoder)

    def test_an_expired_token(self, hub, encoder):
        with pytest.raises(HubError, match=r"401.*hf auth login"):
            publish(encoder, token="hf_old")

    def test_a_namespace_of_others(self, hub, encoder):
        with pytest.raises(PublishError, match="no member of stranger"):
            publish(encoder, "stranger/resnet")

    def test_offline(self, hub, encoder, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            publish(encoder)


def test_a_card_that_the_hub_does_not_take_is_not_sent(hub, encoder, monkeypatch):
    said = {"errors": [{"message": "license must be one of"}], "warnings": []}
    monkeypatch.setattr(_Handler, "validate", lambda self, body: (said, {"status": 400}))
    with pytest.raises(PublishError, match=r"the Hub does not take the card: .*license must be"):
        publish(encoder)
    assert not [r for r in hub.requests if r[0] in ("POST", "PUT") and "validate" not in r[1]]


def test_a_member_that_reads_an_organisation_is_tried_and_refused_by_the_hub(hub, encoder):
    with pytest.raises(HubError, match=r"the Hub answers 403 .*ask for access"):
        publish(encoder, "readers/resnet")
    assert "readers/resnet" not in hub.repos


def test_a_member_that_reads_an_organisation_may_write_to_a_resource_group_of_it(hub, encoder):
    hub.repos["readers/resnet"] = hub.new_repo("readers/resnet")
    hub.resource_group.add("readers/resnet")
    assert publish(encoder, "readers/resnet").changed


def test_a_second_push_keeps_the_license_that_is_on_the_hub(hub):
    model = make_model()
    with pytest.raises(CardError, match='me/resnet needs a license: give one, license="apache'):
        model.push_to_hub(REPO)
    model.push_to_hub(REPO, license="mit")
    with torch.no_grad():
        model.network.fc.bias.add_(1)
    assert model.push_to_hub(REPO).changed
    assert b"license: mit" in files_of(hub)["README.md"]
    model.push_to_hub(REPO, license="apache-2.0")
    assert b"license: apache-2.0" in files_of(hub)["README.md"]


@pytest.mark.parametrize("status", ["400", "405", "413"])
def test_an_answer_that_stays_the_same_is_not_said_to_pass(hub, encoder, status, monkeypatch):
    monkeypatch.setattr("hf_specreg.connection.HUB", hub.url)
    hub.faults = lambda method, path: status if "/preupload/" in path else None
    with pytest.raises(HubError, match=f"answers {status} .*it will answer the same again"):
        publish(encoder)
    assert hub.count("POST", "/preupload/") == 1


def test_a_mirror_that_gives_downloads_only_is_named(hub, encoder):
    """One of olah answers 405 or 404 to what is no download."""
    hub.faults = lambda method, path: "405" if "whoami" in path else None
    with pytest.raises(HubError, match=f"HF_ENDPOINT is {hub.url}: a mirror gives downloads"):
        publish(encoder)


def test_private_does_not_go_into_a_public_repository(hub, encoder):
    publish(encoder)
    with pytest.raises(PublishError, match="is public already: change that"):
        publish(encoder, private=True, license="mit")


def test_the_token_is_in_no_log_message_or_file(hub, encoder, monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    client = logging.getLogger("huggingface_hub")
    caplog.set_level("DEBUG", logger="huggingface_hub")
    monkeypatch.setattr(client, "propagate", True)
    hub.faults = lambda method, path: "403" if "/commit/" in path else None
    with pytest.raises(HubError) as refused:
        publish(encoder, token="hf_writer")
    chain, error = "", refused.value
    while error is not None:
        chain, error = chain + repr(error) + str(error), error.__cause__ or error.__context__
    assert "403" in chain
    out, err = capfd.readouterr()
    assert "hf_writer" not in chain + out + err + caplog.text
    for folder, _, names in os.walk(os.environ["HF_HUB_CACHE"]):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                assert b"hf_writer" not in file.read()


def test_the_token_is_in_no_list_of_processes(hub, encoder):
    lists = []
    hub.before_commit = lambda: lists.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())
    code = "from hf_specreg.cli import main; main()"
    command = [sys.executable, "-c", code, "push", str(encoder), REPO, "--license", "mit"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert b"published" in said
    assert b"hf_writer" not in said
    assert len(lists) == 1
    assert b"--license" in lists[0]
    assert b"hf_writer" not in lists[0]
