#!/bin/sh
# Build the wheel, install it into a clean environment, and run the demo from an empty folder.
# PYTHON names an interpreter with the package `build`.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$root/build"  # what an earlier build left there would go into the wheel
"$python" -m build --wheel --outdir "$work/dist" "$root"
"$python" -m venv "$work/venv"
# The demo compiles what it imports: not all of the dependencies.
"$work/venv/bin/python" -m pip --disable-pip-version-check install -q --no-compile \
    -c "$root/constraints.txt" "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/dinocell" demo --out demo_out --device cpu
for file in report.html summary.csv nuclei_labels.tif nuclei_cells.csv nuclei_overlay.png; do
    test -s "demo_out/$file" || { echo "the wheel's demo must write $file" >&2; exit 1; }
done
"$work/venv/bin/python" -c "
import dinocell, dinov3
for package in (dinocell, dinov3):
    assert 'site-packages' in package.__file__, package.__file__
"
echo "the wheel works: $(ls -l "$work"/dist/*.whl | awk '{print $5}') bytes"
