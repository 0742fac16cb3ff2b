"""The CUDA path: a step from token ids to sampled tokens in one CUDA graph, its sequences kept on the device."""
