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

    pairs = parser.add_argument_group("pairs")
    what = (
        "in place of scoring, write the best and worst of --verify candidates as preference pairs to this parquet file"
    )
    add(pairs, "--write_pairs", what, type=Path)
    turns = "file with one question per line, which take turns over the pictures (default: Describe this image.)"
    add(pairs, "--questions", turns, type=Path)

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
        if args.write_pairs:
            args.relation_file = args.relation_file or MINIATURE / "amber" / "relation.json"
        elif not (args.query_file or args.annotation_file):
            args.query_file = MINIATURE / "amber" / "query" / "query_all.json"
            if args.spacy_model == parser.get_default("spacy_model"):
                args.similarity_table = args.similarity_table or MINIATURE / "amber" / "similarity.json"
        if not args.write_pairs:
            args.image_dir = args.image_dir or MINIATURE / "amber" / "image"
    if args.write_pairs:
        args.output_file, args.skip_evaluation = args.write_pairs, True
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
    if args.write_pairs:
        words = args.nouns == "nltk" or args.query_file or args.relation_file
        yield not args.image_dir, "--write_pairs needs the pictures: give --image_dir"
        yield args.verify == 1, "--write_pairs compares candidates; give --verify 12 too"
        yield args.compare_base or args.clip_model, "--write_pairs takes neither --compare_base nor --clip_model"
        yield not words, "--nouns vocabulary needs the words to look up; give --relation_file"
    else:
        yield args.questions, "--questions goes with --write_pairs"
        yield (
            answering and not (args.query_file and args.image_dir),
            "--query_file and --image_dir are needed to answer",
        )
        yield not (args.query_file or args.annotation_file), "--query_file or --annotation_file is needed to score"
    yield answering and args.image_dir and not args.image_dir.is_dir(), f"--image_dir {args.image_dir} is no folder"
    yield out.is_dir(), f"--output_file {out} is a folder; name a file in it"
    yield out.name == "scores.json", "scores.json is where the scores go; give the answers another name"
    yield answering and args.compare_base and not args.lora_path, "--compare_base needs --lora_path"
    yield args.compare_base and args.baseline_file, "--compare_base and --baseline_file exclude each other; give one"
    yield args.baseline_file and not args.baseline_file.is_file(), f"--baseline_file {args.baseline_file} is no file"
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
from itertools import permutations
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


# ---------------------------------------------------------------------------- pairs of its own answers (--write_pairs)

PAIR_TEMPERATURE = 0.9  # at which the candidates of a pair are drawn
DENIED_COSTS = 2.0  # what an object that is not there costs, where one that is there earns 1
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


def pair_answers(model, processor, images, pixels, questions, max_new_tokens, *, candidates, find) -> Iterator:
    """Yield (picture, question, pair, True) for every question about every picture, where answer_questions yields answers;
    the pair is make_pair's. Candidates that were cut off at `max_new_tokens` are left out."""
    drawn = draw_candidates(model, processor, images, pixels, questions, candidates, max_new_tokens, PAIR_TEMPERATURE)
    texts = {key: [text for text, complete in answers if complete] for key, answers in drawn.items()}
    words = [set() for _ in images]
    for (picture, _), answers in texts.items():
        words[picture] |= {word for text in answers for _, word in find(text)}
    confirmed = confirm_objects(model, processor, images, pixels, [sorted(part) for part in words])
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
    sides = []
    for side in ("chosen", "rejected"):
        rows = [(query["image"], pair[side], pair["doubted"][side]) for query, pair in made]
        rows = [dict(zip(("image", "response", "wrong"), row, strict=True)) for row in rows]
        sides.append((side, None, [{"id": number, "kind": "generative", **row} for number, row in enumerate(rows)]))
    page = output_file.with_suffix(".html")
    write_gallery(sides, image_dir, page, "Objects that the model's own answers make unlikely are marked.")
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
    if args.write_pairs:
        answer = partial(pair_answers, model, processor, max_new_tokens=args.max_new_tokens)
        return partial(answer, candidates=args.verify, find=find), model
    clip = Clip(args.clip_model, model.device) if args.clip_model else None
    answer = partial(verify_answers, model, processor, max_new_tokens=args.max_new_tokens)
    return partial(answer, candidates=args.verify, find=find, clip=clip), model


