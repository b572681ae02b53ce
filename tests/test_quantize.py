"""Quantizing: the merge is PEFT's, a shard at a time; what is written loads right; the gate's figures are the real ones."""

import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import MINIATURE, ROOT, build_original_llava
from safetensors.torch import load_file, save_file
from test_loading import WEIGHTS, configure, edit, make_adapter

import llava_quantize_vllm as quantizing
from llava_orpo_training import build_prompt, generate_answers, load_llava, probe_logits

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "llava_quantize_vllm.py"
BASE, ADAPTER = MINIATURE / "model", MINIATURE / "adapter"


def run(folder, *flags):
    """Quantize the miniature to `folder`, without the gate unless the flags say otherwise, and return the report."""
    quantizing.main(["--test_mode", "--gate_samples", "0", *map(str, flags), "--output_dir", str(folder)])
    return read_report(folder)


def read_report(folder):
    return json.loads((folder / "quantization_report.json").read_text(), parse_constant=pytest.fail)


def read_tensors(folder, own_names=False):
    tensors = load_file(folder / "model.safetensors")
    return {quantizing.rename_key(key): tensor for key, tensor in tensors.items()} if own_names else tensors


def merge_by_peft(lora_path=ADAPTER, nf4=False):
    """PEFT's merge of the whole model, if asked for into the weights that QLoRA's training sees."""
    model, processor = load_llava(str(BASE), str(lora_path))
    if nf4:
        from bitsandbytes.functional import dequantize_4bit

        for name, module in load_llava(str(BASE), load_4bit=True)[0].named_modules():
            if type(module).__name__ == "Linear4bit":
                layer = model.get_base_model().get_submodule(name)
                rounded = dequantize_4bit(module.weight.data, module.weight.quant_state)
                getattr(layer, "base_layer", layer).weight.data = rounded
    return model.merge_and_unload(), processor


def test_the_merge_is_pefts_and_in_the_hubs_layout(made):
    assert read_tensors(made["BF16"]).keys() == read_tensors(BASE).keys()
    wanted = merge_by_peft()[0].state_dict()
    for name, tensor in read_tensors(made["BF16"], own_names=True).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wanted[name].to(torch.bfloat16)), name
    adapter = read_report(made["BF16"])["adapter"]
    assert (adapter["layers"], adapter["changed"], adapter["into"]) == (28, 28, "the base's own weights")


def train_adapter(folder, **options):
    """Save an adapter of random weights. What it trains as a whole is moved, too."""
    make_adapter(folder, **options)
    whole = [key for key in load_file(folder / WEIGHTS) if "linear_1" in key and "lora" not in key]
    if whole:
        edit(folder, WEIGHTS, lambda old: old | {key: old[key] + 0.1 * torch.randn_like(old[key]) for key in whole})
    return {key.removeprefix("base_model.model.").removesuffix(".weight") for key in whole}


