"""ShareGPT_V3 and its kin: one JSON list of conversations, `conversations` with `from` (human, gpt) and `value`.

A conversation is a session; each turn of a human that was answered is a request whose prompt is all that was said
before. When that was is not known, and how many tokens a text has is a tokenizer's to say: each is counted as one for
every four bytes begun, about what English has.
"""

from __future__ import annotations

from twinserve.traces.formats.reading import Reading, Rows
from twinserve.traces.lines import Line
from twinserve.traces.request import Part, Request, answer_text

NAME = "sharegpt-v3"
FIELDS = ("conversations",)

_HUMAN, _MODEL = ("human", "user"), ("gpt", "chatgpt", "assistant", "bing", "bard")
_BYTES = 4


def rows(conversations: list[Line], reading: Reading) -> Rows:
    """The requests of all conversations, one conversation after the other, all at 0."""
    reading.is_timed = False
    number = 0
    for session, conversation in enumerate(conversations):
        said: tuple[Part, ...] = ()
        after, asked = None, 0
        for line in conversation.items("conversations"):
            tokens = _tokens(line)
            speaker = line.get("from")
            if speaker in _MODEL and asked and tokens:
                said = (*said, Part(number, 0, asked))
                yield line, "from", Request(number, 0, said, tokens, session, after)
                said = (*said, Part(answer_text(number), 0, tokens))
                after, asked = number, 0
                reading.clipped["lengths_from_bytes"] += 1
                number += 1
            elif speaker in _HUMAN or speaker == "system":
                asked += tokens
            else:
                reading.dropped["turn_without_a_question"] += 1
        if asked:
            reading.dropped["question_without_an_answer"] += 1


def _tokens(line: Line) -> int:
    """About how many tokens a text has."""
    value = line.get("value")
    if type(value) is not str:
        raise line.error("expected text", "value")
    return -(-len(value.encode("utf-8", "replace")) // _BYTES)
