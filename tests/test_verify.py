"""Checked generation: --verify keeps the candidate that its check confirms best, with and without CLIP."""

import json
from functools import partial

import pytest
import torch
from conftest import MINIATURE, SHARED

import llava_amber_validation_benchmark_with_lora as amber
from miniature.scenes import CLASSES

MINI = ["--test_mode", "--nouns", "vocabulary", "--evaluation_type", "g"]
WORDS = set("cup cups mug ball car bus star tree house tent lamp lamps kite boat fish".split())
CAPTION = "Describe this image."


def collect(found) -> dict:
    """Answers as {(picture, question): (text, complete)}."""
    return {(picture, question): (text, complete) for picture, question, text, complete in found}


def verify(llava, images, pixels, questions, tokens, candidates, words, clip=None) -> dict:
    find = amber.find_nouns("vocabulary", words)
    choose = partial(amber.keep_best, find=find, clip=clip)
    settings = {"count": candidates, "find": find, "choose": choose, "confirm": not clip}
    return collect(amber.check_answers(*llava, images, pixels, questions, tokens, **settings))


def draw(llava, images, pixels, questions, tokens=60, temperature=0.0) -> dict:
    return collect(amber.answer_questions(*llava, images, pixels, questions, tokens, temperature))


@pytest.fixture(scope="module")
def llava():
    return amber.load_llava(str(MINIATURE / "model"), device="cpu")


@pytest.fixture(scope="module")
def some(llava):
    """Six pictures and their pixels."""
    images = [amber.load_image(path) for path in sorted((MINIATURE / "amber" / "image").glob("*.webp"))[:6]]
    return images, llava[1].image_processor(images, return_tensors="pt")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP of random weights whose tokenizer knows letters."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz.,"]
    pieces = [*letters, *[letter + "</w>" for letter in letters], "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(pieces), "eos_token_id": len(pieces) - 1, "bos_token_id": len(pieces) - 2}
    vision = small | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder


def test_drawn_answers_depend_on_picture_question_and_place_alone(llava, some):
    images, pixels = some

    def three(numbers, temperature=1.0):
        part = {name: value[numbers] for name, value in pixels.items()}
        found = draw(llava, [images[n] for n in numbers], part, [[CAPTION] * 3] * len(numbers), 40, temperature)
        return {(numbers[picture], place): text for (picture, place), (text, _) in found.items()}

    together = three([0, 1, 2, 3, 4, 5])
    assert together == {key: text for number in range(6) for key, text in three([number]).items()}
    assert sum(len({together[number, place] for place in range(3)}) > 1 for number in range(6)) >= 4
    assert len(set(three([0], temperature=0).values())) == 1


def test_the_best_candidate_is_kept(llava, some):
    questions = [[CAPTION, "Is there a cup in this image?"]] * 6
    find = amber.find_nouns("vocabulary", WORDS)
    greedy = draw(llava, *some, questions)
    kept = verify(llava, *some, questions, 60, 5, WORDS)
    assert kept.keys() == greedy.keys()
    drawn = draw(llava, *some, [[CAPTION] * 4] * 6, 60, amber.VERIFY_TEMPERATURE)
    changed = 0
    for picture in range(6):
        assert kept[picture, 1] == greedy[picture, 1]  # yes or no: nothing to check

        def wrong(text, picture=picture):
            words = sorted({word for _, word in find(text)})
            asked = [f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word} in this image?" for word in words]
            part = {name: value[[picture]] for name, value in some[1].items()}
            said = [text for text, _ in draw(llava, [some[0][picture]], part, [asked], 5).values()]
            return said.count("No"), -said.count("Yes")

        candidates = [greedy[picture, 0][0], *[drawn[picture, place][0] for place in range(4)]]
        assert kept[picture, 0][0] == min(candidates, key=wrong)  # of equals the first
        changed += kept[picture, 0] != greedy[picture, 0]
    assert changed >= 2


def test_two_open_questions_have_their_own_candidates(llava, some):
    asked = [CAPTION, "Name everything you can see in this image."]
    longest = lambda image, texts: [len(text) for text in texts]  # noqa: E731, fits best
    kept = verify(llava, *some, [asked] * 6, 60, 3, set(CLASSES), longest)
    greedy = draw(llava, *some, [asked] * 6)
    drawn = draw(llava, *some, [[asked[0]] * 2 + [asked[1]] * 2] * 6, 60, amber.VERIFY_TEMPERATURE)
    for (picture, number), (text, whole) in kept.items():
        others = [drawn[picture, 2 * number], drawn[picture, 2 * number + 1]]
        assert text == max([greedy[picture, number][0], *[other for other, _ in others]], key=len) and whole
    cut = verify(llava, *some, [asked] * 6, 8, 3, set(CLASSES), longest)
    assert [whole for _, whole in cut.values()] == [False] * 12


def test_clip_says_what_the_plain_model_says(clip_folder, some):
    from transformers import CLIPModel, CLIPProcessor

    image, texts = some[0][0], ["a cup", "a ball and a cup", "a " * 200]
    found = amber.load_clip(str(clip_folder), "cpu")(image, texts)
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder, backend="pil")
    with torch.inference_mode():
        features = [model(**processor(images=image, text=text, return_tensors="pt", truncation=True)) for text in texts]
    cosines = [torch.cosine_similarity(f.text_embeds, f.image_embeds).item() for f in features]
    assert found == pytest.approx(cosines, abs=1e-5) and len(set(found)) == 3


