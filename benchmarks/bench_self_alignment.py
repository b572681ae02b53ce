"""Alignment without labels on the miniature: rounds of pairs that the model makes itself, from the base and from an adapter.

In every round llava_amber_validation_benchmark_with_lora.py --write_pairs makes pairs about newly drawn pictures with the
adapter of the round before, llava_orpo_training.py trains on them from the start anew, and the result goes through
miniature/amber, whose pictures nothing is trained or tuned on. What is in the drawn pictures is read only to count the
errors of the check.

    python benchmarks/bench_self_alignment.py --seeds 0 --rounds 2 --starts base --weights 0.5 4 > frontier.json
    python benchmarks/bench_self_alignment.py --add frontier.json    # three seeds, three rounds, from both
"""

import argparse
import json
import shutil
import statistics
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "miniature"), str(ROOT / "benchmarks")]

import build
import scenes
from bench_effect import SETTINGS, pick_nouns

FIGURES = {"chair": "CHAIR ↓", "cover": "Cover ↑", "hal": "Hal ↓", "cog": "Cog ↓", "f1": "F1 ↑"}
STARTS = {"base": None, "labelled": str(ROOT / "miniature" / "adapter")}
WEIGHTS = {"base": 2, "labelled": 1}  # what a denied object costs; an adapter that names few absent objects needs less


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run is made for each")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of pairs and training (default: 3)")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS, help="what round 1 starts from")
    parser.add_argument("--weights", type=float, nargs="+", help="what a denied object costs (default: 2; labelled: 1)")
    parser.add_argument("--pictures", type=int, default=640, help="pictures drawn for a round (default: 640)")
    parser.add_argument("--drawn", type=int, default=960, help="other pictures to measure on too (default: 960)")
    parser.add_argument("--verify", type=int, default=12, help="candidates for a picture (default: 12)")
    parser.add_argument("--settings", default=SETTINGS, help=f"flags of the training script (default: {SETTINGS})")
    parser.add_argument(
        "--add", type=Path, nargs="+", default=[], help="what earlier runs printed, to be shown with this"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "outputs" / "self_alignment", help="where the runs go"
    )
    parser.add_argument("--figure", type=Path, help="where the picture goes (default: in --output_dir)")
    return parser.parse_args(argv)


