"""Each faster path gives the loss and the gradients of the plain one, and what it saves is there."""

import copy
import json
import subprocess
import sys
import weakref

import datasets
import psutil
import pytest
import torch
from conftest import MINIATURE
from PIL import Image
from safetensors.torch import load_file
from test_loss import PAIRS, encode, loss_and_gradients, make_trainer, with_adapter
from test_training import SCRIPT, SMALL, few_pairs, losses, run  # noqa: F401
from torch.nn.attention import flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

import llava_orpo_training as training


@pytest.fixture(scope="module")
def adapted():
    """(model with a trained-looking adapter, processor, a batch of three pairs, its loss and gradients in two rows)."""
    model, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    features = [encode(processor, pair, seed) for seed, pair in enumerate(PAIRS)]
    batch = training.collate_pairs(features, processor.tokenizer.pad_token_id)
    model = with_adapter(model, train_projector=True).train()
    loss, _, gradients = loss_and_gradients(make_trainer(False), model, batch)
    assert len(gradients) == 2 * (4 * 7 + 2) and all(gradient.any() for gradient in gradients.values())
    return model, processor, batch, loss, gradients


def assert_equal(adapted, trainer, batch=None, model=None):
    loss, _, gradients = loss_and_gradients(trainer, model or adapted[0], batch or adapted[2])
    assert loss == pytest.approx(adapted[3], abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, adapted[4][name], atol=1e-5, rtol=1e-4)


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """FlexAttention's reference implementation, which has a backward pass on the CPU where the check for one is lifted."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: flex_attention.flex_attention)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("block_mask", [False, True])
def test_every_layout_equals_two_rows(packing, block_mask, adapted, uncompiled_flex):
    trainer = make_trainer(True)
    trainer.packing, trainer.block_mask = packing, block_mask
    training.speed_up(adapted[0], block_mask, autocast=False)
    assert_equal(adapted, trainer)
    training.speed_up(adapted[0], block_mask=False, autocast=False)


def test_where_flex_attention_does_not_compile_a_sentence_says_so(adapted, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no kernel fits the shared memory\nand a long tail")

    monkeypatch.setattr(training, "flex_attention", fail)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert not training.flex_attention_runs(adapted[0])
    said = " ".join(capsys.readouterr().err.split())
    assert "(RuntimeError: no kernel fits the shared memory); a dense mask takes its place" in said


def test_a_packed_row_has_no_padding(adapted):
    batch = adapted[2]
    shared = training.share_prefix(batch, 513, packing=False, block_mask=False)
    packed = training.share_prefix(batch, 513, packing=True, block_mask=False)
    real = batch["prompt_attention_mask"].sum() + sum(
        (batch[f"{name}_labels"] != -100).sum() for name in ("chosen", "rejected")
    )
    assert packed["input_ids"].shape == (1, real) and real < shared["input_ids"].numel()
    assert len(packed["logits_to_keep"]) == real - batch["prompt_attention_mask"].sum()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's compiled backward pass needs a GPU")
@pytest.mark.parametrize("packing", [False, True])
def test_compiled_flex_attention_equals_two_rows_on_a_gpu(packing, adapted):
    model, batch = adapted[0].cuda(), {name: tensor.cuda() for name, tensor in adapted[2].items()}
    trainer = make_trainer(True)
    trainer.packing, trainer.block_mask, trainer.accelerator.device = packing, True, "cuda"
    training.speed_up(model, block_mask=True, autocast=False)
    loss, _, gradients = loss_and_gradients(trainer, model, batch)
    training.speed_up(model.cpu(), block_mask=False, autocast=False)
    assert loss == pytest.approx(adapted[3], abs=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu(), adapted[4][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_the_block_mask_hides_what_the_dense_one_hides(packing, photo_llava):
    """At a real photo's length, where whole blocks of 128 are skipped; compiled, as on a GPU, but without gradients."""
    model, processor = training.load_llava(str(photo_llava), device="cpu")
    sizes = ((336, 672), (500, 333), (336, 336))
    pairs = training.PreferencePairs(None, [], None, processor, 4096, None)
    features = [
        pairs.encode(Image.effect_noise(size, 50).convert("RGB"), *texts[1:])
        for size, texts in zip(sizes, PAIRS, strict=True)
    ]
    batch = training.collate_pairs(features, processor.tokenizer.pad_token_id)
    model = with_adapter(model).eval()
    trainer = make_trainer(True)
    trainer.packing = packing
    with torch.no_grad():
        dense = trainer.concatenated_forward(model, batch)
        trainer.block_mask = True
        training.speed_up(model, block_mask=True, autocast=False)
        for found, expected in zip(trainer.concatenated_forward(model, batch), dense, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    mask = training.share_prefix(batch, 0, packing, block_mask=True)["attention_mask"]
    assert mask.sparsity() > (70 if packing else 30)  # % of the blocks that are not computed


def test_compiled_layers_equal_plain_ones(adapted):
    model, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    model = with_adapter(model, train_projector=True).train()
    for layer in model.get_base_model().model.language_model.layers:
        layer.compile()
    assert_equal(adapted, make_trainer(True), model=model)


@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_recomputed_layers_equal_kept_ones(recomputed, adapted):
    training.checkpoint_layers(adapted[0], recomputed)
    assert_equal(adapted, make_trainer(True))
    training.checkpoint_layers(adapted[0], 0)


def test_the_tower_keeps_nothing_for_the_backward_pass():
    model, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    batch = training.collate_pairs([encode(processor, PAIRS[0])], 513)
    model = with_adapter(model).train()
    for parameter in model.get_base_model().model.vision_tower.parameters():
        parameter.requires_grad_(True)
    before = training.kept_bytes(make_kept(model), batch)
    training.freeze_tower(model)
    assert training.kept_bytes(make_kept(model), batch) < 0.7 * before
    make_trainer(True).get_batch_loss_metrics(model, batch)[0].backward()
    reached = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert len(reached) == 2 * 4 * 7 and not any("vision_tower" in name for name in reached)


def make_kept(model):
    trainer = make_trainer(True)
    trainer.model, trainer.accelerator.autocast = model, training.nullcontext
    trainer.accelerator.device = torch.device("cpu")
    return trainer


@pytest.mark.parametrize("mode, free, count", [("on", 1e12, 4), ("off", 0, 0), ("auto", 1e12, 0), ("auto", 0, 4)])
def test_training_recomputes_what_preflight_has_set(mode, free, count, tmp_path, few_pairs, monkeypatch):  # noqa: F811
    monkeypatch.setattr(training, "free_memory", lambda _: free)
    seen = []

    def look(self, args, state, control, model=None, **_):
        seen.append([layer.gradient_checkpointing for layer in model.get_base_model().model.language_model.layers])
        assert not any(
            getattr(part, "gradient_checkpointing", False)
            for part in model.base_model.model.model.vision_tower.modules()
        )
        assert not args.gradient_checkpointing

    monkeypatch.setattr(training.RunRecorder, "on_step_end", look)
    monkeypatch.setattr(training.RunRecorder, "on_log", lambda *_, **__: None)
    monkeypatch.setattr(training, "finish_run", lambda *_: None)
    run(tmp_path / "run", few_pairs, "--max_samples", "8", "--gradient_checkpointing", mode, "--eval_steps", "9")
    assert seen == [[i < count for i in range(4)]]


def test_a_plan_that_does_not_fit_is_given_up_for_all_layers(tmp_path, few_pairs, monkeypatch):  # noqa: F811
    """The first attempt's tensors are gone when the second starts."""
    backward, alive, outputs = torch.Tensor.backward, [], []
    forward = training.LlavaORPOTrainer.concatenated_forward

    def note(self, model, batch):
        alive.append([reference() is not None for reference in outputs])
        result = forward(self, model, batch)
        if result[0].requires_grad and len(outputs) < 3:
            outputs.append(weakref.ref(result[0].untyped_storage()))
        return result

    def fail_once(self, *args, **kwargs):
        if "failed" not in failed:
            failed.append("failed")
            raise torch.OutOfMemoryError("the GPU is full")
        return backward(self, *args, **kwargs)

    failed = []
    monkeypatch.setattr(training.LlavaORPOTrainer, "concatenated_forward", note)
    monkeypatch.setattr(torch.Tensor, "backward", fail_once)
    folder = run(tmp_path / "run", few_pairs, "--max_samples", "8", "--gradient_checkpointing", "auto")
    assert json.loads((folder / "training_summary.json").read_text())["recomputed_layers"] == 4
    assert failed and outputs and not any(alive[-1])


def test_measuring_memory_gives_it_back(adapted):
    trainer, used = make_kept(adapted[0]), []
    for _ in range(8):
        kept = training.kept_bytes(trainer, adapted[2])
        used.append(psutil.Process().memory_info().rss)
    assert used[-1] - used[1] < 2 * kept


def test_checkpointing_is_as_much_as_the_memory_asks_for(adapted, monkeypatch):
    model, _, batch, *_ = adapted
    trainer = make_kept(model)
    counts = []
    for free in (0, 2e6, 20e6, 40e6, 80e6, 1e12):
        monkeypatch.setattr(training, "free_memory", lambda _, free=free: free)
        counts.append(training.plan_checkpointing(trainer, batch))
    training.checkpoint_layers(model, 0)
    assert counts[0] == 4 and counts[-1] == 0 and counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2  # some layers, not all or none


def test_autocast_without_the_detour_over_float32_is_the_same():
    model, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    batch = training.collate_pairs([encode(processor, pair) for pair in PAIRS], 513)
    model = with_adapter(model.bfloat16()).train()
    found = []
    for autocast in (False, True):
        training.speed_up(model, block_mask=False, autocast=autocast)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(make_trainer(True).concatenated_forward(model, batch)[:2])
    assert {weight.dtype for name, weight in model.named_parameters() if "lora_" in name} == {torch.float32}
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=0, rtol=0)


