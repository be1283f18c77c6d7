"""One atomic push of an encoder with its report and card to the Hub.

Everything is checked before the first byte is sent. All files go into one commit on top of the
state that was looked at: a push either completes or leaves the repository as it was. (One that is
made for it stays, empty, if the commit then fails.) A request that fails for a moment is tried
again for `PATIENCE` seconds (`hf_specreg.connection`), none after `DEADLINE` seconds of
the push. What was pushed is read back (`remote.py`).
"""

import re
import tempfile
import time
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_specreg.connection import first_line, retried, translated
from hf_specreg.encoders.blueprint import read_json
from hf_specreg.encoders.download import LOADED_FILES, RUN_FILE
from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.hub.card import card_files
from hf_specreg.hub.encoder import CARD_FILE, CardError, Encoder, notes_of, report_files
from hf_specreg.hub.metrics import eval_results_file
from hf_specreg.hub.notebook import NOTEBOOK_FILE, notebook
from hf_specreg.hub.remote import check_arrival, check_report_stays, remote_card
from hf_specreg.hub.trusted import by_trusted_publisher, scoped
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.study.result import Study

OURS = re.compile(
    r"preprocessor_config\.json|robustness\.(json|npz|parquet)|notebook\.ipynb|\.eval_results/hf_specreg\.yaml"
    r"|plots/((robust_accuracy|distances|sigmas)_(l2|linf)|study)\.png"
)
PATIENCE = 300.0  # seconds from the first try on in which a request is tried again
DEADLINE = 3600.0  # seconds of a push in which any is
T = TypeVar("T")
_until: ContextVar[float] = ContextVar("until", default=float("inf"))  # of the push, monotonic


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
    eval_results: bool = True,
    notes: Literal["folder", "hub"] | None = None,
    study: Study | str | Path | None = None,
    token: str | None = None,
) -> Pushed | None:
    """Publish a saved encoder.

    Args:
        folder: that `SpecRegModel.save_pretrained` wrote.
        repo_id: "org/name", or "name" in the token's own namespace; made if it is not there.
        report: of its robustness; default: the folder's robustness.json, where there is one.
        baseline: a report of another model on the same images, for the card.
        license: SPDX identifier; default: the one on the folder's card, else on the Hub's.
        private: of a repository that is made; one that is there already must be as is said.
        revision: branch, made if it is not there; default: main.
        create_pr: open a pull request instead of committing.
        commit_message: of the commit.
        eval_results: write `.eval_results/hf_specreg.yaml` where the data set is on the Hub.
        notes: which to keep where those on the folder's card and on the Hub's differ.
        study: that the encoder is a cell of, for the card.
        token: default: the one of `hf auth login`, or HF_TOKEN.

    Returns:
        What was done; None on all but the main process of a distributed run, which do nothing.

    Raises:
        PublishError: it is not fit to be published, or must not be; the message says why.
        CardError: an incomplete card, a report of other weights, or one that would be lost.
        HubError: the Hub is away or refuses, and nothing changed; or a file arrived damaged.
    """
    if not _is_main_process():
        return None
    _until.set(time.monotonic() + DEADLINE)
    encoder = Encoder.open(folder, report=report, baseline=baseline, license=license, study=study)
    _check(encoder, repo_id)
    api = HfApi(token=token)
    with translated(f"pushing to {repo_id}"):
        repo_id = _writable(api, repo_id, create_pr)
        head = _head(api, repo_id, private, revision, create_pr)
        published = remote_card(api, repo_id, head, _patience()) if head else ""
        check_report_stays(api, repo_id, head, encoder, _patience())
    files = _files(_beside(encoder, published, notes), repo_id, eval_results)
    with translated(f"pushing to {repo_id}"):
        _patiently(lambda: _check_card(files[CARD_FILE]))
        parent = head or _create(api, repo_id, private)
        _make_branch(api, repo_id, None if create_pr else revision)
        pushed = _commit(api, repo_id, files, parent, revision, create_pr, commit_message)
        check_arrival(api, repo_id, pushed.commit, files, _patience())
    return pushed


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


def _patience() -> float:
    return max(0.0, min(PATIENCE, _until.get() - time.monotonic()))


def _patiently(request: Callable[[], T]) -> T:
    return retried(request, _patience())