def describe_run(args, queries: list[dict], processor) -> dict:
    """Return the settings on which answers depend, the adapter apart."""
    prompt = json.dumps(build_prompt(processor, "Is it?", (64, 64))).encode()
    names = ("max_new_tokens", "load_4bit", "load_8bit", "backend", "device", "verify", "clip_model")
    return {
        **{name: getattr(args, name) for name in names},
        "nouns": args.nouns if args.verify > 1 else None,
        "pairs": bool(args.write_pairs),
        "image_dir": os.path.abspath(args.image_dir),
        "model": digest_checkpoint(args.model_path),
        "prompt": hashlib.sha256(prompt).hexdigest()[:16],
        "queries": hashlib.sha256(json.dumps(queries).encode()).hexdigest()[:16],
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
    settings = describe_run(args, every_query, processor)
    write = partial(write_pairs, image_dir=args.image_dir) if args.write_pairs else write_answers
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
                write(output_file, every_query, read_journals(output_file, fingerprint))
    return list(failures.values())


def name_base_file(output_file: Path) -> Path:
    """Return where --compare_base puts the answers given with the adapter off."""
    return output_file.with_name(f"{output_file.stem}_base{output_file.suffix}")


# ---------------------------------------------------------------------------- the benchmarks' files


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        stop(f"{path} cannot be read: {error}.")


def read_queries(path: Path) -> tuple[list[dict], dict[int, dict] | None]:
    """Return a file's questions as {id, image, query}, and for a file of POPE's their annotations; None for AMBER's.

    AMBER's files are a JSON list; POPE's have one JSON object a line, with question_id, image, text and label.
    """
    notes = None
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        if "label" in rows[0]:
            notes = {row["question_id"]: {"type": "pope", "truth": row["label"]} for row in rows}
            rows = [{"id": row["question_id"], "image": row["image"], "query": row["text"]} for row in rows]
        queries = {row["id"]: {key: row[key] for key in ("id", "image", "query")} for row in rows}
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        stop(f"--query_file {path} holds neither AMBER's nor POPE's questions ({type(error).__name__}: {error}).")
    if len(queries) < len(rows):  # as in files of POPE's that were put together
        stop(f"--query_file {path} has {len(rows):,} questions with {len(queries):,} ids; ids must differ.")
    return list(queries.values()), notes


def select_queries(queries: list[dict], notes: dict | None, sections: list[str], limit: int | None) -> list[dict]:
    """Return the queries of the `sections` about the first `limit` pictures, in the file's order."""
    if notes is not None:
        unknown = [query["id"] for query in queries if query["id"] not in notes]
        if unknown:
            stop(f"--annotation_file has no entry for query {unknown[0]}; it belongs to other queries.")
        queries = [query for query in queries if KINDS.get(notes[query["id"]]["type"], "relation") in sections]
    if not queries:
        stop("--query_file has no query of this --evaluation_type.")
    images = set(list(dict.fromkeys(query["image"] for query in queries))[:limit])
    return [query for query in queries if query["image"] in images]


def find_file(args, flag: str, name: str) -> Path:
    """Return the file given by its flag, or the one that AMBER has beside the query file or one folder up."""
    given = getattr(args, flag)
    near = (args.query_file or args.annotation_file or given).absolute().parent
    places = [given] if given else [near / name, near.parent / name]
    path = next((path for path in places if path.is_file()), None)
    return path or stop(f"--{flag} is needed to score: AMBER's {name} is not at {' or '.join(map(str, places))}.")


def read_vocabulary(args) -> set[str]:
    """Return all words that AMBER's scoring knows."""
    relation = read_json(find_file(args, "relation_file", "relation.json"))
    return set(relation).union(*relation.values())


def read_answers(path: Path, notes: dict[int, dict]) -> list[dict]:
    """Return the rows of an answer file, {id, response}; to a yes/no question, null is a wrong answer."""
    rows = read_json(path)
    for row in rows or [None]:
        note = notes.get(row["id"]) if isinstance(row, dict) and "id" in row else None
        if note and note["type"] != "generative" and row.get("response", 0) is None:
            row["response"] = ""
        if not note or not isinstance(row.get("response"), str):
            stop(f"{path} must list answers to the annotated queries as {{id, response}}; it has {str(row)[:80]}.")
    return rows


# ---------------------------------------------------------------------------- scoring

# what one answer adds to the sums that all figures are made of; an AMBER question is positive if No is right, POPE's if Yes
CAPTION_COUNTS = ["captions", "clean", "named", "hallucinated", "present", "covered", "traps", "fallen"]
ANSWER_COUNTS = ["asked", "correct", "positive", "said positive", "true positive"]
QUESTION_KINDS = ["existence", "state", "number", "action", "relation"]
ATTRIBUTES = ["state", "number", "action"]
COUNTS = CAPTION_COUNTS + [f"{kind} {count}" for kind in [*QUESTION_KINDS, "pope"] for count in ANSWER_COUNTS]
# section of yes/no questions -> the kinds of question in it
SECTION_KINDS = {"discriminative": QUESTION_KINDS, "attribute": ATTRIBUTES}
SECTION_KINDS |= {kind: [kind] for kind in [*QUESTION_KINDS, "pope"]}
# type of an annotation -> kind of question; other types are relations, as in the official script
KINDS = {"generative": "generative", "pope": "pope", "discriminative-hallucination": "existence"}
KINDS |= {f"discriminative-attribute-{kind}": kind for kind in ATTRIBUTES}
YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
# WordNet's files of things that a picture can show, and words in them that are about pictures
THINGS = {f"noun.{name}" for name in ("animal", "artifact", "body", "food", "object", "person", "plant", "substance")}
NO_OBJECTS = "image picture photo photograph scene view background foreground side top bottom line shape object".split()


def find_nouns(kind: str, vocabulary: set[str] | None) -> Callable[[str], list[tuple[str, str]]]:
    """Return a function from a text to its nouns in the vocabulary, in order: (as written, as in the vocabulary).

    `nltk` is AMBER's way: WordNet's lemmas of tokens tagged NN*; without a vocabulary, of things that can be seen.
    `vocabulary` looks words and regular plurals up.
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
    except LookupError:
        data = "punkt_tab averaged_perceptron_tagger_eng wordnet"
        stop(f"--nouns nltk needs NLTK's data: python -m nltk.downloader {data} (or --nouns vocabulary, not official)")


def look_up_nouns(vocabulary: set[str]) -> Callable[[str], list[tuple[str, str]]]:
    """Return a function as find_nouns does, which knows the vocabulary's words and their plurals, and no grammar."""
    plurals = {"child": "children", "mouse": "mice", "goose": "geese"}
    endings = {r"man$": "men", r"(?<=[lra])f$|(?<=i)fe$": "ves", r"([^aeiou])y$": r"\1ies", r"([sxzo]|[cs]h)$": r"\1es"}
    for word in vocabulary - plurals.keys():
        ending = next((ending for ending in endings if re.search(ending, word)), None)
        plurals[word] = re.sub(ending, endings[ending], word) if ending else f"{word}s"
    forms = {plurals[word]: word for word in vocabulary} | {word: word for word in vocabulary}
    return lambda text: [(word, forms[word]) for word in re.findall(r"\w+(?:-\w+)*", text) if word in forms]


def load_similarity(path: Path | None, spacy_model: str, vocabulary: set[str]) -> tuple[dict[str, set[str]], str]:
    """Return {word: the words it counts as, itself included} and the name of the spaCy model that says so. The table is read
    from `path`, or made there if there is none; without a path, it is kept in the user's cache."""
    words = sorted(vocabulary)
    if not (path and path.exists()):
        meta = Path(spacy_model, "meta.json")
        try:
            local = meta.exists() and json.loads(meta.read_bytes())
            version = local["version"] if local else importlib.metadata.version(spacy_model)
        except importlib.metadata.PackageNotFoundError:
            stop(f"--spacy_model {spacy_model} is not installed: python -m spacy download {spacy_model}")
        name = f"{meta.parent.resolve().name}-{version}"
        key = str([name, local and meta.resolve(), words])
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_amber"
        path = path or cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not path.exists():  # AMBER's words are alike above a similarity of 0.8
        import spacy

        nlp = spacy.load(spacy_model)
        if not nlp.vocab.vectors.n_keys:
            console.print(f"{name} has no word vectors; its similarities are not those that AMBER means")
        run = [nlp(word) for word in words]
        with warnings.catch_warnings(action="ignore"):  # words without a vector are similar to none
            pairs = [(a.text, b.text, a.similarity(b)) for i, a in enumerate(run) for b in run[i + 1 :]]
        similar = [[a, b, round(value, 4)] for a, b, value in pairs if value > 0.8]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"spacy_model": name, "threshold": 0.8, "words": words, "similar": similar}))
        console.print(f"word similarities of {name} are in {path}")
    table = read_json(path)
    if not (isinstance(table, dict) and vocabulary <= set(table.get("words", []))):
        stop(f"--similarity_table {path} does not have AMBER's words; name a new file to have a table made there.")
    alike = {word: {word} for word in table["words"]}
    for first, second, _ in table["similar"]:
        alike[first].add(second)
        alike[second].add(first)
    return alike, table["spacy_model"]


