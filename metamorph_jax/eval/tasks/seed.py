"""SEED-Bench (Li et al. 2023): four options, nine dimensions of images and three of videos.

LLaVA and Cambrian let the model write the letter; the official method ranks the options' texts by
likelihood (`seed:form=choose`). Of a video, the frame in the middle is shown, as LLaVA does.
"""

import dataclasses
import io
import pathlib
from functools import partial
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.errors import BadSample
from metamorph_jax.eval.tasks.base import File, by_group, mean, mean_terms, one_of, write_json_lines
from metamorph_jax.eval.tasks.choice import MultipleChoice

_SOURCE = "huggingface.co/datasets/AILab-CVC/SEED-Bench"


@dataclasses.dataclass(frozen=True)
class Seed(MultipleChoice):
    """Options: `kind` (image, video, all), `form`, `parser` (exact: LLaVA's; first: lmms-eval's).

    Attributes:
        kind: which questions.
    """

    kind: str = "image"
    parser: str = "exact"

    title: ClassVar = "SEED-Bench"
    main: ClassVar = "all"
    scores_of_groups: ClassVar = ("{kind}", "{dimension}")
    files: ClassVar = (
        File("SEED-Bench.json", "the questions", _SOURCE),
        File("SEED-Bench-image", "the images", _SOURCE),
        File("SEED-Bench-video", "videos, or folders of their frames, by data_id (kind=video)",
             _SOURCE),
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        one_of(self, kind=("image", "video", "all"))

    def questions(self):
        path = self.find("SEED-Bench.json")
        table = reading.required(reading.json_file(path, dict), path, "question_type", "questions")
        names = {number: name for name, number in table["question_type"].items()}
        for row in table["questions"]:
            reading.required(row, path, "question_id", "data_type", "data_id", "answer")
            if self.kind not in ("all", row["data_type"]):
                continue
            kind, dimension = row["data_type"], names.get(row["question_type_id"], "")
            yield self.ask(
                str(row["question_id"]), row["question"], [row[f"choice_{c}"] for c in "abcd"],
                row["answer"], images=(self._picture(row),),
                groups={"dimension": dimension, "kind": kind},
            )  # fmt: skip

    def _picture(self, row):
        if row["data_type"] == "image":
            return self.path("SEED-Bench-image", row["data_id"])
        return partial(middle_frame, self.path("SEED-Bench-video", row["data_id"]),
                       row.get("segment"))  # fmt: skip

    def scores(self, records):
        found = {"all": mean(records)}
        for group in ("kind", "dimension"):
            found |= {name: mean(rows) for name, rows in by_group(records, group).items()}
        return found

    def terms(self, record):
        return mean_terms(record, "kind", "dimension", all="all")

    def write(self, records, folder):
        lines = ({"question_id": r["id"], "prediction": r["letter"] or r["reply"]} for r in records)
        return [write_json_lines(folder / "seed_predictions.jsonl", lines)]


def middle_frame(path: str, segment=None) -> bytes:
    """The frame in the middle of a video (or of its seconds [start, end]), as PNG.

    Raises:
        BadSample: it can't be read.
    """
    from PIL import Image

    from metamorph_jax.data.images import MAX_PIXELS
    from metamorph_jax.data.sources import video

    if pathlib.Path(path).is_dir():
        frames = sorted(p for p in pathlib.Path(path).iterdir() if p.is_file())
        if not frames:
            raise BadSample("bad_video", f"{path} holds no frames")
        return frames[len(frames) // 2].read_bytes()
    info = video.probe(path)
    middle = info.frames // 2
    if segment:
        middle = min(int(sum(map(float, segment)) / 2 * info.fps), info.frames - 1)
    pixels = video.decode_frames(path, [middle], MAX_PIXELS)[middle]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()
