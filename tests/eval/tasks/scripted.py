"""A model that gives the replies of a test, and official files of one's own."""

import json
import pathlib

from metamorph_jax.errors import BadSample
from metamorph_jax.eval import bench, tasks
from metamorph_jax.sampling.results import Reply, TextPart


class Scripted:
    """Answers by the question's id; fails where an image is missing, as a generator does."""

    def __init__(self, replies: dict[str, str]):
        self.by_id, self.asked = replies, {}

    def replies(self, requests, options, failed, stream=None, draw=True):
        for request in requests:
            missing = [path for path in request.images if not pathlib.Path(path).is_file()]
            if missing:
                failed(request, BadSample("missing", missing[0]))
                continue
            self.asked[request.id] = request
            yield request, Reply((TextPart(self.by_id[request.id], ()),), True)


def run(spec, root, replies, out, judge=None, resamples=0, **options):
    """(result, model) of a task whose questions are answered by `replies`."""
    model = Scripted(replies)
    task = tasks.make(spec, root, **options)
    settings = bench.Settings(resamples=resamples, model={"model": "scripted"})
    of_folder = judge and (lambda folder: judge)
    result = bench.run_task(task, model, out, settings, of_folder)
    assert result.scores.keys() <= task.score_names()
    return result, model


def put(root: pathlib.Path, files: dict) -> pathlib.Path:
    """Writes files: path -> JSON value, list of them for .jsonl, text, or bytes."""
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif isinstance(value, str):
            path.write_text(value, encoding="utf-8")
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in value), encoding="utf-8")
        else:
            path.write_text(json.dumps(value), encoding="utf-8")
    return root


def official(result) -> list:
    """The values of the official answer files."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in result.files]
