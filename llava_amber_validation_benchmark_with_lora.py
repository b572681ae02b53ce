"""Answer AMBER's or POPE's questions with LLaVA-1.6, with or without an adapter, and score them as the official scripts do.

Reads   a LLaVA-NeXT checkpoint (--model_path), an adapter (--lora_path), the benchmark's questions and pictures, and for
        AMBER its annotations.
Writes  the answers (--output_file, in AMBER's format) and beside them the journal to resume from, scores.json, scores.png
        and, for captions, gallery.html; or, with --write_pairs, preference pairs made of the model's own answers.
Needs   pip install -r requirements/train.txt -r requirements/eval.txt
        python -m spacy download en_core_web_lg
        python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet

    python llava_amber_validation_benchmark_with_lora.py --lora_path checkpoints/llava-orpo-prod --compare_base \\
        --query_file AMBER/data/query/query_all.json --image_dir AMBER/image --output_file amber/results.json
    python llava_amber_validation_benchmark_with_lora.py --lora_path checkpoints/llava-orpo-prod --compare_base \\
        --query_file coco_pope_popular.json --image_dir val2014 --output_file pope_popular/results.json
    python llava_amber_validation_benchmark_with_lora.py --image_dir my_photos --verify 12 --write_pairs pairs.parquet
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
    engines = ["transformers", "vllm"]
    add(model, "--backend", "vllm takes a merged or quantized checkpoint", choices=engines, default="transformers")
    add(model, "--batch_size", "pictures answered together, with all questions (default: 8; vllm: 64)", type=count)
    add(model, "--max_new_tokens", "tokens an answer may have", type=count, default=1024)
    add(model, "--verify", "number of candidates for an answer that names objects, of which the one is kept whose objects "
        "the model (or --clip_model) confirms best", type=count, default=1)  # fmt: skip
    add(model, "--clip_model", "CLIP checkpoint to check with instead of the model: hub id or folder")
    add(model, "--test_mode", "use the embedded miniature as model and benchmark, if not given", action="store_true")

    data = parser.add_argument_group("benchmark")
    add(data, "--query_file", "AMBER's queries (data/query/query_all.json), or a file of POPE or RePOPE", type=Path)
    add(data, "--image_dir", "folder of the pictures", type=Path)
    add(data, "--output_file", "file for the answers", type=Path, default=Path("results.json"))
    files = {"annotation": "annotations.json", "relation": "relation.json", "safe_words": "safe_words.txt"}
    for flag, name in files.items():
        add(data, f"--{flag}_file", f"AMBER's {name} (default: beside the query file, or one folder up)", type=Path)
    add(data, "--evaluation_type", "a all, g generative, d discriminative: de existence, da attribute, dr relation",
        default="a", choices=list(SECTIONS))  # fmt: skip
    add(data, "--limit", "only the first N pictures, with all their questions", type=count)
    add(data, "--skip_inference", "score the answers in --output_file", action="store_true")
    add(data, "--skip_evaluation", "only answer", action="store_true")

    pairs = parser.add_argument_group("pairs")
    add(pairs, "--write_pairs", "in place of scoring, write the best and the worst of --verify candidates as preference "
        "pairs, in RLAIF-V's columns, to this parquet file", type=Path)  # fmt: skip
    add(pairs, "--questions", "file of questions, one a line, which the pictures of --image_dir are asked in turn "
        "(default: Describe this image.)", type=Path)  # fmt: skip

    scoring = parser.add_argument_group("scoring")
    add(scoring, "--baseline_file", "answers of an earlier run to compare with", type=Path)
    add(scoring, "--spacy_model", "word vectors that decide which words are alike", default="en_core_web_lg")
    add(scoring, "--similarity_table", "read this table of alike words, or write it if there is none", type=Path)
    add(scoring, "--nouns", "how nouns are found: nltk is AMBER's way; vocabulary looks up its words without NLTK's data, "
        "which is not official", default="nltk", choices=["nltk", "vocabulary"])  # fmt: skip
    args = parser.parse_args(argv)
    if args.test_mode:
        if args.model_path == parser.get_default("model_path"):
            args.model_path = str(MINIATURE / "model")
        if args.write_pairs:
            args.relation_file = args.relation_file or MINIATURE / "amber" / "relation.json"
        elif args.query_file is None and args.annotation_file is None:
            args.query_file = MINIATURE / "amber" / "query" / "query_all.json"
            if args.spacy_model == parser.get_default("spacy_model"):
                args.similarity_table = args.similarity_table or MINIATURE / "amber" / "similarity.json"
        args.image_dir = args.image_dir or (None if args.write_pairs else MINIATURE / "amber" / "image")
    if args.write_pairs:
        args.output_file, args.skip_evaluation = args.write_pairs, True
    for wrong, message in find_wrong_flags(args):
        if wrong:
            parser.error(message)
    args.batch_size = args.batch_size or (64 if args.backend == "vllm" else 8)
    return args


def find_wrong_flags(args: argparse.Namespace):
    """Yield pairs of a test that flags must not pass together, and what to say if they do."""
    answering, vllm = not args.skip_inference, args.backend == "vllm"
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    yield args.compare_base and not args.lora_path and answering, "--compare_base needs --lora_path"
    yield args.compare_base and args.baseline_file, "--compare_base and --baseline_file exclude each other; give one"
    partly = args.limit or args.skip_evaluation
    yield (
        args.skip_inference and partly,
        "--skip_inference scores a whole file; leave --limit and --skip_evaluation out",
    )
    names = (args.output_file.name, args.baseline_file and args.baseline_file.name)
    yield "scores.json" in names, "scores.json is where the scores go; give the answers another name"
    if args.write_pairs:
        words = args.nouns != "vocabulary" or args.query_file or args.relation_file
        yield not args.image_dir, "--write_pairs needs the pictures: give --image_dir"
        yield args.verify == 1, "--write_pairs compares candidates; give --verify 12 too"
        yield args.compare_base or args.clip_model, "--write_pairs takes neither --compare_base nor --clip_model"
        yield not words, "--nouns vocabulary needs the words to look up; give --relation_file"
    else:
        missing = answering and not (args.query_file and args.image_dir)
        yield args.questions, "--questions goes with --write_pairs"
        yield missing, "--query_file and --image_dir are needed to answer"
        yield not (args.query_file or args.annotation_file), "--query_file or --annotation_file is needed to score"
    for flag in ("query_file", "baseline_file", "questions") + ("output_file",) * args.skip_inference:
        path = getattr(args, flag)
        yield path and not path.is_file(), f"--{flag} {path} is no file"
    yield answering and args.image_dir and not args.image_dir.is_dir(), f"--image_dir {args.image_dir} is no folder"
    yield args.output_file.is_dir(), f"--output_file {args.output_file} is a folder; name a file in it"
    yield vllm and args.lora_path, "--backend vllm takes no --lora_path; merge the adapter with llava_quantize_vllm.py"
    yield vllm and args.verify > 1, "--verify needs --backend transformers"
    yield vllm and (args.load_4bit or args.load_8bit), "--backend vllm loads quantized checkpoints without --load_4bit"
    yield vllm and processes > 1, "--backend vllm starts its own processes; run it without torchrun"
    yield args.clip_model and args.verify == 1, "--clip_model is what --verify checks with; give --verify 4 too"
    alone = processes == 1 and rank != "0"
    yield alone, f"RANK is {rank} in the environment without WORLD_SIZE; unset it or use torchrun"


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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import permutations
from typing import NoReturn

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import jinja2
import matplotlib
import numpy as np
import torch
from peft import LoraConfig
from PIL import Image, ImageOps
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file
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


# Copied from llava_orpo_training.ORIGINAL_KEYS
ORIGINAL_KEYS = {
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}


# Copied from llava_orpo_training.read_original
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
            stop(
                f"--model_path {model_path} has {name} {original.get(name)!r}, and LLaVA-1.6, which this reads, {value!r}."
            )
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
    config = LlavaNextConfig(vision_config=vision.to_dict(), text_config=text, image_grid_pinpoints=grid)
    config.vision_feature_layer = original["mm_vision_select_layer"]
    side = vision.image_size
    images = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=side, image_grid_pinpoints=grid)
    before, after = ("[INST] ", " [/INST]") if text["model_type"] == "mistral" else ("USER: ", " ASSISTANT:")
    template = before + "<image>\n{{ messages[0]['content'][-1]['text'] }}" + after
    processor = LlavaNextProcessor(
        images, tokenizer, vision.patch_size, "default", template, num_additional_image_tokens=1
    )
    return config, processor, tower


# Copied from llava_orpo_training.read_checkpoint
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


# Copied from llava_orpo_training.load_llava
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


# Copied from llava_orpo_training.complete_original
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
        stop(f"--lora_path {lora_path} has more weights in non_lora_trainables.bin; merge it with LLaVA's own code.")
    if not (folder / "adapter_model.safetensors").exists():
        stop(f"--lora_path {lora_path} has no adapter_model.safetensors; convert its adapter_model.bin, if it has one.")
    config.rank_pattern = {rename_key(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {rename_key(name): alpha for name, alpha in config.alpha_pattern.items()}
    return folder, config


# Copied from llava_orpo_training.load_adapter
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
    """Return a picture, at most 448 pixels wide and high, as an address that an HTML page can carry inside it."""
    image, buffer = image.copy(), io.BytesIO()
    image.thumbnail((448, 448))
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------------- answers


@dataclass
class Branch:
    """A question that is being answered: its place, its position and column in the row, and the tokens so far."""

    row: int  # in the batch
    picture: int
    question: int  # its number among the picture's questions
    position: int  # of the next token, counted from the row's picture on
    column: int  # of its last token in the model's latest output
    dice: random.Random
    tokens: list[int] = field(default_factory=list)


def lay_out_row(processor, image: Image.Image, questions: list[str]) -> tuple[list, list, list, list[int]]:
    """Lay a picture and its questions out as one row, `picture | question 1 | question 2 | …`.

    Returns token ids, owners (0 for what all questions see, else the question's number from 1 on), positions (each
    question's follow the picture's), and the column of each question's last token.
    """
    prompts = [build_prompt(processor, question, image.size) for question in questions]
    shared = len(prompts[0]) - prompts[0][::-1].index(processor.image_token_id)
    ids, owners, positions, columns = prompts[0][:shared], [0] * shared, list(range(shared)), []
    for number, prompt in enumerate(prompts, 1):
        ids = ids + prompt[shared:]
        owners += [number] * (len(prompt) - shared)
        positions += range(shared, len(prompt))
        columns.append(len(ids) - 1)
    return ids, owners, positions, columns


def prefill(core, processor, images: list, pixels, questions: list[list[str]]) -> tuple:
    """Put every picture with its questions through the model once; return (output, owners, branches).

    All questions of a row see its picture, and none sees another. `pixels` is the image processor's output for the
    `images`; pictures without questions are left out. Owners have the shape (rows, length) and are -1 for padding.
    """
    pictures = [picture for picture, asked in enumerate(questions) if asked]
    rows, branches = [], []
    for row, picture in enumerate(pictures):
        rows.append(lay_out_row(processor, images[picture], questions[picture]))
        seed = zlib.crc32(images[picture].tobytes())
        for number, (question, column) in enumerate(zip(questions[picture], rows[-1][3], strict=True)):
            dice = random.Random(f"{seed} {number} {question}")
            branches.append(Branch(row, picture, number, rows[-1][2][column] + 1, column, dice))
    longest = max(len(row[0]) for row in rows)
    for branch in branches:
        branch.column += longest - len(rows[branch.row][0])
    ids, owners, positions = (
        torch.tensor([[pad] * (longest - len(row[part])) + row[part] for row in rows], device=core.device)
        for part, pad in enumerate((processor.tokenizer.pad_token_id, -1, 0))
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
    return output, owners, branches


def add_tokens(core, cache, owners: torch.Tensor, branches: list[Branch], pad_token_id: int) -> tuple:
    """Put the last token of every branch through the model; return (output, owners). Rows whose questions are all answered
    leave the batch."""
    kept = sorted({branch.row for branch in branches})
    if len(kept) < len(owners):
        index = torch.tensor(kept, device=core.device)
        cache.batch_select_indices(index)
        owners = owners[index]
    width = Counter(branch.row for branch in branches).most_common(1)[0][1]
    new = [[[pad] * width for _ in kept] for pad in (pad_token_id, -1, 0)]
    filled = Counter()
    for branch in branches:
        branch.row = row = kept.index(branch.row)
        branch.column = filled[row]
        filled[row] += 1
        for part, value in zip(new, (branch.tokens[-1], branch.question + 1, branch.position), strict=True):
            part[row][branch.column] = value
        branch.position += 1
    ids, new_owners, positions = (torch.tensor(part, device=core.device) for part in new)
    owners = torch.cat([owners, new_owners], dim=1)
    visible = (owners[:, None, :] == 0) | (new_owners[:, :, None] == owners[:, None, :])
    output = core.model(
        input_ids=ids,
        attention_mask=visible[:, None],
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return output, owners


def next_logits(core, output, branches: list[Branch]) -> torch.Tensor:
    """Return the logits of each branch's next token, (branches, vocabulary)."""
    places = torch.tensor([[branch.row, branch.column] for branch in branches], device=core.device)
    return core.lm_head(output.last_hidden_state[places[:, 0], places[:, 1]])


