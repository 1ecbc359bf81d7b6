#!/bin/bash
# Make a virtual environment with this checkout and its pinned packages: install.sh cpu|gpu [FOLDER, ~/f2v]
# The machine's own Python packages stay out of it, so every node of a cluster has the same ones.
# TORCH_INDEX names another place than PyTorch's own for the build of torch without CUDA.
set -euo pipefail

torch=torch==2.13.0
kind=${1:?cpu or gpu}
folder=${2:-$HOME/f2v}
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case $kind in
    cpu) index=(--index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}") ;;
    gpu) index=() ;; # what the package index has for Linux is a build with CUDA
    *)
        echo "install.sh: cpu or gpu, not $kind" >&2
        exit 2
        ;;
esac

pip=("$folder/bin/python" -m pip --disable-pip-version-check install --quiet)
[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
"${pip[@]}" "${index[@]}" "$torch"
"${pip[@]}" --no-deps -r "$checkout/requirements.lock"
"${pip[@]}" --no-deps --editable "$checkout"

# OpenCV wants two libraries that a bare machine lacks.
root=()
[ "$(id -u)" = 0 ] || root=(sudo)
"$folder/bin/python" -c 'import cv2' 2>/dev/null || {
    "${root[@]}" apt-get -qq update
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends libgl1 libglib2.0-0
}
"$folder/bin/python" -c 'import cv2, dlib, obstore, onnxruntime, ray, torch'
