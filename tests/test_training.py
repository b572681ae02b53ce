"""The training script run whole: what it writes, that it resumes, and that it stops where it should."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import datasets
import psutil
import pytest
import torch
from conftest import MINIATURE, ROOT
from peft import PeftModel
from safetensors.torch import load_file
from test_data import picture, row
from transformers import LlavaNextForConditionalGeneration

import llava_orpo_training as training

pytestmark = pytest.mark.slow

SCRIPT = str(ROOT / "llava_orpo_training.py")
SMALL = ["--report_to", "none", "--batch_size", "4", "--gradient_accumulation_steps", "2"]
SMALL += ["--learning_rate", "1e-3", "--gradient_checkpointing", "off", "--num_workers", "0"]


@pytest.fixture(scope="session")
def few_pairs(tmp_path_factory):
    """A folder with 49 pairs of the miniature to train on and 10 held out. One pair does not fill a step of 8."""
    return write_pairs(tmp_path_factory.mktemp("few_pairs"), train=49, test=10)


def write_pairs(folder, **sizes):
    """Write the first pairs of the miniature's splits to a folder, and return it."""
    folder.mkdir(exist_ok=True)
    for split, size in sizes.items():
        read_pairs(MINIATURE / "preferences", split).select(range(size)).to_parquet(folder / f"{split}.parquet")
    return folder


def read_pairs(folder, split: str) -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")


def flags_for(folder, data, *flags) -> list[str]:
    places = ["--model_path", str(MINIATURE / "model"), "--dataset", str(data), "--output_dir", str(folder)]
    return [*places, *SMALL, "--epochs", "2", "--save_steps", "2", *map(str, flags)]


def run(folder, data, *flags):
    training.main(flags_for(folder, data, *flags))
    return folder