def pick_tokens(logits: torch.Tensor, temperature: float, dice: list[random.Random]) -> list[int]:
    """Return the next token of each row of `logits` (rows, vocabulary): the likeliest at temperature 0, else a drawn one.
    Each row has its own `dice`, so that what is drawn for it does not depend on the others."""
    if not temperature:
        return logits.argmax(-1).tolist()
    chances, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
    reach = chances.cumsum(-1)
    throws = torch.tensor([[die.random()] for die in dice], device=logits.device)
    places = torch.searchsorted(reach, throws * reach[:, -1:]).clamp(max=reach.shape[-1] - 1)
    return order.gather(-1, places)[:, 0].tolist()


@torch.inference_mode()
def answer_questions(
    model, processor, images: list, pixels, questions: list[list[str]], max_new_tokens: int, temperature: float = 0
) -> Iterator:
    """Answer every question about every picture; yields (picture, question, answer, complete) as each one ends.

    A picture goes through the model once, whatever is asked about it (see prefill), and generation adds a token to every
    unfinished question at a time. Temperature 0 is greedy; above it, an answer depends only on its picture, its question,
    and its place among the picture's questions. `complete` is False for an answer cut off at `max_new_tokens`.
    """
    if not any(questions):
        return
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = core.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    output, owners, branches = prefill(core, processor, images, pixels, questions)
    cache = output.past_key_values
    while True:
        logits = next_logits(core, output, branches)
        unfinished = []
        for branch, token in zip(
            branches, pick_tokens(logits, temperature, [branch.dice for branch in branches]), strict=True
        ):
            branch.tokens.append(token)
            if token in ends or len(branch.tokens) == max_new_tokens:
                text = processor.tokenizer.decode(branch.tokens, skip_special_tokens=True).strip()
                yield branch.picture, branch.question, text, token in ends
            else:
                unfinished.append(branch)
        branches = unfinished
        if not branches:
            return
        output, owners = add_tokens(core, cache, owners, branches, processor.tokenizer.pad_token_id)


