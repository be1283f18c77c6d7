"""Networks whose weights are computed are saved with plain ones, of the same function."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from hf_specreg import SpecRegModel
from tests.tiny import images, tiny


def pruned_twice(layer):
    for _ in range(2):
        prune.l1_unstructured(layer, "weight", 0.3)


COMPUTED = {
    "weight norm, by hooks": nn.utils.weight_norm,
    "spectral norm, by hooks": nn.utils.spectral_norm,
    "pruned": pruned_twice,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_computed_weights_are_saved_as_plain_ones_with_adapters_too(tmp_path, compute, adapted):
    encoder = tiny("resnet20_cifar")
    plain = encoder.network.state_dict().keys()
    compute(encoder.network.stages[0][0].conv1)
    if adapted:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(target_modules=["stages.0.0.conv1"], r=2, init_lora_weights=False)
        peft.inject_adapter_in_model(lora, encoder.network)
    encoder(images()).sum().backward()  # the weight that is kept has a graph
    kept = encoder.network.state_dict().keys()
    expected = encoder.eval()(images())
    encoder.save_pretrained(tmp_path)
    again = SpecRegModel.from_pretrained(tmp_path).eval()
    assert again.network.state_dict().keys() == plain
    torch.testing.assert_close(again(images()), expected, rtol=1e-4, atol=1e-5)
    assert encoder.network.state_dict().keys() == kept
    torch.testing.assert_close(encoder(images()), expected)
