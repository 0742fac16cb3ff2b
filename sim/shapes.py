"""Model shapes: what a decoder-only transformer reads, computes and keeps for each token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

STORED_BITS = 16
"""Of a value that nothing is said about: an activation, an embedding, a key or a value in bfloat16."""


class Matrix(NamedTuple):
    """A projection.

    Attributes:
        is_split: tensor-parallel devices share it; else each has all of it.
        is_quantised: it is, where a model is.
    """

    inputs: int
    outputs: int
    is_split: bool = True
    is_quantised: bool = True

    @property
    def size(self) -> int:
        """Weights."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al., EMNLP 2023).

    Attributes:
        window: a token attends to so many, the last of which is itself; None: to all before it.
        is_gated: the queries' projection also makes a gate of the output.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    is_gated: bool = False

    def matrices(self, hidden: int) -> list[Matrix]:
        """The projections to queries, keys and values together, and of the output."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return [Matrix(hidden, heads * (1 + self.is_gated) + 2 * kv_heads), Matrix(heads, hidden)]

    def kv_values(self, tensor_parallel: int = 1) -> float:
        """Values that a token leaves in the pool of one of so many devices."""
        return 2 * max(1.0, self.num_kv_heads / tensor_parallel) * self.head_dim

    def why_not(self, tensor_parallel: int) -> str | None:
        """Why so many devices cannot share the heads, in words."""
        if self.num_heads % tensor_parallel:
            return f"expected a divisor of the {self.num_heads} query heads"
        if self.num_kv_heads % tensor_parallel and tensor_parallel % self.num_kv_heads:
            return f"expected a divisor or a multiple of the {self.num_kv_heads} key-value heads"
        return None

    @property
    def pair_operations(self) -> int:
        """Operations of a query-key pair: a product of the scores and one of the values, a query head."""
        return 4 * self.num_heads * self.head_dim

    @property
    def prompt_pair_operations(self) -> int:
        """The same for a prompt's tokens."""
        return self.pair_operations

    @property
    def expansion_operations(self) -> int:
        """Operations a token of the context before a prompt's."""
        return 0

    @property
    def state_bytes(self) -> int:
        """Bytes that a sequence keeps however long it is."""
        return 0

    @property
    def state_operations(self) -> int:
        """Operations a token on that state."""
        return 0


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a token keeps one latent vector for all heads.

    Decodes attend to the latent itself, with the up-projection of keys and values absorbed in queries and outputs; a
    prompt's tokens attend to keys and values that are made anew of the context's latents, as vLLM does.

    Attributes:
        query_rank: of the queries' compression; None where they are projected at once.
        rope_dim: of the part of queries and keys that has positions; its key is common to all heads.
    """

    num_heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    window = None

    def matrices(self, hidden: int) -> list[Matrix]:
        """The projections of queries, of the latent, up from it, and of the output."""
        heads, query = self.num_heads, self.num_heads * (self.nope_dim + self.rope_dim)
        queries = [Matrix(hidden, query)]
        if self.query_rank is not None:
            queries = [Matrix(hidden, self.query_rank, False), Matrix(self.query_rank, query)]
        return [
            *queries,
            Matrix(hidden, self.kv_rank + self.rope_dim, False),
            Matrix(self.kv_rank, heads * (self.nope_dim + self.value_dim)),
            Matrix(heads * self.value_dim, hidden),
        ]

    def kv_values(self, tensor_parallel: int = 1) -> float:
        """Values that a token leaves in the pool of each device: the latent is not shared."""
        return float(self.kv_rank + self.rope_dim)

    def why_not(self, tensor_parallel: int) -> str | None:
        """Why so many devices cannot share the heads, in words."""
        return f"expected a divisor of the {self.num_heads} query heads" if self.num_heads % tensor_parallel else None

    @property
    def pair_operations(self) -> int:
        """Operations of a decode's query-key pair, on latents."""
        return 2 * self.num_heads * (2 * self.kv_rank + self.rope_dim)

    @property
    def prompt_pair_operations(self) -> int:
        """Operations of a prompt's query-key pair, on keys and values."""
        return 2 * self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def expansion_operations(self) -> int:
        """Operations that make keys and values of a token of the context before a prompt's."""
        return 2 * self.kv_rank * self.num_heads * (self.nope_dim + self.value_dim)

    state_bytes = 0
    state_operations = 0


