#!/bin/bash
# Make a virtual environment with this checkout and its pinned packages: install.sh cpu|gpu [FOLDER, ~/f2v]
# The machine's own Python packages stay out of it, so every node of a cluster has the same ones.
# TORCH_INDEX names another place than PyTorch's own for the build of torch without CUDA, PYTHON another python3.
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

root=()
[ "$(id -u)" = 0 ] || root=(sudo)
apt() {
    "${root[@]}" apt-get -qq update
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "$@"
}

if [ ! -x "$folder/bin/python" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
        echo "install.sh: Python 3.11 to 3.13 is needed; name one with PYTHON=python3.11" >&2
        exit 1
    }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || apt python3-venv
    "$python" -m venv "$folder"
fi

# Which torch is there: cpu, gpu, or none. One of the other kind has the same version, so pip would leave it.
built() {
    "$folder/bin/python" -c 'import torch; print("gpu" if torch.version.cuda else "cpu")' 2>/dev/null || echo none
}
pip=("$folder/bin/python" -m pip --disable-pip-version-check --quiet)
[ "$(built)" = "$kind" ] || "${pip[@]}" uninstall --yes torch
pip+=(install)
"${pip[@]}" "${index[@]}" "$torch"
[ "$(built)" = "$kind" ] || {
    echo "install.sh: what the index has as $torch for this machine is a build for $(built), not for $kind" >&2
    exit 1
}
"${pip[@]}" --no-deps -r "$checkout/requirements.lock"
"${pip[@]}" --no-deps --editable "$checkout"

# OpenCV wants two libraries that a bare machine lacks.
"$folder/bin/python" -c 'import cv2' 2>/dev/null || apt libgl1 libglib2.0-0
"$folder/bin/python" -c 'import cv2, dlib, obstore, onnxruntime, ray, torch'
