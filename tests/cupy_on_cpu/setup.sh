#!/usr/bin/env bash
# setup.sh DIR: make a virtual environment in DIR/venv in which the real CuPy runs on the CPU, and
# DIR/env.sh with the variables that it needs.  See README.md beside this file.
# Needs Linux on x86-64, Python's venv and headers, g++.  CUDA's own headers come with pip;
# FAKECUDA_INC names another folder of them.
set -euo pipefail
version=14.2.0
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: setup.sh DIR}"
dir=$(cd "$1" && pwd)
python=$dir/venv/bin/python

[ -x "$python" ] || python3 -m venv "$dir/venv"
"$python" -m pip install -q "cupy-cuda13x==$version" 'nvidia-cuda-runtime==13.0.*' \
  'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-profiler-api==13.0.*' 'nvidia-cuda-cccl==13.0.*' \
  scipy 'Cython>=3.2,<3.3' setuptools
source=$dir/cupy-$version
if [ ! -d "$source" ]; then
  CUPY_INSTALL_USE_STUB=1 "$python" -m pip download -q --no-deps \
    --no-binary cupy -d "$dir" "cupy==$version"
  tar xzf "$source.tar.gz" -C "$dir"
fi

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
cuda=${FAKECUDA_INC:-$site/nvidia/cu13/include}
build=$dir/build
mkdir -p "$build" "$dir/lib"
compile=(g++ -std=c++17 -fPIC -w "-I$cuda" -c)

# The stand-in.
"${compile[@]}" -O3 -march=native "$here/fakelibs.cpp" -o "$build/fakelibs.o" &
libs=$!
"${compile[@]}" -O2 "$here/fakecuda.cpp" -o "$build/fakecuda.o"
wait "$libs"

# CuPy's module with NVIDIA's runtime linked into it, from CuPy's own source.
if [ ! -f "$build/runtime.o" ]; then
  (cd "$source" && "$python" - "$version" <<'P'
from Cython import __version__
from Cython.Build import cythonize
from setuptools import Extension

name = "cupy_backends.cuda.api.runtime"
cythonize(
    [Extension(name, ["cupy_backends/cuda/api/runtime.pyx"], language="c++")],
    language_level=3,
    quiet=True,
    compiler_directives={
        "embedsignature": True,
        "c_api_binop_methods": True,
        "binding": False,
        "warn.deprecated.IF": False,
        "freethreading_compatible": True,
    },
    compile_time_env={
        "CUPY_USE_CUDA_PYTHON": False,
        "CUPY_CUFFT_STATIC": False,
        "CUPY_CYTHON_VERSION": __version__,
        "CUPY_CUDA_VERSION": 13000,
        "CUPY_HIP_VERSION": 0,
    },
)
P
  ) 2> "$build/cython.log" || { cat "$build/cython.log"; exit 1; }
  "${compile[@]}" -O1 "-I$include" "-I$source/cupy_backends" \
    "$source/cupy_backends/cuda/api/runtime.cpp" -o "$build/runtime.o"
fi

# Whatever else CuPy's modules would link to answers that it is not implemented.
nm --defined-only "$build/fakecuda.o" "$build/fakelibs.o" | awk 'NF == 3 {print $3}' |
  sort -u > "$build/defined"
{
  nm --undefined-only "$build/runtime.o" | grep -oE '\bcuda[A-Za-z0-9_]+'
  nm -D --undefined-only "$site"/cupy_backends/cuda/libs/{cublas,curand,cusolver,cusparse}.*.so \
    "$site"/cupy/cuda/cufft*.so | grep -oE '\b(cublas|curand|cusolver|cusparse|cufft)[A-Za-z0-9_]+'
} | sort -u | comm -23 - "$build/defined" | awk '
  BEGIN { print "#include <stdio.h>" }
  { print "int " $1 "() { fprintf(stderr, \"fakecuda: " $1 " is not implemented\\n\"); return 801; }" }
' > "$build/missing.c"
gcc -O1 -fPIC -c "$build/missing.c" -o "$build/missing.o"
g++ -shared "$build"/{fakecuda,fakelibs,missing}.o -ldl -Wl,-soname,libfakecuda.so \
  -o "$dir/lib/libfakecuda.so"
for name in cudart.so.13 cuda.so.1 nvrtc.so.13 cublas.so.13 cublasLt.so.13 curand.so.10 \
  cusolver.so.12 cusparse.so.12 cufft.so.12 nvJitLink.so.13; do
  ln -sf libfakecuda.so "$dir/lib/lib$name"
done
g++ -shared "$build/runtime.o" "-L$dir/lib" -lfakecuda -o "$build/runtime.so"
mv "$build/runtime.so" "$site/cupy_backends/cuda/api/runtime$suffix"

# Kernels that were compiled for other sources are worth nothing.
cat "$here"/{fakecc.py,shim.h,fibers.h} > "$build/translator"
cmp -s "$build/translator" "$dir/cache/translator" || rm -rf "$dir/cache"
mkdir -p "$dir/cache" && mv "$build/translator" "$dir/cache/translator"

cat > "$dir/env.sh" <<X
export LD_LIBRARY_PATH=$dir/lib FAKECUDA_CACHE=$dir/cache
export FAKECUDA_CC="python3 -IS '$here/fakecc.py'"
export FAKECUDA_INC=$cuda CUDA_PATH=$(dirname "$cuda") CUPY_CACHE_IN_MEMORY=1 CUPY_ACCELERATORS=
X
echo "ready: . $dir/env.sh; $python -m pytest --backend cupy"
