"""Processes that are forked from one which has imported everything, in place of spawned ones.

Two spawned processes spend ten seconds on imports and less than one on a test of what they compute. Tests without this
keep the true start.
"""

import functools
import multiprocessing.forkserver
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing

from smalti.training import processes

IMPORTED = ["smalti.cli.main", "smalti.training.loop", "smalti.runs.train", "smalti.methods", "smalti.evaluation"]


def fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``torch.multiprocessing`` fork; the server lives as long as this process."""
    _start_server()  # here, where no signal is blocked
    module = sys.modules["torch.multiprocessing.spawn"]  # the attribute of this name is a function
    start = functools.partial(_start, module.start_processes)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "start_processes", start)
    monkeypatch.setattr(torch.multiprocessing, "start_processes", start)
    monkeypatch.setattr(processes, "_process", _process)


def run_script(path: Path, words: tuple[object, ...], folder: Path) -> str:
    """What a script prints that is run in a folder, by a process that has imported everything."""
    _start_server()
    said = folder / f"{path.stem}.log"
    process = multiprocessing.get_context("forkserver").Process(
        target=_run, args=(str(path), [str(word) for word in words], str(folder), str(said))
    )
    process.start()
    process.join()
    text = said.read_text(encoding="utf-8")
    assert process.exitcode == 0, text
    said.unlink()
    return text


def _start_server() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    multiprocessing.forkserver.ensure_running()


def _run(path: str, words: list[str], folder: str, said: str) -> None:
    with Path(said).open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")
    sys.stdout.flush()


def _start(original: Callable[..., Any], *arguments: Any, start_method: str, **options: Any) -> Any:
    assert start_method == "spawn"
    return original(*arguments, start_method="forkserver", **options)


def _process(rank: int, count: int, port: int, parent: int, function: Callable[..., Any], arguments: Any) -> None:
    """As in training, but for the parent: here it is the server, which ends with the process of the tests."""
    processes._process(rank, count, port, os.getppid(), function, arguments)
