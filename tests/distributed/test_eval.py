"""A task on two processes: one store, the same answers on both, and a resume that both know of."""

import json
import multiprocessing
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.eval import toy  # noqa: E402
from tests.train.forked import free_port  # noqa: E402

pytestmark = pytest.mark.e2e
ROWS = [{"id": str(k), "colour": c, "image": f"{k}.png"}
        for k, c in enumerate(("red", "green", "blue", "red"))]  # fmt: skip


def host(number: int, port: int, root: str, out: str) -> None:
    """One of the two: writes what it asked and found to OUT/NUMBER.json."""
    from metamorph_jax import distributed
    from metamorph_jax.eval import bench, tasks
    from metamorph_jax.eval.bench import Settings

    place = distributed.Place(f"localhost:{port}", 2, number)
    distributed.join(place, say=lambda text: None)
    task, model = tasks.make("tests.eval.toy:Colours", root=root), toy.Model()
    result = bench.run_task(task, model, out, Settings(resamples=10))
    found = {"asked": sorted(model.asked), "scores": result.scores, "files": len(result.files)}
    pathlib.Path(out, f"{number}.json").write_text(json.dumps(found))


def test_two_hosts(tmp_path):
    root, out = toy.write_questions(tmp_path / "q", ROWS), tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    answers = out / "tests.eval.toy-Colours" / "answers.jsonl"
    for asked in (["0", "1", "2", "3"], ["1", "2", "3"]):
        port = free_port()
        hosts = [
            context.Process(target=host, args=(k, port, root, str(out)), daemon=True)
            for k in range(2)
        ]
        for one in hosts:
            one.start()
        for one in hosts:
            one.join(300)
            assert one.exitcode == 0
        found = [json.loads((out / f"{k}.json").read_text()) for k in range(2)]
        assert [one["asked"] for one in found] == [asked, asked]
        assert found[0]["scores"] == found[1]["scores"] == {
            "pairs": 100.0, "accuracy": 100.0, "plain": 100.0
        }  # fmt: skip
        assert [one["files"] for one in found] == [1, 0]
        kept = answers.read_text().splitlines(keepends=True)
        assert len(kept) == 4  # those of the first host alone
        keep = [line for line in kept if json.loads(line)["id"] == "0"]
        answers.write_text("".join(keep))
