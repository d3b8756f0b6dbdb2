#!/usr/bin/env bash
# Everything that is to be known of Braeburn on one NVIDIA GPU, without any network: is it right, and how fast is it?
#
#   benchmarks/gpu.sh OUT [WHEELS] [-- ARGUMENTS OF throughput.py ...]
#
# OUT gets the files named below, and a summary is printed at the end. WHEELS (or the variable of that name) is a folder
# of wheels to install first, into a temporary folder; without it, everything is installed already.
#
#   PARTS    which of these, in this order; all by default
#              product    gpu_product.py: the rate of one large product                      product.json, .log
#              speed      throughput.py on the models of gpu_recipes.py                      MODEL.json, .log
#                         and the kernels of PROFILED's steps                                kernels.json, profile.xplane.pb
#              torch      gpu_torch.py on TORCH_MODELS, eager and compiled                   torch-MODEL.json, .log
#              kinds      gpu_kinds.py: small runs of every kind against the CPU             kinds.json, .log
#              train      gpu_train.py: whole runs against the CPU, killed, resumed          train.json, .log
#              attention  gpu_attention.py: back ends against float64, and their speed       attention.json, .log
#   SIZE     "toy" runs every part on models so small that all ends within two minutes on a CPU, to see that the scripts
#            work; cuDNN's attention is then lowered for a GPU and not run. The defaults below are those without it
#   TIME     seconds for all parts together, 540 by default: what is left over when they are spent is not run
#   PYTHON   the Python with JAX for the GPU; python3 by default
#   CARD     80 or 141, for the size of batches; by default what nvidia-smi tells
#   MODELS   which of the three; "1_5b 0_6b 3b" by default
#   EIGHT_BITS     which of them with products in fp8; "1_5b_fp8 3b_fp8" by default, to be "" on a GPU without fp8
#   PROFILED which of them to profile; 1_5b by default
#   TORCH_MODELS   which of them with PyTorch; 1_5b by default
#   TORCH_SEQUENCES  the batches to try there, the first that fits is timed; "8 4 2" by default
#   ATTENTION      arguments of gpu_attention.py, such as --check-only
#
# `torch` is left out, and a line says so, where PyTorch or transformers is not installed.
#
# `product` needs JAX alone. `speed` needs these beyond JAX and NumPy; it loads no orbax, grain or tokenizers. `train` and
# `kinds` need all that Braeburn does, `torch` PyTorch and transformers. On a machine with a network, for Python 3.12,
# with the versions in constraints.txt, from the root of the repository:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --constraint constraints.txt --dest wheels \
#     absl-py annotated-types jaxtyping optax pydantic pydantic-core rich typing-extensions typing-inspection
#
# The exit code is 1 if a part failed or found something wrong; the others are run all the same.
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
parts=${PARTS:-product speed torch kinds train attention}
size=${SIZE:-whole}
toy= kinds=() steps= product=
case $size in
whole)
	models=${MODELS:-1_5b 0_6b 3b} profiled=${PROFILED-1_5b} torch_models=${TORCH_MODELS:-1_5b}
	eight_bits=${EIGHT_BITS-1_5b_fp8 3b_fp8}
	;;
toy)
	models=${MODELS:-toy} profiled=${PROFILED-toy} torch_models=${TORCH_MODELS:-tiny}
	eight_bits=${EIGHT_BITS-}
	toy=--toy product="--width 256" steps="--steps 3" kinds=("qwen3, adamw")
	TORCH_SEQUENCES=${TORCH_SEQUENCES:-2} CARD=80
	;;
*)
	echo "error: SIZE is $size; choose whole or toy" >&2
	exit 2
	;;
esac
deadline=$((SECONDS + ${TIME:-540}))
mkdir -p "$out"
export PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ $size = toy ]; then # nearly all of whose time is that of compilers
	export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/programs}
fi
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
# Parts of which several processes use the GPU at once take what they need.
share="env XLA_PYTHON_CLIENT_PREALLOCATE=false"

failed=0
run() { # NAME COMMAND ...: its output is shown, and kept in OUT with its messages
	local name=$1 left=$((deadline - SECONDS)) began=$SECONDS
	shift
	if [ $left -lt 5 ]; then
		echo "error: no time was left for $name; give more with TIME, or fewer PARTS" >&2
		failed=1
		return
	fi
	if ! timeout --kill-after=5 "$left" "$@" 2>"$out/$name.log" | tee "$out/$name.json"; then
		echo "error: $name failed after $((SECONDS - began)) s; the end of $out/$name.log:" >&2
		tail -n 5 "$out/$name.log" >&2
		failed=1
	fi
	echo "-- $name took $((SECONDS - began)) s"
}

for part in $parts; do
	echo "== $part"
	case $part in
	product) run product "$python" "$here/gpu_product.py" $product ;;
	attention) run attention "$python" "$here/gpu_attention.py" $toy ${ATTENTION:-} ;;
	kinds) run kinds $share "$python" "$here/gpu_kinds.py" ${kinds[@]+"${kinds[@]}"} ;;
	train) run train $share "$python" "$here/gpu_train.py" "$work/runs" $toy ;;
	speed)
		for model in $models $eight_bits; do
			profile=$([ "$model" != "$profiled" ] || echo "--profile $work/profile")
			run "$model" "$python" "$here/throughput.py" "$here/gpu_recipes.py:dense_${model}_${CARD}gb" --json \
				$steps $profile "$@"
			if [ -n "$profile" ] && cp "$work"/profile/plugins/profile/*/*.xplane.pb "$out/profile.xplane.pb"; then
				run kernels "$python" "$here/kernels.py" "$out/profile.xplane.pb" --json
			fi
		done
		;;
	torch)
		if ! "$python" -c "import torch, transformers" 2>/dev/null; then
			echo "torch is left out: PyTorch or transformers is not installed" | tee "$out/torch.log"
			continue
		fi
		for model in $torch_models; do
			for compiled in "" --compile; do
				run "torch-$model${compiled:+-compiled}" "$python" "$here/gpu_torch.py" "$model" $compiled $steps \
					--sequences ${TORCH_SEQUENCES:-8 4 2}
			done
		done
		;;
	*)
		echo "error: PARTS has $part; choose from product, speed, torch, kinds, train, attention" >&2
		exit 2
		;;
	esac
done
"$python" "$here/gpu_summary.py" "$out" | tee "$out/summary.txt"
exit $failed
