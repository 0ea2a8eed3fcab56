#!/usr/bin/env bash
# Hosts on one Linux machine: network, pid, uts and mount namespaces joined by a bridge.
#
# Trains a tiny model on 1, 2 and 4 hosts with both scripts and compares the losses bit by bit, then
# breaks things and says for every case whether what must hold does:
#
#   sudo tests/hosts/two_hosts.sh MODEL_DIR DATA_FILE [CASE ...]     (no case: all of them)
#
# Environment: PYBIN (folder of torchrun and accelerate), WORK (scratch folder, made and removed),
# DEADLINE (seconds in which what is left of a broken run must have ended).
# Needs root, iproute2 and util-linux; no internet, nothing outside the namespaces that it makes. All
# of it, and every process in it (found by namespace), is gone at the end, also after Ctrl-C.
set -u -o pipefail
MODEL=$(realpath "${1:?model folder}"); DATA=$(realpath "${2:?data file}"); shift 2
REPO=$(realpath "$(dirname "$0")/../.."); PYBIN=${PYBIN:-$(dirname "$(command -v torchrun)")}
WORK=${WORK:-$(mktemp -d)}; DEADLINE=${DEADLINE:-75}; ID=mbu$$; NET=10.77.7; PORT=29500
export PATH="$PYBIN:$PATH" OMP_NUM_THREADS=1 PYTHONPATH="$REPO" HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
mkdir -p "$WORK"; FAILED=0; declare -A HOST_PID

# ---- hosts ---------------------------------------------------------------------------------------
make_hosts() {
  ip netns add ${ID}s && ip -n ${ID}s link add br0 type bridge && ip -n ${ID}s link set br0 up || exit 1
  printf '127.0.0.1 localhost\n' >"$WORK/hosts"; for n in 1 2 3 4; do echo "$NET.$n node$n" >>"$WORK/hosts"; done
  for n in 1 2 3 4; do
    # Debian's way: the own name is loopback.
    { printf '127.0.0.1 localhost\n127.0.1.1 node%s\n' $n; grep "node[^$n]$" "$WORK/hosts"; } >"$WORK/hosts-debian-$n"
    ip netns add $ID$n && ip -n $ID$n link add eth0 type veth peer name p$n netns ${ID}s &&
      ip -n ${ID}s link set p$n master br0 up && ip -n $ID$n addr add $NET.$n/24 dev eth0 &&
      ip -n $ID$n link set eth0 up && ip -n $ID$n link set lo up || exit 1
  done
}
kill_host() {  # everything in the network namespace of a host: found by namespace, never by name
  local pids; pids=$(ip netns pids $ID$1 2>/dev/null); [ -z "$pids" ] || kill -9 $pids 2>/dev/null
  [ -z "${HOST_PID[$1]:-}" ] || wait "${HOST_PID[$1]}" 2>/dev/null; }
kill_hosts() { local n; for n in 1 2 3 4; do kill_host $n; done; }
remove_hosts() { local n; kill_hosts; sleep 0.3; for n in 1 2 3 4 s; do ip netns del $ID$n 2>/dev/null; done; }
trap 'remove_hosts; [ -n "${KEEP:-}" ] || rm -rf "$WORK"' EXIT; trap 'exit 130' INT TERM
link() { ip -n ${ID}s link set p$1 "$2"; }

