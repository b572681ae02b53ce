"""Serve a quantized LLaVA-1.6 over vLLM as a web page, alone or beside a second model.

Reads   a checkpoint that llava_quantize_vllm.py made (--model_path), or servers that run one already (--server_url).
Writes  nothing that stays: uploaded pictures are deleted seconds after they were read.
Needs   pip install -r requirements/vllm.txt          (an environment of its own)

    python llava_gradio_lora_host_quantized.py --model_path quantized_models/llava-v1.6-mistral-7b-FP8-Dynamic
    python llava_gradio_lora_host_quantized.py --server_url http://gpu1:8000                   # vllm serve runs there
    python llava_gradio_lora_host_quantized.py --server_url http://gpu1:8000 http://gpu2:8000  # FP8 beside bfloat16
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

# Copied from llava_orpo_training.MINIATURE
MINIATURE = Path(__file__).resolve().parent / "miniature"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(group, flag, help, **options):
        shown = options.get("default")
        group.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    model = parser.add_argument_group("model")
    add(model, "--model_path", "folder of a merged or quantized checkpoint, which vLLM runs in this process "
        "(default: quantized_models/llava-v1.6-mistral-7b-hf-FP8-Dynamic, if there is no --server_url)")  # fmt: skip
    add(model, "--server_url", "OpenAI-compatible server that runs one, such as `vllm serve` (its key: OPENAI_API_KEY in the "
        "environment); a second one, or one beside --model_path, answers beside the first", nargs="+")  # fmt: skip
    add(model, "--tensor_parallel_size", "GPUs that share the model", type=int, default=1)
    add(model, "--dtype", "numbers that what is not quantized is computed in; auto: bfloat16, on older GPUs float16",
        default="auto", choices=["auto", "bfloat16", "float16", "float32"])  # fmt: skip
    add(model, "--test_mode", "use the miniature that llava_quantize_vllm.py --test_mode has quantized",
        action="store_true")  # fmt: skip

    answers = parser.add_argument_group("answers")
    add(answers, "--max_tokens", "tokens an answer may have; the page's slider ends there", type=int, default=1024,
        dest="max_new_tokens", metavar="MAX_TOKENS")  # fmt: skip
    add(
        answers,
        "--temperature",
        "0 always takes the likeliest token; where the page's slider starts",
        type=float,
        default=0,
    )
    add(answers, "--max_num_seqs", "answers generated together, as one batch", type=int, default=32)
    add(
        answers, "--queue_size", "answers that may wait for a place; who asks then is turned away", type=int, default=64
    )

    server = parser.add_argument_group("server")
    add(server, "--host", "address to listen on; 0.0.0.0 lets other machines in", default="127.0.0.1")
    add(server, "--port", "port to listen on (default: the first free one from 7860)", type=int)
    add(server, "--share", "open a public link through gradio.live", action="store_true")
    add(server, "--auth_file", "let in only these users: a text file with a name:password a line", type=Path)
    args = parser.parse_args(argv)
    for name, flag in (("max_new_tokens", "max_tokens"), ("max_num_seqs",) * 2, ("queue_size",) * 2,
                       ("tensor_parallel_size",) * 2):  # fmt: skip
        if getattr(args, name) <= 0:
            parser.error(f"--{flag} is {getattr(args, name)}; it must be above 0")
    if not 0 <= args.temperature <= 2:
        parser.error(f"--temperature is {args.temperature}; it must be from 0 to 2")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port is {args.port}; it must be from 1 to 65535")
    args.server_url = args.server_url or []
    for url in args.server_url:
        if not url.startswith(("http://", "https://")):
            parser.error(f"--server_url {url} is no address; give one such as http://127.0.0.1:8000")
    if len(args.server_url) + bool(args.model_path) > 2:
        parser.error("two models at most are compared: two --server_url, or --model_path and one --server_url")
    if not args.model_path and not args.server_url:
        args.model_path = (
            f"quantized_models/{'miniature' if args.test_mode else 'llava-v1.6-mistral-7b-hf'}-FP8-Dynamic"
        )
    args.users = read_users(parser, args.auth_file) if args.auth_file else None
    return args


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


if __name__ == "__main__":
    parse_args()  # answers --help and refuses wrong flags before the heavy imports
    if importlib.util.find_spec("gradio") is None:
        sys.exit(
            "error: gradio is not installed; pip install -r requirements/vllm.txt (or, for --server_url alone, train.txt and host.txt)"
        )

import asyncio
import atexit
import base64
import difflib
import io
import json
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import unicodedata
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NoReturn

# Copied from llava_gradio_lora_host.UPLOADS
UPLOADS = Path(tempfile.mkdtemp(prefix="llava_host_")).resolve()  # where Gradio puts an uploaded file
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(UPLOADS)}
for name, value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(name, value)

import gradio as gr
import gradio.component_meta
import jinja2
import matplotlib
import numpy as np
import openai
from gradio.data_classes import ImageData
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

# Copied from llava_orpo_training.MAIN_PROCESS
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of several processes, the one that prints and writes


# Copied from llava_orpo_training.console
console = Console(stderr=True, quiet=not MAIN_PROCESS)
# Copied from llava_gradio_lora_host.MAX_FILE
MAX_FILE = 20  # megabytes of a picture's file


# Copied from llava_gradio_lora_host.MAX_PIXELS
MAX_PIXELS = 50_000_000  # of a picture, of which the model sees at most 1,008 x 336 or 672 x 672


# Copied from llava_gradio_lora_host.MAX_QUESTION
MAX_QUESTION = 4_000  # characters


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


# Copied from llava_amber_validation_benchmark_with_lora.THINGS
THINGS = {f"noun.{name}" for name in ("animal", "artifact", "body", "food", "object", "person", "plant", "substance")}


# Copied from llava_amber_validation_benchmark_with_lora.NO_OBJECTS
NO_OBJECTS = set(
    "image picture photo photograph scene view background foreground side top bottom line shape object".split()
)


# Copied from llava_amber_validation_benchmark_with_lora.find_nouns
def find_nouns(kind: str, vocabulary: set[str] | None) -> Callable[[str], list[tuple[str, str]]]:
    """Return a function from a text to its nouns in the vocabulary, in order: (as written, as in the vocabulary).

    `nltk` is AMBER's way: tokens tagged NN*, their WordNet lemma; without a vocabulary, those that WordNet files as things
    to be seen. `vocabulary` looks words and regular plurals up.
    """
    if kind == "vocabulary":
        return look_up_nouns(vocabulary)
    try:
        import nltk

        # loading WordNet also maps it to other versions of itself, which takes seconds and which no lemma needs
        nltk.corpus.reader.wordnet.WordNetCorpusReader.map_wn = lambda *_: None
        lemmatizer = nltk.stem.WordNetLemmatizer()

        def is_thing(lemma: str) -> bool:
            senses = nltk.corpus.wordnet.synsets(lemma, "n")[:2]
            return lemma not in NO_OBJECTS and any(sense.lexname() in THINGS for sense in senses)

        def tag_nouns(text: str) -> list[tuple[str, str]]:
            tagged = nltk.pos_tag(nltk.word_tokenize(text))
            nouns = [(word, lemmatizer.lemmatize(word)) for word, tag in tagged if tag.startswith("NN")]
            return [(word, lemma) for word, lemma in nouns if (lemma in vocabulary if vocabulary else is_thing(lemma))]

        tag_nouns("Two dogs.")
        return tag_nouns
    except ImportError:
        stop("--nouns nltk needs NLTK: pip install -r requirements/eval.txt")
    except LookupError:
        stop("--nouns nltk needs NLTK's data: python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet "
             "(without them, --nouns vocabulary gives figures that are not official)")  # fmt: skip


# Copied from llava_gradio_lora_host.Refused
class Refused(ValueError):
    """What was asked for cannot be done; the text is a sentence for its user."""


# Copied from llava_gradio_lora_host.read_picture
def read_picture(data: bytes | None) -> Image.Image:
    """Read a picture's file. Raises Refused with a sentence for its user if it is none, or too big."""
    if data is None:
        raise Refused("There is no picture yet: upload one, paste one, or take one of the examples.")
    if not data:
        raise Refused("This file is empty (0 bytes); choose a picture.")
    if len(data) > MAX_FILE * 10**6:
        raise Refused(f"This file has {len(data) / 1e6:,.0f} MB; a picture may have {MAX_FILE}.")
    try:
        width, height = Image.open(io.BytesIO(data)).size  # the header alone
    except Image.DecompressionBombError:
        width = height = 10**5
    except Exception as error:  # a broken file makes Pillow's parsers raise almost anything
        raise Refused("This file is no picture that can be read; choose a JPEG, PNG or WebP file.") from error
    if width * height > MAX_PIXELS:
        raise Refused(
            f"This picture has more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller, the model sees less than one."
        )
    if max(width, height) > 100 * min(width, height):
        raise Refused(f"This picture is {width:,} x {height:,} pixels, too narrow to be one; crop it.")
    try:
        return load_image(data)
    except Exception as error:
        raise Refused("This picture's file is broken off or damaged; choose another.") from error


