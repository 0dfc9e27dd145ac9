"""The keys of a record: several ways to write the same, read into one.

    {"video": "a.mp4", "messages": [{"role": "system", …}, {"role": "user", …}, …]}
    -> {"image": "a.mp4", "system": "…", "conversations": [{"from": "user", "value": …}, …]}

A key that is not read is metadata and is passed over, unless it looks like content, which would be
lost without a word. It looks like content if
- its name is that of a key that is read but for case, plural, underscores or a misspelling, or one
  of the names in `OTHER_NAMES`, or
- its value is the path of an image, a video or a sound (or a list of them) that the record does
  not use.
Such a record is bad, and the message names the key. `ignore` of the source lists keys to pass over.
"""

import difflib
import functools
import os
from collections.abc import Collection

from metamorph_jax.data.sources import video
from metamorph_jax.data.sources.base import IMAGE, VIDEO
from metamorph_jax.errors import BadSample
from metamorph_jax.files import shown

MEDIA = ("image", "images", "video", "videos")
TURNS = ("conversations", "messages")
KNOWN = ("id", *MEDIA, *TURNS, "system", "kind")
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
# What other data sets call a key that is read here under another name.
OTHER_NAMES = {
    **dict.fromkeys(("system_prompt", "system_message"), "system"),
    **dict.fromkeys(("dialog", "dialogs", "dialogue", "chat"), "conversations"),
    **dict.fromkeys(("img", "picture", "photo", "image_path", "image_file"), "image"),
    **dict.fromkeys(("imgs", "pictures", "photos", "image_paths", "image_files"), "images"),
    **dict.fromkeys(("clip", "video_path", "video_file"), "video"),
    "frames": "images",
}
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp",
)  # fmt: skip
SOUND_EXTENSIONS = (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac")
_TURN_KEYS = ("from", "value", "role", "content")
_TURN_CONTENT = ("tool_calls", "function_call", "audio")  # of OpenAI's messages


def canonical(record: dict, ignore: Collection[str] = ()) -> dict:
    """The record with the keys that the kinds know.

    Args:
        record: as its file has it.
        ignore: keys to pass over, whatever they look like.

    Returns:
        A record in which `image` is a path or a list of paths or absent, `conversations` a list of
        {"from": "user" | "assistant", "value": text} or absent, and `system` a text or absent.
        Keys that are not read are as they were.

    Raises:
        BadSample: a key or a turn can't be read, or must not be ignored.
    """
    record = {key: value for key, value in record.items() if key not in ignore}
    made = {key: value for key, value in record.items() if key not in (*MEDIA, *TURNS, "system")}
    turns, inside, system = _turns(record)
    media = _media(record, inside)
    if media not in (None, [], ""):
        made["image"] = media
    if turns is not None:
        made["conversations"] = turns
    if system:
        made["system"] = system
    _refuse(record, KNOWN, media)
    return made


def _media(record: dict, inside: list[str]):
    """The path, or the list of paths, that the record names; None if there are none."""
    given = {key: record[key] for key in MEDIA if record.get(key) not in (None, "", [])}
    if len(given) > 1 and len({str(value) for value in given.values()}) > 1:
        raise BadSample("bad_record", f"both `{'` and `'.join(given)}`: put all paths into `image`")
    if given and inside:
        raise BadSample("bad_record", f"paths in `{next(iter(given))}` and in the messages, too")
    media = next(iter(given.values()), inside or None)
    paths = media if isinstance(media, (list, tuple)) else [] if media is None else [media]
    for path in paths:
        if not isinstance(path, str):
            key = next(iter(given), "messages")
            raise BadSample("bad_record", f"`{key}` is {type(path).__name__}, expected a path")
    return media


def _turns(record: dict) -> tuple[list[dict] | None, list[str], str]:
    """(turns, paths that they name, system message)."""
    given = [key for key in TURNS if record.get(key)]
    if len(given) > 1:
        raise BadSample("bad_record", "both `conversations` and `messages`: keep one of them")
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise BadSample("bad_record", "`system` is not a text")
    if not given:
        return record.get("conversations"), [], system
    listed = record[given[0]]
    if not isinstance(listed, list):
        raise BadSample("bad_record", f"`{given[0]}` is not a list of turns")
    turns, paths = [], []
    for number, turn in enumerate(listed):
        role, text, inside = _turn(turn, number)
        paths += inside
        if role == "system" and number == 0 and not system:
            system = text
            continue
        if role == "system":
            raise BadSample("bad_roles", f"turn {number} is a system turn, expected it first only")
        turns.append({"from": role, "value": text})
    return turns, paths, system


def _turn(turn, number: int) -> tuple[str, str, list[str]]:
    """(role, text with markers, paths) of one turn, in LLaVA's form or OpenAI's."""
    if not isinstance(turn, dict):
        raise BadSample("bad_record", f"turn {number} is not an object")
    said = turn.get("from", turn.get("role"))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise BadSample("bad_roles", f"turn {number} is by {shown(said, 40)!r}, known are {known}")
    _refuse(turn, _TURN_KEYS, None, f"turn {number}: ")
    lost = [key for key in _TURN_CONTENT if turn.get(key)]
    if lost or turn.get("weight", 1) != 1:
        key = (lost or ["weight"])[0]
        raise BadSample("unknown_key", f"turn {number}: `{key}` is not supported")
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list):
        return role, *_parts(content, number)
    if not isinstance(content, str):
        raise BadSample("bad_record", f"turn {number} needs a text in `value` or `content`")
    return role, content, []


