#!/usr/bin/env bash
# Runs ruff and the tests; installs what they need first.   bash run_tests.sh [options of pytest]
# The exit code is pytest's, or 1 when only ruff complains.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash install_dependencies.sh --quiet dev

status=0
.venv/bin/python -m ruff check . || status=1
.venv/bin/python -m ruff format --check . || status=1
unset PYTHONDONTWRITEBYTECODE # or each of many processes would compile its packages again
# Two workers with one thread each: a small model gains little from more threads, and workers must not fight for cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/python -m pytest --numprocesses 2 --dist worksteal "$@" || status=$?
exit "$status"
