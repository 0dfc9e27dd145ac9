"""`metamorph chat`: a conversation in the terminal with a model that is loaded once.

    metamorph chat --workdir RUN
    metamorph chat --workdir RUN --decoder RUN2 --out drawings
    printf '/image cat.jpg\\nWhat is this?\\nDraw it at night.\\n' | metamorph chat --workdir RUN

Each line is a turn; the model sees all turns before it. Lines that begin with "/" are commands:

    /image PATH   the next turn has this image: where it says <image>, else before it
    /video PATH   likewise, one frame a second
    /draw TEXT    a turn whose reply begins with an image
    /reset        forget the conversation
    /quit         end (so does the end of the input)
    //…           a turn that begins with "/"

Images that the model draws are written to `--out` and named on a line of their own.
"""

import pathlib
import sys
from collections.abc import Iterator

from metamorph_jax.errors import UserError
from metamorph_jax.files import shown
from metamorph_jax.sampling import generate
from metamorph_jax.sampling.requests import FAULTS, Request, checked
from metamorph_jax.sampling.results import Reply, Stream, describe, write_arrays

LONGEST_LINE = 2**23  # bytes


def add_arguments(parser) -> None:
    parser.description = "A conversation with a model, which is loaded once."
    generate.add_model_arguments(parser)
    generate.add_decoding_arguments(parser)
    parser.add_argument(
        "--out", metavar="DIR", default="chat",
        help="where drawn images go (default: chat); made when the first one is drawn",
    )  # fmt: skip


def run(args) -> int:
    import jax

    generate.check_model(args)
    options = generate.decoding_options(args, 1)
    out = pathlib.Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {shown(args.out)} is not a folder")
    if jax.process_count() > 1:
        raise UserError("chat runs on one host: its terminal is that of one process")
    generator = generate.load(args)
    session = Session(generator, options, out)
    for line in typed_lines():
        if not session.take(line):
            break
    if session.failed and not sys.stdin.isatty():
        raise UserError(f"{session.failed} lines were not answered, for the reasons above")
    return 0


def typed_lines() -> Iterator[str]:
    """Lines of standard input; on a terminal with a prompt and editing.

    What is not UTF-8 keeps its bytes as surrogates, which `checked` refuses.
    """
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401  (gives `input` its editing and history)
        except ImportError:
            pass
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
    source = getattr(sys.stdin, "buffer", None)
    while True:
        line = sys.stdin.readline(LONGEST_LINE) if source is None else source.readline(LONGEST_LINE)
        if not line:
            return
        yield line if source is None else line.decode("utf-8-sig", "surrogateescape")


class Session:
    """What was typed so far.

    Attributes:
        failed: lines that could not be answered.
    """

    def __init__(self, generator, options, out: pathlib.Path):
        from metamorph_jax.sampling.conversation import Conversation

        self._begin = lambda: Conversation(generator, options)
        self._generator, self._out = generator, out
        self._conversation, self._images, self._video = self._begin(), [], ""
        self._replies, self.failed = 0, 0

    def take(self, line: str) -> bool:
        """Answers a line or does what it says; False when it says to stop."""
        line = line.rstrip("\r\n")
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.partition(" ")
            return self._command(name, rest.strip())
        if line.strip():
            self._answer(line[1:] if line.startswith("//") else line)
        return True

    def _command(self, name: str, rest: str) -> bool:
        if name == "/quit":
            return False
        if name == "/draw" and rest:
            self._answer(rest, draw=True)
            return True
        if name == "/reset":
            self._conversation, self._images, self._video = self._begin(), [], ""
        elif name in ("/image", "/video"):
            self._attach(name, rest)
        elif name == "/draw":
            self._complain("/draw needs a text: what is to be drawn")
        else:
            self._complain(
                f"no command {shown(name, 60)}; there are /image PATH, /video PATH, "
                "/draw TEXT, /reset and /quit, and // begins a turn with a slash"
            )
        return True

    def _attach(self, name: str, path: str) -> None:
        """Notes a file for the next turn, if it can be read."""
        from metamorph_jax.data import images
        from metamorph_jax.sampling.requests import as_sample

        path = str(pathlib.Path(path).expanduser()) if path else ""
        if not path:
            return self._complain(f"{name} needs the path of a file")
        kind = {"images": (path,)} if name == "/image" else {"video": path}
        try:
            images.sizes(as_sample(Request("0", "", **kind)).images)
        except FAULTS as error:
            return self._complain(shown(error, 1000))
        if name == "/image":
            self._images.append(path)
        else:
            self._video = path

    def _answer(self, text: str, draw: bool = False) -> None:
        stream = Stream(self._generator)
        try:
            request = checked(Request("0", text, tuple(self._images), self._video))
            reply = self._conversation.say(request, stream, draw)
        except KeyboardInterrupt:
            self._conversation = self._begin()
            return self._complain("stopped; the conversation begins anew")
        except FAULTS as error:
            why = shown(error, 1000)
            full = self._conversation.turns and "has room" in why
            return self._complain(f"{why}; /reset begins anew" if full else why)
        stream.end()
        self._images, self._video = [], ""
        self._keep(reply)

    def _keep(self, reply: Reply) -> None:
        """Writes the drawn images of a reply and names them."""
        drawn = any(part.drawn for part in reply.image_parts)
        if reply.image_parts and not drawn:
            whole = any(part.complete for part in reply.image_parts)
            why = "there is no --decoder" if whole else "--max-new-tokens cut it off"
            print(f"[nothing was drawn: {why}]", flush=True)
        if not drawn:
            return
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            self._replies += 1
            while any(self._out.glob(f"reply{self._replies}_*")):  # of an earlier conversation
                self._replies += 1
            _, arrays = describe(reply, f"reply{self._replies}")
            for file in write_arrays(self._out, arrays):
                if file.suffix == ".png":
                    print(f"[{shown(file)}]", flush=True)
        except OSError as error:
            self._complain(f"{shown(self._out)} can't be written: {error.strerror}")

    def _complain(self, message: str) -> None:
        self.failed += 1
        print(message, file=sys.stderr, flush=True)
