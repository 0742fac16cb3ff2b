"""What clients send: OpenAI's fields and vLLM's beside them, and how what cannot be served is refused."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import cached_property
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from twinserve.policies import SamplingParams
from twinserve.settings.limits import MOST_ANSWERS, MOST_STOPS

NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "documents": (None, []),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "modalities": (None, ["text"]),
    "prompt_embeds": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
"""Fields of OpenAI or vLLM that would change the answer and are not served, and the values that ask for nothing."""


class ApiError(Exception):
    """A request that cannot be served; the message goes to the client in vLLM's form."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return error_body(str(self), self.status, self.param)


def error_body(message: str, status: HTTPStatus, param: str | None = None) -> dict[str, Any]:
    """An error as vLLM says it."""
    kinds = {400: "BadRequestError", 404: "NotFoundError", 408: "RequestTimeoutError", 413: "PayloadTooLargeError"}
    kinds |= {429: "RateLimitError", 503: "ServiceUnavailableError"}
    kind = kinds.get(status, status.phrase)
    return {"error": {"message": message, "type": kind, "param": param, "code": int(status)}}


class Fields(BaseModel):
    """A body whose unknown fields are ignored, as vLLM ignores them; those of NOT_SERVED are refused."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _served(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in NOT_SERVED.keys() & values.keys() - cls.model_fields.keys():
                if values[name] not in NOT_SERVED[name]:
                    raise ValueError(f"{name} is not served here, expected it to be absent")
        return values


class StreamOptions(BaseModel):
    """What a stream says beside the answer."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Generation(Fields):
    """What completions and chats have in common."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[int, float] | None = Field(default=None, max_length=MOST_STOPS)
    min_tokens: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=MOST_STOPS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool | None = False
    priority: int = Field(default=0, ge=-(1 << 31), lt=1 << 31)
    cache_salt: str | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0)
    request_id: str | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("Stream options can only be defined when `stream=True`.")
        if self.cache_salt == "":
            raise ValueError("Parameter 'cache_salt' must be a non-empty string if provided.")
        if any(not -100 <= bias <= 100 for bias in (self.logit_bias or {}).values()):
            raise ValueError("logit_bias must have numbers from -100 to 100.")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("`prompt_logprobs` are not available when `stream=True`.")
        if any(not stop for stop in self.stops):
            raise ValueError("stop cannot contain an empty string.")
        if len(self.stops) > MOST_STOPS:
            raise ValueError(f"stop: expected at most {MOST_STOPS} strings, not {len(self.stops)}")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def token_limit(self) -> int | None:
        """The most tokens of an answer; None where the request leaves it open."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many log-probabilities are asked for of each token; None if none, not even its own."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As many, of each token of the prompt."""
        return self.prompt_logprobs

    def sampling_params(self, defaults: dict[str, Any], max_tokens: int, choice: int) -> SamplingParams:
        """How the tokens of one choice are chosen.

        Args:
            defaults: of what the request leaves open, as the model's generation config says.

        Raises:
            ApiError: a value is out of range.
        """
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        values = defaults | {name: value for name, value in given.items() if value is not None}
        values["top_k"] = max(0, values.get("top_k", 0))
        try:
            return SamplingParams(
                **values,
                max_tokens=max_tokens,
                seed=None if self.seed is None else self.seed + choice,
                ignore_eos=self.ignore_eos,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                min_tokens=self.min_tokens,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=tuple((self.logit_bias or {}).items()),
                logprobs=self.num_logprobs,
            )
        except ValueError as error:  # out of the policies' ranges, which are narrower than those of the fields
            raise ApiError(str(error)) from error


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0)
    add_special_tokens: bool = True

    @property
    def token_limit(self) -> int | None:
        return 1 if self.echoes_alone else self.max_tokens

    @property
    def echoes_alone(self) -> bool:
        """Is the prompt asked for, and no answer?"""
        return self.max_tokens == 0

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs

    @cached_property
    def prompts(self) -> Seq[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        rows = [item for item in self.prompt if not isinstance(item, int)]
        return rows or [[item for item in self.prompt if isinstance(item, int)]]

    @model_validator(mode="after")
    def _asks_for_few(self) -> CompletionRequest:
        if (count := len(self.prompts) * self.n) > MOST_ANSWERS:
            raise ValueError(f"prompt: {count} answers are asked for, expected at most {MOST_ANSWERS} at a time")
        return self

    @model_validator(mode="after")
    def _asks_for_tokens(self) -> CompletionRequest:
        if self.echoes_alone and not self.echo:
            raise ValueError("max_tokens: Input should be greater than or equal to 1, or 0 with echo")
        return self


class TextPart(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def as_template_takes_it(self) -> dict[str, Any]:
        """Role, content as one text, and what else it has."""
        parts = self.content
        text = "\n".join(part.text for part in parts) if isinstance(parts, list) else parts or ""
        return self.model_dump(exclude={"content"}, exclude_none=True) | {"content": text}


# What apply_chat_template of transformers takes beside the variables of a template. A template is a program, and so
# one of a client's could run for ever; the others say how many tokens there are to be, and of what kind.
_NOT_FROM_CLIENTS = (
    "chat_template",
    "conversation",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


class Chat(Fields):
    """Messages, and how a chat template makes a prompt of them."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_alone(cls, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in _NOT_FROM_CLIENTS:
            if name in (kwargs or {}):
                raise ValueError(f"expected variables of the model's chat template, which {name} is none of")
        return kwargs

    @model_validator(mode="after")
    def _one_end(self) -> Chat:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        return self


class ChatCompletionRequest(Generation, Chat):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _asks_for_both(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("when using `top_logprobs`, `logprobs` must be set to true.")
        return self


class TokenizeRequest(Fields):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
