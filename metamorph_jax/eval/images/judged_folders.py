"""GenEval and DPG-Bench of images that somebody drew already, in the official layouts."""

import contextlib
import pathlib
import tempfile

import numpy as np

from metamorph_jax.errors import BadSample, DataError
from metamorph_jax.eval.images import dpg, geneval
from metamorph_jax.eval.images.judging import ImageJudge


def score_geneval(folder: str, metadata: str, judge: ImageJudge) -> tuple[dict, list[dict], int]:
    """(scores from 0 to 1, lines of the result file, how many images had no answer).

    Args:
        folder: 00000/samples/0000.png and so on.
        metadata: evaluation_metadata.jsonl.

    Raises:
        FileError, DataError: the prompts can't be read, or the folder has no images of them.
    """
    rows = geneval.read_prompts(metadata)
    found = geneval.find_images(folder, rows)
    paths, own = [path for _, path in found], [rows[index] for index, _ in found]
    verdicts = geneval.judged(paths, own, judge)
    results = [
        geneval.result(path, row, right, checks)
        for path, row, (right, checks) in zip(paths, own, verdicts, strict=True)
        if right is not None
    ]
    return geneval.summary(results), results, len(paths) - len(results)


def score_dpg(
    folder: str, csv: str, judge: ImageJudge, samples: int = 4, mode: str = "strict"
) -> tuple[dict, list[str], int]:
    """(scores from 0 to 100, lines of the result file, how many prompts were left out because an
    image is bad or the judge had no answer).

    Args:
        folder: ITEM.png and so on, grids of four where `samples` is more than 1.
        csv: dpg_bench.csv.

    Raises:
        FileError, DataError: as `score_geneval`.
    """
    items = dpg.read_items(csv, mode)
    found = dpg.find_images(folder, items)
    prompts, lines, left = [], [], 0
    with tempfile.TemporaryDirectory() as where:
        pairs, shape = [], {}
        for name, path in found.items():
            with contextlib.suppress(BadSample):
                shape[name] = _write_crops(path, samples, pathlib.Path(where), name)
        left += len(found) - len(shape)
        for name, crops in shape.items():
            pairs += [(crop, q.text) for crop in crops for q in items[name].values()]
        if not pairs:
            raise DataError(f"no image in {folder} can be used")
        values = iter(judge(*map(list, zip(*pairs, strict=True))))
        for name, crops in shape.items():
            asked = [{id: float(next(values)) for id in items[name]} for _ in crops]
            if any(np.isnan(list(one.values())).any() for one in asked):
                left += 1
                continue
            said = [{id: v > dpg.THRESHOLD for id, v in one.items()} for one in asked]
            prompts.append(dpg.Judged(items[name], said))
            if (scores := dpg.image_scores(prompts[-1])) is not None:
                lines.append(dpg.result_line(found[name], scores))
    return dpg.summary(prompts, mode), lines, left


def _write_crops(path: str, samples: int, folder: pathlib.Path, name: str) -> list[str]:
    """The images of a grid as files."""
    out = []
    for k, image in enumerate(dpg.crops(path, samples)):
        out.append(str(folder / f"{name}-{k}.png"))
        image.save(out[-1])
    return out
