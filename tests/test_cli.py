"""The command line: verbs, presets, spellings, exit codes, and what it imports."""

import inspect
import itertools
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from vesselrl.cli import VERBS, main
from vesselrl.evaluation.held_out import HeldOutResult
from vesselrl.experiment import options
from vesselrl.experiment.config import PRESETS, TrainConfig, get_preset

# Runs the command line as `python -m vesselrl` does, then says whether torch was imported.
SPY = """
import sys
from vesselrl.launch import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "peft", "matplotlib", "cv2", "numba"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else code)
"""


@pytest.fixture
def trained(monkeypatch) -> list:
    """Stands in for the training: what it was called with, as [config, argv] pairs."""
    calls = []

    def train(config: TrainConfig, argv: list[str], console: object) -> SimpleNamespace:
        calls.append((config, argv))
        return SimpleNamespace(folder="the run folder", validation=[], test=[], caveats=())

    monkeypatch.setattr("vesselrl.training.train.train", train)
    return calls


PARTS = {
    "train": TrainConfig,
    "data check": options.DataCheck,
    "data show": options.DataShow,
    "data draw": options.DataDraw,
} | {verb: getattr(options, verb.capitalize()) for verb in VERBS if verb not in ("train", "data")}


def parts_of(verb: str) -> list[type]:
    """The classes whose fields are a verb's options: those of training stand in groups."""
    return [type(group) for group in vars(TrainConfig()).values()] if verb == "train" else [PARTS[verb]]