def start_vllm(model_path: str, processor, max_new_tokens: int) -> Callable:
    """Start vLLM on a merged or quantized checkpoint; return a function that answers as answer_questions does.

    The questions of a picture follow one another, so that prefix caching computes the picture once. Prompts are token ids
    with BOS, in which vLLM puts the picture's tokens in place of the one `<image>`.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        stop(
            f"--backend vllm cannot be imported ({error}); install requirements/vllm.txt into an environment of its own."
        )
    on_cpu = not torch.cuda.is_available()  # for trying, where a quick start counts for more
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's own choice is half of the memory
    engine = LLM(
        model=model_path,
        enable_prefix_caching=True,
        limit_mm_per_prompt={"image": 1},
        enforce_eager=on_cpu,
        skip_mm_profiling=on_cpu,
    )
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)

    def answer(images: list, pixels, questions: list[list[str]]) -> Iterator:
        asked = [(i, j, question) for i, part in enumerate(questions) for j, question in enumerate(part)]
        prompts = []
        for i, _, question in asked:
            ids = build_prompt(processor, question, images[i].size)
            first = ids.index(processor.image_token_id)
            ids = ids[: first + 1] + [token for token in ids[first:] if token != processor.image_token_id]
            prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": images[i]}})
        for (i, j, _), output in zip(asked, engine.generate(prompts, greedy, use_tqdm=False), strict=True):
            yield i, j, output.outputs[0].text.strip(), output.outputs[0].finish_reason == "stop"

    return answer


# ---------------------------------------------------------------------------- checked answers (--verify)

VERIFY_TEMPERATURE = 0.7  # at which --verify draws candidates beside the greedy answer


class Clip:
    """A CLIP checkpoint in safetensors, which says how well texts fit a picture."""

    def __init__(self, model_path: str, device):
        from transformers import AutoProcessor, CLIPModel, PreTrainedConfig

        try:
            kind = PreTrainedConfig.get_config_dict(model_path)[0].get("model_type")
            if kind != "clip":
                raise ValueError(f"its model_type is {kind}, not clip")
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


def draw_candidates(
    model,
    processor,
    images: list,
    pixels,
    questions: list[list[str]],
    count: int,
    max_new_tokens: int,
    temperature: float,
) -> dict[tuple[int, int], list[tuple[str, bool]]]:
    """Draw `count` answers to every question about every picture; return {(picture, question): [(answer, complete), …]}."""
    drawn: dict = {}
    asked = [[question for question in part for _ in range(count)] for part in questions]
    for picture, place, text, complete in answer_questions(
        model, processor, images, pixels, asked, max_new_tokens, temperature
    ):
        drawn.setdefault((picture, place // count), []).append((text, complete))
    return drawn


@torch.inference_mode()
def confirm_objects(model, processor, images: list, pixels, words: list[list[str]]) -> list[dict[str, float]]:
    """Return, for each picture, {word: probability} of the model's own answer Yes to "Is there a … in this image?".

    The probability is that of Yes among Yes and No in any spelling that is one token. All words about a picture take one
    forward pass.
    """
    if not any(words):
        return [{} for _ in words]
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    spelled: dict[str, list[int]] = {"yes": [], "no": []}
    for token, number in processor.tokenizer.get_vocab().items():
        spelled.get(token.strip("▁ ").lower(), []).append(number)
    questions = [
        [f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word} in this image?" for word in part] for part in words
    ]
    output, _, branches = prefill(core, processor, images, pixels, questions)
    chances = next_logits(core, output, branches).float().softmax(-1)
    yes, no = (chances[:, spelled[answer]].sum(-1) for answer in ("yes", "no"))
    found: list[dict] = [{} for _ in words]
    for branch, share in zip(branches, (yes / (yes + no).clamp(min=1e-30)).tolist(), strict=True):
        found[branch.picture][words[branch.picture][branch.question]] = share
    return found


def choose_candidate(objects: list[list[str]], confirmed: dict[str, float], fits: list[float] | None = None) -> int:
    """Return the number of the candidate that its check confirms best: the one that CLIP finds to fit the picture best, or
    the one whose `objects` have the fewest doubtful and then the most confirmed ones; the first of equals."""
    if fits:
        return max(range(len(fits)), key=fits.__getitem__)
    wrong = [sum(confirmed[word] <= 0.5 for word in set(named)) for named in objects]
    right = [len(set(named)) - doubtful for named, doubtful in zip(objects, wrong, strict=True)]
    return min(range(len(objects)), key=lambda number: (wrong[number], -right[number]))


def verify_answers(
    model, processor, images: list, pixels, questions: list[list[str]], max_new_tokens: int, *,
    candidates: int, find: Callable, clip: Clip | None,
) -> Iterator:  # fmt: skip
    """Answer as answer_questions does, but in place of a greedy answer that names objects give the best of `candidates`:
    itself and others drawn at VERIFY_TEMPERATURE, checked by CLIP or by the model's own yes/no answers."""
    texts: dict = {}
    for picture, number, text, complete in answer_questions(
        model, processor, images, pixels, questions, max_new_tokens
    ):
        if find(text):
            texts[picture, number] = [(text, complete)]
        else:  # "Yes" names no object
            yield picture, number, text, complete
    checked = [
        [number for number in range(len(part)) if (picture, number) in texts] for picture, part in enumerate(questions)
    ]
    asked = [[questions[picture][number] for number in part] for picture, part in enumerate(checked)]
    drawn = draw_candidates(model, processor, images, pixels, asked, candidates - 1, max_new_tokens, VERIFY_TEMPERATURE)
    for (picture, place), more in drawn.items():
        texts[picture, checked[picture][place]] += more
    objects = {key: [[word for _, word in find(text)] for text, _ in answers] for key, answers in texts.items()}
    words: list[set] = [set() for _ in images]
    for (picture, _), named in objects.items():
        words[picture] |= {word for part in named for word in part}
    confirmed = [{}] * len(images)
    if not clip:
        confirmed = confirm_objects(model, processor, images, pixels, [sorted(part) for part in words])
    for (picture, number), answers in texts.items():
        fits = clip.compare(images[picture], [text for text, _ in answers]) if clip else None
        yield picture, number, *answers[choose_candidate(objects[picture, number], confirmed[picture], fits)]


