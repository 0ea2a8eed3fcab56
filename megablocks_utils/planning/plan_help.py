"""What `python -m megablocks_utils.plan --help` prints."""

__all__ = ["HELP"]

HELP = """\
usage: python -m megablocks_utils.plan MODEL --gpus N --gpu NAME [--option value] ...
       python -m megablocks_utils.plan --check RUN_JSON
       python -m megablocks_utils.plan calibrate MODEL --nproc N --output FILE [--option value] ...

Says what a training run will need, before anything is rented or downloaded: for every legal
--ep_size and --expert_dp the memory of the fullest rank by component, whether it fits, what is
sent, which is fastest and why, the command that starts it, and what would make the others fit.
No weights are read and no GPU is used.

  MODEL
      A folder with a config.json, a config.json itself, or a Hub name in the local cache. Families:
      mixtral, qwen3_moe, olmoe; deepseek_v3 can be planned but not trained here.
  --gpus {N|A..B}
      GPUs of the run. A..B plans for A, 2A, 4A ... up to B, a line each.
      Default: 8.
  --gpu {a100-40g|a100-80g|h100-80g|h200-141g|b200-180g|l40s-48g}
      Kind of GPU: its memory, speed and links. Needed, unless --gpu_mem_gib is given.
  --gpu_mem_gib X
      Memory of a GPU in GiB, instead of what --gpu has.
  --gpus_per_node N
      GPUs that share the fast link.
      Default: as --gpu is sold, 8.
  --imbalance X
      Rows that the hottest rank of an ep group receives, over its fair share.
      Default: 1.25.
  --entry_point {fsdp2|fsdp1}
      train_accelerate_fsdp2.py or train_fsdp1.py.
      Default: fsdp2.
  --json FILE
      Write the plan there too.
  --plot FILE
      Draw it as a PNG: a stacked bar a layout, or with A..B lines over GPUs.
  --calibration FILE
      What calibrate has written: seconds are then estimated. Without it none are shown.
  --check RUN_JSON
      Compare what a finished run had predicted with what it measured, line by line.

Every option of the training scripts is taken with its own meaning (train_accelerate_fsdp2.py
--help): --use_lora, --precision, --max_seq_length, --per_device_train_batch_size ... With --ep_size
or --expert_dp only those layouts are planned, with --use_megablocks_sharding False only that
without expert parallelism.

calibrate makes two short runs with train_accelerate_fsdp2.py on this node and solves for the bytes
a rank sends a second and the rest of a micro-step; --help after it says more.

Exit codes: 0 a layout fits, or the comparison was made; 3 none fits; 2 a bad option, model or file,
said in one sentence; 1 anything unexpected.
"""
