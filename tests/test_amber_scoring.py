"""AMBER's scores: every rule by hand, and a second, literal implementation on thousands of random answers."""

import functools
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import spacy
from conftest import MINIATURE, SHARED

import llava_amber_validation_benchmark_with_lora as amber

AMBER = SHARED / "amber"
NLTK_DATA = SHARED / "nltk_data"
needs_amber = pytest.mark.skipif(not AMBER.is_dir(), reason="AMBER's lists are not here")


# ---------------------------------------------------------------------------- the rules, once more and literally


def literal_side(entries, relation):
    """An annotation's words in the order they are looked through, the slot of each, and what is marked so far."""
    words, slots = [], []
    for slot, word in enumerate(entries):
        for other in relation[word]:
            words.append(other)
            slots.append(slot)
    return words + entries, slots + list(range(len(entries))), [0] * len(entries)


def literal_equal(first, second):
    return float(first == second)


def literal_mark(side, noun, similarity) -> bool:
    for word, slot in zip(side[0], side[1], strict=True):
        if similarity(noun, word) > 0.8:
            side[2][slot] = 1
            return True
    return False


def literal_scores(rows, notes, relation, safe_words, nouns_of, similarity) -> dict:
    """What the official script prints, answer by answer: counters that are added to, one formula after the other."""
    score, number = {}, {}

    def add(name, value, of=1):
        score[name] = score.get(name, 0) + value
        number[name] = number.get(name, 0.001) + of

    for row in rows:
        note, response = notes[row["id"]], row["response"]
        if note["type"] == "generative":
            truth, hallu = literal_side(note["truth"], relation), literal_side(note["hallu"], relation)
            known = {*relation, *(word for part in relation.values() for word in part)}
            nouns = [noun for noun in nouns_of(response) if noun in known]
            wrong = 0
            for noun in nouns:
                if noun in safe_words or literal_mark(truth, noun, literal_equal):
                    continue
                literal_mark(hallu, noun, literal_equal)
                literal_mark(hallu, noun, similarity)
                if not literal_mark(truth, noun, similarity):
                    wrong += 1
            add("chair", wrong, len(nouns))
            add("cover", sum(truth[2]), len(note["truth"]))
            add("cog", sum(hallu[2]), len(note["hallu"]))
            add("clean", wrong == 0)
        else:
            kind = note["type"].removeprefix("discriminative-attribute-").removeprefix("discriminative-")
            for name in ("all", kind if kind in ("state", "number", "action", "hallucination") else "relation"):
                add(f"{name} accuracy", response == note["truth"].capitalize())
                if note["truth"] == "no":
                    add(f"{name} recall", response == "No")
                if response == "No":
                    add(f"{name} precision", note["truth"] == "no")

    def percent(*names):
        part = sum(score.get(name, 0) for name in names)
        return round(part / sum(number.get(name, 0.001) for name in names) * 100, 1)

    def section(*names, small=0.0001):
        found = {kind: percent(*(f"{name} {kind}" for name in names)) for kind in ("accuracy", "precision", "recall")}
        p, r = found["precision"] / 100, found["recall"] / 100
        return found | {"f1": round(2 * p * r / (p + r + small) * 100, 1)}

    generative = {"chair": percent("chair"), "cover": percent("cover"), "cog": percent("cog")}
    generative["hal"] = round(100 - score.get("clean", 0) / number.get("clean", 0.001) * 100, 1)
    scores = {"generative": generative, "discriminative": section("all")}
    scores |= {"existence": section("hallucination", small=0.001), "attribute": section("state", "number", "action")}
    return scores | {name: section(name) for name in ("state", "number", "action", "relation")}


def build_vectors(folder: Path, words: list[str]) -> Path:
    """A spaCy pipeline of random vectors in clusters, so that many words are alike; every seventh word has none."""
    nlp = spacy.blank("en")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(words) // 4 + 1, 6))
    for i, word in enumerate(words):
        if i % 7 != 3 and len(nlp(word)) == 1:
            vector = centres[rng.integers(len(centres))] + rng.normal(size=6) * rng.choice([0.1, 0.6])
            nlp.vocab.set_vector(word, vector.astype(np.float32))
    folder.parent.mkdir(exist_ok=True)
    nlp.to_disk(folder)
    return folder


