"""A metric: a path into ``summary.json``, such as ``elapsed.virtual_s`` or ``sum(vms[*].flushes.total)``.

``[*]`` (or no index) goes over a whole list and ``[2]`` picks one; what a list gives is the mean, unless the path
stands in ``sum()``, ``min()`` or ``max()``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from fleet.errors import FleetError
from fleet.names import unknown

_FUNCTIONS: dict[str, Callable[[list[float]], float]] = {"sum": sum, "min": min, "max": max, "mean": fmean}
_CALL = re.compile(r"\s*(?:(\w+)\(([^()]*)\)|([^()]*))\s*")
_PART = re.compile(r"([A-Za-z0-9_\-]+)(?:\[(\*|[0-9]{1,6})\])?")


class MetricError(FleetError):
    """A metric does not exist in this summary, or is no number."""


def value(summary: Mapping[str, Any], metric: str) -> float:
    """The metric's value. Raises MetricError, which names the nearest key that exists."""
    call = _CALL.fullmatch(metric)
    if call is None:
        raise MetricError(f"metric {metric!r}: write a path such as elapsed.virtual_s, or sum(vms[*].flushes.total)")
    name, path = call[1] or "mean", call[2] or call[3] or ""
    if name not in _FUNCTIONS:
        raise MetricError(f"metric {metric!r}: " + unknown("function", name, _FUNCTIONS))
    found = _numbers(summary, path.strip(), metric)
    return float(_FUNCTIONS[name](found))


def _numbers(summary: Mapping[str, Any], path: str, metric: str) -> list[float]:
    nodes: list[Any] = [summary]
    walked = ""
    for text in path.split("."):
        part = _PART.fullmatch(text)
        if part is None:
            raise MetricError(f"metric {metric!r}: {text!r} is no key; write e.g. vms[*].throughput_mops")
        nodes = [_child(node, part[1], walked, metric) for node in nodes]
        walked += ("." if walked else "") + text
        if all(isinstance(node, list) for node in nodes):
            nodes = [child for node in nodes for child in _chosen(node, part[2], walked, metric)]
        elif part[2] is not None:
            raise MetricError(f"metric {metric!r}: {walked!r} is no list")
    for node in nodes:
        if isinstance(node, Mapping):
            raise MetricError(f"metric {metric!r}: {walked!r} is a table; go on with one of {', '.join(sorted(node))}")
        if isinstance(node, bool) or not isinstance(node, int | float):
            raise MetricError(f"metric {metric!r}: {walked!r} is no number")
    if not nodes:
        raise MetricError(f"metric {metric!r}: {walked!r} is empty")
    return [float(node) for node in nodes]


def _child(node: Any, key: str, walked: str, metric: str) -> Any:
    if not isinstance(node, Mapping):
        raise MetricError(f"metric {metric!r}: {walked!r} has no parts")
    if key not in node:
        raise MetricError(f"metric {metric!r}: " + unknown(f"key in {walked or 'the summary'}:", key, node))
    return node[key]


def _chosen(node: Sequence[Any], index: str | None, walked: str, metric: str) -> Sequence[Any]:
    if index in (None, "*"):
        return node
    if int(str(index)) >= len(node):
        raise MetricError(f"metric {metric!r}: {walked!r}: there are only {len(node)}")
    return [node[int(str(index))]]
