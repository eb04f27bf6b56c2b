#!/usr/bin/env bash
# Everything that needs a GPU, on any machine that has one: builds for its architecture, compares bits with the CPU,
# runs compute-sanitizer where it is installed, and times the fused step. Needs nvcc, a C++ compiler, and python with
# torch, pybind11, pytest and pytest-benchmark. Writes a Markdown report.
#
#   benchmarks/run_on_gpu.sh [report.md]
set -euo pipefail
cd "$(dirname "$0")/.."
report=${1:-gpu_report.md}
python=${PYTHON:-python}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

architecture=$("$python" - <<'PY'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("run_on_gpu.sh: torch sees no GPU on this machine")
print("".join(map(str, torch.cuda.get_device_capability())))
PY
)
QGM_CUDA=1 QGM_CUDA_ARCHS=$architecture "$python" setup.py build_ext --inplace

{
  echo "# qgm_ext on a GPU"
  echo
  echo "Measured $(date -u +%F) at commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)."
  echo
  echo '```'
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv || true
  "$python" -c "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"
  echo '```'
} > "$report"

status=0
section() {  # section TITLE COMMAND...: runs it, adds the end of its output to the report
  local title=$1
  shift
  local result=passed
  "$@" 2>&1 | tee "$log" || { result=FAILED; status=1; }
  { printf '\n## %s: %s\n\n```\n' "$title" "$result"; tail -n 5 "$log"; echo '```'; } >> "$report"
}

tests=("$python" -m pytest tests/test_gpu.py -m gpu -q -rs -p no:cacheprovider -o timeout=3600)
section "Same bits as the CPU" "${tests[@]}"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    section "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "${tests[@]}" -k "qg_dsgdm_n and float32 or relay_step and dsgdm_n and bfloat16 or reductions and bfloat16"
  done
else
  printf '\n## compute-sanitizer: not installed here, not run\n' >> "$report"
fi

section "Timing" "$python" -m pytest benchmarks/bench_gpu.py -m gpu --benchmark-only --benchmark-columns=median -q -s -rs -o timeout=3600
{ grep -E '^(Measured on|\|)' "$log" | sed 's/^Measured on.*/\n&\n/' || true; } >> "$report"
echo "wrote $report"
exit "$status"
