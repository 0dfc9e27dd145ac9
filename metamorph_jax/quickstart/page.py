"""The quick start's report: collects what was measured for `eval/report.py`."""

import json
import pathlib

import numpy as np

from metamorph_jax.eval import report
from metamorph_jax.eval.scorers import short_answers
from metamorph_jax.quickstart import best_of
from metamorph_jax.quickstart import data as qdata
from metamorph_jax.train.metrics_file import read_metrics
from metamorph_jax.train.workdir import versions

EXAMPLES = 24
TEXT_LOSSES = ["text_loss/vqa", "text_loss/main"]

LEAD = (
    "A small pretrained language model that had never seen an image was taught, on this machine, "
    "to answer questions about images and to predict the visual tokens of images it is asked "
    "for (visual-predictive instruction tuning). A diffusion decoder turns those tokens into "
    "pixels. Everything below is measured on held-out images, questions and wordings."
)
SMOKE = (
    "Smoke size: every stage ran for a few steps with tiny random models, to see that all of it "
    "works on this machine. Nothing was taught, so the answers are noise, the drawings are grey "
    "squares, and the goals, which belong to the full size, are not shown. `metamorph quickstart` "
    "without --smoke trains the real models."
)
NOTES = [
    "The probe and the classifier are trained on real training images only; they take no part in "
    "training the model.",
    "A dashed line of the visual loss is the score of always predicting the mean token: the "
    "features of one tower share a large mean.",
    "The held-out curves are measured during training on a few questions of the split that the "
    "final score is measured on. Nothing in training depends on them.",
]


def make_report(
    workdir: pathlib.Path, data: qdata.QuickstartData, timings, facts, goals, commands
):  # fmt: skip
    """Writes workdir/report.html and returns its path.

    Args:
        timings: step -> seconds.
        facts: what was run, name -> value.
        goals: name -> number to reach; {} at smoke size, whose page claims nothing.
        commands: what one may do next -> how.
    """
    result = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    arrays = np.load(workdir / "evaluation" / "drawings.npz")
    return report.write_report(
        workdir / "report.html",
        report.Report(
            title=f"metamorph_jax quick start{'' if goals else ', smoke size'}",
            lead=LEAD if goals else SMOKE,
            targets=targets(result, timings, goals) if goals else [],
            curves=curves(workdir, facts["vision head"]),
            scores=[short_answers.TypeScore(**s) for s in result["scores"]],
            examples=examples(data, result["questions"]),
            drawings=drawings(data, result["drawings"], arrays["drawings"]),
            more={"Best of N": best_of.blocks(result["best_of"])} if result["best_of"] else {},
            judges=result["judges"],
            timings=timings,
            facts=facts | result["settings"] | versions(),
            notes=[*NOTES, spread(result)] if goals else [],
            commands=commands,
        ),
    )


def targets(result: dict, timings, goals) -> list[report.Target]:
    """What was measured beside what was to be reached; arguments as of `make_report`."""
    minutes, real = sum(timings.values()) / 60, result["real"]
    return [
        report.Target("Held-out questions answered right", result["accuracy"], goals["accuracy"]),
        report.Target(
            "Generated visual tokens of the right colour and shape (probe)",
            result["tokens_right"],
            goals["tokens_right"],
            note="24 requests" + (", 8 samples each" if result["best_of"] else ""),
        ),
        report.Target(
            "Drawings of the right colour and shape (classifier)",
            result["drawings_right"],
            goals["drawings_right"],
            note="24 requests, two drawings each, none picked",
        ),
        report.Target(
            "Of these, pairs of colour and shape that training never drew",
            result["held_out_right"],
            goals["held_out_right"],
            note="4 requests, two drawings each",
        ),
        report.Target(
            "Overlap of the drawn shape with the circle, rectangle or triangle that fits it best",
            result["overlap"],
            goals["overlap"],
            note=f"IoU, median of all drawings; real images: {100 * real['overlap']:.1f} %",
        ),
        report.Target(
            "Drawings with exactly one connected shape",
            result["one_shape"],
            goals["one_shape"],
            note=f"real images: {100 * real['one_shape']:.1f} %",
        ),
        report.Target("Time without downloads", minutes, goals["minutes"], "min", at_most=True),
    ]


def spread(result: dict) -> str:
    """How much the places and sizes of what was drawn vary, in words."""
    real = result["real"]
    return (
        "A request says nothing of place and size. The centres of the drawn shapes have a standard "
        f"deviation of {result['place_spread']:.1f} pixels ({real['place_spread']:.1f} in real "
        f"images), their sizes one of {result['size_spread']:.1f} ({real['size_spread']:.1f})."
    )


def curves(workdir: pathlib.Path, head: str) -> list[report.Curve]:
    """Loss curves of the three stages, and the evaluations during training."""
    out = []
    visual = ("minus cosine", ["visual_loss", "visual_cosine_floor"])
    if head == "flow":
        visual = ("error of the predicted velocity", ["visual_loss"])
    for stage, title, names in (
        ("connector", "Connector: text loss of the answers", ["text_loss"]),
        ("vpit", "VPiT: text loss (vqa: questions, main: requests)", TEXT_LOSSES),
        ("vpit", "VPiT: text loss of held-out questions", ["evals.heldout.text_loss"]),
        ("vpit", "VPiT: held-out answer tokens predicted right", ["evals.heldout.text_accuracy"]),
        ("vpit", f"VPiT: visual loss ({visual[0]})", visual[1]),
        ("decoder", "Decoder: error of the predicted velocity", ["mse"]),
    ):
        values = read_metrics(workdir / stage / "metrics.jsonl")
        lines = {name: values[name] for name in names if name in values}
        marks = {}
        if "visual_cosine_floor" in lines:
            floor = lines.pop("visual_cosine_floor")[1]
            marks["predicting the mean"] = -float(np.mean(floor))
        if lines:
            out.append(report.Curve(title, lines, marks))
    return out


def examples(data: qdata.QuickstartData, rows: list[dict]) -> list[report.Example]:
    """Every n-th of the questions that were asked, `EXAMPLES` of them."""
    from PIL import Image

    chosen = rows[:: max(len(rows) // EXAMPLES, 1)][:EXAMPLES]
    return [
        report.Example(
            np.asarray(Image.open(data.images / r["image"]).convert("RGB")),
            r["question"],
            r["answer"],
            r["predicted"],
            short_answers.is_right(r["predicted"], r["answer"]),
        )
        for r in chosen
    ]


def drawings(data: qdata.QuickstartData, requests: list[dict], drawn) -> list[report.Drawing]:
    """Every request, with a real held-out image of what was asked for."""
    _, pixels, color, shape = qdata.labelled_images(data, "test")
    out = []
    for request, images in zip(requests, drawn, strict=True):
        same = (color == qdata.COLORS.index(request["color"])) & (
            shape == qdata.SHAPES.index(request["shape"])
        )
        real = pixels[np.argmax(same)] if same.any() else None
        label = f"{request['color']} {request['shape']}"
        out.append(
            report.Drawing(
                request["prompt"], label, list(images), request["seen"], request["right"],
                real, request["tokens_right"],
            )
        )  # fmt: skip
    return out