# ---------------------------------------------------------------------------- pairs of its own answers (--write_pairs)

PAIR_TEMPERATURE = 0.9  # at which the candidates of a pair are drawn
DENIED_COSTS = 1.5  # what an object that is not there costs, where one that is there earns 1
LENGTH_COSTS = 0.15  # what it costs a pair that one of its answers names an object more than the other
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def ask_folder(image_dir: Path, questions_file: Path | None) -> list[dict]:
    """Return a query for each picture of a folder, as read_queries does; the questions of the file take turns."""
    questions = ["Describe this image."]
    if questions_file:
        lines = questions_file.read_text(encoding="utf-8").splitlines()
        questions = [line.strip() for line in lines if line.strip()] or stop(f"--questions {questions_file} is empty.")
    names = sorted(str(path.relative_to(image_dir)) for path in image_dir.rglob("*") if path.suffix.lower() in PICTURES)
    if not names:
        stop(f"--image_dir {image_dir} has no pictures ({', '.join(PICTURES)}).")
    return [{"id": i, "image": name, "query": questions[i % len(questions)]} for i, name in enumerate(names)]


def weigh_objects(objects: list[list[str]], confirmed: dict[str, float]) -> dict[str, float]:
    """Return {object: how likely it is in the picture} from two witnesses, whose odds are multiplied: `confirmed`, which is
    the probability of the model's Yes when it is asked, and the share of the candidates that name the object (`objects`
    has each one's). benchmarks/README.md has the errors of each and of both."""
    counts = Counter(word for named in objects for word in set(named))
    belief = {}
    for word in sorted(counts):
        share = (counts[word] + 0.5) / (len(objects) + 1)
        for_it, against = confirmed[word] * share, (1 - confirmed[word]) * (1 - share)
        belief[word] = for_it / (for_it + against)
    return belief


