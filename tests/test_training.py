"""The training script run whole: what it writes, that it resumes, and that it stops where it should."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import psutil
import pytest
import torch
from conftest import MINIATURE, ROOT
from peft import PeftModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration

import llava_orpo_training as training

SCRIPT = str(ROOT / "llava_orpo_training.py")
SMALL = ["--test_mode", "--report_to", "none", "--batch_size", "4", "--gradient_accumulation_steps", "2"]
SMALL += ["--learning_rate", "1e-3", "--gradient_checkpointing", "off", "--num_workers", "0"]


@pytest.fixture(scope="session")
def few_pairs(tmp_path_factory):
    """A folder with 49 pairs of the miniature to train on and 10 held out."""
    folder = tmp_path_factory.mktemp("few_pairs")
    for split, n in (("train", 49), ("test", 10)):  # 49: one pair does not fill a step of 8
        rows = datasets.load_dataset(
            "parquet", data_files=str(MINIATURE / "preferences" / f"{split}.parquet"), split="train"
        )
        rows.select(range(n)).to_parquet(folder / f"{split}.parquet")
    return folder


def run(folder, data, *flags):
    training.main(
        [
            "--model_path",
            str(MINIATURE / "model"),
            "--dataset",
            str(data),
            "--output_dir",
            str(folder),
            *SMALL[1:],
            *flags,
        ]
    )
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_pairs):
    return run(tmp_path_factory.mktemp("run") / "finished", few_pairs, "--epochs", "2", "--save_steps", "2")


def losses(folder) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in training.read_jsonl(folder / "metrics.jsonl") if "loss" in row}


def test_files_and_keys(finished, few_pairs):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "metrics.jsonl", "samples.html",
                     "samples.jsonl", "training_curves.png", "training_summary.json", "dropped_rows.jsonl",
                     "arguments.json", "checkpoint-12"}  # fmt: skip
    assert not [name for name in names if "partial" in name]
    summary = json.loads((finished / "training_summary.json").read_text())
    assert summary["steps"] == 12 and summary["arguments"]["lora_rank"] == 16
    assert (
        summary["data"]["train_pairs"] == 48
        and summary["data"]["eval_pairs"] == 10
        and summary["data"]["dropped"] == {}
    )
    assert len(summary["data"]["fingerprint"]) == 64 and summary["peak_memory_bytes"] > 1e8
    assert summary["versions"]["trl"] == "1.16.0"
    test = datasets.load_dataset("parquet", data_files=str(few_pairs / "test.parquet"), split="train")
    shorter = [len(row["chosen"].split()) < len(row["rejected"].split()) for row in test]
    assert summary["data"]["shorter_is_chosen"] == sum(shorter) / 10
    assert summary["before"]["step"] == 0 and summary["after"]["step"] == 12
    assert summary["after"]["eval_nll_loss"] < summary["before"]["eval_nll_loss"]
    rows = training.read_jsonl(finished / "metrics.jsonl")
    assert list(losses(finished)) == list(range(1, 13))
    trl_names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
                 "logits/chosen", "logits/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen"}  # fmt: skip
    for row in rows:
        prefix = "eval_" if "eval_loss" in row else ""
        assert {prefix + name for name in trl_names} <= set(row)
    card = (finished / "README.md").read_text()
    assert (
        f"| {summary['before']['eval_rewards/accuracies']:.4f} | {summary['after']['eval_rewards/accuracies']:.4f} |"
        in card
    )


def test_samples_stand_beside_chosen_and_rejected(finished, few_pairs):
    page = (finished / "samples.html").read_text()
    held_out = datasets.load_dataset("parquet", data_files=str(few_pairs / "test.parquet"), split="train")
    evaluations = training.read_jsonl(finished / "samples.jsonl")
    assert [evaluation["step"] for evaluation in evaluations] == [0, 6, 12]
    for i in range(4):
        assert held_out[i]["chosen"] in page and held_out[i]["rejected"] in page
        assert all(evaluation["answers"][i] in page for evaluation in evaluations)
    assert page.count("data:image/png;base64,") == 4


def test_the_adapter_may_be_read_by_whom_its_card_may(finished):
    assert len({(finished / name).stat().st_mode for name in ("adapter_model.safetensors", "README.md")}) == 1


def test_the_adapter_loads_on_an_untouched_base_and_moves_it(finished):
    keys = load_file(finished / "adapter_model.safetensors")
    assert len(keys) == 2 * 4 * 7 and all("language_model" in key and "lora_" in key for key in keys)
    base = LlavaNextForConditionalGeneration.from_pretrained(MINIATURE / "model", dtype=torch.float32)
    rows = base.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[1, 5, 300, 400]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, finished)
        after = adapted(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-2
    assert adapted.get_input_embeddings().weight.shape[0] == rows


def test_an_unbroken_run_is_not_written_over(finished, few_pairs, capsys):
    before = (finished / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        run(finished, few_pairs)
    assert "holds an earlier run; add --resume" in capsys.readouterr().err
    assert (finished / "adapter_model.safetensors").read_bytes() == before


def test_resume_refuses_other_settings(finished, few_pairs, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(finished, few_pairs, "--epochs", "2", "--save_steps", "2", "--resume", "--lora_rank", "8")
    assert "lora_rank was 16, is 8" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("step", [5, 7])  # resumes between evaluations, and from the one that ends an epoch
def test_a_killed_run_resumes_on_the_same_curve(step, tmp_path, finished, few_pairs):
    folder = tmp_path / "killed"
    command = [sys.executable, SCRIPT, "--model_path", str(MINIATURE / "model"), "--dataset", str(few_pairs),
               "--output_dir", str(folder), *SMALL[1:], "--epochs", "2", "--save_steps", "2"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(losses(folder)) < step and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    broken = folder / "checkpoint-99"  # a checkpoint whose writing the kill cut short
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')
    assert not (folder / "adapter_model.safetensors").exists()
    run(folder, few_pairs, "--epochs", "2", "--save_steps", "2", "--resume")
    assert losses(folder) == pytest.approx(losses(finished), abs=1e-6)
    assert [row["step"] for row in training.read_jsonl(folder / "samples.jsonl")] == [0, 6, 12]
    expected = load_file(finished / "adapter_model.safetensors")
    for name, weight in load_file(folder / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("steps", "code", "sentence"),
    [("2", 130, "interrupted; the same command with --resume continues"),
     ("2", 2, "a process that decodes pictures was killed: too little memory, or too little shared memory")],
)  # fmt: skip
def test_what_breaks_a_run_off_is_one_sentence(steps, code, sentence, tmp_path):
    """Ctrl+C, and the kernel's killing of a data loader's worker."""
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, SCRIPT, *SMALL, "--output_dir", str(folder), "--save_steps", steps, "--num_workers", "1",
               "--eval_samples", "8"]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        while len(losses(folder)) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        if code == 130:
            process.send_signal(signal.SIGINT)
        else:
            (worker,) = psutil.Process(process.pid).children()
            worker.kill()
        assert process.wait(timeout=120) == code
    finally:
        process.kill()
    lines = log.read_text().splitlines()  # a worker that was sending when its reader ended may complain below
    assert sum(line.startswith(f"error: {sentence}") for line in lines) == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    training.write_whole(tmp_path / "file", "before")
    monkeypatch.setattr(training.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        training.write_whole(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path, few_pairs, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "run", few_pairs, "--save_steps", "1", "--learning_rate", "1e6", "--epochs", "4")
    error = " ".join(capsys.readouterr().err.split())
    assert "the run has diverged" in error and "Traceback" not in error
    (kept,) = {word.rstrip(".") for word in error.split() if "checkpoint-" in word}
    weights = load_file(os.path.join(kept, "adapter_model.safetensors"))
    assert all(weight.isfinite().all() for weight in weights.values())
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("damage", ["rng_state.pth", "optimizer.pt", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(damage, tmp_path, finished, few_pairs, capsys):
    """In a run folder that was moved, too."""
    folder = tmp_path / "moved"
    shutil.copytree(finished, folder)
    (folder / "training_summary.json").unlink()
    file = folder / "checkpoint-12" / damage
    if damage == "rng_state.pth":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "optimizer.pt" else file.read_bytes()[:-100])
    run(folder, few_pairs, "--epochs", "2", "--save_steps", "2", "--resume")
    said = "".join(capsys.readouterr().err.split())
    assert "checkpoint-12isnotwhole" in said and f"continuingfrom{folder}/checkpoint-10" in said
    assert losses(folder) == pytest.approx(losses(finished), abs=1e-6)


def test_a_mistyped_layer_is_refused(tmp_path, few_pairs, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "run", few_pairs, "--lora_target_modules", "q_proj", "foo")
    assert "--lora_target_modules foo" in capsys.readouterr().err


def test_sigterm_leaves_a_checkpoint_and_a_second_run_is_refused(tmp_path, finished, few_pairs, capsys):
    folder = tmp_path / "run"
    command = [sys.executable, SCRIPT, "--model_path", str(MINIATURE / "model"), "--dataset", str(few_pairs),
               "--output_dir", str(folder), *SMALL[1:], "--epochs", "50", "--save_steps", "1000"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while len(losses(folder)) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(SystemExit, match="2"):
            run(folder, few_pairs, "--epochs", "50", "--save_steps", "1000", "--resume")
        assert "is being written by another run" in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 143 and error.splitlines()[-1].startswith("error: the run was told to end (SIGTERM)")
    assert training.last_checkpoint(folder) and not (folder / "training_summary.json").exists()


def test_the_loss_does_not_depend_on_how_pairs_are_batched(tmp_path, finished, few_pairs):
    """49 pairs at 8 a step: the one that does not fill a step is left out, however the others are batched."""
    for batch_size, steps in (("8", "1"), ("2", "4")):
        folder = run(tmp_path / batch_size, few_pairs, "--epochs", "1", "--save_steps", "100", "--batch_size", batch_size,
                     "--gradient_accumulation_steps", steps)  # fmt: skip
        assert len(losses(folder)) == 6
        first = run(tmp_path / f"{batch_size}-4", few_pairs, "--epochs", "1", "--save_steps", "100")
        assert losses(folder) == pytest.approx(losses(first), abs=1e-4)


def test_a_second_round_goes_on_with_the_first_ones_adapter(tmp_path, finished, few_pairs):
    first = json.loads((finished / "training_summary.json").read_text())
    folder = run(tmp_path / "second", few_pairs, "--lora_path", str(finished))
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary["before"]["eval_loss"] == pytest.approx(first["after"]["eval_loss"], abs=1e-5)
    assert summary["after"]["eval_loss"] != summary["before"]["eval_loss"]
    assert f"started from the adapter `{finished}`" in (folder / "README.md").read_text()
    before, after = (load_file(path / "adapter_model.safetensors") for path in (finished, folder))
    assert before.keys() == after.keys() and all(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("output_dir", "flags", "words"), [
    ("file/run", [], "cannot be written"), ("run", ["--lora_path", "no such adapter"], "--lora_path no such adapter"),
])  # fmt: skip
def test_what_cannot_work_is_one_sentence_before_the_model_is_loaded(
    output_dir, flags, words, tmp_path, few_pairs, capsys, monkeypatch
):
    monkeypatch.delattr(training, "load_llava")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / output_dir, few_pairs, *flags)
    assert words in capsys.readouterr().err


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


def test_a_finished_run_is_not_run_again(finished, few_pairs, capsys):
    before = (finished / "training_summary.json").read_bytes()
    run(finished, few_pairs, "--epochs", "2", "--save_steps", "2", "--resume")
    assert "is finished; there is nothing to resume" in " ".join(capsys.readouterr().err.split())
    assert (finished / "training_summary.json").read_bytes() == before


def test_two_processes_give_the_loss_of_one(tmp_path, finished, few_pairs):
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511", SCRIPT,
               "--model_path", str(MINIATURE / "model"), "--dataset", str(few_pairs), "--output_dir", str(folder), *SMALL[1:],
               "--epochs", "2", "--save_steps", "2", "--gradient_accumulation_steps", "1", "--lora_dropout", "0"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, timeout=300, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    one = run(tmp_path / "one", few_pairs, "--epochs", "2", "--save_steps", "2", "--lora_dropout", "0")
    assert losses(folder) == pytest.approx(losses(one), abs=1e-4)
    figures = [
        {(row["step"], name): value for row in training.read_jsonl(run_folder / "metrics.jsonl") for name, value in row.items()
         if name == "eval_loss" or name.startswith(("eval_rewards", "eval_logps", "eval_nll", "eval_log_odds"))}
        for run_folder in (folder, one)
    ]  # fmt: skip
    assert len(figures[1]) == 3 * 10 and figures[0] == pytest.approx(figures[1], abs=1e-4)


def test_qlora_on_the_cpu(tmp_path, few_pairs):
    """The NF4 base trains, also after an evaluation, which on the CPU once left weights without a gradient."""
    folder = run(
        tmp_path / "qlora", few_pairs, "--load_4bit", "--max_samples", "24", "--epochs", "2", "--save_steps", "2"
    )
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


def photo(width: int, height: int, seed: int) -> bytes:
    """A picture with a photo's size and smooth colours."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(200, 60, 40))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_photos_at_llavas_own_geometry(tmp_path, photo_llava):
    """Ten steps on photo-sized pictures: 336-pixel tiles, five grid shapes, Mistral's tokenizer, 2,340 image tokens."""
    sizes = [
        (640, 480),
        (480, 640),
        (640, 427),
        (427, 640),
        (500, 375),
        (640, 640),
        (640, 360),
        (333, 500),
        (612, 612),
        (900, 300),
    ]
    rows = [{
        "image": {"bytes": photo(*size, seed), "path": f"{seed}.jpg"}, "question": "Describe this image in detail.",
        "chosen": f"A red ball on a lawn, picture {seed}.", "rejected": f"A red ball and a dog on a lawn, picture {seed}, at night.",
    } for seed, size in enumerate(sizes)]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "photos.parquet")
    training.main([
        "--model_path", str(photo_llava), "--dataset", str(tmp_path / "photos.parquet"), "--output_dir", str(tmp_path / "run"),
        "--batch_size", "1", "--gradient_accumulation_steps", "1", "--eval_fraction", "0", "--report_to", "none",
        "--learning_rate", "1e-2", "--num_workers", "0",
    ])  # fmt: skip
    assert len(losses(tmp_path / "run")) == 10
    processor = training.load_llava(str(photo_llava), device="cpu")[1]
    tokens = [training.build_prompt(processor, "", size).count(32000) for size in sizes[:3]]
    assert tokens == [2340, 2352, 2144]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("blind", "another picture moves the chosen log-probability"),
        ("prompt_labels", "each response scores as it does alone"),
        ("frozen", "every trainable weight gets a gradient"),
        ("nan", "another picture moves the chosen log-probability"),
        ("shifted", "each response scores as it does alone"),
    ],
)
def test_preflight_stops_a_faulty_run(fault, sentence, tmp_path, few_pairs, monkeypatch, capsys):
    if fault == "blind":
        forward = training.LlavaORPOTrainer.concatenated_forward
        hide = lambda batch: {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}  # noqa: E731
        monkeypatch.setattr(
            training.LlavaORPOTrainer,
            "concatenated_forward",
            lambda self, model, batch: forward(self, model, hide(batch)),
        )
    elif fault == "prompt_labels":
        collate = training.collate_pairs

        def with_prompt(features, pad_token_id):
            features = [{**one, "chosen": one["prompt"][-3:] + one["chosen"]} for one in features]
            return collate(features, pad_token_id)

        monkeypatch.setattr(training, "collate_pairs", with_prompt)
    elif fault == "shifted":
        share = training.share_prefix

        def shifted(batch, *options):
            inputs = share(batch, *options)
            return {**inputs, "logits_to_keep": inputs["logits_to_keep"] - 1}

        monkeypatch.setattr(training, "share_prefix", shifted)
    else:
        adapt = training.add_adapter

        def spoilt(model, args):
            adapted = adapt(model, args)
            if fault == "nan":
                adapted.get_base_model().lm_head.weight.data.fill_(float("nan"))
            else:
                for name, weight in adapted.named_parameters():
                    if "vision_tower" in name and "layers.3" in name:
                        weight.requires_grad_(True)  # the features are taken one layer below
            return adapted

        monkeypatch.setattr(training, "add_adapter", spoilt)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "faulty", few_pairs)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: preflight failed: {sentence}") and "nothing was trained" in error
    assert not (tmp_path / "faulty" / "metrics.jsonl").exists()


