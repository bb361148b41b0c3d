"""Deals groups of samples, such as patients, to the sides of a split, by size and by foreground share."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

NUM_SHUFFLES = 200
# For more equal foreground, sizes of the sides may be this much worse than the best (share of all samples).
SIZE_TOLERANCE = 0.02

Sides = dict[str, list[str]]


@dataclass(frozen=True)
class Group:
    """Samples that stay together."""

    size: int
    # Sum of the samples' foreground shares; None: the shares do not count.
    foreground: float | None = None


def deal(groups: Mapping[str, Group], seed: int, ratios: Sequence[float]) -> Sides:
    """Names of the groups for train, val and test.

    Args:
        groups: at least three, by name, in an order that does not depend on chance.
        seed: seed of the shuffle.
        ratios: shares of train, val and test, with the sum 1.
    """
    total = sum(group.size for group in groups.values())
    targets = {"test": ratios[2] * total, "val": ratios[1] * total, "train": ratios[0] * total}
    return _best(groups, seed, targets, lambda order: _take_turns(order, groups, targets))


def deal_fold(
    groups: Mapping[str, Group], seed: int, ratios: Sequence[float], fold: tuple[int, int]
) -> Sides:
    """Names of the groups for train, val and test, where test is fold i of k, and `fold` is (i, k).

    The folds depend on the groups, the seed and k alone, so each group is in the test side of exactly one.
    """
    total = sum(group.size for group in groups.values())
    even = {str(number): total / fold[1] for number in range(1, fold[1] + 1)}
    test = _best(groups, seed, even, lambda order: _deal_evenly(order, groups, even))[str(fold[0])]
    rest = {name: group for name, group in groups.items() if name not in test}
    left = sum(group.size for group in rest.values())
    val = ratios[1] / (ratios[0] + ratios[1]) * left
    targets = {"val": val, "train": left - val}
    return {"test": test} | _best(rest, seed, targets, lambda order: _take_turns(order, rest, targets))


def _best(
    groups: Mapping[str, Group], seed: int, targets: Mapping[str, float], divide: Callable[[list[str]], Sides]
) -> Sides:
    """The division of the first shuffle, or of the shuffle that makes foreground shares most equal."""
    generator = random.Random(seed)
    order = list(groups)
    stratified = all(group.foreground is not None for group in groups.values())
    candidates = []
    for _ in range(NUM_SHUFFLES if stratified else 1):
        generator.shuffle(order)
        candidates.append(divide(list(order)))
    if not stratified:
        return candidates[0]
    total = sum(group.size for group in groups.values())
    size_gaps = [_size_gap(sides, groups, targets) for sides in candidates]
    limit = min(size_gaps) + SIZE_TOLERANCE * total
    fit = [sides for sides, gap in zip(candidates, size_gaps, strict=True) if gap <= limit]
    return min(fit, key=lambda sides: _foreground_gap(sides, groups))


def _size_gap(sides: Sides, groups: Mapping[str, Group], targets: Mapping[str, float]) -> float:
    """The largest difference between the samples of a side and its target."""
    return max(abs(sum(groups[name].size for name in sides[side]) - targets[side]) for side in targets)


def _foreground_gap(sides: Sides, groups: Mapping[str, Group]) -> float:
    """The largest difference between the mean foreground share of a side and that of all samples."""

    def mean(names: Sequence[str]) -> float:
        return sum(groups[name].foreground for name in names) / sum(groups[name].size for name in names)

    overall = mean(list(groups))
    return max(abs(mean(names) - overall) for names in sides.values())


def _take_turns(order: list[str], groups: Mapping[str, Group], targets: Mapping[str, float]) -> Sides:
    """Each side but the last takes what brings it nearest to its target; the last gets the others."""
    *first, last = targets
    sides: Sides = {}
    for side in first:
        sides[side] = _choose(order, groups, targets[side])
        chosen = set(sides[side])
        order = [name for name in order if name not in chosen]
    sides[last] = order
    _fill_empty_sides(sides, groups)
    return sides


def _choose(order: Sequence[str], groups: Mapping[str, Group], target: float) -> list[str]:
    """Groups with about `target` samples, so that no one more and no one less would come nearer."""
    chosen: dict[str, None] = {}
    total, improved = 0, True
    while improved:
        improved = False
        for name in order:
            new_total = total + groups[name].size * (-1 if name in chosen else 1)
            if abs(new_total - target) < abs(total - target):
                if name in chosen:
                    del chosen[name]
                else:
                    chosen[name] = None
                total, improved = new_total, True
    return list(chosen)


def _fill_empty_sides(sides: Sides, groups: Mapping[str, Group]) -> None:
    """Moves the smallest group of the side with most groups to each side without any."""
    for side in reversed(sides):
        if not sides[side]:
            giver = max(sides.values(), key=len)
            smallest = min(giver, key=lambda name: groups[name].size)
            giver.remove(smallest)
            sides[side].append(smallest)


def _deal_evenly(order: list[str], groups: Mapping[str, Group], targets: Mapping[str, float]) -> Sides:
    """Each group goes to the side with fewest samples, the largest group first."""
    sides: Sides = {side: [] for side in targets}
    sizes = dict.fromkeys(targets, 0)
    if groups[order[0]].foreground is None:  # else different orders are wanted, to choose from
        order = sorted(order, key=lambda name: -groups[name].size)
    for name in order:
        # Two groups at least stay outside each side: what is left needs two sides of its own.
        open_sides = [side for side in sizes if len(sides[side]) < len(order) - 2]
        side = min(open_sides, key=sizes.__getitem__)
        sides[side].append(name)
        sizes[side] += groups[name].size
    return sides
