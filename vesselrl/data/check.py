"""The check of a data root: every record, image and mask is read, and all faults are listed in one go.

What is an error here is one in training as well: both read through `vesselrl.data.samples`.
"""

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np

from vesselrl.data import samples
from vesselrl.data.formats import list_entries
from vesselrl.data.images import read_oddities
from vesselrl.data.near_duplicates import Look, Pair, find_near_duplicates, look_of
from vesselrl.data.pairing import LABEL_ENDINGS, SUBSETS, folder_key
from vesselrl.data.patients import lone_frames
from vesselrl.data.polygons import RunLengths, is_doubtful, rasterise
from vesselrl.data.pseudonyms import Pseudonym
from vesselrl.data.records import CODES, DataFolder, Entry, Finding, Findings, Listing, Severity
from vesselrl.experiment.progress import logged
from vesselrl.scoring.overlap import dice

MIN_AGREEMENT = 0.98  # Dice of a mask file with the polygons of its image
# Findings of patients who are not kept apart: a training logs them in full.
PATIENT_CODES = ("patients", "lone_frames", "one_patient")


@dataclass(frozen=True)
class DataReport:
    """The result of a check of one data root."""

    layout: str  # such as "annotations.json" or "LabelMe"; empty where none was recognised
    findings: tuple[Finding, ...]
    # images, patients, sequences, masks_from_files, masks_from_polygons, empty_masks, scaled_labels.
    counts: dict[str, int] = field(default_factory=dict)
    # Dice of mask files with the polygons of the same image: images, mean, lowest; None without such images.
    agreement: dict[str, float] | None = None
    # Share of the image that is vessel, by key of every usable sample; `split_by_patient` can stratify by it.
    foreground: dict[str, float] = field(default_factory=dict)
    near_duplicates: list[Pair] = field(default_factory=list)  # of different patients

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    @property
    def exit_code(self) -> int:
        """2 with any error, else 0."""
        return 2 if self.of("error") else 0

    def to_json(self) -> str:
        """Everything, as a JSON object; near duplicates are among the findings."""
        severities = {severity: len(self.of(severity)) for severity in get_args(Severity)}
        values = {"exit_code": self.exit_code, "severities": severities}
        values |= {k: value for k, value in asdict(self).items() if k != "near_duplicates"}
        return json.dumps(values, indent=1)


def render(report: DataReport, limit: int = 3) -> str:
    """The report as text: a line of counts, then every kind of finding with its first messages (0: all)."""
    counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in report.counts.items())
    lines = [f"{report.layout or 'no layout recognised'}: {counts or 'nothing read'}"]
    if report.agreement:
        text = "masks against polygons: mean Dice {mean:.4f} over {images} images, lowest {lowest:.4f}"
        lines.append(text.format(**report.agreement))
    for severity in get_args(Severity):
        for code in dict.fromkeys(finding.code for finding in report.of(severity)):
            group = [finding for finding in report.of(severity) if finding.code == code]
            lines.append(f"{severity}: {CODES[code]}: {sum(finding.count for finding in group)}")
            lines += [f"  {finding.message}" for finding in group[: limit or None]]
            if 0 < limit < len(group):
                lines.append(f"  … and {len(group) - limit} more; --json lists all")
    return "\n".join([*lines, f"{len(report.of('error'))} errors, {len(report.of('warning'))} warnings"])


def check_data(
    root: Path | str,
    patient_pattern: str | None = None,
    patient_aliases: Path | str | None = None,
    near_duplicates: bool = True,
    **places: str | None,
) -> DataReport:
    """All faults of a data root (see `find_samples`); `near_duplicates`: whether images are compared."""
    findings, layout = Findings(), ""
    with findings.catching():
        listing = list_entries(Path(root), findings, **places)
        layout = listing.layout
        with findings.catching(code="patients"):
            aliases = listing.pseudonyms(patient_pattern, patient_aliases, keep="nothing")
            _check_patients(aliases, patient_pattern, findings)
            return check_listing(listing, aliases, findings, near_duplicates)
    return DataReport(layout, tuple(findings))


def foreground_shares(root: Path | str, **options: str | None) -> dict[str, float] | None:
    """Foreground shares by key, for the stratification of the split; None where a fault stops training."""
    report = check_data(root, **options, near_duplicates=False)
    return None if report.exit_code else report.foreground


