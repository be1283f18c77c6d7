"""Layers shared out over processes, and sharded weights."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from hf_specreg import SpecRegModel, SpectralPenalty
from hf_specreg.spectral.sharding import Rows, block_products, scaled, shares
from tests.processes import run
from tests.tiny import tiny


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=30), st.integers(1, 8))
def test_no_process_has_much_more_than_its_share(costs, processes):
    owners = shares(costs, processes)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == p) for p in range(processes)]
    assert set(owners) <= set(range(processes))
    assert max(loads) <= sum(costs) / processes + max(costs)


def test_in_every_turn_the_work_is_shared_too():
    costs = [float(1 + i % 5) for i in range(48)]
    owners = shares(costs, 2, rounds=[i % 8 for i in range(48)])
    for turn in range(8):
        items = range(turn, 48, 8)
        loads = [sum(costs[i] for i in items if owners[i] == p) for p in (0, 1)]
        assert max(loads) - min(loads) <= max(costs[i] for i in items)


def test_rows_of_one_process_give_their_part_of_every_block():
    torch.manual_seed(0)
    direction, weight = torch.randn(2, 12, 5)
    products = block_products(direction, weight, 3, Rows(0, 12))
    expected = torch.stack(
        [(d * w).sum() for d, w in zip(direction.chunk(3), weight.chunk(3), strict=True)]
    )
    torch.testing.assert_close(products, expected)
    factors = torch.tensor([1.0, 0.0, -2.0])
    whole = scaled(direction, factors, Rows(0, 12))
    torch.testing.assert_close(whole[8:], -2 * direction[8:])
    assert not whole[4:8].any()
    torch.testing.assert_close(scaled(direction[3:10], factors, Rows(3, 12)), whole[3:10])


def test_a_kernel_with_its_channels_last_is_read_in_the_order_of_memory():
    torch.manual_seed(0)
    kernels = [torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    part = torch.randn(6, 9, 3, 3)[:, :4]
    for a, b in (kernels, (kernels[0].contiguous(), kernels[1]), (kernels[0], part)):
        expected = (a * b).sum()[None]
        torch.testing.assert_close(block_products(a, b, 1, Rows(0, 6)), expected)
        torch.testing.assert_close(block_products(b, a, 1, Rows(0, 6)), expected)


LAYOUTS = ["one unit", "blocks", "penalty first", "folded", "whole, folded"]


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    result = tmp_path_factory.mktemp("sharded") / "differences.json"
    run("tests.spectral.sharded", str(result))
    return json.loads(result.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", ["vit", "convnext"])
def test_sharded_weights_train_to_those_of_one_process(differences, network, layout):
    """FSDP2 on two processes, in float64; the penalty before or after the forward pass, and handed
    on by its state at every step; and whole weights with the layers shared out. Where norms are
    folded in, their typical 1 / std is of the images of both."""
    found = differences[f"{network}, {layout}"]
    assert found["weights"] < 1e-9
    assert found["value"] < 1e-9
    assert found["sigmas"] < 1e-4  # converged to a residual of 1e-3


def test_a_sharded_loop_is_that_of_whole_weights_and_resumes(tmp_path):
    """On two processes, by the snippets of docs/scale.md: the weights of DistributedDataParallel
    after 20 steps, those of the run that was not stopped, and a folder of whole ones."""
    run("tests.spectral.sharded_loop", str(tmp_path))
    found = {f.stem: load_file(f) for f in tmp_path.glob("*.safetensors")}
    moved = [(found["half"][n] - w).abs().max() for n, w in found["sharded"].items()]
    assert min(moved) > 0
    for name, weight in found["whole"].items():
        torch.testing.assert_close(found["sharded"][name], weight, rtol=0, atol=1e-5, msg=name)
        assert torch.equal(found["resumed"][name], found["sharded"][name]), name
    saved = dict(SpecRegModel.from_pretrained(tmp_path / "encoder").named_parameters())
    assert saved.keys() == found["half"].keys()
    assert all(torch.equal(saved[name], weight) for name, weight in found["half"].items())


@pytest.fixture
def alone():
    """A mesh of this process alone."""
    from torch.distributed.tensor import init_device_mesh

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_model_that_is_sharded_already_is_an_error_with_the_remedy(alone):
    from torch.distributed.tensor import DTensor, Shard

    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    net[1].weight = nn.Parameter(DTensor.from_local(net[1].weight.data, alone, [Shard(0)]))
    with pytest.raises(ValueError, match=r"before .*fully_shard"):
        SpectralPenalty(net, head="2", input_size=(3, 2, 2))


@pytest.mark.filterwarnings("ignore:.*NO_SHARD")
def test_fsdp1_is_refused_with_the_remedy_whether_the_penalty_comes_first_or_last(alone):
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrapped(module):
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"))

    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    known = {"head": "2", "input_size": (3, 2, 2)}
    penalty = SpectralPenalty(net, **known)
    net[1] = wrapped(net[1])
    with pytest.raises(ValueError, match=r"FSDP1 .* FSDP2 \(fully_shard\), or .*DistributedData"):
        penalty()
    whole = wrapped(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2)))
    for model in (net, whole):
        with pytest.raises(ValueError, match="FSDP1"):
            SpectralPenalty(model, **known)


def test_a_folder_is_not_written_from_shards(alone, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = tiny()
    fully_shard(model, mesh=alone)
    with pytest.raises(ValueError, match="get_model_state_dict"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
