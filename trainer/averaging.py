"""A moving average of the trained weights, in fp32: what is validated and published where train.ema_decay is set."""

from collections.abc import Mapping

import torch


class MovingAverage:
    """`of` holds the averages by name. Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by
    Averaging (1992); of the first updates each counts more, as in Tarvainen and Valpola's.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        self.of = {name: weight.detach().float().clone() for name, weight in weights.items()}
        self._decay = decay

    def add(self, weights: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take in the weights after so many updates."""
        share = 1.0 - decay_at(self._decay, num_updates)
        for name, weight in weights.items():
            self.of[name].lerp_(weight.float(), share)


def decay_at(decay: float, num_updates: int) -> float:
    """What is left of the average: less at first, else a short training would publish what it began with."""
    return min(decay, (1 + num_updates) / (10 + num_updates))
