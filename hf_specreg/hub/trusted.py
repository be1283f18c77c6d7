"""Which token may write where: a user's, or a trusted publisher's, from CI, which is nobody's."""

import os
from typing import Any

from huggingface_hub import HfApi


def by_trusted_publisher(api: HfApi, repo_id: str) -> bool:
    """Whether the client takes its token for this repository by OIDC, in place of a user's.

    Raises:
        ValueError: it takes one for another repository, or for a namespace, which cannot write.
    """
    resource = _resource(api)
    if resource is None:
        return False
    if resource != repo_id:
        of = "a token for it" if "/" in resource else "a token for a namespace only reads, and"
        raise ValueError(
            f"HF_OIDC_RESOURCE is {resource}, and {of} cannot write to {repo_id}: set it to "
            f"{repo_id}"
        )
    return True


def refuse_for_several(api: HfApi) -> None:
    """Refuse a trusted publisher's token where several repositories and a collection are written.

    Raises:
        ValueError: the client would take one.
    """
    if resource := _resource(api):
        raise ValueError(
            f"HF_OIDC_RESOURCE is {resource}, and such a token writes to no more than one "
            "repository, and to no collection: push each encoder by hf-specreg push with its own, "
            "or unset it and take a user's token"
        )


def _resource(api: HfApi) -> str | None:
    """What the client asks a token for by OIDC; None where it takes a user's."""
    return (os.environ.get("HF_OIDC_RESOURCE") or None) if api.token is None else None


def scoped(access: dict[str, Any], places: set[str]) -> bool:
    """Whether a fine-grained token has a permission to write in one of the places."""
    if access.get("role") != "fineGrained":
        return True
    scopes = access.get("fineGrained", {}).get("scoped", ())
    return any(
        "repo.write" in scope.get("permissions", ())
        and scope.get("entity", {}).get("name") in places
        for scope in scopes
    )