@dataclass(frozen=True)
class CheckedEntry:
    """An entry whose image and label were read completely."""

    findings: Findings
    file: str  # where the entry stands
    sample: samples.Sample | None = None  # None: an error keeps it from being used
    foreground: float | None = None  # share of the image that is vessel; None: the mask cannot be read
    agreement: float | None = None  # Dice of mask file and polygons; None where there is only one of them
    digest: str = ""  # of the decoded pixels; empty where the image cannot be decoded
    look: Look | None = field(default=None, repr=False)  # None: not asked for, or the image cannot be decoded


def _check_patients(aliases: dict[str, Pseudonym], pattern: str | None, findings: Findings) -> None:
    """Names that may hide who is whom: what looks like frames is a patient each, or one patient is all."""
    sizes = Counter(alias.patient for alias in aliases.values())
    if len(sizes) == 1 and len(aliases) > 2:
        findings.add("one_patient", count=len(aliases))
    # Sub-folders with several images, none of which shares its patient: each may be one patient's.
    folders = Counter(name.rpartition("/")[0] for name in aliases if "/" in name)
    shared = [size for path, size in folders.items() if size > 1 and folder_key(path) not in SUBSETS]
    if pattern is None and shared and len(sizes) == len(aliases):
        findings.add("patients", images=len(aliases), shared=sum(shared), folders=len(shared))
    elif groups := lone_frames({name: alias.patient for name, alias in aliases.items()}):
        counts = {"count": sum(map(len, groups)), "groups": len(groups)}
        findings.add("lone_frames", **counts, patients=len(sizes))


def check_listing(
    listing: Listing, aliases: dict[str, Pseudonym], findings: Findings, near_duplicates: bool = False
) -> DataReport:
    """The report of a data root whose entries have pseudonyms already; adds to `findings`."""
    entries = list(samples.different_images(listing, aliases, findings))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        check = partial(check_entry, folder=listing.folder, with_look=near_duplicates)
        results = pool.map(check, entries, [aliases[entry.name] for entry in entries])
        checked = [*logged(results, "checking images", len(entries))]
    for result in checked:
        findings.extend(result.findings)
    usable = [result for result in checked if result.sample is not None]
    _check_whole(listing, entries, usable, findings)
    pairs = _compare_images(usable, findings) if near_duplicates else []
    agreement = None
    if values := [result.agreement for result in checked if result.agreement is not None]:
        agreement = {"images": len(values), "mean": sum(values) / len(values), "lowest": min(values)}
        if agreement["mean"] < MIN_AGREEMENT:
            findings.add("mean_disagreement", **agreement)
    foreground = {result.sample.key: result.foreground for result in usable}
    for share, what, code in ((0, "empty", "empty_mask"), (1, "without background", "all_foreground")):
        if {*foreground.values()} == {share}:
            text = f"All {len(usable)} masks are {what}. Check that masks or polygons mark the vessels."
            findings.error(code, text)
    num_files = sum(result.sample.mask_path is not None for result in usable)
    counts = {
        "images": len(usable),
        "patients": len({result.sample.patient for result in usable}),
        "sequences": len({result.sample.sequence for result in usable}),
        "masks_from_files": num_files,
        "masks_from_polygons": len(usable) - num_files,
        "empty_masks": sum(share == 0 for share in foreground.values()),
        "scaled_labels": len(findings.of("scaled_label")),
    }
    return DataReport(listing.layout, tuple(findings), counts, agreement, foreground, pairs)


def _compare_images(usable: list[CheckedEntry], findings: Findings) -> list[Pair]:
    """The near duplicates of different patients; those with the same pixels were found before."""
    by_key = {result.sample.key: result for result in usable}
    pairs = find_near_duplicates([result.sample for result in usable], [result.look for result in usable])
    for one, other in ((by_key[one], by_key[other]) for one, other, _ in pairs):
        if one.digest != other.digest:
            findings.add("near_duplicate", one.sample.record, one.file, other=other.sample.record)
    return pairs


def check_entry(entry: Entry, alias: Pseudonym, folder: DataFolder, with_look: bool = False) -> CheckedEntry:
    """Reads one image and its label completely."""
    record, findings = entry.record(alias), Findings(file=entry.file)
    sample = samples.build_sample(entry, alias, findings)
    paths = (entry.image_path, entry.mask_path)
    image_file, mask_file = (folder.shown(path) if path else entry.file for path in paths)
    file_of = dict.fromkeys(("unreadable_mask", "label_size", "scaled_label"), mask_file)
    file_of["unreadable_image"] = image_file
    findings[:] = [replace(item, file=file_of.get(item.code, item.file)) for item in findings]
    _check_text(entry, record, findings)
    digest, look, mask, agreement = "", None, None, None
    if entry.image_path is not None and not findings.of("unreadable_image"):
        with findings.catching(record, image_file):
            pixels = samples.read_with_findings(entry.image_path, f"{record}: image", findings, image_file)
            content = repr(pixels.shape).encode() + pixels.tobytes()
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            look = look_of(pixels) if with_look else None
    if sample is not None:
        with findings.catching(record, mask_file):
            mask = samples.load_mask(sample)
            _check_label(sample, mask.shape, mask_file, findings)
    if mask is None:
        return CheckedEntry(findings, entry.file, digest=digest)
    share = float(mask.mean())
    if share == 0 or share > 0.5:
        code = {0: "empty_mask", 1: "all_foreground"}.get(share, "mostly_foreground")
        findings.add(code, record, mask_file, share=share)
    if entry.mask_path is not None and entry.read_label is not None:
        agreement = _compare_with_outlines(entry, mask, record, findings)
    return CheckedEntry(findings, entry.file, sample if digest else None, share, agreement, digest, look)


