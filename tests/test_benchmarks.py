"""Benchmarks run, and end with one line of JSON whose figures agree where they must."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


def run(name: str, *flags: str) -> dict:
    """The figures that a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    return json.loads(printed.splitlines()[-1])


@pytest.mark.slow
def test_orpo_step_compares_equal_log_probabilities():
    found = {result["form"]: result for result in run("bench_orpo_step", "--steps", "1")["results"]}
    assert list(found) == ["trl", "plain", "shared"]
    for name in ("chosen_logp", "rejected_logp"):
        for form in found:
            assert found[form][name] == pytest.approx(found["trl"][name], abs=1e-4), form
    for other in ("trl", "plain"):
        seconds = found[other]["seconds_per_pair"] / found["shared"]["seconds_per_pair"]
        assert found["shared"][f"speedup_over_{other}"] == pytest.approx(seconds) and seconds > 1
    assert found["shared"]["memory_of_trl"] < 0.7 and 0 < found["shared"]["share_of_matmul"] < 1


@pytest.mark.slow
def test_the_flops_are_those_that_run_and_two_rows_take_three_times_as_many():
    import bench_orpo_step
    from torch.utils.flop_counter import FlopCounterMode

    model = bench_orpo_step.add_adapter(bench_orpo_step.build_model("narrow", "cpu"))
    batch = bench_orpo_step.make_batch(1, "cpu")
    ran = {}
    for form in ("plain", "shared"):
        with FlopCounterMode(display=False) as counter:
            bench_orpo_step.make_trainer(form, "cpu").concatenated_forward(model, batch)[4].backward()
        counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        ran[form] = counts["aten.mm"] + counts["aten.addmm"]
    linear, _ = bench_orpo_step.count_flops(model, batch)
    # the first layer's input needs no gradient; the patches' convolution is left out
    assert linear == pytest.approx(ran["shared"], rel=0.05)
    assert ran["plain"] > 3 * ran["shared"]  # what makes it faster, counted: two rows, and logits for every position


def test_memory_is_accounted_as_it_is_used():
    """The sizes of tensors without content are those of real ones: here, what autograd keeps between the two passes."""
    import bench_memory
    import bench_orpo_step

    short, long = (bench_memory.account("narrow", False, 1, length, 250) for length in (1500, 3000))
    weights = sum(weight.nbytes for weight in bench_orpo_step.build_model("narrow", "meta").parameters())
    assert weights < short < long
    two_rows = bench_memory.account("narrow", False, 2, 2495, 2495)
    assert bench_memory.account("narrow", False, 1, 2615, 250) < 0.7 * two_rows
    packed = bench_memory.account("narrow", True, 1, 1500, 250)
    layers = 4 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1792)
    assert short - packed == pytest.approx(4 * layers * (1 - (0.5 + 1 / 64 + 1 / 4096) / 4), rel=0.15)


@pytest.mark.slow
def test_amber_generation_is_faster_and_the_same():
    figures = run("bench_amber_generation", "--limit", "40")
    assert figures["same"] == figures["questions"] > 300 and figures["pictures"] == 40
    seconds = figures["single_seconds"] / figures["shared_seconds"]
    assert figures["speedup"] == pytest.approx(seconds) and seconds > 4


def test_real_size_refuses_a_small_disk_and_goes_on_where_it_broke_off(tmp_path, monkeypatch, capsys):
    import real_size

    args = real_size.parse_args(["--work_dir", str(tmp_path)])
    works = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write('123')", tmp_path / "made" / "file"]
    steps = {"first": (tmp_path / "made", works), "second": (None, [sys.executable, "-c", "raise SystemExit(3)"])}
    monkeypatch.setattr(real_size, "list_steps", lambda args: steps)
    with pytest.raises(SystemExit, match="first ended with exit code 1"):
        real_size.run_steps(args)
    works[2] = "import os; os.mkdir(os.path.dirname(__import__('sys').argv[1]));" + works[2]
    with pytest.raises(SystemExit, match="second ended with exit code 3"):
        real_size.run_steps(args)
    steps["second"][1][2] = "pass"
    done = real_size.run_steps(args)
    assert "first: done before" in capsys.readouterr().err
    assert done["first"]["output_bytes"] == 3 and done["second"]["resident_bytes"] > 0
    monkeypatch.setattr(real_size, "DISK", 10**9)
    with pytest.raises(SystemExit, match="GB of disk are free"):
        real_size.check_room(tmp_path, 32)