@pytest.mark.parametrize("verb", PARTS)
def test_every_verb_answers_help_and_every_option_has_a_comment_of_its_own(verb: str, capsys) -> None:
    """Help shows the comment over a field; for a field without one, that of the field before."""
    assert main([*verb.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"usage: vesselrl {verb}" in out
    positional = {"data_root"} if verb in ("data check", "data show") else set()
    names = [field.name for part in parts_of(verb) for field in fields(part)]
    assert [name for name in names if f"--{name}" not in out and name not in positional] == []
    kinds = [kind for part in parts_of(verb) for kind in part.__mro__[:-1]]
    sources = [inspect.getsource(kind) for kind in kinds]
    lines = [line.strip() for source in sources for line in source.splitlines()]
    above = {line.partition(":")[0]: before for before, line in itertools.pairwise(lines)}
    assert [name for name in names if not re.match("# (?!----)", above[name])] == []


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(repository: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", SPY, *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: vesselrl" in done.stdout


def test_python_dash_m_and_the_list_of_verbs(repository: Path) -> None:
    command = [sys.executable, "-m", "vesselrl", "--help"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert re.findall(r"^  (\w+) +[A-Z]", done.stdout, re.MULTILINE) == list(VERBS)


def test_train_help_tells_of_presets_and_shows_their_values(capsys) -> None:
    main(["train", "--help"])
    plain = capsys.readouterr().out
    assert "--preset quick, full or debug" in plain
    assert not re.search("---- [A-Z]", plain)  # the headings in config.py are no part of an option's text
    assert "(default: 50)" not in plain
    main(["train", "--preset", "quick", "--help"])
    assert "(default: 50)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", ["usage: vesselrl VERB"]),
        ("tarin", ["usage: vesselrl VERB", "Unknown verb 'tarin'"]),
        ("--version-of-what", ["usage: vesselrl VERB", "Unknown verb '--version-of-what'"]),
        ("train --learnin_rate 1", ["--learnin_rate", "--learning_rate"]),
        ("data", ["usage: vesselrl data PART"]),
        ("data nothing", ["usage: vesselrl data PART"]),
    ],
)
def test_wrong_usage_is_named_and_exits_with_2(words: str, said: list[str], capsys) -> None:
    assert main(words.split()) == 2
    text = "".join(capsys.readouterr())
    assert [word for word in said if word not in text] == []


def test_a_preset_is_a_start_that_options_change(trained: list) -> None:
    for words in ([], ["--seed", "7", "--preset", "quick"], ["--preset=quick", "--seed", "7"]):
        assert main(["train", *words]) == 0
        assert trained[-1][1] == ["vesselrl", "train", *words]
    changed = get_preset("quick", seed=7)
    assert [config for config, _ in trained] == [TrainConfig(), changed, changed]


@pytest.mark.parametrize("words", [["--preset"], ["--preset", "fast"], ["--preset="], ["--preset", "--seed"]])
def test_an_unknown_or_missing_preset_names_the_choices(trained: list, words: list[str], capsys) -> None:
    assert main(["train", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --preset is '")
    assert line.endswith(f"choose one of {', '.join(PRESETS)}.")
    assert trained == []


def test_hyphens_and_underscores_are_the_same(trained: list) -> None:
    main(["train", "--num_epochs", "5", "--lora_scope", "projector", "mask_decoder", "--use_bf16"])
    main(["train", "--num-epochs", "5", "--lora-scope", "projector", "mask_decoder", "--use-bf16"])
    expected = TrainConfig().with_(num_epochs=5, lora_scope=("projector", "mask_decoder"), use_bf16=True)
    assert [config for config, _ in trained] == [expected, expected]


def test_the_options_of_the_prototype_are_known(trained: list) -> None:
    typed = (
        "--model_path m --data_root d --output_dir o --lora_rank 32 --lora_alpha 64 --lora_dropout 0.1 "
        "--num_epochs 3 --learning_rate 5e-5 --weight_decay .01 --max_train_samples 20 --max_val_samples 10 "
        "--reward_type recall_focused --dice_weight .5 --recall_weight .2 --topology_weight .2 "
        "--length_weight .1 --recall_target .85 --gpu 1 --num_workers 2 --use_bf16 --use_wandb "
        "--log_freq 10 --val_freq 100 --save_freq 1"
    ).split()
    assert main(["train", *typed, "--prompt", "Please segment the blood vessel."]) == 0
    settings = trained[0][0].to_dict()
    given = {name: settings[name] for name in ("model_path", "lora_dropout", "recall_weight", "gpu")}
    assert given == {"model_path": "m", "lora_dropout": 0.1, "recall_weight": 0.2, "gpu": 1}


@pytest.mark.parametrize("option", ["--base_model", "--model_path", "--base-model", "--model-path"])
def test_evaluate_takes_both_names_of_the_base_model(option: str, monkeypatch) -> None:
    plans = []

    def evaluate(args: object, weights: str | None, progress: object) -> HeldOutResult:
        plans.append((args.base_model, weights, args.threshold, args.split))
        summary = {"metrics": {}, "n_images": 1, "n_patients": 1, "n_failed": 1}
        values = {"summary": summary, "metrics": (), "caveats": {}, "too_many_failed": args.split == "val"}
        return HeldOutResult(SimpleNamespace(**values), Path("x.json"), Path("x.html"))

    monkeypatch.setattr("vesselrl.evaluation.held_out.evaluate_held_out", evaluate)
    assert main(["evaluate", option, "m", "--lora_weights", "a", "b", "--threshold", "0.3"]) == 0
    assert plans == [("m", "a", 0.3, "test"), ("m", "b", 0.3, "test")]
    assert main(["evaluate", "--split", "val"]) == 1  # too many failed predictions are no success
    assert plans[-1][1] is None


def test_a_verb_of_several_parts_lists_them(capsys) -> None:
    assert main(["data", "--help"]) == 0
    assert "usage: vesselrl data PART" in capsys.readouterr().out


def test_compare_without_runs_exits_2(tmp_path: Path, capsys) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert main(["compare", "--output_dir", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert str(folder) in line
    assert list(tmp_path.iterdir()) == []


def test_data_draws_what_was_asked_for(tmp_path: Path, capsys) -> None:
    words = "--num_patients 1 --num_sequences 1 --num_frames 1 --size 64 --layout masks".split()
    root = tmp_path / "drawn"
    assert main(["data", "draw", "--root", str(root), *words]) == 0
    assert len(list((root / "images").iterdir())) == len(list((root / "masks").iterdir())) == 1
    assert main(["data", "draw", "--root", str(root), *words, "--seed", "5"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(root) in line


def test_what_a_failure_becomes(monkeypatch, capsys) -> None:
    """One line for what a user can mend; the program's own errors are not hidden."""
    import torch

    def fail_with(error: Exception) -> None:
        def fail(args: object) -> int:
            raise error

        monkeypatch.setitem(VERBS, "merge", fail)

    for error, said in (
        (OSError("first\n  second"), "error: first second\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), "memory does not suffice. Give --use_bf16"),
    ):
        fail_with(error)
        assert main(["merge"]) == 1
        assert said in capsys.readouterr().err
    for error in (RuntimeError("another"), ZeroDivisionError("another")):
        fail_with(error)
        with pytest.raises(type(error), match="another"):
            main(["merge"])
