# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-specreg[ssl,attacks,plots]"]
# [tool.uv.sources]
# hf-specreg = { path = ".." }  # of this clone, not of an index
# ///
"""Train an encoder without labels: `hf-specreg train self-supervised`.

    python recipes/self_supervised.py --config recipes/configs/digits_barlow_twins.yaml
    accelerate launch recipes/self_supervised.py --config digits_barlow_twins
    uv run recipes/self_supervised.py --config digits_barlow_twins

What it does: hf_specreg/recipes/self_supervised.py.
"""

import sys

from hf_specreg.recipes.self_supervised import main, parse, train

__all__ = ["main", "parse", "train"]

if __name__ == "__main__":
    main(sys.argv[1:])
