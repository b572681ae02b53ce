"""What ORPO changes on the miniature: held-out preference accuracy and captions of unseen pictures, base beside adapters.

Trains one adapter a seed with llava_orpo_training.py, lets base and adapters caption the pictures of miniature/amber
(greedy), and counts the objects they name: CHAIR (named and absent / named), Cover (present and named / present), Hal
(captions with anything absent), all in percent. Names are looked up in the miniature's own closed vocabulary, which needs
no tagger; these are not the official AMBER scorer's figures.

    python benchmarks/bench_effect.py                       # three seeds
    python benchmarks/bench_effect.py --seeds 0 --output_dir outputs/demo
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SETTINGS = "--epochs 3 --batch_size 16 --gradient_accumulation_steps 1 --learning_rate 1e-3 --beta 0.5 --no-gradient_checkpointing"
TITLES = {
    "accuracy": "preference accuracy, %",
    "CHAIR": "CHAIR, % (absent of named)",
    "Cover": "Cover, % (named of present)",
    "Hal": "Hal, % (captions with any absent)",
    "absent": "absent objects named",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one adapter is trained for each")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "effect", help="where the runs go")
    parser.add_argument("--settings", default=SETTINGS, help=f"flags of the training script (default: {SETTINGS})")
    parser.add_argument("--figure", type=Path, help="where the picture goes (default: effect.png in --output_dir)")
    return parser.parse_args(argv)


def caption_figures(answers: dict[int, str], annotations: list[dict], associations: dict[str, list[str]]) -> dict:
    """CHAIR, Cover and Hal in percent, and absent objects named in all; `answers` maps a query's id to its caption."""
    forms = {}
    for word in associations:
        forms.update({word: word, word + "s": word, word + "es": word})
    named = absent = covered = present = faulty = 0
    for note in annotations:
        if note["id"] not in answers:
            continue
        said = [forms[word] for word in re.findall(r"[a-z]+", answers[note["id"]].lower()) if word in forms]
        wrong = [word for word in said if word not in note["truth"]]
        named, absent, faulty = named + len(said), absent + len(wrong), faulty + bool(wrong)
        covered, present = covered + len(set(said) & set(note["truth"])), present + len(set(note["truth"]))
    return {
        "CHAIR": 100 * absent / max(named, 1),
        "Cover": 100 * covered / present,
        "Hal": 100 * faulty / len(answers),
        "absent": absent,
    }


def caption_pictures(model, processor) -> dict:
    """Caption every picture of miniature/amber greedily; returns caption_figures of the captions."""
    from llava_orpo_training import generate_answers, load_image

    folder = ROOT / "miniature" / "amber"
    queries = json.loads((folder / "query" / "query_generative.json").read_text())
    answers = {}
    for start in range(0, len(queries), 40):
        part = queries[start : start + 40]
        images = [load_image(folder / "image" / query["image"]) for query in part]
        texts = generate_answers(model, processor, images, [query["query"] for query in part], max_new_tokens=96)
        answers |= {query["id"]: text for query, text in zip(part, texts, strict=True)}
    annotations = json.loads((folder / "annotations.json").read_text())
    return caption_figures(answers, annotations, json.loads((folder / "relation.json").read_text()))


def draw_effect(figures: dict, path: Path) -> None:
    """Draw base beside adapters: a bar for each, a dot a seed; `figures` is what main prints as JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = {
        "accuracy": "higher is better",
        "CHAIR": "lower is better",
        "Hal": "lower is better",
        "Cover": "higher is better",
    }
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    for axis, (key, direction) in zip(axes, wanted.items(), strict=True):
        values = figures[key]
        bars = axis.bar(["base", "ORPO"], [values["base"], values["mean"]], color=["#9aa5b1", "#1b7837"], width=0.6)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.plot([1] * len(values["runs"]), values["runs"], "o", color="black", ms=3.5, alpha=0.6)
        axis.set_ylim(0, 1.18 * max(values["base"], *values["runs"]))
        axis.set_title(f"{TITLES[key]}\n{direction}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    args = parse_args(argv)
    from peft import PeftModel
    from rich.console import Console
    from rich.table import Table

    import llava_orpo_training as training

    model, processor = training.load_llava(str(ROOT / "miniature" / "model"))
    base, runs = caption_pictures(model, processor), []
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        flags = f"--test_mode --resume --seed {seed} --report_to none {args.settings} --output_dir"
        print(f"\npython llava_orpo_training.py {flags} {folder}\n", file=sys.stderr)
        training.main([*flags.split(), str(folder)])  # a finished run is left as it is, other settings are refused
        summary = json.loads((folder / "training_summary.json").read_text())
        base["accuracy"] = 100 * summary["before"]["eval_rewards/accuracies"]
        adapted = PeftModel.from_pretrained(model, folder).eval()
        runs.append(caption_pictures(adapted, processor))
        runs[-1]["accuracy"] = 100 * summary["after"]["eval_rewards/accuracies"]
        model = adapted.unload()

    table = Table("unseen pictures and held-out pairs", "base", *(f"seed {seed}" for seed in args.seeds), "mean ± sd")
    spread = {}
    for key, title in TITLES.items():
        values = [run[key] for run in runs]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        spread[key] = {"base": base[key], "runs": values, "mean": statistics.mean(values), "sd": sd}
        shown = [f"{value:.1f}" if key != "absent" else str(value) for value in (base[key], *values)]
        table.add_row(title, *shown, f"{spread[key]['mean']:.1f} ± {sd:.1f}" if len(values) > 1 else "")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    last = args.output_dir / f"seed{args.seeds[-1]}"
    figure = args.figure or args.output_dir / "effect.png"
    draw_effect(spread, figure)
    print(f"look at {figure}, {last}/samples.html and {last}/training_curves.png")
    print(json.dumps({"benchmark": "effect", "settings": args.settings, "seeds": args.seeds, **spread}))


if __name__ == "__main__":
    main()