# Copied from llava_gradio_lora_host.show_picture
def show_picture(data: bytes) -> bytes:
    """The file as browsers can show it: itself, or a PNG of what the model sees. Raises OSError if it is no picture."""
    image = Image.open(io.BytesIO(data))
    plain = image.mode in ("RGB", "RGBA", "L") and not (image.format != "MPO" and getattr(image, "is_animated", False))
    if plain and image.format in ("JPEG", "MPO", "PNG", "WEBP"):  # MPO: a phone's JPEG with more in it
        return data
    image = load_image(data)
    for side in (max(image.size), 2048):  # more than the model sees, and small enough to be sent along
        buffer = io.BytesIO()
        ImageOps.contain(image, (side, side)).save(buffer, "PNG")
        if buffer.tell() < MAX_FILE * 10**6:
            break
    return buffer.getvalue()


# Copied from llava_gradio_lora_host.check_question
def check_question(question: str) -> str:
    """Return the question as the model is asked it; an empty one asks for a description. Raises gr.Error if it is too long."""
    if len(question) > MAX_QUESTION:
        refuse(f"The question has {len(question):,} characters; {MAX_QUESTION:,} are allowed.")
    return question.strip() or QUESTIONS[0]


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


# Copied from llava_gradio_lora_host.Answer
@dataclass
class Answer:
    """One model's answer to one question, as the page shows it."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    line: str = ""  # what it cost
    objects: dict[str, str] = field(default_factory=dict)  # word as written, in lower case -> object
    doubtful: set[str] = field(default_factory=set)  # those objects that the check does not confirm


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


# Copied from llava_gradio_lora_host.choose_nouns
def choose_nouns() -> Callable:
    """find_nouns with NLTK's data if they are there, else with OBJECTS."""
    try:
        from nltk.data import find

        for path in ("tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng", "corpora/wordnet.zip"):
            find(path)
        return find_nouns("nltk", None)
    except (ImportError, LookupError):
        console.print(f"objects are looked up among {len(OBJECTS)} words; to find more: "
                      "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet", soft_wrap=True)  # fmt: skip
        return find_nouns("vocabulary", OBJECTS)


