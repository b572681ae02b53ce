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
    python llava_amber_validation_benchmark_with_lora.py --image_dir my_photos --verify 12 --write_pairs pairs.parquet
    python llava_amber_validation_benchmark_with_lora.py --test_mode --nouns vocabulary --output_file outputs/amber/results.json
"""

import argparse
import os
import sys
from pathlib import Path

# Copied from llava_orpo_training.MINIATURE
MINIATURE = Path(__file__).resolve().parent / "miniature"

# AMBER's own files, which lie beside the query file or one folder up
AMBER_FILES = {"annotation": "annotations.json", "relation": "relation.json", "safe_words": "safe_words.txt"}
ATTRIBUTES = ["state", "number", "action"]
# --evaluation_type -> the sections that the official script prints for it
SECTIONS = {"g": ["generative"], "de": ["existence"], "da": ["attribute", *ATTRIBUTES], "dr": ["relation"]}
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

    def existing(text: str) -> Path:
        if not Path(text).exists():
            raise argparse.ArgumentTypeError(f"{text} does not exist")
        return Path(text)

    model = parser.add_argument_group("model")
    add(model, "--model_path", "base model: hub id or folder", default="llava-hf/llava-v1.6-mistral-7b-hf")
    add(model, "--lora_path", "adapter: hub id or folder")
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
    add(data, "--query_file", "queries: AMBER's data/query/query_all.json, or a file of POPE or RePOPE", type=existing)
    add(data, "--image_dir", "folder of the pictures", type=existing)
    add(data, "--output_file", "file for the answers", type=Path, default=Path("results.json"))
    for name, file in AMBER_FILES.items():
        add(data, f"--{name}_file", f"AMBER's {file} (default: beside the query file, or one folder up)", type=existing)
    kinds = "g captions, d yes/no questions (de existence, da attribute, dr relation), a all"
    add(data, "--evaluation_type", kinds, default="a", choices=list(SECTIONS))
    add(data, "--limit", "only the first N pictures, with all their questions", type=count)
    steps = data.add_mutually_exclusive_group()
    add(steps, "--skip_inference", "score the answers in --output_file", action="store_true")
    add(steps, "--skip_evaluation", "only answer", action="store_true")
    add(steps, "--write_pairs", "only write pairs of the best and worst of --verify candidates to this file", type=Path)
    costs = "what an object that is not there costs a candidate, where one that is there earns 1"
    add(data, "--denied_costs", costs, type=float, default=2.0)
    add(data, "--questions", "for --write_pairs: questions, one a line, which the pictures take in turn", type=existing)

    scoring = parser.add_argument_group("scoring")
    others = scoring.add_mutually_exclusive_group()
    add(others, "--compare_base", "answer with the adapter off too, and compare", action="store_true")
    add(others, "--baseline_file", "answers of an earlier run to compare with", type=existing)
    add(scoring, "--spacy_model", "word vectors that decide which words are alike", default="en_core_web_lg")
    add(scoring, "--similarity_table", "read this table of alike words, or write it if there is none", type=Path)
    nouns = "how nouns are found: in AMBER's way, or looked up, which needs no NLTK and is not official"
    add(scoring, "--nouns", nouns, default="nltk", choices=["nltk", "vocabulary"])

    args = parser.parse_args(argv)
    if args.test_mode:
        amber = MINIATURE / "amber"
        parser.set_defaults(model_path=str(MINIATURE / "model"), relation_file=amber / "relation.json")
        if args.spacy_model == parser.get_default("spacy_model"):
            parser.set_defaults(similarity_table=amber / "similarity.json")
        if not args.write_pairs:  # nobody should train on the benchmark's pictures
            parser.set_defaults(query_file=amber / "query" / "query_all.json", image_dir=amber / "image")
        args = parser.parse_args(argv)
    folder = (args.query_file or Path("-")).absolute().parent
    for name, file in AMBER_FILES.items():
        near = folder / file if (folder / file).exists() else folder.parent / file
        setattr(args, f"{name}_file", getattr(args, f"{name}_file") or near)
    pairs, alone, rank = args.write_pairs, os.environ.get("WORLD_SIZE", "1") == "1", os.environ.get("RANK", "0")
    unmerged = args.lora_path or args.verify > 1 or args.load_4bit or args.load_8bit or not alone
    words = args.nouns == "nltk" or args.relation_file.exists()
    no_vllm = "takes a merged or quantized model, and no --lora_path, --verify, --load_4bit, --load_8bit or torchrun"
    faults = {
        "--query_file is needed": not args.query_file and not pairs,
        "--image_dir is needed to answer": not args.image_dir and not args.skip_inference,
        "scores.json is where the scores go; give the answers another name": args.output_file.name == "scores.json",
        "--skip_inference scores a whole file; leave --limit out": args.skip_inference and args.limit,
        "--compare_base needs --lora_path": args.compare_base and not args.lora_path and not args.skip_inference,
        "--clip_model is what --verify checks with; give --verify 4 too": args.clip_model and args.verify == 1,
        "--write_pairs compares candidates; give --verify 12 too": pairs and args.verify == 1,
        "--write_pairs takes neither --compare_base nor --clip_model": pairs and (args.compare_base or args.clip_model),
        "--nouns vocabulary needs the words to look up; give --relation_file": pairs and not words,
        f"--backend vllm {no_vllm}": args.backend == "vllm" and unmerged,
        f"RANK is {rank} without WORLD_SIZE; unset it, or use torchrun": alone and rank != "0",
    }
    for message, found in faults.items():
        if found:
            parser.error(message)
    if pairs:
        args.output_file, args.skip_evaluation = pairs, True
    if args.compare_base:
        args.baseline_file = args.output_file.with_stem(f"{args.output_file.stem}_base")
    args.batch_size = args.batch_size or (64 if args.backend == "vllm" else 8)
    return args


if __name__ == "__main__":
    parse_args()  # answers --help and refuses wrong flags before the heavy imports

import base64
import fcntl
import hashlib
import inspect
import io
import json
import logging
import random
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial, reduce, wraps
from itertools import chain, combinations, permutations
from operator import sub
from typing import NoReturn

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import jinja2
import numpy as np
import torch
from huggingface_hub import snapshot_download
from matplotlib.figure import Figure
from peft import LoraConfig
from PIL import Image, ImageOps
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

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
def write_whole(path: Path, content: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content, "utf-8", "replace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


# Copied from llava_orpo_training.build_prompt
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


# Copied from llava_orpo_training.complete_original
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


# Copied from llava_orpo_training.allow_cache_position
def allow_cache_position(model):
    """Let callers pass `cache_position`, as transformers 4.38 to 4.57 do, to a model whose forward does not know it."""
    forward = model.forward
    if not {"cache_position", "kwargs"} & inspect.signature(forward).parameters.keys():
        model.forward = wraps(forward)(lambda *args, cache_position=None, **kwargs: forward(*args, **kwargs))
    return model


# Copied from llava_orpo_training.ADAPTER_KEYS
ADAPTER_KEYS = {
    r"^(base_model\.model\.)+": "",
    **ORIGINAL_KEYS,
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^(vision_tower\.|multi_modal_projector\.|language_model\.|image_newline)": r"model.\1",
    r"^model\.vision_tower\.vision_model\.": "model.vision_tower.",
}


# Copied from llava_orpo_training.rename_key
def rename_key(key: str) -> str:
    """Return today's name for a layer or weight of an adapter or a checkpoint."""
    for pattern, replacement in ADAPTER_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


