"""rep-spectral: strength * sum of sigma^2 over the linear maps up to the features, not the head.

    penalty = lambda * sum_{l < L} sigma_max(W_l)^2,     d sigma^2 / d W = 2 sigma u v^T

with (sigma, u, v) the top singular triplet of the layer as a linear operator. The gradient is that
closed form at the current u and v; no graph goes through the iteration that finds them.
`scope="all"` adds the head (ll-spectral, Yoshida & Miyato 2017).

Source: Yang, Zavatone-Veth, Pehlevan, "Spectral regularization for adversarially-robust
representation learning", arXiv:2405.17181. As in the authors' code, and unlike the paper's gamma /
2, there is no 1/2, and the strength is not rescaled by the cadence.
"""

import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_specreg.encoders.features import FeatureSpace
from hf_specreg.encoders.modules import is_compiled
from hf_specreg.ranges import WHOLE, require, require_choices, require_value
from hf_specreg.spectral.folding import acting
from hf_specreg.spectral.followed import FollowedSum
from hf_specreg.spectral.free_scale import FreeScales
from hf_specreg.spectral.maps import linear_maps
from hf_specreg.spectral.norms import adjoining_norms, warn_of_unfolded
from hf_specreg.spectral.placed import Placed, remove
from hf_specreg.spectral.precision import full_precision
from hf_specreg.spectral.regularizers.term import check_recorded, of_its_model
from hf_specreg.spectral.resolution import SeenInput
from hf_specreg.spectral.sharding import check_whole
from hf_specreg.spectral.singular import TopSingularValue
from hf_specreg.spectral.typical import Statistics


