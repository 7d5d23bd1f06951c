"""megatron-core's mixture of experts as our stack uses it: a router in float32, experts over expert-parallel ranks.

Tokens reach their experts by an exchange between the expert-parallel ranks; none is dropped. Transformer Engine
multiplies the matrices of a rank's experts in groups; on a CPU they are multiplied one after the other.

Axes: s position, b row, t token, n expert, h hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HALF = (torch.bfloat16, torch.float16)


class _Gate(torch.autograd.Function):
    """Multiply x [..., h] by a float32 weight [n, h] in float32, and keep x as it is for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight asks for no x
        ctx.dtype = x.dtype
        return x.to(weight.dtype) @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = (dy @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2).to(weight.dtype)
        return dx, dweight


class Router(TopKRouter):
    """megatron-core's router with weight, correction bias and counts in float32 whatever the model's dtype.

    megatron-core casts them to the model's: a bfloat16 count of tokens stops at 256.

    Attributes:
        losses: balance losses of this rank's tokens without their weight, of each micro-batch since `forget`.
        loss_count: of the pass, as of `Surroundings`.
    """

    losses: list[Tensor]
    loss_count: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        """Return logits [s, b, n] of [s, b, h]."""
        return _Gate.apply(input, self.weight)

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *_: object
    ) -> Tensor:
        """Return the activation, whose backward pass begins that of the balance loss too.

        Where Megatron divides a step's gradients by what its loss counts, a micro-batch's balance loss has the weight
        of its share. megatron-core takes its positions for that, of which few may teach, and pairs are fewer still.
        Elsewhere it averages over context-parallel ranks, each of which has a part of the loss of whole rows.
        """
        self.losses.append(aux_loss.detach() / aux_loss_coeff)
        weight = self.loss_count if self.calculate_per_token_loss else self.cp_group.size()
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * weight)

    def forget(self) -> None:
        """Begin the counts of a step."""
        self.local_tokens_per_expert.zero_()
        self.losses = []

    def _maintain_float32_expert_bias(self) -> None:
        """Do nothing: `_apply` has kept it."""

    def _apply(self, fn, recurse: bool = True):
        """Keep all tensors in float32 when the model is cast to a lower precision (moves still apply)."""
        before = {name: tensor.data for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        super()._apply(fn, recurse)
        for name, data in before.items():
            tensor = getattr(self, name)
            if tensor.dtype in _HALF:
                tensor.data = data.to(tensor.device)
        return self


class ExpertsLayer(MLPLayer):
    """megatron-core's MLP layer over its mixture of experts.

    Megatron is not told of the correction bias: it would move it before the step's loss and gradients are looked at,
    and twice where a step is run again. `training.callbacks.expert_load` moves it with the weights.
    """

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        config = copy.copy(config)
        config.num_moe_experts, config.moe_router_topk = config.num_experts, config.experts_per_token
        config.moe_router_topk_scaling_factor = config.expert_scaling
        config.moe_shared_expert_intermediate_size = config.shared_expert_hidden_size
        # equal, for megatron-core would make a deep copy for each layer else
        config.moe_ffn_hidden_size = config.ffn_hidden_size = config.expert_hidden_size
        config.moe_aux_loss_coeff, config.moe_router_enable_expert_bias = config.balance_loss, True
        super().__init__(config, *args, **kwargs)
        # megatron-core's layer builds no router but its own, with a weight on the CPU and in the model's dtype
        router = self.mlp.router
        router.__class__ = Router
        router.forget()
        exact = torch.promote_types(router.weight.dtype, torch.float32)
        router.weight.data = router.weight.data.to(device=router.expert_bias.device, dtype=exact)

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Return the output, and leave nothing of the pass in the dispatcher: its graph would stay."""
        result = super().forward(*args, **kwargs)
        self.mlp.token_dispatcher.probs = None
        return result

    def spread_experts(self) -> None:
        """Have gradients of the experts reduced over the ranks that hold the same ones: with tensor parallelism these
        are not the data-parallel ranks, which megatron-core takes unless experts are split.
        """
        for _, *weights in self.expert_weights():
            for weight in weights:
                weight.allreduce = False

    def expert_linears(self, matrix: str) -> Iterator[tuple[nn.Module, dict[str, str]]]:
        """Yield the linear layers of one of the experts' matrices on this rank, each with its weights' names there ->
        their names over all ranks, `experts.5.linear_fc1`.
        """
        experts, numbers, part = self.mlp.experts, self.mlp.local_expert_indices, matrix.removeprefix("experts.")
        names = [f"experts.{number}.{part}" for number in numbers]
        if isinstance(experts, SequentialMLP):
            for expert, name in zip(experts.local_experts, names, strict=True):
                yield getattr(expert, part), {"weight": name}
        else:
            yield getattr(experts, part), {f"weight{index}": name for index, name in enumerate(names)}

    def expert_weights(self) -> Iterator[tuple[int, nn.Parameter, nn.Parameter]]:
        """Yield this rank's experts: number over all ranks, up, down."""
        experts = self.mlp.experts
        for index, number in enumerate(self.mlp.local_expert_indices):
            if isinstance(experts, SequentialMLP):
                expert = experts.local_experts[index]
                yield number, expert.linear_fc1.weight, expert.linear_fc2.weight
            else:
                names = (experts.linear_fc1, experts.linear_fc2)
                yield number, *(getattr(linear, f"weight{index}") for linear in names)


def routers(model: nn.Module) -> list[Router]:
    """Return the routers of this rank's layers, in order."""
    return [module for module in model.modules() if isinstance(module, Router)]
