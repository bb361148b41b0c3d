"""Geometry of a synthetic coronary tree: grow it, project it to a view, let it beat.

Lengths are in px of a 256-px image, angles in radians; x runs to the right, y down and z to the viewer. A
tree is grown flat, laid on the dome of the heart and turned, so that another view lets other vessels cross.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

CANVAS_PX = 256.0
STEP_PX = 2.0  # distance between two points of a centreline

Range = tuple[float, float]
Rng = np.random.Generator


@dataclass(frozen=True)
class Vessel:
    """One unbranched vessel: centreline (N, 3) of x, y, z, its radius and distance from the ostium (N,)."""

    points: np.ndarray
    radius: np.ndarray
    path: np.ndarray
    parent_radius: float = 0.0


class _Course(NamedTuple):
    heading: float
    length: float
    turn: float
    radius: Range  # at the first and the last point
    tortuosity: float


def grow_tree(
    rng: Rng, width_px: Range, branching: float = 1.0, tortuosity: float = 1.0, loops: float = 0.5
) -> list[Vessel]:
    """Grows one patient's tree, flat, root first; for the arguments see `Domain`."""
    thin, root = width_px[0] / 2, width_px[1] / 2 * rng.uniform(0.85, 1.0)
    tortuosity = tortuosity * rng.uniform(0.5, 1.7)
    template = _left_artery if rng.random() < 0.6 else _right_artery
    mains = template(rng, root, thin, tortuosity)
    tree = list(mains)
    for main in mains:
        sides = _side_branches(rng, main, thin, 52 / branching, tortuosity)
        tree += sides
        for side in sides:
            tree += _side_branches(rng, side, thin, 62 / branching, tortuosity)
    for _ in range(rng.poisson(loops)):
        tree += _collateral(rng, tree, thin)
    return tree


def _left_artery(rng: Rng, root: float, thin: float, tortuosity: float) -> list[Vessel]:
    """Left main stem, anterior descending, circumflex and now and then a ramus between them."""
    wide = root * 0.92
    trunk = _Course(rng.uniform(-0.35, 0.2), rng.uniform(30, 60), 0.0, (root, wide), 0.3)
    stem = _grow_vessel(rng, np.array([10.0, 60.0]), trunk)

    def course(heading: Range, length: Range, turn: Range, width: float, winding: float) -> _Course:
        drawn = rng.uniform(*heading), rng.uniform(*length), rng.uniform(*turn)
        return _Course(*drawn, (wide * width, thin * 1.15), winding * tortuosity)

    courses = [
        course((-0.35, 0.1), (190, 260), (0.9, 1.6), 0.85, 0.6),
        course((0.9, 1.4), (150, 220), (-0.4, 0.7), 0.8, 0.8),
    ]
    if rng.random() < 0.35:
        courses.append(course((0.3, 0.6), (90, 160), (0.0, 0.6), 0.55, 0.8))
    return [stem, *(_grow_vessel(rng, stem.points[-1, :2], one, stem, -1) for one in courses)]


def _right_artery(rng: Rng, root: float, thin: float, tortuosity: float) -> list[Vessel]:
    """Right coronary artery: to the left, down, and back to the right, with two terminal branches."""
    heading, turn = np.pi + rng.uniform(-0.1, 0.6), -rng.uniform(2.7, 3.7)
    whole = _Course(heading, rng.uniform(270, 340), turn, (root, root * 0.55), 0.5 * tortuosity)
    trunk = _grow_vessel(rng, np.array([130.0, 40.0]), whole)
    end, heading = trunk.points[-1, :2], _heading(trunk, -1)
    upper = heading - rng.uniform(0.1, 0.6), rng.uniform(50, 110), rng.uniform(-0.3, 0.8)
    lower = heading + rng.uniform(0.2, 0.8), rng.uniform(50, 100), rng.uniform(-0.8, 0.2)
    courses = [_Course(*one, (root * 0.45, thin), 0.9) for one in (upper, lower)]
    return [trunk, *(_grow_vessel(rng, end, one, trunk, -1) for one in courses)]


def _grow_vessel(
    rng: Rng, start: np.ndarray, course: _Course, parent: Vessel | None = None, at: int = 0
) -> Vessel:
    """A steady turn plus windings that grow towards the end; an uneven wall; one in six has a stenosis."""
    num = max(4, int(course.length / STEP_PX))
    part = np.linspace(0, 1, num)
    along = part * course.length
    first, last = course.radius
    windings = np.zeros(num)
    for amount, wavelengths in ((0.35, (60, 110)), (0.40, (28, 55)), (0.32, (15, 28))):
        wavelength = rng.uniform(*wavelengths)
        amount = rng.normal(0, amount) * min(1.0, wavelength / (10 * first))  # wide vessels wind less
        windings += amount * np.sin(2 * np.pi * along / wavelength + rng.uniform(0, 2 * np.pi))
    heading = course.heading + course.turn * part**1.1 + course.tortuosity * (0.25 + 0.95 * part) * windings
    steps = STEP_PX * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    flat = start + np.cumsum(steps, axis=0) - steps[0]
    radius = last + (first - last) * (1 - part) ** 0.9
    radius = radius * (1 + 0.05 * np.sin(along / rng.uniform(5, 12) + rng.uniform(0, 6)))
    if rng.random() < 1 / 6:
        from_stenosis = along - rng.uniform(0.1, 0.8) * along[-1]
        radius = radius * (1 - rng.uniform(0.2, 0.45) * np.exp(-((from_stenosis / 5) ** 2)))
    depth = 0.35 * course.length * rng.normal() * part**2
    radius = np.maximum(radius, min(first, last))
    if parent is None:
        return Vessel(np.column_stack([flat, depth]), radius, along)
    points = np.column_stack([flat, depth + parent.points[at, 2]])
    return Vessel(points, radius, along + parent.path[at], float(parent.radius[at]))


