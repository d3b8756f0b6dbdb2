#!/usr/bin/env bash
# Times the 0.6B, 1.5B and 3B models of gpu_recipes.py on one GPU, without any network.
#
#   benchmarks/gpu.sh OUT [WHEELS] [-- ARGUMENTS OF throughput.py ...]
#
# OUT gets one MODEL.json a model, MODEL.log beside it, and all.jsonl. WHEELS (or the variable of that name) is a folder
# of wheels to install first, into a temporary folder; without it, everything is installed already.
#
#   PYTHON   the Python with JAX for the GPU; python3 by default
#   CARD     80 or 141, for the size of batches; by default what nvidia-smi tells
#   MODELS   which of the three; "0_6b 1_5b 3b" by default
#
# throughput.py needs these beyond JAX and NumPy; it loads no orbax, grain or tokenizers. On a machine with a network, for
# Python 3.12, with the versions in constraints.txt, from the root of the repository:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --constraint constraints.txt --dest wheels \
#     absl-py annotated-types jaxtyping optax pydantic pydantic-core rich typing-extensions typing-inspection
#
# The exit code is 1 if a model could not be timed; the others are timed all the same.
set -euo pipefail

usage() {
	sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
	exit 2
}

[ $# -ge 1 ] && [ "${1:0:1}" != "-" ] || usage
out=$1
shift
wheels=${WHEELS:-}
if [ $# -ge 1 ] && [ "$1" != "--" ]; then
	wheels=$1
	shift
fi
[ "${1:-}" != "--" ] || shift

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$wheels" ]; then
	site=$(mktemp -d)
	trap 'rm -rf "$site"' EXIT
	"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site" "$wheels"/*.whl
	PYTHONPATH="$PYTHONPATH:$site"
fi

if [ -z "${CARD:-}" ]; then
	mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1 || true)
	CARD=$([ "${mib:-0}" -gt 120000 ] && echo 141 || echo 80)
fi
# The default leaves a quarter of the card unused.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

failed=0
: >"$out/all.jsonl"
for model in ${MODELS:-0_6b 1_5b 3b}; do
	recipe="$here/gpu_recipes.py:dense_${model}_${CARD}gb"
	if "$python" "$here/throughput.py" "$recipe" --json "$@" >"$out/$model.json" 2>"$out/$model.log"; then
		cat "$out/$model.json" | tee -a "$out/all.jsonl"
	else
		echo "error: $model failed; the end of $out/$model.log:" >&2
		tail -n 5 "$out/$model.log" >&2
		rm -f "$out/$model.json"
		failed=1
	fi
done
exit $failed
