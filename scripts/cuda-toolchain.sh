#!/usr/bin/env bash
# Fills .cuda-toolchain/ with NVIDIA's compiler from pinned packages, so that the feature `cuda` builds on a machine that has
# neither a GPU nor a CUDA installation. Needs pip and a host C++ compiler; about 105 MB of downloads, under NVIDIA's licence.
# cuda/build.rs looks there when neither FLOE_NVCC, nor CUDA_HOME, nor PATH has an nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=.cuda-toolchain
packages=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
)
stamp="${packages[*]}"
if [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ]; then
    echo "$folder is complete"
    exit 0
fi
rm -rf "$folder"
python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --no-compile --target "$folder" "${packages[@]}"
# Wheels do not keep the executable bit.
chmod +x "$folder"/nvidia/cu13/bin/* "$folder"/nvidia/cu13/nvvm/bin/*
"$folder/nvidia/cu13/bin/nvcc" --version
echo "$stamp" >"$folder/stamp"
