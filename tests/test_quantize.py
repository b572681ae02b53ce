"""Quantizing: the merge is PEFT's, a shard at a time; what is written loads right; the gate's figures are the real ones."""

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
from test_loading import make_adapter

import llava_quantize_vllm as quantizing
from llava_amber_validation_benchmark_with_lora import answer_questions
from llava_orpo_training import build_prompt, generate_answers, load_image, load_llava, probe_logits

SCRIPT = ROOT / "llava_quantize_vllm.py"


def read_report(folder):
    return json.loads((folder / "quantization_report.json").read_text())


def merged_by_peft(lora_path=MINIATURE / "adapter", model_path=MINIATURE / "model"):
    model, processor = load_llava(str(model_path), str(lora_path), merge_lora="trained")
    return model, processor


def own_names(tensors):
    return {quantizing.rename_key(key, quantizing.MODULE_KEYS): tensor for key, tensor in tensors.items()}


def test_the_merge_is_pefts_and_in_the_hubs_layout(made):
    tensors = load_file(made["BF16"] / "model.safetensors")
    assert tensors.keys() == load_file(MINIATURE / "model" / "model.safetensors").keys()
    wanted = merged_by_peft()[0].state_dict()
    for name, tensor in own_names(tensors).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wanted[name].to(torch.bfloat16)), name
    adapter = read_report(made["BF16"])["adapter"]
    assert (adapter["layers"], adapter["changed"], adapter["into"]) == (28, 28, "the base's own weights")


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
                                     {"modules_to_save": ["linear_1"]}, {"target_modules": ["lm_head", "embed_tokens", "v_proj"]},
                                     {"target_modules": "all-linear", "exclude_modules": ["lm_head"]}])  # fmt: skip