# ---------------------------------------------------------------------------- who generates: vLLM here, or a server


@dataclass(eq=False)
class ShownPicture:
    """A picture as its user sees it."""

    image: Image.Image
    digest: int

    @cached_property
    def address(self) -> str:
        """The picture as a data: address, for a server; PNG, so that the model there sees the same pixels."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", compress_level=1)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class LocalEngine:
    """vLLM's asynchronous engine, in processes of its own that belong to this one."""

    def __init__(self, args):
        folder = Path(args.model_path)
        if not (folder / "config.json").is_file():
            stop(f"--model_path {folder} {'has no config.json' if folder.is_dir() else 'is no folder'}; make a checkpoint with "
                 f"llava_quantize_vllm.py{' --test_mode' if args.test_mode else ''}, or name one.")  # fmt: skip
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            stop(f"--model_path {folder}: its config.json cannot be read ({error}).")
        if kind != "llava_next":
            stop(
                f"--model_path {folder} is a {kind} checkpoint; this serves LLaVA-1.6 as llava_quantize_vllm.py writes it."
            )
        if importlib.util.find_spec("vllm") is None:
            stop("vLLM is not installed; pip install -r requirements/vllm.txt, or name a server with --server_url.")
        import torch
        from transformers import AutoProcessor
        from vllm import AsyncEngineArgs, SamplingParams
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError

        self.name, self.SamplingParams, self.EngineDeadError = (
            "/".join(folder.parts[-2:]),
            SamplingParams,
            EngineDeadError,
        )
        on_cpu = not torch.cuda.is_available()  # for trying, where starting soon counts for more
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's own choice is half of the memory
        settings = AsyncEngineArgs(
            model=str(folder), dtype=args.dtype, tensor_parallel_size=args.tensor_parallel_size, max_num_seqs=args.max_num_seqs,
            limit_mm_per_prompt={"image": 1}, enable_prefix_caching=True, enable_log_requests=False, disable_log_stats=True,
            enforce_eager=on_cpu, skip_mm_profiling=on_cpu,
        )  # fmt: skip
        try:
            self.processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
            self.engine = AsyncLLM.from_engine_args(settings)
        except Exception as error:
            stop(f"--model_path {folder}: vLLM does not start ({type(error).__name__}: {(str(error) or '?').splitlines()[0]}); "
                 "the lines above say why.", code=1)  # fmt: skip

    @property
    def dead(self) -> bool:
        return self.engine.errored

    def write_prompt(self, picture: ShownPicture, question: str, earlier: list) -> dict:
        """vLLM's prompt: token ids with BOS and one `<image>`, in whose place vLLM puts the picture's tokens."""
        history = [(old, answer.tokens) for old, answer in earlier]
        ids = build_chat(self.processor, picture.image.size, question, history)
        token = self.processor.image_token_id
        first = ids.index(token)
        ids = [*ids[:first], token, *(other for other in ids[first:] if other != token)]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": picture.image}}

    async def stream(self, prompt: dict, temperature: float, top_p: float, max_new_tokens: int) -> AsyncIterator[tuple]:
        """Generate; yields (tokens, text, None, or how it ended: stop or length). Whoever stops reading ends it."""
        sampling = self.SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens)
        try:
            async for output in self.engine.generate(prompt, sampling, uuid.uuid4().hex):
                answer = output.outputs[0]
                yield list(answer.token_ids), answer.text, answer.finish_reason
        except self.EngineDeadError as error:
            raise Refused("The model's engine has died, and this server ends; it has to be started again.") from error
        except ValueError as error:  # a prompt longer than the model's context
            raise Refused(f"The model cannot take this: {error}") from error

    def close(self) -> None:
        self.engine.shutdown()


