"""Which token may write where: a user's, or a trusted publisher's, from CI, which is nobody's."""

import os
from typing import Any

from huggingface_hub import HfApi


def by_trusted_publisher(api: HfApi, repo_id: str) -> bool:
    """Whether the client takes its token for this repository by OIDC, in place of a user's.

    Raises:
        ValueError: it takes one for another repository.
    """
    resource = os.environ.get("HF_OIDC_RESOURCE")
    if not resource or api.token is not None:
        return False
    if resource != repo_id:
        raise ValueError(
            f"HF_OIDC_RESOURCE is {resource}, and a token for it cannot write to {repo_id}: set it "
            f"to {repo_id}"
        )
    return True


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
