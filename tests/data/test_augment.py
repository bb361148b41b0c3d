"""Augmentation: image and mask stay together, same numbers give the same picture, thin vessels survive."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from scipy import ndimage

from vesselrl.data import augment as module
from vesselrl.data.augment import AUGMENTATIONS, BORDERS, Augmentation, augment, get_augmentation
from vesselrl.data.synthetic import SOURCE, draw_sequence
from vesselrl.scoring.topology import topology

ALONE = {
    "flips": Augmentation(flips=True),
    "quarter_turns": Augmentation(quarter_turns=True),
    "rotation": Augmentation(rotation_deg=45),
    "scale": Augmentation(scale=1.5),
    "elastic": Augmentation(elastic_px=12),
    "gamma": Augmentation(gamma=2),
    "contrast": Augmentation(contrast=2),
    "blur": Augmentation(blur_px=2),
    "noise": Augmentation(noise=0.1),
}
PLANS = ALONE | {
    "light": AUGMENTATIONS["light"],
    "strong": AUGMENTATIONS["strong"],
    "strong, black": replace(AUGMENTATIONS["strong"], border="black"),
}
SEEDS = range(25)


@pytest.fixture(scope="module")
def drawn():
    """An angiogram of 256 × 200 px and the mask of its vessels."""
    ((image, mask),) = draw_sequence(SOURCE, patient=3, sequence=1, num_frames=1, size=256, seed=1)
    return np.ascontiguousarray(image[:, 20:220]), np.ascontiguousarray(mask[:, 20:220])


def overlap(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def found(image):
    """The bright part of a picture that has a dark and a bright part: cut midway between the two."""
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
    for seed in SEEDS:
        image, moved = augment(as_image(mask), mask, plan, seed, epoch=1, index=seed)
        assert (moved.dtype, moved.shape) == (bool, image.shape[:2])
        assert overlap(found(image), moved) > (0.99 if name in ALONE else 0.93)  # gamma widens soft edges
        changed += image.shape[:2] != mask.shape or (image != as_image(mask)).any()
    assert changed >= len(SEEDS) / 2


@pytest.mark.parametrize("fault", ["one pixel beside", "turned by a degree", "of another picture"])
def test_a_misaligned_mask_would_be_seen(drawn, fault):
    _, mask = drawn
    for seed in SEEDS:
        image, moved = augment(as_image(mask), mask, AUGMENTATIONS["strong"], seed, epoch=1, index=0)
        if fault == "one pixel beside":
            moved = np.roll(moved, 1, axis=1)
        elif fault == "turned by a degree":
            moved = ndimage.rotate(moved, 1, reshape=False, order=0, mode="mirror")
        else:
            _, moved = augment(as_image(mask), mask, AUGMENTATIONS["strong"], seed, epoch=1, index=1)
            moved = cv2.resize(moved.view(np.uint8), image.shape[1::-1]) > 0
        assert overlap(found(image), moved) < 0.87


def test_the_same_numbers_give_the_same_picture(drawn):
    strong = AUGMENTATIONS["strong"]
    places = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1, 2) for index in (0, 1, 7)]
    first = {place: augment(*drawn, strong, *place) for place in places}
    for place in reversed(places):
        np.random.default_rng().random()
        again = augment(*drawn, strong, *place)
        assert all((a == b).all() for a, b in zip(first[place], again, strict=True))
    assert len({image.tobytes() for image, _ in first.values()}) == len(places)


def test_one_change_does_not_depend_on_the_others(drawn):
    strong = AUGMENTATIONS["strong"]
    moving = replace(strong, gamma=1, contrast=1, blur_px=0, noise=0)
    for index in range(8):
        place = (1, 2, index)
        image, mask = augment(*drawn, strong, *place)
        plain, same_mask = augment(*drawn, moving, *place)
        assert (mask == same_mask).all()
        if index == 0:
            assert (image != plain).any()
        turned = augment(*drawn, Augmentation(rotation_deg=25), *place)
        both = augment(*drawn, Augmentation(rotation_deg=25, noise=0.1), *place)
        assert (turned[1] == both[1]).all()
        flipped = augment(*drawn, Augmentation(flips=True), *place)[1]
        laid = augment(*drawn, Augmentation(flips=True, quarter_turns=True), *place)[1]
        assert any(np.array_equal(laid, np.rot90(flipped, turns)) for turns in range(4))


@pytest.mark.parametrize("name", PLANS)
def test_what_never_changes(drawn, name):
    """The arrays given, the range of grey, and no vessels where there are none."""
    image, mask = drawn
    before = image.copy(), mask.copy()
    nothing = np.zeros_like(mask)
    for seed in range(6):
        changed, _ = augment(image, mask, PLANS[name], seed, 1, 0)
        assert changed.dtype == np.uint8
        assert changed.flags.c_contiguous
        assert (changed == changed[:, :, :1]).all(), "grey must stay grey"
        assert not augment(image, nothing, PLANS[name], seed, 1, 0)[1].any()
    assert (image == before[0]).all()
    assert (mask == before[1]).all()


def test_colours_move_together(drawn):
    """A picture whose channels differ is turned like one whose channels do not."""
    image, mask = drawn
    colour = np.stack([image[:, :, 0], 255 - image[:, :, 0], image[:, :, 0] // 2], axis=2)
    plan = Augmentation(flips=True, quarter_turns=True)
    turned, _ = augment(colour, mask, plan, 0, 1, 5)
    grey, _ = augment(image, mask, plan, 0, 1, 5)
    assert (turned[:, :, 0] == grey[:, :, 0]).all()
    assert (turned[:, :, 1] == 255 - grey[:, :, 0]).all()


def test_flips_and_quarter_turns_are_exact(drawn):
    """Each result is one of the eight ways to lay a picture down, and all eight occur."""
    image, mask = drawn
    ways = {}
    for flipped in (False, True):
        for turns in range(4):
            way = np.rot90(image[:, ::-1] if flipped else image, turns)
            ways[way.shape, way.tobytes()] = np.rot90(mask[:, ::-1] if flipped else mask, turns)
    seen = set()
    for index in range(80):
        turned, moved = augment(image, mask, Augmentation(flips=True, quarter_turns=True), 0, 1, index)
        way = turned.shape, turned.tobytes()
        assert (moved == ways[way]).all()
        seen.add(way)
    assert len(seen) == 8


@pytest.mark.parametrize("angle", [-40, -7, 3, 25])
def test_rotation_against_scipy(drawn, angle):
    image, _ = drawn
    places = module._source_places(image.shape[:2], np.deg2rad(angle), 1, 0, np.random.default_rng(0))
    ours = module._read(image, places, "mirror")[:, :, 0].astype(float)
    theirs = ndimage.rotate(image[:, :, 0].astype(float), angle, reshape=False, order=1, mode="mirror")
    assert np.abs(ours - theirs).mean() < 0.5
    assert np.abs(ours - theirs).max() < 8  # places are rounded to 1/32 px


def test_scale_and_angle_keep_to_their_range():
    """A disc beside the centre: its area gives the factor, its direction the angle."""
    y, x = np.mgrid[:201, :201] - 100
    disc = (x - 40) ** 2 + y**2 <= 20**2
    angles, factors = [], []
    for index in range(60):
        _, moved = augment(as_image(disc), disc, Augmentation(rotation_deg=30, scale=1.3), 0, 1, index)
        near = moved & (x**2 + y**2 < 90**2)  # without mirror images
        row, column = ndimage.center_of_mass(near)
        angles.append(np.rad2deg(np.arctan2(100 - row, column - 100)))
        factors.append((near.sum() / disc.sum()) ** 0.5)
        assert np.hypot(row - 100, column - 100) == pytest.approx(40 * factors[-1], rel=0.05)
    assert -31 < min(angles) < -20
    assert 20 < max(angles) < 31
    assert 1 / 1.32 < min(factors) < 0.85
    assert 1.18 < max(factors) < 1.32


def test_elastic_bending_never_folds():
    """The map keeps its orientation everywhere (positive Jacobian), and reaches no further than it says."""
    identity = module._source_places((512, 640), 0, 1, 0, np.random.default_rng(0))
    for seed in range(20):
        places = module._source_places((512, 640), 0, 1, 12, np.random.default_rng(seed))
        (x_down, x_right), (y_down, y_right) = (np.gradient(places[..., axis]) for axis in (0, 1))
        assert (x_right * y_down - x_down * y_right).min() > 0.1
        assert 6 < np.abs(places - identity).max() < 1.6 * 12  # cubic interpolation overshoots


def test_a_thin_vessel_survives_rotation_there_and_back():
    """A winding vessel of 3 px; the nearest neighbour would lose more of it and fray its edge."""
    y, x = np.mgrid[:256, :256]
    width = 3 * np.hypot(1, 0.8 * np.cos(x / 15))  # as seen along a column
    vessel = (np.abs(y - 128 - 12 * np.sin(x / 15)) < width / 2) & (x > 50) & (x < 206)
    scores, ends = {"ours": [], "nearest": []}, {"ours": [], "nearest": []}
    for angle in np.deg2rad(np.arange(-43, 45, 4)):
        there, back = (module._source_places((256, 256), turn, 1, 0, None) for turn in (angle, -angle))
        ours = nearest = vessel
        for places in (there, back):
            ours = module._read(ours.view(np.uint8) * np.uint8(255), places, "mirror") >= 128
            nearest = cv2.remap(nearest.view(np.uint8), places, None, cv2.INTER_NEAREST) > 0
            ends["ours"].append(topology(ours).num_ends)
            ends["nearest"].append(topology(nearest).num_ends)
        scores["ours"].append(overlap(ours, vessel))
        scores["nearest"].append(overlap(nearest, vessel))
    assert topology(vessel).num_ends == 2
    assert np.mean(scores["ours"]) > 0.975
    assert np.mean(scores["ours"]) > np.mean(scores["nearest"])
    assert np.mean(ends["ours"]) < 2.3 < np.mean(ends["nearest"])


@pytest.mark.parametrize("border", BORDERS)
def test_beyond_the_border(border):
    """Image and mask end, or go on, at the same place."""
    mask = np.ones((120, 160), bool)
    plan = Augmentation(rotation_deg=30, scale=1.5, elastic_px=10, border=border)
    num_cut = 0
    for seed in SEEDS:
        image, moved = augment(np.full((120, 160, 3), 255, np.uint8), mask, plan, seed, 1, 0)
        assert ((image[:, :, 0] >= 128) == moved).all()
        num_cut += not moved.all()
    assert num_cut == 0 if border == "mirror" else num_cut > 10


def test_changes_of_grey(drawn):
    """Noise has the spread it says, contrast keeps the mean, gamma the order, blur smooths."""
    _, mask = drawn
    flat = np.full((200, 200, 3), 120, np.uint8)
    empty = np.zeros((200, 200), bool)
    spreads = [augment(flat, empty, Augmentation(noise=0.1), 0, 1, k)[0][:, :, 0].std() for k in range(40)]
    assert 20 < max(spreads) < 26
    assert min(spreads) < 6
    ramp = np.repeat(np.tile(np.arange(30, 170, dtype=np.uint8), (140, 1))[:, :, None], 3, axis=2)
    empty = np.zeros((140, 140), bool)
    for index in range(20):
        steeper, _ = augment(ramp, empty, Augmentation(contrast=1.3), 0, 1, index)
        assert steeper.mean() == pytest.approx(ramp.mean(), abs=1)
        assert 1 / 1.32 < steeper.std() / ramp.std() < 1.32
        curved, _ = augment(ramp, empty, Augmentation(gamma=1.5), 0, 1, index)
        assert (np.diff(curved[0, :, 0].astype(int)) >= 0).all()
        assert curved[0, 70, 0] == pytest.approx(255 * (100 / 255) ** _gamma(index), abs=1)
    rough = as_image(mask)
    smooth, _ = augment(rough, mask, Augmentation(blur_px=5), 0, 1, 0)
    assert np.ptp(np.diff(smooth[:, :, 0].astype(int))) < np.ptp(np.diff(rough[:, :, 0].astype(int)))


def _gamma(index):
    """The exponent that a black, a white and a middle pixel were given, read off another picture."""
    probe = np.full((4, 4, 3), 64, np.uint8)
    seen = augment(probe, np.zeros((4, 4), bool), Augmentation(gamma=1.5), 0, 1, index)[0][0, 0, 0]
    return np.log(seen / 255) / np.log(64 / 255)


def test_plans_have_names_and_print_themselves(drawn):
    assert list(AUGMENTATIONS) == ["none", "light", "strong"]
    assert str(get_augmentation("none")) == "none"
    assert str(get_augmentation("strong")).startswith("flips, quarter_turns, rotation_deg 25, ")
    assert [plan.is_none for plan in AUGMENTATIONS.values()] == [True, False, False]
    image, mask = augment(*drawn, get_augmentation("none"), 0, 1, 0)
    assert image is drawn[0]
    assert mask is drawn[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (2, 2), (17, 5)])
def test_tiny_pictures(shape):
    for plan in PLANS.values():
        image, moved = augment(as_image(np.ones(shape, bool)), np.ones(shape, bool), plan, 0, 1, 0)
        assert sorted(moved.shape) == sorted(shape)
        assert image.shape == (*moved.shape, 3)


def test_errors_say_what_to_do(drawn):
    image, mask = drawn
    with pytest.raises(ValueError, match=r"augment is 'weak'\. Choose one of none, light, strong\."):
        get_augmentation("weak")
    with pytest.raises(ValueError, match=r"scale is 0\.9\. Give a number from 1 to 2\."):
        Augmentation(scale=0.9)
    with pytest.raises(ValueError, match=r"border is 'wrap'\. Choose one of mirror, black\."):
        Augmentation(border="wrap")
    with pytest.raises(ValueError, match=r"shape \(256, 199, 3\) for its mask: got uint8 \(256, 200, 3\)"):
        augment(image, mask[:, 1:], AUGMENTATIONS["light"], 0, 1, 0)