def _heading(vessel: Vessel, at: int) -> float:
    at = at % len(vessel.points)
    low, high = max(at - 2, 0), min(at + 2, len(vessel.points) - 1)
    delta = vessel.points[high, :2] - vessel.points[low, :2]
    return float(np.arctan2(delta[1], delta[0]))


def _side_branches(rng: Rng, parent: Vessel, thin: float, spacing: float, tortuosity: float) -> list[Vessel]:
    """Branches about every `spacing` px, on changing sides; none where the parent is as thin as a twig."""
    branches: list[Vessel] = []
    side = rng.choice([-1, 1])
    position = spacing * rng.uniform(0.35, 0.9)
    while position < parent.path[-1] - parent.path[0] - 6:
        at = int(position / STEP_PX)
        radius = parent.radius[at] * rng.uniform(0.45, 0.75)
        if parent.radius[at] > thin * 1.15:
            radius = max(radius, thin)
            angle = side * rng.uniform(0.5, 1.15)
            length = np.clip(rng.uniform(12, 45) * radius + rng.uniform(10, 40), 22, 150)
            turn = -0.75 * angle * rng.uniform(0, 1.2)  # back to the course of the parent
            course = _Course(_heading(parent, at) + angle, length, turn, (radius, thin), tortuosity)
            branches.append(_grow_vessel(rng, parent.points[at, :2], course, parent, at))
        side = -side if rng.random() < 0.7 else side
        position += spacing * rng.uniform(0.6, 1.5)
    return branches


def _collateral(rng: Rng, tree: list[Vessel], thin: float) -> list[Vessel]:
    """A thin winding vessel from the far part of one vessel to another near by; none if nothing is near."""
    if len(tree) < 4:
        return []
    source = tree[int(rng.integers(1, len(tree)))]
    at = int(rng.uniform(0.6, 0.95) * (len(source.points) - 1))
    start = source.points[at]
    others = np.concatenate([vessel.points for vessel in tree if vessel is not source])
    distance = np.linalg.norm(others[:, :2] - start[:2], axis=1)
    near = np.flatnonzero((distance > 25) & (distance < 70))
    if near.size == 0:
        return []
    end = others[rng.choice(near)]
    num = max(8, int(1.2 * np.linalg.norm(end[:2] - start[:2]) / STEP_PX))
    part = np.linspace(0, 1, num)[:, None]
    normal = np.array([start[1] - end[1], end[0] - start[0], 0.0])
    bow = rng.uniform(-0.35, 0.35) * np.sin(np.pi * part)
    bow = bow + rng.uniform(-0.06, 0.06) * np.sin(4 * np.pi * part)
    points = start + (end - start) * part + normal * bow
    steps = np.linalg.norm(np.diff(points[:, :2], axis=0), axis=1)
    path = source.path[at] + np.concatenate([[0.0], np.cumsum(steps)])
    return [Vessel(points, np.full(num, thin), path, float(source.radius[at]))]


def project(rng: Rng, tree: list[Vessel], *, mirror: bool) -> list[Vessel]:
    """Draws the view of one sequence and shows the tree in it, fitted into the 256-px frame."""
    yaw, pitch, roll = rng.uniform(-0.6, 0.6), rng.uniform(-0.4, 0.4), rng.uniform(-0.3, 0.3)
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(angle), np.sin(angle)) for angle in (yaw, pitch, roll))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    rotation = about_z @ about_x @ about_y
    fill, offset = rng.uniform(0.85, 1.12), np.array([rng.uniform(-16, 16), rng.uniform(-14, 14)])
    flat = np.concatenate([vessel.points for vessel in tree])
    centre = (flat.min(axis=0) + flat.max(axis=0)) / 2
    turned = []
    for vessel in tree:
        local = vessel.points - centre
        local[:, 2] += 70 * (1 - (local[:, 0] ** 2 + local[:, 1] ** 2) / 130**2)  # the dome of the heart
        turned.append(local @ rotation.T * ((-1, 1, 1) if mirror else 1))
    low, high = np.percentile(np.concatenate(turned)[:, :2], [1, 99], axis=0)
    scale = float(np.clip(fill * CANVAS_PX / (high - low).max(), 0.75, 1.3))
    shift = np.append(CANVAS_PX / 2 - scale * (low + high) / 2 + offset, 0.0)
    return [replace(vessel, points=own * scale + shift) for vessel, own in zip(tree, turned, strict=True)]


def beat(tree: list[Vessel], phase: float, amount_px: float) -> list[Vessel]:
    """Moves a projected tree as the heart does: it contracts, twists and ripples; the ostium stays.

    `phase` is the position in the heart cycle, 0 moves nothing; `amount_px` is the displacement 128 px away.
    """
    pull, twist = amount_px / 128 * np.sin(phase), 0.5 * amount_px / 128 * np.sin(2 * phase)
    ripple = 0.35 * amount_px * np.sin(phase)
    ostium = tree[0].points[0, :2]

    def shift(flat: np.ndarray) -> np.ndarray:
        x, y = (flat - ostium).T
        right = -pull * x - twist * y + ripple * np.sin(flat[:, 1] / 37 + phase)
        down = -0.8 * pull * y + twist * x + ripple * np.cos(flat[:, 0] / 43 + phase)
        return np.column_stack([right, down, np.zeros(len(flat))])

    held = shift(ostium[None])
    return [replace(vessel, points=vessel.points + shift(vessel.points[:, :2]) - held) for vessel in tree]
