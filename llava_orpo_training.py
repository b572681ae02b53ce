"""Align LLaVA-1.6 with ORPO and LoRA on image preference pairs, so that it makes up less.

Reads   a LLaVA-NeXT checkpoint (--model_path) and preference pairs in RLAIF-V's columns (--dataset).
Writes  to --output_dir: the LoRA adapter and its card, metrics.jsonl, samples.html, training_curves.png,
        dropped_rows.jsonl, training_summary.json, and checkpoints to resume from.
Needs   pip install -r requirements/train.txt

    python llava_orpo_training.py --output_dir ./checkpoints/llava-orpo-prod --epochs 3 --batch_size 4
    python llava_orpo_training.py --output_dir ./checkpoints/llava-orpo-prod --epochs 3 --batch_size 4 --resume
    python llava_orpo_training.py --test_mode --output_dir outputs/miniature --learning_rate 1e-3 --batch_size 16
"""

import argparse
import sys
from pathlib import Path

MINIATURE = Path(__file__).resolve().parent / "miniature"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(group, flag, help, **options):
        shown = options.get("default")
        group.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    data = parser.add_argument_group("model and data")
    add(data, "--model_path", "base model: hub id or folder", default="llava-hf/llava-v1.6-mistral-7b-hf")
    add(data, "--dataset", "pairs: hub id, folder, .parquet or .jsonl", default="openbmb/RLAIF-V-Dataset")
    add(data, "--output_dir", "where everything is written", type=Path, default=Path("checkpoints/llava-orpo"))
    add(data, "--max_samples", "train on the first N good pairs only", type=int)
    add(data, "--eval_fraction", "share of pairs held out, if the set has no test split", type=float, default=0.1)
    add(data, "--eval_samples", "of the held-out pairs, how many each evaluation goes through, the one before the first step "
        "too", type=int, default=300)  # fmt: skip
    add(data, "--max_length", "tokens a prompt and one response may have; longer responses are cut, longer prompts "
        "dropped", type=int, default=4096)  # fmt: skip
    add(data, "--num_workers", "processes that decode and resize pictures (default: one a core but one, at most 8)",
        type=int)  # fmt: skip
    add(data, "--cache_vision_features", "keep what the frozen vision tower makes of each picture in this folder, "
        "so that later epochs and runs neither decode it nor run the tower (6 MB a picture; safe to delete)", type=Path)  # fmt: skip
    add(data, "--cache_gb", "most that folder may grow to", type=float, default=200)
    add(
        data,
        "--test_mode",
        "use the embedded miniature as model and data, where these are not given",
        action="store_true",
    )

    lora = parser.add_argument_group("adapter")
    add(lora, "--lora_rank", "rank of the update", type=int, default=16)
    add(lora, "--lora_alpha", "its scale is alpha / rank", type=int, default=32)
    add(lora, "--lora_dropout", "dropout on the adapter's input", type=float, default=0.05)
    add(lora, "--lora_target_modules", "linear layers of the language model that get one", nargs="+",
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])  # fmt: skip
    add(lora, "--train_projector", "adapt the vision-language projector too", action="store_true")
    bits = lora.add_mutually_exclusive_group()
    add(bits, "--load_4bit", "QLoRA: base weights in NF4 with double quantization", action="store_true")
    add(bits, "--load_8bit", "base weights in 8 bits (LLM.int8)", action="store_true")

    run = parser.add_argument_group("training")
    add(run, "--epochs", "passes over the pairs", type=float, default=1)
    add(run, "--batch_size", "pairs a device and forward pass", type=int, default=4)
    add(run, "--gradient_accumulation_steps", "forward passes an optimizer step", type=int, default=4)
    add(run, "--learning_rate", "peak of the cosine schedule", type=float, default=5e-5)
    add(run, "--warmup_ratio", "share of the steps that warm up", type=float, default=0.1)
    add(run, "--beta", "weight of the odds-ratio term (the paper's lambda)", type=float, default=0.1)
    add(run, "--seed", "of split, order, adapter and dropout", type=int, default=42)
    add(run, "--gradient_checkpointing", "recompute activations in the backward pass: in as many layers as the memory asks "
        "for (auto), in all (on, or no value) or in none (off)", nargs="?", choices=["auto", "on", "off"], const="on",
        default="auto")  # fmt: skip
    run.add_argument("--no-gradient_checkpointing", dest="gradient_checkpointing", action="store_const", const="off",
                     help="the same as --gradient_checkpointing off")  # fmt: skip
    add(run, "--packing", "lay a batch's pairs out as one row without padding (default: on a GPU, where attention skips what "
        "is masked)", action=argparse.BooleanOptionalAction)  # fmt: skip
    add(run, "--compile", "compile the decoder layers, which takes minutes before the first step; whether it pays "
        "depends on the GPU, benchmarks/bench_orpo_step.py tells", action="store_true")  # fmt: skip
    add(run, "--no_prefix_sharing", "plain form: two rows a pair, for comparison", action="store_true")
    add(run, "--save_steps", "steps between checkpoints; the newest two are kept", type=int, default=200)
    add(run, "--eval_steps", "steps between evaluations (default: once an epoch)", type=int)
    add(run, "--resume", "go on from the newest checkpoint in --output_dir", action="store_true")
    add(run, "--report_to", "experiment tracker; wandb without a login writes offline", choices=["wandb", "none"],
        default="wandb")  # fmt: skip
    add(run, "--wandb_project", "W&B project", default="llava-orpo")
    add(run, "--wandb_entity", "W&B user or team")
    args = parser.parse_args(argv)
    for name in ("eval_fraction", "warmup_ratio", "lora_dropout"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 0 and below 1")
    for name in ("seed", "num_workers"):
        if (getattr(args, name) or 0) < 0:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 0")
    for name in ("max_samples", "max_length", "lora_rank", "lora_alpha", "epochs", "batch_size", "learning_rate", "beta",
                 "gradient_accumulation_steps", "save_steps", "eval_steps", "eval_samples", "cache_gb"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} is {value}; it must be above 0")
    if args.packing and args.no_prefix_sharing:
        parser.error("--packing lays out rows that share a prefix; leave --no_prefix_sharing out")
    for name, folder in (("model_path", "model"), ("dataset", "preferences")):
        if args.test_mode and getattr(args, name) == parser.get_default(name):
            setattr(args, name, str(MINIATURE / folder))
    return args


if __name__ == "__main__":
    parse_args()  # answers --help and refuses wrong flags before the heavy imports

import base64
import hashlib
import importlib.metadata
import inspect
import io
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial, wraps
from itertools import chain
from typing import NoReturn

for name, value in {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import datasets
import jinja2
import matplotlib
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub import ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of several under torchrun, the one that prints and writes
console = Console(stderr=True, quiet=not MAIN_PROCESS)


# ---------------------------------------------------------------------------- blocks that later scripts copy


def stop(message: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


def build_prompt(processor, question: str, image_size: tuple[int, int]) -> list[int]:
    """Return the token ids of LLaVA-1.6's prompt, BOS first: `[INST] <image>\\n{question} [/INST]`, or Vicuna's form where
    the processor's chat template is Vicuna's.

    `image_size` is the picture's (width, height) in pixels, which decides how many image tokens stand for it. The text
    before and after them is tokenized separately, as in the original code, and the question as plain text, so that
    `<image>` or `</s>` inside it are not special tokens.
    """
    tokenizer = processor.tokenizer
    width, height = image_size
    num_image_tokens = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
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


# LLaVA's own key layout, which liuhaotian's checkpoints have -> transformers' module names
ORIGINAL_KEYS = {
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}


def read_original(model_path: str, original: dict) -> tuple:
    """Return what transformers needs to read a checkpoint in LLaVA's own format: (config, processor, vision tower's name).

    `original` is its config.json. The vocabulary gets 64 more rows, `<image>` and `<pad>` first, as in the hub's converted
    checkpoints.
    """
    from transformers import AutoConfig, LlamaTokenizer, LlavaNextConfig, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    wanted = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "vocab_size": 32000}
    for name, value in wanted.items():
        if original.get(name) != value:
            found = original.get(name)
            stop(f"--model_path {model_path} has {name} {found!r}, not {value!r}; this script reads LLaVA-1.6 only.")
    tower = original["mm_vision_tower"]
    vision = LlavaNextConfig().vision_config  # this is openai/clip-vit-large-patch14-336, which all published ones name
    if tower != "openai/clip-vit-large-patch14-336":
        vision = AutoConfig.from_pretrained(tower, trust_remote_code=False)
        vision = getattr(vision, "vision_config", vision)
    llava = ("mm_", "image_", "tokenizer_", "unfreeze_", "tune_", "use_mm_", "freeze_", "architectures", "auto_map")
    text = {name: value for name, value in original.items() if not name.startswith(llava)}
    text["model_type"] = "mistral" if original["model_type"] == "llava_mistral" else "llama"
    grid = original["image_grid_pinpoints"]  # of (width, height), in some checkpoints written as text
    grid = [[height, width] for width, height in (json.loads(grid) if isinstance(grid, str) else grid)]
    tokenizer = LlamaTokenizer.from_pretrained(model_path, add_bos_token=True, legacy=True, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if len(tokenizer) != original["vocab_size"] + 2:
        stop(f"--model_path {model_path} has {len(tokenizer) - 2:,} tokens in its tokenizer and not 32,000.")
    config = LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_index=original["vocab_size"],
        image_grid_pinpoints=grid,
        vision_feature_layer=original["mm_vision_select_layer"],
        tie_word_embeddings=False,
    )
    side = vision.image_size
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=grid
    )
    before, after = ("[INST] ", " [/INST]") if text["model_type"] == "mistral" else ("USER: ", " ASSISTANT:")
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=f"{before}<image>\n{{{{ messages[0]['content'][-1]['text'] }}}}{after}",
    )
    return config, processor, tower


