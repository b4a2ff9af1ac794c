"""What programs with vLLM and their tests agree on; imports nothing of vLLM."""

from __future__ import annotations

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
PROMPTS = ["the answer is", "in the beginning there was"]
TOKENS = 8
LIBRARIES_OF_STORES = ("azure", "boto3", "botocore", "google.auth", "google.cloud", "runai_model_streamer")
"""What an engine that loads through penstock cannot import in these tests."""
