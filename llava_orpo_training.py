"""Align LLaVA-1.6 with ORPO and LoRA on image preference pairs, so that it names fewer things that are not there.

Reads   a LLaVA-NeXT checkpoint (--model_path) and preference pairs in RLAIF-V's columns (--dataset).
Writes  to --output_dir: the LoRA adapter and its card, metrics.jsonl, samples.html, training_curves.png,
        dropped_rows.jsonl, training_summary.json, and checkpoints to resume from.
Needs   pip install -r requirements/train.txt

    python llava_orpo_training.py --output_dir ./checkpoints/llava-orpo-prod --epochs 3 --batch_size 4
    python llava_orpo_training.py --output_dir ./checkpoints/llava-orpo-prod --epochs 3 --batch_size 4 --resume
    python llava_orpo_training.py --test_mode --output_dir outputs/miniature --learning_rate 1e-3 --batch_size 16

Several GPUs: accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 llava_orpo_training.py ...
"""

import argparse
import math
import sys
from pathlib import Path

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

    count, natural = number(int, lambda n: n > 0, "above 0"), number(int, lambda n: n >= 0, "at least 0")
    positive = number(float, lambda x: 0 < x < math.inf, "above 0")
    share = number(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
    data = parser.add_argument_group("model and data")
    add(data, "--model_path", "base model: hub id or folder", default="llava-hf/llava-v1.6-mistral-7b-hf")
    add(data, "--dataset", "pairs: hub id, folder, .parquet or .jsonl", default="openbmb/RLAIF-V-Dataset")
    add(data, "--output_dir", "folder to write to", type=Path, default=Path("checkpoints/llava-orpo"))
    add(data, "--max_samples", "use the first N good pairs only", type=count)
    add(data, "--eval_fraction", "share of the pictures held out, if there is no test split", type=share, default=0.1)
    add(data, "--eval_samples", "how many of the held-out pairs are evaluated", type=count, default=300)
    add(data, "--max_length", "longest prompt and response, in tokens; responses are cut", type=count, default=4096)
    add(data, "--num_workers", "processes that decode and resize pictures", type=natural, default=2)
    add(data, "--test_mode", "use the embedded miniature as model and data, if not given", action="store_true")

    lora = parser.add_argument_group("adapter")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    add(lora, "--lora_path", "start from this adapter (hub id or folder), with its rank and layers, not from zero")
    add(lora, "--lora_rank", "rank of the update", type=count, default=16)
    add(lora, "--lora_alpha", "the update is scaled by alpha / rank", type=count, default=32)
    add(lora, "--lora_dropout", "dropout on the adapter's input", type=share, default=0.0)
    add(lora, "--lora_target_modules", "adapted linear layers of the language model", nargs="+", default=modules)
    add(lora, "--train_projector", "adapt the vision-language projector too", action="store_true")
    add(lora, "--load_4bit", "QLoRA: base weights in NF4 with double quantization", action="store_true")

    run = parser.add_argument_group("training")
    add(run, "--epochs", "passes over the pairs", type=positive, default=1.0)
    add(run, "--batch_size", "pairs per device and forward pass", type=count, default=4)
    add(run, "--gradient_accumulation_steps", "forward passes per optimizer step", type=count, default=4)
    add(run, "--learning_rate", "peak of the cosine schedule", type=positive, default=5e-5)
    add(run, "--warmup_ratio", "share of the steps in which the learning rate rises", type=share, default=0.1)
    add(run, "--beta", "weight of the odds-ratio term (the paper's lambda)", type=positive, default=0.1)
    add(run, "--seed", "seed of the split, the order and the adapter", type=natural, default=42)
    modes = ["auto", "on", "off"]
    add(run, "--gradient_checkpointing", "recompute as few layers as fit, all, or none", choices=modes, default="auto")
    add(run, "--save_steps", "steps between checkpoints, of which the newest two are kept", type=count, default=200)
    add(run, "--resume", "continue from the newest checkpoint in --output_dir", action="store_true")
    add(run, "--report_to", "experiment tracker", choices=["wandb", "none"], default="wandb")
    add(run, "--wandb_project", "W&B project", default="llava-orpo")
    add(run, "--wandb_entity", "W&B user or team")
    args = parser.parse_args(argv)
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
import os
import re
import resource
import zipfile
from collections import Counter
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial, wraps
from itertools import chain
from typing import NoReturn

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import bitsandbytes
import datasets
import jinja2
import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from rich.console import Console
from rich.markdown import Markdown
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm
from transformers import ProgressCallback, set_seed
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

# on a CPU, it would repack NF4 weights at a forward in eval mode, and afterwards silently compute no gradients
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of several processes, the one that prints and writes
console = Console(stderr=True, quiet=not MAIN_PROCESS)


# ---------------------------------------------------------------------------- blocks that later scripts copy


def stop(message: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def write_whole(path: Path, content: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content, "utf-8", "replace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


def build_prompt(processor, question: str, image_size: tuple[int, int]) -> list[int]:
    """Return the token ids of LLaVA-1.6's prompt: BOS and `[INST] <image>\\n{question} [/INST]`, or Vicuna's form of it.

    The number of image tokens depends on the picture's `image_size`, which is (width, height). As in the original code, the
    text before and after them is tokenized separately. A `<image>` or `</s>` inside the question is plain text.
    """
    tokenizer, (width, height) = processor.tokenizer, image_size
    num_image_tokens = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
    before, after = "[INST] ", " [/INST]"
    if "[INST]" not in (processor.chat_template or before):
        before = "A chat between a curious human and an artificial intelligence assistant. "
        before += "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: "
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
    """Return (config, processor, vision tower's name) for a checkpoint in LLaVA's own format, whose config.json is `original`.
    The tokenizer gets `<image>` and `<pad>` as its next two tokens, as in the hub's converted checkpoints."""
    from transformers import AutoConfig, LlamaTokenizer, LlavaNextConfig, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    expected = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "vocab_size": 32000}
    for name, value in expected.items():
        if original.get(name) != value:
            stop(f"--model_path {model_path} has {name} {original.get(name)!r}; LLaVA-1.6 has {value!r}.")
    tower, vision = original["mm_vision_tower"], LlavaNextConfig().vision_config
    if tower != "openai/clip-vit-large-patch14-336":  # this one, which all published checkpoints name, is the default
        vision = AutoConfig.from_pretrained(tower, trust_remote_code=False)
        vision = getattr(vision, "vision_config", vision)
    llava = ("mm_", "image_", "tokenizer_", "unfreeze_", "tune_", "use_mm_", "freeze_", "architectures", "auto_map")
    text = {name: value for name, value in original.items() if not name.startswith(llava)}
    text["model_type"] = "mistral" if original["model_type"] == "llava_mistral" else "llama"
    grid = original["image_grid_pinpoints"]  # (width, height) pairs, which some checkpoints write as text
    grid = [[height, width] for width, height in (json.loads(grid) if isinstance(grid, str) else grid)]
    config = LlavaNextConfig(vision_config=vision.to_dict(), text_config=text, image_grid_pinpoints=grid)
    config.vision_feature_layer = original["mm_vision_select_layer"]
    tokenizer = LlamaTokenizer.from_pretrained(model_path, add_bos_token=True, legacy=True, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if len(tokenizer) != 32002:
        stop(f"--model_path {model_path} has a tokenizer of {len(tokenizer) - 2:,} tokens; LLaVA-1.6 has 32,000.")
    side = vision.image_size
    images = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=side, image_grid_pinpoints=grid)
    before, after = ("[INST] ", " [/INST]") if text["model_type"] == "mistral" else ("USER: ", " ASSISTANT:")
    template = before + "<image>\n{{ messages[0]['content'][-1]['text'] }}" + after
    settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, LlavaNextProcessor(images, tokenizer, vision.patch_size, chat_template=template, **settings), tower


def read_checkpoint(model_path: str) -> tuple:
    """Return (config, processor, vision tower's name) of a checkpoint, as read_original does for LLaVA's own format; config
    and tower are None for the hub's layout. Stops if the checkpoint is not LLaVA-1.6."""
    from transformers import AutoProcessor, PreTrainedConfig

    try:
        found = PreTrainedConfig.get_config_dict(model_path)[0]
        kind = found.get("model_type", "unknown")
        if kind in ("llava_mistral", "llava_llama", "llava") and "mm_vision_tower" in found:
            return read_original(model_path, found)
        if kind != "llava_next":
            stop(f"--model_path {model_path} has no config.json of LLaVA-1.6; its model type is {kind}.")
        processor = AutoProcessor.from_pretrained(model_path, backend="pil", trust_remote_code=False)
    except Exception as error:
        stop(f"--model_path {model_path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}).")
    if re.search("im_start|start_header", processor.chat_template or ""):
        stop(f"--model_path {model_path} has a prompt template that is neither Mistral's nor Vicuna's.")
    return None, processor, None


def load_llava(model_path: str, lora_path: str | None = None, device="auto", load_4bit=False, load_8bit=False):
    """Load a LLaVA-1.6 checkpoint, in the hub's layout or LLaVA's own, and an adapter; return (model, processor).

    The device "auto" is the first of cuda, mps and cpu that is there, and "all" spreads the layers over all GPUs. Weights
    are float32 on the CPU and bfloat16 on a GPU, or float16 if the GPU lacks it. `load_4bit` keeps the language model in NF4
    with double quantization, `load_8bit` in LLM.int8. Only safetensors files are read, and no code of a checkpoint is run.
    """
    from transformers import BitsAndBytesConfig, LlavaNextForConditionalGeneration

    adapter = read_adapter(lora_path) if lora_path else None  # before the base, whose reading takes minutes
    config, processor, tower = read_checkpoint(model_path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    has_bf16 = device == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16 if has_bf16 else torch.float16
    bits = {"load_in_4bit": load_4bit, "load_in_8bit": load_8bit, "bnb_4bit_quant_type": "nf4"}
    bits |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    bits["llm_int8_skip_modules"] = ["lm_head", ".*vision_tower.*", ".*multi_modal_projector.*"]
    settings = {"dtype": dtype, "device_map": "auto" if device == "all" else {"": device}, "use_safetensors": True}
    settings |= {"config": config, "key_mapping": ORIGINAL_KEYS if tower else None, "output_loading_info": True}
    if load_4bit or load_8bit:
        settings["quantization_config"] = BitsAndBytesConfig(**bits)
    try:
        model, report = LlavaNextForConditionalGeneration.from_pretrained(model_path, **settings)
        if tower:
            complete_original(model, tower, report["missing_keys"])
    except Exception as error:
        stop(f"--model_path {model_path} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}).")
    for fault in ("missing", "unexpected"):
        if report[f"{fault}_keys"]:
            stop(f"--model_path {model_path} does not fit its config.json ({fault}: {min(report[f'{fault}_keys'])}).")
    if hasattr(model, "ct_decompress_hook"):  # compressed-tensors would wait for a forward of the whole model
        model.hf_quantizer.compressor.decompress_model(model)
    model = allow_cache_position(model.eval())
    if adapter:
        model = load_adapter(model, *adapter)
        if torch.equal(probe_logits(model, processor), probe_logits(model, processor, adapter=False)):
            stop(f"--lora_path {lora_path} does nothing: the logits of a prompt are the same with it and without it.")
    return model, processor


def complete_original(model, tower: str, missing: set[str]) -> None:
    """Add what a checkpoint in LLaVA's own format lacks: 64 rows of vocabulary, as in the hub's converted checkpoints, and
    the vision weights from the tower's own checkpoint, if all are `missing`."""
    from transformers import CLIPVisionModel

    vision = {key for key in model.state_dict() if "vision_tower" in key}
    if vision <= missing:
        weights = CLIPVisionModel.from_pretrained(tower, dtype=model.dtype, use_safetensors=True).state_dict()
        model.model.vision_tower.load_state_dict(weights)
        missing -= vision
    model.resize_token_embeddings(model.config.text_config.vocab_size + 64, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        # a new row is the mean of the others, so that its logit is their mean and never the greatest
        weight.data[-64:] = weight.data[:-64].float().mean(0).to(weight.dtype)


def allow_cache_position(model):
    """Let callers pass `cache_position`, as transformers 4.38 to 4.57 do, to a model whose forward does not know it."""
    forward = model.forward
    if not {"cache_position", "kwargs"} & inspect.signature(forward).parameters.keys():
        model.forward = wraps(forward)(lambda *args, cache_position=None, **kwargs: forward(*args, **kwargs))
    return model


# names under which adapters and checkpoints of this architecture have been saved -> today's names
ADAPTER_KEYS = {
    r"^(base_model\.model\.)+": "",
    **ORIGINAL_KEYS,
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^(vision_tower\.|multi_modal_projector\.|language_model\.|image_newline)": r"model.\1",
    r"^model\.vision_tower\.vision_model\.": "model.vision_tower.",
}


def rename_key(key: str) -> str:
    """Return today's name for a layer or weight of an adapter or a checkpoint."""
    for pattern, replacement in ADAPTER_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


def read_adapter(lora_path: str) -> tuple[Path, "LoraConfig", dict[str, torch.Tensor]]:
    """Return a LoRA adapter's folder, which is fetched first if `lora_path` is a hub id, its configuration, and its weights."""
    from huggingface_hub import snapshot_download
    from peft import PeftConfig

    folder = Path(lora_path)
    try:
        if not folder.is_dir():
            files = ["*.json", "adapter_model.safetensors", "non_lora_trainables.bin"]
            folder = Path(snapshot_download(lora_path, allow_patterns=files))
        config, saved = PeftConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        advice = "Give a hub id or a folder; convert an adapter_model.bin to safetensors first."
        stop(f"--lora_path {lora_path} is no adapter: {str(error).splitlines()[0]} {advice}")
    if config.peft_type != "LORA":
        stop(f"--lora_path {lora_path} is a {config.peft_type} adapter; this script reads LoRA.")
    if (folder / "non_lora_trainables.bin").exists():
        stop(f"--lora_path {lora_path} has more weights in non_lora_trainables.bin; merge it with LLaVA's own code.")
    weights = {rename_key(key): weight for key, weight in saved.items()}
    config.rank_pattern = {rename_key(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {rename_key(name): alpha for name, alpha in config.alpha_pattern.items()}
    if not config.exclude_modules and not any("vision_tower" in key for key in weights):
        config.exclude_modules = r".*vision_tower.*"  # its layers have the same names
    return folder, config, weights


def load_adapter(model, folder: Path, config, weights: dict[str, torch.Tensor], trainable: bool = False):
    """Put an adapter, as read_adapter returns it, on the model and return the PeftModel. Stops unless every weight is finite
    and has its layer, and every layer that the configuration names has its weights."""
    from peft import get_peft_model, set_peft_model_state_dict

    config.inference_mode, config.base_model_name_or_path = not trainable, None
    try:
        adapted = get_peft_model(model, config)
        report = set_peft_model_state_dict(adapted, {f"base_model.model.{key}": weights[key] for key in weights})
    except Exception as error:  # weights of another base or rank
        stop(f"--lora_path {folder} does not fit this base: {' '.join(str(error).split())[:300]}")
    faults = [f"the model has no layer for {key}" for key in report.unexpected_keys]
    faults += [f"it lacks {key}" for key in report.missing_keys if "lora_" in key or "modules_to_save" in key]
    faults += [f"{key} is not finite" for key, weight in weights.items() if not weight.isfinite().all()]
    if faults:
        stop(f"--lora_path {folder} cannot be used on this base: {faults[0]}.")
    return adapted.eval()


@torch.no_grad()
def probe_logits(model, processor, adapter: bool = True) -> torch.Tensor:
    """Return the logits of a fixed prompt with a picture, (its last 16 tokens, vocabulary), with the adapter on or off."""
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pixels = processor.image_processor(image, return_tensors="pt").to(model.device, model.dtype)
    ids = torch.tensor([build_prompt(processor, "Is there a cup?", image.size)], device=model.device)
    with nullcontext() if adapter else model.disable_adapter():
        return model.eval()(input_ids=ids, **pixels, logits_to_keep=16).logits[0].float()


@torch.no_grad()
def generate_answers(model, processor, images: list, questions: list[str], max_new_tokens=256, **options) -> list[str]:
    """Answer one question about each picture, all in one batch; greedily unless `options` for generate() say otherwise."""
    tokenizer = processor.tokenizer
    prompts = [build_prompt(processor, question, image.size) for image, question in zip(images, questions, strict=True)]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    pixels = processor.image_processor(images, return_tensors="pt").to(model.device, model.dtype)
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
    output = model.generate(**inputs, **pixels, max_new_tokens=max_new_tokens, **options)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


# ---------------------------------------------------------------------------- from rows to batches

TEXTS = ["question", "chosen", "rejected"]  # the columns that hold text
# LLaVA's data sets mark the picture's place by a first or last line `<image>`, but build_prompt puts the picture in
MARKER = re.compile(r"^\s*<image>\s*\n|\n\s*<image>\s*$")


def read_jsonl(path: Path) -> list[dict]:
    """Return a file's rows up to the first line that is not JSON, such as one cut short. A missing file has no rows."""
    rows = []
    with suppress(FileNotFoundError, ValueError):
        rows.extend(json.loads(line) for line in path.read_text(errors="replace").splitlines())
    return rows


def load_rows(source: str) -> datasets.DatasetDict:
    """Open preference pairs from a hub id, a folder, a .parquet or a .jsonl file. No picture is decoded."""
    kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(Path(source).suffix)
    try:
        rows = datasets.load_dataset(kind, data_files=source) if kind else datasets.load_dataset(source)
        if "train" not in rows:
            stop(f"--dataset {source} has no train split (found: {', '.join(rows)}); name its file train.parquet.")
        found = {name: getattr(feature, "dtype", str(feature)) for name, feature in rows["train"].features.items()}
        for name in ("image", *TEXTS):
            if name not in found or name in TEXTS and found[name] not in ("string", "large_string"):
                what = "plain text" if name in TEXTS else "pictures"
                stop(f"--dataset {source} needs a column {name} of {what} (found: {found}).")
        return rows.cast_column("image", datasets.Image(decode=False))
    except Exception as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        stop(f"--dataset {source} cannot be read: {reason} Give a hub id, or a folder or file of parquet or jsonl.")


def inspect_picture(picture: Path | pa.Buffer) -> tuple[tuple[int, int], bytes]:
    """Return a picture's upright (width, height), and a digest of its file's size and first and last 4 KiB, which tells
    pictures apart. No pixels are decoded, and little is read, so that a set of 13 GB is checked in seconds."""
    with picture.open("rb") if isinstance(picture, Path) else pa.BufferReader(picture) as file:
        head, size = file.read(4096), file.seek(0, os.SEEK_END)
        file.seek(max(size - 4096, 0))
        digest = hashlib.sha256(b"%d" % size + head + file.read()).digest()
    # some formats, such as WebP, only open with all of their bytes, and Pillow's parsers raise almost anything
    for part in [picture] if isinstance(picture, Path) else [picture[: 2**16], picture]:
        with suppress(Exception), Image.open(part if isinstance(part, Path) else io.BytesIO(part)) as image:
            # EXIF orientations 5 to 8 swap width and height; without the first test, getexif would decode a whole PNG
            turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
            return image.size[::-1] if turned else image.size, digest
    raise OSError("not a picture")


def encode_texts(processor, image_size, question: str, chosen: str, rejected: str, max_length: int) -> dict:
    """Return a pair's token ids as lists: the `prompt` about a picture of (width, height), and the `chosen` and the
    `rejected` response, which end with EOS and are cut where prompt and response exceed `max_length`."""
    tokenizer = processor.tokenizer
    ids = {"prompt": build_prompt(processor, question, image_size)}
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        response = tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True).input_ids
        ids[name] = [*response, tokenizer.eos_token_id][: max(max_length - len(ids["prompt"]), 0)]
    return ids


def find_fault(question: str, chosen: str, rejected: str, image_size, processor, max_length: int) -> str | None:
    """Return the reason why a row cannot be trained on, or None. `image_size` is None if the picture does not open."""
    for name, text in zip(TEXTS, (question, chosen, rejected), strict=True):
        if not (text or "").strip():
            return f"{name} is empty"
    if chosen.strip() == rejected.strip():
        return "chosen equals rejected"
    if image_size is None:
        return "image does not open"
    image_tokens = processor._get_num_multimodal_tokens(image_sizes=[image_size[::-1]])["num_image_tokens"][0]
    # a token has at least one byte, so that most rows need not be tokenized
    longest = image_tokens + len(question.encode()) + max(len(chosen.encode()), len(rejected.encode())) + 64
    if longest > max_length:
        ids = encode_texts(processor, image_size, question, chosen, rejected, max_length)
        if not ids["chosen"]:
            return "prompt does not fit --max_length"
        if ids["chosen"] == ids["rejected"]:
            return "chosen equals rejected once cut"
    return None


def iterate_rows(rows: datasets.Dataset, root: Path):
    """Yield each row's number, its (question, chosen, rejected), and its picture: the bytes, or the path below `root`."""
    columns = rows.select_columns([*TEXTS, "image"]).with_format("arrow")
    for start in tqdm(range(0, len(rows), 1000), desc="checking rows", disable=len(rows) < 5000):
        table = columns[start : start + 1000]
        texts = zip(*(table[name].to_pylist() for name in TEXTS), strict=True)
        images = chain.from_iterable(zip(c.field("bytes"), c.field("path"), strict=True) for c in table["image"].chunks)
        for row, (text, (content, path)) in enumerate(zip(texts, images, strict=True), start):
            yield row, text, content.as_buffer() if content.is_valid else root / (path.as_py() or "")


def check_rows(rows: datasets.Dataset, root: Path, processor, max_length: int, limit: int | None) -> tuple[dict, list]:
    """Find rows to train on. Returns the first `limit` good ones as {row: digest of its picture}, and those that were left
    out until then as a list of {split, row, reason}."""
    good, dropped, marked = {}, [], 0
    for row, texts, picture in iterate_rows(rows, root):
        size = None
        with suppress(OSError):
            size, digest = inspect_picture(picture)
        if fault := find_fault(*texts, size, processor, max_length):
            dropped.append({"split": str(rows.split), "row": row, "reason": fault})
            continue
        good[row] = digest
        marked += bool(MARKER.search(texts[0]))
        if len(good) == limit:
            break
    if marked:
        console.print(f"{marked:,} questions have <image> on a line of its own; it marks the picture and is left out")
    return good, dropped


def split_rows(good: dict[int, bytes], eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows, {row: digest of its picture}, into (train, held out). All rows of one picture stay on one side."""
    pictures = sorted(set(good.values()))
    wanted = min(max(round(eval_fraction * len(pictures)), 1), len(pictures) - 1) if eval_fraction else 0
    held_out = {pictures[i] for i in np.random.default_rng(seed).permutation(len(pictures))[: max(wanted, 0)]}
    return [row for row in good if good[row] not in held_out], [row for row in good if good[row] in held_out]


class PreferencePairs(torch.utils.data.Dataset):
    """Pairs as token ids and pixels. They are made in the data loader's workers, when they are asked for."""

    def __init__(self, rows: datasets.Dataset, indices: list[int], root: Path, processor, max_length: int, log: Path):
        self.rows, self.indices, self.root = rows, indices, root
        self.processor, self.max_length, self.log = processor, max_length, log

    def __len__(self) -> int:
        return len(self.indices)

    def map(self, *_, **__) -> "PreferencePairs":
        """Do nothing: ORPOTrainer tokenizes with three calls of `map`, and `encode` has its own way to do that."""
        return self

    def __getitem__(self, index: int) -> dict:
        row = self.read_row(index)
        return self.encode(row["image"], *(row[name] for name in TEXTS))

    def read_row(self, index: int) -> dict:
        """Return a pair's columns, with its picture decoded. If the picture's file breaks off, the pair is noted in the log
        of dropped rows, and the next pair takes its place."""
        for number in self.indices[index:] + self.indices[:index]:
            row = self.rows[number]
            content, path = row["image"]["bytes"], row["image"]["path"]
            try:
                image = load_image(content if content is not None else self.root / path)
                return {**row, "question": MARKER.sub("", row["question"]), "image": image}
            except OSError:
                fault = {"split": str(self.rows.split), "row": number, "reason": "image breaks off when decoded"}
                with self.log.open("a") as file:
                    file.write(json.dumps(fault) + "\n")
        stop(f"no row of the {self.rows.split} pairs can be used; see {self.log}.")

    def encode(self, image: Image.Image, question: str, chosen: str, rejected: str) -> dict:
        """Return encode_texts' ids, `pixel_values` (tiles, 3, H, W), and `image_sizes`, which is (height, width)."""
        pixels = self.processor.image_processor(image, return_tensors="pt")
        ids = encode_texts(self.processor, image.size, question, chosen, rejected, self.max_length)
        return {**ids, "pixel_values": pixels["pixel_values"][0], "image_sizes": pixels["image_sizes"][0]}

    def texts(self) -> list[dict[str, str]]:
        """Return the question, the chosen and the rejected response of every pair."""
        return self.rows.select_columns(TEXTS).select(self.indices).to_list()

    def longest(self) -> dict:
        """Return a pair at least as long as every other: the longest question, chosen and rejected response with a picture
        of the shape that takes most tokens, as far as `max_length` allows."""
        texts = self.texts()
        question, *responses = (max((pair[name] for pair in texts), key=len) for name in TEXTS)
        shapes = [Image.new("RGB", (w, h)) for h, w in self.processor.image_processor.image_grid_pinpoints]
        # where responses are cut, the shorter prompt makes the longer pair
        pairs = [self.encode(image, text, *responses) for image in shapes for text in (question, "")]
        fitting = [pair for pair in pairs if pair["chosen"]] or [self[0]]
        return max(fitting, key=lambda pair: sum(len(pair[name]) for name in ("prompt", "chosen", "rejected")))


def make_pairs(args, rows: datasets.DatasetDict, processor) -> tuple[PreferencePairs, PreferencePairs | None]:
    """Check the rows and return the pairs to train on and those to evaluate. Lists rows left out in dropped_rows.jsonl."""
    root = Path(args.dataset).parent if Path(args.dataset).is_file() else Path(args.dataset)
    log = args.output_dir / "dropped_rows.jsonl"
    good, dropped = check_rows(rows["train"], root, processor, args.max_length, args.max_samples)
    test = next((rows[name] for name in ("test", "validation") if name in rows), None)
    if test:
        held_out, more = check_rows(test, root, processor, args.max_length, None)
        train, held_out, dropped = list(good), list(held_out), dropped + more
    else:
        test = rows["train"]
        train, held_out = split_rows(good, args.eval_fraction, args.seed)
    if MAIN_PROCESS:
        write_whole(log, "".join(json.dumps(row) + "\n" for row in dropped))
    reasons = ", ".join(f"{n} x {reason}" for reason, n in Counter(row["reason"] for row in dropped).most_common())
    if not train:
        stop(f"--dataset {args.dataset} has no usable pair ({reasons or 'it has no rows'}); see {log}.")
    evaluated = sorted(np.random.default_rng(args.seed).permutation(held_out)[: args.eval_samples].tolist())
    counts = f"{len(train):,} pairs to train on, {len(held_out):,} held out, of which {len(evaluated):,} are evaluated"
    console.print(f"{counts}; {len(dropped):,} rows left out {reasons}")
    shared = (root, processor, args.max_length, log)
    eval_pairs = PreferencePairs(test, evaluated, *shared) if evaluated else None
    return PreferencePairs(rows["train"], train, *shared), eval_pairs


def collate_pairs(features: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Batch B pairs. Prompts are padded on the left, so that all responses start in one column.

    Returns prompt_input_ids and prompt_attention_mask (B, P), chosen_labels (B, C) and rejected_labels (B, R) padded
    with -100, pixel_values (B, most tiles, 3, H, W), and image_sizes (B, 2) as (height, width).
    """
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    columns = {name: [torch.as_tensor(feature[name]) for feature in features] for name in features[0]}
    return {
        "prompt_input_ids": pad(columns["prompt"], padding_value=pad_token_id, padding_side="left"),
        "prompt_attention_mask": pad([torch.ones_like(ids) for ids in columns["prompt"]], padding_side="left"),
        "chosen_labels": pad(columns["chosen"], padding_value=-100),
        "rejected_labels": pad(columns["rejected"], padding_value=-100),
        "pixel_values": pad(columns["pixel_values"]),
        "image_sizes": torch.stack(columns["image_sizes"]),
    }


# ---------------------------------------------------------------------------- the loss


def share_prefix(batch: dict, pad_token_id: int, packed: bool, dtype: torch.dtype) -> dict:
    """Lay B pairs out as B rows `prompt | chosen | rejected`, in which neither response can see the other, and return the
    model's inputs.

    The positions of both responses follow the prompt's last. `logits_to_keep` has the columns that predict the responses'
    tokens, the first of which is predicted by the prompt's last. The mask (B, 1, S, S) is added to the attention scores.
    If `packed`, all pairs stand in a single row without padding, and the mask is FlexAttention's, which costs memory and
    time only where something is visible.
    """
    prompt, real_prompt = batch["prompt_input_ids"], batch["prompt_attention_mask"]
    responses = torch.cat([batch["chosen_labels"], batch["rejected_labels"]], dim=1)
    length, n_chosen, n_rejected = prompt.shape[1], batch["chosen_labels"].shape[1], batch["rejected_labels"].shape[1]
    device = prompt.device
    real = torch.cat([real_prompt.bool(), responses != -100], dim=1)
    ids = torch.cat([prompt, responses.masked_fill(responses == -100, pad_token_id)], dim=1)
    steps = torch.cat([torch.arange(n, device=device) for n in (n_chosen, n_rejected)])
    positions = torch.cat([(real_prompt.cumsum(1) - 1).clamp(min=0), real_prompt.sum(1, keepdim=True) + steps], dim=1)
    part = torch.tensor([0] * length + [1] * n_chosen + [2] * n_rejected, device=device).expand_as(ids)
    pair = torch.arange(len(ids), device=device)[:, None].where(real, -1)  # padding sees padding alone
    columns = torch.arange(length - 1, ids.shape[1] - 1, device=device)
    columns[n_chosen] = length - 1  # the rejected response's first token follows the prompt, too
    if packed:
        columns = (real.flatten().cumsum(0) - 1).view_as(real)[:, columns][responses != -100]
        ids, positions, part, pair = (tensor[real][None] for tensor in (ids, positions, part, pair))

    def visible(row, head, query, key):
        shared = (part[row, key] == 0) | (part[row, key] == part[row, query])
        return (query >= key) & (pair[row, query] == pair[row, key]) & shared

    rows, size = ids.shape
    if packed:
        make_mask = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
        mask = make_mask(visible, rows, None, size, size, device)
    else:  # a boolean mask would be made into a new tensor of floats in every layer
        index = torch.arange(max(rows, size), device=device)
        seen = visible(index[:rows, None, None, None], None, index[:size, None], index[:size])
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": columns}


class LlavaORPOTrainer(ORPOTrainer):
    """TRL's ORPOTrainer for pairs with a picture. The odds-ratio loss and the metrics are TRL's; the forward is ours.

    The NLL is the mean over pairs of each chosen response's mean token NLL (Hong et al. 2024, arXiv:2403.07691, Eq. 3
    and 6). TRL's own also covers the prompt, and with it the picture, and weighs a pair by its length, so that the loss
    would depend on how pairs fall into batches, accumulation steps and processes.
    """

    def concatenated_forward(self, model, batch: dict) -> tuple[torch.Tensor, ...]:
        """Return the mean log-probability of each chosen and rejected response's tokens (B), mean logits (B), and NLL."""
        labels = torch.cat([batch["chosen_labels"], batch["rejected_labels"]], dim=1)
        real, n_chosen = labels != -100, batch["chosen_labels"].shape[1]
        inputs = share_prefix(batch, self.padding_value, self.packed, next(model.parameters()).dtype)
        pictures = {name: batch[name] for name in ("pixel_values", "image_sizes")}
        logits = model(**inputs, **pictures, use_cache=False).logits.float()
        targets = labels[real] if self.packed else labels.flatten()
        logps = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")

        def means(values: torch.Tensor) -> list[torch.Tensor]:
            """Average one value per kept token over each chosen (B) and each rejected (B) response."""
            values = values if self.packed else values.view_as(real)[real]
            table = values.new_zeros(real.shape).masked_scatter(real, values)
            parts = slice(n_chosen), slice(n_chosen, None)
            return [table[:, part].sum(1) / real[:, part].sum(1) for part in parts]

        chosen_logps, rejected_logps = means(logps)
        return chosen_logps, rejected_logps, *means(logits.detach().mean(-1).flatten()), -chosen_logps.mean()

    @contextmanager
    def plain_forward(self):
        """Turn FlexAttention off for generate(), and for a forward to compare with."""
        speed_up(self.model, packed=False, autocast=False)
        try:
            yield
        finally:
            speed_up(self.model, self.packed, self.accelerator.native_amp)

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Log TRL's metrics. Stops at the first loss or gradient that is not finite, before it reaches a checkpoint."""
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0)):
                good = last_checkpoint(Path(self.args.output_dir)) or "the base model"
                found = f"{name} is {logs[name]} at step {self.state.global_step}; the last good checkpoint is {good}"
                stop(f"the run has diverged: {found}. Start again with a smaller --learning_rate.")
        super().log(logs, start_time)

    def create_model_card(self, *_, **__) -> None:
        """Do nothing: TRL's card shows a text-only pipeline, and finish_run writes one that fits."""


# ---------------------------------------------------------------------------- before the run


def add_adapter(model, args: argparse.Namespace) -> PeftModel:
    """Put a new LoRA adapter on the model. Stops if a name in --lora_target_modules matches no layer."""
    layers = {name.split(".")[-1] for name, _ in model.model.language_model.named_modules() if name}
    unknown = sorted(set(args.lora_target_modules) - layers)
    if unknown:
        stop(f"--lora_target_modules {' '.join(unknown)}: the language model has no layer of that name.")
    targets = rf".*language_model\..*\.({'|'.join(args.lora_target_modules)})"
    targets += r"|.*multi_modal_projector\.linear_[12]" * args.train_projector
    scale = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    return get_peft_model(model, LoraConfig(**scale, target_modules=targets, task_type="CAUSAL_LM"))


def speed_up(model, packed: bool, autocast: bool) -> None:
    """Use FlexAttention in the language model if `packed`. Keep adapters' inputs from being cast to float32 if `autocast`."""
    model.get_base_model().model.language_model.set_attn_implementation("flex_attention" if packed else "sdpa")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = not autocast  # which would cast them back


def flex_attention_runs(model) -> bool:
    """Return whether FlexAttention compiles for the decoder's heads on its GPU, forward and backward."""
    if model.device.type != "cuda":
        return False
    config = model.config.text_config
    shape = 1, config.num_attention_heads, 256, config.head_dim or config.hidden_size // config.num_attention_heads
    try:
        heads = torch.zeros(shape, device=model.device, dtype=model.lm_head.weight.dtype, requires_grad=True)
        torch.compile(flex_attention)(heads, heads, heads).sum().backward()
    except Exception as error:  # no C compiler, no Triton, too little shared memory: each raises its own
        console.print(f"FlexAttention does not run here ({type(error).__name__}); a slower, dense mask is used")
        return False
    return True


def fit_memory(trainer: LlavaORPOTrainer, batch: dict, checkpointing: str) -> int:
    """Run a batch forward and backward, and recompute as few layers as the memory allows. Returns n if every n-th layer is
    recomputed, or 0 if none is. The gradients are kept, and room is left for AdamW's two moments."""
    model = trainer.model.train()
    size = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    _moments = torch.empty(2 * size, dtype=torch.uint8, device=model.device)

    def run() -> None:  # a function of its own, so that the tensors of a failed try are freed
        with trainer.accelerator.autocast():
            chosen, rejected, _, _, nll = trainer.concatenated_forward(model, batch)
            (nll - trainer.odds_ratio_loss(chosen, rejected)[0].mean()).backward()

    plans = {"off": [0], "on": [1], "auto": [0, 4, 2, 1]}[checkpointing]
    for every in plans:
        if every:
            model.get_base_model().model.language_model.gradient_checkpointing_enable(every_n_layers=every)
        with nullcontext() if every == plans[-1] else suppress(torch.OutOfMemoryError):
            run()
            break
        model.zero_grad()
        torch.cuda.empty_cache()
    return every


def compare_alone(trainer: LlavaORPOTrainer, pairs: list[dict], batch: dict) -> float:
    """Return how far apart a response's log-probabilities are in `batch` and alone, as a mean over the same `pairs`."""
    apart, device = [], trainer.model.device
    scores = trainer.concatenated_forward(trainer.model, batch)[:2]
    for name, shared in zip(("chosen", "rejected"), scores, strict=True):
        for pair, score in zip(pairs, shared, strict=True):
            row = torch.tensor([pair["prompt"] + pair[name]], device=device)
            pictures = {key: pair[key][None].to(device) for key in ("pixel_values", "image_sizes")}
            with trainer.plain_forward():
                logits = trainer.model(input_ids=row, **pictures, logits_to_keep=len(pair[name]) + 1).logits[0, :-1]
            alone = -torch.nn.functional.cross_entropy(logits.float(), row[0, -len(pair[name]) :])
            apart.append((alone - score).abs().item())
    return sum(apart) / len(apart)


def check(name: str, passed: bool, found: str) -> None:
    """Print what preflight found, and stop if it is wrong."""
    console.print(f"preflight: {name}: {found}")
    if not passed:
        stop(f"preflight failed: {name}, but found {found}; nothing was trained.")


def preflight(trainer: LlavaORPOTrainer, pairs: PreferencePairs, checkpointing: str) -> int:
    """Check on real pairs what would go wrong silently, and the memory on the longest batch, and stop if a check fails.
    Sets gradient checkpointing and returns what fit_memory returns."""
    model, few = trainer.model.eval(), [pairs[i] for i in range(min(4, len(pairs)))]
    batch = trainer._prepare_inputs(trainer.data_collator(few))
    with torch.no_grad(), trainer.accelerator.autocast():
        seen = trainer.concatenated_forward(model, batch)[0].mean().item()
        unseen = trainer.concatenated_forward(model, {**batch, "pixel_values": -batch["pixel_values"]})[0].mean().item()
        apart = compare_alone(trainer, few, batch)
    moves = 0 < abs(seen - unseen) < 1e4
    check("another picture moves the chosen log-probability", moves, f"{seen:.4f} -> {unseen:.4f}")
    # bfloat16 moves log-probabilities by up to a few hundredths, a wrong mask, label or position by much more
    check("each response scores as it does alone", apart < 0.05, f"log-probabilities {apart:.1e} apart")
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    fresh = [weight for name, weight in trainable.items() if "lora_B" in name and not weight.any()]
    for weight in fresh:  # a new adapter's lora_B is zero, which would leave lora_A without a gradient
        torch.nn.init.normal_(weight, std=1e-2)
    split = trainer.is_fsdp_enabled  # FSDP splits the weights when training starts; until then, every GPU holds all
    longest = few[:1] if split else [pairs.longest()] * trainer.args.per_device_train_batch_size
    longest = trainer._prepare_inputs(trainer.data_collator(longest))
    recomputed = fit_memory(trainer, longest, "on" if split and checkpointing == "auto" else checkpointing)
    dead = [n for n, w in trainable.items() if w.grad is None or not w.grad.any() or not w.grad.isfinite().all()]
    for weight in fresh:
        torch.nn.init.zeros_(weight)
    model.zero_grad()
    size = f"{sum(weight.numel() for weight in trainable.values()):,} weights in {len(trainable)} tensors"
    size += ", a new adapter" if fresh else ", as --lora_path left them"
    check("every trainable weight gets a gradient", not dead, dead[0] if dead else size)
    tokens = sum(longest[name].shape[1] for name in ("prompt_input_ids", "chosen_labels", "rejected_labels"))
    fits = "not tried, as weights are split later" if split else f"{len(longest['image_sizes'])} x {tokens:,} tokens"
    layers = f"1 layer in {recomputed}" if recomputed else "no layer"
    check("the longest batch fits the memory", True, f"{fits}; {layers} is recomputed")
    return recomputed


# ---------------------------------------------------------------------------- the run and its report

SAMPLES_PAGE = jinja2.Template(
    """<!doctype html><meta charset="utf-8"><title>Samples</title>
<style>body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}img{width:18rem}
section{display:flex;flex-wrap:wrap;gap:1.5rem;border-top:1px solid #ddd;padding:1.5rem 0}table{flex:1}th,td{text-align:left;
vertical-align:top;padding:0 1rem .4rem 0}tr:nth-child(2) th{color:#19742c}tr:nth-child(3) th{color:#a32020}</style>
<h1>Held-out pairs, and what the model answers at each evaluation</h1>
{% for sample in samples %}{% set number = loop.index0 %}<section>
<img src="{{ embed(sample.image) }}" alt="the picture asked about"><table>
<tr><th>Question<td>{{ sample.question }}</tr>
<tr><th>Chosen<td>{{ sample.chosen }}</tr><tr><th>Rejected<td>{{ sample.rejected }}</tr>
{% for evaluation in evaluations %}<tr><th>{{ "Base" if evaluation.step == 0 else "Step %d" % evaluation.step }}
<td>{{ evaluation.answers[number] }}</tr>{% endfor %}</table></section>{% endfor %}""",
    autoescape=True,
)


def embed_picture(image: Image.Image) -> str:
    """Return a picture as a data: URL for an HTML page, shrunk to at most 448 pixels on each side."""
    image, buffer = image.copy(), io.BytesIO()
    image.thumbnail((448, 448))
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class RunRecorder(ProgressCallback):
    """Shows progress, writes metrics.jsonl and, at each evaluation, answers to a few held-out pairs into samples.html."""

    def __init__(self, trainer: LlavaORPOTrainer):
        super().__init__()
        self.trainer, self.output_dir, held_out = trainer, Path(trainer.args.output_dir), trainer.eval_dataset
        self.samples = [held_out.read_row(index) for index in range(min(4, len(held_out or [])))]

    def close(self) -> None:
        """Close the progress bars, so that an error stands on a line of its own."""
        for bar in filter(None, (self.prediction_bar, self.training_bar)):
            bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history.clear()  # metrics.jsonl has it; otherwise it would be written into every checkpoint
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        if "loss" in logs:
            self.training_bar.set_postfix({name: f"{logs[name]:.3f}" for name in ("loss", "rewards/accuracies")})
        with (self.output_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}, allow_nan=False) + "\n")

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        model, processor = self.trainer.model.eval(), self.trainer.processing_class
        images, questions = [row["image"] for row in self.samples], [row["question"] for row in self.samples]
        with self.trainer.plain_forward():  # in every process, since all take part where weights are split among them
            answers = generate_answers(model, processor, images, questions, synced_gpus=args.world_size > 1)
        if not state.is_world_process_zero:
            return
        with (self.output_dir / "samples.jsonl").open("a") as file:
            file.write(json.dumps({"step": state.global_step, "answers": answers}) + "\n")
        evaluations = read_jsonl(self.output_dir / "samples.jsonl")
        page = SAMPLES_PAGE.render(samples=self.samples, evaluations=evaluations, embed=embed_picture)
        write_whole(self.output_dir / "samples.html", page)
        if "wandb" in args.report_to:
            import wandb

            rows = [[wandb.Image(row["image"]), *(row[name] for name in TEXTS)] for row in self.samples]
            rows = [[state.global_step, *row, answer] for row, answer in zip(rows, answers, strict=True)]
            wandb.log({"samples": wandb.Table(["step", "picture", *TEXTS, "answer"], rows)})


def open_tracking(args: argparse.Namespace) -> None:
    """Start the W&B run: online for a user who is logged in and has a network, else offline in the output folder."""
    if args.report_to != "wandb" or not MAIN_PROCESS:
        return
    import wandb

    run = {"project": args.wandb_project, "entity": args.wandb_entity, "name": args.output_dir.name}
    try:
        mode = None if wandb.login(prompt=False, verify=False) else "offline"
        wandb.init(**run, dir=args.output_dir, mode=mode, settings=wandb.Settings(init_timeout=20))
    except wandb.Error as error:
        console.print(f"W&B cannot be reached ({str(error).splitlines()[0]}); the run is recorded offline")
        wandb.init(**run, dir=args.output_dir, mode="offline")


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint whose parts are all there and readable, or None, and name the newer ones that are not."""
    for folder in sorted(output_dir.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        parts = [list(folder.glob(name)) for name in ("optimizer.*", "scheduler.pt", "rng_state*.pth")]
        with suppress(OSError, ValueError, SafetensorError):
            json.loads((folder / "trainer_state.json").read_text())
            with safe_open(folder / "adapter_model.safetensors", "pt"):
                if all(files and all(map(zipfile.is_zipfile, files)) for files in parts):  # torch.save writes zip files
                    return folder
        console.print(f"{folder} is not whole; an older checkpoint is used if there is one")
    return None


def open_run(args: argparse.Namespace) -> tuple[Path | None, FileLock]:
    """Make the output folder ready; return the checkpoint to continue from, and the folder's lock. Stops if another run writes
    there, or if an earlier run is there that is not to be continued or had other settings."""
    output_dir, processes = args.output_dir, int(os.environ.get("WORLD_SIZE", 1))
    lock = FileLock(output_dir / ".lock", timeout=0)
    if not MAIN_PROCESS:
        return last_checkpoint(output_dir), lock
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        stop(f"--output_dir {output_dir} is being written by another run; name another folder.")
    except OSError as error:
        stop(f"--output_dir {output_dir} cannot be written ({error.strerror}); name another folder.")
    checkpoint = last_checkpoint(output_dir)
    noted, metrics = output_dir / "arguments.json", output_dir / "metrics.jsonl"
    if not args.resume and (checkpoint or metrics.exists()):
        stop(f"--output_dir {output_dir} holds an earlier run; add --resume to continue it, or name another folder.")
    may_change = "resume output_dir report_to wandb_project wandb_entity num_workers gradient_checkpointing"
    may_change += " batch_size gradient_accumulation_steps"
    settings = {name: str(value) for name, value in vars(args).items() if name not in may_change.split()}
    settings["pairs_a_step"] = str(args.batch_size * args.gradient_accumulation_steps * processes)
    before = json.loads(noted.read_text()) if checkpoint and noted.exists() else {}
    changed = [f"{key} was {before[key]}, is {now}" for key, now in settings.items() if before.get(key, now) != now]
    if changed:  # pairs_a_step also counts the processes
        stop(f"--resume cannot change the run in {output_dir}: {'; '.join(changed)} (with {processes} processes).")
    step = int(checkpoint.name.split("-")[1]) if checkpoint else -1
    for file in (metrics, output_dir / "samples.jsonl"):
        if file.exists():  # the steps after the checkpoint are done again
            write_whole(file, "".join(json.dumps(row) + "\n" for row in read_jsonl(file) if row["step"] <= step))
    write_whole(noted, json.dumps(settings, indent=2))
    if args.resume:
        console.print(f"continuing from {checkpoint}" if checkpoint else "there is no checkpoint yet, starting anew")
    return checkpoint, lock


def build_trainer(args, model, processor, train_pairs, eval_pairs, resumed: bool) -> LlavaORPOTrainer:
    """Return the trainer. The last few training pairs, which do not fill an optimizer step, are left out, so that every pair
    has the same weight however pairs are batched."""
    on_gpu, processes = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    pairs_a_step = args.batch_size * args.gradient_accumulation_steps * processes
    steps_an_epoch = max(len(train_pairs) // pairs_a_step, 1)
    train_pairs.indices = train_pairs.indices[: steps_an_epoch * pairs_a_step]
    if eval_pairs:  # every process gets the same number
        eval_pairs.indices = eval_pairs.indices[: max(len(eval_pairs) // processes, 1) * processes]
    same = "output_dir learning_rate gradient_accumulation_steps beta max_length seed save_steps report_to".split()
    config = ORPOConfig(
        **{name: getattr(args, name) for name in same},
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=1,  # TRL averages over batches, so pairs weigh the same only if each is a batch
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_ratio,
        padding_value=processor.tokenizer.pad_token_id,
        disable_dropout=False,  # the only dropout is LoRA's, which was asked for
        gradient_checkpointing=False,  # preflight turns it on, where TRL would do so in every layer
        ddp_find_unused_parameters=False,  # preflight makes sure that each gets a gradient
        bf16=on_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        use_cpu=not on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # otherwise a loss that is not finite is shown as 0
        # once an epoch, but counted in steps, so that the evaluation comes before the same step's checkpoint
        eval_strategy="no" if eval_pairs is None else "steps",
        eval_steps=steps_an_epoch,
        eval_on_start=eval_pairs is not None and not resumed,  # trainer.evaluate() before train() would undo DDP
        save_total_limit=2,
        enable_jit_checkpoint=True,  # on SIGTERM, with which Slurm and Kubernetes end a job
        dataloader_num_workers=args.num_workers,
        remove_unused_columns=False,
    )
    if not on_gpu:  # with several processes it would be cpu:0, to which torch.load does not move the optimizer's state
        config.__dict__["_setup_devices"] = torch.device("cpu")
    config._n_gpu = 1  # several GPUs need a launcher, since nn.DataParallel would cut logits_to_keep apart
    collate = partial(collate_pairs, pad_token_id=processor.tokenizer.pad_token_id)
    trainer = LlavaORPOTrainer(model, config, collate, train_pairs, eval_pairs, processing_class=processor)
    trainer.use_dpo_data_collator = True  # otherwise TRL warns about ours in every evaluation step
    trainer.packed = flex_attention_runs(model)
    speed_up(model, trainer.packed, trainer.accelerator.native_amp)
    trainer.remove_callback(ProgressCallback)
    trainer.recorder = RunRecorder(trainer)
    trainer.add_callback(trainer.recorder)
    return trainer


def draw_curves(metrics: list[dict], path: Path) -> None:
    """Draw the run's figures against the optimizer step: training as a line, held-out evaluations as dots."""
    panels = {"Log-probability per token": ["logps/chosen", "logps/rejected"]}
    panels |= {"Log-odds, chosen over rejected": ["log_odds_chosen"], "Preference accuracy": ["rewards/accuracies"]}
    panels |= {"ORPO loss": ["loss"], "NLL of the chosen response": ["nll_loss"], "Reward margin": ["rewards/margins"]}
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(2, 3, sharex=True).flat, panels.items(), strict=True):
        for key, colour in zip(keys, ("#1b7837", "#b2182b"), strict=False):
            for prefix, style, label in (("", "-", "training"), ("eval_", "o", "held out")):
                label += f", {key.split('/')[-1]}" if len(keys) > 1 else ""
                points = [(row["step"], row[prefix + key]) for row in metrics if prefix + key in row]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=colour, lw=0.7, ms=5, label=label)
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    figure.supxlabel("optimizer step")
    figure.savefig(path, dpi=110)