# Copied from llava_orpo_training.read_adapter
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


# Copied from llava_orpo_training.load_adapter
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


# Copied from llava_orpo_training.probe_logits
@torch.no_grad()
def probe_logits(model, processor, adapter: bool = True) -> torch.Tensor:
    """Return the logits of a fixed prompt with a picture, (its last 16 tokens, vocabulary), with the adapter on or off."""
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pixels = processor.image_processor(image, return_tensors="pt").to(model.device, model.dtype)
    ids = torch.tensor([build_prompt(processor, "Is there a cup?", image.size)], device=model.device)
    with nullcontext() if adapter else model.disable_adapter():
        return model.eval()(input_ids=ids, **pixels, logits_to_keep=16).logits[0].float()


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
        ids, new, positions = padded.to(self.core.device).unbind(-1)
        self.owners = new if self.owners is None else torch.cat([self.owners, new], dim=1)
        seen = (self.owners[:, None, :] == 0) | (self.owners[:, None, :] == new[:, :, None])
        inputs["attention_mask"] = seen.tril(seen.shape[2] - seen.shape[1])[:, None]
        inputs |= {"position_ids": positions.clamp(0), "past_key_values": self.cache, "use_cache": True}
        output = self.core.model(ids.clamp(0), **inputs)
        self.cache = output.past_key_values
        last = {}  # (picture, question) -> where its last token is in the batch
        for number, (picture, row) in enumerate(rows.items()):
            last |= {(picture, owner): (number, column) for column, (_, owner, _) in enumerate(row)}
        index = torch.tensor([last[branch.picture, branch.question] for branch in self.branches]).unbind(1)
        self.logits = self.core.lm_head(output.last_hidden_state[index])

    def add_tokens(self) -> None:
        """Put the last token of every branch through the model. Pictures without branches leave the batch."""
        rows = defaultdict(list)
        for branch in self.branches:
            position = branch.length + len(branch.tokens) - 1
            rows[branch.picture].append((branch.tokens[-1], branch.question, position))
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
    from vllm import LLM, SamplingParams

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's own choice is half of the memory
    quick = {} if torch.cuda.is_available() else {"enforce_eager": True, "skip_mm_profiling": True}  # to start quickly
    engine = LLM(model=model_path, enable_prefix_caching=True, limit_mm_per_prompt={"image": 1}, **quick)
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)

    def answer(images: list, pixels, questions: list[list[str]]) -> Iterator:
        places, prompts = [], []
        for picture, asked in enumerate(questions):
            for number, question in enumerate(asked):
                ids = build_prompt(processor, question, images[picture].size)
                first = ids.index(processor.image_token_id)
                ids = ids[: first + 1] + [token for token in ids[first:] if token != processor.image_token_id]
                prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": images[picture]}})
                places.append((picture, number))
        for place, output in zip(places, engine.generate(prompts, greedy, use_tqdm=False), strict=True):
            yield *place, output.outputs[0].text.strip(), output.outputs[0].finish_reason == "stop"

    return answer


# ---------------------------------------------------------------------------- checked answers (--verify)

VERIFY_TEMPERATURE = 0.7  # at which --verify draws candidates beside the greedy answer
PAIR_TEMPERATURE = 0.9  # at which --write_pairs draws all candidates


def load_clip(model_path: str, device) -> Callable[[Image.Image, list[str]], list[float]]:
    """Load a CLIP checkpoint in safetensors; return a function from a picture and texts to the cosine similarity of the
    picture and each text, of which CLIP reads the first 77 tokens."""
    from transformers import AutoConfig, AutoProcessor, CLIPModel

    try:
        kind = AutoConfig.from_pretrained(model_path, trust_remote_code=False).model_type
        if kind != "clip":
            stop(f"--clip_model {model_path} has the model type {kind}, not clip.")
        processor = AutoProcessor.from_pretrained(model_path, backend="pil", trust_remote_code=False)
        model = CLIPModel.from_pretrained(model_path, use_safetensors=True).to(device).eval()
    except Exception as error:
        stop(f"--clip_model {model_path} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}).")

    @torch.inference_mode()
    def compare(image: Image.Image, texts: list[str]) -> list[float]:
        inputs = processor(images=image, text=texts, return_tensors="pt", padding=True, truncation=True)
        output = model(**inputs.to(device))
        return (output.text_embeds @ output.image_embeds[0]).tolist()  # both have length 1

    return compare


@torch.inference_mode()
def confirm_objects(model, processor, images: list, pixels, words: list[list[str]]) -> list[dict[str, float]]:
    """Return, for each picture, {word: probability} of the model's own answer Yes to "Is there a … in this image?".

    It is that of Yes among Yes and No in any spelling that is one token. All words about a picture take one forward pass.
    """
    if not any(words):
        return [{} for _ in words]
    asked = "Is there {} {} in this image?"
    questions = [[asked.format("an" if word[0] in "aeiou" else "a", word) for word in part] for part in words]
    batch = Batch(model, processor, images, pixels, questions)
    chances = batch.logits.float().softmax(-1)
    said = {number: token.strip("▁ ").lower() for token, number in processor.tokenizer.get_vocab().items()}
    yes, no = (chances[:, [number for number in said if said[number] == word]].sum(-1) for word in ("yes", "no"))
    shares = iter((yes / (yes + no).clamp(min=1e-30)).tolist())  # in the order of the questions
    return [{word: next(shares) for word in part} for part in words]


