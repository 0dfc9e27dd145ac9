"""MVBench: which frames are taken, which letter a reply means, and official files in small."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.errors import ConfigError
from metamorph_jax.eval import tasks
from metamorph_jax.eval.tasks import mvbench
from tests.data.conftest import clip  # noqa: F401  (a fixture)
from tests.eval.tasks.scripted import official, put, run


@pytest.mark.parametrize(
    "args, numbers",
    [
        ((29, 10, None, None, 3), [4, 14, 23]),  # parts of 29 / 3: 4.83, 14.83 and 23.83
        ((29, 10, 1.0, 2.0, 2), [12, 17]),
        ((5, 10, None, None, 8), [0, 1, 1, 2, 2, 3, 4, 4]),
        ((29, 10, 2.0, 99.0, 2), [22, 26]),
        ((0, 10, None, None, 2), [0, 0]),
        ((29, 10, 9.0, 9.5, 2), [29, 29]),
        ((9, 3, 0.0, 0.0, 2, 1), [1, 1]),
    ],
)
def test_frame_numbers(args, numbers):
    assert mvbench.frame_numbers(*args) == numbers


@pytest.mark.parametrize(
    "reply, letter",
    [("(A) Opens", "A"), ("b", "B"), ("B.", "B"), ("(c)text", "C"), ("", None), ("(", None),
     ("D", None), ("Opens the door", None), ("A", "A")],
)  # fmt: skip
def test_a_reply_needs_a_letter(reply, letter):
    assert mvbench.chosen_letter(reply, 3) == letter


def test_mvbench(clip, tmp_path):  # noqa: F811
    def row(video, answer, **more):
        return {"video": video, "question": "What?", "candidates": ["Yes.", "No.", "Yes."],
                "answer": answer, **more}  # fmt: skip

    colour = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(colour, "JPEG")
    put(tmp_path / "mvbench", {
        "json/action_antonym.json": [row("v.mp4", "No."), row("absent.mp4", "No.")],
        "json/episodic_reasoning.json": [row("show", "Yes.", start=0.0, end=0.5)],
        "video/ssv2_video/v.mp4": pathlib.Path(clip).read_bytes(),
        "video/tvqa/frames_fps3_hq/show/00001.jpg": colour.getvalue(),
        "video/tvqa/frames_fps3_hq/show/00002.jpg": colour.getvalue(),
    })  # fmt: skip
    replies = {"action_antonym/0": "(B) No.", "episodic_reasoning/0": "A"}
    spec = "mvbench:frames=3,only=action_antonym+episodic_reasoning"
    result, model = run(spec, tmp_path, replies, tmp_path / "out")
    request = model.asked["action_antonym/0"]
    assert request.prompt.endswith(
        "question.\nQuestion: What?\nOptions:\n(A) Yes.\n(B) No.\n(C) Yes.\nOnly give the best "
        "option."
    )
    grey = [np.asarray(Image.open(path))[24, 24, 0] / 8 for path in request.images]
    assert grey == pytest.approx([4, 14, 23], abs=0.7)
    # Of equal candidates the last one is right, as officially.
    assert result.scores == {"accuracy": 50, "mean of kinds": 50, "action_antonym": 100,
                             "episodic_reasoning": 0}  # fmt: skip
    assert [*result.failures] == ["action_antonym/1"]
    assert official(result)[0]["action_antonym"] == [
        {"video": "v.mp4", "pred": "(B) No.", "gt": "(B)"}
    ]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="only=dancing, expected some of action_sequence"):
        tasks.make("mvbench:only=dancing")
