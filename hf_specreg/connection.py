"""The way to the Hub: requests end, are tried again where they fail for a moment, and fail clearly.

huggingface_hub's client waits without end for a silent server. Here a request ends after `SILENCE`
seconds of silence, and a Hub that wants to be left alone for longer than `LONGEST_WAIT` is an
error. Transfers go by HTTP, not by Xet, whose client knows none of these limits: it is off for the
whole process while any of these calls runs.

The client tries downloads of files again by itself, but not the questions that come before them:
`retried` repeats a whole call, of which what was transferred is kept.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TypeVar

import tenacity
import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
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

SILENCE = 60.0  # seconds
PATIENCE = 30.0  # seconds from the first try on in which a download is tried again
LONGEST_WAIT = 300.0  # seconds that the Hub may ask to be left alone; its rate limits' window
OF_THE_CLIENT = (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled)
TRANSIENT = (408, 429, 500, 502, 503, 504)
HUB = "https://huggingface.co"
T = TypeVar("T")


class HubError(OSError):
    """The Hub, or the way to it, did not do its part; the message says what to do."""


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


def from_hub(name: str, load: Callable[[], T]) -> T:
    """Return what another library loads of a repository, tried again, with errors `translated`.
    Another try draws the same random numbers.
    """
    drawn = torch.get_rng_state()

    def again() -> T:
        torch.set_rng_state(drawn)
        return load()

    with translated(f"loading {name}", unreadable=(JSONDecodeError,)):
        return retried(again)


def retried(request: Callable[[], T], patience: float | None = None) -> T:
    """Return what a request gives, made again where the Hub or the way to it fails for a moment.

    Args:
        request: what may be done twice.
        patience: seconds from the first try on in which another one begins; default: `PATIENCE`.
    """
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(passes),
        wait=_pause,
        stop=tenacity.stop_after_delay(PATIENCE if patience is None else patience),
        before_sleep=_tell,  # tenacity's own would log the arguments, and so the token
        reraise=True,
    )
    return attempts(request)


def passes(error: BaseException) -> bool:
    """Whether a request may succeed next time: no answer, none that can be read, or a busy Hub.

    The network's errors by name: the client's HTTP library is another from version to version.
    """
    error = _beneath(error)
    if isinstance(error, LocalEntryNotFoundError):  # what the client says beside an empty cache
        return error.__cause__ is not None and passes(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    if isinstance(error, OfflineModeIsEnabled):
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"TransportError", "ConnectionError", "JSONDecodeError"})


def is_missing(error: OSError) -> bool:
    """Whether transformers did not find a file in a folder, or in a repository that answered."""
    error = _beneath(error)
    if isinstance(error, EntryNotFoundError):
        return not isinstance(error, LocalEntryNotFoundError)
    return type(error) is OSError and error.errno is None


def _pause(state: tenacity.RetryCallState) -> float:
    """How long to wait: what the Hub asks for, else 1, 2, 4, 8, 8 ... seconds."""
    response = getattr(_beneath(state.outcome.exception()), "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return float(asked) if asked.isdigit() else tenacity.wait_exponential(max=8)(state)


def _tell(state: tenacity.RetryCallState) -> None:
    error, seconds = first_line(state.outcome.exception()), state.next_action.sleep
    logger.warning("the Hub: %s: trying again in %g s", error, seconds)


class _WithoutXet:
    """Xet is off from the first of several calls, of any thread, to the last one's end."""

    def __init__(self):
        self.lock, self.calls, self.before = threading.Lock(), 0, False

    def __enter__(self):
        with self.lock:
            if not self.calls:
                self.before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
            self.calls += 1

    def __exit__(self, *_):
        with self.lock:
            self.calls -= 1
            if not self.calls:
                constants.HF_HUB_DISABLE_XET = self.before


_WITHOUT_XET = _WithoutXet()


@contextmanager
def translated(
    doing: str, *, unreadable: tuple[type[Exception], ...] = (JSONDecodeError, KeyError)
) -> Iterator[None]:
    """Turn the many errors of the Hub's client into a few that say what to do.

    Args:
        doing: what, for the message.
        unreadable: what is raised of an answer that is not what was asked for.
    """
    limit_silence()
    try:
        with _WITHOUT_XET:
            yield
    except Exception as error:
        told = _translation(_beneath(error), doing, unreadable)
        if told is None:
            raise
        raise told from error


def _beneath(error: BaseException) -> BaseException:
    """What the client said, where transformers or datasets put plain errors of their own on it."""
    found: BaseException | None = error
    while type(found) in (OSError, ConnectionError):
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return found if isinstance(found, OF_THE_CLIENT) or _of_the_network(found) else error


def _of_the_network(error: BaseException | None) -> bool:
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def _translation(
    error: BaseException, doing: str, unreadable: tuple[type[Exception], ...]
) -> OSError | None:
    """What to say instead of an error; None where it says all that there is to know."""
    again = "try again; what was transferred is kept"
    if isinstance(error, LocalEntryNotFoundError):
        return HubError(f"{doing}: it is not in the cache{_cause(error)}")
    if isinstance(error, (FileNotFoundError, HubError)):
        return None
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{doing}: no such revision: {first_line(error)}")
    if isinstance(error, GatedRepoError):
        return HubError(f"{doing}: ask for access on its page first: {first_line(error)}")
    if isinstance(error, (HFValidationError, RepositoryNotFoundError)):
        return FileNotFoundError(
            f"{doing}: neither a local folder nor a repository on the Hub that your token may see "
            f"(an expired one? `hf auth login`): {first_line(error)}"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        remedy = again if status in TRANSIENT else _remedy(status)
        return HubError(f"{doing}: the Hub answers {status} ({first_line(error)}): {remedy}")
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{doing}: HF_HUB_OFFLINE is set: {first_line(error)}")
    if isinstance(error, OSError):
        remedy = f": {again}" if passes(error) or error.errno else ""
        return HubError(f"{doing}: {first_line(error)}{remedy}")
    if isinstance(error, unreadable):
        return HubError(
            f"{doing}: the Hub's answer cannot be read: {error!r}: {_mirror() or again}"
        )
    if _of_the_network(error):
        return HubError(
            f"{doing}: the Hub cannot be reached, or was silent for {SILENCE:g} s "
            f"({type(error).__name__}: {error}): {again}"
        )
    return None


def _remedy(status: int) -> str:
    """What to do about an answer that would be the same the next time."""
    if status == 401:
        return "log in with `hf auth login`, or renew the token"
    if status == 403:
        return "ask for access"
    return _mirror() or "it will answer the same again: what it names must be changed first"


def _mirror() -> str:
    """What to know where another server than the Hub itself is asked."""
    if constants.ENDPOINT == HUB:
        return ""
    shown = re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)  # without a password
    return (
        f"HF_ENDPOINT is {shown}: a mirror gives downloads, and can often neither "
        "list a namespace nor be pushed to; unset HF_ENDPOINT for that"
    )


def _cause(error: LocalEntryNotFoundError) -> str:
    """Why the Hub was not asked for what is not in the cache."""
    cause = error.__cause__
    if cause is None:
        return ", and local_files_only or HF_HUB_OFFLINE keeps it from being downloaded"
    return (
        f", and the Hub cannot be asked ({type(cause).__name__}: {first_line(cause)}): try again "
        "when it can be reached"
    )


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
