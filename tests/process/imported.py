"""What the ranks of process tests are forked from: all imports done, no thread started, no random number drawn."""

import importlib

import torch

from encoder.engine.zero_config import import_deepspeed

torch.set_num_threads(1)
import_deepspeed(torch.device("cpu"))
for name in ("encoder.train.loop", "encoder.train.export", "encoder.train.grow"):
    importlib.import_module(name)
