"""Checkpoints in LLaVA's own format load as the original code reads them; adapters take effect or are refused."""

import inspect
import json
import random
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import MINIATURE, ROOT, build_original_llava
from PIL import Image
from safetensors.torch import load_file, save_file

import llava_orpo_training as training

WIDE_AND_TINY, OTHERS = [(640, 480), (30, 20)], [(333, 500), (500, 500), (1200, 200)]


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


def edit(folder, name: str, change) -> None:
    """Replace the tensors in a folder's file by `change(tensors)`, which must change something."""
    before = load_file(folder / name)
    after = change(dict(before))
    assert after.keys() != before.keys() or any(after[key] is not before[key] for key in after)
    save_file(after, folder / name, {"format": "pt"})


def configure(folder, name: str, **changes) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def pickle(folder, name: str) -> None:
    torch.save(load_file(folder / name), (folder / name).with_suffix(".bin"))
    (folder / name).unlink()


def cut(folder, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def picture(size) -> Image.Image:
    return Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600)).resize(size)


# ---------------------------------------------------------------------------- the original code as oracle


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [WIDE_AND_TINY, OTHERS])
def test_original_format_equals_the_original_code(original, sizes):
    """Token ids, pixels, logits and greedy answers."""
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from transformers import LlamaTokenizer

    folder, oracle, config = original
    model, processor = load(folder)
    question = "What is there?\nAnd where?"
    talk = conv_templates["mistral_instruct" if config.model_type == "llava_mistral" else "llava_v1"].copy()
    talk.append_message(talk.roles[0], f"<image>\n{question}")
    talk.append_message(talk.roles[1], None)
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=True)
    ids = tokenizer_image_token(talk.get_prompt(), tokenizer, return_tensors="pt")[None]
    for image in map(picture, sizes):
        tiles = process_images([image], oracle.get_vision_tower().image_processor, config)
        prompt = training.build_prompt(processor, question, image.size)
        assert [token for token in prompt if token != 32000] == [token for token in ids[0].tolist() if token >= 0]
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
        for _ in range(16):
            tokens.append(oracle(inputs_embeds=embeds).logits[0, -1].argmax().item())
            embeds = torch.cat([embeds, oracle.get_model().embed_tokens(torch.tensor([[tokens[-1]]]))], dim=1)
    options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": -1, "pad_token_id": 0}
    said = model.generate(input_ids=torch.tensor([prompt]), **pixels, **options)
    assert said[0, len(prompt) :].tolist() == tokens


def test_shards_a_grid_written_as_text_and_vision_weights_in_their_own_checkpoint(original, tmp_path):
    """liuhaotian's folders are sharded, and some write the grid as a string."""
    folder = shutil.copytree(original[0], tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    names = sorted(key for key in weights if "vision_tower" not in key)
    assert len(names) < len(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / name, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    grid = json.loads((folder / "config.json").read_text())["image_grid_pinpoints"]
    configure(folder, "config.json", image_grid_pinpoints=str(grid))
    whole, sharded = load(original[0])[0], load(folder)[0]
    assert whole.state_dict().keys() == sharded.state_dict().keys()
    assert all(torch.equal(weight, sharded.state_dict()[key]) for key, weight in whole.state_dict().items())
    assert whole.config.image_grid_pinpoints == sharded.config.image_grid_pinpoints


def test_an_adapter_fits_the_original_format_and_the_hubs(original, tmp_path):
    from transformers.conversion_mapping import get_model_conversion_mapping

    model, processor = load(original[0])
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.save_pretrained(tmp_path / "hub")
    processor.save_pretrained(tmp_path / "hub")
    again, processor_again = load(tmp_path / "hub")
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())
    prompts = [training.build_prompt(one, "Is there a cup?", (64, 48)) for one in (processor, processor_again)]
    assert prompts[0] == prompts[1]
    folder, expected = make_adapter(tmp_path / "adapter", original[0])
    for base in (original[0], tmp_path / "hub"):
        model, processor = load(base, str(folder))
        assert torch.allclose(training.probe_logits(model, processor), expected, atol=1e-6)


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
    options = {"target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)"} | options
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, init_lora_weights=False, **options)).eval()
    model.save_pretrained(folder)
    return folder, training.probe_logits(model, processor)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYERS, PREFIX, PROJECTOR = r"model\.language_model\.layers", r"^base_model\.model\.", "multi_modal_projector"
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
OLDER = ("language_model.model.layers", "model.layers", "language_model.layers")
LAYOUTS = [(LANGUAGE, LAYERS, older) for older in OLDER]
LAYOUTS += [(LANGUAGE, PREFIX, other) for other in ("", "base_model.model.base_model.model.")]
LAYOUTS += [(rf".*{PROJECTOR}\.linear_[12]", rf"model\.{PROJECTOR}", PROJECTOR)]


