#!/usr/bin/env bash
# What waits for a GPU, a stage at a time: benchmarks/gpu.sh tests|kernels|engine [OUT]. Needs torch, triton,
# transformers, peft, safetensors, typer and pytest, and nothing from outside the machine. A stage ends in less than ten
# minutes where a call may last no longer; results go to OUT (default: benchmarks/results). PYTHON names the Python,
# WORK a folder that outlives a call, for the random weights of 20 GB, ROWS other rows of the engine's table.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?name a stage: tests, kernels or engine}
out=${2:-benchmarks/results}
python=${PYTHON:-python3}
work=${WORK:-/tmp/lorafleet-weights}
mkdir -p "$out" "$work"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$python" -c 'import torch, triton, transformers; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, transformers.__version__)'
case "$stage" in
  # Builds (Triton compiles at first use) and checks: kernels against references, graphs against single launches, the
  # engine on the GPU against the engine on the CPU.
  tests) "$python" -m pytest -q -m gpu -p no:cacheprovider tests/engine tests/kernels ;;
  # Shrink and expand against their byte floor with the launches counted; then every path on every workload, and a cost
  # model fitted to them.
  kernels)
    "$python" -m lorafleet.cli bench kernels --device cuda --floor 8B | tee "$out/kernels-floor-cuda.txt"
    "$python" -m lorafleet.cli bench kernels --device cuda --fit "$out/cost-model-cuda.json" | tee "$out/kernels-cuda.txt"
    ;;
  # Each row is checked against transformers or peft before it is timed. The note below the table says how close decoding
  # comes to reading the weights: base_alone is batch 1, base batch 64.
  engine)
    "$python" -m lorafleet.cli bench engine --shape 8B --device cuda --repeats 1 --work "$work" --out "$out" \
      --rows "${ROWS:-base,base_alone,single,mix2,mix2_even8,mix2_even64,mix2_uneven64,token_top2}"
    ;;
  *) echo "unknown stage $stage; known are tests, kernels, engine" >&2; exit 2 ;;
esac
