"""Topology and length as the prototype scored them, to the last digit; for reward spec "seed" only."""

from __future__ import annotations

import numpy as np

from vesselrl.scoring.topology import Topology, prototype_topology


def prototype_shape_scores(
    pred: np.ndarray, gt: np.ndarray, gt_topology: Topology | None = None
) -> tuple[float, float]:
    """Score the shape of a mask by the prototype's rules, with Zhang-Suen skeletons.

    Args:
        pred: bool (H, W).
        gt: bool (H, W), the truth.
        gt_topology: `prototype_topology(gt)` if the caller has it already; any other topology is not used.

    Returns:
        (topology score in [-1, 1], length score, 0 or below and without bound). Fewer than 10 predicted
        pixels, so an empty mask too, have topology -1; two empty masks have length score 0.

    >>> line = np.zeros((5, 20), bool)
    >>> line[2, 2:18] = True
    >>> prototype_shape_scores(line, line)[0]
    1.0
    """
    given = gt_topology is not None and gt_topology.thinning == "zhang"
    truth_shape = gt_topology if given else prototype_topology(gt)
    pred_shape = prototype_topology(pred)
    if truth_shape.length_px > 0:
        length_score = -abs(1 - pred_shape.length_px / truth_shape.length_px)
    else:
        length_score = 0.0 if pred_shape.length_px == 0 else -1.0
    if np.count_nonzero(pred) < 10:
        return -1.0, length_score

    piece_error = abs(pred_shape.num_components - truth_shape.num_components)
    piece_score = 1 - min(piece_error / max(truth_shape.num_components, 1), 1.0)
    if truth_shape.num_junctions > 0:
        junction_score = min(pred_shape.num_junctions / truth_shape.num_junctions, 1.0)
    else:
        junction_score = 1.0 if pred_shape.num_junctions == 0 else 0.5
    if truth_shape.num_ends > 0:
        end_error = abs(pred_shape.num_ends - truth_shape.num_ends)
        end_score = 1 - min(end_error / truth_shape.num_ends, 1.0)
    else:
        end_score = 1.0 if pred_shape.num_ends == 0 else 0.5
    return 0.4 * piece_score + 0.4 * junction_score + 0.2 * end_score, length_score
