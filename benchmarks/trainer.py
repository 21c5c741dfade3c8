"""A pretraining by transformers' Trainer in the way of its run_mlm: grouped blocks, its collator, AdamW, a linear rate.

    python -m benchmarks.trainer PEER.json

A process of its own, as people start it. The model is saved now and then, while the clock stands.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

POINTS = "points.json"
WARMUP_SHARE = 0.05  # of the steps


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What its process is told."""

    tokenizer: str  # folder that AutoTokenizer reads
    settings: dict[str, Any]  # of config.json
    blocks: str  # .npy, int32 [blocks, tokens of a block]
    rows: int  # blocks of a step
    steps: int
    every_steps: int  # a snapshot
    lr: float
    mask_share: float
    autocast: bool
    threads: int
    seed: int


def grouped(documents: list[np.ndarray], *, tokens: int) -> np.ndarray:
    """Documents end to end, cut into blocks of so many tokens; the rest is dropped, as run_mlm has it.

    documents   [1 2 3 4 5] [6 7 8]     blocks of 3: [1 2 3] [4 5 6]
    """
    joined = np.concatenate(documents)
    blocks = len(joined) // tokens
    return joined[: blocks * tokens].reshape(blocks, tokens).astype(np.int32)


def write_peer(peer: Peer, folder: Path) -> Path:
    """The file that main reads; its snapshots go beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "peer.json"
    path.write_text(json.dumps(asdict(peer), indent=1) + "\n", encoding="utf-8")
    return path


def main(path: Path) -> None:
    """Trains, saves snapshots in step-N beside the file, then writes points.json: tokens and seconds of each."""
    peer = Peer(**json.loads(path.read_text(encoding="utf-8")))

    import torch
    import transformers
    from transformers import TrainerCallback

    torch.set_num_threads(peer.threads)
    transformers.set_seed(peer.seed)
    blocks = np.load(peer.blocks)
    tokenizer = transformers.AutoTokenizer.from_pretrained(peer.tokenizer, local_files_only=True)
    model = transformers.AutoModelForMaskedLM.from_config(
        transformers.AutoConfig.for_model(**peer.settings)
    )
    points: list[dict[str, Any]] = []

    class Clock(TrainerCallback):
        """Seconds between the starts and ends of training, without those of snapshots."""

        def __init__(self) -> None:
            self.seconds = 0.0
            self.began = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % peer.every_steps and state.global_step != peer.steps:
                return
            self.seconds += time.perf_counter() - self.began
            folder = path.parent / f"step-{state.global_step}"
            model.save_pretrained(folder, safe_serialization=True)
            points.append(
                {
                    "tokens": state.global_step * peer.rows * blocks.shape[1],
                    "seconds": self.seconds,
                    "folder": folder.name,
                }
            )
            self.began = time.perf_counter()

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(path.parent / "trainer"),
            use_cpu=True,
            per_device_train_batch_size=peer.rows,
            max_steps=peer.steps,
            learning_rate=peer.lr,
            lr_scheduler_type="linear",
            warmup_steps=round(WARMUP_SHARE * peer.steps),
            bf16=peer.autocast,
            seed=peer.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": block.tolist()} for block in blocks],
        data_collator=transformers.DataCollatorForLanguageModeling(
            tokenizer=tokenizer, mlm_probability=peer.mask_share
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    (path.parent / POINTS).write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