def similarity_of(nlp):
    return functools.cache(lambda first, second: nlp(first).similarity(nlp(second)))


def random_rows(notes, words, rng):
    """An answer for each annotation: captions of words, plurals, capitals and filling, or a yes/no of any sort."""
    rows, answers = [], ("Yes", "No", "No", "yes", "No.", "no", "Maybe", "", " Yes", "NO, there is not")
    for note in notes.values():
        if note["type"] != "generative":
            rows.append({"id": note["id"], "response": rng.choice(answers)})
            continue
        near = note["truth"] + note["hallu"] + rng.sample(words, 4)
        said = []
        for _ in range(rng.randrange(0, 12)):
            word = rng.choice(near if rng.random() < 0.7 else words)
            form = rng.choice(["a {}", "two {}s", "the red {}", "{}", "some {}es", "A {},"])
            said.append(form.format(word.capitalize() if rng.random() < 0.1 else word))
        rows.append({"id": note["id"], "response": rng.choice(["", "The image shows "]) + " and ".join(said) + "."})
    return rows


def score(folder: Path, rows, *flags) -> dict:
    """Write the answers, run the script's main on them as it would be from a shell, read scores.json."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "results.json").write_text(json.dumps(rows))
    amber.main(["--skip_inference", "--output_file", str(folder / "results.json"), *map(str, flags)])
    return json.loads((folder / "scores.json").read_text())


def read_lists(folder: Path):
    notes = {note["id"]: note for note in json.loads((folder / "annotations.json").read_text())}
    relation = json.loads((folder / "relation.json").read_text())
    safe_words = (folder / "safe_words.txt").read_text().split("\n")
    return notes, relation, safe_words, sorted({*relation, *(word for part in relation.values() for word in part)})


# ---------------------------------------------------------------------------- against the literal implementation


def vocabulary_nouns(words):
    forms = {word: word for word in words}
    for word in words:
        forms.setdefault(word + ("es" if word.endswith(("s", "x", "z", "o", "ch", "sh")) else "s"), word)
        if word[-1] == "y" and word[-2] not in "aeiou":
            forms.setdefault(word[:-1] + "ies", word)
            del forms[word + "s"]
    return lambda text: [forms[part.strip(".,")] for part in text.split() if part.strip(".,") in forms]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_answers_to_the_miniature(seed, tmp_path):
    folder = MINIATURE / "amber"
    notes, relation, safe_words, words = read_lists(folder)
    vectors = build_vectors(tmp_path / "vectors", words)
    rows = random_rows(notes, words, random.Random(seed))
    flags = ("--nouns", "vocabulary", "--query_file", folder / "query" / "query_all.json", "--spacy_model", vectors)
    scores = score(tmp_path / "run", rows, *flags)
    similarity = similarity_of(spacy.load(vectors))
    expected = literal_scores(rows, notes, relation, safe_words, vocabulary_nouns(words), similarity)
    assert scores["strict"] == expected
    assert 0 < expected["generative"]["cover"] < 100 and 0 < expected["generative"]["cog"] < 100


@needs_amber
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_answers_to_amber_itself(seed, tmp_path, monkeypatch):
    monkeypatch.setattr("nltk.data.path", [str(NLTK_DATA)])
    import nltk

    notes, relation, safe_words, words = read_lists(AMBER)
    rows = random_rows(notes, words, random.Random(seed))
    vectors = SHARED / "spacy_en_glove_100d_50k"
    scores = score(tmp_path / "run", rows, "--spacy_model", vectors, "--query_file", AMBER / "query" / "query_all.json")
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize

    def nouns(text):
        return [lemmatize(word) for word, tag in nltk.pos_tag(nltk.word_tokenize(text)) if tag[:2] == "NN"]

    assert len(rows) == 15_220
    similarity = similarity_of(spacy.load(vectors))
    assert scores["strict"] == literal_scores(rows, notes, relation, safe_words, nouns, similarity)
    assert scores["spacy_model"].startswith("spacy_en_glove_100d_50k") and scores["nouns"] == "nltk"


@pytest.mark.slow
@needs_amber
def test_always_no_scores_what_is_published(tmp_path):
    notes = read_lists(AMBER)[0]
    rows = [{"id": number, "response": "No"} for number, note in notes.items() if note["type"] != "generative"]
    flags = ("--nouns", "vocabulary", "--spacy_model", build_vectors(tmp_path / "vectors", ["sky"]))
    scores = score(tmp_path, rows, *flags, "--query_file", AMBER / "query" / "query_all.json")
    assert scores["strict"]["discriminative"]["accuracy"] == 66.3 and scores["strict"]["discriminative"]["f1"] == 79.7
    assert scores["strict"]["generative"] == {"chair": 0.0, "cover": 0.0, "hal": 100.0, "cog": 0.0}  # of nothing
    assert "generative" not in scores["intervals"] and scores["amber_score"] is None


# ---------------------------------------------------------------------------- each rule by hand

RELATION = {"cup": ["mug"], "boat": ["ship", "mug"]} | {word: [] for word in "ship car tree lamp bus star".split()}
TWINS = [("bus", "car"), ("star", "tree"), ("star", "lamp"), ("mug", "lamp")]


@pytest.mark.parametrize(
    ("nouns", "truth", "hallu", "safe", "named", "hallucinated", "covered", "fallen"),
    [
        ("cup", "cup tree", "car", "", 1, 0, 1, 0),
        ("mug", "cup tree", "", "", 1, 0, 1, 0),  # an association covers the word it belongs to
        ("ship", "ship boat", "", "", 1, 0, 1, 0),  # ... before the word itself: boat's slot, not ship's
        ("ship ship", "ship ship", "", "", 2, 0, 1, 0),  # of like entries only the first can be covered
        ("cup cup cup", "cup", "", "", 3, 0, 1, 0),  # repeats count in CHAIR's denominator
        ("car", "cup", "car", "", 1, 1, 0, 1),  # expected hallucination: marked, and hallucinated
        ("car", "bus", "car", "", 1, 0, 1, 1),  # marked, falls through to a like truth word, which clears it
        ("bus", "cup", "car", "", 1, 1, 0, 1),  # marked by likeness alone
        ("star", "cup", "tree lamp", "", 1, 1, 0, 1),  # likeness marks the first like word only
        ("lamp", "ship", "star lamp", "", 1, 1, 0, 2),  # equal marks one slot, first likeness another: counted twice
        ("tree", "cup", "car", "", 1, 1, 0, 0),  # neither
        ("tree cup", "cup", "", "tree", 2, 0, 1, 0),  # a safe word passes, and is in the denominator
        ("cup", "cup", "cup", "cup", 1, 0, 0, 0),  # ... and neither covers nor marks
        ("mug", "tree", "cup boat", "", 1, 1, 0, 1),  # the first entry that has the association is marked
        ("mug", "lamp boat", "", "", 1, 0, 1, 0),
        ("ship boat", "ship boat", "", "", 2, 0, 1, 0),  # covering both takes boat's slot from both words
        ("ship boat", "boat", "", "", 2, 0, 1, 0),
        ("mug", "boat cup", "", "", 1, 0, 1, 0),
        ("mug cup", "boat cup", "", "", 2, 0, 2, 0),
        ("", "cup", "car", "", 0, 0, 0, 0),
        ("cup", "", "", "", 1, 1, 0, 0),
    ],
)  # fmt: skip
def test_a_rule(nouns, truth, hallu, safe, named, hallucinated, covered, fallen):
    alike = {word: {word, *(other for pair in TWINS if word in pair for other in pair)} for word in [*RELATION, "mug"]}
    nouns, note = [(noun, noun) for noun in nouns.split()], {"truth": truth.split(), "hallu": hallu.split()}
    shares, wrong = amber.judge_caption(nouns, note, RELATION, set(safe.split()), alike)
    assert len(wrong) == hallucinated and shares["hal"] == (not wrong, 1) and shares["chair"] == (hallucinated, named)
    assert shares["cover"] == (covered, len(note["truth"])) and shares["cog"] == (fallen, len(note["hallu"]))


def test_figures_by_hand():
    """Seven answers: denominators start at 0.001 (attribute: three times), F1 from rounded figures."""
    one = {f"{s}_{name}": (1, 1) for s in ("state", "attribute") for name in ("accuracy", "precision", "recall")}
    sums = picture_sums(1, chair=(2, 9), cover=(7, 12), hal=(2, 3), cog=(1, 6), **one)
    figures = amber.compute_figures(sums[0], official=True)
    assert figures["generative"] == {"chair": 22.2, "cover": 58.3, "hal": 33.4, "cog": 16.7}
    for section, value in {"state": 99.9, "attribute": 99.7, "relation": 0.0}.items():
        assert figures[section] == dict.fromkeys(("accuracy", "precision", "recall", "f1"), value)
    assert np.isnan(amber.compute_figures(sums[0], official=False)["relation"]["f1"])


@pytest.mark.parametrize(
    ("response", "truth", "strict", "normalised"),
    [("Yes", "yes", 1, 1), ("No", "no", 1, 1), ("yes", "yes", 0, 1), ("No.", "no", 0, 1), ("**No**, it is not", "no", 0, 1),
     ("Yes, there is no cup", "yes", 0, 1), ("Not at all", "no", 0, 0), ("Nothing", "no", 0, 0), ("", "no", 0, 0),
     ("There is no cup", "no", 0, 0), (" No", "no", 0, 1), ("Yes", "no", 0, 0)],
)  # fmt: skip
def test_a_yes_or_no(response, truth, strict, normalised, tmp_path):
    questions = {1: {"id": 1, "truth": truth, "sections": ["discriminative", "existence"]}}
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "response": response}]))
    row = amber.read_answers(tmp_path / "a.json", questions, None)[1]
    place = amber.SHARES.index(("existence", "accuracy"))
    assert row["strict"][place].tolist() == [strict, 1] and row["normalised"][place].tolist() == [normalised, 1]


@pytest.mark.skipif(not NLTK_DATA.is_dir(), reason="NLTK's data are not here")
def test_nouns_are_tagged_lemmatised_and_case_sensitive(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [str(NLTK_DATA)])
    find = amber.find_nouns("nltk", {"cup", "bus", "child", "sunglasses", "leave", "watch", "person", "fish"})
    text = "Three buses, two cups and children. They watch the fish. Cup! A person with sunglasses and leaves."
    found = find(text)
    assert [lemma for _, lemma in found] == ["bus", "cup", "child", "fish", "person"]  # sunglasses: lemma sunglass
    assert found[:2] == [("buses", "bus"), ("cups", "cup")]


def test_nouns_by_vocabulary_find_plurals():
    vocabulary = "bus knife child woman berry toy e-book shelf glass TV scarf can mouse giraffe reef".split()
    find = amber.find_nouns("vocabulary", set(vocabulary))
    text = "buses knives children women berries toys e-books shelves glasses TVs scarves cans canes mice Bus glass giraffes reefs."
    found = [lemma for _, lemma in find(text)]
    assert found == [*vocabulary[:13], "glass", "giraffe", "reef"]  # neither canes nor Bus


# ---------------------------------------------------------------------------- POPE


def official_pope(answers: list[str], labels: list[str]) -> dict:
    """The rule and the figures of POPE's evaluate.py, written out."""
    said = []
    for text in answers:
        if text.find(".") != -1:
            text = text.split(".")[0]
        words = text.replace(",", "").split(" ")
        said.append("no" if "No" in words or "not" in words or "no" in words else "yes")
    pairs = list(zip(said, labels, strict=True))
    tp, fp, tn, fn = (pairs.count(pair) for pair in [("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes")])
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    figures = {"accuracy": (tp + tn) / len(pairs), "precision": precision, "recall": recall}
    figures |= {"f1": 2 * precision * recall / (precision + recall), "yes": said.count("yes") / len(pairs)}
    return {name: round(100 * value, 2) for name, value in figures.items()}


