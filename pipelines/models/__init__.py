"""A directory or a Hub id enters; a model with its layers, heads and neurons in known places leaves."""