def _check(encoder: Encoder, repo_id: str) -> None:
    """Refuse what nobody should load, and a name that the Hub will not have."""
    for name, tensor in encoder.model.network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise PublishError(
                f"{encoder.folder}: {name} has values that are NaN or infinite; publish an earlier "
                "checkpoint (best/, or checkpoints/ of the run)"
            )
    stated = read_json(encoder.folder / "config.json").get("label_names") or ()
    if stated and len(stated) != encoder.model.num_classes:
        raise PublishError(
            f"{encoder.folder}/config.json has {len(stated)} label_names for a head of "
            f"{encoder.model.num_classes} classes: load it with SpecRegModel.from_pretrained("
            "folder, label_names=[...]), save that, and publish it"
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is no name of a repository: {error}") from error


def _check_card(card: bytes) -> None:
    """Let the Hub say whether it takes the card's front matter."""
    try:
        ModelCard(card.decode()).validate()
    except ValueError as error:  # what the client makes of a 400
        if isinstance(error, JSONDecodeError):
            raise
        raise PublishError(f"the Hub does not take the card: {first_line(error)}") from error


def _beside(encoder: Encoder, published: str, choice: str | None) -> Encoder:
    """The encoder with what the card on the Hub keeps, where its own has nothing of that."""
    mine, theirs = encoder.notes, notes_of(published)
    if choice is None and mine and theirs and mine != theirs:
        raise PublishError(
            f"the notes on the card in {encoder.folder} and on the Hub differ: say which to keep, "
            "--notes folder or --notes hub"
        )
    keep_mine = choice == "folder" or (choice is None and mine)
    return replace(encoder.beside(published), notes=mine if keep_mine else theirs)


def _files(encoder: Encoder, repo_id: str, eval_results: bool) -> dict[str, bytes | Path]:
    """What is published, by its path in the repository."""
    if not encoder.license:
        raise CardError(
            f'{repo_id} needs a license: give one, license="apache-2.0" or --license apache-2.0'
        )
    names = [name for name in LOADED_FILES if name != RUN_FILE]
    files: dict[str, bytes | Path] = {
        name: encoder.folder / name for name in names if (encoder.folder / name).is_file()
    }
    files |= report_files(encoder, repo_id) | card_files(encoder, repo_id)
    files[NOTEBOOK_FILE] = notebook(encoder, repo_id)
    return files | (eval_results_file(encoder) if eval_results else {})


def _writable(api: HfApi, repo_id: str, create_pr: bool) -> str:
    """Return the full name of the repository; refuse a token that cannot write there."""
    if by_trusted_publisher(api, repo_id):
        return repo_id
    user = _patiently(api.whoami)
    namespace, _, name = repo_id.rpartition("/")
    namespace = namespace or user["name"]
    full = f"{namespace}/{name}"
    organisations = {org["name"] for org in user.get("orgs", ())}  # who reads may write in parts
    if create_pr and namespace != user["name"]:
        return full  # whoever can read may propose
    if namespace not in {user["name"], *organisations}:
        raise PublishError(
            f"{user['name']} may not write to {full}, as no member of {namespace}; push to "
            f"{user['name']}/{name}, or open a pull request (create_pr)"
        )
    access = user.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read" or not scoped(access, {namespace, full}):
        raise PublishError(
            f"the token of {user['name']} cannot write to {namespace}: make one with write access "
            "in the Hub's settings, then `hf auth login`"
        )
    return full


def _head(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool
) -> str | None:
    """Return the commit to build on: the branch's, main's for a new one, None if there is none;
    for a pull request all must be there.
    """
    try:
        known = _patiently(lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        if create_pr:
            raise
        return None
    if known.id not in (None, repo_id):
        raise PublishError(f"{repo_id} was moved to {known.id}: push there")
    if private is not None and bool(known.private) != private:
        raise PublishError(
            f"{repo_id} is {'private' if known.private else 'public'} already: change that in "
            "its settings first, or push to another name"
        )
    if revision is None:
        return known.sha
    try:
        return _patiently(lambda: api.model_info(repo_id, revision=revision)).sha
    except RevisionNotFoundError:
        if create_pr or revision.startswith("refs/"):
            raise
        return known.sha


def _create(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Make the repository; return its first commit."""
    _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    return _patiently(lambda: api.model_info(repo_id)).sha


def _make_branch(api: HfApi, repo_id: str, revision: str | None) -> None:
    if revision is not None and not revision.startswith("refs/"):
        _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))


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
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "It seems that you are about to commit a data")
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
        return _patiently(attempt)
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        moved = error
    try:  # our own commit may have landed late: then nothing is left to do
        return _patiently(attempt)
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
    raise PublishError(
        f"{repo_id} was changed by someone else during the push; it is as they left it: look at "
        "their commit, then push again"
    ) from moved
