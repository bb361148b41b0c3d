#!/usr/bin/env bash
# Makes .venv beside this script and installs the pinned dependencies. With nothing changed, a second run is instant.
#
#   bash install_dependencies.sh              what training, evaluation and inference need
#   bash install_dependencies.sh dev dicom    and these extras of pyproject.toml
#   --quiet                                   say nothing when everything is there
#
# Package mirror: pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
# Another torch:  VESSELRL_TORCH='torch==2.12.0' bash install_dependencies.sh     (remembered in .venv)
# Another Python: PYTHON=/usr/bin/python3.12 bash install_dependencies.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=.venv/bin/python

fail() { echo "install_dependencies.sh: $1" >&2; exit "${2:-1}"; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

quiet=no
groups=(run)
for argument in "$@"; do
  case "$argument" in
    --quiet) quiet=yes ;;
    dev | demo | dicom | nifti | docs | wandb) groups+=("$argument") ;;
    *) fail "unknown argument '$argument'. Usage: bash install_dependencies.sh [--quiet] [dev] [demo] [dicom] [nifti] [docs] [wandb]" 2 ;;
  esac
done

torch="${VESSELRL_TORCH:-}"
[[ -n "$torch" ]] || torch="$(cat .venv/vesselrl_torch 2>/dev/null || grep '^torch==' constraints.txt)"
wanted="$(printf '%s\n' "$PWD" "$torch" | cat - constraints.txt pyproject.toml | cksum)"

report() {
  "$python" - <<'PYTHON'
import sys
from importlib.metadata import version

names = ("torch", "transformers", "peft", "numpy", "opencv-python-headless", "scikit-image")
print(f"python {sys.version.split()[0]}, " + ", ".join(f"{name} {version(name)}" for name in names))
PYTHON
  echo "Next: bash run_lora_ppo.sh quick"
}

missing=()
for group in "${groups[@]}"; do
  [[ "$(cat ".venv/vesselrl_installed_$group" 2>/dev/null)" == "$wanted" ]] || missing+=("$group")
done
if [[ ${#missing[@]} -eq 0 ]] && is_new_enough "$python"; then
  [[ "$quiet" == yes ]] || { echo "The dependencies are installed in $PWD/.venv."; report; }
  exit 0
fi

if [[ -x "$python" ]]; then
  is_new_enough "$python" || fail "the Python in $PWD/.venv is older than 3.11. Delete .venv and run this again."
fi
if ! "$python" -m pip --version >/dev/null 2>&1; then
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
    if is_new_enough "$candidate"; then found="$candidate"; break; fi
  done
  [[ -n "${found:-}" ]] || fail "found no Python 3.11 or newer. Install one, or name it: PYTHON=/path/to/python3.11"
  "$found" -m venv .venv || fail "$found cannot make a virtual environment; on Debian and Ubuntu install python3-venv."
fi

# torch first and alone: pip then takes the pinned build and no other package can ask for a newer one.
grep -v '^torch==' constraints.txt >.venv/vesselrl_constraints.txt
# To compile all files would take a third of the time.
pip=("$python" -m pip install --no-compile --constraint .venv/vesselrl_constraints.txt)
echo "Installing into $PWD/.venv; torch is large, so the first time takes minutes."
"${pip[@]}" setuptools
"${pip[@]}" "$torch"
"$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
  >>.venv/vesselrl_constraints.txt || fail "'$torch' did not install torch."
extras="$(IFS=,; echo "${groups[*]:1}")"
# gradio asks for a Pillow before 13, which resizes pictures a little differently; the page works with the pinned one, too.
[[ ",$extras," != *,demo,* ]] || sed -i '/^pillow==/d' .venv/vesselrl_constraints.txt
"${pip[@]}" --no-build-isolation --editable ".${extras:+[$extras]}"
[[ ",$extras," != *,demo,* ]] || "${pip[@]}" --no-deps "$(grep '^pillow==' constraints.txt)"
# What a training imports is compiled now, also where Python writes no compiled files by itself.
env -u PYTHONDONTWRITEBYTECODE "$python" -c 'import matplotlib.figure, vesselrl.inference.merge, vesselrl.training.train'

[[ -z "${VESSELRL_TORCH:-}" ]] || echo "$torch" >.venv/vesselrl_torch
for group in "${groups[@]}"; do echo "$wanted" >".venv/vesselrl_installed_$group"; done
report
