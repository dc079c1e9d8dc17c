"""The command and its verbs: help that is quick, fits 80 columns, and whose examples are accepted."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer.main

from command import smalti
from smalti.choosing.choose import ChooseConfig
from smalti.cli import embed, evaluate, main, samples, shard
from smalti.cli.main import app
from smalti.config import build, parse_overrides
from smalti.evaluation.config import EvalConfig
from smalti.ranking.rank import RankConfig
from smalti.registry import listed
from smalti.runs.config import resolve
from smalti.runs.generate import GenerateConfig

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def of_training(tree: dict[str, Any]) -> None:
    resolve({"method": "mae", **tree})


def of_evaluation(tree: dict[str, Any]) -> None:
    evaluate.check_names(tree)
    build(EvalConfig, tree.get("eval", {}), group="eval")


def of_export(tree: dict[str, Any]) -> None:
    from smalti.cli.export import ExportConfig

    build(ExportConfig, tree)


def of_choice(tree: dict[str, Any]) -> None:
    build(EvalConfig, tree.pop("eval", {}), group="eval")
    build(ChooseConfig, tree)


PARSERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "train": of_training,
    "doctor": of_training,
    "demo": of_training,
    "choose": of_choice,
    "evaluate": of_evaluation,
    "rank": lambda tree: build(RankConfig, tree),
    "generate": lambda tree: build(GenerateConfig, tree),
    "export": of_export,
    "embed": lambda tree: build(embed.EmbedConfig, tree),
    "samples": lambda tree: build(samples.SamplesConfig, tree),
    "shard": lambda tree: build(shard.ShardConfig, tree),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_examples_in_help_are_accepted_by_the_command(verb: str) -> None:
    texts = [str(param.help) for param in COMMANDS[verb].params if param.name == "words"]
    found = re.findall(r"[\w.]+=\S*[\w\]]", " ".join(texts))
    assert bool(found) == bool(texts), "settings without an example"
    for example in found:
        PARSERS[verb](parse_overrides([example]))


@pytest.mark.parametrize("verb", [None, *COMMANDS])
def test_help_fits_80_columns_with_no_text_cut(verb: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = smalti(*([verb] if verb else []), "--help").stdout
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    paragraphs = re.split(r"\n\s*\n", shown.partition("╭")[0])
    for paragraph in paragraphs:
        for line, below in itertools.pairwise(line for line in paragraph.splitlines() if line.strip()):
            if not below.startswith("  "):  # else a list or a block of code
                assert len(line.rstrip()) + 1 + len(below.split()[0]) > 79, f"broken too early: {line}"


def test_the_list_of_commands_has_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    commands = smalti("--help").stdout.rpartition("Commands")[2].splitlines()
    assert [line.split()[1] for line in commands if line.startswith("│")] == list(COMMANDS)


def test_help_of_evaluate_lists_the_protocols() -> None:
    shown = " ".join(smalti("evaluate", "--help").stdout.split())
    for name, protocol in listed("protocol").items():
        assert f"{name}: {protocol.summary}" in shown


def test_help_takes_less_than_a_second_and_no_torch() -> None:
    code = (
        "import sys, time; from smalti.cli.main import run\n"
        f"for verb in {list(COMMANDS)}:\n"
        "    began = time.process_time()\n"
        "    try: run([verb, '--help'])\n"
        "    except SystemExit: print(time.process_time(), 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stderr.splitlines()]
    assert len(lines) == len(COMMANDS) and {has_torch for _, has_torch in lines} == {"False"}
    first, last = float(lines[0][0]), float(lines[-1][0])
    assert first < 1 and last - first < 1.5  # imports and one help; the other thirteen


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_given_its_completion(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smalti", "--show-completion", shell],
        capture_output=True,
        text=True,
        env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert "_SMALTI_COMPLETE" in done.stdout, done.stderr


@pytest.mark.parametrize(("verb", "ending"), [("rank", "; the same command resumes"), ("embed", "")])
def test_ctrl_c_says_whether_the_same_command_resumes(verb, ending, monkeypatch, capsys):
    def stop(*words, **options):
        raise KeyboardInterrupt

    for code in (stop, lambda *words, **options: 130):  # typer returns the code where it has caught the interrupt
        monkeypatch.setattr(main, "app", code)
        assert main._run([verb]) == 130
        assert capsys.readouterr().err == f"smalti: interrupted{ending}\n"
