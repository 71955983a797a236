"""Conversion of a GGUF file with the llama architecture into a Hugging Face folder with bf16 weights.

GGUF is the file format of llama.cpp for quantized models. Two things differ from the Hugging Face layout: the
names, and the rows of the query and key projections, which llama.cpp stores with the two halves of each
head's rotary dimensions interleaved (`permute` in its conversion script).

The conversion of transformers (`from_pretrained(gguf_file=...)`) gives the same weights but cannot replace
this one: up to version 5.23 it does not know the pre-tokenizer "smollm" and uses GPT-2's, which splits white
space before digits differently; it takes the marks of chat turns for BOS and EOS; and what it writes depends
on its version, while the hash of these files identifies the model in caches and runs.

Shape suffixes: R rows out, C columns in.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.files import write_json_atomic

if TYPE_CHECKING:
    import numpy as np

TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
END_OF_TEXT = "<|endoftext|>"


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (bf16), tokenizer.json and their companions into `folder`.

    The embedding is tied to the unembedding. The caller syncs the folder to disk and renames it. Raises
    UserError when the file is not a llama model with the byte-level BPE of GPT-2.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    for name, wanted in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2")):
        if metadata.get(name) != wanted:
            raise UserError(
                f"{gguf_file} has {name} {metadata.get(name)!r} instead of {wanted!r}, and cannot be "
                "converted; give a GGUF file of SmolLM2"
            )
    _write_weights(reader, metadata, folder / "model.safetensors")
    _write_tokenizer(metadata, folder)
    config = _config(metadata)
    write_json_atomic(folder / "config.json", config)
    # Generation also stops at the end of a chat turn.
    ends = [config["eos_token_id"], *_ids_of(metadata, "<|im_end|>")]
    write_json_atomic(folder / "generation_config.json", {"bos_token_id": ends[0], "eos_token_id": ends})


def undo_rotary_permutation(weight_RC: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection [R, C] from llama.cpp's order to Hugging Face's.

    In each head, row 2 i + j of the file becomes row j d_head / 2 + i.
    """
    rows, columns = weight_RC.shape
    return weight_RC.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_weights(reader: Any, metadata: dict[str, Any], file: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = undo_rotary_permutation(values, heads[kind])
        weights[_hugging_face_name(tensor.name)] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    save_file(weights, file, metadata={"format": "pt"})


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` becomes `model.layers.3.self_attn.q_proj.weight`."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    try:
        _, layer, kind, leaf = name.split(".")
        return f"model.layers.{int(layer)}.{TENSOR_NAMES[kind]}.{leaf}"
    except (KeyError, ValueError):
        raise UserError(
            f"the GGUF file has a tensor {name!r}, which a llama model with tied embeddings does not have; "
            "give a GGUF file of SmolLM2"
        ) from None


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    d_model = metadata["llama.embedding_length"]
    n_heads = metadata["llama.attention.head_count"]
    [end] = _ids_of(metadata, END_OF_TEXT)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": d_model,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": d_model // n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 10),
        "rope_parameters": {"rope_theta": metadata["llama.rope.freq_base"], "rope_type": "default"},
        "rope_theta": metadata["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "bfloat16",
    }


def _ids_of(metadata: dict[str, Any], token: str) -> list[int]:
    return [i for i, text in enumerate(metadata["tokenizer.ggml.tokens"]) if text == token]


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """SmolLM's tokenizer: byte-level BPE that splits off every digit before it applies GPT-2's pattern."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise UserError(
            f"the GGUF file has tokenizer.ggml.pre {metadata['tokenizer.ggml.pre']!r} instead of 'smollm'; "
            "give a GGUF file of SmolLM2"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    # The file gives the marks of chat turns as BOS and EOS. Activations are harvested from documents, which
    # pretraining separated by <|endoftext|>; the tokenizer of the SmolLM2 base model uses it too.
    write_json_atomic(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "model_max_length": metadata["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )
