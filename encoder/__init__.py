"""Tessera's library: rooms for words (base), mathematics (nn, optim), models, data, the engine and the story (train)."""