class Server:
    """An OpenAI-compatible server that runs the model: `vllm serve`, on whatever machines."""

    dead = False  # it may come back

    def __init__(self, url: str):
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("OPENAI_API_KEY") or "none"
        try:
            with openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=1, timeout=20) as client:
                model = client.models.list().data[0]
                words = client.post(
                    f"{self.url}/tokenize", cast_to=object,
                    body={"model": model.id, "messages": [{"role": "user", "content": "Is it?"}], "return_token_strs": True},
                )["token_strs"]  # fmt: skip
            self.lacks_bos = words[0] != "<s>"  # the hub's template has none, and the model was trained with it
        except openai.AuthenticationError:
            found = "refuses the key in" if key != "none" else "wants a key, and there is none in"
            stop(f"--server_url {url} {found} OPENAI_API_KEY; put its own into the environment.")
        except Exception as error:  # whatever else listens there
            stop(f"--server_url {url} does not answer as vLLM's server does ({type(error).__name__}: "
                 f"{(str(error) or '?').splitlines()[0]}); start it first, or correct the address.")  # fmt: skip
        self.model, self.name = model.id, "/".join(Path(model.id).parts[-2:])
        self.limit = getattr(model, "max_model_len", None) or 2**20  # more is refused
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=600)

    def write_prompt(self, picture: ShownPicture, question: str, earlier: list) -> list[dict]:
        """The conversation as messages; what the server's tokenizer would take for special tokens is none in a question."""

        def plain(text: str) -> str:
            return re.sub(r"<(/?)(image|s|pad|unk)>", r"(\1\2)", text)

        messages = []
        for asked, answer in [*earlier, (question, None)]:
            messages.append({"role": "user", "content": [{"type": "text", "text": plain(asked)}]})
            if answer:
                messages.append({"role": "assistant", "content": answer.text})
        messages[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": picture.address}})
        return messages

    async def stream(self, prompt: list, temperature: float, top_p: float, max_new_tokens: int) -> AsyncIterator[tuple]:
        """Generate; yields (tokens, text, None, or how it ended: stop or length). Whoever stops reading ends it."""
        tokens, text, end = [], "", None
        try:
            async with await self.client.chat.completions.create(
                model=self.model, messages=prompt, temperature=temperature, top_p=top_p, 
                max_completion_tokens=min(max_new_tokens, self.limit),
                stream=True, extra_body={"add_special_tokens": self.lacks_bos, "return_token_ids": True},
            ) as chunks:  # fmt: skip
                async for chunk in chunks:
                    for choice in chunk.choices:
                        tokens += getattr(choice, "token_ids", None) or []
                        text, end = text + (choice.delta.content or ""), choice.finish_reason or end
                        yield tokens, text, end
        except openai.APIStatusError as error:
            raise Refused(f"The model's server refuses this: {error.message[:300]}") from error
        except Exception as error:  # a lost connection, or lines that are no answer; users need not know the address
            console.print(f"{self.url}: {type(error).__name__}: {error}", markup=False)
            raise Refused(f"The server of {self.name} does not answer; ask again in a moment.") from error
        if end not in ("stop", "length"):
            raise Refused(f"The server of {self.name} broke off in the middle; ask again.")

    def close(self) -> None:
        pass


class VllmHost:
    """What the page and the API need to answer: who generates, the checks, the names."""

    def __init__(self, args):
        servers = [Server(url) for url in args.server_url]  # first, as it takes no time to find one missing
        models = ([LocalEngine(args)] if args.model_path else []) + servers
        self.models = {True: models[0]} | ({False: models[1]} if models[1:] else {})
        self.find, self.clears = choose_nouns(), Counter()
        self.queue_size, self.places = args.queue_size, asyncio.Semaphore(args.max_num_seqs)
        self.checking = asyncio.Semaphore(8)
        self.waiting: dict[int, Answer] = {}  # by id: answers that have not begun are all equal
        self.running: dict[str, set[asyncio.Task]] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        name = models[0].name
        self.headline = f"# LLaVA-1.6, aligned and quantized\nGive a picture, ask about it. Model `{name}`"
        self.titles, self.views = {True: "Answers"}, {"Answers": [True]}
        if models[1:]:
            self.headline += f" · beside it `{models[1].name}`"
            self.titles = {False: f"Beside it: {models[1].name}", True: f"This model: {name}"}
            self.views = {"Side by side": [False, True], "This model only": [True], "The other only": [False]}
        self.checker = "the model, asked about it, did not say yes"
        self.settings = {"model": name, "beside": models[1].name if models[1:] else None, "check": "yes/no questions"}

    @property
    def dead(self) -> bool:
        return any(model.dead for model in self.models.values())

    def stop_session(self, session: str) -> None:
        """End all that a session asked for."""
        for task in list(self.running.get(session, ())):
            self.loop.call_soon_threadsafe(task.cancel)

    def forget(self, session: str) -> None:
        self.stop_session(session)  # nothing else is kept for it here

    def prepare(self, data: bytes | None, question: str) -> tuple[ShownPicture, str]:
        """The picture and the question as they are asked. Raises Refused."""
        image = read_picture(data)
        return ShownPicture(image, zlib.crc32(image.tobytes())), check_question(question)

    def write_prompts(self, picture: ShownPicture, question: str, wanted: dict[bool, list]) -> dict[bool, object]:
        """The prompts, which follow `wanted`: earlier (question, Answer) turns for this model and the other."""
        return {side: self.models[side].write_prompt(picture, question, turns) for side, turns in wanted.items()}

    async def grow(self, side: bool, answer: Answer, prompt, sampling: dict) -> None:
        """Generate an answer into `answer`, when there is a place for it."""
        asked, first, end = time.monotonic(), 0.0, None
        try:
            async with self.places:
                self.waiting.pop(id(answer), None)
                answer.line = "reading the picture …"
                async with aclosing(self.models[side].stream(prompt, **sampling)) as growing:
                    async for update in growing:
                        tokens, text, end = update
                        if not tokens and not text:
                            continue
                        first = first or time.monotonic()
                        answer.tokens, answer.text = tokens, text.strip().rstrip("\ufffd")
                        parts = [f"{first - asked:.2f} s to first token"]
                        if len(tokens) > 1:
                            parts.append(f"{(len(tokens) - 1) / max(time.monotonic() - first, 1e-3):.1f} tokens/s")
                        answer.line = " · ".join([*parts, self.models[side].name])
            if end == "length":
                answer.line += " · cut off at the answer length"
        except asyncio.CancelledError:
            answer.line = f"{answer.line} · stopped" if first else "stopped"
            raise

    async def answer(
        self, picture: ShownPicture, prompts: dict[bool, object], session: str, mark: bool, **sampling
    ) -> AsyncIterator[dict]:
        """Answer each of `prompts` (this model: True, the other: False), as they grow: {side: Answer}.

        Whoever stops reading stops the generation. Raises Refused with a sentence for a user who cannot be answered.
        `mark` has the doubtful objects of the finished answers found.
        """
        if len(self.waiting) >= self.queue_size:
            raise Refused(
                f"The queue is full: {self.queue_size} answers wait for a place already; ask again in a moment."
            )
        self.loop = asyncio.get_running_loop()
        if sampling["temperature"] < 0.01:
            sampling["temperature"] = 0
        answers = {side: Answer() for side in prompts}
        self.waiting |= {id(answer): answer for answer in answers.values()}
        tasks = {
            asyncio.create_task(self.grow(side, answers[side], prompt, sampling)) for side, prompt in prompts.items()
        }
        self.running.setdefault(session, set()).update(tasks)
        try:
            pending = tasks
            while pending:
                growing = sum(map(len, self.running.values()))
                _, pending = await asyncio.wait(pending, timeout=0.1 + 0.01 * growing)  # sending costs the server time
                for place, answer in enumerate(self.waiting.values()):
                    answer.line = f"waiting for a place, {place} before this one …"
                yield {side: replace(answer) for side, answer in answers.items()}
            stopped = any(task.cancelled() for task in tasks)
            for task in tasks:
                if not task.cancelled() and task.exception():
                    raise task.exception()
            if not stopped:
                checking = asyncio.create_task(self.find_doubtful(picture, answers, mark))
                tasks.add(checking)
                self.running[session].add(checking)
                await asyncio.wait({checking})
                if checking.cancelled() or checking.exception():  # the answers are there all the same
                    if not checking.cancelled():
                        console.print(f"a check failed: {checking.exception()!r}", markup=False)
                    for answer in answers.values():
                        answer.line += " · not checked"
            yield answers
        finally:
            for task in tasks:
                task.cancel()
            for answer in answers.values():
                self.waiting.pop(id(answer), None)
            self.running[session] -= tasks
            if not self.running[session]:
                del self.running[session]

    async def find_doubtful(self, picture: ShownPicture, answers: dict[bool, Answer], mark: bool) -> None:
        """Note the objects that the answers name, and which of them the model, asked about each, does not confirm."""
        for answer in answers.values():
            answer.objects = dict(self.find(answer.text.lower()))
        words = sorted({word for answer in answers.values() for word in answer.objects.values() if mark})
        model = self.models[min(answers)]  # the other, where there is one: it is the one that was not quantized

        async def confirm(word: str) -> bool:
            question = f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word} in this image?"
            text = ""
            async with (
                self.checking,
                aclosing(
                    model.stream(model.write_prompt(picture, question, []), temperature=0, top_p=1, max_new_tokens=2)
                ) as growing,
            ):
                async for update in growing:
                    text = update[1]
            return text.strip().lower().startswith("yes")

        found = await asyncio.gather(*(confirm(word) for word in words))
        doubtful = {word for word, there in zip(words, found, strict=True) if not there}
        for answer in answers.values():
            answer.doubtful = doubtful & set(answer.objects.values())

    def close(self) -> None:
        for model in self.models.values():
            model.close()