def check_answers(
    model, processor, images, pixels, questions, max_new_tokens, *, count, find, choose, greedy=True, confirm=True
) -> Iterator:
    """Answer as answer_questions does, but with what `choose` makes of `count` candidates for each answer.

    If `greedy`, the first candidate is the greedy answer, which stands if it names no object, and the others are drawn.
    Otherwise all are drawn, and those cut off at `max_new_tokens` are left out. `choose` gets the image, the candidates,
    [[answer, complete], …], and if `confirm` what confirm_objects says of the objects that `find` finds in them.
    """
    shown = model, processor, images, pixels
    found = {(picture, number): [] for picture, part in enumerate(questions) for number in range(len(part))}
    if greedy:
        for picture, number, *answer in answer_questions(*shown, questions, max_new_tokens):
            found[picture, number].append(answer)
            if not find(answer[0]):  # such as "Yes"
                yield picture, number, *found.pop((picture, number))[0]
    # for each picture, the question to which each drawn answer belongs
    places = [[key for key in found if key[0] == i for _ in range(count - greedy)] for i in range(len(images))]
    asked = [[questions[picture][number] for picture, number in part] for part in places]
    temperature = VERIFY_TEMPERATURE if greedy else PAIR_TEMPERATURE
    for picture, place, *answer in answer_questions(*shown, asked, max_new_tokens, temperature):
        if greedy or answer[1]:
            found[places[picture][place]].append(answer)
    named = [set() for _ in images]
    for (picture, _), answers in found.items():
        named[picture] |= {word for text, _ in answers for _, word in find(text)}
    confirmed = confirm_objects(*shown, [sorted(words) if confirm else [] for words in named])
    for (picture, number), answers in found.items():
        yield picture, number, *choose(images[picture], answers, confirmed[picture])


def keep_best(image, answers: list, confirmed: dict[str, float], *, find: Callable, clip: Callable | None) -> list:
    """Return the candidate that is closest to the image by `clip`, or without it the one with the fewest objects that the
    model denies, and then the most that it confirms; the first of equals."""
    if clip:
        worth = clip(image, [text for text, _ in answers])
    else:
        chances = [[confirmed[word] for word in {word for _, word in find(text)}] for text, _ in answers]
        worth = [(-sum(yes <= 0.5 for yes in part), sum(yes > 0.5 for yes in part)) for part in chances]
    return answers[worth.index(max(worth))]


# ---------------------------------------------------------------------------- pairs of its own answers (--write_pairs)

LENGTH_COSTS = 0.15  # what it costs a pair that one of its answers names an object more than the other
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def ask_folder(image_dir: Path, questions_file: Path | None) -> dict[int, dict]:
    """Return {id: question} as read_questions does, one for each picture of a folder; those of the file take turns."""
    text = questions_file.read_text(encoding="utf-8") if questions_file else "Describe this image."
    questions = [line.strip() for line in text.splitlines() if line.strip()] or stop(f"{questions_file} is empty.")
    names = sorted(str(path.relative_to(image_dir)) for path in image_dir.rglob("*") if path.suffix.lower() in PICTURES)
    if not names:
        stop(f"--image_dir {image_dir} has no pictures ({', '.join(PICTURES)}).")
    asked = [{"id": i, "image": name, "query": questions[i % len(questions)]} for i, name in enumerate(names)]
    return {query["id"]: query | {"sections": ["generative"]} for query in asked}


def make_pair(image, answers: list, confirmed: dict[str, float], *, find: Callable, denied_costs: float) -> tuple:
    """Return the two candidates that differ most in what they are worth, with what was found out about their objects, or
    None if they do not differ by one object; and True, because nothing of them is cut off.

    Two witnesses tell how likely it is that an object is there: `confirmed`, the probability of the model's Yes when it is
    asked, and the share of the candidates that name the object. Their odds are multiplied; benchmarks/README.md has the errors
    of both. An object counts once in a candidate: it earns 1 if it is there, and costs `denied_costs` if not. A pair whose
    candidates name equally many is preferred, because from shorter chosen answers the model learns to say less.
    """
    texts, nouns = [text for text, _ in answers], [find(text) for text, _ in answers]
    objects = [sorted({word for _, word in part}) for part in nouns]
    known, value = {}, {}
    for word in sorted(set(chain(*objects))):
        yes, named_by = confirmed[word], sum(word in part for part in objects)
        share = (named_by + 0.5) / (len(texts) + 1)
        belief = yes * share / (yes * share + (1 - yes) * (1 - share))
        known[word] = {"yes": yes, "named_by": named_by, "belief": belief}
        value[word] = belief - denied_costs * (1 - belief)
    worth = [sum(value[word] for word in part) for part in objects]
    doubted = [[written for written, word in part if known[word]["belief"] <= 0.5] for part in nouns]
    gains = {
        (i, j): worth[i] - worth[j] - LENGTH_COSTS * abs(len(nouns[i]) - len(nouns[j]))
        for i, j in permutations(range(len(texts)), 2)
    }
    best, worst = max(gains, key=gains.get, default=(0, 0))
    if len(texts) < 2 or worth[best] - worth[worst] < 1:
        return None, True
    pair = {"chosen": texts[best], "rejected": texts[worst], "candidates": len(texts)}
    pair |= {"worth": {"chosen": worth[best], "rejected": worth[worst]}, "objects": known}
    return pair | {"doubted": {"chosen": doubted[best], "rejected": doubted[worst]}}, True


def write_pairs(output_file: Path, queries: list[dict], answers: dict[int, dict], image_dir: Path) -> None:
    """Write the pairs as parquet in RLAIF-V's columns, with the pictures' bytes and a column of what was asked and answered
    about each object (JSON), and beside it a page of those that differ most."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def make_row(query: dict, pair: dict) -> dict:
        row = {"ds_name": "own answers", "origin_dataset": image_dir.absolute().name, "question": query["query"]}
        row |= {"chosen": pair["chosen"], "rejected": pair["rejected"], "idx": str(query["id"])}
        row |= {"image_path": query["image"], "origin_split": json.dumps({"type": "self_alignment"})}
        row["checks"] = json.dumps({name: pair[name] for name in ("candidates", "worth", "objects")})
        row["image"] = {"bytes": find_picture(image_dir, query["image"]).read_bytes(), "path": query["image"]}
        return row

    names = "ds_name question chosen rejected origin_dataset origin_split idx image_path checks".split()
    columns = {name: datasets.Value("string") for name in names} | {"image": datasets.Image()}
    schema = datasets.Features(columns).arrow_schema
    made = [(query, pair) for query in queries if (pair := answers.get(query["id"], {}).get("response"))]
    partial_file = output_file.with_name(f"{output_file.name}.{os.getpid()}.partial")
    with parquet.ParquetWriter(partial_file, schema) as writer:
        for start in range(0, len(made), 100):  # pictures are in memory a hundred at a time
            rows = [make_row(*part) for part in made[start : start + 100]]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    os.replace(partial_file, output_file)
    sides = ("chosen", "rejected")
    captions = [{s: query | {"response": pair[s], "wrong": pair["doubted"][s]} for s in sides} for query, pair in made]
    page = output_file.with_suffix(".html")
    write_gallery(captions, image_dir, page, "Objects that the model's own answers make unlikely are marked.")
    asked = sum(query["id"] in answers for query in queries)
    console.print(f"{len(made):,} pairs of {asked:,} questions in {output_file}; look at {page}", markup=False)


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


def digest_checkpoint(path: str | Path) -> str:
    """Return a checkpoint's identity: a hub id's commit, or SHA-256 over a folder's JSON, tokenizer and weight files."""
    if not Path(path).is_dir():
        return Path(snapshot_download(path, allow_patterns="*.json")).name
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.suffix in (".json", ".model", ".safetensors"):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()[:16]


