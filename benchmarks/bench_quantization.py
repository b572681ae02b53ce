"""What merging and quantizing change on AMBER: base, base + adapter, merged, FP8, INT8, and the size of each.

Base and base + adapter answer in transformers, the others in vLLM (the Python of its environment: --vllm_python). Checkpoints
and answers that are in --output_dir already are used again. Ends with one line of JSON.

    python benchmarks/bench_quantization.py                # the miniature, on the CPU
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCHEMES = {"merged": "BF16", "FP8": "FP8_DYNAMIC", "INT8": "W8A8"}
FIGURES = ["chair", "cover", "hal", "cog"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "outputs" / "quantization", help="checkpoints and answers"
    )
    parser.add_argument(
        "--vllm_python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), help="Python that has vLLM"
    )
    parser.add_argument("--limit", type=int, default=240, help="captions (default: 240, all of the miniature's)")
    parser.add_argument(
        "--nouns", default="vocabulary", choices=["nltk", "vocabulary"], help="how AMBER's script finds nouns"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    miniature = ROOT / "miniature"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # vLLM starts sooner

    def run(python, script, *flags):
        subprocess.run([str(python), str(ROOT / script), *map(str, flags)], check=True, env=environment)

    def ask(python, name, *flags):
        """A checkpoint's scores on AMBER's generative task, %."""
        answers = args.output_dir / f"amber_{name}" / "results.json"
        run(python, "llava_amber_validation_benchmark_with_lora.py", "--test_mode", "--evaluation_type", "g",
            "--limit", args.limit, "--nouns", args.nouns, "--batch_size", 40, "--output_file", answers, *flags)  # fmt: skip
        scores = json.loads((answers.parent / "scores.json").read_text())["strict"]["generative"]
        return {figure: scores[figure] for figure in FIGURES}

    base = (miniature / "model" / "model.safetensors").stat().st_size
    adapter = (miniature / "adapter" / "adapter_model.safetensors").stat().st_size
    rows = {
        "base": {**ask(sys.executable, "base"), "bytes": base},
        "base + adapter": {
            **ask(sys.executable, "adapter", "--lora_path", miniature / "adapter"),
            "bytes": base + adapter,
        },
    }
    for name, scheme in SCHEMES.items():
        folder = args.output_dir / scheme
        if not folder.exists():
            run(sys.executable, "llava_quantize_vllm.py", "--test_mode", "--scheme", scheme, "--output_dir", folder)
        report = json.loads((folder / "quantization_report.json").read_text())
        figures = ask(args.vllm_python, scheme, "--backend", "vllm", "--model_path", folder)
        rows[name] = {**figures, "bytes": report["size_bytes"]["quantized"], "kl": report["quality"]["kl"]}
    print(f"{'':16}" + "".join(f"{figure:>8}" for figure in FIGURES) + f"{'MB':>8}{'KL':>10}")
    for name, row in rows.items():
        kl = f"{row['kl']:10.5f}" if "kl" in row else ""
        print(f"{name:16}" + "".join(f"{row[figure]:8.1f}" for figure in FIGURES) + f"{row['bytes'] / 1e6:8.2f}{kl}")
    print(json.dumps({"captions": args.limit, **rows}))


if __name__ == "__main__":
    main()
