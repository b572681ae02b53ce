"""Serve LLaVA-1.6 with a LoRA adapter as a web page: ask about a picture, and see what the alignment changed.

Reads   a LLaVA-NeXT checkpoint (--model_path) and an adapter (--lora_path).
Writes  nothing that stays: uploaded pictures are deleted seconds after they were read.
Needs   pip install -r requirements/train.txt -r requirements/host.txt
        python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet     (optional: finds more objects)

    python llava_gradio_lora_host.py --model_path liuhaotian/llava-v1.6-mistral-7b --lora_path checkpoints/llava-orpo-prod
    python llava_gradio_lora_host.py --lora_path checkpoints/llava-orpo-prod --load_4bit --host 0.0.0.0 --auth_file users.txt
    python llava_gradio_lora_host.py --test_mode          # the embedded miniature, no GPU, no downloads
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
    add(model, "--model_path", "base model: hub id or folder", default="llava-hf/llava-v1.6-mistral-7b-hf")
    add(model, "--lora_path", "adapter folder")
    add(
        model,
        "--device",
        "auto (cuda, then mps, then cpu), all (layers spread over the GPUs), or cuda:1, cpu …",
        default="auto",
    )
    bits = model.add_mutually_exclusive_group()
    add(bits, "--load_4bit", "QLoRA: base weights in NF4 with double quantization", action="store_true")
    add(bits, "--load_8bit", "base weights in 8 bits (LLM.int8)", action="store_true")
    add(model, "--test_mode", "use the embedded miniature and its adapter where no model is given", action="store_true")

    answers = parser.add_argument_group("answers")
    add(answers, "--max_new_tokens", "tokens an answer may have; the page's slider ends there", type=int, default=1024)
    add(
        answers,
        "--temperature",
        "0 always takes the likeliest token; where the page's slider starts",
        type=float,
        default=0,
    )
    add(
        answers,
        "--verify",
        "candidates drawn for an answer that names objects; the one that a check confirms best is kept: "
        "--clip_model's, or the model's own yes/no answers",
        type=int,
        default=1,
    )
    add(
        answers,
        "--clip_model",
        "CLIP checkpoint that checks objects and --verify's candidates: hub id or folder "
        "(without it, the model's own yes/no answers do)",
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
    for name in ("max_new_tokens", "verify", "max_num_seqs", "queue_size"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} is {getattr(args, name)}; it must be above 0")
    if not 0 <= args.temperature <= 2:
        parser.error(f"--temperature is {args.temperature}; it must be from 0 to 2")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port is {args.port}; it must be from 1 to 65535")
    if args.test_mode and args.model_path == parser.get_default("model_path"):
        args.model_path = str(MINIATURE / "model")
        args.lora_path = args.lora_path or str(MINIATURE / "adapter")
    args.users = read_users(parser, args.auth_file) if args.auth_file else None
    return args


def read_users(parser: argparse.ArgumentParser, path: Path) -> list[tuple[str, str]]:
    """The (name, password) pairs of --auth_file."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        parser.error(f"--auth_file {path} cannot be read ({error}); give a text file with a name:password a line")
    users = [tuple(line.split(":", 1)) for line in lines if line and not line.startswith("#")]
    if not users or any(len(user) != 2 or not all(user) for user in users):
        parser.error(f"--auth_file {path} must have a name:password on every line, and at least one")
    return users


if __name__ == "__main__":
    parse_args()  # answers --help and refuses wrong flags before the heavy imports
    if importlib.util.find_spec("gradio") is None:
        sys.exit("error: gradio is not installed; pip install -r requirements/train.txt -r requirements/host.txt")

import asyncio
import atexit
import base64
import difflib
import inspect
import io
import json
import logging
import random
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import NoReturn

UPLOADS = Path(tempfile.mkdtemp(prefix="llava_host_")).resolve()  # where Gradio puts an uploaded file
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(UPLOADS)}
for name, value in {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import gradio as gr
import gradio.component_meta
import jinja2
import matplotlib
import numpy as np
import torch
from gradio.data_classes import ImageData
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from transformers import DynamicCache

# Copied from llava_orpo_training.MAIN_PROCESS
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of several under torchrun, the one that prints and writes
# Copied from llava_orpo_training.console
console = Console(stderr=True, quiet=not MAIN_PROCESS)

MAX_FILE = 20  # megabytes of a picture's file
MAX_PIXELS = 50_000_000  # of a picture; the model sees at most 1,008 x 336 or 672 x 672 of them
MAX_QUESTION = 4_000  # characters
KEPT_SECONDS = 900  # that a user's cache waits for the next question
PROMPT_TOKENS = 12_000  # of prompts that are read at once, while the answers of others wait


# ---------------------------------------------------------------------------- blocks copied from earlier scripts


# Copied from llava_orpo_training.stop
def stop(message: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# Copied from llava_orpo_training.load_image
def load_image(source: str | Path | bytes) -> Image.Image:
    """Open a picture from a path or from a file's bytes: upright (EXIF), RGB, what is transparent on white; of several
    frames the first. Raises OSError if it is none."""
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
    except Exception as error:  # a broken file makes Pillow's parsers raise almost anything
        raise OSError(str(error)) from error


# Copied from llava_orpo_training.build_prompt
def build_prompt(processor, question: str, image_size: tuple[int, int]) -> list[int]:
    """Token ids of LLaVA-1.6's prompt, BOS first: `[INST] <image>\\n{question} [/INST]`, or Vicuna's where the processor's
    chat template is Vicuna's.

    `image_size` is the picture's (width, height) in pixels: it decides how many image tokens stand for it. The text on
    either side of them is tokenized by itself, as the original code does, and the question as plain text: `<image>` or
    `</s>` inside it are no special tokens.
    """
    tokenizer = processor.tokenizer
    height_width = (image_size[1], image_size[0])
    num_image_tokens = processor._get_num_multimodal_tokens(image_sizes=[height_width])["num_image_tokens"][0]
    before, after = "[INST] ", " [/INST]"
    if "[INST]" not in (processor.chat_template or before):
        before = (
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions. USER: "
        )
        after = " ASSISTANT:"
    head = tokenizer(before, add_special_tokens=False).input_ids
    tail = tokenizer(f"\n{question}{after}", add_special_tokens=False, split_special_tokens=True).input_ids
    return [tokenizer.bos_token_id, *head, *[processor.image_token_id] * num_image_tokens, *tail]


# Copied from llava_orpo_training.ORIGINAL_KEYS
ORIGINAL_KEYS = {
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}


# Copied from llava_orpo_training.check_weights
def check_weights(folder: Path) -> None:
    """Refuse a checkpoint folder whose weights are pickled, incomplete or broken off; the sentence names the file."""
    index = folder / "model.safetensors.index.json"
    try:
        shards = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        stop(f"--model_path {folder}: {index.name} is no index of weight files; download it again.")
    for name in shards:
        file = folder / name
        if not file.exists() and not index.exists() and list(folder.glob("*.bin")):
            stop(f"--model_path {folder} holds pickled weights (.bin), which can run code when they are opened; convert them: "
                 "python -c \"import glob, torch, safetensors.torch as s; s.save_file({k: v.clone() for f in "
                 "glob.glob('pytorch_model*.bin') for k, v in torch.load(f, weights_only=True).items()}, 'model.safetensors', "
                 "{'format': 'pt'})\" in that folder")  # fmt: skip
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (OSError, SafetensorError) as error:
            stop(f"--model_path {folder}: {name} {'is not there' if not file.exists() else f'is broken ({error})'}; "
                 "download it again.")  # fmt: skip


# Copied from llava_orpo_training.read_original
def read_original(model_path: str, original: dict) -> tuple:
    """What a checkpoint in LLaVA's own format needs to be read by transformers: (config, processor, vision weights).

    `original` is its config.json. The vocabulary gets 64 more rows, `<image>` and `<pad>` first, as in the hub's converted
    checkpoints. The vision weights are None if they are in the checkpoint, else the model that mm_vision_tower names.
    """
    from transformers import AutoConfig, CLIPVisionConfig, LlamaTokenizer, LlavaNextConfig, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    wanted = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu",
              "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "vocab_size": 32000}  # fmt: skip
    for name, value in wanted.items():
        if original.get(name, value) != value or (isinstance(value, str) and name not in original):
            stop(f"--model_path {model_path} has {name} {original.get(name)!r} in its config.json, LLaVA-1.6 has {value!r}; "
                 "this reads LLaVA-1.6 only.")  # fmt: skip
    tower, layer = original["mm_vision_tower"], original["mm_vision_select_layer"]
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14, projection_dim=768)  # fmt: skip
    if tower != "openai/clip-vit-large-patch14-336":  # the one of all published checkpoints, spelled out above
        vision = AutoConfig.from_pretrained(tower, trust_remote_code=False)
        vision = getattr(vision, "vision_config", vision)
    ours = ("mm_", "image_", "tokenizer_", "unfreeze_", "tune_", "use_mm_", "freeze_")
    text = {
        name: value
        for name, value in original.items()
        if not name.startswith(ours) and name not in ("architectures", "auto_map")
    }
    text["model_type"] = "mistral" if original["model_type"] == "llava_mistral" else "llama"
    pinpoints = original["image_grid_pinpoints"]
    pinpoints = [
        [height, width] for width, height in (json.loads(pinpoints) if isinstance(pinpoints, str) else pinpoints)
    ]
    tokenizer = LlamaTokenizer.from_pretrained(model_path, add_bos_token=True, legacy=True, padding_side="left")
    rows = original["vocab_size"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) != [rows, rows + 1]:
        stop(
            f"--model_path {model_path} has {len(tokenizer) - 2} tokens in its tokenizer and {rows} rows in config.json."
        )
    config = LlavaNextConfig(
        vision_config=vision.to_dict(), text_config=text, image_token_index=rows, image_grid_pinpoints=pinpoints,
        vision_feature_layer=layer, tie_word_embeddings=False,
    )  # fmt: skip
    side = vision.image_size
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    template = "[INST] <image>\n{{ messages[0]['content'][-1]['text'] }} [/INST]"
    if text["model_type"] == "llama":
        template = "USER: <image>\n{{ messages[0]['content'][-1]['text'] }} ASSISTANT:"
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=vision.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip
    return config, processor, tower


# Copied from llava_orpo_training.read_checkpoint
def read_checkpoint(model_path: str) -> tuple:
    """A checkpoint's (config, processor, tower), without its weights. In the hub's layout config and tower are None; in
    LLaVA's own format see read_original. Stops with one sentence if it cannot be LLaVA-1.6."""
    from transformers import AutoProcessor, PreTrainedConfig

    if Path(model_path).is_dir():
        check_weights(Path(model_path))
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model_path):
        stop(f"--model_path {model_path} is no folder, and no hub id, which is owner/name.")
    try:
        found = PreTrainedConfig.get_config_dict(model_path)[0]
        kind = found.get("model_type")
        if kind in ("llava_mistral", "llava_llama", "llava") and "mm_vision_tower" in found:
            return read_original(model_path, found)
        if kind != "llava_next":
            stop(f"--model_path {model_path} {f'is a {kind} checkpoint' if found else 'has no config.json'}; this reads LLaVA-1.6: "
                 "llava_next, or llava_mistral and llava_llama in LLaVA's own format.")  # fmt: skip
        processor = AutoProcessor.from_pretrained(model_path, backend="pil", trust_remote_code=False)
        if re.search("im_start|start_header", processor.chat_template or ""):
            stop(
                f"--model_path {model_path} has a prompt template of another language model; this knows Mistral's and Vicuna's."
            )
        return None, processor, None
    except Exception as error:  # configurations can be wrong in more ways than libraries foresee
        stop(f"--model_path {model_path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}). "
             "Give a hub id or a folder with a LLaVA-1.6 checkpoint in safetensors.")  # fmt: skip


