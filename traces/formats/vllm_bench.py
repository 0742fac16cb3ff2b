"""The result of `vllm bench serve --save-result --save-detailed` (vLLM since January 2026): one JSON object.

Lists with an element a request: `start_times` (seconds of a clock without a date), `input_lens`, `output_lens` (what
was generated), `errors` (empty where there was none). Results from before `start_times` do not say when a request was
sent. Nothing is known of the prompts, so each is a text of its own. Time 0 is the first request that was answered.
"""

from __future__ import annotations

from twinserve.settings.errors import InputError
from twinserve.traces.formats.reading import Reading, Rows, private_prompt
from twinserve.traces.lines import Line
from twinserve.traces.request import Request

NAME = "vllm-bench"
KEYS = {"input_lens", "output_lens", "request_throughput", "tokenizer_id"}

_LISTS = ("input_lens", "output_lens", "errors")


def rows(result: Line, reading: Reading) -> Rows:
    """The requests that were answered, by the time they were sent; those that failed are counted."""
    values = {name: _list(result, name) for name in ("start_times", *_LISTS)}
    for name in _LISTS:
        if len(values[name]) != len(values["start_times"]):
            problem = f"expected {len(values['start_times'])} elements, one for each of start_times"
            raise result.error(problem, name, f"{len(values[name])} elements")
    found: list[tuple[Line, Request]] = []
    for number, (time, prompt_tokens, output_tokens, error) in enumerate(zip(*values.values(), strict=True)):
        if error:
            reading.dropped["failed"] += 1
            continue
        request = {"start_times": time, "input_lens": prompt_tokens, "output_lens": output_tokens}
        line = Line(result.path, result.number, request, f"request {number} of ")
        parts = private_prompt(number, line.integer("input_lens", 1))
        time_ns = reading.time_ns(line, "start_times")
        found.append((line, Request(number, time_ns, parts, reading.output_tokens(line, "output_lens"))))
    yield from reading.sent(found, "start_times")


def _list(result: Line, name: str) -> list:
    if name not in result.values:
        problem = "is missing, expected a result of `vllm bench serve --save-detailed` of January 2026 or later"
        raise InputError(problem, path=result.path, line=result.number, field=name)
    if type(result.values[name]) is not list:
        raise result.error("expected a list", name)
    return result.values[name]
