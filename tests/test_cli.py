"""The command line: verbs, presets, spellings, exit codes, and what it imports."""

import contextlib
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vesselrl.cli import VERBS, main
from vesselrl.evaluation.held_out import HeldOutResult
from vesselrl.experiment.config import PRESETS, TrainConfig
from vesselrl.experiment.progress import LogFile
from vesselrl.experiment.run_folder import run_settings, write_json

# Runs the command line as `python -m vesselrl` does, then says whether something heavy was imported.
SPY = """
import sys
from vesselrl.launch import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "peft", "matplotlib", "cv2", "numba"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else code)
"""


@pytest.fixture
def trained(monkeypatch, tmp_path: Path) -> list:
    """Stands in for the training: what it was called with, as [config, argv] pairs."""
    calls, folder = [], tmp_path / "output" / "the_run"
    (folder / "best_lora").mkdir(parents=True)

    def train(config: TrainConfig, argv: list[str], console: object) -> SimpleNamespace:
        calls.append((config, argv))
        return SimpleNamespace(folder=folder, validation=[], test=[], caveats=())

    monkeypatch.setattr("vesselrl.training.train.train", train)
    return calls


@pytest.mark.parametrize("words", ["--help", "compare --help", "train --help"])
def test_help_lists_the_verbs_and_imports_nothing_heavy(repository: Path, words: str) -> None:
    command = [sys.executable, "-c", SPY, *words.split()]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: vesselrl" in done.stdout
    assert words != "--help" or re.findall(r"^  (\w+) +[A-Z]", done.stdout, re.MULTILINE) == list(VERBS)
    assert not re.search("---- [A-Z]", done.stdout)  # headings in config.py are no part of an option's text


COMPLETED = {
    "tr": "train", "train --stage ": "sft rl sft+rl", "train --pres": "--preset", "data c": "check",
    "data check --j": "--json", "compare --r": "--rank_by",
}  # fmt: skip