def test_every_kind_of_lora_is_merged_as_peft_does(options, tmp_path):
    make_adapter(tmp_path / "adapter", **options)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = {
        key: value + 0.1 * torch.randn_like(value)
        for key, value in weights.items()
        if "linear_1" in key and "lora" not in key
    }
    save_file(weights | trained, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    flags = ["--test_mode", "--scheme", "BF16", "--lora_path", str(tmp_path / "adapter"), "--gate_samples", "0"]
    quantizing.main([*flags, "--output_dir", str(tmp_path / "q")])
    wanted = merged_by_peft(tmp_path / "adapter")[0].state_dict()
    base = own_names(load_file(MINIATURE / "model" / "model.safetensors"))
    changed = set()
    for name, tensor in own_names(load_file(tmp_path / "q" / "model.safetensors")).items():
        assert torch.allclose(tensor.float(), wanted[name], rtol=0.005, atol=1e-6), name
        if not torch.equal(tensor, base[name]):
            changed.add(name.removesuffix(".weight"))
    report = read_report(tmp_path / "q")["adapter"]
    assert len(changed) == report["changed"] == report["layers"] > 3
    assert {key.removeprefix("base_model.model.").removesuffix(".weight") for key in trained} <= changed


def test_after_qlora_the_merge_is_into_rounded_weights(tmp_path):
    shutil.copytree(MINIATURE / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "arguments.json").write_text(json.dumps({"load_4bit": True}))
    flags = ["--test_mode", "--scheme", "BF16", "--lora_path", str(tmp_path / "adapter"), "--gate_samples", "4"]
    quantizing.main([*flags, "--output_dir", str(tmp_path / "rounded")])
    quantizing.main([*flags, "--output_dir", str(tmp_path / "whole"), "--merge_lora", "base"])
    wanted = merged_by_peft(tmp_path / "adapter")[0].state_dict()
    for name, tensor in own_names(load_file(tmp_path / "rounded" / "model.safetensors")).items():
        assert torch.equal(tensor, wanted[name].to(torch.bfloat16)), name
    report = read_report(tmp_path / "rounded")
    assert report["adapter"]["into"] == "NF4-rounded weights" and report["quality"]["kl"] < 1e-4  # the gate rounds too
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert not torch.equal(whole["language_model.model.layers.0.mlp.up_proj.weight"],
                           wanted["model.language_model.layers.0.mlp.up_proj.weight"].to(torch.bfloat16))  # fmt: skip


@pytest.mark.parametrize("scheme", ["BF16", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16"])
def test_transformers_loads_it_right(made, scheme):
    wanted, processor = merged_by_peft()
    model, loaded = load_llava(str(made[scheme]))
    found, bound = probe_logits(model, loaded), {"BF16": 0.1, "W4A16": 1.5}.get(scheme, 0.8)
    assert (found - probe_logits(wanted, processor)).abs().max() < bound  # garbage differs by 10 and more
    assert (found.argmax(-1) == probe_logits(wanted, processor).argmax(-1)).float().mean() > 0.85
    kept = {name: own for name, own in model.state_dict().items() if re.search("vision|projector|lm_head|embed", name)}
    assert len(kept) > 60 and all(torch.equal(own.to(torch.bfloat16), wanted.state_dict()[name].to(torch.bfloat16))
                                  for name, own in kept.items())  # fmt: skip
    image = load_image(sorted((MINIATURE / "amber" / "image").glob("*.webp"))[0])
    pixels = loaded.image_processor(image, return_tensors="pt")
    fresh = load_llava(str(made[scheme]))[0]  # whose first forward is that of AMBER's script and of the page: a part's
    ((_, _, text, complete),) = answer_questions(fresh, loaded, [image], pixels, [["Describe this image."]], 60)
    assert complete and text == generate_answers(model, loaded, [image], ["Describe this image."], 60)[0]
    projection = model.model.language_model.layers[1].mlp.down_proj
    assert hasattr(projection, "quantization_scheme") == (scheme != "BF16")


def test_the_seeds_choice_quantizes_all_but_the_head(tmp_path):
    """The rows' scale is the greatest weight over 448, the greatest E4M3 number; weights are stored in FP8."""
    quantizing.main(["--test_mode", "--ignore", "lm_head", "--output_dir", str(tmp_path / "q"), "--gate_samples", "0"])
    tensors, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "q", MINIATURE / "model"))
    linear = {key.removesuffix("_scale") for key in tensors if key.endswith("weight_scale")}
    dense = {name for name, module in load_llava(str(MINIATURE / "model"))[0].named_modules()
             if isinstance(module, torch.nn.Linear) and name != "lm_head"}  # fmt: skip
    names = {quantizing.rename_key(key, quantizing.MODULE_KEYS).removesuffix(".weight") for key in linear}
    assert names == dense and any("vision_tower" in name for name in names)
    key = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"  # which the adapter leaves alone
    assert tensors[key].dtype == torch.float8_e4m3fn
    scale = base[key].float().abs().amax(1, keepdim=True) / 448
    assert torch.allclose(tensors[key + "_scale"].float(), scale, rtol=0.01)
    assert (
        (tensors[key].float() * tensors[key + "_scale"].float() - base[key].float()).abs() <= 19 * scale
    ).all()  # half of E4M3's step of 32, and the division in bfloat16
    assert read_report(tmp_path / "q")["quality"] is None


def test_the_report_says_what_is_there(made):
    for scheme, folder in made.items():
        report = read_report(folder)
        assert report["scheme"] == scheme
        size = (folder / "model.safetensors").stat().st_size
        assert report["size_bytes"]["quantized"] == size
        assert report["size_bytes"]["base"] == (MINIATURE / "model" / "model.safetensors").stat().st_size
        assert report["base"]["digest"] == quantizing.digest_checkpoint(str(MINIATURE / "model"))
        assert report["adapter"]["digest"] == quantizing.digest_checkpoint(str(MINIATURE / "adapter"))
        assert report["versions"]["llmcompressor"] == "0.14.0.1" and report["seconds"]["checkpoint"] > 0
        assert 0 < report["peak_memory_bytes"]["before"] <= report["peak_memory_bytes"]["checkpoint"]
        written = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("ignore")
        assert written == report["ignored"]
    sizes = {scheme: read_report(folder)["size_bytes"]["ratio"] for scheme, folder in made.items()}
    assert (
        sizes["W4A16"] < sizes["W8A8"] < 0.8
        and sizes["FP8_DYNAMIC"] < 0.8
        and sizes["BF16"] == pytest.approx(1, abs=0.01)
    )


def test_the_gates_figures_are_those_of_one_question_at_a_time():
    """Base + adapter against the base alone: both in float32, so that batches round nothing away."""
    args = quantizing.parse_args(["--test_mode"])
    samples = quantizing.read_samples(args.dataset, 12)
    quality = quantizing.run_gate(args, MINIATURE / "model", samples)
    before, processor = load_llava(args.model_path, args.lora_path)
    after, _ = load_llava(args.model_path)
    kl, same, changed = [], [], 0
    for image, question, _ in samples:
        texts = [generate_answers(model, processor, [image], [question], 128)[0] for model in (before, after)]
        changed += texts[0] != texts[1]
        prompt = build_prompt(processor, question, image.size)
        answer = processor.tokenizer(f" {texts[0]}", add_special_tokens=False).input_ids + [2]
        pixels = processor.image_processor(image, return_tensors="pt")

        def predict(model, prompt=prompt, answer=answer, pixels=pixels):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer]), image_sizes=pixels["image_sizes"],
                               pixel_values=pixels["pixel_values"]).logits[0]  # fmt: skip
            return logits[len(prompt) - 1 : -1].log_softmax(-1)

        p, q = predict(before), predict(after)
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


