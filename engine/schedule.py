"""Learning rates as pure functions of the step: no scheduler object, no state to save."""

import math

from engine.config import OptimizerSection


def learning_rate(step: int, total_steps: int, section: OptimizerSection) -> float:
    """Learning rate of update number `step` (0-based) of `total_steps`.

    Warm-up rises linearly and reaches the highest rate with update `warmup_steps`, so that the
    first update already moves (1 / (warmup_steps + 1) of the rate) and zero warm-up is no special
    case. Then constant; or linear or cosine down to ``final_fraction``; or warmup_stable_decay
    (Hu et al. 2024, MiniCPM): constant, then linear over the last ``decay_fraction`` of all steps.
    """
    highest, warmup = section.learning_rate, section.warmup_steps
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    if section.schedule == "constant":
        return highest
    start = warmup
    if section.schedule == "warmup_stable_decay":
        start = max(warmup, total_steps - round(section.decay_fraction * total_steps))
        if step < start:
            return highest
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if section.schedule == "cosine" else 1.0 - progress
    return highest * (section.final_fraction + (1.0 - section.final_fraction) * remaining)