KINDS = [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
KINDS += [{"modules_to_save": ["linear_1"]}, {"target_modules": ["lm_head", "embed_tokens", "v_proj"]}]
KINDS += [{"target_modules": "all-linear", "exclude_modules": ["lm_head"]}]


@pytest.mark.parametrize("options", KINDS)
def test_every_kind_of_lora_is_merged_as_peft_does(options, tmp_path):
    whole = train_adapter(tmp_path / "adapter", **options)
    report = run(tmp_path / "q", "--scheme", "BF16", "--lora_path", tmp_path / "adapter")["adapter"]
    wanted = merge_by_peft(tmp_path / "adapter")[0].state_dict()
    base, changed = read_tensors(BASE, own_names=True), set()
    for name, tensor in read_tensors(tmp_path / "q", own_names=True).items():
        assert torch.allclose(tensor.float(), wanted[name], rtol=0.005, atol=1e-6), name
        if not torch.equal(tensor, base[name]):
            changed.add(name.removesuffix(".weight"))
    assert len(changed) == report["changed"] == report["layers"] > 3 and whole <= changed


def test_after_qlora_the_merge_is_into_rounded_weights(tmp_path):
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    (adapter / "arguments.json").write_text(json.dumps({"load_4bit": True}))
    flags = ["--scheme", "BF16", "--lora_path", adapter, "--gate_samples", "4"]
    report = run(tmp_path / "rounded", *flags)
    assert report["adapter"]["into"] == "NF4-rounded weights" and report["quality"]["kl"] < 1e-4  # the gate rounds too
    wanted = merge_by_peft(adapter, nf4=True)[0].state_dict()
    for name, tensor in read_tensors(tmp_path / "rounded", own_names=True).items():
        assert torch.equal(tensor, wanted[name].to(torch.bfloat16)), name
    run(tmp_path / "whole", *flags, "--merge_lora", "base")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(read_tensors(tmp_path / "whole", own_names=True)[name], wanted[name].to(torch.bfloat16))


@pytest.mark.parametrize("scheme", ["BF16", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16"])
def test_transformers_loads_it_right(made, scheme):
    wanted, processor = merge_by_peft()
    model, loaded = load_llava(str(made[scheme]))
    words = torch.tensor([[1, 5, 9]])
    part = model.model.language_model(words).last_hidden_state  # before any forward of the model as a whole
    found, bound = probe_logits(model, loaded), {"BF16": 0.1, "W4A16": 1.5}.get(scheme, 0.8)
    assert torch.equal(model.model.language_model(words).last_hidden_state, part)
    assert (found - probe_logits(wanted, processor)).abs().max() < bound  # garbage differs by 10 and more
    assert (found.argmax(-1) == probe_logits(wanted, processor).argmax(-1)).float().mean() > 0.85
    kept = [name for name in model.state_dict() if re.search("vision|projector|lm_head|embed", name)]
    pairs = [[one.state_dict()[name].to(torch.bfloat16) for one in (model, wanted)] for name in kept]
    assert len(kept) > 60 and all(torch.equal(*pair) for pair in pairs)
    projection = model.model.language_model.layers[1].mlp.down_proj
    assert hasattr(projection, "quantization_scheme") == (scheme != "BF16")


def test_fp8_tensors_are_those_of_llm_compressors_oneshot(made, tmp_path):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load_llava(str(made["BF16"]))[0].to(torch.bfloat16)
    ignore = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=ignore))
    model.save_pretrained(tmp_path, save_compressed=True)
    ours, theirs = read_tensors(made["FP8_DYNAMIC"]), read_tensors(tmp_path)
    assert ours.keys() == theirs.keys() and sum(key.endswith("weight_scale") for key in ours) == 28
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor.float(), theirs[key].float()), key


def test_the_seeds_choice_quantizes_all_but_the_head(tmp_path):
    """The rows' scale is the greatest weight over 448, the greatest E4M3 number; weights are stored in FP8."""
    assert run(tmp_path / "q", "--ignore", "lm_head")["quality"] is None
    tensors, base = read_tensors(tmp_path / "q"), read_tensors(BASE)
    linear = {key.removesuffix("_scale") for key in tensors if key.endswith("weight_scale")}
    names = {quantizing.rename_key(key).removesuffix(".weight") for key in linear}
    assert names == quantizing.list_linear(load_llava(str(BASE))[0]).keys() - {"lm_head"}
    assert any("vision_tower" in name for name in names)
    key = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"  # which the adapter leaves alone
    assert tensors[key].dtype == torch.float8_e4m3fn
    scale = base[key].float().abs().amax(1, keepdim=True) / 448
    assert torch.allclose(tensors[key + "_scale"].float(), scale, rtol=0.01)
    error = (tensors[key].float() * tensors[key + "_scale"].float() - base[key].float()).abs()
    assert (error <= 19 * scale).all()  # half of E4M3's step of 32, and the division in bfloat16


def test_the_report_says_what_is_there(made):
    for scheme, folder in made.items():
        report = read_report(folder)
        assert report["scheme"] == scheme
        assert report["size_bytes"]["quantized"] == (folder / "model.safetensors").stat().st_size
        assert report["size_bytes"]["base"] == (BASE / "model.safetensors").stat().st_size
        adapter = (ADAPTER / "adapter_model.safetensors").read_bytes()
        assert report["adapter"]["sha256"] == hashlib.sha256(adapter).hexdigest()
        assert report["versions"]["llmcompressor"] == "0.14.0.1" and report["seconds"]["checkpoint"] > 0
        assert 0 < report["peak_memory_bytes"]["before"] <= report["peak_memory_bytes"]["checkpoint"]
        written = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("ignore")
        assert written == report["ignored"]
    sizes = {scheme: read_report(folder)["size_bytes"]["ratio"] for scheme, folder in made.items()}
    assert sizes["W4A16"] < sizes["W8A8"] < 0.8 and sizes["FP8_DYNAMIC"] < 0.8
    assert sizes["BF16"] == pytest.approx(1, abs=0.01)


