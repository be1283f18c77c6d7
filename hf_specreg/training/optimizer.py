"""timm's optimizer and learning rate schedule, and their config."""

from dataclasses import dataclass

from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from hf_specreg.encoders.model import SpecRegModel
from hf_specreg.ranges import require
from hf_specreg.training.objectives import Objective

SCHEDULES = ("none", "cosine", "tanh", "poly", "step", "multistep")


@dataclass(frozen=True)
class OptimizerConfig:
    """timm's optimizer and schedule.

    Args:
        opt: optimizer, by its name for `timm.optim.create_optimizer_v2`.
        lr: learning rate at the end of the warm-up.
        encoder_lr: learning rate of all but the head, as a fraction of `lr`.
        layer_decay: learning rate of a layer as a fraction of that of the next one; timm networks
            only; default: the same for all.
        momentum: momentum of optimizers that have one, such as sgd.
        betas: betas of optimizers that have them, such as adamw; default: the optimizer's own.
        weight_decay: weight decay, not on biases and norms.
        clip_grad: largest norm of the gradient, loss and penalty together; default: not clipped.
        sched: learning rate schedule, by its name for `timm.scheduler.create_scheduler_v2`
            ("cosine", "tanh", "poly", "multistep", "step"), or "none", a constant rate after the
            warm-up.
        warmup_epochs: epochs in which the learning rate rises, linearly from 0.
        min_lr: learning rate at the end of the schedule.
        decay_milestones: epochs at whose end "multistep" lowers the learning rate: their last
            optimizer step has the lower one already.
        decay_rate: what "multistep" and "step" multiply the learning rate by.
        decay_epochs: epochs between two steps of "step".
        ema_decay: keep an exponential moving average of the weights, evaluate and save it; default:
            off.
    """

    opt: str = "sgd"
    lr: float = 0.1
    encoder_lr: float = 1.0
    layer_decay: float | None = None
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    weight_decay: float = 5e-4
    clip_grad: float | None = None
    sched: str = "cosine"
    warmup_epochs: int = 0
    min_lr: float = 0.0
    decay_milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1
    decay_epochs: int = 30
    ema_decay: float | None = None

    def __post_init__(self):
        require(self, "not negative", "lr", "encoder_lr", "weight_decay", "clip_grad")
        require(self, "not negative", "warmup_epochs", "min_lr", "decay_rate")
        require(self, "in [0, 1]", "layer_decay", "ema_decay")
        require(self, "at least 1", "decay_epochs")
        if self.sched not in SCHEDULES:
            raise ValueError(
                f"optimizer.sched ({self.sched!r}) must be one of {', '.join(SCHEDULES)}: "
                "schedules go by steps here, without a metric"
            )
        known = get_optimizer_info(self.opt.lower().removeprefix("lookahead_"))
        if self.betas and not known.has_betas:
            raise ValueError(f"optimizer.betas are not for {self.opt}")


def build_optimizer(objective: Objective, config: OptimizerConfig) -> Optimizer:
    """Return timm's optimizer, with no weight decay on biases, norms and what else the network
    names. A group's `lr_scale` is applied by the scheduler.

    Raises:
        ValueError: layer_decay for a network that is not timm's.
    """
    fractions = _rate_fractions(objective.encoder, config)
    network = objective.encoder.network
    named = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    exempt = {id(p) for name, p in network.named_parameters() if name in named}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(".bias") or id(parameter) in exempt
            key = fractions.get(id(parameter), 1.0), 0.0 if plain else config.weight_decay
            groups.setdefault(key, []).append(parameter)
    return create_optimizer_v2(
        [
            {"params": parameters, "lr_scale": fraction, "weight_decay": decay}
            for (fraction, decay), parameters in groups.items()
        ],
        opt=config.opt,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        **({"betas": config.betas} if config.betas else {}),
    )


def _rate_fractions(encoder: SpecRegModel, config: OptimizerConfig) -> dict[int, float]:
    """The learning rate of the encoder's parameters, but for the head's, as a fraction, by id."""
    network, fractions = encoder.network, {}
    if config.layer_decay is not None:
        if not hasattr(network, "group_matcher"):
            raise ValueError(
                f"optimizer.layer_decay needs a timm network that says its layers' order, which "
                f"{type(network).__name__} does not: use optimizer.encoder_lr"
            )
        for group in param_groups_layer_decay(network, layer_decay=config.layer_decay):
            fractions |= {id(p): group["lr_scale"] for p in group["params"]}
    return {
        id(p): config.encoder_lr * fractions.get(id(p), 1.0)
        for name, p in network.named_parameters()
        if not encoder.of_head(name)
    }


def build_scheduler(
    optimizer: Optimizer, config: OptimizerConfig, *, steps_per_epoch: int, epochs: int
) -> Scheduler:
    """Return timm's schedule by optimizer steps, at step 0; it applies each group's `lr_scale`."""
    constant = config.sched == "none"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if constant else config.sched,
        num_epochs=epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=0.0,
        min_lr=config.min_lr,
        decay_milestones=list(config.decay_milestones),
        decay_rate=1.0 if constant else config.decay_rate,
        decay_epochs=config.decay_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    scheduler.step_update(0)
    return scheduler
