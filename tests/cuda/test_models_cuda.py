"""The promise on a GPU: packed through FlexAttention equals eager unpacked on the same device, values and gradients."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ppcompile
from ppcompile.verification import unpacked_logps

# Inductor's advice (TensorFloat32, too few SMs, ...) depends on the device.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]

FORWARD = 2e-5  # nats per token
GRADIENT = 1e-4  # norm of the difference over norm
ZERO = 1e-6  # a gradient this small beside the largest is zero but for rounding


def packs() -> list[list[ppcompile.Group]]:
    """Groups of two packs: blocks that are full, partial and empty in the first, a single block in the second."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(8, zoo.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    preamble = ids(40)
    return [
        [
            ppcompile.Group(preamble + ids(130), [ids(60), ids(9)]),
            ppcompile.Group(preamble + ids(7), [ids(50), ids(90)]),
        ],
        [ppcompile.Group(ids(30), [ids(20), ids(3), ids(11)])],
    ]


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps), device=logps.device)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(packed: ppcompile.PackedModel, groups: list[ppcompile.Group], device: torch.device) -> None:
    batch = ppcompile.pack(groups, share="tree").to(device)
    expected = unpacked_logps(packed.unwrapped, batch)
    theirs = gradients(packed.unwrapped, expected)
    logps = packed(batch).token_logps
    assert (logps - expected).abs().max() <= FORWARD
    ours = gradients(packed.unwrapped, logps)
    assert ours.keys() == theirs.keys()
    largest = max(g.norm() for g in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= max(GRADIENT * gradient.norm(), ZERO * largest), name


@pytest.mark.parametrize("name", zoo.FLEX)
def test_packed_equals_eager_unpacked(device: torch.device, name: str) -> None:
    packed = ppcompile.wrap(zoo.FLEX[name]().to(device), backend="flex")
    assert {site.backend for site in packed.compiled().graph.sites} == {"flex"}
    for groups in packs():
        assert_equal(packed, groups, device)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_compiled_as_one_artifact_for_all_lengths(device: torch.device, name: str) -> None:
    """A pack of one block makes a second artifact: dynamo compiles sizes of one on their own."""
    packed = ppcompile.wrap(zoo.FLEX[name]().to(device), backend="flex", compile=True)
    first, second = packs()
    longer = [ppcompile.Group([*first[0].prompt, *second[0].prompt], first[0].responses), *first]
    for groups in (first, longer):
        assert_equal(packed, groups, device)
    assert counters["stats"]["unique_graphs"] == 1
    assert_equal(packed, second, device)
