# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-specreg[lora,attacks,plots]"]
# [tool.uv.sources]
# hf-specreg = { path = ".." }  # of this clone, not of an index
# ///
"""Fine-tune a pretrained encoder: `hf-specreg train transfer`.

    python recipes/transfer.py --config recipes/configs/digits_transfer.yaml
    accelerate launch recipes/transfer.py --config digits_transfer
    uv run recipes/transfer.py --config digits_transfer

What it does: hf_specreg/recipes/transfer.py.
"""

import sys

from hf_specreg.recipes.transfer import main, parse, train

__all__ = ["main", "parse", "train"]

if __name__ == "__main__":
    main(sys.argv[1:])
