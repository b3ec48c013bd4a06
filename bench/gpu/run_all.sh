#!/usr/bin/env bash
# Builds dcext for the GPU at hand, checks that its kernels are right there, then measures them. Needs no network.
#
#   bench/gpu/run_all.sh [--output DIR] [--limit SECONDS] [--steps "STEP ..."] [--smoke]
#
#   --output DIR       where logs and figures go; by default bench/results/gpu
#   --limit SECONDS    for everything, by default 570; a step that does not fit any more is left out, and said so.
#                      With more, steps may take more
#   --steps "STEP .."  some of: build tests memcheck racecheck compile decode gemm link model offload policy ptx; by default all
#   --smoke            tiny sizes, also without a GPU, with the extension that is there: figures mean nothing
#
# PYTHON names the Python, by default .venv/bin/python or python3, the first whose torch sees a GPU. What
# bench/gpu/kit.sh gathered in build/gpu-kit is used. Steps go on when one fails; the exit status is then 1.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/bench/gpu
kit=$root/build/gpu-kit
output=$root/bench/results/gpu
standard_limit=570
limit=$standard_limit
steps="build tests memcheck racecheck compile decode gemm link model offload policy ptx"
known=" $steps "
smoke=""

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
fail() {
  echo "run_all.sh: $*" >&2
  exit 2
}
needs_value() { [ $# -ge 2 ] || fail "$1: expected a value"; }

while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help)
      usage
      exit
      ;;
    --output)
      needs_value "$@"
      output=$2
      shift
      ;;
    --limit)
      needs_value "$@"
      [[ $2 =~ ^[0-9]+$ ]] || fail "--limit: expected seconds, got '$2'"
      limit=$2
      shift
      ;;
    --steps)
      needs_value "$@"
      for step in $2; do
        [[ $known == *" $step "* ]] || fail "--steps: expected some of$known, got '$step'"
      done
      steps=$2
      shift
      ;;
    --smoke) smoke=--smoke ;;
    *) fail "unknown argument '$1'; --help tells" ;;
  esac
  shift
done

# ---- The Python, and its GPU ----

gpu_of() {  # "8.0 NVIDIA A100", or fails and says on stdout what is wrong
  "$1" - 2> /dev/null << 'PY'
import sys
try:
    import torch
except ImportError:
    print("no torch")
    sys.exit(1)
if not torch.cuda.is_available():
    print(f"torch {torch.__version__} sees no GPU")
    sys.exit(1)
print("%d.%d" % torch.cuda.get_device_capability(), torch.cuda.get_device_name())
PY
}

python="" gpu="" seen=""
candidates=("$root/.venv/bin/python" python3 python)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
  command -v "$candidate" > /dev/null || continue
  if found=$(gpu_of "$candidate") && [[ $found =~ ^[0-9] ]]; then
    python=$candidate gpu=$found
    break
  fi
  seen="$seen; $candidate: ${found:-cannot be run}"
  [ -n "$python" ] || [ -z "$smoke" ] || [ "$found" = "no torch" ] || python=$candidate
done
if [ -z "$gpu" ] && [ -z "$smoke" ]; then
  fail "expected a Python whose torch sees a CUDA GPU, found none${seen:-; no python3}. PYTHON names another."
fi
[ -n "$python" ] || fail "expected a Python with torch, found none$seen"

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PIP_NO_INDEX=1
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 DCEXT_CUDA=1
if [ -n "$gpu" ]; then export TORCH_CUDA_ARCH_LIST=${gpu%% *}; fi
if [ -d "$kit/zstd" ]; then export DCEXT_ZSTD_DIR=$kit/zstd; fi
if [ -d "$kit/xxhash" ]; then export DCEXT_XXHASH_DIR=$kit/xxhash; fi
if [ -z "${CUDA_HOME:-}" ]; then  # torch takes the folder of nvcc, which may be a link or a script elsewhere
  nvcc=$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")
  for folder in "$(dirname "$(dirname "$nvcc")")" /usr/local/cuda; do
    if [ -f "$folder/include/cuda_runtime.h" ]; then
      export CUDA_HOME=$folder
      break
    fi
  done
fi

mkdir -p "$output"
output=$(cd "$output" && pwd)
rm -f "$output"/{build,tests,sanitizer,run}.log "$output"/{decode,gemm,link,model,offload,policy,summary}.json
cd "$root"
echo "${gpu:-no GPU}, $("$python" --version), $limit s, output in $output" | tee "$output/run.log"