def describe_run(args, queries: list[dict], processor) -> dict:
    """Return the settings on which answers depend, the adapter apart."""

    def digest(value) -> str:
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

    names = ("max_new_tokens", "load_4bit", "load_8bit", "backend", "device", "verify", "clip_model")
    return {name: getattr(args, name) for name in names} | {
        "queries": digest([[query["id"], query["image"], query["query"]] for query in queries]),
        "prompt": digest(build_prompt(processor, "Is it?", (64, 64))),
        "nouns": args.nouns if args.verify > 1 else None,
        "pairs": bool(args.write_pairs),
        "denied_costs": args.denied_costs if args.write_pairs else None,
        "image_dir": os.path.abspath(args.image_dir),
        "model": digest_checkpoint(args.model_path),
    }


def read_journals(output_file: Path, settings: dict) -> dict[int, dict]:
    """Return the answers of an earlier, unfinished run by query id. Stops if they were given under other `settings`, with
    which each journal begins. Damaged lines are left out, so that their questions are asked again."""
    folder, begin = output_file.parent, f"{output_file.name}.journal-"
    journals = sorted(path for path in folder.iterdir() if path.name.startswith(begin))
    if output_file.exists() and not journals:
        stop(f"{output_file} exists without a journal; score it with --skip_inference or name another --output_file.")
    answers = {}
    for path in journals:
        rows = []
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
        before = rows[0].get("settings", {}) if rows else settings
        changed = [f"{k} was {before.get(k)}, is {now}" for k, now in settings.items() if before.get(k) != now]
        if changed:
            stop(f"{path} is of another run ({'; '.join(changed)}); delete it, or name another --output_file.")
        answers |= {row["id"]: row for row in rows if "id" in row}
    return answers


def fill_journal(path: Path, settings: dict, loader, answers: dict, answer: Callable) -> list[dict]:
    """Answer the opened groups of the loader, each answer into the journal as it arrives; return the failures."""
    failures = []
    with path.open("a") as journal:
        with suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stop(f"another run is writing {path}; wait for it, or name another --output_file.")
        print("\n" * bool(journal.tell()) + json.dumps({"settings": settings}), file=journal)  # ends a half line
        for good, images, pixels, failed in tqdm(loader, path.name.split(".")[0], disable=not MAIN_PROCESS):
            failures += failed
            questions = [[query["query"] for query in asked] for asked in good]
            for picture, number, text, complete in answer(images, pixels, questions) if good else ():
                query = good[picture][number]["id"]
                if query not in answers:
                    print(json.dumps({"id": query, "response": text, "complete": complete}), file=journal, flush=True)
    return failures


def make_answerer(args, processor) -> tuple:
    """Load what answers; return a function of (images, pixels, questions), and the model if it runs in this process."""
    if args.backend == "vllm":
        return start_vllm(args.model_path, processor, args.max_new_tokens), None
    function, checks, device = answer_questions, {}, args.device
    if args.verify > 1:  # before the model, whose loading takes minutes
        find = find_nouns(args.nouns, read_relation(args.relation_file)[1] if args.nouns == "vocabulary" else None)
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # under torchrun, a GPU a process
    model, processor = load_llava(args.model_path, args.lora_path, device, args.load_4bit, args.load_8bit)
    if args.verify > 1:
        clip = load_clip(args.clip_model, model.device) if args.clip_model else None
        choose = partial(keep_best, find=find, clip=clip)
        if args.write_pairs:
            choose = partial(make_pair, find=find, denied_costs=args.denied_costs)
        function, checks = check_answers, {"count": args.verify, "find": find, "choose": choose}
        checks |= {"greedy": not args.write_pairs, "confirm": not clip}
    return partial(function, model, processor, max_new_tokens=args.max_new_tokens, **checks), model


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
    opener = partial(open_group, image_dir=args.image_dir, processor=processor, context=context)
    mine = group_queries(queries, args.batch_size)[state.process_index :: state.num_processes]
    settings = describe_run(args, every_query, processor)
    runs = {args.baseline_file: settings | {"adapter": None}} if args.compare_base else {}
    adapter = digest_checkpoint(read_adapter(args.lora_path)[0]) if args.lora_path else None
    runs[args.output_file] = settings | {"adapter": adapter}
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    earlier = {file: read_journals(file, settings) for file, settings in runs.items()}
    state.wait_for_everyone()  # nobody writes before everybody has read
    failures, answer = {}, None
    for file, settings in runs.items():
        answers, failed = earlier[file], []
        todo = [group for group in mine if any(query["id"] not in answers for asked in group for query in asked)]
        if todo:
            if not answer:
                answer, model = make_answerer(args, processor)
            workers = 2 * torch.cuda.is_available()
            loader = torch.utils.data.DataLoader(todo, batch_size=None, num_workers=workers, collate_fn=opener)
            path = file.with_name(f"{file.name}.journal-{state.process_index}.jsonl")
            off = args.lora_path and not settings["adapter"]
            with model.disable_adapter() if off else nullcontext():
                failed = fill_journal(path, settings, loader, answers, answer)
        failures |= {failure["id"]: failure for failure in gather_object(failed)}
        if MAIN_PROCESS:
            write = partial(write_pairs, image_dir=args.image_dir) if args.write_pairs else write_answers
            write(file, every_query, read_journals(file, settings))
    return list(failures.values())


# ---------------------------------------------------------------------------- the benchmarks' files

# type of an annotation -> the sections of the scores that it counts in; other types are relations, as in the official script
TYPES = {"generative": ["generative"], "pope": ["pope"]}
TYPES["discriminative-hallucination"] = ["discriminative", "existence"]
TYPES |= {f"discriminative-attribute-{kind}": ["discriminative", "attribute", kind] for kind in ATTRIBUTES}


def read_rows(path: Path, keys: str) -> list[dict]:
    """Return the objects of a JSON list, or of a file with one JSON object a line. Stops unless each has the `keys`."""
    with suppress(ValueError, TypeError):
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        if rows and all(key in row for row in rows for key in keys.split()):
            return rows
    stop(f"{path} must hold objects with {', '.join(keys.split())}, in a JSON list or one a line.")