@dataclass(frozen=True)
class LinearAttention:
    """Gated delta rule (Yang, Kautz and Hatamizadeh, ICLR 2025): a state of one size in place of keys and values.

    The state is kept in float32, as vLLM and transformers do, beside the last inputs of a short convolution.

    Attributes:
        conv: tokens that the convolution sees.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv: int

    window = None
    pair_operations = prompt_pair_operations = expansion_operations = 0

    @property
    def _channels(self) -> int:
        """Inputs of the convolution: queries, keys and values."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    def matrices(self, hidden: int) -> list[Matrix]:
        """The projections to queries, keys, values and gate, to the two factors a head, and of the output."""
        values = self.num_value_heads * self.value_dim
        gates = 2 * self.num_value_heads
        return [Matrix(hidden, self._channels + values), Matrix(hidden, gates), Matrix(values, hidden)]

    def kv_values(self, tensor_parallel: int = 1) -> float:
        """None: the state is no part of the pool."""
        return 0.0

    def why_not(self, tensor_parallel: int) -> str | None:
        """Why so many devices cannot share the heads, in words."""
        heads = self.num_key_heads
        return f"expected a divisor of the {heads} heads of linear attention" if heads % tensor_parallel else None

    @property
    def state_bytes(self) -> int:
        """Bytes that a sequence keeps however long it is."""
        state = 4 * self.num_value_heads * self.key_dim * self.value_dim
        return state + STORED_BITS // 8 * self._channels * (self.conv - 1)

    @property
    def state_operations(self) -> int:
        """Operations a token, a value of the state: decay, the product with the key, its correction, with the query."""
        return 7 * self.num_value_heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class Mamba:
    """Mamba-2 (Dao and Gu, ICML 2024): a state of one size in place of keys and values.

    Attributes:
        state_dim: values that each channel keeps.
        num_groups: of heads that share their input and output projections of the state.
        conv: tokens that the convolution sees.
        state_bits: of a value of the state.
    """

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    conv: int
    state_bits: int = STORED_BITS

    window = None
    pair_operations = prompt_pair_operations = expansion_operations = 0

    @property
    def _inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def _channels(self) -> int:
        """Inputs of the convolution: the values, and what goes into the state and out of it."""
        return self._inner + 2 * self.num_groups * self.state_dim

    def matrices(self, hidden: int) -> list[Matrix]:
        """The projections to the gate, the convolution's inputs and the time steps, and of the output."""
        return [Matrix(hidden, self._inner + self._channels + self.num_heads), Matrix(self._inner, hidden)]

    def kv_values(self, tensor_parallel: int = 1) -> float:
        """None: the state is no part of the pool."""
        return 0.0

    def why_not(self, tensor_parallel: int) -> str | None:
        """Why so many devices cannot share the heads, in words."""
        heads = self.num_heads
        return f"expected a divisor of the {heads} heads of Mamba" if heads % tensor_parallel else None

    @property
    def state_bytes(self) -> int:
        """Bytes that a sequence keeps however long it is."""
        state = self.state_bits // 8 * self._inner * self.state_dim
        return state + STORED_BITS // 8 * self._channels * (self.conv - 1)

    @property
    def state_operations(self) -> int:
        """Operations a token, five a value of the state: decay, the input's product and its sum, the output's."""
        return 5 * self._inner * self.state_dim


Mixer = Attention | LatentAttention | LinearAttention | Mamba


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network of one inner layer, with a gate beside it or not; none, where the inner size is 0."""

    inner: int
    is_gated: bool = True

    num = top_k = 0

    def matrices(self, hidden: int) -> list[Matrix]:
        """The projections up, gate included, and down."""
        if not self.inner:
            return []
        return [Matrix(hidden, (1 + self.is_gated) * self.inner), Matrix(self.inner, hidden)]

    def of_each(self, hidden: int) -> list[Matrix]:
        """Nothing: there are no experts."""
        return []

    def distinct(self, tokens: int) -> float:
        """No experts."""
        return 0.0


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes to `top_k` of `num` feed-forward networks, and through the shared one.

    Attributes:
        shared_inner: the inner size of what all tokens go through; 0: nothing.
        has_shared_gate: a factor of the shared network's output is projected for each token.
    """

    num: int
    top_k: int
    inner: int
    shared_inner: int = 0
    is_gated: bool = True
    has_shared_gate: bool = False

    def matrices(self, hidden: int) -> list[Matrix]:
        """The router, and what all tokens go through."""
        router = [Matrix(hidden, self.num + self.has_shared_gate, False, False)]
        return router + (FeedForward(self.shared_inner, self.is_gated).matrices(hidden) if self.shared_inner else [])

    def of_each(self, hidden: int) -> list[Matrix]:
        """The projections of one expert."""
        return FeedForward(self.inner, self.is_gated).matrices(hidden)

    def distinct(self, tokens: int) -> float:
        """Experts that so many tokens are expected to need together, were each to choose evenly and by itself.

        An expert is passed over by one token with probability 1 - top_k / num. Tokens of real texts agree more.
        """
        return self.num * (1.0 - (1.0 - self.top_k / self.num) ** tokens)


