"""Findings of a check of the data: a list for people, and JSON for machines."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Literal

from vesselrl.errors import DataError

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

# Every kind of finding, in words for the summary.
CODES = {
    "unusable": "unusable data root",
    "bad_json": "broken JSON file",
    "bad_record": "record or shape of the wrong form",
    "missing_image": "missing image",
    "missing_label": "image without mask or polygons",
    "missing_file": "vanished file",
    "extra_image": "image that no record names",
    "extra_mask": "mask file of no image",
    "unreadable_image": "unreadable or truncated image",
    "unreadable_mask": "unreadable or truncated mask",
    "too_many_bits": "image with more than 16 bits",
    "sixteen_bit_image": "16-bit image",
    "alpha_image": "image with an alpha channel",
    "rotated_image": "image turned by its EXIF orientation",
    "few_points": "polygon with fewer than 3 points, left out",
    "odd_length": "polygon with an odd number of coordinates",
    "outside_image": "polygon with coordinates outside the image",
    "bad_polygon": "polygon that is no list of finite numbers",
    "bad_rle": "broken run-length mask",
    "label_size": "label and image of different proportions",
    "scaled_label": "label of another size than its image, scaled",
    "text_length": "number of texts differs from the number of objects",
    "text_string": "text as one string",
    "bad_text": "text that is no text",
    "nested_mask": "polygons nested one level deeper",
    "several_labels": "shapes of several classes, joined",
    "empty_mask": "empty mask",
    "all_foreground": "mask without background",
    "mostly_foreground": "mask with more foreground than background",
    "non_binary_mask": "mask that is not binary",
    "disagreement": "mask file and polygons disagree",
    "mean_disagreement": "mask files and polygons disagree on the mean",
    "duplicate_record": "second record of one image",
    "duplicate_image": "second copy of one image",
    "patients": "patients cannot be told apart",
    "repaired": "repaired",
    "left_out": "left out of the repaired copy",
}


@dataclass(frozen=True)
class Finding:
    """One fault, or one thing worth knowing; holds pseudonyms and places, never a file name with a person."""

    # error: training would stop or be wrong; warning: it works, look at it; info: it was understood.
    severity: Severity
    code: str  # a key of CODES
    file: str  # such as images/train_001.png, or "images/ file 3 in name order"; empty: no file's fault
    record: str  # such as annotations.json record 17 (P003_S1_F0011); empty: of the whole data root
    message: str  # what is wrong, what was found, what to do
    count: int = 1  # how many polygons, files, … it stands for


class Findings(list[Finding]):
    """A list of findings, with `file` in those that name none; a strict one raises its first error."""

    def __init__(self, strict: bool = False, file: str = ""):
        super().__init__()
        self._strict = strict
        self._file = file

    def add(
        self, severity: Severity, code: str, message: str, record: str = "", file: str = "", count: int = 1
    ) -> None:
        """Adds a finding, or raises it where it is an error and the collection is strict."""
        if severity == "error" and self._strict:
            raise DataError(message, code) from None
        self.append(Finding(severity, code, file or self._file, record, message, count))

    error = partialmethod(add, "error")
    warning = partialmethod(add, "warning")
    info = partialmethod(add, "info")

    @contextmanager
    def catching(self, record: str = "", file: str = "", code: str = "") -> Iterator[None]:
        """Adds a DataError that ends the block; `code` replaces its own."""
        try:
            yield
        except DataError as error:
            self.error(code or error.code, str(error), record, file)

    def of(self, code: str) -> list[Finding]:
        """The findings of one kind."""
        return [item for item in self if item.code == code]

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [item for item in self if item.severity == "error"]


@dataclass(frozen=True)
class DataReport:
    """The result of a check of one data root."""

    root: Path
    layout: str  # such as "annotations.json" or "LabelMe"; empty where none was recognised
    findings: tuple[Finding, ...]
    # images, patients, sequences, masks_from_files, masks_from_polygons, empty_masks, scaled_labels.
    counts: dict[str, int] = field(default_factory=dict)
    # Dice of mask files with the polygons of the same image: images, mean, lowest; None without such images.
    agreement: dict[str, float] | None = None
    # Share of the image that is vessel, by key of every usable sample; `split_by_patient` can stratify by it.
    foreground: dict[str, float] = field(default_factory=dict)

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    @property
    def exit_code(self) -> int:
        """2 with any error, else 0."""
        return 2 if self.of("error") else 0

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        severities = {severity: len(self.of(severity)) for severity in SEVERITIES}
        values = {"data_root": str(self.root), "exit_code": self.exit_code, "severities": severities}
        values |= {name: value for name, value in asdict(self).items() if name != "root"}
        return json.dumps(values, indent=1)


def render(report: DataReport, limit: int = 3) -> str:
    """The report as text: a line of counts, then every kind of finding with its first messages (0: all).

    >>> finding = Finding("warning", "empty_mask", "", "r 0", "r 0: the mask is empty.")
    >>> print(render(DataReport(Path("d"), "LabelMe", (finding,), {"images": 2})))
    d (LabelMe): 2 images
    warning: empty mask: 1
      r 0: the mask is empty.
    0 errors, 1 warnings
    """
    counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in report.counts.items())
    lines = [f"{report.root} ({report.layout or 'no layout recognised'}): {counts or 'nothing read'}"]
    if report.agreement:
        text = "masks against polygons: mean Dice {mean:.4f} over {images} images, lowest {lowest:.4f}"
        lines.append(text.format(**report.agreement))
    for severity in SEVERITIES:
        for code in dict.fromkeys(finding.code for finding in report.of(severity)):
            group = [finding for finding in report.of(severity) if finding.code == code]
            lines.append(f"{severity}: {CODES[code]}: {sum(finding.count for finding in group)}")
            shown = group[: limit or None]
            lines += [f"  {finding.message}" for finding in shown]
            if len(group) > len(shown):
                lines.append(f"  … and {len(group) - len(shown)} more; --json lists all")
    lines.append(f"{len(report.of('error'))} errors, {len(report.of('warning'))} warnings")
    return "\n".join(lines)