def read_checkpoint(model_path: str) -> tuple:
    """Return a checkpoint's (config, processor, vision tower's name) without its weights. Config and tower are None in the
    hub's layout; for LLaVA's own format see read_original. Stops if it is not LLaVA-1.6."""
    from transformers import AutoProcessor, PreTrainedConfig

    try:
        found = PreTrainedConfig.get_config_dict(model_path)[0]
        kind = found.get("model_type", "unknown")
        if kind in ("llava_mistral", "llava_llama", "llava") and "mm_vision_tower" in found:
            return read_original(model_path, found)
        if kind != "llava_next":
            stop(f"--model_path {model_path} has a config.json of model type {kind}; this script reads LLaVA-1.6 only.")
        processor = AutoProcessor.from_pretrained(model_path, backend="pil", trust_remote_code=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        stop(f"--model_path {model_path} cannot be read ({reason}). Give a hub id or a folder with LLaVA-1.6.")
    if re.search("im_start|start_header", processor.chat_template or ""):
        stop(f"--model_path {model_path} has a prompt template that is neither Mistral's nor Vicuna's.")
    return None, processor, None


def load_llava(model_path: str, lora_path: str | None = None, device="auto", load_4bit=False, load_8bit=False):
    """Load a LLaVA-1.6 checkpoint, in the hub's layout or LLaVA's own, and an adapter; return (model, processor).

    `device` auto is cuda, then mps, then cpu; all spreads the layers over the GPUs. Weights are bfloat16 on a GPU that has
    it (else float16) and float32 on the CPU. `load_4bit` keeps the language model in NF4 with double quantization,
    `load_8bit` in LLM.int8. Only safetensors files are read, and no code of a checkpoint is run.
    """
    from transformers import BitsAndBytesConfig, LlavaNextForConditionalGeneration

    adapter = read_adapter(lora_path) if lora_path else None  # first, since the base takes minutes
    config, processor, tower = read_checkpoint(model_path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = torch.float32
    if device != "cpu":
        has_bfloat16 = device == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    quantization = BitsAndBytesConfig(
        load_in_4bit=load_4bit,
        load_in_8bit=load_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", ".*vision_tower.*", ".*multi_modal_projector.*"],
    )
    try:
        model, report = LlavaNextForConditionalGeneration.from_pretrained(
            model_path,
            config=config,
            key_mapping=ORIGINAL_KEYS if tower else None,
            dtype=dtype,
            quantization_config=quantization if load_4bit or load_8bit else None,
            device_map="auto" if device == "all" else {"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
        if tower:
            complete_original(model, tower, report["missing_keys"])
    except Exception as error:
        stop(f"--model_path {model_path} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}).")
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    wrong += [f"{key} has no place" for key in sorted(report["unexpected_keys"])]
    if wrong:
        stop(f"--model_path {model_path}: its weights do not fit its config.json, {len(wrong)} in all: {wrong[0]}.")
    if hasattr(model, "ct_decompress_hook"):  # compressed-tensors would wait for a forward of the whole model
        model.hf_quantizer.compressor.decompress_model(model)
    if load_4bit and device == "cpu":
        # bitsandbytes repacks weights on their first eval-mode forward; afterwards backward silently gives no gradient
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if adapter:
        model = load_adapter(model, processor, *adapter)
    return allow_cache_position(model.eval()), processor


def complete_original(model, tower: str, missing: set[str]) -> None:
    """Give a model what a checkpoint in LLaVA's own format may lack: the vision weights, if all are missing, from the
    tower's own checkpoint, and the 64 new rows of the vocabulary."""
    from transformers import CLIPVisionModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    vision = {key for key in model.state_dict() if "vision_tower" in key}
    if vision <= missing:
        weights = CLIPVisionModel.from_pretrained(tower, dtype=model.dtype, use_safetensors=True).state_dict()
        model.model.vision_tower.load_state_dict({k.removeprefix("vision_model."): w for k, w in weights.items()})
        missing -= vision
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)  # saved in the hub's layout
    model.resize_token_embeddings(model.config.text_config.vocab_size + 64, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        # a new row is the mean of all others: its logit is their mean, and so never the greatest
        weight.data[-64:] = weight.data[:-64].float().mean(0).to(weight.dtype)


def allow_cache_position(model):
    """Let callers pass `cache_position`, as transformers 4.38 to 4.57 do, to a model whose forward does not know it."""
    forward = model.forward
    parameters = inspect.signature(forward).parameters.values()
    if not any(p.name == "cache_position" or p.kind is p.VAR_KEYWORD for p in parameters):
        model.forward = wraps(forward)(lambda *args, cache_position=None, **kwargs: forward(*args, **kwargs))
    return model


# names that adapters of this architecture have been saved with -> the names that it has now
ADAPTER_KEYS = {
    r"^(base_model\.model\.)+": "",
    **ORIGINAL_KEYS,
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^(vision_tower|multi_modal_projector|language_model)\.": r"model.\1.",
    r"^model\.vision_tower\.vision_model\.": "model.vision_tower.",
}


def rename_key(key: str) -> str:
    """Return today's name for a layer or weight of an adapter."""
    for pattern, replacement in ADAPTER_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


def read_adapter(lora_path: str) -> tuple[Path, "LoraConfig"]:
    """Return a LoRA adapter's folder, fetched first if it is a hub id, and its configuration, with current names."""
    from huggingface_hub import snapshot_download
    from peft import PeftConfig

    folder = Path(lora_path)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(lora_path, allow_patterns=["*.json", "adapter_model.safetensors"]))
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        stop(f"--lora_path {lora_path} is no adapter: {str(error).splitlines()[0]} Give a hub id or a folder.")
    if config.peft_type != "LORA":
        stop(f"--lora_path {lora_path} is a {config.peft_type} adapter; this script reads LoRA.")
    if (folder / "non_lora_trainables.bin").exists():
        stop(
            f"--lora_path {lora_path} has more trained weights in non_lora_trainables.bin; merge it with LLaVA's code."
        )
    if not (folder / "adapter_model.safetensors").exists():
        stop(
            f"--lora_path {lora_path} has no adapter_model.safetensors; convert an adapter_model.bin, which can run code."
        )
    config.rank_pattern = {rename_key(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {rename_key(name): alpha for name, alpha in config.alpha_pattern.items()}
    return folder, config


def load_adapter(model, processor, folder: Path, config, trainable: bool = False):
    """Put a LoRA adapter on the model and return the PeftModel.

    Stops unless every weight is finite and finds its layer, every layer of the configuration finds its weights, and the
    logits of a prompt with a picture move.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    def refuse(reason: str) -> NoReturn:
        stop(f"--lora_path {folder} cannot be used on this base: {reason}.")

    try:
        saved = load_file(folder / "adapter_model.safetensors")
        weights = {f"base_model.model.{rename_key(key)}": weight for key, weight in saved.items()}
        if not config.exclude_modules and not any("vision_tower" in key for key in weights):
            config.exclude_modules = r".*vision_tower.*"  # it has layers of the same names
        config.inference_mode, config.base_model_name_or_path = not trainable, None
        adapted = get_peft_model(model, config)
        report = set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # another base's sizes, another rank, a broken file
        refuse(f"it does not fit ({type(error).__name__}: {' '.join(str(error).split())[:300]})")
    missing = [key for key in report.missing_keys if "lora_" in key or "modules_to_save" in key]
    infinite = [key for key, weight in weights.items() if not weight.isfinite().all()]
    if report.unexpected_keys:
        refuse(f"it has weights for {report.unexpected_keys[0]}, and the model no layer of that name")
    if missing:
        refuse(f"the file is incomplete: it has no {missing[0]}, which its configuration names")
    if infinite:
        refuse(f"{infinite[0]} is not finite")
    if torch.equal(probe_logits(adapted, processor), probe_logits(adapted, processor, adapter=False)):
        refuse("it changes nothing: the logits of a prompt are the same with it and without it")
    return adapted.eval()


@torch.no_grad()
def probe_logits(model, processor, adapter: bool = True) -> torch.Tensor:
    """Return the logits of a fixed prompt with a picture, (its last 16 tokens, vocabulary), with the adapter on or off."""
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pixels = processor.image_processor(image, return_tensors="pt")
    with nullcontext() if adapter else model.disable_adapter():
        output = model.eval()(
            input_ids=torch.tensor([build_prompt(processor, "Is there a cup?", image.size)], device=model.device),
            pixel_values=pixels["pixel_values"].to(model.device, model.dtype),
            image_sizes=pixels["image_sizes"].to(model.device),
            logits_to_keep=16,
        )
    return output.logits[0].float()


@torch.no_grad()
def generate_answers(model, processor, images: list, questions: list[str], max_new_tokens=256, **options) -> list[str]:
    """Answer one question about each picture, as one left-padded batch; greedy unless `options` say otherwise."""
    prompts = [build_prompt(processor, question, image.size) for image, question in zip(images, questions, strict=True)]
    longest = max(map(len, prompts))
    pad = processor.tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    pixels = processor.image_processor(images, return_tensors="pt")
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        pixel_values=pixels["pixel_values"].to(model.device, model.dtype),
        image_sizes=pixels["image_sizes"].to(model.device),
        max_new_tokens=max_new_tokens,
        **{"do_sample": False, "pad_token_id": pad, **options},
    )
    return [text.strip() for text in processor.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]


# ---------------------------------------------------------------------------- data


def load_rows(source: str) -> datasets.DatasetDict:
    """Open preference pairs without decoding a picture: a hub id, a folder, a .parquet or a .jsonl file."""
    path = Path(source)
    builders = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    try:
        if path.is_file():
            if path.suffix not in builders:
                stop(f"--dataset {source} ends in {path.suffix or 'nothing'}; a file must be .parquet or .jsonl.")
            rows = datasets.load_dataset(builders[path.suffix], data_files=str(path))
        else:
            rows = datasets.load_dataset(source)
    except (OSError, ValueError, TypeError, StopIteration, pa.ArrowException, DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is empty."
        stop(f"--dataset {source} cannot be read: {reason} Give a hub id, or a folder or file of parquet or jsonl.")
    if "train" not in rows:
        stop(f"--dataset {source} has no train split (found: {', '.join(rows)}); name its file train.parquet.")
    missing = {"image", "question", "chosen", "rejected"} - set(rows["train"].column_names)
    if missing:
        stop(f"--dataset {source} lacks {', '.join(sorted(missing))} (found: {', '.join(rows['train'].column_names)}); "
             "it must have RLAIF-V's columns image, question, chosen and rejected.")  # fmt: skip
    for name in ("question", "chosen", "rejected"):
        kind = getattr(rows["train"].features[name], "dtype", type(rows["train"].features[name]).__name__)
        if kind not in ("string", "large_string"):
            stop(f"--dataset {source} has {kind} in its column {name}; it must hold plain text.")
    try:
        return rows.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException):
        stop(f"--dataset {source} has {rows['train'].features['image']} in its column image; "
             "it must hold pictures, or the paths of picture files.")  # fmt: skip


def read_size(picture: Path | pa.Buffer) -> tuple[int, int]:
    """The upright (width, height) of a picture, from its header: of a 13 GB set, only the pages with headers are read."""
    if isinstance(picture, Path):
        attempts = [lambda: picture]
    else:
        attempts = [lambda: io.BytesIO(picture.slice(0, min(2**16, picture.size))), lambda: io.BytesIO(picture)]
    for attempt in attempts:
        # whatever a broken header makes Pillow's parsers raise; some formats only open with all of their bytes
        with suppress(Exception), Image.open(attempt()) as image:
            # EXIF orientations 5 to 8 swap width and height; without the test, getexif would decode a whole PNG
            turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
            return image.size[::-1] if turned else image.size
    raise OSError("no picture")


def find_fault(question: str, chosen: str, rejected: str, picture, processor, max_length: int) -> str | None:
    """The reason why a row cannot be trained on, or None. Reads the picture's header, not its pixels."""
    for name, text in (("question", question), ("chosen", chosen), ("rejected", rejected)):
        if not (text or "").strip():
            return f"{name} is empty"
    if chosen.strip() == rejected.strip():
        return "chosen equals rejected"
    try:
        size = read_size(picture)
    except OSError:
        return "image does not open"
    image_tokens = processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])["num_image_tokens"][0]
    at_most = (
        image_tokens + len(question.encode()) + 32
    )  # no token is shorter than a byte; most rows need no exact count
    if at_most >= max_length and len(build_prompt(processor, question, size)) >= max_length:
        return "prompt does not fit --max_length"
    return None


def check_rows(rows: datasets.Dataset, root: Path, processor, max_length: int, limit: int | None) -> tuple[list, list]:
    """Find the rows fit for training: (their indices, at most `limit`; the others as {row, reason})."""
    good, dropped = [], []
    columns = rows.select_columns(["question", "chosen", "rejected", "image"]).with_format("arrow")
    for start in tqdm(range(0, len(rows), 1000), desc="checking rows", disable=len(rows) < 5000):
        table = columns[start : start + 1000]
        texts = zip(*(table[name].to_pylist() for name in ("question", "chosen", "rejected")), strict=True)
        images = chain.from_iterable(zip(c.field("bytes"), c.field("path"), strict=True) for c in table["image"].chunks)
        for i, (text, (content, path)) in enumerate(zip(texts, images, strict=True), start):
            picture = content.as_buffer() if content.is_valid else root / (path.as_py() or "")
            fault = find_fault(*text, picture, processor, max_length)
            if fault:
                dropped.append({"split": str(rows.split), "row": i, "reason": fault})
            else:
                good.append(i)
            if len(good) == limit:
                return good, dropped
    return good, dropped


def split_rows(rows: datasets.Dataset, good: list[int], eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split row indices into (train, held out); rows that share an `image_path` stay on one side."""
    names = rows["image_path"][:] if "image_path" in rows.column_names else [None] * len(rows)
    picture = np.unique([str(i if names[i] is None else names[i]) for i in good], return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(picture.max() + 1) if good else picture
    wanted = min(max(round(eval_fraction * len(order)), 1), len(order) - 1) if eval_fraction else 0
    held_out = np.isin(picture, order[: max(wanted, 0)])
    good = np.asarray(good, dtype=int)
    return good[~held_out].tolist(), good[held_out].tolist()


class VisionCache:
    """What the frozen vision tower makes of pictures, unrounded, one file a picture; every file may be deleted at any time.

    A file is known by the picture's bytes, the tower's weights and type, and the image processor's settings, so that
    nothing stale is ever read.
    """

    def __init__(self, folder: Path, model, processor):
        tower = model.get_base_model().model.vision_tower
        settings = (str(tower.dtype), model.config.vision_feature_layer, tower.config.to_json_string(),
                    processor.image_processor.to_json_string())  # fmt: skip
        digest = hashlib.sha256(repr(settings).encode())
        for weight in tower.state_dict().values():
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.folder = folder / digest.hexdigest()[:16]

    def file(self, picture: bytes) -> Path:
        name = hashlib.sha256(picture).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def holds(self, picture: bytes) -> bool:
        """Whether there is a whole file; its content is not read."""
        with suppress(OSError, SafetensorError), safe_open(self.file(picture), "pt"):
            return True
        return False

    def read(self, picture: bytes) -> dict[str, torch.Tensor] | None:
        """pixel_values (tiles, 1, patches + 1, hidden), in place of pixels, and image_sizes (2); None if not there."""
        try:
            return load_file(self.file(picture))
        except (OSError, SafetensorError):
            return None


class PicturesToCache(torch.utils.data.Dataset):
    """The pictures of pairs, decoded: None for one whose features are there, or that breaks off."""

    def __init__(self, pairs: "PreferencePairs", cache: VisionCache):
        self.pairs, self.cache = pairs, cache

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict | None:
        with suppress(OSError):
            picture = self.pairs.picture(self.pairs.rows[self.pairs.indices[index]])
            if not self.cache.holds(picture):
                pixels = self.pairs.processor.image_processor(load_image(picture), return_tensors="pt")
                return {"picture": picture, **{name: values[0] for name, values in pixels.items()}}
        return None


class PreferencePairs(torch.utils.data.Dataset):
    """Pairs as token ids and pixels, made when asked for: `__getitem__` runs in the data loader's workers.

    What only shows then (a picture that breaks off, responses that are equal once cut to `max_length`) is noted in
    `dropped_file`, and the next row stands in. With a `cache`, a picture whose features are there is not decoded.
    """

    cache: VisionCache | None = None

    def __init__(
        self, rows: datasets.Dataset, indices: list[int], root: Path, processor, max_length: int, dropped_file: Path
    ):
        self.rows, self.indices, self.root = rows, indices, root
        self.processor, self.max_length, self.dropped_file = processor, max_length, dropped_file

    @property
    def split(self) -> str:
        return str(getattr(self.rows, "split", "train"))

    def __len__(self) -> int:
        return len(self.indices)

    def map(self, *_, **__) -> "PreferencePairs":
        """ORPOTrainer tokenizes text by three calls of `map`; there is nothing left for them to do."""
        return self

    def picture(self, row: dict) -> bytes:
        """The file of a row's picture. Raises OSError if it is not there."""
        image = row["image"]
        return image["bytes"] if image["bytes"] is not None else (self.root / image["path"]).read_bytes()

    def row(self, index: int) -> dict:
        """Question, chosen and rejected of a pair, and its picture, decoded. Raises OSError if that breaks off."""
        row = self.rows[self.indices[index]]
        return {**row, "image": load_image(self.picture(row))}

    def __getitem__(self, index: int, use_cache: bool = True) -> dict:
        for candidate in (*range(index, len(self)), *range(index)):
            try:
                features = self.features(candidate, use_cache)
                reason = None if features["chosen"] != features["rejected"] else "chosen equals rejected once cut"
            except OSError:
                reason = "image breaks off when decoded"
            if reason is None:
                return features
            with self.dropped_file.open("a") as file:
                file.write(json.dumps({"split": self.split, "row": self.indices[candidate], "reason": reason}) + "\n")
        raise LookupError(f"no row of the {self.split} pairs can be used; see {self.dropped_file}.")

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """A batch: pixels for all, or cached features for all."""
        batch = [self[index] for index in indices]
        if len({features["pixel_values"].shape[1] for features in batch}) > 1:
            batch = [self.__getitem__(index, use_cache=False) for index in indices]
        return batch

    def features(self, index: int, use_cache: bool) -> dict:
        row = self.rows[self.indices[index]]
        texts = row["question"], row["chosen"], row["rejected"]
        picture = self.picture(row)
        cached = self.cache.read(picture) if self.cache and use_cache else None
        if cached:
            height, width = cached["image_sizes"].tolist()
            return {**self.encode_texts((width, height), *texts), **cached}
        return self.encode(load_image(picture), *texts)

    def encode_texts(self, image_size: tuple[int, int], question: str, chosen: str, rejected: str) -> dict:
        """Ids of the prompt about a picture of (width, height), and of both responses, closed by EOS (cut to
        `max_length`, the prompt never)."""
        tokenizer = self.processor.tokenizer
        prompt = build_prompt(self.processor, question, image_size)
        chosen_ids, rejected_ids = (
            (tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True).input_ids
             + [tokenizer.eos_token_id])[: self.max_length - len(prompt)]
            for text in (chosen, rejected)
        )  # fmt: skip
        return {"prompt": prompt, "chosen": chosen_ids, "rejected": rejected_ids}

    def encode(self, image: Image.Image, question: str, chosen: str, rejected: str) -> dict:
        """One pair: the ids of encode_texts, pixel_values (tiles, 3, H, W) and image_sizes (2) as (height, width)."""
        pixels = self.processor.image_processor(image, return_tensors="pt")
        return {
            **self.encode_texts(image.size, question, chosen, rejected),
            "pixel_values": pixels["pixel_values"][0],
            "image_sizes": pixels["image_sizes"][0],
        }

    def longest(self) -> dict:
        """A pair as long as any: the longest question, chosen and rejected of all (the most tokens of the 16 with the most
        bytes), and a picture of the shape that takes most tokens, as far as `max_length` allows."""
        texts = self.rows.select_columns(["question", "chosen", "rejected"]).with_format("arrow")[:]
        longest = []
        for name in texts.column_names:
            order = pc.binary_length(texts[name]).to_numpy()[self.indices].argsort()[-16:]
            found = [self.rows[self.indices[i]][name] for i in order.tolist()]
            longest.append(max(found, key=lambda text: len(self.processor.tokenizer(text).input_ids)))
        shapes = [
            Image.new("RGB", (width, height)) for height, width in self.processor.image_processor.image_grid_pinpoints
        ]
        # where responses are cut, the shorter prompt makes the longer pair
        pairs = [self.encode(image, question, *longest[1:]) for image in shapes for question in (longest[0], "")]
        fitting = [pair for pair in pairs if len(pair["prompt"]) < self.max_length] or [self[0]]
        return max(fitting, key=lambda pair: sum(len(pair[name]) for name in ("prompt", "chosen", "rejected")))


def collate_pairs(features: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Batch pairs of B rows: prompts padded on the left, so that all responses start in one column.

    Returns prompt_input_ids and prompt_attention_mask (B, P), chosen_labels (B, C) and rejected_labels (B, R) padded
    with -100, pixel_values (B, most tiles, 3, H, W), or features in their place (B, most tiles, 1, patches, hidden), and image_sizes (B, 2) as (height, width).
    """

    def pad(name: str, value: int, left: bool = False) -> torch.Tensor:
        rows = [torch.tensor(feature[name]) for feature in features]
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side="left" if left else "right"
        )

    prompt = pad("prompt", -1, left=True)
    return {
        "prompt_input_ids": prompt.masked_fill(prompt == -1, pad_token_id),
        "prompt_attention_mask": (prompt != -1).long(),
        "chosen_labels": pad("chosen", -100),
        "rejected_labels": pad("rejected", -100),
        "pixel_values": torch.nn.utils.rnn.pad_sequence([f["pixel_values"] for f in features], batch_first=True),
        "image_sizes": torch.stack([feature["image_sizes"] for feature in features]),
    }


# ---------------------------------------------------------------------------- the loss


def share_prefix(batch: dict, pad_token_id: int, packing: bool, block_mask: bool) -> dict:
    """Lay a batch of B pairs out as B rows `prompt | chosen | rejected`, whose two responses cannot see each other.

    Both responses' positions follow the prompt's last. `logits_to_keep` (C + R) indexes the columns that predict the
    C chosen and R rejected tokens; a response's first token is predicted by the prompt's last. With `packing`, all pairs
    stand one after the other in a single row without padding, none sees another, and what is kept is what predicts the
    real tokens. The mask is dense (rows, 1, S, S), or FlexAttention's with `block_mask`, which costs memory and time
    only where something is visible.
    """
    prompt, real_prompt = batch["prompt_input_ids"], batch["prompt_attention_mask"]
    responses = torch.cat([batch["chosen_labels"], batch["rejected_labels"]], dim=1)
    length, n_chosen, n_rejected = prompt.shape[1], batch["chosen_labels"].shape[1], batch["rejected_labels"].shape[1]
    device = prompt.device
    real = torch.cat([real_prompt.bool(), responses != -100], dim=1)
    ids = torch.cat([prompt, responses.masked_fill(responses == -100, pad_token_id)], dim=1)
    steps = torch.cat([torch.arange(n, device=device) for n in (n_chosen, n_rejected)])
    positions = torch.cat([(real_prompt.cumsum(1) - 1).clamp(min=0), real_prompt.sum(1, keepdim=True) + steps], dim=1)
    part = torch.repeat_interleave(
        torch.arange(3, device=device), torch.tensor([length, n_chosen, n_rejected], device=device)
    ).expand_as(ids)
    pair = torch.arange(len(ids), device=device)[:, None].where(real, -1)  # padding sees padding alone
    columns = torch.cat([length - 1 + steps[:n_chosen], torch.tensor([length - 1], device=device),
                         length + n_chosen + steps[n_chosen:-1]])  # fmt: skip
    if packing:
        columns = (real.flatten().cumsum(0) - 1).view_as(real)[:, columns][responses != -100]
        ids, positions, part, pair = (tensor[real][None] for tensor in (ids, positions, part, pair))

    def visible(row, head, query, key):
        shared = (part[row, key] == 0) | (part[row, key] == part[row, query])
        return (query >= key) & (pair[row, query] == pair[row, key]) & shared

    rows, size = ids.shape
    if block_mask:
        make_mask = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
        mask = make_mask(visible, rows, None, size, size, device)
    else:
        index = torch.arange(max(rows, size), device=device)
        mask = visible(index[:rows, None, None, None], None, index[:size, None], index[:size])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": columns}


def two_rows(batch: dict, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Lay a batch of pairs out plainly: all chosen rows, then all rejected rows, prompt and picture in both."""
    prompt, real_prompt = batch["prompt_input_ids"], batch["prompt_attention_mask"]
    labels = [batch["chosen_labels"], batch["rejected_labels"]]
    longest = max(part.shape[1] for part in labels)
    responses = torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=-100) for part in labels])
    real = torch.cat([real_prompt.repeat(2, 1), (responses != -100).long()], dim=1)
    return {
        "input_ids": torch.cat([prompt.repeat(2, 1), responses.masked_fill(responses == -100, pad_token_id)], dim=1),
        "attention_mask": real,
        "position_ids": (real.cumsum(1) - 1).clamp(min=0),
    }


class LlavaORPOTrainer(ORPOTrainer):
    """TRL's ORPOTrainer for pairs with a picture. Its odds-ratio loss and metrics are TRL's; the forward is ours.

    The NLL is the mean over pairs of each chosen response's mean token NLL (Hong et al. 2024, arXiv:2403.07691, Eq. 3
    and 6), over the response alone. TRL's own covers prompt and picture too, and weighs a pair by its length, which
    would make the loss depend on how pairs fall into batches, accumulation steps and processes.
    """

    prefix_sharing, packing, block_mask = True, False, False
    seconds_waited, pairs_seen = 0.0, 0

    def concatenated_forward(self, model, batch: dict) -> tuple[torch.Tensor, ...]:
        """Returns the mean log-probability of each chosen and rejected response's tokens (B), their mean logits (B), and
        the NLL."""
        labels = torch.cat([batch["chosen_labels"], batch["rejected_labels"]], dim=1)
        real, n_chosen = labels != -100, batch["chosen_labels"].shape[1]
        pictures = {name: batch[name] for name in ("pixel_values", "image_sizes")}
        if self.prefix_sharing:
            inputs = share_prefix(batch, self.padding_value, self.packing, self.block_mask)
            logits = model(**inputs, **pictures, use_cache=False).logits.float()
        else:
            pictures = {name: torch.cat([tensor, tensor]) for name, tensor in pictures.items()}
            logits = model(**two_rows(batch, self.padding_value), **pictures, use_cache=False).logits.float()
            chosen, rejected = logits[:, batch["prompt_input_ids"].shape[1] - 1 : -1].chunk(2)
            logits = torch.cat([chosen[:, :n_chosen], rejected[:, : labels.shape[1] - n_chosen]], dim=1)
        targets = labels[real] if self.packing else labels.flatten()
        logps = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")

        def means(values: torch.Tensor) -> list[torch.Tensor]:
            """Of each chosen (B) and each rejected (B) response's tokens, from one value a kept token."""
            values = values if self.packing else values.view_as(real)[real]
            table = values.new_zeros(real.shape).masked_scatter(real, values)
            parts = slice(n_chosen), slice(n_chosen, None)
            return [table[:, part].sum(1) / real[:, part].sum(1) for part in parts]

        chosen_logps, rejected_logps = means(logps)
        return chosen_logps, rejected_logps, *means(logits.detach().mean(-1).flatten()), -chosen_logps.mean()

    @contextmanager
    def plain_forward(self):
        """For generate(), and for a forward to compare with: no FlexAttention, nothing compiled."""
        speed_up(self.model, block_mask=False, autocast=False)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            speed_up(self.model, self.block_mask, self.args.bf16)

    def get_batch_samples(self, *args, **kwargs):
        """What comes next from the data loader; the time it takes is the time that training waits for it."""
        start = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.seconds_waited += time.perf_counter() - start
        self.pairs_seen += sum(len(batch["chosen_labels"]) for batch in samples[0]) * self.args.world_size
        return samples

    def get_batch_loss_metrics(self, *args, **kwargs):
        """TRL's, over all pairs: its gather_for_metrics cuts each forward of an epoch's last step to the size of the last."""
        for_metrics, self.accelerator.gather_for_metrics = self.accelerator.gather_for_metrics, self.accelerator.gather
        try:
            return super().get_batch_loss_metrics(*args, **kwargs)
        finally:
            self.accelerator.gather_for_metrics = for_metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """TRL's eval metrics, but exact: means over pairs, whatever the last batch holds and however many processes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            forward = self.concatenated_forward(model, inputs)
        # without the rows that even out the last batch among processes
        chosen, rejected, *logits = self.accelerator.gather_for_metrics(forward[:4])
        losses, chosen_rewards, rejected_rewards, log_odds_ratio, log_odds_chosen = self.odds_ratio_loss(
            chosen, rejected
        )
        metrics = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/rejected": rejected,
            "logps/chosen": chosen,
            "logits/rejected": logits[1],
            "logits/chosen": logits[0],
            "nll_loss": -chosen,
            "log_odds_ratio": log_odds_ratio,
            "log_odds_chosen": log_odds_chosen,
        }
        metrics = {f"eval_{name}": value.mean().item() for name, value in metrics.items()}
        for _ in range(len(chosen)):  # a batch weighs what it holds
            self.store_metrics(metrics, train_eval="eval")
        return (losses.mean() * -1 - chosen.mean()).detach(), None, None

    def create_model_card(self, *_, **__) -> None:
        """TRL's card shows a text-only pipeline; main() writes one that fits."""


# ---------------------------------------------------------------------------- before, during and after the run


def add_adapter(model, args: argparse.Namespace) -> PeftModel:
    """Put LoRA on the language model's linear layers (and the projector's); the vocabulary is left as it is."""
    targets = rf".*language_model\..*\.({'|'.join(args.lora_target_modules)})"
    if args.train_projector:
        targets = rf"({targets}|.*multi_modal_projector\.linear_[12])"
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        stop(f"--lora_target_modules {' '.join(args.lora_target_modules)}: {str(error).splitlines()[0]}")


def freeze_tower(model) -> None:
    """Run the vision tower without a graph, which checkpointing's hooks would else make it keep. Features of the cache,
    which have one channel in place of three, pass through it as they are."""
    tower, layer = model.get_base_model().model.vision_tower, model.config.vision_feature_layer
    run = tower.forward

    @torch.no_grad()
    def forward(pixel_values, **options):
        if pixel_values.shape[1] == 1:
            return BaseModelOutputWithPooling(hidden_states={layer: pixel_values[:, 0].to(tower.dtype)})
        return run(pixel_values, **options)

    tower.forward = forward


def speed_up(model, block_mask: bool, autocast: bool) -> None:
    """FlexAttention in the language model, and adapters that take their input in its own type under autocast (PEFT would
    turn it to float32 and autocast back). For the trainer's forward; generate() wants both off."""
    model.get_base_model().model.language_model.set_attn_implementation("flex_attention" if block_mask else "sdpa")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = not autocast


def flex_attention_runs(model) -> bool:
    """Whether FlexAttention compiles for the decoder's heads on its device, forward and backward; says so if not."""
    config = model.config.text_config
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    query, key, value = (
        torch.zeros(1, heads, 256, size, device=model.device, dtype=model.lm_head.weight.dtype, requires_grad=True)
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    try:
        torch.compile(flex_attention)(query, key, value, enable_gqa=True).sum().backward()
    except Exception as error:  # no C compiler, no Triton, a GPU with too little shared memory: each raises its own
        console.print(f"FlexAttention does not run here ({type(error).__name__}: {(str(error) or '?').splitlines()[0]}); "
                      "a dense mask takes its place, which is slower")  # fmt: skip
        return False
    return True


def checkpoint_layers(model, count: int) -> None:
    """Let the first `count` decoder layers recompute their activations in the backward pass; the others keep them."""
    language_model = model.get_base_model().model.language_model
    language_model.gradient_checkpointing_enable({"use_reentrant": False})
    for i, layer in enumerate(language_model.layers):
        layer.gradient_checkpointing = i < count


def free_memory(device: torch.device) -> int:
    """Bytes that the device can still give."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available


def kept_bytes(trainer: LlavaORPOTrainer, batch: dict) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of one forward."""
    weights = {weight.untyped_storage().data_ptr() for weight in trainer.model.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its own graph, an output would keep itself alive for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), trainer.accelerator.autocast():
        _graph = trainer.concatenated_forward(trainer.model, batch)  # a name, so that its tensors stay till the sum
    return sum(kept.values())


def plan_checkpointing(trainer: LlavaORPOTrainer, batch: dict) -> int:
    """How many decoder layers must recompute their activations for `batch`, the longest, to fit the memory.

    Counted are what autograd keeps, twice a layer's activations for the one that is being recomputed and its gradients,
    and gradients and AdamW's two moments of the adapter; a tenth of the memory is left for the rest.
    """
    model = trainer.model.train()
    layers = len(model.get_base_model().model.language_model.layers)
    checkpoint_layers(model, layers)
    least = kept_bytes(trainer, batch)
    checkpoint_layers(model, layers - 1)
    a_layer = kept_bytes(trainer, batch) - least
    tokens = sum(batch[name].numel() for name in ("prompt_input_ids", "chosen_labels", "rejected_labels"))
    inputs = layers * tokens * model.config.text_config.hidden_size * model.lm_head.weight.itemsize
    adapter = 3 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    room = 0.9 * free_memory(trainer.accelerator.device) - least - inputs - adapter - 2 * a_layer
    return min(max(layers - int(room // a_layer), 0), layers)


def preflight(trainer: LlavaORPOTrainer, pairs: PreferencePairs, checkpointing: str) -> None:
    """Check on a real pair what goes wrong silently, and on the longest batch that the memory is enough; print a table,
    and stop with one sentence if any line fails. Sets gradient checkpointing (auto, on or off)."""
    model, processor = trainer.model, pairs.processor
    pair = pairs[0]
    batch = trainer._prepare_inputs(collate_pairs([pair], processor.tokenizer.pad_token_id))
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        features = model.get_base_model().get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output
        tokens = f"{pair['prompt'].count(processor.image_token_id)} and {len(features[0])}"
        if pair["prompt"].count(processor.image_token_id) != len(features[0]):  # no forward would run
            stop(f"preflight failed: image tokens equal image features, but found {tokens}; nothing was trained.")
        seen = trainer.concatenated_forward(model, batch)[0].item()
        unseen = trainer.concatenated_forward(model, {**batch, "pixel_values": -batch["pixel_values"]})[0].item()
        pictures = {name: batch[name] for name in ("pixel_values", "image_sizes")}
        apart = 0.0
        for name, shared in zip(("chosen", "rejected"), trainer.concatenated_forward(model, batch)[:2], strict=True):
            row = torch.tensor([pair["prompt"] + pair[name]], device=model.device)
            with trainer.plain_forward():
                logits = model(input_ids=row, **pictures, logits_to_keep=len(pair[name]) + 1).logits[:, :-1].float()
            labels = row[:, -len(pair[name]) :]
            # "encoder-decoder" is TRL's word for logits that already stand at their labels
            alone = trainer.get_batch_logps(logits, labels, average_log_prob=True, is_encoder_decoder=True)
            apart = max(apart, (alone - shared).abs().item())
    model.train()
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    fresh = [weight for name, weight in trainable.items() if "lora_B" in name]
    for weight in fresh:  # these start at zero, which leaves lora_A without a gradient: not so for the probe
        torch.nn.init.normal_(weight, std=1e-2)
    # what FSDP2 or ZeRO-3 splits in train() is whole till then, and leaves less room than training will have
    zero_stage = getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", 0)
    split = trainer.is_fsdp_enabled or zero_stage == 3
    longest = [pair] if split else [pairs.longest()] * trainer.args.per_device_train_batch_size
    longest = trainer._prepare_inputs(collate_pairs(longest, processor.tokenizer.pad_token_id))
    layers = len(model.get_base_model().model.language_model.layers)
    recomputed = {"on": layers, "off": 0}.get(checkpointing, layers if split else None)
    if recomputed is None:
        recomputed = plan_checkpointing(trainer, longest)

    def probe(count: int) -> None:
        checkpoint_layers(model, count)
        with trainer.accelerator.autocast():
            chosen, rejected, _, _, nll = trainer.concatenated_forward(model, longest)
            (nll - trainer.odds_ratio_loss(chosen, rejected)[0].mean()).backward()

    planned = recomputed
    try:
        probe(planned)
    except torch.OutOfMemoryError:
        if checkpointing != "auto" or planned == layers:
            raise
        recomputed = layers
    if recomputed != planned:
        model.zero_grad()
        torch.cuda.empty_cache()  # outside of the except clause, whose traceback would keep the first try's graph
        probe(recomputed)
    row = sum(longest[name].shape[1] for name in ("prompt_input_ids", "chosen_labels", "rejected_labels"))
    dead = [
        name for name, weight in trainable.items()
        if weight.grad is None or not weight.grad.any() or not weight.grad.isfinite().all()
    ]  # fmt: skip
    for weight in fresh:
        torch.nn.init.zeros_(weight)
    model.zero_grad()

    labels = [batch[name][0][batch[name][0] != -100].tolist() for name in ("chosen_labels", "rejected_labels")]
    rows = model.get_input_embeddings().weight.shape[0]
    stray = [name for name in trainable if "embed_tokens" in name or "lm_head" in name]
    modules = Counter(name.split(".lora_A")[0].split(".")[-1] for name in trainable if "lora_A" in name)
    size = sum(weight.numel() for weight in trainable.values())
    checks = [
        ("image tokens equal image features", tokens, True),
        ("another picture moves the chosen log-probability", f"{seen:.4f} -> {unseen:.4f} for its negative",
         seen != unseen and math.isfinite(seen) and math.isfinite(unseen)),
        ("labels cover the responses only", f"{len(labels[0])} chosen, {len(labels[1])} rejected tokens",
         labels == [pair["chosen"], pair["rejected"]] and processor.image_token_id not in labels[0] + labels[1]),
        ("each response scores as it does alone", f"log-probabilities {apart:.1e} apart",
         apart < 0.05),  # bfloat16 and 8 bits round by up to a hundredth; a wrong mask or position is far off
        ("chosen and rejected differ", f"{sum(a != b for a, b in zip(*labels, strict=False))} tokens", labels[0] != labels[1]),
        ("vocabulary is unchanged", f"{rows} rows", rows == model.config.text_config.vocab_size),
        ("every trainable weight gets a gradient", dead[0] if dead else f"{size:,} in "
         + ", ".join(f"{n} {name}" for name, n in modules.items()), bool(trainable) and not dead),
        ("embeddings and head stay frozen", stray[0] if stray else "none trainable", not stray),
        ("the longest batch fits the memory" + ", not tried: weights are split later" * split,
         f"{len(longest['image_sizes'])} x {row:,} tokens; {recomputed} of {layers} layers recompute their activations", True),
    ]  # fmt: skip
    table = Table("preflight", "found", "")
    for name, found, passed in checks:
        table.add_row(name, found, "[green]ok[/]" if passed else "[red]failed[/]")
    console.print(table)
    for name, found, passed in checks:
        if not passed:
            stop(f"preflight failed: {name}, but found {found}; nothing was trained.")


SAMPLES_PAGE = jinja2.Template(
    """<!doctype html><meta charset="utf-8"><title>Samples</title>
<style>body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
section{display:grid;grid-template-columns:18rem 1fr;gap:1.5rem;border-top:1px solid #ddd;padding:1.5rem 0}
img{width:100%;border-radius:6px}th{text-align:left;white-space:nowrap;padding-right:1rem;color:#555;font-weight:600}
th,td{vertical-align:top;padding-bottom:.4rem}th{width:5.5rem}.chosen th{color:#19742c}.rejected th{color:#a32020}
table{align-self:start;border-collapse:collapse}@media(max-width:45rem){section{grid-template-columns:1fr}}</style>
<h1>Held-out pairs, and what the model answers at each evaluation</h1>
{% for sample in samples %}{% set number = loop.index0 %}<section>
<img src="{{ embed(sample.image) }}" alt="the picture asked about"><table>
<tr><th>Question<td>{{ sample.question }}</tr>
<tr class="chosen"><th>Chosen<td>{{ sample.chosen }}</tr><tr class="rejected"><th>Rejected<td>{{ sample.rejected }}</tr>
{% for evaluation in evaluations %}<tr><th>{{ "Base" if evaluation.step == 0 else "Step %d" % evaluation.step }}
<td>{{ evaluation.answers[number] }}</tr>{% endfor %}</table></section>{% endfor %}""",
    autoescape=True,
)


def embed_picture(image: Image.Image) -> str:
    """A picture as an address that an HTML page can carry inside it."""
    buffer = io.BytesIO()
    ImageOps.contain(image, (448, 448)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_jsonl(path: Path) -> list[dict]:
    """The file's lines up to the first that is no JSON, such as one whose writing was cut short; none if no file."""
    rows = []
    with suppress(FileNotFoundError, ValueError):
        rows.extend(json.loads(line) for line in path.read_text().splitlines())
    return rows


class RunRecorder(ProgressCallback):
    """Progress bar, metrics.jsonl, and at each evaluation a few answers beside chosen and rejected (samples.html)."""

    def __init__(self, trainer, output_dir: Path, processor, eval_pairs: PreferencePairs | None, num_samples: int = 4):
        super().__init__()
        self.trainer, self.output_dir, self.processor, self.samples = trainer, output_dir, processor, []
        self.last_log, self.seconds = (0, 0.0), 0.0
        for index in range(len(eval_pairs or [])):
            with suppress(OSError):  # a picture that breaks off is no sample
                self.samples.append(eval_pairs.row(index))
            if len(self.samples) == num_samples:
                break

    def close(self) -> None:
        """End the bars, so that a sentence about why the run broke off stands on a line of its own, the last."""
        with suppress(ValueError):  # torch's handler raises for a dead worker, here too; there is none in other threads
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for bar in filter(None, (self.prediction_bar, self.training_bar)):
            bar.close()

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.last_log = (self.trainer.pairs_seen, time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history.clear()  # metrics.jsonl has it; kept, it would grow, and be written into every checkpoint
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        if "loss" in logs:
            seen, then = self.last_log
            self.last_log = (self.trainer.pairs_seen, time.perf_counter())
            self.seconds += self.last_log[1] - then
            logs["pairs_per_second"] = (self.last_log[0] - seen) / (self.last_log[1] - then)
            self.training_bar.set_postfix(
                loss=f"{logs['loss']:.3f}",
                accuracy=f"{logs['rewards/accuracies']:.2f}",
                margin=f"{logs['rewards/margins']:.4f}",
                pairs_per_s=f"{logs['pairs_per_second']:.1f}",
            )
        with (self.output_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if self.samples:  # in every process: where weights are split among them, all take part in every forward
            model = model.module if hasattr(model, "module") else model  # without the wrapper of several processes
            images, questions = [row["image"] for row in self.samples], [row["question"] for row in self.samples]
            together = {"synced_gpus": True} if args.world_size > 1 else {}
            with self.trainer.plain_forward():
                answers = generate_answers(model.eval(), self.processor, images, questions, **together)
        if state.is_world_process_zero and self.samples:
            with (self.output_dir / "samples.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step, "answers": answers}) + "\n")
            evaluations = read_jsonl(self.output_dir / "samples.jsonl")
            page = SAMPLES_PAGE.render(samples=self.samples, evaluations=evaluations, embed=embed_picture)
            write_whole(self.output_dir / "samples.html", page)
            if "wandb" in args.report_to:
                import wandb

                columns = ("question", "chosen", "rejected")
                rows = [
                    [state.global_step, wandb.Image(row["image"]), *(row[name] for name in columns), answer]
                    for row, answer in zip(self.samples, answers, strict=True)
                ]
                wandb.log({"samples": wandb.Table(["step", "picture", *columns, "answer"], rows)})
        self.last_log = (self.last_log[0], time.perf_counter())  # pairs per second are of training alone


def draw_curves(metrics: list[dict], path: Path) -> None:
    """Draw the run's figures against the optimizer step: training as a line, held-out evaluations as dots."""
    panels = {
        "Log-probability a token": ["logps/chosen", "logps/rejected"],
        "Log-odds, chosen over rejected": ["log_odds_chosen"],
        "Preference accuracy": ["rewards/accuracies"],
        "ORPO loss": ["loss"],
        "NLL of the chosen response": ["nll_loss"],
        "Reward margin": ["rewards/margins"],
    }
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained", sharex=True)
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
        for key, colour in zip(keys, ("#1b7837", "#b2182b"), strict=False):
            label = key.split("/")[-1] if len(keys) > 1 else "training"
            train = [(row["step"], row[key]) for row in metrics if key in row]
            held_out = [(row["step"], row[f"eval_{key}"]) for row in metrics if f"eval_{key}" in row]
            axis.plot(*zip(*train, strict=True), color=colour, alpha=0.55, lw=1, label=label)
            if held_out:
                label = f"held out{', ' + label if len(keys) > 1 else ''}"
                axis.plot(*zip(*held_out, strict=True), "o", color=colour, ms=5, label=label)
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    write_whole(path, buffer.getvalue())


MODEL_CARD = jinja2.Template(
    """---
{{ card }}
---

# {{ name }}

A LoRA adapter for `{{ args.model_path }}`, trained with ORPO ([Hong et al. 2024](https://arxiv.org/abs/2403.07691)) on
{{ pairs }} preference pairs of `{{ args.dataset }}`, so that the model names less that is not in the picture.

{% if rows %}| held-out pairs | base | with adapter |
|---|---|---|
{% for name, before, after in rows %}| {{ name }} | {{ "%.4f" % before }} | {{ "%.4f" % after }} |
{% endfor %}{% endif %}
```python
from peft import PeftModel
from transformers import LlavaNextForConditionalGeneration

model = LlavaNextForConditionalGeneration.from_pretrained("{{ args.model_path }}")
model = PeftModel.from_pretrained(model, "path/to/{{ name }}")
```
"""
)


def set_up_tracking(args: argparse.Namespace) -> None:
    """W&B online for whoever is logged in, else offline into the output folder; nothing is ever asked."""
    if args.report_to == "wandb":
        import wandb

        os.environ.update(WANDB_PROJECT=args.wandb_project, WANDB_DIR=str(args.output_dir))
        if args.wandb_entity:
            os.environ["WANDB_ENTITY"] = args.wandb_entity
        if not wandb.login(prompt=False, verify=False):
            os.environ["WANDB_MODE"] = "offline"
            wandb.teardown()  # the settings that login read know nothing of the line above


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written whole (trainer_state.json comes last), or None."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.split("-")[1].isdigit()]
    found.sort(key=lambda folder: int(folder.name.split("-")[1]))
    for folder in reversed(found):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return folder
        except (OSError, ValueError):
            continue
    return None


def open_run(args: argparse.Namespace) -> Path | None:
    """Make the output folder ready; returns the checkpoint to go on from. Refuses to write over another run."""
    output_dir = args.output_dir
    free = ("resume", "report_to", "wandb_project", "wandb_entity", "num_workers", "gradient_checkpointing", "packing",
            "compile", "cache_vision_features", "cache_gb", "batch_size", "gradient_accumulation_steps")  # fmt: skip
    settings = {name: str(value) for name, value in vars(args).items() if name not in free}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    settings["pairs_a_step"] = str(args.batch_size * args.gradient_accumulation_steps * processes)
    if output_dir.exists() and not output_dir.is_dir():
        stop(f"--output_dir {output_dir} is a file; name a folder.")
    checkpoint = last_checkpoint(output_dir)
    if not MAIN_PROCESS:
        return checkpoint
    if not args.resume and (checkpoint or (output_dir / "metrics.jsonl").exists()):
        stop(f"--output_dir {output_dir} holds an earlier run; add --resume to go on with it, or name another folder.")
    if checkpoint:
        noted = output_dir / "arguments.json"
        before = json.loads(noted.read_text()) if noted.exists() else settings
        pairs = before.get("pairs_a_step")
        if pairs is None:  # noted by an earlier version, which did not take another number of processes
            parts = (
                int(before.get(name, getattr(args, name))) for name in ("batch_size", "gradient_accumulation_steps")
            )
            pairs = str(math.prod(parts) * processes)
        if pairs != settings["pairs_a_step"]:
            stop(f"--resume needs the {pairs} pairs an optimizer step that the run in {output_dir} began with, but "
                 f"--batch_size {args.batch_size} x --gradient_accumulation_steps {args.gradient_accumulation_steps} x "
                 f"{processes} process{'es' if processes > 1 else ''} = {settings['pairs_a_step']}.")  # fmt: skip
        changed = [
            f"--{name} was {before[name]}, is {value}"
            for name, value in settings.items()
            if before.get(name, value) != value
        ]
        if changed:
            stop(f"--resume cannot change the run in {output_dir}: {'; '.join(changed)}.")
        step = int(checkpoint.name.split("-")[1])
        for name in ("metrics.jsonl", "samples.jsonl"):  # what came after the checkpoint is about to be done again
            kept = [json.dumps(line) + "\n" for line in read_jsonl(output_dir / name) if line["step"] <= step]
            write_whole(output_dir / name, "".join(kept))
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl", "dropped_rows.jsonl"):
            (output_dir / name).unlink(missing_ok=True)
        write_whole(output_dir / "arguments.json", json.dumps(settings, indent=2))
    return checkpoint


def make_pairs(args, rows: datasets.DatasetDict, processor) -> tuple[PreferencePairs, PreferencePairs | None]:
    """Check and split the pairs; list the rows left out in dropped_rows.jsonl and count them on screen."""
    root = Path(args.dataset).parent if Path(args.dataset).is_file() else Path(args.dataset)
    dropped_file = args.output_dir / "dropped_rows.jsonl"
    good, dropped = check_rows(rows["train"], root, processor, args.max_length, args.max_samples)
    test = next((rows[name] for name in ("test", "validation") if name in rows), None)
    if test:
        eval_good, eval_dropped = check_rows(test, root, processor, args.max_length, None)
        dropped += eval_dropped
        train = good
    else:
        test = rows["train"]
        train, eval_good = split_rows(rows["train"], good, args.eval_fraction, args.seed)
    if MAIN_PROCESS:
        write_whole(dropped_file, "".join(json.dumps(row) + "\n" for row in dropped))
    reasons = ", ".join(f"{n} x {reason}" for reason, n in Counter(row["reason"] for row in dropped).most_common())
    if not train:
        stop(f"--dataset {args.dataset} has no usable pair ({reasons or 'it has no rows'}); see {dropped_file}.")
    held_out = f"{len(eval_good):,} held out"
    if len(eval_good) > args.eval_samples:
        eval_good = sorted(np.random.default_rng(args.seed).permutation(eval_good)[: args.eval_samples].tolist())
        held_out += f", {args.eval_samples:,} of them evaluated"
    console.print(f"{len(train):,} pairs to train on, {held_out}; {len(dropped):,} rows left out"
                  f"{': ' + reasons if reasons else ''}")  # fmt: skip
    shared = (root, processor, args.max_length, dropped_file)
    return (
        PreferencePairs(rows["train"], train, *shared),
        PreferencePairs(test, eval_good, *shared) if eval_good else None,
    )


def build_trainer(args, model, processor, train_pairs, eval_pairs, checkpoint: Path | None) -> LlavaORPOTrainer:
    on_gpu = torch.cuda.is_available()
    batches = math.ceil(len(train_pairs) / (args.batch_size * int(os.environ.get("WORLD_SIZE", 1))))
    workers = args.num_workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    config = ORPOConfig(
        output_dir=str(args.output_dir),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_ratio,
        beta=args.beta,
        max_length=args.max_length,
        padding_value=processor.tokenizer.pad_token_id,
        disable_dropout=False,  # there is none but LoRA's, which was asked for
        gradient_checkpointing=False,  # preflight sets it, layer by layer; TRL's default would turn all on again
        ddp_find_unused_parameters=False,  # preflight has seen that each gets a gradient
        optim="adamw_torch_fused",
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        seed=args.seed,
        logging_steps=1,
        # once an epoch is given in steps too: then a checkpoint of that step holds what comes after the evaluation
        eval_strategy="no" if eval_pairs is None else "steps",
        eval_steps=args.eval_steps or math.ceil(batches / args.gradient_accumulation_steps),
        eval_on_start=eval_pairs is not None and not checkpoint,  # the base; trainer.evaluate() would undo DDP here
        save_steps=args.save_steps,
        save_total_limit=2,
        dataloader_num_workers=workers,
        # the batches of an optimizer step are asked for at once
        dataloader_prefetch_factor=math.ceil(args.gradient_accumulation_steps / workers) + 1 if workers else None,
        remove_unused_columns=False,
        report_to=args.report_to,
        run_name=args.output_dir.name,
    )
    if not on_gpu:  # for several processes it is cpu:0, onto which torch.load does not bring the optimizer's state
        config.__dict__["_setup_devices"] = torch.device("cpu")
    config._n_gpu = 1  # several GPUs take torchrun: nn.DataParallel would cut logits_to_keep apart
    trainer = LlavaORPOTrainer(
        model=model,
        args=config,
        data_collator=partial(collate_pairs, pad_token_id=processor.tokenizer.pad_token_id),
        train_dataset=train_pairs,
        eval_dataset=eval_pairs,
        processing_class=processor,
    )
    trainer.prefix_sharing = not args.no_prefix_sharing
    trainer.block_mask = on_gpu and trainer.prefix_sharing and flex_attention_runs(model)
    trainer.packing = trainer.block_mask if args.packing is None else args.packing
    freeze_tower(model)
    speed_up(model, trainer.block_mask, config.bf16)
    if args.compile:
        console.print("--compile: preflight, the first evaluation and the first step take minutes longer")
        for layer in model.get_base_model().model.language_model.layers:
            layer.compile()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.recorder = RunRecorder(trainer, args.output_dir, processor, eval_pairs)
    trainer.add_callback(trainer.recorder)
    return trainer


def fill_cache(args, trainer: LlavaORPOTrainer, *sets: PreferencePairs | None) -> None:
    """Run the vision tower once over each picture that --cache_vision_features does not hold yet, before training.

    Stops at --cache_gb or a full disk; what is not there is computed when it is needed. Each process does its share.
    """
    model, accelerator = trainer.model.eval(), trainer.accelerator
    cache = VisionCache(args.cache_vision_features, model, trainer.processing_class)
    pairs = [pairs for pairs in sets if pairs]
    size, total = 0, sum(map(len, pairs))
    for file in args.cache_vision_features.rglob("*.safetensors"):
        with suppress(FileNotFoundError):  # deleted meanwhile
            size += file.stat().st_size
    room = (args.cache_gb * 1e9 - size) / accelerator.num_processes
    share = torch.utils.data.Subset(
        torch.utils.data.ConcatDataset([PicturesToCache(each, cache) for each in pairs]),
        range(accelerator.process_index, total, accelerator.num_processes),
    )
    loader = torch.utils.data.DataLoader(share, batch_size=None, num_workers=trainer.args.dataloader_num_workers)
    tower, layer = model.get_base_model().model.vision_tower, model.config.vision_feature_layer
    written, ended = 0, ""
    for item in tqdm(loader, desc="vision features", disable=not MAIN_PROCESS):
        if not item or cache.holds(item["picture"]):
            continue
        with accelerator.autocast():
            hidden = tower(item["pixel_values"].to(tower.device), output_hidden_states=True).hidden_states[layer]
        content = save({"pixel_values": hidden[:, None].to(tower.dtype).cpu(), "image_sizes": item["image_sizes"]})
        room -= len(content)
        try:
            if room < 0:
                raise OSError(f"--cache_gb {args.cache_gb:g} is reached")
            file = cache.file(item["picture"])
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, content)
        except OSError as error:
            ended = f"; {error.strerror or error}, the rest is computed when it is needed"
            break
        written += 1
    console.print(f"vision features: {written:,} pictures new in {args.cache_vision_features}{ended}")
    accelerator.wait_for_everyone()
    for each in pairs:
        each.cache = cache


def fingerprint(pairs: PreferencePairs) -> str:
    """SHA-256 over the texts of the pairs, in order (not over the pictures)."""
    texts = pairs.rows.select_columns(["question", "chosen", "rejected"])
    digest = hashlib.sha256()
    for start in range(0, len(pairs), 1000):
        for text in texts.select(pairs.indices[start : start + 1000]).to_list():
            digest.update(json.dumps(text).encode())
    return digest.hexdigest()


def finish_run(args: argparse.Namespace, trainer: LlavaORPOTrainer, seconds: float) -> None:
    """Write adapter, model card, curves and training_summary.json, and print what the run changed."""
    output_dir, train_pairs, eval_pairs = args.output_dir, trainer.train_dataset, trainer.eval_dataset
    data_wait = trainer.seconds_waited / max(trainer.recorder.seconds, 1e-9)
    metrics = read_jsonl(output_dir / "metrics.jsonl")
    evaluations = [row for row in metrics if "eval_loss" in row]
    before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    # a picture that breaks off is noted anew whenever it is met
    listed = {(row["split"], row["row"]): row["reason"] for row in read_jsonl(output_dir / "dropped_rows.jsonl")}
    dropped = Counter(listed.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary = {
        "arguments": {name: value if isinstance(value, int | float | list) else str(value) for name, value in vars(args).items()},
        "versions": {name: importlib.metadata.version(name) for name in
                     ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "data": {"train_pairs": len(train_pairs), "eval_pairs": len(eval_pairs or []),
                 "fingerprint": fingerprint(train_pairs),
                 "dropped": dropped},
        "steps": trainer.state.global_step,
        "data_wait_share": data_wait,
        "packed": trainer.packing,
        "flex_attention": trainer.block_mask,
        "recomputed_layers": sum(layer.gradient_checkpointing for layer in
                                 trainer.model.get_base_model().model.language_model.layers),
        "processes": trainer.accelerator.num_processes,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak,
        "before": before,
        "after": after,
    }  # fmt: skip
    partial_dir = output_dir / "adapter.partial"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (partial_dir / name).chmod((output_dir / "metrics.jsonl").stat().st_mode)  # safetensors' own is 0600
        os.replace(partial_dir / name, output_dir / name)
    shutil.rmtree(partial_dir)
    shown = {"accuracies": "preference accuracy", "margins": "reward margin"}
    table = Table(f"{len(eval_pairs or []):,} held-out pairs", "base", "with adapter")
    figures = ("rewards/accuracies", "rewards/margins", "log_odds_chosen", "nll_loss", "loss")
    rows = [
        (shown.get(key.split("/")[-1], key), before[f"eval_{key}"], after[f"eval_{key}"]) for key in figures if before
    ]
    for name, *values in rows:
        table.add_row(name, *(f"{value:.4f}" for value in values))
    console.print(table)
    card = ModelCardData(base_model=args.model_path, library_name="peft", tags=["orpo", "lora", "llava-next"])
    text = MODEL_CARD.render(card=card.to_yaml(), name=output_dir.name, args=args, pairs=len(train_pairs), rows=rows)
    write_whole(output_dir / "README.md", text)
    draw_curves(metrics, output_dir / "training_curves.png")
    write_whole(output_dir / "training_summary.json", json.dumps(summary, indent=2))
    if dropped:
        console.print("rows left out: " + ", ".join(f"{n} x {reason}" for reason, n in dropped.most_common()))
    console.print(f"{data_wait:.1%} of the training time was waiting for pictures"
                  f"{'; more --num_workers can help' if data_wait > 0.03 else ''}")  # fmt: skip
    console.print(f"adapter, card, curves and summary are in {output_dir}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    rows = load_rows(args.dataset)  # a wrong path shows before the model is loaded
    if args.cache_vision_features:
        try:
            args.cache_vision_features.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            stop(
                f"--cache_vision_features {args.cache_vision_features} cannot be used: {error.strerror}; name a folder."
            )
    checkpoint = open_run(args)
    if checkpoint:
        console.print(f"going on from {checkpoint}")
    elif args.resume:
        console.print(f"no checkpoint in {args.output_dir} yet; the run starts at the beginning")
    if args.resume and (args.output_dir / "training_summary.json").exists():
        console.print(f"the run in {args.output_dir} is finished; there is nothing to resume")
        return
    set_up_tracking(args)
    set_seed(args.seed)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model, processor = load_llava(args.model_path, device=device, load_4bit=args.load_4bit, load_8bit=args.load_8bit)
    train_pairs, eval_pairs = make_pairs(args, rows, processor)
    trainer = build_trainer(args, add_adapter(model, args), processor, train_pairs, eval_pairs, checkpoint)
    preflight(trainer, train_pairs, args.gradient_checkpointing)
    if args.cache_vision_features:
        fill_cache(args, trainer, train_pairs, eval_pairs)
    set_seed(args.seed)  # so that order and dropout do not depend on what preflight had to try
    with closing(trainer.recorder):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.accelerator.wait_for_everyone()
        metrics = read_jsonl(args.output_dir / "metrics.jsonl")
        if eval_pairs and not any("eval_loss" in row and row["step"] == trainer.state.global_step for row in metrics):
            trainer.evaluate()
    # in every process: where weights are split among them, each has a part
    trainer.save_model(str(args.output_dir / "adapter.partial"))
    if MAIN_PROCESS:
        finish_run(args, trainer, time.perf_counter() - started)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        newest = last_checkpoint(parse_args().output_dir)
        stop(f"interrupted; the same command with --resume goes on from {newest.name}." if newest else
             "interrupted before the first checkpoint, which comes after --save_steps steps.", code=130)  # fmt: skip
    except LookupError as error:  # of PreferencePairs, maybe in a data loader's worker
        if type(error) is not LookupError:  # a KeyError or an IndexError is a fault of the program
            raise
        stop(str(error).splitlines()[-1])
    except torch.OutOfMemoryError:
        stop(
            "the GPU's memory is full; use a smaller --batch_size with more --gradient_accumulation_steps, --gradient_checkpointing "
            "on, or --load_4bit."
        )
    except (RuntimeError, ConnectionError, EOFError) as error:
        # torch has noticed that a worker is gone, or reading from it breaks off before torch has
        frames = traceback.extract_tb(error.__traceback__) if not isinstance(error, RuntimeError) else []
        if "DataLoader worker (pid" not in str(error) and not any("/multiprocessing/" in at.filename for at in frames):
            raise
        stop("a process that decodes pictures was killed: too little memory, or too little shared memory (in a container: "
             "--shm-size 8g); use a smaller --num_workers, and --resume.")  # fmt: skip
