"""A Hugging Face folder made from a GGUF file of the Llama architecture."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twinserve.settings.errors import InputError

CONVERSION_VERSION = 1
"""Of what `convert_gguf` writes; a cached folder of another version is made anew."""

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
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
_CONTROL, _USER_DEFINED = 3, 4
"""Token types of GGUF that are cut out of a text before it is tokenized."""


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in a GGUF file into `folder` as transformers would have saved it, in float32.

    Weights are dequantised one by one, so the largest of them is what it costs in memory. float32 holds exactly what
    the quantised numbers stand for; a 16-bit type would round them once more.

    Args:
        folder: exists; gets config.json, generation_config.json, model.safetensors, tokenizer.json and
            tokenizer_config.json.

    Raises:
        InputError: the file holds another architecture, another kind of tokenizer, or an unknown tensor.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    metadata = _Metadata(path, {name: field.contents() for name, field in reader.fields.items()})
    metadata.expect("general.architecture", "llama")
    metadata.expect("tokenizer.ggml.model", "gpt2")
    metadata.expect("tokenizer.ggml.pre", "smollm")
    config = _config(metadata, is_tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", metadata.special_ids())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    # The tokenizer's own save() says no OSError where the disk is full.
    (folder / "tokenizer.json").write_text(_tokenizer(metadata).to_str(pretty=True), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", _weights(path, reader.tensors, config))


class _Metadata:
    """The fields of a GGUF file."""

    def __init__(self, path: Path, fields: dict[str, Any]):
        self._path, self._fields = path, fields

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise InputError(f"expected the field {name}, found none", path=self._path)
        return self._fields[name]

    def expect(self, name: str, expected: str) -> None:
        if self[name] != expected:
            raise InputError(f"expected {expected!r}", path=self._path, field=name, value=self[name])

    def number(self, name: str) -> float:
        """A float32 by the shortest decimal that stands for it: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self[name])))

    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens, by the names that Hugging Face gives them."""
        kinds = {"bos": "bos", "eos": "eos", "pad": "padding"}
        return {f"{ours}_token_id": int(self[f"tokenizer.ggml.{theirs}_token_id"]) for ours, theirs in kinds.items()}


def _config(metadata: _Metadata, *, is_tied: bool) -> dict[str, Any]:
    """config.json."""
    hidden_size, num_heads = int(metadata["llama.embedding_length"]), int(metadata["llama.attention.head_count"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": int(metadata["llama.feed_forward_length"]),
        "num_hidden_layers": int(metadata["llama.block_count"]),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(metadata["llama.attention.head_count_kv"]),
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "rms_norm_eps": metadata.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("llama.rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": is_tied,
        "torch_dtype": "float32",
        **metadata.special_ids(),
    }


def _tokenizer(metadata: _Metadata) -> Any:
    """The byte-level BPE tokenizer, a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    # What "smollm" stands for: each digit is a token, and what lies between digits is split as GPT-2 does.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            tokenizer.add_special_tokens([added]) if kind == _CONTROL else tokenizer.add_tokens([added])
    return tokenizer


def _tokenizer_config(metadata: _Metadata) -> dict[str, Any]:
    """tokenizer_config.json."""
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {name.removesuffix("_id"): tokens[token_id] for name, token_id in metadata.special_ids().items()}
    return {
        # The class that takes tokenizer.json as it is; GPT-2's own would build its pre-tokenizer anew, without digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": int(metadata["llama.context_length"]),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


@dataclass(frozen=True)
class Weight:
    """A tensor to be written: its name, its shape, and what makes its float32 numbers when their turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def _weights(path: Path, tensors: Iterable[Any], config: dict[str, Any]) -> list[Weight]:
    """The tensors of a `GGUFReader` under the names of transformers."""
    from gguf.quants import dequantize

    def make(tensor: Any, heads: int | None) -> np.ndarray:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        return numbers if heads is None else unpermute(numbers, heads)

    heads_of = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = []
    for tensor in tensors:
        *prefix, part, suffix = tensor.name.split(".")
        name = (_LAYER_NAMES if prefix else _NAMES).get(part)
        if name is None or suffix != "weight":
            raise InputError("not a tensor of this architecture", path=path, field=tensor.name)
        theirs = f"model.layers.{prefix[1]}.{name}.weight" if prefix else f"{name}.weight"
        # GGUF names the innermost dimension first.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weights.append(Weight(theirs, shape, partial(make, tensor, heads_of.get(part))))
    return weights


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order that Hugging Face has them in.

    GGUF stores each head's rows so that the two dimensions which a rotary position turns together lie side by side;
    transformers turns dimension i with i + head_dim / 2.

    Args:
        rows: [num_heads * head_dim, hidden]
    """
    pairs = rows.reshape(num_heads, len(rows) // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def write_safetensors(path: Path, weights: Iterable[Weight]) -> None:
    """Write float32 tensors one after another; safetensors' own writer wants all of them in memory at once."""
    weights = list(weights)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        begin, end = end, end + 4 * int(np.prod(weight.shape))
        header[weight.name] = {"dtype": "F32", "shape": weight.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for weight in weights:
            numbers = np.ascontiguousarray(weight.make(), dtype="<f4")
            if numbers.shape != weight.shape:
                raise ValueError(f"{weight.name} has the shape {numbers.shape}, expected {weight.shape}")
            file.write(numbers.data)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
