"""Other trainers' words for what a run file says: Hugging Face's, Composer's, fairseq's, nanochat's and Megatron's.

learning_rate: 8e-4    ->    the error names phases.0.lr: {schedule: wsd, peak: 8e-4}
"""

from __future__ import annotations

# what to write here -> the words that others have for it
_WORDS = {
    "phases.0.lr: {schedule: wsd, peak: 8e-4}": "learning_rate lr max_lr",
    "phases.0.tokens: 10B, in tokens; `tessera plan` says how many epochs that is; data.sources.0.max_epochs: 4 is a limit": (
        "num_train_epochs max_epoch epochs num_epochs max_epochs"
    ),
    "phases.0.tokens: 10B, in tokens and not in steps or epochs": (
        "max_steps max_duration max_update total_num_update train_iters num_iterations "
        "total_steps num_steps steps max_tokens"
    ),
    "loader.micro_batch_rows: 8, in rows of data.row_tokens; what is left of the batch is accumulated": (
        "per_device_train_batch_size device_train_microbatch_size device_train_batch_size "
        "device_batch_size micro_batch_size train_micro_batch_size_per_gpu"
    ),
    "phases.0.batch_tokens: 512Ki, in tokens over all ranks and micro-batches": (
        "train_batch_size batch_size global_train_batch_size total_batch_size global_batch_size"
    ),
    "worked out from phases.0.batch_tokens and loader.micro_batch_rows: leave it out": (
        "gradient_accumulation_steps update_freq"
    ),
    "phases.0.lr.warmup_tokens: 3B, in tokens": (
        "warmup_ratio warmup_steps t_warmup warmup_updates lr_warmup_iters warmup_iters warmup"
    ),
    "optimizer.weight_decay: 1e-5, or phases.0.weight_decay for one phase": "weight_decay",
    "engine.precision: autocast, which is bf16 where the device has units for it": (
        "bf16 fp16 tf32 precision amp dtype mixed_precision"
    ),
    "checkpoints.every_tokens: 1B": (
        "save_steps save_strategy save_interval save_interval_updates save_every"
    ),
    "checkpoints.keep_last: 2": "save_total_limit save_num_checkpoints_to_keep",
    "tracking.print_every_steps: 10": "logging_steps console_log_interval log_interval",
    "out: runs/first": "logging_dir output_dir save_folder save_dir save",
    "evaluation: {sources: [{path: shards/web/held_out}], every_tokens: 100M}": (
        "eval_steps evaluation_strategy eval_strategy validation_file eval_interval eval_loader "
        "eval_every val_data valid_data eval_data"
    ),
    "phases.0.lr: {schedule: cosine, peak: 8e-4}": "lr_scheduler_type scheduler lr_scheduler",
    "objective: {name: mlm, mask_share: 0.3}": (
        "mlm_probability mlm_prob mask_prob mask_ratio masking_rate mask_probability"
    ),
    "data.row_tokens: 8192 and phases.0.max_tokens_per_document: 8192": (
        "max_seq_length max_length max_seq_len seq_length seq_len block_size sequence_len "
        "sequence_length tokens_per_sample"
    ),
    "loader.workers: 4": "dataloader_num_workers num_workers",
    "optimizer.betas: [0.9, 0.98]": "adam_beta1 adam_beta2 adam_betas betas",
    "optimizer.eps: 1e-6": "adam_epsilon",
    "engine.gradient_clipping: 1.0": (
        "max_grad_norm clipping_threshold clip_norm grad_clip gradient_clip_val clip_grad "
        "clip_grad_norm"
    ),
    "optimizer: {name: stable_adamw}": "optim",
    "tracking.wandb_project: my-project": "report_to loggers wandb wandb_run project",
    "name: first": "run_name",
    "engine.activation_checkpointing: blocks": "gradient_checkpointing",
    "no setting: the same command goes on from the newest checkpoint in out": (
        "resume_from_checkpoint autoresume"
    ),
    "init_from: FOLDER, a run, a checkpoint, a weights folder or a Hugging Face folder": (
        "model_name_or_path load_path pretrained_model_name load restore_file init_checkpoint"
    ),
    "model: {preset: modernbert_base}, or init_from: FOLDER for stored weights": (
        "model_name config_name arch"
    ),
    "no setting: the shards bring their tokenizer (data-prep prepare makes them with it)": (
        "tokenizer_name tokenizer"
    ),
    "data.sources: [{path: shards/web/train}], folders made by data-prep prepare": (
        "dataset_name train_file dataset train_loader data_path data_dir train_data"
    ),
    "data.sources: [{path: shards/web/train}], or data.mixture: {file: FILE.yaml, name: NAME}": (
        "mixture mixtures data_mixture data_mix"
    ),
    "device: cpu": "no_cuda use_cpu",
    "engine.zero_stage: 2": "deepspeed fsdp fsdp_config zero_stage zero_optimization",
    "compile: auto": "torch_compile",
    "evaluation.rows: 8": (
        "per_device_eval_batch_size device_eval_batch_size global_eval_batch_size"
    ),
    "attention: auto": "attn_implementation use_flash_attention_2",
    "phases.0.lr.decay_tokens: 1B, in tokens": "t_decay",
    "phases.0.lr.floor_share: 0.02, a share of the peak": "alpha_f",
    "phases.0.lr.floor_share: 0.1, a share of the peak": "min_lr",
    "phases.0.model: {global_rope_theta: 160000}, of one phase, or model.global_rope_theta, of all": (
        "global_rope_theta local_rope_theta rope_theta"
    ),
    "no setting: torchrun, deepspeed or srun say how many ranks there are": (
        "gpus num_gpus ngpus nproc_per_node world_size num_nodes devices"
    ),
    "device: cuda": "accelerator device_type",
    "seed: 17": "random_seed",
}
OTHER_WORDS = {word: here for here, words in _WORDS.items() for word in words.split()}
