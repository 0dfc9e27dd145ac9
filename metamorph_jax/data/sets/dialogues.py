"""MMDialog (Feng et al. 2023, arXiv 2211.05719): dialogues between two people who share images.

    {train,valid,test}/conversations.json    JSON lines, in spite of its name
    {train,valid,test}/<media key>.jpg       keys are numbers, often negative

    {"conversation_id": 1, "conversation": [{"turn": [{"__TEXT__": "My kite"}, {"__MEDIA__": "-12"}]},
                                            {"turn": [{"__TEXT__": "So red!"}]}]}

The speakers take turns. Of a turn with several images the first counts.
"""  # noqa: E501

import dataclasses

from metamorph_jax.data.sources.records import JsonlRecords
from metamorph_jax.data.sources.split import SplitRecords
from metamorph_jax.errors import BadSample


@dataclasses.dataclass(frozen=True)
class Turn:
    """Attributes:
    text: what is said, "" if nothing.
    image: name of the file of the image, or "".
    """

    text: str
    image: str = ""


def turns_of(record: dict) -> list[Turn]:
    """The turns of a dialogue.

    Raises:
        BadSample: it isn't one.
    """
    listed = record.get("conversation")
    if not isinstance(listed, list):
        raise BadSample("bad_record", "no list `conversation`")
    return [_turn(turn, number) for number, turn in enumerate(listed)]


def _turn(turn, number: int) -> Turn:
    parts = turn.get("turn") if isinstance(turn, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise BadSample("bad_record", f"turn {number} has no list `turn` of objects")
    texts = [part["__TEXT__"] for part in parts if "__TEXT__" in part]
    keys = [part["__MEDIA__"] for part in parts if "__MEDIA__" in part]
    if not all(isinstance(value, str) for value in (*texts, *keys)):
        raise BadSample("bad_record", f"turn {number}: `__TEXT__` and `__MEDIA__` must be texts")
    return Turn(" ".join(texts), f"{keys[0]}.jpg" if keys else "")


def recent(number: int) -> int:
    """The first of the turns from which MiniGPT-5 (Zheng et al. 2023, arXiv 2310.02239) predicts
    turn `number`: after an answer, only the last question and that answer are left."""
    return max(number - (3 if number % 2 else 2), 0)


class DialogueTurns:
    """A record for each turn but the first, to be learnt from those before it.

    A record is {"id": "<conversation>_<turn>", "turn": its number, "turns": list of `Turn` up to
    it}. A line that is not a dialogue, or of fewer than two turns, is one record that is bad.
    """

    def __init__(self, path: str, index_dir: str | None = None):
        self.path, self._index_dir = path, index_dir
        self.lines = JsonlRecords(path, index_dir)
        self.split = SplitRecords(self.lines, _learnt, "turn", index_dir)

    def __reduce__(self):  # worker processes read the files themselves
        return DialogueTurns, (self.path, self._index_dir)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, k: int) -> dict:
        line, number = self.split.at(k)
        record = self.lines[line]
        turns = turns_of(record)
        if len(turns) < 2:
            raise BadSample("short_dialogue", f"{len(turns)} turns, expected 2 or more")
        id_ = f"{record.get('conversation_id', line)}_{number + 1}"
        return {"id": id_, "turn": number + 1, "turns": turns[: number + 2]}

    def where(self, k: int) -> str:
        """File and line of record k, and which turn it is, from 0."""
        return self.split.where(k)


def _learnt(record: dict) -> int:
    """How many turns of a dialogue are learnt."""
    return len(turns_of(record)) - 1
