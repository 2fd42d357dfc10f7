"""Which dialogues each optimizer step sees and at what learning rate: pure functions of the step.

Because nothing here has state, a resumed run continues with exactly the steps it would have made.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """The course of a training run.

    samples: training samples; per_step: samples per optimizer step, over all workers; epochs may be
    fractional. The last step of an epoch takes what is left, as in transformers' Trainer.
    """

    samples: int
    per_step: int
    epochs: float
    seed: int
    learning_rate: float
    kind: Literal["cosine", "linear", "constant"]
    warmup_ratio: float

    @cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.samples / self.per_step)

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, math.ceil(self.steps_per_epoch * self.epochs))

    @cached_property
    def warmup_steps(self) -> int:
        return math.ceil(self.steps * self.warmup_ratio)

    def samples_of(self, step: int) -> list[int]:
        """Indices of the samples that make up optimizer step `step` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.samples)
        return list(order[place * self.per_step : (place + 1) * self.per_step])

    def epoch_after(self, step: int) -> float:
        """Epochs passed once step `step` (from 0) is done."""
        return (step + 1) / self.steps_per_epoch

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0): transformers' schedules with warm-up.

        The first step of a warm-up has rate 0 there, and so here.
        """
        if step < self.warmup_steps:
            return self.learning_rate * step / max(1, self.warmup_steps)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.kind == "cosine":
            return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.kind == "linear":
            return self.learning_rate * max(0.0, 1.0 - progress)
        return self.learning_rate


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, samples: int) -> tuple[int, ...]:
    """The shuffled order of one epoch; the same on every worker and after every restart."""
    order = list(range(samples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
