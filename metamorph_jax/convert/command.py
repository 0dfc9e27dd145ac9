"""`metamorph convert`: published weights in, a folder for transformers out.

    metamorph convert --from workdir:RUN --out DIR             a training run, for transformers
    metamorph convert --from workdir:RUN --to peft --out DIR   its adapters, for PEFT
    metamorph convert --from workdir:RUN --to reference --out DIR   for the system's public code
    metamorph convert --from hf:owner/name --out DIR --dtype bf16
    metamorph convert --from gguf:model.gguf --out DIR         dequantised
    metamorph convert --list                                   families, sizes, memory
    metamorph convert --check --from hf:owner/name             ours against the reference library

Sources: `hf:owner/name`, a folder, `gguf:FILE`, `pkg:NAME`, `workdir:PATH`. The language model
of a run loads with `AutoModelForCausalLM.from_pretrained(DIR)`; its other parts are in folders
inside DIR. If anything fails, DIR is not created.
"""

import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping

from metamorph_jax import files
from metamorph_jax.errors import UserError

WORKDIR = "workdir:"
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
        "--to", choices=("hf", "peft", "reference"), default="hf",
        help="format: hf, for transformers or diffusers (default); peft, the adapters of a run; "
        "reference, a run in the files of its system's public implementation",
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
            if args.to == "peft":
                total = convert_adapters(args.source, args.out)
            else:
                reference = args.to == "reference"
                total = convert(args.source, args.out, args.dtype, most, args.decoder, reference)
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
        raise UserError(f"--max-shard-size {text!r} is not a size; write 5GB, 200MB or 1GiB")
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


def convert(
    source: str, out: str, dtype="same", most: int = 5 * 10**9, decoder=None, reference=False
) -> int:
    """Writes `out` and returns the bytes of all tensors; see the module docstring."""
    from metamorph_jax.convert import diffusion, export, hf, specs

    title = pathlib.Path(out).name
    if decoder and not source.startswith(WORKDIR):
        raise UserError("--decoder goes with --from workdir:PATH")
    if reference and not source.startswith(WORKDIR):
        raise UserError("--to reference goes with --from workdir:PATH")
    with export.whole_or_nothing(out) as folder:
        if source.startswith(WORKDIR):
            path = pathlib.Path(source.removeprefix(WORKDIR))
            return _from_workdir(path, folder, dtype, most, decoder, title, reference)
        file = specs.file_of(source, ".gguf")
        if file is not None:
            return _from_gguf(source, file, folder, dtype, most, title)
        where = hf.find(source)
        if diffusion.is_pipeline(where):
            return _from_pipeline(source, where, folder, dtype, most)
        return _from_folder(source, where, folder, dtype, most, title)


def _from_gguf(spec: str, file, folder: pathlib.Path, dtype: str, most: int, title: str) -> int:
    from metamorph_jax.convert import export, families, gguf, packages

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
    from metamorph_jax.convert import export, families, hf, llama, tokenizers

    fields = hf.read_config(where)
    tokenizers.check_all(pathlib.Path(where))
    family = families.of_fields(fields, spec)
    tensors = family.read(where)
    if llama.EMBED in tensors:
        fields = llama.untied(fields, tensors)
    source = export.Source(fields, folder=where)
    total = _rewrite(spec, family, tensors, source, folder, dtype, most)
    write_card(folder, title, spec, [], licence_of(where))
    return total


def _from_pipeline(spec: str, where, folder: pathlib.Path, dtype: str, most: int) -> int:
    from metamorph_jax.convert import diffusion, export, hf

    kind = _dtype(dtype, hf.Tensors(where / "unet"))
    print(f"{spec}: a pipeline; writing {kind}", flush=True)
    pipeline = diffusion.load_pipeline(where)
    # The libraries of pipelines don't look for several files of one part.
    writer = export.Writer(kind, max(most, 10**11))
    return diffusion.save_pipeline(pipeline, folder, where / "tokenizer", writer)


def _rewrite(spec, family, tensors: Mapping, source, folder, dtype: str, most: int) -> int:
    """Reads a model and writes it as its family is written; returns bytes of all tensors."""
    from metamorph_jax.convert import export

    kind = _dtype(dtype, tensors)
    print(f"{spec}: {family.name}, {len(tensors)} tensors; reading as {kind}", flush=True)
    model = filled(family, family.config_from_hf(source.fields), tensors, kind)
    progress = Progress("writing", _bytes(model))
    total = family.write(folder, model, source, export.Writer(kind, most, progress))
    progress.close()
    return total


def _from_workdir(workdir, folder, dtype, most, decoder, title, reference) -> int:
    """A finished run as its recipe writes it, and its image decoder in decoder/."""
    from metamorph_jax.convert import export, families
    from metamorph_jax.models import lora

    kind = export.DTYPES["f32" if dtype == "same" else dtype]
    recipe, cfg, model, values = _load_run(workdir)
    print(f"workdir:{workdir}: recipe {values['recipe']}; writing {kind}", flush=True)
    form, model = families.run_form(recipe), lora.merged(model)
    source, licence = form.source(cfg, _data(recipe, values)), licence_of_spec(form.base(cfg))
    progress = Progress("writing", _bytes(model))
    writer = export.Writer(kind, most, progress)
    total = _save_of(form, recipe, reference)(folder, model, source, writer)
    if decoder:
        recipe, cfg, model, drawn = _load_run(decoder)
        form = families.run_form(recipe)
        if not form.beside:
            raise UserError(f"--decoder {decoder} is not a run of an image decoder")
        model, other = lora.merged(model), form.source(cfg, _data(recipe, drawn))
        total += _save_of(form, recipe, reference)(folder / form.beside, model, other, writer)
    progress.close()
    lines, numbers = export.run_lines(values), export.last_numbers(workdir)
    write_card(folder, title, "", lines, licence, numbers)
    return total


