"""The oracle: one forward per patch in plain PyTorch, importing nothing from `interp`, to prove it wrong."""
