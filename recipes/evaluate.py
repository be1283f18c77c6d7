"""Attack a model, on one process or several, and leave a report.

    python recipes/evaluate.py --model runs/digits/model --data digits
    accelerate launch recipes/evaluate.py --model org/name --data org/images --attacks '[tangent]'

The arguments are those of `hf-specreg evaluate`, which does the same on one process. The processes
share the images out; a run that was stopped goes on by the same command.
"""

import sys
from collections.abc import Sequence
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs

from hf_specreg.arguments import OneLineParser, errors_in_one_line
from hf_specreg.cli import evaluate, evaluate_into
from hf_specreg.robustness.report import RobustnessReport
from hf_specreg.robustness.work import Processes


def main(arguments: Sequence[str] | None = None) -> RobustnessReport:
    """Evaluate as the command line says."""
    parser = OneLineParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    parser.add_function_arguments(evaluate)
    settings = parser.parse_args(arguments).as_dict()
    del settings["config"]
    # The fast wait for the slow, for as long as it takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    state = Accelerator(kwargs_handlers=[patience])
    processes = Processes(state.process_index, state.num_processes, state.wait_for_everyone)
    with errors_in_one_line():
        return evaluate_into(
            **{**settings, "device": settings["device"] or str(state.device)}, processes=processes
        )


if __name__ == "__main__":
    main(sys.argv[1:])