def _data(recipe, values: Mapping):
    """The run's `recipe.Data`."""
    from metamorph_jax import config

    return config.build(recipe.Data, values.get("data") or {}, "config.data")


def _save_of(form, recipe, reference: bool):
    """What writes a run: `form.save`, or `form.reference` where that is asked for."""
    if reference and form.reference is None:
        raise UserError(f"{recipe.__name__} has no public form to write with --to reference")
    return form.reference if reference else form.save


def _load_run(workdir):
    """(recipe, its Config, model, saved config) of a finished run."""
    import jax

    from metamorph_jax import sharding
    from metamorph_jax.convert import load

    recipe, cfg, values = load.open_run(workdir)
    mesh = sharding.make_mesh(devices=jax.local_devices())
    return recipe, cfg, load.load_model(recipe, cfg, mesh, workdir=workdir), values


def convert_adapters(source: str, out: str) -> int:
    """Writes the adapters of a run for PEFT and returns the bytes of all tensors.

    Those of the part that the recipe names go into `out`, those of other parts into folders there.

    Raises:
        UserError: `source` is not a run, or it has no adapters.
    """
    from flax import nnx

    from metamorph_jax.convert import export, families, hf, peft
    from metamorph_jax.models import lora

    if not source.startswith(WORKDIR):
        raise UserError("--to peft goes with --from workdir:PATH")
    recipe, cfg, model, _ = _load_run(source.removeprefix(WORKDIR))
    form = families.run_form(recipe)
    base = form.base(cfg).removeprefix(hf.PREFIX)
    main, total = form.adapted, 0
    parts = {main if name.split(".")[: len(main)] == list(main) else (name.partition(".")[0],)
             for name, _ in lora.adapters(model)}  # fmt: skip
    if not parts:
        raise UserError(f"{source} was trained without adapters (config.model.lora)")
    modules = dict(nnx.iter_modules(model))
    with export.whole_or_nothing(out) as folder:
        for part in sorted(parts):
            where = folder if part == main else folder / ".".join(part)
            peft.export_peft(modules[part], where, base)
            total += (where / peft.WEIGHTS).stat().st_size
    return total


def write_card(folder, title: str, spec: str, lines, licence: str, numbers=None) -> None:
    """README.md of a written folder."""
    from metamorph_jax.convert import export

    name = f"`{pathlib.PurePath(spec).name}`" if spec else "a training run"
    (folder / "README.md").write_text(export.card(title, name, lines, licence, numbers))


def filled(family, cfg, tensors: Mapping, dtype: str):
    """A model of a family with these tensors, spread over all devices."""
    from metamorph_jax import sharding
    from metamorph_jax.convert import safetensors
    from metamorph_jax.models import build

    make = lambda rngs: family.create(cfg, rngs=rngs)  # noqa: E731
    model = build.outline(make, sharding.make_mesh(), safetensors.dtype_of(dtype))
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
    """The licence of the weights that a run started from; "" if unknown."""
    from metamorph_jax.convert import hf, packages

    if packages.is_package(spec):
        return packages.licence(spec)
    if spec.startswith(hf.PREFIX) or (spec and pathlib.Path(spec).is_dir()):
        return licence_of(hf.find(spec))
    return ""


def licence_of(folder: pathlib.Path) -> str:
    """The licence in the front matter of a folder's README.md; "" without one."""
    file = pathlib.Path(folder) / "README.md"
    if not file.is_file():
        return ""
    with files.opened(file) as card:
        start = card.read(2**16).decode(errors="replace")
    head = re.match(r"---\n(.*?)\n---", start, re.S)
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", head[1], re.M) if head else None
    return found[1] if found else ""


# ---- the list


def listing() -> Iterator[str]:
    """Families, their sizes, and the memory of weights and training state, line by line: the shapes
    of a large model take a second."""
    import jax
    from flax import nnx

    from metamorph_jax.convert.families import known

    line = "{:12}  {:20}  {:>15}  {:>7}  {:>7}  {:>9}".format
    yield line("family", "size", "parameters", "bf16", "fp32", "training")
    for family in known().values():
        for size, cfg in family.sizes.items():
            if size.endswith(("tiny", "small")):  # for tests: no such weights are published
                continue
            make = lambda f=family, c=cfg: f.create(c, rngs=nnx.Rngs(0))  # noqa: E731
            state = nnx.state(nnx.eval_shape(make), nnx.Param)
            n = sum(x.size for x in jax.tree.leaves(state))
            yield line(family.name, size, f"{n:,}", *(f"{n * e / GIB:,.2f}" for e in (2, 4, 16)))
    yield ""
    yield "Stable Diffusion is clip-text, sd-unet and sd-vae of one size; llava and metamorph are"
    yield "tower, connector, language model and head together."
    yield "bf16, fp32: GiB of the weights. training: GiB of weights, gradients and two moments in"
    yield "float32 if everything is trained, over all devices together and without activations,"
    yield "which `metamorph plan` computes, too."
