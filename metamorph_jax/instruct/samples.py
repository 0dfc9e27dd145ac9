"""From contexts to jobs, and from replies to samples in LLaVA's format.

    {"id": "17", "image": "train2017/000000000017.jpg", "conversations": [
      {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}, …]}

The marker stands before or after the first question. Which, and the question of a description, is
drawn by the seed and the id, so it does not depend on the order or on what was there before.
"""

import dataclasses
import os

import numpy as np

from metamorph_jax.data.cache import stamp
from metamorph_jax.data.sources import kinds as records
from metamorph_jax.data.sources.base import IMAGE, Turn
from metamorph_jax.instruct import wordings
from metamorph_jax.instruct.contexts import Context
from metamorph_jax.instruct.journal import digest
from metamorph_jax.instruct.kinds import CAPTIONS, Kind, Parsed
from metamorph_jax.instruct.writers import Job


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked about each context.

    Attributes:
        kind: of data.
        opening: turns before the context, see `kinds.opening`.
        settings: all that replies depend on beside the prompt, JSON-able.
        seed: of what is drawn here; replies don't depend on it.
        root: folder of the images; "" if it is not known.
    """

    kind: Kind
    opening: tuple[Turn, ...]
    settings: dict
    seed: int = 0
    root: str = ""

    def job(self, context: Context) -> Job:
        """The job of a context.

        Raises:
            BadSample: the image is to be looked at, and its file is missing.
        """
        if self.kind is CAPTIONS:
            file = os.path.join(self.root, context.image)
            text, about = wordings.CAPTION_QUESTION, [context.image, *stamp(file)]
        else:
            file, text, about = "", context.text(self.kind.boxes), []
        prompt = digest([self.opening, text, about, self.settings])
        return Job(context.id, self.opening, text, file, prompt)

    def sample(self, context: Context, parsed: Parsed) -> dict:
        """The sample of a context and the reply to it.

        Raises:
            BadSample: training would refuse it (a text holds the marker of an image).
        """
        rng = np.random.default_rng(int(digest([self.seed, context.id]), 16))
        questions = wordings.DETAIL_QUESTIONS
        drawn = questions[rng.integers(len(questions))]
        marked = "{image}\n{text}" if rng.integers(2) else "{text}\n{image}"
        turns = []
        for number, (question, answer) in enumerate(parsed.pairs):
            said = question or drawn
            if number == 0:
                said = marked.format(image=IMAGE, text=said)
            turns += [{"from": "human", "value": said}, {"from": "gpt", "value": answer}]
        record = {"id": context.id, "image": context.image, "conversations": turns}
        read = records.build(record, "", records.Files(self.root or os.sep), rng)
        read.checked(max_images=1)
        return record
