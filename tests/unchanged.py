"""The law that to look at a model leaves it as it is."""

import contextlib
import copy

import torch


@contextlib.contextmanager
def unchanged(model, images):
    """What is done to the model within changes no parameter, buffer, hook, mode or output."""

    def state():
        tensors = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        modules = [
            (name, {key: kept(value) for key, value in vars(module).items()})
            for name, module in model.named_modules(remove_duplicate=False)
        ]
        hooks = [
            list(hooks)
            for module in model.modules()
            for key, hooks in vars(module).items()
            if key.endswith("_hooks")
        ]
        return [(n, id(t), t.device, t.requires_grad) for n, t in tensors], modules, hooks

    def kept(value):
        if isinstance(value, dict | list | set):
            return id(value), len(value), [id(item) for item in value]
        return value if isinstance(value, bool | int | float | str) else id(value)

    def output():
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            found = copy.deepcopy(model)(images)  # so that what a model keeps of it is not there
        return found if isinstance(found, torch.Tensor) else found[0]

    before, answer = state(), output()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert state() == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output(), answer)
