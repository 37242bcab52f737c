"""The examples and the simulations that need no chemistry run, and say what they should."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: object) -> str:
    """Run a script in a fresh interpreter and return what it prints."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_digits_are_certified_with_few_labels(tmp_path: Path) -> None:
    text = run("examples/inference_set_design/digits.py", "--seeds", 1, "--out", tmp_path / "d.png")
    assert text.count(", certified\n") == 2
    assert "Certified: with 95 % confidence" in text
    assert "of the 1797 images of pool digits" in text
    assert "not images met later" in text
    active, at_random = map(float, re.findall(r": ([\d.]+) % labelled", text))
    assert 0 < active < at_random < 100
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_simulated_coverage(tmp_path: Path) -> None:
    options = ("--pools", 15, "--deltas", 0.2, "--scenarios", "confidently wrong", "failures")
    run("benchmarks/coverage.py", "--out", tmp_path, *options)
    rows = json.loads((tmp_path / "coverage.json").read_text())["results"]
    rules = ["sequential", "hypergeometric", "mean error", "random", "kl_batch"]
    assert [row["rule"] for row in rows] == 2 * rules
    for row in rows:
        if row["is_proved"]:
            assert row["false_low"] <= 0.2
    assert rows[4]["false_low"] > 0.2  # kl_batch, where the model is confidently wrong
    assert (tmp_path / "coverage.png").stat().st_size > 0


def test_simulated_audits(tmp_path: Path) -> None:
    run("benchmarks/audits.py", "--out", tmp_path, "--pools", 2, "--scenarios", "easy")
    rows = json.loads((tmp_path / "audits.json").read_text())["results"]
    assert {row["audit"] for row in rows} == {"sequential", "hypergeometric", "standing"}
    assert all(0 < row["labels"] <= 1000 for row in rows)
