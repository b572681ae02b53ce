"""The Gradio host: many users at once against the same users one after another.

The host runs as its own process; each user asks its API about a picture of its own, over a connection of its own, and reads
the streamed answer to its end. Printed are the ratio of the times, and how many answers are those of
`generate_answers`, asked one at a time.

    python benchmarks/bench_host.py
    python benchmarks/bench_host.py --model_path llava-hf/llava-v1.6-mistral-7b-hf --lora_path ADAPTER --image_dir PHOTOS  # on a GPU
"""

import argparse
import asyncio
import base64
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MINIATURE = ROOT / "miniature"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=str(MINIATURE / "model"), help="LLaVA-NeXT checkpoint")
    parser.add_argument("--lora_path", default=str(MINIATURE / "adapter"), help="adapter")
    parser.add_argument("--image_dir", type=Path, default=MINIATURE / "amber" / "image", help="pictures")
    parser.add_argument("--users", type=int, default=32, help="how many, each with a picture (default: 32)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens an answer may have (default: 256)")
    parser.add_argument("--rounds", type=int, default=3, help="how often both are measured (default: 3)")
    return parser.parse_args(argv)


async def measure(port, pictures, max_new_tokens, rounds, server):
    """The answers and seconds a round of the users one after another, then of all at once."""
    import httpx

    async def ask(picture):
        address = "data:;base64," + base64.b64encode(picture.read_bytes()).decode()
        content = {"data": [{"url": address}, "Describe this image.", True, 0, 1, max_new_tokens]}
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}/gradio_api", timeout=600, verify=False
        ) as client:
            event = (await client.post("/call/answer", json=content)).json()["event_id"]
            async with client.stream("GET", f"/call/answer/{event}") as stream:
                messages = [line.partition(": ")[2] async for line in stream.aiter_lines() if line]
        if messages[-2] != "complete":
            sys.exit(f"error: the host answered {messages[-2:]}.")
        return json.loads(messages[-1])[0]

    while True:
        try:
            await ask(pictures[0])
            break
        except httpx.ConnectError:  # not listening yet
            if server.poll() is not None:
                sys.exit("error: the host did not start; its message is above.")
            time.sleep(1)
    alone_seconds = together_seconds = 0
    for _ in range(rounds):
        started = time.perf_counter()
        alone = [await ask(picture) for picture in pictures]
        between = time.perf_counter()
        together = await asyncio.gather(*[ask(picture) for picture in pictures])
        alone_seconds += (between - started) / rounds
        together_seconds += (time.perf_counter() - between) / rounds
    return alone, alone_seconds, together, together_seconds


def main(argv=None):
    args = parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "llava_gradio_lora_host.py"), "--model_path", args.model_path, "--lora_path",
               args.lora_path, "--max_new_tokens", str(args.max_new_tokens), "--max_num_seqs", str(args.users),
               "--port", str(port)]  # fmt: skip
    pictures = sorted(path for path in args.image_dir.iterdir() if path.is_file())[: args.users]
    server = subprocess.Popen(command)
    try:
        alone, alone_seconds, together, together_seconds = asyncio.run(
            measure(port, pictures, args.max_new_tokens, args.rounds, server)
        )
    finally:
        server.terminate()
        server.wait()

    import torch

    import llava_gradio_lora_host as host
    from llava_orpo_training import generate_answers

    model, processor = host.load_llava(args.model_path, args.lora_path)
    plain = [generate_answers(model, processor, [host.load_image(path)], ["Describe this image."], args.max_new_tokens)[0]
             for path in pictures]  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    same = sum(text == expected for text, expected in zip(together, plain, strict=True))
    ratio = alone_seconds / together_seconds
    print(f"{len(pictures)} users on {device}: one after another {alone_seconds:.1f} s, at once {together_seconds:.1f} s, "
          f"{ratio:.1f} times as fast; {same} of {len(pictures)} answers are those of generate_answers, "
          f"{sum(a == b for a, b in zip(alone, together, strict=True))} the same both times")  # fmt: skip
    print(json.dumps({"benchmark": "host", "device": device, "users": len(pictures), "same": same,
                      "alone_seconds": alone_seconds, "together_seconds": together_seconds, "speedup": ratio}))  # fmt: skip


if __name__ == "__main__":
    main()
