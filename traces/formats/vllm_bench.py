"""Results of `vllm bench serve --save-result --save-detailed`: a JSON object; with `--append-result` one a line.

Lists with an element a request: `start_times` (seconds of a clock without a date, since January 2026), `input_lens`,
`output_lens` (what was generated), `errors` (empty where there was none), `ttfts`. A result without `start_times` does
not say when its requests were sent. A request that failed has an error, or neither tokens nor a time to the first one.
Results ran one after the other, and are replayed so: each begins when the one before, which says its `duration`, had
ended. Nothing is known of the prompts, so each is a text of its own. Time 0 is the first request that was answered.
"""

from __future__ import annotations

from twinserve.settings.errors import InputError
from twinserve.traces.formats.reading import Reading, Rows, private_prompt
from twinserve.traces.lines import Line
from twinserve.traces.request import Request

NAME = "vllm-bench"
FIELDS = ("input_lens", "output_lens", "tokenizer_id")

_LISTS = ("input_lens", "output_lens", "errors")


def rows(results: list[Line], reading: Reading) -> Rows:
    """The requests that were answered, by the time they were sent; those that failed are counted.

    Raises:
        InputError: a list is missing or of another length, or a result says that other requests were answered.
    """
    found: list[tuple[Line, Request]] = []
    begun_ns = 0
    reading.is_timed = all("start_times" in result.values for result in results)
    for result in results:
        answered = _answered(result, reading, len(found))
        completed = result.optional_integer("completed")
        if completed is not None and completed != len(answered):
            raise result.error(f"expected {len(answered)}, the requests that have an answer", "completed")
        first_ns = min((request.arrival_ns for _, request in answered), default=0)
        moved_ns = begun_ns - first_ns if reading.is_timed and len(results) > 1 else 0
        found += [(line, request._replace(arrival_ns=request.arrival_ns + moved_ns)) for line, request in answered]
        if reading.is_timed and len(results) > 1:
            begun_ns += reading.time_ns(result, "duration")
            reading.repaired["results_one_after_the_other"] += 1
    yield from reading.sent(found, "start_times" if reading.is_timed else "input_lens")


def _answered(result: Line, reading: Reading, number: int) -> list[tuple[Line, Request]]:
    """The requests of a result that were answered, numbered from `number`."""
    lists = {name: _list(result, name) for name in _LISTS}
    if reading.is_timed:
        lists = {"start_times": _list(result, "start_times")} | lists
    first = next(iter(lists))
    length = len(lists[first])
    lists.setdefault("start_times", [0] * length)
    lists["ttfts"] = _list(result, "ttfts") if "ttfts" in result.values else [None] * length
    for name, values in lists.items():
        if len(values) != length:
            raise result.error(f"expected {length} elements, one for each of {first}", name, f"{len(values)} elements")
    answered: list[tuple[Line, Request]] = []
    for place, row in enumerate(zip(*lists.values(), strict=True)):
        line = Line(result.path, result.number, dict(zip(lists, row, strict=True)), f"request {place} of ")
        # Behind a proxy that gives no reason, a failure's error is empty.
        if line.values["errors"] or (line.values["output_lens"] == 0 and line.values["ttfts"] == 0):
            reading.dropped["failed"] += 1
            continue
        parts = private_prompt(number + len(answered), line.integer("input_lens", 1))
        time_ns, tokens = reading.time_ns(line, "start_times"), reading.output_tokens(line, "output_lens")
        answered.append((line, Request(number + len(answered), time_ns, parts, tokens)))
    return answered


def _list(result: Line, name: str) -> list:
    if name not in result.values:
        problem = "is missing, expected a result of `vllm bench serve --save-detailed`"
        raise InputError(problem, path=result.path, line=result.number, field=name)
    if type(result.values[name]) is not list:
        raise result.error("expected a list", name)
    return result.values[name]
