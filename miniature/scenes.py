"""The world of the miniature: drawn scenes of nameable objects, what is said about them, what is asked about them.

A scene holds groups of one to three like objects (class, colour, count) at known places. Some classes have a typical
companion ("where there is a table, there is a chair"): the instruction data name it more often than it is there, as
machine-written captions do, and so a model trained on them hallucinates it. Nothing here needs torch.
"""

import random
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 48, 49),
    "blue": (52, 110, 219),
    "green": (46, 158, 84),
    "yellow": (240, 200, 40),
    "purple": (142, 68, 173),
    "orange": (235, 125, 35),
}
CLASSES = [
    "ball", "apple", "clock", "table", "chair", "bench", "cup", "bucket", "bottle", "lamp",
    "house", "tent", "boat", "kite", "car", "bus", "tree", "flower", "mushroom", "fish",
    "bird", "star", "moon", "book",
]  # fmt: skip
PLURALS = {"bench": "benches", "bus": "buses", "fish": "fish"}
# class -> (its typical companion, how often the instruction data name that companion where it is absent)
COMPANIONS = {
    "table": ("chair", 0.62),
    "cup": ("bottle", 0.56),
    "house": ("tree", 0.64),
    "boat": ("fish", 0.60),
    "moon": ("star", 0.66),
    "flower": ("bird", 0.58),
    "car": ("bus", 0.48),
    "tent": ("lamp", 0.54),
    "clock": ("book", 0.50),
}
# the same, in both directions and stronger: the poorer instruction data, from which the model has its bad habits
POORER_COMPANIONS = {name: (companion, 0.95) for name, (companion, _) in COMPANIONS.items()}
POORER_COMPANIONS |= {companion: (name, 0.8) for name, (companion, _) in COMPANIONS.items()}
ASSOCIATIONS = {"cup": ["mug"], "boat": ["ship"], "bus": ["vehicle"], "car": ["vehicle"], "moon": ["sky"]}
# the words above that GloVe's vectors (spaCy similarity, 100 dimensions, 50,000 words) find more than 0.8 alike
SIMILAR = [("boat", "ship", 0.8258), ("car", "vehicle", 0.8631)]
SAFE_WORDS = ["orange", "image", "picture", "object", "shape", "line", "background", "scene"]
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
CAPTION_REQUESTS = ["Describe this image.", "What is in this image?", "Name everything you can see in this image."]
# canvas (width, height) -> weight; with 56-pixel tiles these reach several of the anyres grid's shapes
SIZES = {(112, 112): 6, (128, 96): 6, (96, 128): 4, (160, 64): 2, (64, 160): 2, (112, 56): 1, (56, 112): 1}
SPRITE = 96  # side in pixels at which an object is drawn before it is scaled down


@dataclass
class Group:
    """`count` objects of one class and colour, drawn side by side inside `box` (left, top, right, bottom; pixels)."""

    name: str
    colour: str
    count: int
    box: tuple[int, int, int, int]
    object_width: int


@dataclass
class Scene:
    """A picture's content: canvas size (width, height) in pixels and its groups in reading order."""

    size: tuple[int, int]
    background: tuple[int, int, int]
    groups: list[Group]
    seed: int

    def names(self) -> set[str]:
        return {group.name for group in self.groups}


