#!/usr/bin/env bash
# A private SLURM on this machine, for tests: munged, slurmctld and slurmd, as root.
#   apt-get install slurm-wlm munge iproute2
#   tests/slurm/start_cluster.sh FOLDER [CPUS [NODES]]   then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/start_cluster.sh --stop FOLDER
#   tests/slurm/start_cluster.sh --power-off FOLDER NODE    its network and all that runs there end
#   tests/slurm/start_cluster.sh --power-on FOLDER NODE
# Everything lies in FOLDER. A node may be given more CPUs than it has: ranks then share them. More
# than one node: each has a network namespace, a name and an address of its own, on a bridge.
set -euo pipefail

action=--start
if [[ ${1:-} == --* ]]; then
  action=$1
  shift
fi
if [[ $# == 0 || $EUID != 0 ]]; then
  echo "usage, as root: $0 FOLDER [CPUS [NODES]], or --stop FOLDER, or" \
    "--power-off|--power-on FOLDER NODE" >&2
  exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
bridge=longfold0 network=10.79.0

start_node() {
  # `ip netns exec` would hide the control groups, without which slurmd stops.
  # shellcheck disable=SC2016
  SLURM_CONF=$folder/slurm.conf nsenter --net="/var/run/netns/longfold-$1" \
    unshare --uts --mount sh -c \
    'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; exec slurmd -N "$1"' sh "$1" "$folder"
}

if [[ $action == --power-off ]]; then
  ip link set "lf-$2" down
  ip netns pids "longfold-$2" | xargs --no-run-if-empty kill -KILL
  exit 0
fi
if [[ $action == --power-on ]]; then
  ip link set "lf-$2" up
  start_node "$2"
  exit 0
fi
if [[ $action == --stop ]]; then
  for file in "$folder"/slurmd*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
    [[ ! -f $file ]] || kill "$(< "$file")" 2> /dev/null || true
  done
  if [[ -f $folder/hosts ]]; then
    while read -r _ name; do
      ip netns delete "longfold-$name" 2> /dev/null || true
    done < "$folder/hosts"
    ip link delete "$bridge" 2> /dev/null || true
  fi
  exit 0
fi
for program in munged slurmctld slurmd; do
  if ! command -v "$program" > /dev/null; then
    echo "$program is not installed: apt-get install slurm-wlm munge" >&2
    exit 2
  fi
done

cpus=${2:-2} nodes=${3:-1}
mkdir -p "$folder/state"
chmod 755 "$folder"
[[ -f $folder/munge.key ]] || head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"

port=$((20000 + RANDOM % 10000))
controller=$(hostname -s) address=127.0.0.1
named=("NodeName=$controller NodeAddr=$address CPUs=$cpus RealMemory=1000 State=UNKNOWN")
if ((nodes > 1)); then
  controller=control address=$network.1 named=()
  printf '127.0.0.1 localhost\n%s control\n' "$address" > "$folder/hosts"
  ip link add "$bridge" type bridge
  ip address add "$address/24" dev "$bridge"
  ip link set "$bridge" up
  for ((number = 1; number <= nodes; number++)); do
    name=node$number own=$network.$((10 + number))
    echo "$own $name" >> "$folder/hosts"
    named+=("NodeName=$name NodeAddr=$own CPUs=$cpus RealMemory=1000 State=UNKNOWN")
    ip netns add "longfold-$name"
    ip link add "lf-$name" type veth peer name eth0 netns "longfold-$name"
    ip link set "lf-$name" master "$bridge" up
    ip -netns "longfold-$name" address add "$own/24" dev eth0
    ip -netns "longfold-$name" link set eth0 up
    ip -netns "longfold-$name" link set lo up
  done
fi
cat > "$folder/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$controller($address)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=2
KillWait=10
SlurmdTimeout=30
SlurmdParameters=config_overrides
$(printf '%s\n' "${named[@]}")
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
if ((nodes == 1)); then
  slurmctld -c
  slurmd
else
  unshare --uts sh -c 'hostname control; exec slurmctld -c'
  for ((number = 1; number <= nodes; number++)); do
    start_node "node$number"
  done
fi
for ((second = 0; second < 30; second++)); do
  if [[ $(sinfo --noheader --format='%T %D' 2> /dev/null) == "idle $nodes" ]]; then
    echo "export SLURM_CONF=$SLURM_CONF"
    exit 0
  fi
  sleep 1
done
echo "the nodes did not become idle: see $folder/slurmctld.log and $folder/slurmd-*.log" >&2
exit 1
