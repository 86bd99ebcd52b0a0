"""The command line: arguments, exit statuses and messages."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

import laplace_debiased
import laplace_debiased.demo
from laplace_debiased.cli import main


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reaches the demo, which is not run."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        laplace_debiased.demo, "run_demo", lambda *args, **kwargs: calls.append((*args, kwargs))
    )
    return calls


def test_arguments_reach_the_demo(received: list[tuple[Any, ...]], tmp_path: Path) -> None:
    arguments = ["demo", "--output", str(tmp_path), "--samples", "32"]
    assert main([*arguments, "--seed", "7", "--quick", "--no-progress"]) == 0
    assert received == [(tmp_path, 32, 7, {"quick": True, "progress_bar": False})]


def test_the_demo_has_defaults(received: list[tuple[Any, ...]]) -> None:
    assert main(["demo"]) == 0
    assert received == [(Path("demo-output"), 64, 0, {"quick": False, "progress_bar": True})]


def test_version_is_printed_by_python_dash_m(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["laplace_debiased", "--version"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("laplace_debiased", run_name="__main__")
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"laplace-debiased {laplace_debiased.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["demo", "--samples", "many"]])
def test_what_cannot_be_parsed_exits_with_status_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--samples", "1"], "samples must lie between 2 and"), (["--seed", "-1"], "seed must lie")],
)
def test_bad_values_give_one_line_and_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("laplace-debiased: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_an_output_that_is_a_file_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    assert main(["demo", "--quick", "--output", str(occupied)]) == 2
    assert str(occupied) in capsys.readouterr().err
    assert occupied.read_text() == "mine"


def test_an_interrupt_gives_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(laplace_debiased.demo, "run_demo", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "laplace-debiased: interrupted\n"


def test_public_names_are_all_there() -> None:
    for name in laplace_debiased.__all__:
        assert getattr(laplace_debiased, name) is not None
