"""This project's exchange and kernels inside transformers' expert parallelism, against stock."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from megablocks_utils import register_ep_implementation
from tests.support.compare import relative_error
from tests.support.tiny_families import save_tiny


def load(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.train()


def loss_of(model, rank):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 128, (1, (19, 13)[rank]), generator=generator)
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


def run_in_transformers(rank, folder):
    """Each rank has its own example, as under FSDP: its loss, and the gradients, whole."""
    register_ep_implementation()
    config = DistributedConfig(ep_size=2, fsdp_size=2, ep_implementation="megablocks_utils")
    model = load(folder, distributed_config=config)
    loss = loss_of(model, rank)
    loss.backward()
    grads = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }
    return loss.item(), grads


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_transformers_runs_ours_and_gets_stocks_gradients(ranks2, tmp_path, family):
    save_tiny(family, tmp_path)
    stock = load(tmp_path, experts_implementation="eager")
    losses = [loss_of(stock, rank) for rank in range(2)]
    (sum(losses) / 2).backward()  # transformers' FSDP averages over the ranks
    seen = ranks2.run(run_in_transformers, str(tmp_path))
    for (loss, grads), wanted in zip(seen, losses, strict=True):
        assert loss == pytest.approx(wanted.item(), rel=1e-6)
        for name, parameter in stock.named_parameters():
            assert relative_error(grads[name], parameter.grad) < 1e-5, name


def adapt_experts_in_transformers(rank, folder):
    register_ep_implementation()
    config = DistributedConfig(ep_size=2, fsdp_size=2, ep_implementation="megablocks_utils")
    model = load(folder, distributed_config=config)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=targets))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        loss_of(adapted, rank)


def test_peft_stops_at_experts_that_transformers_has_split(ranks2, tmp_path):
    """No loss of theirs is wrong in silence; if PEFT learns it, the gradients must be compared."""
    save_tiny("mixtral", tmp_path)
    ranks2.run(adapt_experts_in_transformers, str(tmp_path))
