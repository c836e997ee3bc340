"""The learning rate as a function of the step: linear warm-up, then half a cosine down to the end.

    lr(t) = peak (t + 1) / warmup                                                      for t < warmup
    lr(t) = floor + (peak - floor) (1 + cos(pi (t - warmup) / (steps - warmup))) / 2   after

Source: Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts.
"""

from __future__ import annotations

import math

from pretrain.sections import Train


def learning_rate(train: Train, step: int) -> float:
    """The rate of step `step`, counted from 0; pure, so a resumed run needs no scheduler state."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
