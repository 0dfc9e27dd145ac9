"""Stories in images: a character moves through a scene, and the next image is to be drawn.

    root/
      images/{train,seen,unseen}/17_2.png  64x64: image 2 of story 17
      train.jsonl                          stories of the characters that training knows
      seen.jsonl, unseen.jsonl             held-out stories, with known and with new characters
      stories.json                         what is on each image
      manifest.json                        parameters; if they match, nothing is written anew

The words say where the character goes, and neither how it looks nor what is behind it: that has to
be read off the earlier images. All of it is composed, so a drawn image can be judged exactly
(`judge`). Characters are cut-outs: Tux Paint's stamps, where Debian's package
`tuxpaint-stamps-default` is installed (or its folder is given), otherwise the shapes of easy-vqa.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from metamorph_jax.errors import UserError
from metamorph_jax.files import write_whole
from metamorph_jax.quickstart.data import COLORS, SHAPES, labelled_images, write_lines

SIDE, BOX = 64, 26  # pixels of an image and of the square that holds a character
HORIZON = 40  # row at which the ground begins
PLACES = {"on the left": 3, "in the middle": 19, "on the right": 35}  # of the box's left edge
TOP = 24  # of the box's upper edge: it stands on the ground
STAMPS = pathlib.Path("/usr/share/tuxpaint/stamps")
GROUPS = ("animals", "vehicles", "food", "clothes", "household", "plants", "people", "sports")
SPLITS = ("train", "seen", "unseen")
FORMAT = 1  # raise when the files' contents change for the same parameters


@dataclasses.dataclass(frozen=True)
class Character:
    """A cut-out: its name in words, and uint8[BOX, BOX, 4] with its opacity as the last channel."""

    name: str
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Story:
    """One story. `sky`, `ground`: uint8 colours; `places`: where the character is, image by image.

    Attributes:
        character: index into the list of characters.
    """

    character: int
    sky: tuple[int, int, int]
    ground: tuple[int, int, int]
    places: tuple[str, ...]

    def image(self, characters: Sequence[Character], number: int) -> np.ndarray:
        """uint8[SIDE, SIDE, 3]: what image `number` shows."""
        return compose(self, characters[self.character], self.places[number])

    def turns(self, name: str) -> list[tuple[str, str]]:
        """The words with the places of images; all but the first image are to be drawn."""
        first = f"The {name} is {self.places[0]}: <image>\n"
        turns = []
        for place in self.places[1:]:
            turns += [("user", f"Now it is {place}: "), ("assistant", "<image>")]
        return [("user", first + turns[0][1]), *turns[1:]]


def compose(story: Story, character: Character, place: str) -> np.ndarray:
    """uint8[SIDE, SIDE, 3]: the scene of a story with a character at a place."""
    image = np.empty((SIDE, SIDE, 3), np.float32)
    image[:HORIZON], image[HORIZON:] = story.sky, story.ground
    left = PLACES[place]
    here = image[TOP : TOP + BOX, left : left + BOX]
    opacity = character.pixels[..., 3:].astype(np.float32) / 255
    here[...] = here * (1 - opacity) + character.pixels[..., :3] * opacity
    return np.round(image).astype(np.uint8)


# ---- characters


def cut_out(image: Image.Image) -> np.ndarray | None:
    """uint8[BOX, BOX, 4] of an image with transparency; None if it shows nothing or is too thin."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox()
    if box is None or not 0.5 < (box[2] - box[0]) / (box[3] - box[1]) < 2:
        return None
    image = image.crop(box)
    image.thumbnail((BOX, BOX), Image.Resampling.LANCZOS)
    whole = Image.new("RGBA", (BOX, BOX))
    whole.paste(image, ((BOX - image.width) // 2, BOX - image.height))  # it stands on the ground
    pixels = np.asarray(whole)
    return pixels if pixels[..., 3].mean() > 0.3 * 255 else None


def stamps(folder: pathlib.Path) -> list[Character]:
    """The characters among Tux Paint's stamps, one for each name, in the order of their files.

    Raises:
        UserError: the folder has none.
    """
    found: dict[str, Character] = {}
    files = (f for group in GROUPS for f in sorted((folder / group).rglob("*.png")))
    for file in files:
        words = file.with_suffix(".txt")
        if not words.is_file():
            continue
        line = words.read_text(encoding="utf-8", errors="replace").splitlines()[0]
        name = _plain(line)
        if not name or name in found:
            continue
        pixels = cut_out(Image.open(file))
        if pixels is not None:
            found[name] = Character(name, pixels)
    if not found:
        raise UserError(f"{folder} has no stamps of Tux Paint (GROUP/NAME.png beside NAME.txt)")
    return list(found.values())


def _plain(line: str) -> str:
    """ "A blue whale." -> "blue whale"; "" for what is more than three words."""
    words = line.strip().rstrip(".!").split()
    if words and words[0].lower() in ("a", "an", "the", "some"):
        words = words[1:]
    name = " ".join(words).lower()
    return name if 0 < len(words) <= 3 and name.isascii() else ""


def shapes(data) -> list[Character]:
    """Coloured shapes cut out of images of easy-vqa, one of each colour and shape.

    data: a `QuickstartData` that is there.
    """
    _, pixels, colours, kinds = labelled_images(data, "train")
    found = {}
    for image, colour, kind in zip(pixels, colours, kinds, strict=True):
        name = f"{COLORS[colour]} {SHAPES[kind]}"
        if name in found:
            continue
        away = np.abs(image.astype(int) - image[0, 0]).max(-1)
        whole = np.dstack([image, np.where(away > 60, 255, 0).astype(np.uint8)])
        cut = cut_out(Image.fromarray(whole))
        if cut is not None:
            found[name] = Character(name, cut)
    return list(found.values())


# ---- files


def prepare(
    root,
    characters: Callable[[], list[Character]],
    *,
    counts: dict[str, int],
    images: int = 3,
    unseen: float = 0.2,
    seed: int = 0,
) -> pathlib.Path:
    """Writes the files under `root`; the same arguments write the same bytes.

    Args:
        characters: makes the list of them.
        counts: how many stories of each of SPLITS.
        images: in a story.
        unseen: share of the characters that training does not see.
    """
    root, known = pathlib.Path(root), characters()
    looks = zlib.crc32(b"".join(c.name.encode() + c.pixels.tobytes() for c in known))
    parameters = {"format": FORMAT, "counts": counts, "images": images, "unseen": unseen,
                  "seed": seed, "characters": len(known), "looks": looks}  # fmt: skip
    manifest = root / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text()) == parameters:
        return root
    manifest.unlink(missing_ok=True)
    order = np.random.default_rng(seed).permutation(len(known))
    new = order[: max(int(len(known) * unseen), 1)]
    told = {}
    for split in SPLITS:
        of = new if split == "unseen" else order[len(new) :]
        told[split] = _stories(split, counts[split], of, images, seed)
        _write_split(root, split, told[split], known)
    fields = {split: [dataclasses.asdict(s) for s in told[split]] for split in SPLITS}
    fields["characters"] = [c.name for c in known]
    write_whole(root / "stories.json", json.dumps(fields))
    write_whole(manifest, json.dumps(parameters))
    return root


def _stories(split: str, count: int, characters, images: int, seed: int) -> list[Story]:
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    names, made = list(PLACES), []
    for _ in range(count):
        places = [names[rng.integers(3)]]
        while len(places) < images:
            places.append(rng.choice([n for n in names if n != places[-1]]))
        sky, ground = (tuple(int(v) for v in rng.integers(90, 250, 3)) for _ in range(2))
        made.append(Story(int(rng.choice(characters)), sky, ground, tuple(map(str, places))))
    return made


def _write_split(root: pathlib.Path, split: str, stories: list[Story], characters) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for n, story in enumerate(stories):
        names = []
        for k in range(len(story.places)):
            names.append(f"images/{split}/{n}_{k}.png")
            Image.fromarray(story.image(characters, k)).save(root / names[-1])
        turns = story.turns(characters[story.character].name)
        speakers = {"user": "human", "assistant": "gpt"}
        said = [{"from": speakers[who], "value": text} for who, text in turns]
        rows.append({"id": f"{split}-{n}", "image": names, "conversations": said})
    write_lines(root / f"{split}.jsonl", rows)


def read(root, split: str) -> list[Story]:
    """The stories of a split, in the order of its file."""
    fields = json.loads((pathlib.Path(root) / "stories.json").read_text())[split]
    return [
        Story(f["character"], tuple(f["sky"]), tuple(f["ground"]), tuple(f["places"]))
        for f in fields
    ]


# ---- judging


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one drawn image.

    Attributes:
        place, character: whether the nearest of all possible images has the right ones.
        scene: mean distance of the colours beside the character to the right ones, in 0 … 255.
        error: root mean square distance to the true image, in 0 … 255.
    """

    place: bool
    character: bool
    scene: float
    error: float


def judge(
    drawn: np.ndarray, story: Story, number: int, characters: Sequence[Character], others=16
) -> Verdict:
    """Compares a drawn image with all that could have been drawn in this scene.

    Those are the story's own character and `others` more (always the same for a story), at every
    place.

    Args:
        drawn: uint8[SIDE, SIDE, 3].
        number: of the image in its story.
    """
    rng = np.random.default_rng(zlib.crc32(repr(story).encode()))
    rest = [i for i in range(len(characters)) if i != story.character]
    chosen = [story.character, *rng.permutation(rest)[:others].tolist()]
    wanted = drawn.astype(np.float32)
    distances = {
        (who, place): float(np.square(compose(story, characters[who], place) - wanted).mean())
        for who in chosen
        for place in PLACES
    }
    who, place = min(distances, key=distances.get)
    truth = story.image(characters, number).astype(np.float32)
    left = PLACES[story.places[number]]
    beside = np.ones((SIDE, SIDE), bool)
    beside[TOP : TOP + BOX, left : left + BOX] = False
    return Verdict(
        place == story.places[number],
        who == story.character,
        float(np.abs(truth - wanted)[beside].mean()),
        float(np.sqrt(np.square(truth - wanted).mean())),
    )
