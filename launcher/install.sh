#!/usr/bin/env bash
# Installs fulltune and the tested versions of everything it needs: launcher/install.sh .venv/bin/python
# pip is quiet; a line says which step is under way, and the log is shown only when one fails.
set -euo pipefail

python=$1
log="$(dirname "$python")/../install.log"
: >"$log"

step() {
    local what=$1 start=$SECONDS job
    shift
    "$@" >>"$log" 2>&1 &
    job=$!
    if [ -t 1 ]; then
        while kill -0 "$job" 2>/dev/null; do
            printf '\r  %s ... %d s' "$what" $((SECONDS - start))
            sleep 1
        done
    fi
    if ! wait "$job"; then
        printf '\r  %s failed:\n' "$what"
        tail -n 30 "$log"
        exit 1
    fi
    [ ! -t 1 ] || printf '\r'
    printf '  %s: done in %d s\n' "$what" $((SECONDS - start))
}

pip=("$python" -m pip --disable-pip-version-check --no-input)
step "pip" "${pip[@]}" install -q --upgrade pip -c constraints.txt
# torch first: DeepSpeed's own set-up script imports it.
step "torch" "${pip[@]}" install -q torch setuptools wheel ninja py-cpuinfo -c constraints.txt
# DeepSpeed's set-up asks the CUDA toolkit about every operator where torch sees a GPU, and fails if there is no toolkit. Without
# an architecture list it asks for CPUs too. It compiles nothing here, so neither value matters afterwards: a run finds its device.
step "deepspeed" env DS_ACCELERATOR=cpu DS_BUILD_OPS=0 TORCH_CUDA_ARCH_LIST=9.0 "${pip[@]}" \
    install -q --no-build-isolation deepspeed -c constraints.txt
step "fulltune" "${pip[@]}" install -q --no-build-isolation -e '.[dev]' -c constraints.txt
