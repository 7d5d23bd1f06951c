"""Experts as they are trained: the router's precision, its counts and balance loss, matmuls in FP8, adapters."""

from __future__ import annotations

import pytest
import torch
from adapted_model import adapter, randomize_adapters
from small_model import pure_config, relative_error, small_model, tokens

from nemotron_h.schema.recipe import AdapterSchema

pytestmark = pytest.mark.usefixtures("megatron")

ROUTED = ["experts.linear_fc1", "experts.linear_fc2"]
SHARED = ["shared_experts.linear_fc1", "shared_experts.linear_fc2"]


def routers_of(model) -> list:
    from nemotron_h.model.expert_layers import routers

    return routers(model)


def test_router_and_counts_stay_in_float32() -> None:
    """bfloat16 counts no further than 256."""
    model = small_model(pure_config("E", dtype=torch.bfloat16, bf16=True))
    router = routers_of(model)[0]
    assert model.decoder.layers[1].mlp.experts.local_experts[0].linear_fc1.weight.dtype == torch.bfloat16
    ids = tokens(4, 100)
    for _ in range(3):
        model(input_ids=ids)
    assert router.weight.dtype == router.expert_bias.dtype == router.local_tokens_per_expert.dtype == torch.float32
    assert float(router.local_tokens_per_expert.sum()) == 3 * 400 * 2
    assert float(router.local_tokens_per_expert.max()) > 256
    with torch.no_grad():
        model(input_ids=ids)
    assert float(router.local_tokens_per_expert.sum()) == 3 * 400 * 2, "an evaluation counts nothing"


