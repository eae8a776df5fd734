"""The oracle: one forward per patch in plain PyTorch. It imports nothing from `interp`: it can prove it wrong."""
