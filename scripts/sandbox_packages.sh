#!/usr/bin/env bash
# Installs bubblewrap, in which rewards run model-written code, for the tests, where that is possible.
set -euo pipefail
lacking=
for binary in bwrap setpriv prlimit; do
    command -v "$binary" > /dev/null || lacking+=" $binary"
done
[ -n "$lacking" ] || { echo "sandbox: installed already"; exit 0; }
[ "$(id -u)" = 0 ] || { echo "sandbox: not root, so not installing$lacking; its tests skip"; exit 0; }
{ [ -e /etc/debian_version ] && command -v apt-get > /dev/null; } || { echo "sandbox: no apt-get here; its tests skip"; exit 0; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -yq --no-install-recommends bubblewrap util-linux
