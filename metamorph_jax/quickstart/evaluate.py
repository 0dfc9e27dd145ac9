"""What the quick start's models can do, measured on held-out data.

Answers: held-out questions about held-out images, one question per prompt, greedy. Visual tokens:
24 requests in held-out wordings, read by a linear probe; where the head samples, eight samples of
each, and `best_of.py` measures what it is worth to choose among them. Drawings: two of each
request, none picked (of the first two samples, where there are some), whose colour and shape a
small classifier reads; `shapes` measures how clean they are. Four of the 24 pairs of colour and
shape were never drawn in training (`data.HELD_OUT`).
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from PIL import Image

from metamorph_jax.data import predicted
from metamorph_jax.data.cache import ArrayCache
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.eval import probe
from metamorph_jax.eval.scorers import short_answers
from metamorph_jax.quickstart import best_of, shapes
from metamorph_jax.quickstart import data as qdata
from metamorph_jax.sampling.generator import Generator
from metamorph_jax.sampling.image_decoder import ImageDecoder
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import TextPart

ANSWER_TOKENS = 8  # more than "rectangle" and the end of the turn
SEEDS = (0, 1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is evaluated.

    Attributes:
        questions: number of held-out questions, drawn without replacement; 0 is all.
        batch: prompts decoded together.
        judge_steps: training steps of the classifier.
        seed: for the choice of questions and for the classifier.
    """

    questions: int = 500
    batch: int = 50
    judge_steps: int = 800
    seed: int = 0


def answer_questions(generator: Generator, data: qdata.QuickstartData, settings: Settings, say):
    """Rows of `questions_test` with `predicted`: a list of dicts."""
    rows = qdata.read_jsonl(data.questions_test)
    rng = np.random.default_rng(settings.seed)
    if 0 < settings.questions < len(rows):
        chosen = np.sort(rng.choice(len(rows), settings.questions, replace=False))
        rows = [rows[i] for i in chosen]
    options = Options(ANSWER_TOKENS, batch_size=settings.batch)
    for start in range(0, len(rows), settings.batch):
        part = rows[start : start + settings.batch]
        # The last batch is filled up with earlier questions, so nothing is compiled for its size.
        asked = rows[-settings.batch :] if len(part) < settings.batch else part
        replies = generator.generate([_question(row, data) for row in asked], options)
        for row, reply in zip(part, replies[-len(part) :], strict=True):
            words = [p.text for p in reply.segments if isinstance(p, TextPart)]
            row["predicted"] = "".join(words)
        done = start + len(part)
        right = accuracy(rows[:done])
        say(f"questions {done}/{len(rows)}: {100 * right:.1f} % right so far")
    return rows


def _question(row: dict, data: qdata.QuickstartData) -> Request:
    return Request(row["id"], f"<image>\n{row['question']}", (str(data.images / row["image"]),))


def accuracy(rows: list[dict]) -> float:
    """Share of right answers."""
    return sum(short_answers.is_right(r["predicted"], r["answer"]) for r in rows) / len(rows)


def ask_for_images(generator: Generator, prompts: list[str], samples: int = 1, batch: int = 48):
    """(float32[n, samples, P, C] visual tokens, bool[n, samples] whether they are complete)."""
    P, C = generator.feature_shape
    features = np.zeros((len(prompts), samples, P, C), np.float32)
    whole = np.zeros(features.shape[:2], bool)
    asked = [Request(str(n), prompt, sample=k)
             for n, prompt in enumerate(prompts) for k in range(samples)]  # fmt: skip

    def failed(request, error):
        raise error

    options = Options(P + 24, batch_size=batch)
    for request, reply in generator.replies(asked, options, failed, draw=False):
        made = [part for part in reply.image_parts if part.complete]
        if made:
            where = int(request.id), request.sample
            features[where], whole[where] = made[0].features, True
    return features, whole


def predict(generator: Generator, data: qdata.QuickstartData, path: str) -> dict:
    """Saves the model's visual tokens for every training request; see `data.predicted`."""
    samples = qdata.read_jsonl(data.draw_train)
    asked = [s["conversations"][0]["value"] for s in samples]
    prompts = sorted(set(asked))
    features, whole = (x[:, 0] for x in ask_for_images(generator, prompts))
    numbers = {prompt: i if whole[i] else -1 for i, prompt in enumerate(prompts)}
    rows = [numbers[prompt] for prompt in asked]
    predicted.save(path, [str(data.root / s["image"]) for s in samples], rows, features)
    print(f"{whole.sum()} of {len(prompts)} training requests were answered with a complete image")
    return {"requests": len(prompts), "whole_images": int(whole.sum())}


