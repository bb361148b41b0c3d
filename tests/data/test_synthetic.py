"""Synthetic angiograms: reproducible, alike within a patient, exact masks, files in the user's layouts."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from vesselrl.data.synthetic import DatasetPlan, write_plan
from vesselrl.data.vessel_tree import choose_view

from vesselrl.data import synthetic
from vesselrl.data.patients import parse_name
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.synthetic.dataset import SOURCE, TARGET, draw_sequence, write_dataset
from vesselrl.synthetic.rendering import render_attenuation, render_mask
from vesselrl.synthetic.tree import Vessel, grow_tree, project

# No noise, no anatomy, nothing that looks like a vessel, sharp in time.
CALM = replace(
    TARGET,
    noise=(0.0, 0.0),
    background_contrast=(0.0, 0.0),
    motion_blur_px=(0.0, 0.0),
    catheter=0.0,
    reflux=0.0,
    ribs=(0, 0),
    wires=(0, 0),
)


def straight(start, end, radius):
    """One vessel of constant width along a line."""
    points = np.linspace([*start, 0.0], [*end, 0.0], 50)
    return Vessel(points, np.full(50, radius), np.linalg.norm(points - points[0], axis=1))


def overlap(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def correlation(a, b):
    return np.corrcoef(a[..., 0].ravel(), b[..., 0].ravel())[0, 1]


def digest(root: Path):
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# Drawing


@pytest.mark.parametrize("domain", [SOURCE, TARGET], ids=["source", "target"])
@pytest.mark.parametrize("size", [64, 256])
def test_shapes_types_and_share_of_vessels(domain, size):
    pairs = [draw_sequence(domain, patient, 1, 1, size)[0] for patient in range(1, 11)]
    for image, mask in pairs:
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert (image == image[..., :1]).all()
        assert image.std() > 5
        assert mask.shape == (size, size)
        assert mask.dtype == bool
        assert 0.025 < mask.mean() < 0.11
    assert 0.045 < np.mean([mask.mean() for _, mask in pairs]) < 0.08


def test_same_seed_same_frames_whatever_else_is_drawn():
    five = draw_sequence(TARGET, 3, 2, 5, 64, seed=1)
    draw_sequence(TARGET, 4, 1, 1, 64, seed=1)
    two = draw_sequence(TARGET, 3, 2, 2, 64, seed=1)
    for (image, mask), (image_again, mask_again) in zip(five[:2], two, strict=True):
        assert (image == image_again).all()
        assert (mask == mask_again).all()


@pytest.mark.parametrize(
    "other",
    [
        dict(patient=4),
        dict(sequence=2),
        dict(seed=2),
        dict(domain=SOURCE),
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_else_gives_another_tree(other):
    usual = dict(domain=TARGET, patient=3, sequence=1, num_frames=1, size=64, seed=1)
    mask, changed = (draw_sequence(**arguments)[0][1] for arguments in (usual, usual | other))
    assert overlap(mask, changed) < 0.7


def test_frames_resemble_each_other_more_than_other_patients():
    sequences = [draw_sequence(TARGET, patient, 1, 3, 128) for patient in range(1, 9)]
    within = [correlation(frames[0][0], frames[2][0]) for frames in sequences]
    between = [correlation(a[0][0], b[0][0]) for i, a in enumerate(sequences) for b in sequences[:i]]
    assert min(within) > 0.5
    assert np.mean(within) > 0.8
    assert np.mean(between) < 0.4
    # The heart beats: near, but not the same.
    beats = [overlap(frames[0][1], frames[2][1]) for frames in sequences]
    assert 0.1 < np.mean(beats) < 0.97


def test_sequences_of_a_patient_are_views_of_one_tree():
    one, two, stranger = (synthetic._prepare(TARGET, *number, 64, 0) for number in ((1, 1), (1, 2), (2, 1)))
    radii = [np.concatenate([vessel.radius for vessel in tree]) for tree, _ in (one, two, stranger)]
    assert np.array_equal(radii[0], radii[1])
    assert not np.array_equal(radii[0], radii[2])
    assert not np.allclose(one[0][0].points, two[0][0].points, atol=3)
    assert one[1].contrast == two[1].contrast != stranger[1].contrast


def test_mask_is_what_was_drawn_dark():
    """Without noise, anatomy, fading and distractors: dark inside the mask, plain grey away from it."""
    clear = replace(CALM, filling_floor=1.0, distal_fade=0.0, aperture=0.0)
    for patient in range(1, 7):
        image, mask = draw_sequence(clear, patient, 1, 1)[0]
        grey = image[..., 0].astype(float)
        away = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))) == 0
        assert np.ptp(grey[away]) <= 2
        assert (grey[mask] < 0.97 * grey[away].mean()).mean() > 0.99


@pytest.mark.parametrize(
    "change",
    [dict(catheter=1.0), dict(reflux=1.0), dict(ribs=(3, 3)), dict(wires=(2, 2))],
    ids=lambda change: next(iter(change)),
)
def test_distractors_are_in_the_image_and_not_in_the_mask(change):
    darkest = 0
    for patient in range(1, 5):
        plain, mask = draw_sequence(CALM, patient, 1, 1)[0]
        image, same_mask = draw_sequence(replace(CALM, **change), patient, 1, 1)[0]
        assert (mask == same_mask).all()
        darker = plain[..., 0].astype(int) - image[..., 0]
        assert darker.min() >= -1
        darkest = max(darkest, darker[~mask].max())
    assert darkest > 3


def test_faint_ends_stay_in_the_mask():
    fading = [draw_sequence(replace(CALM, distal_fade=fade), 1, 1, 1)[0] for fade in (0.0, 2.0)]
    assert (fading[0][1] == fading[1][1]).all()
    lost = fading[1][0][..., 0].astype(int) - fading[0][0][..., 0]
    assert lost[fading[0][1]].mean() > 3


def test_shrunken_labels_lie_inside_the_lumen():
    lumen, label = (
        draw_sequence(replace(SOURCE, label_shrink_px=shrink), 1, 1, 1)[0][1] for shrink in (0.0, 0.4)
    )
    assert label.sum() < 0.9 * lumen.sum()
    assert not (label & ~lumen).any()


# Vessels as pixels


def test_width_of_the_mask_is_twice_the_radius():
    """A level and an upright vessel; a pixel counts where its centre is inside."""
    across = render_mask([straight((20, 100), (230, 100), 2.4)], 256)  # centres 0, 1, 2 px off the middle
    assert np.flatnonzero(across[:, 128]).tolist() == [98, 99, 100, 101, 102]
    down = render_mask([straight((100.5, 20), (100.5, 230), 1.6)], 256)  # centres 0.5 and 1.5 px off
    assert np.flatnonzero(down[128]).tolist() == [99, 100, 101, 102]


def test_mask_agrees_with_supersampled_opencv_drawing():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        tree = project(grow_tree(rng, (2.2, 8.5)), choose_view(rng, mirror=False))
        fine = np.zeros((2048, 2048), np.uint8)
        for vessel in tree:
            for a, b, radius in zip(vessel.points[:-1], vessel.points[1:], vessel.radius, strict=False):
                ends = [tuple(round(8 * float(value) + 3.5) for value in point[:2]) for point in (a, b)]
                cv2.line(fine, *ends, 255, max(1, round(16 * radius)))
        covered = cv2.resize(fine, (256, 256), interpolation=cv2.INTER_AREA) >= 128
        assert overlap(render_mask(tree, 256), covered) > 0.96


def test_attenuation_is_the_chord_and_adds_up_at_crossings():
    """Radius 4 px: 8 px of contrast agent in the middle is the unit; two vessels one over the other are 2."""
    level, upright = straight((20, 128), (230, 128), 4.0), straight((128, 20), (128, 230), 4.0)
    whole = [np.ones(50), np.ones(50)]
    both = render_attenuation([level, upright], whole, 256, power=1.0)
    assert both[128, 60] == pytest.approx(1.0, abs=0.02)
    # 3 px beside the middle: 2·√(16 − 9) of 8.
    assert both[131, 60] == pytest.approx(2 * np.sqrt(7) / 8, abs=0.03)
    assert both[128, 128] == pytest.approx(2.0, abs=0.04)
    assert both[100, 100] == 0
    half = render_attenuation([level], [np.full(50, 0.5)], 256, power=1.0)
    assert half[128, 60] == pytest.approx(0.5, abs=0.01)


def test_tree_keeps_its_width_range_and_tapers():
    for seed in range(10):
        tree = grow_tree(np.random.default_rng(seed), (2.0, 9.0))
        widths = 2 * np.concatenate([vessel.radius for vessel in tree])
        assert widths.min() > 1.9
        assert 7 < widths.max() < 9.6
        assert all(vessel.radius[0] <= 1.1 * vessel.parent_radius for vessel in tree[1:])
        assert tree[1].radius[-1] < 0.6 * tree[0].radius[0]


def test_collaterals_close_loops():
    without, with_loops = (
        len(grow_tree(np.random.default_rng(5), (2.0, 9.0), loops=loops)) for loops in (0.0, 20.0)
    )
    assert with_loops > without + 5


def test_another_size_shows_the_same_tree():
    small, large = (draw_sequence(CALM, 1, 1, 1, size)[0][1] for size in (128, 256))
    enlarged = cv2.resize(small.astype(np.uint8), (256, 256), interpolation=cv2.INTER_NEAREST) > 0
    assert overlap(enlarged, large) > 0.75


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match="size is 32"):
        draw_sequence(TARGET, 1, 1, 1, size=32)


# Files


@pytest.mark.parametrize("layout", ["annotations", "nested", "masks"])
def test_layouts_are_read_back_exactly(tmp_path, layout):
    root = write_dataset(tmp_path / "data", TARGET, 2, 2, 2, size=128, seed=4, layout=layout)
    samples = find_samples(root)
    assert len(samples) == 8
    assert len({sample.patient for sample in samples}) == 2
    assert len({sample.sequence for sample in samples}) == 4
    drawn = [draw_sequence(TARGET, p, s, 2, 128, seed=4)[f] for p in (1, 2) for s in (1, 2) for f in (0, 1)]
    drawn_masks = {mask.tobytes(): image for image, mask in drawn}
    for sample in samples:
        image = drawn_masks.pop(load_mask(sample).tobytes())
        assert np.abs(load_image(sample).astype(int) - image).mean() < 3  # jpg
    assert not drawn_masks


def test_annotation_records(tmp_path):
    flat = write_dataset(tmp_path / "flat", TARGET, 1, 1, 1, size=64)
    record = json.loads((flat / "annotations.json").read_text())[0]
    assert isinstance(record["mask"][0][0], float | int)
    assert record["text"] == ["Please segment the blood vessel."]
    stem = Path(record["image"]).stem
    raster = np.array(Image.open(flat / "masks" / f"{stem}_mask.png"))
    assert set(np.unique(raster)) == {0, 255}
    with Image.open(flat / "images" / record["image"]) as image:
        assert image.mode == "L"

    nested = write_dataset(tmp_path / "nested", TARGET, 1, 1, 1, size=64, layout="nested")
    deeper = json.loads((nested / "annotations.json").read_text())[0]
    assert deeper["mask"] == [record["mask"]]
    assert deeper["text"] == "Please segment the blood vessel."
    assert not (nested / "masks").exists()


def test_file_names_follow_the_patterns_and_tell_patients_apart(tmp_path):
    plain = write_dataset(tmp_path / "plain", TARGET, 1, 1, 2, size=64)
    names = sorted(path.stem for path in (plain / "images").iterdir())
    assert all(name.startswith("SYNTH(0000000001)_S-1_1_") for name in names)
    assert parse_name(names[0]).person == "id:0000000001"

    varied = write_plan(tmp_path / "varied", DatasetPlan(TARGET, 12, 2, 2, 64, vary_names=True))
    samples = find_samples(varied)
    assert len(samples) == 48
    assert len({sample.patient for sample in samples}) == 12
    assert (
        len({path.name.split("S-")[0].strip("_ 0123456789()") for path in (varied / "images").iterdir()}) >= 3
    )


def test_number_of_processes_changes_nothing(tmp_path):
    plan = DatasetPlan(TARGET, 2, 1, 2, size=64)
    done = []
    one = write_plan(tmp_path / "one", plan, progress=lambda *step: done.append(step))
    two = write_plan(tmp_path / "two", plan, num_processes=2)
    assert digest(one) == digest(two)
    assert done == [(1, 2), (2, 2)]


def test_the_same_data_set_is_reused(tmp_path):
    root = write_dataset(tmp_path / "data", TARGET, 1, 1, 2, size=64)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_dataset(root, TARGET, 1, 1, 2, size=64) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_other_data_in_the_folder_is_an_error(tmp_path):
    root = write_dataset(tmp_path / "data", TARGET, 1, 1, 1, size=64)
    with pytest.raises(FileExistsError, match="num_frames 1, not 2; seed 0, not 5"):
        write_dataset(root, TARGET, 1, 1, 2, size=64, seed=5)
    with pytest.raises(FileExistsError, match="holds other synthetic angiograms: domain"):
        write_dataset(root, replace(TARGET, loops=3.0), 1, 1, 1, size=64)
    next((root / "images").iterdir()).unlink()
    with pytest.raises(FileExistsError, match="holds 0 images where 1 were written"):
        write_dataset(root, TARGET, 1, 1, 1, size=64)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"no synthetic\.json"):
        write_dataset(foreign, TARGET, 1, 1, 1, size=64)
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(done, total):
        raise StoppedError

    with pytest.raises(StoppedError):
        write_plan(tmp_path / "data", DatasetPlan(TARGET, 1, 2, 1, size=64), progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layout="coco"), "layout is 'coco'. Choose one of annotations, nested, masks"),
        (dict(num_frames=0), "num_frames is 0. Give a number from 1"),
        (dict(size=66), "size is 66"),
    ],
)
def test_plans_that_cannot_be_drawn_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DatasetPlan(**(dict(domain=TARGET, num_patients=1, num_sequences=1, num_frames=1) | change))
