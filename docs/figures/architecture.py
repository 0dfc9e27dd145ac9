"""Draws docs/figures/architecture.png: how MetaMorph reads and draws, and which systems follow it.

python docs/figures/architecture.py
"""

import pathlib

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

FILE = pathlib.Path(__file__).with_suffix(".png")
WIDTH, HEIGHT = 140, 61  # units of the drawing

INK, DIM = "#1d1f21", "#5c6166"
FROZEN, TRAINED, DECODER = ("#e8eef6", "#4a74a8"), ("#fdebd6", "#c9772b"), ("#e4f2e9", "#3d8f63")
TEXT, VISUAL, LOSS = ("#ffffff", "#8b9197"), ("#f6b26b", "#c9772b"), ("#ffffff", "#b3382c")
BLUE, RED, PAPER = "#2f6fb5", "#c8322b", "#f2f5ea"

SLOT, FIRST = 4.6, 31  # width of a token, left edge of the sequence
SEQUENCE = ["<", *4 * [""], ">", "make", "it", "red", "Sure", "<", *4 * [""], ">"]
PREDICTED = {8: "Sure", 9: "<", 10: "", 11: "", 12: "", 13: "", 14: ">", 15: "eos"}
BRACKET = 48.3  # height of the line above the predicted tokens

ONE_SEQUENCE = """Text and images form one sequence. Where
an image is the answer, the model predicts
its next visual token, as it predicts words."""

SYSTEMS = (
    ("MetaMorph", "predicts visual tokens,\nthen diffusion", True),
    ("LLaVA", "reads images,\nanswers in text", False),
    ("MM-Interleaved", "image features inside\nLLM and UNet", False),
    ("MiniGPT-5", "generative vokens\n→ Stable Diffusion", False),
)


def box(axes, x, y, w, h, colors, title="", detail="", size=10, dashed=False):
    """A rounded box with its lower left corner at (x, y), a title and smaller text."""
    style = f"round,pad=0,rounding_size={min(w, h) * 0.16}"
    axes.add_patch(
        FancyBboxPatch((x, y), w, h, style, facecolor=colors[0], edgecolor=colors[1], linewidth=1.4,
                       linestyle=(0, (4, 2.5)) if dashed else "solid")
    )  # fmt: skip
    lines = detail.count("\n") + 1 if detail else 0
    middle = y + h / 2
    axes.text(x + w / 2, middle + 0.95 * lines, title, size=size, weight="bold", ha="center",
              va="center")  # fmt: skip
    if detail:
        axes.text(x + w / 2, middle - 1.15, detail, size=size - 2.2, color=DIM, ha="center",
                  va="center", linespacing=1.25)  # fmt: skip


def arrow(axes, *points, color=INK, dashed=False):
    """A line through the points, with a head at its end."""
    line = (0, (4, 2.5)) if dashed else "solid"
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), color=color, linewidth=1.3, linestyle=line,
                  solid_joinstyle="round")  # fmt: skip
    axes.add_patch(
        FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=10, color=color,
                        linewidth=1.3, linestyle=line, shrinkA=0, shrinkB=0)
    )  # fmt: skip


def token(axes, index, y, label, h=3.4):
    """The token in a slot of the sequence; a visual one has no label."""
    face, edge = TEXT if label else VISUAL
    x = FIRST + index * SLOT
    axes.add_patch(
        Rectangle((x + 0.25, y), SLOT - 0.5, h, facecolor=face, edgecolor=edge, linewidth=1.1)
    )
    axes.text(x + SLOT / 2, y + h / 2 - 0.1, label, size=8, ha="center", va="center")


def image(axes, x, y, side, color, label):
    """An image of a disc, with a label below it."""
    axes.add_patch(Rectangle((x, y), side, side, facecolor=PAPER, edgecolor=DIM, linewidth=1.1))
    axes.add_patch(Circle((x + 0.56 * side, y + 0.5 * side), 0.26 * side, color=color))
    axes.text(x + side / 2, y - 0.5, label, size=7.8, color=DIM, ha="center", va="top",
              linespacing=1.15)  # fmt: skip


def center(index):
    return FIRST + (index + 0.5) * SLOT


def bracket(axes, first, last):
    """A line above the predicted tokens first to last."""
    ends = FIRST + first * SLOT + 0.25, FIRST + (last + 1) * SLOT - 0.25
    axes.plot([ends[0], *ends, ends[1]], [BRACKET - 0.7, BRACKET, BRACKET, BRACKET - 0.7],
              color=INK, linewidth=1.1)  # fmt: skip


def draw_reading(axes):
    """The lower row: from images to embeddings."""
    image(axes, 1.5, 11.3, 8, BLUE, "image in the\nprompt")
    image(axes, 12, 11.3, 8, RED, "answer image\n(training)")
    y, h = 11, 8
    box(axes, 24, y, 17, h, FROZEN, "vision tower", "SigLIP so400m\n729 × 1152")
    box(axes, 45, y, 14.5, h, FROZEN, "reduce", "bilinear to\nP = 64 tokens")
    box(axes, 63.5, y, 11, h, FROZEN, "norm", "each token\nto length 1")
    box(axes, 78.5, y, 21, h, TRAINED, "connector", "MLP, 1152 → 4096\nthe width of the LLM")
    for start, end in ((20.6, 24), (41, 45), (59.5, 63.5), (74.5, 78.5)):
        arrow(axes, (start, y + h / 2), (end, y + h / 2))
    bend = 21.4
    arrow(axes, (89, y + h), (89, bend), (center(2.5), bend), (center(2.5), 23.7))
    arrow(axes, (89, bend), (center(12.5), bend), (center(12.5), 23.7))