def count_pictures(folder, train: int) -> int:
    """Different pictures in the first `train` pairs and the nine held out."""
    pictures = set()
    for split, n in (("train", train), ("test", 9)):
        rows = datasets.load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
        rows = rows.cast_column("image", datasets.Image(decode=False)).select(range(n))
        pictures |= {image["bytes"] for image in rows["image"]}
    return len(pictures)


def test_cached_features_train_the_same(tmp_path, few_pairs, monkeypatch, capsys):  # noqa: F811
    flags = ["--max_samples", "16", "--lora_dropout", "0", "--save_steps", "100"]
    folder = tmp_path / "features"
    cache = ["--cache_vision_features", str(folder)]
    plain = run(tmp_path / "plain", few_pairs, *flags)

    def assert_same(name, *options):
        found = run(tmp_path / name, few_pairs, *flags, *cache, *options)
        assert losses(found) == pytest.approx(losses(plain), abs=1e-5)
        expected = load_file(plain / "adapter_model.safetensors")
        for key, weight in load_file(found / "adapter_model.safetensors").items():
            torch.testing.assert_close(weight, expected[key], atol=1e-5, rtol=1e-4)

    assert_same("bounded", "--cache_gb", "0.0005")
    assert 0.2e6 < sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 0.5e6
    assert "--cache_gb 0.0005 is reached" in " ".join(capsys.readouterr().err.split())
    assert_same("filled")
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == count_pictures(few_pairs, 16)

    decoded = []
    load = training.load_image
    monkeypatch.setattr(training, "load_image", lambda source: decoded.append(1) or load(source))
    assert_same("read")
    assert len(decoded) < 8  # what preflight and samples.html show, against 16 + 2 x 9
    files[0].unlink()  # one is deleted, another one breaks off: both are computed anew
    files[1].write_bytes(files[1].read_bytes()[:1000])
    assert_same("mended")
    assert len(load_file(files[0])) == len(load_file(files[1])) == 2


