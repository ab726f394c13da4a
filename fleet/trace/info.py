"""What a trace looks like to a memory tier: footprint, mix, popularity of pages, reuse, regions.

The share of references that a fast tier of some size could serve is given twice: with the most used pages in it for
the whole trace (static, by count), and with LRU over pages (from reuse distances, first uses counted as not served).
A reference across a page boundary counts once for each page.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet.trace.reuse import FIRST_USE, reuse_distances
from proto.trace import LOAD, MODIFY, STORE, Trace, page_span, regions, touched_pages
from proto.units import PAGE_SHIFT, PAGE_SIZE

REGION_GAP_PAGES = (1 << 20) >> PAGE_SHIFT
"""Regions are apart by holes of more than 1 MiB."""
_TIER_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
# Where Valgrind puts things on amd64 (coregrind/m_aspacemgr): client stack below 0x1fff001000, mappings from
# 0x4000000 up, non-PIE and PIE programs and their brk heap below. Linux: PIE and heap at 0x55..., mappings and stack
# from 0x7f... (arch/x86/mm/mmap.c, ELF_ET_DYN_BASE).
_AREAS = (
    (0x0000_0000_0000, "program"),
    (0x0000_0400_0000, "mmap"),
    (0x001F_F000_0000, "stack"),
    (0x0020_0000_0000, "mmap"),
    (0x5500_0000_0000, "program"),
    (0x5700_0000_0000, "mmap"),
    (0x7FF0_0000_0000, "stack"),
    (0x8000_0000_0000, "mmap"),
)

Pages = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Region:
    """Pages that lie together."""

    name: str
    """Guessed from the address: program (with its heap), mmap, or stack."""
    first_page: int
    span_pages: int
    """Holes included."""
    touched_pages: int
    references: int

    @property
    def start(self) -> int:
        """First byte address."""
        return self.first_page << PAGE_SHIFT

    @property
    def end(self) -> int:
        """Byte address behind the last."""
        return (self.first_page + self.span_pages) << PAGE_SHIFT


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """The figures of `describe`."""

    path: str
    trace: Trace
    pages: Pages
    counts: npt.NDArray[np.int64]
    """int64[pages]: references of each page."""
    distances: npt.NDArray[np.int64]
    """int64[page references]: reuse distance of each, in pages (`reuse_distances`)."""
    regions: tuple[Region, ...]

    def summary(self) -> dict[str, Any]:
        """As JSON: units are in the names, shares are of 1."""
        trace, meta = self.trace, self.trace.meta
        references = len(trace.address)
        mix = np.bincount(trace.kind, minlength=3)
        popular = np.sort(self.counts)[::-1].cumsum()
        reuses = self.distances[self.distances != FIRST_USE]
        tiers = []
        for share in _TIER_SHARES:
            pages = max(round(share * len(self.pages)), 1)
            static = float(popular[pages - 1] / popular[-1])
            lru = float(np.count_nonzero(reuses < pages) / len(self.distances))
            tiers.append({"footprint_share": share, "pages": pages, "static": static, "lru": lru})
        quantiles = np.quantile(reuses, (0.5, 0.9, 0.99), method="lower").tolist() if len(reuses) else [0, 0, 0]
        edges = np.concatenate(([0], 1 << np.arange(int(reuses.max(initial=0)).bit_length() + 1)))
        histogram = np.histogram(reuses, edges)[0]
        return {
            "trace": self.path,
            "source": meta.source,
            "source_format": meta.source_format,
            "references": references,
            "footprint": {"pages": len(self.pages), "bytes": len(self.pages) * PAGE_SIZE},
            "mix": {name: int(mix[kind]) for name, kind in (("loads", LOAD), ("stores", STORE), ("modifies", MODIFY))},
            "bytes_accessed": int(trace.size.sum(dtype=np.int64)),
            "page_crossing_references": len(self.distances) - references,
            "compute": {
                "unit": meta.compute_unit,
                "per_reference": float(trace.compute.sum(dtype=np.int64)) / references,
                "dropped_per_reference": meta.dropped_per_reference,
            },
            "popularity": {
                "references_per_page_mean": float(self.counts.mean()),
                "references_per_page_median": float(np.median(self.counts)),
                "pages_used_once": int(np.count_nonzero(self.counts == 1)),
            },
            "reuse": {
                "first_use_share": len(self.pages) / len(self.distances),
                "distance_pages": dict(zip(("p50", "p90", "p99"), map(int, quantiles), strict=True)),
                "distance_histogram": [
                    {"below_pages": int(edge), "reuses": int(count)}
                    for edge, count in zip(edges[1:], histogram, strict=True)
                ],
            },
            "served_by_fast_tier": tiers,
            "regions": [
                {
                    "name": region.name,
                    "start": f"{region.start:#x}",
                    "end": f"{region.end:#x}",
                    "span_pages": region.span_pages,
                    "touched_pages": region.touched_pages,
                    "references": region.references,
                }
                for region in self.regions
            ],
            "recording": {
                "lines": meta.lines,
                "instructions": meta.instructions,
                "skipped": meta.skipped,
                "filtered": meta.filtered,
                "garbage": meta.garbage,
                "garbage_lines": list(meta.garbage_lines),
            },
        }


def page_references(trace: Trace) -> tuple[Pages, npt.NDArray[np.int64]]:
    """Page number and reference number of every page that every reference touches, in order: uint64[m], int64[m]."""
    first, last = page_span(trace)
    count = (last - first).astype(np.int64) + 1
    if count.max() == 1:
        return first, np.arange(len(first))
    reference = np.repeat(np.arange(len(first)), count)
    place = np.arange(len(reference)) - np.repeat(np.cumsum(count) - count, count)
    return first[reference] + place.astype(np.uint64), reference


def describe(trace: Trace, path: str = "") -> TraceInfo:
    """Everything that `fleet trace info` says about a trace."""
    used, _ = page_references(trace)
    pages = touched_pages(trace)
    counts = np.bincount(np.searchsorted(pages, used), minlength=len(pages))
    return TraceInfo(path, trace, pages, counts, reuse_distances(used), tuple(_regions(pages, counts)))


def _regions(pages: Pages, counts: npt.NDArray[np.int64]) -> list[Region]:
    areas = regions(pages, REGION_GAP_PAGES)
    names = [_name(start << PAGE_SHIFT) for start, _ in areas]
    found = []
    for index, (start, span) in enumerate(areas):
        low, high = np.searchsorted(pages, np.array([start, start + span], np.uint64))
        number = f"-{names[:index].count(names[index]) + 1}" if names.count(names[index]) > 1 else ""
        found.append(Region(names[index] + number, start, span, int(high - low), int(counts[low:high].sum())))
    return found


def _name(address: int) -> str:
    return next(name for start, name in reversed(_AREAS) if address >= start)