class SpectralPenalty:
    """strength * sum of sigma^2 over a model's linear maps up to its features, as a loss term.

    Call it once per optimizer step and add what it returns to the loss:

        penalty = SpectralPenalty(model, strength=1e-2)
        loss = criterion(model(images), labels) + penalty()

    With gradient accumulation, call it in the last micro-batch only, and undo the division where
    the loop divides its loss: `every` and `burn_in` count calls, hence optimizer steps.

    Every layer's singular vectors are warm: they are kept between calls, and the layers take turns
    to have theirs renewed (`tracking.py`), so that a use costs little more than reading weights.
    For that a copy of the weights that are penalised is kept, and an input and an output of each
    layer for one image, which on large maps outweigh it (`memory`); with layers shared out or
    weights sharded, each process's part of the copy. The arithmetic is float32 also under autocast
    and for half-precision weights. Only the search of singular vectors is rounded, of which sigma
    feels little: to TF32 on a GPU where torch is told to allow it, and to bfloat16 for large
    convolutions on a processor that multiplies in it. Frozen layers add their value and no
    gradient. A weight that acts in several ways, shared by layers or used at several sizes, counts
    once, as the one with the largest sigma.

    Making it leaves the model as it is. Its first use, or a state that is loaded, puts hooks on it
    (of compiled models, or with layer norms to fold in, its making), to see that images of the
    measured size are trained on, and whether weights are loaded into it: then all vectors are
    renewed, as where parameters are replaced. Call `renew()` where they are changed in place by
    other than training. The hooks go with the penalty, or by `remove_hooks()`. The first use warns
    if norms make most layers scale-invariant (`free_scale`), which are penalised for little then.
    Make it last: layers that are replaced or wrapped after it, by adapters say, are errors, and new
    ones are not seen.

    Args:
        model: a timm model, a transformers vision model, a `SpecRegModel`, or any module together
            with `head`; also inside DistributedDataParallel or torch.compile. Or a `FeatureSpace`.
        strength: lambda, which multiplies the sum of sigma^2.
        scope: "features", the layers up to what the head is fed, or "all", with the head.
        every: one call in `every` gives the penalty, the others 0.
        burn_in: the first `burn_in` calls give 0.
        ramp: calls after the burn-in in which the strength rises linearly from 0.
        renew_every: uses between two renewals of a layer's singular vectors, at most: where the
            weights move too fast for that, they are renewed more often (`pace.py`).
        lanczos_steps: of a renewal, at least 2, at most; each is a product with W and one with W^T.
        input_size: (C, H, W) of the images, which convolutions depend on; default: the model's own
            configuration.
        head: dotted name or names of the head, () for a model that is all encoder; default: found
            for timm and transformers.
        skip: dotted names of modules to leave out, with all they hold.
        split_qkv: penalise q, k and v each where one matrix stacks the three; else that matrix
            whole.
        fold_norm: penalise the maps with the norms beside them folded in, which act at evaluation:
            a batch or layer norm and layer scale after the map, where all of its output goes there,
            and a norm before it (`norms.py`). Statistics are constants: running ones of a batch
            norm, which several processes must synchronise, a layer or RMS norm's typical 1 / std
            (`typical.py`). Gains get a gradient too. `folded` says which; if few, a warning does.
            No study shows that it makes networks harder to attack (docs/norms.md).
        fold_gradient: "exact", that of the value, or "bounded", which after a norm whose statistics
            run has factors that keep steps as long as without one, lest a strong penalty blow up,
            and after a layer norm no part along W, which the norm would undo (`folding.py`).
        shared: share the layers out over the processes of torch.distributed, by their cost; for
            training that averages gradients over processes that all hold all weights, as
            DistributedDataParallel with the default group does. All processes must then call it
            and `state_dict()` together, and its value must go into the backward pass of the loss,
            which averages. Where layers are skipped at random (find_unused_parameters=True) torch
            refuses that ("Expected to mark a variable ready only once"): add the gradient after the
            pass, by `add_gradient` (`gradient.py`), not shared. With one process it changes
            nothing. Sharded weights (FSDP2) need it not: there all work on all layers.
        seed: of the vectors' first draw.

    Attributes:
        layers: the linear operators that it regularises, in forward order.
        step: how many times it was called.

    Raises:
        ValueError: the head or the input size is not known, a name is wrong, no layer is left, or
            the weights are sharded already.
        RuntimeError: the model cannot be run at this size, or its head is not called; or, in a
            call, no gradient is recorded, as in a validation.
        UnsupportedLayerError: a layer's weights cannot be treated; pass its name in `skip`.
    """

    __reduce_ex__ = of_its_model

    def __init__(
        self,
        model: nn.Module | FeatureSpace,
        *,
        strength: float = 1e-2,
        scope: Literal["features", "all"] = "features",
        every: int = 1,
        burn_in: int = 0,
        ramp: int = 0,
        renew_every: int = 8,
        lanczos_steps: int = 8,
        input_size: tuple[int, int, int] | None = None,
        head: str | Sequence[str] | None = None,
        skip: Sequence[str] = (),
        split_qkv: bool = True,
        fold_norm: bool = False,
        fold_gradient: Literal["bounded", "exact"] = "bounded",
        shared: bool = False,
        seed: int = 0,
    ):
        self._strength, self.scope = strength, scope
        self.fold_norm, self.fold_gradient = fold_norm, fold_gradient
        self.every, self.burn_in, self.ramp = every, burn_in, ramp
        self.renew_every, self.lanczos_steps = renew_every, lanczos_steps
        require(self, "not negative", "strength", "burn_in", "ramp")
        require(self, "at least 1", "every", "renew_every")
        require(self, "at least 2", "lanczos_steps")
        require(self, WHOLE, "every", "burn_in", "ramp", "renew_every", "lanczos_steps")
        require_choices(self)
        self.shared = shared and dist.is_initialized() and dist.get_world_size() > 1
        self.seed, self.step = seed, 0
        self.space = FeatureSpace.of(model, head=head, input_size=input_size)
        self._network, self._which = self.space.network, {"skip": skip, "split_qkv": split_qkv}
        self._compiled = isinstance(model, nn.Module) and is_compiled(model)
        self._seen, self._hooks = SeenInput(), []
        weakref.finalize(self, remove, self._hooks)
        self._measure()
        at_once = strength > 0 and not fold_norm
        self._free_scales = FreeScales(self.space, self._modules, at_once=at_once)
        if fold_norm:
            warn_of_unfolded([layer.name for layer in self.layers], self._norms)

    @property
    def folded(self) -> dict[str, tuple[str, ...]]:
        """The layers that norms are folded into, with the names of their gains and statistics."""
        return {name: norms.names for name, norms in self._norms.items()}

    @property
    def free_scale(self) -> tuple[str, ...]:
        """The scale-invariant layers: norms, in the modes that they are in, let powers of a c > 0
        multiply them all with no change of the function (`free_scale.py`); folded norms or not.
        """
        return self._free_scales.names

    @property
    def strength(self) -> float:
        """lambda, which multiplies the sum of sigma^2; it may be set between steps.

        Raises:
            ValueError: set to what is negative or no number.
        """
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        require_value("strength", value, "not negative")
        if value >= 2 * self._strength:
            self._sum.pace.quicken()
        self._strength = value

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that convolutions are measured for."""
        return self.space.input_size

    def set_input_size(self, input_size: tuple[int, int, int]) -> None:
        """Measure convolutions at another image size (C, H, W) from now on; the vectors start
        anew.

        Raises:
            ValueError: the weights are sharded already, or no layer is left.
            RuntimeError: the model cannot be run on images of this size.
        """
        self.space = FeatureSpace.of(self.space, input_size=input_size)
        self._measure()

    def _measure(self) -> None:
        """Find the layers, at the size of the feature space; the vectors start anew."""
        check_whole(self._network)
        self.remove_hooks()
        owners = linear_maps(self.space, up_to_head=self.scope == "features", **self._which)
        self.layers = tuple(operator for _, operator in owners)
        self._modules = {operator.name: module for module, operator in owners}
        self._norms = adjoining_norms(self.space, self._modules) if self.fold_norm else {}
        followed = [one for norms in self._norms.values() for one in norms.statistics]
        self._statistics = Statistics(self._network, followed, shared=self.shared)
        self._sum = FollowedSum(
            self.layers,
            partial(acting, norms=self._norms, bounded=self.fold_gradient == "bounded"),
            every=self.every,
            renew_every=self.renew_every,
            lanczos_steps=self.lanczos_steps,
            shared=self.shared,
            seed=self.seed,
            device=self._device,
        )
        gains = {n.rpartition(".")[0] for norms in self._norms.values() for n in norms.names}
        beside = [self._network.get_submodule(name) for name in gains]
        self._placed = Placed(self._network, [*self._modules.values(), *beside])
        self._seen.expect(owners)
        if followed or self._compiled:  # before the first pass
            self._watch()

    @torch.compiler.disable  # the count of steps must not be compiled in
    def __call__(self) -> Tensor:
        """Count a step; return the penalty, 0-d: 0 in burn-in, at strength 0, between cadences."""
        check_recorded(type(self).__name__, "; sigmas() gives the singular values at any time")
        since = self.step - self.burn_in
        self.step += 1
        self._watch()
        self._statistics.average()
        if self.strength and not self.fold_norm:
            self._free_scales.warn_once()
        if since % self.every:
            return self._zero()
        risen = min(since / self.ramp, 1) if self.ramp else since >= 0
        if risen <= 0 or not self.strength:
            self._check()  # a mistake is known before it counts
            return self._zero()
        return self.value() if risen == 1 else self.value() * risen

    def _watch(self) -> None:
        if not self._hooks:
            for each in (self._seen, self._placed, self._statistics):
                self._hooks += each.hooks()

    def _check(self) -> None:
        self._seen.check(self.input_size)
        self._placed.check()

    @torch.compiler.disable
    def value(self) -> Tensor:
        """Return strength * sum of sigma^2, 0-d, differentiable, at any step; the vectors move on.

        Raises:
            ValueError: the model was trained on images of another size than the penalty measures it
                at, or a layer was replaced or reparameterised since it was found.
        """
        self._check()
        # What is kept of this use takes part in the backward passes of others.
        with torch.inference_mode(False), torch.autocast(self._device.type, enabled=False):
            return self.strength * self._sum.value(self._zero(), changed=self._placed.changed())

    def renew(self) -> None:
        """Have all vectors renewed in the next use: after weights were changed in place by other
        than training, as averaged, pruned or initialised again, which cannot be seen.
        """
        self._placed.loads.seen, self._sum.vectors_loaded = True, False

    @property
    def memory(self) -> int:
        """Bytes that are kept between uses on this process; of the layers that were used yet."""
        return self._sum.triplets.memory

    def remove_hooks(self) -> None:
        """Take its hooks off the model, when the training is over."""
        remove(self._hooks)

    def top_singular_values(
        self, *, tolerance: float = 1e-3, fold_norm: bool = False
    ) -> dict[str, TopSingularValue]:
        """Return every layer's top singular value with its residual, iterated until converged.

        Starts from the warm vectors and leaves them as they are, so that looking does not change
        the training. Where weights are sharded, all processes must call it.

        Args:
            tolerance: of the relative residual.
            fold_norm: only the layers that have a norm beside them, with it folded in.
        """
        look = fold_norm and not self.fold_norm
        norms = adjoining_norms(self.space, self._modules) if look else self._norms
        names = norms if fold_norm else [layer.name for layer in self.layers]
        with torch.autocast(self._device.type, enabled=False):
            weight = partial(acting, norms=norms, bounded=False)  # of the gradient
            return self._sum.converged(weight, names, tolerance=tolerance)

    def sigmas(self) -> dict[str, float]:
        """Return every layer's top singular value (sigma, not squared) by dotted name; warns of
        any that did not converge. Where weights are sharded, all processes must call it.
        """
        values = self.top_singular_values()
        for name, value in values.items():
            if not value.converged:
                said = f"sigma of {name!r} did not converge: residual {value.residual:.1e}"
                warnings.warn(said, stacklevel=2)
        return {name: value.sigma.item() for name, value in values.items()}

    def state_dict(self) -> dict:
        """Return the counts, norms' typical 1 / std, the pace and the warm vectors: with them, a
        resumed run goes on bit for bit. Where layers are shared out, all processes must call it.
        """
        followed = self._sum.state(like=self._zero())
        return {"step": self.step, "norms": self._statistics.state(), **followed}

    def load_state_dict(self, state: dict) -> None:
        """Take over the counts and warm vectors, before or after the weights that they are of. If
        of weights that come after them W v is nothing like sigma u in most layers, all are renewed.

        Raises:
            ValueError: the vectors are those of another model, or of an earlier version.
        """
        if "wait" not in state.get("pace", {}):
            raise ValueError("the state is of an earlier version of the penalty: start anew")
        self._statistics.load(state.get("norms", {}), like=self._zero())
        self._sum.load(state, self._device)
        self.step = state["step"]
        self._placed.changed()  # from now on
        self._watch()

    @property
    def _device(self) -> torch.device:
        return next(self._network.parameters()).device

    def _zero(self) -> Tensor:
        """0 where the model is, in full precision."""
        dtype = next(self._network.parameters()).dtype
        return full_precision(torch.zeros((), dtype=dtype, device=self._device))