# ---------------------------------------------------------------------------- the gate


def ask_gate(folder, count, lora_path=ADAPTER):
    """The gate's figures for base + adapter against the checkpoint in `folder`, with the samples that it asked."""
    samples, _ = quantizing.read_samples(str(MINIATURE / "preferences"), count, 0)
    processor = load_llava(str(BASE))[1]
    reference = (BASE, str(lora_path), False, "cpu")
    return quantizing.run_gate(reference, folder, processor, samples, 128, 0.02), samples


def test_the_gates_figures_are_those_of_one_question_at_a_time():
    """Base + adapter against the base alone: both in float32, so that batches round nothing away."""
    quality, samples = ask_gate(BASE, 12)
    before, processor = load_llava(str(BASE), str(ADAPTER))
    after, _ = load_llava(str(BASE))
    kl, same, changed = [], [], 0
    for image, question, _ in samples:
        texts = [generate_answers(model, processor, [image], [question], 128)[0] for model in (before, after)]
        changed += texts[0] != texts[1]
        prompt = build_prompt(processor, question, image.size)
        answer = processor.tokenizer(f" {texts[0]}", add_special_tokens=False).input_ids + [2]
        pixels = processor.image_processor(image, return_tensors="pt")

        with torch.no_grad():
            p, q = (model(input_ids=torch.tensor([prompt + answer]), **pixels).logits[0] for model in (before, after))
        p, q = (logits[len(prompt) - 1 : -1].log_softmax(-1) for logits in (p, q))
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert (quality["samples"], quality["tokens"], quality["answers_changed"]) == (12, len(torch.cat(kl)), changed)
    assert quality["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3) and quality["passed"] is False
    assert quality["kl_max"] == pytest.approx(torch.cat(kl).max().item(), rel=1e-3)
    assert quality["top1_agreement"] == pytest.approx(torch.cat(same).float().mean().item(), abs=1e-6)
    assert quality["kl_base_alone"] < 1e-6 and 3 < changed < 13


def test_the_gate_sees_that_the_adapter_is_in_it(made):
    quality = read_report(made["FP8_DYNAMIC"])["quality"]
    assert quality["passed"] and quality["kl"] < 0.005 and quality["top1_agreement"] > 0.97
    assert quality["kl_base_alone"] > 20 * quality["kl"] and quality["answers_changed"] < 4


def test_divergence_of_known_distributions():
    """KL of (1/2, 1/2) from (1/4, 3/4) is ln 2 - ln 3 / 2; the other way round it is 3/4 ln 3 - ln 2."""
    even, uneven = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    found = quantizing.measure_divergence([even, uneven], [uneven, even])
    assert torch.allclose(found, torch.tensor([0.143841, 0.130812]), atol=1e-5)


DAMAGE = {"layers.0.mlp.down_proj.weight_scale": lambda scale: scale * 4}
DAMAGE |= {"layers.1.self_attn.o_proj.weight": lambda weight: weight.flip(0), "lm_head.weight": lambda w: w * torch.nan}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.items())
def test_the_gate_catches_one_damaged_tensor_and_its_figures_are_json(made, tmp_path, name, damage):
    folder = shutil.copytree(made["FP8_DYNAMIC"], tmp_path / "damaged")
    (key,) = [key for key in read_tensors(folder) if key.endswith(name) and "vision" not in key]
    change = lambda old: old | {key: damage(old[key].float()).to(old[key].dtype).contiguous()}  # noqa: E731
    edit(folder, "model.safetensors", change)
    quality, _ = ask_gate(folder, 4)
    assert not quality["passed"] and (quality["kl"] is None) == (name == "lm_head.weight")
    json.dumps(quality, allow_nan=False)


def test_a_failed_gate_is_exit_code_4_and_the_files_stay(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "q", "--gate_samples", "4", "--max_kl", "1e-9")
    assert error.value.code == 4 and "the gate failed: KL divergence is 0.000" in capsys.readouterr().err
    assert (tmp_path / "q" / "model.safetensors").exists() and read_report(tmp_path / "q")["quality"]["passed"] is False