@pytest.mark.parametrize("seed", range(4))
def test_pope_by_its_own_rule(seed, tmp_path, capsys):
    rng, asked = random.Random(seed), {"text": "Is there a cup?"}
    said = "Yes|No|yes|no|NO|No.|No, there is none.|There is not. Yes|Not here|Yes. No|none||no,|I do not know|"
    said = [*(said + "Yes, there is no doubt|nothing\nno| No|cannot|3.5 no").split("|")]
    labels = [rng.choice(["yes", "no"]) for _ in range(997)]
    rows = [asked | {"question_id": n, "image": f"{n // 6}.jpg", "label": label} for n, label in enumerate(labels)]
    file = tmp_path / "coco_pope_random.json"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    texts, earlier = ([rng.choice(said) for _ in labels] for _ in range(2))
    (tmp_path / "earlier.json").write_text(json.dumps([{"id": n, "response": text} for n, text in enumerate(earlier)]))
    answers = [{"id": n, "response": text} for n, text in enumerate(texts)]
    scores = score(tmp_path, answers, "--query_file", file, "--baseline_file", tmp_path / "earlier.json")
    assert scores["strict"] == {"pope": official_pope(texts, labels)}
    comparison = scores["comparison"]
    assert comparison["base"]["strict"]["pope"] == official_pope(earlier, labels)
    for name, found in comparison["difference"]["pope"].items():
        difference = scores["strict"]["pope"][name] - comparison["base"]["strict"]["pope"][name]
        assert found["difference"] == pytest.approx(difference, abs=0.011) and found["low"] <= found["high"]
    printed = capsys.readouterr().err
    assert "coco_pope_random.json" in printed and "answered Yes" in printed


