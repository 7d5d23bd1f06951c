"""Muon inside Megatron's distributed optimizer: momentum of the layers' matrices, orthogonalized (arXiv 2502.16982).

    M <- mu M + G,    O = orthogonalize(G + mu M),    W <- W - lr (0.2 sqrt(max(rows, columns)) O + weight_decay W)

Each part of a matrix that its block declares is orthogonalized by itself. All other weights (embedding, output layer,
norms, convolutions, scans, routers) are the AdamW's that this one is made of, at the same learning rate. The momentum
is float32 and flat, as the distributed optimizer holds it: one moment where Adam has two. Gradients are summed, not
averaged; what lies between, a factor, is lost in the orthogonalization.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from nemotron_h.core.errors import UserError
from nemotron_h.ops.newton_schulz import orthogonalize, scale
from nemotron_h.training.muon_parts import Exchange, Holding, Role, roles
from nemotron_h.training.qk_clip import QkClip

#: name of the state, in checkpoints too
MOMENTUM = "momentum"


@dataclass
class Shard:
    """Range of a matrix that this rank holds.

    Attributes:
        role: of the matrix.
        number: of the matrix, in the order that the ranks share.
        start: of the range, in the flat matrix.
        weight: of the model, which has all of this rank's matrix; None where nothing asks for it.
    """

    role: Role
    number: int
    start: int
    weight: nn.Parameter | None = None


class MuonMixin:
    """Muon's part of an optimizer whose other part is AdamW's class; `with_muon` makes it.

    Attributes:
        shards: parameter of the optimizer -> the range that it is.
        exchange: None until `attach`.
        momentum: mu.
        coefficients: of the Newton-Schulz steps.
        clip: of attention logits, or None.
        squares: kind -> sum of squares of the last updates over the learning rate, and their number, of this rank.
    """

    shards: dict[Tensor, Shard]
    exchange: Exchange | None
    momentum: float
    coefficients: str
    clip: QkClip | None
    squares: dict[str, list[Tensor | int]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.shards, self.exchange, self.squares, self.clip = {}, None, {}, None
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step AdamW over what is not Muon's, then Muon."""
        groups = self.param_groups
        others = [{**group, "params": [p for p in group["params"] if p not in self.shards]} for group in groups]
        try:
            self.param_groups = others
            super().step(*args, **kwargs)
        finally:
            self.param_groups = groups
        for group in groups:
            group["step"] = group.get("step", 0) + 1
        if self.exchange is not None:
            self._orthogonal_step(self.exchange)
        if self.clip is not None:
            self._clip_logits(self.clip)

    def _clip_logits(self, clip: QkClip) -> None:
        clip.agree()
        for p, shard in self.shards.items():
            factors = clip.row_factors(shard.weight, shard.role.matrix) if shard.weight in clip.matrices else None
            if factors is not None:
                columns = shard.weight.shape[1]
                p.mul_(factors.repeat_interleave(columns)[shard.start : shard.start + len(p)])

    def _orthogonal_step(self, exchange: Exchange) -> None:
        own: dict[int, tuple[Tensor, Shard, float]] = {}
        self.squares = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.shards:
                    continue
                state = self.state[p]
                if MOMENTUM not in state:
                    state[MOMENTUM] = torch.zeros_like(p)
                state[MOMENTUM].mul_(self.momentum).add_(p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                own[self.shards[p].number] = p, self.shards[p], group["lr"]
        mine = exchange.holdings[exchange.rank]
        for parts in exchange.rounds:
            places: list[slice] = []  # of the parts, in this rank's ranges
            for part in parts:
                start, stop = part.piece(mine)
                at = part.rows.start * part.columns - (own[part.number][1].start if stop else 0)
                places.append(slice(start + at, stop + at) if stop else slice(0))
            sent = [
                self._update(own[part.number][0], place) if part.source(mine)[1] else self._none(exchange)
                for part, place in zip(parts, places, strict=True)
            ]
            whole = exchange.to_owner(parts, sent)
            if whole is not None:
                whole = orthogonalize(whole, self.coefficients)
            for part, place, piece in zip(parts, places, exchange.from_owner(parts, whole), strict=True):
                if len(piece):
                    p, shard, lr = own[part.number]
                    factor = scale(*part.shape)
                    p[place].add_(piece, alpha=-lr * factor)
                    if not part.copies or part.source(mine)[1]:
                        total = self.squares.setdefault(shard.role.kind, [0, 0])
                        total[0] = total[0] + piece.float().square().sum() * factor**2
                        total[1] += len(piece)

    def _update(self, p: Tensor, place: slice) -> Tensor:
        """Return Nesterov's gradient of a range, in the dtype that it is sent and iterated on in."""
        return (p.grad[place] + self.momentum * self.state[p][MOMENTUM][place]).bfloat16()

    @staticmethod
    def _none(exchange: Exchange) -> Tensor:
        return torch.empty(0, dtype=torch.bfloat16, device=exchange.device)

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """Return a state as Transformer Engine's Adam does, which asks for all to save them and knows its own."""
        return self.state[param][MOMENTUM] if state_name == MOMENTUM else super().get_unscaled_state(param, state_name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load AdamW's states by its class and the momentum here; a matrix without one begins at zero."""
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        muon = {key: p for key, p in zip(saved, own, strict=True) if p in self.shards}
        rest = {key: state for key, state in state_dict["state"].items() if key not in muon}
        super().load_state_dict({**state_dict, "state": rest})
        for key, p in muon.items():
            momentum = state_dict["state"].get(key, {}).get(MOMENTUM)
            if momentum is not None or key in state_dict["state"]:
                # Megatron allocates Adam's states where it knows of none, and fills what the optimizer has
                self.state[p][MOMENTUM] = torch.zeros_like(p) if momentum is None else momentum


def with_muon(adam: type) -> type:
    """Return AdamW's class with Muon for the matrices that `attach` names."""
    return type("Muon", (MuonMixin, adam), {})


@contextlib.contextmanager
def chosen() -> Iterator[None]:
    """Have Megatron's optimizers, inside the block, built on Muon."""
    original = megatron_optimizer.Adam
    megatron_optimizer.Adam = with_muon(original)
    try:
        yield
    finally:
        megatron_optimizer.Adam = original


def attach(
    optimizer: MegatronOptimizer,
    models: list[nn.Module],
    momentum: float,
    coefficients: str,
    clip: QkClip | None = None,
) -> None:
    """Tell optimizers that were built inside `chosen` which of their parameters are matrices of layers.

    Args:
        optimizer: Megatron's, of one or of several distributed ones.
        models: this rank's parts of the model, as NeMo's or Megatron's modules wrap them.
        momentum, coefficients: of Muon.
        clip: of the attention layers of these models.
    Errors:
        UserError: nothing is Muon's: the layers' weights are frozen.
    """
    known: dict[nn.Parameter, Role] = {}
    for model in models:
        for module in model.modules():
            if hasattr(module, "decoder") and hasattr(module.decoder, "layers"):
                known |= roles(module)
    if not known:
        raise UserError(
            "optim.name = 'muon' and no matrix of a layer is trained",
            hint="leave optim.name out: AdamW trains adapters and embeddings",
        )
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(each, "is_stub_optimizer", False):
            _attach(each, known, momentum, coefficients, clip)


def _attach(
    optimizer: DistributedOptimizer, known: dict[nn.Parameter, Role], momentum: float, name: str, clip: QkClip | None
) -> None:
    inner, weights = optimizer.optimizer, [w for buffer in optimizer.buffers for w in buffer.params if w in known]
    if not weights:
        return
    group, tensor = optimizer.data_parallel_group, 0
    if getattr(weights[0], "allreduce", True) and parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        tensor = parallel_state.get_tensor_model_parallel_rank()
    ranges: dict[int, tuple[int, int]] = {}
    for number, weight in enumerate(weights):
        if weight in optimizer.model_param_gbuf_map:
            span = optimizer._get_model_param_range_map(weight)["param"]
            index, order = optimizer.model_param_group_index_map[weight]
            ranges[number] = span.start, span.end
            inner.shards[inner.param_groups[index]["params"][order]] = Shard(known[weight], number, span.start, weight)
    inner.momentum, inner.coefficients = momentum, name
    if clip is not None and any(weight in clip.matrices for weight in weights):
        inner.clip = clip
    inner.exchange = Exchange(
        [known[weight] for weight in weights],
        [weight.shape[1] for weight in weights],
        Holding(tensor, ranges),
        group,
        weights[0].device,
    )


def update_rms(optimizer: MegatronOptimizer, kinds: list[str]) -> dict[str, float]:
    """Return the RMS of the last step's updates over the learning rate, by kind of matrix; all ranks call it."""
    totals = torch.zeros(2, len(kinds), dtype=torch.float64, device=torch.cuda.current_device())
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        for kind, (square, count) in getattr(getattr(each, "optimizer", None), "squares", {}).items():
            totals[:, kinds.index(kind)] += torch.tensor([float(square), count], device=totals.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(totals)
    return {kind: float((s / n).sqrt()) for kind, s, n in zip(kinds, *totals, strict=True) if n}