def drawings(image_decoder: ImageDecoder, features: np.ndarray) -> np.ndarray:
    """uint8[n, seeds, h, w, 3] of the first samples in float32[n, samples, P, C], or of the only
    one; the seeds are the same for every request."""
    drawn = [image_decoder.draw_many(features[:, k], None, seed)
             for seed, k in zip(SEEDS, drawn_samples(features), strict=True)]  # fmt: skip
    return np.stack(drawn, axis=1)


def drawn_samples(samples: np.ndarray) -> list[int]:
    """Which of the samples, the second dimension, is drawn with each of the seeds."""
    return [k % samples.shape[1] for k in range(len(SEEDS))]


def judges(generator: Generator, data: qdata.QuickstartData, settings: Settings, cache):
    """(linear probe, image classifier, their accuracy on real held-out images); `cache` as of
    `evaluate`."""
    numbers, train_pixels, *train_labels = qdata.labelled_images(data, "train")
    _, test_pixels, *test_labels = qdata.labelled_images(data, "test")
    if cache is None:
        known = see_all(generator, train_pixels)
    else:
        known = cached_tokens(cache, data, numbers)
    reader = probe.fit_probe(known, train_labels)
    config = dataclasses.replace(probe.ClassifierConfig(), steps=settings.judge_steps)
    classifier = probe.train_classifier(train_pixels, train_labels, settings.seed, config)
    judged = {
        "linear probe on visual tokens": probe.agreement(
            reader.predict(see_all(generator, test_pixels)), test_labels
        ),
        "classifier on images": probe.agreement(classifier.predict(test_pixels), test_labels),
    }
    return reader, classifier, judged


def cached_tokens(cache: ArrayCache, data: qdata.QuickstartData, numbers) -> np.ndarray:
    """float32[n, P, C] visual tokens of training images, by their numbers."""
    refs = [ImageRef(str(data.images / "train" / f"{n}.png")) for n in numbers]
    return np.array(cache.rows[[cache.lookup(ref)[0] for ref in refs]], np.float32)


def see_all(generator: Generator, pixels: np.ndarray, batch: int = 64) -> np.ndarray:
    """float32[n, P, C] visual tokens of uint8[n, h, w, 3] images of any size."""
    ready = np.stack([generator.prompts.views.pixels(Image.fromarray(p))[0] for p in pixels])
    fill = -len(ready) % batch
    ready = np.concatenate([ready, ready[:1].repeat(fill, 0)])
    parts = [generator.reader.see(ready[i : i + batch]) for i in range(0, len(ready), batch)]
    return np.concatenate(parts)[: len(pixels)]


def measure_shapes(drawn: np.ndarray, whole: np.ndarray, color, shape) -> shapes.Measures:
    """Of drawings uint8[n, seeds, h, w, 3], arrays [n, seeds, ...]; 0, or NaN, where bool[n, seeds]
    `whole` says that there is none."""
    n, seeds = drawn.shape[:2]
    flat = drawn.reshape(-1, *drawn.shape[2:])
    found = shapes.measure(flat, color.repeat(seeds), shape.repeat(seeds))
    kept = whole.astype(int)
    overlap, count = (x.reshape(n, seeds) * kept for x in (found.overlap, found.count))
    box = np.where(whole[..., None], found.box.reshape(n, seeds, 4), np.nan)
    return shapes.Measures(overlap, count, box)


def measure_real(data: qdata.QuickstartData, copies: int = len(SEEDS)) -> shapes.Measures:
    """The same measures of real held-out images, as many of each pair as there are drawings."""
    _, pixels, color, shape = qdata.labelled_images(data, "test")
    pairs = color * len(qdata.SHAPES) + shape
    chosen = [i for pair in np.unique(pairs) for i in np.flatnonzero(pairs == pair)[:copies]]
    return shapes.measure(pixels[chosen], color[chosen], shape[chosen])