# ---------------------------------------------------------------------------- similarity


def test_the_table_is_spacys_own_and_made_once(tmp_path, monkeypatch):
    folder = MINIATURE / "amber"
    words = read_lists(folder)[3]
    vectors = build_vectors(tmp_path / "vectors", words)
    flags = ("--nouns", "vocabulary", "--query_file", folder / "query" / "query_all.json", "--spacy_model", vectors)
    flags += ("--similarity_table", tmp_path / "table.json")
    rows = [{"id": 1, "response": "a ship and a vehicle"}]
    first = score(tmp_path / "a", rows, *flags)
    table = json.loads((tmp_path / "table.json").read_text())
    docs = list(spacy.load(vectors).pipe(words))
    alike = {(a.text, b.text) for i, a in enumerate(docs) for b in docs[i + 1 :] if a.similarity(b) > 0.8}
    assert {(a, b) for a, b, _ in table["similar"]} == alike and 5 < len(alike) < 100
    monkeypatch.setattr(spacy, "load", lambda *_: pytest.fail("the table was there"))
    assert score(tmp_path / "b", rows, *flags) == first


def test_the_miniatures_table_is_what_its_builder_writes(tmp_path):
    sys.path.insert(0, str(MINIATURE))
    import scenes

    table = json.loads((MINIATURE / "amber" / "similarity.json").read_text())
    assert [tuple(entry) for entry in table["similar"]] == scenes.SIMILAR
    assert table["words"] == read_lists(MINIATURE / "amber")[3]
    glove = SHARED / "spacy_en_glove_100d_50k"
    if glove.is_dir():
        amber.load_similarity(tmp_path / "made.json", str(glove), set(table["words"]))
        assert json.loads((tmp_path / "made.json").read_text())["similar"] == table["similar"]


