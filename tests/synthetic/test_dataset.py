"""Synthetic angiograms: reproducible, alike within a patient, exact masks, files in the user's layouts."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.scoring.overlap import dice
from vesselrl.synthetic import dataset
from vesselrl.synthetic.dataset import SMALL, SOURCE, TARGET, builtin_data, draw_sequence, write_dataset
from vesselrl.synthetic.rendering import render_mask
from vesselrl.synthetic.tree import Vessel

# No noise, no anatomy, no distractors, sharp in time.
CALM = replace(
    TARGET, noise=(0.0, 0.0), background_contrast=(0.0, 0.0), motion_blur_px=(0.0, 0.0),
    catheter=0.0, reflux=0.0, ribs=(0, 0), wires=(0, 0),
)  # fmt: skip


def straight(start, end, radius):
    """One vessel of constant width along a line."""
    points = np.linspace([*start, 0.0], [*end, 0.0], 50)
    return Vessel(points, np.full(50, radius), np.linalg.norm(points - points[0], axis=1))


@pytest.mark.parametrize(("domain", "size"), [(SOURCE, 256), (TARGET, 64)], ids=["source", "target"])
def test_share_of_vessels(domain, size):
    pairs = [draw_sequence(domain, patient, 1, 1, size)[0] for patient in range(1, 9)]
    assert min(image.std() for image, _ in pairs) > 5
    shares = [mask.mean() for _, mask in pairs]
    assert 0.025 < min(shares) < max(shares) < 0.11
    assert 0.045 < np.mean(shares) < 0.08


@pytest.mark.parametrize("other", [dict(patient=4), dict(sequence=2), dict(seed=2), dict(domain=SOURCE)])
def test_same_seed_same_frames_and_anything_else_gives_another_tree(other):
    usual = dict(domain=TARGET, patient=3, sequence=1, num_frames=5, size=64, seed=1)
    five, changed, two = (draw_sequence(**usual | more) for more in ({}, other, dict(num_frames=2)))
    for frame, again in zip(five[:2], two, strict=True):
        assert all((a == b).all() for a, b in zip(frame, again, strict=True))
    assert dice(five[0][1], changed[0][1]) < 0.7


def test_mask_is_what_was_drawn_dark():
    """Without noise, anatomy, fading and distractors: dark inside the mask, plain grey away from it."""
    clear = replace(CALM, filling_floor=1.0, distal_fade=0.0, aperture=0.0)
    for patient in range(1, 5):
        image, mask = draw_sequence(clear, patient, 1, 1)[0]
        grey = image[..., 0].astype(float)
        away = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))) == 0
        assert np.ptp(grey[away]) <= 2
        assert (grey[mask] < 0.97 * grey[away].mean()).mean() > 0.99


def test_width_of_the_mask_is_twice_the_radius():
    """A level and an upright vessel; a pixel counts where its centre is inside."""
    across = render_mask([straight((20, 100), (230, 100), 2.9)], 256)  # centres 0, 1, 2 px off the middle
    assert np.flatnonzero(across[:, 128]).tolist() == [98, 99, 100, 101, 102]
    down = render_mask([straight((100.5, 20), (100.5, 230), 1.6)], 256)  # centres 0.5 and 1.5 px off
    assert np.flatnonzero(down[128]).tolist() == [99, 100, 101, 102]


@pytest.mark.parametrize("layout", ["annotations", "nested", "masks"])
def test_layouts_are_read_back_exactly(tmp_path, layout):
    root = write_dataset(tmp_path / "data", TARGET, 2, 2, 2, size=128, seed=4, layout=layout)
    samples = find_samples(root)
    assert [len({getattr(s, name) for s in samples}) for name in ("key", "sequence", "patient")] == [8, 4, 2]
    drawn = [draw_sequence(TARGET, p, s, 2, 128, seed=4)[f] for p in (1, 2) for s in (1, 2) for f in (0, 1)]
    images = {mask.tobytes(): image for image, mask in drawn}
    for sample in samples:
        image = images.pop(load_mask(sample).tobytes())
        assert np.abs(load_image(sample).astype(int) - image).mean() < 3  # jpg
    assert not images


def test_the_built_in_data_is_that_of_the_earlier_results_and_drawn_once(tmp_path):
    root = builtin_data(tmp_path, SMALL)
    assert root == tmp_path / "data" / "synthetic_target_64px_f0e8817b"  # a hash of all settings
    before = [(path, path.stat().st_mtime_ns) for path in root.parent.rglob("*")]
    assert builtin_data(tmp_path, SMALL) == root
    assert [(path, path.stat().st_mtime_ns) for path in root.parent.rglob("*")] == before


def test_data_that_cannot_be_drawn_leaves_nothing(tmp_path, monkeypatch):
    for name, value in (("layout", "coco"), ("num_frames", 0), ("size", 66), ("size", 32)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            write_dataset(tmp_path, TARGET, 1, 1, **{"num_frames": 1, name: value})
    monkeypatch.setattr(dataset, "mask_to_polygons", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_dataset(tmp_path / "data", TARGET, 1, 2, 1, size=64)
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_that_draw_the_same_data_the_second_takes_what_the_first_has_drawn(tmp_path, monkeypatch):
    """The other process, played by a second call, finishes while this one is at its last frame."""
    write_frame, calls = dataset._write_frame, []

    def and_the_other(*frame):
        calls.append(frame)
        if len(calls) == 1:
            write_dataset(tmp_path / "other", TARGET, 1, 1, 2, size=64)
            (tmp_path / "other").rename(tmp_path / "data")
        return write_frame(*frame)

    monkeypatch.setattr(dataset, "_write_frame", and_the_other)
    assert write_dataset(tmp_path / "data", TARGET, 1, 1, 2, size=64) == tmp_path / "data"
    assert len(calls) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
