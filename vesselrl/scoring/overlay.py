"""Masks laid over their image; the colours mean the same in every picture of the project.

White is a vessel found, red (vermilion) a vessel missed, blue a vessel invented; told apart by the
colour-blind too.
"""

import numpy as np

from vesselrl.scoring.masks import as_mask, check_same_shape

HIT = (255, 255, 255)
MISSED = (230, 75, 10)
INVENTED = (40, 140, 235)


def overlay(image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """Lay a mask over its image: found white, missed red, invented blue; without a truth the mask is blue.

    An empty mask leaves the image as it is (without a truth) or shows every true vessel as missed.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: bool (H, W), the prediction.
        truth: bool (H, W), or None.

    Returns:
        uint8 (H, W, 3), RGB, a new array.

    Raises:
        ValueError: the sizes of image, mask and truth differ.

    >>> overlay(np.zeros((1, 2, 3), np.uint8), np.array([[True, False]]), np.array([[True, False]])).tolist()
    [[[217, 217, 217], [0, 0, 0]]]
    """
    mask = as_mask(mask, name="mask")
    if image.shape != (*mask.shape, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"overlay needs a uint8 image of shape {(*mask.shape, 3)} for its mask: got {image.dtype} "
            f"{image.shape}. Use the mask at the size of the original image."
        )
    if truth is None:
        layers = [(mask, INVENTED)]
    else:
        truth = as_mask(truth, name="truth")
        check_same_shape(mask, truth)
        layers = [(mask & truth, HIT), (truth & ~mask, MISSED), (mask & ~truth, INVENTED)]
    result = image.copy()
    for region, colour in layers:
        blend = 0.15 * result[region] + 0.85 * np.array(colour, dtype=np.float64)
        result[region] = np.round(blend).astype(np.uint8)
    return result
