"""Models: loading, families as data, and the models that need no hub."""