# ---------------------------------------------------------------------------- the page


gradio.component_meta.create_or_modify_pyi = lambda *_: None  # it would write a .pyi file beside this script


# Copied from llava_gradio_lora_host.Upload
class Upload(bytes):
    """A picture's file as it was uploaded, which the browser does not yet hold as a data: address."""


# Copied from llava_gradio_lora_host.READ
READ: dict[Path, float] = {}  # when an uploaded file was last read, time.time()


# Copied from llava_gradio_lora_host.READ_SECONDS
READ_SECONDS = 20  # after which it goes: another user may have sent the same, and have to wait


# Copied from llava_gradio_lora_host.UNREAD_SECONDS
UNREAD_SECONDS = 900  # after which one goes that nobody asked about


# Copied from llava_gradio_lora_host.sweep_uploads
def sweep_uploads() -> None:
    """Delete the uploaded files that were read, and those that nobody asked about."""
    for path in [path for path in UPLOADS.rglob("*") if path.is_file()]:
        with suppress(OSError):  # gone in the meantime
            written, read = path.stat().st_mtime, READ.get(path, 0)
            if time.time() > (read + READ_SECONDS if read > written else written + UNREAD_SECONDS):
                READ.pop(path, None)
                path.unlink()
                path.parent.rmdir()  # its name is the file's digest


