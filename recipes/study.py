# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-specreg[ssl,lora,attacks,plots]"]
# [tool.uv.sources]
# hf-specreg = { path = ".." }  # of this clone, not of an index
# ///
"""Compare methods over strengths and seeds: `hf-specreg study`.

    python recipes/study.py --config recipes/studies/digits.yaml --workers 2
    uv run recipes/study.py --config digits --dry_run

What it does: hf_specreg/study/command.py.
"""

import sys

from hf_specreg.study.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