def draw_pictures(folder: Path, first: int, count: int) -> None:
    """Draw `count` scenes into a folder, each named by its seed, and the questions that ask for a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        if not (path := folder / f"{seed}.png").exists():
            scenes.draw_scene(scenes.sample_scene(seed))[0].save(path)
    folder.with_suffix(".txt").write_text("\n".join(scenes.CAPTION_REQUESTS))


def judge_pairs(path: Path) -> dict[str, float]:
    """Return the number of pairs and, in %, how many of their objects the check gets wrong, its precision and its recall,
    all by what was drawn."""
    import pyarrow.parquet as parquet

    rows = parquet.read_table(path, columns=["image_path", "checks"]).to_pylist()
    judged = [
        (word in scenes.sample_scene(int(Path(row["image_path"]).stem)).names(), found["belief"] > 0.5)
        for row in rows
        for word, found in json.loads(row["checks"])["objects"].items()
    ]
    right = sum(there and believed for there, believed in judged)
    shares = {
        "check_wrong": statistics.mean(there != believed for there, believed in judged),
        "check_precision": right / sum(believed for _, believed in judged),
        "check_recall": right / sum(there for there, _ in judged),
    }
    return {"pairs": len(rows)} | {name: 100 * value for name, value in shares.items()}


def draw_benchmark(folder: Path, count: int) -> Path:
    """Make a benchmark like miniature/amber over `count` other pictures, if it is not there; return its folder."""
    if not (folder / "safe_words.txt").exists():  # the last file to be written
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build.write_amber(argparse.Namespace(seed=7, amber_images=count), folder)
    return folder


def measure(folder: Path, lora: str | None, nouns: str, benchmarks: dict[str, Path]) -> dict[str, float]:
    """Return the figures of the miniature with an adapter, or without one, on {prefix of their names: benchmark}."""
    import llava_amber_validation_benchmark_with_lora as amber

    figures = {}
    for prefix, benchmark in benchmarks.items():
        results = folder / f"{prefix}amber" / "results.json"
        flags = f"--test_mode --batch_size 40 --nouns {nouns} --output_file {results} --image_dir {benchmark / 'image'}"
        flags += f" --query_file {benchmark / 'query' / 'query_all.json'}"
        amber.main([*flags.split(), *(["--lora_path", lora] if lora else [])])
        strict = json.loads(results.with_name("scores.json").read_text())["strict"]
        found = {**strict["generative"], "f1": strict["discriminative"]["f1"]}
        figures |= {prefix + name: value for name, value in found.items()}
    return figures


def align(folder: Path, start: str, weight: float, lora: str | None, seed: int, number: int, args) -> tuple[str, dict]:
    """Run one round: draw pictures, make pairs with the adapter `lora` (None is the base), train what STARTS names on them;
    return the new adapter and what judge_pairs says."""
    import llava_amber_validation_benchmark_with_lora as amber
    import llava_orpo_training as training

    first = 10_000_000 + 1_000_000 * seed + 100_000 * number
    pictures, pairs = args.output_dir / "pictures" / str(first), folder / "pairs.parquet"
    draw_pictures(pictures, first, args.pictures)
    flags = f"--test_mode --nouns vocabulary --batch_size 40 --max_new_tokens 96 --verify {args.verify}"
    flags += f" --image_dir {pictures} --questions {pictures.with_suffix('.txt')}"
    flags += f" --write_pairs {pairs} --denied_costs {weight}"
    amber.main([*flags.split(), *(["--lora_path", lora] if lora else [])])
    flags = f"--test_mode --dataset {pairs} --output_dir {folder / 'adapter'} --resume --seed {seed}"
    flags += f" --report_to none --eval_fraction 0 {args.settings}"
    training.main([*flags.split(), *(["--lora_path", STARTS[start]] if STARTS[start] else [])])
    return str(folder / "adapter"), judge_pairs(pairs)


def draw_frontier(rows: list[dict], before: dict[str, dict], path: Path) -> None:
    """Draw CHAIR against Cover, a line for each start and weight, with a point for each round (mean of the seeds); `before`
    has the figures of each start."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.size"] = 12  # so that it can be read on a phone, where the picture is half as wide
    figure, axis = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    for start, weight in sorted({(row["start"], row["weight"]) for row in rows}):
        line = [row for row in rows if (row["start"], row["weight"]) == (start, weight)]
        points = []
        for number in sorted({row["round"] for row in line}):
            part = [row for row in line if row["round"] == number]
            points.append([statistics.mean(row[name] for row in part) for name in ("cover", "chair")])
        name = "no labels" if start == "base" else "on top of labelled pairs"
        (drawn,) = axis.plot(*zip(*points, strict=True), "o-", ms=6, label=f"{name}, weight {weight:g}")
        for number, point in enumerate(points[1:], 1):
            style = {"color": drawn.get_color(), "ha": "center"}
            axis.annotate(str(number), point, xytext=(0, -17), textcoords="offset points", **style)
    for start, figures in before.items():
        point = figures["cover"], figures["chair"]
        axis.plot(*point, "s", color="black", ms=8, zorder=3)
        name, place = ("base", (10, -4)) if start == "base" else ("trained on labelled pairs", (-80, -46))
        axis.annotate(name, point, xytext=place, textcoords="offset points", arrowprops={"arrowstyle": "-", "lw": 0.7})
    axis.set(xlabel="Cover: share of what is there, %", ylabel="CHAIR: share of what is named\nthat is not there, %")
    axis.margins(x=0.25)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper left", title="After each round", alignment="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(rows: list[dict], name: str) -> str:
    """Return a figure's mean over `rows`, which differ in the seed, with its standard deviation."""
    values = [row[name] for row in rows if name in row]
    sd = f" ± {statistics.stdev(values):.1f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{0 if name == 'pairs' else 1}f}{sd}" if values else ""


def main(argv=None):
    args = parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    nouns = pick_nouns()
    benchmarks = {"": ROOT / "miniature" / "amber"}
    if args.drawn:
        benchmarks["drawn_"] = draw_benchmark(args.output_dir / f"drawn_{args.drawn}", args.drawn)
    before = {start: measure(args.output_dir / start, lora, nouns, benchmarks) for start, lora in STARTS.items()}
    rows = [row for path in args.add for row in json.loads(path.read_text().splitlines()[-1])["rows"]]
    for start in args.starts:
        for weight, seed in product(args.weights or [WEIGHTS[start]], args.seeds):
            run = {"start": start, "weight": weight, "seed": seed}
            rows.append({**run, "round": 0, **before[start]})
            lora = STARTS[start]
            for number in range(1, args.rounds + 1):
                folder = args.output_dir / f"{start}-{weight:g}-seed{seed}" / f"round{number}"
                lora, judged = align(folder, start, weight, lora, seed, number, args)
                rows.append({**run, "round": number, **judged, **measure(folder, lora, nouns, benchmarks)})
                print(json.dumps(rows[-1]), file=sys.stderr)

    for prefix, benchmark in benchmarks.items():
        names = [prefix + name for name in FIGURES]
        table = Table(f"%, nouns: {nouns}", "pairs", "check wrong", *FIGURES.values(), title=benchmark.name)
        for start, weight, number in dict.fromkeys((row["start"], row["weight"], row["round"]) for row in rows):
            part = [row for row in rows if (row["start"], row["weight"], row["round"]) == (start, weight, number)]
            cells = [show(part, name) for name in ("pairs", "check_wrong", *names)]
            table.add_row(f"{start}, weight {weight:g}, round {number}", *cells)
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    figure = args.figure or args.output_dir / "self_alignment.png"
    draw_frontier(rows, before, figure)
    print(f"look at {figure} and, in {args.output_dir}, at the pages pairs.html")
    settings = {name: getattr(args, name) for name in ("settings", "verify", "pictures", "seeds")}
    print(json.dumps({"benchmark": "self_alignment", **settings, "nouns": nouns, "rows": rows}))


if __name__ == "__main__":
    main()