def read_questions(query_file: Path, annotation_file: Path | None) -> dict[int, dict]:
    """Return {id: question} of a benchmark, in the file's order: its `id`, `image` and `query`, the `sections` that it counts
    in, and what the annotation says, such as its `truth`. POPE's files hold their own annotations."""
    if "label" in read_rows(query_file, "image")[0]:
        names = {"id": "question_id", "image": "image", "query": "text", "truth": "label"}
        rows, notes = read_rows(query_file, " ".join(names.values())), []
        rows = [{name: row[key] for name, key in names.items()} | {"type": "pope"} for row in rows]
    else:
        rows = read_rows(query_file, "id image query")
        notes = read_rows(annotation_file, "id type truth") if annotation_file else []
    questions = {row["id"]: row for row in rows}
    if len(questions) < len(rows):  # as in files of POPE's that were put together
        stop(f"--query_file {query_file} has {len(rows):,} questions with {len(questions):,} ids; ids must differ.")
    for note in notes:
        questions.get(note["id"], {}).update(note)
    for number, question in questions.items():
        if notes and "type" not in question:
            stop(f"--annotation_file {annotation_file} has no entry for query {number}; it belongs to other queries.")
        question["sections"] = TYPES.get(question.get("type"), ["discriminative", "relation"])
    return questions


def select_queries(queries: list[dict], sections: list[str], limit: int | None) -> list[dict]:
    """Return the queries of the `sections` about the first `limit` pictures, in the file's order."""
    queries = [query for query in queries if not set(sections).isdisjoint(query["sections"])]
    if not queries:
        stop("--query_file has no query of this --evaluation_type.")
    images = set(list(dict.fromkeys(query["image"] for query in queries))[:limit])
    return [query for query in queries if query["image"] in images]


def read_relation(relation_file: Path) -> tuple[dict[str, list[str]], set[str]]:
    """Return AMBER's {word: words associated with it}, and all words in it, which are those that its scoring knows."""
    relation = json.loads(relation_file.read_text(encoding="utf-8"))
    return relation, set(relation).union(*relation.values())


# ---------------------------------------------------------------------------- scoring

# AMBER's yes/no sections, and the figures of a section that are 100 * part / whole, where an answer adds to part and whole
ANSWER_SECTIONS = SECTIONS["d"]
SHARES = [("generative", figure) for figure in ("chair", "cover", "hal", "cog")]
SHARES += [(section, figure) for section in ANSWER_SECTIONS for figure in ("accuracy", "precision", "recall")]
SHARES += [("pope", figure) for figure in ("accuracy", "precision", "recall", "f1", "yes")]
YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
# WordNet's files of things that a picture can show, and words in them that are about pictures
THINGS = {f"noun.{name}" for name in ("animal", "artifact", "body", "food", "object", "person", "plant", "substance")}
NO_OBJECTS = "image picture photo photograph scene view background foreground side top bottom line shape object".split()
# ending of a word -> that of its plural; the first that fits counts
PLURALS = {"man$": "men", "(?<=[lra])f$|(?<=i)fe$": "ves", "([^aeiou])y$": r"\1ies"}
PLURALS |= {"([sxzo]|[cs]h)$": r"\1es", "$": "s"}


def find_nouns(kind: str, vocabulary: set[str] | None) -> Callable[[str], list[tuple[str, str]]]:
    """Return a function from a text to its nouns in the vocabulary, in order: (as written, as in the vocabulary). `nltk` is
    AMBER's way: WordNet's lemmas of tokens tagged NN*; without a vocabulary, of things that can be seen. `vocabulary` looks
    words and regular plurals up, and knows no grammar."""
    if kind == "vocabulary":
        plurals = {"child": "children", "mouse": "mice", "goose": "geese"}
        for word in vocabulary - plurals.keys():
            ending = next(ending for ending in PLURALS if re.search(ending, word))
            plurals[word] = re.sub(ending, PLURALS[ending], word)
        forms = {plurals[word]: word for word in vocabulary} | {word: word for word in vocabulary}
        return lambda text: [(word, forms[word]) for word in re.findall(r"\w+(?:-\w+)*", text) if word in forms]
    import nltk

    # loading WordNet also maps it to other versions of itself, which takes seconds and which no lemma needs
    nltk.corpus.reader.wordnet.WordNetCorpusReader.map_wn = lambda *_: None
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize

    def is_thing(lemma: str) -> bool:
        senses = nltk.corpus.wordnet.synsets(lemma, "n")[:2]
        return lemma not in NO_OBJECTS and any(sense.lexname() in THINGS for sense in senses)

    def tag_nouns(text: str) -> list[tuple[str, str]]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        nouns = [(word, lemmatize(word)) for word, tag in tagged if tag.startswith("NN")]
        return [(word, lemma) for word, lemma in nouns if (lemma in vocabulary if vocabulary else is_thing(lemma))]

    try:
        tag_nouns("Two dogs.")
    except LookupError:
        data = "punkt_tab averaged_perceptron_tagger_eng wordnet"
        stop(f"--nouns nltk needs NLTK's data: python -m nltk.downloader {data} (or --nouns vocabulary, not official)")
    return tag_nouns


def load_similarity(path: Path | None, spacy_model: str, vocabulary: set[str]) -> tuple[dict[str, set[str]], str]:
    """Return {word: the words it counts as, itself included} and the name of the spaCy model that says so. The table of the
    words that are alike, for AMBER above a similarity of 0.8, is read from `path`, or made within seconds and written there."""
    if path and path.exists():
        table = json.loads(path.read_text(encoding="utf-8"))
        if not vocabulary <= set(table["words"]):
            stop(f"--similarity_table {path} lacks words of AMBER's; name a new file to have a table made there.")
    else:
        import spacy

        try:
            nlp = spacy.load(spacy_model)
        except OSError:
            stop(f"--spacy_model {spacy_model} is not installed: python -m spacy download {spacy_model}")
        name = f"{Path(spacy_model).name}-{nlp.meta['version']}"
        if not nlp.vocab.vectors.n_keys:
            console.print(f"{name} has no word vectors; its similarities are not those that AMBER means")
        words = sorted(vocabulary)
        warnings.filterwarnings("ignore", message=".*W008")  # words without a vector are similar to none
        pairs = [(a.text, b.text, a.similarity(b)) for a, b in combinations(map(nlp, words), 2)]
        similar = [[first, second, round(value, 4)] for first, second, value in pairs if value > 0.8]
        table = {"spacy_model": name, "threshold": 0.8, "words": words, "similar": similar}
        if path:
            write_whole(path, json.dumps(table))
    alike = {word: {word} for word in table["words"]}
    for first, second, _ in table["similar"]:
        alike[first].add(second)
        alike[second].add(first)
    return alike, table["spacy_model"]


