"""How a run starts and goes on: --help at once, a set of RLAIF-V's size soon at its first step, memory flat over 2,000."""

import importlib
import io
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import MINIATURE, ROOT
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

import llava_orpo_training as training

FIRST_STEP_SECONDS = 60
FLAT_BYTES = 8e6  # between steps 300 and 2,000: a leak of 5 kB a step is found


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("llava_*.py")))
def test_help_answers_at_once(script):
    def seconds() -> float:
        started = time.perf_counter()
        shown = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        assert shown.stdout.startswith(f"usage: {script}")
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 1.5


COMMANDS = """\
llava_orpo_training --output_dir run --epochs 3 --batch_size 4 --lora_rank 8 --gradient_accumulation_steps 8
llava_orpo_training --output_dir run --wandb_project project --wandb_entity team --test_mode
llava_amber_validation_benchmark_with_lora --model_path base --lora_path adapter --query_file miniature/amber/query/query_all.json --image_dir . --output_file results.json
llava_amber_validation_benchmark_with_lora --query_file miniature/amber/query/query_all.json --output_file results.json --skip_inference
llava_amber_validation_benchmark_with_lora --query_file miniature/amber/query/query_all.json --image_dir . --output_file results.json --skip_evaluation
llava_gradio_lora_host --model_path base --lora_path adapter --device cuda --load_8bit
llava_gradio_lora_host --model_path base --lora_path adapter --device cpu --load_4bit
llava_quantize_vllm
llava_gradio_lora_host_quantized --model_path quantized --tensor_parallel_size 2 --max_num_seqs 8 --temperature 0.5 --max_tokens 100
"""


@pytest.mark.parametrize("command", COMMANDS.splitlines())
def test_the_published_commands_are_understood(command, monkeypatch):
    """The flags by which these scripts are known elsewhere."""
    monkeypatch.chdir(ROOT)
    script, *flags = command.split()
    importlib.import_module(script).parse_args(flags)


def write_pairs(path, n: int, words: tuple[int, int], distinct: int, size: tuple[int, int]) -> None:
    """A parquet of `n` pairs with columns of RLAIF-V's: five to a picture, `distinct` texts and pictures, responses of `words`
    from the miniature's captions."""
    choose, rng = random.Random(0), np.random.default_rng(0)
    captions = pq.read_table(MINIATURE / "preferences" / "train.parquet", columns=["chosen"])["chosen"].to_pylist()
    known = sorted({word for caption in captions for word in caption.split()})
    pictures = []
    for _ in range(min(distinct, 150)):
        buffer = io.BytesIO()
        tiny = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        tiny.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    texts = [[" ".join(choose.choices(known, k=choose.randint(*words))) for words in ((12, 18), words, words)]
             for _ in range(distinct)]  # fmt: skip

    def make_row(i: int) -> dict:
        question, chosen, rejected = texts[i % distinct]
        image = {"bytes": pictures[i // 5 % len(pictures)], "path": f"{i // 5}.jpg"}
        row = {"image": image, "question": question, "chosen": f"{chosen} {i % distinct}.", "rejected": f"{rejected}."}
        return row | {"ds_name": "generated", "origin_split": "{}", "idx": str(i), "image_path": f"{i // 5}.jpg"}

    with pq.ParquetWriter(path, pa.Table.from_pylist([make_row(0)]).schema) as writer:
        for start in range(0, n, 2000):
            writer.write_table(pa.Table.from_pylist([make_row(i) for i in range(start, min(start + 2000, n))]))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """The miniature's processor, and a random model of its sizes with one layer in either tower: 50 steps a second."""
    folder = tmp_path_factory.mktemp("one_layer") / "model"
    shutil.copytree(MINIATURE / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlavaNextConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    config.vision_feature_layer = -1
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    return folder


class FirstStepReached(Exception):
    """Ends a run after its first optimizer step."""


@pytest.mark.slow
def test_a_set_of_rlaif_vs_size_reaches_its_first_step_soon(tmp_path, one_layer, monkeypatch):
    """With every flag of the training at its default; the evaluation before the first step counts."""
    write_pairs(tmp_path / "pairs.parquet", 83132, (80, 120), 20000, (96, 72))
    load_llava, seen = training.load_llava, {}

    def load(*args, **options):
        loaded = load_llava(*args, **options)
        seen["loaded"] = time.perf_counter()
        return loaded

    def end(self, args, state, control, **kwargs):
        seen["stepped"], seen["step"] = time.perf_counter(), state.global_step
        seen["evaluated"] = any("eval_loss" in row for row in training.read_jsonl(self.output_dir / "metrics.jsonl"))
        raise FirstStepReached

    monkeypatch.setattr(training, "load_llava", load)
    monkeypatch.setattr(training.RunRecorder, "on_step_end", end)
    with pytest.raises(FirstStepReached):
        training.main(["--model_path", str(one_layer), "--dataset", str(tmp_path / "pairs.parquet"),
                       "--output_dir", str(tmp_path / "run"), "--report_to", "none"])  # fmt: skip
    assert seen["step"] == 1 and seen["evaluated"]
    assert seen["stepped"] - seen["loaded"] < FIRST_STEP_SECONDS


@pytest.mark.slow
def test_memory_is_flat_over_2000_steps(tmp_path, one_layer):
    """Of the process and its data loader's worker together. 200 texts come again and again: the tokenizer keeps up to
    10,000 that it met, which is no leak."""
    write_pairs(tmp_path / "pairs.parquet", 2000, (5, 10), 200, (56, 56))
    command = [sys.executable, str(ROOT / "llava_orpo_training.py"), "--model_path", str(one_layer),
               "--dataset", str(tmp_path / "pairs.parquet"), "--output_dir", str(tmp_path / "run"), "--eval_fraction", "0",
               "--batch_size", "1", "--gradient_accumulation_steps", "1", "--num_workers", "1", "--report_to", "none",
               "--lora_target_modules", "q_proj", "--gradient_checkpointing", "off", "--save_steps", "100000"]  # fmt: skip
    used, metrics = {}, tmp_path / "run" / "metrics.jsonl"  # {step: bytes}
    with (tmp_path / "log").open("w") as log:
        process = psutil.Popen(command, stdout=log, stderr=log)
    while process.poll() is None:
        time.sleep(0.1)
        step = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if 0 < step < 2000:
            try:
                running = [process, *process.children(recursive=True)]
                used[step] = sum(one.memory_info().rss for one in running), len(running)
            except psutil.NoSuchProcess:  # ended between the two lines above
                continue
    assert process.wait() == 0, (tmp_path / "log").read_text()[-2000:]
    assert metrics.read_bytes().count(b"\n") == 2000
    early = [size for step, (size, running) in used.items() if 300 <= step < 500 and running > 1]
    late = [size for step, (size, running) in used.items() if step >= 1800 and running > 1]
    assert len(early) > 5 and len(late) > 5
    assert np.median(late) - np.median(early) < FLAT_BYTES
