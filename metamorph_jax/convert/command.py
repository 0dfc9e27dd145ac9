"""`metamorph convert`: published weights in, a folder for transformers out.

    metamorph convert --from workdir:RUN --out DIR             a training run, for transformers
    metamorph convert --from workdir:RUN --to peft --out DIR   its adapters, for PEFT
    metamorph convert --from hf:owner/name --out DIR --dtype bf16
    metamorph convert --from gguf:model.gguf --out DIR         dequantised
    metamorph convert --list                                   families, sizes, memory
    metamorph convert --check --from hf:owner/name             ours against the reference library

Sources: `hf:owner/name`, a folder, `gguf:FILE`, `pkg:NAME`, `workdir:PATH`. The language model
of a run loads with `AutoModelForCausalLM.from_pretrained(DIR)`; its tower, connector and head lie
in folders beside it. Nothing is left under DIR unless all of it was written.
"""

import json
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping

from metamorph_jax.errors import UserError

WORKDIR = "workdir:"
GIB = 2**30
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser) -> None:
    parser.description = (
        "Reads published weights or a finished training run and writes a folder that transformers "
        "loads unchanged. Takes about as long as reading and writing the weights once; says at "
        "the end where the result lies."
    )
    parser.add_argument(
        "--from", dest="source", metavar="SPEC",
        help="hf:OWNER/NAME, a folder, gguf:FILE, pkg:NAME, or workdir:PATH of a finished run",
    )  # fmt: skip
    parser.add_argument(
        "--to", choices=("hf", "peft"), default="hf",
        help="format: hf, whole weights (default); peft, the adapters of a run",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where the result goes; must not exist yet")
    parser.add_argument(
        "--dtype", choices=("same", "f32", "bf16", "f16"), default="same",
        help="of the written weights (default: that of the source's largest tensor)",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default 5GB)"
    )
    parser.add_argument(
        "--decoder", metavar="WORKDIR", help="with workdir:…: the run of its diffusion decoder"
    )
    parser.add_argument("--allow-nan", action="store_true", help="weights may hold NaN")
    parser.add_argument("--list", action="store_true", help="families, sizes and memory needs")
    parser.add_argument(
        "--check", action="store_true",
        help="compare with the reference library (needs the oracle extra)",
    )  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of --check (default 1e-4)")