# ---------------------------------------------------------------------------- scores.json, intervals, comparison

MINI = ("--test_mode", "--nouns", "vocabulary")


def mini_rows(answer) -> list[dict]:
    notes = read_lists(MINIATURE / "amber")[0]
    return [{"id": number, "response": answer(note)} for number, note in notes.items()]


def say_truth(note) -> str:
    return f"A {note['truth'][0]}" if note["type"] == "generative" else note["truth"].capitalize()


def test_layout_and_extras(tmp_path):
    def answer(note):
        return "A bus and a tree." if note["type"] == "generative" else "no." if note["id"] % 10 else "Hm"

    scores = score(tmp_path, mini_rows(answer), *MINI)
    sections = "generative discriminative existence attribute state number action relation"
    assert list(scores["strict"]) == sections.split()
    assert set(scores["strict"]["generative"]) == {"chair", "cover", "hal", "cog"}
    assert set(scores["strict"]["relation"]) == {"accuracy", "precision", "recall", "f1"}
    strict, normalised = (scores[rule]["discriminative"]["accuracy"] for rule in ("strict", "normalised"))
    assert strict == 0.0 < 40 < normalised
    hm = sum(number % 10 == 0 for number in range(241, 2522))
    assert scores["neither_yes_nor_no"] == round(100 * hm / 2281, 2)
    assert scores["mean_words"] == {"generative": 5.0, "discriminative": 1.0}
    chair, f1 = scores["strict"]["generative"]["chair"], scores["strict"]["discriminative"]["f1"]
    assert scores["amber_score"] == round((100 - chair + f1) / 2, 2)
    assert scores["asked"] == scores["answers"] == {"generative": 240, "discriminative": 2281}
    interval = scores["intervals"]["amber"]["score"]
    assert interval["low"] < scores["amber_score"] < interval["high"]
    assert scores["nouns"] == "vocabulary" and scores["spacy_model"] == "en_glove_100d_50k"
    assert (tmp_path / "scores.png").stat().st_size > 10_000


