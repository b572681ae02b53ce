"""Answer AMBER's questions with LLaVA-1.6, with or without an adapter, and score the answers as AMBER's own script does.

Reads   a LLaVA-NeXT checkpoint (--model_path), an adapter (--lora_path), AMBER's queries, pictures and annotations.
Writes  the answers (--output_file, AMBER's format) and, beside them, the journal to resume from, scores.json, scores.png
        and gallery.html.
Needs   pip install -r requirements/train.txt -r requirements/eval.txt
        python -m spacy download en_core_web_lg
        python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet

    python llava_amber_validation_benchmark_with_lora.py --lora_path checkpoints/llava-orpo-prod --compare_base \\
        --query_file AMBER/data/query/query_all.json --image_dir AMBER/image --output_file amber/results.json
    python llava_amber_validation_benchmark_with_lora.py --skip_inference --output_file amber/results.json \\
        --query_file AMBER/data/query/query_all.json
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(group, flag, help, **options):
        shown = options.get("default")
        group.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    model = parser.add_argument_group("model")
    add(model, "--model_path", "base model: hub id or folder", default="llava-hf/llava-v1.6-mistral-7b-hf")
    add(model, "--lora_path", "adapter folder")
    add(model, "--compare_base", "answer with the adapter off too, and compare", action="store_true")
    add(model, "--merge_lora", "merge the adapter first, into the weights it was trained on (after QLoRA: rounded to NF4), "
        "NF4-rounded ones, or the base's own; alone: trained", choices=["trained", "nf4", "base"], nargs="?", const="trained")  # fmt: skip
    add(
        model,
        "--device",
        "auto (cuda, then mps, then cpu), all (layers spread over the GPUs), or cuda:1, cpu …",
        default="auto",
    )
    bits = model.add_mutually_exclusive_group()
    add(bits, "--load_4bit", "QLoRA: base weights in NF4 with double quantization", action="store_true")
    add(bits, "--load_8bit", "base weights in 8 bits (LLM.int8)", action="store_true")
    add(model, "--backend", "what generates; vllm takes a merged or quantized checkpoint", default="transformers",
        choices=["transformers", "vllm"])  # fmt: skip
    add(
        model,
        "--batch_size",
        "pictures answered together, each with all its questions (default: 8; vllm: 64)",
        type=int,
    )
    add(model, "--max_new_tokens", "tokens an answer may have; answers cut off are counted", type=int, default=1024)
    add(model, "--verify", "candidates drawn for an answer that names objects; the one that a check confirms best is kept: "
        "--clip_model's, or the model's own yes/no answers", type=int, default=1)  # fmt: skip
    add(model, "--clip_model", "CLIP checkpoint that --verify checks with: hub id or folder")
    add(
        model,
        "--test_mode",
        "use the embedded miniature where model and benchmark are not given (without NLTK's data: --nouns vocabulary)",
        action="store_true",
    )

    data = parser.add_argument_group("benchmark")
    add(data, "--query_file", "AMBER's queries, for example data/query/query_all.json", type=Path)
    add(data, "--image_dir", "folder of AMBER's pictures", type=Path)
    add(data, "--output_file", "where the answers go", type=Path, default=Path("results.json"))
    for flag, name in (
        ("annotation", "annotations.json"),
        ("relation", "relation.json"),
        ("safe_words", "safe_words.txt"),
    ):
        add(data, f"--{flag}_file", f"AMBER's {name} (default: beside the query file, or one folder up)", type=Path)
    add(data, "--evaluation_type", "a all, g generative, d discriminative: de existence, da attribute, dr relation",
        default="a", choices=list(SECTIONS))  # fmt: skip
    add(data, "--limit", "only the first N pictures, with all their questions", type=int)
    add(data, "--skip_inference", "score the answers in --output_file as they are", action="store_true")
    add(data, "--skip_evaluation", "only answer", action="store_true")

    scoring = parser.add_argument_group("scoring")
    add(scoring, "--baseline_file", "answers to compare with, from any earlier run", type=Path)
    add(scoring, "--spacy_model", "word vectors that decide which words are alike", default="en_core_web_lg")
    add(
        scoring,
        "--similarity_table",
        "use this table in place of a spaCy model; made and saved there if absent",
        type=Path,
    )
    add(scoring, "--nouns", "nltk: AMBER's way; vocabulary: look its words up, needs no data, is not official",
        default="nltk", choices=["nltk", "vocabulary"])  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "limit", "verify"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} is {getattr(args, name)}; it must be above 0")
    if args.test_mode:
        if args.model_path == parser.get_default("model_path"):
            args.model_path = str(MINIATURE / "model")
        if args.query_file is None and args.annotation_file is None:
            args.query_file = MINIATURE / "amber" / "query" / "query_all.json"
            args.image_dir = args.image_dir or MINIATURE / "amber" / "image"
            if args.spacy_model == parser.get_default("spacy_model"):
                args.similarity_table = args.similarity_table or MINIATURE / "amber" / "similarity.json"
    if args.compare_base and not args.lora_path and not args.skip_inference:
        parser.error("--compare_base needs --lora_path: without an adapter there is nothing to compare")
    if args.skip_inference and (args.limit or args.skip_evaluation):
        parser.error("--skip_inference scores a file as it is: --limit and --skip_evaluation do not go with it")
    if "scores.json" in (args.output_file.name, args.baseline_file and args.baseline_file.name):
        parser.error("scores.json is where the scores go; give the answers another name")
    if args.compare_base and args.baseline_file:
        parser.error("--compare_base and --baseline_file both name what to compare with; give one")
    if not args.skip_inference and not (args.query_file and args.image_dir):
        parser.error(
            "--query_file and --image_dir are needed to answer; --skip_inference scores answers that are there"
        )
    if args.query_file and not args.query_file.is_file():
        parser.error(
            f"--query_file {args.query_file} is no file; name AMBER's queries, such as data/query/query_all.json"
        )
    if not (args.query_file or args.annotation_file):
        parser.error("--query_file or --annotation_file is needed: AMBER's annotations lie beside one of them")
    if args.merge_lora and (args.compare_base or not args.lora_path or args.load_4bit or args.load_8bit):
        parser.error("--merge_lora needs --lora_path, and excludes --compare_base, --load_4bit and --load_8bit")
    if args.backend == "vllm" and args.lora_path:
        parser.error("--backend vllm takes no --lora_path; merge the adapter first and give the merged --model_path")
    if args.clip_model and args.verify == 1:
        parser.error("--clip_model is what --verify checks with; give --verify 4 too")
    if args.backend == "vllm" and args.verify > 1:
        parser.error("--verify is for --backend transformers")
    if args.backend == "vllm" and (args.load_4bit or args.load_8bit):
        parser.error("--backend vllm takes a quantized checkpoint as it is; leave --load_4bit and --load_8bit out")
    if args.backend == "vllm" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--backend vllm starts its own processes; run it without torchrun")
    if not args.skip_inference and not args.image_dir.is_dir():
        parser.error(f"--image_dir {args.image_dir} is no folder; name the one with AMBER's pictures")
    if args.output_file.is_dir():
        parser.error(f"--output_file {args.output_file} is a folder; name a file in it")
    if args.skip_inference and not args.output_file.is_file():
        parser.error(
            f"--output_file {args.output_file} is no file; with --skip_inference it names the answers to score"
        )
    args.batch_size = args.batch_size or (64 if args.backend == "vllm" else 8)
    return args


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
from contextlib import nullcontext, suppress
from functools import partial, wraps
from typing import NoReturn

for name, value in {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import jinja2
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageOps
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError, safe_open
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
ADAPTER_KEYS = {
    r"^(base_model\.model\.)+": "",
    **ORIGINAL_KEYS,
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^(vision_tower|multi_modal_projector|language_model)\.": r"model.\1.",
    r"^model\.vision_tower\.vision_model\.": "model.vision_tower.",
}


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


# Copied from llava_orpo_training.write_whole
def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# Copied from llava_orpo_training.embed_picture
def embed_picture(image: Image.Image) -> str:
    """Return a picture as a data: URL for an HTML page, shrunk to at most 448 pixels on each side."""
    image, buffer = image.copy(), io.BytesIO()
    image.thumbnail((448, 448))
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# Copied from llava_orpo_training.read_jsonl
def read_jsonl(path: Path) -> list[dict]:
    """Return a file's rows up to the first line that is not JSON, such as one cut short. A missing file has no rows."""
    rows = []
    with suppress(FileNotFoundError, ValueError):
        rows.extend(json.loads(line) for line in path.read_text(errors="replace").splitlines())
    return rows


