# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-specreg"]
# [tool.uv.sources]
# hf-specreg = { path = ".." }  # of this clone, not of an index
# ///
"""Train a classifier: `hf-specreg train supervised`.

    python recipes/supervised.py --config recipes/configs/digits.yaml
    accelerate launch recipes/supervised.py --config digits
    uv run recipes/supervised.py --config digits

What it does: hf_specreg/recipes/supervised.py.
"""

import sys

from hf_specreg.recipes.supervised import main, parse, train

__all__ = ["main", "parse", "train"]

if __name__ == "__main__":
    main(sys.argv[1:])