def test_a_failed_gate_is_exit_code_4_and_the_files_stay(tmp_path, capsys):
    flags = ["--test_mode", "--gate_samples", "4", "--max_kl", "1e-9", "--output_dir", str(tmp_path / "q")]
    with pytest.raises(SystemExit) as error:
        quantizing.main(flags)
    assert error.value.code == 4 and "the gate failed: KL divergence is 0.000" in capsys.readouterr().err
    assert (tmp_path / "q" / "model.safetensors").exists() and read_report(tmp_path / "q")["quality"]["passed"] is False


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    """A checkpoint of 6 shards of 50 MB: the miniature, with more layers that are wider."""
    from transformers import AutoConfig, LlavaNextForConditionalGeneration

    folder = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(MINIATURE / "model", folder)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.intermediate_size, config.text_config.num_hidden_layers = 32_768, 12
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).to(torch.bfloat16)
    names = quantizing.HUB_KEYS
    tensors = {quantizing.rename_key(name, names): value for name, value in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    config.save_pretrained(folder)
    weight_map = {}
    for number in range(6):
        layers = tuple(f"language_model.model.layers.{layer}." for layer in (2 * number, 2 * number + 1))
        shard = {key: value for key, value in tensors.items()
                 if key.startswith(layers) or (number == 0 and ".layers." not in key.replace("encoder.layers", "encoder"))}  # fmt: skip
        save_file(shard, folder / f"model-{number:02d}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"model-{number:02d}.safetensors")
    assert weight_map.keys() == tensors.keys()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("language", ["mistral", "llama"])
def test_llavas_own_format_becomes_the_hubs(tmp_path, language):
    folder, _, _ = build_original_llava(tmp_path / "liuhaotian", language)
    quantizing.main(
        ["--model_path", str(folder), "--scheme", "BF16", "--gate_samples", "0", "--output_dir", str(tmp_path / "q")]
    )
    wanted, processor = load_llava(str(folder))
    model, loaded = load_llava(str(tmp_path / "q"))
    assert torch.allclose(probe_logits(model, loaded), probe_logits(wanted, processor), atol=0.03)
    assert model.config.text_config.vocab_size == 32_064 and model.config.model_type == "llava_next"
    assert build_prompt(loaded, "Is it?", (640, 480)) == build_prompt(processor, "Is it?", (640, 480))
    keys = load_file(tmp_path / "q" / "model.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {
        "language_model",
        "vision_tower",
        "multi_modal_projector",
        "image_newline",
    }


def test_the_template_gives_the_trained_tokens(photo_llava):
    processor = quantizing.read_checkpoint(str(photo_llava))[1]
    template = quantizing.fill_template(processor)
    for question in ("What is this?", "Name the\nthings, please."):
        talk = [{"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]}]
        ids = processor.tokenizer(
            processor.apply_chat_template(talk, chat_template=template), add_special_tokens=False
        ).input_ids
        prompt = build_prompt(processor, question, (336, 336))
        assert ids == [token for place, token in enumerate(prompt) if token != 32_000 or prompt[place - 1] != 32_000]
        assert ids[:6] == [1, 733, 16289, 28793, 28705, 32_000]


def test_a_killed_run_leaves_nothing_that_looks_finished_and_memory_is_that_of_a_shard(sharded, tmp_path):
    command = [sys.executable, str(SCRIPT), "--model_path", str(sharded), "--gate_samples", "0", "--output_dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        folder, partial = tmp_path / "q", tmp_path / "q.partial"
        run = subprocess.Popen([*command, str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not (partial.exists() and list(partial.glob("*.safetensors"))):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.02)
        run.send_signal(sent)
        assert run.wait(60) in (130, 143, -9)
        assert not folder.exists() and partial.exists() == (sent == signal.SIGKILL)
        assert "Traceback" not in run.stderr.read()
    subprocess.run([*command, str(folder)], check=True, timeout=200, env=environment)
    assert len(list(folder.glob("*.safetensors"))) == 6 and not partial.exists()
    report = read_report(folder)
    sizes, memory = report["size_bytes"], report["peak_memory_bytes"]
    assert sizes["base"] > 5 * sizes["largest_shard"] and sizes["ratio"] < 0.55
    assert memory["checkpoint"] - memory["before"] < 4 * sizes["largest_shard"]  # in, out, and one layer's work


def break_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 512
    (folder / "config.json").write_text(json.dumps(config))


def refuse(capsys, *flags):
    with pytest.raises(SystemExit) as error:
        quantizing.main(["--test_mode", "--gate_samples", "0", *flags])
    assert error.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    return sentence.removeprefix("error: ")


def test_bad_input_is_one_sentence_and_leaves_nothing(made, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    assert "is not empty" in refuse(capsys, "--output_dir", str(tmp_path / "full"))
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"
    out = ["--output_dir", str(tmp_path / "q")]
    assert "128 divides" in refuse(capsys, "--scheme", "FP8_BLOCK", *out)
    for ignore, words in (("q_proj", "all of them or none"), ("gate_proj", "all of them or none"), ("heads", "matches no layer"),
                          ("re:[", "no regular expression"), ("model.language_model.layers.0", "one of its names only")):  # fmt: skip
        assert words in refuse(capsys, "--ignore", "vision_tower", "multi_modal_projector", ignore, *out)
    (tmp_path / "q.partial").mkdir()
    assert "this script did not make it" in refuse(capsys, *out)
    (tmp_path / "q.partial").rmdir()
    assert "is quantized already" in refuse(capsys, "--model_path", str(made["W8A8"]), *out)
    assert "is no folder" in refuse(capsys, "--model_path", "nowhere", *out)
    assert "is no folder" in refuse(capsys, "--lora_path", "nowhere", *out)
    assert "cannot be read" in refuse(capsys, "--dataset", str(tmp_path / "none"), "--gate_samples", "2", *out)
    rows = tmp_path / "rows.jsonl"
    for content, words in (('{"image": 1, "question": "x"}\n{broken', "cannot be read"), ("", "cannot be read"),
                           ('{"question": "x"}', "no column or split 'image'"), ('{"image": "gone.png", "question": "x"}', "0 rows")):  # fmt: skip
        rows.write_text(content)
        assert words in refuse(capsys, "--dataset", str(rows), "--gate_samples", "2", *out)
    rows.unlink()
    broken = tmp_path / "broken"
    shutil.copytree(MINIATURE / "model", broken)
    break_config(broken)
    assert "do not fit its config.json" in refuse(capsys, "--model_path", str(broken), *out)
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "has 0.0 GB of free disk" in refuse(capsys, *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]


def test_a_disk_that_fills_up_is_one_sentence(sharded, tmp_path):
    """No file may grow beyond 4 MB, as if there were no more room."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**20,) * 2)  # noqa: E731
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--model_path", str(sharded), "--gate_samples", "0", "--output_dir", str(tmp_path / "q")],
        capture_output=True, text=True, timeout=200, preexec_fn=limit, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 2 and "nothing was written to --output_dir" in run.stderr and "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_an_older_gpu_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    quantizing.warn_of_gpu("FP8_DYNAMIC")
    assert "A100 has compute capability 8.0, FP8 arithmetic needs 8.9" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    quantizing.warn_of_gpu("FP8_DYNAMIC")
    quantizing.warn_of_gpu("W8A8")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("flags", "words"), [(["--scheme", "FP4"], "invalid choice"), (["--max_kl", "0"], "above 0"),
                                              (["--gate_samples", "-1"], "at least 0")])  # fmt: skip
def test_bad_flags_are_one_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        quantizing.parse_args(flags)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_names_of_layers_match_however_they_are_written(made, tmp_path):
    """`re:` without a leading .* matches anywhere too, the head stays whole, and a linked folder is followed."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    flags = [
        "--ignore",
        "re:vision_tower.*",
        "re:multi_modal_projector",
        "--gate_samples",
        "0",
        "--output_dir",
        str(tmp_path / "link"),
    ]
    quantizing.main(["--test_mode", *flags])
    ours, usual = (load_file(folder / "model.safetensors") for folder in (tmp_path / "real", made["FP8_DYNAMIC"]))
    assert ours.keys() == usual.keys() and all(torch.equal(ours[key].float(), usual[key].float()) for key in ours)
    model, processor = load_llava(str(tmp_path / "link"))
    wanted = load_llava(str(made["FP8_DYNAMIC"]))[0]
    assert torch.equal(probe_logits(model, processor), probe_logits(wanted, processor))


def test_the_seeds_names_are_the_defaults():
    args = quantizing.parse_args(["--model_path", "liuhaotian/llava-v1.6-mistral-7b"])
    assert (
        args.output_dir == Path("quantized_models/llava-v1.6-mistral-7b-FP8-Dynamic") and args.scheme == "FP8_DYNAMIC"
    )


def test_help_lists_every_flag():
    text = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    flags = ["model_path", "lora_path", "merge_lora", "device", "test_mode", "output_dir", "scheme", "ignore", "dataset",
             "calibration_samples", "gate_samples", "max_new_tokens", "max_kl"]  # fmt: skip
    assert sorted(set(re.findall(r"--(\w+)", text)) & set(flags)) == sorted(flags)