# ---------------------------------------------------------------------------- answers


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


def choose_candidate(objects: list[list[str]], doubtful: set, fits: list[float] | None = None) -> int:
    """The candidate that its check confirms best: the one that CLIP finds to fit the picture best, or by the objects that
    each one names, the one with the fewest doubtful ones, then with the most confirmed ones; the first of equals."""
    if fits:
        return max(range(len(fits)), key=fits.__getitem__)
    wrong = [len(set(named) & doubtful) for named in objects]
    right = [len(set(named) - doubtful) for named in objects]
    return min(range(len(objects)), key=lambda number: (wrong[number], -right[number]))


VERIFY_TEMPERATURE = 0.7  # at which --verify draws candidates beside the greedy answer


def verify_answers(
    model, processor, images: list, pixels, questions: list[list[str]], max_new_tokens: int, *,
    candidates: int, find: Callable, clip: Clip | None,
) -> Iterator:  # fmt: skip
    """Answer as answer_questions does; in place of a greedy answer that names objects, the best of `candidates` is given:
    itself and others drawn at VERIFY_TEMPERATURE, checked by CLIP or by the model's own yes/no answers."""
    drawn: dict = {}
    open_ended = [[] for _ in images]  # the questions of each picture that are checked; "Yes" names no object
    for picture, number, text, complete in answer_questions(
        model, processor, images, pixels, questions, max_new_tokens
    ):
        if find(text):
            open_ended[picture].append(number)
            drawn[picture, number] = [(text, complete)]
        else:
            yield picture, number, text, complete
    if not drawn:
        return
    open_ended = [sorted(part) for part in open_ended]  # they came in the order in which they ended
    asked = [[questions[picture][number] for number in part for _ in range(candidates - 1)]
             for picture, part in enumerate(open_ended)]  # fmt: skip
    for picture, place, text, complete in answer_questions(
        model, processor, images, pixels, asked, max_new_tokens, VERIFY_TEMPERATURE
    ):
        drawn[picture, open_ended[picture][place // (candidates - 1)]].append((text, complete))
    objects = {key: [[word for _, word in find(text)] for text, _ in texts] for key, texts in drawn.items()}
    words = [sorted({word for number in part for named in objects[picture, number] for word in named})
             for picture, part in enumerate(open_ended)]  # fmt: skip
    doubtful = [set()] * len(images) if clip else find_doubtful(model, processor, images, pixels, words)
    for (picture, number), texts in drawn.items():
        fits = clip.compare(images[picture], [text for text, _ in texts]) if clip else None
        yield picture, number, *texts[choose_candidate(objects[picture, number], doubtful[picture], fits)]


def start_vllm(model_path: str, processor, max_new_tokens: int) -> Callable:
    """Start vLLM on a merged or quantized checkpoint; returns a function that answers as answer_questions does.

    The questions of a picture follow one another, so that prefix caching computes the picture once. Prompts are token
    ids with BOS; vLLM itself puts the picture's tokens in place of the one `<image>`.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        stop(
            f"--backend vllm cannot be loaded ({error}); install it into an environment of its own: pip install -r requirements/vllm.txt"
        )
    on_cpu = not torch.cuda.is_available()  # for trying, where starting soon counts for more
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's own choice is half of the memory
    engine = LLM(model=model_path, enable_prefix_caching=True, limit_mm_per_prompt={"image": 1}, enforce_eager=on_cpu,
                 skip_mm_profiling=on_cpu)  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)
    image_token = processor.image_token_id

    def answer(images: list, pixels, questions: list[list[str]]) -> Iterator:
        asked = [(i, j, question) for i, part in enumerate(questions) for j, question in enumerate(part)]
        prompts = []
        for i, _, question in asked:
            ids = build_prompt(processor, question, images[i].size)
            first = ids.index(image_token)
            ids = ids[:first] + [image_token] + [token for token in ids[first:] if token != image_token]
            prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": images[i]}})
        for (i, j, _), output in zip(asked, engine.generate(prompts, greedy, use_tqdm=False), strict=True):
            yield i, j, output.outputs[0].text.strip(), output.outputs[0].finish_reason == "stop"

    return answer


def find_picture(image_dir: Path, name: str) -> Path:
    """The path of a query's picture. Raises OSError if it lies outside `image_dir`, as written, or is no file."""
    folder = os.path.abspath(image_dir)
    path = Path(os.path.abspath(os.path.join(folder, name)))
    if not path.is_relative_to(folder):
        raise OSError(f"lies outside {image_dir}")
    if not path.is_file():
        raise OSError("is not there")
    return path


def open_group(group: list[dict], image_dir: Path, processor) -> tuple[list[dict], list, dict | None, list[dict]]:
    """Open the pictures of a group; returns what can be asked, its images, their pixels, and the failures."""
    good, images, failures = [], [], []
    for picture in group:
        try:
            images.append(load_image(find_picture(image_dir, picture["image"])))
            good.append(picture)
        except (OSError, ValueError) as error:  # ValueError: a name that no path can have
            failures += [
                {"id": query["id"], "image": picture["image"], "reason": str(error)} for query in picture["queries"]
            ]
    pixels = processor.image_processor(images, return_tensors="pt") if images else None
    return good, images, pixels, failures


def group_queries(queries: list[dict], size: int) -> list[list[dict]]:
    """The queries by picture, `size` pictures a group. What is in a group never depends on what is already answered, so
    that a resumed run computes in the same batches as an unbroken one."""
    pictures: dict[str, list] = {}
    for query in queries:
        pictures.setdefault(query["image"], []).append(query)
    listed = [{"image": image, "queries": part} for image, part in pictures.items()]
    return [listed[start : start + size] for start in range(0, len(listed), size)]


def digest_checkpoint(path: str) -> str:
    """Identity of a checkpoint: SHA-256 over its JSON files, tokenizer and 64 slices of each weight file; a hub id's commit."""
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


def journals_of(output_file: Path) -> list[Path]:
    return sorted(output_file.parent.glob(f"{glob.escape(output_file.name)}.journal-*.jsonl"))


def read_journals(output_file: Path, fingerprint: dict) -> dict[int, dict]:
    """Answers of an earlier, unfinished run, by query id. Stops if they were given under other settings."""
    answers = {}
    for path in journals_of(output_file):
        first, *lines = read_jsonl(path) or [{"fingerprint": fingerprint}]
        if not isinstance(first, dict) or "fingerprint" not in first:
            stop(f"{path} is no journal of this script: its first line has no fingerprint; move it away.")
        before = first["fingerprint"]
        changed = [f"{name} was {before.get(name)}, is {fingerprint[name]}" for name in fingerprint
                   if before.get(name) != fingerprint[name]]  # fmt: skip
        if changed:
            stop(
                f"{path} holds answers of another run ({'; '.join(changed)}); name another --output_file or delete it."
            )
        answers |= {line["id"]: line for line in lines}
    return answers


def fill_journal(
    state, args, output_file: Path, groups: list, answers: dict, fingerprint: dict, answer: Callable, processor
) -> list:
    """Answer what is left of this process's groups, each answer into its journal as it arrives; returns the failures."""
    journal = output_file.with_name(f"{output_file.name}.journal-{state.process_index}.jsonl")
    mine = groups[state.process_index :: state.num_processes]
    todo = [
        group for group in mine if any(query["id"] not in answers for picture in group for query in picture["queries"])
    ]
    lines = [{"fingerprint": fingerprint}, *read_jsonl(journal)[1:]]
    write_whole(journal, "".join(json.dumps(line) + "\n" for line in lines))  # without a line that was cut off
    failures = []
    loader = torch.utils.data.DataLoader(
        todo, batch_size=None, num_workers=2 * torch.cuda.is_available(),
        collate_fn=partial(open_group, image_dir=args.image_dir, processor=processor),
    )  # fmt: skip
    total = sum(len(picture["queries"]) for group in mine for picture in group)
    left = sum(len(picture["queries"]) for group in todo for picture in group)
    with journal.open("a") as file, tqdm(
        total=total, initial=total - left, desc=output_file.stem, unit="answer", disable=not MAIN_PROCESS
    ) as bar:  # fmt: skip
        for good, images, pixels, failed in loader:
            failures += failed
            bar.update(len(failed))
            questions = [[query["query"] for query in picture["queries"]] for picture in good]
            for picture, question, text, complete in answer(images, pixels, questions) if good else ():
                query = good[picture]["queries"][question]
                if query["id"] not in answers:
                    answers[query["id"]] = {"id": query["id"], "response": text, "complete": complete}
                    file.write(json.dumps(answers[query["id"]]) + "\n")
                    file.flush()
                bar.update()
    return failures


def make_answerer(args, processor) -> tuple:
    """Load what answers; returns a function of (images, pixels, questions), and the model if it runs in this process."""
    if args.backend == "vllm":
        return start_vllm(args.model_path, processor, args.max_new_tokens), None
    device = args.device
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # under torchrun, a GPU a process
    model, processor = load_llava(
        args.model_path, args.lora_path, device, args.load_4bit, args.load_8bit, args.merge_lora
    )
    if args.verify == 1:
        return partial(answer_questions, model, processor, max_new_tokens=args.max_new_tokens), model
    vocabulary = None
    if args.nouns == "vocabulary":
        relation = read_words(args, {})[0]
        vocabulary = set(relation).union(*relation.values())
    find = find_nouns(args.nouns, vocabulary)
    clip = Clip(args.clip_model, model.device) if args.clip_model else None
    return partial(verify_answers, model, processor, max_new_tokens=args.max_new_tokens, candidates=args.verify,
                   find=find, clip=clip), model  # fmt: skip


def answer_benchmark(args, every_query: list[dict], queries: list[dict]) -> list[dict]:
    """Answer `queries`, without the adapter too if asked; returns the failures.

    Written are the answers to all of `every_query` that the journals have: a smaller --limit loses nothing.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from filelock import FileLock, Timeout

    state = PartialState(cpu=not torch.cuda.is_available())
    processor = read_checkpoint(args.model_path)[1]
    prompt = build_prompt(processor, "Is it?", (64, 64))
    settings = {
        "model": digest_checkpoint(args.model_path),
        "prompt": hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16],
        "queries": hashlib.sha256(args.query_file.read_bytes()).hexdigest()[:16],
        "image_dir": os.path.abspath(args.image_dir),
        "max_new_tokens": args.max_new_tokens,
        "precision": "4 bit" if args.load_4bit else "8 bit" if args.load_8bit else "whole",
        "merged": args.merge_lora,
        "backend": f"{args.backend} on {args.device}",
        "verify": args.verify,
        "clip": digest_checkpoint(args.clip_model) if args.clip_model else None,
        "nouns": args.nouns if args.verify > 1 else None,
    }
    adapter = digest_checkpoint(args.lora_path) if args.lora_path else None
    passes = [(args.output_file, settings | {"adapter": adapter})]
    if args.compare_base:
        passes.insert(0, (base_file(args.output_file), settings | {"adapter": None}))
    groups = group_queries(queries, args.batch_size)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(args.output_file.with_name(f".{args.output_file.name}.lock"))
    try:
        if MAIN_PROCESS:
            lock.acquire(timeout=0)
    except Timeout:
        stop(f"another run is writing {args.output_file}; wait for it, or name another --output_file.")
    answer, failures, earlier = None, [], []
    for output_file, fingerprint in passes:
        if output_file.exists() and not journals_of(output_file):
            stop(f"--output_file {output_file} is there, without a journal to go on from; score it with --skip_inference, "
                 "or name another file.")  # fmt: skip
        earlier.append(read_journals(output_file, fingerprint))
    state.wait_for_everyone()  # nobody writes before everybody has read
    for (output_file, fingerprint), answers in zip(passes, earlier, strict=True):
        failed = []
        if any(query["id"] not in answers for query in queries):
            if answer is None:
                answer, model = make_answerer(args, processor)
            off = args.lora_path and not fingerprint["adapter"]
            with model.disable_adapter() if off else nullcontext():
                failed = fill_journal(state, args, output_file, groups, answers, fingerprint, answer, processor)
            failed = gather_object(failed)
            state.wait_for_everyone()
        if MAIN_PROCESS:
            answers = read_journals(output_file, fingerprint)
            lost = {query["id"] for query in queries} - answers.keys() - {failure["id"] for failure in failed}
            if lost:
                stop(
                    f"{len(lost)} answers are neither in the journals of {output_file} nor failures; give the command again."
                )
            kept = [answers[query["id"]] for query in every_query if query["id"] in answers]
            results = [{"id": line["id"], "response": line["response"]} for line in kept]
            write_whole(output_file, json.dumps(results, indent=1, ensure_ascii=False))
            cut = sum(not line["complete"] for line in kept)
            console.print(
                f"{len(results):,} answers in {output_file}{f'; {cut:,} cut off at --max_new_tokens' if cut else ''}"
            )
        failures += failed
    lock.release()
    return list({failure["id"]: failure for failure in failures}.values())


def base_file(output_file: Path) -> Path:
    """Where --compare_base puts the answers given with the adapter off."""
    return output_file.with_name(f"{output_file.stem}_base{output_file.suffix}")


# ---------------------------------------------------------------------------- AMBER's files


def read_json(path: Path, flag: str, kind: type = list):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        stop(f"{flag} {path} cannot be read: {error}. Give a JSON file in AMBER's format.")
    if not isinstance(content, kind) or not content:
        what = f"a {type(content).__name__}" if content else "nothing"
        stop(f"{flag} {path} holds {what}; AMBER's format is a {kind.__name__} there.")
    return content


def read_queries(path: Path) -> list[dict]:
    """AMBER's queries: id, image, query."""
    queries = read_json(path, "--query_file")
    kinds = {"id": int, "image": str, "query": str}
    for number, query in enumerate(queries):
        if not isinstance(query, dict) or any(not isinstance(query.get(key), kind) for key, kind in kinds.items()):
            stop(f"--query_file {path}: entry {number} is {json.dumps(query)[:80]}; it must have an id (a whole number), an "
                 "image and a query (texts).")  # fmt: skip
    twice = [number for number, count in Counter(query["id"] for query in queries).items() if count > 1]
    if twice:
        stop(f"--query_file {path} has the id {twice[0]} twice; ids must differ.")
    return queries


def select_queries(args, queries: list[dict], notes: dict | None) -> list[dict]:
    """The queries that --evaluation_type and --limit leave, in the file's order."""
    if notes is not None:
        unknown = [query["id"] for query in queries if query["id"] not in notes]
        if unknown:
            stop(f"--annotation_file has no entry for query {unknown[0]}; it belongs to other queries.")
        sections = SECTIONS[args.evaluation_type]
        queries = [query for query in queries if section_of(notes[query["id"]]["type"]) in sections]
    if not queries:
        stop(f"--query_file {args.query_file} has no query of --evaluation_type {args.evaluation_type}.")
    images = set(list(dict.fromkeys(query["image"] for query in queries))[: args.limit])
    return [query for query in queries if query["image"] in images]


def find_file(args, flag: str, name: str) -> Path:
    """The file given by its flag, else the one of AMBER's own layout: beside the query file or one folder up."""
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
            good = (
                note["truth"] in ("yes", "no")
                if note["type"] != "generative"
                else note["truth"] + note["hallu"] is not None
            )
            notes[note["id"]] = note
        except (TypeError, KeyError):
            good = False
        if not good:
            stop(
                f"--annotation_file {path}: entry {number} is {json.dumps(note)[:80]}; it must have id, type and truth."
            )
    return notes


def read_words(args, notes: dict[int, dict]) -> tuple[dict[str, list[str]], set[str]]:
    """AMBER's associations, word -> the words that stand for it, and the words that are always safe."""
    path = find_file(args, "relation_file", "relation.json")
    relation = read_json(path, "--relation_file", dict)
    for note in notes.values():
        for word in note["truth"] + note["hallu"] if note["type"] == "generative" else ():
            if word not in relation:
                stop(
                    f"--relation_file {path} lacks {word!r} of annotation {note['id']}; it belongs to other annotations."
                )
    path = find_file(args, "safe_words_file", "safe_words.txt")
    try:
        return relation, set(path.read_text(encoding="utf-8").split("\n"))
    except (OSError, ValueError) as error:
        stop(f"--safe_words_file {path} cannot be read: {error}. Give a text file with a word a line.")


def read_answers(path: Path, notes: dict[int, dict]) -> list[dict]:
    """An answer file in AMBER's format, from here or elsewhere: a list of id and response. No response (null) to a
    yes/no question is a wrong answer."""
    rows = read_json(path, "the answer file")
    for number, row in enumerate(rows):
        known = isinstance(row, dict) and isinstance(row.get("id"), int) and row["id"] in notes
        if known and row.get("response") is None and notes[row["id"]]["type"] != "generative" and "response" in row:
            row["response"] = ""
        if not known or not isinstance(row.get("response"), str):
            stop(f"the answer file {path}: entry {number} is {json.dumps(row)[:80]}; it must have the id of an annotation "
                 "and a response (text).")  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- scoring

SIMILAR = 0.8  # above this, spaCy's similarity makes two words one
# what one answer adds to the sums that all figures are made of
CAPTION_COUNTS = ["captions", "clean", "named", "hallucinated", "present", "covered", "traps", "fallen"]
ANSWER_COUNTS = ["asked", "correct", "no_true", "no_said", "no_right"]
KINDS = ["existence", "state", "number", "action", "relation"]
COUNTS = CAPTION_COUNTS + [f"{kind} {count}" for kind in KINDS for count in ANSWER_COUNTS]
# section -> the counts that say how many answers it has; amber, whose one figure is the AMBER score, needs both tasks
SECTION_COUNTS = {
    "generative": ["captions"],
    "discriminative": [f"{kind} asked" for kind in KINDS],
    "attribute": ["state asked", "number asked", "action asked"],
    **{kind: [f"{kind} asked"] for kind in KINDS},
}
YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def section_of(kind: str) -> str:
    """The section that a type of annotations.json is scored in; as in the official script, unknown ones are relations."""
    return {
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


def identify_vectors(spacy_model: str) -> tuple[str, str]:
    """A spaCy model's name with version, and a digest that tells it from others of that name."""
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
    """All pairs of the vocabulary that spaCy finds more similar than SIMILAR, from one run of the pipeline a word."""
    try:
        import spacy

        nlp = spacy.load(spacy_model)
    except (ImportError, OSError, ValueError, TypeError, AttributeError) as error:
        stop(f"--spacy_model {spacy_model} cannot be loaded: {str(error).splitlines()[0]}")
    if not nlp.vocab.vectors.n_keys:
        console.print(f"{name} has no word vectors; its similarities are not those that AMBER means")
    words = [nlp(word) for word in vocabulary]
    with warnings.catch_warnings(action="ignore"):  # words without a vector: similar to none
        pairs = [(a.text, b.text, a.similarity(b)) for i, a in enumerate(words) for b in words[i + 1 :]]
    similar = [[a, b, round(value, 4)] for a, b, value in pairs if value > SIMILAR]
    return {"spacy_model": name, "threshold": SIMILAR, "words": vocabulary, "similar": similar}


def load_similarity(args, vocabulary: set[str]) -> tuple[dict[str, set[str]], str]:
    """word -> the words it counts as, itself included, and the name of the spaCy model that says so."""
    path = args.similarity_table
    if path is None:
        name, digest = identify_vectors(args.spacy_model)
        digest = hashlib.sha256(json.dumps([digest, sorted(vocabulary)]).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_amber"
        path = folder / f"{name}-{digest}.json"
    if path.exists():
        table = read_json(path, "--similarity_table", dict)
    else:
        table = make_similarity_table(args.spacy_model, identify_vectors(args.spacy_model)[0], sorted(vocabulary))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(table))
            console.print(f"word similarities of {table['spacy_model']} are in {path}")
        except OSError as error:
            console.print(f"word similarities of {table['spacy_model']} could not be kept in {path}: {error}")
    try:
        missing = vocabulary - set(table["words"])
        alike = {word: {word} for word in table["words"]}
        for first, second, _ in table["similar"]:
            alike[first].add(second)
            alike[second].add(first)
        name, threshold = table["spacy_model"], table["threshold"]
    except (TypeError, KeyError, ValueError) as error:
        stop(
            f"--similarity_table {path} is no table of this script ({error!r}); name a new file to have one made there."
        )
    if missing or threshold != SIMILAR:
        what = f"lacks {sorted(missing)[0]!r}" if missing else f"was made with threshold {threshold}, not {SIMILAR}"
        stop(f"--similarity_table {path} {what}; name a new file to have one made there.")
    return alike, name


def judge_caption(
    nouns: list[str], note: dict, relation: dict, safe_words: set[str], alike: dict
) -> tuple[dict, list[int]]:
    """Score a caption's nouns by AMBER's rules; returns its counts and the numbers of the nouns that are hallucinated.

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
    counts = [
        1,
        not hallucinated,
        len(nouns),
        len(hallucinated),
        len(note["truth"]),
        len(covered),
        len(note["hallu"]),
        len(fallen),
    ]
    return dict(zip(CAPTION_COUNTS, counts, strict=True)), hallucinated


def judge_answer(response: str, truth: str) -> dict:
    """Score a yes/no answer; only `Yes` and `No`, to the letter, are answers."""
    said_no, right_no = response == "No", response == "No" and truth == "no"
    correct = right_no or (response == "Yes" and truth == "yes")
    return dict(zip(ANSWER_COUNTS, [1, correct, truth == "no", said_no, right_no], strict=True))


def compute_figures(sums: dict, shown: Callable = lambda value: value) -> dict[str, dict]:
    """AMBER's figures, in percent, from the sums of COUNTS: numbers, or arrays of one shape.

    Every denominator starts at 0.001, precision and recall are for the answer No, and F1 is computed from what `shown`
    makes of them (the official script rounds to one decimal) with a small number in its denominator.
    """

    def percent(part, whole, start=0.001):
        return part / (whole + start) * 100

    def section(kinds: list[str], start=0.001, small=0.0001) -> dict:
        asked, correct, no_true, no_said, no_right = (
            sum(sums[f"{kind} {count}"] for kind in kinds) for count in ANSWER_COUNTS
        )
        precision, recall = shown(percent(no_right, no_said, start)), shown(percent(no_right, no_true, start))
        f1 = 2 * (precision / 100) * (recall / 100) / ((precision / 100) + (recall / 100) + small) * 100
        return {
            "accuracy": shown(percent(correct, asked, start)),
            "precision": precision,
            "recall": recall,
            "f1": shown(f1),
        }

    generative = {
        "chair": shown(percent(sums["hallucinated"], sums["named"])),
        "cover": shown(percent(sums["covered"], sums["present"])),
        "hal": shown(100 - percent(sums["clean"], sums["captions"])),
        "cog": shown(percent(sums["fallen"], sums["traps"])),
    }
    discriminative = section(KINDS)
    return {
        "generative": generative,
        "discriminative": discriminative,
        "existence": section(["existence"], small=0.001),
        "attribute": section(["state", "number", "action"], start=0.003),  # three denominators, each from 0.001
        **{kind: section([kind]) for kind in ("state", "number", "action", "relation")},
        "amber": {"score": (100 - generative["chair"] + discriminative["f1"]) / 2},
    }


def count_answers(rows: list[dict], notes: dict, relation: dict, safe_words: set, find: Callable, alike: dict) -> tuple:
    """COUNTS of each answer, (rows, COUNTS), as given and with yes/no normalised; and the hallucinated words by id.

    Normalised means that an answer which begins with yes or no, in any case and after any punctuation, is that answer.
    """
    strict, normalised = np.zeros((2, len(rows), len(COUNTS)), dtype=np.int64)
    hallucinated = {}
    place = {name: column for column, name in enumerate(COUNTS)}
    for number, row in enumerate(rows):
        note = notes[row["id"]]
        section = section_of(note["type"])
        if section == "generative":
            nouns = find(row["response"])
            counts, wrong = judge_caption([lemma for _, lemma in nouns], note, relation, safe_words, alike)
            hallucinated[row["id"]] = [nouns[i][0] for i in wrong]
            for name, value in counts.items():
                strict[number, place[name]] = normalised[number, place[name]] = value
        else:
            begins = YES_NO.match(row["response"])
            plain = begins[1].capitalize() if begins else row["response"]
            for table, response in ((strict, row["response"]), (normalised, plain)):
                for name, value in judge_answer(response, note["truth"]).items():
                    table[number, place[f"{section} {name}"]] = value
    return strict, normalised, hallucinated


def summarize(rows: list[dict], strict: np.ndarray, normalised: np.ndarray, notes: dict, sections: list[str]) -> dict:
    """The figures of an answer file: AMBER's, the normalised ones, and what they leave out."""

    def figures(counts: np.ndarray) -> dict:
        return compute_figures(dict(zip(COUNTS, counts.sum(0).tolist(), strict=True)), lambda value: round(value, 1))

    official, plain = figures(strict), figures(normalised)
    captions = [row["response"] for row in rows if notes[row["id"]]["type"] == "generative"]
    answers = [row["response"] for row in rows if notes[row["id"]]["type"] != "generative"]
    whole = "amber" in answered_sections(strict, sections)
    neither = sum(YES_NO.match(text) is None for text in answers)
    return {
        "strict": {section: official[section] for section in sections},
        "normalised": {section: plain[section] for section in sections if section != "generative"},
        "amber_score": round(official["amber"]["score"], 2) if whole else None,
        "neither_yes_nor_no": round(100 * neither / len(answers), 2) if answers else None,
        "answers": {"generative": len(captions), "discriminative": len(answers)},
        "mean_words": {name: round(float(np.mean([len(text.split()) for text in texts])), 1)
                       for name, texts in (("generative", captions), ("discriminative", answers)) if texts},
    }  # fmt: skip


def count_section(section: str, sums: dict):
    """How many answers a section has in `sums` of COUNTS; for amber, the smaller of the two tasks' numbers."""
    if section == "amber":
        return np.minimum(count_section("generative", sums), count_section("discriminative", sums))
    return sum(sums[name] for name in SECTION_COUNTS[section])


def answered_sections(counts: np.ndarray, sections: list[str]) -> list[str]:
    """Those of `sections` that have an answer in `counts`: AMBER's rules give the others figures too, of nothing."""
    sums = dict(zip(COUNTS, counts.sum(0), strict=True))
    whole = ["amber"] if {"generative", "discriminative"} <= set(sections) else []
    return [section for section in [*sections, *whole] if count_section(section, sums)]


def sum_by_image(rows: list[dict], counts: np.ndarray, image_of: dict[int, str]) -> np.ndarray:
    """COUNTS of each picture, (pictures, COUNTS), in the order of their names; an unknown query stands for itself."""
    images = [str(image_of.get(row["id"], row["id"])) for row in rows]
    names, places = np.unique(images, return_inverse=True)
    sums = np.zeros((len(names), counts.shape[1]), dtype=np.int64)
    np.add.at(sums, places, counts)
    return sums


def estimate(first: np.ndarray, second: np.ndarray | None, sections: list[str], draws: int = 4_000) -> dict:
    """95 % bootstrap intervals by image of every figure of `first`, (images, COUNTS), or of its difference to `second`.

    For a difference the same images are drawn from both, and `p_value` is of the paired permutation test: under the null
    hypothesis each image's two answer sets are exchangeable (Efron and Tibshirani 1993, chapters 13 and 15).
    """
    rng = np.random.default_rng(0)
    n = len(first)

    def figures(*sides: np.ndarray) -> dict:
        found = []
        for sums in (dict(zip(COUNTS, side.T, strict=True)) for side in sides):
            computed = compute_figures(sums)
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
            swap = rng.integers(0, 2, size=(size, n)).astype(float)
            moved = swap @ (second - first)
            swapped.append(figures(first.sum(0) + moved, second.sum(0) - moved))
    observed = figures(*(side.sum(0)[None] for side in sides))
    result: dict = {section: {} for section in sections}
    for (section, figure), value in observed.items():
        low, high = np.nanpercentile(np.concatenate([part[section, figure] for part in drawn]), [2.5, 97.5])
        entry = {"low": round(float(low), 2), "high": round(float(high), 2)}
        if second is not None:
            null = np.abs(np.concatenate([part[section, figure] for part in swapped]))
            extreme = int((null >= abs(value[0]) - 1e-9).sum())
            entry = (
                {"difference": round(float(value[0]), 2)} | entry | {"p_value": round((1 + extreme) / (1 + draws), 4)}
            )
        result[section][figure] = entry
    return result


def prepare_scoring(args, notes: dict) -> tuple[dict, Callable, str]:
    """All that scoring needs but the answers; returns a baseline's file and answers by side, a function that counts
    answers, and the spaCy model's name. It runs before anything is answered, so that what is missing shows at once."""
    relation, safe_words = read_words(args, notes)
    vocabulary = set(relation) | {word for words in relation.values() for word in words}
    baseline = {"base": (args.baseline_file, read_answers(args.baseline_file, notes))} if args.baseline_file else {}
    alike, spacy_model = load_similarity(args, vocabulary)
    find = find_nouns(args.nouns, vocabulary)
    return baseline, lambda rows: count_answers(rows, notes, relation, safe_words, find, alike), spacy_model


def evaluate(args, notes: dict, queries: list[dict], prepared: tuple, failures: list[dict]) -> tuple[dict, list[dict]]:
    """Score the answers, and the baseline's if there is one; returns what scores.json holds, and the captions to show."""
    baseline, count, spacy_model = prepared
    files = {"this": (args.output_file, read_answers(args.output_file, notes))} | baseline
    labels = {side: path.stem for side, (path, _) in files.items()}
    if args.compare_base:
        files["base"] = (base_file(args.output_file), read_answers(base_file(args.output_file), notes))
        labels = {"this": "adapter", "base": "base"}
    elif len(set(labels.values())) < len(labels):
        labels = {side: f"{path.absolute().parent.name}/{path.stem}" for side, (path, _) in files.items()}
    image_of = {query["id"]: query["image"] for query in queries}
    answers = {side: rows for side, (_, rows) in files.items()}
    judged = {side: count(rows) for side, rows in answers.items()}
    common = set.intersection(*({row["id"] for row in rows} for rows in answers.values()))
    if not common:
        stop(f"--baseline_file {files['base'][0]} answers none of the queries that {args.output_file} answers.")

    def figures(side: str, ids: set) -> tuple[dict, np.ndarray]:
        kept = [place for place, row in enumerate(answers[side]) if row["id"] in ids]
        rows = [answers[side][place] for place in kept]
        strict, normalised = judged[side][0][kept], judged[side][1][kept]
        by_image = sum_by_image(rows, strict, image_of)
        intervals = estimate(by_image, None, answered_sections(strict, SECTIONS[args.evaluation_type]))
        summary = summarize(rows, strict, normalised, notes, SECTIONS[args.evaluation_type])
        return {"file": files[side][0].name} | summary | {"intervals": intervals}, by_image

    known = common <= image_of.keys()
    asked = Counter("generative" if note["type"] == "generative" else "discriminative" for note in notes.values())
    scores = figures("this", set(notes))[0] | {
        "asked": {"generative": asked["generative"], "discriminative": asked["discriminative"]},
        "spacy_model": spacy_model,
        "nouns": args.nouns,
        "resampled_by": "picture" if known else "question, as --query_file does not name the pictures",
        "failures": failures,
    }
    if "base" in files:
        (this, by_image), (base, base_by_image) = figures("this", common), figures("base", common)
        difference = estimate(by_image, base_by_image, list(this["intervals"]))
        scores["comparison"] = {
            "left_out": len({row["id"] for rows in answers.values() for row in rows} - common),
            "labels": [labels["base"], labels["this"]],
            "base": base,
            "this": this,
            "difference": difference,
        }
    shown = {}
    for side in reversed(files):
        for row in answers[side]:
            if row["id"] in common and row["id"] in judged[side][2]:
                shown.setdefault(row["id"], []).append((labels[side], row["response"], judged[side][2][row["id"]]))
    return scores, [{"image": image_of.get(number), "captions": captions} for number, captions in shown.items()]


# ---------------------------------------------------------------------------- report

TITLES = {"chair": "CHAIR ↓", "cover": "Cover ↑", "hal": "Hal ↓", "cog": "Cog ↓",
          "accuracy": "accuracy ↑", "precision": "precision ↑", "recall": "recall ↑", "f1": "F1 ↑"}  # fmt: skip


def print_scores(scores: dict) -> None:
    """Print the figures: one file's with their intervals, or base beside adapter with the difference's."""
    comparison = scores.get("comparison")
    this, base = (comparison["this"], comparison["base"]) if comparison else (scores, None)
    estimates = comparison["difference"] if comparison else this["intervals"]
    columns = (
        [*map(escape, comparison["labels"]), "difference (95 %)", "p"] if comparison else ["score", "95 % interval"]
    )
    official = "official scoring"
    if scores["nouns"] != "nltk":
        official = "nouns looked up without a tagger, so not the official scores"
    elif not scores["spacy_model"].startswith("en_core_web_lg"):
        official = "official rules with another spaCy model than en_core_web_lg"
    table = Table("", *columns, "normalised", title=f"AMBER: {official}", box=box.SIMPLE_HEAD, pad_edge=False)

    def add_figure(
        title: str, value: float, before: float | None, known: dict, plain: float | None, digits: int
    ) -> None:
        interval = f"{known['low']:.1f} to {known['high']:.1f}"
        cells = [f"{value:.{digits}f}", interval]
        if comparison:
            p_value = "<.001" if known["p_value"] < 0.001 else f"{known['p_value']:.3f}".removeprefix("0")
            cells = [f"{before:.{digits}f}", cells[0], f"{value - before:+.{digits}f} ({interval})", p_value]
        table.add_row(title, *cells, "" if plain is None else f"{plain:.1f}")

    for section, figures in this["strict"].items():
        if section in estimates:
            table.add_row(f"[bold]{section}")
            for figure, value in figures.items():
                before = base["strict"][section][figure] if comparison else None
                plain = this["normalised"].get(section, {}).get(figure)
                add_figure(f"  {TITLES[figure]}", value, before, estimates[section][figure], plain, 1)
    if "amber" in estimates:
        before = base["amber_score"] if comparison else None
        add_figure("[bold]AMBER score ↑", this["amber_score"], before, estimates["amber"]["score"], None, 2)
    console.print(table)
    counts = ", ".join(f"{count:,} of {scores['asked'][name]:,} {name}" for name, count in this["answers"].items())
    lengths = " and ".join(str(words) for words in this["mean_words"].values())
    console.print(
        f"answers: {counts}, of {lengths} words on average; nouns: {scores['nouns']}, alike by {scores['spacy_model']}"
    )
    if comparison and comparison["left_out"]:
        console.print(f"compared are the answers that both files have; {comparison['left_out']:,} are in one file only")
    if scores["resampled_by"] != "picture":
        console.print(f"intervals are by {scores['resampled_by']}: they are too narrow")
    empty = [section for section in this["strict"] if section not in estimates]
    if empty:
        console.print(f"no answers, so no figures: {', '.join(empty)}")
    if this["neither_yes_nor_no"]:
        console.print(f"{this['neither_yes_nor_no']} % of the discriminative answers begin with neither yes nor no")


def draw_scores(scores: dict, path: Path) -> None:
    """Draw the figures of scores.json as bars with 95 % intervals, base beside this if there is a baseline."""
    comparison = scores.get("comparison")
    sides, labels, colours = [scores], [""], ["#1b7837"]
    if comparison:
        sides, labels, colours = [comparison["base"], comparison["this"]], comparison["labels"], ["#9aa5b1", "#1b7837"]
    panels = [
        name
        for name in ("generative", "discriminative", "existence", "attribute", "relation")
        if name in sides[-1]["intervals"]
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 3 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, section in zip(axes.flat, panels, strict=True):
        for shift, (label, side, colour) in enumerate(zip(labels, sides, colours, strict=True)):
            values = side["strict"][section]
            places = np.arange(len(values)) + 0.4 * (shift - (len(sides) - 1) / 2)
            known = [side["intervals"][section][name] for name in values]
            errors = [[max(0, value - edge["low"]) for value, edge in zip(values.values(), known, strict=True)],
                      [max(0, edge["high"] - value) for value, edge in zip(values.values(), known, strict=True)]]  # fmt: skip
            bars = axis.bar(
                places, values.values(), 0.38, color=colour, label=label, yerr=errors, ecolor="#444444", capsize=2
            )
            axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axis.set_xticks(range(len(values)), [TITLES[name] for name in values], fontsize=8)
        axis.set_title(section, fontsize=10)
        axis.set_ylim(0, 115)
        axis.spines[["top", "right"]].set_visible(False)
    if comparison:
        axes.flat[0].legend(fontsize=8, frameon=False)
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
<h1>{{ heading }}</h1><p>Marked: words for things that are not in the picture, by
AMBER's annotation. Colours, numbers and repetitions are not judged.</p>
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
        with suppress(
            OSError, TypeError, ValueError
        ):  # a baseline's picture may not be here: its captions are shown all the same
            address = embed_picture(load_image(find_picture(image_dir, entry["image"])))
        captions = []
        for side, text, wrong in entry["captions"]:
            words = "|".join(map(re.escape, sorted(set(wrong))))
            captions.append((side, re.split(rf"\b({words})\b", text) if words else [text], len(wrong)))
        pictures.append({"image": entry["image"], "address": address, "captions": captions})
    both = any(len(entry["captions"]) > 1 for entry in shown)
    heading = f"The {len(pictures)} captions that {'changed most' if both else 'hallucinate most'}, of {len(shown)}"
    write_whole(path, GALLERY.render(pictures=pictures, heading=heading))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    notes = None if args.skip_evaluation and args.evaluation_type == "a" else read_annotations(args)
    every_query = read_queries(args.query_file) if args.query_file else []
    prepared = prepare_scoring(args, notes) if MAIN_PROCESS and not args.skip_evaluation else None
    failures_file = args.output_file.with_name(f"{args.output_file.stem}_failures.json")
    nothing = False
    if args.skip_inference:
        failures = read_json(failures_file, "the failures file") if failures_file.exists() else []
    else:
        queries = select_queries(args, every_query, notes)
        failures = answer_benchmark(args, every_query, queries)
        nothing = len(failures) == len(queries)
    if not MAIN_PROCESS:
        return
    if failures:
        write_whole(failures_file, json.dumps(failures, indent=1))
        console.print(f"{len(failures):,} queries could not be answered and are listed in {failures_file}; "
                      f"the first: {failures[0]['image']} {failures[0]['reason']}")  # fmt: skip
    else:
        failures_file.unlink(missing_ok=True)
    if not args.skip_evaluation and not nothing:
        folder = args.output_file.absolute().parent
        for name in ("scores.png", "gallery.html"):
            (folder / name).unlink(missing_ok=True)
        scores, captions = evaluate(args, notes, every_query, prepared, failures)
        write_whole(folder / "scores.json", json.dumps(scores, indent=1))
        print_scores(scores)
        if scores["intervals"]:
            draw_scores(scores, folder / "scores.png")
        if captions:
            write_gallery(captions, args.image_dir, folder / "gallery.html")
        console.print(f"scores.json, scores.png and gallery.html are in {folder}")
    if failures:
        raise SystemExit(3)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on after the last answer in the journal.", code=130)
    except torch.OutOfMemoryError:
        stop("the GPU's memory is full; use a smaller --batch_size, or --load_4bit.")
    except OSError as error:  # a full disk, a folder that cannot be written
        stop(f"{error}; answers that were given are in the journal, and the same command goes on after them.")
