#!/usr/bin/env bash
# Everything that is to be known of Braeburn on one NVIDIA GPU, without any network: is it right, and how fast is it?
#
#   benchmarks/gpu.sh OUT [WHEELS] [-- ARGUMENTS OF throughput.py ...]
#
# OUT gets the files named below. WHEELS (or the variable of that name) is a folder of wheels to install first, into a
# temporary folder; without it, everything is installed already.
#
#   PARTS    which of these, in this order; all by default
#              attention  gpu_attention.py: back ends against float64, and their speed       attention.json, .log
#              train      gpu_train.py: whole runs against the CPU, killed, resumed, sampled  train.log
#              speed      throughput.py on the models of gpu_recipes.py                       MODEL.json, .log
#              torch      gpu_torch.py on the same models                                     torch-MODEL.json, .log
#   PYTHON   the Python with JAX for the GPU; python3 by default
#   CARD     80 or 141, for the size of batches; by default what nvidia-smi tells
#   MODELS   which of the three; "0_6b 1_5b 3b" by default
#
# `speed` needs these beyond JAX and NumPy; it loads no orbax, grain or tokenizers. `train` needs all that Braeburn does,
# `torch` PyTorch and transformers. On a machine with a network, for Python 3.12, with the versions in constraints.txt,
# from the root of the repository:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --constraint constraints.txt --dest wheels \
#     absl-py annotated-types jaxtyping optax pydantic pydantic-core rich typing-extensions typing-inspection
#
# The exit code is 1 if a part failed; the others are run all the same.
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
parts=${PARTS:-attention train speed torch}
models=${MODELS:-0_6b 1_5b 3b}
mkdir -p "$out"
export PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -n "$wheels" ]; then
	"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$work/site" \
		"$wheels"/*.whl
	PYTHONPATH="$PYTHONPATH:$work/site"
fi

if [ -z "${CARD:-}" ]; then
	mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1 || true)
	CARD=$([ "${mib:-0}" -gt 120000 ] && echo 141 || echo 80)
fi
# The default leaves a quarter of the card unused.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

failed=0
run() { # NAME COMMAND ...: its output is shown, and kept in OUT with its messages
	local name=$1
	shift
	if ! "$@" 2>"$out/$name.log" | tee "$out/$name.json"; then
		echo "error: $name failed; the end of $out/$name.log:" >&2
		tail -n 5 "$out/$name.log" >&2
		failed=1
	fi
}

for part in $parts; do
	echo "== $part"
	case $part in
	attention) run attention "$python" "$here/gpu_attention.py" ${ATTENTION:-} ;;
	train) run train "$python" "$here/gpu_train.py" "$work/runs" ;;
	speed)
		for model in $models; do
			run "$model" "$python" "$here/throughput.py" "$here/gpu_recipes.py:dense_${model}_${CARD}gb" --json "$@"
		done
		;;
	torch)
		for model in $models; do
			run "torch-$model" "$python" "$here/gpu_torch.py" "$model" ${TORCH:-}
		done
		;;
	*)
		echo "error: PARTS has $part; choose from attention, train, speed, torch" >&2
		exit 2
		;;
	esac
done
exit $failed