def test_pictures_without_anything_to_check_are_passed_over(llava, some):
    images, pixels = some
    words = [["cup"], [], ["star", "tree"], [], [], ["bus"]]
    confirmed = amber.confirm_objects(*llava, images, pixels, words)
    assert [list(part) for part in confirmed] == words
    for picture, part in enumerate(words):
        alone = {name: value[[picture]] for name, value in pixels.items()}
        for word in part:
            ((said, _),) = draw(llava, [images[picture]], alone, [[f"Is there a {word} in this image?"]], 4).values()
            assert (confirmed[picture][word] > 0.5) == (said == "Yes")
            (single,) = amber.confirm_objects(*llava, [images[picture]], alone, [[word]])
            assert single[word] == pytest.approx(confirmed[picture][word], abs=1e-5)
    assert amber.confirm_objects(*llava, images, pixels, [[]] * 6) == [{}] * 6
    assert draw(llava, images, pixels, [[]] * 6, 5) == {}
    asked = [[CAPTION] * (number % 2) + ["Is there a cup in this image?"] for number in range(6)]
    kept = verify(llava, images, pixels, asked, 60, 3, WORDS)
    assert kept.keys() == {(i, j) for i, part in enumerate(asked) for j in range(len(part))}


@pytest.mark.slow
def test_its_effect_on_chair_is_in_the_scores(tmp_path):
    scores = []
    for verify in ("1", "4"):
        file = tmp_path / verify / "results.json"
        amber.main([*MINI, "--limit", "100", "--verify", verify, "--output_file", str(file)])
        scores.append(json.loads(file.with_name("scores.json").read_text())["strict"]["generative"])
    (before, after) = scores
    assert after["chair"] < before["chair"] - 2 and abs(after["cover"] - before["cover"]) < 4, scores


def test_a_clip_model_that_is_none_is_one_sentence(tmp_path, clip_folder, capsys):
    flags = [*MINI, "--limit", "2", "--verify", "2", "--output_file", str(tmp_path / "results.json"), "--clip_model"]
    for folder in (tmp_path / "nowhere", MINIATURE / "model"):
        with pytest.raises(SystemExit) as stopped:
            amber.main([*flags, str(folder)])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and f"error: --clip_model {folder}" in error
    flags[flags.index("--output_file") + 1] = str(tmp_path / "good.json")
    amber.main([*flags, str(clip_folder)])
    assert len(json.loads((tmp_path / "good.json").read_text())) == 2


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "nltk_data").is_dir(), reason="NLTK's data are not here")
def test_without_a_vocabulary_things_are_found_and_other_nouns_are_not(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [str(SHARED / "nltk_data")])
    find = amber.find_nouns("nltk", None)
    found = find("The image shows two men at a wooden table with cups of coffee, a dog and a bus; the mood is calm.")
    words = [word for _, word in found]
    assert words[0] in ("men", "man") and words[1:] == ["table", "cup", "coffee", "dog", "bus"]
    assert found[2] == ("cups", "cup")
