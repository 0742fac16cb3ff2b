"""Results of SGLang's `bench_serving --output-file --output-details`: a JSON object a line, one a rate.

`backend` and lists with an element a request: `input_lens`, `output_lens`, `errors`, `ttfts`. When requests were sent
is not in a result. Otherwise as vLLM's results are.
"""

from __future__ import annotations

from twinserve.traces.formats import vllm_bench

NAME = "sglang-bench"
FIELDS = ("backend", "input_lens", "output_lens")

rows = vllm_bench.rows