def judge_caption(nouns: list[tuple[str, str]], note: dict, relation: dict, safe_words: set[str], alike: dict) -> tuple:
    """Score a caption's nouns by AMBER's rules; return its CAPTION_COUNTS and the hallucinated nouns as written.

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
    counts = [1, not hallucinated, len(nouns), len(hallucinated), len(truth), len(covered)]
    return [*counts, len(hallu), len(fallen - {None})], hallucinated


def judge_answer(response: str, truth: str, pope: bool) -> list[int]:
    """Return the ANSWER_COUNTS of a yes/no answer. For AMBER, only `Yes` and `No`, to the letter, are answers. For POPE's
    evaluate.py, `No`, `not` or `no` among the words before the first full stop means no, and anything else yes."""
    if pope:
        said = "no" if {"No", "not", "no"} & set(response.split(".")[0].replace(",", "").split(" ")) else "yes"
    else:
        said = {"Yes": "yes", "No": "no"}.get(response)
    positive = "yes" if pope else "no"
    return [1, said == truth, truth == positive, said == positive, said == truth == positive]


def count_answers(rows: list[dict], notes: dict, image_of: dict, judge_text: Callable | None) -> list[dict]:
    """Return the rows with the kind and picture of the question, the COUNTS of the answer as given (strict) and normalised,
    and the hallucinated words of captions, which `judge_text` scores. Normalised means that an answer which begins with yes
    or no, in any case and after any punctuation, is that answer."""
    for row in rows:
        note, text = notes[row["id"]], row["response"]
        kind = KINDS.get(note["type"], "relation")
        strict, normalised = counts = np.zeros((2, len(COUNTS)), dtype=np.int64)
        row |= {"kind": kind, "image": image_of.get(row["id"]), "strict": strict, "normalised": normalised}
        if kind == "generative":
            counts[:, : len(CAPTION_COUNTS)], row["wrong"] = judge_text(text, note)
        else:
            first, begins = COUNTS.index(f"{kind} asked"), YES_NO.match(text)
            for line, said in ((strict, text), (normalised, begins[1].capitalize() if begins else text)):
                line[first : first + len(ANSWER_COUNTS)] = judge_answer(said, note["truth"], kind == "pope")
    return rows


def compute_figures(sums: np.ndarray, official: bool) -> tuple[dict[str, dict], dict]:
    """Return the figures of AMBER and POPE by section, in percent, and the number of answers of each section. `sums` are
    those of COUNTS, of shape (COUNTS,) or (COUNTS, draws).

    In AMBER's script, which `official` follows, every denominator starts at 0.001, and F1 is computed from figures rounded
    to one decimal; otherwise nothing is rounded, and 100 % of few answers does not differ from 100 % of many.
    """
    start = 0.001 if official else 1e-9
    count = dict(zip(COUNTS, sums.tolist() if official else sums, strict=True))

    def shown(value, digits=1):
        return round(value, digits) if official else value

    def percent(part, whole, times=1):
        return shown(part / (whole + times * start) * 100)

    figures, asked = {}, {"generative": count["captions"]}
    figures["generative"] = {
        "chair": percent(count["hallucinated"], count["named"]),
        "cover": percent(count["covered"], count["present"]),
        "hal": shown(100 - count["clean"] / (count["captions"] + start) * 100),
        "cog": percent(count["fallen"], count["traps"]),
    }
    for section, kinds in SECTION_KINDS.items():
        n, correct, positive, said, true = (sum(count[f"{kind} {name}"] for kind in kinds) for name in ANSWER_COUNTS)
        asked[section] = n
        shares = {"accuracy": (correct, n), "precision": (true, said), "recall": (true, positive)}
        if section == "pope":
            shares |= {"f1": (2 * true, said + positive), "yes": (said, n)}
            figures[section] = {name: shown(100 * (a / np.maximum(b, 1)), 2) for name, (a, b) in shares.items()}
        else:
            times = 3 if section == "attribute" else 1  # the sum of three denominators
            found = figures[section] = {name: percent(*share, times) for name, share in shares.items()}
            p, r = found["precision"] / 100, found["recall"] / 100
            found["f1"] = shown(2 * p * r / (p + r + (0.001 if section == "existence" else 0.0001)) * 100)
    asked["amber"] = np.minimum(asked["generative"], asked["discriminative"])
    figures["amber"] = {"score": (100 - figures["generative"]["chair"] + figures["discriminative"]["f1"]) / 2}
    return figures, asked


def sum_by_image(rows: list[dict]) -> np.ndarray:
    """Return the strict COUNTS of each picture, (pictures, COUNTS); an answer to an unknown picture stands for itself."""
    names, places = np.unique([row["image"] or str(row["id"]) for row in rows], return_inverse=True)
    sums = np.zeros((len(names), len(COUNTS)), dtype=np.int64)
    np.add.at(sums, places, [row["strict"] for row in rows])
    return sums


def estimate(first: np.ndarray, second: np.ndarray | None, sections: list[str], draws: int = 4_000) -> dict:
    """Return 95 % bootstrap intervals by picture of every figure of `first`, (pictures, COUNTS), or of its difference to
    `second`, for those of the `sections` that have answers, and for the AMBER score if both its tasks have.

    For a difference the same pictures are drawn from both, and `p_value` is that of the paired permutation test: under the
    null hypothesis each picture's two answer sets are exchangeable (Efron and Tibshirani 1993, chapters 13 and 15).
    """
    rng = np.random.default_rng(0)
    n = len(first)
    if {"generative", "discriminative"} <= set(sections):
        sections = [*sections, "amber"]

    def figures(side: np.ndarray, *other: np.ndarray) -> dict:
        computed, asked = compute_figures(side.T, official=False)
        # a draw that has no answer of a section says nothing about it
        values = {(s, f): np.where(asked[s] > 0, value, np.nan) for s in sections for f, value in computed[s].items()}
        minus = figures(*other) if other else dict.fromkeys(values, 0)
        return {key: value - minus[key] for key, value in values.items()}

    sides = [first] if second is None else [first, second]
    drawn, swapped = [], []
    for size in [500] * (draws // 500):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(float)
        drawn.append(figures(*(weights @ side for side in sides)))
        if second is not None:
            moved = rng.integers(0, 2, size=(size, n)).astype(float) @ (second - first)
            swapped.append(figures(first.sum(0) + moved, second.sum(0) - moved))
    result: dict = {}
    for (section, figure), (value,) in figures(*(side.sum(0)[None] for side in sides)).items():
        if np.isnan(value):
            continue
        edges = np.nanpercentile(np.concatenate([part[section, figure] for part in drawn]), [2.5, 97.5])
        low, high, difference = (round(float(x), 2) + 0.0 for x in (*edges, value))  # + 0.0 makes 0.0 of -0.0
        entry = {"low": low, "high": high}
        if second is not None:
            null = np.abs(np.concatenate([part[section, figure] for part in swapped]))
            extreme = int((null >= abs(value) - 1e-6).sum())
            entry = {"difference": difference, **entry, "p_value": round((1 + extreme) / (1 + draws), 4)}
        result.setdefault(section, {})[figure] = entry
    return result


def summarize(file: str, rows: list[dict], sections: list[str]) -> dict:
    """Return what scores.json says of a file's answers, as count_answers returns them."""
    sums = [np.sum([row[counts] for row in rows], axis=0) for counts in ("strict", "normalised")]
    official, plain = (compute_figures(counts, official=True)[0] for counts in sums)
    intervals = estimate(sum_by_image(rows), None, sections)
    texts: dict = {"pope": []} if sections == ["pope"] else {"generative": [], "discriminative": []}
    for row in rows:
        texts[row["kind"] if row["kind"] in texts else "discriminative"].append(row["response"])
    closed = [text for task, part in texts.items() if task != "generative" for text in part]
    neither = sum(YES_NO.match(text) is None for text in closed)
    lengths = {task: [len(text.split()) for text in part] for task, part in texts.items() if part}
    return {
        "file": file,
        "strict": {section: official[section] for section in sections},
        "normalised": {section: plain[section] for section in sections if section not in ("generative", "pope")},
        "amber_score": round(official["amber"]["score"], 2) if "amber" in intervals else None,
        "neither_yes_nor_no": round(100 * neither / len(closed), 2) if closed else None,
        "answers": {task: len(part) for task, part in texts.items()},
        "mean_words": {task: round(float(np.mean(part)), 1) for task, part in lengths.items()},
        "intervals": intervals,
    }


