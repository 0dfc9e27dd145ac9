"""Our models for lmms-eval, whose tasks call them by name (extra `lmms`).

    lmms-eval --model metamorph_jax --model_args workdir=runs/vpit,decoder=runs/decoder \\
        --tasks mme --batch_size 8 --output_path results

lmms-eval 0.7 finds `manifest` by the entry point `lmms_eval.models`, and imports this file; nothing
else does. A task gives prompts and images, and gets one string for each:

    text                                   where the reply has no drawn image
    {"text": …, "images": [paths]}         (JSON) where it has; files lie in `out`
    the text after the last image          of tasks that think in images (`generate_visual_cot`),
                                           whose questions ask for the relevant detail first

A request that can't be answered (too long, a broken image) gets "", and is named and counted.
"""

import collections
import json
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

from lmms_eval.api.model import lmms
from PIL import Image

from metamorph_jax.data.sources import video
from metamorph_jax.errors import ConfigError
from metamorph_jax.files import shown
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import Reply, TextPart, stem

NAME = "metamorph_jax"
# Tasks of lmms-eval that think in images write their question between these.
_QUESTION = re.compile(r"\[QUESTION\](.*?)\[/QUESTION\]", re.S)


def manifest():
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path=f"{__name__}.MetamorphJax")


class MetamorphJax(lmms):
    """A trained model, as lmms-eval calls it.

    Args:
        workdir: of a finished stage; or
        checkpoint, config: published weights, and the config that says what the model is.
        decoder: draws the images; without it none is returned.
        weights: how the language model's are kept, see `api.load`.
        steps: of the diffusion sampler.
        out: folder for drawn images.
        think: ask for the relevant detail before every answer.
        seed: of chance.
        batch_size: requests that are answered together.
        rest: what lmms-eval gives to every model, of which `device` and the like say nothing here.
    """

    is_simple = True

    def __init__(
        self,
        workdir: str = "",
        checkpoint: str = "",
        config: str | None = None,
        decoder: str | None = None,
        weights: str = "auto",
        steps: int | None = None,
        out: str = "lmms_images",
        think: bool = False,
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        generator=None,
        **rest,
    ):
        super().__init__()
        if rest:
            raise ConfigError(f"--model_args: {NAME} has no {shown(', '.join(sorted(rest)), 200)}")
        if generator is None:
            generator = _load(workdir, checkpoint, config, decoder, weights, steps)
        self._generator, self._out, self._think, self._seed = generator, out, bool(think), int(seed)
        self._batch = int(batch_size) if str(batch_size).isdigit() else 8  # of "auto"
        self._used: collections.Counter = collections.Counter()

    def generate_until(self, requests) -> list[str]:
        """A reply to each request: text, or JSON with text and images."""
        return self._answer(requests, self._think, _with_images)

    def generate_visual_cot(self, requests) -> list[str]:
        """The answer after the images of each reply; those go to `out`, too.

        Raises:
            NotImplementedError: the model was not trained to think in images.
        """
        if self._generator.prompts.think is None:
            raise NotImplementedError("this model was not trained to draw before it answers")
        return self._answer(requests, True, _answer_alone)

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError(f"{NAME} answers tasks of one round only")

    def loglikelihood(self, requests):
        raise NotImplementedError(f"{NAME} generates; it does not rate given answers")

    # ---- pieces

    def _answer(self, requests, think: bool, say) -> list[str]:
        found, groups = [""] * len(requests), collections.defaultdict(list)
        for number, request in enumerate(requests):
            groups[self._options(request.args[1])].append(number)
        bad = 0
        for (options, stops), numbers in groups.items():
            for start in range(0, len(numbers), self._batch):
                part = numbers[start : start + self._batch]
                asked = {str(n): requests[n] for n in part}
                for name, reply in self._replies(asked, options, think):
                    if reply is None:
                        bad += 1
                        continue
                    files = self._write(asked[name].args, reply)
                    found[int(name)] = say(reply, files, stops)
        if bad:
            print(f"{NAME}: {bad} of {len(requests)} requests were not answered, for the reasons "
                  "above", file=sys.stderr, flush=True)  # fmt: skip
        return found

    def _options(self, asked: dict) -> tuple[Options, tuple[str, ...]]:
        """(how a task wants its replies, texts that end them)."""
        longest = max(self._generator.prompts.length // 2, 1)
        sampled = asked.get("do_sample", True) and not (asked.get("num_beams") or 1) > 1
        until = asked.get("until") or ()
        options = Options(
            min(int(asked.get("max_new_tokens") or 512), longest),
            float(asked.get("temperature") or 0) if sampled else 0.0,
            top_k=int(asked.get("top_k") or 0), top_p=float(asked.get("top_p") or 1.0),
            seed=self._seed, batch_size=self._batch, beams=int(asked.get("num_beams") or 1),
        )  # fmt: skip
        return options, (until,) if isinstance(until, str) else tuple(until)

    def _replies(self, asked: dict, options: Options, think: bool) -> Iterator[tuple]:
        """(name, reply or None) of requests."""
        failed = []

        def fail(request: Request, error: Exception) -> None:
            print(f"{NAME}: {request.name}: {shown(error, 1000)}", file=sys.stderr, flush=True)
            failed.append(request.id)

        with tempfile.TemporaryDirectory() as folder:
            made = [
                self._request(name, one.args, think, pathlib.Path(folder), fail)
                for name, one in asked.items()
            ]
            made = [request for request in made if request is not None]
            for request, reply in self._generator.replies(made, options, fail):
                yield request.id, reply
        yield from ((name, None) for name in failed)

    def _request(self, name: str, args: Sequence, think: bool, folder: pathlib.Path, fail):
        """A request of ours from one of lmms-eval's: (text, options, its images, id, task, split).

        None, after `fail` was told, if its images can't be had.
        """
        text, _, to_images, doc_id, task, split = args
        question = _QUESTION.search(text) if think else None
        text = question[1].strip() if question else text
        images, clip = [], ""
        try:
            given = to_images(self.task_dict[task][split][doc_id]) if to_images else []
            for place, one in enumerate(given or []):
                if isinstance(one, Image.Image):
                    images.append(str(folder / f"{name}_{place}.png"))
                    one.convert("RGB").save(images[-1])
                elif isinstance(one, str) and video.is_video(one):
                    clip = one
                elif isinstance(one, str):
                    images.append(one)
                else:
                    raise ValueError(f"a {type(one).__name__} is not an image")
        except (OSError, ValueError) as error:
            fail(Request(name, text), ValueError(f"{task} {doc_id}: {error}"))
            return None
        return Request(name, text, tuple(images), clip, think)

    def _write(self, args: Sequence, reply: Reply) -> list[str]:
        """Files of the drawn images of a reply, named after task and document."""
        _, _, _, doc_id, task, _ = args
        name = stem(f"{task}_{doc_id}".lower(), self._used[task, doc_id])
        if reply.images:
            self._used[task, doc_id] += 1
        files = []
        for number, image in enumerate(reply.images):
            file = pathlib.Path(self._out).absolute() / f"{name}_image{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
            files.append(str(file))
        return files


def _load(workdir, checkpoint, config, decoder, weights, steps):
    from metamorph_jax import api

    if bool(workdir) == bool(checkpoint):
        raise ConfigError("--model_args: give either workdir=… or checkpoint=…")
    model = api.load(workdir or checkpoint, decoder, config=config, weights=weights, steps=steps)
    return model.generator


def _with_images(reply: Reply, files: list[str], stops: Sequence[str]) -> str:
    text = _cut(_text(reply.segments), stops)
    return json.dumps({"text": text, "images": files}, ensure_ascii=False) if files else text


def _answer_alone(reply: Reply, files: list[str], stops: Sequence[str]) -> str:
    images = [n for n, part in enumerate(reply.segments) if not isinstance(part, TextPart)]
    return _cut(_text(reply.segments[images[-1] + 1 :] if images else reply.segments), stops)


def _text(segments) -> str:
    return "".join(part.text for part in segments if isinstance(part, TextPart)).strip()


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of these."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
