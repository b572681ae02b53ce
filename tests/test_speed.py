"""Each faster path gives the loss and the gradients of the plain one, and what it saves is there."""

import weakref
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import MINIATURE
from PIL import Image
from test_loss import PAIRS, encode, loss_and_gradients, make_trainer, with_adapter
from test_training import few_pairs  # noqa: F401
from torch.nn.attention import flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

import llava_orpo_training as training


@pytest.fixture(scope="module")
def adapted():
    """(model with a trained-looking adapter, a batch of three pairs, and its loss, gradients and metrics in two rows)."""
    model, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    features = [encode(processor, pair, seed) for seed, pair in enumerate(PAIRS)]
    batch = training.collate_pairs(features, processor.tokenizer.pad_token_id)
    model = with_adapter(model, train_projector=True).train()
    loss, metrics, gradients = loss_and_gradients(make_trainer(False), model, batch)
    assert len(gradients) == 2 * (4 * 7 + 2) and all(gradient.any() for gradient in gradients.values())
    return model, batch, loss, gradients, metrics


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """FlexAttention's reference implementation, which has a backward pass on the CPU where the check for one is lifted."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: flex_attention.flex_attention)


@pytest.mark.parametrize("packed", [False, True])
def test_every_layout_equals_two_rows(packed, adapted, uncompiled_flex):
    trainer = make_trainer(True)
    trainer.packed = packed
    training.speed_up(adapted[0], packed, autocast=False)
    loss, metrics, gradients = loss_and_gradients(trainer, *adapted[:2])
    training.speed_up(adapted[0], packed=False, autocast=False)
    assert loss == pytest.approx(adapted[2], abs=1e-5)
    for name in ("logps/chosen", "logps/rejected", "nll_loss", "log_odds_chosen", "rewards/margins"):
        assert metrics[name] == pytest.approx(adapted[4][name], abs=1e-5), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, adapted[3][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_mask_is_made_once(dtype):
    """It is added to the scores in the model's type, so that the layers need no copies of their own."""
    model, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    batch = training.collate_pairs([encode(processor, pair) for pair in PAIRS], 513)
    model, kept = with_adapter(model.to(dtype)).train(), {}
    inputs = training.share_prefix(batch, 513, packed=False, dtype=dtype)
    assert inputs["attention_mask"].dtype == dtype

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = make_trainer(True).concatenated_forward(model, batch)[4]
    masks = [tensor for tensor in kept.values() if tensor.shape[-2:] == inputs["attention_mask"].shape[-2:]]
    assert loss.isfinite() and len(masks) == 1