def make_pair(texts: list[str], find: Callable, confirmed: dict[str, float]) -> dict | None:
    """Return the two candidates that differ most in what they are worth, with what was found out about their objects; None
    if they do not differ by one object.

    Each object that a candidate names counts once, for or against it by how likely it is there. A pair whose candidates
    name equally many is preferred, because from shorter chosen answers the model learns to say less.
    """
    found = [find(text) for text in texts]
    objects = [[word for _, word in nouns] for nouns in found]
    belief = weigh_objects(objects, confirmed)
    value = {word: chance - DENIED_COSTS * (1 - chance) for word, chance in belief.items()}
    worth = [sum(value[word] for word in sorted(set(named))) for named in objects]

    def compare(pair: tuple[int, int]) -> float:
        best, worst = pair
        return worth[best] - worth[worst] - LENGTH_COSTS * abs(len(objects[best]) - len(objects[worst]))

    best, worst = max(permutations(range(len(texts)), 2), key=compare)
    if worth[best] - worth[worst] < 1:
        return None
    sides = {"chosen": best, "rejected": worst}
    counts = Counter(word for named in objects for word in set(named))
    checks = {word: {"yes": confirmed[word], "named_by": counts[word], "belief": belief[word]} for word in belief}
    doubted = {side: [written for written, word in found[n] if belief[word] <= 0.5] for side, n in sides.items()}
    details = {"candidates": len(texts), "worth": {side: worth[n] for side, n in sides.items()}, "objects": checks}
    return {"chosen": texts[best], "rejected": texts[worst], **details, "doubted": doubted}


