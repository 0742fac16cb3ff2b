"""The learning guide's main loop as the guide gives it (import paths apart), and ours, which gives the same."""

from guide_models import subject

from twinserve.engine import continuous_batching
from twinserve.engine.block_manager import BlockManager
from twinserve.engine.model_runner import ModelRunner
from twinserve.engine.scheduler import Scheduler
from twinserve.engine.sequence import SamplingParams, Sequence, SequenceStatus


def run_continuous_batching(scheduler, model_runner, prompts, tokenizer):
    """
    Continuous Batching 메인 루프

    사용 예시를 참고하여 전체 흐름 이해
    """
    # 1. 모든 요청을 waiting 큐에 추가
    for prompt in prompts:
        tokens = tokenizer.encode(prompt)
        seq = Sequence(tokens, SamplingParams(max_tokens=50))
        scheduler.add(seq)

    results = {}

    # 2. 모든 요청 완료까지 반복
    while not scheduler.is_finished():
        # 스케줄링
        seqs, is_prefill = scheduler.schedule()

        if not seqs:
            break

        # 모델 실행
        next_tokens = model_runner.run(seqs, is_prefill)

        # 후처리
        scheduler.postprocess(seqs, next_tokens, tokenizer.eos_token_id)

        # 완료된 시퀀스 결과 저장
        for seq in seqs:
            if seq.status == SequenceStatus.FINISHED:
                results[seq.seq_id] = tokenizer.decode(seq.token_ids)

    return results


class Characters:
    """A tokenizer of single characters; the token 0 ends a text."""

    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(token) if token else "." for token in token_ids)


class Countdown:
    """A model that answers with the letters before the last one, and ends after "a"."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, bool]] = []

    def run(self, seqs: list[Sequence], is_prefill: bool) -> list[int]:
        self.batches.append((len(seqs), is_prefill))
        return [seq.token_ids[-1] - 1 if seq.token_ids[-1] > ord("a") else 0 for seq in seqs]


def test_the_guides_main_loop_serves_every_prompt_to_its_end():
    for loop in (run_continuous_batching, continuous_batching.run_continuous_batching):
        model = Countdown()
        results = loop(Scheduler(BlockManager(64, 4)), model, ["xxd", "yb", "zzzg"], Characters())
        assert list(results.values()) == ["yba.", "xxdcba.", "zzzgfedcba."]
        assert model.batches == [(3, True), (3, False), (2, False), (2, False), (1, False), (1, False), (1, False)]


def test_the_guides_main_loop_and_ours_draw_the_same_texts_from_a_model():
    of = subject("tiny")
    texts = []
    for loop in (run_continuous_batching, continuous_batching.run_continuous_batching):
        runner = ModelRunner(of.model, of.tokenizer, "cpu", num_blocks=64, block_size=16, seed=3)
        results = loop(Scheduler(BlockManager(64, 16)), runner, of.prompts, of.tokenizer)
        runner.close()
        texts.append([results[seq_id] for seq_id in sorted(results)])
    assert len(set(texts[0])) == len(of.prompts) and texts[0] == texts[1]