def stopped(capsys, *inputs) -> str:
    """Run what must end with exit code 2, and return what stands on stderr, as one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(*inputs)
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_pairs):
    return run(tmp_path_factory.mktemp("run") / "finished", few_pairs)


def losses(folder) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in training.read_jsonl(folder / "metrics.jsonl") if "loss" in row}


def test_files_and_keys(finished, few_pairs):
    names, files = {path.name for path in finished.iterdir()}, "adapter_model.safetensors adapter_config.json README.md"
    files += " metrics.jsonl samples.html samples.jsonl training_curves.png training_summary.json dropped_rows.jsonl"
    assert names >= {*files.split(), "arguments.json", "checkpoint-12"} and "partial" not in "".join(names)
    assert len({(finished / name).stat().st_mode for name in ("adapter_model.safetensors", "README.md")}) == 1
    summary = json.loads((finished / "training_summary.json").read_text())
    data, before, after = summary["data"], summary["before"], summary["after"]
    assert summary["steps"] == 12 and summary["arguments"]["lora_rank"] == 16
    assert (data["train_pairs"], data["eval_pairs"], data["dropped"]) == (48, 10, {})
    assert len(data["fingerprint"]) == 64 and summary["peak_memory_bytes"] > 1e8
    assert summary["versions"]["trl"] == "1.16.0"
    shorter = [len(row["chosen"].split()) < len(row["rejected"].split()) for row in read_pairs(few_pairs, "test")]
    assert data["shorter_is_chosen"] == sum(shorter) / 10
    assert (before["step"], after["step"]) == (0, 12) and after["eval_nll_loss"] < before["eval_nll_loss"]
    assert list(losses(finished)) == list(range(1, 13))
    names = {"nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/accuracies", "rewards/margins"}
    names |= {f"{figure}/{part}" for figure in ("rewards", "logps", "logits") for part in ("chosen", "rejected")}
    for line in training.read_jsonl(finished / "metrics.jsonl"):
        assert {("eval_" if "eval_loss" in line else "") + name for name in names} <= set(line)
    figures = [f"{one['eval_rewards/accuracies']:.4f}" for one in (before, after)]
    card = (finished / "README.md").read_text()
    assert f"| {figures[0]} | {figures[1]} |" in card and f"In {sum(shorter) / 10:.1%} of these pairs" in card


def test_samples_stand_beside_chosen_and_rejected(finished, few_pairs):
    page, held_out = (finished / "samples.html").read_text(), read_pairs(few_pairs, "test")
    evaluations = training.read_jsonl(finished / "samples.jsonl")
    assert [evaluation["step"] for evaluation in evaluations] == [0, 6, 12]
    for i in range(4):
        assert held_out[i]["chosen"] in page and held_out[i]["rejected"] in page
        assert all(evaluation["answers"][i] in page for evaluation in evaluations)
    assert page.count("data:image/png;base64,") == 4


def test_the_adapter_loads_on_an_untouched_base_and_moves_it(finished):
    keys = load_file(finished / "adapter_model.safetensors")
    assert len(keys) == 2 * 4 * 7 and all("language_model" in key and "lora_" in key for key in keys)
    base = LlavaNextForConditionalGeneration.from_pretrained(MINIATURE / "model", dtype=torch.float32)
    rows, ids = base.get_input_embeddings().weight.shape[0], torch.tensor([[1, 5, 300, 400]])
    before = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, finished)
    assert (adapted(input_ids=ids).logits - before).abs().max() > 1e-2
    assert adapted.get_input_embeddings().weight.shape[0] == rows


def test_a_finished_run_is_neither_written_over_nor_changed_nor_run_again(finished, few_pairs, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    assert "holds an earlier run; add --resume" in stopped(capsys, finished, few_pairs)
    assert "lora_rank was 16, is 8" in stopped(capsys, finished, few_pairs, "--resume", "--lora_rank", "8")
    run(finished, few_pairs, "--resume")
    assert "is finished; there is nothing to resume" in " ".join(capsys.readouterr().err.split())
    assert before == {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}


def start(folder, data, *flags):
    """Start the script as a process of its own, and wait for its third step."""
    command = [sys.executable, SCRIPT, *flags_for(folder, data, *flags)]
    # Ctrl+C must arrive even where the tests run in the background, whose processes ignore it
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    while len(losses(folder)) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_a_killed_run_resumes_on_the_same_curve(tmp_path, finished, few_pairs):
    folder = tmp_path / "killed"
    process = start(folder, few_pairs)
    while len(losses(folder)) < 7:  # the newest checkpoint is that of the epoch's end
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (folder / "adapter_model.safetensors").exists()
    broken = folder / "checkpoint-99"  # a checkpoint whose writing the kill cut short
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')
    run(folder, few_pairs, "--resume")
    assert losses(folder) == pytest.approx(losses(finished), abs=1e-6)
    assert [row["step"] for row in training.read_jsonl(folder / "samples.jsonl")] == [0, 6, 12]
    expected = load_file(finished / "adapter_model.safetensors")
    for name, weight in load_file(folder / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)


ENDS = [("Ctrl+C", 130, "interrupted; the same command with --resume continues")]
ENDS += [("SIGTERM", 143, "the run was told to end (SIGTERM)")]
ENDS += [("a worker's death", 2, "a process that decodes pictures was killed")]


@pytest.mark.parametrize(("ended_by", "code", "sentence"), ENDS)
def test_what_breaks_a_run_off_is_one_sentence(ended_by, code, sentence, tmp_path, few_pairs, capsys):
    """SIGTERM also leaves a checkpoint, and while a run goes on, another one cannot write into its folder."""
    folder, flags = tmp_path / "run", ["--epochs", "100", "--save_steps", "1000", "--num_workers", "1"]
    process = start(folder, few_pairs, *flags)
    try:
        if ended_by == "a worker's death":
            (worker,) = psutil.Process(process.pid).children()
            worker.kill()
        elif ended_by == "SIGTERM":
            assert "is being written by another run" in stopped(capsys, folder, few_pairs, *flags, "--resume")
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    # a worker that was sending when its reader ended may complain below
    assert process.returncode == code, error[-2000:]
    assert sum(line.startswith(f"error: {sentence}") for line in error.splitlines()) == 1, error[-2000:]
    assert bool(training.last_checkpoint(folder)) == (ended_by == "SIGTERM")
    assert not (folder / "training_summary.json").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    training.write_whole(tmp_path / "file", "before")
    monkeypatch.setattr(training.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        training.write_whole(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path, few_pairs, capsys):
    error = stopped(capsys, tmp_path / "run", few_pairs, "--save_steps", "1", "--learning_rate", "1e6", "--epochs", "4")
    assert "the run has diverged" in error and "Traceback" not in error
    (kept,) = {word.rstrip(";.") for word in error.split() if "checkpoint-" in word}
    weights = load_file(os.path.join(kept, "adapter_model.safetensors"))
    assert all(weight.isfinite().all() for weight in weights.values())
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_damaged_checkpoint_gives_way_to_the_older_one(tmp_path, finished, few_pairs, capsys):
    """In a run folder that was moved, too."""
    folder = tmp_path / "moved"
    shutil.copytree(finished, folder)
    (folder / "training_summary.json").unlink()
    newest = folder / "checkpoint-12"
    assert training.last_checkpoint(folder) == newest
    for name, kept in (("optimizer.pt", 0), ("adapter_model.safetensors", -100), ("trainer_state.json", 40)):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[:kept])
        assert training.last_checkpoint(folder).name == "checkpoint-10"
        (newest / name).write_bytes(whole)
    (newest / "rng_state.pth").unlink()
    capsys.readouterr()
    run(folder, few_pairs, "--resume")
    said = "".join(capsys.readouterr().err.split())
    assert "checkpoint-12isnotwhole" in said and f"continuingfrom{folder}/checkpoint-10" in said
    assert losses(folder) == pytest.approx(losses(finished), abs=1e-6)


def test_the_loss_does_not_depend_on_how_pairs_are_batched(tmp_path, finished, few_pairs):
    """49 pairs at 8 a step: the one that does not fill a step is left out, however the others are batched."""
    for batch_size, steps in ((8, 1), (2, 4)):
        flags = ["--batch_size", batch_size, "--gradient_accumulation_steps", steps]
        folder = run(tmp_path / str(batch_size), few_pairs, *flags)
        assert losses(folder) == pytest.approx(losses(finished), abs=1e-4)


def test_two_processes_give_the_figures_of_one(tmp_path, finished, few_pairs):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511", SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    flags = flags_for(tmp_path / "two", few_pairs, "--gradient_accumulation_steps", "1")
    subprocess.run([*launch, *flags], env=environment, timeout=300, check=True, capture_output=True)
    for two, one in zip(*(training.read_jsonl(f / "metrics.jsonl") for f in (tmp_path / "two", finished)), strict=True):
        names = [name for name in one if not re.search("runtime|per_second|grad_norm|logits", name)]
        if "loss" in one:
            names = ["step", "loss"]  # the other figures are those of the first process
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-4)


def test_a_second_round_goes_on_with_the_first_ones_adapter(tmp_path, finished, few_pairs):
    first = json.loads((finished / "training_summary.json").read_text())
    folder = run(tmp_path / "second", few_pairs, "--lora_path", finished, "--epochs", "1")
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary["before"]["eval_loss"] == pytest.approx(first["after"]["eval_loss"], abs=1e-5)
    assert summary["after"]["eval_loss"] != summary["before"]["eval_loss"]
    assert f"started from the adapter `{finished}`" in (folder / "README.md").read_text()
    before, after = (load_file(path / "adapter_model.safetensors") for path in (finished, folder))
    assert before.keys() == after.keys() and all(not torch.equal(before[key], after[key]) for key in before)


def test_what_cannot_work_is_refused_if_possible_before_the_model_is_loaded(tmp_path, few_pairs, capsys, monkeypatch):
    error = stopped(capsys, tmp_path / "run", few_pairs, "--lora_target_modules", "q_proj", "foo")
    assert "--lora_target_modules foo" in error
    monkeypatch.delattr(training, "load_llava")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in stopped(capsys, tmp_path / "file" / "run", few_pairs)
    lost = ["--lora_path", "no such adapter"]
    assert "--lora_path no such adapter" in stopped(capsys, tmp_path / "run", few_pairs, *lost)


def test_wandb_without_a_network_is_offline(tmp_path, monkeypatch, capsys):
    import wandb

    calls = []

    def init(**options):
        calls.append(options["mode"])
        if options["mode"] is None:
            raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", init)
    training.open_tracking(training.parse_args(["--output_dir", str(tmp_path)]))
    assert calls == [None, "offline"] and "recorded offline" in " ".join(capsys.readouterr().err.split())


def test_qlora_on_the_cpu(tmp_path, few_pairs):
    """The NF4 base trains, also after an evaluation, which on the CPU once left weights without a gradient."""
    folder = run(tmp_path / "qlora", few_pairs, "--load_4bit", "--max_samples", "24")
    assert len(losses(folder)) == 6
    early, late = (load_file(folder / name / "adapter_model.safetensors") for name in ("checkpoint-4", "checkpoint-6"))
    for name, weight in late.items():
        assert not torch.equal(weight, early[name]), name
    model, _ = training.load_llava(str(MINIATURE / "model"), device="cpu", load_4bit=True)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if not list(module.children())}
    quantized = [name for name, kind in kinds.items() if kind == "Linear4bit"]
    assert len(quantized) == 4 * 7 and all("language_model" in name for name in quantized)
    state = model.model.language_model.layers[0].self_attn.q_proj.weight.quant_state
    assert state.quant_type == "nf4" and state.nested


def test_photos_at_llavas_own_geometry(tmp_path, photo_llava):
    """Steps on photo-sized pictures: 336-pixel tiles, five grid shapes, Mistral's tokenizer, 2,340 image tokens."""
    sizes = [(640, 480), (480, 640), (640, 427), (500, 500), (900, 300), (333, 500)]
    rows = [row(image={"bytes": picture(size, seed, "JPEG"), "path": None}) for seed, size in enumerate(sizes)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "photos.parquet")
    flags = ["--model_path", photo_llava, "--eval_fraction", "0", "--epochs", "1", "--learning_rate", "1e-2"]
    single = ["--batch_size", "1", "--gradient_accumulation_steps", "1"]
    run(tmp_path / "run", tmp_path / "photos.parquet", *flags, *single)
    assert len(losses(tmp_path / "run")) == 6
    processor = training.load_llava(str(photo_llava), device="cpu")[1]
    tokens = [training.build_prompt(processor, "", size).count(32000) for size in sizes[:3]]
    assert tokens == [2340, 2352, 2144]