def rename(folder, pattern: str, replacement: str) -> None:
    edit(folder, WEIGHTS, lambda tensors: {re.sub(pattern, replacement, key): tensors[key] for key in tensors})


@pytest.mark.parametrize(("modules", "pattern", "replacement"), LAYOUTS)
def test_other_key_layouts_are_mapped_and_keep_their_scale(modules, pattern, replacement, tmp_path):
    layer = "model.language_model.layers.1.self_attn.q_proj"
    patterns = {"alpha_pattern": {layer: 64}, "rank_pattern": {layer: 2}} if modules == LANGUAGE else {}
    folder, expected = make_adapter(tmp_path / "adapter", target_modules=modules, **patterns)
    rename(folder, pattern, replacement)
    changes = {name: {re.sub(pattern, replacement, layer): value[layer]} for name, value in patterns.items()}
    if modules == LANGUAGE:
        changes["target_modules"] = ["q_proj", "v_proj", "down_proj"]  # would also name the vision tower's
    configure(folder, CONFIG, **changes)
    model, processor = load(MINIATURE / "model", str(folder))
    assert torch.equal(training.probe_logits(model, processor), expected)


def scale(folder, change) -> None:
    """Replace each of an adapter's weights by `change(key, weight)`, or drop it if that is None."""
    edit(folder, WEIGHTS, lambda old: {key: new for key in old if (new := change(key, old[key])) is not None})


HEAD = {
    "base_model.model.lm_head.weight": torch.zeros(577, 128)
}  # seed 000's second challenge: `<image>` is one more row
BAD_ADAPTERS = {  # what is wrong with it: (what the sentence names, what makes it so)
    "foreign": ("attention.wq", partial(rename, pattern=r"self_attn\.q_proj", replacement="attention.wq")),
    "missing": ("layers.2.mlp", partial(scale, change=lambda key, weight: None if "layers.2.mlp" in key else weight)),
    "rank": ("size mismatch", partial(configure, name=CONFIG, r=16)),
    "other base": (
        "size mismatch",
        partial(scale, change=lambda key, weight: torch.cat([weight] * 2, int("lora_A" in key))),
    ),
    "other vocabulary": ("[577, 128]", partial(edit, name=WEIGHTS, change=lambda tensors: tensors | HEAD)),
    "zero": ("the same with it and without it", partial(scale, change=lambda key, weight: weight * ("lora_A" in key))),
    "not a number": ("not finite", partial(scale, change=lambda _, weight: weight * torch.nan)),
    "pickled": ("convert", partial(pickle, name=WEIGHTS)),
    "no config": ("adapter_config.json", lambda folder: (folder / CONFIG).unlink()),
    "IA3": ("IA3", partial(configure, name=CONFIG, peft_type="IA3", feedforward_modules=[])),
    "cut": ("adapter", partial(cut, name=WEIGHTS)),
    "more beside": ("non_lora_trainables", lambda folder: (folder / "non_lora_trainables.bin").write_bytes(b"")),
}


@pytest.mark.parametrize("fault", BAD_ADAPTERS)
def test_an_adapter_that_cannot_be_right_is_refused(fault, tmp_path, capsys):
    folder, _ = make_adapter(tmp_path / "adapter")
    words, spoil = BAD_ADAPTERS[fault]
    spoil(folder)
    sentence = refused(capsys, MINIATURE / "model", str(folder))
    assert "--lora_path" in sentence and words in sentence


