#!/usr/bin/env bash
# Gathers what bench/gpu/run_all.sh needs on a machine without a network: the sources that the extension embeds, and
# NVIDIA's nvCOMP as a peer. Run it where there is a network, then copy the working tree, build/gpu-kit included.
#
#   bench/gpu/kit.sh [FOLDER]    by default build/gpu-kit, which git ignores; 28 MB
#
# PYTHON names the Python that fetches (3.10 or later, with pip), by default python3. Without nvCOMP the kit is made all
# the same, and the comparison with it is left out.
set -euo pipefail

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit
    ;;
esac
root=$(cd "$(dirname "$0")/../.." && pwd)
kit=${1:-$root/build/gpu-kit}
python=${PYTHON:-python3}

obtain() {  # the path of what third_party/fetch.py fetches
  "$python" "$root/third_party/fetch.py" "$1" --print-path
}

mkdir -p "$kit"
partial=$(mktemp -d "$kit.XXXXXX")
trap 'rm -rf "$partial"' EXIT
zstd=$(obtain zstd)
xxhash=$(obtain xxhash)
mkdir "$partial/zstd"
cp -r "$zstd"/{zstd.h,zstd_errors.h,common,compress,decompress} "$partial/zstd/"
cp -r "$xxhash" "$partial/xxhash"
if nvcomp=$(obtain nvcomp); then
  mkdir "$partial/nvcomp"
  cp "$nvcomp" "$(dirname "$nvcomp")"/../{LICENSE,NOTICE} "$partial/nvcomp/"
else
  echo "kit.sh: goes on without nvCOMP" >&2
fi
rm -rf "$kit"
chmod 755 "$partial"
mv "$partial" "$kit"
trap - EXIT
echo "$kit: $(du -sm --apparent-size "$kit" | cut -f1) MiB"
