"""One atomic push of an encoder with its report and card to the Hub.

Everything is checked before the first byte is sent. All files go into one commit on top of the
state that was looked at: a push either completes or leaves the repository as it was. (One that is
not there is made first, and stays, empty, if the commit then fails.) A request that fails for a
moment is tried again for `PATIENCE` seconds, beside the few times that the Hub's client tries by
itself; for a silent server see `hf_specreg.encoders.download`.
"""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_specreg.encoders.download import (
    LOADED_FILES,
    RUN_FILE,
    HubError,
    is_intact,
    translated,
)
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.hub.card import card_files
from hf_specreg.hub.encoder import (
    CARD_FILE,
    Encoder,
    notes_of,
    report_files,
)
from hf_specreg.hub.metrics import eval_results_file
from hf_specreg.robustness.report import RobustnessReport

OURS = re.compile(
    r"preprocessor_config\.json|robustness\.(json|npz)|\.eval_results/hf_specreg\.yaml"
    r"|plots/(robust_accuracy|distances|sigmas)_(l2|linf)\.png"
)
PATIENCE = 300.0  # seconds from the first try on in which a request is tried again
TRANSIENT = (408, 429, 500, 502, 503, 504)
T = TypeVar("T")


class PublishError(ValueError):
    """An encoder that is not fit to be published, or must not be; it says why and what to do."""


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: "org/name".
        commit: the revision that holds the files.
        changed: whether there was anything new.
        pull_request: its address, where one was opened.
    """

    repo_id: str
    commit: str
    changed: bool
    pull_request: str | None = None


def push(
    folder: str | Path,
    repo_id: str,
    *,
    report: RobustnessReport | str | Path | None = None,
    baseline: RobustnessReport | str | Path | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Publish encoder, report and card",
    eval_results: bool = False,
    notes: Literal["folder", "hub"] | None = None,
    token: str | None = None,
) -> Pushed | None:
    """Publish a saved encoder.

    Args:
        folder: that `SpecRegModel.save_pretrained` wrote.
        repo_id: "org/name", or "name" in the token's own namespace; made if it is not there,
            except for a pull request.
        report: of its robustness; default: the folder's robustness.json, where there is one.
        baseline: a report of another model on the same images, for the card.
        license: SPDX identifier; default: the one on the folder's card.
        private: of a repository that is made; one that is there already must be as is said.
        revision: branch, made if it is not there; default: main.
        create_pr: open a pull request instead of committing.
        commit_message: of the commit.
        eval_results: also write `.eval_results/hf_specreg.yaml`.
        notes: which to keep where those on the folder's card and on the Hub's differ.
        token: default: the one of `hf auth login`, or HF_TOKEN.

    Returns:
        What was done; None on all but the main process of a distributed run, which do nothing.

    Raises:
        PublishError: weights that are not finite, an invalid name, a token that cannot write, notes
            that differ, a repository that someone else changed meanwhile.
        CardError: an incomplete card, or a report of other weights.
        HubError: the Hub cannot be reached or refuses; the repository is as it was.
    """
    if not _is_main_process():
        return None
    encoder = Encoder.open(folder, report=report, baseline=baseline, license=license)
    _check_weights(encoder.model, folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is no name of a repository: {error}") from error
    extra = eval_results_file(encoder) if eval_results else {}
    api = HfApi(token=token)
    with translated(f"pushing to {repo_id}"):
        repo_id = _writable(api, repo_id, create_pr)
    card = card_files(encoder, repo_id)
    with translated(f"pushing to {repo_id}"):
        _retried(lambda: ModelCard(card[CARD_FILE].decode()).validate())
        parent = _prepare(api, repo_id, private, revision, create_pr)
        remote = _retried(lambda: _remote_card(api, repo_id, parent))
    noted = _with_notes(encoder, remote, notes)
    if noted is not encoder:
        card = card_files(noted, repo_id)
    files: dict[str, bytes | Path] = {
        name: Path(folder) / name
        for name in LOADED_FILES
        if name != RUN_FILE and (Path(folder) / name).is_file()
    }
    files |= report_files(encoder, repo_id) | card | extra
    with translated(f"pushing to {repo_id}"):
        return _commit(api, repo_id, files, parent, revision, create_pr, commit_message)


def push_model(
    model: SpecRegModel, repo_id: str, *, report: RobustnessReport | None = None, **options: Any
) -> Pushed | None:
    """Publish a model from memory; arguments as for `push`."""
    if not _is_main_process():
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return push(folder, repo_id, report=report, **options)


def _is_main_process() -> bool:
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized()
    return not several or distributed.get_rank() == 0


def _with_notes(encoder: Encoder, remote_card: str, choice: str | None) -> Encoder:
    """The encoder with the notes that are to be on the card."""
    mine, theirs = encoder.notes, notes_of(remote_card)
    if choice is None and mine and theirs and mine != theirs:
        raise PublishError(
            f"the notes on the card in {encoder.folder} and on the Hub differ: say which to keep, "
            "--notes folder or --notes hub"
        )
    if choice == "folder" or mine == theirs or (choice is None and mine):
        return encoder
    return replace(encoder, notes=theirs)


def _check_weights(model: SpecRegModel, folder: str | Path) -> None:
    for name, tensor in model.network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise PublishError(
                f"{folder}: {name} has values that are NaN or infinite; publish an earlier "
                "checkpoint (best/, or checkpoints/ of the run)"
            )


def _writable(api: HfApi, repo_id: str, create_pr: bool) -> str:
    """Return the full name of the repository; refuse a token that cannot write there."""
    user = _retried(api.whoami)
    namespace, _, name = repo_id.rpartition("/")
    namespace = namespace or user["name"]
    full = f"{namespace}/{name}"
    organisations = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", ())}
    if create_pr and namespace != user["name"]:
        return full  # whoever can read may propose
    if organisations.get(namespace) == "read" or namespace not in {user["name"], *organisations}:
        raise PublishError(
            f"{user['name']} may not write to {full}, as no writing member of {namespace}; push to "
            f"{user['name']}/{name}, or open a pull request (create_pr)"
        )
    access = user.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read" or not _scoped(access, {namespace, full}):
        raise PublishError(
            f"the token of {user['name']} cannot write to {namespace}: make one with write access "
            "in the Hub's settings, then `hf auth login`"
        )
    return full


def _scoped(access: dict[str, Any], places: set[str]) -> bool:
    """Whether a fine-grained token has a permission to write in one of the places."""
    if access.get("role") != "fineGrained":
        return True
    scopes = access.get("fineGrained", {}).get("scoped", ())
    return any(
        "repo.write" in scope.get("permissions", ())
        and scope.get("entity", {}).get("name") in places
        for scope in scopes
    )


def _prepare(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool
) -> str:
    """Make repository and branch if they are not there; return the branch's head.

    For a pull request nothing is made.
    """
    try:
        known = _retried(lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        if create_pr:
            raise
        _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    else:
        if known.id not in (None, repo_id):
            raise PublishError(f"{repo_id} was moved to {known.id}: push there")
        if private is not None and bool(known.private) != private:
            raise PublishError(
                f"{repo_id} is {'private' if known.private else 'public'} already: change that in "
                "its settings first, or push to another name"
            )
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        _retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    return _retried(lambda: api.model_info(repo_id, revision=revision)).sha


def _remote_card(api: HfApi, repo_id: str, revision: str) -> str:
    """Return the card that is on the Hub, for the notes on it; empty if there is none."""
    try:
        path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision)
    except RemoteEntryNotFoundError:
        return ""
    if not is_intact(Path(path)):
        raise HubError("the card on the Hub does not arrive as it is there: try again")
    return Path(path).read_text("utf-8", "replace")


def _commit(
    api: HfApi,
    repo_id: str,
    files: dict[str, bytes | Path],
    parent: str,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> Pushed:
    """Send all files in one commit on `parent`, which also deletes this package's that are no more.

    A commit whose answer was lost is not made twice: the next attempt finds its files there.
    """

    def attempt() -> Pushed:
        there = api.list_repo_files(repo_id, revision=revision)
        operations = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(n) for n in there if OURS.fullmatch(n) and n not in files),
        ]
        try:
            done = api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
        except RuntimeError as error:  # "Error while uploading", from what happened
            raise error.__cause__ or error from None
        return Pushed(repo_id, done.oid, done.oid != parent, done.pr_url)

    if create_pr:  # it would be opened twice
        return attempt()
    try:
        return _retried(attempt)
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        moved = error
    try:
        return _retried(attempt)  # our own commit may have landed late: then nothing is left to do
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
    raise PublishError(
        f"{repo_id} was changed by someone else during the push; it is as they left it: look at "
        "their commit, then push again"
    ) from moved


def _retried(request: Callable[[], T]) -> T:
    """Try again where the Hub or the way to it fails for a moment, for `PATIENCE` seconds."""
    end, wait = time.monotonic() + PATIENCE, 1.0
    while True:
        try:
            return request()
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT or time.monotonic() > end:
                raise
            asked = error.response.headers.get("Retry-After", "")
            pause = float(asked) if asked.isdigit() else wait
        except Exception as error:
            if not _is_of_the_network(error) or time.monotonic() > end:
                raise
            pause = wait
        time.sleep(pause)
        wait = min(2 * wait, 8)


def _is_of_the_network(error: Exception) -> bool:
    """Whether a request got no answer, or one that is none, such as a proxy's page.

    By name: the client's HTTP library is another from version to version.
    """
    if isinstance(error, OfflineModeIsEnabled | JSONDecodeError):
        return isinstance(error, JSONDecodeError)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"TransportError", "ConnectionError", "LocalEntryNotFoundError"})