def label_the_prompt(collate, features, **options):
    return collate([{**one, "chosen": one["prompt"][-3:] + one["chosen"]} for one in features], **options)


def train_an_unused_layer(adapt, *inputs):
    adapted = adapt(*inputs)
    adapted.get_base_model().model.vision_tower.encoder.layers[3].requires_grad_(True)  # features are taken below it
    return adapted


def break_the_head(adapt, *inputs):
    adapted = adapt(*inputs)
    adapted.get_base_model().lm_head.weight.data.fill_(float("nan"))
    return adapted


TRAINER = training.LlavaORPOTrainer
FAULTS = [  # (what is replaced, by what, the check that notices)
    ((TRAINER, "concatenated_forward"), lambda forward, self, model, batch:
     forward(self, model, {**batch, "pixel_values": 0 * batch["pixel_values"]}), "another picture moves the chosen log-probability"),
    ((training, "collate_pairs"), label_the_prompt, "each response scores as it does alone"),
    ((training, "share_prefix"), lambda share, *inputs:
     (laid_out := share(*inputs)) | {"logits_to_keep": laid_out["logits_to_keep"] - 1},
     "each response scores as it does alone"),
    ((training, "add_adapter"), train_an_unused_layer, "every trainable weight gets a gradient"),
    ((training, "add_adapter"), break_the_head, "another picture moves the chosen log-probability"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "fault", "sentence"), FAULTS)
