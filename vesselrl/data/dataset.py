"""Samples as a torch data set, its batches in a seeded order, easy images first if asked, a contact sheet.

Difficulty = rank of faintness / 2 + rank of thinness / 4 + rank of tortuosity / 4, ranks over the data set
from 0 (easiest) to 1; contrast counts twice, because it says most about how well an image is segmented. An
empty mask has difficulty 1: shown early, it would teach to find nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from vesselrl.data.augment import AUGMENTATIONS, Augmentation, get_augmentation
from vesselrl.data.augment import augment as augment_image
from vesselrl.data.check import foreground_shares
from vesselrl.data.pseudonyms import LABELS
from vesselrl.data.samples import Sample, find_samples, load_fov, load_image, load_mask
from vesselrl.data.splits import split_by_patient, take
from vesselrl.data.tiles import WHOLE, Tiling
from vesselrl.experiment.run_folder import atomic_write
from vesselrl.scoring.measurements import UNIT_PX, branches, tortuosity
from vesselrl.scoring.overlap import as_mask
from vesselrl.scoring.topology import Topology, topology

Item = tuple[np.ndarray, np.ndarray, Sample]
OUTSIDE = -100.0  # logit outside of a field of view: no gradient, and never vessel
CACHE_BYTES = 2 * 1024**3  # limit of the memory for the pixels of a data set

FIRST_SHARE = 0.4  # of the samples, in the first epoch
_EDGE_PX, _RING_PX = 1.0, 8.0  # the background of a vessel lies between these distances from it
_NEAR_PX = 24.0  # half the side of the square in which a vessel pixel looks for its background

OUTLINE = (240, 228, 66)  # yellow: seen on grey and on red, and no colour of `overlay`
TILE_PX, COLUMNS = 384, 4
_CAPTION_PX, _GAP_PX = 22, 6
_PAPER, _INK = 255, (51, 51, 51)


@dataclass(eq=False, repr=False)
class VesselDataset:
    """Items (image uint8 (H, W, 3), mask bool (H, W), sample) of the files, in memory up to a limit."""

    samples: Sequence[Sample]
    augmentation: Augmentation = AUGMENTATIONS["none"]
    seed: int = 0
    tiling: Tiling = WHOLE
    _cache: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False)
    _bytes_left: int = field(default_factory=lambda: CACHE_BYTES, init=False)

    def __post_init__(self) -> None:
        # Whether every epoch shows the same.
        self.repeats = self.augmentation.is_none and not self.tiling.cuts_any(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """One item; a broken file is a DataError that names the record."""
        sample = self.samples[index]
        image, mask = self._cache.get(index) or (load_image(sample), load_mask(sample))
        if index not in self._cache and image.nbytes + mask.nbytes <= self._bytes_left:
            self._bytes_left -= image.nbytes + mask.nbytes
            self._cache[index] = image, mask
        return image.copy(), mask.copy(), sample

    def augmented(self, index: int, epoch: int) -> Item:
        """One item, or a crop of it, as this epoch shows it; the same whenever it is asked for."""
        image, mask, sample = self[index]
        return *self._changed(image, mask, index, epoch), sample

    def fov(self, index: int, epoch: int) -> np.ndarray | None:
        """The field of view, bool (H, W), of an item of `augmented`; None: all of it counts."""
        fov = load_fov(self.samples[index])
        return None if fov is None else self._changed(self[index][0], fov, index, epoch)[1]

    def _changed(
        self, image: np.ndarray, mask: np.ndarray, index: int, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.tiling.cuts(*mask.shape):
            crop = self.tiling.crop(*mask.shape, self.seed, epoch, index)
            image, mask = image[crop].copy(), mask[crop].copy()
        return augment_image(image, mask, self.augmentation, self.seed, epoch, index)


@dataclass(frozen=True)
class TrainBatch:
    """Images of one step with their truth, all or one process's share of them; sizes may differ."""

    keys: list[str]  # pseudonyms, for caches
    images: list[np.ndarray]  # uint8 (H, W, 3)
    truths: list[np.ndarray]  # bool (H, W)
    topologies: list[Topology]  # of the truths
    size: int  # images of the step, in all processes
    first: int = 0  # number, in the step, of the first image here; the others follow `stride` apart
    stride: int = 1
    fovs: Sequence[np.ndarray | None] = ()  # bool (H, W); None: all of that image counts

    def inside(self, logits: list) -> list:
        """Tensors of logits (H, W) of the images, without vessels outside of the fields of view."""
        pairs = zip(logits, self.fovs or [None] * len(logits), strict=True)
        return [x if fov is None else x.masked_fill(x.new_tensor(~fov).bool(), OUTSIDE) for x, fov in pairs]

    @property
    def weight(self) -> float:
        """What the mean over these images weighs in that over the step's; 0 for one that another has."""
        return len(self.keys) / self.size if self.first < self.size else 0.0

    @property
    def places(self) -> range:
        """Numbers of these images in the step."""
        return range(self.first, self.first + self.stride * len(self.keys), self.stride)


