"""Measure the two pages and vLLM's own server: tokens per second and seconds to the first token, for several users at once.

    python benchmarks/bench_serving.py                  # the miniature, on the CPU
    python benchmarks/bench_serving.py --model_path llava-hf/llava-v1.6-mistral-7b-hf --lora_path checkpoints/llava-orpo-prod \\
        --image_dir AMBER/image --dtype auto            # on a GPU

All serve the same base and adapter. Each user asks the adapter for a description of another picture, through the page's API
or through vLLM's, and the answers are compared with those of plain `generate`.
"""

import argparse
import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean, median

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QUESTION = "Describe this image."
MAX_NEW_TOKENS = 512  # as the pages' API has it


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=str(ROOT / "miniature" / "model"), help="base: hub id or folder")
    parser.add_argument("--lora_path", default=str(ROOT / "miniature" / "adapter"), help="adapter")
    parser.add_argument("--image_dir", type=Path, default=ROOT / "miniature" / "amber" / "image", help="pictures")
    parser.add_argument("--vllm_python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), help="Python with vLLM")
    parser.add_argument("--dtype", default="float32", help="vLLM's (default: float32, as transformers has on a CPU)")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32], help="how many at once (default: 1 8 32)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    return parser.parse_args(argv)


async def ask_page(client, address: str, picture: Path):
    """Yield the answer so far, from a page's API."""
    files = {"files": (picture.name, picture.read_bytes())}
    path = (await client.post(f"{address}/gradio_api/upload", files=files)).json()[0]
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, QUESTION]  # the adapter, greedily, is the default
    event = (await client.post(f"{address}/gradio_api/call/answer", json={"data": data})).json()["event_id"]
    async with client.stream("GET", f"{address}/gradio_api/call/answer/{event}") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("event: error"):
                sys.exit("error: a page refused a question; its own lines say why.")
            if line.startswith("data: ["):
                yield json.loads(line[6:])[0]


async def ask_vllm(client, address: str, picture: Path, model: str):
    """Yield the answer so far, from vLLM's own API."""
    from llava_gradio_lora_host_quantized import CHAT_TEMPLATE, load_image, write_messages

    body = {"model": model, "messages": write_messages(load_image(picture), [(QUESTION, None)]), "stream": True,
            "temperature": 0, "max_completion_tokens": MAX_NEW_TOKENS, "chat_template": CHAT_TEMPLATE}  # fmt: skip
    text = ""
    async with client.stream("POST", f"{address}/v1/chat/completions", json=body) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                yield text.strip()


async def measure(ask, address: str, pictures: list[Path], args, count_tokens) -> dict:
    """Return {users: {tokens_per_second, first_token_seconds, answers}}."""

    async def finish(client, picture):
        began, first, text = time.perf_counter(), None, ""
        async for text in ask(client, address, picture):
            first = first or (text and time.perf_counter() - began) or None
        return text, first

    figures, start = {}, 0
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        await finish(client, pictures[-1])  # warms up
        for users in args.users:
            rates, firsts, texts = [], [], []
            for _ in range(args.rounds):
                asked = [
                    pictures[(start + number) % len(pictures)] for number in range(users)
                ]  # new ones: no cache helps
                start += users
                began = time.perf_counter()
                answers = await asyncio.gather(*(finish(client, picture) for picture in asked))
                rates.append(sum(count_tokens(text) for text, _ in answers) / (time.perf_counter() - began))
                texts += zip(asked, (text for text, _ in answers), strict=True)
                firsts += [first for _, first in answers]
            figures[users] = {"tokens_per_second": mean(rates), "first_token_seconds": median(firsts), "answers": texts}
    return figures


def start_page(command: list[str]) -> tuple[subprocess.Popen, str]:
    """Start a page and wait until it listens; return (process, address)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=sys.stderr)
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/config", timeout=60)
            return server, f"http://127.0.0.1:{port}"
        except httpx.HTTPError:
            if server.poll() is not None:
                sys.exit("error: a page did not start; its message is above.")
            time.sleep(1)


def find_vllm(server: subprocess.Popen) -> str:
    """Return the address of the vLLM server that a page has started."""
    lines = subprocess.run(["ps", "-ww", "-o", "args=", "--ppid", str(server.pid)], capture_output=True, text=True).stdout
    return f"http://127.0.0.1:{re.search('--port ([0-9]+)', lines)[1]}"


def answer_plainly(args, pictures: list[Path]) -> tuple:
    """Return what `generate` answers without any page, {picture: answer}, and a function that counts a text's tokens."""
    from llava_orpo_training import generate_answers, load_image, load_llava

    model, processor = load_llava(args.model_path, args.lora_path)
    answers = {}
    for start in range(0, len(pictures), 8):
        some = pictures[start : start + 8]
        images = [load_image(picture) for picture in some]
        texts = generate_answers(model, processor, images, [QUESTION] * len(some), MAX_NEW_TOKENS)
        answers |= dict(zip(some, texts, strict=True))
    return answers, lambda text: len(processor.tokenizer.tokenize(text)) + 1


def main(argv=None):
    args = parse_args(argv)
    pictures = sorted(path for path in args.image_dir.iterdir() if path.suffix in (".webp", ".jpg", ".png"))
    half = args.rounds * sum(args.users)  # pictures that each is asked about; the page over vLLM and vLLM share a cache
    wanted, count_tokens = answer_plainly(args, pictures[: 2 * half])
    model, seats = ["--model_path", args.model_path, "--lora_path", args.lora_path], str(2 * max(args.users))
    found = {}
    command = [sys.executable, str(ROOT / "llava_gradio_lora_host.py"), *model, "--max_batch_size", seats]
    server, address = start_page(command)
    found["page over transformers"] = asyncio.run(measure(ask_page, address, pictures, args, count_tokens))
    server.terminate()
    server.wait()
    command = [args.vllm_python, str(ROOT / "llava_gradio_lora_host_quantized.py"), *model, "--max_num_seqs", seats]
    server, address = start_page([*command, "--dtype", args.dtype])
    found["page over vLLM"] = asyncio.run(measure(ask_page, address, pictures, args, count_tokens))
    ask = partial(ask_vllm, model=Path(args.lora_path).name)
    rest = pictures[half:] + pictures[:half]
    found["vLLM alone"] = asyncio.run(measure(ask, find_vllm(server), rest, args, count_tokens))
    server.terminate()
    server.wait()
    print(f"{'users':>6}  {'':24}{'tokens/s':>10}{'first token, s':>16}{'as generate':>14}")
    for users in args.users:
        for name, figures in found.items():
            now = figures[users]
            answers = now.pop("answers")
            now["same"], now["compared"] = sum(wanted.get(picture) == text for picture, text in answers), len(answers)
            print(f"{users:6}  {name:24}{now['tokens_per_second']:10.1f}{now['first_token_seconds']:16.3f}"
                  f"{now['same']:8} of {now['compared']}")  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