def evaluate(
    generator: Generator, image_decoder: ImageDecoder, data, folder: pathlib.Path,
    settings: Settings, cache: ArrayCache | None = None, say=print,
) -> dict:  # fmt: skip
    """Measures everything, saves it in `folder`, and returns the JSON-able part.

    Args:
        folder: gets evaluation.json and drawings.npz (visual tokens, drawings).
        cache: of the visual tokens of the training images; None computes them.
    """
    rows = answer_questions(generator, data, settings, say)
    by_type = short_answers.score_by_type(rows, qdata.QUESTION_TYPES)
    requests = qdata.read_jsonl(data.draw_test)
    wanted = _wanted(requests)
    samples = best_of.SAMPLES if best_of.samples_differ(generator) else 1
    features, whole = ask_for_images(generator, [r["prompt"] for r in requests], samples)
    say(f"{whole.sum()} of {whole.size} requests were answered with a complete image")

    reader, classifier, judged = judges(generator, data, settings, cache)
    tokens_right = _judge_tokens(requests, features, whole, wanted, reader)
    gain = {}
    if samples > 1:
        gain = best_of.measure(generator, requests, features, whole, tokens_right, say)

    drawn, whole = drawings(image_decoder, features), whole[:, drawn_samples(whole)]
    right = _judge_drawings(requests, drawn, whole, wanted, classifier)
    measured = _measure_drawings(requests, drawn, whole, wanted)

    result = {
        "settings": dataclasses.asdict(settings),
        "questions": rows,
        "scores": [dataclasses.asdict(s) for s in by_type],
        "drawings": requests,
        **measured.summary(),
        "real": measure_real(data).summary(),
        "accuracy": accuracy(rows),
        "tokens_right": float(tokens_right.mean()),
        "drawings_right": float(right.mean()),
        "held_out_right": float(right[[r["held_out"] for r in requests]].mean()),
        "best_of": gain,
        "judges": judged,
    }
    _save(folder, result, features, drawn)
    return result


def _wanted(requests: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(colours int[n], shapes int[n]) that are asked for."""
    colors = np.array([qdata.COLORS.index(r["color"]) for r in requests])
    return colors, np.array([qdata.SHAPES.index(r["shape"]) for r in requests])


def _judge_tokens(requests: list[dict], features, whole, wanted, reader) -> np.ndarray:
    """bool[n, samples] whether visual tokens are of what was asked for; noted in the requests for
    those that are drawn."""
    color, shape = _read(reader, features)
    right = whole & (color == wanted[0][:, None]) & (shape == wanted[1][:, None])
    for request, row in zip(requests, right[:, drawn_samples(right)], strict=True):
        request["tokens_right"] = row.tolist()
    return right


def _judge_drawings(requests: list[dict], drawn, whole, wanted, classifier) -> np.ndarray:
    """bool[n, seeds] whether drawings show what was asked for; noted in the requests, with what
    they show."""
    color, shape = _read(classifier, drawn)
    right = whole & (color == wanted[0][:, None]) & (shape == wanted[1][:, None])
    for i, request in enumerate(requests):
        pairs = zip(color[i], shape[i], strict=True)
        request["seen"] = [f"{qdata.COLORS[c]} {qdata.SHAPES[s]}" for c, s in pairs]
        request["right"] = right[i].tolist()
    return right


def _read(judge, made: np.ndarray) -> list[np.ndarray]:
    """(colours int[n, k], shapes int[n, k]) that `judge.predict` sees in made[n, k, ...]."""
    found = judge.predict(made.reshape(-1, *made.shape[2:]))
    return [labels.reshape(made.shape[:2]) for labels in found]


def _measure_drawings(requests: list[dict], drawn, whole, wanted) -> shapes.Measures:
    """How clean the drawings are; noted in the requests."""
    measured = measure_shapes(drawn, whole, *wanted)
    for request, overlap, count in zip(requests, measured.overlap, measured.count, strict=True):
        request |= {"overlap": overlap.tolist(), "shapes": count.tolist()}
    return measured


def _save(folder: pathlib.Path, result: dict, features, drawn) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "drawings.npz", features=features, drawings=drawn)
    partial = folder / "evaluation.json.partial"
    partial.write_text(json.dumps(jax.tree.map(_plain, result), indent=1) + "\n")
    partial.replace(folder / "evaluation.json")


def _plain(x):
    return x.item() if isinstance(x, np.generic) else x
