"""What to do with a finished quick start: commands with the paths of the run."""

import pathlib
import shlex
import shutil
import sys

from metamorph_jax.quickstart.steps import configs_folder


def program() -> str:
    """How this environment's `metamorph` is called from this folder."""
    mine = pathlib.Path(sys.executable).with_name("metamorph")
    if not mine.is_file() or shutil.which("metamorph") == str(mine):
        return "metamorph"
    here = pathlib.Path.cwd()
    return shlex.quote(str(mine.relative_to(here) if mine.is_relative_to(here) else mine))


def following(workdir: pathlib.Path, size: str) -> dict[str, str]:
    """What one may want to do next -> the command.

    Args:
        workdir: of a finished quick start, as an absolute path.
        size: "quickstart" or "smoke".
    """
    images = sorted((workdir / "data/images/test").glob("*.png"))
    image = images[0] if images else "IMAGE"
    ask, decoder = f"--workdir={workdir / 'vpit'}", f"--decoder={workdir / 'decoder'}"
    config = f"{configs_folder() / 'vpit.py'}:{size}"
    commands = {
        "Ask about an image (put the path of your own in its place)": [
            "generate", ask, "--image", str(image), "--prompt", "What shape is in the image?",
        ],
        "Draw": [
            "generate", ask, decoder, "--prompt", "Please draw a blue circle.",
            f"--out={workdir / 'drawn'}",
        ],
        "Chat in the terminal": ["chat", ask, decoder],
        "The same in a browser (needs gradio)": ["demo", ask, decoder],
        "Check data of your own (docs/data.md has the format)": [
            "data", "check", "--data=mine.jsonl", "--data-root=IMAGES",
        ],
        "Go on training with it": [
            "train", f"--config={config}", f"--workdir={workdir / 'mine'}",
            f"--config.model.weights=workdir:{workdir / 'vpit'}", "--data=mine.jsonl",
            "--data-root=IMAGES",
        ],
    }  # fmt: skip
    return {what: f"{program()} {shlex.join(command)}" for what, command in commands.items()}
