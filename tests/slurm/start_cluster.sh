#!/usr/bin/env bash
# A private SLURM of one node on this machine, for tests: munged, slurmctld and slurmd, as root.
#   apt-get install slurm-wlm munge
#   tests/slurm/start_cluster.sh FOLDER [CPUS]     then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/start_cluster.sh --stop FOLDER
# Everything lies in FOLDER. A node may be given more CPUs than it has: ranks then share them.
set -euo pipefail

stop=""
if [[ ${1:-} == --stop ]]; then
  stop=1
  shift
fi
if [[ $# == 0 || $EUID != 0 ]]; then
  echo "usage, as root: $0 [--stop] FOLDER [CPUS]" >&2
  exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cpus=${2:-2}
node=$(hostname -s)

if [[ -n $stop ]]; then
  for name in slurmd slurmctld munged; do
    [[ ! -f $folder/$name.pid ]] || kill "$(< "$folder/$name.pid")" 2> /dev/null || true
  done
  exit 0
fi
for program in munged slurmctld slurmd; do
  if ! command -v "$program" > /dev/null; then
    echo "$program is not installed: apt-get install slurm-wlm munge" >&2
    exit 2
  fi
done

mkdir -p "$folder/state" "$folder/spool"
chmod 755 "$folder"
[[ -f $folder/munge.key ]] || head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"

port=$((20000 + RANDOM % 10000))
cat > "$folder/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
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
SlurmdParameters=config_overrides
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld -c
slurmd
for ((second = 0; second < 30; second++)); do
  if [[ $(sinfo --noheader --format=%T 2> /dev/null) == idle ]]; then
    echo "export SLURM_CONF=$SLURM_CONF"
    exit 0
  fi
  sleep 1
done
echo "the node did not become idle: see $folder/slurmctld.log and $folder/slurmd.log" >&2
exit 1
