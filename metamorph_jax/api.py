"""The Python API: load a trained model, ask it."""

import pathlib
import tempfile
from collections.abc import Mapping, Sequence

from PIL import Image

from metamorph_jax.sampling.conversation import Conversation
from metamorph_jax.sampling.generator import Generator
from metamorph_jax.sampling.image_decoder import load_image_decoder
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request, checked
from metamorph_jax.sampling.results import Reply, Stream
from metamorph_jax.sampling.trained import is_published, load_generator


class Model:
    """A trained model that answers prompts with text and images.

    Attributes:
        generator: what it stands on; for many requests at a time.
    """

    def __init__(self, generator: Generator):
        self.generator = generator

    def generate(
        self,
        prompt: str,
        images: Sequence[str | pathlib.Path | Image.Image] = (),
        *,
        think: bool = False,
        mode: str = "",
        rounds: int = 0,
        literal: bool = False,
        confirm: Sequence[str] | str = (),
        stream: bool = False,
        **options,
    ) -> Reply:
        """The reply to one prompt.

        Args:
            prompt: text; images stand where it has `<image>`, else before it.
            images: files, or Pillow images.
            think: ask the model to draw the relevant detail first.
            mode, rounds: "text", "image" or "both", of a model that draws on its own; these and
                `literal`, a prompt without a chat template around it: see
                `sampling.requests.Request`.
            confirm: with `best_of=N`: questions, or one, to which "yes" means that an image is
                right; by default whether it matches the prompt. The image that gets the surest yes
                is kept, of N; see `reply.candidates`.
            stream: print text as it comes; with `best_of`, once the best is known.
            options: fields of `sampling.options.Options`: max_new_tokens, temperature, top_k,
                top_p, seed, guidance, best_of, …

        Returns:
            `reply.text`, `reply.images` (Pillow images, if an image decoder was loaded),
            `reply.show()`, `reply.save(folder)`.

        Raises:
            ValueError, BadSample: the prompt does not fit, an image can't be read, or the model
                can't do what the options say.
            TypeError: no such option.
        """
        chosen = Options(**{"batch_size": 1, **options})
        questions = (confirm,) if isinstance(confirm, str) else tuple(confirm)
        if questions and chosen.best_of == 1:
            raise ValueError("confirm goes with best_of=N: it decides which of N samples is kept")
        with tempfile.TemporaryDirectory() as folder:
            files = [_file(image, folder, i) for i, image in enumerate(images)]
            asked = Request("0", prompt, tuple(files), think=think, mode=mode, rounds=rounds,
                            literal=literal, confirm=questions)  # fmt: skip
            request = checked(asked)
            printer = Stream(self.generator) if stream else None
            (reply,) = self.generator.generate([request], chosen, printer)
        if printer is not None:
            printer.end()
        return reply

    def chat(self, **options) -> Conversation:
        """A conversation, whose `say(Request(id, prompt, images))` gives the next reply.

        options: as for `generate`.
        """
        return Conversation(self.generator, Options(**{"batch_size": 1, **options}))


def _file(image, folder: str, number: int) -> str:
    if not isinstance(image, Image.Image):
        return str(image)
    path = pathlib.Path(folder) / f"{number}.png"
    image.convert("RGB").save(path)
    return str(path)


def load(
    model: str | pathlib.Path,
    decoder: str | pathlib.Path | None = None,
    *,
    config: str | None = None,
    mesh: Mapping[str, int] | None = None,
    weights: str = "auto",
    steps: int | None = None,
    **options,
) -> Model:
    """A trained model, ready to generate.

    Args:
        model: workdir of a finished stage; or published weights ("hf:OWNER/NAME" or a folder).
        decoder: workdir of a decoder stage, which draws the images; None: nothing is drawn.
        config: FILE[:SIZE] that says what published weights are; None: their config.json does.
        mesh: axis -> size, e.g. {"tensor": 4}; default: as many devices on "tensor" as the run
            had, all others share the rows.
        weights: how the language model's are kept: "auto" (as it computes), "float32", "bfloat16",
            "int8" or "nf4" (4 bits).
        steps: of the diffusion sampler; None: as the config of what draws says.
        options: of the recipe's generator, e.g. `force_end=True`.

    Raises:
        UserError: there is no such model, or it does not generate.
    """
    where = str(model)
    if config is None and not is_published(where):
        generator = load_generator(where, weights=weights, mesh=mesh, **options)
    else:
        generator = load_generator(
            weights_of=where, config=config, weights=weights, mesh=mesh, **options
        )
    if decoder is not None:
        generator.image_decoder = load_image_decoder(str(decoder), steps)
    elif steps is not None:
        generator.set_steps(steps)
    return Model(generator)