# Copied from llava_orpo_training.load_llava
def load_llava(
    model_path: str, lora_path: str | None = None, device="auto", load_4bit=False, load_8bit=False, merge_lora=None
):
    """Load a LLaVA-1.6 checkpoint, in the hub's layout or LLaVA's own, and an adapter; returns (model, processor).

    `device` auto is cuda, then mps, then cpu; all spreads the layers over the GPUs there are. Weights are bfloat16 on a
    GPU that has it (else float16) and float32 on the CPU. `load_4bit` keeps the language model in NF4 with double
    quantization, `load_8bit` in LLM.int8; vision tower, projector and head stay whole. `merge_lora`: see merge_adapter.
    Nothing but safetensors is read and no code of a checkpoint is run.
    """
    from transformers import BitsAndBytesConfig, LlavaNextForConditionalGeneration
    from transformers.conversion_mapping import get_model_conversion_mapping

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = torch.float32
    if device != "cpu":
        dtype = torch.bfloat16 if device == "mps" or torch.cuda.is_bf16_supported() else torch.float16
    quantization = None
    if load_4bit or load_8bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=load_4bit,
            load_in_8bit=load_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", ".*vision_tower.*", ".*multi_modal_projector.*"],
        )
    config, processor, tower = read_checkpoint(model_path)
    try:
        model, report = LlavaNextForConditionalGeneration.from_pretrained(
            model_path, config=config, key_mapping=ORIGINAL_KEYS if tower else None, dtype=dtype,
            quantization_config=quantization, device_map="auto" if device == "all" else {"": device}, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        missing = sorted(report["missing_keys"])
        vision = {key for key in model.state_dict() if "vision_tower" in key}
        if tower and vision <= set(missing):  # a part of a tower is no tower: it stays missing
            load_tower(model, tower)
            missing = [key for key in missing if key not in vision]
    except Exception as error:
        stop(
            f"--model_path {model_path} cannot be loaded ({type(error).__name__}: {(str(error) or '?').splitlines()[0]})."
        )
    wrong = [f"{key} is missing" for key in missing]
    wrong += [f"{key} has no place" for key in sorted(report["unexpected_keys"])]
    wrong += [f"{key} is {tuple(a)} in place of {tuple(b)}" for key, a, b in sorted(report["mismatched_keys"])]
    if wrong:
        stop(f"--model_path {model_path}: its weights do not fit its config.json: {wrong[0]}"
             f"{f' and {len(wrong) - 1} more' if wrong[1:] else ''}.")  # fmt: skip
    if hasattr(model, "ct_decompress_hook"):  # a quantized one, which else waits for a forward of the model as a whole
        model.hf_quantizer.compressor.decompress_model(model)
    if tower:
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)  # saved in the hub's layout
        # 64 rows more, each the mean of all others: its logit is the mean logit, and so never the greatest
        model.resize_token_embeddings(config.text_config.vocab_size + 64, mean_resizing=False)
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight.data[-64:] = weight.data[:-64].float().mean(0).to(weight.dtype)
    if load_4bit and device == "cpu":
        # bitsandbytes repacks weights on their first eval-mode forward; afterwards backward silently gives no gradient
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if lora_path:
        model = load_adapter(model.eval(), processor, model_path, lora_path)
    if lora_path and merge_lora:
        model = merge_adapter(model, processor, lora_path, merge_lora)
    return allow_cache_position(model.eval()), processor


# Copied from llava_orpo_training.load_tower
def load_tower(model, tower: str) -> None:
    """Take the vision weights from the CLIP checkpoint that the config names, where the checkpoint itself has none."""
    from transformers import CLIPVisionModel

    weights = CLIPVisionModel.from_pretrained(tower, dtype=model.dtype, use_safetensors=True).state_dict()
    model.model.vision_tower.load_state_dict(
        {key.removeprefix("vision_model."): weight for key, weight in weights.items()}
    )


# Copied from llava_orpo_training.allow_cache_position
def allow_cache_position(model):
    """Let callers pass `cache_position`, as transformers 4.38 to 4.57 do, to a model whose forward does not know it."""
    forward = model.forward
    parameters = inspect.signature(forward).parameters.values()
    if not any(p.name == "cache_position" or p.kind is p.VAR_KEYWORD for p in parameters):
        model.forward = wraps(forward)(lambda *args, cache_position=None, **kwargs: forward(*args, **kwargs))
    return model


# Copied from llava_orpo_training.ADAPTER_KEYS
ADAPTER_KEYS = [
    (r"^(base_model\.model\.)+", ""),
    (r"\.(base_layer|modules_to_save)\.", "."),
    *ORIGINAL_KEYS.items(),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector|language_model)\.", r"model.\1."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
]


