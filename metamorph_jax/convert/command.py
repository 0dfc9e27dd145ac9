"""`metamorph convert`: published weights in, a folder for transformers out.

    metamorph convert --from workdir:RUN --out DIR             a training run, for transformers
    metamorph convert --from workdir:RUN --to peft --out DIR   its adapters, for PEFT
    metamorph convert --from workdir:RUN --to reference --out DIR   for the system's public code
    metamorph convert --from hf:owner/name --out DIR --dtype bf16
    metamorph convert --from gguf:model.gguf --out DIR         dequantised
    metamorph convert --from BASE --delta DELTA --out DIR      delta weights applied to their base
    metamorph convert --from MODEL --make-delta BASE --out DIR
    metamorph convert --from BASE --lora ADAPTERS --out DIR    adapters merged into their base
    metamorph convert --list                                   families, sizes, memory
    metamorph convert --check --from hf:owner/name             ours against the reference library

Sources: `hf:owner/name`, a folder, `gguf:FILE`, `pkg:NAME`, `workdir:PATH`. The language model
of a run loads with `AutoModelForCausalLM.from_pretrained(DIR)`; its other parts are in folders
inside DIR. If anything fails, DIR is not created.
"""

import pathlib
import re
import time
from collections.abc import Iterator, Mapping

from metamorph_jax.errors import UserError