def compare(sides: list[tuple[str, Path, list[dict]]], sections: list[str]) -> dict:
    """Return the scores of two files' (label, path, rows) on the queries that both answer, and their differences."""
    (first, base_file, base), (second, this_file, this) = sides
    ids = [{row["id"] for row in rows} for rows in (base, this)]
    if not ids[0] & ids[1]:
        stop(f"{base_file} answers none of the queries that {this_file} answers.")
    base, this = ([row for row in rows if row["id"] in ids[0] & ids[1]] for rows in (base, this))
    return {
        "left_out": len(ids[0] ^ ids[1]),
        "labels": [first, second],
        "base": summarize(base_file.name, base, sections),
        "this": summarize(this_file.name, this, sections),
        "difference": estimate(sum_by_image(this), sum_by_image(base), sections),
    }


def prepare_captions(args) -> tuple[Callable, str]:
    """Return a function that scores a caption, (text, annotation), as judge_caption does, and the spaCy model's name."""
    relation = read_json(find_file(args, "relation_file", "relation.json"))
    safe_words = find_file(args, "safe_words_file", "safe_words.txt").read_text(encoding="utf-8")
    safe_words = set(safe_words.split("\n"))
    vocabulary = read_vocabulary(args)
    alike, spacy_model = load_similarity(args.similarity_table, args.spacy_model, vocabulary)
    find = find_nouns(args.nouns, vocabulary)
    return lambda text, note: judge_caption(find(text), note, relation, safe_words, alike), spacy_model