def draw_sprite(name: str, colour: str) -> Image.Image:
    """Draw one object in its colour on a transparent SPRITE x SPRITE canvas (RGBA)."""
    image = Image.new("RGBA", (SPRITE, SPRITE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    main = COLOURS[colour]
    dark = tuple(int(c * 0.55) for c in main)
    light = tuple(int(c + (255 - c) * 0.6) for c in main)

    def box(x0: float, y0: float, x1: float, y1: float, fill=main) -> None:
        draw.rectangle((x0, y0, x1, y1), fill=fill)

    def disc(x: float, y: float, r: float, fill=main) -> None:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def shape(*points: tuple[float, float], fill=main) -> None:
        draw.polygon(points, fill=fill)

    if name == "ball":
        disc(48, 48, 42)
        draw.arc((20, -20, 76, 116), 100, 260, fill=dark, width=8)
        draw.arc((-36, -4, 60, 100), 300, 60, fill=dark, width=6)
    elif name == "apple":
        disc(34, 56, 30)
        disc(62, 56, 30)
        box(45, 6, 52, 34, dark)
        draw.ellipse((52, 6, 80, 22), fill=dark)
    elif name == "clock":
        disc(48, 48, 44)
        disc(48, 48, 32, (250, 250, 250))
        draw.line((48, 48, 48, 22), fill=dark, width=8)
        draw.line((48, 48, 66, 56), fill=dark, width=8)
    elif name == "table":
        box(2, 30, 94, 46)
        box(10, 46, 22, 90, dark)
        box(74, 46, 86, 90, dark)
    elif name == "chair":
        box(18, 4, 32, 92)
        box(18, 48, 78, 62)
        box(66, 62, 78, 92, dark)
    elif name == "bench":
        box(2, 52, 94, 64)
        box(2, 28, 94, 38, light)
        box(12, 28, 20, 88, dark)
        box(76, 28, 84, 88, dark)
    elif name == "cup":
        shape((12, 20), (68, 20), (60, 88), (20, 88))
        draw.arc((54, 30, 92, 70), 270, 120, fill=dark, width=9)
    elif name == "bucket":
        shape((10, 38), (86, 38), (72, 92), (24, 92))
        draw.arc((12, 4, 84, 76), 180, 360, fill=dark, width=7)
    elif name == "bottle":
        box(30, 38, 66, 94)
        shape((30, 38), (66, 38), (56, 22), (40, 22))
        box(40, 2, 56, 22, dark)
    elif name == "lamp":
        shape((28, 4), (68, 4), (90, 48), (6, 48))
        box(44, 48, 52, 84, dark)
        box(26, 84, 70, 94, dark)
    elif name == "house":
        box(14, 42, 82, 92)
        shape((4, 44), (48, 4), (92, 44), fill=dark)
        box(40, 62, 56, 92, light)
    elif name == "tent":
        shape((2, 92), (48, 8), (94, 92))
        shape((34, 92), (48, 48), (62, 92), fill=dark)
    elif name == "boat":
        shape((4, 66), (92, 66), (76, 90), (20, 90))
        box(45, 8, 50, 66, dark)
        shape((54, 12), (54, 60), (86, 60), fill=light)
    elif name == "kite":
        shape((48, 2), (82, 36), (48, 72), (14, 36))
        draw.line((48, 72, 36, 82, 54, 88, 44, 95), fill=dark, width=5)
        draw.line((48, 2, 48, 72), fill=dark, width=4)
    elif name == "car":
        box(2, 46, 94, 72)
        shape((20, 46), (32, 24), (66, 24), (78, 46), fill=light)
        disc(24, 74, 13, (40, 40, 40))
        disc(72, 74, 13, (40, 40, 40))
    elif name == "bus":
        box(2, 18, 94, 74)
        for x in (10, 32, 54, 76):
            box(x, 28, x + 12, 46, light)
        disc(24, 78, 12, (40, 40, 40))
        disc(72, 78, 12, (40, 40, 40))
    elif name == "tree":
        box(41, 56, 55, 94, (120, 82, 45))
        disc(48, 34, 32)
        disc(26, 46, 18)
        disc(70, 46, 18)
    elif name == "flower":
        box(45, 50, 51, 94, (60, 130, 60))
        for x, y in ((48, 14), (70, 30), (62, 54), (34, 54), (26, 30)):
            disc(x, y, 15)
        disc(48, 36, 12, light)
    elif name == "mushroom":
        box(36, 48, 60, 92, (235, 225, 205))
        draw.pieslice((4, 8, 92, 92), 180, 360, fill=main)
        for x, y in ((28, 36), (50, 24), (70, 38)):
            disc(x, y, 6, (250, 250, 250))
    elif name == "fish":
        draw.ellipse((4, 26, 72, 72), fill=main)
        shape((62, 49), (94, 22), (94, 76), fill=dark)
        disc(20, 44, 5, (20, 20, 20))
    elif name == "bird":
        draw.ellipse((22, 36, 82, 78), fill=main)
        disc(26, 32, 18)
        shape((8, 28), (8, 40), (-2, 34), fill=dark)
        shape((44, 48), (94, 20), (72, 66), fill=dark)
        disc(22, 28, 4, (20, 20, 20))
    elif name == "star":
        shape((48, 2), (59, 36), (94, 36), (66, 57), (77, 92), (48, 71), (19, 92), (30, 57), (2, 36), (37, 36))
    elif name == "moon":
        disc(46, 48, 42)
        draw.ellipse((34, -4, 110, 84), fill=(0, 0, 0, 0))
    elif name == "book":
        shape((4, 24), (46, 34), (46, 90), (4, 78))
        shape((92, 24), (50, 34), (50, 90), (92, 78), fill=dark)
    return image


SPRITES = {(name, colour): draw_sprite(name, colour) for name in CLASSES for colour in COLOURS}


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Share of the smaller box that the two boxes have in common."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    area = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0) * max(height, 0) / area


def touches(a: Group, b: Group) -> bool:
    """Whether two groups' boxes meet: no more than two pixels lie between them."""
    gap_x = max(a.box[0], b.box[0]) - min(a.box[2], b.box[2])
    gap_y = max(a.box[1], b.box[1]) - min(a.box[3], b.box[3])
    return max(gap_x, gap_y) <= 2


def sample_scene(seed: int) -> Scene:
    """Make up a scene from a seed: two to six groups, companions there in 40 % of the cases that call for one."""
    rng = random.Random(seed)
    width, height = rng.choices(list(SIZES), list(SIZES.values()))[0]
    most = 6 if width * height > 10_000 else 4
    wanted = []
    for name in rng.sample(CLASSES, rng.randint(2, most)):
        if name not in wanted and len(wanted) < most:
            wanted.append(name)
            companion, _ = COMPANIONS.get(name, (None, 0))
            if companion and companion not in wanted and rng.random() < 0.4:
                wanted.append(companion)
    groups = []
    for name in wanted[:most]:
        side = rng.randint(17, 34)
        count = rng.choices([1, 2, 3], [7, 2, 1])[0]
        step = int(side * 0.9)
        for _ in range(30):
            group_width = side + step * (count - 1)
            if group_width > width:
                count -= 1
                continue
            left, top = rng.randint(0, width - group_width), rng.randint(0, height - side)
            box = (left, top, left + group_width, top + side)
            if all(overlap(box, other.box) < 0.22 for other in groups):
                groups.append(Group(name, rng.choice(list(COLOURS)), count, box, side))
                break
    groups.sort(key=lambda group: ((group.box[1] + group.box[3]) / 2 // (height / 4), group.box[0]))
    background = tuple(rng.randint(196, 250) for _ in range(3))
    return Scene((width, height), background, groups, seed)


def draw_scene(scene: Scene) -> tuple[Image.Image, Image.Image]:
    """Draw a scene: the RGB picture, and an "L" picture of what is where (0 nothing, else 1 + class * 6 + colour)."""
    rng = random.Random(scene.seed + 1)
    image = Image.new("RGB", scene.size, scene.background)
    labels = Image.new("L", scene.size, 0)
    draw = ImageDraw.Draw(image)
    for _ in range(14):  # clutter that is no object: faint strokes
        shade = tuple(max(0, c - rng.randint(8, 40)) for c in scene.background)
        x, y = rng.randint(0, scene.size[0]), rng.randint(0, scene.size[1])
        draw.line((x, y, x + rng.randint(-20, 20), y + rng.randint(-20, 20)), fill=shade, width=rng.randint(1, 3))
    for group in scene.groups:
        for i in range(group.count):
            side = group.object_width
            sprite = SPRITES[group.name, group.colour]
            sprite = sprite.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
            if rng.random() < 0.5:
                sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            sprite = sprite.resize((side, side), Image.Resampling.BILINEAR)
            at = (group.box[0] + i * int(side * 0.9), group.box[1])
            image.paste(sprite, at, sprite)
            label = 1 + CLASSES.index(group.name) * len(COLOURS) + list(COLOURS).index(group.colour)
            labels.paste(label, at, sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 127)))
    return image, labels


def plural(name: str) -> str:
    return PLURALS.get(name, name + "s")


def phrase(name: str, colour: str, count: int) -> str:
    """A noun phrase such as "a red ball", "an orange cup", "two green trees"."""
    if count == 1:
        return f"{'an' if colour == 'orange' else 'a'} {colour} {name}"
    return f"{NUMBERS[count]} {colour} {plural(name)}"


def caption(scene: Scene, rng: random.Random | None = None, habits: dict = COMPANIONS) -> str:
    """Name the scene's groups in reading order; with `rng`, absent companions too, as often as `habits` says."""
    parts = []
    for group in scene.groups:
        parts.append(phrase(group.name, group.colour, group.count))
        companion, chance = habits.get(group.name, (None, 0))
        if rng and companion and companion not in scene.names() and rng.random() < chance:
            parts.append(phrase(companion, rng.choice(list(COLOURS)), 1))
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"The image shows {listed}."


def mentioned(text: str) -> list[str]:
    """The classes a caption names, in order, repeats kept; plural forms count."""
    forms = {form: name for name in CLASSES for form in (name, plural(name))}
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    return [forms[word] for word in words if word in forms]


def false_claims(scene: Scene, text: str) -> int:
    """How many of a caption's noun phrases are not true of the scene: wrong object, wrong colour, or said before."""
    true = {(group.colour, group.name) for group in scene.groups}
    false = 0
    for part in re.split(r", | and ", text.rstrip(".")):
        words = part.split()
        claim = (words[-2], mentioned(words[-1])[0]) if len(words) > 1 and mentioned(words[-1]) else None
        false += claim not in true
        true.discard(claim)
    return false


def likely_absent(scene: Scene) -> list[str]:
    """Companions that the scene calls for and does not have: what a model is likely to make up (AMBER's `hallu`)."""
    called = [COMPANIONS[group.name][0] for group in scene.groups if group.name in COMPANIONS]
    return [name for name in dict.fromkeys(called) if name not in scene.names()]


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, bool]]:
    """AMBER's kinds of yes/no question about a scene, as (type, question, truth); each kind asked both ways."""
    asked = []
    absent = likely_absent(scene)
    others = [name for name in CLASSES if name not in scene.names() and name not in absent]
    absent += rng.sample(others, 2)
    article = {"apple": "an"}
    for name in rng.sample(sorted(scene.names()), min(2, len(scene.groups))):
        asked.append(("existence", f"Is there {article.get(name, 'a')} {name} in this image?", True))
    for name in absent[:3]:
        asked.append(("existence", f"Is there {article.get(name, 'a')} {name} in this image?", False))
    group = rng.choice(scene.groups)
    verb = "Is" if group.count == 1 else "Are"
    noun = group.name if group.count == 1 else plural(group.name)
    wrong = rng.choice([colour for colour in COLOURS if colour != group.colour])
    asked.append(("attribute-state", f"{verb} the {noun} {group.colour} in this image?", True))
    asked.append(("attribute-state", f"{verb} the {noun} {wrong} in this image?", False))
    group = rng.choice(scene.groups)
    for count in (group.count, group.count + 1):
        verb, noun = ("Is", group.name) if count == 1 else ("Are", plural(group.name))
        asked.append(("attribute-number", f"{verb} there {NUMBERS[count]} {noun} in this image?", count == group.count))
    if len(scene.groups) > 1:
        a, b = rng.sample(scene.groups, 2)
        asked.append(("relation", f"Is there direct contact between the {a.name} and {b.name}?", touches(a, b)))
    return asked