def _check_label(sample: samples.Sample, shape: tuple[int, int], file: str, findings: Findings) -> None:
    """Frames of the mask file, or outlines whose pixels are not what was drawn."""
    if sample.mask_path is not None:
        if frames := read_oddities(sample.mask_path, sample.record).get("several_frames"):
            findings.add("several_frames", f"{sample.record}: mask", file, value=frames)
        return
    polygons = [outline for outline in sample.outlines if not isinstance(outline, RunLengths)]
    doubts = zip(*(is_doubtful(polygon, shape) for polygon in polygons), strict=True)
    for code, found in zip(("thin_polygon", "traced_twice"), doubts, strict=False):
        if count := int(sum(found)):
            findings.add(code, sample.record, file, count=count, polygons=len(polygons))


def _check_text(entry: Entry, record: str, findings: Findings) -> None:
    """Whether `text` is a list with a text for each object of `mask`; training does not read it."""
    text, mask = entry.content.get("text", []), entry.content.get("mask")
    mask = mask if isinstance(mask, list) else []
    if any(isinstance(part, list) for item in mask if isinstance(item, list) for part in item[:1]):
        findings.add("nested_mask", record, severity="info")
    if isinstance(text, str):
        findings.add("text_string", record, severity="info")
    elif not isinstance(text, list) or not all(isinstance(item, str) for item in text):
        findings.add("bad_text", record)
    elif "text" in entry.content and mask and len(text) != len(mask):
        severity = "info" if len(text) == 1 else "warning"  # one text for all is the usual form
        findings.add("text_length", record, severity=severity, texts=len(text), objects=len(mask))


def _compare_with_outlines(entry: Entry, mask: np.ndarray, record: str, findings: Findings) -> float | None:
    """Dice of the mask file with the outlines, which are not used; their faults are warnings."""
    unused = Findings(file=entry.file)
    outlines = samples.read_outlines(entry, mask.shape[::-1], record, unused)
    for item in unused:
        message = f"{item.message} Not used: the mask file goes first."
        findings.append(replace(item, severity="warning", message=message))
    if unused.of("error") or not outlines:
        return None
    if (agreement := dice(rasterise(outlines, mask.shape), mask)) < MIN_AGREEMENT:
        findings.add("disagreement", record, dice=agreement)
    return agreement


def _check_whole(
    listing: Listing, entries: list[Entry], usable: list[CheckedEntry], findings: Findings
) -> None:
    """Files that belong to nothing, images with the same pixels, and shapes of several classes."""
    stems, are_pairs = {path.stem for path in listing.images}, listing.pairs
    kinds = [("missing_label" if are_pairs else "extra_image", path) for path in listing.extra_images]
    for path in listing.extra_masks:
        has_image = any(path.stem.removesuffix(ending) in stems for ending in LABEL_ENDINGS)
        kinds.append(("missing_image" if are_pairs and not has_image else "extra_mask", path))
    for code, shown in ((code, listing.folder.shown(path)) for code, path in kinds):
        findings.add(code, shown, shown)
    if listing.folder.fov_folder or any(result.sample.fov_path for result in usable):
        for result in (result for result in usable if result.sample.fov_path is None):
            findings.add("no_fov", result.sample.record, result.file)
    first: dict[str, str] = {}
    for result in usable:
        if (other := first.setdefault(result.digest, result.sample.record)) != result.sample.record:
            findings.add("duplicate_image", result.sample.record, result.file, other=other)
    classes = set()
    for entry, (name, part) in product(entries, (("shapes", "label"), ("annotations", "category_id"))):
        found = entry.content.get(name)
        items = [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
        classes |= {item[part] for item in items if isinstance(item.get(part), str | int)}
    if len(classes) > 1:
        findings.add("several_labels", count=len(classes))
