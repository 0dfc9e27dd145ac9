"""Checkpoints."""

FAMILIES = ()


def load_whole(model, cfg, folder):
    raise NotImplementedError


def base(cfg):
    return "" if cfg.llm_weights == "random" else cfg.llm_weights
