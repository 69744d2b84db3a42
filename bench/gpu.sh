#!/usr/bin/env bash
# Everything that wants a GPU, on a bare machine, in ten minutes: bench/gpu.sh [-t SECONDS] [FOLDER [PART...]]
#
# Needs nvcc, a C++ compiler, and a Python with torch, numpy, safetensors, pytest, hypothesis, pybind11, scikit-build-core,
# cmake and ninja; compute-sanitizer and ncu are used where they are. No network, and nothing is installed into the system:
# what is built lies in build/gpu, and a second run builds only what changed.
#
# nvcc takes minutes for the kernel of all calls, on however many cores. Where time with a GPU is short, run the part `core`
# beforehand on any machine with the same nvcc, and take build/gpu/core along: then the part `build` compiles the Python side alone.
# PYMETA_GPU_ARCH says for which GPU (90, for compute capability 9.0, unless it is set), PYMETA_GPU_ISAS for which of the host's
# instruction sets, as in avx512 (unless it is set, all: a core knows nothing of the machine that it will run on).
#
# PARTS, in this order (default: all but those in brackets)
#   core       [the kernels and all else that knows nothing of Python, into build/gpu/core; without a GPU]
#   build      pymeta with the CUDA executor for this GPU alone, and the emulated device, which a test compares with it
#   kernels    registers, stack, spills and code of each kernel (kernel_report.py)
#   info       python -m pymeta.info, with its self-test
#   smoke      gpu_calls.py, every launch waited for: what fails here needs no test to be found
#   tests      tests/cuda; at the same time as the next four
#   emulated   [tests/device, which needs no GPU]
#   memcheck, racecheck, synccheck
#              compute-sanitizer's tool of that name over gpu_calls.py
#   initcheck  [likewise; it reports padding that is copied as it is and never used]
#   bench      python -m pymeta.bench --device cuda: the four cases that decide, large ones first
#   many       the same for 100,000 networks that are fine-tuned: for some rivals most of the device's memory
#   sweep      the same for pymeta alone with several numbers of threads of a block
#   special    two of those cases with kernels of their own (PYMETA_SPECIALISE), which are compiled first
#   ncu        Nsight Compute's view of W1 T=4096 and W3 T=1024
#
# FOLDER (default bench/results/gpu) gets summary.md, log.txt, junit.xml, bench.json, bench.md, many.json, sweep.json, special.json,
# kernels.json and ncu.txt. A part that fails or runs out of its time is noted, and the next one begins. Exit status: 1 where the build, the smoke
# run, a test or a sanitizer failed or was asked for and not run to its end; initcheck, bench, many, sweep, special and ncu
# do not count.
# shellcheck disable=SC2329 # the functions of the parts are called by name, through `run` and `start`
set -uo pipefail

total=570 # seconds
if [[ ${1:-} == -t ]]; then
  total=$2
  shift 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/bench/results/gpu}