def run(args) -> int:
    if args.list:
        for line in listing():
            print(line, flush=True)
        return 0
    if not args.source:
        raise UserError("say what to convert: --from SPEC (or --list)")
    from metamorph_jax.convert import names
    from metamorph_jax.errors import HubError

    try:
        if args.check:
            from metamorph_jax.convert import check

            return 0 if check.run(args.source, tolerance=args.tolerance) else 1
        if not args.out:
            raise UserError("say where to write: --out DIR")
        most = parse_size(args.max_shard_size)
        start = time.perf_counter()
        with names.allow_nan() if args.allow_nan else _nothing():
            if args.to == "peft":
                total = convert_adapters(args.source, args.out)
            else:
                total = convert(args.source, args.out, args.dtype, most, args.decoder)
        seconds = time.perf_counter() - start
        print(f"{total / 1e9:.2f} GB in {seconds:.0f} s -> {args.out}")
        return 0
    except (HubError, FileNotFoundError, FileExistsError, ValueError, ImportError) as error:
        raise UserError(error) from error


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MiB", "1000"."""
    match = re.fullmatch(r"([\d.]+)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"--max-shard-size {text!r} is no size; write 5GB, 200MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class Progress:
    """A bar over bytes on a terminal, a line every tenth elsewhere."""

    def __init__(self, title: str, total: int):
        self._title, self._total, self._done, self._shown = title, max(total, 1), 0, 0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=title)

    def __call__(self, name: str, size: int) -> None:
        self._done += size
        if self._bar is not None:
            self._bar.update(size)
            return
        tenth = 10 * self._done // self._total
        if tenth > self._shown:
            self._shown = tenth
            print(f"{self._title}: {min(10 * tenth, 100)} %", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


# ---- conversions


def convert(source: str, out: str, dtype: str = "same", most: int = 5 * 10**9, decoder=None) -> int:
    """Writes `out` and returns the bytes of all tensors; see the module docstring."""
    from metamorph_jax.convert import export

    if decoder and not source.startswith(WORKDIR):
        raise UserError("--decoder goes with --from workdir:PATH")
    with export.whole_or_nothing(out) as folder:
        if source.startswith(WORKDIR):
            path = pathlib.Path(source.removeprefix(WORKDIR))
            return _from_workdir(path, folder, dtype, most, decoder, pathlib.Path(out).name)
        return _from_weights(source, folder, dtype, most, pathlib.Path(out).name)


def _from_weights(source: str, folder: pathlib.Path, dtype: str, most: int, title: str) -> int:
    from metamorph_jax.convert import export, families, gguf, hf, packages, specs, tokenizers

    file = specs.file_of(source, ".gguf")
    if file is not None:
        reader = gguf.open_gguf(file)
        fields, tokenizer, where = gguf.read_config(reader), gguf.read_tokenizer(reader), None
        tensors = gguf.Weights(reader, fields)
        licence = packages.licence(source)
        kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
        lines = [f"Dequantised from GGUF ({', '.join(kinds)}): what quantisation lost stays lost."]
    else:
        where = hf.find(source)
        if (where / "model_index.json").is_file():
            from metamorph_jax.convert import diffusion

            kind = _dtype(dtype, hf.Tensors(where / "unet"))
            print(f"{source}: a pipeline; writing {kind}", flush=True)
            pipeline = diffusion.load_pipeline(where)
            return diffusion.save_pipeline(pipeline, folder, where / "tokenizer", kind)
        fields, tensors, tokenizer = hf.read_config(where), hf.Tensors(where), where
        licence, lines = licence_of(where), []
    family = families.of_fields(fields, source)
    kind = _dtype(dtype, tensors)
    print(f"{source}: {family.name}, {len(tensors)} tensors; reading as {kind}", flush=True)
    cfg = family.config_from_hf(fields)
    model = filled(family, cfg, tensors, kind)
    progress = Progress("writing", _bytes(model))
    if family.name in ("llama", "qwen2", "qwen3"):
        generation = None
        if where is not None and (where / "generation_config.json").is_file():
            generation = json.loads((where / "generation_config.json").read_text())
        total = export.write_llm(
            folder, model, kind, most,
            fields=fields, tokenizer=tokenizer, generation=generation, progress=progress,
        )  # fmt: skip
    elif family.name == "metamorph":
        total = export.write_metamorph(
            folder, model, kind, most,
            fields=fields, tokenizer=tokenizers.load(where), progress=progress,
        )  # fmt: skip
    else:
        total = export.write_part(folder, family, model, cfg, kind, most, progress, where)
    progress.close()
    card = export.card(title, f"`{pathlib.PurePath(source).name}`", lines, licence)
    (folder / "README.md").write_text(card)
    return total


def _from_workdir(workdir, folder, dtype, most, decoder, title) -> int:
    from metamorph_jax.convert import export, specs
    from metamorph_jax.models import lora
    from metamorph_jax.sampling.trained import load_trained

    recipe, cfg, model, values = load_trained(str(workdir))
    kind = export.DTYPES["f32" if dtype == "same" else dtype]
    print(f"workdir:{workdir}: recipe {values['recipe']}; writing {kind}", flush=True)
    model = lora.merged(model)
    progress = Progress("writing", _bytes(model))
    if values["recipe"] == "metamorph":
        fields = {}
        if cfg.llm == "auto":
            fields = specs.llm_fields(cfg.llm_weights)
        total = export.write_metamorph(
            folder, model, kind, most,
            fields=fields, tokenizer=recipe.load_tokenizer(cfg), progress=progress,
        )  # fmt: skip
    elif values["recipe"] == "decoder":
        total = export.write_decoder(folder, model, kind, most, progress)
    else:
        raise UserError(f"{workdir} is of recipe {values['recipe']!r}; its export isn't written")
    if decoder:
        other, _, artist, _ = load_trained(decoder)
        if not other.__name__.endswith("decoder"):
            raise UserError(f"--decoder {decoder} is no run of the decoder recipe")
        total += export.write_decoder(folder / "decoder", lora.merged(artist), kind, most, progress)
    progress.close()
    numbers = export.last_numbers(workdir)
    licence = licence_of_spec(getattr(cfg, "weights", "") or getattr(cfg, "llm_weights", ""))
    lines = export.run_lines(values)
    card = export.card(title, "a training run", lines, licence, numbers)
    (folder / "README.md").write_text(card)
    return total


def convert_adapters(source: str, out: str) -> int:
    """Writes the adapters of a run for PEFT and returns the bytes of all tensors.

    Those of the language model or the denoiser lie in `out`, those of other parts in folders there.

    Raises:
        UserError: `source` is no run, or it has no adapters.
    """
    from metamorph_jax.convert import export, hf, peft
    from metamorph_jax.models import lora
    from metamorph_jax.sampling.trained import load_trained

    if not source.startswith(WORKDIR):
        raise UserError("--to peft goes with --from workdir:PATH")
    _, cfg, model, _ = load_trained(source.removeprefix(WORKDIR))
    base = getattr(cfg, "llm_weights", "") or getattr(cfg, "sd_weights", "")
    base = "" if base == "random" else base.removeprefix(hf.PREFIX)
    parts = sorted({name.partition(".")[0] for name, _ in lora.adapters(model)})
    if not parts:
        raise UserError(f"{source} was trained without adapters (config.model.lora)")
    total = 0
    with export.whole_or_nothing(out) as folder:
        for part in parts:
            main = part in ("llm", "denoiser")
            where = folder if main else folder / part
            peft.export_peft(getattr(model, part), where, base)
            total += (where / peft.WEIGHTS).stat().st_size
    return total


def filled(family, cfg, tensors: Mapping, dtype: str):
    """A model of a family with these tensors, spread over all devices; see `names`."""
    import jax
    from flax import nnx

    from metamorph_jax import sharding
    from metamorph_jax.convert import safetensors

    kind = safetensors.dtype_of(dtype)
    model = nnx.eval_shape(lambda: family.create(cfg, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    mesh = sharding.make_mesh()
    many = mesh.size > 1
    where = sharding.state_shardings(state, mesh)

    def place(x, where):
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=where if many else None)

    nnx.update(model, jax.tree.map(place, state, where))
    family.load(model, tensors)
    return model


def _dtype(name: str, tensors: Mapping) -> str:
    """The safetensors name of the dtype to write."""
    import math

    from metamorph_jax.convert import export, names, safetensors

    if name != "same":
        return export.DTYPES[name]
    largest = max(tensors, key=lambda key: math.prod(names.shape_of(tensors, key)))
    found = safetensors.name_of(tensors[largest].dtype)
    return found if found in export.DTYPES.values() else "F32"


def _bytes(model) -> int:
    import jax
    from flax import nnx

    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def licence_of_spec(spec: str) -> str:
    """The licence of the weights that a run started from; "" if it isn't known."""
    from metamorph_jax.convert import hf, packages

    if packages.is_package(spec):
        return packages.licence(spec)
    if spec.startswith(hf.PREFIX) or (spec and pathlib.Path(spec).is_dir()):
        return licence_of(hf.find(spec))
    return ""


def licence_of(folder: pathlib.Path) -> str:
    """What the front matter of a folder's README.md says; "" if nothing."""
    file = pathlib.Path(folder) / "README.md"
    if not file.is_file():
        return ""
    head = re.match(r"---\n(.*?)\n---", file.read_text(errors="replace"), re.S)
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", head[1], re.M) if head else None
    return found[1] if found else ""


# ---- the list


def listing() -> Iterator[str]:
    """Families, their sizes, and the memory that weights and training state take; line by line,
    for shapes of large models take a second."""
    import jax
    from flax import nnx

    from metamorph_jax.convert.families import FAMILIES

    line = "{:12}  {:20}  {:>15}  {:>7}  {:>7}  {:>9}".format
    yield line("family", "size", "parameters", "bf16", "fp32", "training")
    for family in FAMILIES.values():
        for size, cfg in family.sizes.items():
            if size.endswith(("tiny", "small")):  # for tests; nobody has published such weights
                continue
            make = lambda f=family, c=cfg: f.create(c, rngs=nnx.Rngs(0))  # noqa: E731
            state = nnx.state(nnx.eval_shape(make), nnx.Param)
            n = sum(x.size for x in jax.tree.leaves(state))
            yield line(family.name, size, f"{n:,}", *(f"{n * e / GIB:,.2f}" for e in (2, 4, 16)))
    yield ""
    yield "Stable Diffusion is clip-text, sd-unet and sd-vae of one size; llava and metamorph are"
    yield "tower, connector, language model and head together."
    yield "bf16, fp32: GiB of the weights. training: GiB of weights, gradients and two moments in"
    yield "float32 if everything is trained, over all devices together and without activations"
    yield "(`metamorph plan` compiles a step and says those, too)."
