"""The only room that imports deepspeed: the update, ZeRO, checkpoints."""