shift $(($# ? 1 : 0))
parts=("$@")
sanitizers=(memcheck racecheck synccheck)
((${#parts[@]})) || parts=(build kernels info smoke tests "${sanitizers[@]}" bench many sweep special ncu)
known=" core build kernels info smoke tests emulated ${sanitizers[*]} initcheck bench many sweep special ncu "
for part in "${parts[@]}"; do
  [[ $known == *" $part "* ]] || { echo "gpu.sh: no part '$part'; there are$known" >&2; exit 2; }
done

mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=$root/build/gpu
site=$work/site
logs=$work/logs
rm -rf "$logs" "$work/run" "$work/results"
mkdir -p "$logs" "$work/run" "$work/results" || exit 2
cp -r "$root/tests" "$root/pyproject.toml" "$root/bench/gpu_calls.py" "$root/bench/kernel_report.py" "$work/run"

python=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: no ${PYTHON:-python3}" >&2; exit 2; }
python=$("$python" -c 'import sys; print(sys.executable)') # not a wrapper script: sanitizers follow the process itself
for folder in "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}; do
  [[ -d $folder ]] && PATH=$PATH:$folder
done
export PATH PYTHONPATH=$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
CUDACXX=${CUDACXX:-$(command -v nvcc)}
export CUDACXX

# ---- parts and their state ---------------------------------------------------------------------------------------

declare -A state note took
order=()

left() { # seconds left of all, or of a part that may take so many: left [SECONDS]
  local now=$((total - SECONDS))
  ((now < 1)) && now=1
  echo $((${1:-$now} < now ? ${1:-$now} : now))
}
wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }
say() { printf '%4ds  %s\n' "$SECONDS" "$*"; }

# A part's end by its exit code: settle NAME CODE STARTED
settle() {
  local name=$1 code=$2
  took[$name]=$((SECONDS - $3))
  case $code in
    0) state[$name]=passed ;;
    124 | 137) state[$name]="out of time" ;;
    77) state[$name]="not possible here" ;;
    *) state[$name]=failed ;;
  esac
  note[$name]=$(last_words "$name")
  say "$name: ${state[$name]}${note[$name]:+ (${note[$name]})}"
}
# What a part's log ends with, or says of its errors, in a line.
last_words() {
  local said
  said=$(grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY|^=+ .*(passed|failed|error|skipped).*=+$|^(self-test|kernel_report:|gpu\.sh:)' \
    "$logs/$1.txt" 2>/dev/null | tail -n 1)
  [[ -n $said ]] || said=$(grep -vE '^\s*$' "$logs/$1.txt" 2>/dev/null | tail -n 1)
  said=${said//=/}
  said=${said//|//}
  echo "${said:0:120}" | sed 's/^ *//; s/ *$//'
}
# A shell has its background commands ignore SIGINT; env undoes that.
heeding_interrupts=(env --default-signal=INT)
"${heeding_interrupts[@]}" true 2>/dev/null || heeding_interrupts=()
# within SECONDS COMMAND...: interrupted when they are over, so that it can still write its report.
within() {
  local seconds
  seconds=$(left "$1")
  shift
  timeout --signal=INT --kill-after=10 "$seconds" "${heeding_interrupts[@]}" "$@"
}
# Whether there is time for another part.
begin() {
  order+=("$1")
  if ((total - SECONDS < 5)); then
    state[$1]="out of time"
    say "$1: no time left"
    return 1
  fi
  say "$1 ..."
}
# run NAME FUNCTION [ARGUMENTS...]: here and now
run() {
  local name=$1 began=$SECONDS
  shift
  begin "$name" || return
  "$@" >"$logs/$name.txt" 2>&1
  settle "$name" $? "$began"
}
# start NAME FUNCTION [ARGUMENTS...]: beside others; `finish` waits for all of them.
declare -A started began_at
start() {
  local name=$1
  shift
  begin "$name" || return
  began_at[$name]=$SECONDS
  "$@" >"$logs/$name.txt" 2>&1 &
  started[$name]=$!
}
finish() {
  local name
  for name in "${order[@]}"; do
    [[ -n ${started[$name]:-} ]] || continue
    wait "${started[$name]}"
    settle "$name" $? "${began_at[$name]}"
    unset "started[$name]"
  done
}

cores() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc; } # which nproc would heed

# ---- what the parts do -------------------------------------------------------------------------------------------

machine() {
  nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm --format=csv
  "$CUDACXX" --version | tail -n 2
  "$python" - <<'PYTHON'
import importlib.metadata, os, platform
print("python", platform.python_version(), "on", os.cpu_count(), "cores")
try:
    import torch
    print("torch sees", torch.cuda.device_count(), "GPUs, CUDA", torch.version.cuda)
except Exception as error:
    print("torch:", error)
for name in ("torch", "numpy", "jax", "pytest", "hypothesis", "pybind11", "scikit-build-core", "cmake", "ninja"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
PYTHON
  git -C "$root" log -1 --format='%h %s' 2>/dev/null
  true
}

# What a core was built of: its files, in an order of their own in every locale, and its CUDA.
sources() {
  (cd "$root" && find CMakeLists.txt cmake csrc -type f ! -path 'csrc/bind/*' ! -path 'csrc/tests/*' \
    \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.txt' -o -name '*.cmake' -o -name '*.py' \) -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum && "$CUDACXX" --version | grep -o 'release [0-9.]*') | sha256sum | cut -d ' ' -f 1
}
configured_for() { # ARCHITECTURE: -Xptxas=-v is for kernel_report.py, -lineinfo for the sanitizers and ncu; neither changes the code.
  printf '%s\n' PYMETA_CUDA=ON PYMETA_EMULATE=ON \
    "CMAKE_CUDA_ARCHITECTURES=$1-real" "CMAKE_CUDA_FLAGS=-Xptxas=-v -lineinfo"
}
core() {
  local arch=${PYMETA_GPU_ARCH:-90} defines
  [[ -n $CUDACXX ]] || { echo "gpu.sh: no nvcc on the PATH or in /usr/local/cuda/bin"; return 1; }
  mapfile -t defines < <(configured_for "$arch")
  defines+=("PYMETA_ISAS=${PYMETA_GPU_ISAS:-}")
  rm -rf "$work/core" && mkdir -p "$work/core" || return 1
  cmake -S "$root" -B "$root/build/gpu-core" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPYMETA_BUILD_PYTHON=OFF "${defines[@]/#/-D}" &&
    cmake --build "$root/build/gpu-core" --target pymeta_core --clean-first --parallel "$(cores)" 2>&1 | tee "$work/core/build.log"
  ((PIPESTATUS[0] == 0)) && cp "$root/build/gpu-core/libpymeta_core.a" "$work/core/" || return 1
  echo "$arch $(sources)" >"$work/core/made_of"
  du -h "$work/core/libpymeta_core.a"
}
# Whether there is one of these sources for this architecture: it is said why not.
has_core() {
  [[ -f $work/core/made_of ]] || return 1
  [[ $(<"$work/core/made_of") == "$1 $(sources)" ]] && return 0
  echo "gpu.sh: build/gpu/core is of other sources, another nvcc or GPU: everything is compiled here"
  return 1
}

architecture() { # 90 for compute capability 9.0
  local found
  found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
  [[ $found =~ ^[0-9]+\.[0-9]+$ ]] ||
    found=$("$python" -c 'import torch; print(*torch.cuda.get_device_capability(), sep=".")' 2>/dev/null)
  [[ $found =~ ^[0-9]+\.[0-9]+$ ]] && echo "${found/./}"
}

build() {
  build_for "$(architecture)" 2>&1 | tee "$work/build.log"
  local code=${PIPESTATUS[0]}
  [[ -f $work/with_core ]] && cat "$work/core/build.log" >>"$work/build.log"
  return "$code"
}
build_for() {
  local arch=$1
  [[ -n $CUDACXX ]] || { echo "gpu.sh: no nvcc on the PATH or in /usr/local/cuda/bin"; return 1; }
  [[ -n $arch ]] || { echo "gpu.sh: neither nvidia-smi nor torch tells the compute capability"; return 1; }
  local defines
  mapfile -t defines < <(configured_for "$arch")
  CMAKE_BUILD_PARALLEL_LEVEL=$(cores)
  export CMAKE_BUILD_PARALLEL_LEVEL
  rm -f "$work/with_core"
  if has_core "$arch"; then
    touch "$work/with_core"
    build_with "${defines[@]}" "PYMETA_CORE=$work/core/libpymeta_core.a" && return 0
    echo "gpu.sh: not with build/gpu/core: everything is compiled here"
    rm -f "$work/with_core"
  fi
  # This machine's own instruction set: the others are for other machines.
  grep -q avx512bw /proc/cpuinfo 2>/dev/null && defines+=(PYMETA_ISAS=avx512)
  build_with "${defines[@]}" PYMETA_CORE=
}
build_with() { # DEFINITIONS of CMake's
  local began=$SECONDS
  rm -rf "$site"
  within 450 "$python" -m pip install -v --disable-pip-version-check --no-index --no-deps --no-build-isolation \
    --target "$site" --config-settings="build-dir=$work/cmake" "${@/#/--config-settings=cmake.define.}" \
    "$root" && return 0
  # Quickly over: not the compiler, but what packages it (an older scikit-build-core, say).
  ((SECONDS - began < 30)) || return 1
  echo "gpu.sh: pip failed, by CMake alone"
  build_by_cmake "$@"
}
build_by_cmake() {
  rm -rf "$site" "$work/cmake-alone"
  within 60 cmake -S "$root" -B "$work/cmake-alone" -DCMAKE_BUILD_TYPE=Release "-DPython_EXECUTABLE=$python" \
    "-DCMAKE_INSTALL_PREFIX=$site" "${@/#/-D}" &&
    within 450 cmake --build "$work/cmake-alone" --target _native &&
    cmake --install "$work/cmake-alone" || return 1
  cp -r "$root"/pymeta/. "$site/pymeta"
  local about=$site/pymeta_kernels-0+unknown.dist-info
  mkdir "$about" && printf 'Metadata-Version: 2.1\nName: pymeta-kernels\nVersion: 0+unknown\n' >"$about/METADATA"
}

in_run() { (cd "$work/run" && "$@"); }

kernels() {
  local module log=()
  module=$(find "$site/pymeta" -name '_native*.so' | head -n 1)
  [[ -f $work/build.log ]] && log=(--log "$work/build.log")
  # Without cuobjdump the build's log tells all but the code's size.
  in_run within 60 "$python" kernel_report.py "$module" "${log[@]}" --json "$work/results/kernels.json" ||
    in_run within 60 "$python" kernel_report.py "${log[@]}" --json "$work/results/kernels.json"
}

info() {
  # Not another pymeta that this Python may have.
  in_run "$python" -c 'import pymeta._native, sys; print("module     ", pymeta._native.__file__)
sys.exit(not pymeta._native.__file__.startswith(sys.argv[1]))' "$site" || {
    echo "gpu.sh: $python has a pymeta of its own (an editable install?), which would be tested in place of this one"
    return 1
  }
  in_run within 60 "$python" -m pymeta.info
}

# pytest SECONDS TESTS [OPTIONS...]; on several processes where pytest-xdist is there. A skipped module is no pass.
pytest_of() {
  local seconds=$1 log
  shift
  local spread=()
  "$python" -c 'import xdist' 2>/dev/null && spread=(-n 6)
  log=$(mktemp)
  in_run within "$seconds" "$python" -m pytest -p no:cacheprovider "${spread[@]}" "$@" 2>&1 | tee "$log"
  local code=${PIPESTATUS[0]}
  grep -qE '^=+ .*[0-9]+ passed' "$log" || ((code)) || code=1
  rm -f "$log"
  return "$code"
}
tests() { pytest_of 130 tests/cuda --junitxml "$work/results/junit.xml" --durations 15; }
emulated() { pytest_of 200 tests/device; }

smoke() { CUDA_LAUNCH_BLOCKING=1 in_run within 60 "$python" gpu_calls.py all; }

# Each allocation by itself, so that memcheck sees the end of every array.
sanitize() {
  local tool=$1 port=$2 log code only=() calls=(all)
  command -v compute-sanitizer >/dev/null || { echo "gpu.sh: no compute-sanitizer"; return 77; }
  # initcheck has to see who writes what, torch's kernels too.
  [[ $tool != initcheck && $(compute-sanitizer --help 2>&1) == *"--kernel-name "* ]] && only=(--kernel-name kns=pymeta)
  # Barriers are the same in both precisions; addresses are not.
  [[ $tool == racecheck || $tool == synccheck ]] && calls=(all float32)
  log=$(mktemp)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 in_run within 130 compute-sanitizer --tool "$tool" --port "$port" \
    --error-exitcode 9 --report-api-errors no --print-limit 20 "${only[@]}" "$python" gpu_calls.py "${calls[@]}" 2>&1 | tee "$log"
  code=${PIPESTATUS[0]}
  grep -q 'Device not supported' "$log" && code=77
  ((code == 0)) && ! grep -q 'gpu_calls: all calls made' "$log" && code=1
  rm -f "$log"
  return "$code"
}

bench() {
  local seconds=$1
  shift
  in_run within "$seconds" "$python" -m pymeta.bench --device cuda "$@"
}

special() {
  PYMETA_SPECIALISE=1 PYMETA_CACHE="$work/special" bench "$@"
}

profile() {
  local code=0 case sections=(SpeedOfLight MemoryWorkloadAnalysis SchedulerStats WarpStateStats InstructionStats
    SourceCounters Occupancy LaunchStats)
  command -v ncu >/dev/null || { echo "gpu.sh: no ncu"; return 77; }
  for case in "W1 4096" "W3 1024"; do
    echo "---- $case"
    # shellcheck disable=SC2086 # two arguments
    in_run within 40 ncu --clock-control none "${sections[@]/#/--section=}" --kernel-name 'regex:.*run_tasks.*' --launch-skip 2 --launch-count 1 \
      "$python" gpu_calls.py $case || code=$?
  done
  grep -q 'LibraryNotLoaded\|ERR_NVGPUCTRPERM' "$logs/ncu.txt" && code=77
  cp "$logs/ncu.txt" "$work/results/ncu.txt"
  return "$code"
}

# ---- the summary -------------------------------------------------------------------------------------------------

summary() {
  local name
  echo "# pymeta on a GPU, $(date -u +%Y-%m-%d)"
  echo
  sed 's/^/    /' "$logs/machine.txt"
  printf '\n| part | state | seconds | last words |\n|---|---|---:|---|\n'
  for name in "${order[@]}"; do
    echo "| $name | ${state[$name]:-stopped} | ${took[$name]:-} | ${note[$name]:-} |"
  done
  for name in kernels info; do
    [[ -s $logs/$name.txt ]] && printf '\n## %s\n\n%s\n' "$name" "$(cat "$logs/$name.txt")"
  done
  for name in bench many sweep special; do
    [[ -s $work/results/$name.md ]] && printf '\n## %s\n\n%s\n' "$name" "$(cat "$work/results/$name.md")"
  done
}
write_results() {
  local name
  for name in machine "${order[@]}"; do
    printf '\n======== %s\n\n' "$name"
    cat "$logs/$name.txt" 2>/dev/null
  done >"$out/log.txt"
  for name in junit.xml bench.json bench.md many.json sweep.json special.json kernels.json ncu.txt; do
    [[ -s $work/results/$name ]] && cp "$work/results/$name" "$out/"
  done
  summary >"$out/summary.md"
}
counts_against() { # whether a part that did not pass makes the run fail
  [[ $1 =~ ^(core|build|info|smoke|tests|emulated|memcheck|racecheck|synccheck)$ && ${state[$1]:-stopped} != "passed" ]] &&
    [[ ${state[$1]:-stopped} != "not possible here" ]]
}
end() {
  trap - EXIT INT TERM
  local name code=0
  for name in "${started[@]}"; do kill "$name" 2>/dev/null; done
  write_results
  echo
  printf '%-12s %-18s %8s   %s\n' part state seconds 'last words'
  for name in "${order[@]}"; do
    printf '%-12s %-18s %8s   %s\n' "$name" "${state[$name]:-stopped}" "${took[$name]:-}" "${note[$name]:-}"
    counts_against "$name" && code=1
  done
  printf '\n%s: %s; %d s\n' "$out" "$( ((code)) && echo FAILED || echo passed)" "$SECONDS"
  exit "$code"
}
trap end EXIT INT TERM

# ---- the run -----------------------------------------------------------------------------------------------------

machine >"$logs/machine.txt" 2>&1 & # beside the build: torch's first import takes its time
machine=$!
wanted core && run core core
if [[ ${parts[*]} == core ]]; then
  wait "$machine"
  exit 0
fi
wanted build && run build build
if ! compgen -G "$site/pymeta/_native*.so" >/dev/null; then
  echo "gpu.sh: nothing is built, so nothing can be run" | tee -a "$logs/machine.txt"
  exit 1
fi
wanted kernels && start kernels kernels # beside the next ones: it needs no GPU
wanted info && run info info
wanted smoke && run smoke smoke
wanted tests && start tests tests
wanted emulated && [[ -d $work/run/tests/device ]] && start emulated emulated
port=49152
for tool in "${sanitizers[@]}" initcheck; do
  wanted "$tool" && start "$tool" sanitize "$tool" "$port"
  port=$((port + 100))
done
finish
wait "$machine"
# From here on nothing else runs: times are taken.
wanted bench && run bench bench 180 --budget 150 --cases "W1 T=65536 K=1" "W3 T=16384 K=5" "W1 T=25 K=1" "W3 T=1024 K=5" \
  --out "$work/results/bench.json"
wanted many && run many bench 150 --budget 105 --rounds 3 --cases "W5 fine-tuning T=100000 K=20" --out "$work/results/many.json"
wanted sweep && run sweep bench 60 --only pymeta --cases "W1 T=25 K=1" "W1 T=4096 K=1" "W3 T=1024 K=5" \
  "W5 fine-tuning T=1000 K=20" \
  --block-threads 32 64 128 256 --out "$work/results/sweep.json"
wanted special && run special special 90 --only pymeta --cases "W1 T=65536 K=1" "W3 T=16384 K=5" --out "$work/results/special.json"
wanted ncu && run ncu profile
exit 0