NAMES = [f"language_model.layers.{name}" for name in ("1.self_attn.q_proj", "2.mlp.up_proj")]
KINDS = {
    "plain": {},
    "some layers": {"target_modules": r".*language_model.layers.[12].*\.(q_proj|v_proj)"},
    "vision": {"target_modules": r".*vision_tower.*\.(q_proj|v_proj)"},
    "full names": {"target_modules": NAMES},
    "excluded": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*(vision_tower|layers\.0\.mlp).*"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "layers": {"layers_to_transform": [0, 2], "target_modules": ["up_proj"]},
    "head": {"target_modules": ["gate_proj", "lm_head"]},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {NAMES[0]: 64}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_is_applied_as_it_was_trained(kind, tmp_path):
    folder, expected = make_adapter(tmp_path / "adapter", **KINDS[kind])
    model, processor = load(MINIATURE / "model", str(folder))
    assert torch.equal(training.probe_logits(model, processor), expected)
    plain = training.probe_logits(load(MINIATURE / "model")[0], processor)
    assert torch.equal(training.probe_logits(model, processor, adapter=False), plain)
    assert (expected - plain).abs().max() > 1e-3


def test_an_adapter_is_refused_before_the_base_is_read(tmp_path, capsys):
    assert "--lora_path" in refused(capsys, tmp_path / "no such base", str(tmp_path / "no such adapter"))


# ---------------------------------------------------------------------------- what must never be loaded


def lose_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def set_config(**changes):
    return partial(configure, name="config.json", **changes)


def edit_model(change):
    return partial(edit, name="model.safetensors", change=change)


def lose(name):
    return edit_model(lambda tensors: {key: tensors[key] for key in tensors if name not in key})


def add_code(folder):
    set_config(model_type="evil", auto_map={"AutoConfig": "evil.Config"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def add_code_to_the_tower(folder):
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    (folder / "tower" / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    set_config(mm_vision_tower=str(folder / "tower"))(folder)


BAD_CHECKPOINTS = {  # what is wrong with it: (what the sentence names, what makes it so)
    "pickled": ("model.safetensors", partial(pickle, name="model.safetensors")),
    "missing shard": ("model-00002-of-00002.safetensors", lose_a_shard),
    "truncated": ("cannot be loaded", partial(cut, name="model.safetensors")),
    "layers": ("config.json", set_config(num_hidden_layers=3)),
    "width": ("ignore_mismatched_sizes", set_config(intermediate_size=96)),  # after transformers' own table of sizes
    "missing key": ("norm.weight", lose("model.norm.weight")),
    "part of a tower": ("post_layernorm.bias", lose("post_layernorm.bias")),
    "extra key": (
        "model.extra.weight",
        edit_model(lambda tensors: tensors | {"model.extra.weight": torch.zeros(3)}),
    ),
    "other model": ("bert", set_config(model_type="bert")),
    "llava 1.5": ("image_aspect_ratio 'pad'", set_config(image_aspect_ratio="pad")),
    "other vocabulary": ("vocab_size 64000", set_config(vocab_size=64000)),
    "no tokenizer": ("--model_path", lambda folder: (folder / "tokenizer.model").unlink()),
    "no config": ("config.json", lambda folder: (folder / "config.json").unlink()),
    "code": ("evil", add_code),
    "code in the tower": ("cannot be read", add_code_to_the_tower),
}


@pytest.mark.parametrize("fault", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_one_sentence(fault, original, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(original[0], folder)
    words, spoil = BAD_CHECKPOINTS[fault]
    spoil(folder)
    assert words in refused(capsys, folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("model_path", ["missing/model", "."])
def test_a_model_that_is_not_there_is_one_sentence(model_path, tmp_path, capsys):
    assert "--model_path" in refused(capsys, tmp_path / model_path)


@pytest.mark.slow
def test_a_processor_with_code_is_refused_whatever_is_typed(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MINIATURE / "model", folder)
    code = '{"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}'
    (folder / "processor_config.json").write_text(code)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = f"import llava_orpo_training as t; t.load_llava({str(folder)!r}, device='cpu')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input="y\ny\n", capture_output=True, text=True)
    assert done.returncode != 0 and not (tmp_path / "ran").exists() and "Traceback" not in done.stderr


def test_the_tower_of_all_published_checkpoints_is_spelled_out_right(original):
    """CLIP ViT-L/14-336, which is not fetched for its configuration: the figures are those of openai's config.json."""
    written = json.loads((original[0] / "config.json").read_text())
    written["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    vision = training.read_original(str(original[0]), written)[0].vision_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1024, 4096, 24)
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 336, 14)
    assert vision.hidden_act == "quick_gelu"


def test_a_prompt_template_that_is_not_known_is_refused(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(MINIATURE / "model", folder)
    (folder / "chat_template.jinja").write_text("<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>")
    assert "prompt template" in refused(capsys, folder)
