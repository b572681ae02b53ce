"""The whole chain at the 7B model's real size, on the CPU, to find what works on the miniature and breaks at this size.

A random checkpoint of LLaVA-1.6-Mistral-7B's exact shapes is written. On it, the scripts' own command lines train a
QLoRA adapter for one step with its preflight, answer with and without that adapter, and merge and quantize both to FP8; vLLM
reads the result's configuration. The time and the peak memory of each step are printed, and the training's memory beside
what bench_memory.py accounts for. This needs 24 GB of memory, 30 GB of disk, and an hour and a half on two cores. A step
that is done is not done again when the command is repeated. It ends with one line of JSON.

    python benchmarks/real_size.py
    python benchmarks/real_size.py --layers 1 --work_dir /tmp/quick    # a language model of one layer, in a few minutes
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

GB = 1e9
MEMORY, DISK = 20, 30  # GB that must be free
PICTURE = ROOT / "miniature" / "amber" / "image" / "scene_900000.webp"
TRAINING = "one QLoRA step"
BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bench_quantization import build_random_llava
build_random_llava(Path(sys.argv[2]), layers=int(sys.argv[3]))
"""
CONFIGURE = """
import sys
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=sys.argv[1]).create_engine_config()
model, quantization = config.model_config, type(config.quant_config).__name__
print(f"vLLM accepts {model.architecture}, {model.quantization} ({quantization}), {model.dtype}, {model.max_model_len:,} tokens")
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag, help, **options):
        shown = options.get("default")
        parser.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    add("--work_dir", "folder for everything that is made; delete it afterwards", type=Path, default=Path("real_size"))
    add("--fresh", "run every step again, in place of what is in --work_dir", action="store_true")
    add("--layers", "layers of the language model; fewer make a quick try", type=int, default=32)
    pairs = ROOT / "miniature" / "preferences" / "train.parquet"
    add("--dataset", "preference pairs, the first of which is trained on", type=Path, default=pairs)
    add("--vllm_python", "the Python that has vLLM", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    return parser.parse_args(argv)


def check_room(work_dir: Path, layers: int) -> None:
    """Say what the run needs, and stop if the machine has less memory or disk."""
    import psutil

    share = (layers + 6) / 38  # the vision tower and the vocabulary are as large as six layers in float32
    needs = {"memory": share * MEMORY, "disk": share * DISK}
    free = {"memory": psutil.virtual_memory().available, "disk": shutil.disk_usage(work_dir).free}
    print(f"real size: {layers} layers need {needs['memory']:.0f} GB of free memory, {needs['disk']:.0f} GB of disk in "
          f"{work_dir}, and about {90 * share:.0f} minutes on two cores", file=sys.stderr)  # fmt: skip
    for kind, needed in needs.items():
        if free[kind] < needed * GB:
            sys.exit(f"error: {free[kind] / GB:.1f} GB of {kind} are free, and this needs {needed:.0f} GB.")


def list_steps(args) -> dict[str, tuple[Path, list]]:
    """Return the steps in order, each with the folder that it writes, or None, and its command."""
    base, adapter, fp8 = (args.work_dir / name for name in ("base", "adapter", "fp8"))

    def script(name, *flags):
        return [sys.executable, ROOT / name, "--model_path", base, *flags]

    train = "--load_4bit --max_samples 1 --eval_fraction 0 --epochs 1 --batch_size 1 --gradient_accumulation_steps 1"
    # With a warmup, the first step's learning rate would be zero. A CPU does not run out of memory, it ends the process,
    # so that preflight cannot find out how many layers to recompute. With --max_length, it tries the pair itself, of 1,200
    # tokens, in place of the longest possible pair of 3,000, which saves a quarter of an hour.
    train += " --learning_rate 1e-3 --warmup_ratio 0 --gradient_checkpointing on --max_length 1500"
    train += " --num_workers 0 --report_to none"
    question = ["--question", "Describe this image.", "--max_new_tokens", "8"]
    return {
        "random checkpoint": (base, [sys.executable, "-c", BUILD, ROOT / "benchmarks", base, args.layers]),
        TRAINING: (adapter, script("llava_orpo_training.py", "--dataset", args.dataset, "--output_dir", adapter,
                                 *train.split())),
        "two answers of 8 tokens": (None, script("llava_gradio_lora_host.py", "--load_4bit", "--device", "cpu", "--lora_path",
                                                 adapter, "--image", PICTURE, *question)),
        "merged and quantized": (fp8, script("llava_quantize_vllm.py", "--lora_path", adapter, "--gate_samples", "0",
                                             "--output_dir", fp8)),
        "configured by vLLM": (None, [args.vllm_python, "-c", CONFIGURE, fp8]),
    }  # fmt: skip


def run_steps(args) -> dict[str, dict]:
    """Run the steps that have not been run; return each one's seconds and memory, as bench_quantization.watch does."""
    from bench_quantization import watch

    log = args.work_dir / "steps.json"
    done = json.loads(log.read_text()) if log.exists() else {}
    for name, (output, command) in list_steps(args).items():
        if name in done:
            print(f"{name}: done before", file=sys.stderr)
            continue
        if not Path(command[0]).exists():
            print(f"{name}: skipped, since there is no {command[0]}; make .venv-vllm/done makes it", file=sys.stderr)
            continue
        print(f"{name} ...", file=sys.stderr)
        if output:
            shutil.rmtree(output, ignore_errors=True)  # left by a run that broke off
        figures = watch([str(part) for part in command])
        if figures["exit_code"]:
            sys.exit(f"error: {name} ended with exit code {figures['exit_code']}; the same command goes on from there.")
        size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) if output else None
        done[name] = figures | {"output_bytes": size}
        log.write_text(json.dumps(done, indent=1))
    return done


