"""Schedules: one value an iteration (matches `dinov3.train.cosine_lr_scheduler`; SGDR, eq. 5)."""

import numpy as np


class CosineScheduler:
    """Zero while frozen, linear warm-up, then a half cosine from `base_value` to `final_value`.

    Args:
        total_iters: length; later iterations get `final_value`.
        warmup_iters, start_warmup_value: the ramp up to `base_value`, both ends included.
        freeze_iters: zeros before the ramp.
        trunc_extra: stretch the cosine by this share of its length and cut it off at the end, then
            rescale it so that it still ends at `final_value` (a straighter decay).
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
        trunc_extra: float = 0.0,
    ) -> None:
        decay_iters = total_iters - warmup_iters - freeze_iters
        if decay_iters < 0:
            raise ValueError(
                f"A schedule must be at least as long as its warm-up, got {total_iters} iterations "
                f"and {warmup_iters} + {freeze_iters} of warm-up: shorten the warm-up"
            )
        self.final_value = np.float64(final_value)
        self.total_iters = total_iters
        frozen = np.zeros(freeze_iters)
        ramp = np.linspace(start_warmup_value, base_value, warmup_iters)
        if trunc_extra == 0.0:
            phase = np.pi * np.arange(decay_iters) / max(decay_iters, 1)
            share = (1 + np.cos(phase)) / 2
        else:
            stretched = int((1 + trunc_extra) * decay_iters)
            share = (1 + np.cos(np.linspace(0, np.pi, stretched)[:decay_iters])) / 2
            if decay_iters:
                share = (share - share[-1]) / (1 - share[-1])
        decay = final_value + (base_value - final_value) * share
        self.schedule = np.concatenate([frozen, ramp, decay])

    def __getitem__(self, it: int) -> float:
        """The value of iteration `it`, counted from 0."""
        return self.final_value if it >= self.total_iters else self.schedule[it]


def linear_warmup_cosine_decay(
    start: float,
    peak: float,
    end: float,
    warmup_iterations: int,
    total_iterations: int,
    cosine_iterations: int | None = None,
) -> np.ndarray:
    """A linear ramp from `start` (included) to `peak` (excluded), a half cosine to `end`, then `end`.

    `cosine_iterations`: length of the cosine, both ends included; None: all that is left.  Returns
    float64 [total_iterations].
    """
    if cosine_iterations is None:
        cosine_iterations = total_iterations - warmup_iterations
    rest = total_iterations - warmup_iterations - cosine_iterations
    if rest < 0 or cosine_iterations < 0:
        raise ValueError(
            "Warm-up and cosine must fit into the schedule, got "
            f"{warmup_iterations} + {cosine_iterations} of {total_iterations} iterations: shorten one of them"
        )
    ramp = np.linspace(start, peak, warmup_iterations, endpoint=False)
    share = (np.cos(np.linspace(0, np.pi, cosine_iterations)) + 1) / 2
    return np.concatenate([ramp, end + (peak - end) * share, np.full(rest, end, dtype=np.float64)])