def pair_answers(
    model, processor, images: list, pixels, questions: list[list[str]], max_new_tokens: int, *, candidates: int, find: Callable
) -> Iterator:  # fmt: skip
    """Yield (picture, question, pair, True) for every question about every picture, where answer_questions yields answers;
    the pair is make_pair's. Candidates that were cut off at `max_new_tokens` are left out."""
    drawn = draw_candidates(model, processor, images, pixels, questions, candidates, max_new_tokens, PAIR_TEMPERATURE)
    texts = {key: [text for text, complete in answers if complete] for key, answers in drawn.items()}
    words = [sorted({word for key in texts if key[0] == picture for text in texts[key] for _, word in find(text)})
             for picture in range(len(images))]  # fmt: skip
    confirmed = confirm_objects(model, processor, images, pixels, words)
    for (picture, number), answers in texts.items():
        yield picture, number, make_pair(answers, find, confirmed[picture]) if len(answers) > 1 else None, True


def write_pairs(output_file: Path, queries: list[dict], answers: dict[int, dict], image_dir: Path) -> None:
    """Write the pairs as parquet in RLAIF-V's columns, with the pictures' bytes and a column of what was asked and answered
    about each object (JSON), and beside it a page of those that differ most."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as parquet

    names = "ds_name question chosen rejected origin_dataset origin_split idx image_path checks".split()
    columns = {name: datasets.Value("string") for name in names} | {"image": datasets.Image()}
    schema = datasets.Features(columns).arrow_schema
    made = [(query, pair) for query in queries if (pair := answers.get(query["id"], {}).get("response"))]

    def make_row(query: dict, pair: dict) -> dict:
        return {
            "ds_name": "own answers",
            "image": {"bytes": find_picture(image_dir, query["image"]).read_bytes(), "path": query["image"]},
            "question": query["query"],
            "chosen": pair["chosen"],
            "rejected": pair["rejected"],
            "origin_dataset": image_dir.absolute().name,
            "origin_split": json.dumps({"type": "self_alignment"}),
            "idx": str(query["id"]),
            "image_path": query["image"],
            "checks": json.dumps({name: pair[name] for name in ("candidates", "worth", "objects")}),
        }

    partial_file = output_file.with_name(f"{output_file.name}.{os.getpid()}.partial")
    with parquet.ParquetWriter(partial_file, schema) as writer:
        for start in range(0, len(made), 100):  # pictures are in memory a hundred at a time
            rows = [make_row(query, pair) for query, pair in made[start : start + 100]]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    os.replace(partial_file, output_file)
    shown = [
        {
            "image": query["image"],
            "captions": [(side, pair[side], doubted) for side, doubted in pair["doubted"].items()],
        }
        for query, pair in made
    ]
    page = output_file.with_suffix(".html")
    write_gallery(shown, image_dir, page, "Objects that the model's own answers make unlikely are marked.")
    asked = sum(query["id"] in answers for query in queries)
    console.print(f"{len(made):,} pairs of {asked:,} questions in {output_file}; look at {page}", markup=False)


# ---------------------------------------------------------------------------- answering a benchmark


def find_picture(image_dir: Path, name: str) -> Path:
    """Return the path of a query's picture. Raises OSError if it lies outside `image_dir` or is not there."""
    folder = os.path.abspath(image_dir)
    path = Path(os.path.abspath(os.path.join(folder, name)))
    if not path.is_relative_to(folder):
        raise OSError(f"lies outside {image_dir}")
    if not path.is_file():
        raise OSError("is not there")
    return path


def find_question_fault(processor, question: str, image: Image.Image, context: int) -> str | None:
    """Return the reason why a question cannot be asked, or None. `context` is the model's, in tokens."""
    try:
        length = len(build_prompt(processor, question, image.size))
    except (UnicodeError, TypeError):
        return "has a question that is not valid Unicode"
    return f"has a question of {length:,} tokens; the model's context has {context:,}" if length >= context else None


def open_group(group: list[dict], image_dir: Path, processor, context: int) -> tuple:
    """Open the pictures of a group; return what can be asked of it, its images, their pixels (None without an image), and
    the failures."""
    good, images, failures = [], [], []
    for picture in group:
        try:
            image, fault = load_image(find_picture(image_dir, picture["image"])), None
        except (OSError, ValueError) as error:  # ValueError: a name that no path can have
            image, fault = None, str(error)
        asked = []
        for query in picture["queries"]:
            reason = fault or find_question_fault(processor, query["query"], image, context)
            if reason:
                failures.append({"id": query["id"], "image": picture["image"], "reason": reason})
            else:
                asked.append(query)
        if asked:
            good.append({"image": picture["image"], "queries": asked})
            images.append(image)
    return good, images, processor.image_processor(images, return_tensors="pt") if images else None, failures