def test_another_tower_reads_no_stale_features():
    model, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    model = with_adapter(model)
    first = training.VisionCache(MINIATURE, model, processor)
    assert training.VisionCache(MINIATURE, model, processor).folder == first.folder
    for change in ("dtype", "layer", "tower", "pictures"):
        other, _ = training.load_llava(str(MINIATURE / "model"), device="cpu")
        other, options = with_adapter(other), copy.deepcopy(processor)
        if change == "dtype":
            other.bfloat16()
        elif change == "layer":
            other.config.vision_feature_layer = -1
        elif change == "tower":
            other.get_base_model().model.vision_tower.config.hidden_act = "gelu"
        else:
            options.image_processor.image_mean = [0.5, 0.5, 0.4]
        assert training.VisionCache(MINIATURE, other, options).folder != first.folder, change
    weight = next(model.get_base_model().model.vision_tower.parameters())
    weight.data.view(-1)[-1] += 1e-3
    assert training.VisionCache(MINIATURE, model, processor).folder != first.folder
    assert first.file(b"one") != first.file(b"other")


def test_runs_at_once_fill_one_cache(tmp_path, few_pairs):  # noqa: F811
    flags = ["--max_samples", "24", "--lora_dropout", "0", "--save_steps", "100"]
    plain = run(tmp_path / "plain", few_pairs, *flags)
    command = [sys.executable, SCRIPT, "--model_path", str(MINIATURE / "model"), "--dataset", str(few_pairs), *SMALL[1:],
               *flags, "--cache_vision_features", str(tmp_path / "features")]  # fmt: skip
    folders = [tmp_path / name for name in ("one", "two", "three")]
    runs = [subprocess.Popen([*command, "--output_dir", str(folder)], stderr=subprocess.DEVNULL) for folder in folders]
    assert [process.wait(timeout=300) for process in runs] == [0] * 3
    for folder in folders:
        assert losses(folder) == pytest.approx(losses(plain), abs=1e-5)
    files = [file for file in (tmp_path / "features").rglob("*") if file.is_file()]
    assert len(files) == count_pictures(few_pairs, 24) and {file.suffix for file in files} == {".safetensors"}
    assert all(len(load_file(file)) == 2 for file in files)


