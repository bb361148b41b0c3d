"""The shortest paths that join the components of a mask, as few as join all that can be joined.

Plain loops that numba compiles as they stand (`kernels.spanning_paths`); without numba they run as Python.
"""

import numpy as np


def spanning_paths(ways, labels, steps, num_components):
    """Marks a spanning forest of the components over the pixels that a path may use.

    Each way pixel is claimed by the component that is the fewest steps away. Where two claims meet there is a
    path between the two components; from the shortest on, those are taken that join what no other has joined
    (Kruskal, 1956; that meetings of claims suffice for shortest paths between all: Mehlhorn, 1988).

    Args:
        ways: int32 (N,), flat positions of the pixels that a path may use, in reading order.
        labels: int32, flat with a border of 0: components 1 to `num_components`, 0 elsewhere.
        steps: int32 (8,), to the neighbours of a flat position.
        num_components: of the mask.

    Returns:
        bool (N,): which of the way pixels lie on a path that was taken.
    """
    number = np.zeros(len(labels), np.int32)  # of a way pixel, counted from 1
    for i in range(len(ways)):
        number[ways[i]] = i + 1
    owner = np.zeros(len(ways), np.int32)
    distance = np.zeros(len(ways), np.int32)
    before = np.full(len(ways), -1, np.int32)
    queue = np.empty(len(ways), np.int32)
    # Where claims meet: a way pixel, the other one (or -c where it is component c itself), the path's length.
    one = np.empty(16 * len(ways), np.int32)
    other = np.empty(16 * len(ways), np.int32)
    length = np.empty(16 * len(ways), np.int32)
    num_queued, num_meetings = 0, 0
    for i in range(len(ways)):
        for step in steps:
            component = labels[ways[i] + step]
            if component == 0:
                continue
            if owner[i] == 0:
                owner[i], distance[i] = component, 1
                queue[num_queued] = i
                num_queued += 1
            elif component != owner[i]:
                one[num_meetings], other[num_meetings], length[num_meetings] = i, -component, 1
                num_meetings += 1
    done = 0
    while done < num_queued:
        i = queue[done]
        done += 1
        for step in steps:
            j = number[ways[i] + step] - 1
            if j < 0:
                continue
            if owner[j] == 0:
                owner[j], distance[j], before[j] = owner[i], distance[i] + 1, i
                queue[num_queued] = j
                num_queued += 1
            elif owner[j] != owner[i]:
                one[num_meetings], other[num_meetings] = i, j
                length[num_meetings] = distance[i] + distance[j]
                num_meetings += 1
    joined = np.arange(num_components + 1)
    taken = np.zeros(len(ways), np.bool_)
    for m in np.argsort(length[:num_meetings], kind="mergesort"):
        i, j = one[m], other[m]
        first, second = owner[i], owner[j] if j >= 0 else -j
        while joined[first] != first:
            first = joined[first]
        while joined[second] != second:
            second = joined[second]
        if first == second:
            continue
        joined[first] = second
        for end in (i, j):
            while end >= 0:
                taken[end] = True
                end = before[end]
    return taken
