# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-specreg[plots]"]
# [tool.uv.sources]
# hf-specreg = { path = ".." }  # of this clone, not of an index
# ///
"""Publish a saved encoder with its report and card on the Hub; on several ranks, once.

    python recipes/publish.py runs/digits/model org/name --report runs/a --license apache-2.0
    accelerate launch recipes/publish.py runs/digits/model org/name

It is `hf-specreg push`. Only the main process publishes; the others wait.
"""

import sys

from hf_specreg.cli import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
