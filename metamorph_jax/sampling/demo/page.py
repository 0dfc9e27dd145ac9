"""The page of `metamorph demo`: Gradio components around an `Engine`.

    title
    model A | model B        one conversation each; a single one takes the whole width
    [ text and images ]  draw
    again  clear
    settings: temperature, guidance, seed, new tokens

It loads nothing from other hosts: system fonts, no analytics, and a policy in its header by which
the browser refuses what is not ours. Gradio is imported here only (extra `demo`).
"""

import html
import os

from metamorph_jax.errors import UserError
from metamorph_jax.sampling.demo.engine import Engine, Said, Settings, Turn

KINDS = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
CSS = """
.gradio-container, .gradio-container > main { width: 100% !important; }
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.4rem; margin: 0.4rem 0 0; }
#title p { margin: 0.2rem 0 0; opacity: 0.75; }
.talk { min-height: 16rem; }
.talk img { max-height: 22rem; }
button[aria-label="Share"], button[title="Share"] { display: none !important; }
footer { display: none !important; }
"""


def gradio():
    """The library, with its analytics off.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"metamorph demo needs {error.name}: pip install 'metamorph_jax[demo]'"
        ) from error
    return gradio


def build(engine: Engine, start: Settings):
    """The page, a `gradio.Blocks`, with these settings at first."""
    gr = gradio()
    names = list(engine.models)
    with gr.Blocks(title="metamorph demo", analytics_enabled=False) as page:
        gr.Markdown(f"# {' and '.join(names)}\n{_about(engine)}", elem_id="title")
        history = gr.State([])
        with gr.Row():
            talks = [_talk(gr, name) for name in names]
        box = gr.MultimodalTextbox(
            file_count="multiple", file_types=KINDS, sources=["upload"], show_label=False,
            placeholder="Your turn, with images if you like", autofocus=True, max_lines=8,
        )  # fmt: skip
        with gr.Row(equal_height=True):
            draw = gr.Checkbox(
                label="Draw: the reply begins with an image", visible=engine.draws, min_width=240
            )
            again = gr.Button("Answer again", size="sm", min_width=120)
            clear = gr.Button("Clear", size="sm", min_width=120)
        with gr.Accordion("Settings", open=False):
            settings = _fields(gr, engine, start)
        _wire(gr, engine, page, history, talks, box, draw, again, clear, settings)
    return page


def _talk(gr, name: str):
    """The conversation with one model."""
    return gr.Chatbot(
        label=name, height="56vh", render_markdown=False, buttons=["copy"], feedback_options=None,
        elem_classes="talk", placeholder="Ask something.", min_width=320,
    )  # fmt: skip


def _fields(gr, engine: Engine, start: Settings) -> list:
    """The fields of `_settings`, in its order."""
    guidance = engine.guidance()
    with gr.Row():
        temperature = gr.Slider(
            0, 2, start.temperature, step=0.1, label="Temperature", min_width=220,
            info="0 takes the likeliest token; a new value compiles first",
        )  # fmt: skip
        tokens = gr.Slider(
            1, engine.longest, min(start.max_new_tokens, engine.longest), step=1,
            label="New tokens", info="visual tokens count", min_width=220,
        )  # fmt: skip
    with gr.Row():
        seed = gr.Number(
            start.seed, label="Seed", precision=0, minimum=0, maximum=2**31 - 1,
            info="of chance in text and drawings", min_width=220,
        )  # fmt: skip
        scale = gr.Number(
            start.guidance if start.guidance is not None else guidance,
            label="Guidance", info="how strictly drawings follow the visual tokens",
            visible=guidance is not None, min_width=220,
        )  # fmt: skip
    return [temperature, scale, seed, tokens]


def _wire(gr, engine: Engine, page, history, talks, box, draw, again, clear, settings) -> None:
    """Says what happens when something on the page is used."""
    events, shown = _Events(gr, engine), [box, history, *talks]

    # Gradio fills in what is annotated with its Request.
    def ask(said, draw, history, temperature, scale, seed, tokens, who: gr.Request):
        chosen = _settings(temperature, scale, seed, tokens)
        yield from events.ask(who.session_hash, said, draw, history, chosen)

    def answer_again(history, temperature, scale, seed, tokens, who: gr.Request):
        chosen = _settings(temperature, scale, seed, tokens)
        yield from events.again(who.session_hash, history, chosen)

    def forget(who: gr.Request):
        return events.clear(who.session_hash)

    def leave(who: gr.Request):
        engine.clear(who.session_hash)

    one = dict(concurrency_id="model", concurrency_limit=1, api_visibility="private")
    box.submit(ask, [box, draw, history, *settings], shown, **one)
    again.click(answer_again, [history, *settings], shown, **one)
    clear.click(forget, None, shown, **one)
    for talk in talks:  # their own bins
        talk.clear(forget, None, shown, **one)
    page.unload(leave)


def _about(engine: Engine) -> str:
    limits = engine.limits
    return (f"Up to {limits.images} images a turn, each up to {limits.megabytes} MB and "
            f"{limits.pixels / 1e6:g} megapixels.")  # fmt: skip


class _Events:
    """What happens when something on the page is used.

    The history of a visitor is a list of (messages of the user, messages of each model).
    """

    def __init__(self, gr, engine: Engine):
        self._gr, self._engine = gr, engine

    def ask(self, visitor: str, said, draw, history, settings: Settings):
        files = tuple(said.get("files") or ())
        text = said.get("text") or ""
        if not text.strip() and not files:
            yield self._page(history, locked=False)
            return
        mine = [_message("user", self._shown(file)) for file in files]
        mine += [_message("user", _literal(text))] if text.strip() else []
        replies = self._engine.ask(visitor, Turn(text, files, bool(draw)), settings)
        yield from self._follow([*history, (mine, [])], replies)

    def again(self, visitor: str, history, settings: Settings):
        if not history:
            yield self._page(history, locked=False)
            return
        yield from self._follow(history, self._engine.again(visitor, settings))

    def clear(self, visitor: str):
        self._engine.clear(visitor)
        return self._page([], locked=False)

    def _follow(self, history, replies):
        """The page again and again while the last turn is answered."""
        *before, (mine, _) = history
        waiting = [[_message("assistant", "…")] for _ in self._engine.models]
        yield self._page([*before, (mine, waiting)], locked=True)
        answers = waiting
        for said in replies:
            answers = [self._messages(one) or wait for one, wait in zip(said, waiting, strict=True)]
            yield self._page([*before, (mine, answers)], locked=True)
        empty = [_message("assistant", "[an empty reply]")]
        answers = [empty if one in waiting else one for one in answers]
        yield self._page([*before, (mine, answers)], locked=False)

    def _messages(self, said: Said) -> list[dict]:
        parts = [_literal(part) if isinstance(part, str) else self._image(part)
                 for part in said.parts if not isinstance(part, str) or part.strip()]  # fmt: skip
        notes = [f"⚠ {_literal(said.note)}"] if said.note else []
        return [_message("assistant", content) for content in (*parts, *notes)]

    def _shown(self, file: str):
        """An uploaded image, or the name of one that can't be read."""
        readable = self._engine.can_read(file)
        return self._image(file) if readable else f"[{_literal(os.path.basename(file))}]"

    def _image(self, value):
        return self._gr.Image(value, format="png", show_label=False, buttons=["fullscreen"])

    def _page(self, history, locked: bool) -> list:
        """Values of the text box, the history and each conversation."""
        box = self._gr.MultimodalTextbox(value=None, interactive=not locked)
        talks = [
            [message for mine, theirs in history for message in (*mine, *theirs[k])]
            for k in range(len(self._engine.models))
        ]
        return [box, history, *talks]


def _message(role: str, content) -> dict:
    return {"role": role, "content": content}


def _literal(text: str) -> str:
    """Text that the page shows as it is: what looks like a tag is not one."""
    return html.escape(text, quote=False)


def _settings(temperature, scale, seed, tokens) -> Settings:
    return Settings(float(temperature or 0), None if scale is None else float(scale),
                    int(seed or 0), int(tokens or 1))  # fmt: skip


def serve(page, host: str, port: int | None, megabytes: int, wait: bool = True):
    """Serves the page until it is interrupted; returns (its app, its address).

    Raises:
        UserError: the port is taken.
    """
    gr = gradio()
    from starlette.middleware import Middleware

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        app, address, _ = page.queue(max_size=32).launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            max_file_size=f"{megabytes}mb", show_error=False, ssr_mode=False, footer_links=[],
            enable_monitoring=False, theme=theme, css=CSS,
            app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
        )  # fmt: skip
    except OSError as error:
        where = f"port {port}" if port is not None else "a port from 7860 on"
        raise UserError(f"{where} of {host} can't be had: give another --port or --host") from error
    if wait:
        print(f"demo: {address}  (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return app, address


class OwnHostOnly:
    """ASGI middleware: tells the browser to load nothing from other hosts."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)
