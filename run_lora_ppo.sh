#!/usr/bin/env bash
# Trains with PPO:   bash run_lora_ppo.sh quick|full [options of train_lora_ppo.py]
# Shell variables of the names below override the preset:   LORA_RANK=16 bash run_lora_ppo.sh quick
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
mode="${1:-}"
case "$mode" in
  quick | full) shift ;;
  *) echo "Usage: bash run_lora_ppo.sh quick|full [options]; got mode '$mode'." >&2; exit 2 ;;
esac

options=(--preset "$mode")
for name in MODEL_PATH DATA_ROOT OUTPUT_DIR GPU LORA_RANK LORA_ALPHA LORA_DROPOUT MAX_TRAIN_SAMPLES MAX_VAL_SAMPLES \
  NUM_EPOCHS LEARNING_RATE VAL_FREQ SAVE_FREQ REWARD_TYPE REWARD_SPEC STAGE SEED DICE_WEIGHT RECALL_WEIGHT \
  TOPOLOGY_WEIGHT LENGTH_WEIGHT RECALL_TARGET PROMPT; do
  [[ -z "${!name:-}" ]] || options+=("--$(echo "$name" | tr '[:upper:]' '[:lower:]')" "${!name}")
done

bash "$here/install_dependencies.sh" --quiet
exec "$here/.venv/bin/python" "$here/train_lora_ppo.py" "${options[@]}" "$@"