# ---------------------------------------------------------------------------- report

TITLES = {"chair": "CHAIR ↓", "cover": "Cover ↑", "hal": "Hal ↓", "cog": "Cog ↓", "accuracy": "accuracy ↑",
          "precision": "precision ↑", "recall": "recall ↑", "f1": "F1 ↑", "yes": "answered Yes", "score": "AMBER score ↑"}  # fmt: skip


def print_scores(scores: dict) -> None:
    """Print the figures: one file's with their intervals, or base beside adapter with the difference and its interval."""
    title = "AMBER: official scoring"
    if "pope" in scores["strict"]:
        title = f"POPE, {scores['query_file']}: official scoring"
    elif scores["nouns"] != "nltk":
        title = "AMBER: nouns looked up without a tagger, so not the official scores"
    elif not scores["spacy_model"].startswith("en_core_web_lg"):
        title = "AMBER: official rules with another spaCy model than en_core_web_lg"
    comparison = scores.get("comparison")
    sides = [comparison["base"], comparison["this"]] if comparison else [scores]
    columns = [*comparison["labels"], "difference (95 %)", "p"] if comparison else ["score", "95 % interval"]
    columns += ["normalised"] * bool(sides[-1]["normalised"])
    table = Table("%", *map(escape, columns), title=escape(title), box=box.SIMPLE_HEAD, pad_edge=False)
    for section, figures in (comparison["difference"] if comparison else scores["intervals"]).items():
        if section != "amber":
            table.add_row(f"[bold]{section}")
        digits = 2 if section in ("pope", "amber") else 1
        for figure, known in figures.items():
            values = [s["amber_score"] if section == "amber" else s["strict"][section][figure] for s in sides]
            cells = [f"{value:z.{digits}f}" for value in values]
            interval = f"{known['low']:z.1f} to {known['high']:z.1f}"
            if comparison:
                p_value = "<.001" if known["p_value"] < 0.001 else f"{known['p_value']:.3f}".removeprefix("0")
                cells += [f"{values[1] - values[0]:+z.{digits}f} ({interval})", p_value]
            else:
                cells.append(interval)
            if section in sides[-1]["normalised"]:
                cells.append(f"{sides[-1]['normalised'][section][figure]:.1f}")
            table.add_row(TITLES[figure] if section == "amber" else f"  {TITLES[figure]}", *cells)
    console.print(table)
    this, left_out = sides[-1], comparison["left_out"] if comparison else 0
    counts = ", ".join(f"{count:,} of {scores['asked'][task]:,} {task}" for task, count in this["answers"].items())
    lengths = " and ".join(str(words) for words in this["mean_words"].values())
    nouns = f"; nouns: {scores['nouns']}, alike by {scores['spacy_model']}" if scores["spacy_model"] else ""
    neither, by = this["neither_yes_nor_no"], scores["resampled_by"]
    remarks = {
        f"answers: {counts}, of {lengths} words on average{nouns}": True,
        f"compared are the answers that both files have; {left_out:,} are in one file only": left_out,
        f"intervals are by {by}: they are too narrow": by != "picture",
        f"{neither} % of the answers to yes/no questions begin with neither yes nor no": neither,
    }
    for remark, holds in remarks.items():
        if holds:
            console.print(remark)