def test_preflight_stops_a_faulty_run(place, fault, sentence, tmp_path, few_pairs, monkeypatch, capsys):
    original = getattr(*place)
    monkeypatch.setattr(*place, lambda *inputs, **options: fault(original, *inputs, **options))
    error = stopped(capsys, tmp_path / "faulty", few_pairs)
    assert f"error: preflight failed: {sentence}" in error and "nothing was trained" in error
    assert not (tmp_path / "faulty" / "metrics.jsonl").exists()


def test_test_mode_fills_in_what_is_not_given():
    plain, test_mode = vars(training.parse_args([])), vars(training.parse_args(["--test_mode"]))
    assert {name for name in plain if plain[name] != test_mode[name]} == {"model_path", "dataset", "test_mode"}
    args = training.parse_args(["--test_mode", "--dataset", "pairs.parquet"])
    assert args.dataset == "pairs.parquet" and args.model_path == str(MINIATURE / "model")


def test_wandb_runs_offline_without_asking(tmp_path, few_pairs):
    """No login, no terminal: the run ends by itself and leaves an offline W&B run with the samples table."""
    flags = flags_for(tmp_path / "run", few_pairs, "--max_samples", "8", "--report_to", "wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment.update(HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    options = {"env": environment, "timeout": 240, "stdin": subprocess.DEVNULL, "capture_output": True}
    subprocess.run([sys.executable, SCRIPT, *flags], check=True, **options)
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("run-*.wandb"))
    assert list(runs[0].rglob("samples*.table.json"))
