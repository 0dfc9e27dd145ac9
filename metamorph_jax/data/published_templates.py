"""Which chat template a published LLaVA checkpoint was trained with.

Its config.json decides where it can; the name of the checkpoint where it can't (the reference goes
by names alone):

| config.json                                         | template         |
|-----------------------------------------------------|------------------|
| its language model is Mistral                       | mistral_instruct |
| its language model is MPT                           | mpt              |
| it has 64,000 tokens or a few more (Yi)             | chatml_direct    |
| it has an MLP connector, or transformers' form      | vicuna_v1        |
| otherwise, by name                                  | `BY_NAME`        |
"""

from collections.abc import Mapping

# Part of a name -> template; the first that is found counts, and nothing found is v0.
BY_NAME = {
    "llama-2": "llava_llama_2",
    "mistral": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "v1": "vicuna_v1",
    "mpt": "mpt",
    "": "llava_v0",
}
_YI = range(64000, 64256)  # sizes of its table, with added rows


def template_of(fields: Mapping, name: str = "", demo: bool = False) -> str:
    """The name of the template (`chat_templates.TEMPLATES`) that a checkpoint is asked with.

    Args:
        fields: its config.json, in the original's form or in transformers'; {} if there is none.
        name: of the checkpoint, a path or a repository.
        demo: ask as the reference's demo does, which has another system message for v1 than
            training and evaluations.
    """
    name = name or str(fields.get("_name_or_path") or "")
    found = _by_config(fields, name) or _by_name(name)
    return "llava_v1" if demo and found == "vicuna_v1" else found


def _by_config(fields: Mapping, name: str) -> str | None:
    text = fields.get("text_config") or fields
    listed = fields.get("architectures") or ()
    kinds = " ".join(map(str, (text.get("model_type"), fields.get("model_type"), *listed))).lower()
    if "mistral" in kinds:
        return "mistral_instruct"
    if "mpt" in kinds:
        return "mpt"
    if text.get("vocab_size") in _YI:
        return "chatml_direct"
    later = "text_config" in fields or fields.get("mm_projector_type") == "mlp2x_gelu"
    return "vicuna_v1" if later and "llama-2" not in name.lower() else None


def _by_name(name: str) -> str:
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return next(template for part, template in BY_NAME.items() if part in last)
