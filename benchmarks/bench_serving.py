"""Tokens a second and time to first token of the two hosts, at 1, 8 and 32 users at once: transformers with the adapter,
vLLM with the merged checkpoint, vLLM with FP8. All are asked over HTTP, streamed, the same pictures in the same order.

Uses a GPU if there is one. Ends with one line of JSON.

    python benchmarks/bench_serving.py                     # the miniature, quantized here if it is not yet
    python benchmarks/bench_serving.py --model_path llava-hf/llava-v1.6-mistral-7b-hf --lora_path checkpoints/llava-orpo-prod \\
        --merged_path quantized_models/llava-v1.6-mistral-7b-hf-BF16 --quantized_path quantized_models/llava-v1.6-mistral-7b-hf-FP8-Dynamic \\
        --image_dir AMBER/image --vllm_python .venv-vllm/bin/python
"""

import argparse
import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "miniature"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=str(MINIATURE / "model"), help="base, for transformers")
    parser.add_argument("--lora_path", default=str(MINIATURE / "adapter"), help="adapter, for transformers")
    quantized = ROOT / "quantized_models"
    parser.add_argument(
        "--merged_path", type=Path, default=quantized / "miniature-BF16", help="merged checkpoint, for vLLM"
    )
    parser.add_argument(
        "--quantized_path", type=Path, default=quantized / "miniature-FP8-Dynamic", help="FP8 checkpoint, for vLLM"
    )
    parser.add_argument("--image_dir", type=Path, default=MINIATURE / "amber" / "image", help="pictures")
    parser.add_argument(
        "--vllm_python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), help="Python that has vLLM"
    )
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32], help="how many at once (default: 1 8 32)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens an answer may have (default: 256)")
    return parser.parse_args(argv)


async def ask(address, picture, max_new_tokens):
    """The answer, and the seconds to its first token."""
    import httpx

    data = "data:;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = {"data": [{"url": data}, "Describe this image.", True, 0, 1, max_new_tokens]}
    async with httpx.AsyncClient(base_url=f"{address}/gradio_api", timeout=600) as client:
        began, first, last = time.perf_counter(), None, ""
        event = (await client.post("/call/answer", json=content)).json()["event_id"]
        async with client.stream("GET", f"/call/answer/{event}") as stream:
            async for line in stream.aiter_lines():
                if line.startswith("event: error"):
                    sys.exit("error: a host refused a question; its own lines say why.")
                if line.startswith("data: ["):
                    last = json.loads(line[6:])[0]
                    first = first or (last and time.perf_counter() - began) or None
        return last, first


async def measure(address, server, pictures, args, count_tokens):
    """{users: {tokens_per_second, first_token_seconds, answers}}"""
    import httpx

    while True:
        try:
            await ask(address, pictures[-1], 8)
            break
        except httpx.ConnectError:  # not listening yet
            if server.poll() is not None:
                sys.exit("error: a host did not start; its message is above.")
            time.sleep(1)
    figures, start = {}, 0
    for users in args.users:
        rates, firsts, texts = [], [], []
        for _ in range(args.rounds):
            asked = [pictures[(start + number) % len(pictures)] for number in range(users)]  # new ones: no cache helps
            start += users
            began = time.perf_counter()
            answers = await asyncio.gather(*(ask(address, picture, args.max_new_tokens) for picture in asked))
            seconds = time.perf_counter() - began
            texts += [text for text, _ in answers]
            rates.append(sum(count_tokens(text) for text, _ in answers) / seconds)
            firsts += [first for _, first in answers]
        figures[users] = {"tokens_per_second": mean(rates), "first_token_seconds": median(firsts), "answers": texts}
    return figures


def main(argv=None):
    args = parse_args(argv)
    if args.merged_path == parse_args([]).merged_path:
        for scheme, folder in (("BF16", args.merged_path), ("FP8_DYNAMIC", args.quantized_path)):
            if not folder.exists():
                subprocess.run([sys.executable, str(ROOT / "llava_quantize_vllm.py"), "--test_mode", "--scheme", scheme,
                                "--output_dir", str(folder)], check=True)  # fmt: skip
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.merged_path)
    pictures = sorted(path for path in args.image_dir.iterdir() if path.suffix in (".webp", ".jpg", ".png"))
    seats = ["--max_num_seqs", str(max(args.users))]
    quantized = [args.vllm_python, str(ROOT / "llava_gradio_lora_host_quantized.py"), *seats, "--model_path"]
    hosts = {
        "transformers, adapter": [sys.executable, str(ROOT / "llava_gradio_lora_host.py"), *seats,
                                  "--model_path", args.model_path, "--lora_path", args.lora_path],
        "vLLM, merged": [*quantized, str(args.merged_path)],
        "vLLM, FP8": [*quantized, str(args.quantized_path)],
    }  # fmt: skip
    found = {}
    for name, command in hosts.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = subprocess.Popen([*command, "--port", str(port)], stdout=sys.stderr, start_new_session=True)
        try:
            found[name] = asyncio.run(
                measure(
                    f"http://127.0.0.1:{port}", server, pictures, args, lambda text: len(tokenizer.tokenize(text)) + 1
                )
            )
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
    first = found["transformers, adapter"]
    print(f"{'users':>6}  {'host':24}{'tokens/s':>10}{'ratio':>8}{'first token, s':>16}{'same answers':>14}")
    for users in args.users:
        for name, figures in found.items():
            now = figures[users]
            now["ratio"] = now["tokens_per_second"] / first[users]["tokens_per_second"]
            now["same"] = sum(a == b for a, b in zip(now["answers"], first[users]["answers"], strict=True))
            print(f"{users:6}  {name:24}{now['tokens_per_second']:10.1f}{now['ratio']:8.2f}{now['first_token_seconds']:16.3f}"
                  f"{now['same']:8} of {len(now['answers'])}")  # fmt: skip
    for figures in found.values():
        for now in figures.values():
            now["answers"] = len(now["answers"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
