"""What the Hub has: card and report before a push, and the checksums of what was pushed."""

import logging
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from hf_specreg.connection import HubError, first_line, retried
from hf_specreg.encoders.blueprint import FolderError, read_json
from hf_specreg.encoders.download import is_intact
from hf_specreg.hub.encoder import (
    CARD_FILE,
    REPORT_FILE,
    CardError,
    Encoder,
    card_metadata,
    card_of,
)
from hf_specreg.hub.summary import KEY

logger = logging.getLogger(__name__)


def remote_card(api: HfApi, repo_id: str, revision: str, patience: float) -> str:
    """Return the card that is on the Hub, for what is kept of it; empty if there is none."""
    path = _file(api, repo_id, CARD_FILE, revision, patience)
    return path.read_text("utf-8", "replace") if path else ""


def check_report_stays(
    api: HfApi, repo_id: str, revision: str | None, encoder: Encoder, patience: float
) -> None:
    """Refuse a push without the report that the folder's card shows, or without one over a report
    of these very weights.

    Raises:
        CardError: there is such a card, or such a report on the Hub.
    """
    if encoder.report is not None:
        return
    shown = card_metadata(card_of(encoder.folder))
    if KEY in shown and shown.get("model-index"):  # a card of this package, with results
        raise CardError(
            f"the card in {encoder.folder} shows a report that is not given: give it (--report, or "
            "report in zoo.yaml), lay it beside the weights, or delete that card"
        )
    path = _file(api, repo_id, REPORT_FILE, revision, patience) if revision else None
    try:
        model = read_json(path).get("model") if path else None
    except FolderError:  # no report, then
        return
    if isinstance(model, dict) and model.get("weights_sha256") == encoder.weights:
        raise CardError(
            f"{repo_id} has a report of these weights, which this push would delete: give it again "
            f"(--report, and its --baseline), or delete {REPORT_FILE} there first"
        )


def check_arrival(
    api: HfApi, repo_id: str, commit: str, files: Mapping[str, bytes | Path], patience: float
) -> None:
    """Compare a commit's files with those that were sent, by the SHA-256 that the Hub states for
    large files and git's hash for others. A Hub that does not say is told of in a warning: the
    commit is made by then.

    Args:
        api: with the token.
        repo_id: "org/name".
        commit: that was made.
        files: what was sent, by path.
        patience: seconds in which the question is asked again.

    Raises:
        HubError: a file is missing there, or has other content.
    """
    try:
        stated = retried(lambda: api.get_paths_info(repo_id, [*files], revision=commit), patience)
    except Exception as error:  # whatever it is, the push is done
        logger.warning(
            "%s: commit %s could not be read back: %s", repo_id, commit, first_line(error)
        )
        return
    there = {entry.path: entry for entry in stated if isinstance(entry, RepoFile)}
    wrong = [name for name, content in files.items() if not _same(there.get(name), content)]
    if wrong:
        raise HubError(
            f"{repo_id}: {', '.join(wrong)} in commit {commit} is not what was sent: push again, "
            "and do not load that commit"
        )


def _file(api: HfApi, repo_id: str, name: str, revision: str, patience: float) -> Path | None:
    """A file that is on the Hub, downloaded; None if there is none."""
    try:
        path = retried(lambda: api.hf_hub_download(repo_id, name, revision=revision), patience)
    except RemoteEntryNotFoundError:
        return None
    if not is_intact(Path(path)):
        what = "card" if name == CARD_FILE else "report"
        raise HubError(f"the {what} on the Hub does not arrive as it is there: try again")
    return Path(path)


def _same(stated: RepoFile | None, content: bytes | Path) -> bool:
    if stated is None:
        return False
    if stated.lfs:
        sent = CommitOperationAdd(stated.path, content).upload_info
        return stated.lfs.sha256 == sent.sha256.hex()
    content = content if isinstance(content, bytes) else content.read_bytes()
    return stated.blob_id == git_hash(content)