@dataclass(frozen=True)
class Layers:
    """Layers that are alike."""

    count: int
    mixer: Mixer
    network: FeedForward | Experts

    def matrices(self, hidden: int) -> list[Matrix]:
        """The projections of one of them that all tokens go through."""
        return self.mixer.matrices(hidden) + self.network.matrices(hidden)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer.

    Attributes:
        tied: the output projection is the embedding, so it is stored once.
        weight_bits: stored bits of a weight of a layer's matrices, scales included; those of the embedding, the output
            projection and an expert's router are of 16.
        expert_bits: of a weight of an expert; None: `weight_bits`.
        kv_bits: of a key's or value's element.
        arithmetic: that of the layers' matrices.
    """

    name: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layers, ...]
    tied: bool = False
    weight_bits: float = STORED_BITS
    expert_bits: float | None = None
    kv_bits: int = STORED_BITS
    arithmetic: Literal["bfloat16", "float8"] = "bfloat16"

    @classmethod
    def dense(
        cls,
        name: str,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        tied: bool = False,
    ) -> ModelShape:
        """A decoder with grouped-query attention to all tokens and a gated feed-forward network in every layer."""
        layer = Layers(num_layers, Attention(num_heads, num_kv_heads, head_dim), FeedForward(intermediate_size))
        return cls(name, vocab_size, hidden_size, (layer,), tied)

    @classmethod
    def of_facts(cls, name: str, facts: dict[str, Any]) -> ModelShape:
        """The shape that an engine's facts describe."""
        heads = facts["num_heads"], facts["num_kv_heads"], facts["head_dim"]
        windowed = len(facts.get("windowed_layers") or ())
        counts = ((None, facts["num_layers"] - windowed), (facts.get("sliding_window"), windowed))
        layers = [
            Layers(count, Attention(*heads, window), FeedForward(facts["intermediate_size"]))
            for window, count in counts
            if count
        ]
        return cls(
            name, facts["vocab_size"], facts["hidden_size"], tuple(layers), tied=bool(facts["tie_word_embeddings"])
        )

    @property
    def num_layers(self) -> int:
        """Layers of all kinds."""
        return sum(layers.count for layers in self.layers)

    @property
    def num_sums(self) -> int:
        """Times that a step adds up what devices that share the layers have: after each mixer and each network."""
        return sum(
            layers.count * (1 if isinstance(layers.network, FeedForward) and not layers.network.inner else 2)
            for layers in self.layers
        )

    @property
    def head(self) -> Matrix:
        """The output projection."""
        return Matrix(self.hidden_size, self.vocab_size)

    @property
    def num_parameters(self) -> int:
        """Weights of projections and embeddings; norms, biases and convolutions are left out."""
        return self._embeddings + sum(
            layers.count * (_sizes(layers.matrices(self.hidden_size)) + layers.network.num * self._expert(layers))
            for layers in self.layers
        )

    @property
    def num_active_parameters(self) -> int:
        """Of these, those that a token is multiplied with; its embedding is looked up."""
        return self.head.size + sum(
            layers.count * (_sizes(layers.matrices(self.hidden_size)) + layers.network.top_k * self._expert(layers))
            for layers in self.layers
        )

    def weight_bytes(self, tensor_parallel: int = 1) -> float:
        """Bytes of the weights on one of so many devices."""
        return self._embeddings * STORED_BITS / 8 / tensor_parallel + self.layer_bytes(tensor_parallel)

    def layer_bytes(self, tensor_parallel: int = 1, expert_parallel: int = 1) -> float:
        """Bytes of the layers' weights on one of so many devices; experts lie whole on `expert_parallel` of them."""
        bits = 0.0
        for layers in self.layers:
            shared = layers.network.num * self._expert(layers) * self.bits_of_experts
            own = sum(
                matrix.size * self.bits_of(matrix) / (tensor_parallel if matrix.is_split else 1)
                for matrix in layers.matrices(self.hidden_size)
            )
            bits += layers.count * (own + shared / max(tensor_parallel, expert_parallel))
        return bits / 8

    def kv_bytes_per_token(self, tensor_parallel: int = 1) -> float:
        """Bytes that a token's keys and values take in all layers, on one of so many devices.

        A layer with a window counts as one without: the pool keeps all tokens.
        """
        values = sum(layers.count * layers.mixer.kv_values(tensor_parallel) for layers in self.layers)
        return values * self.kv_bits / 8

    @property
    def state_bytes(self) -> int:
        """Bytes that a sequence keeps in all layers however long it is."""
        return sum(layers.count * layers.mixer.state_bytes for layers in self.layers)

    @property
    def bits_of_experts(self) -> float:
        """Stored bits of a weight of an expert."""
        return self.weight_bits if self.expert_bits is None else self.expert_bits

    def bits_of(self, matrix: Matrix) -> float:
        """Stored bits of one of its weights."""
        return self.weight_bits if matrix.is_quantised else STORED_BITS

    @property
    def _embeddings(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    def _expert(self, layers: Layers) -> int:
        """Weights of one expert of these layers."""
        return _sizes(layers.network.of_each(self.hidden_size))

    def as_dict(self) -> dict[str, Any]:
        """The sizes by name; a layer's mixer and network with the kinds that they are."""
        layers = [
            {
                "count": group.count,
                "mixer": {"kind": type(group.mixer).__name__} | asdict(group.mixer),
                "network": {"kind": type(group.network).__name__} | asdict(group.network),
            }
            for group in self.layers
        ]
        return asdict(self) | {"layers": layers}


def _sizes(matrices: list[Matrix]) -> int:
    return sum(matrix.size for matrix in matrices)