@pytest.mark.slow
def test_evaluation_type_chooses_the_sections(tmp_path):
    rows = mini_rows(lambda note: "No")
    everything = score(tmp_path, rows, *MINI)["strict"]
    kinds = {"g": "generative", "de": "existence", "dr": "relation", "da": "attribute state number action"}
    for kind, sections in kinds.items():
        found = score(tmp_path, rows, *MINI, "--evaluation_type", kind)["strict"]
        assert found == {name: everything[name] for name in sections.split()}


def picture_sums(pictures: int, **shares) -> np.ndarray:
    """Sums of SHARES, (pictures, SHARES, 2), by name; `state_accuracy` is that of the section `state`."""
    sums = np.zeros((pictures, len(amber.SHARES), 2))
    for name, (part, whole) in shares.items():
        section, _, figure = name.rpartition("_")
        place = amber.SHARES.index((section or "generative", figure))
        sums[:, place, 0], sums[:, place, 1] = part, whole
    return sums


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 200 samples of 100 images from a known population, about 95 % of the intervals hold its CHAIR and accuracy."""
    rng = np.random.default_rng(1)
    held = {"chair": 0, "accuracy": 0}
    for _ in range(200):
        rate = rng.beta(2, 6, size=100)  # images differ, answers about one image are alike: mean 0.25
        wrong, right = rng.binomial(8, rate), rng.binomial(10, 1 - rate)
        counts = picture_sums(100, hal=(0, 1), chair=(wrong, 8), state_accuracy=(right, 10))
        found = amber.estimate(counts, None, ["generative", "state"], draws=500)
        held["chair"] += found["generative"]["chair"]["low"] <= 25 <= found["generative"]["chair"]["high"]
        held["accuracy"] += found["state"]["accuracy"]["low"] <= 75 <= found["state"]["accuracy"]["high"]
    assert all(0.88 * 200 <= number <= 200 for number in held.values()) and min(held.values()) < 200


def test_p_values_are_uniform_without_a_difference_and_small_with_one():
    rng = np.random.default_rng(2)
    values = []
    for _ in range(150):
        right = rng.binomial(10, 0.7, size=(2, 80))
        first, second = (picture_sums(80, state_accuracy=(part, 10)) for part in right)
        values.append(amber.estimate(first, second, ["state"], draws=500)["state"]["accuracy"]["p_value"])
    assert 0.01 <= np.mean(np.array(values) < 0.05) <= 0.12 and 0.4 < np.mean(values) < 0.65
    second = picture_sums(80, state_accuracy=(right[1] - 1, 10))
    found = amber.estimate(first, second, ["state"])["state"]["accuracy"]
    assert found["p_value"] < 0.01 and found["low"] > 0 and found["low"] <= found["difference"] <= found["high"]


def test_comparison_with_a_file_that_has_fewer_answers(tmp_path):
    rows = mini_rows(lambda note: "A tree." if note["type"] == "generative" else "No")
    better = mini_rows(say_truth)
    (tmp_path / "earlier.json").write_text(json.dumps(rows[:2000]))
    scores = score(tmp_path, better, *MINI, "--baseline_file", tmp_path / "earlier.json")
    assert scores["answers"]["discriminative"] == 2281
    comparison = scores["comparison"]
    assert comparison["base"]["answers"] == comparison["this"]["answers"] == {"generative": 240, "discriminative": 1760}
    assert comparison["labels"] == ["earlier", "results"] and comparison["left_out"] == 521
    for section, figure, sign in (("generative", "chair", -1), ("discriminative", "accuracy", 1)):
        found = comparison["difference"][section][figure]
        sides = [comparison[side]["strict"][section][figure] for side in ("base", "this")]
        assert found["difference"] == pytest.approx(sides[1] - sides[0], abs=0.11) and sign * found["difference"] > 5
        assert sign * found["low"] > 0 and sign * found["high"] > 0 and found["p_value"] < 0.001
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("<section>") == 24 and "<mark>tree</mark>" in page and "data:image/png" in page


@pytest.mark.slow
def test_intervals_are_by_picture(tmp_path):
    """Answers that agree within a picture: by question, the interval would be half as wide."""
    queries = json.loads((MINIATURE / "amber" / "query" / "query_all.json").read_text())
    images = {query["id"]: query["image"] for query in queries}
    right = {image: number % 2 for number, image in enumerate(dict.fromkeys(images.values()))}
    rows = mini_rows(lambda note: say_truth(note) if note["id"] > 240 and right[images[note["id"]]] else "")
    edges = score(tmp_path, rows, *MINI)["intervals"]["discriminative"]["accuracy"]
    by_picture = edges["high"] - edges["low"]
    assert by_picture == pytest.approx(2 * 1.96 * 100 * 0.5 / len(right) ** 0.5, rel=0.1)
    sums = [picture_sums(1, discriminative_accuracy=(row["response"] != "", 1))[0] for row in rows if row["id"] > 240]
    edges = amber.estimate(np.array(sums), None, ["discriminative"], draws=500)["discriminative"]["accuracy"]
    assert edges["high"] - edges["low"] < by_picture / 2


def test_estimates_by_hand():
    # two files that differ in the same way on every picture: the difference has no spread, whatever the figures have
    right = np.arange(60) % 9
    first, second = (picture_sums(60, state_accuracy=(part, 10)) for part in (right + 1, right))
    found = amber.estimate(first, second, ["state"])["state"]["accuracy"]
    assert found["low"] == found["high"] == found["difference"] == 10.0
    alone = amber.estimate(first, None, ["state"])["state"]["accuracy"]
    assert alone["high"] - alone["low"] > 5
    # 100 % precision of 3 and of 9 answers a picture, which AMBER's 0.001 makes 99.99 and 99.997, does not differ
    shares = [{"accuracy": (n, 10), "precision": (n, n), "recall": (n, 10)} for n in (9, 3)]
    first, second = (picture_sums(40, **{f"existence_{name}": part[name] for name in part}) for part in shares)
    found = amber.estimate(first, second, ["existence"])["existence"]
    assert found["precision"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    assert "-0.0" not in json.dumps(amber.estimate(second, first, ["existence"])["existence"]["precision"])
    assert found["recall"]["p_value"] < 0.001
    # a section that one picture has is not drawn as nothing where the draw lacks this picture
    rare = np.where(np.arange(30) == 4, 4, 0)
    found = amber.estimate(picture_sums(30, hal=(0, 1), action_accuracy=(rare, rare)), None, ["action"])
    assert found["action"]["accuracy"]["low"] >= 99.9


@pytest.mark.slow
def test_the_chart_has_a_unit_and_no_label_on_another(tmp_path, monkeypatch):
    kept, save = [], amber.Figure.savefig
    monkeypatch.setattr(amber.Figure, "savefig", lambda figure, *a, **b: [kept.append(figure), save(figure, *a, **b)])
    rows = mini_rows(say_truth)
    (tmp_path / "earlier.json").write_text(json.dumps(rows))
    score(tmp_path, rows, *MINI, "--baseline_file", tmp_path / "earlier.json")  # full bars beside full bars
    axis = kept[0].axes[0]
    boxes = [text.get_window_extent() for text in [*axis.texts, *axis.get_yticklabels()] if text.get_text()]
    assert "%; thin lines are 95 % intervals" in axis.get_xlabel() and len(boxes) > 40 and len(kept[0].axes) == 1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


@pytest.mark.parametrize(("kind", "answered"), [("g", "discriminative"), ("d", "generative")])
def test_a_task_without_answers_has_scores_and_no_chart(kind, answered, tmp_path, capsys):
    (tmp_path / "scores.png").write_text("of an earlier run")
    rows = [row for row in mini_rows(lambda note: "No") if (row["id"] <= 240) == (answered == "generative")]
    scores = score(tmp_path, rows, *MINI, "--evaluation_type", kind)
    printed = "".join(capsys.readouterr().err.split())  # long paths are wrapped
    assert "gallery.html" not in printed.split("scores.json")[1] or (tmp_path / "gallery.html").exists()
    assert scores["intervals"] == {} and scores["strict"] and not (tmp_path / "scores.png").exists()


def test_odd_answers_are_scored_and_two_files_of_one_name_have_two_labels(tmp_path):
    rows = [{"id": 1, "response": "<script>alert(1)</script> a tree \ud83d and a bus"}, {"id": 241, "response": None}]
    score(tmp_path / "earlier", rows, *MINI)
    scores = score(tmp_path / "now", rows, *MINI, "--baseline_file", tmp_path / "earlier" / "results.json")
    assert scores["answers"] == {"generative": 1, "discriminative": 1}
    assert "<script>" not in (tmp_path / "now" / "gallery.html").read_text()
    assert scores["comparison"]["labels"] == ["earlier results", "results"]


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"id": 1}', '[{"id": 99999, "response": "No"}]', '[{"id": 1}]', '[{"id": 1, "response": null}]'],
)  # fmt: skip
def test_a_bad_answer_file_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        amber.main([*MINI, "--skip_inference", "--output_file", str(tmp_path / "results.json")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "results.json" in error and not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("name", ["safe_words.txt", "relation.json", "annotations.json", "similarity.json"])
def test_bad_lists_are_named(name, tmp_path, capsys):
    shutil.copytree(MINIATURE / "amber", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("image"))
    (tmp_path / name).unlink()
    if name == "similarity.json":  # one of other words
        (tmp_path / name).write_text('{"words": ["a"], "similar": [], "spacy_model": "x", "threshold": 0.8}')
    flags = ["--query_file", tmp_path / "query" / "query_all.json", "--similarity_table", tmp_path / "similarity.json"]
    with pytest.raises((SystemExit, FileNotFoundError)) as stopped:
        score(tmp_path / "run", mini_rows(lambda note: "No"), "--nouns", "vocabulary", *flags)
    assert name in f"{capsys.readouterr().err} {stopped.value}"


def test_missing_data_of_nltk_are_one_sentence_with_the_command(tmp_path, monkeypatch, capsys):
    def not_there(*_):
        raise LookupError

    monkeypatch.setattr("nltk.word_tokenize", not_there)
    with pytest.raises(SystemExit) as stopped:
        score(tmp_path, mini_rows(lambda note: "No"), "--test_mode")
    assert stopped.value.code == 2 and "python -m nltk.downloader punkt_tab" in capsys.readouterr().err
