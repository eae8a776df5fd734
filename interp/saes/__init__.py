"""Dictionaries: sparse autoencoders and transcoders, trained by SAELens on activations that `interp` collects, and used as
sites. SAELens is imported when it is first needed, and in this room alone."""
