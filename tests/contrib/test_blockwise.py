from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from thalweg.contrib.blockwise import PAPER_RATES, OutsideOfBlocks, blockwise_groups
from thalweg.errors import InvalidInput


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "token_embedding": nn.Embedding(5, 2),
            "attention": nn.ModuleDict({"query": nn.Linear(2, 2), "value": nn.Linear(2, 2)}),
            "norm": nn.LayerNorm(2),
            "head": nn.Linear(2, 5, bias=False),
        }
    )


def test_each_block_has_the_published_multiple_of_the_base_rate() -> None:
    groups = blockwise_groups(model(), lr=0.5)
    assert {group["block"]: group["lr"] for group in groups} == {
        "embedding": 5.0,
        "query_key": 4.0,
        "value_output": 2.0,
        "norm": 0.5,
        "other": 0.5,
    }
    assert all(group["lr"] == 0.5 * group["relative_lr"] for group in groups)
    names = {group["block"]: [name for name, _ in group["params"]] for group in groups}
    assert names["query_key"] == ["attention.query.weight", "attention.query.bias"]
    assert names["other"] == ["head.weight"]
    assert dict(PAPER_RATES) == {
        "norm": 1,
        "value_output": 4,
        "feed_forward": 6,
        "query_key": 8,
        "embedding": 10,
    }


def test_the_default_is_for_all_that_has_no_rate() -> None:
    groups = blockwise_groups(model(), 1.0, {"norm": 2.0}, default=3.0)
    rates = {name: group["relative_lr"] for group in groups for name, _ in group["params"]}
    expected = {name: 2.0 if "norm" in name else 3.0 for name, _ in model().named_parameters()}
    assert rates == expected


def test_frozen_parameters_are_left_out_and_pairs_will_do() -> None:
    frozen = model()
    frozen["head"].requires_grad_(False)
    groups = blockwise_groups(frozen.named_parameters(), 1.0)
    assert "other" not in {group["block"] for group in groups}


def test_sgd_moves_each_block_by_its_own_rate() -> None:
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(blockwise_groups(net, lr=0.1))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: float((before[name] - p.detach()).mean()) for name, p in net.named_parameters()}
    for name, distance in moved.items():
        rate = {"token": 10, "query": 8, "value": 4}.get(name.split(".")[-2].split("_")[0], 1)
        assert distance == pytest.approx(0.1 * rate, rel=1e-5), name


def test_adamw_with_groups_is_an_optimizer_for_each_block() -> None:
    ours, theirs = model(), model()
    grouped = torch.optim.AdamW(blockwise_groups(ours, lr=0.01), weight_decay=0.1)
    separate = [
        torch.optim.AdamW(group["params"], lr=group["lr"], weight_decay=0.1)
        for group in blockwise_groups(theirs, lr=0.01)
    ]
    for _ in range(3):
        for net in (ours, theirs):
            for parameter in net.parameters():
                parameter.grad = parameter.detach().sin() + 1
        for optimizer in (grouped, *separate):
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def scheduled(make: object, steps: int) -> list[dict[str, float]]:
    optimizer = torch.optim.SGD(blockwise_groups(model(), lr=0.1))
    schedule = make(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(steps):
        rates.append({group["block"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    return rates


def test_a_schedule_by_factors_keeps_the_ratios() -> None:
    for rates in scheduled(lambda o: LambdaLR(o, lambda t: 1 / (1 + t)), 5):
        assert rates["embedding"] / rates["norm"] == pytest.approx(10)


def test_a_cosine_to_a_floor_is_that_of_the_public_code() -> None:
    floor, steps = 0.005, 8
    found = scheduled(lambda o: CosineAnnealingLR(o, steps, eta_min=floor), steps + 1)
    for t, rates in enumerate(found):
        coefficient = 0.5 * (1 + math.cos(math.pi * t / steps))
        for block, rate in rates.items():
            peak = 0.1 * PAPER_RATES.get(block, 1.0)
            assert rate == pytest.approx(floor + coefficient * (peak - floor)), (t, block)
    assert all(rate == pytest.approx(floor) for rate in found[-1].values())


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"attention": 2.0}, "rates: got 'attention', allowed: blocks norm, position"),
        ({"norm": 0.0}, "rate of norm: got 0.0, allowed: a number > 0"),
        ({"norm": math.inf}, "rate of norm: got inf"),
    ],
)
def test_impossible_rates_are_refused(rates: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        blockwise_groups(model(), 0.1, rates)


def test_a_model_that_is_no_transformer_is_refused() -> None:
    with pytest.raises(InvalidInput, match="none of norm, position"):
        blockwise_groups(nn.Sequential(nn.Linear(2, 2)), 0.1)


def test_torchs_own_transformer_has_its_rates_and_what_is_in_no_block_is_named() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1), "embed": nn.Embedding(9, 8)})
    message = r"in_proj_bias, encoder\.layers\.0\.self_attn\.in_proj_weight: in no block.*in one"
    with pytest.warns(OutsideOfBlocks, match=message) as said:
        groups = blockwise_groups(net, lr=1.0)
    assert len(said) == 1
    found = {name: group["block"] for group in groups for name, _ in group["params"]}
    start = "encoder.layers.0."
    for name, block in (
        ("linear1.weight", "feed_forward"),
        ("linear2.bias", "feed_forward"),
        ("self_attn.out_proj.weight", "value_output"),
        ("self_attn.in_proj_weight", "other"),
        ("norm1.weight", "norm"),
    ):
        assert found[start + name] == block
    assert found["embed.weight"] == "embedding"


def test_patterns_of_ones_own_say_nothing_of_the_rest() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(2, 2), "strange": nn.Linear(2, 2)})
    groups = blockwise_groups(net, 1.0, {"table": 2.0}, blocks={"table": ["embed.*"]})
    assert [group["block"] for group in groups] == ["table", "other"]
    with pytest.warns(OutsideOfBlocks, match=r"strange\.bias, strange\.weight: in no block"):
        blockwise_groups(net, 1.0)