def finish_run(args: argparse.Namespace, trainer: LlavaORPOTrainer, recomputed: int, seconds: float) -> None:
    """Evaluate once more if the run ended within an epoch, save the adapter, and report what the run changed."""
    if trainer.eval_dataset and trainer.state.global_step % trainer.args.eval_steps:
        trainer.evaluate()
    trainer.save_model()  # in every process, since each has a part where weights are split among them
    if MAIN_PROCESS:
        # safetensors makes a file that only its owner can read
        (args.output_dir / "adapter_model.safetensors").chmod((args.output_dir / "arguments.json").stat().st_mode)
        write_report(args, trainer, recomputed, seconds)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def write_report(args: argparse.Namespace, trainer: LlavaORPOTrainer, recomputed: int, seconds: float) -> None:
    """Write training_summary.json, the card and the curves, and print what the run changed."""
    output_dir, on_gpu = args.output_dir, torch.cuda.is_available()
    metrics = read_jsonl(output_dir / "metrics.jsonl")
    evaluations = [row for row in metrics if "eval_loss" in row] or [{}]
    # a picture that breaks off is noted every time it is met
    dropped = {(row["split"], row["row"]): row["reason"] for row in read_jsonl(output_dir / "dropped_rows.jsonl")}
    train, held_out = trainer.train_dataset.texts(), trainer.eval_dataset.texts() if trainer.eval_dataset else []
    shorter = sum(len(pair["chosen"].split()) < len(pair["rejected"].split()) for pair in held_out)
    data = {"train_pairs": len(train), "eval_pairs": len(held_out), "dropped": Counter(dropped.values())}
    data["fingerprint"] = hashlib.sha256("".join(map(json.dumps, train)).encode()).hexdigest()
    data["shorter_is_chosen"] = shorter / max(len(held_out), 1)  # what a mere preference for short answers gets right
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
    host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary = {
        "arguments": {k: v if isinstance(v, int | float | list) else str(v) for k, v in vars(args).items()},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores",
        "data": data,
        "steps": trainer.state.global_step,
        "packed": trainer.packed,
        "recomputed_every": recomputed,
        "processes": trainer.accelerator.num_processes,
        "seconds": seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else host_peak,
        "before": evaluations[0],
        "after": evaluations[-1],
    }
    write_whole(output_dir / "training_summary.json", json.dumps(summary, indent=2, allow_nan=False))
    write_card(args, summary)
    draw_curves(metrics, output_dir / "training_curves.png")
    console.print(f"adapter, card, curves and summary are in {output_dir}")


