"""A zoo: several encoders with their reports and cards, in one collection on the Hub.

Each push is atomic and sends nothing that is there (`hf_specreg.hub.publish`); the collection is
made where there is none of its title, and has each encoder once. So the same command goes on where
a publication was stopped, and changes nothing where it was done.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import Collection, HfApi

from hf_specreg.connection import retried, translated
from hf_specreg.encoders.blueprint import check_schema
from hf_specreg.encoders.download import WEIGHTS_FILE
from hf_specreg.hub.card import TAGS
from hf_specreg.hub.encoder import CARD_FILE, card_metadata
from hf_specreg.hub.publish import PATIENCE, PublishError, Pushed, push
from hf_specreg.hub.trusted import refuse_for_several

ZOO_FILE = "zoo.yaml"
_TEXT = {"type": "string", "minLength": 1}
_ENTRY = {
    "type": "object",
    "required": ["folder"],
    "additionalProperties": False,
    "properties": dict.fromkeys(("folder", "report", "baseline", "study", "license"), _TEXT),
}
_ZOO = {"type": "object", "minProperties": 1, "additionalProperties": _ENTRY}


@dataclass(frozen=True)
class PublishedZoo:
    """What a publication did.

    Attributes:
        pushed: of each encoder, in order.
        collection: the address of the collection.
    """

    pushed: list[Pushed]
    collection: str


def entries(folder: str | Path) -> dict[str, dict[str, str]]:
    """Return what is pushed of each encoder, by its name: the arguments of `push`.

    Args:
        folder: that holds zoo.yaml, from names to "folder", "report", "baseline", "study" (paths
            from there) and "license"; or, where it holds none, the folders of saved encoders with
            their cards, each of which is named by its path ("digits/plain/model" is digits-plain).

    Raises:
        PublishError: there are no encoders, or two of one name.
        FolderError: zoo.yaml is damaged.
    """
    folder = Path(folder)
    stated = folder / ZOO_FILE
    if stated.is_file():
        return {
            name: {k: v if k == "license" else str(folder / v) for k, v in entry.items()}
            for name, entry in read_zoo(stated).items()
        }
    found: dict[str, dict[str, str]] = {}
    for card in sorted(folder.rglob(CARD_FILE)):
        ours = TAGS[0] in (card_metadata(card.read_text("utf-8", "replace")).get("tags") or ())
        if not ours or not (card.parent / WEIGHTS_FILE).is_file():
            continue
        parts = card.parent.relative_to(folder).parts or (folder.resolve().name,)
        name = "-".join(parts[:-1] if len(parts) > 1 and parts[-1] == "model" else parts)
        if name in found:
            raise PublishError(
                f"{found[name]['folder']} and {card.parent} would both be named {name}: rename one"
            )
        found[name] = {"folder": str(card.parent)}
    if not found:
        raise PublishError(
            f"there is neither {stated} nor a saved encoder with its card below {folder}: write "
            "cards with hf-specreg card"
        )
    return found


def read_zoo(path: Path) -> dict[str, dict[str, str]]:
    """Return what a zoo.yaml holds.

    Raises:
        PublishError: it is not YAML.
        FolderError: it does not hold what `entries` says.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise PublishError(f"{path} cannot be read: {error}") from error
    check_schema(content, _ZOO, path)
    return content


def publish_zoo(
    folder: str | Path,
    namespace: str,
    *,
    title: str = "Encoders of hf_specreg",
    license: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> PublishedZoo | None:
    """Push encoders with their reports and cards, and put them into one collection.

    Args:
        folder: see `entries`.
        namespace: a user or an organisation.
        title: of the collection.
        license: SPDX identifier, of those that state none; default: the ones on their cards.
        private: make the repositories and the collection private.
        token: default: the one of `hf auth login`, or HF_TOKEN.

    Returns:
        What was done; None on all but the main process of a distributed run, which do nothing.

    Raises:
        PublishError, CardError, HubError: as `push`; what was pushed before stays.
        ValueError: the token would be a trusted publisher's, which is for one repository.
    """
    api, pushed, collection = HfApi(token=token), [], None
    refuse_for_several(api)
    for name, entry in entries(folder).items():
        arguments = {"license": license, **entry}
        done = push(
            arguments.pop("folder"),
            f"{namespace}/{name}",
            private=private or None,
            token=token,
            **arguments,
        )
        if done is None:
            return None
        pushed.append(done)
        with translated(f"adding {done.repo_id} to the collection {title!r}"):
            collection = collection or _collection(api, namespace, title, private)
            collection = _with(api, collection, done.repo_id)
    return PublishedZoo(pushed, collection.url)


def _collection(api: HfApi, namespace: str, title: str, private: bool) -> Collection:
    """The collection of a title, made where there is none."""
    settings: Mapping[str, Any] = {"namespace": namespace, "private": private, "exists_ok": True}
    return retried(lambda: api.create_collection(title, **settings), PATIENCE)


def _with(api: HfApi, collection: Collection, repo_id: str) -> Collection:
    """The collection with an encoder in it."""
    if any((item.item_type, item.item_id) == ("model", repo_id) for item in collection.items):
        return collection
    slug = collection.slug
    return retried(
        lambda: api.add_collection_item(slug, repo_id, "model", exists_ok=True), PATIENCE
    )
