"""`metamorph generate`: a trained model answers, draws, edits and thinks visually.

    metamorph generate --workdir RUN --prompt "What is this?" --image cat.jpg
    metamorph generate --workdir RUN --decoder RUN2 --prompt "Draw a red circle." --out drawings
    metamorph generate --workdir RUN --prompts questions.jsonl --out answers

Pictures stand where the prompt says `<image>`, else in front of it on a line of their own. A line
of a JSONL file is {"id": …, "prompt": …, "images": […] or "image": …, "video": …}, paths relative
to the file. What comes out, in `--out`:

    results.jsonl        one line per prompt as soon as it is done; started again, these are skipped
    segments.json        all of them as one list, at the end
    ID_picture0.npy      the visual tokens of a picture, float32[P, C]
    ID_picture0_scale7.5.png   drawn from them, for each guidance scale
"""

import collections
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from metamorph_jax.cli import UserError
from metamorph_jax.data.sources.base import IMAGE, BadSample, ImageRef

GUIDANCE = (7.5,)


def add_arguments(parser) -> None:
    parser.description = "Answers prompts with text and pictures."
    group = parser.add_argument_group("model")
    group.add_argument("--workdir", help="of a finished training stage")
    group.add_argument(
        "--checkpoint", metavar="SPEC", help="published weights (hf:OWNER/NAME or a folder)"
    )
    group.add_argument("--config", metavar="FILE[:SIZE]", help="the config of --checkpoint")
    group.add_argument(
        "--decoder", metavar="WORKDIR", help="of a decoder stage: draws the pictures"
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", help="one prompt")
    group.add_argument("--prompts", metavar="FILE.jsonl", help="one prompt a line")
    group.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable")
    group.add_argument("--video", metavar="FILE", help="one frame a second of it")
    group.add_argument(
        "--think", action="store_true", help="ask the model to picture the detail first"
    )
    group = parser.add_argument_group("decoding")
    group.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    group.add_argument("--top-k", type=int, default=0, help="0 is all tokens")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument(
        "--max-new-tokens", type=int, default=512, help="visual tokens count (default 512)"
    )
    group.add_argument("--force-end", action="store_true", help="end pictures after P tokens")
    group.add_argument("--parity", action="store_true", help="faults of the reference included")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--batch-size", type=int, default=8, help="for --prompts")
    group.add_argument("--context", type=int, default=0, help="most positions; 0 as in training")
    group = parser.add_argument_group("drawing")
    group.add_argument("--guidance", type=float, nargs="+", default=list(GUIDANCE))
    group.add_argument("--steps", type=int, default=50, help="of the diffusion sampler")
    parser.add_argument("--out", metavar="DIR", help="where results go")


def run(args) -> int:
    if bool(args.workdir) == bool(args.checkpoint):
        raise UserError("give either --workdir or --checkpoint")
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("give either --prompt or --prompts")
    if args.max_new_tokens < 1 or args.batch_size < 1 or args.steps < 1:
        raise UserError("--max-new-tokens, --batch-size and --steps must be at least 1")
    if args.decoder and not args.out:
        raise UserError("--decoder draws into files: give --out")
    if args.checkpoint and not args.config:
        raise UserError("--checkpoint needs --config FILE[:SIZE], which says what the model is")
    if args.prompts and (args.image or args.video):
        raise UserError("with --prompts, pictures are named in the file, not by --image or --video")
    bad = 0
    if args.prompts:
        requests, bad = read_requests(args.prompts, args.think)
    else:
        requests = [Request("0", args.prompt, tuple(args.image), args.video or "", args.think)]
    from metamorph_jax.sampling.text import Sampler

    try:
        sampler = Sampler(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise UserError(error) from error
    out = Output(args.out, settings(args)) if args.out else None
    todo = [r for r in requests if out is None or not out.has(r)]
    if len(todo) < len(requests):
        print(f"{len(requests) - len(todo)} of {len(requests)} were done before", file=sys.stderr)
    if todo:
        speaker = load_speaker(args.workdir, args.checkpoint, args.config, args.overrides)
        speaker.options = dataclasses.replace(
            speaker.options, sampler=sampler, force_end=args.force_end, parity=args.parity
        )
        speaker.context = args.context or speaker.context
        artist = load_artist(args.decoder, args.steps) if args.decoder else None
        bad += answer(speaker, artist, todo, args, out, alone=args.prompts is None)
    if out is not None:
        out.finish(requests)
    return 1 if bad else 0


def settings(args) -> dict:
    """What decides the results, apart from the prompts."""
    names = (
        "workdir checkpoint config decoder temperature top_k top_p max_new_tokens force_end parity"
        " seed context guidance steps"
    )
    return {name: getattr(args, name) for name in names.split()}


# ---- requests


@dataclasses.dataclass(frozen=True)
class Request:
    id: str
    prompt: str
    images: tuple[str, ...] = ()
    video: str = ""
    think: bool = False


def read_requests(path: str, think: bool = False) -> tuple[list[Request], int]:
    """(requests of a JSONL file, how many lines were bad and reported)."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"no file {path}")
    found, bad, ids = [], 0, set()
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                request = _request(json.loads(line), number, file.parent, think)
                if request.id in ids:
                    raise ValueError(f"id {request.id!r} is there twice")
            except ValueError as error:  # JSONDecodeError is one
                print(f"{path}, line {number}: {error}; skipped", file=sys.stderr)
                bad += 1
                continue
            ids.add(request.id)
            found.append(request)
    return found, bad


def _request(value, number: int, folder: pathlib.Path, think: bool) -> Request:
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError('expected {"prompt": "…"}')
    unknown = value.keys() - {"id", "prompt", "image", "images", "video", "think"}
    if unknown:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    images = value.get("images", value.get("image")) or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise ValueError("images must be a list of paths")
    video = value.get("video") or ""
    if not isinstance(video, str):
        raise ValueError("video must be a path")
    return Request(
        str(value.get("id", number)),
        value["prompt"],
        tuple(str(folder / i) for i in images),
        str(folder / video) if video else "",
        bool(value.get("think", think)),
    )


def place_pictures(text: str, count: int) -> str:
    """The prompt with one <image> for each picture: where it says so, else in front of it."""
    markers = text.count(IMAGE)
    if not markers:
        return IMAGE * count + "\n" + text if count else text
    if markers != count:
        raise ValueError(
            f"the prompt has {markers} {IMAGE} markers, but {count} pictures are given"
        )
    return text


def picture_refs(request: Request) -> list[ImageRef]:
    refs = [ImageRef(path) for path in request.images]
    if request.video:
        from metamorph_jax.data.sources import video

        info = video.probe(request.video)
        frames = video.frame_indices(info, 1.0)
        refs += [ImageRef(request.video, frame=i) for i in frames]
    return refs


# ---- models


def _load_model(workdir: str):
    """(recipe module, its Config, model, saved config) of a finished stage."""
    from flax import nnx

    from metamorph_jax import config
    from metamorph_jax.train import checkpoint
    from metamorph_jax.train.workdir import find_recipe

    saved = pathlib.Path(workdir) / "config.json"
    if not saved.is_file():
        raise UserError(f"{workdir} is no workdir of a training run (it has no config.json)")
    values = json.loads(saved.read_text())
    recipe = find_recipe(values["recipe"])
    cfg = config.build(recipe.Config, values["model"], "config.model")
    model = recipe.create(cfg, nnx.Rngs(0))
    try:
        checkpoint.load_params(model, workdir)
    except checkpoint.CheckpointError as error:
        raise UserError(error) from error
    return recipe, cfg, model, values


def load_speaker(workdir, checkpoint, config_spec=None, overrides=None) -> "Speaker":
    """The model that reads and speaks, from a workdir or from published weights."""
    from flax import nnx

    from metamorph_jax import config
    from metamorph_jax.data.pipeline import DataConfig

    if workdir:
        recipe, cfg, model, values = _load_model(workdir)
    else:
        from metamorph_jax.train.workdir import find_recipe

        values = config.load_config(config_spec, overrides).to_dict()
        recipe = find_recipe(values["recipe"])
        cfg = config.build(recipe.Config, values["model"], "config.model")
        cfg = dataclasses.replace(cfg, weights=checkpoint, tokenizer=cfg.tokenizer or checkpoint)
        model = recipe.create(cfg, nnx.Rngs(0))
        recipe.load_pretrained(model, cfg)
    for name in ("project", "predict_visual"):
        if not hasattr(model, name):
            raise UserError(f"the recipe {values['recipe']!r} does not generate text and pictures")
    data = dict(values["data"])
    data.setdefault("sources", [{"path": "none"}])
    data = recipe.complete_data_config(config.build(DataConfig, data, "config.data"), cfg)
    return Speaker(model, recipe.load_tokenizer(cfg), data)


class Speaker:
    """A model with all that belongs to talking with it."""

    def __init__(self, model, tokenizer, data):
        import jax
        from flax import nnx

        from metamorph_jax.data.chat import Chat
        from metamorph_jax.sampling.interleaved import Options, prepare

        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.chat = Chat(
            tokenizer, data.template, data.system, data.single_bos,
            image_start=model.image_start, image_end=model.image_end,
        )  # fmt: skip
        self.decoder = prepare(model)
        ends = {self.chat.close, getattr(tokenizer, "eos_token_id", None)} - {None}
        self.options = Options(eos=tuple(sorted(ends)))
        self.context = data.length
        graph, self._weights = nnx.split(model)
        self._see = jax.jit(
            lambda weights, pixels: nnx.merge(graph, weights).visual_features(pixels)
        )

    def see(self, pixels: np.ndarray) -> np.ndarray:
        """float32[n, P, C] of uint8[n, h, w, 3], at numbers of pictures that are powers of two."""
        n = len(pixels)
        size = 1 << max(n - 1, 0).bit_length()
        padded = np.concatenate([pixels, np.zeros((size - n, *pixels.shape[1:]), np.uint8)])
        return np.asarray(self._see(self._weights, padded))[:n]

    def prompt(self, request: Request, max_new_tokens: int) -> np.ndarray:
        """float[L, D]: what the language model reads.

        Raises:
            ValueError, BadSample: with a message for the user.
        """
        import jax.numpy as jnp

        from metamorph_jax.data import pictures
        from metamorph_jax.data.interleave import build_row
        from metamorph_jax.data.sources.templates import THINK_HUMAN
        from metamorph_jax.models.interleave import place_visual

        refs = picture_refs(request)
        text = place_pictures((THINK_HUMAN[1] if request.think else "") + request.prompt, len(refs))
        ids = self.chat.prompt([("user", text)])
        P = self.decoder.P
        room = self.context - max_new_tokens
        need = len(ids) + len(refs) * (P - 1)
        if need > room:
            words = len(ids) - len(refs)
            fit = max((room - words) // P, 0)
            raise ValueError(
                f"{len(refs)} pictures and {words} text tokens make {need} positions, but beside "
                f"{max_new_tokens} new tokens the context of {self.context} has room for "
                f"{max(room, 0)}: "
                + (f"{fit} pictures fit" if refs else "shorten the prompt or --max-new-tokens")
            )
        if refs and self.model.tower is None:
            raise ValueError(
                "this model was trained on cached features and has no tower for pictures"
            )
        row = build_row(ids, None, P, max(need, 1), self.model.image_start)
        embeds = self.model.embed_text(jnp.asarray(row.tokens))[None]
        if refs:
            preprocess = self.data.preprocess
            pixels = np.stack([preprocess(p) for p in pictures.load(refs, self.data.max_pixels)])
            visual = self.model.project(jnp.asarray(self.see(pixels)))
            visual = visual.reshape(1, -1, visual.shape[-1])
            embeds = place_visual(embeds, visual, jnp.asarray(row.image_slots)[None])
        return np.asarray(embeds[0], np.float32)


def load_artist(workdir: str, steps: int) -> "Artist":
    """The model that draws, from the workdir of a decoder stage."""
    model = _load_model(workdir)[2]
    if not hasattr(model, "denoise"):
        raise UserError(f"{workdir} holds no decoder")
    return Artist(model, steps)


class Artist:
    """A trained decoder that draws visual tokens."""

    def __init__(self, model, steps: int):
        import jax
        from flax import nnx

        from metamorph_jax.sampling import diffusion

        self.cfg = model.cfg
        # Pixels, and a schedule that ends in pure noise, have to be sampled from its very end.
        if model.cfg.schedule.zero_snr or model.cfg.vae is None:
            sampler = diffusion.DDIM(spacing="trailing", to_one=True)
        else:
            sampler = diffusion.DPMSolverPP()
        graph, self._weights = nnx.split(model)

        def paint(weights, features, noise, scale):
            recipe = nnx.merge(graph, weights)
            return diffusion.draw(recipe, features, noise, sampler, steps=steps, scale=scale)

        self._paint = jax.jit(paint, static_argnames="scale")

    def draw(self, features: np.ndarray, scale: float, seed: int) -> np.ndarray:
        """uint8[h, w, 3] of float[P, C]."""
        return self.draw_many(features[None], scale, seed)[0]

    def draw_many(self, features: np.ndarray, scale: float, seed: int) -> np.ndarray:
        """uint8[n, h, w, 3] of float[n, P, C]."""
        import jax

        side, channels = self.cfg.sample_side, self.cfg.sample_channels
        noise = jax.random.normal(jax.random.key(seed), (len(features), side, side, channels))
        images = np.asarray(self._paint(self._weights, features, noise, scale=float(scale)))
        return np.round(images * 255).astype(np.uint8)


# ---- answering


def answer(speaker: Speaker, artist, requests, args, out, alone: bool) -> int:
    """Decodes all requests, writing each as it is done; returns how many were bad."""
    bad = 0

    def prompts() -> Iterator[tuple[Request, np.ndarray]]:
        nonlocal bad
        for request in requests:
            try:
                yield request, speaker.prompt(request, args.max_new_tokens)
            except (BadSample, ValueError, OSError, ImportError) as error:
                if alone:
                    raise UserError(error) from error
                print(f"{request.id}: {error}; skipped", file=sys.stderr, flush=True)
                bad += 1

    size = 1 if alone else args.batch_size
    for batch in batches(prompts(), size):
        # A short batch is filled up, so that it needs no compilation of its own.
        rows = [prompt for _, prompt in batch]
        fill = size - len(rows)
        budgets = [args.max_new_tokens] * len(rows) + [1] * fill
        rows += rows[:1] * fill
        voice = Voice(speaker) if alone else None
        results = speaker.decoder(
            rows, budgets, speaker.options, seeds=[args.seed] * size,
            stream=voice and (lambda new, say=voice: say(new[0])),
        )  # fmt: skip
        if voice:
            voice.end()
        for (request, _), result in zip(batch, results, strict=False):
            record, drawings = describe(speaker, artist, request, result, args)
            if out is not None:
                out.write(request, record, drawings)
            if not alone:
                print(f"{request.id}: {record['text']}", flush=True)
    return bad


def batches(prompts: Iterable, size: int) -> Iterator[list]:
    """Groups (request, prompt) pairs whose prompts fall into the same bucket."""
    from metamorph_jax.sampling.interleaved import bucket

    waiting = collections.defaultdict(list)
    for pair in prompts:
        group = waiting[bucket(len(pair[1]))]
        group.append(pair)
        if len(group) == size:
            yield list(group)
            group.clear()
    for group in waiting.values():
        if group:
            yield group


class Voice:
    """Writes text to the terminal as its tokens come; a picture is a mark in it."""

    def __init__(self, speaker: Speaker, file=None):
        self._speaker, self._file = speaker, file or sys.stdout
        self._ids, self._said, self._pictures = [], "", 0

    def __call__(self, records) -> None:
        decoder = self._speaker.decoder
        for token in np.asarray(records).tolist():
            if token == decoder.start:
                self._flush(last=True)
                self._print(f"[picture {self._pictures}]")
                self._pictures += 1
            elif token >= 0 and token != decoder.end and token not in self._speaker.options.eos:
                self._ids.append(token)
        self._flush()

    def _flush(self, last: bool = False) -> None:
        text = self._speaker.tokenizer.decode(self._ids)
        # The bytes of a character may be spread over several tokens.
        if last or not text.endswith("\ufffd"):
            self._print(text[len(self._said) :])
            self._said = text
        if last:
            self._ids, self._said = [], ""

    def _print(self, text: str) -> None:
        print(text, end="", file=self._file, flush=True)

    def end(self) -> None:
        self._flush(last=True)
        self._print("\n")


def describe(speaker: Speaker, artist, request: Request, result, args) -> tuple[dict, dict]:
    """(the record of a result, file name -> array of its pictures)."""
    from metamorph_jax.sampling.interleaved import Text

    name = re.sub(r"[^\w.-]", "_", request.id)[:80] or "_"
    segments, files, text, count = [], {}, "", 0
    for segment in result.segments:
        if isinstance(segment, Text):
            words = speaker.tokenizer.decode(segment.ids.tolist())
            segments.append({"type": "text", "text": words, "ids": segment.ids.tolist()})
            text += words
            continue
        stem = f"{name}_picture{count}"
        entry = {"type": "picture", "picture": count, "complete": segment.complete}
        entry |= {"tokens": len(segment.features), "features": f"{stem}.npy", "drawings": {}}
        files[f"{stem}.npy"] = segment.features
        if artist is not None and segment.complete:
            for scale in args.guidance:
                file = f"{stem}_scale{scale:g}.png"
                files[file] = artist.draw(segment.features, scale, args.seed + count)
                entry["drawings"][f"{scale:g}"] = file
        segments.append(entry)
        text += f"[picture {count}]"
        count += 1
    record = {
        "id": request.id,
        "request": dataclasses.asdict(request) | {"images": list(request.images)},
        "text": text,
        "segments": segments,
        "ended": "eos" if result.ended else "budget",
    }
    return record, files


class Output:
    """The folder of results; what is in it already is not made again."""

    def __init__(self, folder: str, settings: dict):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if saved.is_file():
            before = json.loads(saved.read_text())
            changed = sorted(k for k in settings if settings[k] != before.get(k))
            if changed:
                raise UserError(
                    f"{folder} holds results made with other settings ({', '.join(changed)}); "
                    "choose another --out or remove it"
                )
        saved.write_text(json.dumps(settings, indent=1) + "\n")
        self._records = {}
        self._file = self.folder / "results.jsonl"
        if self._file.is_file():
            whole = []
            for line in self._file.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # cut off while it was written
                self._records[record["id"]] = record
                whole.append(line + "\n")
            self._file.write_text("".join(whole))

    def has(self, request: Request) -> bool:
        record = self._records.get(request.id)
        wanted = dataclasses.asdict(request) | {"images": list(request.images)}
        return record is not None and record["request"] == wanted

    def write(self, request: Request, record: dict, files: dict) -> None:
        from PIL import Image

        for name, value in files.items():
            if name.endswith(".npy"):
                np.save(self.folder / name, value)
            else:
                Image.fromarray(value).save(self.folder / name)
        self._records[request.id] = record
        with self._file.open("a") as f:
            f.write(json.dumps(record) + "\n")

    def finish(self, requests) -> None:
        records = [self._records[r.id] for r in requests if r.id in self._records]
        (self.folder / "segments.json").write_text(json.dumps(records, indent=1) + "\n")
