"""Small data sets in the official formats of CC3M, VIST and MMDialog, and a tokenizer of words."""

import json
import pathlib
import re

from tests.data.conftest import make_image

VOKENS, BOS = 100_000, 1
READ_ID = VOKENS + 8


class Words:
    """Ids of words and marks in the order in which they come up, from 10 on; "###" is one."""

    bos_token, bos_token_id, eos_token, eos_token_id, unk_token_id = "<s>", BOS, "</s>", 2, None

    def __init__(self):
        self.known = {}

    def encode(self, text, add_special_tokens=False):
        words = re.findall(r"###|\w+|[^\w\s]", text)
        ids = [self.known.setdefault(word, 10 + len(self.known)) for word in words]
        return [BOS] * add_special_tokens + ids

    def decode(self, ids):
        names = {id: word for word, id in self.known.items()}
        return " ".join(names.get(int(i), f"[{i}]") for i in ids)

    def get_vocab(self):
        return {}

    def convert_tokens_to_ids(self, token):
        return {"<s>": BOS, "</s>": 2}.get(token)


def pictures(root: pathlib.Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed).save(root / name)


def cc3m(root: pathlib.Path, captions, column: str = "image_path") -> str:
    """A TSV file as the reference's sample has it, with images 0.jpg, 1.jpg, …"""
    names = [f"val/{k}.jpg" for k in range(len(captions))]
    pictures(root, *names)
    rows = [f"{caption}\t{name}" for caption, name in zip(captions, names, strict=True)]
    path = root / "cc3m_val.tsv"
    path.write_bytes("".join([f"caption\t{column}\r\n", *(f"{row}\n" for row in rows)]).encode())
    return str(path)


def vist(root: pathlib.Path, stories: dict, mapping: dict) -> str:
    """A file of stories and that of their images."""
    (root / "val_cleaned.json").write_text(json.dumps(stories))
    (root / "val_image_mapping.json").write_text(json.dumps(mapping))
    return str(root / "val_cleaned.json")


def five_steps() -> tuple[dict, dict]:
    """(stories, mapping) of one story whose steps are out of order."""
    steps = [
        {"caption": f"step {k} .", "image_id": f"{k}", "sequence_index": k} for k in (3, 0, 4, 1, 2)
    ]
    return {"7": steps}, {f"{k}": f"val_images/{k}.jpg" for k in range(5)}


def mmdialog(root: pathlib.Path, dialogues) -> str:
    """A conversations.json of JSON lines; lines that are texts are written as they are."""
    lines = [
        line
        if isinstance(line, str)
        else json.dumps({"conversation_id": number, "conversation": line})
        for number, line in enumerate(dialogues)
    ]
    (root / "conversations.json").write_text("".join(f"{line}\n" for line in lines))
    return str(root / "conversations.json")


def turn(text, *keys):
    return {"turn": [{"__TEXT__": text}, *({"__MEDIA__": key} for key in keys)]}
