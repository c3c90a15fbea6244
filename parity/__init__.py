"""The parity harness: what torchtune_qwen25vl computes against what transformers computes."""