def test_an_epochs_last_step_is_measured_whole(tmp_path, few_pairs, monkeypatch):  # noqa: F811
    """Of 11 pairs, the second step holds 3; TRL's metrics would count one of each forward's."""
    seen = []
    monkeypatch.setattr(
        training.RunRecorder, "on_step_end", lambda self, *_, **__: seen.append(self.trainer.pairs_seen)
    )
    folder = run(
        tmp_path / "run", few_pairs, "--max_samples", "11", "--batch_size", "2", "--gradient_accumulation_steps", "4"
    )
    rows = [row for row in training.read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 2 and seen == [8, 11]  # of which pairs_per_second is made
    for row in rows:
        assert -row["logps/chosen"] == pytest.approx(row["nll_loss"], abs=1e-6)


def test_the_wait_for_data_is_measured(tmp_path, few_pairs, monkeypatch, capsys):  # noqa: F811
    """Without workers, decoding is waiting: 0.05 s more a pair must show."""
    features = training.PreferencePairs.features

    def slow(self, *args):
        training.time.sleep(0.05)
        return features(self, *args)

    monkeypatch.setattr(training.PreferencePairs, "features", slow)
    folder = run(tmp_path / "slow", few_pairs, "--max_samples", "16")
    summary = json.loads((folder / "training_summary.json").read_text())
    seconds = sum(8 / row["pairs_per_second"] for row in training.read_jsonl(folder / "metrics.jsonl") if "loss" in row)
    assert summary["data_wait_share"] * seconds > 16 * 0.05 and summary["data_wait_share"] < 1
    assert "more --num_workers can help" in " ".join(capsys.readouterr().err.split())


def test_the_longest_pair_is_no_shorter_than_any(few_pairs):  # noqa: F811
    _, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    rows = training.load_rows(str(few_pairs))["train"]
    pairs = training.PreferencePairs(rows, list(range(len(rows))), few_pairs, processor, 512, None)
    names = ("prompt", "chosen", "rejected")
    longest = pairs.longest()
    assert sum(len(longest[name]) for name in names) >= max(
        sum(len(pairs[i][name]) for name in names) for i in range(len(rows))
    )
    # the longest texts are those of different rows, and one alone would be cut at --max_length
    rows = rows.select(range(3)).to_list()
    for row, lengths in zip(rows, ((1, 900, 2), (90, 1, 400), (1, 300, 300)), strict=True):
        words = ("tree", "red ball", "blue cup")
        row["question"], row["chosen"], row["rejected"] = (
            f"{word} " * n for word, n in zip(words, lengths, strict=True)
        )
    pairs = training.PreferencePairs(datasets.Dataset.from_list(rows), [0, 1, 2], few_pairs, processor, 512, None)
    longest = pairs.longest()
    assert all(
        sum(len(longest[name]) for name in names) >= sum(len(pairs[i][name]) for name in names) for i in range(3)
    )
