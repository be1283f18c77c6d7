"""What the network and the Hub can do to a push and to a load.

A push either completes or leaves the repository as it was; a load gives the right weights or an
error; nothing hangs. The number of injected faults is printed at the end.
"""

import contextlib
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, try_to_load_from_cache

from hf_specreg import SpecRegModel, connection
from hf_specreg.connection import HubError, translated
from hf_specreg.encoders.download import is_intact
from hf_specreg.hub import publish
from hf_specreg.hub.publish import PublishError, push
from tests.hub.server import FAULTS, Repo

REPO = "me/resnet"
PUSH = {  # what a push asks for
    "whoami": ("GET", "/api/whoami-v2"),
    "create": ("POST", "/api/repos/create"),
    "info": ("GET", "/api/models/me/resnet"),
    "card": ("HEAD", "/resolve/"),
    "validate": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "put": ("PUT", "/lfs/"),
    "commit": ("POST", "/commit/"),
}
LOAD = {
    "info": ("GET", "/api/models/me/resnet/revision"),
    "tree": ("GET", "/tree/"),
    "head": ("HEAD", "/resolve/"),
    "config": ("GET", "/config.json"),
    "weights": ("GET", "/model.safetensors"),
}
SIZE = (1, 8, 8)
LIMIT = 60  # seconds for one push or load, whatever happens to it
INJECTED: Counter[str] = Counter()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A small model without a report: fast to publish."""
    folder = tmp_path_factory.mktemp("bare")
    arguments = {"img_size": 8, "hidden_features": 16, "input_size": SIZE}
    SpecRegModel.from_timm("mlp_2000", **arguments).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def count_faults(hub, monkeypatch):
    monkeypatch.setattr(publish, "PATIENCE", 0.2)
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    yield
    INJECTED.update(hub.injected)


@pytest.fixture(scope="module", autouse=True)
def enough_faults(request, pytestconfig):
    yield
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(INJECTED.items()))
    reporter.write_line(f"\ninjected faults: {INJECTED.total()} ({kinds})")
    if len(request.session.items) > len(FAULTS) * 2 and not request.session.testsfailed:
        assert INJECTED.total() >= 200


def inject(hub, fault, where, times):
    """Do it to the first so many requests of a kind."""
    left = [times]

    def faults(method, path):
        if method == where[0] and where[1] in path and left[0] > 0:
            left[0] -= 1
            return fault
        return None

    hub.faults = faults


def attempted(action):
    """What the action gives, or None where it failed in one of the ways that are announced."""
    with contextlib.suppress(HubError, PublishError, FileNotFoundError):
        return action()
    return None


def test_a_file_that_arrived_as_another_is_named(hub, bare, monkeypatch):
    stored = Repo.commit

    def swapped(self, branch, files, *rest):
        return stored(self, branch, {**files, "config.json": b"{}"} if files else files, *rest)

    monkeypatch.setattr(Repo, "commit", swapped)
    with pytest.raises(HubError, match=r"config.json in commit \w+ is not what was sent"):
        push(bare, REPO, license="mit")


def test_a_push_that_cannot_be_read_back_is_done_and_says_so(hub, bare, caplog):
    inject(hub, "500", ("POST", "/paths-info/"), 10**6)
    pushed = push(bare, REPO, license="mit")
    assert pushed.commit == hub.repos[REPO].branches["main"][-1].oid
    assert "could not be read back" in caplog.text


def test_one_deadline_is_that_of_all_requests_of_a_push(hub, bare, monkeypatch):
    """Once it has passed, nothing is tried again, however patient each request is."""
    monkeypatch.setattr(publish, "PATIENCE", 60)
    monkeypatch.setattr(publish, "DEADLINE", 0)
    inject(hub, "503", PUSH["whoami"], 10**6)
    with pytest.raises(HubError, match="503"):
        push(bare, REPO, license="mit")
    assert hub.count("GET", "whoami") == 1


@pytest.mark.parametrize("times", [1, 10**6], ids=["once", "always"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_completes_or_leaves_the_repository_as_it_was(hub, bare, fault, times):
    for kind, where in PUSH.items():
        hub.repos.clear()
        hub.objects.clear()
        before = older_version(hub, bare) if kind != "create" else None
        inject(hub, fault, where, times)
        start = time.perf_counter()
        pushed = attempted(lambda: push(bare, REPO, license="mit"))
        assert time.perf_counter() - start < LIMIT, kind
        hub.faults = lambda method, path: None
        repo = hub.repos.get(REPO)
        if pushed is None:
            head = repo and repo.branches["main"][-1]
            assert head is before or (before is None and head.files == {}), kind
            push(bare, REPO, license="mit")  # the next try goes through
        else:
            assert pushed.commit == repo.branches["main"][-1].oid, kind
        history = hub.repos[REPO].branches["main"]
        assert len(history) == (2 if before is None else 4), kind
        files = history[-1].files
        for name in ("config.json", "model.safetensors"):
            assert files[name] == (bare / name).read_bytes(), kind
        assert b"license: mit" in files["README.md"], kind
        assert before is None or b"Theirs." in files["README.md"], kind


def older_version(hub, bare):
    """Publish under another license, and write notes on the Hub; return the head."""
    push(bare, REPO, license="apache-2.0")
    card = hub.repos[REPO].branches["main"][-1].files["README.md"].decode()
    noted = card.replace("*Intended use, what you saw, what to know.*", "Theirs.")
    assert noted != card
    return hub.repos[REPO].commit("main", {"README.md": noted.encode()}, "notes")


@pytest.mark.parametrize("fault", ["500", "429", "drop", "drop after", "stall", "slow", "garbage"])
def test_a_push_survives_what_passes(hub, bare, fault, monkeypatch):
    monkeypatch.setattr(publish, "PATIENCE", 20.0)
    for kind, where in PUSH.items():
        hub.repos.clear()
        hub.objects.clear()
        inject(hub, fault, where, 1)
        assert push(bare, REPO, license="mit").changed, kind


@pytest.mark.parametrize("times", [1, 10**6], ids=["once", "always"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_load_gives_the_right_weights_or_an_error(hub, bare, fault, times, fresh_cache):
    push(bare, REPO, license="mit")
    images = torch.rand(2, *SIZE)
    with torch.no_grad():
        expected = SpecRegModel.from_pretrained(bare).eval()(images)
    for kind, where in LOAD.items():
        fresh_cache()
        inject(hub, fault, where, times)
        start = time.perf_counter()
        for _ in range(2):  # what failed must not have left anything wrong in the cache
            model = attempted(lambda: SpecRegModel.from_pretrained(REPO).eval())
            if model is not None:
                with torch.no_grad():
                    torch.testing.assert_close(model(images), expected)
            assert time.perf_counter() - start < LIMIT, kind
            hub.faults = lambda method, path: None
        with torch.no_grad():
            again = SpecRegModel.from_pretrained(REPO).eval()(images)
        torch.testing.assert_close(again, expected)


TRANSIENT = ["500", "503", "429", "drop", "truncate", "garbage", "stall"]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_load_survives_one_of_what_passes(hub, bare, fault, fresh_cache, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 20.0)
    push(bare, REPO, license="mit")
    images = torch.rand(2, *SIZE)
    with torch.no_grad():
        expected = SpecRegModel.from_pretrained(bare).eval()(images)
    for kind in ("info", "tree", "config", "weights"):
        fresh_cache()  # of files; the client keeps the tree of a commit that it knows in memory
        hub.repos[REPO].commit("main", {"kind.txt": f"{fault} {kind}".encode()}, "another commit")
        hub.requests.clear()
        inject(hub, fault, LOAD[kind], 1)
        with torch.no_grad():
            torch.testing.assert_close(SpecRegModel.from_pretrained(REPO).eval()(images), expected)
        answered = fault == "garbage" and kind in ("config", "weights")  # it is for JSON answers
        assert hub.count(*LOAD[kind]) == (1 if answered else 2), kind


def test_what_is_logged_of_a_retry_names_the_fault_and_not_the_token(
    hub, bare, fresh_cache, monkeypatch, caplog
):
    monkeypatch.setattr(connection, "PATIENCE", 20.0)
    push(bare, REPO, license="mit")
    fresh_cache()
    inject(hub, "503", LOAD["info"], 1)
    SpecRegModel.from_pretrained(REPO, token="hf_writer")
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "503" in said
    assert "trying again in 1 s" in said
    assert "hf_writer" not in said


def test_bytes_that_were_altered_on_the_way_are_never_weights(hub, bare, fresh_cache):
    push(bare, REPO, license="mit")
    fresh_cache()
    inject(hub, "corrupt", ("GET", "/model.safetensors"), 10**6)
    with pytest.raises(HubError, match=r"model.safetensors does not have the hash"):
        SpecRegModel.from_pretrained(REPO)
    assert hub.injected["corrupt"] == 2


def test_a_file_in_the_store_that_repositories_share_is_compared_too(hub, bare, tmp_path):
    """hf_xet links the repository's blob, named by its hash, to a store named by another."""
    push(bare, REPO, license="mit")
    SpecRegModel.from_pretrained(REPO)
    pointer = Path(try_to_load_from_cache(REPO, "model.safetensors"))
    blob, shared = pointer.resolve(), tmp_path / ("f" * 64)
    blob.rename(shared)
    blob.symlink_to(shared)
    assert is_intact(pointer)
    SpecRegModel.from_pretrained(REPO)
    assert shared.exists()
    shared.write_bytes(shared.read_bytes()[:-4] + b"\0\0\0\1")
    assert not is_intact(pointer)
    SpecRegModel.from_pretrained(REPO)
    assert is_intact(pointer)


