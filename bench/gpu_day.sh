#!/usr/bin/env bash
# One call on a machine with an H100: everything that only hardware can show, most important first. In the repository root:
#
#     bash bench/gpu_day.sh [phase ...]        # all phases, or some of: facts selfcheck rows probe tiny decoding kernels tests sanitizer
#
# OUT: where logs go (default gpu-day-out). GPU_DAY_SECONDS: begin nothing that would end later (default 490).
# GPU_DAY_CARRY: a folder with gguf-*.whl and triton-cache.tar.xz (default .gpu). Each phase has its own limit and log; the last
# lines printed, and $OUT/verdicts.txt, say in a line what each found. A phase that fails stops nothing. What was found is kept
# in bench/results, and docs/hardware.md follows from it (bench/hardware.py). Exit status: 0 where all is well, 1 where a
# phase found something wrong or did not end, 2 outside of the repository, 3 without a GPU: then nothing is kept.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$PWD
OUT=${OUT:-$ROOT/gpu-day-out}
CARRY=${GPU_DAY_CARRY:-$ROOT/.gpu}
LIMIT=${GPU_DAY_SECONDS:-490}
PY=${PYTHON:-python3}
LOGS=$(mktemp -d)
mkdir -p "$OUT"
: > "$OUT/verdicts.txt"
[ -f "$ROOT/idlm_kernels/_version.py" ] || { echo "run this in the repository root" | tee "$OUT/verdicts.txt"; exit 2; }

wanted=" ${*:-facts selfcheck rows probe tiny decoding kernels tests sanitizer} "
worst=0
say() { echo "[$SECONDS s] $*" | tee -a "$OUT/verdicts.txt"; }
pack() { tar -C "$LOGS" -czf "$LOGS.tgz" . 2>/dev/null && mv "$LOGS.tgz" "$OUT/logs.tgz"; }
trap 'pack; exit 143' TERM INT

# phase NAME LIMIT COMMAND...: at most LIMIT seconds, and never past the end of the day.
phase() {
  local name=$1 most=$2 rc start line; shift 2
  case $wanted in *" $name "*) ;; *) return 0 ;; esac
  local left=$((LIMIT - SECONDS))
  if [ "$left" -lt 12 ]; then say "$name: NOT BEGUN, $left s left"; worst=1; return 0; fi
  [ "$most" -gt "$left" ] && most=$left
  start=$SECONDS
  PHASE_SECONDS=$most timeout -k 3 "$most" "$@" > "$LOGS/$name.log" 2>&1 < /dev/null; rc=$?
  line=$(grep -a '^VERDICT' "$LOGS/$name.log" | tail -n 1 | cut -c1-1400)
  [ -n "$line" ] || line="no verdict; its last line: $(grep -av '^ *$' "$LOGS/$name.log" | tail -n 1 | cut -c1-300)"
  case $rc in 124|137) line="TIME IS UP after $most s; $line" ;; esac
  say "$name ($((SECONDS - start)) s, status $rc): ${line#VERDICT: }"
  [ "$rc" -eq 0 ] || worst=1
  pack
}

# Without a GPU there is nothing to find: each phase says so, and nothing is written elsewhere.
reason=$("$PY" -c 'import torch, triton; assert torch.cuda.is_available(), "torch sees no CUDA device"' 2>&1 | tail -n 1)
if [ -n "$reason" ]; then
  for name in $wanted; do say "$name: NOT BEGUN, ${reason#AssertionError: }"; done
  echo "gpu-day: without a GPU there was nothing to do, exit status 3"
  exit 3
fi

# -- What every phase needs

export PYTHONUNBUFFERED=1 PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=4 GOMP_SPINCOUNT=5000
# Triton writes absolute paths into its cache, so a cache that was made elsewhere serves at this very path only.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/idlm-triton-cache}
mkdir -p "$TRITON_CACHE_DIR"
if ! "$PY" -c 'import gguf' 2>/dev/null; then  # wanted for GGUF files alone, which no phase but the tests reads
  wheel=$(ls "$CARRY"/gguf-*.whl 2>/dev/null | head -n 1)
  [ -n "$wheel" ] && export PYTHONPATH=$PYTHONPATH:$wheel  # pure Python: it can stay a wheel
fi
[ -f "$CARRY/triton-cache.tar.xz" ] && tar -C "$TRITON_CACHE_DIR" -xJf "$CARRY/triton-cache.tar.xz" && echo "Triton cache: $(ls "$TRITON_CACHE_DIR" | wc -l) entries carried"
"$PY" -c 'import torch, triton, idlm_kernels.model, bench.gpu_cases, tests.tiny' > "$LOGS/import.log" 2>&1 || { say "IMPORT FAILS: $(tail -n 1 "$LOGS/import.log")"; pack; }

# -- Beside the first phases, on the CPU: the native module and every Triton kernel