def test_help_lists_every_flag():
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    for flag in ("--output_dir", "--epochs", "--batch_size", "--lora_rank", "--gradient_accumulation_steps", "--wandb_project",
                 "--wandb_entity", "--test_mode", "--resume", "--lora_path", "--load_4bit"):  # fmt: skip
        assert flag in shown


def test_test_mode_is_the_miniature_and_nothing_more():
    plain, test_mode = vars(training.parse_args([])), vars(training.parse_args(["--test_mode"]))
    assert {name for name in plain if plain[name] != test_mode[name]} == {"model_path", "dataset", "test_mode"}


def test_test_mode_leaves_what_is_given():
    args = training.parse_args(["--test_mode", "--dataset", "pairs.parquet"])
    assert args.dataset == "pairs.parquet" and args.model_path == str(MINIATURE / "model")


def test_wandb_runs_offline_without_asking(tmp_path, few_pairs):
    """No login, no terminal: the run ends by itself and leaves an offline W&B run with the samples table."""
    command = [sys.executable, SCRIPT, "--model_path", str(MINIATURE / "model"), "--dataset", str(few_pairs), *SMALL[3:],
               "--output_dir", str(tmp_path / "run"), "--max_samples", "8"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment.update(HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    subprocess.run(command, env=environment, timeout=240, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("run-*.wandb"))
    assert list(runs[0].rglob("samples*.table.json"))


@pytest.mark.parametrize("model_path", ["missing/model", "empty"])
def test_a_model_that_cannot_be_loaded_is_one_sentence(model_path, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        training.load_llava(str(tmp_path / model_path), device="cpu")
    assert capsys.readouterr().err.startswith("error: --model_path")
