"""Reuse distance of pages: how many distinct other pages are used between two uses of a page (Mattson et al. 1970).

An LRU memory of c pages serves exactly the uses with a distance below c. Computed exactly, by counting the pages whose
last use lies in between in a Fenwick tree (Bennett and Kruskal 1975), in O(n log n). Left out: sampling (SHARDS).
"""

import numpy as np
import numpy.typing as npt
from numba import njit

FIRST_USE = -1


def reuse_distances(pages: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Distance of each use, FIRST_USE where there is none before: int64[n].

    `pages`: uint64[n], page numbers in the order of use.
    """
    if not len(pages):
        return np.zeros(0, np.int64)
    # Runs of one page have distance 0 and would only lengthen the tree.
    starts = np.concatenate(([True], pages[1:] != pages[:-1]))
    heads = pages[starts]
    order = np.argsort(heads, kind="stable")
    again = heads[order[1:]] == heads[order[:-1]]
    previous = np.full(len(heads), -1, np.int64)
    previous[order[1:][again]] = order[:-1][again]
    distances = np.zeros(len(pages), np.int64)
    distances[starts] = _distances(previous)
    return distances


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _distances(previous: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`previous`: int64[n], index of the use before of the same page, -1 = none."""
    n = len(previous)
    tree = np.zeros(n + 1, np.int32)  # over uses: 1 at the last use so far of each page
    distances = np.empty(n, np.int64)
    marked = 0
    for use in range(n):
        last = previous[use]
        if last < 0:
            distances[use] = FIRST_USE
            marked += 1
        else:
            up_to = 0
            node = last + 1
            while node:
                up_to += tree[node]
                node &= node - 1
            distances[use] = marked - up_to
            node = last + 1
            while node <= n:
                tree[node] -= 1
                node += node & -node
        node = use + 1
        while node <= n:
            tree[node] += 1
            node += node & -node
    return distances
