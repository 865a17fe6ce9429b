#!/bin/sh
# vLLM with the guard inside: ./serve.sh MODEL [options of vllm serve]
GUARD_CONFIG="${GUARD_CONFIG:-$(dirname "$0")/guard.yaml}" exec vllm serve "$@" --middleware guard_integrations.vllm.VLLMGuard
