"""ZeRO's stages, as DeepSpeed has them."""
