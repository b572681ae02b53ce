"""Checkpoints in LLaVA's own format load as the original code reads them; adapters take effect or are refused."""

import inspect
import json
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import MINIATURE, ROOT, build_original_llava
from PIL import Image
from safetensors.torch import load_file, save_file

import llava_orpo_training as training

SIZES = {
    "landscape": (640, 480),
    "portrait": (333, 500),
    "square": (500, 500),
    "very wide": (1200, 200),
    "tiny": (30, 20),
}


@pytest.fixture(scope="module", params=["mistral", "llama"])
def original(request, tmp_path_factory):
    """(folder, the original code's model, its configuration) of a tiny checkpoint in LLaVA's own format."""
    return build_original_llava(tmp_path_factory.mktemp("original") / f"llava-v1.6-{request.param}", request.param)


def load(folder, *args, **options):
    return training.load_llava(str(folder), *args, **({"device": "cpu"} | options))


def refused(capsys, folder, *args, **options) -> str:
    """The one sentence with which a load ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        load(folder, *args, **options)
    error = capsys.readouterr().err
    sentence = error[error.index("error: ") :]
    assert stopped.value.code == 2 and sentence.count("\n") == 1 and "Traceback" not in error
    return sentence


def picture(size) -> Image.Image:
    return Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600)).resize(size)


# ---------------------------------------------------------------------------- the original code as oracle


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_original_format_equals_the_original_code(original, size):
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from transformers import LlamaTokenizer

    folder, oracle, config = original
    model, processor = load(folder)
    image, question = picture(size), "What is there?\nAnd where?"
    talk = conv_templates["mistral_instruct" if config.model_type == "llava_mistral" else "llava_v1"].copy()
    talk.append_message(talk.roles[0], f"<image>\n{question}")
    talk.append_message(talk.roles[1], None)
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=True)
    ids = tokenizer_image_token(talk.get_prompt(), tokenizer, return_tensors="pt")[None]
    tiles = process_images([image], oracle.get_vision_tower().image_processor, config)

    prompt = training.build_prompt(processor, question, image.size)
    text = [token for token in prompt if token != 32000]
    assert text == [token for token in ids[0].tolist() if token >= 0]
    assert prompt.index(32000) == ids[0].tolist().index(-200)
    pixels = processor.image_processor(image, return_tensors="pt")
    assert torch.allclose(pixels["pixel_values"][0], tiles[0], atol=1e-5, rtol=0)
    with torch.no_grad():
        expected = oracle(input_ids=ids, images=[tiles[0]], image_sizes=[image.size]).logits[0]
        found = model(input_ids=torch.tensor([prompt]), **pixels).logits[0]
    assert len(found) == len(expected)  # as many image tokens
    assert torch.allclose(found[-1, :32000], expected[-1], atol=1e-4, rtol=0)
    assert (found[:, 32000:].amax(1) < found[:, :32000].amax(1)).all()  # a row that was added is never said

    tokens = []
    with torch.no_grad():
        embeds = oracle.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, [tiles[0]], [image.size])[4]
        for _ in range(32):
            tokens.append(oracle(inputs_embeds=embeds).logits[0, -1].argmax().item())
            embeds = torch.cat([embeds, oracle.get_model().embed_tokens(torch.tensor([[tokens[-1]]]))], dim=1)
    said = model.generate(
        input_ids=torch.tensor([prompt]), **pixels, do_sample=False, max_new_tokens=32, eos_token_id=-1, pad_token_id=0
    )
    assert said[0, len(prompt) :].tolist() == tokens


def test_vision_weights_may_lie_in_their_own_checkpoint(original, tmp_path):
    folder, _, _ = original
    shutil.copytree(folder, tmp_path / "bare")
    weights = load_file(folder / "model.safetensors")
    kept = {key: weight for key, weight in weights.items() if "vision_tower" not in key}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    whole, bare = load(folder)[0].state_dict(), load(tmp_path / "bare")[0].state_dict()
    assert all(torch.equal(whole[key], bare[key]) for key in whole) and set(whole) == set(bare)


def test_it_is_saved_in_the_hubs_layout_and_loads_again(original, tmp_path):
    model, processor = load(original[0])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
        "image_newline",
    }
    again, processor_again = load(tmp_path)
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())
    for question in ("What?", "Is there a cup?"):
        assert training.build_prompt(processor, question, (64, 48)) == training.build_prompt(
            processor_again, question, (64, 48)
        )


def test_shards_and_a_grid_written_as_text(original, tmp_path):
    """liuhaotian's folders are sharded, and some write the grid as a string."""
    folder, _, _ = original
    shutil.copytree(folder, tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: weights[key] for key in keys}, tmp_path / "sharded" / name, {"format": "pt"})
    (tmp_path / "sharded" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["image_grid_pinpoints"] = str(config["image_grid_pinpoints"])
    (tmp_path / "sharded" / "config.json").write_text(json.dumps(config))
    whole, sharded = load(folder)[0], load(tmp_path / "sharded")[0]
    assert all(torch.equal(weight, sharded.state_dict()[key]) for key, weight in whole.state_dict().items())
    assert whole.config.image_grid_pinpoints == sharded.config.image_grid_pinpoints


def test_four_bits_of_the_original_format(original):
    model, _ = load(original[0], load_4bit=True)
    assert type(model.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.shape[0] == 32064
    whole = [*model.model.vision_tower.modules(), *model.model.multi_modal_projector.modules()]
    assert all(type(module) is torch.nn.Linear for module in whole if isinstance(module, torch.nn.Linear))


# ---------------------------------------------------------------------------- cache_position


def test_cache_position_is_dropped_where_forward_does_not_know_it(original):
    _, oracle, _ = original
    ids = torch.tensor([[1, 5, 9]])
    with pytest.raises(TypeError):
        oracle(input_ids=ids, cache_position=torch.arange(3))
    signature = inspect.signature(oracle.forward)
    forward = oracle.forward
    try:
        assert training.allow_cache_position(oracle) is oracle
        patched = oracle(input_ids=ids, cache_position=torch.arange(3)).logits
        assert inspect.signature(oracle.forward) == signature
    finally:
        oracle.forward = forward
    assert torch.equal(patched, oracle(input_ids=ids).logits)
    model = torch.nn.Module()
    model.forward = known = lambda x, **kwargs: x
    assert training.allow_cache_position(model).forward is known


# ---------------------------------------------------------------------------- adapters


def make_adapter(folder, model_path=MINIATURE / "model", rank=4, **options):
    """A LoRA adapter of random weights on the language model, saved by PEFT; returns (folder, its logits)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, processor = load(model_path)
    settings = {
        "target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)",
        "init_lora_weights": False,
    } | options
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, **settings)).eval()
    model.save_pretrained(folder)
    return folder, training.probe_logits(model, processor)


def rename(folder, pattern: str, replacement: str) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {re.sub(pattern, replacement, key): weight for key, weight in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})


def change_config(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_adapter_is_applied_and_switched_off(tmp_path):
    folder, expected = make_adapter(tmp_path / "adapter")
    base, processor = load(MINIATURE / "model")
    model, _ = load(MINIATURE / "model", str(folder))
    assert torch.equal(training.probe_logits(model, processor), expected)
    plain = training.probe_logits(base, processor)
    assert (
        torch.equal(training.probe_logits(model, processor, adapter=False), plain)
        and (expected - plain).abs().max() > 0.1
    )


def test_an_adapter_on_the_projector_alone(tmp_path):
    folder, expected = make_adapter(tmp_path / "adapter", target_modules=r".*multi_modal_projector\.linear_[12]")
    rename(folder, r"model\.multi_modal_projector", "multi_modal_projector")
    model, processor = load(MINIATURE / "model", str(folder))
    assert torch.equal(training.probe_logits(model, processor), expected)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(r"model\.language_model\.layers", "language_model.model.layers"), (r"model\.language_model\.layers", "model.layers"),
     (r"^base_model\.model\.", ""), (r"^base_model\.model\.", "base_model.model.base_model.model."),
     (r"model\.language_model\.layers", "language_model.layers")],
)  # fmt: skip
def test_other_key_layouts_are_mapped(pattern, replacement, tmp_path):
    folder, expected = make_adapter(tmp_path / "adapter")
    rename(folder, pattern, replacement)
    change_config(folder, target_modules=["q_proj", "v_proj", "down_proj"])  # would also name the vision tower's
    model, processor = load(MINIATURE / "model", str(folder))
    assert torch.equal(training.probe_logits(model, processor), expected)


def test_an_adapter_of_the_original_format_and_back(original, tmp_path):
    """Made on a checkpoint in LLaVA's own format, it works on the same weights in the hub's layout."""
    model, processor = load(original[0])
    model.save_pretrained(tmp_path / "hub")
    processor.save_pretrained(tmp_path / "hub")
    folder, expected = make_adapter(tmp_path / "adapter", original[0])
    for base in (original[0], tmp_path / "hub"):
        model, processor = load(base, str(folder))
        assert torch.allclose(training.probe_logits(model, processor), expected, atol=1e-6)


@pytest.mark.parametrize(
    "fault",
    ["foreign", "missing", "rank", "other base", "zero", "pickled", "empty", "no config", "IA3", "cut", "not a number"],
)
def test_an_adapter_that_cannot_be_right_is_refused(fault, tmp_path, capsys):
    folder, _ = make_adapter(tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    words = {"foreign": "no layer for", "missing": "it lacks", "rank": "does not fit", "other base": "does not fit",
             "zero": "the same with it and without it", "pickled": "convert", "empty": "no adapter_model.safetensors", "no config": "adapter_config",
             "IA3": "IA3", "cut": "adapter", "whole target": "down_proj", "saved module": "lm_head",
             "not a number": "not finite", "more beside": "non_lora_trainables", "pissa": "pissa", "odd rank": "fit"}[fault]  # fmt: skip
    if fault == "foreign":
        rename(folder, r"self_attn\.q_proj", "attention.wq")
    elif fault == "missing":
        save_file({key: weight for key, weight in weights.items() if "layers.2.mlp" not in key}, file, {"format": "pt"})
    elif fault == "rank":
        change_config(folder, r=16)
    elif fault == "other base":
        save_file(
            {key: torch.cat([weight, weight], 1 if "lora_A" in key else 0) for key, weight in weights.items()}, file
        )
    elif fault == "zero":
        save_file({key: weight * ("lora_A" in key) for key, weight in weights.items()}, file, {"format": "pt"})
    elif fault == "pickled":
        torch.save(weights, folder / "adapter_model.bin")
        file.unlink()
    elif fault == "empty":
        file.unlink()
    elif fault == "no config":
        (folder / "adapter_config.json").unlink()
    elif fault == "whole target":
        save_file({key: weight for key, weight in weights.items() if "down_proj" not in key}, file, {"format": "pt"})
    elif fault == "saved module":
        change_config(folder, modules_to_save=["lm_head"])
    elif fault == "not a number":
        save_file({key: weight * float("nan") for key, weight in weights.items()}, file, {"format": "pt"})
    elif fault == "more beside":
        (folder / "non_lora_trainables.bin").write_bytes(b"")
    elif fault == "pissa":
        change_config(folder, init_lora_weights="pissa")
    elif fault == "odd rank":
        change_config(folder, r="x")
    elif fault == "IA3":
        change_config(folder, peft_type="IA3", feedforward_modules=[])
    else:
        file.write_bytes(file.read_bytes()[:-1000])
    sentence = refused(capsys, MINIATURE / "model", str(folder))
    assert "--lora_path" in sentence and words in sentence


@pytest.mark.parametrize(
    "options",
    [{"target_modules": r".*language_model.layers.[12].*\.(q_proj|v_proj)"}, {"target_modules": r".*vision_tower.*\.(q_proj|v_proj)"},
     {"target_modules": ["language_model.layers.1.self_attn.q_proj", "language_model.layers.2.self_attn.v_proj"]},
     {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*(vision_tower|layers\.0\.mlp).*"}, {"use_rslora": True},
     {"use_dora": True}, {"layers_to_transform": [0, 2], "target_modules": ["up_proj"]}, {"target_modules": ["gate_proj", "lm_head"]},
     {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"language_model.layers.1.self_attn.q_proj": 64}}],
    ids=["some layers", "vision", "full names", "excluded", "rslora", "dora", "layers", "head", "patterns"],
)  # fmt: skip
def test_every_kind_of_lora_is_applied_as_it_was_trained(options, tmp_path):
    folder, expected = make_adapter(tmp_path / "adapter", **options)
    model, processor = load(MINIATURE / "model", str(folder))
    assert torch.equal(training.probe_logits(model, processor), expected)
    assert torch.equal(
        training.probe_logits(model, processor, adapter=False),
        training.probe_logits(load(MINIATURE / "model")[0], processor),
    )


def test_patterns_of_an_older_layout_keep_their_scale(tmp_path):
    layer = "model.language_model.layers.1.self_attn.q_proj"
    folder, expected = make_adapter(tmp_path / "adapter", alpha_pattern={layer: 64}, rank_pattern={layer: 2})
    rename(folder, r"model\.language_model\.layers", "language_model.model.layers")
    older = layer.replace("model.language_model", "language_model.model")
    change_config(
        folder, alpha_pattern={older: 64}, rank_pattern={older: 2}, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    model, processor = load(MINIATURE / "model", str(folder))
    assert torch.equal(training.probe_logits(model, processor), expected)


@pytest.mark.parametrize("rows", [100, 513, 577])
def test_an_adapter_of_another_vocabulary_is_refused(rows, tmp_path, capsys):
    """Seed 000's second challenge: embedding and head saved with `<image>` as one more row."""
    folder, _ = make_adapter(tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = torch.zeros(rows, 128)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    sentence = refused(capsys, MINIATURE / "model", str(folder))
    assert "lm_head" in sentence and f"[{rows}, 128]" in sentence and "[576, 128]" in sentence


def test_an_adapter_is_refused_before_the_base_is_read(tmp_path, capsys):
    assert "--lora_path" in refused(capsys, tmp_path / "no such base", str(tmp_path / "no such adapter"))


# ---------------------------------------------------------------------------- what must never be loaded


@pytest.mark.parametrize("fault", ["pickled", "missing shard", "truncated", "layers", "width", "missing key", "extra key",
                                   "other model", "llava 1.5", "tokenizer", "no config", "code", "tower code", "part of a tower",
                                   "other vocabulary", "odd value"])  # fmt: skip
def test_a_bad_checkpoint_is_one_sentence(fault, original, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(original[0], folder)
    file = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    words = "config.json"
    if fault == "pickled":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
        words = "model.safetensors"
    elif fault == "missing shard":
        file.rename(folder / "model-00001-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        words = "model-00002-of-00002.safetensors"
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
        words = "cannot be loaded"
    elif fault == "layers":
        config["num_hidden_layers"] = 3
    elif fault == "width":
        config["intermediate_size"], words = 96, "ignore_mismatched_sizes"  # after transformers' own table of the sizes
    elif fault in ("missing key", "extra key"):
        weights = load_file(file)
        if fault == "missing key":
            del weights["model.norm.weight"]
        else:
            weights["model.extra.weight"] = torch.zeros(3)
        save_file(weights, file, {"format": "pt"})
        words = "norm.weight" if fault == "missing key" else "model.extra.weight"
    elif fault == "other model":
        config["model_type"], words = "bert", "bert"
    elif fault == "llava 1.5":
        config["image_aspect_ratio"], words = "pad", "image_aspect_ratio 'pad'"
    elif fault == "tokenizer":
        (folder / "tokenizer.model").unlink()
        words = "--model_path"
    elif fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "tower code":
        shutil.copytree(config["mm_vision_tower"], tmp_path / "tower")
        (tmp_path / "tower" / "config.json").write_text(
            '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}'
        )
        (tmp_path / "tower" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        config["mm_vision_tower"], words = str(tmp_path / "tower"), "cannot be read"
    elif fault == "part of a tower":
        weights = load_file(file)
        save_file(
            {key: weight for key, weight in weights.items() if "post_layernorm.bias" not in key}, file, {"format": "pt"}
        )
        words = "post_layernorm.bias"
    elif fault == "other vocabulary":
        config["vocab_size"], words = 64000, "vocab_size 64000"
    elif fault == "odd value":
        config["hidden_act"], words = "zz", "zz"
    else:
        config["model_type"], config["auto_map"] = "evil", {"AutoConfig": "evil.Config"}
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        words = "evil"
    if (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(config))
    assert words in refused(capsys, folder)
    assert not (tmp_path / "ran").exists()


def test_a_processor_with_code_is_refused_whatever_is_typed(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MINIATURE / "model", folder)
    (folder / "processor_config.json").write_text(
        '{"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}'
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = f"import llava_orpo_training as t; t.load_llava({str(folder)!r}, device='cpu')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input="y\ny\n", capture_output=True, text=True)
    assert done.returncode != 0 and not (tmp_path / "ran").exists() and "Traceback" not in done.stderr


def test_the_tower_of_all_published_checkpoints_is_spelled_out_right(original):
    from transformers import LlavaNextConfig

    written = json.loads((original[0] / "config.json").read_text()) | {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336"
    }
    config = training.read_original(str(original[0]), written)[0]
    published = LlavaNextConfig().vision_config
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "hidden_act",
    ):
        assert getattr(config.vision_config, name) == getattr(published, name)


def test_a_prompt_template_that_is_not_known_is_refused(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(MINIATURE / "model", folder)
    (folder / "chat_template.jinja").write_text("<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>")
    assert "prompt template" in refused(capsys, folder)
