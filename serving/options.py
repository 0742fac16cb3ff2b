"""ServeOptions: what the server is told beside policies and engine, under vLLM's names where vLLM has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from twinserve.settings.config import read_table, validated
from twinserve.settings.limits import MOST, MOST_MIB, MOST_WAIT_S


class ServeOptions(BaseModel):
    """Where the server listens, and whom it lets in."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str = Field(default="127.0.0.1", description="address to listen at; 0.0.0.0 is every one of this machine")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen at; 0 takes a free one")
    served_model_name: list[str] = Field(default=[], description="what clients call the model; may be given again")
    api_key: list[str] = Field(default=[], description="what /v1 asks clients for; may be given again")
    allowed_origins: list[str] = Field(default=[], description="origins whose pages browsers let call; * is any")
    max_num_queued_reqs: int | None = Field(
        default=None,
        ge=0,
        le=MOST,
        description="requests that may be there at a time, waiting or running; 429 for those beyond (vLLM 0.33: 503)",
    )
    max_body_mib: float = Field(default=64, gt=0, le=MOST_MIB, description="MiB of a request; 413 beyond")
    client_timeout: float = Field(
        default=60,
        gt=0,
        le=MOST_WAIT_S,
        description="seconds in which a client has to send its request, and to go on reading its answer",
    )
    generation_config: Literal["auto", "vllm"] = Field(
        default="auto",
        description="sampling that a request leaves open: auto, as the model's generation config says; vllm: as it is",
    )
    max_logprobs: int = Field(
        default=20, ge=0, le=MOST, description="the most log-probabilities a token may be asked for"
    )
    shutdown_timeout: int = Field(
        default=30,
        ge=0,
        le=MOST_WAIT_S,
        description="seconds in which running requests may end at shutdown; then they are aborted",
    )

    @classmethod
    def load(cls, values: dict[str, Any], path: Path | None = None) -> ServeOptions:
        """Options from `values`, over the table `serve` of the TOML file `path`.

        Raises:
            InputError: a value is unknown, of the wrong kind, or out of range.
        """
        return validated(cls, read_table(path, "serve"), values, path, within="serve.")
