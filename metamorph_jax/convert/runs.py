"""Finished training runs, written as their recipe says (`families.RunForm`)."""

import pathlib
from collections.abc import Mapping

import jax
from flax import nnx

from metamorph_jax import config, sharding
from metamorph_jax.convert import export, families, hf, load, peft
from metamorph_jax.convert.card import licence_of_spec, write_card
from metamorph_jax.convert.progress import Progress, bytes_of
from metamorph_jax.errors import UserError
from metamorph_jax.models import lora


def write(workdir, folder, to: str, dtype: str, most: int, decoder=None, title: str = "") -> int:
    """A finished run as its recipe writes it, and its image decoder in decoder/.

    Args:
        workdir: of the run.
        folder: to write into.
        to: "hf", "reference" or "connector", see `families.RunForm`.
        dtype: "same" (float32) or a key of `export.DTYPES`.
        most: bytes of a file.
        decoder: workdir of the run of its image decoder, or None.
        title: of the card.

    Returns:
        Bytes of all tensors.
    """
    kind = export.DTYPES["f32" if dtype == "same" else dtype]
    recipe, cfg, model, values = _load(workdir)
    print(f"workdir:{workdir}: recipe {values['recipe']}; writing {kind}", flush=True)
    form = families.run_form(recipe)
    model = model if to == "reference" and form.keeps_adapters else lora.merged(model)
    source, licence = form.source(cfg, _data(recipe, values)), licence_of_spec(form.base(cfg))
    progress = Progress("writing", bytes_of(model))
    writer = export.Writer(kind, most, progress)
    total = _save_of(form, recipe, to)(folder, model, source, writer)
    if decoder:
        recipe, cfg, model, drawn = _load(decoder)
        form = families.run_form(recipe)
        if not form.beside:
            raise UserError(f"--decoder {decoder} is not a run of an image decoder")
        model, other = lora.merged(model), form.source(cfg, _data(recipe, drawn))
        total += _save_of(form, recipe, to)(folder / form.beside, model, other, writer)
    progress.close()
    lines, numbers = export.run_lines(values), export.last_numbers(workdir)
    write_card(folder, title, "", lines, licence, numbers)
    return total


def write_adapters(workdir: str, out: str) -> int:
    """Writes the adapters of a run for PEFT and returns the bytes of all tensors.

    Those of the part that the recipe names go into `out`, those of other parts into folders there;
    what the recipe has to add to them comes beside (`RunForm.beside_adapters`).

    Raises:
        UserError: the run has no adapters.
    """
    recipe, cfg, model, values = _load(workdir)
    form = families.run_form(recipe)
    base = form.base(cfg).removeprefix(hf.PREFIX)
    main, total = form.adapted, 0
    parts = {main if name.split(".")[: len(main)] == list(main) else (name.partition(".")[0],)
             for name, _ in lora.adapters(model)}  # fmt: skip
    if not parts:
        raise UserError(f"workdir:{workdir} was trained without adapters (config.model.lora)")
    modules = dict(nnx.iter_modules(model))
    with export.whole_or_nothing(out) as folder:
        for part in sorted(parts):
            where = folder if part == main else folder / ".".join(part)
            peft.export_peft(modules[part], where, base)
            total += (where / peft.WEIGHTS).stat().st_size
        if form.beside_adapters is not None:
            total += form.beside_adapters(folder, model, form.source(cfg, _data(recipe, values)))
    return total


def _data(recipe, values: Mapping):
    """The run's `recipe.Data`."""
    return config.build(recipe.Data, values.get("data") or {}, "config.data")


def _save_of(form: families.RunForm, recipe, to: str):
    """What writes a run in the form that `--to` names."""
    found = {"hf": form.save, "reference": form.reference, "connector": form.connector}[to]
    if found is None:
        what = {"reference": "no public form", "connector": "no connector"}[to]
        raise UserError(f"{recipe.__name__} has {what} to write with --to {to}")
    return found


def _load(workdir: str | pathlib.Path):
    """(recipe, its Config, model, saved config) of a finished run."""
    recipe, cfg, values = load.open_run(workdir)
    mesh = sharding.make_mesh(devices=jax.local_devices())
    return recipe, cfg, load.load_model(recipe, cfg, mesh, workdir=workdir), values
