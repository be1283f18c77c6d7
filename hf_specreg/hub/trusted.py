"""Pushes from CI by a trusted publisher, whose token is of one repository and of no user."""

import os

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
