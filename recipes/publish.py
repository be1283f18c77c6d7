"""Publish a saved encoder with its report and card on the Hub; on several ranks, once.

    python recipes/publish.py runs/digits/model org/name --report runs/a --license apache-2.0
    accelerate launch recipes/publish.py runs/digits/model org/name

The arguments are those of `hf-specreg push`. Only the main process publishes; the others wait.
"""

import sys
from collections.abc import Sequence
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs

from hf_specreg.arguments import OneLineParser, errors_in_one_line
from hf_specreg.cli import push


def main(arguments: Sequence[str] | None = None) -> None:
    """Publish as the command line says."""
    parser = OneLineParser(prog="publish.py", description=__doc__.splitlines()[0])
    parser.add_function_arguments(push, as_positional=True)
    settings = parser.parse_args(arguments).as_dict()
    # An upload may take longer than a collective operation.
    state = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    with errors_in_one_line():
        push(**settings)
    state.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1:])