# ---- Steps ----

names=() states=() seconds=()
# What later steps are to have left, at least, so that a slow one does not take it all.
declare -A least=([build]=60 [tests]=40 [memcheck]=20 [racecheck]=20 [compile]=20 [decode]=40 [gemm]=40 [link]=25 [model]=40 [offload]=50 [policy]=60 [ptx]=0)

say() { echo "$*" | tee -a "$output/run.log"; }

note() {  # step, state, seconds
  names+=("$1") states+=("$2") seconds+=("$3")
  say "-- $1: $2 ($3 s)"
}

allowed_for() {  # step, most seconds
  local later=0 seen_it="" step left
  for step in $steps; do
    [ -z "$seen_it" ] || later=$((later + least[$step]))
    [ "$step" != "$1" ] || seen_it=1
  done
  left=$((limit - SECONDS - later))
  local most=$((limit > standard_limit ? $2 * limit / standard_limit : $2))
  echo $((left < most ? left : most))
}

wanted() { [[ " $steps " == *" $1 "* ]]; }

# step, most seconds, log, command ...; ALLOWED in the command stands for the seconds that it may take by itself. Logs of
# steps that print tables are run.log, shown as they come.
run() {
  local step=$1 most=$2 log=$output/$3 allowed begin status=0 took
  shift 3
  wanted "$step" || return 0
  allowed=$(allowed_for "$step" "$most")
  if [ "$allowed" -lt 15 ]; then
    note "$step" "left out: out of time" 0
    return 0
  fi
  local command=("${@/#ALLOWED/$((allowed > 60 ? allowed - 25 : allowed * 3 / 5))}")
  begin=$SECONDS
  say "-- $step: at most $allowed s"
  if [ "$log" = "$output/run.log" ]; then
    timeout -s INT -k 10 "$allowed" "${command[@]}" 2>&1 | tee -a "$log" || status=$?
  else
    echo "\$ ${command[*]}" >> "$log"
    timeout -s INT -k 10 "$allowed" "${command[@]}" >> "$log" 2>&1 || status=$?
  fi
  took=$((SECONDS - begin))
  case $status in
    0) note "$step" ok "$took" ;;
    124 | 137) note "$step" "FAILED: took more than $allowed s" "$took" ;;
    *) note "$step" "FAILED: exit status $status" "$took" ;;
  esac
  return 0
}

last_state() { echo "${states[${#states[@]} - 1]-}"; }

show_failure() {  # log, lines
  [[ $(last_state) != FAILED* ]] || tail -n "$2" "$output/$1" | cut -c 1-400 | tee -a "$output/run.log"
}

build() {
  local suffix
  suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  rm -f "dcext/_C$suffix"  # of another device or another build of torch, perhaps
  run build 180 build.log "$python" setup.py build_ext --inplace
  show_failure build.log 25
}

pytest_step() {  # step, most seconds, files ...
  local step=$1 most=$2
  shift 2
  wanted "$step" || return 0
  local arguments=(-q -p no:cacheprovider)
  if "$python" -c 'import xdist' 2> /dev/null; then  # kernels are compiled beside each other
    arguments+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  fi
  # Tests need right results, not the fastest tiles.
  run "$step" "$most" tests.log env DCEXT_AUTOTUNE=0 "$python" -m pytest "${arguments[@]}" "$@"
  grep -E '^(FAILED|ERROR|SKIPPED)|(passed|failed|error).* in ' "$output/tests.log" | tail -n 15 | cut -c 1-300 |
    tee -a "$output/run.log" || true
}