def test_a_damaged_cache_is_mended(hub, bare):
    push(bare, REPO, license="mit")
    images = torch.rand(2, *SIZE)
    model = SpecRegModel.from_pretrained(REPO).eval()

    blob = Path(try_to_load_from_cache(REPO, "model.safetensors")).resolve()
    blob.write_bytes(blob.read_bytes()[:-4] + b"\0\0\0\1")
    with torch.no_grad():
        mended = SpecRegModel.from_pretrained(REPO).eval()
        torch.testing.assert_close(mended(images), model(images))


def test_a_hub_that_wants_to_be_left_alone_for_a_day_is_an_error(hub, bare):
    inject(hub, "429 for long", PUSH["preupload"], 1)
    with pytest.raises(HubError, match="asks to come back in 86400 s"):
        push(bare, REPO, license="mit")


def test_a_repository_that_someone_else_changed_meanwhile_is_left_as_it_is(hub, bare):
    push(bare, REPO, license="mit")
    theirs = []

    def someone_else():
        if not theirs:
            theirs.append(hub.repos[REPO].commit("main", {"new.txt": b"theirs"}, "theirs"))

    hub.before_commit = someone_else
    with pytest.raises(PublishError, match="changed by someone else during the push"):
        push(bare, REPO, license="apache-2.0")
    assert hub.repos[REPO].branches["main"][-1] is theirs[0]
    push(bare, REPO, license="apache-2.0")
    assert b"license: apache-2.0" in hub.repos[REPO].branches["main"][-1].files["README.md"]