def test_where_flex_attention_does_not_compile_a_sentence_says_so(adapted, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no kernel fits the shared memory\nand a long tail")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)  # which would be on a GPU
    model = SimpleNamespace(device=torch.device("cuda"), config=adapted[0].config, lm_head=adapted[0].lm_head)
    assert not training.flex_attention_runs(model)
    assert "FlexAttention does not run here (RuntimeError)" in " ".join(capsys.readouterr().err.split())


def test_a_packed_row_has_no_padding(adapted):
    batch = adapted[1]
    shared, packed = (training.share_prefix(batch, 513, packed, torch.float32) for packed in (False, True))
    real, answers = batch["prompt_attention_mask"].sum(), (batch["chosen_labels"], batch["rejected_labels"])
    kept = sum((labels != -100).sum() for labels in answers)
    assert packed["input_ids"].shape == (1, real + kept) and real + kept < shared["input_ids"].numel()
    assert len(packed["logits_to_keep"]) == kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's compiled backward pass needs a GPU")
def test_compiled_flex_attention_equals_two_rows_on_a_gpu(adapted):
    model, batch = adapted[0].cuda(), {name: tensor.cuda() for name, tensor in adapted[1].items()}
    trainer = make_trainer(True)
    trainer.packed = True
    training.speed_up(model, packed=True, autocast=False)
    loss, _, gradients = loss_and_gradients(trainer, model, batch)
    training.speed_up(model.cpu(), packed=False, autocast=False)
    assert loss == pytest.approx(adapted[2], abs=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu(), adapted[3][name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_block_mask_hides_what_the_dense_one_hides(photo_llava):
    """At a real photo's length, where whole blocks of 128 are skipped; compiled, as on a GPU, but without gradients."""
    model, processor = training.load_llava(str(photo_llava), device="cpu")
    sizes = ((336, 672), (500, 333), (336, 336))
    pairs = training.PreferencePairs(None, [], None, processor, 4096, None)
    images = [Image.effect_noise(size, 50).convert("RGB") for size in sizes]
    features = [pairs.encode(image, *texts[1:]) for image, texts in zip(images, PAIRS, strict=True)]
    batch = training.collate_pairs(features, processor.tokenizer.pad_token_id)
    model = with_adapter(model).eval()
    trainer = make_trainer(True)
    with torch.no_grad():
        dense = trainer.concatenated_forward(model, batch)
        trainer.packed = True
        training.speed_up(model, packed=True, autocast=False)
        for found, expected in zip(trainer.concatenated_forward(model, batch), dense, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    mask = training.share_prefix(batch, 0, True, torch.float32)["attention_mask"]
    assert mask.sparsity() > 70  # % of the blocks that are not computed


@pytest.mark.parametrize(("mode", "failures", "every"), [("off", 0, 0), ("on", 0, 1), ("auto", 0, 0), ("auto", 2, 2)])
def test_as_few_layers_are_recomputed_as_fit(mode, failures, every, adapted, monkeypatch):
    """Recomputed layers give the gradients of kept ones, and a failed try's tensors are gone when the next one starts."""
    model, trainer = adapted[0], make_trainer(True)
    language_model, kept, left_over = model.get_base_model().model.language_model, [], []
    trainer.model, forward, backward = model, trainer.concatenated_forward, torch.Tensor.backward

    def start(*inputs):
        left_over.append(sum(reference() is not None for reference in kept))
        kept.clear()
        return forward(*inputs)

    def fail_at_first(*inputs, **options):
        assert len(kept) == 1 and kept[0]() is not None
        if len(left_over) <= failures:
            raise torch.OutOfMemoryError("the GPU is full")
        return backward(*inputs, **options)

    monkeypatch.setattr(trainer, "concatenated_forward", start)
    monkeypatch.setattr(torch.Tensor, "backward", fail_at_first)
    # the input of the projector's adapter is always kept, for the gradient of lora_A
    adapter = model.get_base_model().model.multi_modal_projector.linear_2.lora_A["default"]
    hook = adapter.register_forward_hook(lambda _, inputs, __: kept.append(weakref.ref(inputs[0].untyped_storage())))
    model.zero_grad()
    try:
        assert training.fit_memory(trainer, adapted[1], mode) == every
        recomputed = [layer.gradient_checkpointing for layer in language_model.layers]
        assert recomputed == [bool(every) and i % every == 0 for i in range(4)]
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        assert left_over == [0] * (failures + 1)
        failures = 100
        with pytest.raises(torch.OutOfMemoryError):  # where nothing fits, the error reaches the user
            training.fit_memory(trainer, adapted[1], mode)
    finally:
        hook.remove()
        language_model.gradient_checkpointing_disable()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, adapted[3][name], atol=1e-5, rtol=1e-4)


def test_autocast_without_the_detour_over_float32_is_the_same():
    model, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    batch = training.collate_pairs([encode(processor, pair) for pair in PAIRS], 513)
    model = with_adapter(model.bfloat16()).train()
    found = []
    for autocast in (False, True):
        training.speed_up(model, packed=False, autocast=autocast)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(make_trainer(True).concatenated_forward(model, batch)[:2])
    assert {weight.dtype for name, weight in model.named_parameters() if "lora_" in name} == {torch.float32}
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=0, rtol=0)


def test_the_longest_pair_is_no_shorter_than_any(few_pairs):  # noqa: F811
    processor = training.load_llava(str(MINIATURE / "model"), device="cpu")[1]
    real = training.load_rows(str(few_pairs))["train"]
    # the longest texts are those of different rows, and one alone would be cut at --max_length
    made = real.select(range(3)).to_list()
    for row, lengths in zip(made, ((1, 900, 2), (90, 1, 400), (1, 300, 300)), strict=True):
        words = zip(training.TEXTS, ("tree ", "red ball ", "blue cup "), lengths, strict=True)
        row.update({name: word * length for name, word, length in words})
    for rows in (real, datasets.Dataset.from_list(made)):
        pairs = training.PreferencePairs(rows, list(range(len(rows))), few_pairs, processor, 512, None)
        every = [pairs.longest(), *(pairs[i] for i in range(len(pairs)))]
        lengths = [sum(len(pair[name]) for name in ("prompt", "chosen", "rejected")) for pair in every]
        assert lengths[0] == max(lengths)
