"""The command line: `vesselrl VERB [options]`.

Parsing and printing only; nothing heavy is imported before a verb needs it, so that `--help` is instant.
"""

import inspect
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, make_dataclass
from difflib import get_close_matches
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, Union

import tyro
from rich.console import Console

from vesselrl.errors import EXPECTED, explanation
from vesselrl.experiment import options
from vesselrl.experiment.config import PRESETS, READING, TrainConfig
from vesselrl.experiment.progress import LogFile, bar
from vesselrl.experiment.run_folder import CONFIG_FILE, run_settings
from vesselrl.training import processes

if TYPE_CHECKING:
    from vesselrl.evaluation.held_out import HeldOutResult
    from vesselrl.training.train import TrainResult

T = TypeVar("T")
USAGE = "VERB [options]   (vesselrl VERB --help lists them)"
Verb = Callable[[list[str]], int]
LISTS = ("--format", "--report_to", "--lora_scope")  # options of several values
BASE_ALONE = "none"  # in the place of an adapter
RUNS = Path("output")  # where runs are looked for
# Of several processes the main one says what goes on, and the others, by number, what goes wrong.
OF_PROCESS = "" if processes.is_main() else f"process {processes.rank()}: "
LOG_FORMAT = f"%(asctime)s {OF_PROCESS}%(message)s", "%H:%M:%S"
console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0 done, 1 failed, 2 wrong usage or refused, 3 partly done."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(USAGE, VERBS))
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        print(f"vesselrl {sys.modules[__package__].__version__}")
        return 0
    if verb not in VERBS:
        near = "".join(f" Did you mean {name!r}?" for name in get_close_matches(verb, VERBS, 1))
        print(f"Unknown verb {verb!r}.{near}\n{usage(USAGE, VERBS)}", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a notebook has others; Windows pipes no Greek letters
            stream.reconfigure(errors="replace")
    level = logging.WARNING if OF_PROCESS else logging.INFO
    logging.basicConfig(level=level, format=LOG_FORMAT[0], datefmt=LOG_FORMAT[1])
    for noisy in ("httpx", "matplotlib", "PIL", "numba"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return VERBS[verb](rest)
    except SystemExit as stop:  # the parser's: 0 after --help, 2 after wrong usage, which it has explained
        return int(stop.code or 0)
    except (*EXPECTED, RuntimeError) as error:
        return fail(error)


def fail(error: Exception) -> int:
    """Says in one line what a user can mend, and returns the exit code; raises what is a fault of ours."""
    if os.environ.get("VESSELRL_TRACEBACK") or not (text := explanation(error)):
        raise error
    print(f"{OF_PROCESS}error: {text}", file=sys.stderr)
    return getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)


def run_logged(folder: str | Path, name: str, run: Callable[[], "TrainResult | None"]) -> int:
    """Trains, with a log file, and shows what came of it."""
    log = LogFile(folder, name, logging.Formatter(*LOG_FORMAT))
    with nullcontext() if OF_PROCESS else log:
        print_result(run(), log)
    return 0


def usage(form: str, verbs: dict[str, Verb]) -> str:
    """How to call the command, and its verbs or the parts of a verb, one line each."""
    lines = [f"  {name:9} {run.__doc__.splitlines()[0]}" for name, run in verbs.items()]
    return f"usage: vesselrl {form}\n\n" + "\n".join(lines)


def run_train(rest: list[str]) -> int:
    """Fine-tune with PPO or supervised; --preset quick, full or debug.

    A preset is a set of defaults that the options change; `--preset quick --help` shows them. `--config RUN`
    takes the settings of another run, or of its config.json, in their place.
    `--resume_from RUN`, alone, goes on with an interrupted run; what has changed since must be named in
    `--allow_change`.
    """
    argv, bars = ["vesselrl", "train", *rest], console if console.is_terminal and not OF_PROCESS else None
    if any(argument.partition("=")[0] in ("--resume_from", "--resume-from") for argument in rest):
        args = parse(options.Resume, rest, "train")
        from vesselrl.training.train import resume

        folder = Path(args.resume_from)
        return run_logged(folder.parent, "resumed", lambda: resume(folder, argv, bars, args.allow_change))
    how = {"use_underscores": True, "add_help": False, "return_unknown_args": True}
    start, others = tyro.cli(options.Start, args=rest, prog="vesselrl train", **how)
    settings = config_of(Path(start.config)) if start.config else PRESETS.get(start.preset)
    config = parse(TrainConfig, others, "train", settings)
    from vesselrl.training.train import train

    name = start.preset or config.optim.stage
    return run_logged(config.run.output_dir, name, lambda: train(config, argv, bars))


def run_evaluate(rest: list[str]) -> int:
    """Score models on held-out patients."""
    args = parse(options.Evaluate, rest, "evaluate")
    from vesselrl.evaluation.held_out import base_beside, evaluate_held_out
    from vesselrl.evaluation.words import differences_table

    failed, asked = False, args.lora_weights or (newest_run(args.base_model),)
    for weights in (None if weights == BASE_ALONE else weights for weights in asked):
        with bar(console, "evaluating") as progress:
            result = evaluate_held_out(args, weights, progress)
        print_evaluation(f"{weights or 'base model'}, {args.split}", args.threshold, result)
        if rows := base_beside(args, weights, result.evaluation):
            console.print(differences_table(f"base model and adapter, {args.split}", rows))
        failed |= result.evaluation.too_many_failed
    return int(failed)


def run_predict(rest: list[str]) -> int:
    """Segment images: masks, probability maps and overlays."""
    args = parse(options.Predict, rest, "predict")
    from vesselrl.inference.files import list_name, predict_files
    from vesselrl.inference.predictor import load_predictor

    listed, predictor = list_name(args.shard), load_predictor(args, adapter_of(args))
    counts, failed = Counter(), []
    with bar(console, "predicting") as progress:
        places = Path(args.image), Path(args.output_dir)
        for row in predict_files(predictor, *places, progress, args.shard, args.pixel_mm, args.format):
            counts[row["status"]] += 1
            failed += [f"{row['image']}: {row['reason']}"] if row["status"] == "failed" else []
    written = counts["done"] + counts["replaced"]
    print(f"{written} images written to {args.output_dir}; all are listed in {listed} there.")
    for kind in sorted({"labelme", "coco"} & {*args.format}):
        place = Path(args.output_dir, kind)
        print(f"To correct: {place}; then: vesselrl data merge DATA_ROOT {place} --output NEW_DATA_ROOT")
    if counts["replaced"]:
        print(f"{counts['replaced']} of them anew: their results were of another image, model or settings.")
    if counts["kept"]:
        print(f"{counts['kept']} were done before and are kept.")
    if failed:
        print("\n".join([f"{len(failed)} could not be done:", *failed]), file=sys.stderr)
    return 0 if not failed else 3 if written or counts["kept"] else 1


def run_demo(rest: list[str]) -> int:
    """Try a model on a page in the browser."""
    args = parse(options.Demo, rest, "demo")
    from vesselrl.demo import serving

    with serving(args, adapter_of(args)) as address:
        print(f"The page is at {address} until Ctrl-C, which also deletes what was uploaded.", flush=True)
        while True:
            time.sleep(3600)


def adapter_of(args: options.Predict | options.Demo) -> str | None:
    """The adapter that was named, or the newest run's; None for the base model."""
    adapter = args.lora_weights or newest_run(args.base_model)
    return None if adapter == BASE_ALONE else adapter


def run_merge(rest: list[str]) -> int:
    """Write a merged copy of the model and verify it."""
    args = parse(options.Merge, rest, "merge")
    from vesselrl.inference.merge import merge
    from vesselrl.models.lora import adapter_settings
    from vesselrl.models.miniature import base_checkpoint

    adapter = args.lora_weights or newest_run(needed_by="merge")
    settings = adapter_settings(adapter)
    with base_checkpoint(args.base_model or settings.get("model_path"), settings.get("seed")) as base:
        done = merge(base, adapter, args.output_model, args.dtype)
    same = f"predicts what base and adapter predict (Dice {done['verified_dice']:.4f})"
    console.print(f"{done['output']}: {same}")
    if (alike := done["dice_without_head"]) is not None:
        masks = f"other code gives masks without it, which agree with these by a Dice of {alike:.2f} at worst"
        console.print(f"detail_head.safetensors beside it is used by vesselrl alone: {masks}.")
        console.print("If those are needed, train with --deep_supervision 0.1.")
    return 0


def run_push(rest: list[str]) -> int:
    """Upload the best adapter and its model card to the Hugging Face hub."""
    args = parse(options.Push, rest, "push")
    from vesselrl.inference.merge import push

    adapter = args.lora_weights or newest_run(needed_by="push")
    console.print(f"Uploaded: {push(adapter, args.repository, args.public)}", soft_wrap=True)
    return 0


def run_compare(rest: list[str]) -> int:
    """All runs in one table, and which one to deploy."""
    if rest and not rest[0].startswith("-"):
        rest = ["--output_dir", *rest]
    args = parse(options.Compare, rest, "compare")
    from vesselrl.evaluation.compare import compare_sets, load_runs
    from vesselrl.evaluation.report import write_comparison_report

    root = Path(args.output_dir)
    runs, skipped = load_runs(root)
    for number, comparison in enumerate(compare_sets(runs, args.baseline, args.rank_by, skipped), start=1):
        place = root / "comparison" / f"test_set_{number}" if number > 1 else root / "comparison"
        paths = write_comparison_report(place, comparison)
        print(paths[1].read_text(encoding="utf-8"))
        print(f"Written: {', '.join(map(str, paths))}")
    return 0


def run_data(rest: list[str]) -> int:
    """Check, show, join or draw a data set: data check, data show, data merge, data draw."""
    parts = {"check": check_data_set, "show": show_data_set, "merge": merge_data_sets, "draw": draw_data_set}
    name = rest[0] if rest else ""
    if name in parts:
        return parts[name](rest[1:])
    asked = name in ("-h", "--help")
    print(usage("data PART [options]", parts), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def check_data_set(rest: list[str]) -> int:
    """Look at every record, image and mask."""
    args = parse(options.DataCheck, rest, "data check")
    from vesselrl.data.check import check_data, render
    from vesselrl.data.repair import repair_data

    look, roots = (repair_data, [args.data_root, args.fix]) if args.fix else (check_data, [args.data_root])
    report = look(*roots, **{name: getattr(args, name) for name in READING})
    print(report.to_json() if args.json else render(report))
    return report.exit_code


def show_data_set(rest: list[str]) -> int:
    """Write a contact sheet."""
    args = parse(options.DataShow, rest, "data show")
    from vesselrl.data.dataset import write_contact_sheet
    from vesselrl.synthetic.dataset import builtin_data

    chosen = {"data_root": args.data_root or builtin_data("output"), "stratified": args.data_root is not None}
    console.print(f"Written: {write_contact_sheet(**vars(args) | chosen)}")
    return 0


def merge_data_sets(rest: list[str]) -> int:
    """Join new or corrected labels with a data set."""
    args = parse(options.DataMerge, rest, "data merge")
    from vesselrl.data.repair import merge_data

    done = merge_data(**vars(args))
    text = "{images} images: {corrected} with a new mask, {added} added, {new_patients} new patients."
    print(text.format(**done))
    split = f" --split_file {done['split_file']}" if done["split_file"] else ""
    if not split:
        print("A training splits them anew; --split_file RUN/data_split.json keeps patients in their subset.")
    print(f"Next: vesselrl train --data_root {args.output}{split}")
    return 0


def draw_data_set(rest: list[str]) -> int:
    """Draw a synthetic data set."""
    args = parse(options.DataDraw, rest, "data draw")
    from vesselrl.synthetic.dataset import SOURCE, TARGET, write_dataset

    root = write_dataset(**vars(args) | {"domain": {"source": SOURCE, "target": TARGET}[args.domain]})
    console.print(f"{args.num_patients * args.num_sequences * args.num_frames} images in {root}")
    return 0


def run_doctor(rest: list[str]) -> int:
    """Check machine, packages, model folder and data."""
    args = parse(options.Doctor, rest, "doctor")
    from vesselrl.doctor import diagnose, format_report

    checks = diagnose(**{name: value for name, value in vars(args).items() if name != "json"})
    print(json.dumps([asdict(check) for check in checks], indent=1) if args.json else format_report(checks))
    return int(any(check.status == "problem" for check in checks))


def run_completion(rest: list[str]) -> int:
    """Print the completion script of a shell: bash, zsh or fish."""
    shell = parse(options.Completion, rest, "completion").shell

    def choice(verbs: dict[str, tuple]) -> object:
        parsers, flat = [], tyro.conf.arg(name="")
        for verb in dict.fromkeys(name.partition(" ")[0] for name in verbs):
            parts = {name[len(verb) + 1 :]: verbs[name] for name in verbs if name.split()[0] == verb}
            kinds = parts.get("") or (choice(parts),)  # of data: the options of check, show and draw
            fields = [(f"_{number}", Annotated[kind, flat]) for number, kind in enumerate(kinds)]
            name = tyro.conf.subcommand(verb, prefix_name=False)
            parsers.append(Annotated[make_dataclass(verb, fields), name])
        return Union[tuple(parsers)]  # noqa: UP007 (of as many as there are)

    script = ["--tyro-print-completion", shell]
    return tyro.cli(choice(options.OPTIONS), args=script, prog="vesselrl", use_underscores=True)


VERBS: dict[str, Verb] = {
    "doctor": run_doctor,
    "data": run_data,
    "train": run_train,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "demo": run_demo,
    "merge": run_merge,
    "compare": run_compare,
    "push": run_push,
    "completion": run_completion,
}


def parse(kind: type[T], arguments: list[str], verb: str, default: T | None = None) -> T:
    """Options to one of the dataclasses; the prototype's underscore names and hyphens both work.

    Values of an option that takes several may stand apart or between commas.
    """
    before = [word[:2] + word[2:].replace("-", "_") for word in ["", *arguments]]
    words = (w.split(",") if b in LISTS else [w] for b, w in zip(before, arguments, strict=False))
    given = {} if default is None else {"default": default}
    about = inspect.getdoc(run_train if kind is TrainConfig else kind)
    given |= {"prog": f"vesselrl {verb}", "description": about, "use_underscores": True}
    return tyro.cli(kind, args=[*chain(*words)], **given)


def config_of(place: Path) -> TrainConfig:
    """The settings of a run, by its folder or its config.json."""
    folder = place.parent if place.name == CONFIG_FILE else place
    if not (settings := run_settings(folder, may_be_changed=True)):
        raise ValueError(f"--config: there is no {CONFIG_FILE} in {folder}; give the folder of a run.")
    return TrainConfig.from_dict(settings)


def newest_run(base_model: str | None = None, needed_by: str = "") -> str | None:
    """The run in output/ that finished last, which is said; None: there is none, or a base was named."""
    finished = [] if base_model else RUNS.glob("*/training_info.json")
    runs = [file for file in finished if (file.parent / "best_lora").is_dir()]
    if not runs and needed_by:
        raise ValueError(f"{needed_by} needs --lora_weights, as there is no finished run in {RUNS}/.")
    if not runs:
        return None
    newest = str(max(runs, key=lambda file: file.stat().st_mtime).parent)
    print(f"No model was named: the adapter is that of {newest}, the run that finished last.")
    return newest


def print_evaluation(title: str, threshold: float, result: "HeldOutResult") -> None:
    """Patient means with intervals as asked for, as tuned, and of a second observer."""
    from vesselrl.evaluation.words import TUNED_FILES, masks_in_words, scores_table

    names = {"": f"threshold {threshold:g}", "human": "human agreement"}
    for ending, chosen in (result.tuning.choices if result.tuning else {}).items():
        names[ending] = f"{masks_in_words(asdict(chosen))}, {TUNED_FILES[ending]} on validation"
    console.print(scores_table(title, {names[ending]: one for ending, (one, _) in result.scored.items()}))
    for caveat in result.evaluation.caveats.values():
        console.print(f"[bold]{caveat}[/bold]")
    counts, paths = result.evaluation.summary, ", ".join(str(path) for _, path in result.scored.values())
    found = "{n_images} images of {n_patients} patients, {n_failed} failed".format(**counts)
    console.print(f"{found}; {paths}")
    console.print(f"Report: {result.report_path}")


def print_result(result: "TrainResult | None", log: LogFile) -> None:
    """Before and after on validation and test patients, and where to go on, in the log too."""
    from vesselrl.evaluation.words import differences_table

    if result is None:
        return
    lines = [f"[bold]{caveat}[/bold]" for caveat in result.caveats]
    tables = (("validation", result.validation), ("test", result.test))
    lines += [differences_table(title, rows) for title, rows in tables if rows]
    best = next(result.folder.glob("best_*"))
    lines += [f"Log: {log.baseFilename}"] if log.stream else []
    lines += [f"Report: {result.folder / 'report.html'}", f"Best weights: {best}"]
    if best.name == "best_lora":
        lines.append(f"Next: vesselrl predict --lora_weights {result.folder} --image IMAGES")
    console.print(*lines, sep="\n", soft_wrap=True)
    log.add(*lines)