# on HOST LOG [FROM:TO ...] -- COMMAND   starts it; FROM is seen as TO by this host only
on() {
  local n=$1 log=$2 binds="mount --bind ${HOSTS_FILE:-$WORK/hosts} /etc/hosts" pair; shift 2
  while [ "$1" != -- ]; do pair=$1; binds+=" && mount --bind '${pair%%:*}' '${pair##*:}'"; shift; done; shift
  ip netns exec $ID$n unshare --uts --pid --mount --fork --kill-child=KILL --mount-proc bash -c \
    "hostname node$n && $binds && cd '$REPO' && $*; exit \$?" >"$log" 2>&1 &
  HOST_PID[$n]=$!
}
COMMON="--model_name_or_path $MODEL --data_path $DATA --use_megablocks_sharding True --per_device_train_batch_size 2 --learning_rate 1e-3 --seed 1"
without() { sed "s|--$1 [^ ]*||" <<<"$COMMON"; }
# FSDP2 HOST [HOSTS] and FSDP1 HOST [HOSTS]: the command of one host of a run on so many (2)
FSDP2() { local n=${2:-2}; echo "torchrun --nnodes $n --nproc_per_node $((4 / n)) ${LAUNCH:-} --rdzv_backend c10d --rdzv_endpoint $NET.1:$PORT --rdzv_id t train_accelerate_fsdp2.py $COMMON"; }
FSDP1() { local n=${2:-2}; echo "accelerate launch --config_file accelerate.yaml --num_processes 4 --num_machines $n --machine_rank $(($1 - 1)) --main_process_ip ${HEAD:-$NET.1} --main_process_port $PORT train_fsdp1.py $COMMON"; }
alone() { [ $1 = FSDP2 ] && echo "torchrun --standalone --nproc_per_node 4 train_accelerate_fsdp2.py $COMMON" || echo "accelerate launch --config_file accelerate.yaml --num_processes 4 train_fsdp1.py $COMMON"; }
steps() { wc -l 2>/dev/null <"$1/metrics.jsonl" || echo 0; }
wait_steps() { for _ in $(seq 600); do [ "$(steps "$1")" -ge "$2" ] && return 0; sleep 0.5; done; return 1; }
wait_host() { timeout ${2:-300} tail --pid=${HOST_PID[$1]} -f /dev/null; }
wait_gone() {  # hosts whose processes must end within DEADLINE; prints the seconds
  local from=$SECONDS n; while :; do local left=0; for n in $1; do [ -n "$(ranks $n)" ] && left=1; done
    [ $left = 0 ] && break; [ $((SECONDS - from)) -ge $DEADLINE ] && { echo "$DEADLINE+"; return 1; }; sleep 0.5; done; echo $((SECONDS - from)); }
ranks() {  # process ids of the training processes of a host
  local p; for p in $(ip netns pids $ID$1 2>/dev/null); do tr '\0' '\n' 2>/dev/null </proc/$p/environ | grep -q '^LOCAL_RANK=' && [ "$(cut -d' ' -f3 /proc/$p/stat 2>/dev/null)" != Z ] && echo $p; done; }
wait_ranks() { for _ in $(seq 240); do [ -n "$(ranks $1)" ] && return 0; sleep 0.5; done; return 1; }
said() { grep -ohE ".*($1).*" "${@:2}" 2>/dev/null | grep -vE '^ |Traceback|raise |socket|every rank holds' | head -1 | cut -c1-200; }
verdict() { printf '%-34s %-6s %s\n' "$1" "$2" "$3"; [ "$2" = ok ] || FAILED=$((FAILED + 1)); }
worst() { python - "$1" "$2" <<'PY'
import json, sys
a, b = ([json.loads(line) for line in open(f"{d}/metrics.jsonl")] for d in sys.argv[1:])
assert len(a) == len(b) > 0, (len(a), len(b))
print(max(abs(x[k] - y[k]) / abs(y[k]) for x, y in zip(a, b) for k in ("loss", "grad_norm")))
PY
}

