"""Shared fixtures: the miniature, and a narrow LLaVA-NeXT with LLaVA-1.6's geometry and tokenizer."""

import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "miniature"
SHARED = ROOT.parent / "shared" / "data"  # real photos and lists; tests do without where it is not there
sys.path.insert(0, str(ROOT))
os.environ.update(
    HF_HUB_OFFLINE="1", WANDB_MODE="offline", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false"
)


def build_photo_llava(folder: Path) -> Path:
    """Save a randomly initialised LLaVA-NeXT of LLaVA-1.6's geometry: 336-pixel CLIP, five grid shapes, the real
    Mistral tokenizer with `<image>` and `<pad>` on rows 32000 and 32001 of 32,064; layers are few and narrow."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaTokenizer,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        MistralConfig,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(files("mistral_common") / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=grid
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=336, patch_size=14
        ),
        text_config=MistralConfig(
            vocab_size=32064, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096, sliding_window=None, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=32000,
        image_grid_pinpoints=grid,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photo_llava(tmp_path_factory) -> Path:
    return build_photo_llava(tmp_path_factory.mktemp("photo_llava"))


def build_original_llava(folder: Path, language: str):
    """A tiny checkpoint in the format of liuhaotian's, made by the original code (PyPI llava-torch); returns (folder, the
    original code's model, its configuration). `language` is mistral or llama; the vision tower's own checkpoint lies
    beside the folder."""
    import importlib
    import json

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    name = f"Llava{language.capitalize()}"
    module = importlib.import_module(f"llava.model.language_model.llava_{language}")
    torch.manual_seed(0)
    tower = folder.parent / "tower"
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=336, patch_size=14
    )
    CLIPVisionModel(vision).save_pretrained(tower)
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(tower)
    settings = {
        "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "mm_vision_tower": str(tower), "mm_hidden_size": 64, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres", "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "tokenizer_padding_side": "right", "rope_theta": 1000000.0,
    } | ({"sliding_window": None} if language == "mistral" else {})  # fmt: skip
    original = getattr(module, f"{name}ForCausalLM")
    config = original.config_class(**settings)
    model = original(config).eval()
    torch.nn.init.normal_(model.model.image_newline, std=0.1)
    model.get_vision_tower().load_model()
    model.save_pretrained(folder)
    # as published: the tower's keys have one level more, the base of the rotary embedding is a key of its own
    weights = load_file(folder / "model.safetensors")
    longer = {
        key.replace("vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model."): weights[key]
        for key in weights
    }
    save_file(longer, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written["rope_theta"] = written.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(written))
    shutil.copy(files("mistral_common") / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder, model, config


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, Path]:
    """The miniature with its adapter, quantized in every scheme: {scheme: folder}."""
    import llava_quantize_vllm as quantizing

    root = tmp_path_factory.mktemp("made") / "quantized_models"
    folders = {scheme: root / f"miniature-{name}" for scheme, name in quantizing.SCHEMES.items()}
    for scheme, folder in folders.items():
        flags = ["--test_mode", "--scheme", scheme, "--output_dir", str(folder), "--calibration_samples", "48"]
        flags += ["--gate_samples", "12" if scheme == "FP8_DYNAMIC" else "0"]
        if scheme == "FP8_BLOCK":  # the miniature's k_proj has 64 rows
            flags += ["--ignore", "lm_head", "vision_tower", "multi_modal_projector", "self_attn"]
        quantizing.main(flags)
    return folders
