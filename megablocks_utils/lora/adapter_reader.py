"""TEMPORARY stand-in until the reader branch is merged."""

import json
from pathlib import Path
from safetensors.torch import load_file
from megablocks_utils.lora.peft_format import expert_key, linear_key, unpack_lora_a, unpack_lora_b
from megablocks_utils.lora.settings import LoraSettings, same_rank_everywhere


def open_adapter(folder, model):
    return AdapterReader(Path(folder), model)


class AdapterReader:
    def __init__(self, folder, model):
        self.config = json.loads((folder / "adapter_config.json").read_text())
        self.tensors = load_file(folder / "adapter_model.safetensors")
        self.num_experts = (
            getattr(model.config, "num_local_experts", None) or model.config.num_experts
        )
        r = self.config["r"]
        self.settings = LoraSettings(
            r,
            self.config["lora_alpha"],
            tuple(sorted(self.config["target_modules"] or [])),
            same_rank_everywhere(r) if self.config["target_parameters"] else {},
        )

    def linear(self, name):
        return tuple(self.tensors[linear_key(name, s)] for s in "AB")

    def experts(self, name, experts):
        a = unpack_lora_a(self.tensors[expert_key(name, "A")], self.num_experts)
        b = unpack_lora_b(self.tensors[expert_key(name, "B")], self.num_experts)
        return a[experts.start : experts.stop], b[experts.start : experts.stop]