# ---- the same on one, two and four hosts ---------------------------------------------------------
case_parity() {
  local kind ep n a b w host; for kind in FSDP2 FSDP1; do for ep in 2 4; do
    a=$WORK/one-$kind-$ep; on 1 "$a.log" -- "$(alone $kind) --ep_size $ep --max_steps 6 --output_dir $a"; wait_host 1
    for n in 2 4; do
      b=$WORK/$n-$kind-$ep
      for host in $(seq $n); do on $host "$b.$host.log" -- "$($kind $host $n) --ep_size $ep --max_steps 6 --output_dir $b"; done
      for host in $(seq $n); do wait_host $host; done; kill_hosts
      w=$(worst "$a" "$b" 2>&1 | tail -1); [ "$w" = 0.0 ] && verdict "parity $kind ep $ep hosts $n" ok "worst $w" || verdict "parity $kind ep $ep hosts $n" FAIL "$w"
    done
  done; done
}
# ---- one axis each, across hosts or within each: the same as on one host -------------------------
_axis() {  # NAME OPTION ...
  local d="$WORK/axis-${1// /-}" n w words="${*:2} --max_steps 4 --ep_size"
  words="$words $([[ $1 == expert_tp* ]] && echo 1 || echo 2)"
  on 1 "$d-one.log" -- "$(alone FSDP2) $words --output_dir $d-one"; wait_host 1
  for n in 1 2; do on $n "$d.$n.log" -- "$(FSDP2 $n) $words --output_dir $d"; done
  for n in 1 2; do wait_host $n; done; kill_hosts
  w=$(worst "$d-one" "$d" 2>&1 | tail -1); [ "$w" = 0.0 ] && verdict "$1" ok "worst $w" || verdict "$1" FAIL "$w"
}
case_slices() { _axis "expert_tp 4 across hosts" --expert_tp_size 4; }
case_tp() { _axis "tp 2 within each host" --tp_size 2; }
case_sp() { _axis "sp 4 across hosts" --sp_size 4; }
case_hsdp() { _axis "a group of HSDP on each host" --dp_replicate_size 2; }
# ---- a run under way that breaks: survivors end in time, and each of their hosts says why ---------
_fault() {  # NAME KIND SURVIVORS ACTION [OPTION ...]
  local d=$WORK/$1-$2 s word rc n words="${*:5}" silent=""; rm -rf "$d" "$d".*
  for n in 1 2; do on $n "$d.$n.log" -- "$($2 $n) --ep_size 4 --max_steps 100000 --save_strategy steps --save_steps 5 --save_total_limit 2 --output_dir $d $words"; done
  wait_steps "$d" 6 || { verdict "$1 $2" FAIL "no steps"; kill_hosts; return; }
  eval "$4"; s=$(wait_gone "$3"); rc=$?; sleep 1; link 1 up; link 2 up; sleep 2
  for n in $3; do word=$(said "was lost:|run hangs:" "$d".$n.log); [ -n "$word" ] || silent+=" $n"; done; kill_hosts
  [ $rc = 0 ] && [ -z "$silent" ] && verdict "$1 $2" ok "$s s: $word" || verdict "$1 $2" FAIL "$s s: ${word:-} silent:$silent"
}
case_link() { for k in FSDP2 FSDP1; do _fault link-down $k "1 2" "link 2 down"; done; }
case_limit() { DEADLINE=40 _fault link-down-15s FSDP2 "1 2" "link 2 down" --lost_rank_timeout_s 15; }
case_host() { for k in FSDP2 FSDP1; do _fault kill-host-2 $k 1 "kill_host 2"; done; }
case_head() { for k in FSDP2 FSDP1 FSDP2 FSDP2 FSDP2; do _fault kill-head $k 2 "kill_host 1"; done; }  # often: a race
case_stop() { _fault stop-rank FSDP2 1 'kill -STOP $(ranks 2 | tail -1)'; }
# ---- hosts that are not alike: both end in time, not with 0, and each says why --------------------
_refused() {  # NAME WHAT LOG1 LOG2 [HOSTS]
  local s rc code=0 words=() word n; wait_ranks 1; s=$(wait_gone "1 2"); rc=$?
  [ $rc = 0 ] && for n in 1 2; do timeout 30 tail --pid=${HOST_PID[$n]} -f /dev/null; wait ${HOST_PID[$n]} && code=$((code + 1)); done; kill_hosts
  for n in 3 4; do word=$(said "$2" "${!n}"); [ -n "$word" ] && words+=("$word"); done
  [ $rc = 0 ] && [ $code = 0 ] && [ ${#words[@]} = 2 ] && verdict "$1" ok "$s s: ${words[0]}" || verdict "$1" FAIL "$s s, hosts that ended with 0: $code; ${words[*]:-nobody says why}"
}
_differ() {  # NAME WHAT KIND WORDS1 WORDS2 [BIND2]: other words, or another file, on host 2
  local d=$WORK/differ-$1 n words bind; for n in 1 2; do
    words=$4; bind=(); [ $n = 2 ] && { words=$5; [ -z "${6:-}" ] || bind=("$6"); }
    on $n "$d.$n.log" ${bind[@]+"${bind[@]}"} -- "$($3 $n) --ep_size 4 --max_steps 4 --output_dir $d $words"; done
  DEADLINE=${DEADLINE_DIFFER:-120} _refused "$1 $3" "$2" "$d.1.log" "$d.2.log"; }
case_data() { tac "$DATA" >"$WORK/data-2"; _differ "other-order" "the data of --data_path" FSDP2 "" "" "$WORK/data-2:$DATA"
  head -n 40 "$DATA" >"$WORK/data-3"; _differ "less-data" "the data of --data_path|data" FSDP1 "" "" "$WORK/data-3:$DATA"; }
case_weights() { cp -r "$MODEL" "$WORK/model-2"; python - "$WORK/model-2" <<'PY'
import sys, glob
from safetensors.torch import load_file, save_file
for path in glob.glob(f"{sys.argv[1]}/*.safetensors"):
    save_file({k: v + 0.01 for k, v in load_file(path).items()}, path, {"format": "pt"})
PY
  _differ "other-weights" "the model of --model_name_or_path" FSDP2 "" "" "$WORK/model-2:$MODEL"; }
case_options() {
  local k; for k in FSDP2 FSDP1; do
    _differ "other-accumulation" "gradient_accumulation_steps" $k "" "--gradient_accumulation_steps 2"
    _differ "other-weight-decay" "weight_decay" $k "--weight_decay 0.1" "--weight_decay 0.2"; done
  _differ "other-logging" "logging_steps" FSDP2 "" "--logging_steps 2"
}
case_steps() { local d=$WORK/steps n; for n in 1 2; do on $n "$d.$n.log" -- "$(FSDP2 $n) --ep_size 4 --max_steps $((n * 3)) --output_dir $d"; done; _refused "other-max-steps FSDP2" "max_steps" "$d.1.log" "$d.2.log"; }
case_versions() {  # another commit of this package, and another transformers, on host 2
  cp -r "$REPO/megablocks_utils" "$WORK/package-2"; echo '# later' >>"$WORK/package-2/errors.py"
  _differ "other-sources" "megablocks_utils sources" FSDP2 "" "" "$WORK/package-2:$REPO/megablocks_utils"
  local info; info=$(python -c "import importlib.metadata as m; print(m.distribution('peft')._path)"); cp -r "$info" "$WORK/info"; sed -i 's/^Version: .*/Version: 0.0.1/' "$WORK/info/METADATA"
  _differ "other-peft" "peft 0.0.1" FSDP1 "" "" "$WORK/info:$info"; }
case_door() {  # one host alone is refused before the processes meet: by its folder, its options, a crash
  local d=$WORK/door n k; for k in 1 2; do mkdir -p "$d-$k"/1 "$d-$k"/2 "$d-$k"/out; mkdir -p "$d-$k/$k/run"; echo '{}' >"$d-$k/$k/run/run.json"
    for n in 1 2; do on $n "$d-$k.$n.log" "$d-$k/$n:$d-$k/out" -- "$(FSDP2 $n) --ep_size 4 --max_steps 4 --output_dir $d-$k/out/run"; done
    _refused "folder refused on host $k" "finished run" "$d-$k.1.log" "$d-$k.2.log"; done
  for k in FSDP2 FSDP1; do _differ "bad-option" "no_such_option" $k "" "--no_such_option 1"; done
  _differ "bad-option-host-1" "no_such_option" FSDP1 "--no_such_option 1" ""
  mkdir -p "$WORK/crash"; echo 'import os
if os.environ.get("LOCAL_RANK"):
    import megablocks_utils.config.entry_points as e
    def parse_args(*a, **k): raise ValueError("a defect on host 2")
    import megablocks_utils.config as c
    c.parse_args = parse_args' >"$WORK/crash/sitecustomize.py"
  local d=$WORK/crashed; on 1 "$d.1.log" -- "$(FSDP2 1) --ep_size 4 --max_steps 4 --output_dir $d"; on 2 "$d.2.log" -- "PYTHONPATH=$WORK/crash:\$PYTHONPATH $(FSDP2 2) --ep_size 4 --max_steps 4 --output_dir $d"
  _refused "crash on host 2 FSDP2" "a defect on host 2" "$d.1.log" "$d.2.log"
}
case_private() {  # each host has a disk of its own behind --output_dir
  local d=$WORK/private n; mkdir -p "$d"/1 "$d"/2 "$d"/out; for n in 1 2; do on $n "$d.$n.log" "$d/$n:$d/out" -- "$(FSDP2 $n) --ep_size 4 --max_steps 6 --save_strategy steps --save_steps 3 --output_dir $d/out/run"; done
  DEADLINE=120 _refused "private output folder" "shared|every host|output_dir" "$d.1.log" "$d.2.log"
}
# ---- names and addresses -------------------------------------------------------------------------
case_debian() {  # the own name is 127.0.1.1, with the head given by address and by name
  local head k d n w; for head in $NET.1 node1; do for k in FSDP1 FSDP2; do d=$WORK/debian-$k-$head
    for n in 1 2; do LAUNCH=""; [ $n = 1 ] && LAUNCH="--rdzv_conf is_host=true"  # torchrun asks the name too
      HOSTS_FILE=$WORK/hosts-debian-$n HEAD=$head on $n "$d.$n.log" -- "$(HEAD=$head LAUNCH=$LAUNCH $k $n | sed "s|endpoint $NET.1|endpoint $head|") --ep_size 4 --max_steps 3 --output_dir $d"; done
    LAUNCH=""; for n in 1 2; do wait_host $n 120; done; kill_hosts
    w=$(said "GLOO_SOCKET_IFNAME" "$d".[12].log); [ "$(steps $d)" = 3 ] && [ -n "$w" ] && verdict "127.0.1.1 $k $head" ok "$w" || verdict "127.0.1.1 $k $head" FAIL "$(steps $d) steps; $(tail -1 $d.1.log | cut -c1-200)"
  done; done
}
case_address() {  # by hand: an address that does not resolve, one where nobody is, a port that is taken
  local hand="WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1" what s rc; for what in "RANK=1 MASTER_ADDR=nowhere.invalid MASTER_PORT=29500" "RANK=1 MASTER_ADDR=$NET.99 MASTER_PORT=29500" "RANK=1 MASTER_ADDR=$NET.1 MASTER_PORT=1" "RANK=0 MASTER_ADDR=$NET.1 MASTER_PORT=0" "RANK=0 MASTER_ADDR=$NET.1 MASTER_PORT=70000" "RANK=x MASTER_ADDR=$NET.1 MASTER_PORT=29500"; do
    s=$SECONDS; on 1 "$WORK/address.log" -- "env $hand $what python train_accelerate_fsdp2.py $COMMON --output_dir $WORK/address"; wait_host 1 90; wait ${HOST_PID[1]}; rc=$?; s=$((SECONDS - s)); kill_hosts
    [ $rc = 2 ] && [ $s -le 40 ] && verdict "$(sed 's/MASTER_//g' <<<$what)" ok "$s s: $(said "MASTER_|RANK" "$WORK/address.log")" || verdict "$what" FAIL "$s s, exit $rc: $(tail -1 "$WORK/address.log" | cut -c1-200)"
  done
}
# ---- elastic: torchrun starts a broken run again -------------------------------------------------
_elastic() {  # NAME NNODES ENV ACTION: after ACTION the run must end with 0, or with a sentence
  local d=$WORK/elastic-$1 n; rm -rf "$d"; ELASTIC="--ep_size 4 --max_steps ${STEPS:-60} --save_strategy steps --save_steps 5 --save_total_limit 3 --resume_from_checkpoint auto --output_dir $d"
  start() { on $1 "$d.$1.${3:-a}.log" -- "$2 $(LAUNCH="--max-restarts 3" FSDP2 1 | sed "s|nnodes 2|nnodes $NODES|") $ELASTIC"; }
  NODES=$2; for n in 1 2; do start $n "$3"; done; wait_steps "$d" 6 || { verdict "elastic $1" FAIL "no steps"; kill_hosts; return; }
  eval "$4"; wait_host 1 ${WAIT:-240}; local done_steps; done_steps=$(steps "$d"); kill_hosts
  local word; word=$(said "was lost:|must|have not come|has not come|ended before" "$d".*.log)
  [ "$done_steps" = ${STEPS:-60} ] && verdict "elastic $1" ok "goes on to its end; ${word:0:100}" || { [ -n "$word" ] && verdict "elastic $1" ok "ended at step $done_steps: $word" || verdict "elastic $1" FAIL "step $done_steps, nobody says why"; }
}
case_elastic() {
  SHARE="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
  _elastic rank-lost 2 "" 'kill -9 $(ranks 2 | tail -1)'
  _elastic host-back 2 "$SHARE" 'kill_host 2; sleep 5; start 2 "$SHARE" b'
  _elastic host-replaced 2 "$SHARE" 'kill_host 2; sleep 5; start 3 "$SHARE" b'
  _elastic host-replaced-shared-store 2 "" 'kill_host 2; sleep 5; start 3 "" b'
  _elastic host-lost-1:2 1:2 "$SHARE" 'kill_host 2'
}
[ "$(id -u)" = 0 ] || { echo "needs root" >&2; exit 2; }
make_hosts
for name in ${@:-parity slices tp sp hsdp link limit host head stop private data weights options steps versions door debian address elastic}; do case_$name; done
echo "$FAILED cases do not hold"; exit $((FAILED > 0))
