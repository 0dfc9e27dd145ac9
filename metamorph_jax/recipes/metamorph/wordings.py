"""Wordings that MetaMorph's samples are built from: visual thinking, boxes, frame prediction.

From every list one is drawn at random, all with the same probability.
"""

import numpy as np

from metamorph_jax.data.sources.base import IMAGE

# Asked of the model before a question, so that it looks at a detail first. One is empty.
THINK_HUMAN = (
    "",
    "Look closely before you answer. ",
    "Picture the part that matters first. ",
    "Show yourself the detail you need, then answer. ",
    "Think with your eyes. ",
    "Work this out by looking. ",
    "Find the place that decides it and view it up close. ",
    "Bring up the region that helps, then reply. ",
    "Zoom in where it counts. ",
    "Use a close-up to find out. ",
    "Let a picture of the detail guide you. ",
    "First see, then say. ",
    "Draw the relevant part before answering. ",
)
THINK_GPT = (
    "",
    "Let me look at that part.",
    "I will view the detail first.",
    "This is the region that matters.",
    "Here is a closer view.",
    "Zooming in, I see this.",
    "To be sure, I picture the detail.",
    "The place to look at is this one.",
    "I start with a close-up.",
    "Looking nearer.",
    "This part holds the answer.",
    "I bring up the area in question.",
    "First, the detail.",
    "A closer look shows this.",
    "I focus on this spot.",
    "Let me see it enlarged.",
)
THINK_BOXES = (
    "",
    "Look for the objects before you answer. ",
    "Mark what you need, then answer. ",
    "Point out the things that matter first. ",
    "Find the objects in question. ",
    "Search the picture, then reply. ",
    "Box in what you rely on. ",
    "Locate everything the question is about. ",
    "Show where the objects are before replying. ",
    "Begin by finding the objects. ",
    "Use boxes to think. ",
    "Outline the relevant things. ",
    "Track down what is asked about. ",
    "Check the picture for the objects first. ",
    "Draw your evidence, then answer. ",
)
BOXES_FOUND = "The question is about {names}. I mark what I found with boxes: "
BOXES_LINK = " From this I can tell: "


def look_first(question: str, wording: str = THINK_HUMAN[1]) -> str:
    """A question, with its images, that asks the model to draw the relevant detail first.

    Training and generation both write it with this; training draws the wording.
    """
    return wording + question


def choose(options, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]


def name_list(names: list[str]) -> str:
    """ "a", "a and b", "a, b, and c"."""
    if len(names) < 3:
        return " and ".join(names)
    return ", ".join(names[:-1]) + ", and " + names[-1]


# Two frames: {first} is the first image; eleven of twelve questions state the interval.
TWO_FRAMES = (
    ("{first} What does this look like {step} seconds later?", "It then looks like this: "),
    ("{first} Show the scene after {step} seconds.", "After {step} seconds: "),
    ("{first} Move {step} seconds ahead.", "Moving ahead gives: "),
    ("Here is a frame: {first} Predict the one that comes {step} seconds after it.", "I expect: "),
    ("Given {first} draw what happens in {step} seconds.", "This is what happens: "),
    ("{first} Let {step} seconds pass. What do we see?", "We see: "),
    ("Start: {first} Continue by {step} seconds.", "Continued: "),
    ("{first} How will this change within {step} seconds?", "It changes to: "),
    ("This is the present: {first} Show me {step} seconds into the future.", "The future: "),
    ("{first} What is the state of things {step} seconds on?", "By then: "),
    ("A video begins with {first} Which frame follows {step} seconds in?", "This frame follows: "),
    ("{first} What could come next?", "Next could be: "),
)


def _markers(n: int, rng: np.random.Generator) -> str:
    return choose((" ", ""), rng).join([IMAGE] * n)


def _count(n: int) -> str:
    return f"{n} frame" + ("" if n == 1 else "s")


def frame_prediction(
    frames: int, step: float, rng: np.random.Generator, most: int = 45
) -> tuple[str, str, list[int]]:
    """A question and an answer about `frames` frames that lie `step` seconds apart.

    Args:
        frames: there are, at least 2.
        step: seconds.
        rng: of all choices.
        most: images that a sample may hold; the one wording that shows frames twice is left out
            where that would be more.

    Returns:
        (question, answer, which frame each marker stands for, in order).

    Differs from the reference where it was broken: "continue" asks only for frames that exist;
    "order" does not spell out the shuffled order in an answer that shows the right one; the gaps
    template says that the step is between neighbours once the gaps are filled.
    """
    seconds = f"{step:g}"
    if frames < 2:
        raise ValueError("frame prediction needs at least two frames")
    if frames == 2:
        question, answer = choose(TWO_FRAMES, rng)
        question = question.format(first=IMAGE, step=seconds)
        return question, answer.format(step=seconds) + IMAGE, [0, 1]

    start = int(rng.integers(0, frames - 1))  # in [0, n - 2]
    end = int(rng.integers(start + 1, frames))  # in [start + 1, n - 1]
    chosen = list(range(start, end + 1))
    m = len(chosen)
    left = frames - 1 - end  # frames after the selection
    made = [_forward, _split, _reverse, _gaps]
    made += [_order] if 2 * m <= most else []
    made += [_interval, _continue] if left else [_interval]
    return choose(made, rng)(chosen, m, left, seconds, rng)


def _forward(chosen, m, left, seconds, rng):
    question = f"{IMAGE} Show the next {_count(m - 1)}, {seconds} seconds apart."
    return question, "They are: " + _markers(m - 1, rng), chosen


def _split(chosen, m, left, seconds, rng):
    k = int(rng.integers(1, m))
    question = (
        f"{_markers(k, rng)} {_count(k)} of a video, one every {seconds} seconds. "
        f"Show the {_count(m - k)} that follow."
    )
    return question, "What follows: " + _markers(m - k, rng), chosen


def _reverse(chosen, m, left, seconds, rng):
    question = (
        f"{IMAGE} Run this backwards: show the {_count(m - 1)} before it, latest first, "
        f"{seconds} seconds apart."
    )
    return question, "Going back in time: " + _markers(m - 1, rng), chosen[::-1]


def _gaps(chosen, m, left, seconds, rng):
    even, odd = chosen[::2], chosen[1::2]
    question = (
        f"{_markers(len(even), rng)} Every second frame is missing here. With the gaps filled, "
        f"neighbours are {seconds} seconds apart. Draw the missing {_count(len(odd))}."
    )
    return question, "In the gaps belong: " + _markers(len(odd), rng), even + odd


def _order(chosen, m, left, seconds, rng):
    shuffled = [chosen[i] for i in rng.permutation(m)]
    question = (
        f"{_markers(m, rng)} These {_count(m)} of one video, {seconds} seconds apart, were "
        "shuffled. Show them in the right order."
    )
    return question, "In order of time: " + _markers(m, rng), shuffled + chosen


def _interval(chosen, m, left, seconds, rng):
    question = f"{_markers(m, rng)} How many seconds lie between neighbours of these {m} frames?"
    return question, f"About {seconds} seconds.", chosen


def _continue(chosen, m, left, seconds, rng):
    q = int(rng.integers(1, min(3, left) + 1))
    question = (
        f"{_markers(m, rng)} {_count(m)}, {seconds} seconds apart. "
        f"Carry on with {_count(q)} more at the same pace."
    )
    return (
        question,
        "It goes on so: " + _markers(q, rng),
        chosen + [chosen[-1] + 1 + i for i in range(q)],
    )
