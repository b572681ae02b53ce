"""Tokens per second of the page over transformers, the page over vLLM, and vLLM's server without a page.

1, 8 and 32 users at once each ask the adapter to describe a picture, and read the streamed answer to its end. Both vLLM rows
use one server, which serves the base model and the adapter. Every answer is compared with plain `generate`'s. Prints a table,
and then one line of JSON. Uses a GPU if there is one.

    python benchmarks/bench_serving.py                       # the miniature
    python benchmarks/bench_serving.py --model_path llava-hf/llava-v1.6-mistral-7b-hf --lora_path checkpoints/llava-orpo-prod \\
        --image_dir AMBER/image --dtype auto
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "miniature"
sys.path.insert(0, str(ROOT))
QUESTION = "Describe this image."
# vLLM's server by itself, in vLLM's environment; prints its address
SERVE = """if 1:
    import llava_gradio_lora_host_quantized as page, signal, sys
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # which also ends the server
    model, adapter, dtype, users = sys.argv[1:]
    process, url, _ = page.start_server(model, [adapter], dtype=dtype, **{"max-num-seqs": users})
    print(url, flush=True)
    process.wait()
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=str(MINIATURE / "model"), help="base model, in the hub's layout")
    parser.add_argument("--lora_path", default=str(MINIATURE / "adapter"), help="LoRA adapter")
    parser.add_argument("--image_dir", type=Path, default=MINIATURE / "amber" / "image", help="pictures")
    parser.add_argument("--dtype", default="float32", help="vLLM's type of the weights (default: float32)")
    python = str(ROOT / ".venv-vllm" / "bin" / "python")
    parser.add_argument(
        "--vllm_python", default=python, help="Python of the environment with vLLM (default: .venv-vllm's)"
    )
    parser.add_argument(
        "--users", type=int, nargs="+", default=[1, 8, 32], help="how many ask at once (default: 1 8 32)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each number of users is measured (default: 3)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, in tokens (default: 256)")
    return parser.parse_args(argv)


@contextmanager
def running(command, **options):
    """Run a command until the block ends."""
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


async def ask_page(client, model, picture, max_new_tokens):
    """Yield a page's answer so far."""
    files = {"files": (picture.name, picture.read_bytes())}
    path = (await client.post("/gradio_api/upload", files=files)).raise_for_status().json()[0]
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, QUESTION, model, 0, 1, max_new_tokens]
    event = (await client.post("/gradio_api/call/answer", json={"data": data})).raise_for_status().json()["event_id"]
    async with client.stream("GET", f"/gradio_api/call/answer/{event}") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("event: error"):
                sys.exit("error: a page refused a question; its own lines above say why.")
            if line.startswith("data: ["):
                yield json.loads(line[6:])[0]


async def measure(ask, pictures, args, count_tokens):
    """Return {users: {"tokens_per_second", "first_token_seconds", "answers"}}. `ask(picture)` yields the answer so far."""

    async def read(picture):
        began, first, text = time.perf_counter(), None, ""
        async for text in ask(picture):
            first = first or (text and time.perf_counter() - began)
        return picture, text, first

    figures, start = {}, 0
    await read(pictures[-1])  # not counted: the first question of all
    for users in args.users:
        rates, answers = [], []
        for _ in range(args.rounds):
            asked = [pictures[(start + number) % len(pictures)] for number in range(users)]  # others, so no cache helps
            start += users
            began = time.perf_counter()
            found = await asyncio.gather(*map(read, asked))
            rates.append(sum(count_tokens(text) for _, text, _ in found) / (time.perf_counter() - began))
            answers += found
        first = median(first for _, _, first in answers)
        figures[users] = {"tokens_per_second": mean(rates), "first_token_seconds": first, "answers": answers}
    return figures


