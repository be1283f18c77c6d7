"""A repository of the Hub as a local folder: whole and unaltered.

huggingface_hub's client checks the size of what it downloads, not the content: here every file in
the cache is compared with the hash that the Hub gave for it.
"""

import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from hf_specreg.connection import HubError, retried, translated

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
RUN_FILE = "specreg.json"
PROCESSOR_FILE = "preprocessor_config.json"
LOADED_FILES = ["config.json", PROCESSOR_FILE, RUN_FILE, WEIGHTS_FILE]
PICKLES = re.compile(r"\.(bin|pt|pth|pth\.tar|ckpt|pkl|h5|msgpack|npz)$")
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def download(
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Path:
    """Return the local folder; or download the few files of a Hub repository that are read.

    Args:
        name_or_folder: a local folder or a Hub id.
        revision: branch, tag or commit on the Hub.
        token: for private repositories.
        cache_dir: where downloads are kept; default: huggingface_hub's.
        local_files_only: take what is in the cache, and ask the Hub nothing.
        subfolder: of the folder or repository, where the model is.

    Raises:
        FileNotFoundError: neither a folder nor a repository, no such revision, or it has no
            safetensors weights in one file.
        HubError: the Hub cannot be reached or refuses, the disk is full, or what came is not what
            the Hub says it is.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        where = {"revision": revision, "token": token, "cache_dir": cache_dir}
        where["local_files_only"] = local_files_only
        with translated(f"loading {name_or_folder}"):
            folder = _snapshot(str(name_or_folder), subfolder, **where)
    folder = folder / (subfolder or "")
    if not (folder / WEIGHTS_FILE).is_file():
        named = f"{name_or_folder}/{subfolder}" if subfolder else name_or_folder
        offered = [] if local_files_only else _offered(name_or_folder, subfolder, revision, token)
        raise FileNotFoundError(
            f"{named} has no {WEIGHTS_FILE}; only safetensors weights are read{_instead(offered)}"
        )
    return folder


def _snapshot(name: str, subfolder: str | None, **where: Any) -> Path:
    """Download, and once more where a file in the cache is not what its hash says."""
    files = [f"{subfolder}/{file}" if subfolder else file for file in LOADED_FILES]
    for _attempt in range(2):
        request = partial(snapshot_download, name, allow_patterns=files, **where)
        folder = Path(retried(request))
        paths = [folder / file for file in files if (folder / file).exists()]
        damaged = [path for path in paths if not is_intact(path)]
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
        with blob.open("rb") as file:
            return sha_fileobj(file).hex() == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        return git_hash(blob.read_bytes()) == blob.name
    return True


def _blob(path: Path) -> Path:
    """What a file of the cache links to; one step only, for a blob may be a link to Xet's store."""
    return path.parent / os.readlink(path)


def _offered(
    name_or_folder: str | Path, subfolder: str | None, revision: str | None, token: str | None
) -> list[str]:
    """The files of a folder or repository; none where it cannot be asked: it is for a hint only."""
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        if Path(name_or_folder).is_dir():
            return os.listdir(Path(name_or_folder) / prefix)
        with translated(f"listing {name_or_folder}"):
            names = HfApi().list_repo_files(str(name_or_folder), revision=revision, token=token)
    except OSError:
        return []
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _instead(offered: list[str]) -> str:
    """What to say of weights that are there in another form."""
    shards = sorted(name for name in offered if SHARD.fullmatch(name))
    if shards:
        return (
            f", and from one file: it has them in {len(shards)} ({shards[0]}, ...); load it with "
            'transformers\' from_pretrained and save it with save_pretrained(max_shard_size="1TB")'
        )
    pickles = sorted(name for name in offered if PICKLES.search(name))
    if not pickles:
        return ""
    return (
        f". It offers {', '.join(pickles[:3])}: such files can run code when they are read, and "
        "are refused; ask its author for safetensors"
    )
