"""Forms of a latency model, each judged on recorded runs that it was not fitted on.

    python benchmarks/latency_forms.py RUN RUN RUN... [--docs FOLDER] [--out FILE]

Each run, of one engine on one device, is predicted from the others: the device time of its steps as they were recorded,
and its latencies, simulated from its arrivals and lengths. Writes docs/latency-forms.md and
benchmarks/results/latency-forms.json. Needs scikit-learn, for the trees.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from environment import ROOT, commit, versions
from result_files import RESULTS, write_json

from twinserve.policies import Sequence
from twinserve.settings.build_core import Settings
from twinserve.sim.fit import FittedLatency, choose_knots, least_squares, ramps
from twinserve.sim.kernels import Kernels
from twinserve.sim.latency import StepCost, StepFeatures
from twinserve.sim.recorded_steps import fit_records, steps_of
from twinserve.sim.replica import simulate
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.traces.runs.vllm_records import requests_of
from twinserve.worlds.run import about_runs

Predict = Callable[[list[StepFeatures]], list[float]]
"""From features to nanoseconds on the device."""

Steps = list[tuple[StepFeatures, int]]
"""Features and nanoseconds on the device."""


def tokens_and_pairs(steps: Steps, model: FittedLatency) -> Predict:
    """Linear in contexts, query-key pairs, rows, sampled rows and ramps of tokens, decodes and prompts apart."""
    fitted = {}
    for with_prompts in (False, True):
        mine = [(f, ns) for f, ns in steps if bool(f.prompt_tokens) == with_prompts]
        knots = choose_knots([f.tokens for f, _ in mine])
        rows = np.array([_token_row(f, knots) for f, _ in mine])
        fitted[with_prompts] = (
            knots,
            least_squares(rows, np.array([ns for _, ns in mine]), np.ones(len(mine))),
        )

    def predict(features: StepFeatures) -> float:
        knots, coefficients = fitted[bool(features.prompt_tokens)]
        return float(np.dot(_token_row(features, knots), coefficients))

    return lambda steps: list(map(predict, steps))


def _token_row(f: StepFeatures, knots: list[int]) -> list[float]:
    pairs = f.attention_pairs if f.prompt_tokens else 0
    return [1.0, f.kv_tokens, pairs, f.seqs, f.sampled, *ramps(f.tokens, knots)]


def kernels(steps: Steps, model: FittedLatency) -> Predict:
    """The form of `twinserve fit`."""
    return lambda steps: [float(model.step_cost(features).device_ns) for features in steps]


def trees(steps: Steps, model: FittedLatency) -> Predict:
    """Gradient-boosted trees on the same features, rising in each of them, of the logarithm."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    rows = np.array([_tree_row(f, model.kernels) for f, _ in steps])
    booster = HistGradientBoostingRegressor(
        max_iter=300, learning_rate=0.08, min_samples_leaf=10, monotonic_cst=[1] * rows.shape[1], random_state=0
    )
    booster.fit(rows, np.log([ns for _, ns in steps]))
    return lambda steps: np.exp(booster.predict([_tree_row(f, model.kernels) for f in steps])).tolist()


def _tree_row(f: StepFeatures, cut: Kernels) -> list[float]:
    num_prompts, (tiles, contexts) = len(f.prompts), cut.tiles(f.prompts)
    decodes, tokens, sampled = cut.padded(f.decode_tokens, f.prompt_tokens, num_prompts, f.sampled)
    blocks = cut.blocks(decodes, f.longest_decode) if f.decode_tokens else 0
    return [tokens, sampled, f.decode_kv_tokens, blocks, tiles, contexts, f.longest_prompt, num_prompts, f.tokens]


FORMS = {"tokens and pairs": tokens_and_pairs, "kernels": kernels, "trees": trees}


class _Latency:
    """A form's device time, and the host's of the fit."""

    def __init__(self, predict: Predict, model: FittedLatency):
        self._predict, self._model = predict, model

    def step_cost(self, features: StepFeatures) -> StepCost:
        cost = self._model.step_cost(features)
        return cost._replace(device_ns=round(self._predict([features])[0]))


def judge(record: RunRecord, steps: Steps, predict: Predict, model: FittedLatency) -> dict[str, float]:
    """Relative errors: of sums and of single steps on the device, and of simulated means."""
    measured = np.array([ns for _, ns in steps])
    predicted = np.array(predict([f for f, _ in steps]))
    errors = np.abs(predicted / measured - 1.0)
    has_prompt = np.array([bool(f.prompt_tokens) for f, _ in steps])
    result = {"sum": float(predicted.sum() / measured.sum() - 1.0)}
    for name, kind in (("decode", ~has_prompt), ("prompt", has_prompt)):
        result[f"{name}_sum"] = float(predicted[kind].sum() / measured[kind].sum() - 1.0)
        result[f"{name}_step"] = float(errors[kind].mean())
    ended: list[Sequence] = []
    core = Settings.recorded(record.run["settings"], record.path).build_core()
    simulate(requests_of(record), core, _Latency(predict, model), progress=ended.append)
    firsts = [(seq.first_token_ns or 0) - seq.arrival_ns for seq in ended]
    later = [
        ((seq.finish_ns or 0) - (seq.first_token_ns or 0)) / (seq.num_completion_tokens - 1)
        for seq in ended
        if seq.num_completion_tokens > 1
    ]
    summary = record.run["summary"]
    result["ttft_mean"] = float(np.mean(firsts)) / 1e9 / summary["ttft_s"]["mean"] - 1.0
    result["tpot_mean"] = float(np.mean(later)) / 1e9 / summary["tpot_s"]["mean"] - 1.0
    return {name: round(value, 4) for name, value in result.items()}


def page(results: dict[str, Any]) -> str:
    """docs/latency-forms.md."""
    heads = ["sum", "decode_sum", "prompt_sum", "decode_step", "prompt_step", "tpot_mean", "ttft_mean"]
    lines = [
        "# Forms of a latency model",
        "",
        f"Made by `{results['command']}`; the numbers are in `benchmarks/results/latency-forms.json`.",
        "",
        "Each run is predicted from the others. On the device, given the steps as they were recorded: the error of the "
        "sum of all steps, of decodes and of steps with prompts, and the mean size of the error of one step. Simulated "
        "from arrivals and lengths alone: the errors of the mean TPOT and TTFT. The host is that of the fit in each.",
        "",
        "| run | form | all | decodes | prompts | a decode step | a prompt step | TPOT | TTFT |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run, forms in results["runs"].items():
        for form, errors in forms.items():
            cells = (f"{errors[head]:.1%}" if head.endswith("_step") else f"{errors[head]:+.1%}" for head in heads)
            lines.append(f"| `{run}` | {form} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency-forms.json")
    arguments = parser.parse_args()
    records = {path.name: load_record(path) for path in arguments.runs}
    if len(records) < 3:
        print("latency_forms.py: expected at least three runs with names of their own", file=sys.stderr)
        return 2
    steps = {name: steps_of(record) for name, record in records.items()}
    results: dict[str, Any] = {
        "command": "python benchmarks/latency_forms.py RUN...",
        "commit": commit(),
        "versions": versions(),
        "runs": {},
    }
    for name, record in records.items():
        others = [other for other in records if other != name]
        known = [records[other] for other in others]
        model = fit_records(known, about_runs(known))
        training = [step for other in others for step in steps[other]]
        results["runs"][name] = {
            form: judge(record, steps[name], fitted(training, model), model) for form, fitted in FORMS.items()
        }
        print(name, results["runs"][name], file=sys.stderr)
    write_json(arguments.out, results)
    (arguments.docs / "latency-forms.md").write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
