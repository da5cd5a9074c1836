#!/usr/bin/env bash
# Proves and measures everything where there is a GPU, in under nine minutes; --help says more.
# PYTHON=... picks the interpreter: else the clone's .venv, else python3.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  if [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m tests.gpu_suite "$@"
