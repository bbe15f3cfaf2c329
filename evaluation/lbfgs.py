"""L-BFGS for smooth convex functions, preconditioned (Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.4).

torch.optim.LBFGS knows no initial inverse Hessian; on badly scaled features that is the difference between tens and
hundreds of passes over the data.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-9  # of a mean of many float32 terms that was summed in float64


class Minimum(NamedTuple):
    """Where the search ended; converged says whether the gradient norm came below the tolerance."""

    point: Tensor
    value: float
    gradient_norm: float
    iterations: int
    converged: bool


def minimise(
    function: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    max_iterations: int,
    memory: int = 20,
) -> Minimum:
    """Follow L-BFGS directions until the Euclidean norm of the gradient is at most `tolerance`.

    function(point) -> value, gradient (float64, shaped like start); precondition(g) applies the inverse of a fixed
    positive definite Hessian model. It also ends, unconverged, where rounding keeps the value from falling further.
    """
    point = start
    value, gradient = function(point)
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)
    gamma, iterations, idle = 1.0, 0, 0
    while (norm := float(gradient.norm())) > tolerance and iterations < max_iterations and idle < 10:
        direction = -_two_loops(gradient, pairs, precondition, gamma)
        slope = float((gradient * direction).sum())
        found = _backtrack(function, point, value, direction, slope)
        if found is None:
            break
        new_point, new_value, new_gradient = found
        idle = idle + 1 if new_value > value - ROUNDING * abs(value) else 0
        value = new_value
        step, change = new_point - point, new_gradient - gradient
        curvature = float((step * change).sum())
        if curvature > 1e-12 * float(step.norm() * change.norm()):
            pairs.append((step, change, curvature))
            gamma = curvature / float((change * precondition(change)).sum())
        point, gradient, iterations = new_point, new_gradient, iterations + 1
    return Minimum(point, value, norm, iterations, norm <= tolerance)


def _two_loops(
    gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, float]], initial: Callable[[Tensor], Tensor], gamma: float
) -> Tensor:
    """The inverse Hessian estimate times the gradient."""
    q, shares = gradient, []
    for step, change, curvature in reversed(pairs):
        share = (step * q).sum() / curvature
        q = q - share * change
        shares.append(share)
    r = gamma * initial(q)
    for (step, change, curvature), share in zip(pairs, reversed(shares), strict=True):
        r = r + (share - (change * r).sum() / curvature) * step
    return r


def _backtrack(
    function: Callable[[Tensor], tuple[float, Tensor]], point: Tensor, value: float, direction: Tensor, slope: float
) -> tuple[Tensor, float, Tensor] | None:
    """First step length from 1 downwards with sufficient decrease, up to the rounding of the function's value."""
    length = 1.0
    for _ in range(30):
        new_point = torch.add(point, direction, alpha=length)
        new_value, gradient = function(new_point)
        if new_value <= value + 1e-4 * length * slope + ROUNDING * abs(value):
            return new_point, new_value, gradient
        parabola = -slope * length * length / (2 * (new_value - value - slope * length))
        length = min(max(parabola, 0.1 * length), 0.5 * length)
    return None
