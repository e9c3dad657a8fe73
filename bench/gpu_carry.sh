#!/usr/bin/env bash
# Where the code is written, beforehand: what the GPU machine lacks, into .gpu (kept out of git), and, with
# `full`, what saves it a minute: the native module and the compiled kernels for its Python 3.12 and Triton 3.6.0.
#     bash bench/gpu_carry.sh [full]        # seconds; full: about ten minutes and 5 GB in /tmp/gpu312
# Do it again after the last change to a kernel: cache entries go by source, and the module by the hash of csrc.
set -eu
[ -f idlm_kernels/_version.py ] || { echo "run this in the repository root" >&2; exit 2; }
mkdir -p .gpu
python3 -m pip download -q --no-deps -d .gpu "$(grep '^gguf==' constraints.txt)"
[ "${1:-}" = full ] || { ls -la .gpu; exit 0; }
V=/tmp/gpu312
P=$(ls "$HOME"/.pyenv/versions/3.12*/bin/python3.12 2>/dev/null | tail -n 1); P=${P:-python3.12}
[ -x $V/bin/python ] || "$P" -m venv $V
$V/bin/pip install -q torch==2.11.0 triton==3.6.0 numpy 'safetensors<1' 'tokenizers<1' jinja2 typer rich huggingface_hub pybind11 ninja cmake .gpu/gguf-*.whl
$V/bin/python csrc/build.py --build-dir /tmp/gpu312/build > /dev/null
export TRITON_CACHE_DIR=/tmp/idlm-triton-cache PYTHONPATH=. OMP_NUM_THREADS=1  # this very path, there too
if ! ldconfig -p | grep -q libcuda.so.1; then  # the launchers link against it and need nothing of it here
  mkdir -p /tmp/gpu312/stub; echo 'void idlm_stub(void) {}' | gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o /tmp/gpu312/stub/libcuda.so.1 -xc -
  export TRITON_LIBCUDA_PATH=/tmp/gpu312/stub
fi
claims=$(mktemp -d)
for i in $(seq "$(nproc)"); do $V/bin/python -m bench.gpu_prewarm --claims "$claims" --launchers --turn "$i" & done; wait
(cd $TRITON_CACHE_DIR && find . -name '*.cubin' -o -name '*.json' -o -name '*.so' | tar -cJf - -T -) > .gpu/triton-cache.tar.xz
ls -la .gpu idlm_kernels/native/*.so
