from twinserve.policies.sequence import SamplingParams, Sequence, SequenceStatus

__all__ = ["SamplingParams", "Sequence", "SequenceStatus"]
