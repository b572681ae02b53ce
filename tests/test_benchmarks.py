"""Benchmarks run, and end with one line of JSON whose figures agree where they must."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def test_orpo_step_compares_equal_log_probabilities():
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_orpo_step.py"), "--steps", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400).stdout
    figures = json.loads(printed.splitlines()[-1])
    for name in ("chosen_logp", "rejected_logp"):
        assert figures["shared"][name] == pytest.approx(figures["plain"][name], abs=1e-4)
        assert figures["shared"][name] == pytest.approx(figures["trl"][name], abs=1e-4)
    for form in ("trl", "plain"):
        seconds = figures[form]["seconds_per_pair"] / figures["shared"]["seconds_per_pair"]
        assert figures[f"speedup_over_{form}"] == pytest.approx(seconds) and seconds > 2
        assert figures[f"memory_of_{form}"] < 0.7


def test_amber_generation_is_faster_and_the_same():
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_amber_generation.py"), "--limit", "40"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400).stdout
    figures = json.loads(printed.splitlines()[-1])
    assert figures["same"] == figures["questions"] > 300 and figures["pictures"] == 40
    assert (
        figures["speedup"] == pytest.approx(figures["single_seconds"] / figures["shared_seconds"])
        and figures["speedup"] > 4
    )


def test_host_answers_many_users_faster_and_the_same():
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_host.py"), "--users", "16", "--rounds", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400).stdout
    figures = json.loads(printed.splitlines()[-1])
    assert figures["same"] == figures["users"] == 16
    assert figures["speedup"] == pytest.approx(figures["alone_seconds"] / figures["together_seconds"])
    assert figures["speedup"] > 1.5
