"""A repository of the Hub as a local folder: whole, unaltered, and in finite time.

huggingface_hub's client waits without end for a silent server, and checks the size of what it
downloads, not the content. Here a request ends after `SILENCE` seconds of silence, a Hub that wants
to be left alone for longer than `LONGEST_WAIT` is an error, and every file in the cache is compared
with the hash that the Hub gave for it. Transfers go by HTTP, not by Xet, whose client knows none of
these limits.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
RUN_FILE = "specreg.json"
PROCESSOR_FILE = "preprocessor_config.json"
LOADED_FILES = ["config.json", PROCESSOR_FILE, RUN_FILE, WEIGHTS_FILE]
PICKLES = re.compile(r"\.(bin|pt|pth|pth\.tar|ckpt|pkl|h5|msgpack|npz)$")
SILENCE = 60.0  # seconds
LONGEST_WAIT = 300.0  # seconds that the Hub may ask to be left alone; its rate limits' window


class HubError(OSError):
    """The Hub, or the way to it, did not do its part; the message says what to do."""


def download(name_or_folder: str | Path, *, revision: str | None, token: str | None) -> Path:
    """Return the local folder; or download the few files of a Hub repository that are read.

    Raises:
        FileNotFoundError: neither a folder nor a repository, no such revision, or it has no
            safetensors weights.
        HubError: the Hub cannot be reached or refuses, the disk is full, or what came is not what
            the Hub says it is.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        with translated(f"loading {name_or_folder}"):
            folder = _snapshot(str(name_or_folder), revision, token)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"{name_or_folder} has no {WEIGHTS_FILE}; only safetensors weights are read"
            + _pickles(name_or_folder, revision, token)
        )
    return folder


def limit_silence() -> None:
    """Let huggingface_hub's requests of this process end: see the head of this file.

    Shorter time limits that a request has already are left alone.
    """
    make_client = _http._GLOBAL_CLIENT_FACTORY
    if getattr(make_client, "limits_silence", False):
        return

    def limited():
        client = make_client()
        _limit_client(client)
        return client

    limited.limits_silence = True
    _limit_client(get_session())  # set_client_factory would close it under other threads' feet
    _http._GLOBAL_CLIENT_FACTORY = limited


def _limit_client(client) -> None:
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks.get("request", ()), _limit],
        "response": [*hooks.get("response", ()), _refuse_to_wait],
    }


def _limit(request) -> None:
    # Some requests of huggingface_hub say "no limit" themselves, which a client's default is not.
    limits = {"connect": None, "read": None, "write": None, "pool": None}
    limits |= request.extensions.get("timeout", {})
    request.extensions["timeout"] = {k: min(v or SILENCE, SILENCE) for k, v in limits.items()}


def _refuse_to_wait(response) -> None:
    asked = [response.headers.get("Retry-After", "")]
    asked += re.findall(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    wait = max((float(text) for text in asked if text.isdigit()), default=0.0)
    if response.status_code in (429, 503) and wait > LONGEST_WAIT:
        raise HubError(f"the Hub asks to come back in {wait:g} s: try again then")


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn the many errors of the Hub's client into a few that say what to do."""
    limit_silence()
    again = "try again; what was transferred is kept"
    xet, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        raise HubError(
            f"{doing}: it is not in the cache, and the Hub cannot be asked "
            f"({type(cause).__name__}: {first_line(cause)}): try again when it can be reached"
        ) from error
    except (FileNotFoundError, HubError):
        raise
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{doing}: no such revision: {first_line(error)}") from error
    except GatedRepoError as error:
        raise HubError(f"{doing}: ask for access on its page first: {first_line(error)}") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{doing}: neither a local folder nor a repository on the Hub that your token may see "
            f"(an expired one? `hf auth login`): {first_line(error)}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {401: "log in with `hf auth login`, or renew the token", 403: "ask for access"}
        raise HubError(
            f"{doing}: the Hub answers {status} ({first_line(error)}): {remedy.get(status, again)}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{doing}: HF_HUB_OFFLINE is set: {first_line(error)}") from error
    except OSError as error:
        raise HubError(f"{doing}: {first_line(error)}: {again}") from error
    except (JSONDecodeError, KeyError) as error:
        raise HubError(f"{doing}: the Hub's answer cannot be read: {error!r}: {again}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        raise HubError(
            f"{doing}: the Hub cannot be reached, or was silent for {SILENCE:g} s "
            f"({type(error).__name__}: {error}): {again}"
        ) from error
    finally:
        constants.HF_HUB_DISABLE_XET = xet


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


def _snapshot(name: str, revision: str | None, token: str | None) -> Path:
    """Download, and once more where a file in the cache is not what its hash says."""
    for _attempt in range(2):
        folder = Path(
            snapshot_download(name, revision=revision, token=token, allow_patterns=LOADED_FILES)
        )
        damaged = [path for path in sorted(folder.iterdir()) if not is_intact(path)]
        if not damaged:
            return folder
        for path in damaged:
            logger.warning("%s is not what the Hub says it is: deleted", path)
            _blob(path).unlink()
            path.unlink(missing_ok=True)
    raise HubError(
        f"loading {name}: {damaged[0].name} does not have the hash that the Hub gives for it, "
        "twice: the way from the Hub alters it; nothing was kept"
    )


def is_intact(path: Path) -> bool:
    """Whether a file of the cache has the hash that the Hub gave for it.

    The name of the blob that it links to is that hash: git's SHA-1 of small files, SHA-256 of
    others. A cache without links does not keep the hashes: True.
    """
    if not path.is_symlink():
        return True
    blob = _blob(path)
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        found = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", blob.name):
        size = blob.stat().st_size
        found = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    else:
        return True
    with blob.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest() == blob.name


def _blob(path: Path) -> Path:
    """What a file of the cache links to; one step only, for a blob may be a link to Xet's store."""
    return path.parent / os.readlink(path)


def _pickles(name_or_folder: str | Path, revision: str | None, token: str | None) -> str:
    """What to say of a repository that offers pickles instead."""
    try:
        if Path(name_or_folder).is_dir():
            names = os.listdir(name_or_folder)
        else:
            with translated(f"listing {name_or_folder}"):
                names = HfApi().list_repo_files(str(name_or_folder), revision=revision, token=token)
    except OSError:  # it would have been a hint only
        return ""
    pickles = sorted(name for name in names if PICKLES.search(name))
    if not pickles:
        return ""
    return (
        f". It offers {', '.join(pickles[:3])}: such files can run code when they are read, and "
        "are refused; ask its author for safetensors"
    )