# Copied from llava_gradio_lora_host.InlinePicture
class InlinePicture(gr.Image):
    """A picture that lives in the browser: its file is deleted soon after it was read, and the page carries it as a data: address."""

    is_template = True  # to Gradio's frontend, it is an Image

    def preprocess(self, payload: ImageData | None) -> bytes | None:
        """The picture's file, as the page's data: address or as an upload."""
        if payload is None or not (payload.url or payload.path):
            return None
        if (payload.url or "").startswith("data:"):
            with suppress(ValueError):
                return base64.b64decode(payload.url.partition(",")[2])
            return b""
        path = Path(payload.path).resolve()
        if UPLOADS not in path.parents or not path.is_file():  # a caller can send any path
            raise gr.Error("This is no uploaded picture, or its time is over; upload it again.", print_exception=False)
        READ[path] = time.time()
        return Upload(path.read_bytes())

    def postprocess(self, value: bytes | str | None) -> ImageData | None:
        """A picture's file, or the path of an example, as a data: address."""
        if value is None:
            return None
        data = value if isinstance(value, bytes) else Path(value).read_bytes()
        kind = Image.open(io.BytesIO(data)).get_format_mimetype()
        return ImageData(url=f"data:{kind};base64,{base64.b64encode(data).decode()}")

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | None) -> str | None:
        """Leave an uploaded file where it is; never fetch one from elsewhere."""
        if url_or_file_path and re.match(r"\w+://", str(url_or_file_path)):
            raise gr.Error("This server fetches no pictures from addresses; upload the file.", print_exception=False)
        return url_or_file_path


# Copied from llava_gradio_lora_host.Gate
class Gate:
    """Turns away requests with a body larger than a picture and a question can be, and any for an uploaded file: a picture
    is for the model, and the browser that sent it has it."""

    def __init__(self, app):
        self.app, self.limit = app, MAX_FILE * 10**6 * 3 // 2  # as base64, and some text

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self.limit:
                answer = PlainTextResponse(f"A request may have {self.limit:,} bytes.", 413)
                return await answer(scope, receive, send)
            file = Path(scope["path"].partition("/file=")[2] or "/").resolve()
            if UPLOADS in file.parents or scope["path"].rstrip("/").endswith(
                "/deep_link"
            ):  # which would write them to disk
                return await PlainTextResponse("Uploaded pictures are not served.", 404)(scope, receive, send)
        read = 0

        async def receive_some():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message if read <= self.limit else {"type": "http.disconnect"}

        await self.app(scope, receive_some, send)