@dataclass(eq=False)
class BatchSource:
    """Batches of a data set, epoch by epoch, each pass over the data in another order.

    Seed and epoch decide order and augmentation. With `difficulties` easy images come first, see
    `open_samples`. The truth's topology is computed once, or anew where crop or augmentation change it.

    Of each batch come the images of one process, every `stride`-th from the `first` on. Where it has none,
    comes the batch's first image with weight 0: all processes take all steps.
    """

    dataset: VesselDataset
    batch_size: int
    seed: int
    num_epochs: int = 1
    difficulties: Sequence[float] | None = None
    num_passes: Callable[[int], int] = lambda epoch: 1
    first: int = 0
    stride: int = 1
    _topologies: dict[str, Topology] = field(default_factory=dict, init=False)

    def num_batches(self, epoch: int) -> int:
        """Batches of one epoch, counted from 1."""
        return self.num_passes(epoch) * -(-len(self._open(epoch)) // self.batch_size)

    @cached_property
    def num_steps(self) -> int:
        """Batches of all epochs."""
        return sum(self.num_batches(epoch) for epoch in range(1, self.num_epochs + 1))

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[TrainBatch]:
        """Batches of one epoch, counted from 1, without the first `skip`."""
        opened = self._open(epoch)
        per_pass = self.num_batches(epoch) // self.num_passes(epoch)
        for number in range(skip // per_pass, self.num_passes(epoch)):
            # Like no other pass's, this number decides order and augmentation.
            one_pass = epoch + number * self.num_epochs
            generator = np.random.default_rng([self.seed, one_pass])
            order = [opened[k] for k in generator.permutation(len(opened)).tolist()]
            first = skip % per_pass if number == skip // per_pass else 0
            for start in range(first * self.batch_size, len(order), self.batch_size):
                whole = order[start : start + self.batch_size]
                mine = whole[self.first :: self.stride] or whole[:1]
                items = [self.dataset.augmented(k, one_pass) for k in mine]
                images, truths, samples = map(list, zip(*items, strict=True))
                keys = [sample.key for sample in samples]
                topologies = [*map(self._topology, keys, truths)]
                fovs = [self.dataset.fov(k, one_pass) for k in mine]
                yield TrainBatch(keys, images, truths, topologies, len(whole), self.first, self.stride, fovs)

    def _open(self, epoch: int) -> Sequence[int]:
        """The images that an epoch shows."""
        if self.difficulties is None:
            return range(len(self.dataset))
        return open_samples(self.difficulties, epoch, self.num_epochs)

    def _topology(self, key: str, mask: np.ndarray) -> Topology:
        if not self.dataset.repeats:
            return topology(mask)
        if key not in self._topologies:
            self._topologies[key] = topology(mask)
        return self._topologies[key]


class Measures(NamedTuple):
    """Vessel width, contrast in [0, 1] and tortuosity of one sample; all None where the mask is empty."""

    width_px: float | None = None
    contrast: float | None = None
    tortuosity: float | None = None


def measure(image: np.ndarray, mask: np.ndarray) -> Measures:
    """Measures the vessels of a mask (H, W) in an image (H, W, 3), in px where the shorter side has 512 px.

    - Width: median along the centreline of 2 · d − 1, with d the largest distance to the background among the
      pixel and its eight neighbours; outside the image is background.
    - Contrast: |mean over the vessel pixels of (mean grey of the background near by − own grey)| / 255, with
      the background 1 to 8 px beside any vessel and at most 24 px from the pixel; 0 without any.
    - Tortuosity: as in `vessel_measurements`, but 1 without any branch that is long enough.
    """
    mask = as_mask(mask)
    if image.shape != (*mask.shape, 3):
        raise ValueError(f"The image has the shape {image.shape}, its mask {mask.shape}. Load both together.")
    if not mask.any():
        return Measures()
    unit = min(mask.shape) / UNIT_PX
    skeleton = topology(mask).skeleton
    inside = cv2.distanceTransform(np.pad(mask, 1).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    ridge = cv2.dilate(inside, np.ones((3, 3)))[1:-1, 1:-1]
    width_px = float(np.median(2 * ridge[skeleton] - 1)) / unit
    contrast = _contrast(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), mask, unit)
    winding = tortuosity([path for path, _ in branches(skeleton)], unit)
    return Measures(round(width_px, 3), round(contrast, 5), 1.0 if math.isnan(winding) else round(winding, 5))


def _contrast(grey: np.ndarray, mask: np.ndarray, unit: float) -> float:
    distance = cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    ring = (distance > _EDGE_PX * unit) & (distance <= max(_RING_PX * unit, 2))
    side = 2 * math.ceil(_NEAR_PX * unit) + 1
    share = cv2.blur(ring.astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
    total = cv2.blur(np.where(ring, grey, 0).astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
    known = mask & (share > 0.5 / side**2)
    return float(abs((total[known] / share[known] - grey[known]).mean())) / 255 if known.any() else 0.0


def rate_difficulty(measures: Sequence[Measures]) -> list[float]:
    """The difficulty of each sample in [0, 1], by ranks over all with vessels; a single one has 0."""
    from scipy.stats import rankdata  # slow to import, and for a curriculum alone

    vessels = [(-one.contrast, -one.width_px, one.tortuosity) for one in measures if one != Measures()]
    columns = np.reshape(vessels, (-1, 3)).T
    faint, thin, winding = ((rankdata(values) - 1) / max(1, len(values) - 1) for values in columns)
    known = iter(((2 * faint + thin + winding) / 4).tolist())
    return [1.0 if one.width_px is None else round(next(known), 6) for one in measures]


def difficulty_table(
    samples: Sequence[Sample], load: Callable[[Sample], tuple[np.ndarray, np.ndarray]]
) -> dict[str, dict[str, float | None]]:
    """Difficulty and measures of each sample by its key, ready for JSON; `calibre_px` is the vessel width."""
    found = [measure(*load(sample)) for sample in samples]
    names = ("difficulty", "calibre_px", *Measures._fields[1:])
    rows = zip(samples, rate_difficulty(found), found, strict=True)
    return {sample.key: dict(zip(names, (rating, *one), strict=True)) for sample, rating, one in rows}


def open_samples(difficulties: Sequence[float], epoch: int, num_epochs: int) -> list[int]:
    """Indices, ascending, of the samples that an epoch may use: the easiest share, until all are open.

    share(epoch) = 0.4 + 0.6 · (epoch − 1) / (num_epochs // 2), at most 1; their number is rounded up.
    Equal difficulties open in the order of their indices. Epochs count from 1.

    >>> [open_samples([0.9, 0.1, 0.5, 0.3], epoch, num_epochs=4) for epoch in (1, 2, 3)]
    [[1, 3], [1, 2, 3], [0, 1, 2, 3]]
    """
    if epoch < 1:
        raise ValueError(f"epoch is {epoch}. Epochs are counted from 1.")
    half = num_epochs // 2
    share = 1.0 if epoch > half else FIRST_SHARE + (1 - FIRST_SHARE) * (epoch - 1) / half
    num_open = math.ceil(round(share * len(difficulties), 6))
    easiest = sorted(range(len(difficulties)), key=lambda index: (difficulties[index], index))
    return sorted(easiest[:num_open])


def contact_sheet(items: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Images in rows, the outline of the mask on each, its key below: uint8 (H, W, 3), RGB, on white.

    Items are (key, image uint8 (H, W, 3), mask bool (H, W)); a key that is no pseudonym is a ValueError.
    """
    tiles = [_tile(*item, place=place) for place, item in enumerate(items, start=1)]
    columns = min(COLUMNS, len(tiles))
    tiles += [np.full_like(tiles[0], _PAPER)] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    return np.pad(np.vstack(rows), ((_GAP_PX, 0), (_GAP_PX, 0), (0, 0)), constant_values=_PAPER)


def write_contact_sheet(
    data_root: Path | str,
    output: Path | str,
    num_images: int = 12,
    augment: str = "none",
    seed: int = 42,
    split_seed: int = 42,
    stratified: bool = True,
    **options: str | None,
) -> Path:
    """Writes a PNG with training images of a split, as the first epoch shows them.

    It shows those that `--max_train_samples` would keep, of fewer than three patients any. `stratified`: by
    foreground, as for all but the built-in data; `options`: the others of `find_samples`.
    """
    samples = find_samples(data_root, **options)
    if len({sample.patient for sample in samples}) >= 3:
        shares = foreground_shares(data_root, **options) if stratified else None
        samples = split_by_patient(samples, split_seed, shares=shares).train
    chosen = take(samples, num_images, split_seed)
    dataset = VesselDataset(chosen, augmentation=get_augmentation(augment), seed=seed)
    shown = (dataset.augmented(index, epoch=1) for index in range(len(dataset)))
    sheet = contact_sheet([(sample.key, image, mask) for image, mask, sample in shown])
    path = Path(output)
    with atomic_write(path) as partial:
        kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
        Image.fromarray(sheet).save(partial, format=kind)
    return path


def _tile(key: str, image: np.ndarray, mask: np.ndarray, place: int) -> np.ndarray:
    if LABELS["files"].fullmatch(key) is None:
        raise ValueError(f"The caption of image {place} is no pseudonym. Use the key of its sample.")
    factor = TILE_PX / max(mask.shape)
    size = [max(1, round(side * factor)) for side in mask.shape[::-1]]
    smooth = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    shown = cv2.resize(image, size, interpolation=smooth)
    share = cv2.resize(mask.view(np.uint8) * np.uint8(255), size, interpolation=smooth)
    mask = share >= (64 if factor < 1 else 128)  # a thin vessel must not fall apart
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    shown[(cv2.dilate(mask.view(np.uint8), cross) > 0) & ~mask] = OUTLINE  # beside the vessel, to show it
    tile = np.full((TILE_PX + _CAPTION_PX + _GAP_PX, TILE_PX + _GAP_PX, 3), _PAPER, np.uint8)
    top, left = (TILE_PX - size[1]) // 2, (TILE_PX - size[0]) // 2
    tile[top : top + size[1], left : left + size[0]] = shown
    baseline = TILE_PX + _CAPTION_PX - 6
    cv2.putText(tile, key, (2, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.5, _INK, 1, cv2.LINE_AA)
    return tile