def group_queries(queries: list[dict], size: int) -> list[list[dict]]:
    """Return the queries by picture, `size` pictures a group. What is in a group does not depend on what is already
    answered, so that a resumed run computes in the same batches as an unbroken one."""
    pictures: dict[str, list] = {}
    for query in queries:
        pictures.setdefault(query["image"], []).append(query)
    listed = [{"image": image, "queries": part} for image, part in pictures.items()]
    return [listed[start : start + size] for start in range(0, len(listed), size)]


def digest_checkpoint(path: str) -> str:
    """Return a checkpoint's identity: SHA-256 over its JSON files, tokenizer and 64 slices of each weight file, or a hub
    id's commit."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        with suppress(Exception):  # a wrong id is reported where the model is loaded
            return Path(hf_hub_download(path, "config.json")).parent.name
        return path
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                for part in range(64):
                    stream.seek(part * max(size - 65_536, 0) // 63)
                    digest.update(stream.read(65_536))
        elif file.suffix in (".json", ".model") and "training" not in file.name:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def list_journals(output_file: Path) -> list[Path]:
    return sorted(output_file.parent.glob(f"{glob.escape(output_file.name)}.journal-*.jsonl"))


def read_journal(path: Path) -> list[dict]:
    """Return a journal's rows, the first of which has the run's fingerprint; none if there is no file. Damaged lines, such
    as one whose writing was cut short, are left out, so that their questions are asked again."""
    rows, damaged = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line.decode("ascii")))
        except ValueError:
            damaged += 1
    if damaged:
        console.print(f"{escape(str(path))}: {damaged} damaged lines are left out, and their questions asked again")
    return rows


def read_journals(output_file: Path, fingerprint: dict) -> dict[int, dict]:
    """Return the answers of an earlier, unfinished run by query id. Stops if they were given under other settings."""
    answers = {}
    for path in list_journals(output_file):
        rows = read_journal(path)
        if not rows:
            continue
        before = rows[0].get("fingerprint")
        if before is None:
            stop(f"{path} is damaged: its first line does not say with which settings it was written; move it away.")
        different = [name for name in fingerprint if before.get(name) != fingerprint[name]]
        if different:
            changes = "; ".join(f"{name} was {before.get(name)}, is {fingerprint[name]}" for name in different)
            stop(f"{path} holds answers of another run ({changes}); name another --output_file or delete it.")
        answers |= {row["id"]: row for row in rows[1:]}
    return answers


def fill_journal(
    state, output_file: Path, groups: list, answers: dict, fingerprint: dict, answer: Callable, open_pictures: Callable
) -> list[dict]:
    """Answer what is left of this process's groups, each answer into its journal as it arrives; return the failures."""
    journal = output_file.with_name(f"{output_file.name}.journal-{state.process_index}.jsonl")
    mine = groups[state.process_index :: state.num_processes]

    ids = [[query["id"] for picture in group for query in picture["queries"]] for group in mine]
    left = [numbers for numbers in ids if not answers.keys() >= set(numbers)]
    todo = [group for group, numbers in zip(mine, ids, strict=True) if not answers.keys() >= set(numbers)]
    rows = [{"fingerprint": fingerprint}, *read_journal(journal)[1:]]
    write_whole(journal, "".join(json.dumps(row) + "\n" for row in rows))  # without damaged lines
    failures = []
    workers = 2 * torch.cuda.is_available()
    loader = torch.utils.data.DataLoader(todo, batch_size=None, num_workers=workers, collate_fn=open_pictures)
    total, done = sum(map(len, ids)), sum(map(len, ids)) - sum(map(len, left))
    progress = tqdm(total=total, initial=done, desc=output_file.stem, unit="answer", disable=not MAIN_PROCESS)
    with journal.open("a") as file, progress as bar:
        for good, images, pixels, failed in loader:
            failures += failed
            bar.update(len(failed))
            questions = [[query["query"] for query in picture["queries"]] for picture in good]
            for picture, question, text, complete in answer(images, pixels, questions) if good else ():
                number = good[picture]["queries"][question]["id"]
                if number not in answers:
                    answers[number] = {"id": number, "response": text, "complete": complete}
                    file.write(json.dumps(answers[number]) + "\n")
                    file.flush()
                bar.update()
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
    if args.write_pairs:
        answer = partial(pair_answers, model, processor, max_new_tokens=args.max_new_tokens)
        return partial(answer, candidates=args.verify, find=find), model
    clip = Clip(args.clip_model, model.device) if args.clip_model else None
    answer = partial(verify_answers, model, processor, max_new_tokens=args.max_new_tokens)
    return partial(answer, candidates=args.verify, find=find, clip=clip), model


