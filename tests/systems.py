"""The paper's models in miniature: random weights behind every feature of the real ones.

Sizes are toys; everything that changes what an activation is (scales, caps, windows, norms,
rotations) is the published configuration's, or keeps its proportion to a toy's context length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 400
WORDS = [f"{a}{b}{c}" for a in ("ba", "ko", "lu", "mi", "sta", "tre")
         for b in ("n", "r", "ss", "lt") for c in ("a", "ed", "ing", "o", "um", "y")]
TEXT = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(40)) for i in range(200)]
ROPE_31 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gemma2(**sizes: Any) -> PreTrainedModel:
    """Gemma 2: embeddings times √d, soft-caps, every other layer a window, norms on both sides."""
    own: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
                           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256,
                           "sliding_window": 8, "attn_logit_softcapping": 50.0,
                           "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}
    config = Gemma2Config(vocab_size=VOCABULARY, max_position_embeddings=512, **own | sizes)
    return shaken(Gemma2ForCausalLM(config))


def gemma3(**sizes: Any) -> PreTrainedModel:
    """Gemma 3: no soft-caps, normed queries and keys, five layers with windows to one without."""
    own: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7,
                           "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
                           "sliding_window": 8, "query_pre_attn_scalar": 256}
    config = Gemma3TextConfig(vocab_size=VOCABULARY, max_position_embeddings=512, bos_token_id=2,
                              eos_token_id=1, **own | sizes)
    return shaken(Gemma3ForCausalLM(config))


def llama31(**sizes: Any) -> PreTrainedModel:
    """Llama 3.1: slow rotations stretched by 8; four query heads to a key-value head."""
    own: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
                           "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128,
                           "rope_parameters": ROPE_31}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=131_072, rms_norm_eps=1e-5,
                         bos_token_id=0, eos_token_id=1, **own | sizes)
    return shaken(LlamaForCausalLM(config))


def gpt2(**sizes: Any) -> PreTrainedModel:
    """GPT-2: learned positions, layer norms with biases, biases in every map."""
    own: dict[str, Any] = {"n_embd": 32, "n_layer": 9, "n_head": 4}
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=256, bos_token_id=0, eos_token_id=0,
                        **own | sizes)
    return shaken(GPT2LMHeadModel(config))


@torch.no_grad()
def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Norm weights and biases away from 0 and 1, so that leaving one out is seen."""
    generator = torch.Generator().manual_seed(0)
    for values in model.parameters():
        if values.ndim == 1:
            values.add_(0.2 * torch.randn(values.shape, generator=generator))
        else:
            values.copy_(torch.randn(values.shape, generator=generator) * values.shape[-1] ** -0.5)
    return model.eval()


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """As Gemma's: pieces that begin with '▁', <bos> first."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    made.pre_tokenizer = pieces  # type: ignore[assignment]
    return GemmaTokenizer(**_learned(made, special))


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 3.1's: bytes, <|begin_of_text|> first."""
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    made = _bytes()
    _learned(made, special)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=special[0],
                                   eos_token=special[1])


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: bytes, <|endoftext|> for everything."""
    return GPT2Tokenizer(**_learned(_bytes(), ["<|endoftext|>"]))


def _bytes() -> Tokenizer:
    made = Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pieces  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return made


def _learned(tokenizer: Tokenizer, special: list[str]) -> dict[str, Any]:
    """Vocabulary and merges of a tokenizer trained on the toy words."""
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special,
                                  show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    found = json.loads(tokenizer.to_str())["model"]
    return {"vocab": found["vocab"], "merges": [tuple(pair) for pair in found["merges"]]}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path,
         dtype: torch.dtype = torch.bfloat16, shard: str = "100KB") -> None:
    """Write both as the hub has them: configuration, sharded safetensors and index, tokenizer."""
    cast = model.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    cast.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