# Copied from llava_gradio_lora_host.TALK
TALK = jinja2.Template(
    """\
<div class="talk {{ 'two' if sides | length == 2 }}">
  {% for side in sides %}<h3>{{ titles[side] }}</h3>{% endfor %}
  {% for turn in turns | reverse %}
  <p class="question">{{ turn.question }}</p>
  {% for side in sides %}
  <section class="{{ 'aligned' if side else 'base' }}" aria-label="{{ titles[side] }}">
    {% if side in turn.answers %}
    <p class="side">{{ titles[side] }}</p>
    <p class="answer" aria-live="polite">
    {%- for text, differs, doubtful in mark(turn, side) %}
      {%- if differs %}<mark>{% endif %}{% if doubtful %}<u title="not confirmed to be in the picture">{% endif %}{{ text }}
      {%- if doubtful %}</u>{% endif %}{% if differs %}</mark>{% endif %}
    {%- endfor %}</p>
    <p class="cost">{{ turn.answers[side].line }}</p>
    {% endif %}
  </section>
  {% endfor %}
  {% else %}{% for side in sides %}<p class="empty">Answers appear here.</p>{% endfor %}
  {% endfor %}
</div>""",
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


# Copied from llava_gradio_lora_host.DOWNLOAD
DOWNLOAD = """(file) => {
  if (!file) return;
  const bytes = Uint8Array.from(atob(file), c => c.charCodeAt(0));
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([bytes], {type: 'application/zip'}));
  link.download = 'llava_pair.zip';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


# Copied from llava_gradio_lora_host.QUESTIONS
QUESTIONS = ["Describe this image.", "Name everything you can see in this image.", "Is there a chair in this image?"]


# Copied from llava_gradio_lora_host.EXAMPLES
EXAMPLES = [16, 6, 34, 19, 3, 5]  # of the miniature's pictures


# Copied from llava_gradio_lora_host.split_words
def split_words(text: str) -> list[str]:
    """Return the text in words and what is between them."""
    return re.findall(r"\w+(?:[-'’]\w+)*|\W+", text)


# Copied from llava_gradio_lora_host.find_differences
@lru_cache(1000)
def find_differences(text: str, other: str) -> frozenset[int]:
    """Which of split_words' pieces of `text` are not in the other text, in order (difflib's matching blocks)."""
    pieces = split_words(text)
    words = [number for number, piece in enumerate(pieces) if re.match(r"\w", piece)]
    others = [piece.lower() for piece in split_words(other) if re.match(r"\w", piece)]
    # in a long text that repeats itself, an exact search would take seconds
    match = difflib.SequenceMatcher(
        None, [pieces[number].lower() for number in words], others, autojunk=len(words) > 300
    )
    differs = {n for kind, start, end, _, _ in match.get_opcodes() if kind != "equal" for n in words[start:end]}
    return frozenset(differs | {number for number in range(len(pieces)) if {number - 1, number + 1} <= differs})


# Copied from llava_gradio_lora_host.mark_pieces
def mark_pieces(answer: Answer, other: Answer | None) -> list[tuple[str, bool, bool]]:
    """The answer's text in pieces (text, differs from the other answer, is a doubtful object); together, they are it."""
    differs = find_differences(answer.text, other.text) if other and other.text else ()
    return [(piece, number in differs, answer.objects.get(piece.lower()) in answer.doubtful)
            for number, piece in enumerate(split_words(answer.text))]  # fmt: skip


# Copied from llava_gradio_lora_host.render_talk
def render_talk(titles: dict[bool, str], turns: list[dict], sides: list[bool]) -> str:
    """The page's HTML of a conversation, the newest turn first; `turns` have a question and answers {adapter: Answer}."""

    def mark(turn: dict, side: bool) -> list:
        answers = turn["answers"]
        whole = "asked" in turn and len(sides) == 2  # while answers grow, all would differ
        return mark_pieces(answers[side], answers.get(not side) if whole else None)

    return TALK.render(titles=titles, turns=turns, sides=sides, mark=mark)


# Copied from llava_gradio_lora_host.draw_pair
def draw_pair(image: Image.Image, titles: dict[bool, str], turn: dict) -> bytes:
    """A turn as a picture for a report, PNG: the picture, the question, the answers side by side with their marks."""
    width, gap = 1200, 40
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Pillow's own font has fewer letters
    fonts = {size: ImageFont.truetype(file, size) for size in (16, 21, 23)}
    names = [name for name in (False, True) if name in turn["answers"]]
    column = (width - gap * (len(names) + 1)) // len(names)
    picture = ImageOps.contain(image, (width - 2 * gap, 480))
    sheet = Image.new("RGB", (width, 20_000), "white")
    draw = ImageDraw.Draw(sheet)
    sheet.paste(picture, (gap, gap))

    def write(pieces: list, left: int, top: int, room: int, size: int, fill: str) -> int:
        """Lay pieces (text, differs, doubtful) out in lines of `room` pixels; returns where the next line starts."""
        font, x, y = fonts[size], left, top
        height = int(size * 1.5)
        for text, differs, doubtful in pieces:
            parts = re.findall(r"\n|[^\S\n]+|\S+", text)
            if any(draw.textlength(part, font) > room for part in parts if part != "\n"):
                parts = list(text)  # a language without spaces
            for part in parts:
                long = draw.textlength(part, font) if part != "\n" else 0
                if part == "\n" or (x + long > left + room and x > left and re.match(r"[\w<(\[]", part)):
                    x, y = left, y + height
                if part.isspace() and x == left:
                    continue
                if differs:
                    draw.rectangle((x - 1, y + 1, x + long + 1, y + height - 4), fill="#ffe08a")
                draw.text((x, y), part, fill, font)
                if doubtful:
                    wave = [(x + i, y + height - 4 + 2 * (i // 4 % 2)) for i in range(0, int(long) + 1, 4)]
                    draw.line(wave, "#dd3333", 2)
                x += long
        return y + height

    top = write([(turn["question"], False, False)], gap, gap * 2 + picture.height, width - 2 * gap, 23, "black") + 16
    ends = []
    for place, name in enumerate(names):
        left = gap + place * (column + gap)
        y = write([(titles[name], False, False)], left, top, column, 16, "#666666") + 4
        answer = turn["answers"][name]
        y = write(mark_pieces(answer, turn["answers"].get(not name)), left, y, column, 21, "black") + 8
        ends.append(write([(answer.line, False, False)], left, y, column, 16, "#666666"))
    legend = [("differs", True, False), ("  from the other answer    ", False, False)] if len(names) == 2 else []
    legend += [("doubtful", False, True), ("  object: the check, which can be wrong, did not confirm it", False, False)]
    bottom = write(legend, gap, max(ends) + 16, width - 2 * gap, 16, "#444444")
    buffer = io.BytesIO()
    sheet.crop((0, 0, width, min(bottom + gap, sheet.height))).save(buffer, "PNG")
    return buffer.getvalue()


# Copied from llava_gradio_lora_host.pack_pair
def pack_pair(image: Image.Image, titles: dict[bool, str], turn: dict, settings: dict) -> str:
    """A turn as a zip file of pair.png and pair.json, in base64."""
    answers = [{"title": titles[name], "adapter": name, "answer": answer.text, "tokens": len(answer.tokens), "cost": answer.line,
                "objects": sorted(set(answer.objects.values())), "doubtful": sorted(answer.doubtful)}
               for name, answer in sorted(turn["answers"].items())]  # fmt: skip
    content = {"question": turn["question"], **settings, "picture": {"width": image.width, "height": image.height,
               "crc32": f"{zlib.crc32(image.tobytes()):08x}"}, "answers": answers}  # fmt: skip
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("pair.png", draw_pair(image, titles, turn))
        file.writestr("pair.json", json.dumps(content, indent=1, ensure_ascii=False))
    return base64.b64encode(buffer.getvalue()).decode()


# Copied from llava_gradio_lora_host.build_page
def build_page(engine, about: str, max_new_tokens: int, remember: bool, users: int, queue_size: int) -> gr.Blocks:
    """Return the page and its API over an engine, which has `models` (their names) and `stream` (see Engine).

    `about` is the line below the title, `remember` whether follow-up questions see the conversation at first, and `users`
    how many questions are answered at once, while `queue_size` more wait.
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
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 always takes the likeliest token")
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


# Copied from llava_gradio_lora_host.check_port
def check_port(args) -> None:
    """Stop if the address or the port cannot be had, before the model is loaded."""
    try:
        socket.create_server((args.host, args.port or 0)).close()
    except OSError as error:
        where = f"--host {args.host}" + (f" --port {args.port}" if args.port else "")
        reason = os.strerror(error.errno) if error.errno else error
        stop(f"{where} cannot be listened on ({reason}); name another, or end what listens there.")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_port(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that UPLOADS is deleted
    host = VllmHost(args)
    page = build_page(host, args)
    launch_page(page, args, args.port)
    names = " and ".join(model.name for model in host.models.values())
    console.print(f"serving {names} at {page.local_url}{f' and {page.share_url}' if page.share_url else ''}; Ctrl+C ends it",
                  soft_wrap=True)  # fmt: skip
    try:
        while not host.dead:
            time.sleep(0.5)
        time.sleep(3)  # in which the pages hear of it
    finally:
        host.close()
    stop("the model's engine has died; its own lines above say why. Start this again.", code=1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted.", code=130)
