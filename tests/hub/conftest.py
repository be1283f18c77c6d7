import os
import shutil
import time

import pytest
import torch
from huggingface_hub.utils import close_session

from hf_specreg import SpecRegModel, connection, evaluate_robustness
from hf_specreg.robustness.evaluate import Measures
from hf_specreg.robustness.images import ImageSet
from tests.hub.server import Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fresh Hub, an empty cache, a token that can write, and little patience."""
    shutil.rmtree(os.environ["HF_HUB_CACHE"], ignore_errors=True)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(connection, "SILENCE", 0.5)
    close_session()
    patient = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: patient(min(seconds, 0.01)))
    server = Hub(int(os.environ["HF_ENDPOINT"].rsplit(":", 1)[1]))
    yield server
    server.close()
    close_session()


@pytest.fixture
def fresh_cache():
    """Empties the cache when it is called."""
    return lambda: shutil.rmtree(os.environ["HF_HUB_CACHE"], ignore_errors=True)


def make_model(**arguments):
    torch.manual_seed(0)
    arguments = {"num_classes": 3, "input_size": (3, 32, 32), **arguments}
    model = SpecRegModel.from_timm("test_resnet", **arguments).eval()
    model.metadata = {
        "data": {"source": "org/pictures"},
        "config": {
            "epochs": 3,
            "seed": 0,
            "batch_size": 8,
            "output_dir": "/home/someone/secret-project/run",
            "optimizer": {"opt": "sgd", "lr": 0.1},
            "penalty": {"strength": 0.01, "scope": "features", "every": 1, "burn_in_epochs": 2.0},
        },
        "metrics": {"test_accuracy": 0.5, "test_images": 30, "sum_sigma2": 12.0},
        "penalty_share": 0.01,
    }
    return model


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A saved model with its report."""
    folder = tmp_path_factory.mktemp("encoder") / "resnet"
    model = make_model()
    model.save_pretrained(folder)
    report_on(model, "mine").save(folder / "robustness.json")
    return folder


def report_on(model, name):
    torch.manual_seed(1)
    images = torch.rand(12, *model.input_size)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % model.num_classes
    attacks = {"tangent": {"iterations": 2}, "pgd-l2": {"steps": 5}}
    return evaluate_robustness(
        model,
        ImageSet(
            (images, labels), about={"id": "org/pictures", "revision": "abc", "split": "test"}
        ),
        attacks=attacks,
        eps=[0.1, 0.5],
        name=name,
        measures=Measures(masking=False),
        progress=False,
    )
