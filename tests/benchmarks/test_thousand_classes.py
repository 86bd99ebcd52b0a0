"""The benchmark of many classes, on a language model of a few thousand weights."""

from __future__ import annotations

import json

import pytest

from benchmarks.thousand_classes.__main__ import main


def test_language_models_are_fitted_and_predict(tmp_path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    options = ["--parts", "language", "--tiny", "--sequences", "2", "--threads", "1"]
    assert main([*options, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "thousand_classes.json").read_text())["rows"]
    notes = {(row["network"], row["step"]): row["note"] for row in rows}
    assert notes["GPT-2, lora", "la(x), 2, last position"] == "[2, 1000]"
    assert notes["GPT-2, block", "la(x), 2, last position"] == "[2, 1000]"
    assert "covers" in notes["GPT-2, lora", "fit, 2 sequences"]
    assert not any("Error" in note for note in notes.values()), notes
