"""Masks, bool (H, W): random pairs, and edits such as a model's mistakes, `edit(rng, mask) -> mask`."""

import functools

import cv2
import numpy as np

from vesselrl.scoring.topology import topology


def random_pairs(number=12):
    """(prediction, truth): blobs of odd sizes and a noisy copy, in turn."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        shape = 2 * rng.integers(8, 40, size=2) + 1
        truth = cv2.GaussianBlur(rng.random(shape).astype(np.float32), (0, 0), 3) > 0.5
        noisy = truth ^ (rng.random(shape) < 0.05)
        yield (noisy, truth) if seed % 2 else (truth, noisy)


def morphed(operation, mask, size, shape=cv2.MORPH_ELLIPSE):
    kernel, border = cv2.getStructuringElement(shape, (size, size)), cv2.BORDER_CONSTANT
    return cv2.morphologyEx(mask.astype(np.uint8), operation, kernel, borderType=border, borderValue=0) > 0


fattened = functools.partial(morphed, cv2.MORPH_DILATE)


def skeleton(mask):
    return topology(mask).skeleton


def pick_on_centreline(rng, mask, how_many):
    points = np.argwhere(skeleton(mask))
    return points[rng.integers(len(points), size=how_many)] if len(points) else points


def window(mask, row, column, half):
    return np.s_[max(0, row - half) : row + half, max(0, column - half) : column + half]


def with_lines(mask, starts, ends, widths):
    canvas = mask.astype(np.uint8)
    for (y, x), (end_y, end_x), width in zip(starts, ends, widths, strict=True):
        cv2.line(canvas, (int(x), int(y)), (int(end_x), int(end_y)), 1, int(width))
    return canvas > 0


def shift(rng, mask):
    down, right = (int(step) for step in rng.integers(-3, 4, 2))
    return np.pad(mask, 3)[3 - down :, 3 - right :][: mask.shape[0], : mask.shape[1]]


def drop_component(rng, mask):
    num, labels = cv2.connectedComponents(mask.astype(np.uint8))
    return mask & (labels != rng.integers(1, num)) if num > 1 else mask


def keep_largest_component(rng, mask):
    num, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA]) if num > 1 else mask


def drop_block(rng, mask):
    mask, size = mask.copy(), mask.shape[0] // int(rng.choice([4, 8]))
    row, column = (rng.integers(0, side - size) for side in mask.shape)
    mask[row : row + size, column : column + size] = False
    return mask


def specks(rng, mask):
    mask, size = mask.copy(), int(rng.choice([1, 2, 3]))
    for _ in range(rng.choice([1, 3, 10, 30])):
        row, column = (rng.integers(0, side - size) for side in mask.shape)
        mask[row : row + size, column : column + size] = True
    return mask


def rough_edge(rng, mask):
    edge = fattened(mask, 3) ^ morphed(cv2.MORPH_ERODE, mask, 3)
    return mask ^ (edge & (rng.random(mask.shape) < rng.choice([0.1, 0.3])))


def breaks(rng, mask):
    mask = mask.copy()
    for row, column in pick_on_centreline(rng, mask, rng.choice([1, 3, 8])):
        mask[window(mask, row, column, int(rng.choice([2, 4, 7])))] = False
    return mask


def bridges(rng, mask):
    starts = pick_on_centreline(rng, mask, 3)
    points, ends = np.argwhere(skeleton(mask)), []
    for start in starts:
        distance = np.abs(points - start).sum(axis=1)
        near = points[(distance > 6) & (distance < 40)]
        ends.append(near[rng.integers(len(near))] if len(near) else start)
    return with_lines(mask, starts, ends, rng.integers(1, 4, len(ends)))


def spurs(rng, mask):
    starts = pick_on_centreline(rng, mask, rng.choice([1, 4, 10]))
    angle, length = rng.uniform(0, 2 * np.pi, len(starts)), rng.uniform(4, 25, len(starts))
    ends = starts + np.stack([length * np.sin(angle), length * np.cos(angle)], axis=1)
    return with_lines(mask, starts, ends, rng.integers(1, 3, len(starts)))


def parallel_twigs(rng, mask):
    centreline, result = skeleton(mask), mask.copy()
    for row, column in pick_on_centreline(rng, mask, rng.choice([1, 3])):
        twig = np.zeros_like(mask)
        twig[window(mask, row, column, 12)] = centreline[window(mask, row, column, 12)]
        result |= np.roll(twig, rng.integers(-8, 9, 2), axis=(0, 1))
    return result


def half_width_and_limit(rng, mask, shares):
    half_width = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    return half_width, np.quantile(half_width[skeleton(mask)], rng.choice(shares)) if mask.any() else 0


def drop_thin_vessels(rng, mask):
    half_width, limit = half_width_and_limit(rng, mask, [0.1, 0.25, 0.5])
    return mask & fattened(skeleton(mask) & (half_width > limit), 9)


def thicken_wide_vessels(rng, mask):
    half_width, limit = half_width_and_limit(rng, mask, [0.5, 0.8])
    wide = skeleton(mask) & (half_width >= limit)
    return mask | fattened(wide, rng.choice([9, 13])) if mask.any() else mask


def fill_loops(rng, mask):
    outside = np.pad(mask, 1).astype(np.uint8)
    cv2.floodFill(outside, None, (0, 0), 1)
    return mask | (outside[1:-1, 1:-1] == 0)


EDITS = {
    "dilate": lambda rng, mask: fattened(mask, rng.choice([3, 5, 7])),
    "erode": lambda rng, mask: morphed(cv2.MORPH_ERODE, mask, 3),
    "opened": lambda rng, mask: morphed(cv2.MORPH_OPEN, mask, rng.choice([3, 5])),
    "closed": lambda rng, mask: morphed(cv2.MORPH_CLOSE, mask, rng.choice([5, 9, 15])),
    **{edit.__name__: edit for edit in (
        shift, drop_component, keep_largest_component, drop_block, specks, rough_edge, breaks, bridges, spurs,
        parallel_twigs, drop_thin_vessels, thicken_wide_vessels, fill_loops,
    )},
    "centreline": lambda rng, mask: skeleton(mask),
    "fat_centreline": lambda rng, mask: fattened(skeleton(mask), rng.choice([3, 5, 7])),
}  # fmt: skip


def edited(rng, mask, num):
    for name in rng.choice(np.array([*EDITS], object), num):
        mask = np.ascontiguousarray(EDITS[name](rng, mask))
    return mask


def edited_masks(truth, num, seed):
    """The truth, the extremes, the centreline, then chains of one to four random edits of the truth."""
    rng = np.random.default_rng(seed)
    dilated = [morphed(cv2.MORPH_DILATE, truth, size, cv2.MORPH_RECT) for size in (3, 7)]
    masks = [truth, np.zeros_like(truth), np.ones_like(truth), *dilated, skeleton(truth)]
    return masks + [edited(rng, truth, rng.integers(1, 5)) for _ in range(num - len(masks))]