def draw_scores(scores: dict, path: Path) -> None:
    """Draw the figures of scores.json as bars with 95 % intervals, base above this if there is a baseline."""
    comparison = scores.get("comparison")
    sides = [comparison["base"], comparison["this"]] if comparison else [scores]
    labels = comparison["labels"] if comparison else [""]
    colours = ["#9aa5b1", "#1b7837"][-len(sides) :]
    sections = [name for name in sides[-1]["intervals"] if name not in ("state", "number", "action", "amber")]
    keys = [(section, name) for section in sections for name in sides[-1]["strict"][section]]
    places = np.arange(len(keys)) + 0.8 * np.array([sections.index(section) for section, _ in keys])
    height = 0.8 / len(sides)
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.36 * places[-1]), layout="constrained")
    for number, (side, label) in enumerate(zip(sides, labels, strict=True)):
        values = np.array([side["strict"][section][name] for section, name in keys])
        low, high = (np.array([side["intervals"][s][name][edge] for s, name in keys]) for edge in ("low", "high"))
        style = {"color": colours[number], "ecolor": "#444444", "capsize": 2, "label": label}
        style["xerr"] = np.maximum([values - low, high - values], 0)
        bars = axis.barh(places + height * (number - (len(sides) - 1) / 2), values, 0.92 * height, **style)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    for section in sections:
        first = keys.index(next(key for key in keys if key[0] == section))
        axis.text(107, places[first], section, fontsize=10, fontweight="bold", va="center")
    axis.set_yticks(places, [TITLES[name] for _, name in keys], fontsize=8)
    axis.set(xlim=(0, 100), ylim=(places[-1] + 0.7, -0.7), xlabel="%; thin lines are 95 % intervals")
    axis.spines[["top", "right"]].set_visible(False)
    if comparison:
        figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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