# Copied from llava_orpo_training.read_adapter
def read_adapter(model, processor, model_path: str, lora_path: str) -> tuple:
    """Read a LoRA adapter for a model: (its LoraConfig, its weights by PEFT's names for this model). Stops with the reason
    if they do not belong together.

    Keys of other layouts (older PEFT and transformers, LLaVA's own) are renamed. Embedding or head weights of another
    number of rows are used as far as the model's own vocabulary goes. Every weight of the file finds its layer, and no
    layer that the configuration names is left out. Of the model, only embedding and head need values.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    def refuse(reason: str) -> NoReturn:
        stop(f"--lora_path {lora_path} cannot be used on {model_path}: {reason}.")

    folder = adapter_folder(lora_path)
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        pickled = (folder / "adapter_model.bin").exists()
        refuse("its weights are pickled (adapter_model.bin), which can run code when opened; convert them: python -c "
               "\"import torch, safetensors.torch as s; s.save_file(torch.load('adapter_model.bin', weights_only=True), "
               "'adapter_model.safetensors')\" in that folder" if pickled else "there is no adapter_model.safetensors in it")  # fmt: skip
    if (folder / "non_lora_trainables.bin").exists():
        refuse("LLaVA's own training left more trained weights in non_lora_trainables.bin, which are not read; merge it with "
               "that code first")  # fmt: skip
    try:
        config = LoraConfig.from_pretrained(folder)
        saved = load_file(file)
    except Exception as error:
        refuse(f"it cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})")
    if config.peft_type != "LORA":
        refuse(f"it is a {config.peft_type} adapter, this reads LoRA")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
        refuse(f"it was made with init_lora_weights={config.init_lora_weights!r}, which changes the base's weights too; convert "
               "it with PEFT's path_initial_model_for_weight_conversion")  # fmt: skip
    modules = dict(model.named_modules())
    vocabulary = {name for name, module in modules.items() if module in (model.get_input_embeddings(), model.lm_head)}
    rows, known = model.get_input_embeddings().weight.shape[0], processor.image_token_id
    lora, whole, weights, ranks, alphas = set(), set(), {}, {}, {}
    for key, weight in saved.items():
        name = key
        for pattern, replacement in ADAPTER_KEYS:
            name = re.sub(pattern, replacement, name)
        module, is_lora = re.split(r"\.lora_|\.(?:weight|bias)$", name)[0], ".lora_" in name
        if module not in modules:
            refuse(f"it has weights for {key}, and the model no layer of that name")
        if not weight.isfinite().all():
            refuse(f"{key} is not finite")
        if name.endswith(".bias") and config.bias != "none":
            refuse(f"it trained biases too (bias={config.bias!r}), which are not read")
        if ".base_layer." in key and torch.equal(weight[:known].float(), modules[module].weight[:known].float().cpu()):
            continue  # PEFT saves the base's own embedding beside an update of it
        if module in vocabulary and weight.shape[0] != rows and (not is_lora or "lora_B" in name):
            if weight.shape[0] < known:
                refuse(f"{key} has {weight.shape[0]:,} rows, fewer than the vocabulary's {known:,}")
            # rows that the base's tokens have come from the adapter, all others from the base
            mine = (
                weight.new_zeros(rows, weight.shape[1])
                if is_lora
                else modules[module].weight.detach().to(weight).clone()
            )
            mine[:known] = weight[:known]
            console.print(f"{key} has {weight.shape[0]:,} rows, the base's vocabulary {known:,}: "
                          f"the first {known:,} are used, {weight.shape[0] - known:,} left out")  # fmt: skip
            weight = mine
        if not is_lora and weight.shape != (own := getattr(modules[module], name.split(".")[-1])).shape:
            refuse(f"{key} is {tuple(weight.shape)}, the model's layer {tuple(own.shape)}")
        (lora if is_lora else whole).add(module)
        weights[f"base_model.model.{name}"] = weight
        if is_lora:  # patterns are written for the names that the adapter was saved with
            before = re.sub(r"^(base_model\.model\.)+", "", key).split(".lora_")[0]
            ranks[module] = config.rank_pattern.get(get_pattern_key(config.rank_pattern, before), config.r)
            alphas[module] = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, before), config.lora_alpha)
    if not lora or lora & whole:
        refuse(
            f"its file holds {f'both an update of {min(lora & whole)} and other weights for it' if lora else 'no LoRA weights'}"
        )
    for module in sorted(modules):
        part = next(
            (part for part in ("language_model", "multi_modal_projector", "vision_tower") if f".{part}." in module),
            None,
        )
        spellings = {module, module.removeprefix("model."), re.sub(r"^model\.language_model\.", "model.", module),
                     re.sub(r"^model\.language_model\.", "language_model.model.", module)}  # fmt: skip
        if (isinstance(modules[module], torch.nn.Linear) and module not in lora and config.target_modules != "all-linear"
                and any(f".{part}." in other for other in lora)
                and any(check_target_module_exists(config, spelling) for spelling in spellings)):  # fmt: skip
            refuse(f"it has no weights for {module}, which its configuration names; the file is incomplete")
    for name in config.modules_to_save or []:
        if not any(module.split(".")[-1] == name.split(".")[-1] for module in lora | whole):
            refuse(f"it has no weights for {name}, which its configuration names; the file is incomplete")
    config.target_modules, config.exclude_modules, config.layers_to_transform, config.layers_pattern = (
        lora,
        None,
        None,
        None,
    )
    config.rank_pattern = {re.escape(module): rank for module, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {re.escape(module): alpha for module, alpha in alphas.items() if alpha != config.lora_alpha}
    config.modules_to_save, config.inference_mode, config.init_lora_weights = sorted(whole) or None, True, True
    named, config.base_model_name_or_path = config.base_model_name_or_path, None  # PEFT would warn of any other path
    if named and Path(str(named)).name != Path(model_path).name:
        console.print(f"the adapter names {named} as its base, it is used on {model_path}")
    return config, weights


# Copied from llava_orpo_training.load_adapter
def load_adapter(model, processor, model_path: str, lora_path: str):
    """Put a LoRA adapter on the model and prove that it is there; returns the PeftModel. Stops with the reason if not.

    Proved are: what read_adapter sees to, every weight arrives, and the logits of a prompt move.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    def refuse(reason: str) -> NoReturn:
        stop(f"--lora_path {lora_path} cannot be used on {model_path}: {reason}.")

    config, weights = read_adapter(model, processor, model_path, lora_path)
    try:
        adapted = get_peft_model(model, config)
        report = set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # sizes of another base or another rank, values that are no numbers
        refuse(f"it does not fit ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    lost = [key for key in report.missing_keys if "lora_" in key or "modules_to_save" in key] + report.unexpected_keys
    if lost:
        refuse(f"{lost[0]} did not find its place")
    if not (probe_logits(adapted, processor) - probe_logits(adapted, processor, adapter=False)).abs().max() > 0:
        refuse("it changes nothing: the logits of a prompt are the same with it and without it")
    return adapted.eval()


# Copied from llava_orpo_training.adapter_folder
def adapter_folder(lora_path: str) -> Path:
    """Where an adapter's files lie; from the hub, they are fetched first."""
    if Path(lora_path).is_dir():
        return Path(lora_path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", lora_path):
        stop(f"--lora_path {lora_path} is no folder, and no hub id, which is owner/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(lora_path, allow_patterns=["*.json", "adapter_model.safetensors"]))
    except Exception as error:
        stop(f"--lora_path {lora_path} is no folder, and no adapter on the hub ({str(error).splitlines()[0]}).")


# Copied from llava_orpo_training.probe_logits
@torch.no_grad()
def probe_logits(model, processor, adapter: bool = True) -> torch.Tensor:
    """Logits of a fixed prompt with a picture, (its last 16 tokens, vocabulary), float32, with the adapter on or off."""
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pixels = processor.image_processor(image, return_tensors="pt")
    with nullcontext() if adapter else model.disable_adapter():
        return (
            model.eval()(
                input_ids=torch.tensor([build_prompt(processor, "Is there a cup?", image.size)], device=model.device),
                pixel_values=pixels["pixel_values"].to(model.device, model.dtype),
                image_sizes=pixels["image_sizes"].to(model.device),
                logits_to_keep=16,
            )
            .logits[0]
            .float()
        )


# Copied from llava_orpo_training.trained_on_nf4
def trained_on_nf4(lora_path: str) -> bool | None:
    """Whether an adapter was trained by QLoRA, on a base in NF4; None if nothing beside it says so."""
    folder = adapter_folder(lora_path)
    for file in (folder / "arguments.json", folder / "training_summary.json", folder.parent / "arguments.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(file.read_text())
            return str(content.get("arguments", content)["load_4bit"]) == "True"
    return None


# Copied from llava_orpo_training.round_to_nf4
def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight as QLoRA's training saw it: to NF4 with double quantization, and back."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


# Copied from llava_orpo_training.merge_adapter
def merge_adapter(model, processor, lora_path: str, weights: str):
    """Merge the adapter into the base; `weights` says into which: `trained` (what it was trained on), `nf4` or `base`.

    An adapter trained by QLoRA has learned to correct NF4's rounding, so there `trained` rounds the linear layers as NF4
    does (dequantized, with double quantization) before it adds the update. Whether it was is noted in the run's
    arguments.json, beside the adapter or its checkpoint. Prints how far apart the two choices are, in logits.
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        stop("an adapter is merged into whole weights; load the base without --load_4bit and --load_8bit.")
    noted = trained_on_nf4(lora_path)
    if not noted and weights != "nf4":
        why = (
            "on which it was trained"
            if noted is False
            else f"as nothing beside {lora_path} says what it was trained on"
        )
        console.print(f"merged into the base's own weights, {why}")
        return model.merge_and_unload()

    def exchange(module, *_) -> None:  # a layer's rounded weights for the time of its own forward
        module.whole, module.weight.data = module.weight.data, round_to_nf4(module.weight.data)

    def give_back(module, *_) -> None:
        module.weight.data = module.__dict__.pop("whole")

    linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
              and ".language_model." in name and ".lora_" not in name and ".modules_to_save." not in name]  # fmt: skip
    on_base = probe_logits(model, processor)
    hooks = [hook for module in linear for hook in
             (module.register_forward_pre_hook(exchange), module.register_forward_hook(give_back))]  # fmt: skip
    on_trained = probe_logits(model, processor)
    for hook in hooks:
        hook.remove()
    if weights != "base":
        for module in linear:
            module.weight.data = round_to_nf4(module.weight.data)
    console.print(f"merged into the {'base weights' if weights == 'base' else 'NF4-rounded weights'}; the other "
                  f"choice differs by up to {(on_base - on_trained).abs().max():.4f} in a prompt's logits")  # fmt: skip
    return model.merge_and_unload()


# Copied from llava_amber_validation_benchmark_with_lora.pick_tokens
def pick_tokens(logits: torch.Tensor, temperatures: list[float], top_ps: list[float], dice: list) -> list[int]:
    """The next token of each row of `logits` (rows, vocabulary): the likeliest where the temperature is 0, else one drawn
    from the smallest set of tokens whose probabilities sum to top-p (nucleus sampling, Holtzman et al. 2020, section 3.1).

    Each row has its own `random.Random`, so what is drawn for it does not depend on the other rows.
    """
    tokens = logits.argmax(-1).tolist()
    hot = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if hot:
        heat, top_p, throw = (
            torch.tensor([[value] for value in values], device=logits.device)
            for values in (
                [temperatures[row] for row in hot],
                [top_ps[row] for row in hot],
                [dice[row].random() for row in hot],
            )
        )
        chances, order = (logits[hot].float() / heat).softmax(-1).sort(descending=True)
        reach = chances.cumsum(-1)
        nucleus = torch.where(reach - chances < top_p, chances, 0).sum(-1, keepdim=True)
        place = torch.searchsorted(reach, throw * nucleus).clamp(max=reach.shape[-1] - 1)
        for row, token in zip(hot, order.gather(-1, place)[:, 0].tolist(), strict=True):
            tokens[row] = token
    return tokens


# Copied from llava_amber_validation_benchmark_with_lora.answer_questions
@torch.inference_mode()
def answer_questions(
    model, processor, images: list, pixels, questions: list[list[str]], max_new_tokens: int, temperature: float = 0
) -> Iterator:
    """Answer every question about every picture; yields (picture, question, answer, complete) as each one ends.

    A picture and its questions are one row, `picture | question 1 | question 2 | …`: all questions see the picture, none
    sees another, and each one's positions follow the picture's. So a picture goes through the model once, whatever is
    asked about it; generation adds a token to every unfinished question of every row at a time. `pixels` is the image
    processor's output for the `images`. Temperature 0 is greedy; above it, an answer depends on its picture, its question
    and its place among the picture's questions alone.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = core.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    rows, branches = [], []  # a branch: row, picture, question, next position, column of its last token, tokens so far
    pictures = [picture for picture, asked in enumerate(questions) if asked]
    for row, picture in enumerate(pictures):
        image, asked = images[picture], questions[picture]
        prompts = [build_prompt(processor, question, image.size) for question in asked]
        shared = len(prompts[0]) - prompts[0][::-1].index(processor.image_token_id)
        seed = zlib.crc32(image.tobytes())
        ids, owners, positions = list(prompts[0][:shared]), [0] * shared, list(range(shared))
        for number, prompt in enumerate(prompts):
            ids += prompt[shared:]
            owners += [number + 1] * (len(prompt) - shared)
            positions += range(shared, len(prompt))
            branches.append({"row": row, "picture": picture, "question": number, "position": len(prompt),
                             "column": len(ids) - 1, "tokens": [],
                             "dice": random.Random(f"{seed} {number} {asked[number]}")})  # fmt: skip
        rows.append((ids, owners, positions))
    if not rows:
        return
    longest = max(len(row[0]) for row in rows)
    for branch in branches:
        branch["column"] += longest - len(rows[branch["row"]][0])
    pads = (processor.tokenizer.pad_token_id, -1, 0)
    ids, owners, positions = (
        torch.tensor([[pad] * (longest - len(row[part])) + row[part] for row in rows], device=core.device)
        for part, pad in enumerate(pads)
    )
    causal = torch.ones(longest, longest, dtype=torch.bool, device=core.device).tril()
    visible = causal & ((owners[:, None, :] == 0) | (owners[:, :, None] == owners[:, None, :]))
    output = core.model(
        input_ids=ids,
        attention_mask=visible[:, None],
        position_ids=positions,
        pixel_values=pixels["pixel_values"][pictures].to(core.device, core.dtype),
        image_sizes=pixels["image_sizes"][pictures].to(core.device),
        use_cache=True,
    )
    cache = output.past_key_values
    while True:
        places = torch.tensor([[branch["row"], branch["column"]] for branch in branches], device=core.device)
        logits = core.lm_head(output.last_hidden_state[places[:, 0], places[:, 1]])
        count = len(branches)
        tokens = pick_tokens(logits, [temperature] * count, [1.0] * count, [branch["dice"] for branch in branches])
        unfinished = []
        for branch, token in zip(branches, tokens, strict=True):
            branch["tokens"].append(token)
            if token in ends or len(branch["tokens"]) == max_new_tokens:
                text = processor.tokenizer.decode(branch["tokens"], skip_special_tokens=True).strip()
                yield branch["picture"], branch["question"], text, token in ends
            else:
                unfinished.append(branch)
        branches = unfinished
        if not branches:
            return
        kept = sorted({branch["row"] for branch in branches})
        if len(kept) < len(owners):  # a picture whose questions are all answered leaves the batch
            index = torch.tensor(kept, device=core.device)
            cache.batch_select_indices(index)
            owners = owners[index]
        width = Counter(branch["row"] for branch in branches).most_common(1)[0][1]
        ids, new_owners, positions = ([[pad] * width for _ in kept] for pad in pads)
        filled = Counter()
        for branch in branches:
            branch["row"] = row = kept.index(branch["row"])
            branch["column"] = column = filled[row]
            filled[row] += 1
            ids[row][column], new_owners[row][column] = branch["tokens"][-1], branch["question"] + 1
            positions[row][column] = branch["position"]
            branch["position"] += 1
        ids, new_owners, positions = (torch.tensor(part, device=core.device) for part in (ids, new_owners, positions))
        owners = torch.cat([owners, new_owners], dim=1)
        visible = (owners[:, None, :] == 0) | (new_owners[:, :, None] == owners[:, None, :])
        output = core.model(
            input_ids=ids,
            attention_mask=visible[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )


# Copied from llava_amber_validation_benchmark_with_lora.Clip
class Clip:
    """A CLIP checkpoint in safetensors, which says how well texts fit a picture."""

    def __init__(self, model_path: str, device):
        from transformers import AutoProcessor, CLIPModel, PreTrainedConfig

        try:
            kind = PreTrainedConfig.get_config_dict(model_path)[0].get("model_type")
            if kind != "clip":
                raise ValueError(f"its model_type is {kind}, not clip")
            self.processor = AutoProcessor.from_pretrained(model_path, backend="pil", trust_remote_code=False)
            self.model, report = CLIPModel.from_pretrained(model_path, use_safetensors=True, output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError(f"it lacks {sorted(report['missing_keys'])[0]}")
        except Exception as error:  # configurations can be wrong in more ways than libraries foresee
            stop(f"--clip_model {model_path} cannot be loaded ({type(error).__name__}: {(str(error) or '?').splitlines()[0]}); "
                 "give a hub id or a folder with a CLIP checkpoint, such as openai/clip-vit-large-patch14-336.")  # fmt: skip
        self.model = self.model.to(device).eval()

    @torch.inference_mode()
    def compare(self, image: Image.Image, texts: list[str]) -> list[float]:
        """Cosine similarity of the picture and each text; of a text beyond CLIP's 77 tokens, the head is read."""
        inputs = self.processor(images=image, text=texts, return_tensors="pt", padding=True, truncation=True)
        output = self.model(**inputs.to(self.model.device))
        return (output.text_embeds @ output.image_embeds[0]).tolist()  # both have length 1


# Copied from llava_amber_validation_benchmark_with_lora.find_doubtful
def find_doubtful(
    model, processor, images: list, pixels, words: list[list[str]], clip: Clip | None = None
) -> list[set]:
    """Those of each picture's `words` that a check does not confirm to be in it.

    With CLIP, a word is confirmed if "a photo of a …" fits the picture better than "a photo"; else if the model answers
    "Is there a … in this image?" with Yes.
    """
    named = [[f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in part] for part in words]
    doubtful = [set() for _ in words]
    if clip:
        for picture, (image, part) in enumerate(zip(images, words, strict=True)):
            plain, *fits = clip.compare(image, ["a photo", *[f"a photo of {name}" for name in named[picture]]])
            doubtful[picture] = {word for word, fit in zip(part, fits, strict=True) if fit <= plain}
    elif any(words):
        questions = [[f"Is there {name} in this image?" for name in part] for part in named]
        for picture, number, text, _ in answer_questions(model, processor, images, pixels, questions, 2):
            if not text.lower().startswith("yes"):
                doubtful[picture].add(words[picture][number])
    return doubtful


# Copied from llava_amber_validation_benchmark_with_lora.choose_candidate
def choose_candidate(objects: list[list[str]], doubtful: set, fits: list[float] | None = None) -> int:
    """The candidate that its check confirms best: the one that CLIP finds to fit the picture best, or by the objects that
    each one names, the one with the fewest doubtful ones, then with the most confirmed ones; the first of equals."""
    if fits:
        return max(range(len(fits)), key=fits.__getitem__)
    wrong = [len(set(named) & doubtful) for named in objects]
    right = [len(set(named) - doubtful) for named in objects]
    return min(range(len(objects)), key=lambda number: (wrong[number], -right[number]))


# Copied from llava_amber_validation_benchmark_with_lora.VERIFY_TEMPERATURE
VERIFY_TEMPERATURE = 0.7  # at which --verify draws candidates beside the greedy answer
# Copied from llava_amber_validation_benchmark_with_lora.THINGS
THINGS = {f"noun.{name}" for name in ("animal", "artifact", "body", "food", "object", "person", "plant", "substance")}
# Copied from llava_amber_validation_benchmark_with_lora.NO_OBJECTS
NO_OBJECTS = set(
    "image picture photo photograph scene view background foreground side top bottom line shape object".split()
)


# Copied from llava_amber_validation_benchmark_with_lora.find_nouns
def find_nouns(kind: str, vocabulary: set[str] | None) -> Callable[[str], list[tuple[str, str]]]:
    """A function from a text to its nouns in the vocabulary, in order: (as written, as in the vocabulary).

    `nltk` is AMBER's way: tokens tagged NN*, their WordNet lemma; without a vocabulary, those that WordNet files as things
    to be seen. `vocabulary` looks words and regular plurals up.
    """
    if kind == "vocabulary":
        plurals = {"child": "children", "mouse": "mice", "goose": "geese"}
        endings = [
            (r"man$", "men"),
            (r"(?<=[lra])f$|(?<=i)fe$", "ves"),
            (r"([^aeiou])y$", r"\1ies"),
            (r"([sxzo]|[cs]h)$", r"\1es"),
            (r"$", "s"),
        ]
        for word in vocabulary - plurals.keys():
            plurals[word] = next(re.sub(ending, plural, word) for ending, plural in endings if re.search(ending, word))
        forms = {plurals[word]: word for word in vocabulary} | {word: word for word in vocabulary}
        return lambda text: [(word, forms[word]) for word in re.findall(r"\w+(?:-\w+)*", text) if word in forms]
    try:
        import nltk

        # loading WordNet also maps it to other versions of itself, which takes seconds and which no lemma needs
        nltk.corpus.reader.wordnet.WordNetCorpusReader.map_wn = lambda *_: None
        lemmatizer = nltk.stem.WordNetLemmatizer()

        def tag_nouns(text: str) -> list[tuple[str, str]]:
            tagged = nltk.pos_tag(nltk.word_tokenize(text))
            nouns = [(word, lemmatizer.lemmatize(word)) for word, tag in tagged if tag.startswith("NN")]
            if vocabulary is not None:
                return [(word, lemma) for word, lemma in nouns if lemma in vocabulary]
            return [(word, lemma) for word, lemma in nouns if is_thing(lemma)]

        def is_thing(lemma: str) -> bool:
            senses = nltk.corpus.wordnet.synsets(lemma, "n")[:2]
            return lemma not in NO_OBJECTS and any(sense.lexname() in THINGS for sense in senses)

        tag_nouns("Two dogs.")
        return tag_nouns
    except ImportError:
        stop("--nouns nltk needs NLTK: pip install -r requirements/eval.txt")
    except LookupError:
        stop("--nouns nltk needs NLTK's data: python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet "
             "(or, without them and not official, --nouns vocabulary)")  # fmt: skip


# ---------------------------------------------------------------------------- generation for many users at once


class Refused(ValueError):
    """What was asked for cannot be done; the text is a sentence for its user."""


@dataclass(eq=False)
class Picture:
    """A picture as its user sees it and as the model takes it."""

    image: Image.Image
    digest: int
    pixels: dict  # the image processor's output


@dataclass(eq=False)
class Request:
    """One answer to generate. Its user fills the upper part, the engine's thread alone the lower; `ids` are the whole
    prompt's. Without a session, no cache is kept."""

    ids: list[int]
    picture: Picture
    session: str
    adapter: bool
    max_new_tokens: int
    temperature: float = 0
    top_p: float = 1
    dice: random.Random = field(default_factory=random.Random)
    notify: Callable = lambda: None
    stopped: bool = False

    tokens: list[int] = field(default_factory=list)
    state: str = "waiting"  # then running; then complete, cut (too long), stopped or failed
    error: str = ""
    asked: float = 0  # time.monotonic(), seconds; so are the next two
    first: float = 0
    ended: float = 0
    reused: int = 0  # prompt tokens that a kept cache spared

    @property
    def done(self) -> bool:
        return self.state not in ("waiting", "running")


@dataclass
class Batch:
    """The answers that grow together, a token a step: one cache, its rows padded on the left to one width."""

    rows: list[Request] = field(default_factory=list)
    pads: list[int] = field(default_factory=list)  # columns of padding in each row
    cache: DynamicCache | None = None


class Engine:
    """Generates the answers of all users in one thread, one batch with the adapter and one without.

    A request joins its batch between two steps, after its prompt went through the model with those of others that came in
    meanwhile, and leaves when it is done or stopped. The cache of a user's last answer is kept (the least recently used
    are dropped), so that the next question about that picture computes only what is new.
    """

    def __init__(self, model, processor, max_num_seqs: int, clip: Clip | None = None):
        self.model, self.processor, self.max_num_seqs, self.clip = model, processor, max_num_seqs, clip
        self.core = model.get_base_model() if hasattr(model, "get_base_model") else model
        ends = self.core.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        text = self.core.config.text_config
        self.context = text.max_position_embeddings
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head * self.core.dtype.itemsize
        on_gpu = self.core.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.core.device)[0] if on_gpu else 4 * 2**30
        self.room = int(0.5 * free / self.token_bytes)  # tokens of cache; the rest is for activations and copies
        self.kept_room = int(0.15 * free)  # bytes
        self.batches = {True: Batch(), False: Batch()}
        self.kept: OrderedDict = OrderedDict()  # (session, adapter) -> (picture's digest, ids, [(keys, values)], when)
        self.waiting: list[Request] = []
        self.open: list[Request] = []  # all that are not done
        self.checks, self.comparisons = [], []
        self.wake = threading.Condition()  # its lock may be taken again by who holds it
        self.closed, self.adapter_on = False, True
        self.thread = threading.Thread(target=self.run, daemon=True, name="engine")
        self.thread.start()

    # ---- called from other threads

    @property
    def active(self) -> int:
        """How many answers are growing."""
        return sum(len(batch.rows) for batch in self.batches.values())

    def submit(self, request: Request) -> None:
        """Queue a request; its answer ends where the model's context does. Raises Refused if there is none left."""
        limit = min(self.context, self.room) - len(request.ids)
        if limit <= 0:
            raise Refused(f"Picture and question need {len(request.ids):,} tokens, and the model here takes "
                             f"{len(request.ids) + limit:,}; shorten the question, or press Clear.")  # fmt: skip
        request.max_new_tokens = min(request.max_new_tokens, limit)
        request.asked = time.monotonic()
        with self.wake:
            self.waiting.append(request)
            self.open.append(request)
            self.wake.notify()

    def check(self, picture: Picture, words: list[str], adapter: bool) -> Future:
        """Have find_doubtful check words between two steps, together with those of other users; its result is a set."""
        return self.post(self.checks, (picture, words, adapter))

    def compare(self, picture: Picture, texts: list[str]) -> Future:
        """Have CLIP compare texts with a picture between two steps; its result is a list of similarities."""
        return self.post(self.comparisons, (picture, texts))

    def post(self, queue: list, item: tuple) -> Future:
        future = Future()
        with self.wake:
            queue.append((*item, future))
            self.wake.notify()
        return future

    def stop(self, requests: list[Request]) -> None:
        """End requests before their next token."""
        with self.wake:
            for request in requests:
                request.stopped = True
            self.wake.notify()

    def stop_session(self, session: str) -> None:
        """End all that a session asked for."""
        self.stop([request for request in self.open if request.session == session])

    def forget(self, session: str) -> None:
        """End all that a session asked for, and drop what is kept for it."""
        self.stop_session(session)
        with self.wake:
            for request in self.open:
                request.session = "" if request.session == session else request.session
            for key in [key for key in self.kept if key[0] == session]:
                del self.kept[key]

    def close(self) -> None:
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join()

    # ---- the engine's own thread

    @torch.inference_mode()
    def run(self) -> None:
        while True:
            with self.wake:
                busy = any(batch.rows for batch in self.batches.values())
                while not (self.closed or self.waiting or self.checks or self.comparisons or busy):
                    self.wake.wait(60)
                    self.expire()
                if self.closed:
                    return
                newcomers = self.admit()
            self.run_checks()
            for adapter, batch in self.batches.items():
                mine = [request for request in newcomers if request.adapter is adapter]
                try:
                    self.leave(batch)
                    if batch.rows or mine:
                        self.switch(adapter)
                    if batch.rows:
                        self.step(batch)
                    if mine:
                        self.join(batch, mine)
                except Exception as error:  # such as a full GPU: these answers are lost, the server is not
                    console.print(
                        f"a batch of {len(batch.rows)} answers failed: {type(error).__name__}: {error}", markup=False
                    )
                    for request in {*batch.rows, *mine}:
                        request.error = "The model failed on this question; ask again, or something shorter."
                        self.finish(request, "failed")
                    self.batches[adapter] = Batch()
                    with self.wake:
                        self.kept.clear()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()

    def run_checks(self) -> None:
        """Do up to eight of the checks that were asked for, of either side, and the comparisons."""
        for adapter in self.batches:
            mine = self.take(self.checks, lambda item, adapter=adapter: item[2] is adapter)
            if not mine:
                continue
            pictures, words, _, futures = zip(*mine, strict=True)
            try:
                self.switch(adapter)
                images = [picture.image for picture in pictures]
                doubtful = find_doubtful(
                    self.model, self.processor, images, self.stack(pictures), list(words), self.clip
                )
                for future, found in zip(futures, doubtful, strict=True):
                    future.set_result(found)
            except Exception as error:
                for future in futures:
                    future.set_exception(error)
        for picture, texts, future in self.take(self.comparisons, lambda _: True):
            try:
                future.set_result(self.clip.compare(picture.image, texts))
            except Exception as error:
                future.set_exception(error)

    def take(self, queue: list, wanted: Callable) -> list:
        """Up to eight of a queue's items, without those that nobody waits for any more."""
        with self.wake:
            taken = [item for item in queue if wanted(item)][:8]
            for item in taken:
                queue.remove(item)
        return [item for item in taken if item[-1].set_running_or_notify_cancel()]

    def stack(self, pictures: list[Picture]) -> dict:
        """The pixels of pictures as one batch, tiles padded to the largest count."""
        pixels = [picture.pixels for picture in pictures]
        tiles = max(part["pixel_values"].shape[1] for part in pixels)
        padded = [
            torch.nn.functional.pad(part["pixel_values"], (0,) * 7 + (tiles - part["pixel_values"].shape[1],))
            for part in pixels
        ]
        return {
            "pixel_values": torch.cat(padded).to(self.core.device, self.core.dtype),
            "image_sizes": torch.cat([part["image_sizes"] for part in pixels]).to(self.core.device),
        }

    def switch(self, adapter: bool) -> None:
        """Turn the adapter on or off, if there is one. PEFT's own disable_adapter takes longer than a small model's step."""
        if adapter is not self.adapter_on and self.model is not self.core:
            layers = self.model.base_model
            layers.enable_adapter_layers() if adapter else layers.disable_adapter_layers()
            self.adapter_on = adapter

    def admit(self) -> list[Request]:
        """Those who waited longest and for whom there is room; no more than is read quickly, as others want their tokens."""
        for request in [request for request in self.waiting if request.stopped]:
            self.waiting.remove(request)
            self.finish(request, "stopped")
        rows = [*self.batches[True].rows, *self.batches[False].rows]
        newcomers = []
        while self.waiting and len(rows) < self.max_num_seqs:
            rows.append(self.waiting[0])
            longest = max(len(row.ids) + row.max_new_tokens for row in rows)
            prompts = sum(len(row.ids) for row in newcomers) + len(rows[-1].ids)
            if (len(rows) > 1 and len(rows) * longest > self.room) or (newcomers and prompts > PROMPT_TOKENS):
                break
            newcomers.append(self.waiting.pop(0))
            newcomers[-1].state = "running"
        return newcomers

    def join(self, batch: Batch, newcomers: list[Request]) -> None:
        """Send the newcomers' prompts through the model and add them to the batch, with their first token."""
        fresh = {}  # the same question of one user, asked for several candidates, is computed once
        for request in newcomers:
            key = request.session, request.adapter
            with self.wake:
                digest, ids, layers, _ = self.kept.get(key, (None, [], None, 0))
                if layers:
                    self.kept.move_to_end(key)
            same = next(
                (i for i, (a, b) in enumerate(zip(ids, request.ids, strict=False)) if a != b),
                min(len(ids), len(request.ids)),
            )
            images_end = len(request.ids) - request.ids[::-1].index(self.processor.image_token_id)
            if digest == request.picture.digest and same >= images_end:
                request.reused = min(same, len(request.ids) - 1)
                cache = DynamicCache(
                    [(keys[:, :, : request.reused], values[:, :, : request.reused]) for keys, values in layers]
                )
                output = self.core.model(
                    input_ids=torch.tensor([request.ids[request.reused :]], device=self.core.device),
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
                self.add(batch, [request], [0], output)
            else:
                fresh.setdefault((request.session, request.picture.digest, tuple(request.ids)), []).append(request)
        if not fresh:
            return
        prompts = [group[0] for group in fresh.values()]
        longest = max(len(request.ids) for request in prompts)
        pads = [longest - len(request.ids) for request in prompts]
        pad = self.processor.tokenizer.pad_token_id
        output = self.core.model(
            input_ids=torch.tensor([[pad] * n + r.ids for n, r in zip(pads, prompts, strict=True)], device=self.core.device),
            attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in pads], device=self.core.device),
            position_ids=torch.tensor([[0] * n + [*range(longest - n)] for n in pads], device=self.core.device),
            **self.stack([request.picture for request in prompts]),
            use_cache=True,
        )  # fmt: skip
        index = [number for number, group in enumerate(fresh.values()) for _ in group]
        output.past_key_values.batch_select_indices(torch.tensor(index))
        output.last_hidden_state = output.last_hidden_state[index]
        self.add(batch, [request for group in fresh.values() for request in group], [pads[i] for i in index], output)

    def add(self, batch: Batch, newcomers: list[Request], pads: list[int], output) -> None:
        """Widen the batch by rows whose prompts the model has just read."""
        cache = output.past_key_values
        if batch.rows:
            widths = batch.cache.get_seq_length(), cache.get_seq_length()
            width = max(widths)
            for old, new in zip(batch.cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    parts = [torch.nn.functional.pad(part, (0, 0, width - own, 0))
                             for part, own in zip((getattr(old, name), getattr(new, name)), widths, strict=True)]  # fmt: skip
                    setattr(old, name, torch.cat(parts))
            batch.pads = [pad + width - widths[0] for pad in batch.pads] + [pad + width - widths[1] for pad in pads]
        else:
            batch.cache, batch.pads = cache, pads
        batch.rows = batch.rows + newcomers
        self.extend(newcomers, output.last_hidden_state[:, -1])
        self.leave(batch)

    def step(self, batch: Batch) -> None:
        """Add a token to every answer of a batch."""
        width = batch.cache.get_seq_length() + 1
        device = self.core.device
        columns = torch.arange(width, device=device)
        output = self.core.model(
            input_ids=torch.tensor([[row.tokens[-1]] for row in batch.rows], device=device),
            attention_mask=(columns >= torch.tensor(batch.pads, device=device)[:, None]).long(),
            position_ids=torch.tensor([[width - 1 - pad] for pad in batch.pads], device=device),
            past_key_values=batch.cache, use_cache=True,
        )  # fmt: skip
        self.extend(batch.rows, output.last_hidden_state[:, -1])
        self.leave(batch)

    def extend(self, rows: list[Request], hidden: torch.Tensor) -> None:
        """Give each row its next token; `hidden` is (rows, width of the model)."""
        tokens = pick_tokens(self.core.lm_head(hidden), [row.temperature for row in rows], [row.top_p for row in rows],
                             [row.dice for row in rows])  # fmt: skip
        for row, token in zip(rows, tokens, strict=True):
            if row.stopped:
                continue
            row.tokens.append(token)
            if not row.first:
                row.first = time.monotonic()
            if token in self.ends or len(row.tokens) == row.max_new_tokens:
                row.ended = time.monotonic()
                row.state = "complete" if token in self.ends else "cut"
            row.notify()

    def leave(self, batch: Batch) -> None:
        """Take what is done or stopped out of the batch, and the padding that nobody needs any more."""
        gone = [number for number, row in enumerate(batch.rows) if row.done or row.stopped]
        if not gone:
            return
        for number in gone:
            self.keep(batch, number)
            self.finish(batch.rows[number], "stopped")
        stay = [number for number in range(len(batch.rows)) if number not in gone]
        batch.rows = [batch.rows[number] for number in stay]
        if not stay:
            batch.cache, batch.pads = None, []
            return
        batch.cache.batch_select_indices(torch.tensor(stay))
        spare = min(batch.pads[number] for number in stay)
        batch.pads = [batch.pads[number] - spare for number in stay]
        for layer in batch.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, spare:], layer.values[:, :, spare:]

    def keep(self, batch: Batch, number: int) -> None:
        """Keep a row's cache for its user's next question."""
        row, pad = batch.rows[number], batch.pads[number]
        if not row.session:
            return
        layers = [(layer.keys[number : number + 1, :, pad:].clone(), layer.values[number : number + 1, :, pad:].clone())
                  for layer in batch.cache.layers]  # fmt: skip
        ids = (row.ids + row.tokens)[: layers[0][0].shape[2]]
        with self.wake:
            if row.session:  # its user is still there
                self.kept[row.session, row.adapter] = (row.picture.digest, ids, layers, time.monotonic())
                self.kept.move_to_end((row.session, row.adapter))
            self.expire()

    def expire(self) -> None:
        """Drop what was kept long ago, and the least recently used of what is too much."""
        while self.kept:
            used = sum(len(ids) for _, ids, _, _ in self.kept.values()) * self.token_bytes
            if used <= self.kept_room and time.monotonic() - next(iter(self.kept.values()))[3] < KEPT_SECONDS:
                return
            self.kept.popitem(last=False)

    def finish(self, request: Request, state: str) -> None:
        """Close a request; `state` is the end of one that was still growing."""
        request.state = request.state if request.done else state
        request.ended = request.ended or time.monotonic()
        with self.wake:
            if request in self.open:
                self.open.remove(request)
        request.notify()


# ---------------------------------------------------------------------------- pictures and questions


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


def open_picture(data: bytes | None, processor) -> Picture:
    """Read a picture's file as the model takes it. Raises Refused as read_picture does."""
    image = read_picture(data)
    return Picture(image, zlib.crc32(image.tobytes()), processor.image_processor(image, return_tensors="pt"))


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


def check_question(question: str) -> str:
    """The question as the model is asked it. Raises Refused with a sentence for its user."""
    if not isinstance(question, str) or not any(unicodedata.category(c)[0] in "LNPS" for c in question):
        raise Refused("There is no question yet: type one, or take one of those below the field.")
    if len(question) > MAX_QUESTION:
        raise Refused(f"This question has {len(question):,} characters; it may have {MAX_QUESTION:,}.")
    question = "".join(c for c in question.strip() if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
    return re.sub(
        r"\[\s*(/?)\s*INST\s*\]", r"(\1INST)", question
    )  # Mistral's own marks, which are plain text to a tokenizer


def build_chat(
    processor, image_size: tuple[int, int], question: str, earlier: list[tuple[str, list[int]]]
) -> list[int]:
    """Token ids of a prompt that goes on from `earlier` (question, answer's tokens) turns about the same picture."""
    tokenizer = processor.tokenizer
    if not earlier:
        return build_prompt(processor, question, image_size)
    pattern = "[INST] {} [/INST]" if "[INST]" in (processor.chat_template or "[INST]") else "USER: {} ASSISTANT:"
    ids = build_prompt(processor, earlier[0][0], image_size)
    for (_, tokens), asked in zip(earlier, [*[asked for asked, _ in earlier[1:]], question], strict=True):
        ids += tokens if tokens and tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]
        ids += tokenizer(pattern.format(asked), add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


# ---------------------------------------------------------------------------- answers


@dataclass
class Answer:
    """One model's answer to one question, as the page shows it."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    line: str = ""  # what it cost
    objects: dict[str, str] = field(default_factory=dict)  # word as written, in lower case -> object
    doubtful: set[str] = field(default_factory=set)  # those objects that the check does not confirm


# WordNet finds more; these are what is looked for without its data
OBJECTS = set(
    """person man woman child boy girl baby people bicycle car motorcycle airplane bus train truck boat bench bird cat dog
    horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard ball kite bat
    glove skateboard surfboard racket bottle glass cup mug fork knife spoon bowl banana apple sandwich broccoli carrot
    pizza donut cake chair couch plant bed table toilet tv television laptop mouse remote keyboard phone microwave oven
    toaster sink refrigerator book clock vase scissors bear hairdryer toothbrush lamp bucket house tent tree flower mushroom
    fish star moon sun cloud sky grass beach mountain building window door hat shoe shirt plate napkin candle basket sign
    """.split()
)


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


class Host:
    """What the page and the API need to answer: the engine, the checks, the names."""

    def __init__(self, args):
        model, self.processor = load_llava(args.model_path, args.lora_path, args.device, args.load_4bit, args.load_8bit)
        self.clip = Clip(args.clip_model, model.device) if args.clip_model else None
        self.candidates, self.queue_size = args.verify, args.queue_size
        self.find = choose_nouns()
        self.base = "/".join(Path(args.model_path).parts[-2:])
        self.adapter = "/".join(Path(args.lora_path).parts[-2:]) if args.lora_path else None
        self.clears = Counter()  # how often each session was cleared
        names = f"Base `{self.base}`" + (f" · adapter `{self.adapter}`" if self.adapter else "")
        self.headline = f"# LLaVA-1.6 before and after alignment\nGive a picture, ask about it, compare. {names}"
        self.titles = {False: "Base: adapter off", True: "Aligned: adapter on"} if self.adapter else {False: "Answers"}
        self.views = {"Side by side": [False, True], "Aligned only": [True], "Base only": [False]}  # adapter off, on
        if not self.adapter:
            self.views = {"Base only": [False]}
        self.checker = (
            f"CLIP ({Path(args.clip_model).name}) does not find it"
            if self.clip
            else "the base model, asked about it, did not say yes"
        )
        self.settings = {"model": args.model_path, "lora": args.lora_path, "candidates": args.verify,
                         "check": args.clip_model or "yes/no questions"}  # fmt: skip
        self.engine = Engine(model, self.processor, args.max_num_seqs, self.clip)

    def stop_session(self, session: str) -> None:
        self.engine.stop_session(session)

    def forget(self, session: str) -> None:
        self.engine.forget(session)

    def prepare(self, data: bytes | None, question: str) -> tuple[Picture, str]:
        """The picture and the question as they are asked. Raises Refused."""
        return open_picture(data, self.processor), check_question(question)

    def write_prompts(self, picture: Picture, question: str, wanted: dict[bool, list]) -> dict[bool, list[int]]:
        """The prompts, which follow `wanted`: earlier (question, Answer) turns for adapter on or off."""
        return {
            adapter: build_chat(
                self.processor, picture.image.size, question, [(old, answer.tokens) for old, answer in turns]
            )
            for adapter, turns in wanted.items()
        }

    async def answer(
        self, picture: Picture, prompts: dict[bool, list[int]], session: str, mark: bool, **sampling
    ) -> AsyncIterator[dict]:
        """Answer once with each of `prompts` (adapter on or off -> prompt ids), as they grow: {adapter: Answer}.

        Whoever stops reading stops the generation. With candidates to choose from, the first is shown while they grow. Raises
        Refused with a sentence for a user who cannot be answered.
        `mark` has the doubtful objects of the finished answers found.
        """
        if len(self.engine.waiting) >= self.queue_size:
            raise Refused(
                f"The queue is full: {self.queue_size} answers wait for a place already; ask again in a moment."
            )
        loop, changed, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        groups = {}
        if sampling["temperature"] < 0.01:
            sampling["temperature"] = 0
        for adapter, ids in prompts.items():
            groups[adapter] = [
                Request(ids, picture, session, adapter, **sampling, dice=random.Random(random.getrandbits(64)))
                for _ in range(self.candidates)
            ]
            for request in groups[adapter][1:]:
                request.temperature = max(request.temperature, VERIFY_TEMPERATURE)
        requests = [request for group in groups.values() for request in group]

        def look() -> None:
            changed.set()
            if all(request.done for request in requests):
                ended.set()

        def notify() -> None:  # from the engine's thread
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(look)

        try:
            for request in requests:
                request.notify = notify
                self.engine.submit(request)
            while not ended.is_set():
                with suppress(TimeoutError):  # wait_for would lose a cancellation now and then (Python 3.11)
                    async with asyncio.timeout(0.5):  # a waiting user who left is noticed at the next yield
                        await changed.wait()
                changed.clear()
                yield {adapter: self.describe(group[0]) for adapter, group in groups.items()}
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.05 + 0.01 * self.engine.active):  # sending costs the server time
                        await ended.wait()
            failed = next((request for request in requests if request.error), None)
            if failed:
                raise Refused(failed.error)
            try:
                yield await self.check(picture, groups, mark)
            except Exception as error:  # the answers are there all the same
                console.print(f"a check failed: {type(error).__name__}: {error}", markup=False)
                answers = {adapter: self.describe(group[0]) for adapter, group in groups.items()}
                for answer in answers.values():
                    answer.line += " · not checked"
                yield answers
        finally:
            self.engine.stop(requests)

    def describe(self, request: Request) -> Answer:
        """A request as it stands."""
        tokens = list(request.tokens)
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip().rstrip("\ufffd")
        if request.state == "waiting":
            with self.engine.wake:
                before = self.engine.waiting.index(request) if request in self.engine.waiting else 0
            return Answer(line=f"waiting for a place, {before} before this one …")
        if not tokens:
            return Answer(line="reading the picture …" if not request.done else "stopped")
        parts = [f"{request.first - request.asked:.2f} s to first token"]
        if len(tokens) > 1:
            seconds = (request.ended or time.monotonic()) - request.first
            parts.append(f"{(len(tokens) - 1) / max(seconds, 1e-3):.1f} tokens/s")
        parts.append(
            f"{request.ids.count(self.processor.image_token_id):,} image tokens{' (reused)' if request.reused else ''}"
        )
        parts.append(f"{self.base}{f' + {self.adapter}' if request.adapter and self.adapter else ''}")
        parts += {"cut": ["cut off at the answer length"], "stopped": ["stopped"]}.get(request.state, [])
        return Answer(text, tokens, " · ".join(parts))

    async def check(self, picture: Picture, groups: dict[bool, list[Request]], mark: bool) -> dict[bool, Answer]:
        """The answers, of several candidates the one that its check confirms best; with their doubtful objects if asked."""
        if any(request.state == "stopped" for group in groups.values() for request in group):
            return {adapter: self.describe(group[0]) for adapter, group in groups.items()}
        answers = {}
        for adapter, group in groups.items():
            drawn = [self.describe(request) for request in group]
            for answer in drawn:
                answer.objects = dict(self.find(answer.text.lower()))
            best = 0
            if len(drawn) > 1 and drawn[0].objects:  # yes or no names nothing to check
                named = [list(answer.objects.values()) for answer in drawn]
                words = sorted({word for part in named for word in part})
                doubtful = set() if self.clip else await self.doubt(picture, words, adapter)
                texts = [answer.text for answer in drawn]
                fits = self.clip and await asyncio.wrap_future(self.engine.compare(picture, texts))
                best = choose_candidate(named, doubtful, fits)
                drawn[best].line += f" · candidate {best + 1} of {len(drawn)}"
            answers[adapter] = drawn[best]
        words = sorted({word for answer in answers.values() for word in answer.objects.values() if mark})
        doubtful = await self.doubt(picture, words, adapter=False)
        for answer in answers.values():
            answer.doubtful = doubtful & set(answer.objects.values())
        return answers

    async def doubt(self, picture: Picture, words: list[str], adapter: bool) -> set[str]:
        """The words that CLIP, or the model's own yes/no answers, do not confirm to be in the picture."""
        return await asyncio.wrap_future(self.engine.check(picture, words, adapter)) if words else set()


# ---------------------------------------------------------------------------- the page


gradio.component_meta.create_or_modify_pyi = lambda *_: None  # it would write a .pyi file beside this script


class Upload(bytes):
    """A picture's file as it was uploaded, which the browser does not yet hold as a data: address."""


READ: dict[Path, float] = {}  # when an uploaded file was last read, time.time()
READ_SECONDS = 20  # after which it goes: another user may have sent the same, and have to wait
UNREAD_SECONDS = 900  # after which one goes that nobody asked about


def sweep_uploads() -> None:
    """Delete the uploaded files that were read, and those that nobody asked about."""
    for path in [path for path in UPLOADS.rglob("*") if path.is_file()]:
        with suppress(OSError):  # gone in the meantime
            written, read = path.stat().st_mtime, READ.get(path, 0)
            if time.time() > (read + READ_SECONDS if read > written else written + UNREAD_SECONDS):
                READ.pop(path, None)
                path.unlink()
                path.parent.rmdir()  # its name is the file's digest


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

CSS = """
.talk { display: grid; gap: 0 1.6em; color: var(--body-text-color) }
.talk.two { grid-template-columns: 1fr 1fr }
.talk .side { display: none; margin: .6em .2em 0; font-size: .82rem; font-weight: 600 }
@media (max-width: 600px) {
  .talk.two { grid-template-columns: 1fr } .talk.two h3 { display: none } .talk.two .side { display: block }
}
.talk h3 { margin: 0 0 .6em; font-size: 1rem }
.talk .question { grid-column: 1 / -1; background: var(--background-fill-secondary); border-radius: 8px; margin: 0;
  padding: .5em .8em; white-space: pre-wrap; overflow-wrap: anywhere }
.talk .answer { font-size: 1.06rem; line-height: 1.55; margin: .6em .2em; min-height: 1.6em; white-space: pre-wrap;
  overflow-wrap: anywhere }
.talk .cost, .talk .empty, .status { opacity: .72; font-size: .82rem; margin: 0 0 1.6em; overflow-wrap: anywhere }
.legend { font-size: .85rem; margin: 0; color: var(--body-text-color) }
.talk mark, .legend mark { background: #ffe08a; color: #222; border-radius: 3px; padding: .05em 0 }
.talk u, .legend u { color: inherit; text-decoration: underline wavy #d33 1.5px; text-underline-offset: 3px }
.notice { background: #fdecea; color: #8a1f11; border: 1px solid #f5c2bb; border-radius: 8px; padding: .6em .9em; margin: 0 }
#examples .gallery-item { height: 92px } #examples .gallery-item * { height: 100%; object-fit: contain }
footer .divider { display: none }
"""

# a file that the server made for this click, handed over as base64, becomes a download
DOWNLOAD = """(file) => {
  if (!file) return;
  const bytes = Uint8Array.from(atob(file), c => c.charCodeAt(0));
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([bytes], {type: 'application/zip'}));
  link.download = 'llava_pair.zip';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""

QUESTIONS = ["Describe this image.", "Name everything you can see in this image.", "Is there a chair in this image?",
             "Is there a person in this image?"]  # fmt: skip
EXAMPLES = [16, 6, 34, 19, 3, 5]  # of the miniature's pictures


def split_words(text: str) -> list[str]:
    """The text in words and what is between them."""
    return re.findall(r"\w+(?:-\w+)*|[^\w]+", text)


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


def mark_pieces(answer: Answer, other: Answer | None) -> list[tuple[str, bool, bool]]:
    """The answer's text in pieces (text, differs from the other answer, is a doubtful object); together, they are it."""
    differs = find_differences(answer.text, other.text) if other and other.text else ()
    return [(piece, number in differs, answer.objects.get(piece.lower()) in answer.doubtful)
            for number, piece in enumerate(split_words(answer.text))]  # fmt: skip


def render_talk(titles: dict[bool, str], turns: list[dict], sides: list[bool]) -> str:
    """The page's HTML of a conversation, the newest turn first; `turns` have a question and answers {adapter: Answer}."""

    def mark(turn: dict, side: bool) -> list:
        answers = turn["answers"]
        whole = "asked" in turn and len(sides) == 2  # while answers grow, all would differ
        return mark_pieces(answers[side], answers.get(not side) if whole else None)

    return TALK.render(titles=titles, turns=turns, sides=sides, mark=mark)


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


def build_page(host, args) -> gr.Blocks:
    """The page and its API."""
    titles, views, both = host.titles, list(host.views), len(host.titles) == 2

    def show_notice(sentence: str):
        return gr.HTML(
            sentence and f'<p class="notice" role="alert">{jinja2.filters.escape(sentence)}</p>', visible=bool(sentence)
        )

    decoders = asyncio.Semaphore(2)  # large pictures take memory

    async def decode(function: Callable, *arguments):
        async with decoders:
            return await asyncio.to_thread(function, *arguments)

    async def converse(replaced, data, question, turns, view, temperature, top_p, length, remember, request):
        """A question from the page, whose answer may take the last one's place: yields what changes on the page."""
        sides = host.views[view]
        turn = {
            "question": (question or "").strip(),
            "answers": {side: Answer(line="reading the picture …") for side in sides},
        }

        def show(running: bool, notice: str = "", asked: bool = True):
            return {
                talk: render_talk(titles, [*turns, turn] if asked else turns, sides),
                state: turns,
                notices: show_notice(notice),
                send: gr.Button(visible=not running),
                halt: gr.Button(visible=running),
                again: gr.Button(interactive=not running and bool(turns)),
                save: gr.Button(interactive=not running and bool(turns)),
            }

        clears, before = host.clears[request.session_hash], turns
        if replaced:
            turns = turns[:-1]
        try:
            picture, asked = await decode(host.prepare, data, question)
            if turns and turns[-1]["digest"] != picture.digest:  # another picture, another conversation
                turns = []
            earlier = {side: [(old["asked"], old["answers"][side]) for old in turns if side in old["answers"]] if remember else []
                       for side in sides}  # fmt: skip
            prompts = await decode(host.write_prompts, picture, asked, earlier)
            yield show(True) | {question_box: ""}
            sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": int(length)}
            async with aclosing(host.answer(picture, prompts, request.session_hash, True, **sampling)) as growing:
                async for turn["answers"] in growing:
                    if host.clears[request.session_hash] != clears:  # in the meantime
                        yield blank(view)
                        return
                    yield show(True)
            turns = [*turns, turn | {"asked": asked, "digest": picture.digest, "settings": sampling}]
            await asyncio.to_thread(render_talk, titles, turns, sides)  # finds the differences, and remembers them
            yield show(False, asked=False)
        except Exception as error:
            sentence = str(error)
            if not isinstance(error, Refused):
                console.print(f"a question failed: {type(error).__name__}: {error}", markup=False)
                sentence = "This failed on the server, whose log says why; ask again."
            turns = before
            yield show(False, sentence, asked=False) | ({} if replaced else {question_box: question})

    async def ask(data, question, turns, view, temperature, top_p, length, remember, request: gr.Request):
        async with aclosing(
            converse(False, data, question, turns, view, temperature, top_p, length, remember, request)
        ) as updates:
            async for update in updates:
                yield update

    async def regenerate(data, turns, view, temperature, top_p, length, remember, request: gr.Request):
        question = turns[-1]["question"]  # the button is off without one
        async with aclosing(
            converse(True, data, question, turns, view, temperature, top_p, length, remember, request)
        ) as updates:
            async for update in updates:
                yield update

    async def receive(data):
        """A picture from the user: checked, and handed back for the browser to keep."""
        if not isinstance(data, Upload):
            return {notices: show_notice("")}
        try:
            await decode(read_picture, data)
            shown = await decode(show_picture, data)
            return {photo: shown, notices: show_notice("")}
        except Refused as error:
            return {photo: None, notices: show_notice(str(error))}

    def blank(view) -> dict:
        """The page without a conversation."""
        return {
            question_box: "", state: [], talk: render_talk(titles, [], host.views[view]), notices: show_notice(""),
            send: gr.Button(visible=True), halt: gr.Button(visible=False),
            again: gr.Button(interactive=False), save: gr.Button(interactive=False),
        }  # fmt: skip

    def clear(view, request: gr.Request):
        host.clears[request.session_hash] += 1
        host.forget(request.session_hash)
        return blank(view) | {photo: None}

    def stop_session(request: gr.Request):
        host.stop_session(request.session_hash)

    def leave(request: gr.Request):
        host.forget(request.session_hash)
        host.clears.pop(request.session_hash, None)

    def pack(data, turns):
        image = load_image(data) if data and turns else None
        if image is None or zlib.crc32(image.tobytes()) != turns[-1]["digest"]:
            return "", show_notice("The last answer is about another picture; put that one back, or ask again.")
        return pack_pair(image, titles, turns[-1], host.settings | turns[-1]["settings"]), show_notice("")

    async def answer_api(image, question: str, adapter: bool, temperature: float, top_p: float, max_new_tokens: int):
        """Ask a question about a picture; streams the answer as it grows, each message the whole text so far."""
        try:
            side = bool(adapter) if both else next(iter(titles))
            numbers = all(isinstance(value, int | float) for value in (temperature, top_p, max_new_tokens))
            if (
                not numbers
                or not 0 <= temperature <= 2
                or not 0 < top_p <= 1
                or not 0 < max_new_tokens <= args.max_new_tokens
            ):
                raise Refused("temperature must be from 0 to 2, top_p above 0 and up to 1, max_new_tokens from 1 to "
                                 f"{args.max_new_tokens:,}.")  # fmt: skip
            picture, asked = await decode(host.prepare, image, question)
            prompts = await decode(host.write_prompts, picture, asked, {side: []})
            sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": int(max_new_tokens)}
            async with aclosing(host.answer(picture, prompts, "", False, **sampling)) as growing:
                async for answers in growing:
                    yield answers[side].text
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="LLaVA, aligned", analytics_enabled=False) as page:
        state = gr.State([], time_to_live=3600)
        gr.Markdown(host.headline)
        if args.test_mode:
            gr.HTML(
                '<p class="legend">This is the miniature: it knows drawn scenes like the examples, and nothing else.</p>'
            )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = InlinePicture(label="Picture", sources=["upload", "clipboard", "webcam"], height=340,
                                      elem_id="picture", buttons=["fullscreen"])  # fmt: skip
                paths = sorted((MINIATURE / "amber" / "image").glob("*.webp"))
                with gr.Column(elem_id="examples"):
                    examples = gr.Examples([[str(paths[number])] for number in EXAMPLES], photo, label="Examples")
                with gr.Accordion("Settings", open=False):
                    view = gr.Radio(views, value=views[0], label="Answers", visible=len(views) > 1)
                    temperature = gr.Slider(0, 2, args.temperature, step=0.05, label="Temperature",
                                            info="0 takes the likeliest token")  # fmt: skip
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p",
                                      info="draw from the likeliest tokens that sum to this")  # fmt: skip
                    length = gr.Slider(1, args.max_new_tokens, min(512, args.max_new_tokens), step=1, label="Answer length",
                                       info="tokens, at most")  # fmt: skip
                    remember = gr.Checkbox(not args.test_mode, label="Follow-ups see the conversation so far")
            with gr.Column(scale=5):
                question_box = gr.Textbox(label="Question", placeholder="Ask about the picture …", max_lines=6,
                                          elem_id="question", autofocus=True)  # fmt: skip
                with gr.Row():
                    send = gr.Button("Ask", variant="primary", elem_id="send")
                    halt = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
                    again = gr.Button("Regenerate", interactive=False, elem_id="again")
                    save = gr.Button("Save pair" if both else "Save", interactive=False, elem_id="save")
                    reset = gr.Button("Clear", elem_id="clear")
                gr.Examples([[question] for question in QUESTIONS], question_box, label="Questions to try")
                notices = gr.HTML("", visible=False, elem_id="notices")
                talk = gr.HTML(render_talk(titles, [], host.views[views[0]]), elem_id="talk")
                checker = jinja2.filters.escape(host.checker)
                differs = "<mark>word</mark> differs from the other answer &nbsp; " if both else ""
                gr.HTML(f'<p class="legend">{differs}<u>object</u> {checker} (which can be wrong)</p>')  # fmt: skip
                gr.HTML(f'<p class="status">{args.max_num_seqs} answers are generated at a time; {args.queue_size} more '
                        "may wait. Pictures are not kept on the server.</p>")  # fmt: skip
        packed = gr.Textbox(visible=False)
        settings = [view, temperature, top_p, length, remember]
        changed = [talk, state, notices, send, halt, again, save, question_box]
        private = {"api_visibility": "private"}
        slow = {"concurrency_limit": None, "show_progress": "hidden"}  # the engine says who waits
        gr.on(
            [send.click, question_box.submit],
            ask,
            [photo, question_box, state, *settings],
            changed,
            **private,
            **slow,
        )
        again.click(regenerate, [photo, state, *settings], changed, **private, **slow)
        fast = {"queue": False, "show_progress": "hidden"}
        halt.click(stop_session, **private, **fast)
        reset.click(clear, view, [photo, *changed], **private, **fast)
        examples.dataset.click(lambda: show_notice(""), None, notices, **private, **fast)
        photo.input(receive, photo, [photo, notices], **private, **fast)
        view.change(
            lambda view, turns: render_talk(titles, turns, host.views[view]), [view, state], talk, **private, **fast
        )
        made = save.click(pack, [photo, state], [packed, notices], **private, **fast)
        made.then(None, packed, None, js=DOWNLOAD, **private)
        page.unload(leave)
        api_inputs = [InlinePicture(label="image", visible=False), gr.Textbox(label="question", visible=False),
                      gr.Checkbox(True, label="adapter", visible=False), gr.Number(args.temperature, label="temperature", visible=False),
                      gr.Number(1, label="top_p", visible=False),
                      gr.Number(args.max_new_tokens, precision=0, label="max_new_tokens", visible=False)]  # fmt: skip
        gr.Button(visible=False).click(
            answer_api, api_inputs, gr.Textbox(label="answer", visible=False), api_name="answer", **slow
        )
    return page


def launch_page(page: gr.Blocks, args, port: int | None) -> None:
    """Let the page listen, in threads of its own. Raises OSError if the address or the port cannot be had."""

    def sweep() -> None:
        while True:
            time.sleep(5)
            sweep_uploads()

    threading.Thread(target=sweep, daemon=True, name="sweeper").start()
    page.launch(
        server_name=args.host, server_port=port, share=args.share, auth=args.users, max_file_size=MAX_FILE * 10**6,
        show_error=True, run_history=False, ssr_mode=False, enable_monitoring=False, quiet=True, footer_links=["api"],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]), css=CSS,
        app_kwargs={"middleware": [Middleware(Gate)]}, prevent_thread_lock=True,
        max_threads=args.max_num_seqs + args.queue_size + 8,  # Gradio serves no more events than that at once
    )  # fmt: skip


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
    if args.lora_path:
        adapter_folder(args.lora_path)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that UPLOADS is deleted
    host = Host(args)
    page = build_page(host, args)
    launch_page(page, args, args.port)
    console.print(f"serving {args.model_path}{f' with {args.lora_path}' if args.lora_path else ''} at {page.local_url}"
                  f"{f' and {page.share_url}' if page.share_url else ''}; Ctrl+C ends it", soft_wrap=True)  # fmt: skip
    page.block_thread()
    host.engine.close()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted.", code=130)
    except torch.OutOfMemoryError:
        stop("the GPU's memory is full; use --load_4bit, or a smaller --max_num_seqs.")
