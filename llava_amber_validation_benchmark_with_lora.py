"""Answer AMBER's or POPE's questions with LLaVA-1.6, with or without an adapter, and score them as the official scripts do.

Reads   a LLaVA-NeXT checkpoint (--model_path), an adapter (--lora_path), the benchmark's questions and pictures, and for
        AMBER its annotations.
Writes  the answers (--output_file, in AMBER's format) and beside them the journal to resume from, scores.json, scores.png
        and, for captions, gallery.html.
Needs   pip install -r requirements/train.txt -r requirements/eval.txt
        python -m spacy download en_core_web_lg
        python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet

    python llava_amber_validation_benchmark_with_lora.py --lora_path checkpoints/llava-orpo-prod --compare_base \\
        --query_file AMBER/data/query/query_all.json --image_dir AMBER/image --output_file amber/results.json
    python llava_amber_validation_benchmark_with_lora.py --lora_path checkpoints/llava-orpo-prod --compare_base \\
        --query_file coco_pope_popular.json --image_dir val2014 --output_file pope_popular/results.json
    python llava_amber_validation_benchmark_with_lora.py --test_mode --nouns vocabulary --output_file outputs/amber/results.json
"""

import argparse
import os
import sys
from pathlib import Path

# Copied from llava_orpo_training.MINIATURE
MINIATURE = Path(__file__).resolve().parent / "miniature"

