"""What merging and quantizing change on AMBER, and what quantizing a model of real size takes.

The miniature is measured as base, base + adapter, merged, FP8 and INT8. The first two answer in transformers, the others in
vLLM (--vllm_python). Checkpoints and answers that are in --output_dir are used again. With --size 7b, a random checkpoint of
LLaVA-1.6-Mistral-7B's exact shapes is written to $TMPDIR, quantized to FP8 and deleted, which needs 24 GB of disk, 10 GB of
memory and about twenty minutes on two cores. Both end with one line of JSON.

    python benchmarks/bench_quantization.py                # the miniature, on the CPU
    python benchmarks/bench_quantization.py --size 7b      # seconds, memory and output size at real size
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCHEMES = {"merged": "BF16", "FP8": "FP8_DYNAMIC", "INT8": "W8A8"}
FIGURES = ["chair", "cover", "hal", "cog"]
SHARD = 5_000_000_000  # bytes, as in the hub's checkpoint


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag, help, **options):
        shown = options.get("default")
        parser.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    add("--size", "the miniature's quality, or time and memory of the 7B model", choices=["mini", "7b"], default="mini")
    add("--output_dir", "checkpoints and answers", type=Path, default=ROOT / "outputs" / "quantization")
    add("--vllm_python", "the Python that has vLLM", default=str(ROOT / ".venv-vllm" / "bin" / "python"))
    add("--limit", "captions, of the miniature's 240", type=int, default=240)
    add("--nouns", "how AMBER's script finds nouns", default="vocabulary", choices=["nltk", "vocabulary"])
    return parser.parse_args(argv)


def build_random_llava(folder: Path, seed: int = 0, layers: int = 32) -> Path:
    """Write a random checkpoint of LLaVA-1.6-Mistral-7B's exact shapes in the hub's layout, and return its folder.

    It has 15.1 GB in bfloat16 and is written a shard at a time. The tokenizer is Mistral's, from mistral-common. Fewer
    `layers` of the language model make a smaller one.
    """
    sys.path.insert(0, str(ROOT))
    import torch
    from safetensors.torch import save_file
    from transformers import (
        LlamaTokenizer,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        MistralConfig,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from llava_quantize_vllm import name_in_hub

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(files("mistral_common") / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=336, image_grid_pinpoints=grid)
    LlavaNextProcessor(images, tokenizer, 14, "default", num_additional_image_tokens=1).save_pretrained(folder)
    text = MistralConfig(vocab_size=32064, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=32768,
                         rope_theta=1e6, sliding_window=None, bos_token_id=1, eos_token_id=2,
                         num_hidden_layers=layers)  # fmt: skip
    config = LlavaNextConfig(text_config=text, image_token_index=32000, image_grid_pinpoints=grid, dtype="bfloat16")
    config.architectures = ["LlavaNextForConditionalGeneration"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    torch.manual_seed(seed)
    shard, size, weight_map = {}, 0, {}

    def close_shard() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, place in model.state_dict().items():
        if size + 2 * place.numel() > SHARD:
            close_shard()
            size = 0
        # norms keep the scale of what passes through them, as in a trained model
        weight = (
            torch.ones(place.shape) if "norm" in name and name.endswith("weight") else 0.02 * torch.randn(place.shape)
        )
        shard[name_in_hub(name)] = weight.to(torch.bfloat16)
        size += 2 * place.numel()
    close_shard()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def watch(command: list[str]) -> dict:
    """Run a command and return its seconds, exit code, and greatest memory in bytes: resident, and of that its own, which
    leaves out the pages of mapped files, since the system takes those back when it needs memory."""
    import psutil

    started, resident, own = time.monotonic(), 0, 0
    process = psutil.Popen(command)
    while process.poll() is None:
        try:
            memory = process.memory_info()
            resident, own = max(resident, memory.rss), max(own, memory.rss - memory.shared)
        except psutil.Error:  # it has just ended
            break
        time.sleep(0.05)
    return {"seconds": round(time.monotonic() - started, 1), "exit_code": process.wait(), "resident_bytes": resident,
            "own_bytes": own}  # fmt: skip


def measure_7b() -> dict:
    """Quantize a random 7B model in a process of its own; return its time, memory and sizes."""
    with tempfile.TemporaryDirectory(prefix="llava_7b_") as folder:
        print("writing a random LLaVA-1.6-Mistral-7B of 15.1 GB", file=sys.stderr)
        base, output = build_random_llava(Path(folder) / "base"), Path(folder) / "fp8"
        figures = watch([sys.executable, str(ROOT / "llava_quantize_vllm.py"), "--model_path", str(base), "--gate_samples",
                         "0", "--output_dir", str(output)])  # fmt: skip
        if figures["exit_code"]:
            raise SystemExit(f"error: quantizing ended with exit code {figures['exit_code']}.")
        return figures | json.loads((output / "quantization_report.json").read_text())["size_bytes"]


def measure_miniature(args) -> dict:
    """Score the miniature on AMBER as base, base + adapter, merged, FP8 and INT8; print the table and return its rows."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # vLLM starts sooner

    def run(python, script, *flags):
        subprocess.run([str(python), str(ROOT / script), *map(str, flags)], check=True, env=environment)

    def ask(python, name, *flags):
        """Return a checkpoint's scores on AMBER's generative task, %."""
        answers = args.output_dir / f"amber_{name}" / "results.json"
        run(python, "llava_amber_validation_benchmark_with_lora.py", "--test_mode", "--evaluation_type", "g",
            "--limit", args.limit, "--nouns", args.nouns, "--batch_size", 40, "--output_file", answers, *flags)  # fmt: skip
        scores = json.loads((answers.parent / "scores.json").read_text())["strict"]["generative"]
        return {figure: scores[figure] for figure in FIGURES}

    miniature = ROOT / "miniature"
    base = (miniature / "model" / "model.safetensors").stat().st_size
    both = base + (miniature / "adapter" / "adapter_model.safetensors").stat().st_size
    adapted = ask(sys.executable, "adapter", "--lora_path", miniature / "adapter")
    rows = {"base": ask(sys.executable, "base") | {"bytes": base}, "base + adapter": adapted | {"bytes": both}}
    for name, scheme in SCHEMES.items():
        folder = args.output_dir / scheme
        if not folder.exists():
            run(sys.executable, "llava_quantize_vllm.py", "--test_mode", "--scheme", scheme, "--output_dir", folder)
        report = json.loads((folder / "quantization_report.json").read_text())
        figures = ask(args.vllm_python, scheme, "--backend", "vllm", "--model_path", folder)
        rows[name] = figures | {"bytes": report["size_bytes"]["quantized"], "kl": report["quality"]["kl"]}
    print(f"{'':16}" + "".join(f"{figure:>8}" for figure in FIGURES) + f"{'MB':>8}{'KL':>10}")
    for name, row in rows.items():
        kl = f"{row['kl']:10.5f}" if "kl" in row else ""
        print(f"{name:16}" + "".join(f"{row[figure]:8.1f}" for figure in FIGURES) + f"{row['bytes'] / 1e6:8.2f}{kl}")
    return {"captions": args.limit, **rows}


def main(argv=None):
    args = parse_args(argv)
    print(json.dumps(measure_7b() if args.size == "7b" else measure_miniature(args)))


if __name__ == "__main__":
    main()