def judge_caption(nouns: list[tuple[str, str]], note: dict, relation: dict, safe_words: set[str], alike: dict) -> tuple:
    """Score a caption's nouns by AMBER's rules; return what it adds to each figure, {figure: (part, whole)}, and the
    hallucinated nouns as written. For Hal, the part counts captions without any, which compute_figures subtracts from 100 %.

    A slot is an entry of the annotation's truth (what is there) or hallu (what people would imagine). A word associated with
    an entry stands for it. The first match gets the credit, associations before entries, as in AMBER's inference.py.
    """

    def first_slot(entries: list[str], wanted: set[str]) -> int | None:
        slots = [slot for slot, word in enumerate(entries) if not wanted.isdisjoint(relation[word])]
        slots += [slot for slot, word in enumerate(entries) if word in wanted]
        return slots[0] if slots else None

    truth, hallu = note["truth"], note["hallu"]
    covered, fallen, hallucinated = set(), set(), []
    for written, noun in nouns:
        if noun in safe_words:
            continue
        slot = first_slot(truth, {noun})
        if slot is None:
            fallen |= {first_slot(hallu, {noun}), first_slot(hallu, alike[noun])}
            slot = first_slot(truth, alike[noun])
        if slot is None:
            hallucinated.append(written)
        else:
            covered.add(slot)
    shares = {"chair": (len(hallucinated), len(nouns)), "cover": (len(covered), len(truth))}
    return shares | {"hal": (not hallucinated, 1), "cog": (len(fallen - {None}), len(hallu))}, hallucinated


def prepare_captions(args) -> tuple[Callable, str]:
    """Return a function that scores a caption, (text, annotation), as judge_caption does, and the spaCy model's name."""
    relation, vocabulary = read_relation(args.relation_file)
    safe_words = set(args.safe_words_file.read_text(encoding="utf-8").split("\n"))
    alike, spacy_model = load_similarity(args.similarity_table, args.spacy_model, vocabulary)
    find = find_nouns(args.nouns, vocabulary)
    return lambda text, note: judge_caption(find(text), note, relation, safe_words, alike), spacy_model


def judge_answer(response: str, truth: str, pope: bool) -> dict[str, tuple]:
    """Return what a yes/no answer adds to each figure, {figure: (part, whole)}. Positive is No for AMBER, and Yes for POPE.

    For AMBER, only `Yes` and `No`, to the letter, are answers. For POPE's evaluate.py, `No`, `not` or `no` among the words
    before the first full stop means no, and anything else yes.
    """
    if pope:
        said = "no" if {"No", "not", "no"} & set(response.split(".")[0].replace(",", "").split(" ")) else "yes"
    else:
        said = {"Yes": "yes", "No": "no"}.get(response)
    is_positive, says_positive = (word == ("yes" if pope else "no") for word in (truth, said))
    both = is_positive and says_positive
    shares = {"accuracy": (said == truth, 1), "precision": (both, says_positive), "recall": (both, is_positive)}
    return shares | ({"f1": (2 * both, says_positive + is_positive), "yes": (says_positive, 1)} if pope else {})


def read_answers(path: Path, questions: dict[int, dict], judge_text: Callable | None) -> dict[int, dict]:
    """Return {id: row} of an answer file: the question and the `response`, what it adds to SHARES, (SHARES, 2), and for a
    caption the `wrong` words, which `judge_text` finds. Answers to other questions are left out.

    An answer is counted as given (`strict`) and `normalised`: one that begins with yes or no, in any case and after any
    punctuation, is that answer.
    """
    found = {}
    for row in (row | questions[row["id"]] for row in read_rows(path, "id response") if row["id"] in questions):
        caption = row["sections"] == ["generative"]
        if row["response"] is None and not caption:
            row["response"] = ""  # a wrong answer
        if not isinstance(text := row["response"], str):
            stop(f"{path} has no text as its response to question {row['id']}.")
        if caption:
            shares, row["wrong"] = judge_text(text, row)
        begins = YES_NO.match(text)
        for rule, said in (("strict", text), ("normalised", begins[1].capitalize() if begins else text)):
            if not caption:
                shares = judge_answer(said, row["truth"], row["sections"] == ["pope"])
            row[rule] = np.array([shares.get(f, (0, 0)) if s in row["sections"] else (0, 0) for s, f in SHARES], int)
        found[row["id"]] = row
    return found or stop(f"{path} has no answer to a question of this benchmark.")


def compute_figures(sums: np.ndarray, official: bool) -> dict[str, dict]:
    """Return the figures of AMBER and POPE by section, in percent, from the sums of SHARES, (..., SHARES, 2).

    In AMBER's script, which `official` follows, every denominator starts at 0.001, and F1 is computed from figures rounded
    to one decimal. Otherwise nothing is rounded, 100 % of few answers does not differ from 100 % of many, and a section
    without answers has NaN.
    """
    figures = defaultdict(dict)
    shares = dict(zip(SHARES, np.moveaxis(sums, (-2, -1), (0, 1)), strict=True))

    def shown(value, section: str):
        if official:
            return round(float(value), 2 if section == "pope" else 1)
        asked = shares[section, "hal" if section == "generative" else "accuracy"][1]
        return np.where(asked > 0, value, np.nan)

    for (section, figure), (part, whole) in shares.items():
        start = (0.001 if official else 1e-9) * (3 if section == "attribute" else 1)  # the sum of three denominators
        value = part / (np.maximum(whole, 1) if section == "pope" else whole + start) * 100
        figures[section][figure] = shown(100 - value if figure == "hal" else value, section)
    for section in ANSWER_SECTIONS:
        p, r = figures[section]["precision"] / 100, figures[section]["recall"] / 100
        added = 0.001 if section == "existence" else 0.0001
        figures[section]["f1"] = shown(2 * p * r / (p + r + added) * 100, section)
    figures["amber"] = {"score": (100 - figures["generative"]["chair"] + figures["discriminative"]["f1"]) / 2}
    return figures


def sum_by_image(rows: list[dict]) -> np.ndarray:
    """Return the strict SHARES of each picture, (pictures, SHARES, 2)."""
    names, places = np.unique([row["image"] for row in rows], return_inverse=True)
    sums = np.zeros((len(names), len(SHARES), 2), int)
    np.add.at(sums, places, [row["strict"] for row in rows])
    return sums