def describe_run(args, queries: list[dict], processor) -> dict:
    """Return the settings on which answers depend, the adapter apart."""
    prompt = build_prompt(processor, "Is it?", (64, 64))
    return {
        "model": digest_checkpoint(args.model_path),
        "prompt": hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16],
        "queries": hashlib.sha256(json.dumps(queries).encode()).hexdigest()[:16],
        "image_dir": os.path.abspath(args.image_dir),
        "max_new_tokens": args.max_new_tokens,
        "precision": "4 bit" if args.load_4bit else "8 bit" if args.load_8bit else "whole",
        "backend": f"{args.backend} on {args.device}",
        "verify": args.verify,
        "pairs": bool(args.write_pairs),
        "clip": digest_checkpoint(args.clip_model) if args.clip_model else None,
        "nouns": args.nouns if args.verify > 1 else None,
    }


@contextmanager
def lock_output(output_file: Path):
    """Keep a second run from writing the same answers."""
    from filelock import FileLock, Timeout

    output_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_file.with_name(f".{output_file.name}.lock"), timeout=0)
    if not MAIN_PROCESS:
        yield
        return
    try:
        lock.acquire()
    except Timeout:
        stop(f"another run is writing {output_file}; wait for it, or name another --output_file.")
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_answers(output_file: Path, every_query: list[dict], answers: dict[int, dict]) -> None:
    """Write the answers in AMBER's format, in the order of the query file."""
    kept = [answers[query["id"]] for query in every_query if query["id"] in answers]
    rows = [{"id": row["id"], "response": row["response"]} for row in kept]
    write_whole(output_file, json.dumps(rows, indent=1, ensure_ascii=False))
    cut = sum(not row["complete"] for row in kept)
    note = f"; {cut:,} cut off at --max_new_tokens" if cut else ""
    console.print(f"{len(rows):,} answers in {escape(str(output_file))}{note}")


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
    settings = describe_run(args, every_query, processor)
    write = partial(write_pairs, image_dir=args.image_dir) if args.write_pairs else write_answers
    passes = [(args.output_file, settings | {"adapter": digest_checkpoint(args.lora_path) if args.lora_path else None})]
    if args.compare_base:
        passes.insert(0, (name_base_file(args.output_file), settings | {"adapter": None}))
    groups = group_queries(queries, args.batch_size)
    answer, failures, earlier = None, [], []
    with lock_output(args.output_file):
        for output_file, fingerprint in passes:
            if output_file.exists() and not list_journals(output_file):
                stop(f"{output_file} exists without a journal; score it with --skip_inference or name another.")
            earlier.append(read_journals(output_file, fingerprint))
        state.wait_for_everyone()  # nobody writes before everybody has read
        for (output_file, fingerprint), answers in zip(passes, earlier, strict=True):
            if any(query["id"] not in answers for query in queries):
                if answer is None:
                    answer, model = make_answerer(args, processor)
                off = args.lora_path and not fingerprint["adapter"]
                with model.disable_adapter() if off else nullcontext():
                    failed = fill_journal(state, output_file, groups, answers, fingerprint, answer, open_pictures)
                failures += gather_object(failed)
                state.wait_for_everyone()
            if MAIN_PROCESS:
                write(output_file, every_query, read_journals(output_file, fingerprint))
    return list({failure["id"]: failure for failure in failures}.values())


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
    near = (args.query_file or args.annotation_file or given).absolute().parent
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
    """<!doctype html><meta charset="utf-8"><title>Captions</title>
<style>body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
section{display:grid;grid-template-columns:15rem 1fr;gap:1.5rem;border-top:1px solid #ddd;padding:1.5rem 0}
img{width:100%;border-radius:6px}mark{background:#f8c9c4;padding:0 .15em;border-radius:3px}h2{font-size:.9rem;color:#555;
margin:0 0 .2rem}p{margin:0 0 1rem}@media(max-width:45rem){section{grid-template-columns:1fr}}</style>
<h1>{{ heading }}</h1><p>{{ note }} Colours, numbers and repetitions are not judged.</p>
{% for picture in pictures %}<section><img src="{{ picture.address }}" alt="{{ picture.image }}"><div>
{% for label, pieces, count in picture.captions %}<h2>{{ label }}: {{ count }} marked</h2><p>
{% for piece in pieces %}{% if loop.index0 is odd %}<mark>{{ piece }}</mark>{% else %}{{ piece }}{% endif %}{% endfor %}</p>
{% endfor %}</div></section>
{% endfor %}""",
    autoescape=True,
)


def write_gallery(shown: list[dict], image_dir: Path, path: Path, note: str, limit: int = 24) -> None:
    """Show the captions whose marked words changed most (with one file: that have most), under a `note` that says what
    is marked."""

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
    write_whole(path, GALLERY.render(pictures=pictures, heading=heading, note=note))


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
        note = "Words for things that are not in the picture, by AMBER's annotation, are marked."
        write_gallery(captions, args.image_dir, folder / "gallery.html", note)
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
    if args.write_pairs and not args.query_file:
        queries = ask_folder(args.image_dir, args.questions)
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
