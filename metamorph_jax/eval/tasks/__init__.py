"""The tasks by name, and how they are asked for: NAME or NAME:OPTION=VALUE,…

    make("pope", root)
    make("seed:form=choose,kind=image", root)
    make("package.module:Class", root)

The files of a task are in BENCH_ROOT/NAME (the part before the colon), see `docs/evaluation.md`.
"""

import dataclasses
import difflib
import pathlib
import re

from metamorph_jax import options
from metamorph_jax.config import find_class
from metamorph_jax.errors import ConfigError
from metamorph_jax.eval.tasks.base import Task
from metamorph_jax.files import shown

_HERE = "metamorph_jax.eval.tasks"
# Name -> module:Class; names in lower case. The folder under the bench root has the same name.
TASKS = {
    "ade20k": f"{_HERE}.segmentation_drawing:Ade20k",
    "cc3m": f"{_HERE}.cc3m:CC3M",
    "chartqa": f"{_HERE}.chartqa:ChartQA",
    "coco30k": f"{_HERE}.coco_drawing:Coco30k",
    "coco30k_rows": f"{_HERE}.coco_drawing:Coco30kRows",
    "coco_caption": f"{_HERE}.captions:CocoCaption",
    "dpg": f"{_HERE}.judged_drawing:Dpg",
    "easy_vqa": f"{_HERE}.easy_vqa:EasyVQA",
    "flickr30k": f"{_HERE}.captions:Flickr30k",
    "flintstones": f"{_HERE}.stories:Flintstones",
    "geneval": f"{_HERE}.judged_drawing:GenEval",
    "gqa": f"{_HERE}.gqa:GQA",
    "image2paragraph": f"{_HERE}.captions:Image2Paragraph",
    "interleaved": f"{_HERE}.interleaved:Interleaved",
    "llava_bench_coco": f"{_HERE}.llava_bench:LLaVABenchCOCO",
    "llava_bench_wild": f"{_HERE}.llava_bench:LLaVABenchWild",
    "lncoco": f"{_HERE}.coco_drawing:LnCoco",
    "made_images": f"{_HERE}.made_images:MadeImages",
    "mmbench": f"{_HERE}.mmbench:MMBench",
    "mmdialog": f"{_HERE}.mmdialog:MMDialog",
    "mme": f"{_HERE}.mme:MME",
    "mmmu": f"{_HERE}.mmmu:MMMU",
    "mmvet": f"{_HERE}.mmvet:MMVet",
    "mmvp": f"{_HERE}.mmvp:MMVP",
    "mvbench": f"{_HERE}.mvbench:MVBench",
    "nocaps": f"{_HERE}.captions:NoCaps",
    "okvqa": f"{_HERE}.vqa:OKVQA",
    "pope": f"{_HERE}.pope:Pope",
    "pororo": f"{_HERE}.stories:Pororo",
    "realworldqa": f"{_HERE}.realworldqa:RealWorldQA",
    "refcoco": f"{_HERE}.refcoco:RefCOCO",
    "refcoco+": f"{_HERE}.refcoco:RefCOCOPlus",
    "refcocog": f"{_HERE}.refcoco:RefCOCOg",
    "scienceqa": f"{_HERE}.scienceqa:ScienceQA",
    "seed": f"{_HERE}.seed:Seed",
    "textvqa": f"{_HERE}.vqa:TextVQA",
    "visdial": f"{_HERE}.visdial:VisDial",
    "vist": f"{_HERE}.stories:Vist",
    "vist_narration": f"{_HERE}.narration:Narration",
    "vizwiz": f"{_HERE}.vqa:VizWiz",
    "vqav2": f"{_HERE}.vqa:VQAv2",
    "vstar": f"{_HERE}.vstar:VStar",
}


def make(spec: str, bench_root: str | pathlib.Path = "", **given) -> Task:
    """The task that a text names.

    Args:
        spec: see the module docstring.
        bench_root: folder with a folder for each task.
        given: further options; `root` replaces the folder of this task.

    Raises:
        ConfigError: there is no such task or option, or a value is of the wrong kind.
    """
    cls, name, texts = _split(spec)
    known = {field.name for field in dataclasses.fields(cls)} - {"name"}
    unknown = (texts.keys() | given.keys()) - known
    if unknown:
        raise ConfigError(
            f"task {shown(spec)}: no option {shown(', '.join(sorted(unknown)))}; it has "
            + ", ".join(sorted(known))
        )
    start = {"root": str(pathlib.Path(bench_root, name)), **given, "name": spec}
    protocol = texts.get("protocol", given.get("protocol", ""))
    if protocol and protocol not in cls.protocols:
        raise ConfigError(f"task {shown(spec)}: protocol={shown(protocol)}, expected one of "
                          + ", ".join(cls.protocols))  # fmt: skip
    start = {**(cls.protocols[protocol].options if protocol else {}), **start}
    values = options.complete(cls, start, f"task {name}")
    return cls(**options.change(cls, values, texts, f"task {name}"))


def _split(spec: str) -> tuple[type[Task], str, dict[str, str]]:
    """(class, short name, option -> text) of a task as it is asked for."""
    name, _, rest = spec.partition(":")
    if name in TASKS:
        address = TASKS[name]
    else:
        attribute, _, rest = rest.partition(":")
        if "." not in name or not attribute:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"no task {shown(name)!r}{hint or '.'} Tasks: {', '.join(sorted(TASKS))}; or "
                "package.module:Class"
            )
        address, name = f"{name}:{attribute}", attribute.lower()
    texts = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"task {shown(spec)}: expected OPTION=VALUE, not {shown(part)!r}")
        texts[key.strip()] = value
    return find(address), name, texts


def find(address: str) -> type[Task]:
    """The class "package.module:Class".

    Raises:
        ConfigError: there is none.
    """
    found = find_class(address, "task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"{shown(address)} is not a task (a subclass of {_HERE}.base.Task)")
    return found


def file_name(spec: str) -> str:
    """A task as a folder's name: "seed:form=choose" -> "seed-form=choose"."""
    return re.sub(r"[^A-Za-z0-9_=.,-]", "-", spec)
