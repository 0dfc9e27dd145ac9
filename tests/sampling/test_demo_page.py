"""The demo's page, served: what a browser gets and what events answer.

Needs gradio, which the test environment lacks since it asks for an older Pillow:

    pip install 'metamorph_jax[demo]' && pytest tests/sampling/test_demo_page.py
"""

import builtins
import os

import pytest

from metamorph_jax.errors import UserError
from metamorph_jax.sampling.demo import page
from metamorph_jax.sampling.demo.engine import Engine, Settings
from metamorph_jax.sampling.options import Options

SKIPPED = "needs gradio: pip install 'metamorph_jax[demo]' in an environment of its own"


def test_a_missing_gradio_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs gradio: pip install 'metamorph_jax\[demo\]'"):
        page.gradio()


@pytest.fixture(scope="module")
def engine(generator):
    return Engine({"one": generator, "two": generator}, Options(min_new_tokens=4))


def test_events_build_the_page_step_by_step(engine, image_files):
    gr = pytest.importorskip("gradio", reason=SKIPPED)
    events = page._Events(gr, engine)
    settings = Settings(max_new_tokens=4)
    image, broken = (str(image_files / name) for name in ("a.png", "c.png"))
    said = {"text": "Is <b>this</b> it?", "files": [image]}
    steps = list(events.ask("me", said, False, [], settings))
    boxes, histories, *talks = zip(*steps, strict=True)
    assert [box.interactive for box in boxes] == [False] * (len(steps) - 1) + [True]
    shown, text, reply = talks[0][-1]
    assert isinstance(shown["content"], gr.Image)
    assert text["content"] == "Is &lt;b&gt;this&lt;/b&gt; it?"
    assert reply["role"] == "assistant" and reply["content"] and talks[0][0][-1]["content"] == "…"
    said = {"text": "And?", "files": [broken]}
    *_, (_, history, first, _) = events.ask("me", said, False, histories[-1], settings)
    assert [m["content"] for m in first[3:5]] == ["[c.png]", "And?"]
    assert first[5]["content"].startswith("⚠ Not answered") and len(history) == 2
    *_, (_, again, _, _) = events.again("me", history, settings)
    assert len(again) == 2
    (step,) = events.ask("me", {"text": " ", "files": []}, False, again, settings)
    assert step[1] == again
    assert events.clear("me")[1:] == [[], [], []]


def test_the_page_is_served_without_other_hosts(engine):
    pytest.importorskip("gradio", reason=SKIPPED)
    import httpx

    built = page.build(engine, Settings(max_new_tokens=4))
    _, address = page.serve(built, "127.0.0.1", None, megabytes=1, wait=False)
    try:
        got = httpx.get(address)
        assert got.status_code == 200 and got.headers["content-security-policy"] == page.POLICY
        assert "fonts.googleapis.com/css" not in got.text
        big = {"files": ("big.png", os.urandom(1_200_000))}
        sent = httpx.post(f"{address}gradio_api/upload", files=big)
        assert sent.status_code == 413
        with pytest.raises(UserError, match="port .* can't be had"):
            port = int(address.rstrip("/").rsplit(":", 1)[1])
            page.serve(page.build(engine, Settings()), "127.0.0.1", port, 1, wait=False)
    finally:
        built.close()
