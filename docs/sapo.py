"""A loss of one's own: SAPO, Gao et al. 2025, arXiv 2511.20347. A soft gate takes the place of clipping."""

import torch

from grpo_mlflow.algorithm.losses import LossParts


def sapo(inputs, *, tau_positive: float = 1.0, tau_negative: float = 1.05):
    advantage = inputs.advantages[:, None]
    tau = torch.where(advantage > 0, tau_positive, tau_negative)
    ratio = (inputs.policy - inputs.old).exp()
    gate = torch.sigmoid(tau * (ratio - 1))
    terms = -4 / tau * gate * advantage * inputs.correction
    slope = 4 * gate * (1 - gate)
    return LossParts(
        terms={"loss_pg": inputs.weighted_sum(terms)},
        sums={"ratio_mean": inputs.token_sum(ratio), "gate_slope": inputs.token_sum(slope)},
    )