def write_gallery(sides: list, image_dir: Path | None, path: Path, note: str, limit: int = 24) -> None:
    """Show the captions whose marked words changed most (with one file: that have most), under a note that says which words
    are marked."""
    captions = [{row["id"]: row for row in rows if row["kind"] == "generative"} for _, _, rows in sides]
    shown = [[side[number] for side in captions] for number in captions[0] if number in captions[-1]]
    both = len(sides) > 1
    if not shown:
        return
    shown.sort(key=lambda rows: abs(len(rows[0]["wrong"]) - both * len(rows[-1]["wrong"])), reverse=True)
    pictures = []
    for rows in shown[:limit]:
        image, address, texts = rows[0]["image"], "", []
        with suppress(OSError, TypeError, ValueError):  # without its picture, a caption is shown all the same
            address = embed_picture(load_image(find_picture(image_dir, image)))
        for (label, *_), row in zip(sides, rows, strict=True):
            words = "|".join(map(re.escape, sorted(set(row["wrong"]))))
            pieces = re.split(rf"\b({words})\b", row["response"]) if words else [row["response"]]
            texts.append((label, pieces, len(row["wrong"])))
        pictures.append({"image": image, "address": address, "captions": texts})
    heading = f"The {len(pictures)} captions that {'changed most' if both else 'hallucinate most'}, of {len(shown)}"
    write_whole(path, GALLERY.render(pictures=pictures, heading=heading, note=note))


