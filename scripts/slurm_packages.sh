#!/usr/bin/env bash
# Installs Slurm with accounting for the tests, where that is possible; starts no system service.
#
# Where it is not possible (no root, no Debian, no network) it says why and exits with 0: tests/slurm then skips with the reason. Under CI
# a skip would go unseen, so there it exits with 1.
set -euo pipefail
root=${SLURM_PACKAGES_ROOT:-}  # set by the tests of this script only
PATH=$PATH:$root/usr/sbin:$root/sbin
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge slurmdbd slurm-wlm-mysql-plugin mariadb-server)
tries=3

find_lacking() {
    lacking=
    for binary in sbatch slurmctld slurmd slurmdbd mariadbd munged; do
        command -v "$binary" > /dev/null || lacking+=" $binary"
    done
}

give_up() {
    case ${CI:-} in
        "" | 0 | false | False | FALSE) echo "slurm: $1; its tests skip" ; exit 0 ;;
        *) echo "slurm: $1; its tests may not skip under CI (CI=$CI)" >&2 ; exit 1 ;;
    esac
}

find_lacking
[ -n "$lacking" ] || { echo "slurm: installed already"; exit 0; }
[ "$(id -u)" = 0 ] || give_up "lacking$lacking, and not root, so not installing: as root, bash scripts/slurm_packages.sh"
{ [ -e "$root/etc/debian_version" ] && command -v apt-get > /dev/null; } || give_up "lacking$lacking, and no apt-get here"

# 101 means "action forbidden": the packages' scripts then start no daemon. A policy that is there already comes back on every way out.
policy=$root/usr/sbin/policy-rc.d
mark="# of scripts/slurm_packages.sh"
kept=$policy.before-quarry
restore() {
    if [ -e "$kept" ]; then mv -f "$kept" "$policy"; else rm -f "$policy"; fi
}
# One with our mark was left by a run that was killed outright.
if [ -e "$policy" ] && ! grep -qF "$mark" "$policy"; then cp -p "$policy" "$kept"; fi
trap restore EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
printf '#!/bin/sh\n%s\nexit 101\n' "$mark" > "$policy"
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
options=(-q -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 -o Acquire::http::Timeout=30)
for ((try = 1; try <= tries; try++)); do
    # The lists that are there may do. A container has none, old ones name versions that the mirror has no more: then they are fetched.
    if [ $try -gt 1 ]; then
        [ $try = 2 ] || sleep 10
        dpkg --configure -a || true  # a run before may have been killed in the middle of it
        apt-get "${options[@]}" update || continue
    fi
    if apt-get "${options[@]}" install -y --no-install-recommends "${packages[@]}"; then
        find_lacking
        [ -z "$lacking" ] || give_up "apt-get installed ${packages[*]}, but$lacking cannot be found"
        echo "slurm: installed"
        exit 0
    fi
done
give_up "apt-get could not install ${packages[*]} in $tries tries, see its messages above (no network, or a mirror that is down?)"
