#!/usr/bin/env bash
# Sets up what is missing, then regenerates every artifact of a profile that is not up to date.
#
#   ./run_all.sh [--profile smoke|cpu|paper] [--only STEM...] [--recompute | --retrain] [--force] [--data DIR]
#                [--device cpu|cuda|cuda:N] [--time-limit SECONDS]
#   ./run_all.sh list [--profile NAME]   name every notebook, with its verdict in a profile
#   ./run_all.sh check [--recompute N]   are the published results what their ledger says, and what today's code computes?
#   ./run_all.sh report                  all artifacts as one static site
#   ./run_all.sh zoo                     the trained networks
#   ./run_all.sh score                   influence of your own data on your own model
#   ./run_all.sh test [ARGS]             linters, types, all tests, every notebook's outputs; ARGS go to pytest
#   ./run_all.sh setup                   only set up; prints the interpreter
# The last option of list, check, report, zoo and score may be --help.
#
#   --profile NAME        smoke (default: no download, no GPU, minutes), cpu (MNIST and CIFAR-10, hours), paper (one GPU)
#   --only STEM...        these notebooks alone, such as sensitivity/fig_layers
#   --recompute           compute anew what other profiles than smoke only draw (says which data it needs, and whence)
#   --retrain             the same on networks that are trained here for it, kept in build/cache/retrained/
#   --force               run again what is unchanged as well
#   --data DIR            folder of the data sets, in torchvision's layout (default: $INFLUENCE_DATA, else a download)
#   --device NAME         cpu, cuda or cuda:N (default: $INFLUENCE_DEVICE, else a GPU where there is one)
#   --time-limit SECONDS  for each notebook
#   --refresh-notebooks   for maintainers: write outputs back into notebooks/, of those that have this profile
#
# Results go to results/PROFILE/ ($INFLUENCE_RESULTS moves results/), logs and executed notebooks to build/. A run that
# was interrupted goes on where it stopped. Exit status: 0 well, 1 something failed, 2 bad usage, 130 interrupted.
# An active environment that meets pyproject.toml is used as it is; else .venv is made here from requirements.lock.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$root/.venv"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# has_everything PYTHON EXTRA...: does it meet pyproject.toml with these extras?
has_everything() { new_enough "$1" && "$1" -P "$root/influence/companion/runner/environment.py" "${@:2}" >/dev/null 2>&1; }

# The environment the reader has activated, or an interpreter on PATH that happens to have everything.
active_python() {
    local candidate
    for candidate in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"}; do
        [ "$candidate" != "$venv/bin/python" ] || continue
        if has_everything "$candidate" "$@"; then printf '%s' "$candidate"; return; fi
    done
    if [ ! -x "$venv/bin/python" ] && has_everything python3 "$@"; then printf 'python3'; fi
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        # The path of the interpreter itself: version managers put scripts in its place.
        if new_enough "$candidate"; then "$candidate" -c 'import sys; print(sys.executable)'; return; fi
    done
    die "no Python >= 3.11 on PATH (tried python3, python3.13, python3.12, python3.11): install one, then run this again"
}

# uv from PATH, else a private copy in build/.
find_uv() {
    local python="$1" private="$root/build/uv"
    if uv --version >/dev/null 2>&1; then printf 'uv'; return; fi
    if ! "$private/bin/uv" --version >/dev/null 2>&1; then
        say "uv is not on PATH: installing a private copy into build/uv"
        rm -rf "$private"
        if "$python" -m venv "$private" >/dev/null 2>&1; then
            "$private/bin/python" -m pip install --quiet --disable-pip-version-check uv >&2 || die "cannot install uv"
        else  # distributions that ship Python without venv
            rm -rf "$private"
            "$python" -m pip install --quiet --disable-pip-version-check --target "$private" uv >&2 ||
                die "cannot install uv: install uv, or Python's venv and pip modules, then run this again"
        fi
    fi
    printf '%s' "$private/bin/uv"
}

set_up_venv() {
    local wanted python uv quiet=--quiet
    wanted="$(cat "$root/requirements.lock" "$root/pyproject.toml" | cksum)"
    if new_enough "$venv/bin/python" && [ "$(cat "$venv/.complete" 2>/dev/null)" = "$wanted" ]; then return; fi
    python="$(find_python)"
    uv="$(find_uv "$python")"
    [ -t 2 ] && quiet=
    # Trust what the system trusts, as pip does: networks with certificates of their own are common.
    if [ -z "${SSL_CERT_FILE:-}" ] && [ -e /etc/ssl/certs/ca-certificates.crt ]; then
        export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
    fi
    say "setting up .venv from requirements.lock (once; PyTorch is a large download)"
    rm -f "$venv/.complete"
    if ! new_enough "$venv/bin/python"; then
        rm -rf "$venv"
        "$uv" venv --quiet --python "$python" "$venv" >&2 || die "cannot create .venv"
    fi
    # shellcheck disable=SC2086  # $quiet is one option or none
    "$uv" pip install $quiet --python "$venv/bin/python" --require-hashes -r "$root/requirements.lock" >&2 ||
        die "cannot install requirements.lock into .venv (see above)"
    "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --editable "$root" >&2 ||
        die "cannot install the package into .venv (see above)"
    printf '%s' "$wanted" >"$venv/.complete"
}

# set_up EXTRA...: leaves the interpreter in $python.
set_up() {
    python="$(active_python "$@")"
    if [ -z "$python" ]; then
        set_up_venv
        python="$venv/bin/python"
        # Without compiled modules every kernel would compile PyTorch anew; in our own folder they are in nobody's way.
        unset PYTHONDONTWRITEBYTECODE
        say "environment: .venv, made from requirements.lock"
    else
        say "environment: $("$python" -c 'import sys; print(sys.prefix)'), as it is"
    fi
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}

run_tests() {
    cd "$root"
    local failed=0
    "$python" -m ruff check . || failed=1
    # Types are checked beside the tests: on a new checkout that takes a minute of one core.
    types_said="$(mktemp)"
    "$python" -m mypy influence >"$types_said" 2>&1 &
    types=$!
    trap 'kill "$types" 2>/dev/null || true; rm -f "$types_said"; exit 130' INT
    # One process on each core, each with one thread: most tensors are small. A file's tests stay in one process: they
    # share what it sets up, and two notebooks that start kernels at once may choose the same port.
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest -n "$(nproc)" --maxprocesses 8 --dist loadfile \
        --no-loadscope-reorder "$@" || failed=1
    wait "$types" || failed=1
    cat "$types_said"
    rm -f "$types_said"
    return "$failed"
}

# Not `python -m`: the first seconds go into importing PyTorch, and Ctrl-C is to be answered in one line there too.
companion() {
    exec "$python" -c '
import sys
try:
    from influence.companion.runner.cli import main
    status = main(sys.argv[1:])
except KeyboardInterrupt:
    print("\ninterrupted: nothing had begun", file=sys.stderr)
    status = 130
sys.exit(status)' "$@"
}

case "${1:-}" in
    -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" ;;
    setup) set_up companion test; printf '%s\n' "$python" ;;
    test) shift; set_up companion test; run_tests "$@" ;;
    list | check | report | zoo | score) set_up companion; companion "$@" ;;
    *) set_up companion; companion run "$@" ;;
esac
