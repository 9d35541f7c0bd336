"""The DPO loss against the formula of the paper, pair by pair."""

import math

import pytest
import torch

from ppcompile.losses import dpo_loss

POLICY = torch.tensor([-10.0, -12.0, -3.0, -4.0, -3.5], dtype=torch.float64)
REFERENCE = torch.tensor([-11.0, -11.0, -3.0, -3.0, -4.0], dtype=torch.float64)
PAIRS = [(0, 1), (2, 3), (2, 4)]


def paper(win: int, lose: int, beta: float, eps: float) -> float:
    h = beta * ((POLICY[win] - POLICY[lose]) - (REFERENCE[win] - REFERENCE[lose])).item()
    return (1 - eps) * math.log1p(math.exp(-h)) + eps * math.log1p(math.exp(h))


@pytest.mark.parametrize(("beta", "eps"), [(0.1, 0.0), (0.5, 0.1)])
def test_losses_and_rewards_are_those_of_the_paper(beta, eps):
    result = dpo_loss(POLICY, REFERENCE, PAIRS, beta=beta, label_smoothing=eps)
    assert result.losses.tolist() == pytest.approx([paper(*pair, beta, eps) for pair in PAIRS])
    assert result.chosen_rewards.tolist() == pytest.approx([beta, 0, 0])
    assert result.rejected_rewards.tolist() == pytest.approx([-beta, -beta, 0.5 * beta])
    assert result.correct.tolist() == [1, 1, 0]


def test_a_policy_equal_to_its_reference_scores_as_chance_does():
    result = dpo_loss(POLICY, POLICY.clone(), PAIRS)
    assert result.losses.tolist() == pytest.approx([math.log(2)] * 3)
    assert result.correct.tolist() == [0.5] * 3


def test_gradients_reach_the_policy_only():
    policy, reference = POLICY.clone().requires_grad_(), REFERENCE.clone().requires_grad_()
    dpo_loss(policy, reference.detach(), PAIRS).losses.sum().backward()
    assert policy.grad is not None
    assert (policy.grad[[0, 2]] < 0).all()
    assert (policy.grad[[1, 3, 4]] > 0).all()
    assert torch.autograd.gradcheck(lambda logps: dpo_loss(logps, REFERENCE, PAIRS).losses, policy)


def test_no_pairs_give_no_losses():
    assert dpo_loss(POLICY, REFERENCE, []).losses.shape == (0,)


@pytest.mark.parametrize(
    ("pairs", "options", "said"),
    [
        ([(0, 5)], {}, r"pairs name responses 0\.\.4, got 0\.\.5"),
        ([(-1, 0)], {}, "got -1"),
        ([0, 1], {}, r"pairs must be \[N, 2\]"),
        (PAIRS, {"beta": 0.0}, "beta must be above 0"),
        (PAIRS, {"label_smoothing": 0.5}, "label_smoothing"),
    ],
)
def test_bad_arguments_are_named(pairs, options, said):
    with pytest.raises(ValueError, match=said):
        dpo_loss(POLICY, REFERENCE, pairs, **options)


def test_policy_and_reference_must_agree_in_shape():
    with pytest.raises(ValueError, match=r"got \[5\] and \[4\]"):
        dpo_loss(POLICY, REFERENCE[:4], PAIRS)