WORKDIR = "workdir:"
CHANGES = ("delta", "make_delta", "lora")  # options that name what changes --from
GIB = 2**30
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser) -> None:
    parser.description = (
        "Reads published weights or a finished training run and writes a folder that transformers "
        "loads unchanged. Takes about as long as reading and writing the weights once."
    )
    parser.add_argument(
        "--from", dest="source", metavar="SPEC",
        help="hf:OWNER/NAME, a folder, gguf:FILE, pkg:NAME, or workdir:PATH of a finished run",
    )  # fmt: skip
    parser.add_argument(
        "--to", choices=("hf", "peft", "reference", "connector"), default="hf",
        help="format: hf, for transformers or diffusers (default); peft, the adapters of a run; "
        "reference, a run in the files of its system's public implementation; connector, that "
        "part of a run alone",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", metavar="MODULE",
        help="your own recipe, where workdir:PATH was trained with one; its code is imported",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder for the result; must not exist yet")
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
    parser.add_argument("--delta", metavar="SPEC", help="delta weights to add to --from, a base")
    parser.add_argument(
        "--make-delta", metavar="SPEC", help="write the differences of --from to this base"
    )
    parser.add_argument(
        "--lora", metavar="SPEC", help="adapters (a PEFT folder) to merge into --from, a base"
    )
    parser.add_argument("--allow-nan", action="store_true", help="accept weights with NaN or inf")
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
        raise UserError("nothing to convert: give --from SPEC (or --list)")
    from metamorph_jax import recipe
    from metamorph_jax.convert import names
    from metamorph_jax.errors import HubError

    try:
        if args.recipe:
            recipe.find(args.recipe)
        if args.check:
            from metamorph_jax.convert import check

            return 0 if check.run(args.source, tolerance=args.tolerance) else 1
        if not args.out:
            raise UserError("no folder to write to: give --out DIR")
        most = parse_size(args.max_shard_size)
        start = time.perf_counter()
        with names.allow_nan() if args.allow_nan else _nothing():
            total = _converted(args, most)
        seconds = time.perf_counter() - start
        print(f"{total / 1e9:.2f} GB in {seconds:.0f} s -> {args.out}")
        return 0
    except (HubError, FileNotFoundError, FileExistsError, ValueError, ImportError) as error:
        raise UserError(error) from error


def _converted(args, most: int) -> int:
    """Writes what the arguments ask for and returns the bytes of all tensors."""
    run = args.source.startswith(WORKDIR)
    asked = [name for name in CHANGES if getattr(args, name)]
    if len(asked) + (args.to != "hf") > 1:
        raise UserError("--to, --delta, --make-delta and --lora are one choice")
    if asked and run:
        raise UserError(f"--{asked[0].replace('_', '-')} goes with published weights; write the "
                        "run as a folder first")  # fmt: skip
    if args.to == "peft" and run:
        from metamorph_jax.convert import runs

        return runs.write_adapters(args.source.removeprefix(WORKDIR), args.out)
    if asked:
        from metamorph_jax.convert import changes

        other = getattr(args, asked[0])
        return changes.write(args.source, args.out, asked[0], other, args.dtype, most)
    return convert(args.source, args.out, args.dtype, most, args.decoder, args.to)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MiB", "1000"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if unit is None or not 1 <= float(match[1]) * unit < 2**63:
        raise UserError(f"--max-shard-size {text!r} is not a size; write 5GB, 200MB or 1GiB")
    return int(float(match[1]) * unit)


# ---- conversions


def convert(
    source: str, out: str, dtype="same", most: int = 5 * 10**9, decoder=None, to: str = "hf"
) -> int:
    """Writes `out` and returns the bytes of all tensors; see the module docstring."""
    from metamorph_jax.convert import diffusion, export, hf, specs

    title = pathlib.Path(out).name
    if decoder and not source.startswith(WORKDIR):
        raise UserError("--decoder goes with --from workdir:PATH")
    if to != "hf" and not source.startswith(WORKDIR):
        raise UserError(f"--to {to} goes with --from workdir:PATH")
    with export.whole_or_nothing(out) as folder:
        if source.startswith(WORKDIR):
            from metamorph_jax.convert import runs

            path = pathlib.Path(source.removeprefix(WORKDIR))
            return runs.write(path, folder, to, dtype, most, decoder, title)
        file = specs.file_of(source, ".gguf")
        if file is not None:
            return _from_gguf(source, file, folder, dtype, most, title)
        where = hf.find(source)
        if diffusion.is_pipeline(where):
            return _from_pipeline(source, where, folder, dtype, most)
        return _from_folder(source, where, folder, dtype, most, title)


def _from_gguf(spec: str, file, folder: pathlib.Path, dtype: str, most: int, title: str) -> int:
    from metamorph_jax.convert import export, families, gguf, packages
    from metamorph_jax.convert.card import write_card

    reader = gguf.open_gguf(file)
    fields = gguf.read_config(reader)
    source = export.Source(fields, gguf.read_tokenizer(reader))
    kinds = sorted({tensor.kind.name for tensor in reader.tensors})
    lines = [f"Dequantised from GGUF ({', '.join(kinds)}): lost precision is not restored."]
    total = _rewrite(spec, families.of_fields(fields, spec), gguf.Weights(reader, fields), source,
                     folder, dtype, most)  # fmt: skip
    write_card(folder, title, spec, lines, packages.licence(spec))
    return total


def _from_folder(spec: str, where, folder: pathlib.Path, dtype: str, most: int, title: str) -> int:
    from metamorph_jax.convert import export, families, llama
    from metamorph_jax.convert.card import licence_of, write_card
    from metamorph_jax.data import tokenizers

    fields = families.read_config(where)
    tokenizers.check_all(pathlib.Path(where))
    family = families.of_fields(fields, spec)
    tensors = family.read(where)
    if rows := export.rows_of(tensors):
        export.check_special_ids(pathlib.Path(where), fields, rows)
    if llama.EMBED in tensors:
        fields = llama.untied(fields, tensors)
    source = export.Source(fields, folder=where)
    total = _rewrite(spec, family, tensors, source, folder, dtype, most)
    write_card(folder, title, spec, [], licence_of(where))
    return total


def _from_pipeline(spec: str, where, folder: pathlib.Path, dtype: str, most: int) -> int:
    from metamorph_jax.convert import diffusion, export, hf

    kind = export.written_dtype(dtype, hf.Tensors(where / "unet"))
    print(f"{spec}: a pipeline; writing {kind}", flush=True)
    pipeline = diffusion.load_pipeline(where)
    # The libraries of pipelines don't look for several files of one part.
    writer = export.Writer(kind, max(most, 10**11))
    return diffusion.save_pipeline(pipeline, folder, where / "tokenizer", writer)


def _rewrite(spec, family, tensors: Mapping, source, folder, dtype: str, most: int) -> int:
    """Reads a model and writes it as its family is written; returns bytes of all tensors."""
    from metamorph_jax.convert import export
    from metamorph_jax.convert.progress import Progress, bytes_of

    kind = export.written_dtype(dtype, tensors)
    print(f"{spec}: {family.name}, {len(tensors)} tensors; reading as {kind}", flush=True)
    model = filled(family, family.config_from_hf(source.fields), tensors, kind)
    progress = Progress("writing", bytes_of(model))
    total = family.write(folder, model, source, export.Writer(kind, most, progress))
    progress.close()
    return total


def filled(family, cfg, tensors: Mapping, dtype: str):
    """A model of a family with these tensors, spread over all devices."""
    from metamorph_jax import sharding
    from metamorph_jax.convert import safetensors
    from metamorph_jax.models import build

    make = lambda rngs: family.create(cfg, rngs=rngs)  # noqa: E731
    model = build.outline(make, sharding.make_mesh(), safetensors.dtype_of(dtype))
    family.load(model, tensors)
    return model


# ---- the list


def listing() -> Iterator[str]:
    """Families, their sizes, and the memory of weights and training state, line by line: the shapes
    of a large model take a second."""
    import jax
    from flax import nnx

    from metamorph_jax.convert.families import known
    from metamorph_jax.models import build

    line = "{:12}  {:20}  {:>15}  {:>7}  {:>7}  {:>9}".format
    yield line("family", "size", "parameters", "bf16", "fp32", "training")
    for family in known().values():
        for size, cfg in family.sizes.items():
            if size.endswith(("tiny", "small")):  # for tests: no such weights are published
                continue
            make = lambda f=family, c=cfg: f.create(c, rngs=build.rngs(0))  # noqa: E731
            state = nnx.state(nnx.eval_shape(make), nnx.Param)
            n = sum(x.size for x in jax.tree.leaves(state))
            yield line(family.name, size, f"{n:,}", *(f"{n * e / GIB:,.2f}" for e in (2, 4, 16)))
    yield ""
    yield "Stable Diffusion is clip-text, sd-unet and sd-vae of one size; llava and metamorph are"
    yield "tower, connector, language model and head together."
    yield "bf16, fp32: GiB of the weights. training: GiB of weights, gradients and two moments in"
    yield "float32 if everything is trained, over all devices together and without activations,"
    yield "which `metamorph plan` computes, too."