def draw_model(axes):
    """The sequence, the language model and its two heads."""
    for index, label in enumerate(SEQUENCE):
        token(axes, index, 24, label)
    end = FIRST + len(SEQUENCE) * SLOT
    box(axes, FIRST, 29.6, end - FIRST, 6.2, TRAINED, "language model",
        "Llama 3.1 8B, causal over text and visual tokens alike", size=12)  # fmt: skip
    for index in range(len(SEQUENCE)):
        arrow(axes, (center(index), 27.4), (center(index), 29.6), color=DIM)
    for index, label in PREDICTED.items():
        arrow(axes, (center(index), 35.8), (center(index), 38), color=DIM)
        token(axes, index, 43.6, label)
        arrow(axes, (center(index), 41.4), (center(index), 43.6), color=DIM)
    for first, last, colors, name in (
        (8, 9, TRAINED, "text"),
        (10, 13, TRAINED, "visual head"),
        (14, 15, TRAINED, "text"),
    ):
        box(axes, FIRST + first * SLOT + 0.2, 38, (last - first + 1) * SLOT - 0.4, 3.4, colors,
            name, size=9)  # fmt: skip
    box(axes, 58.6, 50.4, 15.2, 5.2, LOSS, "text loss", "cross-entropy", size=9)
    bracket(axes, 8, 9)
    arrow(axes, (center(8.5), BRACKET), (center(8.5), 50.4), color=LOSS[1])
    box(axes, 75.2, 50.4, 17.2, 5.2, LOSS, "visual loss", "−cosine to true token", size=9)
    bracket(axes, 10, 13)
    arrow(axes, (center(11), BRACKET), (center(11), 50.4), color=LOSS[1])
    axes.text(FIRST, 42.2, ONE_SEQUENCE, size=8.6, color=DIM, va="center", linespacing=1.35)


def draw_drawing(axes):
    """The right column: from predicted visual tokens to pixels, and back into the sequence."""
    box(
        axes,
        115,
        46,
        23,
        9,
        DECODER,
        "diffusion decoder",
        "projector → UNet → VAE\n(Stable Diffusion)",
        10,
    )
    top, start, branch = 57.8, center(13.1), 108.2
    arrow(axes, (start, BRACKET), (start, top), (111.8, top), (111.8, 50.5), (115, 50.5))
    axes.text(start + 0.8, top + 0.5, "predicted visual tokens", size=8.4, color=DIM, va="bottom")
    image(axes, 120, 29, 13, RED, "drawn image")
    arrow(axes, (126.5, 46), (126.5, 42))
    arrow(axes, (branch, top), (branch, 15), (99.5, 15), dashed=True)
    axes.text(branch + 1, 19, "when generating, each predicted\nvisual token is fed back", size=8.4,
              color=DIM, va="center", linespacing=1.25)  # fmt: skip


def draw_legend(axes):
    axes.text(1.5, 58.3, "MetaMorph", size=15, weight="bold", va="center")
    axes.text(1.5, 55, "visual-predictive instruction tuning", size=9, color=DIM, va="center")
    entries = (
        (FROZEN, "frozen"),
        (TRAINED, "trained"),
        (DECODER, "trained separately"),
        (LOSS, "loss"),
        (TEXT, "text token"),
        (VISUAL, "visual token"),
    )
    for i, (colors, label) in enumerate(entries):
        y = 49.6 - 3.5 * i
        box(axes, 1.5, y, 3.6, 2.3, colors)
        axes.text(6.4, y + 1.1, label, size=8.5, va="center")


def draw_systems(axes):
    """The strip of systems that share all of this."""
    axes.axhline(6.6, color="#d5d8da", linewidth=1)
    axes.text(
        1.5, 3, "one code base,\nfour systems", size=9, weight="bold", va="center", linespacing=1.3
    )
    for i, (name, what, stands) in enumerate(SYSTEMS):
        x = 20 + 30 * i
        box(axes, x, 0.6, 28.5, 4.9, TRAINED if stands else TEXT, dashed=not stands)
        axes.text(x + 1.2, 3, name, size=9.3, weight="bold", va="center")
        axes.text(x + 27.6, 3, what, size=7.2, color=DIM, va="center", ha="right", linespacing=1.2)


def main():
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "text.color": INK}):
        figure = Figure((WIDTH / 11.2, HEIGHT / 11.2))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
        axes.axis("off")
        for draw in (draw_reading, draw_model, draw_drawing, draw_legend, draw_systems):
            draw(axes)
        figure.savefig(FILE, dpi=170)


if __name__ == "__main__":
    main()
