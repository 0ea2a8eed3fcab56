"""What other trainers call our options. Torch-free."""

from types import MappingProxyType

__all__ = ["SYNONYMS"]

_NAMES = {
    "model_name_or_path": "model base_model model_name model_path pretrained_model hf_model",
    "data_path": "data dataset datasets dataset_name dataset_path data_file data_files data_dir"
    " train_data train_file train_data_path",
    "output_dir": "output output_path out_dir save_dir save_path checkpoint_dir",
    "ep_size": "ep ep_degree expert_parallel_size expert_parallel_degree expert_parallelism"
    " expert_model_parallel_size moe_expert_parallel_size",
    "kernel": "experts_implementation moe_backend moe_kernel backend",
    "use_lora": "lora peft use_peft adapter finetuning_type",
    "lora_target": "lora_target_modules lora_modules target_modules",
    "lora_r": "lora_rank lora_dim rank r",
    "resume_adapter": "adapter_name_or_path lora_model_dir adapter_path",
    "precision": "bf16 fp16 mixed_precision amp half",
    "data_weights": "probabilities interleave_probs mixture_weights dataset_weights data_mixture",
    "dataset_config": "dataset_config_name subset dataset_subset",
    "dataset_split": "split train_split",
    "shuffle_buffer_size": "buffer_size stream_buffer_size",
    "chat_template": "template chat_template_path chat_template_jinja chat_template_file",
    "max_seq_length": "sequence_len seq_len seq_length sequence_length max_seq_len max_length"
    " model_max_length cutoff_len block_size context_length",
    "per_device_train_batch_size": "micro_batch_size batch_size train_batch_size bs mbs"
    " local_batch_size device_batch_size train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps accumulation_steps"
    " grad_accumulation_steps gradient_accumulation",
    "num_train_epochs": "epochs num_epochs n_epochs epoch train_epochs",
    "max_steps": "steps num_steps train_steps total_steps max_train_steps max_steps_per_epoch"
    " iterations",
    "optim": "optimizer optimizer_name optimizer_type",
    "learning_rate": "lr max_lr peak_lr base_lr",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule learning_rate_scheduler",
    "warmup_steps": "warmup warmup_ratio lr_warmup_steps num_warmup_steps",
    "weight_decay": "wd",
    "max_grad_norm": "clip_grad grad_clip gradient_clipping clip_grad_norm max_norm"
    " gradient_clip_val",
    "gradient_checkpointing": "recompute activation_recompute grad_checkpointing"
    " enable_activation_checkpointing",
    "router_aux_loss_coef": "aux_loss_coef moe_aux_loss_coef moe_aux_loss_coeff load_balance_loss",
    "logging_steps": "log_every log_every_n_steps log_steps log_interval log_freq",
    "report_to": "logger use_wandb wandb tracker",
    "run_name": "wandb_run_name wandb_name experiment_name",
    "project": "wandb_project project_name mlflow_experiment_name",
    "save_steps": "save_every save_interval checkpoint_steps checkpoint_interval"
    " checkpointing_steps save_freq",
    "save_total_limit": "keep_checkpoints max_checkpoints keep_last_n",
    "resume_from_checkpoint": "resume auto_resume_from_checkpoints resume_from",
    "optim_dtype": "optimizer_dtype optim_state_dtype",
    "seed": "random_seed",
    "attn_implementation": "attn_impl attention attention_implementation flash_attention flash_attn"
    " flash_attention_2 use_flash_attn use_flash_attention_2 sdp_attention xformers_attention",
    "eval_data_path": "eval_dataset eval_file eval_data validation_file test_datasets",
    "eval_fraction": "val_set_size val_size test_split_ratio",
    "expert_quantization": "load_in_4bit load_in_8bit quantization quantization_bit quantize bits"
    " bnb_4bit_quant_type",
    "packing": "sample_packing neat_packing packed",
    "tp_size": "tensor_parallel_size tensor_parallel_degree tp",
    "expert_tp_size": "etp expert_tensor_parallel_size expert_tensor_parallel_degree",
    "sp_size": "sequence_parallel_size sequence_parallel_degree context_parallel_size cp_size",
}
SYNONYMS = MappingProxyType(
    {alien: ours for ours, line in _NAMES.items() for alien in line.split()}
)
"""Our name of what Axolotl, TRL, LLaMA-Factory, torchtune and others have another name for."""
