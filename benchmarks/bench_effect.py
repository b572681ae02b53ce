"""What ORPO changes on the miniature: held-out preference accuracy and AMBER's figures, base beside adapters.

Trains one adapter a seed with llava_orpo_training.py and lets llava_amber_validation_benchmark_with_lora.py put base and
adapter through miniature/amber: 240 captions and 2,281 yes/no answers each, over pictures that nothing was trained on.
Nouns are found by NLTK where its data are there or can be fetched, else in the vocabulary, which the tables then say.

    python benchmarks/bench_effect.py                       # three seeds
    python benchmarks/bench_effect.py --seeds 0 --output_dir outputs/demo
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SETTINGS = "--epochs 3 --batch_size 16 --gradient_accumulation_steps 1 --learning_rate 1e-3 --beta 0.5 --gradient_checkpointing off"
TITLES = {
    "accuracy": "preference accuracy ↑",
    "chair": "CHAIR ↓",
    "cover": "Cover ↑",
    "hal": "Hal ↓",
    "cog": "Cog ↓",
    "f1": "discriminative F1 ↑",
    "amber_score": "AMBER score ↑",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one adapter is trained for each")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "effect", help="where the runs go")
    parser.add_argument("--settings", default=SETTINGS, help=f"flags of the training script (default: {SETTINGS})")
    parser.add_argument("--figure", type=Path, help="where the picture goes (default: effect.png in --output_dir)")
    return parser.parse_args(argv)


def pick_nouns() -> str:
    """How nouns are found here: `nltk` if its data are there or come within 20 seconds, else `vocabulary`."""
    import nltk

    for attempt in range(2):
        try:
            nltk.stem.WordNetLemmatizer().lemmatize(nltk.pos_tag(nltk.word_tokenize("Two dogs."))[1][0])
            return "nltk"
        except LookupError:
            fetch = [
                sys.executable,
                "-m",
                "nltk.downloader",
                "-q",
                "punkt_tab",
                "averaged_perceptron_tagger_eng",
                "wordnet",
            ]
            with contextlib.suppress(subprocess.TimeoutExpired):
                if not attempt:
                    subprocess.run(fetch, timeout=20, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return "vocabulary"


def read_figures(summary: dict, accuracy: float) -> dict[str, float]:
    """The figures of TITLES from one side of scores.json and from the training's summary."""
    strict = summary["strict"]
    f1, score = strict["discriminative"]["f1"], summary["amber_score"]
    return {"accuracy": 100 * accuracy, **strict["generative"], "f1": f1, "amber_score": score}


def draw_effect(figures: dict, path: Path) -> None:
    """Draw base beside adapters: a bar for each, a dot a seed; `figures` is what main prints as JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 5, figsize=(13, 3.2), layout="constrained")
    for axis, key in zip(axes, ("accuracy", "chair", "hal", "cover", "f1"), strict=True):
        values = figures[key]
        bars = axis.bar(["base", "ORPO"], [values["base"], values["mean"]], color=["#9aa5b1", "#1b7837"], width=0.6)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.plot([1] * len(values["runs"]), values["runs"], "o", color="black", ms=3.5, alpha=0.6)
        axis.set_ylim(0, 1.18 * max(values["base"], *values["runs"]))
        axis.set_title(TITLES[key], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    args = parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    import llava_amber_validation_benchmark_with_lora as amber
    import llava_orpo_training as training

    base, runs, nouns = {}, [], pick_nouns()
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        flags = f"--test_mode --resume --seed {seed} --report_to none {args.settings} --output_dir"
        print(f"\npython llava_orpo_training.py {flags} {folder}\n", file=sys.stderr)
        training.main([*flags.split(), str(folder)])  # a finished run is left as it is, other settings are refused
        flags = f"--test_mode --compare_base --batch_size 40 --nouns {nouns} --lora_path"
        answers = folder / "amber" / "results.json"
        print(f"\npython {Path(amber.__file__).name} {flags} {folder} --output_file {answers}\n", file=sys.stderr)
        amber.main([*flags.split(), str(folder), "--output_file", str(answers)])
        summary = json.loads((folder / "training_summary.json").read_text())
        scores = json.loads((answers.parent / "scores.json").read_text())
        base = read_figures(scores["comparison"]["base"], summary["before"]["eval_rewards/accuracies"])
        runs.append(read_figures(scores["comparison"]["this"], summary["after"]["eval_rewards/accuracies"]))

    spread = {}
    table = Table(f"%, nouns: {nouns}", "base", *(f"seed {seed}" for seed in args.seeds), "mean ± sd")
    for key, title in TITLES.items():
        values = [run[key] for run in runs]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        spread[key] = {"base": base[key], "runs": values, "mean": statistics.mean(values), "sd": sd}
        shown = [f"{value:.1f}" for value in (base[key], *values)]
        table.add_row(title, *shown, f"{spread[key]['mean']:.1f} ± {sd:.1f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    last = args.output_dir / f"seed{args.seeds[-1]}"
    figure = args.figure or args.output_dir / "effect.png"
    draw_effect(spread, figure)
    print(f"look at {figure} and, in {last}, at samples.html, training_curves.png and amber/gallery.html")
    print(json.dumps({"benchmark": "effect", "settings": args.settings, "seeds": args.seeds, "nouns": nouns, **spread}))


if __name__ == "__main__":
    main()
