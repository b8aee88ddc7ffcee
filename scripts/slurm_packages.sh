#!/usr/bin/env bash
# Installs Slurm with accounting for the tests, where that is possible; starts no system service.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
lacking=
for binary in sbatch slurmctld slurmd slurmdbd mariadbd munged; do
    command -v "$binary" > /dev/null || lacking+=" $binary"
done
[ -n "$lacking" ] || { echo "slurm: installed already"; exit 0; }
[ "$(id -u)" = 0 ] || { echo "slurm: not root, so not installing$lacking; its tests skip"; exit 0; }
{ [ -e /etc/debian_version ] && command -v apt-get > /dev/null; } || { echo "slurm: no apt-get here; its tests skip"; exit 0; }
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
# 101 means "action forbidden": the packages' scripts then start no daemon.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f '$policy EXIT
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod 755 $policy
fi
apt-get update -q
apt-get install -yq --no-install-recommends slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge slurmdbd \
    slurm-wlm-mysql-plugin mariadb-server