def test_shells_complete_verbs_options_and_values(tmp_path: Path, capsys) -> None:
    """Bash runs its script; those of zsh and fish hold the same words."""
    for shell in ("zsh", "fish", "bash"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(f"'{name}': {{'description'" in script for name in (*VERBS, "check", "show", "draw"))
    for words, expected in COMPLETED.items():
        typed = ["vesselrl", *words.split(" ")]
        fill = f"COMP_WORDS=({' '.join(word or repr('') for word in typed)}); COMP_CWORD={len(typed) - 1}"
        program = f"{script}\n{fill}; _tyro_vesselrl; echo ${{COMPREPLY[*]}}"
        done = subprocess.run(["bash"], input=program, capture_output=True, text=True, check=True)
        assert done.stdout.split() == expected.split(), words
    assert main(["completion", "tcsh"]) == 2


WRONG_USAGE = {
    "": ["usage: vesselrl VERB"],
    "tarin": ["usage: vesselrl VERB", "Unknown verb 'tarin'. Did you mean 'train'?"],
    "--version-of-what": ["usage: vesselrl VERB", "Unknown verb '--version-of-what'"],
    "train --learnin_rate 1": ["--learnin_rate", "--learning_rate"],
    "train --reward_type best": ["'best'", "multi_objective", "simple_dice", "recall_focused"],
    "train --num_samples 1": ["--num_samples is 1; give at least 2."],
    "data": ["usage: vesselrl data PART"],
    "data nothing": ["usage: vesselrl data PART"],
}


@pytest.mark.parametrize("words", WRONG_USAGE)
def test_wrong_usage_is_named_and_exits_with_2(words: str, capsys) -> None:
    assert main(words.split()) == 2
    text = "".join(capsys.readouterr())
    assert [word for word in WRONG_USAGE[words] if word not in text] == []


def test_a_preset_is_a_start_that_options_change(trained: list, capsys) -> None:
    for words in ([], ["--seed", "7", "--preset", "quick"], ["--preset=quick", "--seed", "7"]):
        assert main(["train", *words]) == 0
        assert trained[-1][1] == ["vesselrl", "train", *words]
    changed = PRESETS["quick"].with_(seed=7)
    assert [config for config, _ in trained] == [TrainConfig(), changed, changed]
    for words in (["--preset"], ["--preset", "fast"], ["--preset="], ["--preset", "--seed"]):
        assert main(["train", *words]) == 2
        assert "argument '--preset'" in capsys.readouterr().err
    assert len(trained) == 3


def test_the_settings_of_another_run_are_a_start(trained: list, finished_run: Path, capsys) -> None:
    for place in (finished_run, finished_run / "config.json"):
        assert main(["train", "--config", str(place), "--seed", "7"]) == 0
    settings = TrainConfig.from_dict(run_settings(finished_run)).with_(seed=7)
    assert [config for config, _ in trained] == [settings, settings]
    assert settings != TrainConfig().with_(seed=7)
    assert main(["train", "--config", str(finished_run / "best_lora")]) == 2
    assert "there is no config.json in" in capsys.readouterr().err


def test_the_version_is_printed(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vesselrl {importlib.metadata.version('vesselrl')}\n"


def test_without_a_model_the_newest_finished_run_is_taken_and_told(
    finished_run, tmp_path, monkeypatch, capsys
) -> None:
    """Unless a base is named, or none is asked for; its base's scores stand beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vesselrl.cli.RUNS", Path("output"))
    for number, name in enumerate(("newer", "older", "unfinished")):
        shutil.copytree(finished_run, Path("output") / name)
        os.utime(Path("output") / name / "training_info.json", (1e9 - number, 1e9 - number))
    Path("output/unfinished/training_info.json").unlink()
    assert main(["evaluate"]) == 0
    out = capsys.readouterr().out
    told = "No model was named: the adapter is that of output/newer, the run that finished last."
    assert out.startswith(told)
    assert "base model and adapter, test: patient means" in out
    assert Path("output/newer/evaluation/test_best_lora.json").is_file()
    seen = []
    monkeypatch.setattr("vesselrl.inference.predictor.Predictor.from_pretrained",
                        lambda *places, **_: seen.append(places) or sys.exit(0))  # fmt: skip
    for words in ("", "--lora_weights output/older", "--base_model b", "--lora_weights none"):
        assert main(["predict", "--image", "images", *words.split()]) == 0
    assert seen == [(None, "output/newer"), (None, "output/older"), ("b", None), (None, None)]
    shutil.rmtree("output")
    assert main(["merge", "--output_model", "merged"]) == 2
    assert "there is no finished run" in capsys.readouterr().err


def test_the_last_lines_say_how_to_go_on_and_a_log_file_has_all_or_why_it_ended(
    monkeypatch, tmp_path: Path, capsys
) -> None:
    """But there is no file where a training was refused before a run began."""
    (tmp_path / "the_run" / "best_lora").mkdir(parents=True)
    numbers = dict.fromkeys(("before", "after", "difference", "low", "high"), 0.5)
    row = numbers | {"metric": "dice", "reason": "", "verdict": "better"}
    result = {"folder": tmp_path / "the_run", "validation": [row], "test": [], "caveats": ("LEAKY: a",)}

    def train(config: TrainConfig, argv: list[str], console: object) -> SimpleNamespace:
        logging.getLogger("vesselrl").warning("step 1")
        if config.optim.seed == 1:
            raise ValueError("refused")
        write_json(Path(config.run.output_dir, "run", "metrics.jsonl"), {})
        if config.optim.seed == 2:
            raise OSError("the [disk] is full")
        return SimpleNamespace(**result)

    monkeypatch.setattr("vesselrl.training.train.train", train)
    logs = {}
    for seed, code in ((1, 2), (2, 1), (3, 0)):
        place = tmp_path / str(seed)
        assert main(["train", "--preset", "quick", "--seed", str(seed), "--output_dir", str(place)]) == code
        logs[seed] = [(str(file), file.read_text()) for file in place.glob("train_quick_*.log")]
    assert logs[1] == []
    assert re.fullmatch(r"..:..:.. step 1\nended by OSError: the \[disk\] is full\n", logs[2][0][1])
    ((name, text),) = logs[3]
    assert "+0.5000" in text
    last = [
        f"Log: {name}",
        f"Report: {tmp_path / 'the_run' / 'report.html'}",
        f"Best weights: {tmp_path / 'the_run' / 'best_lora'}",
        f"Next: vesselrl predict --lora_weights {tmp_path / 'the_run'} --image IMAGES",
    ]
    assert text.splitlines()[-4:] == capsys.readouterr().out.splitlines()[-4:] == last
    assert not [one for one in logging.getLogger().handlers if isinstance(one, LogFile)]


def test_hyphens_and_underscores_commas_and_spaces_are_the_same(trained: list) -> None:
    main(["train", "--num_epochs", "5", "--lora_scope", "projector", "mask_decoder", "--use_bf16"])
    main(["train", "--num-epochs", "5", "--lora-scope", "projector,mask_decoder", "--use-bf16"])
    expected = TrainConfig().with_(num_epochs=5, lora_scope=("projector", "mask_decoder"), use_bf16=True)
    assert [config for config, _ in trained] == [expected, expected]


@pytest.mark.parametrize("option", ["--base_model", "--model_path", "--base-model", "--model-path"])
def test_evaluate_takes_both_names_of_the_base_model(option: str, monkeypatch) -> None:
    plans = []

    def evaluate(args: object, weights: str | None, progress: object) -> HeldOutResult:
        plans.append((args.base_model, weights, args.threshold, args.split))
        summary = {"metrics": {}, "n_images": 1, "n_patients": 1, "n_failed": 1}
        values = {"summary": summary, "metrics": (), "caveats": {}, "too_many_failed": args.split == "val"}
        return HeldOutResult({"": (SimpleNamespace(**values), Path("x.json"))}, Path("x.html"))

    monkeypatch.setattr("vesselrl.evaluation.held_out.evaluate_held_out", evaluate)
    assert main(["evaluate", option, "m", "--lora_weights", "a", "b", "--threshold", "0.3"]) == 0
    assert plans == [("m", "a", 0.3, "test"), ("m", "b", 0.3, "test")]
    assert main(["evaluate", "--split", "val"]) == 1  # too many failed predictions are no success
    assert plans[-1][1] is None


FAILURES = [
    (OSError("first\n  second"), "error: first second\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), "memory does not suffice. Give --use_bf16"),
    (RuntimeError("another"), None),
    (ZeroDivisionError("another"), None),
]


@pytest.mark.parametrize(("error", "said"), FAILURES)
def test_one_line_for_what_a_user_can_mend_and_no_hiding_of_own_errors(
    monkeypatch, capsys, error, said
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setitem(VERBS, "merge", fail)
    with contextlib.nullcontext() if said else pytest.raises(type(error), match="another"):
        assert main(["merge"]) == 1
        assert said in capsys.readouterr().err