async def measure_page(address, process, pictures, args, count_tokens):
    """Wait for a page, then measure it, asking for the last of its models, which is the adapter."""
    import httpx

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        while True:
            try:
                model = (await client.get("/gradio_api/info")).json()["named_endpoints"]["/answer"]["parameters"][2]
                break
            except httpx.ConnectError:
                if process.poll() is not None:
                    sys.exit("error: a page did not start; its message is above.")
                await asyncio.sleep(1)
        name = model["parameter_default"]

        def ask(picture):
            return ask_page(client, name, picture, args.max_new_tokens)

        return await measure(ask, pictures, args, count_tokens)


async def measure_server(url, pictures, args, count_tokens):
    """Measure vLLM's server as the page asks it, without the page."""
    from llava_gradio_lora_host_quantized import ServedModels, load_image

    engine = ServedModels([url])

    async def ask(picture):
        model = engine.models[-1]
        conversations = {model: [(QUESTION, None)]}
        async for answers in engine.stream(load_image(picture), conversations, max_new_tokens=args.max_new_tokens):
            yield answers[model]

    return await measure(ask, pictures, args, count_tokens)


def measure_all(args, pictures, count_tokens) -> dict:
    """Return measure's figures for each of the three."""
    seats = str(max(args.users))

    def run_page(script, *flags):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with running([sys.executable, ROOT / script, "--port", port, *flags], stdout=sys.stderr) as process:
            return asyncio.run(measure_page(f"http://127.0.0.1:{port}", process, pictures, args, count_tokens))

    checkpoint = ["--model_path", args.model_path, "--lora_path", args.lora_path]
    found = {"page, transformers": run_page("llava_gradio_lora_host.py", *checkpoint, "--max_batch_size", seats)}
    command = [args.vllm_python, "-c", SERVE, args.model_path, args.lora_path, args.dtype, seats]
    with running(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}) as server:
        url = server.stdout.readline().strip()
        if not url:
            sys.exit("error: vLLM's server did not start; its message is above.")
        flags = [
            "--server_url",
            url,
            "--max_num_seqs",
            2 * max(args.users),
        ]  # the page reckons with two answers a question
        found["page, vLLM"] = run_page("llava_gradio_lora_host_quantized.py", *flags)
        half = args.rounds * sum(args.users)  # the server has cached the pictures that the page was asked about
        others = pictures[half:] + pictures[:half]
        found["vLLM alone"] = asyncio.run(measure_server(url, others, args, count_tokens))
    return found


def main(argv=None):
    args = parse_args(argv)
    from llava_orpo_training import generate_answers, load_image, load_llava

    model, processor = load_llava(args.model_path, args.lora_path)
    pictures = sorted(path for path in args.image_dir.iterdir() if path.suffix in (".webp", ".jpg", ".png"))
    found = measure_all(args, pictures, lambda text: len(processor.tokenizer.tokenize(text)) + 1)
    plain = {}
    print(f"{'users':>5}  {'':20}{'tokens/s':>10}{'ratio':>8}{'first token, s':>16}  same as generate")
    for users in args.users:
        for name, figures in found.items():
            now, base = figures[users], found["page, transformers"][users]
            for picture in {picture for picture, _, _ in now["answers"]} - plain.keys():
                image = load_image(picture)
                plain[picture] = generate_answers(model, processor, [image], [QUESTION], args.max_new_tokens)[0]
            now["same"] = sum(plain[picture] == text for picture, text, _ in now["answers"])
            now["ratio"] = now["tokens_per_second"] / base["tokens_per_second"]
            print(f"{users:5}  {name:20}{now['tokens_per_second']:10.1f}{now['ratio']:8.2f}{now['first_token_seconds']:16.3f}"
                  f"{now['same']:6} of {len(now['answers'])}")  # fmt: skip
    for now in (now for figures in found.values() for now in figures.values()):
        now["answers"] = len(now["answers"])
    print(json.dumps({"benchmark": "serving", "results": found}))


if __name__ == "__main__":
    main()
