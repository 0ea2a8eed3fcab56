"""LoRA on experts: ours against PEFT's."""
