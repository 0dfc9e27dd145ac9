"""How a MetaMorph model decodes."""


def generator(model, cfg, data, **options):
    """A generator over this model."""
    raise NotImplementedError
