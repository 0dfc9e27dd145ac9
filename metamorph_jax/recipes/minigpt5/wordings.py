"""Texts that MiniGPT-5's weights have seen around captions, stories and dialogues, word for word.

A word changed here is another prompt than the one that published weights were trained with.
"""

import re
from collections.abc import Sequence

import numpy as np

from metamorph_jax.data import system_messages
from metamorph_jax.data.sources.base import IMAGE

END = " ###"
READ = f"<Img>{IMAGE}</Img>"  # an image that is read

# Captions
CAPTION_SYSTEM = "You will be able to generate image according to command."
CAPTION = "###Human: {prefix} {caption} ###Assistant:"
PREFIXES = (
    "generate image with caption:",
    "can you give me the image with caption:",
    "help me to generate this image:",
    "generate image with according to caption:",
    "according to caption, generate image:",
    "an image with caption:",
    "can you visualize this caption:",
)

# Stories; {story} are the steps so far
STORY_SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the "
    "images once I provide it to you. Please understanding images and generate story."
)
SCENE = (
    "###Human:{story} Generate an image with the scene description: {text} ###Assistant:",
    "###Human:{story} the scene description: {text} ###Assistant:",
)
NEXT = (
    "###Human:{story} Tell me the next scene with image. ###Assistant:",
    "###Human:{story} Generate the next scene with image. ###Assistant:",
    "###Human:{story} What should happen then? ###Assistant:",
)
TELL = (
    "###Human:{story} Tell me the next scene description by this image: {image} ###Assistant:",
    "###Human:{story} What happen in the next scene image: {image} ###Assistant:",
)

# Dialogues
DIALOGUE_SYSTEM = system_messages.IMG_TAGS
SPEAKERS = ("###Human:", "###Assistant:")


def choose(options: Sequence[str], rng: np.random.Generator) -> str:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def filled(template: str, **parts: str) -> str:
    """A template with its parts put in; braces in the parts mean nothing."""
    return re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], template)


def story(texts: Sequence[str]) -> str:
    """The steps so far, each with its image, as prompts have them."""
    return "".join(text + READ for text in texts) + ("\n" if texts else "")