def _parts(parts: list, number: int) -> tuple[str, list[str]]:
    """(text with markers, paths) of the parts of one of OpenAI's messages."""
    text, paths = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
            continue
        medium = kind.removesuffix("_url") if isinstance(kind, str) else ""
        if medium not in ("image", "video"):
            raise BadSample(
                "bad_record", f"turn {number}: a part of type {shown(kind, 40)!r}, known are text, "
                "image, image_url, video and video_url",
            )  # fmt: skip
        path = part.get(kind) or part.get("path") or part.get("url")
        path = path.get("url") if isinstance(path, dict) else path
        text += IMAGE if medium == "image" else VIDEO
        if path is not None and not isinstance(path, str):
            raise BadSample("bad_record", f"turn {number}: `{kind}` is not a path")
        paths += [path] if path else []
    return text, paths


def _refuse(table: dict, known: Collection[str], used, where: str = "") -> None:
    """BadSample if a key that is not read looks like content; `used` are the paths that are."""
    used = used if isinstance(used, (list, tuple)) else [used]
    names = {os.path.basename(path.split("###")[0]) for path in used if isinstance(path, str)}
    for key, value in table.items():
        if key in known or value in (None, "", [], {}):
            continue
        meant = _meant(key, tuple(known)) if isinstance(value, (str, list, dict)) else ""
        if meant:
            raise BadSample("unknown_key", f"{where}`{shown(key, 60)}`: did you mean `{meant}`?")
        paths = [p for p in (value if isinstance(value, list) else [value]) if _is_path(p)]
        if any(os.path.basename(path) not in names for path in paths):
            raise BadSample(
                "unknown_key",
                f"{where}`{shown(key, 60)}` names the file {shown(paths[0], 80)}, but is not read; "
                f"known are {', '.join(known)}",
            )


@functools.lru_cache(maxsize=4096)
def _meant(key: str, known: tuple[str, ...]) -> str:
    """The known key that `key` seems to be meant for, or ""."""
    if len(key) > 40:
        return ""
    name = _plain(key)
    others = {_plain(other): meant for other, meant in OTHER_NAMES.items() if meant in known}
    if name in known or name in others:
        return others.get(name, name) if len(name) > 2 else ""
    for other in known:
        shuffled = sorted(name) == sorted(other)
        if shuffled or difflib.SequenceMatcher(None, name, other).ratio() >= 0.88:
            return other
    return ""


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _is_path(value) -> bool:
    """Whether a value looks like the path of an image, a video or a sound; URLs are only
    references."""
    if not isinstance(value, str) or len(value) > 1000 or "://" in value or "\n" in value:
        return False
    return value.lower().endswith((*IMAGE_EXTENSIONS, *video.EXTENSIONS, *SOUND_EXTENSIONS))