CORES=$(nproc)
(
  if "$PY" -c 'import torch, sys; from idlm_kernels import native; native.load()' > "$LOGS/native.log" 2>&1; then
    echo "VERDICT: ok, the carried module loads" >> "$LOGS/native.log"
  elif timeout -k 3 150 "$PY" csrc/build.py --jobs "$CORES" >> "$LOGS/native.log" 2>&1 \
      && "$PY" -c 'import torch; from idlm_kernels import native; native.load(); print("VERDICT: ok,", native.status())' >> "$LOGS/native.log" 2>&1; then :
  else
    echo "VERDICT: NOT BUILT: $(tail -n 1 "$LOGS/native.log")" >> "$LOGS/native.log"
  fi
) & native=$!
claims=$(mktemp -d)
warmers=()
n=$((CORES > 4 ? CORES - 3 : CORES))
for i in $(seq "$n"); do
  OMP_NUM_THREADS=1 timeout -k 3 "${GPU_DAY_PREWARM:-110}" "$PY" -m bench.gpu_prewarm --claims "$claims" --launchers --turn "$i" \
    > "$LOGS/prewarm.$i.log" 2>&1 < /dev/null &
  warmers+=($!)
done

phase facts 70 "$PY" -m bench.gpu_checks facts --seconds 60 --output "$OUT/environment.json"
wait "$native"
say "native: $(grep -a '^VERDICT' "$LOGS/native.log" | tail -n 1 | cut -c10-400)"
grep -qa '^VERDICT: ok' "$LOGS/native.log" || worst=1
wait "${warmers[@]}"
say "Triton: $(cat "$LOGS"/prewarm.*.log | "$PY" -c '
import json, sys
r = [json.loads(x) for x in sys.stdin if x.startswith("{")]
t = lambda k: sum(x[k] for x in r)
failed = sorted({f for x in r for f in x["failed"]})
print(len(r), "workers,", t("compiled"), "compiled,", t("hits"), "from the carried cache,", t("launchers"), "launchers; failed:", failed[:5])')"
rm -rf "$claims"
pack

# -- What only hardware can show

phase selfcheck 90 "$PY" -m bench.gpu_checks selfcheck --seconds 85 --jobs 8
phase rows 110 "$PY" -m bench.gpu_checks rows --seconds 105 --jobs 7
phase probe 60 "$PY" -m bench.gpu_probe  # may instructions of other shapes be used for the same row?
phase tiny 80 "$PY" -m bench.gpu_checks tiny --seconds 75 --jobs 2
phase decoding 120 "$PY" -m bench.gpu_report --parts decoding,adapter --minutes 1.9 --output "$OUT/gpu-decoding"
phase kernels 120 "$PY" -m bench.gpu_report --parts kernels --minutes 1.9 --output "$OUT/gpu-kernels"
limit=$("$PY" -c 'import pytest_timeout; print("--timeout=40")' 2>/dev/null)
tests() {  # the two suites side by side, for they share no process; without what is about nvcc, which needs no GPU
  local pids=() bad=0 x
  for x in triton native; do
    "$PY" -m pytest -q --maxfail=8 -p no:cacheprovider -p no:benchmark -W ignore $limit tests/$x \
      --ignore tests/native/test_compiled.py --ignore tests/native/test_cutlass.py \
      > "$LOGS/tests.$x.log" 2>&1 & pids+=($!)
  done
  for x in "${pids[@]}"; do wait "$x" || bad=1; done
  echo "VERDICT: $(for x in triton native; do
    echo "$x: $(tail -n 1 "$LOGS/tests.$x.log") $(grep -a '^FAILED\|^ERROR\|^SKIPPED SUITE' "$LOGS/tests.$x.log" | cut -c1-160 | head -n 8);"
  done | tr '\n' ' ')"
  return $bad
}
export -f tests; export LOGS PY limit
phase tests 100 bash -c tests
sanitizer() {
  local pids=() names=("memcheck triton strided_attention" "memcheck triton gated_lora_linear" "memcheck triton verify_accept"
    "memcheck cuda verify_accept" "racecheck cuda sample_rows" "racecheck triton advance") bad=0 one
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # so that it knows where a tensor ends
  command -v compute-sanitizer > /dev/null || { echo "VERDICT: no compute-sanitizer here"; return 3; }
  for one in "${names[@]}"; do
    set -- $one
    compute-sanitizer --tool "$1" --target-processes all --error-exitcode 99 --print-limit 20 \
      "$PY" -m bench.gpu_checks one selfcheck "$2" "$3" > "$LOGS/sanitizer.$1.$2.$3.log" 2>&1 & pids+=($!)
  done
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}"; one=$?
    set -- ${names[$i]}
    echo "${names[$i]}: status $one, $(grep -a 'ERROR SUMMARY\|hazard' "$LOGS/sanitizer.$1.$2.$3.log" | tail -n 1)"
    [ "$one" -eq 0 ] || bad=$((bad + 1))
  done
  echo "VERDICT: $([ $bad -eq 0 ] && echo ok || echo "$bad of ${#names[@]} complain")"
  [ $bad -eq 0 ]
}
export -f sanitizer; export HERE LOGS PY
phase sanitizer 90 bash -c sanitizer

pack
# Kept beside the code, and in $OUT, which is all that comes back from a machine that is lent.
"$PY" -m bench.hardware keep "$OUT" || worst=1
echo "===== verdicts"
cat "$OUT/verdicts.txt"
exit $worst