def write_card(args: argparse.Namespace, summary: dict) -> None:
    """Write the adapter's README.md: its base, its data, and what it changed. Prints the table of what changed."""
    data, before, after = summary["data"], summary["before"], summary["after"]
    names = {"preference accuracy": "rewards/accuracies", "reward margin": "rewards/margins", "NLL": "nll_loss"}
    names |= {"log-odds": "log_odds_chosen", "loss": "loss"}
    table = f"| {data['eval_pairs']:,} held-out pairs | before | after |\n|---|---|---|\n" if before else ""
    if before:
        for name, key in names.items():
            table += f"| {name} | {before[f'eval_{key}']:.4f} | {after[f'eval_{key}']:.4f} |\n"
        table += f"\nIn {data['shorter_is_chosen']:.1%} of these pairs, the chosen response has fewer words.\n"
        console.print(Markdown(table))
    start = f" It started from the adapter `{args.lora_path}`." if args.lora_path else ""
    text = f"""---
base_model: {args.model_path}
library_name: peft
tags: [orpo, lora, llava-next]
---

# {args.output_dir.name}

A LoRA adapter for `{args.model_path}`, trained with ORPO ([Hong et al. 2024](https://arxiv.org/abs/2403.07691)) on
{data["train_pairs"]:,} preference pairs of `{args.dataset}`, so that the model names fewer things that are not in the
picture.{start} Load it with `PeftModel.from_pretrained(model, path)`.

{table}"""
    write_whole(args.output_dir / "README.md", text)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = load_rows(args.dataset)  # this and a wrong adapter show before the model is loaded
    adapter = read_adapter(args.lora_path) if args.lora_path else None
    checkpoint, lock = open_run(args)
    if checkpoint and (args.output_dir / "training_summary.json").exists():
        console.print(f"the run in {args.output_dir} is finished; there is nothing to resume")
        return
    open_tracking(args)
    set_seed(args.seed)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model, processor = load_llava(args.model_path, device=device, load_4bit=args.load_4bit)
    train_pairs, eval_pairs = make_pairs(args, rows, processor)
    model = load_adapter(model, *adapter, trainable=True) if adapter else add_adapter(model, args)
    trainer = build_trainer(args, model, processor, train_pairs, eval_pairs, resumed=checkpoint is not None)
    recomputed = preflight(trainer, train_pairs, args.gradient_checkpointing)
    set_seed(args.seed)  # so that order and dropout do not depend on what preflight had to try
    with closing(trainer.recorder):
        seconds = trainer.train(str(checkpoint) if checkpoint else None).metrics["train_runtime"]
    if trainer.state.global_step < trainer.state.max_steps:
        stop("the run was told to end (SIGTERM); the same command with --resume continues it.", code=143)
    finish_run(args, trainer, recomputed, seconds)
    lock.release()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; the same command with --resume continues from the last checkpoint.", code=130)
    except torch.OutOfMemoryError:
        stop("the GPU's memory is full; use a smaller --batch_size with more accumulation steps, or --load_4bit.")
    except (RuntimeError, ConnectionError, EOFError) as error:
        # torch notices that a worker is gone, or reading from the worker breaks off before that
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        print(file=sys.stderr)  # torch may notice it while the progress bar is being closed, before its line has ended
        advice = "use fewer --num_workers, or more shared memory (docker's --shm-size), and --resume"
        stop(f"a process that decodes pictures was killed for lack of memory; {advice}.")
