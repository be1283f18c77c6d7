"""The supervised recipe where accelerate is in the state of FSDP2 that it takes on GPUs only."""

from unittest import mock

from accelerate.utils import DistributedType

from hf_specreg.recipes import supervised
from hf_specreg.training import recipe
from hf_specreg.training.sharded import fsdp_settings


def main(arguments):
    """Train as the command line says."""
    build = recipe.build_accelerator

    def as_on_gpus(config):
        accelerator = build(config)
        accelerator.state.fsdp_plugin = fsdp_settings(accelerator)
        accelerator.state.distributed_type = DistributedType.FSDP
        assert accelerator.is_fsdp2
        return accelerator

    with mock.patch.object(recipe, "build_accelerator", as_on_gpus):
        supervised.main(arguments)
