#!/usr/bin/env bash
# Measure a GPU in one run of six minutes at most; every figure also goes to a JSON file:
#   bash bench/gpu.sh results.json
#   bash bench/gpu.sh --dry_run results.json      # tiny models on the CPU, to find mistakes first
#   PYTHON=.venv/bin/python bash bench/gpu.sh results.json
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