def test_what_was_uploaded_is_not_uploaded_again(hub, encoder):
    first = []

    def faults(method, path):
        if method == "PUT" and path not in first and len(first) < 2:
            first.append(path)
        return "403" if method == "PUT" and path not in first else None

    hub.faults = faults
    with pytest.raises(HubError, match="403"):
        push(encoder, REPO, license="mit")
    assert hub.objects
    kept = {f"/lfs/{oid}" for oid in hub.objects}
    hub.faults = lambda method, path: None
    hub.requests.clear()
    push(encoder, REPO, license="mit")
    assert not kept & {path for method, path in hub.requests if method == "PUT"}


def test_xet_is_off_until_the_last_of_several_calls_ends(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    first, second = translated("one thing"), translated("another")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert constants.HF_HUB_DISABLE_XET
    second.__exit__(None, None, None)
    assert not constants.HF_HUB_DISABLE_XET


def test_no_server_at_all(hub, bare):
    hub.close()
    with pytest.raises(HubError, match="cannot be reached"):
        push(bare, REPO, license="mit")
    with pytest.raises(HubError, match="the Hub cannot be asked"):
        SpecRegModel.from_pretrained(REPO)


def test_a_full_disk_is_named_and_leaves_nothing_wrong(hub, encoder, tmp_path, monkeypatch):
    push(encoder, REPO, license="mit")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(small))
        with pytest.raises(HubError, match=r"[Nn]o space left"):
            SpecRegModel.from_pretrained(REPO)
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        SpecRegModel.from_pretrained(REPO)
    finally:
        subprocess.run(["umount", str(small)], check=True)
