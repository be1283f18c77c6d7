"""Every test sees a Hub on loopback, and never another: the client reads its address at import.
The longest files come first, so that no process is left alone with one at the end.
"""

import os
import socket
import tempfile

import psutil

with socket.socket() as _probe:
    _probe.bind(("127.0.0.1", 0))
    _PORT = _probe.getsockname()[1]

_CACHE = tempfile.TemporaryDirectory(prefix="hf_specreg-hub-")
os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{_PORT}",
    "HF_HUB_CACHE": f"{_CACHE.name}/hub",
    "HF_TOKEN_PATH": f"{_CACHE.name}/token",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_ETAG_TIMEOUT": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "1",
}
os.environ.pop("HF_TOKEN", None)

LONGEST = ("test_kills.py", "test_distributed.py", "test_sharding.py", "test_interruption.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST and "recipes" not in item.path.parts)


def pytest_xdist_auto_num_workers():
    """A process for each core, up to 4, of which each and what it starts get 4 GiB of memory."""
    by_memory = psutil.virtual_memory().available // (4 * 2**30)
    return max(1, min(4, os.cpu_count(), by_memory))