def estimate(first: np.ndarray, second: np.ndarray | None, sections: list[str], draws: int = 4_000) -> dict:
    """Return 95 % bootstrap intervals by picture of every figure of `first`, (pictures, SHARES, 2), or of its difference to
    `second`, for those of the `sections` that have answers, and for the AMBER score if both its tasks have.

    For a difference the same pictures are drawn from both, and `p_value` is that of the paired permutation test: under the
    null hypothesis each picture's two answer sets are exchangeable (Efron and Tibshirani 1993, chapters 13 and 15).
    """
    sides = np.stack([first] if second is None else [first, second])  # (sides, pictures, SHARES, 2)

    def subtract(sums: np.ndarray) -> dict[str, dict]:
        """Return each figure of the first side's sums, (sides, ..., SHARES, 2), less that of the second, if there is one."""
        figures = compute_figures(sums, official=False)
        return {s: {f: value[0] - value[1:].sum(0) for f, value in figures[s].items()} for s in figures}

    rng, n = np.random.default_rng(0), len(first)
    drawn, swapped, result = [], [], defaultdict(dict)
    for _ in range(draws // 500):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=500).astype(float)
        drawn.append([np.tensordot(weights, side, 1) for side in sides])
        if second is not None:
            moved = np.tensordot(rng.integers(0, 2, size=(500, n)).astype(float), second - first, 1)
            swapped.append([first.sum(0) + moved, second.sum(0) - moved])
    figures, spread = subtract(sides.sum(1)), subtract(np.concatenate(drawn, 1))
    null = subtract(np.concatenate(swapped, 1)) if swapped else None
    for section in [*sections, *["amber"] * ({"generative", "discriminative"} <= set(sections))]:
        for figure, value in figures[section].items():
            if np.isnan(value):
                continue
            edges = np.nanpercentile(spread[section][figure], [2.5, 97.5])
            low, high, difference = (round(float(x), 2) + 0.0 for x in (*edges, value))  # + 0.0 makes 0.0 of -0.0
            result[section][figure] = {"low": low, "high": high}
            if null:
                extreme = int((np.abs(null[section][figure]) >= abs(value) - 1e-6).sum())
                p_value = round((1 + extreme) / (1 + draws), 4)
                result[section][figure] = {"difference": difference, "low": low, "high": high, "p_value": p_value}
    return result


def summarize(file: Path, rows: list[dict], sections: list[str]) -> dict:
    """Return what scores.json says of a file's answers, as read_answers returns them."""
    strict, plain = (compute_figures(np.sum([row[rule] for row in rows], 0), True) for rule in ("strict", "normalised"))
    intervals = estimate(sum_by_image(rows), None, sections)
    tasks = ["pope"] if sections == ["pope"] else ["generative", "discriminative"]
    texts = {task: [row["response"] for row in rows if task in row["sections"]] for task in tasks}
    neither = [YES_NO.match(text) is None for text in texts[tasks[-1]]]
    return {
        "file": file.name,
        "strict": {section: strict[section] for section in sections},
        "normalised": {section: plain[section] for section in sections if section in ANSWER_SECTIONS},
        "amber_score": round(strict["amber"]["score"], 2) if "amber" in intervals else None,
        "neither_yes_nor_no": round(100 * sum(neither) / len(neither), 2) if neither else None,
        "answers": {task: len(part) for task, part in texts.items()},
        "mean_words": {t: round(float(np.mean([len(text.split()) for text in p])), 1) for t, p in texts.items() if p},
        "intervals": intervals,
    }


# ---------------------------------------------------------------------------- report

TITLES = {"chair": "CHAIR ↓", "cover": "Cover ↑", "hal": "Hal ↓", "cog": "Cog ↓", "score": "AMBER score ↑"}
TITLES |= {figure: f"{figure} ↑" for figure in ("accuracy", "precision", "recall")}
TITLES |= {"f1": "F1 ↑", "yes": "answered Yes"}


def list_sides(scores: dict) -> tuple[list[str], list[dict]]:
    """Return the labels and the summaries of the one file of scores.json, or of the two that are compared."""
    comparison = scores.get("comparison")
    return (comparison["labels"], [comparison["base"], comparison["this"]]) if comparison else (["score"], [scores])


def print_scores(scores: dict) -> None:
    """Print the figures: one file's with their intervals, or base beside adapter with the difference and its interval."""
    title = "AMBER: official scoring"
    if "pope" in scores["strict"]:
        title = f"POPE, {scores['query_file']}: official scoring"
    elif scores["nouns"] != "nltk":
        title = "AMBER: nouns looked up without a tagger, so not the official scores"
    elif not scores["spacy_model"].startswith("en_core_web_lg"):
        title = "AMBER: official rules with another spaCy model than en_core_web_lg"
    labels, sides = list_sides(scores)
    this, comparison = sides[-1], scores.get("comparison")
    columns = [*labels, *(["difference (95 %)", "p"] if comparison else ["95 % interval"])]
    columns += ["normalised"] * bool(this["normalised"])
    table = Table("%", *map(escape, columns), title=escape(title), box=box.SIMPLE_HEAD, pad_edge=False)
    for section, figures in (comparison["difference"] if comparison else this["intervals"]).items():
        if section != "amber":
            table.add_row(f"[bold]{section}")
        digits = 2 if section in ("pope", "amber") else 1
        for figure, known in figures.items():
            values = [side["amber_score"] if section == "amber" else side["strict"][section][figure] for side in sides]
            cells = [f"{value:z.{digits}f}" for value in values]
            cells.append(f"{known['low']:z.1f} to {known['high']:z.1f}")
            if comparison:
                cells[-1] = f"{values[1] - values[0]:+z.{digits}f} ({cells[-1]})"
                cells.append("<.001" if known["p_value"] < 0.001 else f"{known['p_value']:.3f}".removeprefix("0"))
            if section in this["normalised"]:
                cells.append(f"{this['normalised'][section][figure]:.1f}")
            table.add_row(TITLES[figure] if section == "amber" else f"  {TITLES[figure]}", *cells)
    console.print(table)
    counts = ", ".join(f"{count:,} of {scores['asked'][task]:,} {task}" for task, count in this["answers"].items())
    lengths = " and ".join(map(str, this["mean_words"].values()))
    nouns = f"; nouns: {scores['nouns']}, alike by {scores['spacy_model']}" if scores["spacy_model"] else ""
    console.print(f"answers: {counts}, of {lengths} words on average{nouns}")
    if comparison and comparison["left_out"]:
        console.print(f"{comparison['left_out']:,} answers are in one file only, and are left out of the comparison")
    if neither := this["neither_yes_nor_no"]:
        console.print(f"{neither} % of the answers to yes/no questions begin with neither yes nor no")


def draw_scores(scores: dict, path: Path) -> None:
    """Draw the figures of scores.json as bars with 95 % intervals, base above this if there is a baseline."""
    labels, sides = list_sides(scores)
    sections = [name for name in sides[-1]["intervals"] if name not in (*ATTRIBUTES, "amber")]
    keys = [(section, name) for section in sections for name in sides[-1]["strict"][section]]
    places = np.arange(len(keys)) + 0.8 * np.array([sections.index(section) for section, _ in keys])
    height = 0.8 / len(sides)
    figure = Figure(figsize=(8, 1.2 + 0.36 * places[-1]), layout="constrained")
    axis = figure.subplots()
    style = {"height": 0.92 * height, "ecolor": "#444444", "capsize": 2}
    for number, (side, label) in enumerate(zip(sides, labels, strict=True)):
        rows = [[side["strict"][s][name], *side["intervals"][s][name].values()] for s, name in keys]
        values, low, high = np.array(rows).T
        middles = places + height * (number - (len(sides) - 1) / 2)
        ends = np.maximum([values - low, high - values], 0)
        colour = "#1b7837" if side is sides[-1] else "#9aa5b1"
        bars = axis.barh(middles, values, xerr=ends, color=colour, label=label, **style)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    for section in sections:
        first = [key[0] for key in keys].index(section)
        axis.text(107, places[first], section, fontsize=10, fontweight="bold", va="center")
    axis.set_yticks(places, [TITLES[name] for _, name in keys], fontsize=8)
    axis.set(xlim=(0, 100), ylim=(places[-1] + 0.7, -0.7), xlabel="%; thin lines are 95 % intervals")
    axis.spines[["top", "right"]].set_visible(False)
    if len(sides) > 1:
        figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


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


def write_gallery(captions: list[dict[str, dict]], image_dir: Path | None, path: Path, note: str) -> None:
    """Show the captions whose marked words changed most (with one label: that have most), under a note that says which words
    are marked. `captions` has {label: row} for each picture."""
    if not captions:
        return
    captions.sort(key=lambda rows: abs(reduce(sub, (len(row["wrong"]) for row in rows.values()))), reverse=True)
    pictures = []
    for rows in captions[:24]:
        address, texts = "", []
        for label, row in rows.items():
            words = "|".join(map(re.escape, sorted(set(row["wrong"])))) or "(?!)"  # which matches nothing
            texts.append((label, re.split(rf"\b({words})\b", row["response"]), len(row["wrong"])))
        with suppress(OSError, TypeError, ValueError):  # without its picture, a caption is shown all the same
            address = embed_picture(load_image(find_picture(image_dir, row["image"])))
        pictures.append({"image": row["image"], "address": address, "captions": texts})
    kind = "changed most" if len(captions[0]) > 1 else "hallucinate most"
    heading = f"The {len(pictures)} captions that {kind}, of {len(captions)}"
    write_whole(path, GALLERY.render(pictures=pictures, heading=heading, note=note))


def evaluate(args, questions: dict[int, dict], sections: list[str], prepared: tuple, failures: list[dict]) -> None:
    """Score the answers, beside the base's or an earlier run's if asked; write scores.json, chart and gallery; print the
    figures. `prepared` is of prepare_captions."""
    judge_text, spacy_model = prepared
    answers = read_answers(args.output_file, questions, judge_text)
    scores = summarize(args.output_file, list(answers.values()), sections) | {"query_file": args.query_file.name}
    asked = {task: sum(task in query["sections"] for query in questions.values()) for task in scores["answers"]}
    scores |= {"asked": asked, "spacy_model": spacy_model, "nouns": args.nouns, "failures": failures}
    shown = {args.output_file.stem: list(answers.values())}
    if args.baseline_file:
        earlier = read_answers(args.baseline_file, questions, judge_text)
        common = [number for number in earlier if number in answers]
        if not common:
            stop(f"{args.baseline_file} answers none of the queries that {args.output_file} answers.")
        first, second = ("base", "adapter") if args.compare_base else (args.baseline_file.stem, args.output_file.stem)
        first = f"earlier {first}" if first == second else first
        base, this = ([side[number] for number in common] for side in (earlier, answers))
        scores["comparison"] = {
            "left_out": len(earlier.keys() ^ answers.keys()),
            "labels": [first, second],
            "base": summarize(args.baseline_file, base, sections),
            "this": summarize(args.output_file, this, sections),
            "difference": estimate(sum_by_image(this), sum_by_image(base), sections),
        }
        shown = {first: base, second: this}
    folder = args.output_file.absolute().parent
    for name in ("scores.png", "gallery.html"):  # of an earlier run
        (folder / name).unlink(missing_ok=True)
    write_whole(folder / "scores.json", json.dumps(scores, indent=1))
    print_scores(scores)
    if scores["intervals"]:
        draw_scores(scores, folder / "scores.png")
    captions = [dict(zip(shown, rows, strict=True)) for rows in zip(*shown.values(), strict=True) if "wrong" in rows[0]]
    note = "Words for things that are not in the picture, by AMBER's annotation, are marked."
    write_gallery(captions, args.image_dir, folder / "gallery.html", note)
    console.print(f"the figures are in {folder / 'scores.json'}, and what was made of them is beside it", markup=False)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.query_file:
        annotated = not args.skip_evaluation or args.evaluation_type != "a"
        questions = read_questions(args.query_file, args.annotation_file if annotated else None)
    else:
        questions = ask_folder(args.image_dir, args.questions)
    queries = list(questions.values())
    pope = queries[0]["sections"] == ["pope"]
    sections = ["pope"] if pope else SECTIONS[args.evaluation_type]
    evaluating = MAIN_PROCESS and not args.skip_evaluation
    # before anything is answered, so that what is missing shows at once
    prepared = prepare_captions(args) if evaluating and not pope else (None, None)
    failures_file = args.output_file.with_name(f"{args.output_file.stem}_failures.json")
    if args.skip_inference:
        failures = json.loads(failures_file.read_text()) if failures_file.exists() else []
    else:
        selected = select_queries(queries, sections, args.limit)
        failures = answer_benchmark(args, queries, selected)
        evaluating = evaluating and len(failures) < len(selected)
    if not MAIN_PROCESS:
        return
    failures_file.unlink(missing_ok=True)
    if failures:
        write_whole(failures_file, json.dumps(failures, indent=1))
        text = f"{len(failures):,} queries could not be answered and are listed in {failures_file}; the first: "
        console.print(f"{text}{failures[0]['image']} {failures[0]['reason']}", markup=False)
    if evaluating:
        evaluate(args, questions, sections, prepared, failures)
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
        stop(str(error).splitlines()[0])
