"""What the Hub has: the card before a push, and the checksums of what was pushed."""

import logging
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from hf_specreg.encoders.connection import HubError, first_line, retried
from hf_specreg.encoders.download import is_intact
from hf_specreg.hub.encoder import CARD_FILE

logger = logging.getLogger(__name__)


def remote_card(api: HfApi, repo_id: str, revision: str, patience: float) -> str:
    """Return the card that is on the Hub, for what is kept of it; empty if there is none."""
    try:
        path = retried(lambda: api.hf_hub_download(repo_id, CARD_FILE, revision=revision), patience)
    except RemoteEntryNotFoundError:
        return ""
    if not is_intact(Path(path)):
        raise HubError("the card on the Hub does not arrive as it is there: try again")
    return Path(path).read_text("utf-8", "replace")


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


def _same(stated: RepoFile | None, content: bytes | Path) -> bool:
    if stated is None:
        return False
    if stated.lfs:
        sent = CommitOperationAdd(stated.path, content).upload_info
        return stated.lfs.sha256 == sent.sha256.hex()
    content = content if isinstance(content, bytes) else content.read_bytes()
    return stated.blob_id == git_hash(content)