def evaluate(args, queries: list, notes: dict, sections: list[str], prepared: tuple, failures: list[dict]) -> None:
    """Score the answers, beside the base's or an earlier run's if asked; write scores.json, chart and gallery; print the
    figures. `prepared` is of prepare_captions."""
    judge_text, spacy_model = prepared
    image_of = {query["id"]: query["image"] for query in queries}
    baseline = name_base_file(args.output_file) if args.compare_base else args.baseline_file
    files = [path for path in (baseline, args.output_file) if path]
    labels = ["base", "adapter"] if args.compare_base else [path.stem for path in files]
    if len(set(labels)) < len(labels):
        labels = [f"{path.absolute().parent.name}/{path.stem}" for path in files]
    answers = [count_answers(read_answers(path, notes), notes, image_of, judge_text) for path in files]
    sides = list(zip(labels, files, answers, strict=True))
    captions = sum(note["type"] == "generative" for note in notes.values())
    asked = {"generative": captions, "discriminative": len(notes) - captions, "pope": len(notes)}
    known = all(row["image"] for rows in answers for row in rows)
    scores = summarize(args.output_file.name, answers[-1], sections)
    scores |= {
        "query_file": args.query_file and args.query_file.name,
        "asked": {task: asked[task] for task in scores["answers"]},
        "spacy_model": spacy_model,
        "nouns": args.nouns,
        "resampled_by": "picture" if known else "question, as --query_file does not name the pictures",
        "failures": failures,
    }
    if len(sides) > 1:
        scores["comparison"] = compare(sides, sections)
    folder = args.output_file.absolute().parent
    for name in ("scores.png", "gallery.html"):  # of an earlier run
        (folder / name).unlink(missing_ok=True)
    write_whole(folder / "scores.json", json.dumps(scores, indent=1))
    print_scores(scores)
    if scores["intervals"]:
        draw_scores(scores, folder / "scores.png")
    note = "Words for things that are not in the picture, by AMBER's annotation, are marked."
    write_gallery(sides, args.image_dir, folder / "gallery.html", note)
    written = [name for name in ("scores.json", "scores.png", "gallery.html") if (folder / name).exists()]
    console.print(f"{escape(str(folder))} has {', '.join(written)}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    queries, notes = read_queries(args.query_file) if args.query_file else ([], None)
    if args.write_pairs and not args.query_file:
        queries = ask_folder(args.image_dir, args.questions)
    sections = ["pope"] if notes else SECTIONS[args.evaluation_type]
    if notes is None and not (args.skip_evaluation and args.evaluation_type == "a"):
        notes = {note["id"]: note for note in read_json(find_file(args, "annotation_file", "annotations.json"))}
    evaluating = MAIN_PROCESS and not args.skip_evaluation
    # before anything is answered, so that what is missing shows at once
    prepared = prepare_captions(args) if evaluating and sections != ["pope"] else (None, None)
    failures_file = args.output_file.with_name(f"{args.output_file.stem}_failures.json")
    if args.skip_inference:
        failures, answered = read_json(failures_file) if failures_file.exists() else [], True
    else:
        selected = select_queries(queries, notes, sections, args.limit)
        failures = answer_benchmark(args, queries, selected)
        answered = len(failures) < len(selected)
    if not MAIN_PROCESS:
        return
    failures_file.unlink(missing_ok=True)
    if failures:
        write_whole(failures_file, json.dumps(failures, indent=1))
        text = f"{len(failures):,} queries could not be answered and are listed in {failures_file}; the first: "
        console.print(f"{text}{failures[0]['image']} {failures[0]['reason']}", markup=False)
    if evaluating and answered:
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
