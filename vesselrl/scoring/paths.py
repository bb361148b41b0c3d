"""The shortest paths that join the components of a mask, as few as join all that can be joined.

Each pixel that a path may use is claimed by the component that is the fewest steps away. Where two claims
meet there is a path between the two components; from the shortest on, those are taken that join what no other
has joined (Kruskal 1956; that such meetings suffice for shortest paths between all: Mehlhorn 1988).

Plain loops that numba compiles as they stand (see `kernels.py`); without numba they run as Python.
"""

import numpy as np


def claim_ways(ways, labels, steps):
    """Claims the way pixels, and finds where claims meet.

    Args:
        ways: int32 (N,), flat positions of the pixels that a path may use, in reading order.
        labels: int32, flat with a border of 0: components from 1 on, 0 elsewhere.
        steps: int32 (8,), to the neighbours of a flat position.

    Returns:
        owner: int32 (N,), the component that claims a way pixel; 0: it can be reached from none.
        before: int32 (N,), the way pixel through which it was reached; -1: from the component itself.
        one, other, length: int32 (M,), two way pixels where claims meet and the pixels of the path through
            them; instead of the second, -c where component c itself is met.
    """
    number = np.zeros(len(labels), np.int32)
    number[ways] = np.arange(1, len(ways) + 1)
    owner, distance = np.zeros(len(ways), np.int32), np.zeros(len(ways), np.int32)
    before = np.full(len(ways), -1, np.int32)
    queue, num_queued = np.empty(len(ways), np.int32), 0
    room = 16 * len(ways)
    one, other, length = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int32)
    met = 0
    for i in range(len(ways)):
        for step in steps:
            component = labels[ways[i] + step]
            if component != 0 and owner[i] == 0:
                owner[i], distance[i] = component, 1
                queue[num_queued] = i
                num_queued += 1
            elif component != 0 and owner[i] != component:
                one[met], other[met], length[met] = i, -component, 1
                met += 1
    done = 0
    while done < num_queued:
        i = queue[done]
        done += 1
        for step in steps:
            j = number[ways[i] + step] - 1
            if j >= 0 and owner[j] == 0:
                owner[j], distance[j], before[j] = owner[i], distance[i] + 1, i
                queue[num_queued] = j
                num_queued += 1
            elif j >= 0 and owner[j] != owner[i]:
                one[met], other[met], length[met] = i, j, distance[i] + distance[j]
                met += 1
    return owner, before, one[:met], other[:met], length[:met]


def spanning_paths(owner, before, one, other, length, num_components):
    """Which way pixels lie on the shortest paths that join all components that can be joined; bool (N,).

    Args:
        owner: these and the next four are what `claim_ways` gave.
        before: likewise.
        one: likewise.
        other: likewise.
        length: likewise.
        num_components: of the mask.
    """
    group = np.arange(num_components + 1)
    taken = np.zeros(len(owner), np.bool_)
    for meeting in np.argsort(length, kind="mergesort"):
        i, j = one[meeting], other[meeting]
        first, second = group[owner[i]], group[owner[j] if j >= 0 else -j]
        if first == second:
            continue
        group[group == second] = first
        for end in (i, j):
            while end >= 0:
                taken[end] = True
                end = before[end]
    return taken
