"""Large images: tiles that leave no seam, and masks in evaluation as in training and prediction."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.runs import train_debug
from vesselrl.data.tiles import Tiling, tile_px_of
from vesselrl.evaluation.held_out import evaluate_held_out
from vesselrl.evaluation.results import csv_text, read_evaluation
from vesselrl.experiment.options import Evaluate
from vesselrl.inference.predictor import Predictor
from vesselrl.models.processing import Sa2VAInputs
from vesselrl.scoring.postprocessing import PostProcessing, drop_small_components

RNG = np.random.default_rng(0)
CHESS_BOARD = np.repeat(np.kron(np.indices((12, 15)).sum(0) % 2, np.full((9, 9), 255))[..., None], 3, axis=2)


class ByPlace:
    """A model whose probability rises within every tile from 0.1 at its upper left to 0.9."""

    device = torch.device("cpu")

    def __call__(self, inputs: Sa2VAInputs) -> list[torch.Tensor]:
        sides = [[torch.linspace(0.1, 0.9, side) for side in size] for size in inputs.sizes]
        return [torch.logit((down[:, None] + across) / 2) for down, across in sides]


def largest_jumps(probabilities: np.ndarray, tiling: Tiling) -> list[tuple[float, float]]:
    """Between neighbouring pixels, down and across: over lines where a tile begins or ends, and elsewhere."""
    result = []
    for axis, side in enumerate(probabilities.shape):
        ends = {end for tile, _ in tiling.places(side) for end in (tile.start, tile.stop)}
        jumps = np.abs(np.diff(probabilities, axis=axis)).max(axis=1 - axis)
        seams = sorted(end - 1 for end in ends - {0, side})
        assert seams
        result.append((jumps[seams].max(), np.delete(jumps, seams).max()))
    return result


@pytest.mark.parametrize(
    ("size", "tile_px"), [((100, 333), 64), ((65, 64), 64), ((20, 200), 33), ((99, 7), 7)]
)
def test_tiles_cover_the_image_share_a_quarter_and_add_up_to_it(size: tuple[int, int], tile_px: int) -> None:
    tiling, image = Tiling(tile_px, tile_px), RNG.random(size, np.float32)
    assert np.abs(tiling.blend(image, lambda tile: tile) - image).max() < 1e-6
    assert tiling.blend(image, np.ones_like).max() <= 1
    for side in size:
        tiles = [tile for tile, _ in tiling.places(side)]
        assert {tile.stop - tile.start for tile in tiles} == {min(tile_px, side)}
        assert (tiles[0].start, tiles[-1].stop) == (0, side)
        assert all(one.stop - other.start >= tile_px // 4 for one, other in pairwise(tiles))


def test_only_large_images_are_cut_unless_a_size_is_given() -> None:
    auto, given = Tiling.of_model(None, 1024), Tiling.of_model(300, 1024)
    assert [auto.cuts(*size) for size in ((2048, 2048), (2049, 10), (2336, 3504))] == [False, True, True]
    assert [len(auto.places(side)) for side in (2336, 3504)] == [3, 5]  # 15 tiles of 1024 px
    assert [given.cuts(300, 300), given.cuts(200, 301)] == [False, True]
    assert not Tiling.of_model(0, 1024).cuts(9999, 9999)
    # As asked, or as the run was trained; runs of before had no tiles; no run: by the model's square.
    stored = {"tile_px": 512}, {"tile_px": None}, {"seed": 1}, {}
    assert [tile_px_of(settings) for settings in stored] == [512, None, 0, None]
    assert [tile_px_of(settings, 64) for settings in stored] == [64] * 4
    with pytest.raises(ValueError, match="--tile_px is 8; give 0 for none, or at least 32"):
        tile_px_of({}, 8)


def test_a_model_that_answers_by_place_leaves_no_seam(predictor: Predictor) -> None:
    """Put side by side its tiles would jump by 0.3 and more; a pixel amid the overlap is half of both."""
    tiled = Predictor(ByPlace(), predictor.processor, tile_px=64)
    result = tiled.predict(np.zeros((150, 200, 3), np.uint8))
    for across, inside in largest_jumps(result.probabilities, tiled.tiling):
        assert across < inside < 0.04
    row, column = 21, 54  # in the first row of tiles, where that from 0 to 63 meets that from 45 to 108
    shares = [0.1 + 0.8 * place / 63 for place in (row, column, column - 45)]
    by_hand = [(shares[0] + share) / 2 for share in shares[1:]]
    assert result.probabilities[row, column] == pytest.approx(np.mean(by_hand), abs=0.01)
    with pytest.raises(ValueError, match="Image 0 is float64"):
        tiled.predict(np.zeros((150, 200, 3)))


@pytest.mark.parametrize("picture", ["chess board", "coronary80/images/*", "chase_db1/images/*"])
def test_no_seam_in_pictures(predictor: Predictor, picture: str, request: pytest.FixtureRequest) -> None:
    if "/" in picture:
        file = sorted((request.getfixturevalue("shared_folder") / "data").glob(picture))[0]
        image = np.asarray(Image.open(file).convert("RGB"))[:300, :300]
    else:
        image = CHESS_BOARD.astype(np.uint8)
    tiled = Predictor(predictor.model, predictor.processor, tile_px=64)
    result = tiled.predict(image)
    for across, inside in largest_jumps(result.probabilities, tiled.tiling):
        assert across <= inside
    # One tile by itself, where no other reaches; a whole image gives another answer.
    alone = predictor.predict(image[:64, :64])
    assert np.abs(result.probabilities - alone.probabilities[0, 0])[0, 0] < 1e-6
    assert np.abs(result.probabilities - predictor.predict(image).probabilities).max() > 1e-3


def test_the_whole_image_is_cut_at_the_threshold_and_post_processed(predictor: Predictor, images) -> None:
    """A component that reaches over tiles counts as one; in a batch an image is cut as it is alone."""
    shared = predictor.model, predictor.processor
    image = np.repeat(np.repeat(images[1], 2, axis=0), 2, axis=1)
    plain = Predictor(*shared, tile_px=64).predict(image)
    cut = float(np.median(plain.probabilities))
    made = Predictor(*shared, post=PostProcessing(cut, 400), tile_px=64)
    result, other = made.predict_batch([image, images[0]])
    mask = plain.probabilities > np.float32(cut)
    clear = np.abs(plain.probabilities - cut) > 1e-6
    assert (result.mask == drop_small_components(mask, 400))[clear].all()
    assert 0 < result.mask.sum() < mask.sum()
    assert np.abs(result.probabilities - plain.probabilities).max() < 1e-6
    assert np.array_equal(other.logits, predictor.predict(images[0]).logits)  # not cut
    prints = {Predictor(*shared, tile_px=px).fingerprint() for px in (None, 0, 64)}
    assert len(prints) == 3


def test_evaluation_cuts_as_the_training_did(tiny_checkpoint: Path, angiograms: Path, tmp_path: Path) -> None:
    """Images of 64 px, crops and tiles of 40 px."""
    given = {"model_path": tiny_checkpoint, "data_root": angiograms, "stage": "sft", "learning_rate": 0.02}
    run = train_debug(tmp_path, **given, tile_px=40).folder
    trained = csv_text(read_evaluation(run / "test_after.json").rows)
    assert csv_text(evaluate_held_out(Evaluate(tune=False), str(run)).evaluation.rows) == trained
    whole = evaluate_held_out(Evaluate(tune=False, tile_px=0), str(run)).evaluation.rows
    assert csv_text(whole) != trained
