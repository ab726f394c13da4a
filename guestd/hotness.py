"""Ground truth: how well a placement matches the workload's own heat.

True hot pages are those hotter than the mean touched page, at most as many as the fast tier holds, hottest first. The
oracle's fast ratio is the share of accesses that the best static placement would serve from the fast tier.
"""

import numpy as np

from proto.arrays import Bytes, Mask, Words


def placement_by_heat(heat: Words, capacity: int) -> Bytes:
    """Preferred node per page (uint8[pages]): 0 for the ``capacity`` hottest, ties by page number, 1 for the others."""
    prefer = np.ones(heat.size, np.uint8)
    prefer[np.argsort(-heat, kind="stable")[: max(0, capacity)]] = 0
    return prefer


def score(heat: Words, fast: Mask, capacity: int) -> dict[str, float]:
    """Precision, recall, F1 of ``fast`` (bool[pages]) against the true hot set, and the oracle's fast ratio."""
    total = int(heat.sum())
    if total == 0 or capacity <= 0:
        return {}
    order = np.argsort(-heat, kind="stable")[:capacity]
    touched = heat > 0
    hot = np.zeros(heat.size, np.bool_)
    hot[order[heat[order] * int(touched.sum()) > total]] = True
    both = int((hot & fast).sum())
    precision = both / max(1, int(fast.sum()))
    recall = both / max(1, int(hot.sum()))
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "oracle_fast_ratio": int(heat[order].sum()) / total,
    }
