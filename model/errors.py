"""The error of a model configuration, or of weights, that cannot be used."""


class ModelConfigError(ValueError):
    """A model configuration that cannot be built; the message names the field and the remedy."""
