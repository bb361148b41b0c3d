"""Augmentation: image and mask stay together, and the same numbers give the same image."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from scipy import ndimage

from vesselrl.data.augment import AUGMENTATIONS, Augmentation, _source_places, augment, get_augmentation
from vesselrl.synthetic.dataset import SOURCE, draw_sequence

AMOUNTS = dict(
    flips=True, quarter_turns=True, rotation_deg=45, scale=1.5, elastic_px=12, gamma=2, contrast=2, blur_px=2,
    noise=0.1,
)  # fmt: skip
ALONE = {name: Augmentation(**{name: amount}) for name, amount in AMOUNTS.items()}
STRONG = AUGMENTATIONS["strong"]
PLANS = ALONE | {name: AUGMENTATIONS[name] for name in ("light", "strong")}


@pytest.fixture(scope="module")
def drawn():
    """An angiogram of 256 × 200 px and the mask of its vessels."""
    ((image, mask),) = draw_sequence(SOURCE, patient=3, sequence=1, num_frames=1, size=256, seed=1)
    return np.ascontiguousarray(image[:, 20:220]), np.ascontiguousarray(mask[:, 20:220])


def overlap(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def found(image):
    """The bright part of an image that has a dark and a bright part: cut midway between the two."""
    grey = image[:, :, 0]
    bright = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1] > 0
    return grey > (np.median(grey[bright]) + np.median(grey[~bright])) / 2


def as_image(mask):
    return np.repeat(np.where(mask, 230, 0).astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("name", PLANS)
def test_image_and_mask_stay_aligned(drawn, name):
    """The image is drawn from the mask, so what is bright in it must be the mask again."""
    _, mask = drawn
    plan, changed = PLANS[name], 0
    for seed in range(15):
        image, moved = augment(as_image(mask), mask, plan, seed, epoch=1, index=seed)
        assert (moved.dtype, moved.shape) == (bool, image.shape[:2])
        assert overlap(found(image), moved) > (0.99 if name in ALONE else 0.93)  # gamma widens soft edges
        changed += image.shape[:2] != mask.shape or (image != as_image(mask)).any()
    assert changed >= 15 / 2


def test_the_same_numbers_give_the_same_image(drawn):
    places = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1, 2) for index in (0, 1, 7)]
    first = {place: augment(*drawn, STRONG, *place) for place in places}
    for place in reversed(places):
        again = augment(*drawn, STRONG, *place)
        assert all((a == b).all() for a, b in zip(first[place], again, strict=True))
    assert len({image.tobytes() for image, _ in first.values()}) == len(places)
    # The amount of one change does not depend on which others there are.
    moving = replace(STRONG, gamma=1, contrast=1, blur_px=0, noise=0)
    assert all((augment(*drawn, moving, *place)[1] == first[place][1]).all() for place in places)


@pytest.mark.parametrize("name", PLANS)
def test_what_never_changes(drawn, name):
    """The arrays given, the range of grey, and no vessels where there are none."""
    image, mask = drawn
    before = image.copy(), mask.copy()
    for seed in range(4):
        changed, _ = augment(image, mask, PLANS[name], seed, 1, 0)
        assert (changed.dtype, changed.flags.c_contiguous) == (np.uint8, True)
        assert (changed == changed[:, :, :1]).all(), "grey must stay grey"
        assert not augment(image, np.zeros_like(mask), PLANS[name], seed, 1, 0)[1].any()
    assert all((given == one).all() for given, one in zip((image, mask), before, strict=True))
    for shape in ((1, 1), (1, 30), (17, 5)):
        tiny, moved = augment(as_image(np.ones(shape, bool)), np.ones(shape, bool), PLANS[name], 0, 1, 0)
        assert (sorted(moved.shape), tiny.shape) == (sorted(shape), (*moved.shape, 3))


def test_flips_and_quarter_turns_are_exact(drawn):
    """Each result is one of the eight ways to lay a colour image down, and all eight occur."""
    image, mask = drawn
    image = np.stack([image[:, :, 0], 255 - image[:, :, 0], image[:, :, 0] // 2], axis=2)
    lain = [(np.rot90(image[:, ::s], n), np.rot90(mask[:, ::s], n)) for s in (1, -1) for n in range(4)]
    ways = {(way.shape, way.tobytes()): expected for way, expected in lain}
    seen = set()
    for index in range(60):
        turned, moved = augment(image, mask, Augmentation(flips=True, quarter_turns=True), 0, 1, index)
        way = turned.shape, turned.tobytes()
        assert (moved == ways[way]).all()
        seen.add(way)
    assert len(seen) == 8


def test_rotation_against_scipy(drawn):
    grey = drawn[0][:, :, 0]
    for angle in (-40, -7, 3, 25):
        places = _source_places(grey.shape, np.deg2rad(angle), 1, 0, None)
        theirs = ndimage.rotate(grey.astype(float), angle, reshape=False, order=1, mode="mirror")
        ours = cv2.remap(grey, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        error = np.abs(ours - theirs)
        assert error.mean() < 0.5
        assert error.max() < 8  # places are rounded to 1/32 px


def test_the_plan_that_changes_nothing_and_unknown_ones(drawn):
    assert [plan.is_none for plan in AUGMENTATIONS.values()] == [True, False, False, False]
    assert all(a is b for a, b in zip(augment(*drawn, get_augmentation("none"), 0, 1, 0), drawn, strict=True))
    with pytest.raises(ValueError, match=r"augment is 'weak'\. Choose one of none, flips, light, strong\."):
        get_augmentation("weak")
    with pytest.raises(ValueError, match=r"shape \(256, 199, 3\) for its mask: got uint8 \(256, 200, 3\)"):
        augment(drawn[0], drawn[1][:, 1:], STRONG, 0, 1, 0)
