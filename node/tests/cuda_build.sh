#!/bin/sh
# Builds the node with its feature `cuda`.
#
# cuda_build.sh check   type checks it; a stand-in for nvcc writes empty kernels, so nothing is fetched. What CI can afford.
# cuda_build.sh wheels  fetches nvcc and CUDA's libraries from PyPI (1.2 GB) to the folder CUDA_WHEELS, .cuda by default, unless they are
#                       there, and prints the environment that a build needs.
# cuda_build.sh build   the same, then a release build of consilium-node with real kernels for CUDA_COMPUTE_CAP, 80 by default.
#
# Further arguments go to cargo.
set -eu
cd "$(dirname "$0")/../.."
action=${1:?check, wheels or build}
shift
export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}"
# The kernels' bindings are those of CUDA 12.2, and this variable would ask for others beside them.
unset CUDARC_CUDA_VERSION

stand_in() {
    folder=$1
    mkdir -p "$folder/bin"
    cat > "$folder/bin/nvcc" <<'NVCC'
#!/bin/sh
# Answers as nvcc 13.0 does and writes empty files where it would write code.
out='' folder=. ptx='' sources=''
while [ $# -gt 0 ]; do
    case $1 in
        --version) echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit ;;
        --list-gpu-code) echo sm_80; exit ;;
        --ptx) ptx=1 ;;
        -o) out=$2; shift ;;
        --output-directory) folder=$2; shift ;;
        *.cu) sources="$sources $1" ;;
    esac
    shift
done
if [ -n "$out" ]; then : > "$out"; fi
if [ -n "$ptx" ]; then for source in $sources; do : > "$folder/$(basename "$source" .cu).ptx"; done; fi
NVCC
    chmod +x "$folder/bin/nvcc"
    mkdir -p "$folder/include"
    : > "$folder/include/cuda.h"
}

wheels() {
    folder=$1
    if [ ! -x "$folder/nvidia/cu13/bin/nvcc" ]; then
        python3 -m venv "$folder/venv"
        "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder" \
            nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
            nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88 nvidia-curand==10.4.0.35 nvidia-cublas==13.0.2.14
    fi
    # The wheels have libraries without the names that linkers look for, and none of the driver's.
    lib=$folder/nvidia/cu13/lib
    for name in cublas cublasLt curand nvrtc cudart; do
        file=$(cd "$lib" && ls "lib$name.so."[0-9]* | head -n 1)
        ln -sf "$file" "$lib/lib$name.so"
    done
    # Without a driver, programs are linked with empty functions of its names.
    if ! ldconfig -p | grep -q 'libcuda\.so '; then
        mkdir -p "$lib/stubs"
        cargo fetch --locked --quiet
        bindings=$(ls "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-0.19.*/src/driver/sys/mod.rs | tail -n 1)
        grep -oE 'fn cu[A-Z][A-Za-z0-9_]*' "$bindings" | sort -u | sed 's/fn \(.*\)/void \1(void) {}/' |
            cc -shared -o "$lib/stubs/libcuda.so" -Wl,-soname,libcuda.so.1 -x c -
    fi
}

case $action in
    check)
        stand_in="$PWD/target/nvcc-stand-in"
        stand_in "$stand_in"
        export CUDA_HOME="$stand_in" PATH="$stand_in/bin:$PATH" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target/cuda-check}"
        exec cargo check -p consilium-node --features cuda --locked "$@"
        ;;
    wheels | build)
        case ${CUDA_WHEELS:=.cuda} in /*) ;; *) CUDA_WHEELS=$PWD/$CUDA_WHEELS ;; esac
        wheels "$CUDA_WHEELS"
        root=$CUDA_WHEELS/nvidia/cu13
        export CUDA_HOME="$root" PATH="$root/bin:$PATH" LIBRARY_PATH="$root/lib:$root/lib/stubs:${LIBRARY_PATH:-}"
        if [ "$action" = wheels ]; then
            printf 'export CUDA_HOME=%s PATH=%s/bin:$PATH LIBRARY_PATH=%s/lib:%s/lib/stubs LD_LIBRARY_PATH=%s/lib\n' \
                "$root" "$root" "$root" "$root" "$root"
            printf 'export CUDA_COMPUTE_CAP=%s\n' "$CUDA_COMPUTE_CAP"
            exit
        fi
        exec cargo build --release -p consilium-node --features cuda --locked "$@"
        ;;
    *)
        echo "cuda_build.sh: $action: expected check, wheels or build" >&2
        exit 2
        ;;
esac
