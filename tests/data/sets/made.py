"""Official files of stories and scenes, in small."""

import json
import pathlib

import numpy as np
from PIL import Image

CLIPS = 8


def put(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def picture(path: pathlib.Path, shape, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def vist_row(story: int, place: int) -> list[dict]:
    photo = 100 * story + place
    return [{"story_id": str(story), "album_id": "7", "photo_flickr_id": str(photo),
             "worker_arranged_photo_order": place, "text": f"[male] saw {photo} .",
             "original_text": f"Tom saw {photo}.", "storylet_id": str(photo)}]  # fmt: skip


def vist(root: pathlib.Path) -> pathlib.Path:
    """Stories 1 and 2 are whole (1 in reverse order), 3 has four frames, 4 lacks an image."""
    rows = [vist_row(1, place) for place in reversed(range(5))]
    rows += [vist_row(2, place) for place in range(5)]
    rows += [vist_row(3, place) for place in range(4)]
    rows += [vist_row(4, place) for place in range(5)]
    put(root / "test.story-in-sequence.json", {"albums": [], "images": [], "annotations": rows})
    for [row] in rows:
        if row["photo_flickr_id"] != "402":
            seed = int(row["photo_flickr_id"])
            picture(root / "test" / f"{seed}.jpg", (20, 24), seed)
    return root


def formatted(root: pathlib.Path) -> pathlib.Path:
    """The same set as MM-Interleaved lays it out."""
    frames = [{"caption": f"frame {k} .", "image_id": str(10 + k), "sequence_index": k}
              for k in (1, 0, 2, 4, 3)]  # fmt: skip
    put(root / "annotations" / "test_formatted_filtered.json", {"annotations": {"1": frames}})
    for k in range(5):
        picture(root / "images" / "test_images" / f"{10 + k}.png", (8, 8), k)
    return root


def cleaned(root: pathlib.Path) -> pathlib.Path:
    """Two stories as MiniGPT-5 lays the set out; the second has an image that the table lacks."""
    stories = {
        str(story): [{"caption": f"frame {k} .", "image_id": str(10 * story + k),
                      "sequence_index": k} for k in (1, 0, 2, 4, 3)]
        for story in (1, 2)
    }  # fmt: skip
    put(root / "val_cleaned.json", stories)
    table = {str(n): f"val_images/{n:09}.jpg" for n in (*range(10, 15), *range(20, 24))}
    put(root / "val_image_mapping.json", table)
    for place in table.values():
        picture(root / place, (20, 24), len(place))
    return root


def pororo(root: pathlib.Path) -> pathlib.Path:
    """Eight clips of an episode, of one to three frames; two stories, one for training."""
    names = [f"S1/E1/{n}.png" for n in range(1, CLIPS + 1)]
    for n, name in enumerate(names):
        picture(root / name, (128 * (1 + n % 3), 128), n)
    texts = {name[:-4]: [f"Then PORORO  met\tloopy {n}.\n"] for n, name in enumerate(names)}
    np.save(root / "descriptions.npy", texts)
    np.save(root / "img_cache4.npy", np.array([name.encode() for name in names[:3]]))
    following = [[name.encode() for name in names[n + 1 : n + 5]] for n in range(3)]
    np.save(root / "following_cache4.npy", np.array(following))
    ids = np.empty(3, object)
    ids[:] = [np.array([0]), np.array([], np.int64), np.array([2])]
    np.save(root / "train_seen_unseen_ids.npy", ids)
    return root


def flintstones(root: pathlib.Path) -> pathlib.Path:
    """Six clips of one episode and one of the next; the first three are the test split."""
    ids = [f"s_01_e_01_shot_{n:06}_{n:06}" for n in range(6)] + ["s_01_e_02_shot_000000_000000"]
    put(root / "train-val-test_split.json", {"train": ids[3:], "val": [], "test": ids[:3]})
    rows = [{"globalID": id, "description": f"FRED talks to wilma {n}.", "setting": "cave"}
            for n, id in enumerate(ids)]  # fmt: skip
    put(root / "flintstones_annotations_v1-0.json", rows)
    (root / "video_frames_sampled").mkdir()
    for n, id in enumerate(ids):
        frames = np.random.default_rng(n).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
        np.save(root / "video_frames_sampled" / f"{id}.npy", frames)
    return root


def ade20k(root: pathlib.Path, split: str = "validation") -> pathlib.Path:
    """Two scenes with 4 x 6 labels."""
    rows = []
    for n in range(2):
        id = f"ADE_val_{n + 1:08}"
        rows.append({"image_id": id, "caption": f"scene {n}."})
        picture(root / "images" / split / f"{id}.jpg", (4, 6), n)
        labels = (np.arange(24).reshape(4, 6) % 7 + 20 * n).astype(np.uint8)
        labels[0, 0] = 0
        path = root / "annotations" / split / f"{id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(path)
    put(root / f"{split}.json", rows)
    return root