def test_the_balance_loss_is_that_of_each_sequence() -> None:
    """Gradients with its weight less those without are those of weight * E sum_n f_n P_n, a mean over sequences: f_n is
    the share of choices without the bias, P_n the mean of scores, normalised over all experts (DeepSeek-V3 2.1.2).
    """
    weight, ids = 0.3, tokens(2, 40)
    gradients, noted = [], []
    for balance in (weight, 0.0):
        model = small_model(pure_config("E", balance_loss=balance))
        model(input_ids=ids).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        noted.append([float(loss) for router in routers_of(model) for loss in router.losses])
    model = small_model(pure_config("E"))
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.decoder.layers):
        if hasattr(layer.mlp if hasattr(layer, "mlp") else None, "router"):
            layer.mlp.router.register_forward_pre_hook(lambda _, args, n=number: seen.__setitem__(n, args[0]))
    model(input_ids=ids)
    total = 0.0
    for number, x in seen.items():
        scores = (x.transpose(0, 1) @ model.decoder.layers[number].mlp.router.weight.T).sigmoid()  # [b, l, n]
        shares = scores / scores.sum(dim=-1, keepdim=True)
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(2, dim=-1).indices, 1.0).mean(dim=1) / 2
        total = total + (6 * chosen * shares.mean(dim=1)).sum(dim=-1).mean()
    (weight * total).backward()
    reached = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(gradients[0][name] - gradients[1][name], parameter.grad) < 1e-3, name
            reached += 1
    assert reached > 10
    assert sum(noted[0]) == pytest.approx(float(total), rel=1e-5)
    assert not noted[1]


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_beside_a_sum_the_balance_loss_weighs_what_that_counts(recompute: str) -> None:
    """Where Megatron divides a step's gradients by tokens or pairs, a micro-batch has its share: also where another
    micro-batch has passed in between, as in a pipeline.
    """
    from nemotron_h.model.step import data_step, forward_step

    def batch(rows: int, **count: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = (torch.arange(40) < 5).float().expand(rows, 40)
        found = {"tokens": tokens(rows, 40, rows), "labels": tokens(rows, 40), "loss_mask": mask, **count}
        return data_step(iter([{**found, "position_ids": found["tokens"]}]))

    batches = [batch(2), batch(3, pairs=torch.tensor([4, 0, 3]))]
    assert [int(each["loss_count"]) for each in batches] == [2 * 5, 7]

    def gradients(of: list[dict], **changes) -> dict[str, torch.Tensor]:
        model = small_model(pure_config("E", recompute_experts=recompute, **changes))
        losses = [forward_step(model, each).mean() for each in of]
        for loss in losses:
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    both = [gradients(batches, balance_loss=b, calculate_per_token_loss=True) for b in (0.3, 0.0)]
    alone = [[gradients([each], balance_loss=b) for b in (0.3, 0.0)] for each in batches]
    for name in both[0]:
        expected = sum(n * (one[name] - zero[name]) for n, (one, zero) in zip((10, 7), alone, strict=True))
        if expected.any():  # nothing reaches the last layer's experts and the output layer
            assert relative_error(both[0][name] - both[1][name], expected) < 1e-3, name
    assert all(both[0][n].ne(both[1][n]).any() for n in both[0] if n.endswith(".router.weight"))


@pytest.mark.parametrize("recipe", ["fp8_current_scaling", "fp8_blockwise"])
def test_emulated_fp8_takes_the_experts_and_leaves_the_router(recipe: str) -> None:
    """One expert gets no token."""
    results = []
    for emulated in (recipe, None):
        model = small_model(pure_config("E"))
        first = routers_of(model)[0]
        first.expert_bias[3] = -10.0
        if emulated:
            for module in model.modules():
                if hasattr(module, "fp8_emulation"):
                    module.fp8_emulation = emulated
        matrices = [n for n, m in model.named_modules() if getattr(m, "fp8_emulation", None) and ".mlp." in n]
        assert len(matrices) == (3 * (6 + 1) * 2 if emulated else 0)
        out = model(input_ids=tokens(2, 32))
        out.square().mean().backward()
        assert float(first.local_tokens_per_expert[3]) == 0
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        unused = model.decoder.layers[1].mlp.experts.local_experts[3]
        assert not unused.linear_fc1.weight.grad.any()
        results.append(out.detach())
    quantised, exact = results  # where a choice is a near one, another expert may have the token
    assert 1e-4 < float((quantised - exact).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_shared_experts_have_adapters(kind: str) -> None:
    settings = AdapterSchema(**{**vars(adapter(kind)), "targets": SHARED})
    model, base = pure_config("E", adapter=settings).configure_model(None), small_model(pure_config("E"))
    model.load_state_dict(base.state_dict())
    ids = tokens(2, 40)
    assert torch.equal(model(input_ids=ids), base(input_ids=ids))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2 * (2 if kind == "lora" else 3)
    assert all(".mlp.shared_experts.linear_fc" in name for name in trained)
    randomize_adapters(model)
    model(input_ids=ids).square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)
    # a checkpoint of adapters has neither weights nor correction biases
    with_adapters = {k: v for k, v in model.state_dict().items() if ".adapter." in k}
    other = pure_config("E", adapter=settings).configure_model(None)
    other.load_state_dict(base.state_dict())
    other.load_state_dict(with_adapters)
    assert torch.equal(model(input_ids=ids), other(input_ids=ids))


def adapted_experts(kind: str, base, **changes):
    """A model with adapters of every routed expert that change as much as the weights, over a base's."""
    settings = adapter(kind, targets=ROUTED, **changes)
    model = pure_config("E", adapter=settings, dtype=torch.float64).configure_model(None).double()
    model.load_state_dict(base.state_dict())
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_routed_expert_has_adapters_of_its_own(kind: str) -> None:
    """Untrained they change nothing; trained, outputs and gradients are those of the weights that they stand for."""
    base = small_model(pure_config("E", dtype=torch.float64))
    model = adapted_experts(kind, base)
    ids = tokens(2, 40)
    assert torch.equal(model(input_ids=ids), base(input_ids=ids))
    of = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(of) == 3 * 6 * 2 * (2 if kind == "lora" else 3)
    places = {name.partition(".adapter.")[0] for name in of}
    assert all(".mlp.experts.local_experts." in place for place in places)
    firsts = [p for name, p in of.items() if name.endswith("linear_fc1.adapter.a")]
    assert not torch.equal(firsts[0], firsts[1]), "each begins at numbers of its own"
    randomize_adapters(model)
    weights, scales = dict(base.named_parameters()), {}
    with torch.no_grad():
        for place in places:
            weight, a, b = weights[f"{place}.weight"], of[f"{place}.adapter.a"], of[f"{place}.adapter.b"]
            weight += 2.0 * b @ a
            scales[place] = torch.ones(len(weight), 1, dtype=weight.dtype)
            if kind == "dora":
                scales[place] = (of[f"{place}.adapter.magnitude"] / weight.norm(dim=1))[:, None]
            weight *= scales[place]
    for each in (model, base):
        each(input_ids=ids).square().mean().backward()
    assert relative_error(model(input_ids=ids).detach(), base(input_ids=ids).detach()) < 1e-9
    reached = 0
    for place in places:
        full, a, b = weights[f"{place}.weight"].grad * scales[place], of[f"{place}.adapter.a"], of[f"{place}.adapter.b"]
        reached += bool(full.any())
        assert relative_error(b.grad, 2.0 * full @ a.detach().T) < 1e-9, place
        assert relative_error(a.grad, 2.0 * b.detach().T @ full) < 1e-9, place
    assert reached > len(places) / 2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_group_of_experts_is_adapted_as_they_are_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's layer of all experts of a rank, by a stand-in: same outputs, gradients and checkpoints."""
    from grouped_linear import GroupedLinear

    from nemotron_h.model import layers

    base = small_model(pure_config("E", dtype=torch.float64))
    one = adapted_experts(kind, base)
    randomize_adapters(one)
    plain = layers.Parts

    def parts(*arguments: object, **named: object) -> layers.Parts:
        return plain(*arguments, **named, grouped=(GroupedLinear, GroupedLinear))

    monkeypatch.setattr(layers, "Parts", parts)
    group = pure_config("E", adapter=one.config.adapter, dtype=torch.float64).configure_model(None).double()
    saved, loaded = (
        {(t.key, t.global_offset): t for name, t in model.sharded_state_dict().items() if ".mlp.experts." in name}
        for model in (one, group)
    )
    assert saved.keys() == loaded.keys()
    assert len(saved) == 3 * 6 * 2 * (3 if kind == "lora" else 4)
    others = {name: tensor for name, tensor in one.state_dict().items() if ".mlp.experts." not in name}
    group.load_state_dict({**group.state_dict(), **others})
    with torch.no_grad():
        for key, tensor in loaded.items():
            assert (tensor.global_shape, tensor.replica_id) == (saved[key].global_shape, saved[key].replica_id), key
            tensor.data.copy_(saved[key].data)
    ids, found = tokens(2, 40), []
    for model in (one, group):
        out = model(input_ids=ids)
        out.square().mean().backward()
        squares = [p.grad.square().sum() for p in model.parameters() if p.requires_grad]
        found.append((out.detach(), torch.stack(squares).sum()))
    assert relative_error(found[1][0], found[0][0]) < 1e-12
    assert relative_error(found[1][1], found[0][1]) < 1e-9
    # a base that is loaded alone sets DoRA's lengths
    alone = {key: value for key, value in group.state_dict().items() if ".adapter." not in key}
    group.load_state_dict({key: 2 * value if "weight3" in key else value for key, value in alone.items()})
    for name, p in group.named_parameters():
        if name.endswith("linear_fc1.adapter.3.magnitude"):
            layer = group.get_submodule(name.partition(".adapter.")[0])
            assert torch.allclose(p, layer.adapter[3].lengths(layer.weight3))


def test_dropout_of_an_expert_s_adapter_is_drawn_in_training_alone() -> None:
    base = small_model(pure_config("E", dtype=torch.float64))
    model = adapted_experts("lora", base, dropout=0.5)
    randomize_adapters(model)
    ids = tokens(1, 30)
    first, second = model(input_ids=ids), model(input_ids=ids)
    assert relative_error(first.detach(), second.detach()) > 1e-3
    model.eval()
    assert torch.equal(model(input_ids=ids), model(input_ids=ids))


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_step_of_fixed_shapes_is_the_plain_one(batch: int) -> None:
    """As a GPU takes it: of up to 3 tokens, 6 choices, experts are gathered; of more, all of them run."""
    from nemotron_h.architecture.blocks.experts import Experts
    from nemotron_h.model.blocks.experts import ExpertsWeights, RunningExperts

    block, g = Experts(16, 6, 2, 24, 32, 1.5), torch.Generator().manual_seed(batch)
    shapes = ((16,), (6, 16), (6,), (6, 24, 16), (6, 16, 24), (32, 16), (16, 32))
    weights = ExpertsWeights(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))
    running, h = RunningExperts(block, 1e-5), torch.randn(batch, 16, generator=g, dtype=torch.float64)
    assert relative_error(running._run_by_shape(weights, h), running._run(weights, h)) < 1e-12
