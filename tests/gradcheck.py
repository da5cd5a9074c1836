"""Gradients against slopes of the loss, along random directions, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

ATTEMPTS = 50


def away_from_zero(x: np.ndarray, margin: float = 0.1) -> np.ndarray:
    """Push x off the kink of a ReLU, further than any step of a check."""
    return x + np.copysign(margin, x)


def check_gradients(
    loss: Callable[[], float],
    arrays: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    *,
    step: float = 1e-3,
    rtol: float = 1e-9,
    seed: int = 0,
    kinks: Callable[[], np.ndarray] | None = None,
) -> None:
    """Assert gradient . direction = slope of `loss()` for each array, along two directions each.

    `loss` reads the arrays, which are moved in place and put back bit by bit. Five points give the
    slope with an error of step^4. `kinks` tells, after a call of `loss`, on which side of every
    kink it was: directions that cross one are passed over.
    """
    draw = np.random.default_rng(seed)
    for name, x in arrays.items():
        assert x.dtype == np.float64, name
        assert gradients[name].shape == x.shape, name
        for _ in range(2):
            direction, losses = _smooth_direction(loss, x, step, kinks, draw)
            one, two = losses[1] - losses[-1], losses[2] - losses[-2]
            slope = (8 * one - two) / (12 * step)
            terms = gradients[name] * direction
            size = np.sqrt((terms**2).sum())
            rounding = 10 * np.finfo(float).eps * abs(losses[0]) / step
            assert abs(slope - terms.sum()) <= rtol * size + rounding, (
                f"d{name}: got {terms.sum():.12g}, the loss says {slope:.12g}"
            )


def _smooth_direction(
    loss: Callable[[], float],
    x: np.ndarray,
    step: float,
    kinks: Callable[[], np.ndarray] | None,
    draw: np.random.Generator,
) -> tuple[np.ndarray, dict[int, float]]:
    """A direction without a kink within two steps, and the losses at -2 .. 2 steps along it."""
    start = x.copy()
    for _ in range(ATTEMPTS):
        direction = draw.standard_normal(x.shape)
        losses, sides = {}, []
        for count in (-2, -1, 0, 1, 2):
            x[...] = start + count * step * direction
            losses[count] = loss()
            sides.append(kinks().copy() if kinks else np.zeros(0))
        x[...] = start
        if all(np.array_equal(side, sides[0]) for side in sides):
            return direction, losses
    raise AssertionError(f"no direction without a kink in {ATTEMPTS} attempts")