# --evaluation_type -> the sections that the official script prints for it
SECTIONS = {
    "g": ["generative"],
    "de": ["existence"],
    "da": ["attribute", "state", "number", "action"],
    "dr": ["relation"],
}
SECTIONS["d"] = ["discriminative", *SECTIONS["de"], *SECTIONS["da"], *SECTIONS["dr"]]
SECTIONS["a"] = [*SECTIONS["g"], *SECTIONS["d"]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...] (--help lists the flags)",
    )

    def add(group, flag, help, **options):
        shown = options.get("default")
        group.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    def count(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return int(text)

    model = parser.add_argument_group("model")
    add(model, "--model_path", "base model: hub id or folder", default="llava-hf/llava-v1.6-mistral-7b-hf")
    add(model, "--lora_path", "adapter: hub id or folder")
    add(model, "--compare_base", "answer with the adapter off too, and compare", action="store_true")
    add(model, "--device", "auto (cuda, mps or cpu), all (layers spread over the GPUs), or a name", default="auto")
    bits = model.add_mutually_exclusive_group()
    add(bits, "--load_4bit", "base weights in NF4 with double quantization", action="store_true")
    add(bits, "--load_8bit", "base weights in 8 bits (LLM.int8)", action="store_true")
    add(model, "--backend", "vllm takes merged checkpoints", default="transformers", choices=["transformers", "vllm"])
    add(model, "--batch_size", "pictures answered together, with all questions (default: 8; vllm: 64)", type=count)
    add(model, "--max_new_tokens", "tokens an answer may have", type=count, default=1024)
    add(model, "--verify", "candidates for a caption, of which the best confirmed is kept", type=count, default=1)
    add(model, "--clip_model", "CLIP checkpoint to check with instead of the model: hub id or folder")
    add(model, "--test_mode", "use the embedded miniature as model and benchmark, if not given", action="store_true")

    data = parser.add_argument_group("benchmark")
    add(data, "--query_file", "AMBER's queries (data/query/query_all.json), or a file of POPE or RePOPE", type=Path)
    add(data, "--image_dir", "folder of the pictures", type=Path)
    add(data, "--output_file", "file for the answers", type=Path, default=Path("results.json"))
    files = {"annotation": "annotations.json", "relation": "relation.json", "safe_words": "safe_words.txt"}
    for flag, name in files.items():
        add(data, f"--{flag}_file", f"AMBER's {name} (default: beside the query file, or one folder up)", type=Path)
    kinds = "a all, g generative, d discriminative: de existence, da attribute, dr relation"
    add(data, "--evaluation_type", kinds, default="a", choices=list(SECTIONS))
    add(data, "--limit", "only the first N pictures, with all their questions", type=count)
    add(data, "--skip_inference", "score the answers in --output_file", action="store_true")
    add(data, "--skip_evaluation", "only answer", action="store_true")

    scoring = parser.add_argument_group("scoring")
    add(scoring, "--baseline_file", "answers of an earlier run to compare with", type=Path)
    add(scoring, "--spacy_model", "word vectors that decide which words are alike", default="en_core_web_lg")
    add(scoring, "--similarity_table", "read this table of alike words, or write it if there is none", type=Path)
    nouns = "how nouns are found: in AMBER's way, or without NLTK's data by looking up its words, which is not official"
    add(scoring, "--nouns", nouns, default="nltk", choices=["nltk", "vocabulary"])
    args = parser.parse_args(argv)
    if args.test_mode:
        if args.model_path == parser.get_default("model_path"):
            args.model_path = str(MINIATURE / "model")
        if not (args.query_file or args.annotation_file):
            args.query_file = MINIATURE / "amber" / "query" / "query_all.json"
            if args.spacy_model == parser.get_default("spacy_model"):
                args.similarity_table = args.similarity_table or MINIATURE / "amber" / "similarity.json"
        args.image_dir = args.image_dir or MINIATURE / "amber" / "image"
    for wrong, message in find_wrong_flags(args):
        if wrong:
            parser.error(message)
    args.batch_size = args.batch_size or (64 if args.backend == "vllm" else 8)
    return args


def find_wrong_flags(args: argparse.Namespace):
    """Yield pairs of a test that flags must not pass together, and what to say if they do."""
    answering, vllm, out = not args.skip_inference, args.backend == "vllm", args.output_file
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    yield processes == 1 and rank != "0", f"RANK is {rank} without WORLD_SIZE; unset it, or use torchrun"
    yield answering and not (args.query_file and args.image_dir), "--query_file and --image_dir are needed to answer"
    yield not (args.query_file or args.annotation_file), "--query_file or --annotation_file is needed to score"
    yield answering and args.image_dir and not args.image_dir.is_dir(), f"--image_dir {args.image_dir} is no folder"
    yield out.is_dir(), f"--output_file {out} is a folder; name a file in it"
    yield out.name == "scores.json", "scores.json is where the scores go; give the answers another name"
    yield answering and args.compare_base and not args.lora_path, "--compare_base needs --lora_path"
    yield args.compare_base and args.baseline_file, "--compare_base and --baseline_file exclude each other; give one"
    partly = args.limit or args.skip_evaluation
    yield not answering and partly, "--skip_inference scores a whole file; leave --limit and --skip_evaluation out"
    yield args.clip_model and args.verify == 1, "--clip_model is what --verify checks with; give --verify 4 too"
    yield vllm and args.lora_path, "--backend vllm takes no --lora_path; merge the adapter with llava_quantize_vllm.py"
    own = args.verify > 1 or args.load_4bit or args.load_8bit
    yield (
        vllm and own,
        "--verify, --load_4bit and --load_8bit need --backend transformers; vllm takes quantized checkpoints",
    )
    yield vllm and processes > 1, "--backend vllm starts its own processes; run it without torchrun"


if __name__ == "__main__":
    parse_args()  # answers --help and refuses wrong flags before the heavy imports

import base64
import glob
import hashlib
import importlib.metadata
import inspect
import io
import json
import logging
import random
import re
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import NoReturn

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import jinja2
import matplotlib
import numpy as np
import torch
from filelock import FileLock, Timeout
from peft import LoraConfig
from PIL import Image, ImageOps
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Copied from llava_orpo_training.MAIN_PROCESS
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of several processes, the one that prints and writes
# Copied from llava_orpo_training.console
console = Console(stderr=True, quiet=not MAIN_PROCESS)


# ---------------------------------------------------------------------------- blocks copied from earlier scripts


# Copied from llava_orpo_training.stop
def stop(message: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# Copied from llava_orpo_training.write_whole
def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


# Copied from llava_orpo_training.ORIGINAL_KEYS
ORIGINAL_KEYS = {
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}


# Copied from llava_orpo_training.read_original
def read_original(model_path: str, original: dict) -> tuple:
    """Return (config, processor, vision tower's name) for a checkpoint in LLaVA's own format, whose config.json is `original`.

    The tokenizer gets `<image>` and `<pad>` as its next two tokens, as in the hub's converted checkpoints.
    """
    from transformers import AutoConfig, LlamaTokenizer, LlavaNextConfig, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    expected = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "vocab_size": 32000}
    for name, value in expected.items():
        if original.get(name) != value:
            stop(f"--model_path {model_path} has {name} {original.get(name)!r}; LLaVA-1.6 has {value!r}.")
    tower = original["mm_vision_tower"]
    vision = LlavaNextConfig().vision_config
    if tower != "openai/clip-vit-large-patch14-336":  # this one, which all published checkpoints name, is the default
        vision = AutoConfig.from_pretrained(tower, trust_remote_code=False)
        vision = getattr(vision, "vision_config", vision)
    llava = ("mm_", "image_", "tokenizer_", "unfreeze_", "tune_", "use_mm_", "freeze_", "architectures", "auto_map")
    text = {name: value for name, value in original.items() if not name.startswith(llava)}
    text["model_type"] = "mistral" if original["model_type"] == "llava_mistral" else "llama"
    grid = original["image_grid_pinpoints"]  # (width, height) pairs, which some checkpoints write as text
    grid = [[height, width] for width, height in (json.loads(grid) if isinstance(grid, str) else grid)]
    tokenizer = LlamaTokenizer.from_pretrained(model_path, add_bos_token=True, legacy=True, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if len(tokenizer) != 32002:
        stop(f"--model_path {model_path} has a tokenizer of {len(tokenizer) - 2:,} tokens; LLaVA-1.6 has 32,000.")
    config = LlavaNextConfig(vision_config=vision.to_dict(), text_config=text, image_grid_pinpoints=grid)
    config.vision_feature_layer = original["mm_vision_select_layer"]
    side = vision.image_size
    images = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=side, image_grid_pinpoints=grid)
    before, after = ("[INST] ", " [/INST]") if text["model_type"] == "mistral" else ("USER: ", " ASSISTANT:")
    template = before + "<image>\n{{ messages[0]['content'][-1]['text'] }}" + after
    processor = LlavaNextProcessor(images, tokenizer, vision.patch_size, "default", template)
    processor.num_additional_image_tokens = 1
    return config, processor, tower


# Copied from llava_orpo_training.read_checkpoint
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


# Copied from llava_orpo_training.load_llava
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
    dtype = torch.float32
    if device != "cpu":
        has_bf16 = device == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bf16 else torch.float16
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
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        found = f"missing: {', '.join(missing[:3]) or 'none'}; unexpected: {', '.join(unexpected[:3]) or 'none'}"
        stop(f"--model_path {model_path}: the weights do not fit config.json ({found}).")
    if hasattr(model, "ct_decompress_hook"):  # compressed-tensors would wait for a forward of the whole model
        model.hf_quantizer.compressor.decompress_model(model)
    if load_4bit and device == "cpu":
        # bitsandbytes would repack the weights at a forward in eval mode, and then silently compute no gradients
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if adapter:
        model = load_adapter(model, processor, *adapter)
    return allow_cache_position(model.eval()), processor


# Copied from llava_orpo_training.complete_original
def complete_original(model, tower: str, missing: set[str]) -> None:
    """Add what a checkpoint in LLaVA's own format lacks: 64 rows of vocabulary, as in the hub's converted checkpoints, and
    the vision weights from the tower's own checkpoint, if all are `missing`."""
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
        # a new row is the mean of the others, so that its logit is their mean and never the greatest
        weight.data[-64:] = weight.data[:-64].float().mean(0).to(weight.dtype)


# Copied from llava_orpo_training.allow_cache_position
def allow_cache_position(model):
    """Let callers pass `cache_position`, as transformers 4.38 to 4.57 do, to a model whose forward does not know it."""
    forward = model.forward
    parameters = inspect.signature(forward).parameters.values()
    if not any(p.name == "cache_position" or p.kind is p.VAR_KEYWORD for p in parameters):
        model.forward = wraps(forward)(lambda *args, cache_position=None, **kwargs: forward(*args, **kwargs))
    return model


# Copied from llava_orpo_training.ADAPTER_KEYS
ADAPTER_KEYS = {
    r"^(base_model\.model\.)+": "",
    **ORIGINAL_KEYS,
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^(vision_tower|multi_modal_projector|language_model)\.": r"model.\1.",
    r"^model\.vision_tower\.vision_model\.": "model.vision_tower.",
}


# Copied from llava_orpo_training.rename_key
def rename_key(key: str) -> str:
    """Return today's name for a layer or weight of an adapter."""
    for pattern, replacement in ADAPTER_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


# Copied from llava_orpo_training.read_adapter
def read_adapter(lora_path: str) -> tuple[Path, "LoraConfig"]:
    """Return a LoRA adapter's folder, which is fetched first if `lora_path` is a hub id, and its configuration."""
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
        stop(f"--lora_path {lora_path} has more weights in non_lora_trainables.bin; merge it with LLaVA's own code.")
    if not (folder / "adapter_model.safetensors").exists():
        stop(f"--lora_path {lora_path} has no adapter_model.safetensors; convert its adapter_model.bin, if it has one.")
    config.rank_pattern = {rename_key(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {rename_key(name): alpha for name, alpha in config.alpha_pattern.items()}
    return folder, config


# Copied from llava_orpo_training.load_adapter
def load_adapter(model, processor, folder: Path, config, trainable: bool = False):
    """Put a LoRA adapter on the model and return the PeftModel.

    Stops unless every weight is finite and has its layer, every layer that the configuration names has its weights, and the
    adapter moves the logits of a prompt with a picture.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    try:
        saved = load_file(folder / "adapter_model.safetensors")
        weights = {f"base_model.model.{rename_key(key)}": weight for key, weight in saved.items()}
        if not config.exclude_modules and not any("vision_tower" in key for key in weights):
            config.exclude_modules = r".*vision_tower.*"  # its layers have the same names
        config.inference_mode, config.base_model_name_or_path = not trainable, None
        adapted = get_peft_model(model, config)
        report = set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # weights of another base or rank, a broken file
        stop(f"--lora_path {folder} does not fit this base: {' '.join(str(error).split())[:300]}")
    faults = [f"the model has no layer for {key}" for key in report.unexpected_keys]
    faults += [f"it lacks {key}" for key in report.missing_keys if "lora_" in key or "modules_to_save" in key]
    faults += [f"{key} is not finite" for key, weight in weights.items() if not weight.isfinite().all()]
    if not faults and torch.equal(probe_logits(adapted, processor), probe_logits(adapted, processor, adapter=False)):
        faults = ["the logits of a prompt are the same with it and without it"]
    if faults:
        stop(f"--lora_path {folder} cannot be used on this base: {faults[0]}.")
    return adapted.eval()


# Copied from llava_orpo_training.probe_logits
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


# Copied from llava_orpo_training.embed_picture
def embed_picture(image: Image.Image) -> str:
    """Return a picture as a data: URL for an HTML page, shrunk to at most 448 pixels on each side."""
    image, buffer = image.copy(), io.BytesIO()
    image.thumbnail((448, 448))
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------------- answers


@dataclass
class Branch:
    """A question that is being answered, and the tokens of its answer so far."""

    picture: int
    question: int  # its number among the picture's questions, from 1 on
    length: int  # of its prompt
    dice: random.Random
    tokens: list[int] = field(default_factory=list)


class Batch:
    """Questions about pictures on their way through the model, which sees each picture once.

    A picture and its questions are one row, `picture | question 1 | question 2 | …`, in which every question sees the
    picture, but no other question: what they share has the owner 0, and each question its number. Positions are counted as
    if each question stood alone. `logits` are those of each branch's next token, (branches, vocabulary), and `owners` those
    of all tokens so far, (rows, length). `pixels` is the image processor's output for the `images`.
    """

    def __init__(self, model, processor, images: list, pixels, questions: list[list[str]]):
        self.core = core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.cache, self.owners, self.branches, rows = None, None, [], {}
        self.pictures = [picture for picture, asked in enumerate(questions) if asked]
        for picture in self.pictures:
            row, seed = [], zlib.crc32(images[picture].tobytes())
            for number, question in enumerate(questions[picture]):
                prompt = build_prompt(processor, question, images[picture].size)
                shared = len(prompt) - prompt[::-1].index(processor.image_token_id)
                row = row or [(prompt[place], 0, place) for place in range(shared)]
                row += [(prompt[place], number + 1, place) for place in range(shared, len(prompt))]
                dice = random.Random(f"{seed} {number} {question}")
                self.branches.append(Branch(picture, number + 1, len(prompt), dice))
            rows[picture] = row
        shown = pixels["pixel_values"][self.pictures].to(core.device, core.dtype)
        self.run(rows, pixel_values=shown, image_sizes=pixels["image_sizes"][self.pictures].to(core.device))

    def run(self, rows: dict[int, list[tuple[int, int, int]]], **inputs) -> None:
        """Put each picture's row of (token, owner, position) through the model, after what the cache holds of it."""
        padded = pad_sequence([torch.tensor(row) for row in rows.values()], batch_first=True, padding_value=-1)
        ids, new, places = padded.to(self.core.device).unbind(-1)
        self.owners = new if self.owners is None else torch.cat([self.owners, new], dim=1)
        seen = (self.owners[:, None, :] == 0) | (self.owners[:, None, :] == new[:, :, None])
        seen = seen.tril(seen.shape[2] - seen.shape[1])[:, None]
        inputs |= {"past_key_values": self.cache, "use_cache": True}
        output = self.core.model(ids.clamp(0), attention_mask=seen, position_ids=places.clamp(0), **inputs)
        self.cache = output.past_key_values
        last = {(i, token[1]): (n, k) for n, (i, row) in enumerate(rows.items()) for k, token in enumerate(row)}
        index = torch.tensor([last[branch.picture, branch.question] for branch in self.branches]).unbind(1)
        self.logits = self.core.lm_head(output.last_hidden_state[index])

    def add_tokens(self) -> None:
        """Put the last token of every branch through the model. Pictures without branches leave the batch."""
        rows = defaultdict(list)
        for branch in self.branches:
            place = branch.length + len(branch.tokens) - 1
            rows[branch.picture].append((branch.tokens[-1], branch.question, place))
        if len(rows) < len(self.pictures):
            kept = torch.tensor([self.pictures.index(picture) for picture in rows], device=self.core.device)
            self.cache.batch_select_indices(kept)
            self.owners, self.pictures = self.owners[kept], list(rows)
        self.run(rows)


def pick_tokens(logits: torch.Tensor, branches: list[Branch], temperature: float) -> list[int]:
    """Return the next token of each branch from its row of `logits`: the likeliest at temperature 0, else one drawn with the
    branch's own dice, so that it does not depend on the others."""
    if not temperature:
        return logits.argmax(-1).tolist()
    chances, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
    reach = chances.cumsum(-1)
    throws = torch.tensor([[branch.dice.random()] for branch in branches], device=logits.device)
    places = torch.searchsorted(reach, throws * reach[:, -1:]).clamp(max=reach.shape[-1] - 1)
    return order.gather(-1, places)[:, 0].tolist()


@torch.inference_mode()
def answer_questions(
    model, processor, images: list, pixels, questions: list[list[str]], max_new_tokens: int, temperature: float = 0
) -> Iterator:
    """Answer every question about every picture; yields (picture, question, answer, complete) as each one ends.

    Temperature 0 is greedy; above it, an answer depends only on its picture, its question, and its place among the picture's
    questions. `complete` is False for an answer cut off at `max_new_tokens`.
    """
    if not any(questions):
        return
    batch = Batch(model, processor, images, pixels, questions)
    ends = np.ravel(batch.core.generation_config.eos_token_id).tolist()
    while batch.branches:
        unfinished = []
        for branch, token in zip(batch.branches, pick_tokens(batch.logits, batch.branches, temperature), strict=True):
            branch.tokens.append(token)
            if token in ends or len(branch.tokens) == max_new_tokens:
                text = processor.tokenizer.decode(branch.tokens, skip_special_tokens=True).strip()
                yield branch.picture, branch.question - 1, text, token in ends
            else:
                unfinished.append(branch)
        batch.branches = unfinished
        if unfinished:
            batch.add_tokens()


def start_vllm(model_path: str, processor, max_new_tokens: int) -> Callable:
    """Start vLLM on a merged or quantized checkpoint; return a function that answers as answer_questions does.

    The questions of a picture follow one another, so that prefix caching computes the picture once. Prompts are token ids
    with BOS, in which vLLM puts the picture's tokens in place of the one `<image>`.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        stop(f"--backend vllm needs requirements/vllm.txt, installed into an environment of its own ({error}).")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's own choice is half of the memory
    quick = {} if torch.cuda.is_available() else {"enforce_eager": True, "skip_mm_profiling": True}  # to start quickly
    engine = LLM(model=model_path, enable_prefix_caching=True, limit_mm_per_prompt={"image": 1}, **quick)
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)

    def answer(images: list, pixels, questions: list[list[str]]) -> Iterator:
        places = [(i, j) for i, asked in enumerate(questions) for j in range(len(asked))]
        prompts = []
        for i, j in places:
            ids = build_prompt(processor, questions[i][j], images[i].size)
            first = ids.index(processor.image_token_id)
            ids = ids[: first + 1] + [token for token in ids[first:] if token != processor.image_token_id]
            prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": images[i]}})
        for place, output in zip(places, engine.generate(prompts, greedy, use_tqdm=False), strict=True):
            yield *place, output.outputs[0].text.strip(), output.outputs[0].finish_reason == "stop"

    return answer


# ---------------------------------------------------------------------------- checked answers (--verify)

VERIFY_TEMPERATURE = 0.7  # at which --verify draws candidates beside the greedy answer


class Clip:
    """A CLIP checkpoint in safetensors, which says how well texts fit a picture."""

    def __init__(self, model_path: str, device):
        from transformers import AutoConfig, AutoProcessor, CLIPModel

        try:
            kind = AutoConfig.from_pretrained(model_path, trust_remote_code=False).model_type
            if kind != "clip":
                stop(f"--clip_model {model_path} has the model type {kind}, not clip.")
            self.processor = AutoProcessor.from_pretrained(model_path, backend="pil", trust_remote_code=False)
            self.model = CLIPModel.from_pretrained(model_path, use_safetensors=True).to(device).eval()
        except Exception as error:
            stop(f"--clip_model {model_path} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}).")

    @torch.inference_mode()
    def compare(self, image: Image.Image, texts: list[str]) -> list[float]:
        """Return the cosine similarity of the picture and each text, of which CLIP reads the first 77 tokens."""
        inputs = self.processor(images=image, text=texts, return_tensors="pt", padding=True, truncation=True)
        output = self.model(**inputs.to(self.model.device))
        return (output.text_embeds @ output.image_embeds[0]).tolist()  # both have length 1


def draw_candidates(model, processor, images, pixels, questions, count: int, max_new_tokens: int, temperature) -> dict:
    """Draw `count` answers to every question about every picture; return {(picture, question): [[answer, complete], …]}."""
    drawn = defaultdict(list)
    asked = [[question for question in part for _ in range(count)] for part in questions]
    answers = answer_questions(model, processor, images, pixels, asked, max_new_tokens, temperature)
    for picture, place, *answer in answers:
        drawn[picture, place // count].append(answer)
    return drawn


@torch.inference_mode()
def confirm_objects(model, processor, images: list, pixels, words: list[list[str]]) -> list[dict[str, float]]:
    """Return, for each picture, {word: probability} of the model's own answer Yes to "Is there a … in this image?".

    It is that of Yes among Yes and No in any spelling that is one token. All words about a picture take one forward pass.
    """
    found: list[dict] = [{} for _ in words]
    if not any(words):
        return found
    spelled: dict[str, list[int]] = {"yes": [], "no": []}
    for token, number in processor.tokenizer.get_vocab().items():
        spelled.get(token.strip("▁ ").lower(), []).append(number)
    questions = [
        [f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word} in this image?" for word in part] for part in words
    ]
    batch = Batch(model, processor, images, pixels, questions)
    chances = batch.logits.float().softmax(-1)
    yes, no = (chances[:, spelled[answer]].sum(-1) for answer in ("yes", "no"))
    for branch, share in zip(batch.branches, (yes / (yes + no).clamp(min=1e-30)).tolist(), strict=True):
        found[branch.picture][words[branch.picture][branch.question - 1]] = share
    return found


def choose_candidate(objects: list[list[str]], confirmed: dict[str, float], fits: list[float] | None = None) -> int:
    """Return the number of the candidate that its check confirms best: the one that CLIP finds to fit the picture best, or
    the one whose `objects` have the fewest doubtful and then the most confirmed ones; the first of equals."""
    if fits:
        return int(np.argmax(fits))
    doubtful = [sum(confirmed[word] <= 0.5 for word in set(named)) for named in objects]
    return min(range(len(objects)), key=lambda number: (doubtful[number], doubtful[number] - len(set(objects[number]))))


def verify_answers(model, processor, images, pixels, questions, max_new_tokens, *, candidates, find, clip) -> Iterator:
    """Answer as answer_questions does, but in place of a greedy answer that names objects give the best of `candidates`:
    itself and others drawn at VERIFY_TEMPERATURE, checked by `clip` or by the model's own yes/no answers."""
    texts = {}
    greedy = answer_questions(model, processor, images, pixels, questions, max_new_tokens)
    for picture, number, text, complete in greedy:
        if find(text):
            texts[picture, number] = [[text, complete]]
        else:  # "Yes" names no object
            yield picture, number, text, complete
    open_ones = [[(i, j) for j in range(len(part)) if (i, j) in texts] for i, part in enumerate(questions)]
    asked = [[questions[i][j] for i, j in part] for part in open_ones]
    drawn = draw_candidates(model, processor, images, pixels, asked, candidates - 1, max_new_tokens, VERIFY_TEMPERATURE)
    for (picture, place), more in drawn.items():
        texts[open_ones[picture][place]] += more
    objects = {key: [[word for _, word in find(text)] for text, _ in answers] for key, answers in texts.items()}
    words = [sorted({word for key in part for named in objects[key] for word in named}) for part in open_ones]
    confirmed = [{}] * len(images) if clip else confirm_objects(model, processor, images, pixels, words)
    for (picture, number), answers in texts.items():
        fits = clip.compare(images[picture], [text for text, _ in answers]) if clip else None
        yield picture, number, *answers[choose_candidate(objects[picture, number], confirmed[picture], fits)]


# ---------------------------------------------------------------------------- answering a benchmark


def find_picture(image_dir: Path, name: str) -> Path:
    """Return the path of a query's picture. Raises OSError if it lies outside `image_dir`."""
    path = Path(os.path.abspath(image_dir / name))
    if not path.is_relative_to(os.path.abspath(image_dir)):
        raise OSError(f"lies outside {image_dir}")
    return path


def group_queries(queries: list[dict], size: int) -> list[list[list[dict]]]:
    """Return the queries, a list a picture, `size` pictures a group. What is in a group does not depend on what is already
    answered, so that a resumed run computes in the same batches as an unbroken one."""
    by_image = defaultdict(list)
    for query in queries:
        by_image[query["image"]].append(query)
    pictures = list(by_image.values())
    return [pictures[start : start + size] for start in range(0, len(pictures), size)]


def open_group(group: list[list[dict]], image_dir: Path, processor, context: int) -> tuple:
    """Open the pictures of a group; return those of its queries that can be asked, the images and their pixels (None without
    an image), and the failures. `context` is the model's, in tokens."""
    good, images, failures = [], [], []
    for queries in group:
        image, asked = None, []
        for query in queries:
            try:
                image = image or load_image(find_picture(image_dir, query["image"]))
                query["query"].encode()  # fails at a lone surrogate
                length = len(build_prompt(processor, query["query"], image.size))
                if length >= context:
                    raise ValueError(f"has a question of {length:,} tokens; the model's context has {context:,}")
                asked.append(query)
            except (OSError, ValueError) as error:  # a UnicodeError is a ValueError
                failures.append({"id": query["id"], "image": query["image"], "reason": str(error)})
        if asked:
            good.append(asked)
            images.append(image)
    return good, images, processor.image_processor(images, return_tensors="pt") if images else None, failures


def digest_checkpoint(path: str) -> str:
    """Return a checkpoint's identity: SHA-256 over 64 slices of each JSON, tokenizer and weight file, or a hub id's commit."""
    if not Path(path).is_dir():
        from huggingface_hub import hf_hub_download

        with suppress(Exception):  # a wrong id is reported where the model is loaded
            return Path(hf_hub_download(path, "config.json")).parent.name
        return path
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.suffix in (".json", ".model", ".safetensors") and "training" not in file.name:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                for start in range(0, size, size // 64 + 1):
                    stream.seek(start)
                    digest.update(stream.read(65_536))  # all of a file of less than 4 MiB
    return digest.hexdigest()[:16]


def read_journals(output_file: Path, fingerprint: dict) -> dict[int, dict]:
    """Return the answers of an earlier, unfinished run by query id. Stops if they were given under other settings.

    A journal begins with its run's `fingerprint`. Damaged lines are left out, so that their questions are asked again.
    """
    answers = {}
    journals = sorted(output_file.parent.glob(f"{glob.escape(output_file.name)}.journal-*.jsonl"))
    if output_file.exists() and not journals:
        stop(f"{output_file} exists without a journal; score it with --skip_inference or name another --output_file.")
    for path in journals:
        rows = []
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
        before = rows[0].get("fingerprint", {}) if rows else fingerprint
        changed = [f"{k} was {before.get(k)}, is {now}" for k, now in fingerprint.items() if before.get(k) != now]
        if changed:
            stop(f"{path} is of another run ({'; '.join(changed)}); delete it, or name another --output_file.")
        answers |= {row["id"]: row for row in rows if "id" in row}
    return answers


def fill_journal(state, output_file, groups, answers, fingerprint, answer: Callable, open_pictures: Callable) -> list:
    """Answer what is left of this process's groups, each answer into its journal as it arrives; return the failures."""
    mine = groups[state.process_index :: state.num_processes]
    todo = [group for group in mine if any(query["id"] not in answers for asked in group for query in asked)]
    workers = 2 * torch.cuda.is_available()
    loader = torch.utils.data.DataLoader(todo, batch_size=None, num_workers=workers, collate_fn=open_pictures)
    path, failures = output_file.with_name(f"{output_file.name}.journal-{state.process_index}.jsonl"), []
    with path.open("a") as journal:
        print("\n" * bool(journal.tell()) + json.dumps({"fingerprint": fingerprint}), file=journal)  # ends a half line
        for good, images, pixels, failed in tqdm(loader, output_file.stem, unit="batch", disable=not MAIN_PROCESS):
            failures += failed
            questions = [[query["query"] for query in asked] for asked in good]
            for picture, number, text, complete in answer(images, pixels, questions) if good else ():
                query = good[picture][number]["id"]
                if query not in answers:
                    answers[query] = {"id": query, "response": text, "complete": complete}
                    print(json.dumps(answers[query]), file=journal, flush=True)
    return failures


def make_answerer(args, processor) -> tuple:
    """Load what answers; return a function of (images, pixels, questions), and the model if it runs in this process."""
    if args.backend == "vllm":
        return start_vllm(args.model_path, processor, args.max_new_tokens), None
    device = args.device
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # under torchrun, a GPU a process
    model, processor = load_llava(args.model_path, args.lora_path, device, args.load_4bit, args.load_8bit)
    if args.verify == 1:
        return partial(answer_questions, model, processor, max_new_tokens=args.max_new_tokens), model
    find = find_nouns(args.nouns, read_vocabulary(args) if args.nouns == "vocabulary" else None)
    clip = Clip(args.clip_model, model.device) if args.clip_model else None
    answer = partial(verify_answers, model, processor, max_new_tokens=args.max_new_tokens)
    return partial(answer, candidates=args.verify, find=find, clip=clip), model


def describe_run(args, processor) -> dict:
    """Return the settings on which answers depend, the adapter apart."""
    prompt = json.dumps(build_prompt(processor, "Is it?", (64, 64))).encode()
    names = ("max_new_tokens", "load_4bit", "load_8bit", "backend", "device", "verify", "clip_model")
    return {
        **{name: getattr(args, name) for name in names},
        "nouns": args.nouns if args.verify > 1 else None,
        "image_dir": os.path.abspath(args.image_dir),
        "model": digest_checkpoint(args.model_path),
        "prompt": hashlib.sha256(prompt).hexdigest()[:16],
        "queries": hashlib.sha256(args.query_file.read_bytes()).hexdigest()[:16],
    }


@contextmanager
def lock_output(output_file: Path):
    """Keep a second run from writing the same answers."""
    lock = FileLock(output_file.with_name(f".{output_file.name}.lock"), blocking=False)
    try:
        with lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink()
    except Timeout:
        stop(f"another run is writing {output_file}; wait for it, or name another --output_file.")


def write_answers(output_file: Path, every_query: list[dict], answers: dict[int, dict]) -> None:
    """Write the answers in AMBER's format, in the order of the query file."""
    kept = [answers[query["id"]] for query in every_query if query["id"] in answers]
    rows = [{"id": row["id"], "response": row["response"]} for row in kept]
    write_whole(output_file, json.dumps(rows, indent=1, ensure_ascii=False))
    cut = sum(not row["complete"] for row in kept)
    console.print(f"{len(rows):,} answers in {escape(str(output_file))}, {cut:,} cut off at --max_new_tokens")


def answer_benchmark(args, every_query: list[dict], queries: list[dict]) -> list[dict]:
    """Answer `queries`, without the adapter too if asked, and return the failures. The answers to all of `every_query` that
    the journals have are written, so that a smaller --limit loses nothing."""
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from transformers import AutoConfig

    state = PartialState(cpu=not torch.cuda.is_available())
    config, processor, _ = read_checkpoint(args.model_path)
    context = (config or AutoConfig.from_pretrained(args.model_path)).text_config.max_position_embeddings
    open_pictures = partial(open_group, image_dir=args.image_dir, processor=processor, context=context)
    settings = describe_run(args, processor)
    runs = {name_base_file(args.output_file): settings | {"adapter": None}} if args.compare_base else {}
    runs[args.output_file] = settings | {"adapter": digest_checkpoint(args.lora_path) if args.lora_path else None}
    groups, failures, answer = group_queries(queries, args.batch_size), {}, None
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_output(args.output_file) if MAIN_PROCESS else nullcontext():
        earlier = [read_journals(output_file, fingerprint) for output_file, fingerprint in runs.items()]
        state.wait_for_everyone()  # nobody writes before everybody has read
        for (output_file, fingerprint), answers in zip(runs.items(), earlier, strict=True):
            if any(query["id"] not in answers for query in queries):
                if not answer:
                    answer, model = make_answerer(args, processor)
                off = args.lora_path and not fingerprint["adapter"]
                with model.disable_adapter() if off else nullcontext():
                    failed = fill_journal(state, output_file, groups, answers, fingerprint, answer, open_pictures)
                failures |= {failure["id"]: failure for failure in gather_object(failed)}
            if MAIN_PROCESS:
                write_answers(output_file, every_query, read_journals(output_file, fingerprint))
    return list(failures.values())


def name_base_file(output_file: Path) -> Path:
    """Return where --compare_base puts the answers given with the adapter off."""
    return output_file.with_name(f"{output_file.stem}_base{output_file.suffix}")


# ---------------------------------------------------------------------------- the benchmarks' files


def read_json(path: Path, flag: str, kind: type = list):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        stop(f"{flag} {path} cannot be read: {error}.")
    if not isinstance(content, kind) or not content:
        found = f"a JSON {type(content).__name__}" if content else "nothing"
        stop(f"{flag} {path} holds {found}, where a {kind.__name__} is expected.")
    return content


def read_queries(path: Path) -> tuple[list[dict], dict[int, dict] | None]:
    """Return a file's questions as {id, image, query}, and for a file of POPE's their annotations; None for AMBER's.

    AMBER's files are a JSON list; POPE's have one JSON object a line, with question_id, image, text and label.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        pope = "label" in rows[0]
        if pope:
            rows = [
                {"id": row["question_id"], "image": row["image"], "query": row["text"], "truth": row["label"]}
                for row in rows
            ]
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        stop(f"--query_file {path} holds neither AMBER's nor POPE's questions ({type(error).__name__}: {error}).")
    kinds = {"id": int, "image": str, "query": str}
    for number, row in enumerate(rows):
        good = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
        if not good or row.get("truth", "no") not in ("yes", "no"):
            stop(f"--query_file {path}: entry {number} is no question: {json.dumps(row)[:80]}.")
    twice = [number for number, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        stop(f"--query_file {path} has the id {twice[0]} twice; ids must differ.")
    notes = {row["id"]: {"id": row["id"], "type": "pope", "truth": row["truth"]} for row in rows} if pope else None
    return rows, notes


def select_queries(queries: list[dict], notes: dict | None, sections: list[str], limit: int | None) -> list[dict]:
    """Return the queries of the `sections` about the first `limit` pictures, in the file's order."""
    if notes is not None:
        unknown = [query["id"] for query in queries if query["id"] not in notes]
        if unknown:
            stop(f"--annotation_file has no entry for query {unknown[0]}; it belongs to other queries.")
        queries = [query for query in queries if section_of(notes[query["id"]]["type"]) in sections]
    if not queries:
        stop("--query_file has no query of this --evaluation_type.")
    images = set(list(dict.fromkeys(query["image"] for query in queries))[:limit])
    return [query for query in queries if query["image"] in images]


def find_file(args, flag: str, name: str) -> Path:
    """Return the file given by its flag, or the one that AMBER has beside the query file or one folder up."""
    given = getattr(args, flag)
    near = (args.query_file or args.annotation_file).absolute().parent
    places = [given] if given else [near / name, near.parent / name]
    for path in places:
        if path.is_file():
            return path
    stop(f"--{flag} is needed to score: found no file {' or '.join(map(str, places))}; name AMBER's {name}.")


def read_annotations(args) -> dict[int, dict]:
    path = find_file(args, "annotation_file", "annotations.json")
    notes = {}
    for number, note in enumerate(read_json(path, "--annotation_file")):
        try:
            wanted = (str,) if note["type"] != "generative" else (list,)
            if not isinstance(note["truth"], wanted) or (wanted == (str,) and note["truth"] not in ("yes", "no")):
                raise ValueError
            notes[note["id"]] = note if wanted == (str,) else {**note, "hallu": note["hallu"] + []}
        except (TypeError, KeyError, ValueError):
            stop(f"--annotation_file {path}: entry {number} is no annotation of AMBER's: {json.dumps(note)[:80]}.")
    return notes


def read_vocabulary(args) -> set[str]:
    """Return all words that AMBER's scoring knows."""
    relation = read_json(find_file(args, "relation_file", "relation.json"), "--relation_file", dict)
    return set(relation).union(*relation.values())


def read_words(args, notes: dict[int, dict]) -> tuple[dict[str, list[str]], set[str]]:
    """Return AMBER's associations, {word: words that stand for it}, and the words that are always safe."""
    path = find_file(args, "relation_file", "relation.json")
    relation = read_json(path, "--relation_file", dict)
    known = (word for note in notes.values() if note["type"] == "generative" for word in note["truth"] + note["hallu"])
    missing = next((word for word in known if word not in relation), None)
    if missing:
        stop(f"--relation_file {path} lacks {missing!r} of the annotations; it belongs to other ones.")
    return relation, set(find_file(args, "safe_words_file", "safe_words.txt").read_text(encoding="utf-8").split("\n"))


def read_answers(path: Path, notes: dict[int, dict]) -> list[dict]:
    """Return the rows of an answer file in AMBER's format, from here or elsewhere: id and response. A response null to a
    yes/no question is a wrong answer."""
    rows = read_json(path, "the answer file")
    for number, row in enumerate(rows):
        note = notes.get(row.get("id")) if isinstance(row, dict) and isinstance(row.get("id"), int) else None
        if note and note["type"] != "generative" and row.get("response", "") is None:
            row["response"] = ""
        if not note or not isinstance(row.get("response"), str):
            stop(f"the answer file {path}: entry {number} must have the id of an annotation and a response, and is "
                 f"{json.dumps(row)[:80]}.")  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- scoring

SIMILAR = 0.8  # above this, spaCy's similarity makes two words one
# what one answer adds to the sums that all figures are made of
CAPTION_COUNTS = ["captions", "clean", "named", "hallucinated", "present", "covered", "traps", "fallen"]
ANSWER_COUNTS = ["asked", "correct", "no_true", "no_said", "no_right"]
POPE_COUNTS = ["asked", "correct", "yes_true", "yes_said", "yes_right"]
KINDS = ["existence", "state", "number", "action", "relation"]
COUNTS = CAPTION_COUNTS + [f"{kind} {count}" for kind in KINDS for count in ANSWER_COUNTS]
COUNTS += [f"pope {count}" for count in POPE_COUNTS]
# section -> the counts that say how many answers it has; amber, whose one figure is the AMBER score, needs both tasks
SECTION_COUNTS = {
    "generative": ["captions"],
    "discriminative": [f"{kind} asked" for kind in KINDS],
    "attribute": ["state asked", "number asked", "action asked"],
    **{kind: [f"{kind} asked"] for kind in [*KINDS, "pope"]},
}
YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def section_of(kind: str) -> str:
    """Return the section that a type of annotation is scored in; unknown ones are relations, as in the official script."""
    return {
        "pope": "pope",
        "generative": "generative",
        "discriminative-hallucination": "existence",
        "discriminative-attribute-state": "state",
        "discriminative-attribute-number": "number",
        "discriminative-attribute-action": "action",
    }.get(kind, "relation")


# WordNet's files of things that a picture can show, and words in them that are about pictures
THINGS = {f"noun.{name}" for name in ("animal", "artifact", "body", "food", "object", "person", "plant", "substance")}
NO_OBJECTS = set(
    "image picture photo photograph scene view background foreground side top bottom line shape object".split()
)


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


def look_up_nouns(vocabulary: set[str]) -> Callable[[str], list[tuple[str, str]]]:
    """Return a function as find_nouns does, which knows the vocabulary's words and their plurals, and no grammar."""
    plurals = {"child": "children", "mouse": "mice", "goose": "geese"}
    endings = {
        r"man$": "men",
        r"(?<=[lra])f$|(?<=i)fe$": "ves",
        r"([^aeiou])y$": r"\1ies",
        r"([sxzo]|[cs]h)$": r"\1es",
        r"$": "s",
    }
    for word in vocabulary - plurals.keys():
        ending = next(ending for ending in endings if re.search(ending, word))
        plurals[word] = re.sub(ending, endings[ending], word)
    forms = {plurals[word]: word for word in vocabulary} | {word: word for word in vocabulary}
    return lambda text: [(word, forms[word]) for word in re.findall(r"\w+(?:-\w+)*", text) if word in forms]


def identify_vectors(spacy_model: str) -> tuple[str, str]:
    """Return a spaCy model's name with its version, and a digest that tells it from others of that name."""
    folder = Path(spacy_model)
    try:
        if folder.is_dir():
            meta = (folder / "meta.json").read_bytes()
            digest = hashlib.sha256(meta)
            for file in sorted(folder.glob("vocab/*")):
                digest.update(file.read_bytes())
            return f"{folder.resolve().name}-{json.loads(meta).get('version')}", digest.hexdigest()
        name = f"{spacy_model}-{importlib.metadata.version(spacy_model)}"
        return name, hashlib.sha256(name.encode()).hexdigest()
    except (OSError, ValueError, importlib.metadata.PackageNotFoundError):
        stop(f"--spacy_model {spacy_model} is not installed: python -m spacy download {spacy_model} "
             "(or give a table of word similarities as --similarity_table)")  # fmt: skip


def make_similarity_table(spacy_model: str, name: str, vocabulary: list[str]) -> dict:
    """Return all pairs of the vocabulary that spaCy finds more similar than SIMILAR, from one run of the pipeline a word."""
    import spacy

    nlp = spacy.load(spacy_model)
    if not nlp.vocab.vectors.n_keys:
        console.print(f"{name} has no word vectors; its similarities are not those that AMBER means")
    words = [nlp(word) for word in vocabulary]
    with warnings.catch_warnings(action="ignore"):  # words without a vector are similar to none
        pairs = [(a.text, b.text, a.similarity(b)) for i, a in enumerate(words) for b in words[i + 1 :]]
    similar = [[a, b, round(value, 4)] for a, b, value in pairs if value > SIMILAR]
    return {"spacy_model": name, "threshold": SIMILAR, "words": vocabulary, "similar": similar}


def load_similarity(table_file: Path | None, spacy_model: str, vocabulary: set[str]) -> tuple[dict[str, set[str]], str]:
    """Return {word: the words it counts as, itself included} and the name of the spaCy model that says so. A table is made
    once for each model and vocabulary."""
    path = table_file
    if path is None:
        name, digest = identify_vectors(spacy_model)
        digest = hashlib.sha256(json.dumps([digest, sorted(vocabulary)]).encode()).hexdigest()[:16]
        path = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_amber" / f"{name}-{digest}.json"
        )
    if path.exists():
        table = read_json(path, "--similarity_table", dict)
    else:
        table = make_similarity_table(spacy_model, identify_vectors(spacy_model)[0], sorted(vocabulary))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(table))
            console.print(f"word similarities of {table['spacy_model']} are in {path}")
        except OSError as error:
            console.print(f"word similarities of {table['spacy_model']} could not be kept: {error}")
    try:
        missing = sorted(vocabulary - set(table["words"]))
        alike = {word: {word} for word in table["words"]}
        for first, second, _ in table["similar"]:
            alike[first].add(second)
            alike[second].add(first)
        name = table["spacy_model"]
    except (TypeError, KeyError, ValueError) as error:
        stop(
            f"--similarity_table {path} is no table of this script ({error!r}); name a new file to have one made there."
        )
    if missing:
        stop(f"--similarity_table {path} lacks {missing[0]!r}; name a new file to have one made there.")
    return alike, name


def judge_caption(
    nouns: list[str], note: dict, relation: dict, safe_words: set[str], alike: dict
) -> tuple[dict, list[int]]:
    """Score a caption's nouns by AMBER's rules; return its counts and the numbers of the nouns that are hallucinated.

    A slot is an entry of the annotation's truth (what is there) or hallu (what people would imagine). A word that is
    associated with an entry stands for it. Association words come before the entries themselves, and the first match in
    that order gets the credit, as in AMBER's inference.py.
    """

    def candidates(words: list[str]) -> list[tuple[str, int]]:
        associated = [(other, slot) for slot, word in enumerate(words) for other in relation[word]]
        return associated + [(word, slot) for slot, word in enumerate(words)]

    def first_slot(listed: list[tuple[str, int]], wanted: set[str]) -> int | None:
        return next((slot for word, slot in listed if word in wanted), None)

    truth, hallu = candidates(note["truth"]), candidates(note["hallu"])
    covered, fallen, hallucinated = set(), set(), []
    for number, noun in enumerate(nouns):
        if noun in safe_words:
            continue
        slot = first_slot(truth, {noun})
        if slot is None:
            fallen |= {first_slot(hallu, {noun}), first_slot(hallu, alike[noun])}
            slot = first_slot(truth, alike[noun])
        if slot is None:
            hallucinated.append(number)
        else:
            covered.add(slot)
    fallen.discard(None)
    counts = [1, not hallucinated, len(nouns), len(hallucinated)]
    counts += [len(note["truth"]), len(covered), len(note["hallu"]), len(fallen)]
    return dict(zip(CAPTION_COUNTS, counts, strict=True)), hallucinated


def judge_answer(response: str, truth: str) -> dict:
    """Score a yes/no answer by AMBER's rule: only `Yes` and `No`, to the letter, are answers."""
    said_no, right_no = response == "No", response == "No" and truth == "no"
    correct = right_no or (response == "Yes" and truth == "yes")
    return dict(zip(ANSWER_COUNTS, [1, correct, truth == "no", said_no, right_no], strict=True))


def judge_pope(response: str, truth: str) -> dict:
    """Score a yes/no answer by the rule of POPE's evaluate.py: if `No`, `not` or `no` is a word of the text before the first
    full stop, it means no, and otherwise yes."""
    said_yes = not {"No", "not", "no"} & set(response.split(".")[0].replace(",", "").split(" "))
    is_yes = truth == "yes"
    return dict(zip(POPE_COUNTS, [1, said_yes == is_yes, is_yes, said_yes, said_yes and is_yes], strict=True))


def compute_figures(
    sums: dict, shown: Callable = lambda value, digits=1: value, start: float = 0.001
) -> dict[str, dict]:
    """Return the figures of AMBER and POPE, in percent, from the sums of COUNTS: numbers, or arrays of one shape.

    In AMBER's script, every denominator starts at 0.001, precision and recall are for the answer No, and F1 is computed
    from what `shown` makes of them (rounded to one decimal) with a small number in its denominator. POPE's figures are for
    the answer Yes, and are plain.
    """

    def percent(part, whole, times=1):
        return part / (whole + times * start) * 100

    def section(kinds: list[str], times=1, small=0.0001) -> dict:
        asked, correct, no_true, no_said, no_right = (
            sum(sums[f"{kind} {count}"] for kind in kinds) for count in ANSWER_COUNTS
        )
        precision, recall = shown(percent(no_right, no_said, times)), shown(percent(no_right, no_true, times))
        f1 = 2 * (precision / 100) * (recall / 100) / ((precision / 100) + (recall / 100) + small) * 100
        accuracy = shown(percent(correct, asked, times))
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": shown(f1)}

    generative = {
        "chair": shown(percent(sums["hallucinated"], sums["named"])),
        "cover": shown(percent(sums["covered"], sums["present"])),
        "hal": shown(100 - percent(sums["clean"], sums["captions"])),
        "cog": shown(percent(sums["fallen"], sums["traps"])),
    }
    discriminative = section(KINDS)
    asked, correct, yes_true, yes_said, yes_right = (sums[f"pope {count}"] for count in POPE_COUNTS)
    pope = {
        "accuracy": correct / np.maximum(asked, 1),
        "precision": yes_right / np.maximum(yes_said, 1),
        "recall": yes_right / np.maximum(yes_true, 1),
        "f1": 2 * yes_right / np.maximum(yes_said + yes_true, 1),  # the harmonic mean of the two
        "yes": yes_said / np.maximum(asked, 1),
    }
    return {
        "generative": generative,
        "discriminative": discriminative,
        "existence": section(["existence"], small=0.001),
        "attribute": section(["state", "number", "action"], times=3),  # three denominators
        **{kind: section([kind]) for kind in ("state", "number", "action", "relation")},
        "pope": {name: shown(100 * value, digits=2) for name, value in pope.items()},
        "amber": {"score": (100 - generative["chair"] + discriminative["f1"]) / 2},
    }


def count_answers(rows: list[dict], notes: dict, judge_text: Callable) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return COUNTS of each answer, (rows, COUNTS), as given and with yes/no normalised, and the hallucinated words by id.

    `judge_text` scores a caption: (text, annotation) -> (counts, hallucinated words). Normalised means that an answer which
    begins with yes or no, in any case and after any punctuation, is that answer.
    """
    strict, normalised = np.zeros((2, len(rows), len(COUNTS)), dtype=np.int64)
    hallucinated = {}
    place = {name: column for column, name in enumerate(COUNTS)}
    for number, row in enumerate(rows):
        note, response = notes[row["id"]], row["response"]
        section = section_of(note["type"])
        if section == "generative":
            counts, hallucinated[row["id"]] = judge_text(response, note)
            for name, value in counts.items():
                strict[number, place[name]] = normalised[number, place[name]] = value
            continue
        begins = YES_NO.match(response)
        judge = judge_pope if section == "pope" else judge_answer
        for table, text in ((strict, response), (normalised, begins[1].capitalize() if begins else response)):
            for name, value in judge(text, note["truth"]).items():
                table[number, place[f"{section} {name}"]] = value
    return strict, normalised, hallucinated


def summarize(rows: list[dict], strict: np.ndarray, normalised: np.ndarray, notes: dict, sections: list[str]) -> dict:
    """Return the figures of an answer file: the official ones, the normalised ones, and what they leave out."""

    def figures(counts: np.ndarray) -> dict:
        return compute_figures(
            dict(zip(COUNTS, counts.sum(0).tolist(), strict=True)), lambda value, digits=1: round(value, digits)
        )

    official, plain = figures(strict), figures(normalised)
    texts = group_by_task(notes, rows, sections)
    closed = [row["response"] for task, part in texts.items() if task != "generative" for row in part]
    neither = sum(YES_NO.match(text) is None for text in closed)
    return {
        "strict": {section: official[section] for section in sections},
        "normalised": {section: plain[section] for section in sections if section not in ("generative", "pope")},
        "amber_score": round(official["amber"]["score"], 2) if "amber" in answered_sections(strict, sections) else None,
        "neither_yes_nor_no": round(100 * neither / len(closed), 2) if closed else None,
        "answers": {task: len(part) for task, part in texts.items()},
        "mean_words": {
            task: round(float(np.mean([len(row["response"].split()) for row in part])), 1)
            for task, part in texts.items()
            if part
        },
    }


def group_by_task(notes: dict, rows: list[dict], sections: list[str]) -> dict[str, list]:
    """Return the rows that have an `id` in the notes by task: generative and discriminative, or pope."""
    groups: dict[str, list] = {
        task: [] for task in (["pope"] if sections == ["pope"] else ["generative", "discriminative"])
    }
    for row in rows:
        kind = notes[row["id"]]["type"]
        groups[kind if kind in groups else "discriminative"].append(row)
    return groups


def count_section(section: str, sums: dict):
    """Return how many answers a section has in `sums` of COUNTS; for amber, the smaller of the two tasks' numbers."""
    if section == "amber":
        return np.minimum(count_section("generative", sums), count_section("discriminative", sums))
    return sum(sums[name] for name in SECTION_COUNTS[section])


def answered_sections(counts: np.ndarray, sections: list[str]) -> list[str]:
    """Return those of `sections` that have an answer in `counts`: AMBER's rules give the others figures too, of nothing."""
    sums = dict(zip(COUNTS, counts.sum(0), strict=True))
    whole = ["amber"] if {"generative", "discriminative"} <= set(sections) else []
    return [section for section in [*sections, *whole] if count_section(section, sums)]


def sum_by_image(rows: list[dict], counts: np.ndarray, image_of: dict[int, str]) -> np.ndarray:
    """Return COUNTS of each picture, (pictures, COUNTS), in the order of their names; an unknown query stands for itself."""
    images = [str(image_of.get(row["id"], row["id"])) for row in rows]
    names, places = np.unique(images, return_inverse=True)
    sums = np.zeros((len(names), counts.shape[1]), dtype=np.int64)
    np.add.at(sums, places, counts)
    return sums


def estimate(first: np.ndarray, second: np.ndarray | None, sections: list[str], draws: int = 4_000) -> dict:
    """Return 95 % bootstrap intervals by picture of every figure of `first`, (pictures, COUNTS), or of its difference to
    `second`.

    For a difference the same pictures are drawn from both, and `p_value` is that of the paired permutation test: under the
    null hypothesis each picture's two answer sets are exchangeable (Efron and Tibshirani 1993, chapters 13 and 15). Figures
    are computed without AMBER's 0.001, which makes 100 % of few answers differ from 100 % of many.
    """
    rng = np.random.default_rng(0)
    n = len(first)

    def figures(*sides: np.ndarray) -> dict:
        found = []
        for sums in (dict(zip(COUNTS, side.T, strict=True)) for side in sides):
            computed = compute_figures(sums, start=1e-9)
            # a draw that has no answer of a section says nothing about it
            found.append({(section, name): np.where(count_section(section, sums) > 0, value, np.nan)
                          for section in sections for name, value in computed[section].items()})  # fmt: skip
        return {key: value - (found[1][key] if found[1:] else 0) for key, value in found[0].items()}

    sides = [first] if second is None else [first, second]
    drawn, swapped = [], []
    for size in [500] * (draws // 500):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(float)
        drawn.append(figures(*(weights @ side for side in sides)))
        if second is not None:
            moved = rng.integers(0, 2, size=(size, n)).astype(float) @ (second - first)
            swapped.append(figures(first.sum(0) + moved, second.sum(0) - moved))
    result: dict = {section: {} for section in sections}
    for (section, figure), value in figures(*(side.sum(0)[None] for side in sides)).items():
        edges = np.nanpercentile(np.concatenate([part[section, figure] for part in drawn]), [2.5, 97.5])
        low, high, difference = (round(float(x), 2) + 0.0 for x in (*edges, value[0]))  # + 0.0 makes 0.0 of -0.0
        entry = {"low": low, "high": high}
        if second is not None:
            null = np.abs(np.concatenate([part[section, figure] for part in swapped]))
            extreme = int((null >= abs(value[0]) - 1e-6).sum())
            entry = {"difference": difference, **entry, "p_value": round((1 + extreme) / (1 + draws), 4)}
        result[section][figure] = entry
    return result


def prepare_captions(args, notes: dict) -> tuple[Callable, str]:
    """Return a function that scores a caption, (text, annotation) -> (counts, hallucinated words), and the spaCy model's name."""
    relation, safe_words = read_words(args, notes)
    vocabulary = read_vocabulary(args)
    alike, spacy_model = load_similarity(args.similarity_table, args.spacy_model, vocabulary)
    find = find_nouns(args.nouns, vocabulary)

    def judge_text(text: str, note: dict) -> tuple[dict, list[str]]:
        nouns = find(text)
        counts, wrong = judge_caption([lemma for _, lemma in nouns], note, relation, safe_words, alike)
        return counts, [nouns[number][0] for number in wrong]

    return judge_text, spacy_model


@dataclass
class Answers:
    """An answer file with its scores: the label it is shown under, rows, and what count_answers returns."""

    path: Path
    label: str
    rows: list[dict]
    strict: np.ndarray
    normalised: np.ndarray
    hallucinated: dict[int, list[str]]

    def ids(self) -> set[int]:
        return {row["id"] for row in self.rows}

    def keep(self, ids: set[int]) -> "Answers":
        """Return the answers to the queries `ids`."""
        kept = [place for place, row in enumerate(self.rows) if row["id"] in ids]
        rows = [self.rows[place] for place in kept]
        return Answers(self.path, self.label, rows, self.strict[kept], self.normalised[kept], self.hallucinated)

    def score(self, notes: dict, sections: list[str], image_of: dict) -> dict:
        """Return what scores.json says of the answers."""
        summary = summarize(self.rows, self.strict, self.normalised, notes, sections)
        by_image = sum_by_image(self.rows, self.strict, image_of)
        intervals = estimate(by_image, None, answered_sections(self.strict, sections))
        return {"file": self.path.name, **summary, "intervals": intervals}


def compare(base: Answers, this: Answers, notes: dict, sections: list[str], image_of: dict) -> dict:
    """Return the scores of two answer files on the queries that both answer, and their differences."""
    common = base.ids() & this.ids()
    if not common:
        stop(f"{base.path} answers none of the queries that {this.path} answers.")
    left_out = len((base.ids() | this.ids()) - common)
    base, this = base.keep(common), this.keep(common)
    sums = [sum_by_image(side.rows, side.strict, image_of) for side in (this, base)]
    return {
        "left_out": left_out,
        "labels": [base.label, this.label],
        "base": base.score(notes, sections, image_of),
        "this": this.score(notes, sections, image_of),
        "difference": estimate(*sums, answered_sections(this.strict, sections)),
    }


def pick_captions(sides: list[Answers], image_of: dict) -> list[dict]:
    """Return the captions that all `sides` have, as {image, captions: [(label, text, hallucinated words), …]}."""
    common = set.intersection(*(side.ids() & side.hallucinated.keys() for side in sides))
    texts = [{row["id"]: row["response"] for row in side.rows} for side in sides]
    return [
        {
            "image": image_of.get(number),
            "captions": [
                (side.label, text[number], side.hallucinated[number]) for side, text in zip(sides, texts, strict=True)
            ],
        }
        for number in texts[0]
        if number in common
    ]


def name_files(output_file: Path, baseline_file: Path | None, compare_base: bool) -> dict[str, Path]:
    """Return the answer files to score, this run's last, as {the label to show: path}."""
    if compare_base:
        return {"base": name_base_file(output_file), "adapter": output_file}
    files = [path for path in (baseline_file, output_file) if path]
    labels = [path.stem for path in files]
    if len(set(labels)) < len(labels):
        labels = [f"{path.absolute().parent.name}/{path.stem}" for path in files]
    return dict(zip(labels, files, strict=True))


# ---------------------------------------------------------------------------- report

TITLES = {"chair": "CHAIR ↓", "cover": "Cover ↑", "hal": "Hal ↓", "cog": "Cog ↓", "accuracy": "accuracy ↑",
          "precision": "precision ↑", "recall": "recall ↑", "f1": "F1 ↑", "yes": "answered Yes", "score": "AMBER score ↑"}  # fmt: skip


def describe_rules(scores: dict) -> str:
    """Return the heading of the table: which rules the figures follow."""
    if "pope" in scores["strict"]:
        return f"POPE, {scores['query_file']}: official scoring"
    if scores["nouns"] != "nltk":
        return "AMBER: nouns looked up without a tagger, so not the official scores"
    if not scores["spacy_model"].startswith("en_core_web_lg"):
        return "AMBER: official rules with another spaCy model than en_core_web_lg"
    return "AMBER: official scoring"


def print_scores(scores: dict) -> None:
    """Print the figures: one file's with their intervals, or base beside adapter with the difference and its interval."""
    comparison = scores.get("comparison")
    this, base = (comparison["this"], comparison["base"]) if comparison else (scores, None)
    estimates = comparison["difference"] if comparison else this["intervals"]
    columns = (
        [*map(escape, comparison["labels"]), "difference (95 %)", "p"] if comparison else ["score", "95 % interval"]
    )
    columns += ["normalised"] if this["normalised"] else []
    table = Table("%", *columns, title=escape(describe_rules(scores)), box=box.SIMPLE_HEAD, pad_edge=False)

    def add_figure(section: str, figure: str, value: float, before: float | None, digits: int) -> None:
        known = estimates[section][figure]
        interval = f"{known['low']:z.1f} to {known['high']:z.1f}"
        cells = [f"{value:z.{digits}f}", interval]
        if comparison:
            p_value = "<.001" if known["p_value"] < 0.001 else f"{known['p_value']:.3f}".removeprefix("0")
            cells = [f"{before:z.{digits}f}", cells[0], f"{value - before:+z.{digits}f} ({interval})", p_value]
        plain = this["normalised"].get(section, {}).get(figure)
        cells += [] if plain is None else [f"{plain:.1f}"]
        table.add_row(TITLES[figure] if figure == "score" else f"  {TITLES[figure]}", *cells)

    for section, figures in this["strict"].items():
        if section in estimates:
            table.add_row(f"[bold]{section}")
            for figure, value in figures.items():
                before = base["strict"][section][figure] if comparison else None
                add_figure(section, figure, value, before, 2 if section == "pope" else 1)
    if "amber" in estimates:
        add_figure("amber", "score", this["amber_score"], base["amber_score"] if comparison else None, 2)
    console.print(table)
    for line in describe_answers(scores, this):
        console.print(line)


def describe_answers(scores: dict, this: dict) -> Iterator[str]:
    """Yield what has to be known beside the figures, a line each."""
    counts = ", ".join(f"{count:,} of {scores['asked'][name]:,} {name}" for name, count in this["answers"].items())
    lengths = " and ".join(str(words) for words in this["mean_words"].values())
    nouns = f"; nouns: {scores['nouns']}, alike by {scores['spacy_model']}" if scores["spacy_model"] else ""
    yield f"answers: {counts}, of {lengths} words on average{nouns}"
    left_out = scores["comparison"]["left_out"] if "comparison" in scores else 0
    if left_out:
        yield f"compared are the answers that both files have; {left_out:,} are in one file only"
    if scores["resampled_by"] != "picture":
        yield f"intervals are by {scores['resampled_by']}: they are too narrow"
    empty = [section for section in this["strict"] if section not in this["intervals"]]
    if empty:
        yield f"no answers, so no figures: {', '.join(empty)}"
    if this["neither_yes_nor_no"]:
        yield f"{this['neither_yes_nor_no']} % of the answers to yes/no questions begin with neither yes nor no"


def draw_scores(scores: dict, path: Path) -> None:
    """Draw the figures of scores.json as bars with 95 % intervals, base above this if there is a baseline."""
    comparison = scores.get("comparison")
    sides, labels, colours = [scores], [""], ["#1b7837"]
    if comparison:
        sides, labels, colours = [comparison["base"], comparison["this"]], comparison["labels"], ["#9aa5b1", "#1b7837"]
    sections = ["generative", "discriminative", "existence", "attribute", "relation", "pope"]
    sections = [section for section in sections if section in sides[-1]["intervals"]]
    keys = [(section, name) for section in sections for name in sides[-1]["strict"][section]]
    places = np.arange(len(keys)) + 0.8 * np.array([sections.index(section) for section, _ in keys])
    height = 0.8 / len(sides)
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.36 * places[-1]), layout="constrained")
    for number, (side, label, colour) in enumerate(zip(sides, labels, colours, strict=True)):
        values = np.array([side["strict"][section][name] for section, name in keys])
        low, high = (np.array([side["intervals"][s][name][edge] for s, name in keys]) for edge in ("low", "high"))
        errors = np.maximum([values - low, high - values], 0)
        rows = places + height * (number - (len(sides) - 1) / 2)
        axis.barh(rows, values, 0.92 * height, color=colour, label=label, xerr=errors, ecolor="#444444", capsize=2)
        for row, value, end in zip(rows, values, values + errors[1], strict=True):
            axis.text(end + 1, row, f"{value:.1f}", va="center", fontsize=7)
    for section in sections:
        first = places[[section for section, _ in keys].index(section)]
        axis.text(107, first, section, fontsize=10, fontweight="bold", va="center")
    axis.set_yticks(places, [TITLES[name] for _, name in keys], fontsize=8)
    axis.set(xlim=(0, 100), ylim=(places[-1] + 0.7, -0.7), xlabel="%; thin lines are 95 % intervals")
    axis.spines[["top", "right"]].set_visible(False)
    if comparison:
        figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    write_whole(path, buffer.getvalue())


GALLERY = jinja2.Template(
    """<!doctype html><meta charset="utf-8"><title>AMBER captions</title>
<style>body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
section{display:grid;grid-template-columns:15rem 1fr;gap:1.5rem;border-top:1px solid #ddd;padding:1.5rem 0}
img{width:100%;border-radius:6px}mark{background:#f8c9c4;padding:0 .15em;border-radius:3px}h2{font-size:.9rem;color:#555;
margin:0 0 .2rem}p{margin:0 0 1rem}@media(max-width:45rem){section{grid-template-columns:1fr}}</style>
<h1>{{ heading }}</h1><p>Words for things that are not in the picture, by AMBER's annotation, are marked. Colours, numbers and
repetitions are not judged.</p>
{% for picture in pictures %}<section><img src="{{ picture.address }}" alt="{{ picture.image }}"><div>
{% for label, pieces, count in picture.captions %}<h2>{{ label }}: {{ count }} hallucinated</h2><p>
{% for piece in pieces %}{% if loop.index0 is odd %}<mark>{{ piece }}</mark>{% else %}{{ piece }}{% endif %}{% endfor %}</p>
{% endfor %}</div></section>
{% endfor %}""",
    autoescape=True,
)


def write_gallery(shown: list[dict], image_dir: Path, path: Path, limit: int = 24) -> None:
    """Show the captions whose hallucinations changed most (with one file: that have most), words marked."""

    def change(entry: dict) -> int:
        numbers = [len(wrong) for _, _, wrong in entry["captions"]]
        return abs(numbers[0] - numbers[-1]) if len(numbers) > 1 else numbers[0]

    pictures = []
    for entry in sorted(shown, key=change, reverse=True)[:limit]:
        address = ""
        with suppress(OSError, TypeError, ValueError):  # without its picture, a caption is shown all the same
            address = embed_picture(load_image(find_picture(image_dir, entry["image"])))
        captions = []
        for side, text, wrong in entry["captions"]:
            words = "|".join(map(re.escape, sorted(set(wrong))))
            captions.append((side, re.split(rf"\b({words})\b", text) if words else [text], len(wrong)))
        pictures.append({"image": entry["image"], "address": address, "captions": captions})
    both = any(len(entry["captions"]) > 1 for entry in shown)
    heading = f"The {len(pictures)} captions that {'changed most' if both else 'hallucinate most'}, of {len(shown)}"
    write_whole(path, GALLERY.render(pictures=pictures, heading=heading))


def report(args, scores: dict, captions: list[dict]) -> None:
    """Write scores.json, and the chart and gallery if there is something to show; print the figures."""
    folder = args.output_file.absolute().parent
    for name in ("scores.png", "gallery.html"):
        (folder / name).unlink(missing_ok=True)
    write_whole(folder / "scores.json", json.dumps(scores, indent=1))
    print_scores(scores)
    if scores["intervals"]:
        draw_scores(scores, folder / "scores.png")
    if captions:
        write_gallery(captions, args.image_dir, folder / "gallery.html")
    written = [name for name in ("scores.json", "scores.png", "gallery.html") if (folder / name).exists()]
    console.print(
        f"{' and '.join([', '.join(written[:-1]), written[-1]][not written[:-1] :])} are in {escape(str(folder))}"
    )


def list_failures(path: Path, failures: list[dict]) -> None:
    """Write the queries that could not be answered to a file of their own, if there are any."""
    path.unlink(missing_ok=True)
    if failures:
        write_whole(path, json.dumps(failures, indent=1))
        first = f"{failures[0]['image']} {failures[0]['reason']}"
        console.print(
            f"{len(failures):,} queries could not be answered and are listed in {path}; the first: {first}",
            markup=False,
        )


def evaluate(
    args, queries: list[dict], notes: dict, sections: list[str], prepared: tuple, failures: list[dict]
) -> None:
    """Score the answers, beside the base's or an earlier run's if asked, and report. `prepared` is of prepare_captions."""
    judge_text, spacy_model = prepared
    image_of = {query["id"]: query["image"] for query in queries}
    sides = []
    for label, path in name_files(args.output_file, args.baseline_file, args.compare_base).items():
        rows = read_answers(path, notes)
        sides.append(Answers(path, label, rows, *count_answers(rows, notes, judge_text)))
    known = all(side.ids() <= image_of.keys() for side in sides)
    scores = {
        **sides[-1].score(notes, sections, image_of),
        "query_file": args.query_file and args.query_file.name,
        "asked": {task: len(part) for task, part in group_by_task(notes, list(notes.values()), sections).items()},
        "spacy_model": spacy_model,
        "nouns": args.nouns,
        "resampled_by": "picture" if known else "question, as --query_file does not name the pictures",
        "failures": failures,
    }
    if len(sides) > 1:
        scores["comparison"] = compare(*sides, notes, sections, image_of)
    report(args, scores, pick_captions(sides, image_of))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    queries, notes = read_queries(args.query_file) if args.query_file else ([], None)
    sections = ["pope"] if notes else SECTIONS[args.evaluation_type]
    if notes is None and not (args.skip_evaluation and args.evaluation_type == "a"):
        notes = read_annotations(args)
    prepared = (None, None)
    if MAIN_PROCESS and not args.skip_evaluation:  # what is missing shows before anything is answered
        if sections != ["pope"]:
            prepared = prepare_captions(args, notes)
        if args.baseline_file:
            read_answers(args.baseline_file, notes)
    failures_file = args.output_file.with_name(f"{args.output_file.stem}_failures.json")
    answered = True
    if args.skip_inference:
        failures = read_json(failures_file, "the failures file") if failures_file.exists() else []
    else:
        selected = select_queries(queries, notes, sections, args.limit)
        failures = answer_benchmark(args, queries, selected)
        answered = len(failures) < len(selected)
    if not MAIN_PROCESS:
        return
    list_failures(failures_file, failures)
    if answered and not args.skip_evaluation:
        evaluate(args, queries, notes, sections, prepared, failures)
    if failures:
        raise SystemExit(3)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on after the answers that are in the journal.", code=130)
    except torch.OutOfMemoryError:
        stop("the GPU's memory is full; use a smaller --batch_size, or --load_4bit.")
    except OSError as error:  # a full disk, a folder that cannot be written
        stop(f"{error}; if the journal has answers, the same command goes on after them.")
