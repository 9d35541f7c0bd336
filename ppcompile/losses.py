"""Preference losses on the per-response log-probabilities of a packed forward.

Names follow one legend: ``R`` responses of a batch in input order, ``N`` pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DPOResult", "dpo_loss"]


@dataclass(frozen=True)
class DPOResult:
    """What :func:`dpo_loss` returns, one entry per pair.

    Attributes:
        losses: ``[N]``, differentiable.
        chosen_rewards, rejected_rewards: ``[N]``, ``beta * (policy - reference)``, detached.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """``[N]``, by how much the implicit reward prefers the chosen response."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def correct(self) -> Tensor:
        """``[N]`` in the dtype of the rewards: 1 where the chosen response is ahead, 0.5 on a tie, else 0.

        A policy that still equals its reference ties everywhere and scores one half, as chance would.
        """
        return 0.5 * (1 + self.margins.sign())


def dpo_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    pairs: Tensor | Sequence[tuple[int, int]],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> DPOResult:
    """Direct Preference Optimization, one loss per pair (arXiv 2305.18290; smoothing: arXiv 2310.12036, cDPO).

    With ``h = beta * ((pi_w - pi_l) - (ref_w - ref_l))`` the loss of a pair is
    ``-(1 - eps) * log sigmoid(h) - eps * log sigmoid(-h)``.

    Losses are not averaged here: packs hold different numbers of pairs, so the mean belongs to the optimizer step and
    not to the pack (divide by the number of pairs of the *step* before ``backward``).

    Args:
        policy_logps: ``[R]`` log-probability of each response, with gradient.
        reference_logps: ``[R]`` the same under the frozen reference.
        pairs: ``[N, 2]`` indices into ``R``, ``(winner, loser)``.
        beta: how strongly the policy is held to the reference; above 0.
        label_smoothing: assumed share of wrong labels, in ``[0, 0.5)``.

    Raises:
        ValueError: shapes that do not agree, an index outside ``R``, or ``beta`` or ``label_smoothing`` out of range.
    """
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta must be above 0 and label_smoothing in [0, 0.5), got {beta} and {label_smoothing}")
    if policy_logps.ndim != 1 or policy_logps.shape != reference_logps.shape:
        raise ValueError(
            "policy_logps and reference_logps must both be [R], one entry per response; "
            f"got {list(policy_logps.shape)} and {list(reference_logps.shape)}"
        )
    chosen, rejected = _indices(pairs, policy_logps)
    advantage = policy_logps - reference_logps
    rewards = beta * advantage.detach()
    h = beta * (advantage[chosen] - advantage[rejected])
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return DPOResult(losses, rewards[chosen], rewards[rejected])


def _indices(pairs: Tensor | Sequence[tuple[int, int]], logps: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.as_tensor(pairs, dtype=torch.int64)
    if index.numel() == 0:
        index = index.reshape(0, 2)
    if index.ndim != 2 or index.shape[1] != 2:
        raise ValueError(f"pairs must be [N, 2], (winner, loser) in each row; got {list(index.shape)}")
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < len(logps)):
        raise ValueError(f"pairs name responses 0..{len(logps) - 1}, got {int(index.min())}..{int(index.max())}")
    chosen, rejected = index.to(logps.device).unbind(dim=1)
    return chosen, rejected