def account_training(command: list) -> dict[str, int]:
    """Return the tokens of the pair on which `command`, the training's, tries the memory in preflight, and the bytes that
    bench_memory.py accounts for in a step on it: as on a GPU in bfloat16, and as here in float32."""
    import bench_memory

    import llava_orpo_training as training

    flags = training.parse_args([str(part) for part in command[2:]])
    processor = training.read_checkpoint(flags.model_path)[1]
    pair = training.make_pairs(flags, training.load_rows(flags.dataset), processor)[0].longest()
    kept = len(pair["chosen"]) + len(pair["rejected"])
    case = "7b", True, 1, len(pair["prompt"]) + kept, kept
    accounted = {kind: bench_memory.account(*case, on_cpu=kind == "float32") for kind in ("bfloat16", "float32")}
    return {"tokens": case[3], **accounted}


def print_table(steps: dict[str, dict], accounted: dict | None) -> None:
    """Print each step's time and memory, and how the training's memory differs from what is accounted for."""
    print(f"{'':24}{'minutes':>9}{'own GB':>9}{'resident GB':>13}{'written GB':>12}")
    for name, step in steps.items():
        written = f"{step['output_bytes'] / GB:12.2f}" if step["output_bytes"] else ""
        own, resident = step["own_bytes"] / GB, step["resident_bytes"] / GB
        print(f"{name:24}{step['seconds'] / 60:9.1f}{own:9.1f}{resident:13.1f}{written}")
    if accounted:
        found, single, half = (
            size / GB for size in (steps[TRAINING]["own_bytes"], accounted["float32"], accounted["bfloat16"])
        )
        print(f"""
bench_memory.py accounts for {half:.1f} GB in a QLoRA step on {accounted["tokens"]:,} tokens on a GPU. On a CPU, what is not in 4 bits is in
float32 in place of bfloat16, which makes {single:.1f} GB. The process had {found:.1f} GB of its own, {found - single:+.1f} GB: Python and its
packages, and freed blocks that the C library's malloc keeps, which a GPU's allocator would use again. Resident memory
includes the pages of mapped files, which are the checkpoint; the system takes them back when it needs them.""")


def main(argv=None):
    args = parse_args(argv)
    if args.fresh:
        (args.work_dir / "steps.json").unlink(missing_ok=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if not (args.work_dir / "steps.json").exists():  # otherwise some of the disk is used already
        check_room(args.work_dir, args.layers)
    steps = run_steps(args)
    accounted = account_training(list_steps(args)[TRAINING][1]) if args.layers == 32 else None
    print_table(steps, accounted)
    print(f"to delete what was made: rm -r {args.work_dir}", file=sys.stderr)
    print(json.dumps({"benchmark": "real_size", "layers": args.layers, "steps": steps, "accounted": accounted}))


if __name__ == "__main__":
    main()
