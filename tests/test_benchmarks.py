"""Benchmarks run, and end with one line of JSON whose figures agree where they must."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def test_orpo_step_compares_equal_losses():
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_orpo_step.py"), "--steps", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400).stdout
    figures = json.loads(printed.splitlines()[-1])
    assert figures["shared"]["loss"] == pytest.approx(figures["plain"]["loss"], abs=1e-4)
    assert figures["speedup"] == pytest.approx(
        figures["plain"]["seconds_per_pair"] / figures["shared"]["seconds_per_pair"]
    )
    assert figures["memory_ratio"] < 1 < figures["speedup"]
