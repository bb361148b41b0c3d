"""The definitions behind every number of this package, in one place."""

from __future__ import annotations

from typing import Any

# Stored with every result; results of different specifications are not compared. Raise `version` whenever a
# definition changes or a score is added.
METRIC_SPEC: dict[str, Any] = {
    "version": 2,
    "skeleton": "guo_hall",
    "foreground_connectivity": 8,
    "background_connectivity": 4,
    "padding": "background",
    "length": "skeleton pixels",
    "path_length": "side steps + sqrt(2) x diagonal steps that no side steps replace",
    "end": "skeleton pixel with exactly one 8-neighbour",
    "junction": "8-connected cluster of skeleton pixels with crossing number >= 3",
    "border": "foreground pixels with a background 4-neighbour; outside the image is background",
    "hd95": "larger of the two directed 95th percentiles (linear) between borders, px",
    "nsd": "share of both borders within nsd_tolerance_px of the other",
    "nsd_tolerance_px": 2.0,
    "calibre": "largest disc inside the truth over the nearest centreline pixel",
    "calibre_medium_from_px": 5,
    "calibre_thick_from_px": 9,
}