sanitize() {  # tool of compute-sanitizer
  local sanitizer begin log=$output/sanitizer.log
  wanted "$1" || return 0
  sanitizer=$(command -v compute-sanitizer || true)
  [ -n "$sanitizer" ] || [ -z "${CUDA_HOME:-}" ] || sanitizer=$(command -v "$CUDA_HOME/bin/compute-sanitizer" || true)
  if [ -z "$sanitizer" ] || [ -z "$gpu" ]; then
    # Its cases are worth running unwatched.
    run "$1" 40 sanitizer.log "$python" "$here/sanitize.py" $smoke
    [ "$(last_state)" != ok ] || states[${#states[@]} - 1]="ok, but not watched: no compute-sanitizer, or no GPU"
    say "   ${states[${#states[@]} - 1]}"
    show_failure sanitizer.log 20
    return 0
  fi
  begin=$(wc -c < "$log" 2> /dev/null || echo 0)
  local options=(--tool "$1" --error-exitcode 99)
  [ "$1" != memcheck ] || options+=(--report-api-errors no)  # torch asks the driver for things that it may not have
  run "$1" 60 sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$sanitizer" "${options[@]}" "$python" "$here/sanitize.py"
  if [[ $(last_state) == FAILED* ]] &&
    tail -c "+$((begin + 1))" "$log" | grep -qiE 'device not supported|not supported on|failed to initialize'; then
    # It refuses the device, under some virtual machines: nothing was found, and nothing was looked for.
    states[${#states[@]} - 1]="not checked: compute-sanitizer refuses this device"
    say "   ${states[${#states[@]} - 1]}"
  fi
  show_failure sanitizer.log 20
}

if [ -z "$smoke" ] && wanted build; then build; fi
pytest_step tests 110 tests/kernels/test_cuda_ops.py tests/codec/test_seek_index.py tests/weights/test_resident.py tests/offloading/test_prefetching.py tests/offloading/test_device_plans.py \
  tests/kernels/test_int8_gemm_triton.py tests/kernels/test_packed_triton.py
sanitize memcheck
sanitize racecheck
run compile 60 run.log "$python" "$here/compile_kernels.py" $smoke
run decode 70 run.log "$python" "$here/decode.py" $smoke --output "$output/decode.json" --seconds ALLOWED
run gemm 70 run.log "$python" "$here/gemm.py" $smoke --output "$output/gemm.json" --seconds ALLOWED
run link 45 run.log "$python" "$here/link.py" $smoke --output "$output/link.json" --seconds ALLOWED
run model 90 run.log "$python" "$here/model.py" $smoke --output "$output/model.json" --seconds ALLOWED
run offload 120 run.log "$python" "$here/offload.py" $smoke --output "$output/offload.json" --seconds ALLOWED
run policy 100 run.log "$python" "$here/policy.py" $smoke --output "$output/policy.json" --seconds ALLOWED
# Without a GPU they say the same: last, if there is time.
pytest_step ptx 90 tests/kernels/test_int8_gemm_ptx.py tests/kernels/test_packed_ptx.py

# ---- The end ----

failed=0
say ""
for i in "${!names[@]}"; do
  say "$(printf '%-10s %4d s  %s' "${names[i]}" "${seconds[i]}" "${states[i]}")"
  case "${states[i]}" in
    ok* | "not checked"*) ;;
    "left out"* | "FAILED: took more"*) [ "${names[i]}" = ptx ] || failed=1 ;;  # which any machine can run
    *) failed=1 ;;
  esac
done
printf '%s\n' "${names[@]}" > "$output/steps.part"
printf '%s\n' "${states[@]}" > "$output/states.part"
printf '%s\n' "${seconds[@]}" > "$output/seconds.part"
"$python" - "$output" "$SECONDS" "${smoke:+1}" << 'PY' || failed=1
import json, pathlib, sys
sys.path.insert(0, "bench")
folder = pathlib.Path(sys.argv[1])
columns = [(folder / f"{name}.part").read_text().splitlines() for name in ("steps", "states", "seconds")]
for name in ("steps", "states", "seconds"):
    (folder / f"{name}.part").unlink()
try:
    from hardware import hardware
    machine = hardware()
except Exception as error:  # the extension was not built
    machine = {"line": f"unknown: {type(error).__name__}: {error}"}
report = {
    "kind": "smoke, means nothing" if sys.argv[3] else "measured",
    "hardware": machine,
    "seconds": int(sys.argv[2]),
    "steps": [{"name": n, "state": s, "seconds": int(t)} for n, s, t in zip(*columns, strict=True)],
}
(folder / "summary.json").write_text(json.dumps(report, indent=1) + "\n")
print(machine["line"])
for log in folder.glob("*.log"):  # the end of a log that something filled
    if log.stat().st_size > 8 << 20:
        log.write_bytes(log.read_bytes()[-(8 << 20):])
PY
if [ "$failed" -ne 0 ]; then say "something failed: see above, and the logs in $output"; fi
exit "$failed"
