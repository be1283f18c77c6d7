# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-specreg[attacks,plots]"]
# [tool.uv.sources]
# hf-specreg = { path = ".." }  # of this clone, not of an index
# ///
"""Attack a model, on one process or several, and leave a report.

    python recipes/evaluate.py runs/digits/model digits
    accelerate launch recipes/evaluate.py org/name org/images --attacks '[tangent]'

It is `hf-specreg evaluate`. The processes share the images out; a run that was stopped goes on by
the same command.
"""

import sys

from hf_specreg.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
