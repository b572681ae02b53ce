"""Answering AMBER: one prefill a picture, shared by its questions, against one question at a time.

Both answer the same queries of the miniature greedily, from the picture files on, with one loaded model in float32 on a CPU
(in the GPU's own type on a GPU). Printed are the ratio of the times and how many answers are the same, token for token.

    python benchmarks/bench_amber_generation.py
    python benchmarks/bench_amber_generation.py --model_path llava-hf/llava-v1.6-mistral-7b-hf --limit 20 \\
        --query_file AMBER/data/query/query_all.json --image_dir AMBER/image --batch_size 8      # on a GPU
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MINIATURE = ROOT / "miniature"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=str(MINIATURE / "model"), help="LLaVA-NeXT checkpoint")
    parser.add_argument(
        "--query_file", type=Path, default=MINIATURE / "amber" / "query" / "query_all.json", help="queries"
    )
    parser.add_argument("--image_dir", type=Path, default=MINIATURE / "amber" / "image", help="their pictures")
    parser.add_argument("--batch_size", type=int, default=40, help="pictures answered together (default: 40)")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="tokens an answer may have (default: 1024)")
    parser.add_argument("--limit", type=int, help="only the first N pictures, with all their questions")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import torch
    from tqdm import tqdm

    import llava_amber_validation_benchmark_with_lora as amber
    from llava_orpo_training import generate_answers

    model, processor = amber.load_llava(args.model_path)
    context = model.config.text_config.max_position_embeddings
    queries = json.loads(args.query_file.read_text())
    wanted = set(list(dict.fromkeys(query["image"] for query in queries))[: args.limit])
    queries = [query for query in queries if query["image"] in wanted]
    generate_answers(
        model, processor, [amber.load_image(args.image_dir / queries[0]["image"])], ["Is it?"], 2
    )  # warm up

    started = time.perf_counter()
    single = {}
    for query in tqdm(queries, desc="one question at a time", mininterval=5):
        image = amber.load_image(args.image_dir / query["image"])
        single[query["id"]] = generate_answers(model, processor, [image], [query["query"]], args.max_new_tokens)[0]
    single_seconds = time.perf_counter() - started

    started = time.perf_counter()
    shared = {}
    for group in tqdm(amber.group_queries(queries, args.batch_size), desc="one prefill a picture", mininterval=5):
        good, images, pixels, _ = amber.open_group(group, args.image_dir, processor, context)
        questions = [[query["query"] for query in picture["queries"]] for picture in good]
        for picture, question, text, _ in amber.answer_questions(
            model, processor, images, pixels, questions, args.max_new_tokens
        ):
            shared[good[picture]["queries"][question]["id"]] = text
    shared_seconds = time.perf_counter() - started

    same = sum(single[number] == shared[number] for number in single)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{len(queries):,} questions about {len(wanted)} pictures on {device}: one at a time {single_seconds:.1f} s, shared "
          f"prefill {shared_seconds:.1f} s, {single_seconds / shared_seconds:.1f} times as fast; {same:,} answers the same")  # fmt: skip
    print(json.dumps({"benchmark": "amber_generation", "device": device, "questions": len(queries), "pictures": len(wanted),
                      "batch_size": args.batch_size, "same": same, "single_seconds": single_seconds,
                      "shared_seconds": shared_seconds, "speedup": single_seconds / shared_seconds}))  # fmt: skip


if __name__ == "__main__":
    main()
