"""One number for a whole faithfulness curve: CPR and CMD over the share of nodes kept (MIB; digest 1.8).

With f(p) the faithfulness of the circuit that keeps a share p of all nodes (or edges):

    CPR = area under f(p)          higher is better
    CMD = area of |1 - f(p)|       lower is better

by the trapezoid rule over PROPORTIONS. On the linear axis, which is MIB's, the last interval (0.5 to 1) alone weighs
half; on the logarithmic axis every factor weighs the same, and the area is divided by the axis' length. The shares are
those of the sizes that were really used, so a label is never another size's value.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from circuits.faithfulness import CurvePoint
from shared.errors import UserError
from shared.stats import Interval, bootstrap_interval

PROPORTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Areas(NamedTuple):
    """CPR and CMD on the linear axis (0 to 1, undivided) and on the logarithmic one (divided by its length)."""

    cpr: Interval
    cmd: Interval
    cpr_log: Interval
    cmd_log: Interval


def proportion_sizes(total: int, proportions: Sequence[float] = PROPORTIONS) -> list[int]:
    """Return the number of nodes at each share of the total, at least one, each number once, in order."""
    if not proportions or not all(0 < share <= 1 for share in proportions):
        raise UserError(
            f"proportions must be shares of all nodes, above 0 and at most 1; got {list(proportions)}"
        )
    return sorted({max(1, round(share * total)) for share in proportions})


def areas(points: Sequence[CurvePoint], total: int, seed: int = 0) -> Areas:
    """Return CPR and CMD of a curve over `total` nodes, with 95 % intervals that resample examples (or clusters).

    The curve needs at least two different sizes; `curve(..., proportion_sizes(total), ...)` gives MIB's.
    """
    points = sorted(points, key=lambda point: point.size)
    sizes = [point.size for point in points]
    if len(set(sizes)) < max(2, len(sizes)) or not 0 < sizes[0] <= sizes[-1] <= total:
        raise UserError(
            f"an area needs two or more different sizes between 1 and {total}, got {sizes}: "
            "take them from proportion_sizes(total)"
        )
    share_P = np.array(sizes) / total
    rows = [points[0].full_B, points[0].empty_B, *(point.circuit_B for point in points)]
    samples = [row.double().cpu().numpy() for row in rows]

    def interval(axis_P: NDArray, width: float, distance: bool) -> Interval:
        def statistic(full: NDArray, empty: NDArray, *circuits: NDArray) -> NDArray | float:
            gap = (full - empty).mean(-1)
            f_P = np.stack([(circuit - empty).mean(-1) / gap for circuit in circuits], axis=-1)
            return np.trapezoid(np.abs(1 - f_P) if distance else f_P, axis_P, axis=-1) / width

        return bootstrap_interval(*samples, statistic=statistic, clusters=points[0].clusters, seed=seed)

    log_P = np.log(share_P)
    width = float(log_P[-1] - log_P[0])
    return Areas(
        cpr=interval(share_P, 1.0, False),
        cmd=interval(share_P, 1.0, True),
        cpr_log=interval(log_P, width, False),
        cmd_log=interval(log_P, width, True),
    )