# ---------------------------------------------------------------------------- layouts, shards and the prompt


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    """A checkpoint in shards of 50 MB: the miniature, with more layers that are wider."""
    from transformers import AutoConfig, LlavaNextForConditionalGeneration

    folder = shutil.copytree(BASE, tmp_path_factory.mktemp("sharded") / "model")
    config = AutoConfig.from_pretrained(folder)
    config.text_config.intermediate_size, config.text_config.num_hidden_layers = 32_768, 12
    torch.manual_seed(0)
    (folder / "model.safetensors").unlink()
    LlavaNextForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="53MB")
    return folder


@pytest.mark.parametrize("language", ["mistral", "llama"])
def test_llavas_own_format_becomes_the_hubs(tmp_path, language):
    folder, _, _ = build_original_llava(tmp_path / "liuhaotian", language)
    if language == "mistral":  # as published, in shards, of which one holds the head alone
        body = load_file(folder / "model.safetensors")
        save_file({"lm_head.weight": body.pop("lm_head.weight")}, folder / "head.safetensors", {"format": "pt"})
        save_file(body, folder / "body.safetensors", {"format": "pt"})
        index = {"lm_head.weight": "head.safetensors", **dict.fromkeys(body, "body.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (folder / "model.safetensors").unlink()
    flags = ["--model_path", str(folder), "--scheme", "BF16", "--dataset", str(MINIATURE / "preferences")]
    quantizing.main([*flags, "--gate_samples", "2", "--output_dir", str(tmp_path / "q")])
    assert read_report(tmp_path / "q")["quality"]["kl"] < 1e-3
    wanted, processor = load_llava(str(folder))
    model, loaded = load_llava(str(tmp_path / "q"))
    assert torch.allclose(probe_logits(model, loaded), probe_logits(wanted, processor), atol=0.03)
    reference = quantizing.load_reference(tmp_path / "q", None, False, "cpu")
    assert torch.allclose(probe_logits(reference, loaded), probe_logits(model, loaded))
    assert model.config.text_config.vocab_size == 32_064 and model.config.model_type == "llava_next"
    assert build_prompt(loaded, "Is it?", (640, 480)) == build_prompt(processor, "Is it?", (640, 480))
    parts = {key.split(".")[0] for file in (tmp_path / "q").glob("*.safetensors") for key in load_file(file)}
    assert parts == {"language_model", "vision_tower", "multi_modal_projector", "image_newline"}


def test_the_template_gives_the_trained_tokens(photo_llava):
    processor = quantizing.read_checkpoint(str(photo_llava))[1]
    template = quantizing.fill_template(processor)
    for question in ("What is this?", "Name the\nthings, please."):
        talk = [{"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]}]
        text = processor.apply_chat_template(talk, chat_template=template)
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        prompt = build_prompt(processor, question, (336, 336))
        assert ids == [token for place, token in enumerate(prompt) if token != 32_000 or prompt[place - 1] != 32_000]
        assert ids[:6] == [1, 733, 16289, 28793, 28705, 32_000]


def test_names_of_layers_match_however_they_are_written(made, tmp_path):
    """`re:` without a leading .* matches anywhere too, the head stays whole, and a linked folder is followed."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(tmp_path / "link", "--ignore", "re:vision_tower.*", "re:multi_modal_projector")
    ours, usual = read_tensors(tmp_path / "real"), read_tensors(made["FP8_DYNAMIC"])
    assert ours.keys() == usual.keys() and all(torch.equal(ours[key].float(), usual[key].float()) for key in ours)
    found, wanted = load_llava(str(tmp_path / "link")), load_llava(str(made["FP8_DYNAMIC"]))
    assert torch.equal(probe_logits(*found), probe_logits(*wanted))


# ---------------------------------------------------------------------------- what can go wrong


def test_a_killed_run_leaves_nothing_that_looks_finished_and_memory_is_that_of_a_shard(sharded, tmp_path):
    command = [sys.executable, str(SCRIPT), "--model_path", str(sharded), "--gate_samples", "0", "--output_dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder, partial = tmp_path / "q", tmp_path / "q.partial"
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a job in the background ignores
    options = {"env": environment, "preexec_fn": listen}
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([*command, str(folder)], stderr=subprocess.PIPE, text=True, **options)
        deadline = time.monotonic() + 120
        while not (partial.exists() and list(partial.glob("*.safetensors"))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(sent)
        assert process.wait(60) in (130, 143, -9)
        assert not folder.exists() and partial.exists() == (sent == signal.SIGKILL)
        assert "Traceback" not in process.stderr.read()
    asked = "--gate_samples 1 --max_new_tokens 2 --max_kl 100 --test_mode".split()  # by a base of several files
    command += [str(folder), *asked]
    finished = subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True)
    assert b"accelerator" not in finished.stderr  # a library's warning
    assert len(list(folder.glob("*.safetensors"))) == len(list(sharded.glob("*.safetensors"))) and not partial.exists()
    assert read_report(folder)["quality"]["tokens"] > 0
    sizes, memory = read_report(folder)["size_bytes"], read_report(folder)["peak_memory_bytes"]
    assert sizes["base"] > 5 * sizes["largest_shard"] and sizes["ratio"] < 0.55
    assert memory["checkpoint"] - memory["before"] < 4 * sizes["largest_shard"]  # in, out, and one layer's work


def refuse(capsys, *flags):
    with pytest.raises(SystemExit) as error:
        quantizing.main(["--test_mode", "--gate_samples", "0", *flags])
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")


def test_bad_input_is_one_sentence_and_leaves_nothing(made, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    assert "is not empty" in refuse(capsys, "--output_dir", str(tmp_path / "full"))
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"
    out = ["--output_dir", str(tmp_path / "q")]
    assert "128 divides" in refuse(capsys, "--scheme", "FP8_BLOCK", *out)
    for ignore, words in (("q_proj", "all of them or none"), ("gate_proj", "all of them or none"), ("heads", "matches no layer"),
                          ("model.language_model.layers.0", "only one of a layer's two names")):  # fmt: skip
        assert words in refuse(capsys, "--ignore", "vision_tower", "multi_modal_projector", ignore, *out)
    (tmp_path / "q.partial").mkdir()
    assert "this script did not make it" in refuse(capsys, *out)
    (tmp_path / "q.partial").rmdir()
    assert "is quantized already" in refuse(capsys, "--model_path", str(made["W8A8"]), *out)
    assert "cannot be read" in refuse(capsys, "--model_path", "nowhere", *out)
    assert "is no adapter" in refuse(capsys, "--lora_path", "nowhere", *out)
    broken = shutil.copytree(ADAPTER, tmp_path / "adapter")  # all other faults of adapters are test_loading's
    configure(broken, "adapter_config.json", bias="lora_only")
    assert "trained biases" in refuse(capsys, "--lora_path", str(broken), *out)
    configure(broken, "adapter_config.json", bias="none")
    edit(broken, WEIGHTS, lambda old: old | {min(old): old[min(old)] * torch.nan})
    assert "is not finite" in refuse(capsys, "--lora_path", str(broken), *out)
    shutil.rmtree(broken)
    assert "cannot be read" in refuse(capsys, "--dataset", str(tmp_path / "none"), "--gate_samples", "2", *out)
    rows = tmp_path / "rows.jsonl"
    for content, words in (('{"image": 1, "question": "x"}\n{broken', "cannot be read"), ("", "cannot be read"),
                           ('{"question": "x"}', "KeyError: 'image'"), ('{"image": "gone.png", "question": "x"}', "0 rows")):  # fmt: skip
        rows.write_text(content)
        assert words in refuse(capsys, "--dataset", str(rows), "--gate_samples", "2", *out)
    rows.unlink()
    broken = shutil.copytree(BASE, tmp_path / "broken")
    text = json.loads((broken / "config.json").read_text())["text_config"] | {"intermediate_size": 512}
    configure(broken, "config.json", text_config=text)
    assert "do not fit its config.json" in refuse(capsys, "--model_path", str(broken), *out)
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "has 0.0 GB of free disk" in refuse(capsys, *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]


def test_a_disk_that_fills_up_is_one_sentence(sharded, tmp_path):
    """No file may grow beyond 4 MB, as if there were no more room."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**20,) * 2)  # noqa: E731
    command = [sys.executable, str(SCRIPT), "--model_path", str(sharded), "--gate_samples", "0"]
    finished = subprocess.run([*command, "--output_dir", str(tmp_path / "q")], capture_output=True, text=True, timeout=200,
                              preexec_fn=limit, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert finished.returncode == 2 and "nothing was written to --output_dir" in finished.stderr
    assert "Traceback" not in finished.stderr and not list(tmp_path.iterdir())


def test_the_seeds_names_are_the_defaults():
    args = quantizing.parse_args(["--model_path", "liuhaotian/llava-v1.6-mistral-7b"])
    folder = Path("quantized_models/llava-v1.6-mistral-7b-FP8-Dynamic").resolve()
    assert args.output_dir == folder and args.scheme == "FP8_DYNAMIC"
